"""Calibration: scores to probabilities that hold on new patients, and how far off they are.

For two outcomes the probability of the positive one is compared with how often it happens, never the confidence with
the accuracy. Items of one patient are not independent: every interval and every null here moves whole patients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clinical_nlp.errors import InputError, UsageError
from clinical_nlp.runs import Estimate
from clinical_nlp.statistics.intervals import FEWEST_PATIENTS, by_patient, patient_bootstrap

Scheme = Literal["mass", "width"]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Platt scaling: probability = sigmoid(slope * logit + offset).

    References
    ----------
    Platt 1999, Probabilistic Outputs for Support Vector Machines.
    """

    slope: float = 1.0
    offset: float = 0.0

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Return probabilities of the shape of the logits."""
        values = self.slope * np.asarray(logits, dtype=np.float64) + self.offset
        return np.asarray(0.5 * (1 + np.tanh(0.5 * values)))


def fit_calibration(logits: np.ndarray, gold: np.ndarray) -> Calibration:
    """Fit slope and offset by maximum likelihood; the identity where there is nothing to fit.

    Parameters
    ----------
    logits : any shape.
    gold : 0 or 1, of the same shape.

    Notes
    -----
    Platt's targets, (n1 + 1) / (n1 + 2) and 1 / (n0 + 2), keep the fit finite on separable scores. The slope is kept
    positive: a calibration must not turn the order around.
    """
    from scipy.optimize import minimize

    values, truth = np.ravel(logits).astype(np.float64), np.ravel(gold).astype(bool)
    positive = int(truth.sum())
    if not positive or positive == truth.size:
        return Calibration()
    target = np.where(truth, (positive + 1) / (positive + 2), 1 / (truth.size - positive + 2))

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        slope = np.exp(parameters[0])
        score = slope * values + parameters[1]
        error = 0.5 * (1 + np.tanh(0.5 * score)) - target
        value = float(np.mean(np.logaddexp(0, score) - target * score))
        return value, np.array([np.mean(error * values) * slope, np.mean(error)])

    found = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=[(-5, 5), (-50, 50)])
    return Calibration(float(np.exp(found.x[0])), float(found.x[1]))


# How far off ----------------------------------------------------------------------------------------------------------


def checked_probabilities(probabilities: np.ndarray, gold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities (n,) and outcomes (n,) as floats.

    Raises
    ------
    UsageError : shapes do not fit, or an outcome is not 0 or 1.
    InputError : a probability is not finite, or not between 0 and 1.
    """
    values, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    if values.ndim != 1 or truth.shape != values.shape:
        raise UsageError(f"one outcome for each probability is needed (got {values.shape} and {truth.shape})")
    if not np.isin(truth, (0.0, 1.0)).all():
        raise UsageError("outcomes must be 0 or 1; for more than two classes compare each with the rest, or top_label")
    wrong = int((~((values >= 0) & (values <= 1))).sum())
    if wrong:
        raise InputError(f"{wrong} of {len(values)} probabilities are not between 0 and 1 (or not a number)")
    return values, truth


def top_label(probabilities: np.ndarray, gold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability of the likeliest of several classes, and whether it is the right one, (n,) each.

    Parameters
    ----------
    probabilities : (n, k), k of 3 or more; rows sum to one.
    gold : (n,) int.
    """
    if probabilities.ndim != 2 or probabilities.shape[1] < 3 or len(probabilities) != len(gold):
        raise UsageError(f"top_label takes (n, k) probabilities of 3 classes or more (got {probabilities.shape})")
    best = probabilities.argmax(1)
    return probabilities[np.arange(len(best)), best], (best == np.asarray(gold)).astype(np.float64)


def calibration_bin(probabilities: np.ndarray, *, n_bins: int = 15, scheme: Scheme = "mass") -> np.ndarray:
    """(n,) the bin of each probability.

    width: [0, 1/15), [1/15, 2/15), ..., and the last one holds 1.0 too. mass: about equally many each, equal
    probabilities always in one bin.
    """
    if n_bins < 1:
        raise UsageError(f"n_bins must be at least 1 (got {n_bins})")
    if scheme == "width":
        return np.minimum((probabilities * n_bins).astype(int), n_bins - 1)
    if not len(probabilities):
        return np.zeros(0, dtype=int)
    edges = np.unique(np.quantile(probabilities, np.arange(1, n_bins) / n_bins, method="inverted_cdf"))
    return np.searchsorted(edges, probabilities, side="left")


def _weights(n: int, patients: Sequence[str] | None) -> np.ndarray:
    if patients is None:
        return np.full(n, 1 / max(n, 1))
    _, rows, counts = np.unique(np.asarray(patients, dtype=str), return_inverse=True, return_counts=True)
    if len(rows) != n:
        raise UsageError(f"{len(rows)} patients for {n} probabilities")
    return np.asarray(1 / (counts[rows] * len(counts)))


def expected_calibration_error(
    probabilities: np.ndarray,
    gold: np.ndarray,
    *,
    patients: Sequence[str] | None = None,
    n_bins: int = 15,
    scheme: Scheme = "mass",
) -> float:
    """Mean over bins of |probability - frequency|, weighted by size; NaN without items.

    Parameters
    ----------
    probabilities, gold : (n,) of the positive outcome, and 0 or 1.
    patients : n names; every patient weighs 1. Without them every item does.

    Notes
    -----
    It is above 0 for a perfect model too (0.07 at 200 items): see `calibration_error`, which gives the excess.

    References
    ----------
    Naeini, Cooper and Hauskrecht 2015, Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI.
    """
    values, truth = checked_probabilities(probabilities, gold)
    if not len(values):
        return math.nan
    bins = calibration_bin(values, n_bins=n_bins, scheme=scheme)
    off = np.bincount(bins, weights=_weights(len(values), patients) * (truth - values))
    return float(np.abs(off).sum())


@dataclass(frozen=True, slots=True)
class CalibrationError:
    """ECE beside what a calibrated model of these patients would show, and the difference, which is what counts."""

    value: float
    null_mean: float
    null_sd: float
    excess: float
    p_value: float
    n_patients: int
    n_items: int
    note: str = ""


def calibration_error(
    probabilities: np.ndarray,
    gold: np.ndarray,
    patients: Sequence[str],
    *,
    n_bins: int = 15,
    scheme: Scheme = "mass",
    n_draws: int = 999,
    seed: int = 0,
) -> CalibrationError:
    """Expected calibration error, its excess over the null, and a p-value.

    In the null each patient's residuals (outcome minus probability) change sign together, at random: their size and
    their correlation within the patient stay, and what they have in common across patients goes. Where a model is far
    off, the residuals are large and the null too wide, which is on the safe side. There are no more bins than a tenth
    of the patients. At 5 % a calibrated model was rejected in 5.2 to 6.3 % of 2,000 runs (30 to 150 patients).

    Returns
    -------
    CalibrationError; no interval, since every resample of patients is further off than the sample. Under 20 patients
    null and excess are NaN, with the reason.

    References
    ----------
    Liu 1988, Bootstrap procedures under some non-i.i.d. models, Annals of Statistics 16 (the wild bootstrap).
    """
    values, truth = checked_probabilities(probabilities, gold)
    people, rows = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    weight = _weights(len(values), patients)
    if len(people) < FEWEST_PATIENTS:
        value = expected_calibration_error(values, truth, patients=patients, n_bins=n_bins, scheme=scheme)
        none = (math.nan,) * 4
        return CalibrationError(value, *none, len(people), len(values), f"fewer than {FEWEST_PATIENTS} patients")
    bins = calibration_bin(values, n_bins=max(2, min(n_bins, len(people) // 10)), scheme=scheme)
    table = np.zeros((int(bins.max()) + 1, len(people)))
    np.add.at(table, (bins, rows), weight * (truth - values))
    signs = np.random.default_rng([seed, 41]).choice((-1.0, 1.0), size=(len(people), n_draws))
    null = np.abs(table @ signs).sum(0)
    value = float(np.abs(table.sum(1)).sum())
    p_value = (1 + int((null >= value - 1e-12).sum())) / (n_draws + 1)
    mean = float(null.mean())
    return CalibrationError(value, mean, float(null.std()), value - mean, p_value, len(people), len(values))


@dataclass(frozen=True, slots=True)
class Brier:
    """score = reliability - resolution + uncertainty + within, exactly.

    reliability: how far bins are from their frequency (0 is best). resolution: how far the frequencies are apart (more
    is better). uncertainty: of the outcome itself. within: what differs inside bins, 0 if all probabilities of a bin
    are equal.
    """

    score: float
    reliability: float
    resolution: float
    uncertainty: float
    within: float


def brier(
    probabilities: np.ndarray,
    gold: np.ndarray,
    *,
    patients: Sequence[str] | None = None,
    n_bins: int = 15,
    scheme: Scheme = "mass",
) -> Brier:
    """Mean squared distance of probability and outcome, and what it is made of; NaN without items.

    References
    ----------
    Murphy 1973, A New Vector Partition of the Probability Score, Journal of Applied Meteorology 12.
    Stephenson, Coelho and Jolliffe 2008, Two Extra Components in the Brier Score Decomposition, Weather and
    Forecasting 23 (here their sum, `within`).
    """
    values, truth = checked_probabilities(probabilities, gold)
    if not len(values):
        return Brier(*(math.nan,) * 5)
    weight = _weights(len(values), patients)
    bins = calibration_bin(values, n_bins=n_bins, scheme=scheme)
    mass = np.bincount(bins, weights=weight)
    used = mass > 0
    said = np.bincount(bins, weights=weight * values)[used] / mass[used]
    seen = np.bincount(bins, weights=weight * truth)[used] / mass[used]
    rate, mass = float(weight @ truth), mass[used]
    score = float(weight @ (values - truth) ** 2)
    reliability, resolution = float(mass @ (said - seen) ** 2), float(mass @ (seen - rate) ** 2)
    uncertainty = rate * (1 - rate)
    return Brier(score, reliability, resolution, uncertainty, score - reliability + resolution - uncertainty)


def brier_estimate(
    probabilities: np.ndarray, gold: np.ndarray, patients: Sequence[str], *, n_notes: int, part: str, seed: int = 0
) -> Estimate:
    """Brier score, patients weighing 1, with an interval over patients."""
    values, truth = checked_probabilities(probabilities, gold)
    each = by_patient(patients, np.stack([(values - truth) ** 2, np.ones(len(values))], 1))
    means = np.stack([each[:, 0] / each[:, 1], np.ones(len(each))], 1)
    return patient_bootstrap(means, lambda c: c[..., 0] / c[..., 1], n_notes=n_notes, part=part, seed=seed)


def calibration_line(
    probabilities: np.ndarray, gold: np.ndarray, patients: Sequence[str], *, n_notes: int, part: str
) -> tuple[Estimate, Estimate]:
    """Calibration slope and intercept, patients weighing 1, with intervals that allow for clustered items.

    Slope: b of logit P(y) = a + b logit(p); 1 is right, below 1 the probabilities are too extreme. Intercept: a of
    logit P(y) = a + logit(p); 0 is right, above 0 the outcome is commoner than said. Probabilities of exactly 0 or 1
    are taken as 1e-6 off. Intervals from the sandwich variance over patients.

    References
    ----------
    Cox 1958, Two further applications of a model for binary regression, Biometrika 45.
    Van Calster et al. 2019, Calibration: the Achilles heel of predictive analytics, BMC Medicine 17.
    """
    values, truth = checked_probabilities(probabilities, gold)
    people, rows = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    weight = _weights(len(values), patients)
    x = _log_odds(values)

    def nothing(note: str) -> Estimate:
        return Estimate(math.nan, math.nan, math.nan, len(people), n_notes, part, note)

    if not truth.any() or truth.all():
        same = nothing("undefined: all outcomes are alike")
        return same, same
    intercept = _fitted(np.ones((len(x), 1)), x, truth, weight, rows)
    slope = None
    if np.ptp(x) > 1e-9:
        slope = _fitted(np.stack([x - weight @ x, np.ones(len(x))], 1), np.zeros(len(x)), truth, weight, rows)

    def estimate(found: tuple[float, float] | None, note: str) -> Estimate:
        if found is None:
            return nothing(note)
        if len(people) < FEWEST_PATIENTS:
            few = f"fewer than {FEWEST_PATIENTS} patients"
            return Estimate(found[0], math.nan, math.nan, len(people), n_notes, part, few)
        from scipy import stats

        reach = float(stats.t.ppf(0.975, len(people) - 1)) * found[1]
        return Estimate(found[0], found[0] - reach, found[0] + reach, len(people), n_notes, part)

    why = "undefined: all probabilities are alike" if np.ptp(x) <= 1e-9 else "undefined: outcomes are separated"
    return estimate(slope, why), estimate(intercept, "undefined: the fit did not end")


def _log_odds(probabilities: np.ndarray) -> np.ndarray:
    inside = np.clip(probabilities, 1e-6, 1 - 1e-6)
    return np.asarray(np.log(inside) - np.log1p(-inside))


def _maximum(x: np.ndarray, offset: np.ndarray, y: np.ndarray, weight: np.ndarray) -> np.ndarray | None:
    """Coefficients of a weighted logistic regression; None where there is no maximum."""
    beta = np.zeros(x.shape[1])

    def loss(at: np.ndarray) -> float:
        score = offset + x @ at
        return float(weight @ (np.logaddexp(0, score) - y * score))

    for _ in range(100):
        chance = 0.5 * (1 + np.tanh(0.5 * (offset + x @ beta)))
        gradient = x.T @ (weight * (y - chance))
        hessian = x.T @ (x * (weight * chance * (1 - chance))[:, None])
        if np.linalg.cond(hessian) > 1e12 or np.abs(beta).max() > 1e3:
            return None
        step = np.linalg.solve(hessian, gradient)
        before = loss(beta)
        while loss(beta + step) > before + 1e-15 and np.abs(step).max() > 1e-12:
            step = step / 2
        beta = beta + step
        if np.abs(step).max() < 1e-10:
            return beta
    return None


def _fitted(
    x: np.ndarray, offset: np.ndarray, y: np.ndarray, weight: np.ndarray, rows: np.ndarray
) -> tuple[float, float] | None:
    """First coefficient of a logistic regression and its clustered standard error; None where there is no maximum."""
    beta = _maximum(x, offset, y, weight)
    if beta is None:
        return None
    chance = 0.5 * (1 + np.tanh(0.5 * (offset + x @ beta)))
    hessian = x.T @ (x * (weight * chance * (1 - chance))[:, None])
    if np.linalg.cond(hessian) > 1e12:
        return None
    scores = np.zeros((int(rows.max()) + 1, x.shape[1]))
    np.add.at(scores, rows, x * (weight * (y - chance))[:, None])
    bread = np.linalg.inv(hessian)
    variance = bread @ (scores.T @ scores) @ bread * len(scores) / max(1, len(scores) - 1)
    return float(beta[0]), float(math.sqrt(max(variance[0, 0], 0.0)))


# Mending --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Temperature:
    """Divide logits by one number; the order of the classes stays. `note` says where the fit ran into its bounds."""

    value: float = 1.0
    note: str = ""

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Return probabilities: (n,) logits by the sigmoid, (n, k) by the softmax."""
        scaled = np.asarray(logits, dtype=np.float64) / self.value
        if scaled.ndim == 1:
            return np.asarray(0.5 * (1 + np.tanh(0.5 * scaled)))
        scaled = scaled - scaled.max(1, keepdims=True)
        powers = np.exp(scaled)
        return np.asarray(powers / powers.sum(1, keepdims=True))


def fit_temperature(
    logits: np.ndarray, gold: np.ndarray, *, patients: Sequence[str] | None = None, reach: float = 5.0
) -> Temperature:
    """Fit a temperature by maximum likelihood (Brent on log T), on patients that are scored nowhere.

    Parameters
    ----------
    logits : (n,) of two outcomes, or (n, k).
    gold : (n,) 0 or 1, or the class.
    patients : n names; every patient weighs 1.
    reach : log T stays within minus and plus this.

    Returns
    -------
    Temperature; 1 where there is nothing to fit (no item, or logits that do not vary).

    References
    ----------
    Guo et al. 2017, On Calibration of Modern Neural Networks, ICML.
    """
    from scipy.optimize import minimize_scalar

    values, truth = np.asarray(logits, dtype=np.float64), np.asarray(gold).astype(int)
    if values.ndim not in (1, 2) or len(values) != len(truth):
        raise UsageError(f"one outcome for each row of logits is needed (got {values.shape} and {truth.shape})")
    if not np.isfinite(values).all():
        raise InputError("logits hold values that are not finite; leave those items out")
    if values.ndim == 1:
        values = np.stack([np.zeros(len(values)), values], 1)
    if not len(values) or np.ptp(values, axis=1).max() < 1e-12:
        return Temperature(1.0, "nothing to fit")
    weight = _weights(len(values), patients)
    own = values[np.arange(len(truth)), truth]

    def loss(log_t: float) -> float:
        scale = math.exp(-log_t)
        highest = values.max(1) * scale
        total = highest + np.log(np.exp(values * scale - highest[:, None]).sum(1))
        return float(weight @ (total - own * scale))

    found = minimize_scalar(loss, bounds=(-reach, reach), method="bounded", options={"xatol": 1e-8})
    # Where every outcome is told right the loss is flat towards 0, and where nothing is told towards infinity.
    best = min((float(found.x), -reach, reach), key=lambda at: round(loss(at), 12) - 1e-12 * (abs(at) == reach))
    note = "at its bound: every outcome is told right, or nothing is told" if abs(best) == reach else ""
    return Temperature(math.exp(best), note)


# Answering less -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AbstentionPoint:
    """Keep the items of at least `threshold` confidence: their share, and how many of them are wrong."""

    threshold: float
    share: float
    error: Estimate


def abstention_curve(
    confidence: np.ndarray,
    correct: np.ndarray,
    patients: Sequence[str],
    *,
    shares: Sequence[float] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1),
    part: str = "test",
    seed: int = 0,
) -> list[AbstentionPoint]:
    """Error among the most confident items, for shares of them; items of equal confidence stay or go together.

    References
    ----------
    El-Yaniv and Wiener 2010, On the Foundations of Noise-free Selective Classification, JMLR 11.
    """
    values, right = checked_probabilities(confidence, correct)
    if not len(values):
        return []
    points = []
    for share in shares:
        if not 0 < share <= 1:
            raise UsageError(f"a share to keep lies above 0 and at most at 1 (got {share})")
        limit = float(np.sort(values)[::-1][max(1, math.ceil(share * len(values))) - 1])
        kept = values >= limit
        counts = by_patient(patients, np.stack([kept * (1 - right), kept], 1))
        error = patient_bootstrap(
            counts, lambda c: c[..., 0] / c[..., 1], n_notes=int(kept.sum()), part=part, seed=seed
        )
        points.append(AbstentionPoint(limit, float(kept.mean()), error))
    return points
