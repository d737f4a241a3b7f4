"""A finite map whose inner products are the kernel of `mmd_test`, the same at every institution that names its seed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from clinical_nlp.errors import UsageError
from clinical_nlp.statistics.permutation import PermutationPlan

WIDTHS = (0.5, 1.0, 2.0)
"""Widths of the three Gaussians of the kernel, in units of the width that is given."""

_CELLS_AT_ONCE = 8_000_000


@dataclass(frozen=True)
class RandomFeatures:
    """Random Fourier features of the mean of three Gaussian kernels.

    `transform(x) @ transform(y)` estimates the mean over s of exp(-|x - y|^2 / (2 (s width)^2)), s = 1/2, 1, 2, with
    a standard error of at most 1 / sqrt(n_features / 2), and is 1 for x = y. The map depends on its four arguments
    and on no data: institutions that agree on them compute comparable features without exchanging a note. `digest`
    is the proof that they did.

    Parameters
    ----------
    dimensions : of the vectors.
    width : the middle width s = 1; for pooled data the median distance, otherwise a number agreed on beforehand.
    n_features : even; half of them cosines, half sines of the same frequencies.
    seed : of the frequencies.

    References
    ----------
    Rahimi and Recht 2007, Random Features for Large-Scale Kernel Machines, NeurIPS 20.
    Sutherland and Schneider 2015, On the Error of Random Fourier Features, UAI (why pairs of sine and cosine).
    """

    dimensions: int
    width: float
    n_features: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dimensions < 1:
            raise UsageError(f"dimensions must be at least 1 (got {self.dimensions})")
        if not (math.isfinite(self.width) and self.width > 0):
            raise UsageError(f"width must be a positive number (got {self.width})")
        if self.n_features < 2 * len(WIDTHS) or self.n_features % 2:
            raise UsageError(f"n_features must be even and at least {2 * len(WIDTHS)} (got {self.n_features})")

    @cached_property
    def frequencies(self) -> np.ndarray:
        """(dimensions, n_features / 2) float32; the three widths take turns."""
        half = self.n_features // 2
        # The legacy generator: its stream is frozen, where that of default_rng may change with the numpy version.
        drawn = np.random.RandomState(self.seed).standard_normal((half, self.dimensions)).T
        return (drawn / (self.width * np.resize(WIDTHS, half))).astype(np.float32)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the map's arguments and its frequencies to three decimals (machines differ in the last bits)."""
        scaled = np.round(self.frequencies.astype(np.float64) * self.width * 1e3).astype("<i4")
        head = f"{self.dimensions} {self.width!r} {self.n_features} {self.seed}\n".encode()
        return hashlib.sha256(head + np.ascontiguousarray(scaled).tobytes()).hexdigest()

    def transform(self, vectors: np.ndarray) -> np.ndarray:
        """Map (n, dimensions) vectors to (n, n_features) float32."""
        vectors = np.asarray(vectors, dtype=np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dimensions:
            raise UsageError(f"vectors have shape {vectors.shape}; they need {self.dimensions} columns")
        half = self.n_features // 2
        found = np.empty((len(vectors), self.n_features), dtype=np.float32)
        phases = vectors @ self.frequencies
        np.cos(phases, out=found[:, :half])
        np.sin(phases, out=found[:, half:])
        found *= np.float32(1 / math.sqrt(half))
        return found


def patient_feature_means(
    features: RandomFeatures, vectors: np.ndarray, rows: np.ndarray | PermutationPlan
) -> np.ndarray:
    """Average the random features of each patient's notes, block by block.

    Inner products of two patients' means are the kernel averaged over the pairs of their notes.

    Parameters
    ----------
    features : the map.
    vectors : (n_notes, dimensions); a memory-mapped array does.
    rows : (n_notes,) int, each note's patient as 0 ... n_patients - 1, or the plan that knows it.

    Returns
    -------
    (n_patients, n_features) float32.
    """
    note_patient = rows.note_patient if isinstance(rows, PermutationPlan) else np.asarray(rows)
    means = np.empty((int(note_patient.max(initial=-1)) + 1, features.n_features), dtype=np.float32)
    for block, of_patients in patient_blocks(features, vectors, note_patient):
        means[block] = of_patients
    return means


def patient_blocks(
    features: RandomFeatures, vectors: np.ndarray, note_patient: np.ndarray
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (patients, their mean features) for one run of patients after the other; see `patient_feature_means`."""
    if vectors.ndim != 2 or len(vectors) != len(note_patient):
        raise UsageError(f"vectors have shape {vectors.shape}; they need one row for each of {len(note_patient)} notes")
    counts = np.bincount(note_patient)
    if len(counts) and counts.min() == 0:
        raise UsageError("rows must number the patients from 0 without a gap")
    order = np.argsort(note_patient, kind="stable")
    in_order = bool((np.diff(note_patient) >= 0).all())
    starts = np.concatenate([[0], np.cumsum(counts)])
    notes_at_once = max(1, _CELLS_AT_ONCE // features.n_features)
    patient = 0
    while patient < len(counts):
        stop = max(patient + 1, int(np.searchsorted(starts, starts[patient] + notes_at_once, side="right")) - 1)
        sums = np.zeros((stop - patient, features.n_features))
        # One patient may have more notes than fit at once.
        for begin in range(starts[patient], starts[stop], notes_at_once):
            end = min(begin + notes_at_once, starts[stop])
            block = vectors[begin:end] if in_order else vectors[order[begin:end]]
            if not np.isfinite(block).all():
                raise UsageError("vectors hold values that are not finite")
            first = int(np.searchsorted(starts, begin, side="right")) - 1
            last = int(np.searchsorted(starts, end, side="left"))
            cuts = np.maximum(starts[first:last], begin) - begin
            mapped = features.transform(block)
            sums[first - patient : last - patient] += np.add.reduceat(mapped, cuts, axis=0, dtype=np.float64)
        yield slice(patient, stop), (sums / counts[patient:stop, None]).astype(np.float32)
        patient = stop


def unbiased_mmd2(
    sums: tuple[np.ndarray, np.ndarray], squares: tuple[np.ndarray, np.ndarray], counts: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Unbiased squared maximum mean discrepancy from sums over patients, without pairs of a patient with themselves.

    Parameters
    ----------
    sums : (..., D), for each of two sides the sum of its patients' mean features.
    squares : (...), the sum of the squared norms of these means.
    counts : (...), the number of patients.

    Returns
    -------
    (...) values; may be negative. The same number added to all features of all patients changes nothing, and
    centring them beforehand saves digits.

    References
    ----------
    Gretton et al. 2012, A Kernel Two-Sample Test, JMLR 13, eq. 3.
    """
    within = [
        (np.einsum("...d,...d->...", total, total) - square) / (count * (count - 1.0))
        for total, square, count in zip(sums, squares, counts, strict=True)
    ]
    between = np.einsum("...d,...d->...", *sums) / (np.asarray(counts[0], dtype=np.float64) * counts[1])
    return np.asarray(within[0] + within[1] - 2 * between)
