"""The slow tier of `cross_institution`: a base model fine-tuned by every method, on the patients of the fast one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from tiny_models import write_decoder, write_encoder

from clinical_nlp.config import load_config
from clinical_nlp.errors import ClinicalNlpError, ConfigError, RunError, TooFewPatientsError
from clinical_nlp.eval import cross_institution
from clinical_nlp.eval._feature_training import agreed_labels
from clinical_nlp.eval._fine_tuning import FineTuner, FineTuningConfig, Texts
from clinical_nlp.eval.cross_institution import Bench, read_notes
from clinical_nlp.invariance.objectives import ObjectiveConfig, Unlabelled
from clinical_nlp.notes.corpus import load_corpus


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return str(write_encoder(tmp_path_factory.mktemp("encoder")))


def texts(count, *, institutions=("a", "b"), seed=0):
    """Notes that say fever or cough; the label is whether they say fever."""
    random = np.random.default_rng(seed)
    label = random.integers(0, 2, count)
    said = [f"{random.choice(['Today', 'Now', 'Still'])} {'fever' if one else 'cough'}." for one in label]
    where = np.array([institutions[row % len(institutions)] for row in range(count)])
    return Texts(said, where, np.array([f"p{seed}-{row}" for row in range(count)]), label)


def tuner(folder, base, *, resume=False, **settings):
    options = {"strategy": "full", "max_tokens": 32, "training": {"batch_size": 8, "epochs": 2}, **settings}
    return FineTuner(load_config(FineTuningConfig, None, {"base_model": base, **options}), folder, resume=resume)


def test_it_learns_what_notes_say(tmp_path, encoder):
    test = texts(40, seed=9)
    training = {"batch_size": 8, "epochs": 12, "learning_rate": 1e-3}
    found = tuner(tmp_path, encoder, training=training).scores("erm", 1, texts(64), test)
    assert roc_auc_score(test.label, found) > 0.95


def test_weight_0_is_erm_bit_for_bit_and_a_weight_is_not(tmp_path, encoder):
    fine, notes, test = tuner(tmp_path, encoder), texts(24), texts(6, seed=3)
    erm = fine.scores("erm", 1, notes, test)
    nothing = ObjectiveConfig(name="dann", weight=0.0)
    assert np.array_equal(fine.scores("nothing", 1, notes, test, objective=nothing), erm)
    asked = ObjectiveConfig(name="coral", weight=10.0)
    assert not np.array_equal(fine.scores("coral", 1, notes, test, objective=asked), erm)


def test_what_is_done_is_not_done_again_and_the_same_seed_gives_the_same_scores(tmp_path, encoder):
    notes, test = texts(16), texts(5, seed=2)
    first = tuner(tmp_path / "one", encoder)
    found = first.scores("erm", 4, notes, test)
    again = tuner(tmp_path / "one", encoder, resume=True)
    assert np.array_equal(again.scores("erm", 4, notes, test), found)
    assert (first.n_trainings, again.n_trainings) == (1, 0)
    assert np.array_equal(tuner(tmp_path / "two", encoder).scores("erm", 4, notes, test), found)
    assert not np.array_equal(first.scores("erm", 5, notes, test), found)
    assert not [path for path in (tmp_path / "one").rglob("*") if path.name == "trainable.safetensors"]


def test_a_training_that_was_cut_off_is_finished_on_resume_and_refused_without(tmp_path, encoder):
    notes, test = texts(16), texts(5, seed=2)
    whole = tuner(tmp_path / "whole", encoder).scores("erm", 4, notes, test)
    broken = tuner(tmp_path / "broken", encoder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clinical_nlp.eval._fine_tuning.score_notes", _stop)
        with pytest.raises(RunError, match="stopped here"):
            broken.scores("erm", 4, notes, test)
    with pytest.raises(RunError, match="--resume"):
        tuner(tmp_path / "broken", encoder).scores("erm", 4, notes, test)
    resumed = tuner(tmp_path / "broken", encoder, resume=True)
    assert np.array_equal(resumed.scores("erm", 4, notes, test), whole)


def _stop(*arguments, **options):
    raise RunError("stopped here")


def test_an_institution_that_training_did_not_have_gets_no_token(tmp_path, encoder):
    fine, notes, test = tuner(tmp_path, encoder), texts(24), texts(6, seed=3)
    other = Texts(test.texts, np.full(6, "elsewhere"), test.patient, test.label)
    nowhere = Texts(test.texts, np.full(6, "nowhere"), test.patient, test.label)
    scores = [fine.scores(f"t{place}", 1, notes, one, token=True) for place, one in enumerate((test, other, nowhere))]
    assert np.array_equal(scores[1], scores[2])
    assert not np.array_equal(scores[0], scores[1])


def test_test_time_adaptation_reads_the_notes_first_and_moves_the_scores(tmp_path, encoder):
    fine, notes, test = tuner(tmp_path, encoder), texts(24), texts(6, seed=3)
    plain = fine.scores("erm", 1, notes, test)
    moved = fine.scores("tent", 1, notes, test, read_first=texts(40, seed=5).texts)
    done = json.loads((tmp_path / "tent-1" / "manifest.json").read_text("utf-8"))["adaptation"]
    assert done["steps"] == 3 or done["collapsed"]
    assert np.array_equal(plain, moved) == done["collapsed"]


@pytest.mark.parametrize("strategy", ["lora", "qlora"])
def test_a_decoder_is_fine_tuned_with_an_adversary_and_with_notes_without_labels(tmp_path, strategy):
    base = str(write_decoder(tmp_path / "decoder"))
    fine = tuner(tmp_path / "runs", base, strategy=strategy, max_steps=2)
    notes = texts(16).and_also(texts(8, institutions=("t",), seed=4).without_labels())
    scores = [
        fine.scores(name, 1, notes, texts(4, seed=8), objective=ObjectiveConfig(name=name)) for name in ("dann", "cdan")
    ]
    assert all(np.isfinite(found).all() for found in scores)
    assert not np.array_equal(*scores)


def test_two_models_teach_the_surest_notes_of_each_label_on_which_they_agree():
    first, second = np.array([3.0, 2.0, 1.0, -1.0, -4.0, 5.0]), np.array([4.0, 1.0, 0.5, -2.0, -3.0, -5.0])
    assert agreed_labels(first, second).tolist() == [1, 1, Unlabelled, Unlabelled, 0, Unlabelled]


def test_what_cannot_be_fine_tuned_is_told_in_one_line(tmp_path, encoder):
    with pytest.raises(ConfigError, match="'head' leaves the base as it is"):
        tuner(tmp_path, encoder, strategy="head")
    with pytest.raises(ConfigError, match=r"objectives"):
        tuner(tmp_path, encoder, objectives=["dan"])
    with pytest.raises(ClinicalNlpError, match="no/such/model"):
        tuner(tmp_path, "no/such/model")
    with pytest.raises(TooFewPatientsError, match="one label"):
        alone = texts(8)
        tuner(tmp_path, encoder).scores("erm", 1, alone.with_labels(np.ones(8, dtype=int)), texts(4))


# In the suite ---------------------------------------------------------------------------------------------------------

SMALL = {
    "corpus.options": {
        "institutions": 3,
        "patients": 14,
        "notes_per_patient": [1, 2],
        "spurious": [0.98, 0.9, 0.1],
    },
    "features.steps": 3,
    "features.components": 8,
    "weights": [1.0],
    "objectives": ["dann"],
    "few_labels": [5],
    "n_seeds": 1,
    "n_resamples": 200,
    "n_permutations": 99,
    "targets": ["hospital-3"],
    "fine_tuning.n_seeds": 1,
    "fine_tuning.max_tokens": 40,
    "fine_tuning.max_steps": 1,
    "fine_tuning.training.batch_size": 8,
    "fine_tuning.objectives": ["dann", "group_dro"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, encoder):
    seen = []
    train = FineTuner._train

    def watched(self, arm, run, notes, test, read_first, resume):
        seen.append((arm, notes, test, list(read_first)))
        return train(self, arm, run, notes, test, read_first, resume)

    config = load_config(cross_institution.CONFIG, None, {**SMALL, "fine_tuning.base_model": encoder})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTuner, "_train", watched)
        run = cross_institution.run(config, tmp_path_factory.mktemp("suite") / "run")
    bench = Bench(config, read_notes(load_corpus(config.corpus.name, **config.corpus.options), config))
    return run, json.loads((run.path / "results.json").read_text("utf-8")), seen, bench


def test_the_fine_tuned_table_has_the_rows_of_the_frozen_one(finished):
    run, results, seen, _ = finished
    (table,) = results["targets"]
    tiers = {row["name"]: row["tier"] for row in table["fine_tuned"]["rows"]}
    assert tiers == {
        "erm": "no target data",
        "erm_reseeded": "control",
        "constant": "control",
        "erm_size_matched": "reference",
        "in_domain": "reference",
        "style_masked": "reference",
        "lp_ft": "no target data",
        "institution_token": "no target data",
        "dann": "no target data",
        "dann_target": "unlabelled target",
        "group_dro": "no target data",
        "mcd": "unlabelled target",
        "self_training": "unlabelled target",
        "tent": "unlabelled target",
        "few_labels_5": "few target labels",
    }
    numbers = results["numbers"]
    for name in tiers:
        number = numbers[f"fine_tuned.hospital-3.{name}"]
        assert number["n_patients"] == table["n_patients"]
        assert number["low"] is not None or number["note"]
    assert {f"fine_tuned.hospital-3.{kind}" for kind in ("source_drop", "target_drop", "erm_at_sources")} <= set(
        numbers
    )
    assert numbers["fine_tuned.hospital-3.dann"]["selection"] == (
        "weight by source_validation on source patients, on frozen features"
    )
    assert numbers["fine_tuned.hospital-3.group_dro"]["selection"].startswith("the objective's default weight")
    assert run.manifest["fine_tunings"] == len(seen) == len(tiers) - 1 + 2  # no training for the constant, two teachers


def test_nobody_is_scored_who_was_fine_tuned_on_and_tiers_see_what_they_say(finished):
    _, _, seen, bench = finished
    scored = set(bench.data.patient[bench.scored])
    there = set(bench.data.patient[bench.data.institution == "hospital-3"])
    for arm, notes, _, read_first in seen:
        assert not scored & set(notes.patient), arm.name
        name = arm.name.removeprefix("hospital-3.")
        known = set(notes.patient[notes.label != Unlabelled])
        if name in ("in_domain", "few_labels_5", "self_training"):
            assert known & there or name == "self_training"
        else:
            assert not known & there, name
        if name in ("erm", "lp_ft", "dann", "group_dro", "institution_token", "tent"):
            assert not set(notes.patient) & there, name
        assert bool(read_first) == (name == "tent")
    by_name = {arm.name.removeprefix("hospital-3."): (arm, notes) for arm, notes, _, _ in seen}
    assert (by_name["dann_target"][1].label == Unlabelled).any()
    assert len(set(by_name["few_labels_5"][1].patient) & there) == SMALL["few_labels"][0]
    sizes = [len(set(by_name[name][1].patient)) for name in ("in_domain", "erm_size_matched")]
    assert sizes[0] == sizes[1]
    assert by_name["lp_ft"][0].strategy.name == "lp_ft"
    assert by_name["institution_token"][0].token


def test_the_page_has_both_tables(finished):
    run, _, _, _ = finished
    page = (run.path / "report.html").read_text("utf-8")
    assert "Held out: hospital-3</h2>" in page
    assert "fine-tuned (lora)" in page
    assert "erm, norm layers moved by the notes to be read" in page


def test_a_suite_that_was_stopped_goes_on_where_it_was_and_ends_the_same(tmp_path, encoder, finished):
    _, results, seen, _ = finished
    train, done = FineTuner._train, []

    def stopping(self, arm, *arguments):
        if len(done) == 6:
            raise RunError("stopped here")
        done.append(arm.name)
        return train(self, arm, *arguments)

    config = load_config(cross_institution.CONFIG, None, {**SMALL, "fine_tuning.base_model": encoder})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTuner, "_train", stopping)
        with pytest.raises(RunError, match="stopped here"):
            cross_institution.run(config, tmp_path / "run")
    with pytest.raises(RunError, match="--resume"):
        cross_institution.run(config, tmp_path / "run")
    run = cross_institution.run(config, tmp_path / "run", resume=True)
    again = json.loads((run.path / "results.json").read_text("utf-8"))
    assert run.manifest["fine_tunings"] == len(seen) - 6
    assert again["numbers"] == results["numbers"]
    assert again["targets"] == results["targets"]


def test_without_a_base_model_there_is_no_slow_tier():
    assert load_config(cross_institution.CONFIG, None, {}).fine_tuning.base_model is None
