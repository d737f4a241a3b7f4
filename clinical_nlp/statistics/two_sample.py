"""Do two institutions' notes differ? Tests that permute whole patients and let every patient weigh the same.

How many notes a patient has is a difference of its own (`utilisation_test`). With very unequal numbers of notes the
tests over all notes are approximate; a plan over one random note a patient is exact, and a report gives both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clinical_nlp.errors import TooFewPatientsError, UsageError
from clinical_nlp.statistics.intervals import FEWEST_PATIENTS
from clinical_nlp.statistics.permutation import PermutationPlan

_CELLS_AT_ONCE = 8_000_000
_FEWEST_FOR_T = 5


@dataclass(frozen=True, slots=True)
class TestResult:
    """One test of one comparison.

    `statistic` is what was permuted; `null_mean` and `null_sd` are over the permutations. `effect` says the same in
    a unit that means something (`effect_unit`), with an interval where a valid one exists; otherwise `low` and
    `high` are NaN and `note` says why. `n_units` counts what was permuted: patients.
    """

    __test__ = False  # not a pytest class

    name: str
    statistic: float
    p_value: float
    null_mean: float
    null_sd: float
    n_units: int
    n_notes: int
    n_permutations: int
    smallest_p: float
    effect: float
    effect_unit: str
    low: float = math.nan
    high: float = math.nan
    unit: str = "patient"
    note: str = ""


def as_result(
    name: str,
    plan: PermutationPlan,
    values: np.ndarray,
    *,
    effect: float,
    effect_unit: str,
    low: float = math.nan,
    high: float = math.nan,
    note: str = "",
) -> TestResult:
    """Return the result of a test from the statistic of every relabelling, the observed one first."""
    permuted = values[1:][np.isfinite(values[1:])]
    return TestResult(
        name=name,
        statistic=float(values[0]),
        p_value=plan.p_value(values),
        null_mean=float(permuted.mean()) if len(permuted) else math.nan,
        null_sd=float(permuted.std(ddof=1)) if len(permuted) > 1 else math.nan,
        n_units=plan.n_people,
        n_notes=len(plan.note_patient),
        n_permutations=plan.n_permutations,
        smallest_p=plan.smallest_p,
        effect=effect,
        effect_unit=effect_unit,
        low=low,
        high=high,
        note=note,
    )


def checked_features(features: np.ndarray, plan: PermutationPlan) -> np.ndarray:
    """Return (n_notes, d) float64 features, or say what is wrong with them."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) != len(plan.note_patient):
        raise UsageError(f"features have shape {features.shape}; they need one row for each of the plan's notes")
    if not np.isfinite(features).all():
        raise UsageError("features hold values that are not finite")
    return features


def patient_means(values: np.ndarray, plan: PermutationPlan) -> np.ndarray:
    """Average notes (n_notes, k) within the rows of the plan: (n_rows, k)."""
    return np.asarray(_averaging(plan) @ values)


def _averaging(plan: PermutationPlan) -> Any:
    """(n_rows, n_notes) sparse; multiplied with values of the notes it averages them within patients."""
    from scipy import sparse

    shape = (len(plan.patients), len(plan.note_patient))
    return sparse.csr_array((plan.note_weight, (plan.note_patient, np.arange(shape[1]))), shape=shape)


# Domain classifier ---------------------------------------------------------------------------------------------------


def domain_classifier_test(features: np.ndarray, plan: PermutationPlan, *, n_folds: int = 5) -> TestResult:
    """How well a note of an unseen patient gives its institution away.

    A ridge discriminant is fitted on the patients of the other folds (each patient weighs 1; features standardised
    inside the fold; penalty equal to the number of features, as for a unit prior) and scores the patients of this
    one. The statistic is the area under the ROC curve over pairs of patients of one fold, 0.5 at chance. Folds are
    drawn without looking at institutions, so that every relabelling goes through exactly the same procedure; one
    factorisation a fold serves all relabellings.

    Parameters
    ----------
    features : (n_notes, d), made without looking at institutions.
    plan : the relabellings.
    n_folds : folds of patients.

    Returns
    -------
    TestResult; `effect` is the AUC, with an interval on the arcsine scale from DeLong's variance over patients, not
    narrower than the spread over relabellings.

    References
    ----------
    Lopez-Paz and Oquab 2017, Revisiting Classifier Two-Sample Tests, arXiv 1610.06545.
    DeLong, DeLong and Clarke-Pearson 1988, Biometrics 44.
    """
    features = checked_features(features, plan)
    n_patients = len(plan.patients)
    n_folds = max(2, min(n_folds, n_patients // 2))
    fold_of = np.random.default_rng([plan.seed, 1]).permutation(n_patients) % n_folds
    members = plan.membership
    won = np.zeros(members.shape[1])
    pairs = np.zeros(members.shape[1])
    placement = np.full(n_patients, math.nan)
    for fold in range(n_folds):
        inside = fold_of == fold
        test = np.flatnonzero(inside[plan.note_patient])
        train = np.flatnonzero(~inside[plan.note_patient])
        weight = plan.note_weight[train]
        centre = np.average(features[train], axis=0, weights=weight)
        scale = np.sqrt(np.average((features[train] - centre) ** 2, axis=0, weights=weight))
        # A feature that is constant but for rounding must not be blown up to unit variance.
        varies = scale > 1e-9 * max(float(scale.max(initial=0.0)), 1e-300)
        scale = np.where(varies, scale, 1.0)
        known = np.where(varies, (features[train] - centre) / scale, 0.0)
        new = np.where(varies, (features[test] - centre) / scale, 0.0)
        gram = known.T @ (known * weight[:, None]) + features.shape[1] * np.eye(features.shape[1])
        means = np.zeros((n_patients, features.shape[1]))
        np.add.at(means, plan.note_patient[train], known * weight[:, None])
        directions = np.linalg.solve(gram, means[~inside].T)
        at_once = max(1, _CELLS_AT_ONCE // max(1, 4 * len(test)))
        for start in range(0, members.shape[1], at_once):
            labels = members[:, start : start + at_once].astype(np.float64)
            trained = labels[~inside] - labels[~inside].mean(axis=0)
            # Identical notes must tie, whatever order the arithmetic took.
            scores = np.round(new @ (directions @ trained), 9)
            here = labels[plan.note_patient[test]]
            fold_won, note_placement = _placements(scores, here, plan.note_weight[test])
            target = labels[inside].sum(axis=0)
            won[start : start + at_once] += fold_won
            pairs[start : start + at_once] += target * (inside.sum() - target)
            if start == 0:
                rows = plan.note_patient[test]
                sums = np.bincount(rows, weights=note_placement * plan.note_weight[test], minlength=n_patients)
                placement[inside] = sums[inside]
    auc = np.divide(won, pairs, out=np.full(len(won), 0.5), where=pairs > 0)
    low, high, note = _auc_interval(auc, placement, plan)
    return as_result(
        "domain_classifier",
        plan,
        auc,
        effect=float(auc[0]),
        effect_unit="AUC over pairs of patients",
        low=low,
        high=high,
        note=note,
    )


def _placements(scores: np.ndarray, is_target: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted Mann-Whitney sum per column, and for column 0 each note's share of the other side that it beats.

    Parameters
    ----------
    scores, is_target : (n, columns). weight : (n,).
    """
    order = np.argsort(scores, axis=0, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=0)
    target = np.take_along_axis(is_target, order, axis=0)
    mass = weight[order]
    other = np.cumsum(mass * (1 - target), axis=0)
    positions = np.arange(len(scores))[:, None]
    begins = np.vstack([np.ones((1, scores.shape[1]), dtype=bool), ranked[1:] != ranked[:-1]])
    ends = np.vstack([begins[1:], np.ones((1, scores.shape[1]), dtype=bool)])
    first = np.maximum.accumulate(np.where(begins, positions, 0), axis=0)
    last = np.minimum.accumulate(np.where(ends, positions, len(scores))[::-1], axis=0)[::-1]

    def below(cumulative: np.ndarray) -> np.ndarray:
        padded = np.vstack([np.zeros((1, cumulative.shape[1])), cumulative])
        return (np.take_along_axis(padded, first, axis=0) + np.take_along_axis(padded, last + 1, axis=0)) / 2

    beaten = below(other)
    won = (mass * target * beaten).sum(axis=0)

    own = np.cumsum(mass[:, :1] * target[:, :1], axis=0)
    first, last = first[:, :1], last[:, :1]
    n_target, n_other = own[-1, 0], other[-1, 0]
    share = np.full(len(scores), math.nan)
    if n_target > 0 and n_other > 0:
        share[order[:, 0]] = np.where(target[:, 0] == 1, beaten[:, 0] / n_other, 1 - below(own)[:, 0] / n_target)
    return won, share


def _auc_interval(aucs: np.ndarray, placement: np.ndarray, plan: PermutationPlan) -> tuple[float, float, str]:
    if min(plan.n_patients) < FEWEST_PATIENTS:
        return math.nan, math.nan, f"no interval: fewer than {FEWEST_PATIENTS} patients in an institution"
    # On the arcsine scale the spread hardly depends on the AUC, so that the interval holds up to 1.
    auc = min(max(float(aucs[0]), 0.0), 1.0)
    sides = [placement[plan.is_target == side] for side in (True, False)]
    scored = math.sqrt(sum(float(np.nanvar(side, ddof=1)) / np.isfinite(side).sum() for side in sides))
    slope = 2 * math.sqrt(auc * (1 - auc))
    # DeLong leaves out that other patients would have trained another discriminant; relabelling shows how much.
    reach = 1.959964 * max(scored / slope if slope > 1e-6 else 0.0, float(aucs[1:].std(ddof=1)))
    angle = math.asin(math.sqrt(auc))
    return math.sin(max(angle - reach, 0.0)) ** 2, math.sin(min(angle + reach, math.pi / 2)) ** 2, ""


# Maximum mean discrepancy ---------------------------------------------------------------------------------------------


def mmd_test(features: np.ndarray, plan: PermutationPlan) -> TestResult:
    """Unbiased squared maximum mean discrepancy, every patient weighing 1, pairs of one patient left out.

    The kernel is the mean of three Gaussians at half, once and twice the median distance between notes of different
    patients, pooled over institutions. It is averaged over the notes of every pair of patients once; each
    relabelling is then a product with a (patients x patients) matrix.

    Parameters
    ----------
    features : (n_notes, d), made without looking at institutions.
    plan : the relabellings.

    Returns
    -------
    TestResult; `effect` is the statistic in null standard deviations. It may be negative and is not clipped. No
    interval is given: resampling patients twins them with themselves, and such intervals exclude zero under no
    difference.

    References
    ----------
    Gretton et al. 2012, A Kernel Two-Sample Test, JMLR 13, eq. 3.
    """
    features = checked_features(features, plan)
    values = _mmd2(patient_kernel(features, plan), plan.membership)
    result = as_result("mmd", plan, values, effect=math.nan, effect_unit="", note="no valid interval exists for this")
    effect = (result.statistic - result.null_mean) / result.null_sd if result.null_sd > 0 else math.nan
    return as_result(
        "mmd", plan, values, effect=effect, effect_unit="standard deviations of the null", note=result.note
    )


def median_distance(features: np.ndarray, plan: PermutationPlan, *, at_most: int = 1000) -> float:
    """Median distance between notes of different patients, from one note each of at most `at_most` patients."""
    _, first = np.unique(plan.note_patient, return_index=True)
    if len(first) > at_most:
        first = np.sort(np.random.default_rng([plan.seed, 2]).choice(first, at_most, replace=False))
    squared = _squared_distances(features[first], features[first])
    distances = np.sqrt(squared[np.triu_indices(len(first), 1)])
    positive = distances[distances > 1e-7 * max(1.0, float(distances.max(initial=0.0)))]
    return float(np.median(positive)) if len(positive) else 1.0


def patient_kernel(features: np.ndarray, plan: PermutationPlan) -> np.ndarray:
    """(n_patients, n_patients) mean kernel over the notes of two patients, shifted by a constant, diagonal zero.

    The unbiased statistic does not change when a constant is subtracted from every pair; subtracting about the mean
    before summing keeps the sums small and the rounding error with them.
    """
    order = np.argsort(plan.note_patient, kind="stable")
    features = features[order] - features.mean(axis=0)
    counts = plan.notes_per_patient
    starts = np.concatenate([[0], np.cumsum(counts)])
    width = median_distance(_unsorted(features, order), plan)
    sample = features[np.linspace(0, len(features) - 1, min(len(features), 300)).astype(int)]
    constant = float(_gaussians(_squared_distances(sample, sample), width).mean())
    kernel = np.zeros((len(counts), len(counts)))
    row = 0
    while row < len(counts):
        notes = max(1, _CELLS_AT_ONCE // max(1, len(features) - starts[row]))
        stop = max(row + 1, int(np.searchsorted(starts, starts[row] + notes, side="right")) - 1)
        rows = slice(starts[row], starts[stop])
        block = _gaussians(_squared_distances(features[rows], features[starts[row] :]), width) - constant
        block = np.add.reduceat(block, starts[row:-1] - starts[row], axis=1)
        kernel[row:stop, row:] = np.add.reduceat(block, starts[row:stop] - starts[row], axis=0)
        row = stop
    kernel = np.triu(kernel, 1) / np.outer(counts, counts)
    return kernel + kernel.T


def _unsorted(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
    back = np.empty_like(rows)
    back[order] = rows
    return back


def _squared_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    squared = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1)[None, :] - 2 * (left @ right.T)
    return np.maximum(squared, 0, out=squared)


def _gaussians(squared: np.ndarray, width: float) -> np.ndarray:
    # exp(-d / (2 (s w)^2)) for s = 1/2, 1, 2: each is a power of the widest, so one exponential serves all three.
    widest = np.exp(squared / (-8 * width**2))
    middle = widest**4
    return (widest + middle + middle**4) / 3


def _mmd2(kernel: np.ndarray, membership: np.ndarray) -> np.ndarray:
    values = np.empty(membership.shape[1])
    row_sums, total = kernel.sum(axis=0), kernel.sum()
    at_once = max(1, _CELLS_AT_ONCE // len(kernel))
    for start in range(0, len(values), at_once):
        target = membership[:, start : start + at_once].astype(np.float64)
        n_target = target.sum(axis=0)
        n_reference = len(kernel) - n_target
        within = (target * (kernel @ target)).sum(axis=0)
        touching = row_sums @ target
        between = touching - within
        outside = total - 2 * touching + within
        values[start : start + at_once] = (
            within / (n_target * (n_target - 1))
            + outside / (n_reference * (n_reference - 1))
            - 2 * between / (n_target * n_reference)
        )
    return values


# Length and utilisation -----------------------------------------------------------------------------------------------


def ratio_test(name: str, values: np.ndarray, plan: PermutationPlan, *, effect_unit: str) -> TestResult:
    """Ratio of the geometric means of a positive quantity, one value a patient, two-sided.

    The permuted statistic is Welch's |t| of the patients' mean logarithms: studentised, it keeps its level when the
    spread of patients differs between the institutions, as it does when one writes more notes a patient.

    Parameters
    ----------
    name : of the result.
    values : (n_notes,) positive; averaged on the logarithmic scale within each patient.
    plan : the relabellings.
    effect_unit : words for the effect, e.g. "times as many words a note".

    Returns
    -------
    TestResult; `effect` is other / reference, with Welch's interval.

    References
    ----------
    Chung and Romano 2013, Exact and asymptotically robust permutation tests, Annals of Statistics 41.
    """
    from scipy import stats

    values = np.asarray(values, dtype=np.float64)
    if values.shape != plan.note_patient.shape or not (values > 0).all():
        raise UsageError(f"{name}: values must be positive, one for each of the plan's notes")
    logs = patient_means(np.log(values)[:, None], plan)
    difference, error, freedom = (found[0] for found in _studentised(logs, plan))
    low = high = math.nan
    note = ""
    if error[0] == 0:
        note = "no interval: the patients of each institution are all alike"
    elif min(plan.n_patients) < _FEWEST_FOR_T:
        note = f"no interval: fewer than {_FEWEST_FOR_T} patients in an institution"
    if not note:
        reach = stats.t.ppf(0.975, freedom[0]) * error[0]
        low, high = math.exp(difference[0] - reach), math.exp(difference[0] + reach)
    statistic = _absolute_t(difference, error)
    return as_result(
        name, plan, statistic, effect=math.exp(difference[0]), effect_unit=effect_unit, low=low, high=high, note=note
    )


def _studentised(values: np.ndarray, plan: PermutationPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
    n, sums, squares = (_both_sides(part, labels) for part in (there.astype(np.float64), values, values**2))
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
            of_pairs = _both_sides(np.where(paired, values, 0.0), labels)
            n_pairs = paired[plan.twins[:, 0]].sum(axis=0)[:, None]
            covariance = products - means[0] * of_pairs[1] - means[1] * of_pairs[0] + n_pairs * means[0] * means[1]
            total = total - 2 * covariance / np.sqrt((n * (n - 1)).prod(axis=0))
            freedom = np.where(n_pairs > 0, n.min(axis=0) - 1, freedom)
        # Rounding leaves crumbs where everything cancels.
        total = np.where(total > 1e-24 * np.maximum(1.0, (squares / n).max(axis=0)), total, 0.0)
        usable = n.min(axis=0) >= 2
        found = (means[1] - means[0], np.sqrt(total), freedom)
        return tuple(np.where(usable, part, math.nan) for part in found)  # type: ignore[return-value]


def _both_sides(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Sums over the rows of each side, (2, k, columns)."""
    target = values.T @ labels
    return np.stack([values.sum(axis=0)[:, None] - target, target])


def _absolute_t(difference: np.ndarray, error: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        whole = np.where(np.abs(difference) > 1e-12, np.inf, 0.0)
        return np.where(np.isnan(error), math.nan, np.where(error > 0, np.abs(difference) / error, whole))


def length_test(words: np.ndarray, plan: PermutationPlan) -> TestResult:
    """Are the notes longer? `words` (n_notes,) counts words a note, at least 1; see `ratio_test`."""
    return ratio_test("length", words, plan, effect_unit="times as many words a note")


def utilisation_test(notes_per_patient: np.ndarray, plan: PermutationPlan) -> TestResult:
    """Do patients have more notes? `notes_per_patient` (n_notes,) repeats each patient's count; see `ratio_test`."""
    return ratio_test("utilisation", notes_per_patient, plan, effect_unit="times as many notes a patient")


# Many quantities at once ----------------------------------------------------------------------------------------------


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
    difference, error, freedom = _studentised(patients, plan)
    if cells is None:
        statistic, why = _absolute_t(difference, error), ""
    else:
        difference, left_out = _within_cells(values, measured, cells, plan)
        spread = np.nanstd(difference, axis=1, keepdims=True)
        statistic = _absolute_t(difference - np.nanmean(difference, axis=1, keepdims=True), spread)
        why = f"no interval: {_composition_note(left_out)}"
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


def _within_cells(
    values: np.ndarray, measured: np.ndarray, cells: Sequence[object], plan: PermutationPlan
) -> tuple[np.ndarray, int]:
    """Differences within each cell summed with fixed weights, (k, columns), and the notes of cells left out."""
    labels = plan.membership.astype(np.float64)
    total = np.zeros((values.shape[1], labels.shape[1]))
    weights = np.zeros((values.shape[1], 1))
    left_out = 0
    for notes, _, weight in _usable_cells(cells, plan):
        if not weight:
            left_out += len(notes)
            continue
        patients = _measured_means(values[notes], measured[notes], plan.note_patient[notes], len(plan.patients))
        there = np.isfinite(patients)
        n = _both_sides(there.astype(np.float64), labels)
        sums = _both_sides(np.where(there, patients, 0.0), labels)
        usable = n.min(axis=(0, 2)) >= 1
        with np.errstate(all="ignore"):
            means = sums / n
        total[usable] += weight * (means[1] - means[0])[usable]
        weights[usable] += weight
    with np.errstate(all="ignore"):
        return np.where(weights > 0, total / weights, math.nan), left_out


def _usable_cells(cells: Sequence[object], plan: PermutationPlan) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Notes and rows of each cell and its share of rows; 0 where some relabelling has fewer than two on a side.

    Which cells count is the same for every relabelling, and so are the weights.
    """
    if len(cells) != len(plan.note_patient):
        raise UsageError(f"{len(cells)} cells for {len(plan.note_patient)} notes")
    _, cell = np.unique(np.asarray(cells, dtype=str), return_inverse=True)
    found = []
    for number in range(int(cell.max(initial=-1)) + 1):
        notes = np.flatnonzero(cell == number)
        rows = np.unique(plan.note_patient[notes])
        n_target = plan.membership[rows].sum(axis=0)
        enough = min(int(n_target.min()), len(rows) - int(n_target.max())) >= 2
        found.append((notes, rows, float(len(rows)) if enough else 0.0))
    total = sum(weight for _, _, weight in found)
    if not total:
        raise TooFewPatientsError("no cell (note type and year) has at least 2 patients on both sides; use wider cells")
    return [(notes, rows, weight / total) for notes, rows, weight in found]


def _composition_note(left_out: int) -> str:
    note = "approximate, since it conditions on the note's type"
    return f"{note}; {left_out} notes of cells with too few patients are left out" if left_out else note


def output_shift_test(scores: np.ndarray, names: Sequence[str], plan: PermutationPlan) -> ManyMeasures:
    """Do a model's outputs differ? Location and spread of every output over the notes; see `max_t_test`.

    A black-box test: it needs what a model says, not the model. It sees what matters to this model only; a change
    that leaves every output's distribution alone passes.

    Parameters
    ----------
    scores : (n_notes, k) probabilities, logits or counts.
    names : of the k outputs.
    plan : the relabellings.

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
        name="outputs",
    )


# Vocabulary -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenShift:
    """How much one token adds to the divergence: bits beyond what relabelled patients give, and its two rates."""

    token: str
    excess_bits: float
    per_thousand: tuple[float, float]
    n_patients: tuple[int, int]


@dataclass(frozen=True, slots=True)
class VocabularyShift:
    """Jensen-Shannon test, Kullback-Leibler divergence as a description, and the tokens behind them."""

    jensen_shannon: TestResult
    kullback_leibler: TestResult
    tokens: tuple[TokenShift, ...]


def vocabulary_test(
    frequencies: np.ndarray,
    tokens: tuple[str, ...],
    plan: PermutationPlan,
    *,
    n_tokens: int = 15,
    smallest_cell: int = 11,
    smoothing: float = 0.1,
) -> VocabularyShift:
    """Do the notes use other words? Divergence of the average note's token distribution, in bits.

    Every divergence of samples is above zero; what counts is its excess over relabelled patients (`effect`).

    Parameters
    ----------
    frequencies : (n_notes, v) sparse or dense; the share of each token in a note, rows sum to 1.
    tokens : v names.
    plan : the relabellings.
    n_tokens : how many of the most diverging tokens to return.
    smallest_cell : a token is returned only if at least that many patients of one institution have it.
    smoothing : share of the pooled distribution mixed in before the Kullback-Leibler divergence of the other
        institution from the reference, which is infinite otherwise.

    References
    ----------
    Lin 1991, Divergence Measures Based on the Shannon Entropy, IEEE Transactions on Information Theory 37.
    Jelinek and Mercer 1980 (the smoothing).
    """
    from scipy import sparse

    notes = sparse.csr_array(frequencies)
    if notes.shape != (len(plan.note_patient), len(tokens)):
        raise UsageError(f"frequencies have shape {notes.shape}; {len(plan.note_patient)} notes, {len(tokens)} tokens")
    patients = sparse.csr_array(_averaging(plan) @ notes)
    columns = patients.T.tocsr()
    total = np.asarray(patients.sum(axis=0)).ravel()
    pooled = total / len(plan.patients)
    divergence, directed = np.empty(plan.n_permutations + 1), np.empty(plan.n_permutations + 1)
    observed, expected = np.zeros(len(tokens)), np.zeros(len(tokens))
    rates = np.zeros((2, len(tokens)))
    at_once = max(1, _CELLS_AT_ONCE // max(1, 4 * len(tokens)))
    for start in range(0, len(divergence), at_once):
        labels = plan.membership[:, start : start + at_once].astype(np.float64)
        n_target = labels.sum(axis=0)
        sums = columns @ labels
        target = sums / n_target
        reference = np.maximum(total[:, None] - sums, 0) / (len(plan.patients) - n_target)
        middle = (target + reference) / 2
        parts = (_information(target, middle) + _information(reference, middle)) / 2
        mixed = [(1 - smoothing) * side + smoothing * pooled[:, None] for side in (target, reference)]
        divergence[start : start + at_once] = parts.sum(axis=0)
        directed[start : start + at_once] = _information(*mixed).sum(axis=0)
        if start == 0:
            observed, rates = parts[:, 0], np.stack([reference[:, 0], target[:, 0]])
        expected += parts.sum(axis=1)
    expected = (expected - observed) / plan.n_permutations

    have = patients > 0
    counts = np.stack([np.asarray(have[plan.is_target == side].sum(axis=0)).ravel() for side in (False, True)])
    excess = observed - expected
    shown = [i for i in np.argsort(-excess, kind="stable") if counts[:, i].max() >= smallest_cell and excess[i] > 0]
    shifts = tuple(
        TokenShift(
            tokens[i],
            float(excess[i]),
            (float(1000 * rates[0, i]), float(1000 * rates[1, i])),
            (int(counts[0, i]), int(counts[1, i])),
        )
        for i in shown[:n_tokens]
    )
    note = "no interval: resampling patients adds divergence of its own"
    unit = "bits a token beyond relabelled patients"

    def described(name: str, values: np.ndarray) -> TestResult:
        return as_result(name, plan, values, effect=float(values[0] - values[1:].mean()), effect_unit=unit, note=note)

    return VocabularyShift(described("vocabulary", divergence), described("vocabulary_kl", directed), shifts)


def _information(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Elementwise left log2(left / right), 0 where left is 0."""
    ratio = np.divide(left, right, out=np.ones_like(left), where=(left > 0) & (right > 0))
    return left * np.log2(ratio)
