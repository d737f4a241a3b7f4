"""How common is a label where nobody has labelled? Only if the text of each label is written as it is at home.

A model of the label given the text is calibrated on labelled patients of one institution; the prevalence at another
is what makes its calibrated outputs there most likely. If P(text | label) differs, the answer is wrong without a sign.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clinical_nlp.errors import TooFewPatientsError, UsageError
from clinical_nlp.runs import Estimate
from clinical_nlp.statistics.intervals import FEWEST_PATIENTS

ASSUMPTION = "P(text | label) is the same in both institutions"
_FEWEST_OF_A_LABEL = 5


@dataclass(frozen=True, slots=True)
class TemperatureScaling:
    """Bias-corrected temperature scaling: probabilities = softmax(logits / temperature + bias).

    References
    ----------
    Alexandari, Kundaje and Shrikumar 2020, Maximum Likelihood with Bias-Corrected Calibration is Hard-To-Beat at
    Label Shift Adaptation, ICML, arXiv 1901.06852.
    """

    temperature: float
    bias: tuple[float, ...]

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Return (n, c) probabilities."""
        return _softmax(np.asarray(logits, dtype=np.float64) / self.temperature + np.array(self.bias))


@dataclass(frozen=True, eq=False)
class LabelShift:
    """Prevalence of each label at the reference (from its labels) and at the other institution (if `assumption`).

    `p_value` is of equal prevalences, from the spread of the log-odds over patient resamples; NaN, with the reason in
    `note`, where there are too few patients. `fit_p_value` is of the assumption, as far as scores can contradict it:
    whether the other institution's scores are a mixture of the reference's scores of each label. It says nothing when
    it is large.
    """

    labels: tuple[str, ...]
    reference: tuple[Estimate, ...]
    other: tuple[Estimate, ...]
    p_value: float
    fit_p_value: float
    calibration: TemperatureScaling
    n_resamples: int
    assumption: str = ASSUMPTION
    note: str = ""


def _softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def fit_temperature_scaling(
    logits: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    start: TemperatureScaling | None = None,
) -> TemperatureScaling:
    """Fit temperature and biases by maximum likelihood, pulled slightly to plain scores of unit spread.

    Parameters
    ----------
    logits : (n, c). labels : (n,) int. weights : (n,), default 1 each.
    start : where to begin, such as the fit on all patients for a resample of them.

    Notes
    -----
    The pull (half a patient's worth) keeps scores finite that separate the labels perfectly.
    """
    from scipy.optimize import minimize

    logits = np.asarray(logits, dtype=np.float64)
    n, c = logits.shape
    weights = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    wanted = np.zeros((n, c))
    wanted[np.arange(n), labels] = 1.0
    # Scores of any scale begin at a spread of about one.
    scale = float(np.sqrt(np.mean((logits - logits.mean(axis=1, keepdims=True)) ** 2))) or 1.0
    shaped = logits / scale

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        slope, bias = math.exp(parameters[0]), np.concatenate([[0.0], parameters[1:]])
        inside = slope * shaped + bias
        high = inside.max(axis=1, keepdims=True)
        normal = high[:, 0] + np.log(np.exp(inside - high).sum(axis=1))
        error = (_softmax(inside) - wanted) * weights[:, None]
        value = float(weights @ (normal - (inside * wanted).sum(axis=1))) + 0.25 * float(parameters @ parameters)
        gradient = np.concatenate([[float((error * shaped).sum()) * slope], error.sum(axis=0)[1:]])
        return value, gradient + 0.5 * parameters

    begin = np.zeros(c)
    if start is not None:
        begin[0] = math.log(scale / start.temperature)
        begin[1:] = np.array(start.bias)[1:] - start.bias[0]
    found = minimize(loss, begin, jac=True, method="L-BFGS-B", bounds=[(-8, 8)] + [(-30, 30)] * (c - 1)).x
    return TemperatureScaling(scale / math.exp(found[0]), (0.0, *map(float, found[1:])))


def estimate_prevalence(
    probabilities: np.ndarray, prior: np.ndarray, weights: np.ndarray | None = None, *, tolerance: float = 1e-9
) -> np.ndarray:
    """Prevalences at which calibrated outputs are most likely, by expectation maximisation.

    Parameters
    ----------
    probabilities : (n, c) of each label at the reference's prevalences, for notes of the other institution.
    prior : (c,) prevalences at the reference, all positive.
    weights : (n,), default 1 each.

    Returns
    -------
    (c,) prevalences that sum to 1.

    References
    ----------
    Saerens, Latinne and Decaestecker 2002, Adjusting the Outputs of a Classifier to New a Priori Probabilities,
    Neural Computation 14. The likelihood is concave in the prevalences.
    """
    weights = np.ones(len(probabilities)) if weights is None else np.asarray(weights, dtype=np.float64)
    weights = weights / weights.sum()
    ratio = np.asarray(probabilities, dtype=np.float64) / prior
    found = np.asarray(prior, dtype=np.float64)
    for _ in range(2000):
        joint = ratio * found
        new = weights @ (joint / joint.sum(axis=1, keepdims=True))
        if np.abs(new - found).max() < tolerance:
            return new
        found = new
    return found


def label_shift(
    logits: np.ndarray,
    labels: np.ndarray,
    patient_ids: Sequence[str],
    other_logits: np.ndarray,
    other_patient_ids: Sequence[str],
    *,
    names: Sequence[str],
    n_resamples: int = 500,
    seed: int = 0,
) -> LabelShift:
    """Estimate the prevalence of labels at another institution without its labels.

    Every patient weighs 1. Calibration, prevalences and their intervals are made anew in every resample of patients.

    Parameters
    ----------
    logits : (n, c) scores of rows of the reference, from a model that has not seen their patients.
    labels : (n,) int, 0 to c - 1.
    patient_ids : (n,).
    other_logits, other_patient_ids : (m, c), (m,) of the other institution.
    names : of the c labels.
    n_resamples, seed : of the patient bootstrap.

    Raises
    ------
    UsageError : shapes do not fit, or scores are not finite.
    TooFewPatientsError : a label has fewer than 5 patients at the reference.
    """
    logits, other_logits = np.asarray(logits, dtype=np.float64), np.asarray(other_logits, dtype=np.float64)
    labels = np.asarray(labels, dtype=np.int64)
    c = len(names)
    if logits.shape != (len(labels), c) or other_logits.shape != (len(other_patient_ids), c) or c < 2:
        raise UsageError(f"scores have shapes {logits.shape} and {other_logits.shape} for {c} labels; give one a label")
    if not (np.isfinite(logits).all() and np.isfinite(other_logits).all()):
        raise UsageError("scores hold values that are not finite; leave out the notes that the model could not score")
    people, rows = np.unique(np.asarray(patient_ids, dtype=str), return_inverse=True)
    others, other_rows = np.unique(np.asarray(other_patient_ids, dtype=str), return_inverse=True)
    for label, name in enumerate(names):
        if (having := len(np.unique(rows[labels == label]))) < _FEWEST_OF_A_LABEL:
            raise TooFewPatientsError(
                f"label {name!r} has {having} patients at the reference; label shift needs {_FEWEST_OF_A_LABEL}"
            )
    weight, other_weight = 1.0 / np.bincount(rows)[rows], 1.0 / np.bincount(other_rows)[other_rows]

    def solve(
        w: np.ndarray, v: np.ndarray, start: TemperatureScaling | None
    ) -> tuple[TemperatureScaling, np.ndarray, np.ndarray]:
        calibration = fit_temperature_scaling(logits, labels, w, start=start)
        prior = np.bincount(labels, weights=w, minlength=c) / w.sum()
        return calibration, prior, estimate_prevalence(calibration(other_logits), np.maximum(prior, 1e-6), v)

    calibration, prior, found = solve(weight, other_weight, None)
    enough = min(len(people), len(others)) >= FEWEST_PATIENTS
    generator = np.random.default_rng(seed)
    drawn: list[np.ndarray] = []
    fits: list[float] = []
    observed = _misfit(calibration(logits), labels, weight, calibration(other_logits), other_weight, found)
    while enough and len(drawn) < n_resamples:
        w = np.bincount(generator.integers(0, len(people), len(people)), minlength=len(people))[rows] * weight
        v = np.bincount(generator.integers(0, len(others), len(others)), minlength=len(others))[other_rows]
        _, here, there = solve(w, v * other_weight, calibration)
        drawn.append(np.stack([here, there]))
        again = _misfit(calibration(logits), labels, w, calibration(other_logits), v * other_weight, there)
        fits.append(again - observed)
    note = "" if enough else f"no interval: fewer than {FEWEST_PATIENTS} patients in an institution"
    p_value = fit_p = math.nan
    if enough:
        p_value = _equal_prevalence(np.array(drawn), prior, found)
        spread = float(np.std(fits, ddof=1))
        fit_p = math.erfc(abs(observed) / spread / math.sqrt(2)) if spread > 0 else math.nan

    def estimates(side: int, value: np.ndarray, n_patients: int, n_notes: int) -> tuple[Estimate, ...]:
        bounds = np.full((2, c), math.nan)
        if enough:
            bounds = np.quantile(np.array(drawn)[:, side], [0.025, 0.975], axis=0)
        part = "labelled" if side == 0 else f"estimated, if {ASSUMPTION}"
        return tuple(
            Estimate(float(value[k]), float(bounds[0, k]), float(bounds[1, k]), n_patients, n_notes, part, note)
            for k in range(c)
        )

    return LabelShift(
        tuple(names),
        estimates(0, prior, len(people), len(labels)),
        estimates(1, found, len(others), len(other_rows)),
        p_value,
        fit_p,
        calibration,
        len(drawn),
        note=note,
    )


def _misfit(
    scores: np.ndarray, labels: np.ndarray, weight: np.ndarray, other: np.ndarray, other_weight: np.ndarray,
    prevalence: np.ndarray,
) -> float:  # fmt: skip
    """How much more spread out the other side's scores are than the mixture of the reference's scores allows.

    The mean is what the prevalences were fitted to; the second moment is free to contradict them.
    """
    square = (scores**2).sum(axis=1)
    expected = 0.0
    for label, share in enumerate(prevalence):
        inside = labels == label
        if weight[inside].sum() > 0:
            expected += share * np.average(square[inside], weights=weight[inside])
    return float(np.average((other**2).sum(axis=1), weights=other_weight) - expected)


def _equal_prevalence(drawn: np.ndarray, prior: np.ndarray, found: np.ndarray) -> float:
    """Wald test of equal log-odds, the largest label decides (Bonferroni over labels, over one for two of them)."""
    smallest = 1e-4

    def log_odds(share: np.ndarray) -> np.ndarray:
        clipped = np.clip(share, smallest, 1 - smallest)
        return np.asarray(np.log(clipped) - np.log1p(-clipped))

    spread = (log_odds(drawn[:, 1]) - log_odds(drawn[:, 0])).std(axis=0, ddof=1)
    with np.errstate(all="ignore"):
        z = np.abs(log_odds(found) - log_odds(prior)) / spread
    n_tests = 1 if len(prior) == 2 else len(prior)
    return float(min(1.0, n_tests * math.erfc(float(np.nanmax(z)) / math.sqrt(2))))
