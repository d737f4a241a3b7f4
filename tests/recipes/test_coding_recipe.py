"""The recipe coding from corpus to proposals: what is coded, what is counted, what is refused."""

from __future__ import annotations

import csv
import json

import pyarrow.parquet as pq
import pytest
from tiny_models import write_decoder, write_encoder

from clinical_nlp.config import load_config
from clinical_nlp.errors import ConfigError, InputError
from clinical_nlp.language.terminology.code_status import load_code_book
from clinical_nlp.notes.corpus import load_corpus
from clinical_nlp.recipes import code, coding
from clinical_nlp.reporting.page import run_report
from clinical_nlp.runs import Run
from clinical_nlp.tasks.coding import Coder

SMALL = {
    "corpus.options": {"institutions": 2, "patients": 40},
    "max_steps": 4,
    "chunk": 64,
    "training.batch_size": 4,
    "baseline_documents": 3,
}


def settings(**options):
    return load_config(coding.CONFIG, None, {**SMALL, **options})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {
        "decoder": str(write_decoder(tmp_path_factory.mktemp("decoder"))),
        "encoder": str(write_encoder(tmp_path_factory.mktemp("encoder"))),
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("coding") / "run"
    return coding.run(settings(base_model=models["encoder"], **{"strategy.name": "full"}), folder)


def test_every_score_has_its_interval_or_its_reason_and_its_patients(finished):
    names = {"micro_f1", "macro_f1", "map", "precision_at_5", "precision_at_8", "precision_at_15", "auc_micro"}
    for prefix in ("test.", "test.baseline_tfidf.", "test.baseline_zero_shot."):
        assert names <= {key.removeprefix(prefix) for key in finished.metrics if key.startswith(prefix)}, prefix
    for name, entry in finished.metrics.items():
        assert entry["n_patients"] > 10, name
        assert entry["low"] is not None or entry["note"], name


def test_proposals_point_into_the_notes_and_doubtful_ones_go_to_review(finished):
    corpus = load_corpus("synthetic_hospitals", institutions=2, patients=40)
    texts = {row["note_id"]: row["text"] for row in corpus.notes.select(["note_id", "text"]).to_pylist()}
    rows = pq.read_table(finished.path / "predictions.parquet").to_pylist()
    assert rows
    for row in rows:
        assert row["evidence"]
        for span in row["evidence"]:
            assert texts[span["note_id"]][span["start"] : span["end"]].strip()
        assert row["review"] == (row["probability"] < 0.8)
    with open(finished.path / "review.csv", encoding="utf-8", newline="") as file:
        review = list(csv.DictReader(file))
    assert len(review) == sum(row["review"] for row in rows) == finished.manifest["predictions"]["to_review"]


def test_the_table_of_codes_accounts_for_every_gold_code(finished):
    with open(finished.path / "codes.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["status"] for row in rows} <= {"valid", "category", "unknown"}
    data = coding.read(finished_config(finished), load_code_book("ICD-10-CM"))
    assert sum(int(row["gold"]) for row in rows) == sum(len(data.codes[row]) for row in data.held_out)
    assert sum(int(row["train"]) for row in rows) == sum(len(data.codes[row]) for row in data.train)


def finished_config(run):
    return coding.CONFIG.model_validate(run.manifest["config"])


def test_the_run_can_be_used_without_the_training_data(finished):
    proposals = Coder.load(finished.path).predict([["Patient has pneumonia and chest pain.", "Fever."], [""]])
    assert len(proposals) == 2


def test_new_notes_are_coded_without_the_training_data(tmp_path, finished):
    from clinical_nlp.corpora.synthetic_hospitals import write_table

    corpus = load_corpus("synthetic_hospitals", institutions=1, patients=6, seed=5)
    write_table(corpus, tmp_path / "export.csv")
    corpus_options = {"corpus.path": str(tmp_path / "export.csv"), "corpus.options": {"format": "table"}}
    config = load_config(code.CONFIG, None, {"model": str(finished.path), **corpus_options})
    run = code.run(config, tmp_path / "codes")
    counts = run.manifest["predictions"]
    encounters = set(corpus.notes["encounter_id"].to_pylist())
    assert counts["encounters"] == len(encounters)
    rows = pq.read_table(run.path / "predictions.parquet").to_pylist()
    assert {row["encounter_id"] for row in rows} <= encounters
    assert len(rows) == counts["proposed"] > 0
    assert all(row["gold"] is None for row in rows)
    texts = {row["note_id"]: row["text"] for row in corpus.notes.select(["note_id", "text"]).to_pylist()}
    assert all(texts[span["note_id"]][span["start"] : span["end"]].strip() for row in rows for span in row["evidence"])
    assert "drafts" in (run.path / "report.html").read_text("utf-8")


def test_code_needs_a_coding_run(tmp_path):
    with pytest.raises(ConfigError, match="--model RUN"):
        code.run(load_config(code.CONFIG, None, {}), tmp_path / "codes")


def test_the_page_names_codes_and_no_note(finished):
    run_report(Run.load(finished.path))
    page = (finished.path / "report.html").read_text("utf-8")
    assert "bag of words" in page
    assert "Code by code" in page
    assert (finished.path / "model_card.md").is_file()
    corpus = load_corpus("synthetic_hospitals", institutions=2, patients=40)
    lines = {line.strip() for text in corpus.notes["text"].to_pylist() for line in text.splitlines() if len(line) > 40}
    assert not any(line in page for line in lines)


def test_qlora_of_a_decoder_is_beside_its_prompted_self(tmp_path, models):
    run = coding.run(settings(base_model=models["decoder"], max_steps=2), tmp_path / "run")
    assert run.metrics["test.baseline_zero_shot.map"]["n_notes"] == 3
    assert run.metrics["test.baseline_few_shot.map"]["n_notes"] == 3
    assert json.loads((run.path / "task.json").read_text("utf-8"))["quantization"] == "nf4"
    assert Coder.load(run.path).predict([["chest pain"]])


def test_encounters_are_coded_from_all_their_notes_in_order(tmp_path):
    data = coding.read(settings(), load_code_book("ICD-10-CM"))
    assert data.unit == "encounter"
    fields = data.corpus.notes.select(["encounter_id", "patient_id", "written_at"]).to_pylist()
    for name, notes, patient in zip(data.names, data.notes, data.patients, strict=True):
        assert {fields[note]["encounter_id"] for note in notes} == {name[1]}
        assert {fields[note]["patient_id"] for note in notes} == {patient}
        dates = [fields[note]["written_at"] for note in notes]
        assert dates == sorted(dates)
    parts = [set(data.train), set(data.development), set(data.held_out)]
    assert not (parts[0] & parts[1]) | (parts[0] & parts[2]) | (parts[1] & parts[2])
    patients = [{data.patients[row] for row in part} for part in parts]
    assert not (patients[0] & patients[2]) | (patients[0] & patients[1])


def test_what_has_no_code_or_no_note_is_counted():
    whole = coding.read(settings(), load_code_book("ICD-10-CM"))
    only = coding.read(settings(note_types=["discharge"]), load_code_book("ICD-10-CM"))
    corpus = whole.corpus
    encounters = len(set(corpus.notes["encounter_id"].to_pylist()))
    assert len(whole.names) + whole.left_out.get("encounters without a code of ICD-10-CM", 0) == encounters
    assert only.left_out["notes of another type"] == sum(
        kind != "discharge" for kind in corpus.notes["note_type"].to_pylist()
    )
    assert sum(only.statuses.values()) + only.left_out["codes of what has no note to read"] == corpus.codes.num_rows


def test_categories_and_own_lists(tmp_path):
    book = load_code_book("ICD-10-CM")
    options = settings(**{"codes.level": "category"})
    data = coding.read(options, book)
    assert all("." not in code for codes in data.codes for code in codes)
    own = tmp_path / "codes.csv"
    own.write_text("id,label\nI50.9,heart failure\nI10,hypertension\nZ99.9,never seen\n", "utf-8")
    config = settings(**{"codes.path": str(own)})
    book = load_code_book("ICD-10-CM", path=str(own))
    data = coding.read(config, book)
    codes = coding.codes_to_learn(config, book, data)
    assert "Z99.9" in codes
    assert data.statuses["unknown"] > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"codes.system": "ICD-9-CM"}, InputError, "has no codes of system 'ICD-9-CM'; it has ICD-10-CM"),
        ({"note_types": ["dischrage"]}, InputError, "no note of corpus"),
        ({"codes.least": 1000}, ConfigError, "smaller codes.least"),
        ({"attention": "causal"}, ConfigError, "is an encoder"),
        ({"split.development": 0.0}, ConfigError, "larger split.development"),
        ({"corpus.name": "mtsamples"}, Exception, "mtsamples"),
    ],
)
def test_what_cannot_work_is_one_clear_error(tmp_path, models, options, error, message, monkeypatch):
    monkeypatch.delenv("CLINICAL_NLP_DATA", raising=False)
    values = {"base_model": models["encoder"], "strategy.name": "lora", "max_steps": 1, "baselines": [], **options}
    if "corpus.name" in options:
        values["corpus.options"] = {}
    with pytest.raises(error, match=message):
        coding.run(settings(**values), tmp_path / "run")
