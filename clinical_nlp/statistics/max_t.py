"""Which of many quantities of the notes differ? Studentised differences of patients' means, largest first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clinical_nlp.errors import UsageError
from clinical_nlp.statistics.intervals import FEWEST_PATIENTS
from clinical_nlp.statistics.permutation import PermutationPlan
from clinical_nlp.statistics.two_sample import Groups, TestResult, as_result, both_sides, compared_groups


@dataclass(frozen=True, slots=True)
class MeasureShift:
    """How one quantity of the notes differs: the average patient's average note at the reference and at the other.

    `low` and `high` bound the difference at 95 % (Welch), each quantity by itself; NaN with the reason in `note`.
    `p_value` is of this quantity alone, `adjusted_p` holds for all quantities of the test together. `n_patients`
    have it measured.
    """

    name: str
    reference: float
    other: float
    difference: float
    low: float
    high: float
    statistic: float
    p_value: float
    adjusted_p: float
    n_patients: tuple[int, int]
    n_notes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class ManyMeasures:
    """The test that anything differs, and each quantity in the order given."""

    test: TestResult
    measures: tuple[MeasureShift, ...]


def max_t_test(
    values: np.ndarray,
    names: Sequence[str],
    plan: PermutationPlan,
    *,
    cells: Sequence[object] | None = None,
    name: str = "max_t",
) -> ManyMeasures:
    """Which of many quantities of the notes differ? The largest studentised difference against relabelled patients.

    Each quantity is averaged within patients; its statistic is |t| of the difference of the patients' means (Welch;
    studentised, so that no quantity rules the maximum by its scale or by the spread of one side). Adjusted p-values
    come from successive maxima over the same relabellings: the chance of naming any quantity that does not differ
    stays below the level, however the quantities depend on each other.

    Parameters
    ----------
    values : (n_notes, k); NaN where a quantity was not measured on a note, which is then left out of its average.
    names : of the k quantities.
    plan : the relabellings.
    cells : one label a note, such as note type and year: differences are taken within each cell and summed with the
        cell's share of patients as fixed weight. Goes with a plan over `profile_strata`. Differences are divided by
        their standard deviation over relabellings then, and have no interval.
    name : of the test.

    Returns
    -------
    ManyMeasures; the test's effect is the largest |t|.

    References
    ----------
    Westfall and Young 1993, Resampling-Based Multiple Testing, Wiley, algorithm 2.8 (step-down maxT).
    """
    from scipy import stats

    values = np.asarray(values, dtype=np.float64)
    if values.shape != (len(plan.note_patient), len(names)) or not len(names):
        raise UsageError(
            f"{name}: values have shape {values.shape}; {len(plan.note_patient)} notes, {len(names)} names"
        )
    if np.isinf(values).any():
        raise UsageError(f"{name}: values hold infinities")
    measured = np.isfinite(values)
    patients = _measured_means(values, measured, plan.note_patient, len(plan.patients))
    difference, error, freedom = studentised(patients, plan)
    if cells is None:
        statistic, why = absolute_t(difference, error), ""
    else:
        groups, why = compared_groups(cells, plan)
        difference = _within_groups(values, measured, groups, plan)
        spread = np.nanstd(difference, axis=1, keepdims=True)
        statistic = absolute_t(difference - np.nanmean(difference, axis=1, keepdims=True), spread)
    adjusted = _step_down(statistic, plan)
    shifts = []
    for row, quantity in enumerate(names):
        has = np.isfinite(patients[:, row])
        sides = [has & (plan.is_target == side) for side in (False, True)]
        counts = (int(sides[0].sum()), int(sides[1].sum()))
        means = [float(patients[side, row].mean()) if side.any() else math.nan for side in sides]
        low = high = math.nan
        note = why
        if not note and min(counts) < FEWEST_PATIENTS:
            note = f"no interval: fewer than {FEWEST_PATIENTS} patients in an institution"
        elif not note and error[row, 0] == 0:
            note = "no interval: the patients of each institution are all alike"
        elif not note:
            reach = float(stats.t.ppf(0.975, freedom[row, 0]) * error[row, 0])
            low, high = float(difference[row, 0]) - reach, float(difference[row, 0]) + reach
        shifts.append(
            MeasureShift(
                name=quantity,
                reference=means[0],
                other=means[1],
                difference=float(difference[row, 0]),
                low=low,
                high=high,
                statistic=float(statistic[row, 0]),
                p_value=plan.p_value(statistic[row]),
                adjusted_p=float(adjusted[row]),
                n_patients=counts,
                n_notes=int(measured[:, row].sum()),
                note=note if min(counts) >= 2 else "measured on fewer than 2 patients of an institution",
            )
        )
    largest = np.fmax.reduce(statistic, axis=0)
    test = as_result(
        name, plan, largest, effect=float(largest[0]), effect_unit="largest |t|", note="a maximum has no valid interval"
    )
    return ManyMeasures(test, tuple(shifts))


def output_shift_test(
    scores: np.ndarray, names: Sequence[str], plan: PermutationPlan, *, cells: Sequence[object] | None = None
) -> ManyMeasures:
    """Do a model's outputs differ? Location and spread of every output over the notes; see `max_t_test`.

    A black-box test: it needs what a model says, not the model. It sees what matters to this model only; a change
    that leaves every output's distribution alone passes.

    Parameters
    ----------
    scores : (n_notes, k) probabilities, logits or counts.
    names : of the k outputs.
    plan : the relabellings.
    cells : see `max_t_test`.

    References
    ----------
    Rabanser, Guennemann and Lipton 2019, Failing Loudly, NeurIPS 32.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or len(scores) != len(plan.note_patient):
        raise UsageError(f"scores have shape {scores.shape}; they need one row for each of the plan's notes")
    measured = np.isfinite(scores)
    weight = plan.note_weight[:, None] * measured
    with np.errstate(all="ignore"):
        centre = (weight * np.where(measured, scores, 0.0)).sum(axis=0) / weight.sum(axis=0)
    spread = (scores - centre) ** 2
    return max_t_test(
        np.column_stack([scores, spread]),
        [*names, *(f"{output} (squared distance from the mean)" for output in names)],
        plan,
        cells=cells,
        name="outputs",
    )


def studentised(values: np.ndarray, plan: PermutationPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Difference of patients' means, its standard error, and Welch's degrees of freedom, for every relabelling.

    Parameters
    ----------
    values : (n_rows, k), NaN where a quantity was not measured.

    Returns
    -------
    Three (k, 1 + n_permutations) arrays. A patient seen in both institutions makes the two means covary, and the
    error allows for it. NaN where a side has fewer than two patients.
    """
    labels = plan.membership.astype(np.float64)
    there = np.isfinite(values)
    everywhere = np.maximum(there.sum(axis=0), 1)
    values = np.where(there, values, 0.0)
    values = np.where(there, values - values.sum(axis=0) / everywhere, 0.0)
    # What differs by rounding only is the same.
    values = np.where(np.abs(values) > 1e-12 * np.maximum(1.0, np.abs(values).max(axis=0, initial=0.0)), values, 0.0)
    n, sums, squares = (both_sides(part, labels) for part in (there.astype(np.float64), values, values**2))
    with np.errstate(all="ignore"):
        means = sums / n
        variance = np.maximum(squares - sums * means, 0) / (n - 1) / n
        freedom = variance.sum(axis=0) ** 2 / (variance**2 / (n - 1)).sum(axis=0)
        total = variance.sum(axis=0)
        if len(plan.twins):
            paired = np.zeros_like(there)
            paired[plan.twins] = (there[plan.twins[:, 0]] & there[plan.twins[:, 1]])[:, None]
            first, second = values[plan.twins[:, 0]], values[plan.twins[:, 1]]
            products = (first * second * paired[plan.twins[:, 0]]).sum(axis=0)[:, None]
            of_pairs = both_sides(np.where(paired, values, 0.0), labels)
            n_pairs = paired[plan.twins[:, 0]].sum(axis=0)[:, None]
            covariance = products - means[0] * of_pairs[1] - means[1] * of_pairs[0] + n_pairs * means[0] * means[1]
            total = total - 2 * covariance / np.sqrt((n * (n - 1)).prod(axis=0))
            freedom = np.where(n_pairs > 0, n.min(axis=0) - 1, freedom)
        # Rounding leaves crumbs where everything cancels.
        total = np.where(total > 1e-24 * np.maximum(1.0, (squares / n).max(axis=0)), total, 0.0)
        usable = n.min(axis=0) >= 2
        found = (means[1] - means[0], np.sqrt(total), freedom)
        return tuple(np.where(usable, part, math.nan) for part in found)  # type: ignore[return-value]


def absolute_t(difference: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return |t|; without spread 0 where nothing differs and infinity where something does."""
    with np.errstate(all="ignore"):
        whole = np.where(np.abs(difference) > 1e-12, np.inf, 0.0)
        return np.where(np.isnan(error), math.nan, np.where(error > 0, np.abs(difference) / error, whole))


def _measured_means(values: np.ndarray, measured: np.ndarray, rows: np.ndarray, n_rows: int) -> np.ndarray:
    from scipy import sparse

    summing = sparse.csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(n_rows, len(rows)))
    count = summing @ measured.astype(np.float64)
    total = summing @ np.where(measured, values, 0.0)
    return np.divide(total, count, out=np.full(total.shape, math.nan), where=count > 0)


def _step_down(statistic: np.ndarray, plan: PermutationPlan) -> np.ndarray:
    """Adjusted p of each row of statistics (k, columns); NaN where the observed one is NaN."""
    adjusted = np.full(len(statistic), math.nan)
    order = [row for row in np.argsort(-statistic[:, 0], kind="stable") if not math.isnan(statistic[row, 0])]
    successive = np.full(statistic.shape[1], -np.inf)
    raw = []
    for row in reversed(order):
        successive = np.fmax(successive, statistic[row])
        raw.append(plan.p_value(np.concatenate([statistic[row, :1], successive[1:]])))
    adjusted[order] = np.maximum.accumulate(raw[::-1]) if raw else []
    return adjusted


def _within_groups(values: np.ndarray, measured: np.ndarray, groups: Groups, plan: PermutationPlan) -> np.ndarray:
    """Differences within each group of notes summed with the groups' weights, (k, columns)."""
    total = np.zeros((values.shape[1], plan.n_permutations + 1))
    weights = np.zeros((values.shape[1], 1))
    for notes, rows, weight in groups:
        local = np.searchsorted(rows, plan.note_patient[notes])
        patients = _measured_means(values[notes], measured[notes], local, len(rows))
        there = np.isfinite(patients)
        labels = plan.membership[rows].astype(np.float64)
        n = both_sides(there.astype(np.float64), labels)
        sums = both_sides(np.where(there, patients, 0.0), labels)
        usable = n.min(axis=(0, 2)) >= 1
        with np.errstate(all="ignore"):
            means = sums / n
        total[usable] += weight * (means[1] - means[0])[usable]
        weights[usable] += weight
    with np.errstate(all="ignore"):
        return np.where(weights > 0, total / weights, math.nan)
