"""Conformal sets: the classes that cannot be ruled out, right for the share of new notes that was asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clinical_nlp.errors import InputError, UsageError
from clinical_nlp.runs import Estimate
from clinical_nlp.statistics.intervals import by_patient, patient_bootstrap
from clinical_nlp.statistics.label_shift import ASSUMPTION, LabelShift, label_shift


@dataclass(frozen=True, slots=True)
class ConformalSets:
    """Holds every class of at least `1 - limit` probability; `limit` above 1 holds all classes, with the reason."""

    limit: float
    miss: float
    n_patients: int
    n_items: int
    note: str = ""

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        """Return which classes are in the set, (n, k) bool; (n,) probabilities of two classes give k = 2."""
        return 1 - _rows(probabilities) <= self.limit + 1e-12


@dataclass(frozen=True, slots=True)
class ShiftedSets:
    """Sets for patients among whom classes are more or less common, each class with a limit of its own.

    `weights` is how much commoner each class is there; the promise stands on `assumption`, which the sets cannot check.
    """

    limits: tuple[float, ...]
    weights: tuple[float, ...]
    miss: float
    n_patients: int
    n_items: int
    note: str = ""
    assumption: str = ASSUMPTION

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        """Return which classes are in the set, (n, k) bool; (n,) probabilities of two classes give k = 2."""
        values = _rows(probabilities)
        if values.shape[1] != len(self.limits):
            raise UsageError(f"sets of {len(self.limits)} classes (got probabilities of {values.shape[1]})")
        return 1 - values <= np.array(self.limits) + 1e-12


def _rows(probabilities: np.ndarray) -> np.ndarray:
    values = np.asarray(probabilities, dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any() or (values > 1).any():
        raise InputError("some probabilities are not between 0 and 1 (or not a number)")
    if values.ndim == 1:
        return np.stack([1 - values, values], 1)
    if values.ndim != 2:
        raise UsageError(f"probabilities are (n,) or (n, k) (got {values.shape})")
    return values


def fit_conformal(
    probabilities: np.ndarray, gold: np.ndarray, patients: Sequence[str], *, miss: float = 0.1
) -> ConformalSets:
    """Choose the limit on calibration patients so that the right class is missing in at most `miss` of new notes.

    The score of an item is 1 - P(right class). Each of P patients spreads weight 1 / (P + 1) over their items and the
    new patient's stands at infinity; the limit is the (1 - miss) quantile. For one item of a patient exchangeable with
    these, coverage is at least 1 - miss, whatever the correlation within patients and the model. It is an average over
    patients: not for each institution, and not where patients differ from these.

    Parameters
    ----------
    probabilities : (n,) of the positive class, or (n, k).
    gold : (n,) int, the class.
    patients : n names, none of whom the model was trained on.

    References
    ----------
    Vovk, Gammerman and Shafer 2005, Algorithmic Learning in a Random World.
    Lee, Barber and Willett 2023, Distribution-free inference with hierarchical data, arXiv 2306.06342.
    """
    scores, truth, share, _ = _scored(probabilities, gold, patients, miss)
    n_patients = len(set(patients))
    limit = _limit(scores, share, 1.0, miss)
    note = ""
    if limit == math.inf:
        note = f"{n_patients} patients cannot assure {100 * (1 - miss):g} %: every set holds all classes"
    return ConformalSets(limit, miss, n_patients, len(truth), note)


def fit_shifted_conformal(
    probabilities: np.ndarray,
    gold: np.ndarray,
    patients: Sequence[str],
    weights: Sequence[float],
    *,
    miss: float = 0.1,
) -> ShiftedSets:
    """Choose the limits as `fit_conformal` does, for patients among whom class k is `weights[k]` times as common.

    An item of class k weighs w_k / (items of its patient), and the new item, were it of class k, w_k at infinity. With
    the true weights and P(text | class) the same, coverage is at least 1 - miss for patients of one item each; with
    several items of a patient, and with estimated weights, it is so as patients become many.

    Parameters
    ----------
    probabilities, gold, patients : of calibration patients, as for `fit_conformal`.
    weights : prevalence of each class among the new patients over that among these; see `prevalence_weights`.

    References
    ----------
    Podkopaev and Ramdas 2021, Distribution-free uncertainty quantification for classification under label shift, UAI.
    Tibshirani, Barber, Candes and Ramdas 2019, Conformal Prediction Under Covariate Shift, NeurIPS.
    """
    scores, truth, share, n_classes = _scored(probabilities, gold, patients, miss)
    factors = np.asarray(weights, dtype=np.float64)
    if factors.shape != (n_classes,) or not np.isfinite(factors).all() or (factors < 0).any() or not factors.any():
        raise UsageError(f"weights are {n_classes} numbers of at least 0, one a class, not all of them 0")
    limits = tuple(_limit(scores, share * factors[truth], float(factor), miss) for factor in factors)
    note = ""
    if lost := [str(k) for k, limit in enumerate(limits) if limit == math.inf]:
        note = (
            f"{len(set(patients))} patients cannot assure {100 * (1 - miss):g} % at these prevalences: every set holds "
            f"class {', '.join(lost)}"
        )
    return ShiftedSets(limits, tuple(factors.tolist()), miss, len(set(patients)), len(truth), note)


def _scored(
    probabilities: np.ndarray, gold: np.ndarray, patients: Sequence[str], miss: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return of each item its score, its class, and its share of its patient; and how many classes there are."""
    if not 0 < miss < 1:
        raise UsageError(f"miss lies between 0 and 1 (got {miss})")
    values, truth = _rows(probabilities), np.asarray(gold).astype(int)
    if len(values) != len(truth) or len(values) != len(patients):
        raise UsageError(f"{len(values)} probabilities, {len(truth)} classes and {len(patients)} patients")
    if ((truth < 0) | (truth >= values.shape[1])).any():
        raise UsageError(f"classes are 0 to {values.shape[1] - 1}")
    if not len(truth):
        raise InputError("conformal sets need calibration patients; there are none")
    _, rows, counts = np.unique(np.asarray(patients, dtype=str), return_inverse=True, return_counts=True)
    return 1 - values[np.arange(len(truth)), truth], truth, 1 / counts[rows], values.shape[1]


def _limit(scores: np.ndarray, mass: np.ndarray, own: float, miss: float) -> float:
    """Return the (1 - miss) quantile of the scores under their mass, with `own` more at infinity."""
    order = np.argsort(scores, kind="stable")
    reached = np.cumsum(mass[order]) / (mass.sum() + own)
    places = np.flatnonzero(reached >= 1 - miss - 1e-12)
    return float(scores[order[places[0]]]) if len(places) else math.inf


def prevalence_weights(
    probabilities: np.ndarray,
    gold: np.ndarray,
    patients: Sequence[str],
    other: np.ndarray,
    other_patients: Sequence[str],
    *,
    seed: int = 0,
) -> tuple[tuple[float, ...], LabelShift]:
    """Estimate how much commoner each of two classes is among other patients, who have no gold.

    By expectation maximisation on recalibrated outputs (`label_shift`), under its assumption.

    Parameters
    ----------
    probabilities, gold, patients : (n,) of the outcome, whether it is there, and whose, of calibration patients.
    other, other_patients : (m,) of the patients that the sets are for.

    Returns
    -------
    The weights for `fit_shifted_conformal`, and what they come from.

    Raises
    ------
    TooFewPatientsError : a class has too few calibration patients.
    """

    def logits(values: np.ndarray) -> np.ndarray:
        inside = np.clip(np.asarray(values, dtype=np.float64), 1e-6, 1 - 1e-6)
        return np.stack([np.zeros(len(inside)), np.log(inside) - np.log1p(-inside)], 1)

    truth = np.asarray(gold).astype(np.int64)
    found = label_shift(
        logits(probabilities), truth, patients, logits(other), other_patients,
        names=("absent", "present"), n_resamples=_RESAMPLES, seed=seed,
    )  # fmt: skip
    pairs = zip(found.other, found.reference, strict=True)
    return tuple(there.value / max(here.value, 1e-6) for there, here in pairs), found


_RESAMPLES = 100
"""Patient resamples behind the intervals of the prevalences."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """How often the right class is in the set, how many classes a set holds, and how many sets hold none or all."""

    covered: Estimate
    size: Estimate
    empty: float
    undecided: float


def coverage(
    sets: np.ndarray, gold: np.ndarray, patients: Sequence[str], *, part: str = "test", seed: int = 0
) -> Coverage:
    """Score sets (n, k) on new patients, each weighing 1."""
    truth = np.asarray(gold).astype(int)
    inside = sets[np.arange(len(truth)), truth]
    each = by_patient(patients, np.stack([inside, sets.sum(1), np.ones(len(truth))], 1).astype(float))
    means = np.concatenate([each[:, :2] / each[:, 2:], np.ones((len(each), 1))], 1)
    size = sets.sum(1)

    def estimate(column: int) -> Estimate:
        return patient_bootstrap(means, lambda c: c[..., column] / c[..., 2], n_notes=len(truth), part=part, seed=seed)

    return Coverage(estimate(0), estimate(1), float((size == 0).mean()), float((size == sets.shape[1]).mean()))
