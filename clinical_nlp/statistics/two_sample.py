"""Do two institutions' notes differ? Tests that permute whole patients and let every patient weigh the same.

How many notes a patient has is a difference of its own (`utilisation_test`). With very unequal numbers of notes the
tests over all notes are approximate; a plan over one random note a patient is exact, and a report gives both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from clinical_nlp.errors import UsageError
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


def _result(
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
    permuted = values[1:][np.isfinite(values[1:])]
    return TestResult(
        name=name,
        statistic=float(values[0]),
        p_value=plan.p_value(values),
        null_mean=float(permuted.mean()) if len(permuted) else math.nan,
        null_sd=float(permuted.std(ddof=1)) if len(permuted) > 1 else math.nan,
        n_units=len(plan.patients),
        n_notes=len(plan.note_patient),
        n_permutations=plan.n_permutations,
        smallest_p=plan.smallest_p,
        effect=effect,
        effect_unit=effect_unit,
        low=low,
        high=high,
        note=note,
    )


def _checked(features: np.ndarray, plan: PermutationPlan) -> np.ndarray:
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) != len(plan.note_patient):
        raise UsageError(f"features have shape {features.shape}; they need one row for each of the plan's notes")
    if not np.isfinite(features).all():
        raise UsageError("features hold values that are not finite")
    return features


def _patient_means(values: np.ndarray, plan: PermutationPlan) -> np.ndarray:
    """Average note rows (n_notes, k) within patients: (n_patients, k)."""
    means = np.zeros((len(plan.patients), values.shape[1]))
    np.add.at(means, plan.note_patient, values * plan.note_weight[:, None])
    return means


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
    features = _checked(features, plan)
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
    return _result(
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
    features = _checked(features, plan)
    values = _mmd2(patient_kernel(features, plan), plan.membership)
    result = _result("mmd", plan, values, effect=math.nan, effect_unit="", note="no valid interval exists for this")
    effect = (result.statistic - result.null_mean) / result.null_sd if result.null_sd > 0 else math.nan
    return _result("mmd", plan, values, effect=effect, effect_unit="standard deviations of the null", note=result.note)


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
    logs = _patient_means(np.log(values)[:, None], plan)[:, 0]
    difference, error, freedom = _welch(logs, plan.membership)
    with np.errstate(all="ignore"):
        statistic = np.where(error > 1e-12, np.abs(difference) / error, np.where(np.abs(difference) > 1e-12, np.inf, 0))
    low = high = math.nan
    note = ""
    if error[0] <= 1e-12:
        note = "no interval: the patients of each institution are all alike"
    elif min(plan.n_patients) < _FEWEST_FOR_T:
        note = f"no interval: fewer than {_FEWEST_FOR_T} patients in an institution"
    if not note:
        reach = stats.t.ppf(0.975, freedom[0]) * error[0]
        low, high = math.exp(difference[0] - reach), math.exp(difference[0] + reach)
    return _result(
        name, plan, statistic, effect=math.exp(difference[0]), effect_unit=effect_unit, low=low, high=high, note=note
    )


def _welch(values: np.ndarray, membership: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    target = membership.astype(np.float64)
    values = values - values.mean()
    n = np.stack([len(values) - target.sum(axis=0), target.sum(axis=0)])
    sums = np.stack([values.sum() - values @ target, values @ target])
    squares = np.stack([(values**2).sum() - values**2 @ target, values**2 @ target])
    variance = np.maximum(squares - sums**2 / n, 0) / (n - 1) / n
    means = sums / n
    with np.errstate(all="ignore"):
        freedom = variance.sum(axis=0) ** 2 / (variance**2 / (n - 1)).sum(axis=0)
    return means[1] - means[0], np.sqrt(variance.sum(axis=0)), freedom


def length_test(words: np.ndarray, plan: PermutationPlan) -> TestResult:
    """Are the notes longer? `words` (n_notes,) counts words a note, at least 1; see `ratio_test`."""
    return ratio_test("length", words, plan, effect_unit="times as many words a note")


def utilisation_test(notes_per_patient: np.ndarray, plan: PermutationPlan) -> TestResult:
    """Do patients have more notes? `notes_per_patient` (n_notes,) repeats each patient's count; see `ratio_test`."""
    return ratio_test("utilisation", notes_per_patient, plan, effect_unit="times as many notes a patient")


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
    shape = (len(plan.patients), len(plan.note_patient))
    average = sparse.csr_array((plan.note_weight, (plan.note_patient, np.arange(shape[1]))), shape=shape)
    patients = sparse.csr_array(average @ notes)
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
        return _result(name, plan, values, effect=float(values[0] - values[1:].mean()), effect_unit=unit, note=note)

    return VocabularyShift(described("vocabulary", divergence), described("vocabulary_kl", directed), shifts)


def _information(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Elementwise left log2(left / right), 0 where left is 0."""
    ratio = np.divide(left, right, out=np.ones_like(left), where=(left > 0) & (right > 0))
    return left * np.log2(ratio)
