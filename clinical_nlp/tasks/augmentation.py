"""Missing-section augmentation: a note with some of its sections left out, and its gold spans moved along."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from clinical_nlp.language.sections import find_sections

if TYPE_CHECKING:
    from clinical_nlp.tasks.ner import Span


def drop_sections(
    text: str, spans: Iterable[Span], *, probability: float, seed: int, epoch: int, note_id: str
) -> tuple[str, list[Span]]:
    """Leave out each section of a note with a probability, so that a model meets notes that lack it.

    The draw depends on nothing but (seed, epoch, note_id): a resumed run and every process of a parallel one see the
    same note. One section at least stays. Two sections that a span reaches across are dropped or kept as one.

    Parameters
    ----------
    text : the note.
    spans : half-open spans into it; those in a dropped section go with it.
    probability : for each section, from 0 (nothing is dropped) to 1 (all but one are).
    seed, epoch, note_id : what the draw depends on.

    Returns
    -------
    The text of the kept sections, in order, and the spans in them, moved to where their text now is.
    """
    spans = list(spans)
    blocks = _blocks(text, spans)
    rng = np.random.default_rng(_entropy(seed, epoch, note_id))
    dropped = rng.random(len(blocks)) < probability
    if len(blocks) < 2 or not dropped.any():
        return text, spans
    if dropped.all():
        dropped[rng.integers(len(blocks))] = False
    pieces: list[str] = []
    moved: list[Span] = []
    length = 0
    for (begin, end), gone in zip(blocks, dropped, strict=True):
        if gone:
            continue
        moved += [(a - begin + length, b - begin + length, label) for a, b, label in spans if begin <= a < b <= end]
        pieces.append(text[begin:end])
        length += end - begin
    return "".join(pieces), moved


def _blocks(text: str, spans: list[Span]) -> list[tuple[int, int]]:
    """Return what is dropped or kept as one: sections, joined where a span crosses or where one is only blank."""
    edges = [0]
    for section in find_sections(text)[1:]:
        edge = section.start
        if text[edges[-1] : edge].strip() and not any(start < edge < end for start, end, _ in spans):
            edges.append(edge)
    return list(itertools.pairwise([*edges, len(text)]))


def _entropy(seed: int, epoch: int, note_id: str) -> int:
    digest = hashlib.blake2b(repr((seed, epoch, note_id)).encode("utf-8", "surrogatepass"), digest_size=16)
    return int.from_bytes(digest.digest(), "big")
