"""A bounded sample of patients and notes from a stream, and on which side a patient of two institutions stands."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from clinical_nlp.errors import InputError
from clinical_nlp.notes.schema import Note

PatientInTwo = Literal["majority", "drop", "error"]


@dataclass(frozen=True, eq=False)
class SampledNotes:
    """Notes of patients who each stand in one institution; one entry a note, sorted by institution and patient.

    `notes_of_patient` counts all notes of the patient at the institution, sampled or not. `is_first` marks one random
    note a patient. `n_patients` and `n_notes` are what the stream held in each institution after assignment;
    `n_institutions` were named by the stream. `n_in_two` patients had notes in several institutions, and
    `n_notes_left_out` notes of theirs are not counted.
    """

    notes: tuple[Note, ...]
    patient_ids: tuple[str, ...]
    institutions: tuple[str, ...]
    notes_of_patient: np.ndarray
    is_first: np.ndarray
    n_patients: dict[str, int]
    n_notes: dict[str, int]
    n_institutions: int
    n_in_two: int
    n_notes_left_out: int

    def select(self, rows: np.ndarray) -> SampledNotes:
        """Return the notes of some rows; the counts stay those of the whole."""
        return replace(
            self,
            notes=tuple(self.notes[i] for i in rows),
            patient_ids=tuple(self.patient_ids[i] for i in rows),
            institutions=tuple(self.institutions[i] for i in rows),
            notes_of_patient=self.notes_of_patient[rows],
            is_first=self.is_first[rows],
        )


class NoteSampler:
    """Keeps at most so many patients an institution and notes a patient, chosen by a seeded hash of their ids.

    The choice depends on neither the order of the stream nor on what the notes say.

    Parameters
    ----------
    max_patients : kept in each institution.
    max_notes_per_patient : kept of each patient.
    seed : of the hash.
    """

    def __init__(self, *, max_patients: int = 1000, max_notes_per_patient: int = 10, seed: int = 0) -> None:
        self._max_patients, self._max_notes, self._seed = max_patients, max_notes_per_patient, seed
        self._counts: dict[str, Counter[str]] = {}
        self._kept: dict[str, dict[str, list[tuple[int, str, Note]]]] = {}
        self._ranks: dict[str, list[tuple[int, str]]] = {}

    def _rank(self, *parts: str) -> int:
        key = "\0".join((str(self._seed), *parts)).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")

    def add(self, note: Note, *, patient: str | None = None) -> None:
        """Count a note and keep it if it is of the sample; `patient` stands in for the note's own id."""
        patient, institution = note.patient_id if patient is None else patient, note.institution
        self._counts.setdefault(patient, Counter())[institution] += 1
        patients = self._kept.setdefault(institution, {})
        if patient not in patients and not self._admit(patient, institution, patients):
            return
        heap = patients[patient]
        entry = (-self._rank("note", institution, note.note_id), note.note_id, note)
        if len(heap) < self._max_notes:
            heapq.heappush(heap, entry)
        elif entry[:2] > heap[0][:2]:
            heapq.heapreplace(heap, entry)

    def _admit(self, patient: str, institution: str, patients: dict[str, list[tuple[int, str, Note]]]) -> bool:
        ranks = self._ranks.setdefault(institution, [])
        entry = (-self._rank("patient", patient), patient)
        if len(ranks) >= self._max_patients:
            if entry <= ranks[0]:
                return False
            del patients[heapq.heapreplace(ranks, entry)[1]]
        else:
            heapq.heappush(ranks, entry)
        patients[patient] = []
        return True

    def finish(self, patient_in_two: PatientInTwo = "majority") -> SampledNotes:
        """Put every patient on one side.

        Parameters
        ----------
        patient_in_two : what becomes of a patient with notes in several institutions. majority: stands where most of
            their notes are (the first in sorted order among equals), notes elsewhere are left out. drop: is left out.

        Raises
        ------
        InputError : there is such a patient and `patient_in_two` is error, or nobody is left.
        """
        in_two = [patient for patient, counts in self._counts.items() if len(counts) > 1]
        if in_two and patient_in_two == "error":
            raise InputError(
                f"{len(in_two)} of {len(self._counts)} patients have notes in several institutions, and a patient can "
                "stand on one side only; use patient_in_two=majority to count each where most of their notes are, or "
                "patient_in_two=drop to leave them out"
            )
        side = {}
        for patient, counts in self._counts.items():
            if len(counts) == 1 or patient_in_two == "majority":
                side[patient] = min(counts, key=lambda name: (-counts[name], name))
        if not side:
            raise InputError(
                f"all {len(in_two)} patients have notes in several institutions and were left out; use "
                "patient_in_two=majority, or another level with institution_from"
            )
        n_patients: Counter[str] = Counter(side.values())
        n_notes: Counter[str] = Counter()
        for patient, institution in side.items():
            n_notes[institution] += self._counts[patient][institution]
        rows: list[tuple[str, str, Note, bool]] = []
        for institution in sorted(self._kept):
            for patient in sorted(self._kept[institution]):
                if side.get(patient) == institution:
                    heap = sorted(self._kept[institution][patient], key=lambda entry: entry[:2], reverse=True)
                    rows += [(institution, patient, note, i == 0) for i, (_, _, note) in enumerate(heap)]
        return SampledNotes(
            tuple(row[2] for row in rows),
            tuple(row[1] for row in rows),
            tuple(row[0] for row in rows),
            np.array([self._counts[row[1]][row[0]] for row in rows]),
            np.array([row[3] for row in rows], dtype=bool),
            dict(sorted(n_patients.items())),
            dict(sorted(n_notes.items())),
            len({name for counts in self._counts.values() for name in counts}),
            len(in_two),
            sum(sum(counts.values()) for counts in self._counts.values()) - sum(n_notes.values()),
        )
