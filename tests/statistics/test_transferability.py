"""Scores before training, against brute force and hand-made tables; and what must not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats
from sklearn.covariance import LedoitWolf

from clinical_nlp.errors import UsageError
from clinical_nlp.runs import Estimate
from clinical_nlp.statistics.transferability import (
    grouped_jackknife,
    h_score,
    independent_difference,
    interval_over_seeds,
    log_expected_empirical_prediction,
    log_maximum_evidence,
    rank_agreement,
)


def drawn(n=60, d=5, classes=3, separation=1.5, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, n)
    centres = generator.normal(size=(classes, d)) * separation
    return centres[labels] + generator.normal(size=(n, d)), labels


def evidence(features, target, alpha, beta):
    """Log evidence a row from the marginal distribution of y itself: N(0, I / beta + F F' / alpha)."""
    n = len(target)
    covariance = np.eye(n) / beta + features @ features.T / alpha
    return stats.multivariate_normal(np.zeros(n), covariance, allow_singular=True).logpdf(target) / n


@pytest.mark.parametrize(("n", "d"), [(60, 5), (40, 39), (30, 45)])
def test_logme_is_the_maximum_of_the_log_evidence(n, d):
    features, labels = drawn(n, d)
    best = []
    for kind in np.unique(labels):
        target = (labels == kind).astype(float)

        def loss(logs, target=target):
            return -evidence(features, target, math.exp(logs[0]), math.exp(logs[1]))

        found = min(
            (optimize.minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12})
             for start in ([0.0, 0.0], [4.0, 2.0], [8.0, 1.0])),
            key=lambda outcome: outcome.fun,
        )  # fmt: skip
        best.append(-found.fun)
    assert log_maximum_evidence(features, labels) == pytest.approx(np.mean(best), abs=1e-6)


def test_logme_of_features_that_say_nothing_is_that_of_no_features():
    generator = np.random.default_rng(1)
    features = generator.normal(size=(400, 3))
    labels = np.repeat([0, 1], 200)
    features -= features[labels == 0].mean(0) * (labels == 0)[:, None]
    features -= features[labels == 1].mean(0) * (labels == 1)[:, None]  # F'y is zero for both classes
    without = (math.log(400 / 200) - math.log(2 * math.pi) - 1) / 2
    assert log_maximum_evidence(features, labels) == pytest.approx(without, abs=1e-6)


def by_definition(features, labels):
    means = np.stack([features[labels == kind].mean(0) for kind in labels])
    whole, between = np.cov(features.T, bias=True), np.cov(means.T, bias=True)
    return np.trace(np.linalg.pinv(whole) @ between)


@pytest.mark.parametrize("d", [2, 5, 20])
def test_h_score_is_its_definition(d):
    features, labels = drawn(80, d)
    assert h_score(features, labels, shrinkage=False) == pytest.approx(by_definition(features, labels), rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(80, 5), (40, 60)])
def test_shrunk_h_score_is_the_definition_with_the_covariance_of_ledoit_and_wolf(n, d):
    features, labels = drawn(n, d)
    shrunk = LedoitWolf().fit(features)
    means = np.stack([features[labels == kind].mean(0) for kind in labels])
    expected = np.trace(np.linalg.inv(shrunk.covariance_) @ ((1 - shrunk.shrinkage_) * np.cov(means.T, bias=True)))
    assert h_score(features, labels) == pytest.approx(expected, rel=1e-9)


def test_without_shrinkage_more_features_than_rows_say_everything_about_any_labels():
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(30, 60)), generator.integers(0, 3, 30)
    assert h_score(features, labels, shrinkage=False) == pytest.approx(2, abs=1e-9)
    assert h_score(features, labels) < 0.5


def test_leep_of_a_table_worked_by_hand():
    # Two source classes. P(z) = (0.55, 0.45); P(y=0, z) = (0.45, 0.05) and P(y=1, z) = (0.10, 0.40).
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.3, 0.7]])
    labels = np.array([0, 0, 1, 1])
    first = 0.9 * 0.45 / 0.55 + 0.1 * 0.05 / 0.45
    third = 0.1 * 0.10 / 0.55 + 0.9 * 0.40 / 0.45
    fourth = 0.3 * 0.10 / 0.55 + 0.7 * 0.40 / 0.45
    expected = (2 * math.log(first) + math.log(third) + math.log(fourth)) / 4
    assert log_expected_empirical_prediction(probabilities, labels) == pytest.approx(expected, rel=1e-12)


def test_leep_of_a_source_that_knows_the_labels_is_zero_and_of_one_that_does_not_is_their_entropy():
    labels = np.array([0, 0, 0, 1])
    assert log_expected_empirical_prediction(np.eye(2)[labels], labels) == pytest.approx(0)
    blind = np.full((4, 3), 1 / 3)
    entropy = 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert log_expected_empirical_prediction(blind, labels) == pytest.approx(entropy)
    never = np.hstack([np.eye(2)[labels], np.zeros((4, 1))])  # a source class that is never predicted
    assert log_expected_empirical_prediction(never, labels) == pytest.approx(0)


@pytest.mark.parametrize("score", [log_maximum_evidence, h_score, lambda f, y: h_score(f, y, shrinkage=False)])
def test_rotation_scale_order_and_names_of_classes_do_not_matter(score):
    features, labels = drawn(80, 6)
    generator = np.random.default_rng(3)
    rotation = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    order = generator.permutation(80)
    value = score(features, labels)
    assert score(1e3 * features @ rotation, labels) == pytest.approx(value, rel=1e-6)
    assert score(features[order], np.array([7, 3, 5])[labels[order]]) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("score", [log_maximum_evidence, h_score, lambda f, y: h_score(f, y, shrinkage=False)])
def test_features_that_part_the_classes_better_rank_higher(score):
    values = [score(*drawn(300, 8, separation=separation)) for separation in (0.0, 0.3, 1.0, 3.0)]
    assert values == sorted(values)
    assert values[0] < values[-1] - 0.1


def test_extreme_features_stay_finite():
    features, labels = drawn(50, 4)
    copies = np.hstack([features, features, np.zeros((50, 2))])
    for rows in (copies * 1e-12, copies * 1e12, np.eye(3)[labels]):
        assert math.isfinite(log_maximum_evidence(rows, labels))
        assert math.isfinite(h_score(rows, labels))


def test_what_cannot_be_scored_is_refused():
    features, labels = drawn()
    for score in (log_maximum_evidence, h_score, log_expected_empirical_prediction):
        with pytest.raises(UsageError, match="one class"):
            score(np.full((4, 2), 0.5), np.zeros(4, int))
        with pytest.raises(UsageError, match="one label a row"):
            score(features, labels[:-1])
        with pytest.raises(UsageError, match="not finite"):
            score(np.where(features > 0, np.nan, features), labels)
    with pytest.raises(UsageError, match="sum to 1"):
        log_expected_empirical_prediction(np.abs(features), labels)


def test_the_grouped_jackknife_covers_a_mean_of_clustered_rows():
    """200 trials, 30 patients of 5 alike rows: 95 % of intervals cover; one over rows would cover half of them."""
    generator = np.random.default_rng(0)
    patients = np.repeat([f"p{k}" for k in range(30)], 5).tolist()
    covered = 0
    for trial in range(200):
        rows = np.repeat(generator.normal(size=30), 5) + 0.1 * generator.normal(size=150)
        found = grouped_jackknife(lambda at, rows=rows: float(rows[at].mean()), patients, n_notes=30, seed=trial)
        covered += found.low <= 0 <= found.high
    assert 180 <= covered <= 200
    few = grouped_jackknife(lambda at: 1.0, ["a", "b", "c"], n_notes=3)
    assert math.isnan(few.low)
    assert "patients" in few.note


def estimate(value, low, high, note=""):
    return Estimate(value, low, high, 30, 60, "test", note)


def test_the_difference_of_two_groups_adds_their_squares():
    found = independent_difference(estimate(0.9, 0.86, 0.93), estimate(0.7, 0.62, 0.77))
    assert (found.value, found.n_patients) == (pytest.approx(0.2), 60)
    assert found.low == pytest.approx(0.2 - math.hypot(0.04, 0.07))
    assert found.high == pytest.approx(0.2 + math.hypot(0.03, 0.08))
    perfect = estimate(1.0, math.nan, math.nan, "every patient scores alike: resampling shows no spread")
    found = independent_difference(perfect, estimate(0.7, 0.62, 0.77))
    assert (found.low, found.high) == (pytest.approx(0.23), pytest.approx(0.38))
    few = independent_difference(estimate(0.9, math.nan, math.nan, "fewer than 20 patients"), perfect)
    assert math.isnan(few.low)
    assert "fewer than 20" in few.note


def test_seeds_give_students_interval():
    found = interval_over_seeds([0.6, 0.7, 0.8], n_patients=10, n_notes=20, part="test")
    assert found.value == pytest.approx(0.7)
    assert found.high - found.value == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    for values in ([0.6], [0.6, 0.6, 0.6], [0.6, math.nan]):
        assert math.isnan(interval_over_seeds(values, n_patients=10, n_notes=20, part="test").low)


def test_three_candidates_cannot_show_an_order():
    assert rank_agreement([1, 2, 3], [0.1, 0.5, 0.7]) == (pytest.approx(1), pytest.approx(1 / 3))
    assert rank_agreement([1, 2, 3, 4, 5], [5, 4, 3, 2, 1]) == (pytest.approx(-1), pytest.approx(1 / 60))
    assert math.isnan(rank_agreement([1, 1], [0.1, 0.5])[0])
