"""The patient rule, as a table of cases, and its invariants."""

from collections import Counter
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_nlp.extraction.patients import (
    LIFELONG,
    STATES,
    evidence_kind,
    lifelong_concepts,
    patient_rows,
    patient_states,
    propagate_states,
)
from clinical_nlp.language.terminology import load_terminology

FEVER = "HP:0001945"
SEIZURE = "HP:0001250"
FOCAL = "HP:0007359"  # Focal-onset seizure, below Seizure
NERVOUS = "HP:0000707"  # Abnormality of the nervous system, above Seizure
CLEFT = "HP:0000175"  # Cleft palate, lifelong


@pytest.fixture(scope="module")
def hpo():
    return load_terminology("hpo")


AXES = {
    "affirmed": ("present", "current", "actual", "patient"),
    "past": ("present", "historical", "actual", "patient"),
    "denied": ("absent", "current", "actual", "patient"),
    "denied_past": ("absent", "historical", "actual", "patient"),
    "maybe": ("uncertain", "current", "actual", "patient"),
    "family": ("present", "historical", "actual", "family"),
    "family_denied": ("absent", "current", "actual", "family"),
    "other": ("present", "current", "actual", "other"),
    "if": ("present", "current", "conditional", "patient"),
    "watch_for": ("present", "future", "hypothetical", "patient"),
    "planned": ("present", "future", "actual", "patient"),
    "general": ("present", "current", "generic", "patient"),
}
KIND = {
    "affirmed": "affirmed",
    "past": "affirmed",
    "denied": "denied",
    "denied_past": "denied",
    "maybe": "uncertain",
    "family": "family",
}

CASES = [
    ("one affirmation", [(FEVER, "affirmed")], {FEVER: "present"}),
    ("history counts as present", [(FEVER, "past")], {FEVER: "present"}),
    ("one denial", [(FEVER, "denied")], {FEVER: "excluded"}),
    ("a resolved fever stays present", [(FEVER, "affirmed"), (FEVER, "denied")], {FEVER: "present"}),
    ("denied first, there later", [(FEVER, "denied"), (FEVER, "affirmed")], {FEVER: "present"}),
    ("a cleft palate does not come and go", [(CLEFT, "affirmed"), (CLEFT, "denied")], {CLEFT: "conflicting"}),
    (
        "denied above, affirmed below: the denial is in conflict",
        [(NERVOUS, "denied"), (FOCAL, "affirmed")],
        {NERVOUS: "conflicting", FOCAL: "present"},
    ),
    (
        "denied below says nothing above",
        [(SEIZURE, "affirmed"), (FOCAL, "denied")],
        {SEIZURE: "present", FOCAL: "excluded"},
    ),
    (
        "an uncertain finding below does not contest a denial above",
        [(SEIZURE, "denied"), (FOCAL, "maybe")],
        {SEIZURE: "excluded", FOCAL: "uncertain"},
    ),
    (
        "the family below does not contest a denial above",
        [(SEIZURE, "denied"), (FOCAL, "family")],
        {SEIZURE: "excluded", FOCAL: "family_only"},
    ),
    ("only a suspicion", [(FEVER, "maybe")], {FEVER: "uncertain"}),
    ("a suspicion that was confirmed", [(FEVER, "maybe"), (FEVER, "affirmed")], {FEVER: "present"}),
    ("a suspicion that was ruled out", [(FEVER, "maybe"), (FEVER, "denied")], {FEVER: "excluded"}),
    ("only the mother", [(SEIZURE, "family")], {SEIZURE: "family_only"}),
    ("the mother, and denied of the patient", [(SEIZURE, "family"), (SEIZURE, "denied")], {SEIZURE: "excluded"}),
    ("the mother, and suspected", [(SEIZURE, "family"), (SEIZURE, "maybe")], {SEIZURE: "uncertain"}),
    *(
        (f"{name} is no evidence", [(FEVER, name)], {})
        for name in ("family_denied", "other", "if", "watch_for", "planned", "general")
    ),
    ("a concept of the user's own", [("LOCAL:1", "affirmed"), ("LOCAL:1", "denied")], {"LOCAL:1": "present"}),
]


@pytest.mark.parametrize(("mentions", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_states(mentions, expected, hpo):
    evidence: dict[str, Counter] = {}
    for concept, name in mentions:
        if (kind := evidence_kind(*AXES[name])) is not None:
            evidence.setdefault(concept, Counter())[kind] += 1
    assert patient_states(evidence, hpo) == expected


@pytest.mark.parametrize("name", AXES)
def test_evidence_kinds(name):
    assert evidence_kind(*AXES[name]) == KIND.get(name)


def test_lifelong_ids_are_live_and_say_what_the_comment_says(hpo):
    assert all(hpo.resolve(concept) == concept for concept in LIFELONG)
    lifelong = lifelong_concepts(hpo)
    assert CLEFT in lifelong
    assert FEVER not in lifelong
    assert hpo.label("HP:0000202") == "Orofacial cleft"


def mention(concept, name, *, note="n1", day=1, start=0, copied=None):
    presence, temporality, modality, experiencer = AXES[name]
    return {
        "institution": "A",
        "note_id": note,
        "written_at": None if day is None else datetime(2020, 1, day, tzinfo=UTC),
        "start": start,
        "end": start + 5,
        "concept_id": concept,
        "concept_label": "a label",
        "presence": presence,
        "temporality": temporality,
        "modality": modality,
        "experiencer": experiencer,
        "copied_from": copied,
    }


def test_dates_are_those_of_the_state_and_all_evidence_is_kept(hpo):
    rows = patient_rows(
        "p",
        [
            mention(FEVER, "denied", note="n1", day=1),
            mention(FEVER, "affirmed", note="n2", day=2),
            mention(FEVER, "affirmed", note="n3", day=5, copied="n2"),
            mention(FEVER, "denied", note="n4", day=9),
            mention(FEVER, "affirmed", note="n5", day=None),
        ],
        hpo,
    )
    (row,) = rows
    assert row["state"] == "present"
    assert (row["first_documented"].day, row["last_documented"].day) == (2, 5)
    assert [item["kind"] for item in row["evidence"]] == ["denied", "affirmed", "affirmed", "denied", "affirmed"]
    assert (row["n_mentions"], row["n_notes"], row["n_copied"], row["n_denied"]) == (5, 5, 1, 2)


def test_retired_ids_are_one_concept_with_their_successor(hpo):
    retired = next(old for old, new in sorted(hpo.retired.items()) if new in hpo)
    successor = hpo.resolve(retired)
    rows = patient_rows("p", [mention(retired, "affirmed"), mention(successor, "affirmed", note="n2")], hpo)
    assert [(row["concept_id"], row["n_notes"]) for row in rows] == [(successor, 2)]


def test_propagation_goes_up_for_presence_and_down_for_exclusion(hpo):
    rows = {
        row["concept_id"]: row
        for row in patient_rows("p", [mention(FOCAL, "affirmed", day=3), mention(FEVER, "denied")], hpo, propagate=True)
    }
    assert rows[SEIZURE]["state"] == rows[NERVOUS]["state"] == "present"
    assert rows[SEIZURE]["propagated_from"] == [FOCAL]
    assert rows[SEIZURE]["first_documented"].day == 3
    assert rows[SEIZURE]["n_mentions"] == 0
    below_fever = hpo.descendants(FEVER)
    assert below_fever
    assert all(rows[concept]["state"] == "excluded" for concept in below_fever)
    assert "HP:0000118" not in rows
    assert "HP:0000001" not in rows


POOL = [FEVER, SEIZURE, FOCAL, NERVOUS, CLEFT, "HP:0000202", "HP:0012638"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(POOL), st.sampled_from(sorted(AXES))), max_size=15))
def test_invariants(mentions):
    hpo = load_terminology("hpo")
    rows = patient_rows("p", [mention(concept, name) for concept, name in mentions], hpo, propagate=True)
    states = {row["concept_id"]: row["state"] for row in rows}
    assert set(states.values()) <= set(STATES)
    assert [row["concept_id"] for row in rows] == sorted(states)
    for concept, state in states.items():
        if state == "present":
            # What is present has nothing excluded above it, so no output contradicts itself.
            assert not any(states.get(above) == "excluded" for above in hpo.ancestors(concept))
    reversed_rows = patient_rows(
        "p", [mention(concept, name) for concept, name in reversed(mentions)], hpo, propagate=True
    )
    assert {row["concept_id"]: row["state"] for row in reversed_rows} == states
    plain = {row["concept_id"]: row["state"] for row in rows if not row["propagated_from"]}
    assert propagate_states(plain, hpo).keys() == {row["concept_id"] for row in rows if row["propagated_from"]} | {
        concept for concept in propagate_states(plain, hpo) if concept in plain
    }


def test_mentions_of_another_patient_are_refused():
    import pyarrow as pa

    from clinical_nlp.errors import RunError
    from clinical_nlp.extraction.gathering import Found, Gatherer, Person
    from clinical_nlp.extraction.plan import ExtractionConfig
    from clinical_nlp.language.terminology import load_terminology
    from clinical_nlp.notes.schema import Patient

    row = {
        "institution": "a", "patient_id": "1", "note_id": "n", "written_at": None, "start": 0, "end": 5,
        "concept_id": "HP:0001945", "concept_label": "Fever", "presence": "present", "temporality": "current",
        "modality": "actual", "experiencer": "patient", "copied_from": None,
    }  # fmt: skip
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist([row])
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    mentions = sink.getvalue().to_pybytes()
    gatherer = Gatherer(ExtractionConfig(source="x", format="table"), load_terminology("hpo"))

    def gathered(scope, patient_id, count=1):
        return gatherer.gather(
            Found([Person(scope, Patient(patient_id, None, None, None), None, count, with_packet=True)], mentions)
        )

    assert gathered("a", "1").rows.column("concept_id").to_pylist() == ["HP:0001945"]
    for scope, patient_id, count in (("a", "2", 1), ("b", "1", 1), ("a", "1", 2)):
        with pytest.raises(RunError, match="do not match"):
            gathered(scope, patient_id, count)
