"""Notes of a corpus larger than memory: read once, in batches, divided by patient as they come.

What must be remembered (texts and patients seen) is on disk; in memory are one batch and the names of the patients who
are scored.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from clinical_nlp.config import SplitConfig
from clinical_nlp.errors import ConfigError
from clinical_nlp.notes.readers.index import DiskIndex
from clinical_nlp.notes.schema import Note, Record, Skipped
from clinical_nlp.notes.splitting import PARTS


class NoteStream:
    """Batches of (part, note) from the records of a reader; counts what it saw, for the caller to read afterwards.

    `new_patients` grows by (patient, part) as they are first seen; the caller empties it after each batch.

    A patient's part follows from a keyed hash of the id alone, so every batch agrees on it, in any order of notes:
    the hash of `split_patients`, with shares instead of counts. Of the development and test parts at most `limit`
    patients are kept, those with the lowest hash. Notes with the text of an earlier one are dropped, whichever part
    they are in; near copies are not looked for.

    Parameters
    ----------
    records : of a reader; Skipped and Rejected ones are counted.
    split : `official` or `random`, with its shares.
    seed : of the hash.
    limit : patients kept of each part that is not trained on.
    scratch : folder for on-disk indexes; a temporary one if None.

    Raises
    ------
    ConfigError : a split that needs all notes at once.
    """

    def __init__(
        self,
        records: Iterable[Record],
        split: SplitConfig,
        *,
        seed: int,
        limit: int,
        scratch: Path | None = None,
    ) -> None:
        if split.name not in ("official", "random"):
            raise ConfigError(f"split {split.name!r} needs all notes at once; with stream, leave split.name at random")
        if split.development + split.test >= 1 or split.test <= 0:
            raise ConfigError("split.development and split.test must leave patients to train on and to score")
        self.notes: Counter[str] = Counter()
        self.patients: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.duplicates = 0
        self.new_patients: list[tuple[str, str]] = []
        self._records, self._split, self._limit, self._scratch = records, split, limit, scratch
        self._seed = seed
        self._kept: dict[str, dict[str, int]] = {"development": {}, "test": {}}
        self._highest: dict[str, list[tuple[int, str]]] = {"development": [], "test": []}

    def batches(self, size: int = 1000) -> Iterator[list[tuple[str, Note]]]:
        """Yield the notes; what a part that is not trained on gave up later is told by `kept`."""
        batch: list[tuple[str, Note]] = []
        with DiskIndex(self._scratch) as seen:
            for record in self._records:
                if not isinstance(record, Note):
                    rule = record.rule if isinstance(record, Skipped) else record.reason
                    self.left_out[f"{'skipped' if isinstance(record, Skipped) else 'rejected'} ({rule})"] += 1
                    continue
                if seen.add("text", record.text_sha256) is not None:
                    self.duplicates += 1
                    continue
                part, rank = part_of_patient(record.patient_id, self._split, seed=self._seed)
                self.notes[part] += 1
                if seen.add("patient", record.patient_id) is None:
                    self.patients[part] += 1
                    self.new_patients.append((record.patient_id, part))
                if part == "train" or self._admit(part, record.patient_id, rank):
                    batch.append((part, record))
                if len(batch) == size:
                    yield batch
                    batch = []
        if batch:
            yield batch

    def kept(self, part: str) -> set[str]:
        """Return the patients of a part that is not trained on, whose notes count."""
        return set(self._kept[part])

    def describe(self) -> str:
        """Return one line: patients and notes a part, and what was left out."""
        sizes = "; ".join(
            f"{part} {self.patients[part]} patients, {self.notes[part]} notes" for part in PARTS if self.notes[part]
        )
        scored = len(self._kept["test"])
        bound = f"; {scored} of the test patients are scored" if scored < self.patients["test"] else ""
        return f"streamed, random split by patient: {sizes}{bound}; {self.duplicates} exact copies left out"

    def _admit(self, part: str, patient: str, rank: int) -> bool:
        """Keep the patients with the lowest hash; the highest of them gives way."""
        kept, highest = self._kept[part], self._highest[part]
        if patient in kept:
            return True
        if len(kept) == self._limit and rank >= -highest[0][0]:
            return False
        heapq.heappush(highest, (-rank, patient))
        kept[patient] = rank
        if len(kept) > self._limit:
            del kept[heapq.heappop(highest)[1]]
        return True


def part_of_patient(patient: str, split: SplitConfig, *, seed: int) -> tuple[str, int]:
    """Return the part of a patient, and the hash that decided it, from the id, the shares and the seed alone."""
    key = str(seed).encode()
    digest = hashlib.blake2b(patient.encode("utf-8", "surrogatepass"), key=key, digest_size=8).digest()
    rank = int.from_bytes(digest, "big")
    share = rank / 2**64
    if share < split.test:
        return "test", rank
    return ("development" if share < split.test + split.development else "train"), rank
