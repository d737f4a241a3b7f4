"""The suite `sparsity`: planted losses and gaps are found, others are not, and the page says so."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pytest
from tiny_models import write_encoder

from clinical_nlp.config import load_config
from clinical_nlp.errors import ConfigError
from clinical_nlp.eval import sparsity
from clinical_nlp.eval.sparsity import Book, Scored, cut, span_counts
from clinical_nlp.notes.corpus import Card, Corpus
from clinical_nlp.notes.schema import PATIENT_SCHEMA, Note, notes_table
from clinical_nlp.recipe import execute, find_recipe
from clinical_nlp.recipes import coding, ner
from clinical_nlp.reporting.sparsity_page import sparsity_page
from clinical_nlp.reporting.tripod import tripod_section


def settings(**options):
    return load_config(sparsity.CONFIG, None, {"run": "unused", **options})


def planted(n=120, *, unfair=False):
    """Documents whose code is found where the medications say so; women are read worse where `unfair`."""
    rng = np.random.default_rng(0)
    notes, people, patients, texts, rows = [], [], [], [], []
    for number in range(n):
        sex = "female" if number % 2 else "male"
        drugs = "furosemide" if not (unfair and sex == "female" and rng.random() < 0.5) else "aspirin"
        pages = [f"MEDICATIONS:\n{drugs}\n\nSOCIAL HISTORY:\nLives alone.\n", "FINDINGS:\nClear lungs.\n"]
        if number % 3 == 0:
            pages[0] += "\nALLERGIES:\nNone known.\n"
        rows.append([len(notes), len(notes) + 1])
        for page, kind in zip(pages, ("discharge", "radiology"), strict=True):
            notes.append(Note(f"n{len(notes)}", f"p{number}", "h", page, "test", note_type=kind,
                              written_at=datetime(2020, 5, 1, tzinfo=UTC)))  # fmt: skip
        people.append({"patient_id": f"p{number}", "sex": sex, "birth_date": date(1950 + number % 60, 6, 1),
                       "death_date": None})  # fmt: skip
        patients.append(f"p{number}")
        texts.append(pages)

    def count(texts):
        found = np.array(["furosemide" in "".join(pages) for pages in texts])
        return np.stack([found, found, np.ones(len(texts))], 1).astype(float)

    whole = count(texts)

    def again(kept, places):
        return whole[places], count(cut([texts[place] for place in places], kept))

    corpus = Corpus(notes_table(notes), Card("made", "", "", "", "", "", "", ""),
                    patients=pa.Table.from_pylist(people, schema=PATIENT_SCHEMA))  # fmt: skip
    return Scored("coding", "encounter", "made", corpus, patients, rows, texts, whole, again)


def state_of(book):
    return {f"{one['kind']} {one['name']}": one["state"] for one in book.findings}


def test_the_section_that_carries_the_code_is_named_and_the_others_are_not():
    book = Book(settings(), planted())
    book.take_away()
    found = state_of(book)
    assert found["section medications"] == "worse" or book.numbers["section.medications.loss"]["value"] == 1
    assert book.numbers["section.medications.without"]["value"] == 0
    for name in ("section social_history", "section findings", "section allergies"):
        assert book.numbers[f"{name.replace(' ', '.')}.loss"]["value"] == 0
    assert book.numbers["section.allergies.loss"]["n_patients"] == 40  # only those who have it
    assert book.numbers["note type.discharge.loss"]["value"] == 1
    assert book.numbers["note type.radiology.loss"]["value"] == 0


def test_more_goes_where_more_went_before_and_the_score_falls_with_it():
    book = Book(settings(shares=[0.25, 0.5, 0.75]), planted(200))
    book.take_away()
    losses = [book.numbers[f"share.{share} %.loss"] for share in (25, 50, 75)]
    assert 0.05 < losses[0]["value"] < losses[1]["value"] < losses[2]["value"]
    assert all(loss["low"] > 0.02 for loss in losses)
    assert state_of(book)["share 50 %"] == "worse"
    again = Book(settings(shares=[0.5]), planted(200))
    again.take_away()
    assert again.numbers["share.50 %.loss"]["value"] == losses[1]["value"]


def test_a_group_that_is_read_worse_is_named_and_chance_is_not():
    unfair = Book(settings(columns=["sex", "age"]), planted(200, unfair=True))
    unfair.by_group()
    found = state_of(unfair)
    assert found["group sex female"] == "worse"
    assert found["group sex male"] == "no worse"
    assert unfair.numbers["sex.female"]["n_patients"] == 100
    fair = Book(settings(columns=["sex", "age"]), planted(200))
    fair.by_group()
    assert "worse" not in state_of(fair).values()
    ages = [name for name in fair.numbers if name.startswith("age.") and not name.endswith(".gap")]
    assert {"age.18 to 44", "age.45 to 64"} <= set(ages)


def test_completeness_groups_patients_by_kinds_of_section():
    book = Book(settings(), planted())
    book.by_completeness()
    names = [name for name in book.numbers if name.startswith("completeness.") and name != "completeness.gap"]
    assert len(names) == 2  # three kinds of section, or four
    assert sum(book.numbers[name]["n_patients"] for name in names) == 120


def test_small_groups_are_hidden_and_unknown_columns_are_told():
    scored = planted(30)
    book = Book(settings(columns=["age", "institution"]), scored)
    book.by_group()
    assert any("fewer than 11" in reason for reason in book.missing.values())
    assert book.missing["institution"] == "fewer than two groups to compare"
    people = scored.corpus.patients.to_pylist()
    for number, person in enumerate(people):
        person["sex"] = "female" if number < 5 else "male"
    lopsided = replace(scored, corpus=replace(scored.corpus, patients=pa.Table.from_pylist(people, PATIENT_SCHEMA)))
    book = Book(settings(columns=["sex"]), lopsided)
    book.by_group()
    assert not any(name.startswith("sex") for name in book.numbers), "the gap to five patients would show theirs"
    assert book.missing["sex male"] == "fewer than 11 other patients to compare with"
    with pytest.raises(ConfigError, match="did you mean 'sex'"):
        Book(settings(columns=["sxe"]), scored).by_group()
    with pytest.raises(ConfigError, match="between 0 and 1"):
        execute(find_recipe("sparsity", "eval"), settings(shares=[1.5]), output=None)


def fevers(texts):
    """Tag fevers, but only in notes that say why the patient came; and the word after each cut-off "no"."""
    found = []
    for text in texts:
        spans = [(at, at + 5, "problem") for at in range(len(text)) if text.startswith("fever", at)]
        spans += [(at, at + 8, "problem") for at in range(len(text)) if text.startswith("no\ncough", at)]
        found.append(sorted(spans) if "REASON" in text else [])
    return found


def test_spans_are_scored_where_they_are_left_before_and_after():
    text = "REASON: fever.\nPLAN: rest, no\nMORE: fever\ncough and fever"
    gold = [(8, 13, "problem"), (36, 41, "problem"), (52, 57, "problem"), (42, 47, "problem")]
    assert [text[a:b] for a, b, _ in gold] == ["fever", "fever", "fever", "cough"]
    again = span_counts([text, text], [gold, gold], ("problem",), fevers)
    whole = (0, len(text))
    before, after = again([[[whole]], [[whole]]], [0, 1])
    assert before.tolist() == after.tolist() == [[3, 3, 4]] * 2
    without_reason = [[(15, len(text))]]
    before, after = again([without_reason], [1])
    assert before.tolist() == [[2, 2, 3]]  # the fever of the first section counts on neither side
    assert after.tolist() == [[0, 0, 3]]
    without_more = [[(0, 30), (42, len(text))]]
    before, after = again([without_more], [0])
    assert before.tolist() == [[2, 2, 3]]
    assert after.tolist() == [[2, 3, 3]]  # what is read across the cut is nobody's, and wrong
    before, after = again([[[]]], [0])
    assert before.tolist() == after.tolist() == [[0, 0, 0]]


def test_a_span_finds_its_way_back_over_every_cut():
    text = "abcdefghijklmnop"
    kept = [(2, 5), (8, 10), (12, 16)]
    left = "".join(text[a:b] for a, b in kept)
    for start in range(len(left)):
        for end in range(start + 1, len(left) + 1):
            a, b, _ = sparsity._placed((start, end, "x"), kept)
            assert (text[a], text[b - 1]) == (left[start], left[end - 1])


def test_a_tagging_run_reads_the_rest_of_a_note_without_a_section(tmp_path):
    values = {
        "corpus.options": {"institutions": 2, "patients": 45, "notes_per_patient": [1, 1]},
        "base_model": str(write_encoder(tmp_path / "encoder")),
        "strategy.name": "full",
        "max_steps": 5,
        "window": 128,
        "overlap": 16,
        "baseline_notes": 0,
        "split.test": 0.5,
    }
    tagged = ner.run(load_config(ner.CONFIG, None, values), tmp_path / "tagged")
    run = execute(find_recipe("sparsity", "eval"), settings(run=str(tagged.path), shares=[0.5]), output=tmp_path / "o")
    found = json.loads((run.path / "results.json").read_text("utf-8"))
    sections = [one for one in found["findings"] if one["kind"] == "section"]
    assert sections
    assert "share.50 %.loss" in found["numbers"]
    for one in sections:
        entry = found["numbers"][one["number"]]
        assert "the spans in what is left" in entry["protocol"]
        assert entry["low"] is not None or entry["note"]
    assert not [one for one in found["findings"] if one["kind"] == "note type"]
    assert "the same spans before and after" in (run.path / "report.html").read_text("utf-8")


def test_a_coding_run_from_the_command_on(tmp_path):
    values = {
        "corpus.options": {"institutions": 2, "patients": 60},
        "base_model": str(write_encoder(tmp_path / "encoder")),
        "strategy.name": "full",
        "max_steps": 4,
        "chunk": 64,
        "max_tokens": 256,
        "training.batch_size": 4,
        "baselines": [],
    }
    coded = coding.run(load_config(coding.CONFIG, None, values), tmp_path / "coded")
    config = settings(run=str(coded.path), shares=[0.5])
    run = execute(find_recipe("sparsity", "eval"), config, output=tmp_path / "out")
    found = json.loads((run.path / "results.json").read_text("utf-8"))
    scored, recorded = found["numbers"]["whole"]["value"], coded.metrics["test.micro_f1"]["value"]
    assert scored == pytest.approx(recorded, abs=1e-6)  # the same patients, the same threshold
    assert "share.50 %.loss" in found["numbers"]
    assert any(name.startswith("section.") for name in found["numbers"])
    for name, entry in found["numbers"].items():
        assert entry["low"] is not None or entry["note"], name
    html = (run.path / "report.html").read_text("utf-8")
    assert "What is shown" in html
    record = found["record"]
    parts = {part["part"]: part["n_patients"] for part in record["notes"]["parts"]}
    assert parts["test"] == found["protocol"]["n_patients"]
    assert record["notes"]["overlap"]["patients"] == 0
    made = record["decisions"][0]
    right, said = made["true_positives"], made["true_positives"] + made["false_positives"]
    f1 = 2 * right / (said + right + made["false_negatives"])
    assert f1 == pytest.approx(scored, abs=1e-6)
    assert "Known: coding on synthetic_hospitals" in html
    assert sparsity_page(found, tripod_section(run, found)) == html
