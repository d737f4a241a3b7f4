"""What a reader needs to judge an evaluation: each item from what was recorded, or that it was not and what to do."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pytest

from clinical_nlp.config import Config
from clinical_nlp.errors import InputError, UsageError
from clinical_nlp.notes.corpus import Card, Corpus
from clinical_nlp.notes.schema import PATIENT_SCHEMA, Note, notes_table
from clinical_nlp.reporting.page import page
from clinical_nlp.reporting.tripod import (
    STATED,
    corpus_record,
    counted_decisions,
    decisions,
    judged_run,
    notes_record,
    tripod_section,
)
from clinical_nlp.runs import Run

MARKER = "Zyxwvut"


def corpus(*, phi=True):
    """Thirty patients with two notes each; every third patient's first note says what patient 0's says."""
    notes = []
    for patient in range(30):
        for number in range(2):
            text = f"{MARKER} same" if number == 0 and patient % 3 == 0 else f"{MARKER} {patient} {number}"
            when = None if patient == 4 else datetime(2019 + patient // 15, 1 + patient % 12, 3, tzinfo=UTC)
            notes.append(Note(f"n{patient}-{number}", f"p{patient}", "h", text, "made", written_at=when,
                              note_type="letter" if number else None))  # fmt: skip
    people = [{"patient_id": f"p{p}", "sex": "female" if p % 2 else None, "birth_date": date(1950, 1, 1),
               "death_date": None} for p in range(28)]  # fmt: skip
    card = Card("made", "a made export.", "", "", "", "", "", "", contains_phi=phi)
    return Corpus(notes_table(notes), card, patients=pa.Table.from_pylist(people, schema=PATIENT_SCHEMA))


PARTS = {"train": range(24), "test": range(24, 50), "few": range(50, 56)}


def words(run, results):
    html = page("t", [tripod_section(run, results)])
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html.partition("<main>")[2]))


@pytest.fixture
def run(tmp_path):
    with Run.open(tmp_path / "run", Config(), recipe="made") as made:
        made.note(seed=1)
    return made


def test_the_record_counts_what_is_there():
    made = corpus()
    found = notes_record(made.notes, PARTS, patients=made.patients, trained="train")
    assert [(p["part"], p["n_patients"], p["n_notes"]) for p in found["parts"]] == [
        ("train", 12, 24), ("test", 13, 26), ("few", 3, 6),
    ]  # fmt: skip
    assert (found["parts"][0]["first"], found["parts"][0]["last"]) == ("2019-01", "2019-12")
    assert found["parts"][2]["first"] is None, "months of fewer than 11 patients are not written"
    assert found["n_notes_unused"] == 60 - 56
    missing = {row["what"]: (row["n"], row["of"]) for row in found["missing"]}
    assert missing == {
        "date": (2, 56), "note type": (28, 56), "encounter": (56, 56), "sex": (14, 28), "birth date": (0, 28),
    }  # fmt: skip
    # Copies of the training part: first notes of patients 12, 15, 18, 21, 24 (test) and 27 (few).
    assert found["overlap"] == {"trained": "train", "patients": 0, "copies": 6, "n_notes": 32}
    assert "sex" not in {row["what"] for row in notes_record(made.notes, PARTS)["missing"]}
    shared = notes_record(made.notes, {"train": range(25), "test": range(25, 50)}, trained="train")
    assert shared["overlap"]["patients"] == 1


def test_decisions_are_counted_against_gold():
    gold = np.array([1, 1, 0, 0, 1, 0])
    said = np.array([1, 0, 1, 0, np.nan, np.nan])
    found = decisions("all", gold, said, ["a", "a", "b", "c", "d", "d"])
    counts = {key: found[key] for key in found if key != "where"}
    assert counts == {"true_positives": 1, "false_positives": 1, "true_negatives": 1, "false_negatives": 1,
                      "abstained_positive": 1, "abstained_negative": 1, "n_patients": 4}  # fmt: skip
    counted = counted_decisions("codes", np.array([[2, 3, 5], [1, 1, 1]]), 2)
    assert (counted["true_positives"], counted["false_positives"], counted["false_negatives"]) == (3, 1, 3)
    assert counted["true_negatives"] is None


def test_each_item_is_said_from_the_record(run):
    record = corpus_record(corpus(), PARTS, judged="some/model") | {
        "decisions": [decisions("all", np.array([1, 0]), np.array([1.0, np.nan]), ["a", "b"])],
        "thresholds": ["a code is proposed at 0.5, fixed in advance"],
    }
    results = {"version": 7, "protocol": {"selection": "nothing"}, "record": record}
    record["decided_on"] = "Sure ones only."
    text = words(run, results)
    for said in (
        "Counts of decisions, not of patients. Sure ones only.",
        "2019-01 to 2019-12",
        "fewer than 11 patients",
        "4 notes of the corpus were not used",
        "note type of 28 of 56 notes",
        "0 patients are in the train part and in another; 6 of 32 other notes are word for word in the train part",
        "a code is proposed at 0.5, fixed in advance",
        "Version 7 of suite made",
        "Selection: nothing",
        "The notes are not public (a made export)",
        "Base model: some/model",
        "abstained, outcome there",
    ):
        assert said in text, said
    assert text.count("Not recorded") == len(STATED)
    assert MARKER not in text
    alone = words(run, {"record": {"notes": notes_record(corpus().notes, PARTS)}})
    assert "No table of patients was read" in alone
    opened = words(run, {"record": corpus_record(corpus(phi=False), PARTS)})
    assert "a base model may have read them" in opened
    assert "No pretrained model is used" in opened


def test_nothing_recorded_is_said_to_be_so(run):
    text = words(run, {})
    for said in (
        "intended_use",
        "came without their notes",
        "what trained the model is not known",
        "None: nothing is decided",
    ):
        assert said in text, said
    assert str(run.manifest["packages"]["numpy"]) in text


def test_people_state_what_no_software_knows(run):
    (run.path / "statements.yaml").write_text(
        "intended_use: Coders see the proposals <b>and</b> decide.\n"
        + "".join(f"{key}: It is said here.\n" for key in STATED if key != "intended_use"),
        "utf-8",
    )
    text = words(run, {"record": corpus_record(corpus(), PARTS, judged="some/model")})
    assert "Coders see the proposals &lt;b&gt;and&lt;/b&gt; decide." in text
    assert text.count("It is said here.") == len(STATED) - 1
    assert "Not recorded" not in text
    for wrong, error, match in (
        ("intended_us: x", UsageError, "did you mean 'intended_use'"),
        ("intended_use: 3", UsageError, "must be a sentence"),
        ("- a", InputError, "holds no statements"),
        ("a: [", InputError, "is not YAML"),
    ):
        (run.path / "statements.yaml").write_text(wrong, "utf-8")
        with pytest.raises(error, match=match):
            tripod_section(run, {})


def test_what_a_judged_run_and_those_below_it_have_read(tmp_path):
    for name, below in (("dapt", "hub/encoder"), ("ner", str(tmp_path / "dapt"))):
        with Run.open(tmp_path / name, Config(), recipe=name) as made:
            made.note(inputs={"corpus": f"{name} notes", "n_notes": 5}, base_model={"name": below, "digest": "abc" * 9})
    found = judged_run(tmp_path / "ner")
    assert [(step["recipe"], step["corpus"]) for step in found["steps"]] == [
        ("ner", "ner notes"), ("dapt", "dapt notes"),
    ]  # fmt: skip
    with Run.open(tmp_path / "out", Config(), recipe="made") as out:
        pass
    text = words(out, {"record": {"judged": found}})
    assert "Known: ner on ner notes (5 notes); then below it dapt on dapt notes (5 notes)." in text
    assert "Not recorded (pretraining)" in text
