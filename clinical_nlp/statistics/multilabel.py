"""Scores of many labels a document (clinical codes): thresholded, ranked, by label and by how common a label is.

Patients are resampled for every interval. Documents of a patient count alike, and all documents count alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from clinical_nlp.runs import Estimate
from clinical_nlp.statistics.intervals import FEWEST_PATIENTS, by_patient, patient_bootstrap, percentile_interval

PRECISION_AT = (5, 8, 15)
BANDS = ((0, 0), (1, 4), (5, 19), (20, 99), (100, None))
"""How many training documents a label has: from, to."""
_MOST_CELLS = 40_000_000
"""Of a table that is resampled; above, a score is given without an interval."""


def band_name(band: tuple[int, int | None]) -> str:
    """Name a band of training counts: `unseen`, `1-4`, `100+`."""
    low, high = band
    return "unseen" if high == 0 else f"{low}+" if high is None else f"{low}-{high}"


def f1(true: np.ndarray, predicted: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """F1 = 2 tp / (predicted + gold); NaN where both are 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(predicted + gold > 0, 2 * true / (predicted + gold), np.nan)


def choose_threshold(scores: np.ndarray, gold: np.ndarray) -> float:
    """Return the score from which predicting gives the best micro-F1; half-way to the next lower score.

    Parameters
    ----------
    scores : (n, k); -inf is never predicted.
    gold : (n, k) bool.

    Returns
    -------
    +inf where there is no gold label with a score.
    """
    values, truth = np.ravel(scores), np.ravel(gold)
    total = int(truth.sum())
    kept = np.isfinite(values)
    values, truth = values[kept], truth[kept]
    if not truth.any():
        return math.inf
    order = np.argsort(-values, kind="stable")
    values, hits = values[order], np.cumsum(truth[order])
    last = np.append(np.flatnonzero(values[1:] < values[:-1]), len(values) - 1)  # equal scores go together
    best = int(last[np.argmax(2 * hits[last] / (last + 1 + total))])
    lower = values[best + 1] if best + 1 < len(values) else values[best] - 1.0
    return float((values[best] + lower) / 2)


def average_precision(scores: np.ndarray, gold: np.ndarray) -> float:
    """Mean of the precision at the rank of each gold label; one that has no score (-inf) adds 0. NaN without gold."""
    if not gold.any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    hits = gold[order] & np.isfinite(scores[order])
    ranks = np.flatnonzero(hits)
    return float((np.arange(1, len(ranks) + 1) / (ranks + 1)).sum() / gold.sum())


def precision_at(scores: np.ndarray, gold: np.ndarray, k: int) -> float:
    """Return the share of gold labels among the k best scores; k counts also where fewer labels have a score."""
    best = np.argsort(-scores, kind="stable")[:k]
    return float((gold[best] & np.isfinite(scores[best])).sum() / k)


def score(
    scores: np.ndarray,
    gold: np.ndarray,
    threshold: float,
    patients: Sequence[str],
    *,
    train_counts: np.ndarray,
    part: str,
    seed: int,
    prefix: str = "test.",
) -> dict[str, Estimate]:
    """Score documents.

    Parameters
    ----------
    scores : (n, k) logits or probabilities; -inf for a gold label that the model does not know.
    gold : (n, k) bool; every document has at least one.
    threshold : predicted are scores of at least this.
    patients : n patient ids.
    train_counts : (k,) training documents with each label, for the bands.

    Returns
    -------
    `micro_f1`, `micro_precision`, `micro_recall`; `macro_f1`, over labels that the scored documents have;
    `precision_at_5`, `_8`, `_15`, `r_precision`, `map`; `auc_micro` and `auc_macro` (labels that the model knows, in
    the latter those that some scored documents have and some have not); `labels_per_document`; and `micro_f1.<band>`.
    """
    predicted = scores >= threshold
    common: dict[str, Any] = {"n_notes": len(patients), "part": part}
    found: dict[str, Estimate] = {}

    def add(name: str, rows: np.ndarray, formula: Callable[[np.ndarray], np.ndarray]) -> None:
        found[prefix + name] = patient_bootstrap(by_patient(patients, rows), formula, seed=seed, **common)

    def micro(columns: np.ndarray) -> np.ndarray:
        parts = ((gold & predicted)[:, columns], predicted[:, columns], gold[:, columns])
        return np.stack([part.sum(1) for part in parts], 1).astype(float)

    everything = micro(np.ones(gold.shape[1], bool))
    add("micro_f1", everything, lambda c: f1(c[..., 0], c[..., 1], c[..., 2]))
    add("micro_precision", everything, lambda c: _ratio(c[..., 0], c[..., 1]))
    add("micro_recall", everything, lambda c: _ratio(c[..., 0], c[..., 2]))
    add("labels_per_document", _with_ones(everything[:, 1]), _mean)
    found[prefix + "macro_f1"] = _macro_f1(gold, predicted, patients, seed=seed, **common)

    for k in PRECISION_AT:
        values = np.array([precision_at(row, truth, k) for row, truth in zip(scores, gold, strict=True)])
        add(f"precision_at_{k}", _with_ones(values), _mean)
    values = np.array([precision_at(row, truth, int(truth.sum())) for row, truth in zip(scores, gold, strict=True)])
    add("r_precision", _with_ones(values), _mean)
    values = np.array([average_precision(row, truth) for row, truth in zip(scores, gold, strict=True)])
    add("map", _with_ones(values), _mean)

    known = np.isfinite(scores).all(0)
    found[prefix + "auc_micro"] = _auc_micro(scores[:, known], gold[:, known], patients, seed=seed, **common)
    found[prefix + "auc_macro"] = _auc_macro(scores[:, known], gold[:, known], patients, seed=seed, **common)
    for band in BANDS:
        low, high = band
        columns = (train_counts >= low) & (train_counts <= (math.inf if high is None else high))
        if gold[:, columns].any():
            add(f"micro_f1.{band_name(band)}", micro(columns), lambda c: f1(c[..., 0], c[..., 1], c[..., 2]))
    return found


def label_table(
    scores: np.ndarray, gold: np.ndarray, threshold: float, patients: Sequence[str], *, part: str, seed: int
) -> list[dict[str, Any]]:
    """One row a label: documents and patients that have it by gold, predicted, true, precision, recall, F1, AUC.

    An interval needs 20 patients who have the label, by gold or by prediction.
    """
    predicted = scores >= threshold
    rows = []
    for column in range(gold.shape[1]):
        truth, said = gold[:, column], predicted[:, column]
        counts = np.stack([truth & said, said, truth], 1).astype(float)
        estimate = None
        if (truth | said).sum() >= FEWEST_PATIENTS:
            estimate = patient_bootstrap(
                by_patient(patients, counts), lambda c: f1(c[..., 0], c[..., 1], c[..., 2]),
                n_notes=len(patients), part=part, seed=seed,
            )  # fmt: skip
        true, n_predicted, n_gold = counts.sum(0)
        value = float(f1(true, n_predicted, n_gold))
        known = bool(np.isfinite(scores[:, column]).all())
        rows.append(
            {
                "gold": int(n_gold),
                "patients": len({patient for patient, has in zip(patients, truth, strict=True) if has}),
                "predicted": int(n_predicted),
                "true": int(true),
                "precision": float(_ratio(true, n_predicted)),
                "recall": float(_ratio(true, n_gold)),
                "f1": value,
                "f1_low": math.nan if estimate is None else estimate.low,
                "f1_high": math.nan if estimate is None else estimate.high,
                "auc": auc(scores[:, column], truth) if known else math.nan,
            }
        )
    return rows


def auc(scores: np.ndarray, gold: np.ndarray) -> float:
    """Area under the ROC curve of n scores, ties counted half; NaN where all or none are gold."""
    from scipy.stats import rankdata

    positive = int(gold.sum())
    negative = len(gold) - positive
    if not positive or not negative:
        return math.nan
    ranks = rankdata(scores)[gold].sum()
    return float((ranks - positive * (positive + 1) / 2) / (positive * negative))


def expected_calibration_error(probabilities: np.ndarray, gold: np.ndarray, *, bins: int = 15) -> float:
    """Mean distance between probability and frequency over bins with equally many predictions, weighted by size.

    References
    ----------
    Nixon et al. 2019, Measuring Calibration in Deep Learning (adaptive calibration error, one class).
    """
    values, truth = np.ravel(probabilities), np.ravel(gold).astype(float)
    if not values.size:
        return math.nan
    order = np.argsort(values, kind="stable")
    parts = zip(np.array_split(values[order], bins), np.array_split(truth[order], bins), strict=True)
    return float(sum(abs(p.mean() - t.mean()) * len(p) for p, t in parts if len(p)) / values.size)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, part / whole, np.nan)


def _with_ones(values: np.ndarray) -> np.ndarray:
    return np.stack([values, np.ones(len(values))], 1)


def _mean(counts: np.ndarray) -> np.ndarray:
    return _ratio(counts[..., 0], counts[..., 1])


def _macro_f1(
    gold: np.ndarray, predicted: np.ndarray, patients: Sequence[str], *, n_notes: int, part: str, seed: int
) -> Estimate:
    columns = gold.any(0)
    truth, said = gold[:, columns], predicted[:, columns]
    k = truth.shape[1]
    n_patients = len(set(patients))
    if n_patients * 3 * k > _MOST_CELLS:
        value = float(np.mean(f1((truth & said).sum(0), said.sum(0), truth.sum(0)))) if k else math.nan
        return Estimate(value, math.nan, math.nan, n_patients, n_notes, part, "no interval: too large to resample")
    counts = by_patient(patients, np.concatenate([truth & said, said, truth], 1).astype(np.float64))

    def formula(c: np.ndarray) -> np.ndarray:
        each = f1(c[..., :k], c[..., k : 2 * k], c[..., 2 * k :])
        drawn = c[..., 2 * k :] > 0  # labels that the resampled documents have
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.where(drawn, each, 0.0).sum(-1) / drawn.sum(-1))

    plain = patient_bootstrap(counts, formula, n_notes=n_notes, part=part, seed=seed, n_resamples=1)
    if plain.note.startswith(("undefined: nothing", "fewer")):
        return plain
    draws = np.random.default_rng(seed).multinomial(n_patients, np.full(n_patients, 1 / n_patients), 1000)
    bounds, note = percentile_interval(_centred(formula(draws @ counts), plain.value), plain.value, n_patients)
    return Estimate(plain.value, *bounds, n_patients, n_notes, part, note)


def _centred(resampled: np.ndarray, value: float) -> np.ndarray:
    """Move resampled means over labels so that their mean is the value.

    A resample lacks some of the labels that few patients have, which are not scored like the others: its mean over the
    labels that it has is of other labels.
    """
    return np.asarray(np.clip(resampled - (np.nanmean(resampled) - value), 0, 1))


def _auc_micro(
    scores: np.ndarray, gold: np.ndarray, patients: Sequence[str], *, n_notes: int, part: str, seed: int
) -> Estimate:
    """Histogram the scores between those of gold labels, which is exact, or between 1,024 quantiles of them."""
    levels = np.unique(scores[gold])
    if len(levels) > 1024:
        levels = np.unique(np.quantile(levels, np.linspace(0, 1, 1024)))
    bins = 2 * len(levels) + 1
    place = np.searchsorted(levels, scores, "left") + np.searchsorted(levels, scores, "right")
    rows = np.zeros((len(scores), 2 * bins))
    for row in range(len(scores)):
        rows[row, :bins] = np.bincount(place[row][gold[row]], minlength=bins)
        rows[row, bins:] = np.bincount(place[row][~gold[row]], minlength=bins)

    def formula(c: np.ndarray) -> np.ndarray:
        positive, negative = c[..., :bins], c[..., bins:]
        below = np.cumsum(negative, -1) - negative / 2
        return _ratio((positive * below).sum(-1), positive.sum(-1) * negative.sum(-1))

    counts = by_patient(patients, rows)
    return patient_bootstrap(counts, formula, n_notes=n_notes, part=part, seed=seed, n_resamples=500)


def _auc_macro(
    scores: np.ndarray, gold: np.ndarray, patients: Sequence[str], *, n_notes: int, part: str, seed: int
) -> Estimate:
    ids, owner = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    columns = np.flatnonzero(gold.any(0) & ~gold.all(0))
    each = np.array([auc(scores[:, column], gold[:, column]) for column in columns])
    value = float(each.mean()) if len(each) else math.nan

    def without(note: str) -> Estimate:
        return Estimate(value, math.nan, math.nan, len(ids), n_notes, part, note)

    if not len(each):
        return without("undefined: no label that some documents have and some have not")
    if len(ids) < FEWEST_PATIENTS:
        return without(f"fewer than {FEWEST_PATIENTS} patients")
    n_resamples = 300
    if gold[:, columns].sum() * len(gold) > _MOST_CELLS:
        return without("no interval: too large to resample")
    draws = np.random.default_rng(seed).multinomial(len(ids), np.full(len(ids), 1 / len(ids)), n_resamples)
    weights = draws[:, owner].astype(np.float64)
    total, defined = np.zeros(n_resamples), np.zeros(n_resamples)
    for column in columns:
        have = np.flatnonzero(gold[:, column])
        lack = np.flatnonzero(~gold[:, column])
        mine, other = scores[have, column], scores[lack, column]
        wins = (mine[:, None] > other) + 0.5 * (mine[:, None] == other)
        part_of = (weights[:, have] * (weights[:, lack] @ wins.T)).sum(1)
        whole = weights[:, have].sum(1) * weights[:, lack].sum(1)
        total += np.where(whole > 0, part_of / np.maximum(whole, 1e-300), 0.0)
        defined += whole > 0
    bounds, note = percentile_interval(_centred(total / np.maximum(defined, 1), value), value, len(ids))
    return Estimate(value, *bounds, len(ids), n_notes, part, note)
