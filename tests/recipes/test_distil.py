"""The recipe distil: a student of a tagger and of a coder, resumed, refused, and compared on held-out patients."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_models import write_encoder

from clinical_nlp.config import load_config
from clinical_nlp.errors import ConfigError, ModelError, RunError
from clinical_nlp.recipes import coding, dapt, distil, ner
from clinical_nlp.tasks.coding import Coder
from clinical_nlp.tasks.ner import Encoded, NerPredictor

CORPUS = {"corpus.options": {"institutions": 1, "patients": 20}}
STUDENT = {"student.layers": 1, "student.hidden": 32, "student.vocabulary": 400, "max_steps": 3, "timed_notes": 10}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return str(write_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def tagger(tmp_path_factory, encoder):
    values = {**CORPUS, "base_model": encoder, "strategy.name": "full", "max_steps": 3, "baseline_notes": 0}
    return ner.run(load_config(ner.CONFIG, None, values), tmp_path_factory.mktemp("ner") / "run").path


@pytest.fixture(scope="module")
def coder(tmp_path_factory, encoder):
    values = {**CORPUS, "base_model": encoder, "strategy.name": "full", "max_steps": 3, "chunk": 64, "baselines": []}
    values["corpus.options"] = {"institutions": 1, "patients": 40}
    return coding.run(load_config(coding.CONFIG, None, values), tmp_path_factory.mktemp("coding") / "run").path


def settings(run, **options):
    return load_config(distil.CONFIG, None, {**CORPUS, **STUDENT, "teacher": str(run), **options})


def test_a_student_of_a_tagger_is_a_tagger(tmp_path, tagger):
    run = distil.run(settings(tagger), tmp_path / "run")
    assert NerPredictor.load(run.path).task.labels == NerPredictor.load(tagger).task.labels
    assert run.metrics["test.times_faster"]["value"] > 0
    assert run.metrics["test.student_f1"]["value"] == run.metrics["test.f1_strict"]["value"]
    page = (run.path / "report.html").read_text("utf-8")
    assert "What is lost, what is won" in page
    assert "neither has seen" in page
    with np.load(run.path / distil.TEACHER) as said:
        assert all(said[name].dtype.kind in "fi" for name in said.files)  # probabilities and places, no text


def test_a_student_of_a_coder_is_a_coder(tmp_path, coder):
    run = distil.run(settings(coder, **{"corpus.options": {"institutions": 1, "patients": 40}}), tmp_path / "run")
    assert Coder.load(run.path).task.codes == Coder.load(coder).task.codes
    assert {"test.f1_kept", "test.micro_f1", "test.map", "test.times_faster"} <= run.metrics.keys()


def test_a_teacher_of_another_split_may_have_seen_the_patients(tmp_path, tagger, capsys):
    run = distil.run(settings(tagger, seed=1), tmp_path / "run")
    assert "may have learned from patients held out" in capsys.readouterr().err
    assert "neither has seen" not in (run.path / "report.html").read_text("utf-8")


def test_more_notes_are_read_but_none_of_a_held_out_patient(tmp_path, tagger):
    more = {"unlabelled.name": "synthetic_hospitals", "unlabelled.options": {"institutions": 1, "patients": 30}}
    run = distil.run(settings(tagger, **more), tmp_path / "run")
    data = ner.read(settings(tagger).corpus, settings(tagger).split, 0)
    everything = ner.read(
        settings(tagger, **{"corpus.options": {"institutions": 1, "patients": 30}}).corpus, settings(tagger).split, 0
    )
    held_out = {data.patients[row] for part in (data.split.development, data.split.test) for row in part}
    expected = sum(patient not in held_out for patient in everything.patients)
    assert run.manifest["inputs"]["unlabelled_notes"] == expected < len(everything.texts)


def test_a_resumed_run_does_not_ask_the_teacher_again(tmp_path, tagger, monkeypatch):
    def stopped(*_, **__):
        raise RunError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(distil, "train", stopped)
        with pytest.raises(RunError):
            distil.run(settings(tagger), tmp_path / "run")
    monkeypatch.setattr(distil, "labelled", stopped)
    resumed = distil.run(settings(tagger), tmp_path / "run", resume=True)
    monkeypatch.undo()
    whole = distil.run(settings(tagger), tmp_path / "whole")
    for name in ("test.f1_strict", "test.teacher_f1"):
        assert resumed.metrics[name] == whole.metrics[name]


def test_what_the_teacher_said_survives_the_file():
    said = [
        (Encoded([(0, 2), (3, 5)], []), np.array([[-1.0, -2.0], [-3.0, -4.0]], np.float32)),
        (Encoded([], []), np.zeros((0, 2), np.float32)),
        (Encoded([(1, 4)], []), np.array([[-5.0, -6.0]], np.float32)),
    ]
    back = distil.unflattened(distil.flattened(said))
    for (encoded, values), (again, same) in zip(said, back, strict=True):
        assert encoded.word_spans == again.word_spans
        np.testing.assert_array_equal(values, same)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"teacher": ""}, ConfigError, "--teacher RUN"),
        ({"teacher": "nowhere"}, RunError, "not a run directory"),
        ({"strategy.name": "lora"}, ConfigError, "trains in full"),
    ],
)
def test_what_cannot_work_is_one_clear_error(tmp_path, tagger, options, error, message):
    with pytest.raises(error, match=message):
        distil.run(settings(tagger, **options), tmp_path / "run")


def test_a_teacher_must_have_a_task(tmp_path, encoder):
    values = {**CORPUS, "base_model": encoder, "strategy.name": "full", "max_steps": 1, "length": 64}
    teacher = dapt.run(load_config(dapt.CONFIG, None, values), tmp_path / "dapt").path
    assert json.loads((teacher / "task.json").read_text("utf-8"))["task"] == "pretraining"
    with pytest.raises(ModelError, match="needs a ner or a coding run"):
        distil.run(settings(teacher), tmp_path / "run")
