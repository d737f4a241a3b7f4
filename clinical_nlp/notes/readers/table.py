"""Any table of notes: CSV (, ; tab or | as its header shows), JSON Lines, Parquet; one file or a folder of them.

Columns are note_id, patient_id, institution, text, and where they are there encounter_id, note_type, written_at,
title, language, status; `columns={"text": "body"}` maps a name to the column that holds it. Names are compared without
case. A file `patients.*` in the folder gives patient_id, sex, birth_date, death_date.

Notes in several rows: with `columns={"line": "LINE"}`, or in Epic Clarity's own tables (HNO_NOTE_TEXT or
HNO_PLAIN_TEXT: NOTE_ID, NOTE_CSN_ID, LINE, NOTE_TEXT), which are joined to HNO_INFO (or NOTE_ENC_INFO) in the same
folder for patient, encounter, type and time. Rows may be in any order. NOTE_CSN_ID is a version of a note: the last
one is read. Clarity names no institution: give `institution`, or `institution_from` a column of either table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clinical_nlp.errors import UsageError, nearest
from clinical_nlp.notes.readers.dates import note_time
from clinical_nlp.notes.readers.demographics import patient_of
from clinical_nlp.notes.readers.files import UnreadableError, walk
from clinical_nlp.notes.readers.line_split import Joined, Piece, join
from clinical_nlp.notes.readers.options import Reading, ReadOptions
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

REQUIRED = ("note_id", "patient_id", "institution", "text")
OPTIONAL = ("encounter_id", "note_type", "written_at", "title", "language", "status", "line")

_CLARITY_TEXT = ("hno_note_text", "hno_plain_text")
_CLARITY_INFO = ("hno_info", "note_enc_info")
_CLARITY: dict[str, tuple[str, ...]] = {
    "note_id": ("note_id", "note_csn_id"),
    "version": ("note_csn_id",),
    "line": ("line",),
    "text": ("note_text", "plain_text"),
    "patient_id": ("pat_id", "patient_id"),
    "encounter_id": ("pat_enc_csn_id", "encounter_id"),
    "note_type": ("note_type", "ip_note_type", "note_type_noadd_c", "ip_note_type_c"),
    "written_at": ("create_instant_dttm", "note_file_time_dttm", "contact_date", "note_date"),
    "title": ("note_desc",),
    "status": ("note_status", "note_status_c"),
    "deleted": ("delete_instant_dttm",),
}
"""Field -> the columns of Clarity that may hold it, best first."""


def files(source: Path) -> list[Path]:
    """Return the tables."""
    return [source] if source.is_file() else [path for path in walk(source) if suffix(path) in SUFFIXES]


def read(reading: Reading) -> Iterator[Record]:
    """Yield one record a row, or one a note where notes are split into rows."""
    _check_mapping(reading.options)
    found = [path for path in files(reading.source) if table_name(path) != "patients" or path == reading.source]
    texts = [path for path in found if table_name(path).startswith(_CLARITY_TEXT)]
    if texts and "text" not in reading.options.columns:
        yield from _clarity(texts, [path for path in found if table_name(path) in _CLARITY_INFO], reading)
        return
    mappings, problems = _mappings(found, reading)
    if problems and not mappings:
        raise UsageError(next(iter(problems.values())))
    for path, problem in problems.items():
        yield Rejected(reading.name(path), problem)
    readable = [path for path in found if path not in problems]

    def records(path: Path, name: str) -> Iterator[Record]:
        mapping = mappings.get(path, {})
        for row in rows(path, name, reading.options.encoding, set(mapping.values())):
            yield row if isinstance(row, Rejected) else _note(row, mapping, reading)

    def pieces(path: Path, name: str) -> Iterator[Any]:
        mapping = mappings.get(path, {})
        for row in rows(path, name, reading.options.encoding, set(mapping.values())):
            yield row if isinstance(row, Rejected) else _piece(row, mapping, reading)

    if "line" in reading.options.columns:
        yield from _joined(over_files(readable, reading, pieces), reading)
    else:
        yield from over_files(readable, reading, records)


def patients(reading: Reading) -> Iterator[Patient]:
    """Yield the rows of `patients.*`, where there is one in the folder."""
    for path in files(reading.source):
        if table_name(path) == "patients" and path != reading.source:
            for row in rows(path, reading.name(path), reading.options.encoding):
                if (patient := patient_of(row, reading)) is not None:
                    yield patient


def _check_mapping(options: ReadOptions) -> None:
    for field in options.columns:
        if field not in (*REQUIRED, *OPTIONAL):
            raise UsageError(f"columns.{field} is not known{nearest(field, (*REQUIRED, *OPTIONAL))}")


def _mappings(paths: list[Path], reading: Reading) -> tuple[dict[Path, dict[str, str]], dict[Path, str]]:
    """Return field -> column (lower-case) for the files that fit, and what is wrong with those that do not."""
    mappings: dict[Path, dict[str, str]] = {}
    problems: dict[Path, str] = {}
    for path in paths:
        name = reading.name(path)
        try:
            present = columns(path, name, reading.options.encoding)
        except UnreadableError:
            continue  # told when its rows are read
        if not present:
            continue
        mapping, problem = column_mapping(present, name, reading.options)
        if problem is None:
            mappings[path] = mapping
        else:
            problems[path] = problem
    return mappings, problems


def column_mapping(present: list[str], name: str, options: ReadOptions) -> tuple[dict[str, str], str | None]:
    """Return field -> column (lower-case), and what is missing, in words, or None."""
    known = {column.lower() for column in present}
    asked = dict(options.columns)
    if options.institution_from is not None:
        asked["institution"] = options.institution_from
    mapping: dict[str, str] = {}
    missing: list[str] = []
    for field in (*REQUIRED, *OPTIONAL):
        column = asked.get(field, field)
        if column.lower() in known:
            mapping[field] = column.lower()
        elif field == "institution" and options.institution is not None and options.institution_from is None:
            continue
        elif field in REQUIRED or field in asked:
            what = repr(column) if column == field else f"{column!r} (for {field})"
            missing.append(what + near_column(column, present))
    if not missing:
        return mapping, None
    remedy = "map it with --columns.FIELD=COLUMN" + (
        ", or name one institution for all with --institution" if "institution" not in mapping else ""
    )
    return mapping, f"table {name} has no column {'; no column '.join(missing)} ({remedy})"


def _values(row: Row, mapping: Mapping[str, str], reading: Reading) -> dict[str, Any]:
    """Return the short fields of a row."""
    options = reading.options
    values: dict[str, Any] = {
        field: text_value(row.get(column)) for field, column in mapping.items() if field not in ("text", "line")
    }
    if options.institution is not None and options.institution_from is None:
        values["institution"] = options.institution
    return values


def _build(values: Mapping[str, Any], text: str, source: str, reading: Reading) -> Note:
    institution = values.get("institution")
    if institution is None and reading.options.institution_from is not None:
        institution = reading.options.fallback_institution()
    return Note(
        note_id=values.get("note_id") or "",
        patient_id=values.get("patient_id") or "",
        institution=institution or "",
        text=text,
        source=source,
        encounter_id=values.get("encounter_id"),
        note_type=values.get("note_type"),
        written_at=note_time(values.get("written_at"), reading),
        title=values.get("title"),
        language=values.get("language") or reading.options.default_language,
        status=values.get("status"),
    )


def _note(row: Row, mapping: Mapping[str, str], reading: Reading) -> Record:
    values = _values(row, mapping, reading)
    text, problem = body_value(row.get(mapping["text"]))
    if text is None:
        return Rejected(row.source, str(problem), values.get("note_id"), values.get("patient_id"))
    return _build(values, text, row.source, reading)


def _piece(row: Row, mapping: Mapping[str, str], reading: Reading) -> Piece | Rejected:
    values = _values(row, mapping, reading)
    note_id, version = values.get("note_id"), values.pop("version", None)
    text, problem = body_value(row.get(mapping["text"]))
    try:
        line = int(text_value(row.get(mapping["line"])) or "")
        (text or "").encode("utf-8")
    except UnicodeEncodeError:
        problem = "holds lone surrogates, which no Unicode text has; export it as UTF-8 again"
    except ValueError:
        problem = "the line number is no number"
    if note_id is None:
        problem = "no note_id"
    if problem == "no text":  # a row of a split note may be blank
        text, problem = "", None
    if text is None or problem is not None or note_id is None or not -(2**63) <= line < 2**63:
        return Rejected(row.source, problem or "the line number is no number", note_id, values.get("patient_id"))
    return Piece(note_id, version or "", line, text, row.source, values)


def _joined(pieces: Iterator[Any], reading: Reading) -> Iterator[Record]:
    for item in join(pieces, reading):
        if not isinstance(item, Joined):
            yield item
            continue
        values = dict(item.fields)
        known = reading.index.get("clarity", item.note_id)
        for field, value in (json.loads(known) if known else {}).items():
            values[field] = values.get(field) or value
        if values.get("deleted"):
            yield Skipped(item.source, "deleted", item.note_id, values.get("patient_id"))
            continue
        if not item.complete:
            values["status"] = "incomplete"
            reading.remarks["notes have gaps in their line numbers; their status is 'incomplete'"] += 1
        yield _build(values, item.text, item.source, reading)


def _clarity(texts: list[Path], infos: list[Path], reading: Reading) -> Iterator[Record]:
    options = reading.options
    level = options.institution_from
    if options.institution is None and level is None:
        raise UsageError(
            "Clarity's tables name no institution: give one for all (--institution), or a column (--institution-from)"
        )
    seen: list[str] = []
    for path in infos:
        mapping = _clarity_mapping(path, reading, seen)
        for row in rows(path, reading.name(path), options.encoding, set(mapping.values())):
            values = {} if isinstance(row, Rejected) else _values(row, mapping, reading)
            if not values.get("note_id"):
                reading.remarks[f"rows of {path.name} could not be read, or have no NOTE_ID"] += 1
                continue
            earlier = reading.index.get("clarity", values["note_id"])
            values = {**{field: value for field, value in values.items() if value}, **json.loads(earlier or "{}")}
            reading.index.put("clarity", values["note_id"], value=json.dumps(values))
    mappings = {path: _clarity_mapping(path, reading, seen) for path in texts}
    for path, mapping in mappings.items():
        lacking = [field for field in ("note_id", "line", "text") if field not in mapping]
        if lacking:
            wanted = " or ".join(column.upper() for column in _CLARITY[lacking[0]])
            raise UsageError(f"table {reading.name(path)} has no column {wanted}; a Clarity note table needs it")
    if level is not None and level.lower() not in seen:
        near = near_column(level, set(seen))
        raise UsageError(f"institution_from {level!r} is a column of none of the tables{near}")

    def pieces(path: Path, name: str) -> Iterator[Any]:
        for row in rows(path, name, options.encoding, set(mappings[path].values())):
            yield row if isinstance(row, Rejected) else _piece(row, mappings[path], reading)

    yield from _joined(over_files(texts, reading, pieces), reading)


def _clarity_mapping(path: Path, reading: Reading, seen: list[str]) -> dict[str, str]:
    present = [column.lower() for column in columns(path, reading.name(path), reading.options.encoding)]
    seen.extend(present)
    mapping: dict[str, str] = {}
    for field, candidates in _CLARITY.items():
        asked = reading.options.columns.get(field)
        found = [column for column in ((asked.lower(),) if asked else candidates) if column in present]
        if found:
            mapping[field] = found[0]
    if mapping.get("note_id") == "note_csn_id":
        mapping.pop("version", None)
    level = reading.options.institution_from
    if level is not None and level.lower() in present:
        mapping["institution"] = level.lower()
    return mapping
