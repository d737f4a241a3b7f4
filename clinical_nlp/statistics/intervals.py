"""Intervals for scores: patients are resampled, counts are summed, nothing is decoded again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from clinical_nlp.errors import UsageError
from clinical_nlp.runs import Estimate

FEWEST_PATIENTS = 20
"""Below this no bootstrap interval of a ratio keeps what it promises (micro-F1: 81 % at 5 patients, 87 % at 10)."""

_CELLS_AT_ONCE = 4_000_000


def by_patient(patient_ids: Sequence[str], counts: np.ndarray) -> np.ndarray:
    """Sum counts over the notes of each patient.

    Parameters
    ----------
    patient_ids : the patient of each note, n_notes of them.
    counts : (n_notes, k) what a score is made of (true positives, false positives, tokens, summed losses, ...).

    Returns
    -------
    (n_patients, k) float64, patients in sorted order of their ids.

    Raises
    ------
    UsageError : the two do not have one row a note.
    """
    counts = np.asarray(counts, dtype=np.float64)
    if counts.ndim != 2 or len(counts) != len(patient_ids):
        raise UsageError(f"counts has shape {counts.shape}; it needs one row for each of {len(patient_ids)} notes")
    if not len(patient_ids):
        return counts
    patients, rows = np.unique(np.asarray(patient_ids, dtype=str), return_inverse=True)
    summed = np.zeros((len(patients), counts.shape[1]))
    np.add.at(summed, rows, counts)
    return summed


def patient_bootstrap(
    counts: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    n_notes: int,
    part: str = "test",
    n_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Estimate a statistic of summed counts with an interval from resampled patients.

    The interval is the expanded percentile interval: percentiles of the bootstrap distribution, taken further out so
    that a mean of that many patients would be covered as Student's t covers it. It keeps to the range of the
    statistic. Simulated coverage of micro-F1 (skewed entities a patient, intra-patient correlation 0.15, 800 runs)
    at 20 / 30 / 50 / 100 / 200 patients, nominal 95 %: F1 near 0.8, 94 / 95 / 94 / 94 / 94 % (plain percentile
    91 / 94 / 94 / 93 / 94, BCa 90 / 94 / 93 / 93 / 94); F1 near 0.95, 92 / 93 / 92 / 93 / 95 % (plain 89 / 91 / 91 /
    92 / 95, BCa 90 / 92 / 92 / 93 / 94).

    Parameters
    ----------
    counts : (n_patients, k), one row a patient; see `by_patient`.
    statistic : maps summed counts (..., k) to values (...); 0 / 0 may give NaN, and is then reported as undefined.
    n_notes : how many notes the counts come from.
    part : what was scored (test, development, ...).
    n_resamples : bootstrap samples.
    seed : of the resampling.
    confidence : nominal coverage.

    Returns
    -------
    Estimate. The value is NaN where the statistic is undefined, never 0. `low` and `high` are NaN, and `note` says
    why, with fewer than 20 patients that have anything to count, or when the resamples cannot show any spread.

    References
    ----------
    Hesterberg 2015, What Teachers Should Know About the Bootstrap, The American Statistician 69, section 4.3.
    """
    counts = np.asarray(counts, dtype=np.float64)
    if counts.ndim != 2:
        raise UsageError(f"counts has shape {counts.shape}; it needs one row a patient")
    n_patients = len(counts)
    with np.errstate(all="ignore"):
        value = float(statistic(counts.sum(axis=0)))

    def without_interval(note: str) -> Estimate:
        return Estimate(value, math.nan, math.nan, n_patients, n_notes, part, note)

    if not math.isfinite(value):
        value = math.nan
        return without_interval("undefined: nothing to count")
    informative = int(np.any(counts != 0, axis=1).sum())
    if informative < FEWEST_PATIENTS:
        return without_interval(f"fewer than {FEWEST_PATIENTS} patients")

    resampled = _resample(counts, statistic, n_resamples, np.random.default_rng(seed))
    bounds, note = percentile_interval(resampled, value, informative, confidence=confidence)
    return Estimate(value, *bounds, n_patients, n_notes, part, note)


def percentile_interval(
    resampled: np.ndarray, value: float, informative: int, *, confidence: float = 0.95
) -> tuple[tuple[float, float], str]:
    """Return the expanded percentile interval of resampled values, or NaN twice and the reason why there is none.

    Parameters
    ----------
    resampled : values of the statistic in bootstrap samples of patients; NaN where it is undefined.
    value : of the statistic itself.
    informative : patients that have anything to count.
    """
    none = (math.nan, math.nan)
    defined = np.isfinite(resampled)
    if defined.mean() < 0.95:
        return none, "undefined in more than 5 % of resamples"
    resampled = resampled[defined]
    if np.ptp(resampled) <= 1e-12 * max(1.0, abs(value)):
        return none, "every patient scores alike: resampling shows no spread"
    tail = _expanded_tail((1 - confidence) / 2, informative)
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return (float(low), float(high)), ""


def _expanded_tail(tail: float, n: int) -> float:
    """Tail whose percentile gives a mean of n values the length of its t interval."""
    from scipy import stats

    return float(stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf(tail, n - 1)))


def _resample(
    counts: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], n_resamples: int, generator: np.random.Generator
) -> np.ndarray:
    n_patients = len(counts)
    values = np.empty(n_resamples)
    at_once = max(1, _CELLS_AT_ONCE // n_patients)
    for start in range(0, n_resamples, at_once):
        size = min(at_once, n_resamples - start)
        drawn = generator.integers(0, n_patients, size=(size, n_patients))
        drawn += np.arange(size)[:, None] * n_patients
        weights = np.bincount(drawn.ravel(), minlength=size * n_patients).reshape(size, n_patients)
        with np.errstate(all="ignore"):
            values[start : start + size] = statistic(weights.astype(np.float64) @ counts)
    return values
