"""Calibration: scores to probabilities that hold on new patients, and how far off they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
