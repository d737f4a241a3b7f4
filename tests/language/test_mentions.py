import pickle
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_nlp.language.mentions import Annotator


@pytest.fixture(scope="module")
def annotator():
    return Annotator("hpo")


NOTE = """CHIEF COMPLAINT: fever

Family History:
Mother had seizures.

Allergies:
none

PHYSICAL EXAM:
No edema. Possible ataxia.
"""


def test_annotate(annotator):
    found = {m.text: m for m in annotator.annotate(NOTE)}
    assert list(found) == ["fever", "seizures", "edema", "ataxia"]  # the header Allergies is no allergy
    assert all(NOTE[m.start : m.end] == m.text for m in found.values())
    assert {m.section for m in found.values()} == {"chief_complaint", "family_history", "physical_exam"}
    assert found["seizures"].assertion.experiencer == "family"
    assert found["edema"].assertion.presence == "absent"
    assert found["ataxia"].assertion.presence == "uncertain"
    assert {m.lane for m in found.values()} == {"dictionary"}
    assert {m.label for m in found.values()} == {"phenotype"}


def test_extra_spans(annotator):
    text = "No fever, zebra gait, seizures."
    spans = [(3, 8, "SYMPTOM", 0.4), (9, 20, "SIGN", 0.6), (2, 3, "SPACE", 1.0)]
    found = annotator.annotate(text, spans)
    assert [(m.text, m.label, m.lane, m.concept_id) for m in found] == [
        ("fever", "SYMPTOM", "both", "HP:0001945"),
        ("zebra gait", "SIGN", "model", None),
        ("seizures", "phenotype", "dictionary", "HP:0001250"),
    ]
    assert found[0].score == 1.0
    assert found[1].assertion.presence == "absent"
    assert annotator.annotate(text, spans + spans) == found


@pytest.mark.parametrize("span", [(0, 0, "X", 1.0), (3, 90, "X", 1.0), (-1, 2, "X", 1.0)])
def test_bad_extra_span(annotator, span):
    with pytest.raises(ValueError, match="outside"):
        annotator.annotate("No fever.", [span])


def test_no_header_no_section(annotator):
    assert annotator.annotate("Fever.")[0].section is None


def test_pickle(annotator):
    packed = pickle.dumps(annotator)
    assert len(packed) < 500  # the name, not the index
    assert pickle.loads(packed).annotate(NOTE) == annotator.annotate(NOTE)


def test_ids_are_of_the_terminology(annotator):
    assert all(m.concept_id in annotator.terminology for m in annotator.annotate(NOTE))


PIECES = [
    "No",
    "fever",
    "seizures",
    "Family History:",
    "\n",
    "\n\n",
    "- ",
    ".",
    ",",
    "ASD",
    "possible",
    "mother",
    "é",
    "\u202e",
    "\x00",
]


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(st.text(max_size=200), st.lists(st.sampled_from(PIECES), max_size=40).map(" ".join)), st.integers(0, 50)
)
def test_any_text(annotator, text, at):
    for m in annotator.annotate(text, [(at, at + 7, "X", 0.5)] if at + 7 <= len(text) else []):
        assert m.text == text[m.start : m.end]
        assert m.text == m.text.strip() != ""
        assert all(0 <= start <= end <= len(text) for _, start, end in m.assertion.cues)


@pytest.mark.parametrize("unit", ["no fever and possible seizures have ", "- fever\n", "NO FEVER, ", "fever: no "])
def test_time_is_linear(annotator, unit):
    started = time.process_time()
    annotator.annotate(unit * 2_000)
    assert time.process_time() - started < 20


def test_a_linked_span_takes_the_place_of_what_is_less_specific_inside_it():
    annotator = Annotator("hpo")
    text = "No intrascleral schwannoma was seen."
    assert [m.concept_id for m in annotator.annotate(text)] == ["HP:0100008"]
    found = annotator.annotate(text, [(3, 26, "phenotype", 0.87, "HP:0100011")])
    assert [(m.text, m.concept_id, m.lane, m.score) for m in found] == [
        ("intrascleral schwannoma", "HP:0100011", "model", 0.87)
    ]
    assert found[0].assertion.presence == "absent"
    # What is linked to something else stands beside it.
    both = annotator.annotate(text, [(3, 26, "phenotype", 0.87, "HP:0000518")])
    assert {(m.concept_id, m.lane) for m in both} == {("HP:0000518", "model"), ("HP:0100008", "dictionary")}


def test_a_linked_span_is_no_header():
    text = "ALLERGIES: none\nHe sneezes."
    linked = (0, 9, "phenotype", 0.9, "HP:0012393")
    assert all(m.start != 0 for m in Annotator("hpo").annotate(text, [linked]))
