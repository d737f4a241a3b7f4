"""Distances between two institutions' notes, each as its excess over what relabelled patients give.

Every distance of two samples of one population is above zero, by an amount that depends on their sizes and on how
patients cluster. So none of these is reported bare, none has a fixed threshold, and none has a percentile interval:
resampled patients are further apart than patients are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from clinical_nlp.errors import UsageError
from clinical_nlp.statistics.permutation import PermutationPlan
from clinical_nlp.statistics.two_sample import TestResult, as_result, both_sides, checked_features, patient_means

_NO_INTERVAL = "no interval: resampling patients adds distance of its own"
_PATIENTS_PER_DIMENSION = 10


def coral_test(features: np.ndarray, plan: PermutationPlan, *, dimensions: int = 64) -> TestResult:
    """Squared distance of the two covariance matrices, |C1 - C2|^2 / (4 d^2), on pooled principal components.

    Parameters
    ----------
    features : (n_notes, d), made without looking at institutions.
    plan : the relabellings.
    dimensions : principal components at most; fewer where the smaller institution has less than ten patients for
        each. They come from all patients together, each weighing 1.

    Returns
    -------
    TestResult; `effect` is the excess over relabelled patients.

    References
    ----------
    Sun and Saenko 2016, Deep CORAL, ECCV Workshops, eq. 1.
    """
    moments = _side_moments(features, plan, dimensions)
    apart = moments.covariance[1] - moments.covariance[0]
    values = (apart**2).sum(axis=(1, 2)) / (4 * moments.dimensions**2)
    return _excess("coral", plan, values, "of the squared covariance distance", moments.note)


def frechet_test(features: np.ndarray, plan: PermutationPlan, *, dimensions: int = 64) -> TestResult:
    """Squared Fréchet distance of two Gaussians with the institutions' means and covariances; see `coral_test`.

    References
    ----------
    Dowson and Landau 1982, The Fréchet distance between multivariate normal distributions, Journal of Multivariate
    Analysis 12.
    """
    moments = _side_moments(features, plan, dimensions)
    first, second = moments.covariance
    values = ((moments.mean[1] - moments.mean[0]) ** 2).sum(axis=1)
    values += np.trace(first, axis1=1, axis2=2) + np.trace(second, axis1=1, axis2=2)
    # The trace of the root of C1 C2 is the sum of the singular values of R1 R2, for any R with R' R = C or R R' = C.
    roots = [_root(matrices) for matrices in (first, second)]
    values -= 2 * np.linalg.svd(roots[0].swapaxes(1, 2) @ roots[1], compute_uv=False).sum(axis=1)
    return _excess("frechet", plan, values, "of the squared Fréchet distance", moments.note)


def _root(covariance: np.ndarray) -> np.ndarray:
    """R with R R' = C, for a stack of covariance matrices that may be singular."""
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0))[:, None, :])


@dataclass(frozen=True, slots=True)
class _Moments:
    """Of both sides for every relabelling: mean (2, columns, d), covariance (2, columns, d, d)."""

    mean: np.ndarray
    covariance: np.ndarray
    dimensions: int
    note: str


def _side_moments(features: np.ndarray, plan: PermutationPlan, dimensions: int) -> _Moments:
    if dimensions < 1:
        raise UsageError(f"dimensions must be at least 1 (got {dimensions})")
    features = checked_features(features, plan)
    weight = plan.note_weight / plan.note_weight.sum()
    features = features - weight @ features
    values, vectors = np.linalg.eigh(features.T @ (features * weight[:, None]))
    kept = max(1, min(dimensions, features.shape[1], min(plan.n_patients) // _PATIENTS_PER_DIMENSION))
    explained = float(values[-kept:].sum() / values.sum()) if values.sum() > 0 else 1.0
    reduced = features @ vectors[:, ::-1][:, :kept]
    labels = plan.membership.astype(np.float64)
    n = both_sides(np.ones((len(labels), 1)), labels)[:, 0, :]
    mean = both_sides(patient_means(reduced, plan), labels).swapaxes(1, 2) / n[:, :, None]
    covariance = np.empty((2, labels.shape[1], kept, kept))
    for row in range(kept):
        products = patient_means(reduced[:, row:] * reduced[:, row, None], plan)
        second = both_sides(products, labels).swapaxes(1, 2) / n[:, :, None]
        covariance[:, :, row, row:] = second - mean[:, :, row, None] * mean[:, :, row:]
        covariance[:, :, row:, row] = covariance[:, :, row, row:]
    note = f"on {kept} principal components with {100 * explained:.0f} % of the variance; {_NO_INTERVAL}"
    return _Moments(mean, covariance, kept, note)


@dataclass(frozen=True, slots=True)
class HistogramShift:
    """Two distances between the distributions of one quantity, and its bins.

    `bins` names them; `shares` holds the average patient's share of notes in each bin at the reference and at the
    other institution.
    """

    population_stability: TestResult
    jensen_shannon: TestResult
    bins: tuple[str, ...]
    shares: tuple[tuple[float, ...], tuple[float, ...]]


def histogram_test(
    values: np.ndarray | Sequence[str | None], plan: PermutationPlan, *, name: str = "histogram", n_bins: int = 10
) -> HistogramShift:
    """Does the distribution of a quantity over its bins differ? Population stability index and Jensen-Shannon.

    The population stability index is the sum over bins of (q - p) ln(q / p), with half a patient added to every bin,
    since one empty bin would rule it otherwise. Its customary thresholds of 0.1 and 0.25 know nothing of sample
    sizes: under no difference its mean is about (bins - 1)(1/n + 1/m), more with fewer notes a patient; `null_mean`
    is that number here.

    Parameters
    ----------
    values : (n_notes,) numbers, binned at the quantiles of all patients together (each weighing 1; equal values stay
        together; NaN has a bin of its own), or names, one bin each.
    plan : the relabellings.
    name : of the quantity.
    n_bins : of numbers.

    References
    ----------
    Lin 1991, Divergence Measures Based on the Shannon Entropy, IEEE Transactions on Information Theory 37.
    Siddiqi 2006, Credit Risk Scorecards, Wiley (the index).
    """
    bins, index = _binned(values, plan, n_bins)
    shares = np.zeros((len(plan.patients), len(bins)))
    np.add.at(shares, (plan.note_patient, index), plan.note_weight)
    labels = plan.membership.astype(np.float64)
    sums = both_sides(shares, labels)
    n = both_sides(np.ones((len(labels), 1)), labels)
    padded = (sums + 0.5) / (n + 0.5 * len(bins))
    psi = ((padded[1] - padded[0]) * np.log(padded[1] / padded[0])).sum(axis=0)
    plain = np.maximum(sums, 0) / n
    middle = plain.mean(axis=0)
    with np.errstate(all="ignore"):
        terms = np.where(plain > 0, plain * np.log2(plain / middle), 0.0)
    divergence = terms.sum(axis=(0, 1)) / 2
    return HistogramShift(
        _excess(f"{name}_psi", plan, psi, "of the population stability index"),
        _excess(f"{name}_js", plan, divergence, "bits of Jensen-Shannon divergence"),
        bins,
        (tuple(plain[0, :, 0].tolist()), tuple(plain[1, :, 0].tolist())),
    )


def _binned(
    values: np.ndarray | Sequence[str | None], plan: PermutationPlan, n_bins: int
) -> tuple[tuple[str, ...], np.ndarray]:
    given = np.asarray(values)
    if given.shape != plan.note_patient.shape:
        raise UsageError(f"values have shape {given.shape}; they need one for each of the plan's notes")
    if given.dtype.kind not in "biuf":
        names, index = np.unique([str(value or "") for value in values], return_inverse=True)
        return tuple(names.tolist()), index
    if n_bins < 2:
        raise UsageError(f"n_bins must be at least 2 (got {n_bins})")
    numbers = given.astype(np.float64)
    measured = np.isfinite(numbers)
    if not measured.any():
        raise UsageError("values hold no finite number")
    order = np.argsort(numbers[measured], kind="stable")
    ranked = numbers[measured][order]
    mass = np.cumsum(plan.note_weight[measured][order])
    places = np.searchsorted(mass, mass[-1] * np.arange(1, n_bins) / n_bins, side="left")
    cuts = np.unique(ranked[np.minimum(places, len(ranked) - 1)])
    index = np.searchsorted(cuts, numbers, side="left")
    edges = ["", *(f"{cut:g}" for cut in cuts), ""]
    bins = [f"{low}–{high}" for low, high in pairwise(edges)]
    bins[0], bins[-1] = f"up to {cuts[0]:g}", f"above {cuts[-1]:g}"
    if not measured.all():
        index[~measured] = len(bins)
        bins.append("not measured")
    return tuple(bins), index


def calibration_shift_test(
    probabilities: np.ndarray, outcomes: np.ndarray, plan: PermutationPlan, *, n_bins: int = 10
) -> TestResult:
    """Is a model calibrated otherwise at the other institution?

    Notes are binned by probability at pooled quantiles; the statistic is the sum over bins of the absolute
    difference, between the institutions, of the mean of outcome - probability times the bin's share: the expected
    calibration error of one side where the other is perfect. Like that error it is above zero for any two samples.

    Parameters
    ----------
    probabilities : (n_notes,) in [0, 1], of the positive class.
    outcomes : (n_notes,) 0 or 1.
    plan : the relabellings.
    n_bins : quantile bins.

    Returns
    -------
    TestResult; `effect` is the excess over relabelled patients, in probability.
    """
    probabilities, outcomes = np.asarray(probabilities, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    if probabilities.shape != plan.note_patient.shape or outcomes.shape != probabilities.shape:
        raise UsageError(
            f"probabilities have shape {probabilities.shape} and outcomes {outcomes.shape}; each needs one for each of "
            "the plan's notes"
        )
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise UsageError("probabilities must lie between 0 and 1")
    if not np.isin(outcomes, (0.0, 1.0)).all():
        raise UsageError("outcomes must be 0 or 1")
    bins, index = _binned(probabilities, plan, n_bins)
    residuals = np.zeros((len(plan.patients), len(bins)))
    np.add.at(residuals, (plan.note_patient, index), plan.note_weight * (outcomes - probabilities))
    labels = plan.membership.astype(np.float64)
    n = both_sides(np.ones((len(labels), 1)), labels)
    sides = both_sides(residuals, labels) / n
    return _excess("calibration", plan, np.abs(sides[1] - sides[0]).sum(axis=0), "of calibration error, in probability")


def _excess(name: str, plan: PermutationPlan, values: np.ndarray, unit: str, note: str = _NO_INTERVAL) -> TestResult:
    return as_result(
        name,
        plan,
        values,
        effect=float(values[0] - values[1:].mean()),
        effect_unit=f"{unit}, beyond relabelled patients",
        note=note,
    )
