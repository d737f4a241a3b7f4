"""Readers: from what hospitals export to notes, each record becoming exactly one of note, skipped or rejected."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from clinical_nlp.errors import InputError, MissingDataError, UsageError, nearest
from clinical_nlp.notes.readers.files import require_codec
from clinical_nlp.notes.readers.index import DiskIndex
from clinical_nlp.notes.readers.options import DEFAULT_OPTIONS, UNKNOWN_INSTITUTION, Reading, ReadOptions
from clinical_nlp.notes.readers.patient_map import PATIENT_MAP, PatientMap
from clinical_nlp.notes.schema import Note, Patient, Record, Rejected, Skipped
from clinical_nlp.progress import say

__all__ = ["FORMATS", "ReadOptions", "input_files", "read_notes", "read_patients"]

FORMATS: dict[str, str] = {
    name: f"clinical_nlp.notes.readers.{name}" for name in ("fhir", "omop", "mimic", "table", "brat", "iob", "text")
}
"""Format -> the module that reads it; each has `files(source)`, `read(reading)` and `patients(reading)`."""


_LANGUAGE = re.compile(r"[a-z]{2,3}(?:[-_][a-z0-9]{1,8})*|concept:\d+", re.IGNORECASE)
_NO_LEVELS = ("brat", "iob", "text")
"""Formats that know no institutions, where an unknown one is no news."""


def read_notes(source: Path, *, format: str, options: ReadOptions = DEFAULT_OPTIONS) -> Iterator[Record]:
    """Stream the notes of an export in a fixed order.

    Memory does not grow with the export: what must be remembered (ids seen, which document replaces which) is in an
    on-disk index below `options.scratch` that is removed when the iterator ends or is closed.

    Parameters
    ----------
    source : a file or a folder.
    format : one of `FORMATS`.
    options : see `ReadOptions`.

    Yields
    ------
    Note, Skipped (with the rule: `entered-in-error`, `replaced`, `same-text-same-encounter`, `empty-text`,
    `language:de`, ...) or Rejected (with file, line and reason). A second record with the same
    (institution, note_id) is rejected.

    Raises
    ------
    UsageError : the format or an option does not fit.
    MissingDataError : the source does not exist.
    InputError : the source holds no notes, or its only file cannot be read.
    """
    module, source = _reader(format), _existing(source)
    require_codec(options.encoding)
    for language in (*options.languages, options.default_language):
        if not _LANGUAGE.fullmatch(language.strip()):
            raise UsageError(
                f"language {language!r} is no language code; write it as en, or as the export does (en-GB)"
            )
    if options.columns and format != "table":
        raise UsageError(f"columns are mapped for the format table alone, not for {format}; leave --columns out")
    if options.attachments is not None and not options.attachments.is_dir():
        raise MissingDataError(f"attachments folder {options.attachments} does not exist")
    if format == "brat" and options.patient_map is None and (own := source / PATIENT_MAP).is_file():
        say(f"whose notes these are: {own}")
        options = replace(options, patient_map=own)
    return _read(module, source, format, options)


def read_patients(source: Path, *, format: str, options: ReadOptions = DEFAULT_OPTIONS) -> Iterator[Patient]:
    """Stream the demographics that an export holds: Patient NDJSON, PERSON and DEATH, patients.csv.

    A format without demographics yields nothing. A patient that occurs twice is yielded once, as first seen; rows
    that cannot be read are counted on standard error. See `read_notes` for the parameters and errors.
    """
    module, source = _reader(format), _existing(source)
    require_codec(options.encoding)
    return _read_patients(module, source, format, options)


def input_files(source: Path, format: str) -> list[Path]:
    """Return the files that reading `source` looks at, in order."""
    return list(_reader(format).files(_existing(source)))


def expected_records(source: Path, format: str) -> int | None:
    """Return how many records an export has where its files say so without being read: a table in Parquet, else None.

    It is for progress alone: notes in several rows make fewer records.
    """
    files = input_files(source, format)
    if format != "table" or not files or any(file.suffix != ".parquet" for file in files):
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return sum(pq.read_metadata(file).num_rows for file in files if file.stem != "patients")
    except (OSError, pa.ArrowException):
        return None  # the reader says what is wrong with it


def _reader(format: str) -> Any:
    if format not in FORMATS:
        raise UsageError(f"format {format!r} is not known{nearest(format, FORMATS)}")
    return importlib.import_module(FORMATS[format])


def _existing(source: Path) -> Path:
    source = Path(source)
    if not source.exists():
        raise MissingDataError(f"no such file or folder: {source}")
    return source


def _read(module: Any, source: Path, format: str, options: ReadOptions) -> Iterator[Record]:
    languages = {_primary(language) for language in options.languages}
    with DiskIndex(options.scratch) as index:
        reading = Reading(source, options, index)
        patient_map = PatientMap(options, index)
        count = 0
        for record in module.read(reading):
            count += 1
            record = _admit(record, reading, languages)
            if isinstance(record, Note) and record.institution == UNKNOWN_INSTITUTION and format not in _NO_LEVELS:
                reading.remarks["notes name no institution at the level asked for; theirs is 'unknown'"] += 1
            yield patient_map.apply(record) if options.patient_map else record
        if not count:
            raise InputError(f"{source} holds no notes in the format {format!r}; check the path and --format")
        _tell(source, format, reading)


def _admit(record: Record, reading: Reading, languages: set[str]) -> Record:
    """Hold a note against the rules that every format shares."""
    if not isinstance(record, Note):
        return record
    where = (record.source, record.note_id or None, record.patient_id or None)

    def rejected(reason: str) -> Rejected:
        return Rejected(where[0], reason, where[1], where[2])

    for name in ("note_id", "patient_id", "institution"):
        if not getattr(record, name).strip():
            return rejected(f"no {name}")
    if not _storable(record):
        return rejected("holds lone surrogates, which no Unicode text has; export it as UTF-8 again")
    language = _primary(record.language) or _primary(reading.options.default_language)
    if languages and language not in languages:
        return Skipped(record.source, f"language:{language}", record.note_id, record.patient_id)
    if not record.text.strip("\ufeff \t\r\n\f\v\0\u00a0"):
        return Skipped(record.source, "empty-text", record.note_id, record.patient_id)
    first = reading.index.add("note", record.institution, record.note_id, value=record.source)
    if first is not None:
        return rejected(f"duplicate note_id in its institution; first seen at {first}")
    return replace(record, language=language) if language != record.language else record


def _storable(note: Note) -> bool:
    try:
        for value in (note.text, note.note_id, note.patient_id, note.institution, note.title, note.note_type):
            (value or "").encode("utf-8")
        (note.encounter_id or "").encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _primary(language: str) -> str:
    return language.strip().replace("_", "-").split("-")[0].lower()


def _read_patients(module: Any, source: Path, format: str, options: ReadOptions) -> Iterator[Patient]:
    with DiskIndex(options.scratch) as index:
        reading = Reading(source, options, index)
        patient_map = PatientMap(options, index)
        for patient in module.patients(reading):
            patient = patient_map.apply(patient) if options.patient_map else patient
            if index.add("patient", patient.patient_id) is None:
                yield patient
        _tell(source, format, reading)


def _tell(source: Path, format: str, reading: Reading) -> None:
    for remark, count in sorted(reading.remarks.items()):
        say(f"{format} {source.name}: {count} {remark}")
