"""Conformal sets: the classes that cannot be ruled out, right for the share of new notes that was asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clinical_nlp.errors import InputError, UsageError
from clinical_nlp.runs import Estimate
from clinical_nlp.statistics.intervals import by_patient, patient_bootstrap


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
    if not 0 < miss < 1:
        raise UsageError(f"miss lies between 0 and 1 (got {miss})")
    values, truth = _rows(probabilities), np.asarray(gold).astype(int)
    if len(values) != len(truth) or len(values) != len(patients):
        raise UsageError(f"{len(values)} probabilities, {len(truth)} classes and {len(patients)} patients")
    if ((truth < 0) | (truth >= values.shape[1])).any():
        raise UsageError(f"classes are 0 to {values.shape[1] - 1}")
    people, rows, counts = np.unique(np.asarray(patients, dtype=str), return_inverse=True, return_counts=True)
    if not len(people):
        raise InputError("conformal sets need calibration patients; there are none")
    scores = 1 - values[np.arange(len(truth)), truth]
    order = np.argsort(scores, kind="stable")
    mass = np.cumsum((1 / counts[rows])[order]) / (len(people) + 1)
    reached = np.flatnonzero(mass >= 1 - miss - 1e-12)
    if not len(reached):
        note = f"{len(people)} patients cannot assure {100 * (1 - miss):g} %: every set holds all classes"
        return ConformalSets(math.inf, miss, len(people), len(truth), note)
    return ConformalSets(float(scores[order[reached[0]]]), miss, len(people), len(truth))


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
