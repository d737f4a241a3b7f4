"""Scores of an extraction against gold that is known exactly."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clinical_nlp.errors import InputError, RunError
from clinical_nlp.eval.extraction import score
from clinical_nlp.extraction import extract
from clinical_nlp.notes.corpus import Card, Corpus
from clinical_nlp.notes.schema import SPAN_SCHEMA, Note, notes_table

OBO = """format-version: 1.2
data-version: hp/releases/2025-01-16

[Term]
id: HP:0000118
name: Phenotypic abnormality

[Term]
id: HP:0001945
name: Fever
is_a: HP:0000118

[Term]
id: HP:0012735
name: Cough
is_a: HP:0000118
"""
CARD = Card("tiny", "made here", "none", "none", "25 patients", "a name", "a number", "nowhere")
AXES = ("presence", "temporality", "modality", "experiencer")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """25 patients with one note each: "Fever. No cough." or, for every fifth, "Cough."."""
    folder = tmp_path_factory.mktemp("scored")
    (folder / "hp.obo").write_text(OBO)
    notes = notes_table(
        Note(f"n{k:02}", f"p{k:02}", "A", "Cough." if k % 5 == 0 else "Fever. No cough.", f"x:{k}") for k in range(25)
    )
    pq.write_table(notes, folder / "notes.parquet")
    extract(
        folder / "notes.parquet",
        format="table",
        institution_from="institution",
        terminology=folder / "hp.obo",
        output=folder / "out",
    )
    return folder, notes


def gold(notes, change=lambda row: [row]):
    rows = []
    for note in notes.to_pylist():
        for concept, word in (("HP:0001945", "Fever"), ("HP:0012735", "ough")):
            start = note["text"].find(word)
            if start >= 0:
                start -= word == "ough"
                end = start + 5
                denied = "No cough" in note["text"] and word == "ough"
                rows += change(
                    {
                        "institution": "A",
                        "note_id": note["note_id"],
                        "start": start,
                        "end": end,
                        "text": note["text"][start:end],
                        "label": "problem",
                        "hpo_id": concept,
                        "presence": "absent" if denied else "present",
                        "temporality": "current",
                        "modality": "actual",
                        "experiencer": "patient",
                    }
                )
    return Corpus(notes, CARD, spans=pa.Table.from_pylist(rows, schema=SPAN_SCHEMA))


def test_gold_that_equals_the_output_scores_one(setting):
    folder, notes = setting
    results = score(folder / "out", gold(notes))
    assert {name: estimate.value for name, estimate in results.items()} == dict.fromkeys(results, 1.0)
    assert {estimate.n_patients for estimate in results.values()} == {25}
    assert set(results) == {
        *(
            f"{kind}_{name}"
            for kind in ("mention_exact", "mention_overlap", "patient")
            for name in ("precision", "recall", "f1")
        ),
        *(f"{axis}_accuracy" for axis in AXES),
    }


def test_errors_are_counted_where_they_belong(setting):
    folder, notes = setting

    def change(row):
        if row["note_id"] == "n01" and row["text"] == "Fever":
            return []  # Found, and not in gold.
        if row["note_id"] == "n02" and row["text"] == "Fever":
            return [{**row, "end": row["end"] + 1}]  # Overlap, not exact.
        if row["note_id"] == "n03" and row["text"] == "Fever":
            return [{**row, "hpo_id": "HP:0012735"}]  # Another concept, which is then both affirmed and denied.
        if row["note_id"] == "n04" and row["text"] == "cough":
            return [{**row, "presence": "uncertain"}]  # Another state.
        if row["note_id"] == "n05":
            return [row, {**row, "start": 0, "end": 1}]  # Missed; one found span cannot pay for two of gold.
        return [row]

    results = score(folder / "out", gold(notes, change))
    found, wanted = 45, 45 - 1 + 1
    assert results["mention_exact_precision"].value == pytest.approx((found - 3) / found)
    assert results["mention_exact_recall"].value == pytest.approx((wanted - 3) / wanted)
    assert results["mention_overlap_precision"].value == pytest.approx((found - 2) / found)
    assert results["presence_accuracy"].value == pytest.approx(42 / 43)
    assert results["temporality_accuracy"].value == 1.0
    # n01 loses one state; n03 has fever and an excluded cough found, a present cough in gold; n04 differs in one.
    assert results["patient_precision"].value == pytest.approx((45 - 1 - 2 - 1) / 45)
    assert results["patient_recall"].value == pytest.approx((45 - 1 - 2 - 1) / (45 - 1 - 1))
    assert results["mention_exact_f1"].low < results["mention_exact_f1"].value < results["mention_exact_f1"].high


def test_the_seed_moves_the_interval_and_nothing_else(setting):
    folder, notes = setting
    corpus = gold(notes, lambda row: [] if int(row["note_id"][1:]) % 3 == 1 and row["text"] == "Fever" else [row])
    first, again, other = (score(folder / "out", corpus, seed=seed) for seed in (0, 0, 1))
    assert str(first) == str(again)
    assert [estimate.value for estimate in first.values()] == [estimate.value for estimate in other.values()]
    assert str(first) != str(other)


def test_names_of_an_export_find_back_to_the_corpus(setting, tmp_path):
    folder, notes = setting
    renamed = notes.set_column(
        notes.schema.get_field_index("note_id"),
        "note_id",
        pa.array([f"DocumentReference/{name}" for name in notes["note_id"].to_pylist()]),
    ).drop(["institution"])
    pq.write_table(renamed, tmp_path / "notes.parquet")
    extract(
        tmp_path / "notes.parquet",
        format="table",
        institution="elsewhere",
        terminology=folder / "hp.obo",
        output=tmp_path / "out",
    )
    results = score(tmp_path / "out", gold(notes))
    assert {estimate.value for estimate in results.values()} == {1.0}


def test_what_cannot_be_scored_is_said(setting, tmp_path):
    folder, notes = setting
    with pytest.raises(InputError, match="no gold spans"):
        score(folder / "out", Corpus(notes, CARD))
    with pytest.raises(RunError):
        score(tmp_path, gold(notes))
    other = notes_table([Note("elsewhere", "p", "A", "Fever.", "x:1")])
    with pytest.raises(InputError, match="none of the notes"):
        score(folder / "out", gold(other))
    empty = gold(notes, lambda row: [])
    assert math.isnan(score(folder / "out", empty)["mention_exact_recall"].value)
