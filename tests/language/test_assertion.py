import csv
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clinical_nlp.language.assertion as module
from clinical_nlp.language.assertion import assert_spans
from clinical_nlp.notes.schema import EXPERIENCER, MODALITY, PRESENCE, TEMPORALITY, Assertion


def test_example_of_the_design():
    absent, family = assert_spans("No fever. Mother had seizures.", [(3, 8), (21, 29)])
    assert (absent.presence, absent.experiencer) == ("absent", "patient")
    assert absent.cues == (("absent", 0, 2),)
    assert (family.presence, family.experiencer) == ("present", "family")
    assert family.cues == (("family", 10, 16),)


def test_plain_is_the_default():
    assert assert_spans("Fever today.", [(0, 5)]) == [Assertion()]


def test_order_and_overlap_of_spans_do_not_matter():
    text = "No chest pain, but fever."
    spans = [(19, 24), (3, 13), (9, 13)]
    results = assert_spans(text, spans)
    assert [r.presence for r in results] == ["present", "absent", "absent"]
    assert results == [assert_spans(text, [span])[0] for span in spans]


@pytest.mark.parametrize("span", [(3, 3), (-1, 2), (0, 99), (4, 2)])
def test_bad_span(span):
    with pytest.raises(ValueError, match="span"):
        assert_spans("No fever.", [span])


def test_error_holds_no_text():
    with pytest.raises(ValueError) as caught:
        assert_spans("MARKER-TEXT", [(5, 5)])
    assert "MARKER" not in str(caught.value)


def test_cues_file():
    """Every row is a rule that can act: known kind, axis, value, direction, and no phrase twice for one purpose."""
    values = {"presence": PRESENCE, "temporality": TEMPORALITY, "modality": MODALITY, "experiencer": EXPERIENCER}
    seen = set()
    with (Path(module.__file__).parent / "cues.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            assert row["kind"] in ("cue", "pseudo", "end", "class"), row
            if row["kind"] == "cue":
                assert row["value"] in values[row["axis"]], row
                assert row["direction"] in ("forward", "over", "backward", "both"), row
                assert int(row["scope"]) > 0, row
            elif row["kind"] == "pseudo":
                assert row["axis"] in (*values, ""), row  # none: it only hides the end of a scope
            elif row["kind"] == "class":
                assert row["value"].startswith("@"), row
            key = tuple(row.values())
            assert key not in seen, row
            seen.add(key)


PIECES = [
    "no",
    "denies",
    "fever",
    "cough",
    ",",
    "or",
    ".",
    ":",
    "\n",
    "- ",
    "mother",
    "had",
    "possible",
    "(-)",
    "but",
    "if",
]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_text(data):
    text = data.draw(
        st.one_of(st.text(min_size=1, max_size=80), st.lists(st.sampled_from(PIECES), min_size=1).map(" ".join))
    )
    starts = data.draw(st.lists(st.integers(0, len(text) - 1), max_size=5))
    spans = [(start, data.draw(st.integers(start + 1, len(text)))) for start in starts]
    results = assert_spans(text, spans)
    assert len(results) == len(spans)
    for result in results:
        assert result.presence in PRESENCE
        assert result.temporality in TEMPORALITY
        assert result.modality in MODALITY
        assert result.experiencer in EXPERIENCER
        assert all(0 <= start <= end <= len(text) for _, start, end in result.cues)


@pytest.mark.parametrize(
    "unit", ["no fever, cough ", "fever? ", "1. fever\n", "any fever\n", "fever -, ", "if fever . "]
)
def test_time_is_linear(unit):
    """A note without end or without punctuation does not make each span cost the whole note."""
    text = unit * 4000
    spans = [found.span() for found in re.finditer("fever", text)]
    started = time.process_time()
    assert len(assert_spans(text, spans)) == 4000
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("marked", "cue"),
    [
        ("[[No]] *fever*.", "absent"),
        ("*Fever*: [[none]].", "absent"),
        ("*Fever* was [[ruled out]].", "absent"),
        ("Patient's [[mother]] had *asthma*.", "family"),
        ("[[Possible]] *asthma*.", "uncertain"),
        ("Return [[if]] *fever*.", "hypothetical"),
        ("*Dyspnea* [[on exertion]].", "conditional"),
        ("[[FAMILY HISTORY]]: *asthma*", "family"),
        ("Any *fever*? [[No]].", "absent"),
    ],
)
def test_cue_is_where_it_says(marked, cue):
    """`[[...]]` is the evidence within the cue that is returned, `*...*` the span."""
    plain = re.sub(r"\[\[|\]\]|\*", "", marked)
    evidence = re.search(r"\[\[(.*?)\]\]", marked)[1]
    word = re.search(r"\*(.*?)\*", marked)[1]
    start = plain.index(word)
    ((value, first, last),) = assert_spans(plain, [(start, start + len(word))])[0].cues
    assert value == cue
    assert evidence in plain[first:last]


def test_plan_makes_procedures_future_and_leaves_problems():
    text = "PLAN:\n1. Colonoscopy.\n2. Hypertension, continue lisinopril.\nPROCEDURES:\nColonoscopy."
    spans = [found.span() for found in re.finditer("Colonoscopy|Hypertension", text)]
    assert [a.temporality for a in assert_spans(text, spans)] == ["future", "current", "current"]


def test_problem_list_is_not_past():
    text = "PROBLEM LIST:\n1. Gout\nPAST MEDICAL HISTORY:\n1. Gout"
    spans = [found.span() for found in re.finditer("Gout", text)]
    assert [a.temporality for a in assert_spans(text, spans)] == ["current", "historical"]


@pytest.mark.parametrize(
    ("text", "presence"),
    [
        ("Negtaive for fever.", "absent"),
        ("Suspicoius for fever.", "uncertain"),
        ("Compliant with fever diary.", "present"),
        ("Nuclear scan for fever.", "present"),
    ],
)
def test_two_letters_exchanged_in_a_cue(text, presence):
    """A slip of the pen is read; a word of its own that looks like one is not."""
    start = text.index("fever")
    assert assert_spans(text, [(start, start + 5)])[0].presence == presence
