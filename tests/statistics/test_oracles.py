"""Statistics on random input against naive loops and reference formulas of numpy, scipy and scikit-learn."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist, jensenshannon
from scipy.stats import ttest_ind, ttest_rel
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import rbf_kernel

from clinical_nlp.statistics import domain_classifier, random_features
from clinical_nlp.statistics.distances import coral_test, histogram_test
from clinical_nlp.statistics.max_t import max_t_test
from clinical_nlp.statistics.mmd import median_distance, mmd_test
from clinical_nlp.statistics.permutation import PermutationPlan
from clinical_nlp.statistics.random_features import RandomFeatures
from clinical_nlp.statistics.ratios import length_test

WORLDS = st.tuples(st.integers(0, 10_000), st.integers(2, 9), st.integers(2, 9), st.integers(1, 4), st.booleans())


def world(drawn):
    """Random notes of two institutions, in random order; every patient at both where the last entry is true."""
    seed, first, second, most_notes, paired = drawn
    generator = np.random.default_rng(seed)
    ids, sides = [], []
    for side, size in enumerate((first, first if paired else second)):
        for patient in range(size):
            n = int(generator.integers(1, most_notes + 1))
            ids += [f"{patient}" if paired else f"{side}-{patient}"] * n
            sides += ["ab"[side]] * n
    order = generator.permutation(len(ids))
    features = generator.normal(size=(len(ids), int(generator.integers(1, 6)))) * generator.uniform(0.1, 30)
    plan = PermutationPlan([ids[i] for i in order], [sides[i] for i in order], n_permutations=3, paired=paired)
    return features, plan


def over_pairs(plan, labels, value):
    """The unbiased statistic from the value of every pair of bundles of different patients."""
    found = {}
    for p in range(len(plan.patients)):
        for q in range(len(plan.patients)):
            if plan.row_person[p] != plan.row_person[q]:
                found.setdefault((bool(labels[p]), bool(labels[q])), []).append(value(p, q))
    return np.mean(found[True, True]) + np.mean(found[False, False]) - 2 * np.mean(found[True, False])


@settings(deadline=None, max_examples=60)
@given(WORLDS)
def test_mmd_is_the_loop_over_pairs_of_patients(drawn):
    features, plan = world(drawn)
    width = median_distance(features, plan.row_person[plan.note_patient], seed=plan.seed)
    kernel = np.mean([rbf_kernel(features, gamma=1 / (2 * (s * width) ** 2)) for s in (0.5, 1, 2)], axis=0)
    notes = [np.flatnonzero(plan.note_patient == row) for row in range(len(plan.patients))]
    values = [
        over_pairs(plan, plan.membership[:, column], lambda p, q: kernel[np.ix_(notes[p], notes[q])].mean())
        for column in range(4)
    ]
    result = mmd_test(features, plan)
    assert result.statistic == pytest.approx(values[0], abs=1e-10)
    assert result.null_mean == pytest.approx(np.mean(values[1:]), abs=1e-10)


@settings(deadline=None, max_examples=40)
@given(WORLDS, st.integers(1, 30))
def test_streamed_random_features_are_the_loop_over_pairs_of_patients(drawn, notes_at_once):
    features, plan = world(drawn)
    width = median_distance(features, plan.row_person[plan.note_patient], seed=plan.seed)
    mapped = RandomFeatures(features.shape[1], width, 24, plan.seed).transform(features).astype(np.float64)
    means = np.stack([mapped[plan.note_patient == row].mean(axis=0) for row in range(len(plan.patients))])
    before = random_features._CELLS_AT_ONCE
    random_features._CELLS_AT_ONCE = 24 * notes_at_once
    try:
        result = mmd_test(features, plan, exact_up_to=0, n_random_features=24)
    finally:
        random_features._CELLS_AT_ONCE = before
    values = [over_pairs(plan, plan.membership[:, c], lambda p, q: means[p] @ means[q]) for c in range(4)]
    assert result.statistic == pytest.approx(values[0], abs=2e-6)
    assert result.null_mean == pytest.approx(np.mean(values[1:]), abs=2e-6)


def test_the_median_distance_is_that_of_scipy_over_one_note_a_patient():
    features, plan = world((1, 9, 9, 1, False))
    distances = cdist(features, features)[np.triu_indices(18, 1)]
    assert median_distance(features, plan.note_patient) == pytest.approx(np.median(distances))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(20, 60), st.integers(20, 60))
def test_coral_is_that_of_numpy_covariances(seed, first, second):
    """With one note a patient patients' weights are equal, and numpy knows the covariance."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(first + second, 2)) * generator.uniform(0.5, 5, size=2)
    ids = [str(i) for i in range(first + second)]
    plan = PermutationPlan(ids, ["a"] * first + ["b"] * second, n_permutations=3)
    values = []
    target = plan.membership[plan.note_patient]
    for column in range(4):
        sides = [np.cov(features[target[:, column] == side].T, bias=True) for side in (True, False)]
        values.append(np.linalg.norm(sides[0] - sides[1]) ** 2 / (4 * 2**2))
    result = coral_test(features, plan)
    assert result.statistic == pytest.approx(values[0], rel=1e-8)
    assert result.null_mean == pytest.approx(np.mean(values[1:]), rel=1e-8)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000))
def test_jensen_shannon_is_that_of_scipy(seed):
    generator = np.random.default_rng(seed)
    kinds = generator.choice(list("abcd"), 30)
    plan = PermutationPlan([str(i) for i in range(30)], ["a"] * 14 + ["b"] * 16, n_permutations=3)
    shift = histogram_test(kinds, plan)
    assert shift.jensen_shannon.statistic == pytest.approx(jensenshannon(*shift.shares, base=2) ** 2, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(WORLDS)
def test_t_is_that_of_scipy(drawn):
    features, plan = world(drawn)
    means = np.array([features[plan.note_patient == row, 0].mean() for row in range(len(plan.patients))])
    sides = [means[plan.is_target], means[~plan.is_target]]
    expected = ttest_rel(*sides) if drawn[-1] else ttest_ind(*sides, equal_var=False)
    found = max_t_test(features[:, :1], ["x"], plan).measures[0]
    assert found.statistic == pytest.approx(abs(expected.statistic), rel=1e-6)
    assert found.difference == pytest.approx(sides[0].mean() - sides[1].mean(), abs=1e-9)
    scaled = length_test(np.exp(features[:, 0] / 30), plan)
    assert scaled.statistic == pytest.approx(abs(expected.statistic), rel=1e-6)
    assert math.log(scaled.effect) == pytest.approx(found.difference / 30)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(1, 6))
def test_the_weighted_rank_sum_is_the_area_of_scikit_learn(seed, n, levels):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, levels, size=(n, 1)).astype(float)
    labels = np.zeros((n, 1))
    labels[: max(1, n // 3)] = 1
    weight = generator.uniform(0.1, 2, n)
    won, _ = domain_classifier._placements(scores, labels, weight)
    possible = weight[labels[:, 0] == 1].sum() * weight[labels[:, 0] == 0].sum()
    area = roc_auc_score(labels[:, 0], scores[:, 0], sample_weight=weight)
    assert won[0] / possible == pytest.approx(area, abs=1e-9)
