"""A folder of text files, one a note, with an optional `notes.csv` that says whose they are.

The note id is the path below the source without its suffix. A table `notes.csv` (or .tsv, .parquet, .jsonl) beside
the files may give note_id, patient_id and any other column of a note but its text; a file that it does not name is
rejected then, since its patient is unknown. Without such a table every file is its own patient.
`patients.csv` may give patient_id, sex, birth_date, death_date.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from clinical_nlp.notes.readers.dates import note_time
from clinical_nlp.notes.readers.demographics import patient_of
from clinical_nlp.notes.readers.files import read_text, walk
from clinical_nlp.notes.readers.folder import check_institution_from, institution_of, stem
from clinical_nlp.notes.readers.options import Reading
from clinical_nlp.notes.readers.rows import SUFFIXES, Row, rows, suffix, table_name, text_value
from clinical_nlp.notes.schema import Note, Patient, Record, Rejected

_FIELDS = ("patient_id", "institution", "encounter_id", "note_type", "written_at", "title", "language", "status")


def files(source: Path) -> Iterator[Path]:
    """Yield the texts, and the tables about them."""
    if source.is_file():
        yield source
        return
    yield from (path for path in (_table(source, "notes"), _table(source, "patients")) if path is not None)
    yield from _texts(source)


def _texts(source: Path) -> Iterator[Path]:
    if source.is_file():
        yield source
    else:
        yield from (path for path in walk(source) if path.suffix.lower() in (".txt", ".text"))


def _table(source: Path, name: str) -> Path | None:
    if source.is_file():
        return None
    found = (path for path in sorted(source.iterdir()) if table_name(path) == name and suffix(path) in SUFFIXES)
    return next(found, None)


def read(reading: Reading) -> Iterator[Record]:
    """Yield one record a text file."""
    options, index = reading.options, reading.index
    check_institution_from(options, format="text")
    about = _table(reading.source, "notes")
    if about is not None:
        for row in rows(about, reading.name(about), options.encoding):
            note_id = text_value(row.get("note_id")) if isinstance(row, Row) else None
            if isinstance(row, Rejected) or note_id is None:
                reading.remarks[f"rows of {about.name} could not be read, or have no note_id"] += 1
                continue
            values = {name: text_value(row.get(name)) for name in _FIELDS}
            index.add("about", stem(note_id) if note_id.endswith(".txt") else note_id, value=json.dumps(values))
    for path in _texts(reading.source):
        name = reading.name(path)
        note_id = stem(name)
        known = index.get("about", note_id)
        if about is not None and known is None:
            yield Rejected(name, f"no patient: {about.name} has no row with this note_id", note_id)
            continue
        values = json.loads(known) if known else {}
        patient_id = (values.get("patient_id") or "") if about is not None else note_id
        text, problem = read_text(path, options.encoding)
        if text is None:
            yield Rejected(name, str(problem), note_id, patient_id or None)
            continue
        institution = institution_of(name, options)
        if not options.institution and not options.institution_from:
            institution = values.get("institution") or institution
        yield Note(
            note_id=note_id,
            patient_id=patient_id,
            institution=institution,
            text=text,
            source=name,
            encounter_id=values.get("encounter_id"),
            note_type=values.get("note_type"),
            written_at=note_time(values.get("written_at"), reading),
            title=values.get("title"),
            language=values.get("language") or options.default_language,
            status=values.get("status"),
        )


def patients(reading: Reading) -> Iterator[Patient]:
    """Yield the rows of patients.csv, where there is one."""
    table = _table(reading.source, "patients")
    if table is not None:
        for row in rows(table, reading.name(table), reading.options.encoding):
            if (patient := patient_of(row, reading)) is not None:
                yield patient
