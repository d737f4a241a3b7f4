"""Decision curves: is acting on the probabilities better than treating everybody, or nobody?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clinical_nlp.errors import UsageError
from clinical_nlp.runs import Estimate
from clinical_nlp.statistics.calibration import checked_probabilities
from clinical_nlp.statistics.intervals import by_patient, patient_bootstrap

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))


@dataclass(frozen=True, slots=True)
class NetBenefit:
    """Net benefit at one threshold: of the model, of treating everybody, and the difference; treating nobody gives 0.

    `avoided` is how many interventions a hundred items are spared at equal benefit, compared with treating everybody.
    """

    threshold: float
    model: Estimate
    treat_all: Estimate
    over_treat_all: Estimate
    avoided: Estimate


def net_benefit(
    probabilities: np.ndarray,
    gold: np.ndarray,
    patients: Sequence[str],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    part: str = "test",
    seed: int = 0,
    n_resamples: int = 1000,
) -> list[NetBenefit]:
    """Net benefit TP / n - FP / n * t / (1 - t) of acting from a probability of t on, with bands over patients.

    Parameters
    ----------
    probabilities, gold : (n,) of the positive outcome, and 0 or 1; an item is a decision.
    patients : n names; they are resampled with all of their items.
    thresholds : t, the odds t / (1 - t) at which a false alarm weighs as much as a hit.

    Raises
    ------
    UsageError : a threshold is not between 0 and 1.

    References
    ----------
    Vickers and Elkin 2006, Decision Curve Analysis, Medical Decision Making 26.
    """
    values, truth = checked_probabilities(probabilities, gold)
    found = []
    for t in thresholds:
        if not 0 < t < 1:
            raise UsageError(f"a threshold of net benefit lies between 0 and 1 (got {t})")
        odds, acts = t / (1 - t), values >= t
        rows = np.stack([acts & (truth == 1), acts & (truth == 0), truth == 1, np.ones(len(truth))], 1)
        counts = by_patient(patients, rows.astype(float))

        def model(c: np.ndarray, odds: float = odds) -> np.ndarray:
            return np.asarray((c[..., 0] - odds * c[..., 1]) / c[..., 3])

        def everybody(c: np.ndarray, odds: float = odds) -> np.ndarray:
            return np.asarray((c[..., 2] - odds * (c[..., 3] - c[..., 2])) / c[..., 3])

        def spared(c: np.ndarray, odds: float = odds) -> np.ndarray:
            return np.asarray(100 * (model(c) - everybody(c)) / odds)

        estimates = [
            patient_bootstrap(counts, formula, n_notes=len(truth), part=part, seed=seed, n_resamples=n_resamples)
            for formula in (model, everybody, lambda c: model(c) - everybody(c), spared)
        ]
        found.append(NetBenefit(float(t), *estimates))
    return found
