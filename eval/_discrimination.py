"""AUC with patients as the unit: weights, intervals, and permutations of trained models and of methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from clinical_nlp.runs import Estimate
from clinical_nlp.statistics.intervals import FEWEST_PATIENTS, percentile_interval

FEWEST_SEEDS = 6
"""With six seeds of each of two methods, 2 of 924 exchanges are as far out as a perfect order; with five, 2 of 252."""


def weighted_auc(scores: np.ndarray, label: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Probability that a note with the label scores above one without it, ties by half, under weights.

    Parameters
    ----------
    scores, label : (n,), label bool.
    weights : (..., n), at least 0.

    Returns
    -------
    (...), NaN where one of the two kinds has no weight.
    """
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    positive = np.add.reduceat(weights[..., order] * label[order], starts, axis=-1)
    negative = np.add.reduceat(weights[..., order] * ~label[order], starts, axis=-1)
    below = np.cumsum(negative, axis=-1) - negative
    pairs = positive.sum(-1) * negative.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(pairs > 0, (positive * (below + 0.5 * negative)).sum(-1) / pairs, np.nan))


@dataclass(frozen=True, eq=False)
class Panel:
    """The test notes on which models are compared: (n,) label and patient, and resamples shared by all of them.

    Every patient weighs 1, however many notes. `weights` is (1 + n_resamples, n): row 0 as observed, then patients
    drawn with replacement.
    """

    label: np.ndarray
    patient: np.ndarray
    n_resamples: int
    seed: int

    def __post_init__(self) -> None:
        people, rows = np.unique(self.patient, return_inverse=True)
        per_note = 1.0 / np.bincount(rows)[rows]
        random = np.random.default_rng(self.seed)
        draws = random.multinomial(len(people), np.full(len(people), 1 / len(people)), size=self.n_resamples)
        counts = np.concatenate([np.ones((1, len(people))), draws])
        object.__setattr__(self, "weights", counts[:, rows] * per_note)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "n_patients", len(people))

    weights: np.ndarray = None  # type: ignore[assignment]
    rows: np.ndarray = None  # type: ignore[assignment]
    n_patients: int = 0

    def aucs(self, scores: Sequence[np.ndarray]) -> np.ndarray:
        """AUC of each model (seed), as observed and in every resample: (n_seeds, 1 + n_resamples)."""
        return np.stack([weighted_auc(each, self.label.astype(bool), self.weights) for each in scores])

    def over_seeds(self, aucs: np.ndarray, *, salt: int) -> np.ndarray:
        """Mean over seeds, as observed and with patients and seeds both drawn anew: (1 + n_resamples,)."""
        n_seeds, size = aucs.shape
        drawn = np.random.default_rng((self.seed, salt)).integers(0, n_seeds, size=(n_seeds, size - 1))
        resampled = aucs[drawn, np.arange(1, size)].mean(0)
        return np.concatenate([[aucs[:, 0].mean()], resampled])

    def estimate(self, values: np.ndarray, *, part: str, note: str = "") -> Estimate:
        """Estimate from a value and its resamples, with the interval or the reason why there is none."""
        value = float(values[0])
        bounds, reason = (math.nan, math.nan), f"fewer than {FEWEST_PATIENTS} patients"
        if not math.isfinite(value):
            value, reason = math.nan, "undefined: one label only"
        elif self.n_patients >= FEWEST_PATIENTS:
            bounds, reason = percentile_interval(values[1:], value, self.n_patients)
        return Estimate(value, *bounds, self.n_patients, len(self.label), part, note or reason)

    def models_differ(self, first: np.ndarray, second: np.ndarray, *, n_permutations: int) -> float:
        """Two-sided p-value that two trained models score these patients alike, from exchanging them in patients.

        Scores are taken by rank within each model, since models differ in scale. It speaks of the two models, not of
        the methods: one method with two seeds differs too.
        """
        first, second = (np.argsort(np.argsort(each, kind="stable"), kind="stable") for each in (first, second))
        random = np.random.default_rng((self.seed, 7))
        weights, label = self.weights[0], self.label.astype(bool)

        def distance(exchanged: np.ndarray) -> float:
            one, other = np.where(exchanged, second, first), np.where(exchanged, first, second)
            return abs(float(weighted_auc(one, label, weights) - weighted_auc(other, label, weights)))

        observed = distance(np.zeros(len(label), dtype=bool))
        if not math.isfinite(observed):
            return math.nan
        beyond = 0
        for _ in range(n_permutations):
            beyond += distance((random.random(self.n_patients) < 0.5)[self.rows]) >= observed - 1e-12
        return (1 + beyond) / (n_permutations + 1)


def methods_differ(first: Sequence[float], second: Sequence[float]) -> tuple[float, str]:
    """Two-sided p-value that two methods score alike over seeds: every exchange of seeds between them, exactly.

    Returns
    -------
    p-value and "", or NaN and the reason: fewer than six seeds of either.
    """
    if min(len(first), len(second)) < FEWEST_SEEDS:
        return math.nan, f"a claim about methods needs {FEWEST_SEEDS} seeds of each (got {len(first)}, {len(second)})"
    pooled = np.array([*first, *second])
    if not np.isfinite(pooled).all():
        return math.nan, "a score is undefined"
    total, size = pooled.sum(), len(first)
    chosen = np.array([pooled[list(places)].sum() for places in combinations(range(len(pooled)), size)])
    distances = np.abs(chosen / size - (total - chosen) / len(second))
    observed = abs(float(np.mean(first)) - float(np.mean(second)))
    return float((distances >= observed - 1e-12).mean()), ""
