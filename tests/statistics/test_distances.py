"""Distances equal naive formulas for every relabelling, and their excess is nil where nothing differs."""

import math

import numpy as np
import pytest
from scipy import linalg

from clinical_nlp.errors import UsageError
from clinical_nlp.statistics.distances import calibration_shift_test, coral_test, frechet_test, histogram_test
from clinical_nlp.statistics.permutation import PermutationPlan


def notes(seed, *, patients=(40, 40), dimensions=4, spread=1.0, most_notes=6):
    generator = np.random.default_rng(seed)
    ids, sides, rows = [], [], []
    for side in range(2):
        for patient in range(patients[side]):
            n = generator.integers(1, most_notes + 1)
            own = generator.normal(size=dimensions) * math.sqrt(0.3)
            rows.append((own + generator.normal(size=(n, dimensions)) * math.sqrt(0.7)) * (spread if side else 1.0))
            ids += [f"{side}-{patient}"] * n
            sides += [f"h{side}"] * n
    return np.concatenate(rows), ids, sides


def naive_moments(features, plan, labels, side):
    mean, second, n = 0.0, 0.0, 0
    for row in range(len(plan.patients)):
        if labels[row] == side:
            own = features[plan.note_patient == row]
            mean = mean + sum(x for x in own) / len(own)
            second = second + sum(np.outer(x, x) for x in own) / len(own)
            n += 1
    return mean / n, second / n - np.outer(mean / n, mean / n)


def test_coral_and_frechet_equal_naive_loops():
    """With as many components as features the rotation changes neither distance."""
    features, ids, sides = notes(0, spread=1.5)
    features[:, 0] *= 2
    plan = PermutationPlan(ids, sides, n_permutations=9)
    coral, frechet = coral_test(features, plan), frechet_test(features, plan)
    naive = {"coral": [], "frechet": []}
    for column in range(10):
        (m0, c0), (m1, c1) = (naive_moments(features, plan, plan.membership[:, column], side) for side in (False, True))
        naive["coral"].append(sum((c1 - c0)[i, j] ** 2 for i in range(4) for j in range(4)) / (4 * 16))
        root = linalg.sqrtm(c0 @ c1).real
        naive["frechet"].append(((m1 - m0) ** 2).sum() + np.trace(c0 + c1 - 2 * root))
    for result in (coral, frechet):
        values = naive[result.name]
        assert result.statistic == pytest.approx(values[0], rel=1e-8)
        assert result.null_mean == pytest.approx(np.mean(values[1:]), rel=1e-8)
        assert result.effect == pytest.approx(values[0] - np.mean(values[1:]), rel=1e-8)
        assert math.isnan(result.low)
        assert "4 principal components with 100 %" in result.note


def test_components_are_few_where_patients_are_few():
    features, ids, sides = notes(1, patients=(25, 40), dimensions=6)
    assert "on 2 principal components" in coral_test(features, PermutationPlan(ids, sides, n_permutations=9)).note


def test_psi_and_jensen_shannon_by_hand():
    ids, sides = list("abcdefgh"), list("xxxxyyyy")
    plan = PermutationPlan(ids, sides, n_permutations=19)
    shift = histogram_test(["a", "a", "b", "c", "a", "b", "b", "b"], plan)
    assert shift.bins == ("a", "b", "c")
    assert shift.shares == ((0.5, 0.25, 0.25), (0.25, 0.75, 0.0))
    p, q = np.array([2.5, 1.5, 1.5]) / 5.5, np.array([1.5, 3.5, 0.5]) / 5.5
    assert shift.population_stability.statistic == pytest.approx(sum((q - p) * np.log(q / p)))
    p, q = np.array(shift.shares)
    m = (p + q) / 2
    js = 0.5 * sum(x * math.log2(x / y) for x, y in zip([*p, *q], [*m, *m], strict=True) if x > 0)
    assert shift.jensen_shannon.statistic == pytest.approx(js)


def test_numbers_are_binned_at_pooled_quantiles_with_ties_together_and_nan_apart():
    ids = [f"{side}{i}" for side in "xy" for i in range(50)]
    plan = PermutationPlan(ids, [i[0] for i in ids], n_permutations=9)
    values = np.concatenate([np.zeros(60), np.arange(1, 40), [math.nan]])
    shift = histogram_test(values, plan, n_bins=5)
    assert shift.bins[0] == "up to 0"
    assert shift.bins[-1] == "not measured"
    assert sum(shift.shares[0]) == pytest.approx(1)
    assert shift.shares[1][-1] == pytest.approx(1 / 50)
    assert shift.shares[0][0] == pytest.approx(1.0)


def test_the_null_mean_of_the_stability_index_is_what_theory_says():
    """One note a patient: (bins - 1)(1/n + 1/m), which a fixed threshold of 0.1 would call a shift at n = 100."""
    generator = np.random.default_rng(0)
    ids = [f"{side}{i}" for side in "xy" for i in range(100)]
    plan = PermutationPlan(ids, [i[0] for i in ids], n_permutations=999)
    found = histogram_test(generator.normal(size=200), plan).population_stability
    assert found.null_mean == pytest.approx(9 * 2 / 100, rel=0.1)


def test_calibration_shift_equals_a_loop_and_finds_one():
    generator = np.random.default_rng(3)
    _, ids, sides = notes(3)
    probabilities = np.round(generator.random(len(ids)), 2)
    outcomes = (generator.random(len(ids)) < probabilities).astype(int)
    plan = PermutationPlan(ids, sides, n_permutations=9)
    found = calibration_shift_test(probabilities, outcomes, plan, n_bins=2)
    order = np.argsort(probabilities, kind="stable")
    mass = np.cumsum(plan.note_weight[order])
    cut = probabilities[order][np.flatnonzero(mass >= mass[-1] / 2)[0]]
    naive = 0.0
    for inside in (probabilities <= cut, probabilities > cut):
        parts = []
        for side in (True, False):
            rows = [row for row in range(len(plan.patients)) if plan.is_target[row] == side]
            residual = [((outcomes - probabilities) * inside)[plan.note_patient == row].mean() for row in rows]
            parts.append(np.mean(residual))
        naive += abs(parts[0] - parts[1])
    assert found.statistic == pytest.approx(naive)
    off = outcomes.copy()
    off[np.array(sides) == "h1"] = 1 - off[np.array(sides) == "h1"]
    found = calibration_shift_test(probabilities, off, PermutationPlan(ids, sides, n_permutations=199))
    assert found.p_value == pytest.approx(1 / 200)
    assert found.effect > 0.2


def test_size_and_power_of_all_distances():
    rejected = {"size": {}, "power": {}}
    excess = []
    for run in range(100):
        for kind, spread in (("size", 1.0), ("power", 1.6)):
            features, ids, sides = notes(run, spread=spread)
            plan = PermutationPlan(ids, sides, n_permutations=99, seed=run)
            shift = histogram_test(features[:, 0], plan)
            results = (coral_test(features, plan), frechet_test(features, plan), *_both(shift))
            for result in results:
                rejected[kind][result.name] = rejected[kind].get(result.name, 0) + (result.p_value <= 0.05)
            if kind == "size":
                excess.append([result.effect / result.null_sd for result in results])
    assert max(rejected["size"].values()) <= 100 * (0.05 + 3 * math.sqrt(0.05 * 0.95 / 100)), rejected
    assert min(rejected["power"].values()) > 60, rejected
    assert np.abs(np.mean(excess, axis=0)).max() < 4 / math.sqrt(100)


def _both(shift):
    return shift.population_stability, shift.jensen_shannon


def test_constant_embeddings_are_no_finding():
    plan = PermutationPlan(list("abcdef"), list("xxxyyy"), n_permutations=19)
    for result in (coral_test(np.ones((6, 3)), plan), frechet_test(np.ones((6, 3)), plan)):
        assert result.statistic == pytest.approx(0.0, abs=1e-12)
        assert result.effect == pytest.approx(0.0, abs=1e-12)
        assert result.p_value == 1.0


def test_what_does_not_fit_is_said():
    plan = PermutationPlan(list("abcd"), list("xxyy"), n_permutations=5)
    with pytest.raises(UsageError, match="not finite"):
        coral_test(np.full((4, 2), math.nan), plan)
    with pytest.raises(UsageError, match="dimensions"):
        frechet_test(np.zeros((4, 2)), plan, dimensions=0)
    with pytest.raises(UsageError, match="one for each of the plan's notes"):
        histogram_test(np.zeros(3), plan)
    with pytest.raises(UsageError, match="no finite number"):
        histogram_test(np.full(4, math.nan), plan)
    with pytest.raises(UsageError, match="between 0 and 1"):
        calibration_shift_test(np.full(4, 1.2), np.zeros(4), plan)
    with pytest.raises(UsageError, match="0 or 1"):
        calibration_shift_test(np.zeros(4), np.full(4, 0.5), plan)
