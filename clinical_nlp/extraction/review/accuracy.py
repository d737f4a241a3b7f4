"""What readers' corrections say: how far readers agree, and how right the extraction is, weighted by design."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clinical_nlp.extraction.review.sampling import Stratum
from clinical_nlp.runs import Estimate
from clinical_nlp.statistics.intervals import FEWEST_PATIENTS, by_patient, patient_bootstrap, percentile_interval

ALL = "all"
"""In place of a concept or an institution: all of them together."""

_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class ReadNote:
    """A sampled note that was read.

    `patient` names the patient in the sample; `flagged` is the kind that the note was drawn from, `of_kind` how many
    notes of that kind the patient has. `found` are the concepts that the extraction affirms in it, `true` those that
    readers do, each with the share of readers who do.
    """

    patient: str
    institution: str
    stratum: str
    flagged: bool
    of_kind: int
    found: frozenset[str]
    true: Mapping[str, float] = field(default_factory=dict)


def design_weights(notes: Sequence[ReadNote], strata: Mapping[str, Stratum]) -> np.ndarray:
    """Return how many notes of all each note that was read stands for.

    The weight is the inverse of the probability of being drawn: patients of the stratum with notes of that kind over
    those of whom any was read, times the patient's notes of that kind over those that were read. What was drawn and
    not read is made up for by what was, within stratum and kind.
    """
    read: dict[tuple[str, bool], dict[str, int]] = {}
    for note in notes:
        patients = read.setdefault((note.stratum, note.flagged), {})
        patients[note.patient] = patients.get(note.patient, 0) + 1
    weights = []
    for note in notes:
        patients = read[note.stratum, note.flagged]
        stratum = strata[note.stratum]
        total = stratum.with_flagged if note.flagged else stratum.with_unflagged
        weights.append(total / len(patients) * note.of_kind / patients[note.patient])
    return np.array(weights)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A figure of one concept at one institution; `measure` is ppv or sensitivity."""

    measure: str
    concept: str
    institution: str
    estimate: Estimate


def weighted_accuracy(
    notes: Sequence[ReadNote], strata: Iterable[Stratum], concepts: Sequence[str], *, seed: int = 0
) -> list[Accuracy]:
    """Estimate positive predictive value and sensitivity over all notes, by concept and institution.

    With weights w, f = 1 where the extraction affirms a concept in a note, and t the share of readers who do,
    ppv = sum(w f t) / sum(w f) and sensitivity = sum(w f t) / sum(w t). `all` sums over concepts or institutions.

    Parameters
    ----------
    notes : that were read.
    strata : of the sample.
    concepts : that were reviewed.
    seed : of the resampling.

    Returns
    -------
    Figures in the order of concepts, institutions and measures, `all` first. `n_patients` and `n_notes` are those that
    the denominator comes from. Intervals resample patients within strata (rescaled bootstrap, n - 1 of n drawn), and
    are exact binomial ones at the effective number of patients where there are fewer than 20 or no spread.

    References
    ----------
    Rao, Wu & Yue 1992, Some recent work on resampling methods for complex surveys, Survey Methodology 18.
    Korn & Graubard 1998, Confidence intervals for proportions with small expected number of positive counts estimated
    from survey data, Survey Methodology 24.
    """
    by_name = {stratum.name: stratum for stratum in strata}
    weights = design_weights(notes, by_name)
    patients = sorted({note.patient for note in notes})
    row_of = {patient: row for row, patient in enumerate(patients)}
    draws = _draws(notes, row_of, np.random.default_rng(seed))
    institutions = sorted({note.institution for note in notes})
    rows = np.array([row_of[note.patient] for note in notes], dtype=np.int64)
    results = []
    for concept in (ALL, *concepts):
        counted = concepts if concept == ALL else (concept,)
        found = np.array([[float(name in note.found) for name in counted] for note in notes])
        true = np.array([[note.true.get(name, 0.0) for name in counted] for note in notes])
        parts = np.stack([(found * true).sum(axis=1), found.sum(axis=1), true.sum(axis=1)], axis=1)
        for institution in (ALL, *institutions):
            here = np.array([institution in (ALL, note.institution) for note in notes])
            for measure, column in (("ppv", 1), ("sensitivity", 2)):
                counts = np.zeros((len(patients), 2))
                np.add.at(counts, rows, (parts[:, [0, column]] * weights[:, None]) * here[:, None])
                n_notes = int(((parts[:, column] > 0) & here).sum())
                estimate = _ratio(counts, draws, n_notes)
                results.append(Accuracy(measure, concept, institution, estimate))
    return results


def _draws(notes: Sequence[ReadNote], row_of: Mapping[str, int], generator: np.random.Generator) -> np.ndarray:
    """Return (resamples, patients) factors of the rescaled bootstrap.

    No correction is made for strata that were read as a whole: the figures are wanted for patients like these.
    """
    members: dict[str, set[int]] = {}
    for note in notes:
        members.setdefault(note.stratum, set()).add(row_of[note.patient])
    factors = np.ones((_RESAMPLES, len(row_of)))
    for _, within in sorted(members.items()):
        size = len(within)
        if size > 1:  # the spread of a stratum cannot be told from one patient
            drawn = generator.multinomial(size - 1, np.full(size, 1 / size), size=_RESAMPLES)
            factors[:, sorted(within)] = drawn * size / (size - 1)
    return factors


def _ratio(counts: np.ndarray, draws: np.ndarray, n_notes: int) -> Estimate:
    """Estimate the ratio of two weighted sums, given (patients, 2) counts."""
    informative = int((counts[:, 1] > 0).sum())
    top, bottom = counts.sum(axis=0)
    if bottom == 0:
        return Estimate(math.nan, math.nan, math.nan, informative, n_notes, "review", "undefined: nothing to count")
    value = float(top / bottom)
    resampled = draws @ counts
    with np.errstate(all="ignore"):
        ratios = resampled[:, 0] / resampled[:, 1]
    (low, high), note = percentile_interval(ratios, value, max(informative, 2))
    if informative < FEWEST_PATIENTS or math.isnan(low):
        effective = float(bottom**2 / (counts[:, 1] ** 2).sum())
        low, high = _clopper_pearson(value, effective)
        note = f"exact binomial at {effective:.1f} effective patients"
    return Estimate(value, low, high, informative, n_notes, "review", note)


def _clopper_pearson(share: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    from scipy.stats import beta

    tail, hits = (1 - confidence) / 2, share * n
    low = 0.0 if share <= 0 else float(beta.ppf(tail, hits, n - hits + 1))
    high = 1.0 if share >= 1 else float(beta.ppf(1 - tail, hits + 1, n - hits))
    return low, high


def cohen_kappa(counts: np.ndarray) -> np.ndarray:
    """Return Cohen's kappa of counts (..., 4): both yes, only the first, only the second, neither.

    References
    ----------
    Cohen 1960, A coefficient of agreement for nominal scales, Educational and Psychological Measurement 20.
    """
    total = counts.sum(axis=-1)
    observed = (counts[..., 0] + counts[..., 3]) / total
    first = (counts[..., 0] + counts[..., 1]) / total
    second = (counts[..., 0] + counts[..., 2]) / total
    expected = first * second + (1 - first) * (1 - second)
    return np.asarray((observed - expected) / (1 - expected))


def f1(counts: np.ndarray) -> np.ndarray:
    """Return the F1 of counts (..., 3): marked by both, by the first, by the second."""
    return np.asarray(2 * counts[..., 0] / (counts[..., 1] + counts[..., 2]))


@dataclass(frozen=True, slots=True)
class Reading:
    """What one reader says of one note: spans as (start, end, concept, presence) and the concepts that are affirmed."""

    patient: str
    spans: frozenset[tuple[int, int, str, str]]
    affirmed: frozenset[str]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two readers agree; `measure` is kappa, span_f1_exact, span_f1_overlap or presence."""

    readers: tuple[str, str]
    measure: str
    concept: str
    estimate: Estimate


def agreement(
    first: tuple[str, Mapping[str, Reading]],
    second: tuple[str, Mapping[str, Reading]],
    concepts: Sequence[str],
    *,
    seed: int = 0,
) -> list[Agreement]:
    """Compare two readers on the notes that both have read.

    Parameters
    ----------
    first, second : name of the reader, and note -> what they say.
    concepts : that were reviewed.
    seed : of the resampling.

    Returns
    -------
    kappa, over pairs of note and concept (affirmed or not) for all concepts and for each; F1 of the spans of equal
    concept, with equal offsets (exact) or one to one with overlapping ones; and the share of the overlapping pairs
    with equal presence. Intervals resample patients and say nothing about other readers.
    """
    notes = sorted(set(first[1]) & set(second[1]))
    pairs = [(first[1][note], second[1][note]) for note in notes]
    patients = [left.patient for left, _ in pairs]
    names = (first[0], second[0])

    def estimated(
        measure: str, concept: str, counts: list[Any], statistic: Callable[[np.ndarray], np.ndarray]
    ) -> Agreement:
        summed = by_patient(patients, np.array(counts, dtype=np.float64).reshape(len(pairs), -1))
        estimate = patient_bootstrap(summed, statistic, n_notes=len(pairs), part="review", seed=seed)
        return Agreement(names, measure, concept, estimate)

    if not pairs:
        return []
    results = []
    for concept in (ALL, *concepts):
        counted = concepts if concept == ALL else (concept,)
        results.append(estimated("kappa", concept, [_cells(*pair, counted) for pair in pairs], cohen_kappa))
    exact = [[len(_marks(a) & _marks(b)), len(_marks(a)), len(_marks(b))] for a, b in pairs]
    matched = [_overlapping(a.spans, b.spans) for a, b in pairs]
    overlap = [[len(found), len(a.spans), len(b.spans)] for found, (a, b) in zip(matched, pairs, strict=True)]
    same = [[sum(x[3] == y[3] for x, y in found), len(found)] for found in matched]
    results.append(estimated("span_f1_exact", ALL, exact, f1))
    results.append(estimated("span_f1_overlap", ALL, overlap, f1))
    results.append(estimated("presence", ALL, same, lambda counts: counts[..., 0] / counts[..., 1]))
    return results


def _marks(reading: Reading) -> set[tuple[int, int, str]]:
    return {span[:3] for span in reading.spans}


def _cells(left: Reading, right: Reading, concepts: Sequence[str]) -> list[int]:
    cells = [0, 0, 0, 0]
    for concept in concepts:
        a, b = concept in left.affirmed, concept in right.affirmed
        cells[0 if a and b else 1 if a else 2 if b else 3] += 1
    return cells


_Span = tuple[int, int, str, str]


def _overlapping(left: Iterable[_Span], right: Iterable[_Span]) -> list[tuple[_Span, _Span]]:
    """Pair spans of equal concept, each at most once: those with equal offsets first, then those that overlap."""
    waiting, free = sorted(left), sorted(right)
    pairs: list[tuple[_Span, _Span]] = []

    def fits(a: _Span, b: _Span, exact: bool) -> bool:
        return a[2] == b[2] and (a[:2] == b[:2] if exact else a[0] < b[1] and b[0] < a[1])

    for exact in (True, False):
        for a in list(waiting):
            b = next((b for b in free if fits(a, b, exact)), None)
            if b is not None:
                waiting.remove(a)
                free.remove(b)
                pairs.append((a, b))
    return pairs
