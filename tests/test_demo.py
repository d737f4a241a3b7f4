"""The demo goes all the way and reports figures that come from its own data."""

from __future__ import annotations

import json

import pytest
from tiny_models import write_decoder

from clinical_nlp.demo import run_demo
from clinical_nlp.runs import Run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("demo")
    model = str(write_decoder(folder / "model"))
    small = {"institutions": 2, "patients": 12, "dapt_epochs": 0.05, "ner_epochs": 0.05, "n_permutations": 19}
    return run_demo(folder / "out", 3, base_model=model, **small)


def test_every_step_is_measured_with_its_patients_and_notes(made: Run) -> None:
    for step in ("dapt.test.perplexity", "ner.test.f1_strict", "extraction.patient_f1", "drift."):
        entries = [entry for name, entry in made.metrics.items() if name.startswith(step)]
        assert entries, step
        assert all(entry["n_patients"] > 0 and entry["n_notes"] > 0 for entry in entries)


def test_every_note_of_the_export_is_accounted_for(made: Run) -> None:
    counts = made.manifest["extraction"]
    exported = sum(
        len(path.read_text("utf-8").splitlines())
        for name in ("DocumentReference", "DiagnosticReport")
        for path in (made.path / "export").glob(f"{name}*.ndjson")
    )
    assert counts["records"] == counts["done"] + counts["skipped"] + counts["rejected"] == exported


def test_the_page_opens_offline_and_shows_the_figures(made: Run) -> None:
    page = (made.path / "report.html").read_text("utf-8")
    assert "concepts and states of patients, F1" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page


def test_extraction_is_scored_on_patients_that_training_has_not_seen(made: Run) -> None:
    tagger = json.loads((made.path / "adapt" / "ner" / "metrics.json").read_text("utf-8"))
    entry = tagger["test.f1_strict"]
    scored = made.metrics["extraction.patient_f1"]
    assert (scored["n_patients"], scored["n_notes"], scored["part"]) == (entry["n_patients"], entry["n_notes"], "test")
