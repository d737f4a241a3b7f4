"""Find repeated text: exact copies by digest, near copies by MinHash, every near copy verified by exact Jaccard.

A text is compared with the texts that are kept, never with one that was already dropped, so that a chain of small
edits does not swallow notes that differ.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from clinical_nlp.errors import UsageError

_WORDS_PER_SHINGLE = 5
_PERMUTATIONS = 128
_BLOCK = 4096
_WORD = re.compile(r"\w+")
_MISSED = 1e-3


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A text that was dropped: its index, the index of the kept text it repeats, and how alike they are.

    `kind` is `exact` (same characters) or `near`; `similarity` is the Jaccard index of the sets of five-word
    sequences, so a near copy with similarity 1 differs in case, punctuation or spacing only.
    """

    index: int
    duplicate_of: int
    kind: str
    similarity: float


@dataclass(frozen=True, slots=True)
class Deduplication:
    """Which texts to keep (indices, ascending) and which were dropped; it holds no text."""

    keep: np.ndarray
    dropped: tuple[Duplicate, ...]
    threshold: float

    def describe(self) -> str:
        """Return one line with the counts."""
        exact = sum(duplicate.kind == "exact" for duplicate in self.dropped)
        return (
            f"{len(self.keep)} of {len(self.keep) + len(self.dropped)} texts kept; left out: {exact} exact copies, "
            f"{len(self.dropped) - exact} near copies (Jaccard of five-word sequences >= {self.threshold:g})"
        )

    def table(self, notes: pa.Table) -> pa.Table:
        """Return the dropped notes as ids: what was dropped, what it repeats, kind and similarity; no text.

        Parameters
        ----------
        notes : the table (`NOTE_SCHEMA`) whose `text` column was deduplicated.
        """
        keys = notes.select(["institution", "note_id"])
        left = keys.take(pa.array([duplicate.index for duplicate in self.dropped], pa.int64()))
        right = keys.take(pa.array([duplicate.duplicate_of for duplicate in self.dropped], pa.int64()))
        return pa.table(
            {
                "institution": left["institution"],
                "note_id": left["note_id"],
                "duplicate_of_institution": right["institution"],
                "duplicate_of_note_id": right["note_id"],
                "kind": pa.array([duplicate.kind for duplicate in self.dropped], pa.string()),
                "similarity": pa.array([duplicate.similarity for duplicate in self.dropped], pa.float64()),
            }
        )


def deduplicate(
    texts: Sequence[str] | pa.Array | pa.ChunkedArray,
    *,
    threshold: float = 0.9,
    order: Sequence[int] | np.ndarray | None = None,
) -> Deduplication:
    """Drop every text that repeats an earlier one.

    Parameters
    ----------
    texts : n texts; an Arrow column is read in place.
    threshold : in (0, 1]; Jaccard index of the sets of five-word sequences (case and punctuation ignored) from which
        two texts count as near copies. A text of fewer than five words is one sequence; a text without a word has
        only exact copies.
    order : the n indices in the order in which texts are considered; of two copies the earlier one is kept. Default:
        as given.

    Notes
    -----
    MinHash with 128 permutations (Broder 1997), banded so that a pair at the threshold is missed with probability
    below 0.001 (Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, section 3.4); candidates are then compared
    exactly, so nothing below the threshold is ever dropped. Memory is about 600 bytes a text beside the texts.
    Deterministic: no random state.

    Raises
    ------
    UsageError : the threshold is not in (0, 1].
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"deduplication threshold must be above 0 and at most 1 (got {threshold})")
    sequence = np.arange(len(texts)) if order is None else np.asarray(order, np.int64)
    dropped: list[Duplicate] = []
    first: dict[bytes, int] = {}
    distinct: list[int] = []
    for index in sequence.tolist():
        digest = hashlib.sha256(_text(texts, index).encode("utf-8", "surrogatepass")).digest()
        kept = first.setdefault(digest, index)
        if kept == index:
            distinct.append(index)
        else:
            dropped.append(Duplicate(index, kept, "exact", 1.0))
    near = _near(texts, distinct, threshold)
    # An exact copy of a text that is itself a near copy points to the text that is really kept.
    dropped = [
        Duplicate(item.index, near[item.duplicate_of].duplicate_of, "near", near[item.duplicate_of].similarity)
        if item.duplicate_of in near
        else item
        for item in dropped
    ]
    dropped = sorted([*dropped, *near.values()], key=lambda item: item.index)
    keep = np.array(sorted(index for index in distinct if index not in near), np.int64)
    return Deduplication(keep, tuple(dropped), threshold)


def _text(texts: Sequence[str] | pa.Array | pa.ChunkedArray, index: int) -> str:
    value = texts[index]
    return value if isinstance(value, str) else value.as_py()


def _near(
    texts: Sequence[str] | pa.Array | pa.ChunkedArray, distinct: list[int], threshold: float
) -> dict[int, Duplicate]:
    """Find near copies among texts that differ; positions below count within `distinct`, in the order considered."""
    with_words: list[int] = []
    signatures = np.empty((len(distinct), _PERMUTATIONS), np.uint32)
    for index in distinct:
        signature = _signature(_text(texts, index))
        if signature is not None:
            signatures[len(with_words)] = signature
            with_words.append(index)
    signatures = signatures[: len(with_words)]
    groups = _groups(signatures, _rows_per_band(threshold))

    found: dict[int, Duplicate] = {}
    kept_in_group: dict[tuple[int, int], list[int]] = {}
    margin = 4 * (threshold * (1 - threshold) / _PERMUTATIONS) ** 0.5
    for position, index in enumerate(with_words):
        mine = [(band, int(group)) for band, group in enumerate(groups[position]) if group >= 0]
        candidates = np.array(sorted({other for key in mine for other in kept_in_group.get(key, ())}), np.int64)
        if len(candidates):
            estimate = (signatures[candidates] == signatures[position]).mean(axis=1)
            candidates = candidates[estimate >= threshold - margin]
        best: tuple[float, int] | None = None
        if len(candidates):
            shingles = _shingles(_text(texts, index))
            for other in candidates.tolist():
                similarity = _jaccard(shingles, _shingles(_text(texts, with_words[other])))
                if similarity >= threshold and (best is None or similarity > best[0]):
                    best = (similarity, with_words[other])
        if best is not None:
            found[index] = Duplicate(index, best[1], "near", best[0])
        else:
            for key in mine:
                kept_in_group.setdefault(key, []).append(position)
    return found


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    if len(words) < _WORDS_PER_SHINGLE:
        return {tuple(words)}
    return set(zip(*(words[start:] for start in range(_WORDS_PER_SHINGLE)), strict=False))


def _jaccard(left: set[tuple[str, ...]], right: set[tuple[str, ...]]) -> float:
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)


def _odd_multipliers(count: int, first: int) -> np.ndarray:
    """Fixed odd 64-bit multipliers: outputs of splitmix64 (Steele, Lea & Flood 2014)."""
    state = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(first)) * np.uint64(0x9E3779B97F4A7C15)
    return _mix(state) | np.uint64(1)


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_PLACE = _odd_multipliers(_WORDS_PER_SHINGLE, 0)
_MULTIPLIER = _odd_multipliers(_PERMUTATIONS, 1000)
_INCREMENT = _odd_multipliers(_PERMUTATIONS, 2000)


def _signature(text: str) -> np.ndarray | None:
    """Return the (128,) uint32 MinHash of a text's shingles, None for a text without a word."""
    words = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in _WORD.findall(text.lower())]
    if not words:
        return None
    words += [0] * (_WORDS_PER_SHINGLE - len(words))
    hashes = np.array(words, np.uint64)
    count = len(hashes) - _WORDS_PER_SHINGLE + 1
    shingles = np.zeros(count, np.uint64)
    for place in range(_WORDS_PER_SHINGLE):
        shingles += hashes[place : place + count] * _PLACE[place]
    shingles = _mix(shingles)
    # The high half of a multiply-add is the hash; blocks keep a very long note from needing 1 KiB a word.
    lowest = np.full(_PERMUTATIONS, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, count, _BLOCK):
        block = shingles[start : start + _BLOCK, None] * _MULTIPLIER + _INCREMENT
        lowest = np.minimum(lowest, block.min(axis=0))
    return (lowest >> np.uint64(32)).astype(np.uint32)


def _rows_per_band(threshold: float) -> int:
    """Largest band that still finds a pair at the threshold (miss probability `(1 - t^r)^(128/r)` below 0.001)."""
    for rows in (32, 16, 8, 4, 2):
        if (1 - threshold**rows) ** (_PERMUTATIONS // rows) < _MISSED:
            return rows
    return 1


def _groups(signatures: np.ndarray, rows: int) -> np.ndarray:
    """Return (n, bands) group numbers: equal where two texts agree on a whole band, -1 where no other text does."""
    bands = _PERMUTATIONS // rows
    groups = np.full((len(signatures), bands), -1, np.int32)
    weights = _odd_multipliers(rows, 3000)
    for band in range(bands):
        part = signatures[:, band * rows : (band + 1) * rows].astype(np.uint64)
        keys = _mix(part * weights).sum(axis=1, dtype=np.uint64)
        _, group, size = np.unique(keys, return_inverse=True, return_counts=True)
        shared = size[group] > 1
        groups[shared, band] = group[shared]
    return groups
