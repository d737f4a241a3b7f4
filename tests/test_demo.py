"""The demo goes all the way, on a small scale and with a small model, and reports figures from its own data."""

from __future__ import annotations

import json

import pytest
from tiny_models import write_decoder

from clinical_nlp.demo import run_demo
from clinical_nlp.errors import RunError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    model = str(write_decoder(folder / "model"))
    small = {"patients": 12, "dapt_epochs": 0.1, "ner_epochs": 0.1, "n_permutations": 19}
    return folder / "out", run_demo(folder / "out", 3, base_model=model, **small)


def test_every_step_is_measured_with_its_patients_and_notes(made):
    _, measured = made
    for step in ("dapt.test.perplexity", "ner.test.f1_strict", "patient_f1", "drift."):
        estimates = [estimate for name, estimate in measured.items() if name.startswith(step)]
        assert estimates, step
        assert all(estimate.n_patients > 0 and estimate.n_notes > 0 for estimate in estimates)


def test_every_note_of_the_export_is_accounted_for(made):
    output, _ = made
    counts = json.loads((output / "run" / "manifest.json").read_text("utf-8"))["extraction"]
    exported = sum(
        len(path.read_text("utf-8").splitlines())
        for name in ("DocumentReference", "DiagnosticReport")
        for path in (output / "export").glob(f"{name}*.ndjson")
    )
    assert counts["records"] == counts["done"] + counts["skipped"] + counts["rejected"] == exported


def test_extraction_is_scored_on_the_patients_that_no_training_step_has_read(made):
    _, measured = made
    tagged, scored, read = (measured[name] for name in ("ner.test.f1_strict", "patient_f1", "dapt.test.perplexity"))
    assert (scored.n_patients, scored.n_notes, scored.part) == (tagged.n_patients, tagged.n_notes, "test")
    assert read.n_patients == tagged.n_patients


def test_the_page_opens_offline_and_shows_the_figures(made):
    output, measured = made
    page = (output / "report.html").read_text("utf-8")
    assert "Patients: HPO id and state, F1" in page
    assert f"{measured['ner.test.f1_lenient'].n_patients}" in page
    assert 'src="http' not in page
    assert "<script" not in page


def test_a_folder_that_holds_something_is_refused(made):
    output, _ = made
    with pytest.raises(RunError, match="not empty"):
        run_demo(output)
