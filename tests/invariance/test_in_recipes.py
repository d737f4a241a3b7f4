"""Objectives from a config: recipes train with them, what they save does without, and what is wrong is told early."""

from __future__ import annotations

import pytest

from clinical_nlp.config import load_config
from clinical_nlp.errors import ConfigError, TooFewPatientsError
from clinical_nlp.recipes import coding, ner
from clinical_nlp.tasks.coding import Coder
from clinical_nlp.tasks.ner import NerPredictor

SMALL = {
    "corpus.options": {"institutions": 3, "patients": 14, "notes_per_patient": [1, 1]},
    "training.batch_size": 8,
    "max_steps": 3,
}
TARGET = {"name": "synthetic_hospitals", "options": {"institutions": 4, "patients": 4, "notes_per_patient": [1, 1]}}


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "dann", "target": TARGET},
        {"name": "cdan", "level": "token"},
        {"name": "group_dro"},
        {"name": "mcd", "level": "token", "target": TARGET},
        {"name": "self_training", "target": TARGET},
    ],
    ids=lambda objective: objective["name"],
)
def test_ner_trains_with_an_objective_and_tags_without_it(tmp_path, objective):
    options = {**SMALL, "baseline_notes": 0, "objective": objective}
    run = ner.run(load_config(ner.CONFIG, None, options), tmp_path / "run")
    names = ["hospital-1", "hospital-2", "hospital-3", *(["hospital-4"] if "target" in objective else [])]
    assert run.manifest["objective"] == {"name": objective["name"], "between": names}
    assert not [name for name in run.metrics if "nan" in name]
    tagger = NerPredictor.load(run.path)  # neither the discriminator nor the other institutions are needed
    assert isinstance(tagger.predict(["No fever today."]), list)


@pytest.mark.parametrize("name", ["cdan", "irm", "mcd", "self_training"])
def test_coding_trains_with_an_objective_and_codes_without_it(tmp_path, name):
    options = {**SMALL, "baselines": [], "objective": {"name": name}, "chunk": 128, "max_tokens": 256}
    if name != "irm":
        options["objective"]["target"] = TARGET
    run = coding.run(load_config(coding.CONFIG, None, options), tmp_path / "run")
    assert run.manifest["objective"]["name"] == name
    assert Coder.load(run.path).predict([["No fever today."]])


def test_one_training_institution_is_refused_before_anything_is_trained(tmp_path):
    options = {
        **SMALL,
        "corpus.options": {"institutions": 2, "patients": 14, "notes_per_patient": [1, 1]},
        "split": {"name": "institution", "test_institutions": ["hospital-2"]},
        "baseline_notes": 0,
        "objective.name": "irm",
    }
    with pytest.raises(TooFewPatientsError, match=r"the training part has 1 \('hospital-1'\)"):
        ner.run(load_config(ner.CONFIG, None, options), tmp_path / "run")


def test_what_does_not_go_together_is_refused_before_the_notes_are_read(tmp_path):
    options = {"objective.name": "dann", "strategy": "head", "corpus.name": "ncbi_disease"}
    with pytest.raises(ConfigError, match="strategy 'head' leaves it"):
        ner.run(load_config(ner.CONFIG, None, options), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"objective\.name"):
        load_config(ner.CONFIG, None, {"objective.name": "dan"})
