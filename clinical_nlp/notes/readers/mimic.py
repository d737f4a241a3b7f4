"""MIMIC-IV-Note (discharge, radiology) and MIMIC-III (NOTEEVENTS), CSV or CSV.gz as PhysioNet ships them.

Dates in MIMIC are shifted by a random amount per patient. Where MIMIC-IV's patients.csv(.gz) lies below the source,
`written_at` is moved back so that the patient's anchor_year becomes the first year of the anchor_year_group: right to
three years between patients, exact within a patient. A split by time means something then. Without the table the
shifted time stands, and this is told. MIMIC-III has no such groups.

Every note is from one hospital, so institution is "BIDMC" unless `institution` or `institution_from` (a column) says
otherwise. ISERROR = 1 is skipped as `entered-in-error`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

from clinical_nlp.errors import UsageError
from clinical_nlp.notes.readers.dates import note_time, parse_date
from clinical_nlp.notes.readers.demographics import sex_of
from clinical_nlp.notes.readers.files import UnreadableError, walk
from clinical_nlp.notes.readers.options import Reading
from clinical_nlp.notes.readers.over_files import over_files
from clinical_nlp.notes.readers.rows import (
    SUFFIXES,
    Row,
    body_value,
    columns,
    near_column,
    rows,
    suffix,
    table_name,
    text_value,
)
from clinical_nlp.notes.schema import Note, Patient, Record, Rejected, Skipped

INSTITUTION = "BIDMC"
_NOTES = ("discharge", "radiology", "noteevents")
_TYPES = {
    "DS": "Discharge summary",
    "AD": "Discharge summary addendum",
    "RR": "Radiology report",
    "AR": "Radiology report addendum",
}


def files(source: Path) -> list[Path]:
    """Return the tables of notes, and of patients."""
    return [*_tables(source, *_NOTES), *_tables(source, "patients")]


def _tables(source: Path, *names: str) -> list[Path]:
    if source.is_file():
        return [source] if names == _NOTES else []
    return [path for path in walk(source) if table_name(path) in names and suffix(path) in SUFFIXES]


def read(reading: Reading) -> Iterator[Record]:
    """Yield one record a row of the note tables."""
    paths = _tables(reading.source, *_NOTES)
    for path in paths:
        _check_columns(path, reading)
    _index_shifts(reading)

    def records(path: Path, name: str) -> Iterator[Record]:
        for row in rows(path, name, reading.options.encoding):
            yield row if isinstance(row, Rejected) else _note(row, reading)

    yield from over_files(paths, reading, records)


def patients(reading: Reading) -> Iterator[Patient]:
    """Yield the rows of patients: MIMIC-IV has the sex and the (moved) day of death, MIMIC-III also a shifted DOB."""
    _index_shifts(reading)
    for path in _tables(reading.source, "patients"):
        for row in rows(path, reading.name(path), reading.options.encoding):
            patient_id = text_value(row.get("subject_id")) if isinstance(row, Row) else None
            if isinstance(row, Rejected) or patient_id is None:
                reading.remarks["rows of patients could not be read, or have no subject_id"] += 1
                continue
            died = parse_date(row.get("dod"))
            yield Patient(
                patient_id,
                sex=sex_of(text_value(row.get("gender"))),
                birth_date=parse_date(row.get("dob")),
                death_date=_moved(died, patient_id, reading) if died else None,
            )


def _check_columns(path: Path, reading: Reading) -> None:
    name, level = reading.name(path), reading.options.institution_from
    try:
        present = columns(path, name, reading.options.encoding)
    except UnreadableError:
        return  # told when its rows are read
    known = {column.lower() for column in present}
    missing = [column for column in ("subject_id", "text") if column not in known]
    if not known & {"note_id", "row_id"}:
        missing.append("note_id")
    if present and missing:
        told = "; no column ".join(f"{column!r}{near_column(column, present)}" for column in missing)
        raise UsageError(f"table {name} has no column {told}; is it a note table of MIMIC?")
    if present and level is not None and level.lower() not in known:
        raise UsageError(f"institution_from {level!r} is not a column of {name}{near_column(level, present)}")


def _index_shifts(reading: Reading) -> None:
    """Remember by how many days each patient's dates are moved back."""
    for path in _tables(reading.source, "patients"):
        for row in rows(path, reading.name(path), reading.options.encoding):
            if isinstance(row, Rejected):
                continue  # told when demographics are read
            patient_id, anchor = text_value(row.get("subject_id")), text_value(row.get("anchor_year"))
            group = re.match(r"\s*(\d{4})", text_value(row.get("anchor_year_group")) or "", re.ASCII)
            if patient_id and group and anchor and re.fullmatch(r"\d{4}", anchor, re.ASCII):
                days = round(365.2425 * (int(group[1]) - int(anchor)))
                reading.index.add("shift", patient_id, value=str(days))


def _moved(value: Any, patient_id: str, reading: Reading) -> Any:
    days = reading.index.get("shift", patient_id)
    if not isinstance(value, (date, datetime)) or days is None:
        return value
    try:
        return value + timedelta(days=int(days))
    except OverflowError:
        return None


def _note(row: Row, reading: Reading) -> Record:
    options = reading.options
    patient_id = text_value(row.get("subject_id")) or ""
    note_id = text_value(row.get("note_id")) or text_value(row.get("row_id")) or ""
    if text_value(row.get("iserror")) in ("1", "1.0"):
        return Skipped(row.source, "entered-in-error", note_id or None, patient_id or None)
    text, problem = body_value(row.get("text"))
    if text is None:
        return Rejected(row.source, str(problem), note_id or None, patient_id or None)
    kind = text_value(row.get("note_type")) or text_value(row.get("category"))
    institution = options.institution or INSTITUTION
    if options.institution_from is not None:
        institution = text_value(row.get(options.institution_from)) or options.fallback_institution()
    written = note_time(row.get("charttime") or row.get("chartdate"), reading)
    if written is not None and reading.index.get("shift", patient_id) is None:
        reading.remarks["notes keep MIMIC's shifted times (no anchor_year_group): a split by time means nothing"] += 1
    return Note(
        note_id=note_id,
        patient_id=patient_id,
        institution=institution,
        text=text,
        source=row.source,
        encounter_id=text_value(row.get("hadm_id")),
        note_type=_TYPES.get(kind or "", kind),
        written_at=_moved(written, patient_id, reading),
        title=text_value(row.get("description")),
        language=options.default_language,
    )
