import csv
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinical_nlp.language.measurements import find_measurements
from clinical_nlp.language.mentions import Annotator
from clinical_nlp.language.terminology import load_terminology

with Path(__file__).with_name("measurement_cases.csv").open(encoding="utf-8", newline="") as file:
    CASES = list(csv.DictReader(file))


@pytest.fixture(scope="module")
def hpo():
    return load_terminology("hpo")


def test_cases_are_many_and_mixed():
    assert len(CASES) >= 200
    assert len({case["kind"] for case in CASES}) >= 8
    assert sum(not case["concepts"] for case in CASES) >= 80


@pytest.mark.parametrize("case", CASES, ids=[case["text"][:40] for case in CASES])
def test_concepts_of_a_value(hpo, case):
    age = float(case["age_years"]) if case["age_years"] else None
    found = find_measurements(case["text"], hpo, age_years=age, sex=case["sex"] or None)
    assert {hpo.label(m.concept_id) for m in found if m.concept_id} == set(filter(None, case["concepts"].split(";")))


def test_places_and_reasons(hpo):
    text = "Na 128 -> 138. Keep K > 4. Hgb 12.5 g/dL."
    assert [(text[m.start : m.end], m.concept_id, m.reason) for m in find_measurements(text, hpo)] == [
        ("Na 128", "HP:0002902", "value"),
        ("138", None, "normal"),
        ("K > 4", None, "goal"),
        ("Hgb 12.5 g/dL", None, "group"),
    ]


def test_nothing_outside_the_terminology(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("id,label\nA,Pain\n")
    assert [m for m in find_measurements("Na 128", load_terminology(str(path))) if m.concept_id] == []


def test_an_option_of_the_annotator():
    text = "Labs: Na 128. Family history: mother with Na 120."
    assert [m.text for m in Annotator("hpo").annotate(text)] == []
    annotator = pickle.loads(pickle.dumps(Annotator("hpo", measurements=True)))
    first, *rest = annotator.annotate(text)
    assert (first.text, first.concept_id, first.lane, first.assertion.presence) == (
        "Na 128",
        "HP:0002902",
        "measurement",
        "present",
    )
    assert all(mention.assertion.experiencer == "family" for mention in rest)


def test_age_and_sex_from_the_patient_table():
    annotator = Annotator("hpo", measurements=True)
    assert annotator.annotate("Hgb 12.5 g/dL") == []
    assert [m.concept_id for m in annotator.annotate("Hgb 12.5 g/dL", age_years=40, sex="M")] == ["HP:0001903"]
    assert annotator.annotate("Hgb 12.5 g/dL", age_years=40, sex="F") == []


WORDS = [
    "Na",
    "K",
    "BP",
    "128",
    "->",
    "3.1",
    "120/80",
    "goal",
    "<",
    "mmol/L",
    "(",
    ")",
    "5-year-old",
    "percentile",
    "\n",
    "%",
]


@given(st.one_of(st.text(max_size=80), st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join)))
def test_any_text(hpo, text):
    for m in find_measurements(text, hpo):
        assert 0 <= m.start < m.end <= len(text)
        assert m.concept_id is None or m.concept_id in hpo.matchable
