"""Scores of many labels: equal to scikit-learn, and the same for a patient's documents in any order."""

import math

import numpy as np
import pytest
from sklearn import metrics

from clinical_nlp.statistics.calibration import Calibration, fit_calibration
from clinical_nlp.statistics.multilabel import (
    auc,
    average_precision,
    choose_threshold,
    expected_calibration_error,
    label_table,
    precision_at,
    score,
)


def random_case(seed, n=60, k=25, ties=False):
    generator = np.random.default_rng(seed)
    gold = generator.random((n, k)) < generator.beta(1, 6, k)
    gold[np.arange(n), generator.integers(0, k, n)] = True
    scores = generator.normal(size=(n, k)) + 1.5 * gold
    return (np.round(scores, 1) if ties else scores), gold


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_scikit_learn(seed):
    scores, gold = random_case(seed)
    patients = [f"p{i // 2}" for i in range(len(gold))]
    found = score(scores, gold, 0.7, patients, train_counts=np.ones(gold.shape[1]), part="test", seed=0)
    said = scores >= 0.7
    present = gold.any(0)
    expected = {
        "micro_f1": metrics.f1_score(gold, said, average="micro"),
        "micro_precision": metrics.precision_score(gold, said, average="micro"),
        "micro_recall": metrics.recall_score(gold, said, average="micro"),
        "macro_f1": metrics.f1_score(gold[:, present], said[:, present], average="macro", zero_division=0),
        "map": np.mean([metrics.average_precision_score(g, s) for g, s in zip(gold, scores, strict=True)]),
        "auc_micro": metrics.roc_auc_score(gold.ravel(), scores.ravel()),
        "auc_macro": metrics.roc_auc_score(gold[:, present], scores[:, present], average="macro"),
    }
    for name, value in expected.items():
        estimate = found[f"test.{name}"]
        assert estimate.value == pytest.approx(value, abs=1e-9), name
        assert estimate.low < estimate.value < estimate.high, name
        assert (estimate.n_patients, estimate.n_notes) == (30, 60)


@pytest.mark.parametrize("seed", range(3))
def test_auc_counts_ties_half(seed):
    scores, gold = random_case(seed, ties=True)
    assert auc(scores[:, 0], gold[:, 0]) == pytest.approx(metrics.roc_auc_score(gold[:, 0], scores[:, 0]))
    found = score(scores, gold, 0.0, [str(i) for i in range(60)], train_counts=np.ones(25), part="test", seed=0)
    assert found["test.auc_micro"].value == pytest.approx(metrics.roc_auc_score(gold.ravel(), scores.ravel()))


def test_precision_at_k_by_hand():
    scores = np.array([0.9, 0.8, 0.1, -math.inf])
    gold = np.array([True, False, True, True])
    assert precision_at(scores, gold, 2) == 0.5
    assert precision_at(scores, gold, 5) == 0.4  # two of five: a label without a score is never proposed
    assert average_precision(scores, gold) == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_a_label_nobody_was_taught_is_a_miss_everywhere():
    scores, gold = random_case(0)
    patients = [str(i) for i in range(60)]
    plain = score(scores, gold, 0.5, patients, train_counts=np.ones(25), part="test", seed=0)
    wider = np.concatenate([scores, np.full((60, 1), -math.inf)], 1)
    extra = np.concatenate([gold, np.arange(60)[:, None] % 3 == 0], 1)
    counts = np.append(np.ones(25), 0)
    missed = score(wider, extra, 0.5, patients, train_counts=counts, part="test", seed=0)
    for name in ("micro_f1", "micro_recall", "macro_f1", "map", "r_precision"):
        assert missed[f"test.{name}"].value < plain[f"test.{name}"].value, name
    assert missed["test.micro_precision"].value == plain["test.micro_precision"].value
    assert missed["test.auc_macro"].value == plain["test.auc_macro"].value
    assert missed["test.micro_f1.unseen"].value == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_the_threshold_is_the_best_of_all(seed, ties):
    scores, gold = random_case(seed, ties=ties)
    chosen = metrics.f1_score(gold, scores >= choose_threshold(scores, gold), average="micro")
    best = max(metrics.f1_score(gold, scores >= value, average="micro") for value in np.unique(scores))
    assert chosen == pytest.approx(best)


def test_without_gold_nothing_is_predicted():
    assert choose_threshold(np.zeros((3, 2)), np.zeros((3, 2), bool)) == math.inf


def test_few_patients_have_no_interval_and_a_reason():
    scores, gold = random_case(0, n=10)
    patients = list("abcdefghij")
    found = score(scores, gold, 0.5, patients, train_counts=np.ones(25), part="test", seed=0)
    assert all(math.isnan(estimate.low) and estimate.note for estimate in found.values())


def test_documents_of_a_patient_may_come_in_any_order():
    scores, gold = random_case(1)
    patients = [f"p{i % 24}" for i in range(60)]
    order = np.random.default_rng(0).permutation(60)
    one = score(scores, gold, 0.5, patients, train_counts=np.ones(25), part="test", seed=0)
    shuffled = [patients[i] for i in order]
    two = score(scores[order], gold[order], 0.5, shuffled, train_counts=np.ones(25), part="test", seed=0)
    for name, estimate in one.items():
        assert estimate.value == pytest.approx(two[name].value), name
        assert estimate.low == pytest.approx(two[name].low), name


def test_label_table_adds_up():
    scores, gold = random_case(2)
    rows = label_table(scores, gold, 0.5, [str(i) for i in range(60)], part="test", seed=0)
    assert sum(row["gold"] for row in rows) == gold.sum()
    assert sum(row["true"] for row in rows) == (gold & (scores >= 0.5)).sum()
    row, said = rows[0], scores[:, 0] >= 0.5
    assert row["f1"] == pytest.approx(metrics.f1_score(gold[:, 0], said))
    assert any(not math.isnan(row["f1_low"]) for row in rows)


def test_calibration_recovers_what_distorted_the_logits():
    generator = np.random.default_rng(0)
    logits = generator.normal(-2, 2, 20_000)
    gold = generator.random(20_000) < 1 / (1 + np.exp(-(0.5 * logits + 0.7)))
    found = fit_calibration(logits, gold)
    assert (found.slope, found.offset) == pytest.approx((0.5, 0.7), abs=0.06)
    assert expected_calibration_error(found(logits), gold) < 0.015
    assert expected_calibration_error(Calibration()(logits), gold) > 0.03


def test_calibration_of_nothing_is_the_identity():
    assert fit_calibration(np.zeros(5), np.zeros(5, bool)) == Calibration()
    assert np.isfinite(Calibration()(np.array([-1e4, 1e4]))).all()


def test_calibration_stays_finite_on_separable_scores():
    found = fit_calibration(np.array([-3.0, -2.0, 2.0, 3.0]), np.array([False, False, True, True]))
    assert 0 < found.slope < 150


def test_the_interval_of_a_mean_over_rare_labels_holds_it():
    """Most labels are in one document, where a resample has them or has them not."""
    generator = np.random.default_rng(0)
    gold = np.zeros((80, 400), bool)
    gold[generator.integers(0, 80, 400), np.arange(400)] = True
    gold[:, 0] = True
    scores = np.where(gold, 0.4, 0.0) + generator.random(gold.shape) * 0.5
    scores[:, 0] += 1
    found = score(scores, gold, 0.8, [str(i) for i in range(80)], train_counts=np.ones(400), part="test", seed=0)
    estimate = found["test.macro_f1"]
    assert estimate.low < estimate.value < estimate.high
