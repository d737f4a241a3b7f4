"""Spans that a linker looks at."""

import pytest

from clinical_nlp.language.terminology import Match, Matcher, load_terminology
from clinical_nlp.language.terminology.candidates import Candidate, Lexicon, candidates, content, spelled, worth_a_look

HPO = load_terminology("hpo")
MATCHER = Matcher(HPO)


@pytest.fixture(scope="module")
def lexicon():
    return Lexicon(HPO)


def phrases(text, matches=()):
    return [text[c.start : c.end] for c in candidates(text, matches)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("There were bursts of laughter.", ["bursts of laughter", "bursts", "laughter"]),
        ("Torn medial meniscus, feeding by tube", ["Torn medial meniscus", "feeding by tube", "feeding", "tube"]),
        ("No torn\n\nmeniscus", ["torn", "meniscus"]),
        ("torn\nmeniscus", ["torn\nmeniscus"]),
        ("The heart was normal", ["heart"]),
        ("vitamin 12 level", ["vitamin 12 level"]),
        ("", []),
    ],
)
def test_a_phrase_ends_at_closed_words_marks_and_blank_lines(text, expected):
    assert sorted(phrases(text)) == sorted(expected)


def test_offsets_are_code_points_of_the_unchanged_text():
    text = "\u05e9 \U0001f9e0 torn e\u0301xostosis\u2009rim"
    assert all(spelled(text[c.start : c.end]) for c in candidates(text, ()))
    assert any("torn" in phrase for phrase in phrases(text))


def test_what_the_dictionary_matched_is_left_alone_and_what_holds_a_match_says_so():
    text = "intrascleral schwannoma was seen"
    start = text.index("schwannoma")
    match = Match(start, start + len("schwannoma"), "HP:0100008", 1.0)
    assert list(candidates(text, [match])) == [Candidate(0, start + len("schwannoma"), ("HP:0100008",))]
    cut = Match(0, 5, "HP:0100008", 1.0)
    assert list(candidates("intra scleral", [cut])) == [Candidate(0, 13, ("HP:0100008",))]
    assert list(candidates("torn meniscus", [Match(0, 13, "HP:0100008", 1.0)])) == []


def test_a_span_has_to_share_what_tells_with_a_name(lexicon):
    assert worth_a_look("lost consciousness", lexicon)
    assert worth_a_look("happy disposition", lexicon)
    assert not worth_a_look("laughter", lexicon)  # one word is the dictionary's business
    assert not worth_a_look("abnormal invoice", lexicon)
    assert not worth_a_look("insurance card", lexicon)


def test_nearness_is_the_dice_coefficient_of_weighed_words(lexicon):
    words = content("conspicuously happy disposition")
    assert lexicon.nearness(words) == pytest.approx(1.0)
    fewer = content("happy disposition")
    shared = lexicon.weight(fewer)
    assert lexicon.nearness(fewer) == pytest.approx(2 * shared / (shared + lexicon.weight(words)))
    assert lexicon.nearness(fewer) == lexicon.nearness(fewer)  # nothing is left behind by a look


def test_only_what_is_under_the_first_root_is_linked_to(lexicon):
    wide = Lexicon(load_terminology("hpo_wide"))
    assert wide.names == lexicon.names
    assert {concept_id for concept_id, _, _ in wide.names} <= HPO.matchable
