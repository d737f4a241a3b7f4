"""How well a representation suits a task before anything is trained, and intervals for what training then shows.

The three scores see items (words, say) as independent rows. Items of one patient are not: `grouped_jackknife` leaves
out whole patients, and a caller gives every patient about the same number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from clinical_nlp.errors import TooFewPatientsError, UsageError
from clinical_nlp.runs import Estimate

_LARGEST_RATIO = 1e10
"""Prior precision beyond which features count as unused: the evidence no longer changes."""


def log_maximum_evidence(features: np.ndarray, labels: np.ndarray, *, iterations: int = 1000) -> float:
    """LogME: log evidence a row of a Bayesian linear model from features to labels, averaged over classes.

    For the 0/1 indicator y of a class, w ~ N(0, I / alpha) and y ~ N(F w, I / beta). With A = alpha I + beta F'F and
    m = beta A^-1 F'y,

        log p(y | F) = (n log beta + d log alpha - n log 2 pi - beta |Fm - y|^2 - alpha |m|^2 - log |A|) / 2,

    maximised over alpha and beta by the fixed point gamma = sum_i beta s_i^2 / (alpha + beta s_i^2),
    alpha = gamma / |m|^2, beta = (n - gamma) / |Fm - y|^2, with s_i the singular values of F. The fixed point climbs
    to the maximum nearest to where it starts (alpha = beta, in units of the mean s_i^2).

    Parameters
    ----------
    features : (n, d); centred by nobody, rotated or scaled as one likes.
    labels : (n,) int; classes that do not occur are not averaged over.
    iterations : at most; it stops when alpha / beta changes by less than 1e-10 of itself.

    Returns
    -------
    float; higher is better. Comparable only on the same rows and labels.

    Raises
    ------
    UsageError : shapes do not fit, values are not finite, or there is one class only.

    References
    ----------
    You et al. 2021, LogME: Practical Assessment of Pre-trained Models for Transfer Learning, ICML, eq. 2 and alg. 1-3.
    """
    features, labels = _checked(features, labels)
    n, d = features.shape
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    squares = singular**2
    if not squares.any():
        raise UsageError("every feature is zero: nothing can be told from them")
    scale = squares.sum() / d
    values = []
    for kind in np.unique(labels):
        target = (labels == kind).astype(np.float64)
        projected = (left.T @ target) ** 2
        outside = max(0.0, target.sum() - projected.sum())
        ratio = scale
        for _ in range(iterations):
            weight, residual, gamma = _posterior(squares, projected, outside, ratio)
            alpha = gamma / max(weight, np.finfo(float).tiny)
            beta = (n - gamma) / max(residual, np.finfo(float).tiny)
            new = float(np.clip(alpha / beta, scale / _LARGEST_RATIO, scale * _LARGEST_RATIO))
            done = abs(new - ratio) <= 1e-10 * ratio
            ratio = new
            if done:
                break
        weight, residual, _ = _posterior(squares, projected, outside, ratio)
        # For a given ratio alpha / beta the best beta has a closed form; it keeps the pair consistent at the limits.
        # The floor is a residual of 1e-12 a row: labels that the features reproduce exactly have no finite evidence.
        beta = n / max(residual + ratio * weight, 1e-12 * n)
        alpha = ratio * beta
        determinant = np.log(alpha + beta * squares).sum() + max(0, d - len(squares)) * math.log(alpha)
        evidence = n * math.log(beta) + d * math.log(alpha) - n * math.log(2 * math.pi) - determinant
        values.append((evidence - beta * (residual + ratio * weight)) / (2 * n))
    return float(np.mean(values))


def _posterior(squares: np.ndarray, projected: np.ndarray, outside: float, ratio: float) -> tuple[float, float, float]:
    """Return |m|^2, |Fm - y|^2 and gamma for alpha / beta = ratio."""
    shrunk = ratio / (ratio + squares)
    weight = float((squares * projected / (ratio + squares) ** 2).sum())
    return weight, outside + float((projected * shrunk**2).sum()), float((1 - shrunk).sum())


def h_score(features: np.ndarray, labels: np.ndarray, *, shrinkage: bool = True) -> float:
    """H-score: between-class scatter of the features, in units of their whole covariance.

    H = tr(S^-1 B), with S the covariance of the features (divided by n) and B that of their class means. Where there
    are not many more rows than features, S is inverted in noise and H comes near its ceiling, (classes - 1), whatever
    the labels; with `shrinkage`, S becomes (1 - a) S + a tr(S)/d I and B becomes (1 - a) B, a by Ledoit and Wolf.

    Parameters
    ----------
    features : (n, d).
    labels : (n,) int.
    shrinkage : the regularised score; without it, the definition with a pseudo-inverse.

    Returns
    -------
    float in [0, classes - 1]; higher is better.

    Raises
    ------
    UsageError : shapes do not fit, values are not finite, or there is one class only.

    References
    ----------
    Bao et al. 2019, An Information-Theoretic Approach to Transferability in Task Transfer Learning, ICIP, def. 2.
    Ibrahim, Ponomareva and Mazumder 2022, Newer is not always better: Rethinking transferability metrics, ECML, sec. 4.
    Ledoit and Wolf 2004, A well-conditioned estimator for large-dimensional covariance matrices, JMVA 88.
    """
    features, labels = _checked(features, labels)
    n, d = features.shape
    centred = features - features.mean(0)
    _, singular, right = np.linalg.svd(centred, full_matrices=False)
    eigenvalues = singular**2 / n
    if not eigenvalues.any():
        raise UsageError("no feature varies: nothing can be told from them")
    if shrinkage:
        mean = eigenvalues.sum() / d
        distance = float((eigenvalues**2).sum() - d * mean**2)
        noise = float(((centred**2).sum(1) ** 2).mean() - (eigenvalues**2).sum()) / n
        amount = 1.0 if distance <= 0 else min(1.0, max(0.0, noise / distance))
        spread = (1 - amount) * eigenvalues + amount * mean
    else:
        amount, spread = 0.0, eigenvalues
    usable = spread > max(n, d) * np.finfo(float).eps * spread.max()
    total = 0.0
    for kind in np.unique(labels):
        rows = labels == kind
        mean_of_class = right[usable] @ centred[rows].mean(0)
        total += rows.mean() * float((mean_of_class**2 / spread[usable]).sum())
    return (1 - amount) * total


def log_expected_empirical_prediction(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """LEEP: mean log probability of the labels when a source head's classes are read as labels.

    With p(z | x_i) the source probabilities, P(y, z) = sum_{i: y_i = y} p(z | x_i) / n and P(y | z) = P(y, z) / P(z),

        LEEP = 1/n sum_i log sum_z P(y_i | z) p(z | x_i).

    Parameters
    ----------
    probabilities : (n, Z), rows sum to one: what the head of the source task says. It needs such a head; a language
        model or an encoder without a task has none, and the score does not apply.
    labels : (n,) int.

    Returns
    -------
    float, at most 0; higher is better.

    Raises
    ------
    UsageError : shapes do not fit, there is one class only, or rows are no probabilities.

    References
    ----------
    Nguyen et al. 2020, LEEP: A New Measure to Evaluate Transferability of Learned Representations, ICML, eq. 2.
    """
    probabilities, labels = _checked(probabilities, labels)
    if (probabilities < 0).any() or not np.allclose(probabilities.sum(1), 1, atol=1e-4):
        raise UsageError("rows of the source probabilities must be at least 0 and sum to 1")
    mean = probabilities.mean(0)
    used = mean > 0
    chosen = np.empty(len(labels))
    for kind in np.unique(labels):
        rows = labels == kind
        conditional = probabilities[rows][:, used].sum(0) / len(labels) / mean[used]
        chosen[rows] = probabilities[rows][:, used] @ conditional
    return float(np.log(np.maximum(chosen, np.finfo(float).tiny)).mean())


def _checked(rows: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, labels = np.asarray(rows, dtype=np.float64), np.asarray(labels)
    if rows.ndim != 2 or labels.shape != (len(rows),) or not rows.size:
        raise UsageError(f"one label a row is needed (got rows {rows.shape} and labels {labels.shape})")
    if not np.isfinite(rows).all():
        raise UsageError("the rows hold values that are not finite")
    if len(np.unique(labels)) < 2:
        raise UsageError("all labels are of one class: there is nothing to tell apart")
    return rows, labels


def grouped_jackknife(
    statistic: Callable[[np.ndarray], float],
    patients: Sequence[str],
    *,
    groups: int = 10,
    n_notes: int,
    part: str = "train",
    seed: int = 0,
) -> Estimate:
    """Estimate a statistic of rows with an interval from leaving out a tenth of the patients at a time.

    Resampling with replacement is not open to these scores: repeated rows look like certainty. The interval is
    value +- t(groups - 1) * s, s^2 = (g - 1)/g sum (theta_k - mean)^2.

    Parameters
    ----------
    statistic : from row numbers (ascending) to a value.
    patients : patient of each row.
    groups : how many groups of patients; fewer patients than that give no interval.
    n_notes : for the record.
    part : what the rows are from.
    seed : of the grouping.

    References
    ----------
    Kott 2001, The Delete-a-Group Jackknife, Journal of Official Statistics 17.
    """
    from scipy import stats

    people, of_row = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    value = statistic(np.arange(len(of_row)))
    if len(people) < 2 * groups:
        note = f"fewer than {2 * groups} patients"
        return Estimate(value, math.nan, math.nan, len(people), n_notes, part, note)
    group = np.random.default_rng(seed).permutation(len(people)) % groups
    try:
        found = np.array([statistic(np.flatnonzero(group[of_row] != one)) for one in range(groups)])
    except UsageError:  # a group held every row of all classes but one
        return Estimate(value, math.nan, math.nan, len(people), n_notes, part, "undefined without some of the patients")
    error = math.sqrt((groups - 1) / groups * float(((found - found.mean()) ** 2).sum()))
    reach = float(stats.t.ppf(0.975, groups - 1)) * error
    return Estimate(value, value - reach, value + reach, len(people), n_notes, part)


def independent_difference(first: Estimate, second: Estimate, *, part: str = "") -> Estimate:
    """First minus second, for two groups of different patients, with an interval from the two intervals.

    low = d - sqrt((a - a_low)^2 + (b_high - b)^2), high = d + sqrt((a_high - a)^2 + (b - b_low)^2). An estimate that
    has no interval because all its patients score alike is taken as it stands; any other lack leaves the difference
    without one.

    References
    ----------
    Zou and Donner 2008, Construction of confidence limits about effect measures: a general approach, Statistics in
    Medicine 27, eq. 4 (the "square-and-add" method).
    """
    difference = first.value - second.value
    result = Estimate(
        difference,
        math.nan,
        math.nan,
        first.n_patients + second.n_patients,
        first.n_notes + second.n_notes,
        part or f"{first.part} and {second.part}",
    )
    notes = []
    ends = []
    for one in (first, second):
        if math.isnan(one.low) and not one.note.startswith("every patient scores alike"):
            return replace(result, note=f"{one.part}: {one.note or 'no interval'}")
        if math.isnan(one.low):
            notes.append(f"{one.part} taken as exact: {one.note}")
        ends.append((one.value, one.value) if math.isnan(one.low) else (one.low, one.high))
    (a_low, a_high), (b_low, b_high) = ends
    if len(notes) == 2:
        return replace(result, note="every patient scores alike: no spread")
    low = difference - math.hypot(first.value - a_low, b_high - second.value)
    high = difference + math.hypot(a_high - first.value, second.value - b_low)
    return replace(result, low=low, high=high, note="; ".join(notes))


def interval_over_seeds(values: Sequence[float], *, n_patients: int, n_notes: int, part: str) -> Estimate:
    """Mean of a score over seeds with Student's interval: how much another seed and draw of patients would move it."""
    from scipy import stats

    found = np.asarray(values, dtype=np.float64)
    if not len(found):
        raise TooFewPatientsError("no seed gave a score")
    mean = float(found.mean())
    if len(found) < 2 or not np.isfinite(found).all():
        note = "one seed" if len(found) < 2 else "undefined for some seeds"
        return Estimate(mean, math.nan, math.nan, n_patients, n_notes, part, note)
    if np.ptp(found) <= 1e-12 * max(1.0, abs(mean)):
        return Estimate(mean, math.nan, math.nan, n_patients, n_notes, part, "every seed scores alike")
    reach = float(stats.t.ppf(0.975, len(found) - 1)) * float(found.std(ddof=1)) / math.sqrt(len(found))
    return Estimate(mean, mean - reach, mean + reach, n_patients, n_notes, part, f"interval over {len(found)} seeds")


def rank_agreement(scores: Sequence[float], truth: Sequence[float]) -> tuple[float, float]:
    """Kendall's tau-b between scores and truth, and the smallest two-sided p-value that so many candidates allow.

    With n candidates without ties the p-value of a perfect order is 2 / n!: 1/3 with three, 1/12 with four, 1/60 with
    five. Below five no order can be told from chance at 5 %. tau is NaN where all scores, or all truths, tie.
    """
    from scipy import stats

    if len(scores) < 2 or len(scores) != len(truth):
        raise UsageError(f"an order needs two candidates or more with both figures (got {len(scores)}, {len(truth)})")
    return float(stats.kendalltau(scores, truth).statistic), 2 / math.factorial(len(scores))
