"""Divide notes into train, development and test by whole patients."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clinical_nlp.config import SplitConfig
from clinical_nlp.errors import ConfigError, InputError, TooFewPatientsError, UsageError, nearest
from clinical_nlp.notes.deduplication import Deduplication, deduplicate
from clinical_nlp.notes.schema import utc

PARTS = ("train", "development", "test")


@dataclass(frozen=True, slots=True)
class Split:
    """Row indices (ascending) into the notes; no patient is in two of the parts.

    `test` holds the notes to report on. They are the corpus's development part, and `reported_part` says so, where a
    corpus has official parts but no test part; `development` is then a share of the training patients.
    `patients` counts the patients of train, development and test; `remarks` says what a reader of a score must know.
    """

    train: np.ndarray
    development: np.ndarray
    test: np.ndarray
    name: str
    reported_part: str
    patients: tuple[int, int, int]
    remarks: tuple[str, ...] = ()

    @property
    def official(self) -> bool:
        """True where the reported part is one of the corpus's own."""
        return self.name == "official"

    @property
    def part(self) -> str:
        """The part that a score is on, as `runs.Estimate.part` names it."""
        return self.reported_part

    def describe(self) -> str:
        """Return one line: kind of split, patients and notes a part, remarks."""
        sizes = "; ".join(
            f"{part} {patients} patients, {len(rows)} notes"
            for part, patients, rows in zip(
                ("train", "development", "reported"),
                self.patients,
                (self.train, self.development, self.test),
                strict=True,
            )
        )
        remarks = "".join(f"; {remark}" for remark in self.remarks)
        return f"{self.name} split by patient: {sizes}; scores are on the {self.reported_part} part{remarks}"


def split_patients(
    notes: pa.Table,
    config: SplitConfig,
    *,
    seed: int,
    parts: Mapping[tuple[str, str], str] | None = None,
) -> Split:
    """Divide notes by patient.

    Parameters
    ----------
    notes : table of `NOTE_SCHEMA`, n rows.
    config : which split.
        official: the corpus's own parts; without any, as random. A missing development part is a share of the
        training patients. A missing test part makes the development part the reported one.
        random: patients are ranked by a hash of seed and id, so neither row order nor the number of notes matters.
        institution: patients with any note from `test_institutions` are the test part, with all their notes; those
        seen at other institutions as well are counted in the remarks.
        time: patients whose first note is on or after `after` are the test part. Patients with notes on both sides
        stay in train, with all their notes; they, and patients without a date, are counted in the remarks.
    seed : of the ranking; also decides which training patients are the development part.
    parts : (institution, note_id) -> train, development or test, where the corpus has official parts.

    Raises
    ------
    TooFewPatientsError : a part that was asked for would be empty.
    ConfigError, UsageError : the config does not fit (no such institution, no date, shares of 1 or more).
    InputError : official parts that are incomplete or divide a patient.
    """
    parts = parts or {}
    if config.development + config.test >= 1:
        raise ConfigError(
            f"split.development and split.test must leave patients to train on "
            f"(got {config.development:g} and {config.test:g})"
        )
    if not len(notes):
        raise TooFewPatientsError("there are no notes to split")
    ids, patient_of = _patients(notes)
    remarks: list[str] = []
    name: str = config.name
    reported = "test"
    if name == "official" and set(parts.values()) <= {"train"}:
        name = "random"
        remarks.append("the corpus has no official parts here, so patients were divided at random")

    # One number a patient: 0 train, 1 development, 2 reported.
    if name == "official":
        assigned, reported, has_development = _official(notes, parts, ids, patient_of)
        wanted = 0.0 if has_development else config.development
    elif name == "random":
        assigned = np.zeros(len(ids), np.int64)
        _draw(assigned, ids, seed, config.test, 2)
        wanted = config.development * len(ids) / max(1, int((assigned == 0).sum()))
    elif name == "institution":
        assigned = _institution(notes, config, ids, patient_of, remarks)
        wanted = config.development
    else:
        assigned = _time(notes, config, ids, patient_of, remarks)
        wanted = config.development
    _draw(assigned, ids, seed, wanted, 1)

    part_of_note = assigned[patient_of]
    counts = [int((assigned == part).sum()) for part in range(3)]
    return Split(
        train=np.flatnonzero(part_of_note == 0),
        development=np.flatnonzero(part_of_note == 1),
        test=np.flatnonzero(part_of_note == 2),
        name=name,
        reported_part=reported,
        patients=(counts[0], counts[1], counts[2]),
        remarks=tuple(remarks),
    )


def split_without_duplicates(
    notes: pa.Table,
    config: SplitConfig,
    *,
    seed: int,
    parts: Mapping[tuple[str, str], str] | None = None,
    threshold: float = 0.9,
) -> tuple[Split, Deduplication]:
    """Split, then remove repeated text, so that no text is in two parts.

    Patients are divided before any note is dropped: two corpora with the same patients are divided alike, whatever
    their texts. Of several copies the one in the test part is kept, then development, then train; within a part the
    first by (institution, note_id), whatever the row order. Indices of both results count rows of `notes`; dropped
    rows are in no part. Parameters and errors as `split_patients` and `deduplicate`.
    """
    split = split_patients(notes, config, seed=seed, parts=parts)
    keys = list(zip(notes["institution"].to_pylist(), notes["note_id"].to_pylist(), strict=True))
    rank = np.full(len(keys), 2, np.int64)
    rank[split.development], rank[split.test] = 1, 0
    order = sorted(range(len(keys)), key=lambda row: (rank[row], keys[row]))
    found = deduplicate(notes["text"], threshold=threshold, order=order)
    _, patient_of = _patients(notes)
    parts_left = [np.intersect1d(rows, found.keep) for rows in (split.train, split.development, split.test)]
    counts = [len(np.unique(patient_of[rows])) for rows in parts_left]
    train, development, test = parts_left
    if not len(train) or not len(test):
        raise TooFewPatientsError("after removing repeated texts a part of the split is empty")
    return replace(
        split,
        train=train,
        development=development,
        test=test,
        patients=(counts[0], counts[1], counts[2]),
        remarks=(*split.remarks, found.describe()),
    ), found


def _patients(notes: pa.Table) -> tuple[list[str], np.ndarray]:
    """Return the distinct patients, sorted, and for each note the position of its patient."""
    unique = pc.unique(notes["patient_id"])
    unique = unique.take(pc.sort_indices(unique))
    return unique.to_pylist(), pc.index_in(notes["patient_id"], value_set=unique).to_numpy().astype(np.int64)


def _draw(assigned: np.ndarray, ids: list[str], seed: int, share: float, part: int) -> None:
    """Move `share` of the patients still in train (at least one) to `part`: those with the lowest keyed hash."""
    if share <= 0:
        if not (assigned == 0).any():
            raise TooFewPatientsError("the split leaves no patient to train on")
        return
    free = np.flatnonzero(assigned == 0).tolist()
    count = max(1, round(share * len(free)))
    if count >= len(free):
        raise TooFewPatientsError(
            f"{len(free)} patients cannot be divided into train and {PARTS[part]}; give more patients, "
            f"or a smaller split.{PARTS[part]} (0 for none)"
        )
    key = str(seed).encode()

    def rank(patient: int) -> tuple[bytes, str]:
        digest = hashlib.blake2b(ids[patient].encode("utf-8", "surrogatepass"), key=key, digest_size=8).digest()
        return digest, ids[patient]

    assigned[sorted(free, key=rank)[:count]] = part


def _official(
    notes: pa.Table, parts: Mapping[tuple[str, str], str], ids: list[str], patient_of: np.ndarray
) -> tuple[np.ndarray, str, bool]:
    keys = zip(notes["institution"].to_pylist(), notes["note_id"].to_pylist(), strict=True)
    named = [parts.get(key) for key in keys]
    if unknown := sorted({str(part) for part in named if part not in PARTS}):
        missing = sum(part is None for part in named)
        if missing:
            raise InputError(f"{missing} of {len(named)} notes have no official part; use split=random")
        raise InputError(f"official parts must be {', '.join(PARTS)} (got {', '.join(unknown)})")
    number = np.array([PARTS.index(part) for part in named if part is not None], np.int64)
    lowest = np.full(len(ids), len(PARTS), np.int64)
    highest = np.full(len(ids), -1, np.int64)
    np.minimum.at(lowest, patient_of, number)
    np.maximum.at(highest, patient_of, number)
    if divided := int((lowest != highest).sum()):
        raise InputError(f"the official parts divide {divided} patients; use split=random")
    here = {PARTS[part] for part in set(number.tolist())}
    if "train" not in here:
        raise UsageError(
            f"of the official parts only {' and '.join(sorted(here))} is here; add the training files, "
            "or use split=random"
        )
    if "test" in here:
        return lowest, "test", "development" in here
    lowest[lowest == 1] = 2
    return lowest, "development", False


def _institution(
    notes: pa.Table, config: SplitConfig, ids: list[str], patient_of: np.ndarray, remarks: list[str]
) -> np.ndarray:
    known = sorted(set(pc.unique(notes["institution"]).to_pylist()))
    if not config.test_institutions:
        raise ConfigError(f"split=institution needs split.test_institutions; known: {', '.join(known)}")
    for name in config.test_institutions:
        if name not in known:
            raise ConfigError(f"split.test_institutions: {name!r} has no notes{nearest(name, known)}")
    held_out = pc.is_in(notes["institution"], value_set=pa.array(config.test_institutions, pa.string())).to_numpy()
    at_held_out = np.zeros(len(ids), bool)
    elsewhere = np.zeros(len(ids), bool)
    at_held_out[patient_of[held_out]] = True
    elsewhere[patient_of[~held_out]] = True
    if both := int((at_held_out & elsewhere).sum()):
        remarks.append(f"{both} patients with notes at held-out and other institutions are wholly in the test part")
    if at_held_out.all():
        raise TooFewPatientsError("every patient has notes at a held-out institution, so none is left to train on")
    return np.where(at_held_out, 2, 0)


def _time(
    notes: pa.Table, config: SplitConfig, ids: list[str], patient_of: np.ndarray, remarks: list[str]
) -> np.ndarray:
    if config.after is None:
        raise ConfigError("split=time needs split.after, an ISO date such as 2019-01-01")
    try:
        cut = int(utc(datetime.fromisoformat(config.after)).timestamp() * 1_000_000)
    except ValueError:
        raise ConfigError(f"split.after must be an ISO date such as 2019-01-01 (got {config.after!r})") from None
    written = notes["written_at"].cast(pa.int64())
    dated = pc.is_valid(written).to_numpy()
    when = pc.fill_null(written, 0).to_numpy()[dated]
    first = np.full(len(ids), np.iinfo(np.int64).max, np.int64)
    last = np.full(len(ids), np.iinfo(np.int64).min, np.int64)
    np.minimum.at(first, patient_of[dated], when)
    np.maximum.at(last, patient_of[dated], when)
    undated = first > last
    after = ~undated & (first >= cut)
    straddling = int((~undated & (first < cut) & (last >= cut)).sum())
    if undated.all():
        raise InputError("split=time needs dates, and no note has one")
    if not after.any() or after.all():
        begin, end = (np.datetime64(int(value), "us").astype("datetime64[D]") for value in (when.min(), when.max()))
        raise TooFewPatientsError(
            f"split.after={config.after} puts {'every' if after.all() else 'no'} patient in the test part; "
            f"the notes run from {begin} to {end}"
        )
    if straddling:
        remarks.append(f"{straddling} patients with notes before and after {config.after} stay in train")
    if undated.any():
        remarks.append(f"{int(undated.sum())} patients without a dated note stay in train")
    return np.where(after, 2, 0)
