"""Many quantities at once: equal to naive loops, the right family-wise error, and each difference in its own unit."""

import math

import numpy as np
import pytest
from scipy import stats

from clinical_nlp.errors import TooFewPatientsError, UsageError
from clinical_nlp.statistics.max_t import max_t_test, output_shift_test
from clinical_nlp.statistics.permutation import PermutationPlan
from clinical_nlp.statistics.ratios import length_test


def quantities(seed, *, patients=(25, 25), k=6, shift=(), most_notes=6, missing=0.0):
    """Correlated quantities with 30 % of their variance between patients; `shift` is added at the second place."""
    generator = np.random.default_rng(seed)
    ids, sides, values = [], [], []
    for side in range(2):
        for patient in range(patients[side]):
            n = generator.integers(1, most_notes + 1)
            own = generator.normal(size=k) + generator.normal()
            rows = own * math.sqrt(0.15) + generator.normal(size=(n, k)) * math.sqrt(0.7)
            rows[:, : len(shift)] += np.array(shift) * side
            values.append(np.where(generator.random((n, k)) < missing, math.nan, rows))
            ids += [f"{side}-{patient}"] * n
            sides += [f"h{side}"] * n
    return np.concatenate(values), ids, sides


def naive_t(values, plan, labels, column):
    """Welch's |t| by scipy over the patients' means of the notes that have the quantity."""
    means = {}
    for row in range(len(plan.patients)):
        notes = values[plan.note_patient == row, column]
        if np.isfinite(notes).any():
            means[row] = np.nanmean(notes)
    sides = [[mean for row, mean in means.items() if labels[row] == side] for side in (True, False)]
    return abs(stats.ttest_ind(*sides, equal_var=False).statistic)


def naive_step_down(observed, permuted):
    adjusted, before = np.empty(len(observed)), 0.0
    order = np.argsort(-observed)
    for rank, row in enumerate(order):
        largest = permuted[order[rank:]].max(axis=0)
        before = max(before, (1 + (largest >= observed[row] - 1e-12).sum()) / (1 + len(largest)))
        adjusted[row] = before
    return adjusted


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_it_equals_a_naive_loop(missing):
    values, ids, sides = quantities(0, patients=(8, 9), k=3, shift=(1.0,), missing=missing)
    plan = PermutationPlan(ids, sides, n_permutations=39)
    found = max_t_test(values, ["a", "b", "c"], plan)
    naive = np.array([[naive_t(values, plan, plan.membership[:, c], k) for c in range(40)] for k in range(3)])
    assert [shift.statistic for shift in found.measures] == pytest.approx(naive[:, 0])
    assert found.test.statistic == pytest.approx(naive[:, 0].max())
    assert found.test.null_mean == pytest.approx(naive[:, 1:].max(axis=0).mean())
    expected = naive_step_down(naive[:, 0], naive[:, 1:])
    assert [shift.adjusted_p for shift in found.measures] == pytest.approx(expected)
    assert found.test.p_value == min(shift.adjusted_p for shift in found.measures)


def test_family_wise_error_under_none_and_under_some_differences():
    """Naming any quantity that does not differ: at most 5 %, whether or not others differ."""
    runs, names = 300, list("abcdef")
    any_named, any_true_null_named, alone = 0, 0, 0
    for run in range(runs):
        values, ids, sides = quantities(run)
        plan = PermutationPlan(ids, sides, n_permutations=99, seed=run)
        found = max_t_test(values, names, plan)
        any_named += found.test.p_value <= 0.05
        alone += min(shift.p_value for shift in found.measures) <= 0.05
        values, ids, sides = quantities(run, shift=(1.5, 1.5))
        found = max_t_test(values, names, PermutationPlan(ids, sides, n_permutations=99, seed=run))
        any_true_null_named += min(shift.adjusted_p for shift in found.measures[2:]) <= 0.05
    bound = 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)
    assert any_named / runs <= bound
    assert any_true_null_named / runs <= bound
    assert alone / runs > bound, "without adjustment six quantities alarm more often, or this test shows nothing"


def test_the_difference_is_in_its_own_unit_and_its_interval_covers():
    covered = 0
    for run in range(200):
        values, ids, sides = quantities(run, k=2, shift=(0.5,))
        shift = max_t_test(values, ["words", "x"], PermutationPlan(ids, sides, n_permutations=19)).measures[0]
        assert shift.difference == pytest.approx(shift.other - shift.reference)
        covered += shift.low <= 0.5 <= shift.high
    assert abs(covered / 200 - 0.95) < 3 * math.sqrt(0.05 * 0.95 / 200)


def test_a_quantity_that_separates_completely_is_found_and_a_constant_one_is_not():
    ids = [f"{side}{i}" for side in "ab" for i in range(25)]
    plan = PermutationPlan(ids, [i[0] for i in ids], n_permutations=199)
    values = np.column_stack([np.arange(50) >= 25, np.full(50, 3.3)]).astype(float)
    separates, constant = max_t_test(values, ["separates", "constant"], plan).measures
    assert separates.adjusted_p == pytest.approx(1 / 200)
    assert constant.p_value == 1.0
    assert "all alike" in constant.note
    assert math.isnan(constant.low)
    assert length_test(1 + values[:, 0], plan).p_value == pytest.approx(1 / 200)


def test_a_quantity_measured_at_one_institution_only_is_nan_with_the_reason():
    values, ids, sides = quantities(1, k=2)
    values[np.array(sides) == "h0", 1] = math.nan
    found = max_t_test(values, ["both", "one"], PermutationPlan(ids, sides, n_permutations=19))
    assert math.isnan(found.measures[1].p_value)
    assert math.isnan(found.measures[1].adjusted_p)
    assert "fewer than 2 patients" in found.measures[1].note
    assert found.measures[1].n_patients[0] == 0
    assert not math.isnan(found.test.p_value)


def mixed_types(seed, *, shift=0.0, patients=60):
    """Two note types with other values, mixed differently at the two institutions; within a type nothing differs."""
    generator = np.random.default_rng(seed)
    ids, sides, kinds, values = [], [], [], []
    for side in range(2):
        for patient in range(patients):
            n, share = generator.integers(2, 9), generator.beta(2 + 2 * side, 4 - 2 * side)
            kind = generator.random(n) < share
            values.append(generator.normal() * 0.55 + generator.normal(size=n) * 0.84 + 1.5 * kind + shift * side)
            ids += [f"{side}-{patient}"] * n
            sides += [f"h{side}"] * n
            kinds += np.where(kind, "letter", "note").tolist()
    return np.concatenate(values)[:, None], ids, sides, kinds


def test_within_cells_equals_a_naive_weighted_difference():
    values, ids, sides, kinds = mixed_types(0, patients=8)
    plan = PermutationPlan(ids, sides, n_permutations=19)
    found = max_t_test(values, ["x"], plan, cells=kinds)
    parts = []
    for kind in ("letter", "note"):
        means = {side: [] for side in (False, True)}
        for row in range(len(plan.patients)):
            notes = values[(plan.note_patient == row) & (np.array(kinds) == kind), 0]
            if len(notes):
                means[bool(plan.is_target[row])].append(notes.mean())
        weight = len(means[True]) + len(means[False])
        parts.append((weight, np.mean(means[True]) - np.mean(means[False])))
    naive = sum(w * d for w, d in parts) / sum(w for w, _ in parts)
    assert found.measures[0].difference == pytest.approx(naive)
    assert "approximate" in found.measures[0].note


def test_cells_without_patients_on_both_sides_are_left_out_or_refused():
    values, ids, sides, kinds = mixed_types(1, patients=20)
    plan = PermutationPlan(ids, sides, n_permutations=19)
    rare = ["once" if i == 0 else kind for i, kind in enumerate(kinds)]
    assert "1 notes of cells" in max_t_test(values, ["x"], plan, cells=rare).measures[0].note
    with pytest.raises(TooFewPatientsError, match="wider cells"):
        max_t_test(values, ["x"], plan, cells=range(len(ids)))


def test_outputs_that_move_or_spread_are_named():
    generator = np.random.default_rng(5)
    ids = [f"{side}{i}" for side in "ab" for i in range(60) for _ in range(3)]
    sides = [i[0] for i in ids]
    scores = generator.normal(size=(360, 3))
    scores[180:, 1] += 0.7
    scores[180:, 2] *= 1.8
    found = output_shift_test(scores, ["x", "y", "z"], PermutationPlan(ids, sides, n_permutations=199))
    named = {shift.name for shift in found.measures if shift.adjusted_p <= 0.05}
    assert {"y", "z (squared distance from the mean)"} <= named
    assert not named & {"x", "z", "x (squared distance from the mean)"}
    assert found.test.name == "outputs"


def test_what_does_not_fit_is_said():
    plan = PermutationPlan(list("abcd"), list("xxyy"), n_permutations=5)
    with pytest.raises(UsageError, match="4 notes, 2 names"):
        max_t_test(np.zeros((4, 1)), ["a", "b"], plan)
    with pytest.raises(UsageError, match="infinities"):
        max_t_test(np.full((4, 1), np.inf), ["a"], plan)
    with pytest.raises(UsageError, match="one row for each"):
        output_shift_test(np.zeros((3, 1)), ["a"], plan)
