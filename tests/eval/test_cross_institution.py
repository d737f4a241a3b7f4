"""The suite `cross_institution`: its statistics against loops, who sees what, and what it refuses to claim."""

from __future__ import annotations

import json
import math
from itertools import combinations
from typing import get_args

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from clinical_nlp.config import CorpusConfig, load_config
from clinical_nlp.errors import ConfigError, InputError, TooFewPatientsError
from clinical_nlp.eval import _feature_training, cross_institution
from clinical_nlp.eval._discrimination import FEWEST_SEEDS, Panel, methods_differ, weighted_auc
from clinical_nlp.eval._feature_training import (
    FeatureConfig,
    Notes,
    TermFeatures,
    align_discriminatively,
    minimise_discrepancy,
    self_train,
    train_classifier,
)
from clinical_nlp.eval._fine_tuning import Asked
from clinical_nlp.eval.cross_institution import Bench, Book, Labelled, choose_weights, read_notes
from clinical_nlp.invariance.objectives import NEEDS, ObjectiveConfig, Unlabelled
from clinical_nlp.notes.corpus import load_corpus
from clinical_nlp.notes.schema import NOTE_SCHEMA
from clinical_nlp.recipe import find_recipe

# AUC and its tests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_weighted_auc_equals_the_naive_loop_and_scikit_learn(seed):
    random = np.random.default_rng(seed)
    scores, label = random.integers(0, 6, 40) / 3.0, random.random(40) < 0.4
    weights = random.random((3, 40))
    for row in weights:
        won = total = 0.0
        for i in np.flatnonzero(label):
            for j in np.flatnonzero(~label):
                total += row[i] * row[j]
                won += row[i] * row[j] * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
        assert float(weighted_auc(scores, label, row)) == pytest.approx(won / total)
        assert won / total == pytest.approx(roc_auc_score(label, scores, sample_weight=row))
    assert weighted_auc(scores, label, weights).shape == (3,)
    assert math.isnan(float(weighted_auc(scores, np.ones(40, dtype=bool), weights[0])))


def test_every_patient_weighs_1_however_many_notes():
    label, patient = np.array([1, 0, 0, 0, 0]), np.array(["a", "b", "c", "c", "c"])
    panel = Panel(label, patient, 200, 0)
    assert panel.aucs([np.array([1.0, 0.0, 2.0, 2.0, 2.0])])[0, 0] == pytest.approx(0.5)


def test_methods_are_told_apart_by_every_exchange_of_seeds():
    first, second = [0.70, 0.71, 0.69, 0.72, 0.70, 0.71], [0.75, 0.76, 0.74, 0.77, 0.75, 0.78]
    p_value, reason = methods_differ(first, second)
    assert (p_value, reason) == (pytest.approx(2 / 924), "")
    mixed, rest = [0.70, 0.76, 0.69, 0.77, 0.70, 0.71], [0.75, 0.71, 0.74, 0.72, 0.78, 0.73]
    pooled = [*mixed, *rest]
    observed = abs(np.mean(mixed) - np.mean(rest))
    beyond = 0
    for chosen in combinations(range(12), 6):
        one = [pooled[i] for i in chosen]
        other = [pooled[i] for i in range(12) if i not in chosen]
        beyond += abs(np.mean(one) - np.mean(other)) >= observed - 1e-12
    assert methods_differ(mixed, rest)[0] == pytest.approx(beyond / 924)
    assert 0.01 < beyond / 924 < 1.0
    few, why = methods_differ(first[:5], second)
    assert math.isnan(few)
    assert str(FEWEST_SEEDS) in why


def test_one_method_with_other_seeds_differs_in_at_most_five_of_a_hundred():
    random = np.random.default_rng(0)
    found = [methods_differ(*random.normal(size=(2, 6)))[0] <= 0.05 for _ in range(400)]
    assert np.mean(found) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    seen = [methods_differ(random.normal(size=6), random.normal(3.0, size=6))[0] <= 0.05 for _ in range(50)]
    assert np.mean(seen) > 0.95


def test_two_models_that_err_alike_are_rarely_told_apart_and_unlike_ones_are():
    random = np.random.default_rng(1)
    patient = np.repeat(np.arange(50), 3)
    rejected, power = [], []
    for number in range(120):
        label = np.repeat(random.random(50) < 0.5, 3).astype(int)
        panel = Panel(label, patient, 1, number)
        truth = label + np.repeat(random.normal(size=50), 3)
        one, other, worse = (truth * part + np.repeat(random.normal(size=50), 3) * 0.7 for part in (1, 1, 0))
        rejected.append(panel.models_differ(one, other, n_permutations=99) <= 0.05)
        power.append(panel.models_differ(one, worse, n_permutations=99) <= 0.05)
    assert np.mean(rejected) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 120)
    assert np.mean(power) > 0.4
    assert panel.models_differ(one, one, n_permutations=99) == 1.0
    assert panel.models_differ(one, 5.0 * one + 2.0, n_permutations=99) == 1.0  # another scale is the same model


def test_no_interval_under_twenty_patients_and_none_invented():
    label = np.arange(12) % 2
    panel = Panel(label, np.arange(12), 300, 0)
    found = panel.estimate(panel.over_seeds(panel.aucs([label + 0.1]), salt=0), part="test")
    assert found.value == 1.0
    assert math.isnan(found.low)
    assert "fewer than 20 patients" in found.note
    single = Panel(np.ones(30, dtype=int), np.arange(30), 300, 0)
    nothing = single.estimate(single.over_seeds(single.aucs([np.arange(30.0)]), salt=0), part="test")
    assert math.isnan(nothing.value)
    assert "one label" in nothing.note


# Training on features -------------------------------------------------------------------------------------------------


def hospitals(sizes, *, spurious, seed=0, notes=2):
    """Vectors with a core axis that tells the label in part, and a style axis that goes with it by institution."""
    random = np.random.default_rng(seed)
    rows = []
    for place, (size, follows) in enumerate(zip(sizes, spurious, strict=True)):
        for patient in range(size):
            label = int(random.random() < 0.4)
            for _ in range(notes):
                style = label if random.random() < follows else int(random.random() < 0.4)
                vector = random.normal(size=8).astype(np.float32)
                vector[0] += 1.6 * label
                vector[1] += 4.0 * style
                rows.append((vector, f"h{place}", f"h{place}-{patient}", label))
    return Notes(
        np.array([row[0] for row in rows]),
        np.array([row[1] for row in rows]),
        np.array([row[2] for row in rows]),
        np.array([row[3] for row in rows]),
    )


FAST = FeatureConfig(steps=150, width=4)


def auc(notes, scores):
    return roc_auc_score(notes.label, scores)


def test_erm_leans_on_a_spurious_style_and_drops_where_it_does_not_hold():
    train, there = hospitals([150] * 3, spurious=[0.98, 0.9, 0.7]), hospitals([200], spurious=[0.1], seed=5)
    model = train_classifier(train, FAST)
    home = hospitals([200] * 3, spurious=[0.98, 0.9, 0.7], seed=9)
    assert auc(home, model.score(home)) - auc(there, model.score(there)) > 0.1
    blind = Notes(np.where(np.arange(8) == 1, 0.0, train.vectors).astype(np.float32), *_rest(train))
    seen = Notes(np.where(np.arange(8) == 1, 0.0, there.vectors).astype(np.float32), *_rest(there))
    assert auc(there, train_classifier(blind, FAST).score(seen)) > auc(there, model.score(there)) + 0.05


def _rest(notes):
    return notes.institution, notes.patient, notes.label


OBJECTIVES = get_args(Asked)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_and_the_same_seed_gives_the_same_model(name):
    train = hospitals([30] * 3, spurious=[0.98, 0.9, 0.7])
    config = FeatureConfig(steps=25, width=4)
    one, again = (train_classifier(train, config, objective=ObjectiveConfig(name=name), seed=3) for _ in range(2))
    assert np.array_equal(one.score(train), again.score(train))
    assert not np.array_equal(one.score(train), train_classifier(train, config, seed=3).score(train))
    if NEEDS[name].target:
        target = hospitals([30], spurious=[0.1], seed=4)
        target = Notes(target.vectors, np.full(len(target.label), "t"), target.patient, target.label)
        both = train.and_also(target.without_labels())
        assert (both.label == Unlabelled).sum() == len(target.label)
        with_it = train_classifier(both, config, objective=ObjectiveConfig(name=name), seed=3)
        assert np.isfinite(with_it.score(train)).all()


def test_an_institution_that_training_did_not_have_gets_no_token():
    train = hospitals([40] * 2, spurious=[0.5, 0.5])
    model = train_classifier(train, FAST, token=True)
    new = Notes(train.vectors, np.full(len(train.label), "somewhere new"), train.patient, train.label)
    assert np.isfinite(model.score(new)).all()
    assert not np.array_equal(model.score(new), model.score(train))


def test_bad_vectors_and_one_label_are_refused():
    train = hospitals([20] * 2, spurious=[0.5, 0.5])
    broken = train.vectors.copy()
    broken[3, 2] = np.nan
    with pytest.raises(InputError, match="not finite"):
        train_classifier(Notes(broken, *_rest(train)), FAST)
    with pytest.raises(TooFewPatientsError, match="one label"):
        train_classifier(train.at(np.flatnonzero(train.label == 1)), FAST)
    with pytest.raises(TooFewPatientsError, match="compares institutions"):
        train_classifier(
            train.at(np.flatnonzero(train.institution == "h0")), FAST, objective=ObjectiveConfig(name="irm")
        )


@pytest.mark.parametrize("adapts", [self_train, align_discriminatively, minimise_discrepancy])
def test_adaptation_without_labels_keeps_what_the_source_taught(adapts):
    train, target = hospitals([60] * 2, spurious=[0.5, 0.5]), hospitals([60], spurious=[0.5], seed=2)
    blind = target.without_labels()
    assert auc(target, adapts(train, blind, FAST).score(target)) > 0.75
    assert np.array_equal(adapts(train, blind, FAST).score(target), adapts(train, target, FAST).score(target))


def moved(notes, by):
    vectors = notes.vectors + np.eye(8, dtype=np.float32)[0] * by
    return Notes(vectors, *_rest(notes))


def decided(notes, model):
    return float(((model.score(notes) > 0) == (notes.label == 1)).mean())


def test_adda_moves_a_shifted_target_back():
    train, target = hospitals([150] * 2, spurious=[0.0, 0.0]), moved(hospitals([150], spurious=[0.0], seed=2), 2.0)
    settings = FeatureConfig(steps=400, width=8)
    before = decided(target, train_classifier(train, settings))
    assert decided(target, align_discriminatively(train, target.without_labels(), settings)) > before + 0.05


def test_the_two_heads_of_mcd_are_seen_to_disagree_on_the_target_alone():
    train, target = hospitals([150] * 2, spurious=[0.0, 0.0]), moved(hospitals([150], spurious=[0.0], seed=2), 2.0)
    same = minimise_discrepancy(train, train, FAST).score(train)
    other = minimise_discrepancy(train, target.without_labels(), FAST).score(train)
    assert not np.array_equal(same, other)
    assert auc(train, other) > 0.8


def test_term_features_know_only_the_words_they_were_fitted_on():
    fit = TermFeatures(["fever and cough today", "fever and no cough", "cough and pain today", "no pain"], 2)
    assert fit(["fever and cough zzz"]) == pytest.approx(fit(["fever and cough"]))
    with pytest.raises(InputError, match="share no word"):
        TermFeatures(["a", "b"], 2)


# The suite ------------------------------------------------------------------------------------------------------------

SMALL = {
    "corpus.options": {
        "institutions": 4,
        "patients": 40,
        "notes_per_patient": [1, 2],
        "spurious": [0.98, 0.9, 0.7, 0.1],
    },
    "features.steps": 15,
    "features.components": 12,
    "weights": [1.0],
    "few_labels": [5],
    "n_seeds": 2,
    "n_resamples": 200,
    "n_permutations": 99,
    "targets": ["hospital-4"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    suite = find_recipe("cross_institution", "eval").load()
    seen = []
    train = _feature_training.train_classifier

    def watched(notes, *arguments, **options):
        seen.append((set(notes.patient[notes.label != Unlabelled]), set(notes.patient)))
        return train(notes, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "train_classifier", watched)
        patch.setattr(_feature_training, "train_classifier", watched)
        run = suite.run(load_config(suite.CONFIG, None, SMALL), tmp_path_factory.mktemp("suite") / "run")
    return run, json.loads((run.path / "results.json").read_text("utf-8")), seen


def test_the_table_has_every_row_that_a_claim_needs(finished):
    _, results, _ = finished
    (table,) = results["targets"]
    tiers = {row["name"]: row["tier"] for row in table["rows"]}
    assert {"erm", "lp_ft", "institution_token", "chosen", *OBJECTIVES} <= tiers.keys()
    assert {name for name, tier in tiers.items() if tier == "reference"} == {
        "in_domain",
        "style_masked",
        "erm_size_matched",
    }
    assert {name for name, tier in tiers.items() if tier == "control"} == {"constant", "erm_reseeded"}
    aligned = {f"{name}_target" for name in OBJECTIVES if NEEDS[name].target}
    assert {name for name, tier in tiers.items() if tier == "unlabelled target"} == {
        *aligned,
        "self_training",
        "adda",
        "mcd",
    }
    assert tiers["few_labels_5"] == "few target labels"
    numbers = results["numbers"]
    assert numbers["held_out.hospital-4.constant"]["value"] == 0.5
    for kind in ("source_drop", "target_drop", "erm_at_sources"):
        assert f"held_out.hospital-4.{kind}" in numbers
    assert {f"matrix.hospital-{i}.hospital-{j}" for i in range(1, 5) for j in range(1, 5)} <= numbers.keys()
    assert {"temporal.early", "temporal.recent", "temporal.drop"} <= numbers.keys()


def test_every_number_has_its_protocol_n_and_interval_or_the_reason(finished):
    _, results, _ = finished
    for name, number in results["numbers"].items():
        assert all(number[key] for key in ("protocol", "split", "selection")), name
        assert 0 < number["n_patients"] <= number["n_notes"], name
        assert (number["low"] is not None and number["low"] <= number["high"]) or number["note"], name
    assert results["protocol"]["selection"] == "leave_one_out"
    assert results["numbers"]["held_out.hospital-4.irm"]["selection"].startswith("weight by leave_one_out")


def test_nobody_is_scored_who_was_trained_on(finished):
    run, _, seen = finished
    config = load_config(cross_institution.CONFIG, None, SMALL)
    data = read_notes(load_corpus(config.corpus.name, **config.corpus.options), config)
    bench = Bench(config, data)
    scored = set(data.patient[bench.scored])
    timeless = [everyone for _, everyone in seen[:-4]]  # the last four are those over time, with a split of their own
    assert len(timeless) > 40
    assert not any(everyone & scored for everyone in timeless)
    assert run.manifest["trainings"] > 0


def test_two_seeds_support_no_claim(finished):
    _, results, _ = finished
    rows = [row for row in results["targets"][0]["rows"] if "verdict" in row]
    assert rows
    assert all(row["verdict"].startswith("no claim: a claim about methods needs 6 seeds") for row in rows)


def test_the_page_says_it_in_words_and_loads_nothing(finished):
    run, _, _ = finished
    page = (run.path / "report.html").read_text("utf-8")
    assert "Held out: hospital-4" in page
    assert "no claim" in page
    assert "ceiling: given sentences taken out" in page
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize("encoder", ["tfidf", "builtin:tiny"])
def test_features_of_the_source_do_not_depend_on_the_target(encoder):
    config = load_config(cross_institution.CONFIG, None, {"features.encoder": encoder, "features.components": 4})
    texts = [f"{word} today and {other}" for word in ("fever", "cough", "pain") for other in ("rash", "chills", "none")]
    where = np.array(["a"] * 5 + ["b"] * 4)
    vectors = []
    for there in ("unlike", "something else"):
        said = [*texts[:5], *(f"{there} {text}" for text in texts[5:])]
        label, people = np.arange(9) % 2, np.array([f"p{n}" for n in range(9)])
        bench = Bench(config, Labelled(said, where, people, label, [None] * 9, 0))
        vectors.append(bench.notes(np.arange(5), fitted_on=np.arange(5)).vectors)
    assert vectors[0] == pytest.approx(vectors[1], abs=1e-4)
    assert vectors[0].mean(0) == pytest.approx(0.0, abs=1e-4)


def test_choices_do_not_depend_on_the_target():
    config = load_config(
        cross_institution.CONFIG, None, {**SMALL, "objectives": ["coral", "vrex"], "weights": [0.1, 10.0]}
    )
    data = read_notes(load_corpus(config.corpus.name, **config.corpus.options), config)
    sources = ["hospital-1", "hospital-2", "hospital-3"]
    there = data.institution == "hospital-4"
    spoilt = Labelled(
        [text if not gone else "nothing at all" for text, gone in zip(data.texts, there, strict=True)],
        data.institution,
        data.patient,
        np.where(there, 1 - data.label, data.label),
        data.written,
        0,
    )
    found = [choose_weights(Bench(config, one), Book(), sources, "x") for one in (data, spoilt)]
    assert found[0].scores == found[1].scores
    assert found[0].weights == found[1].weights


def corpus_of(**changes):
    corpus = load_corpus("synthetic_hospitals", institutions=2, patients=6, spurious=0.5, seed=1)
    if "patient_id" in changes:
        columns = {name: corpus.notes[name] for name in NOTE_SCHEMA.names}
        columns["patient_id"] = [changes["patient_id"]] * corpus.notes.num_rows
        import pyarrow as pa

        return type(corpus)(notes=pa.table(columns, schema=NOTE_SCHEMA), card=corpus.card, codes=corpus.codes)
    return corpus


def test_input_that_cannot_be_used_is_told_in_one_line():
    config = load_config(cross_institution.CONFIG, None, {})
    with pytest.raises(InputError, match="patients have notes in two institutions"):
        read_notes(corpus_of(patient_id="p"), config)
    with pytest.raises(InputError, match="0 of"):
        read_notes(corpus_of(), load_config(cross_institution.CONFIG, None, {"label.code": "Z99"}))
    with pytest.raises(InputError, match="no codes of system 'ICD-9-CM'"):
        read_notes(corpus_of(), load_config(cross_institution.CONFIG, None, {"label.system": "ICD-9-CM"}))
    alone = load_corpus("synthetic_hospitals", institutions=1, patients=20, seed=1)
    with pytest.raises(TooFewPatientsError, match="one institution"):
        read_notes(alone, config)
    label = np.array([0, 1, 0, 1, 1])
    where = np.array(["a", "a", "a", "a", "b"])
    single = Labelled(["x"] * 5, where, np.array(list("pqrst")), label, [None] * 5, 0)
    with pytest.raises(TooFewPatientsError, match="institution 'b' has one patient"):
        Bench(config, single)


def test_wrong_targets_versions_and_doubled_objectives_are_refused(tmp_path):
    for change, message in (
        ({"targets": ["hospital-9"]}, "no institution 'hospital-9'"),
        ({"version": 2}, "version 1"),
        ({"objectives": ["irm", "irm"]}, "once"),
    ):
        config = load_config(cross_institution.CONFIG, None, {**SMALL, **change})
        with pytest.raises(ConfigError, match=message):
            cross_institution.run(config, tmp_path / "run")


def test_with_two_institutions_objectives_are_missing_with_the_reason(tmp_path):
    change = {
        "corpus": CorpusConfig(options={"institutions": 2, "patients": 30, "notes_per_patient": [1, 2]}).model_dump(),
        "targets": ["hospital-2"],
    }
    small = {key: value for key, value in SMALL.items() if key not in ("corpus.options", "targets")}
    run = cross_institution.run(load_config(cross_institution.CONFIG, None, {**small, **change}), tmp_path / "run")
    results = json.loads((run.path / "results.json").read_text("utf-8"))
    assert "1 source institution" in results["missing"]["held_out.hospital-2.irm"]
    assert results["protocol"]["selection"] == "source_validation"
    assert "three source institutions" in results["protocol"]["selection_reason"]
    assert results["targets"][0]["chosen"] == "erm"
