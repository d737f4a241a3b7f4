import random

import pytest

from clinical_nlp.language.terminology import Matcher, load_terminology
from clinical_nlp.language.terminology.spelling import FIELD, SHORTEST, mended


@pytest.fixture(scope="module")
def matcher():
    return Matcher(load_terminology("hpo"))


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("hepatosplenomeagly", "hepatosplenomegaly"),  # two letters changed places
        ("thrombocytopeenia", "thrombocytopenia"),  # one too many
        ("nephrolithiasus", None),  # the ending must be right
        ("hypertension", None),  # a word that is known elsewhere is no slip of hypotension
        ("osteoporsis", "osteoporosis"),  # one missing
    ],
)
def test_one_slip(word, meant):
    known = {"hepatosplenomegaly", "thrombocytopenia", "nephrolithiasis", "hypotension", "osteoporosis"}
    assert mended(word, known) == meant


def test_no_choice_between_two_words():
    assert mended("arthrxsis", {"arthrosis", "arthrisis"}) is None


def test_slips_in_labels_are_found(matcher):
    """One letter lost from the middle of a long word of the field, over the whole terminology."""
    terminology = matcher.terminology
    draw = random.Random(0)
    words = sorted({terminology.label(i) for i in terminology.matchable})
    words = [w for w in words if w.isalpha() and len(w) > SHORTEST + 1 and w.lower().endswith(FIELD)][::3]
    hits = wrong = 0
    for word in words:
        k = draw.randrange(3, len(word) - 3)
        slip = word[:k].lower() + word[k + 1 :].lower()
        meant, said = matcher.exact(word), matcher.exact(f"{slip}")
        hits += said == meant
        wrong += said not in (None, meant)
    assert len(words) > 100
    assert hits / len(words) > 0.8
    assert wrong / len(words) < 0.02


@pytest.mark.parametrize(
    "text", ["irrigation of the hemithorax", "military clothing", "inflated balloon", "thymoglobulin"]
)
def test_real_words_are_left_alone(matcher, text):
    assert matcher.match(text) == []
