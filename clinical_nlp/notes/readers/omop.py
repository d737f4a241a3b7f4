"""OMOP CDM v5: NOTE, joined to VISIT_OCCURRENCE, CARE_SITE and CONCEPT where they are there; PERSON and DEATH.

A folder with one file (or one folder of files) a table, as CSV, JSON Lines or Parquet (`NOTE.csv`, `note.parquet`,
`note/part-0.parquet`), one such NOTE file, or a DuckDB file. Choices:

- patient_id is person_id; encounter_id is visit_occurrence_id; written_at is note_datetime, else note_date.
- institution is the care site of the note's visit (`care_site`, default): care_site_source_value, else the name, else
  the id; where two care sites share that word, `word (id)`. A note without visit or care site is `--institution`, else
  "unknown", and is counted: the care site of PERSON is where a patient belongs, not where a note is from.
  `--institution-from COLUMN` takes a column of NOTE instead.
- language: 0 or nothing is the default language, 4180186 is English, others are named by CONCEPT; without CONCEPT they
  are `concept:ID`, and skipped under that name unless asked for.
- note_type is the name of note_class_concept_id, else note_source_value, else that id.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from clinical_nlp.errors import InputError, UsageError
from clinical_nlp.notes.readers.dates import note_time, parse_date
from clinical_nlp.notes.readers.demographics import sex_of
from clinical_nlp.notes.readers.files import UnreadableError, walk
from clinical_nlp.notes.readers.options import Reading
from clinical_nlp.notes.readers.over_files import over_files
from clinical_nlp.notes.readers.rows import (
    SUFFIXES,
    DuckDb,
    Row,
    body_value,
    columns,
    near_column,
    rows,
    suffix,
    text_value,
)
from clinical_nlp.notes.schema import Note, Patient, Record, Rejected

_TABLES = ("note", "person", "visit_occurrence", "care_site", "concept", "death")
_FILE = re.compile(rf"(?:(?:omop|cdm|omop_cdm)[_-])?({'|'.join(_TABLES)})(?:[_-]?\d+)?")
_DUCKDB = (".duckdb", ".ddb", ".db")
_NEEDED = ("note_id", "person_id", "note_text")
_NOTE_COLUMNS = (
    *_NEEDED,
    "note_date",
    "note_datetime",
    "note_class_concept_id",
    "note_title",
    "language_concept_id",
    "visit_occurrence_id",
    "note_source_value",
)
_ENGLISH = "4180186"
_LANGUAGES = {
    "english": "en",
    "spanish": "es",
    "french": "fr",
    "german": "de",
    "italian": "it",
    "portuguese": "pt",
    "dutch": "nl",
    "danish": "da",
    "swedish": "sv",
    "norwegian": "no",
    "finnish": "fi",
    "polish": "pl",
    "russian": "ru",
    "chinese": "zh",
    "japanese": "ja",
    "korean": "ko",
    "arabic": "ar",
    "turkish": "tr",
    "greek": "el",
    "hebrew": "he",
    "hindi": "hi",
    "vietnamese": "vi",
}


def files(source: Path) -> list[Path]:
    """Return the files of the tables that are read."""
    return [source] if source.is_file() else sorted({path for paths in _files(source).values() for path in paths})


def _files(source: Path) -> dict[str, list[Path]]:
    """Return the files of each table; under "duckdb" the databases."""
    found: dict[str, list[Path]] = {name: [] for name in (*_TABLES, "duckdb")}
    for path in walk(source):
        if path.suffix.lower() in _DUCKDB:
            found["duckdb"].append(path)
            continue
        if suffix(path) not in SUFFIXES:
            continue
        stem = path.name.split(".")[0].lower()
        match = _FILE.fullmatch(stem) or (_FILE.fullmatch(path.parent.name.lower()) if path.parent != source else None)
        if match:
            found[match[1]].append(path)
    return found


class _Tables:
    """The tables of a source, in files or in a DuckDB file."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        source = reading.source
        self._database: DuckDb | None = None
        self.files: dict[str, list[Path]] = {name: [] for name in _TABLES}
        databases = [source] if source.is_file() and source.suffix.lower() in _DUCKDB else []
        if source.is_file() and not databases:
            self.files["note"] = [source]
        elif not databases:
            self.files = _files(source)
            databases = self.files["duckdb"] if not self.files["note"] else []
        if len(databases) > 1:
            raise UsageError(f"{source} holds {len(databases)} DuckDB files; name the one to read")
        if databases:
            self._database = DuckDb(databases[0], reading.name(databases[0]), reading.index.folder)
            if "note" not in self._database:
                self._database.close()
                raise InputError(f"{databases[0].name} has no table NOTE")

    def __enter__(self) -> _Tables:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._database is not None:
            self._database.close()

    def has(self, table: str) -> bool:
        """Tell whether the source has a table."""
        return table in self._database if self._database is not None else bool(self.files[table])

    def note_columns(self) -> dict[str, list[str]]:
        """Return the columns of NOTE, for each file of it that can be opened."""
        if self._database is not None:
            return {"note": self._database.columns("note")}
        found = {}
        for path in self.files["note"]:
            name = self._reading.name(path)
            try:
                found[name] = columns(path, name, self._reading.options.encoding)
            except UnreadableError:
                continue  # told when its rows are read
        return {name: present for name, present in found.items() if present}

    def linked(self, table: str, wanted: set[str]) -> Iterator[Row]:
        """Yield the good rows of a table that notes are joined to; what cannot be read is counted."""
        remark = f"rows or files of {table.upper()} could not be read"
        if not self.has(table):
            return
        sources = (
            [self._database.rows(table, wanted)]
            if self._database is not None
            else [
                rows(path, self._reading.name(path), self._reading.options.encoding, wanted)
                for path in self.files[table]
            ]
        )
        for source in sources:
            try:
                for row in source:
                    if isinstance(row, Row):
                        yield row
                    else:
                        self._reading.remarks[remark] += 1
            except UnreadableError:
                self._reading.remarks[remark] += 1

    def notes(self, wanted: set[str], to_record: Callable[[Row], Record]) -> Iterator[Record]:
        """Yield the record of every row of NOTE."""

        def records(path: Path, name: str) -> Iterator[Record]:
            for row in rows(path, name, self._reading.options.encoding, wanted):
                yield row if isinstance(row, Rejected) else to_record(row)

        if self._database is None:
            yield from over_files(self.files["note"], self._reading, records)
        else:
            for row in self._database.rows("note", wanted):
                yield row if isinstance(row, Rejected) else to_record(row)


def read(reading: Reading) -> Iterator[Record]:
    """Yield one record a row of NOTE."""
    with _Tables(reading) as tables:
        if not tables.has("note"):
            return
        _check_columns(tables.note_columns(), reading)
        options = reading.options
        level = options.institution_from or "care_site"
        wanted = {*_NOTE_COLUMNS, level.lower()}
        _index_concepts(tables, reading, wanted)
        if level == "care_site" and not (options.institution and options.institution_from is None):
            _index_visits(tables, reading)
        yield from tables.notes(wanted, lambda row: _note(row, level, reading))


def patients(reading: Reading) -> Iterator[Patient]:
    """Yield the rows of PERSON, with the date of DEATH."""
    with _Tables(reading) as tables:
        for row in tables.linked("death", {"person_id", "death_date", "death_datetime"}):
            person, died = text_value(row.get("person_id")), row.get("death_date") or row.get("death_datetime")
            if person and parse_date(died):
                reading.index.add("death", person, value=str(died))
        wanted = {"person_id", "gender_concept_id", "gender_source_value", "birth_datetime"}
        wanted |= {f"{part}_of_birth" for part in ("year", "month", "day")}
        for row in tables.linked("person", wanted):
            person = text_value(row.get("person_id"))
            if person is None:
                reading.remarks["rows of PERSON have no person_id"] += 1
                continue
            sex = sex_of(text_value(row.get("gender_concept_id")))
            if sex in (None, "unknown"):
                sex = sex_of(text_value(row.get("gender_source_value"))) or sex
            year, month, day = (text_value(row.get(f"{part}_of_birth")) for part in ("year", "month", "day"))
            yield Patient(
                person,
                sex=sex,
                birth_date=parse_date(row.get("birth_datetime")) or parse_date(f"{year}-{month}-{day}"),
                death_date=parse_date(reading.index.get("death", person)),
            )


def _check_columns(found: dict[str, list[str]], reading: Reading) -> None:
    level = reading.options.institution_from
    for name, present in found.items():
        known = {column.lower() for column in present}
        missing = [column for column in _NEEDED if column not in known]
        if missing:
            told = "; no column ".join(f"{column!r}{near_column(column, present)}" for column in missing)
            raise UsageError(f"table NOTE in {name} has no column {told}")
        if level not in (None, "care_site") and level.lower() not in known:
            raise UsageError(
                f"institution_from {level!r} is neither care_site nor a column of NOTE{near_column(level, present)}"
            )


def _index_visits(tables: _Tables, reading: Reading) -> None:
    index = reading.index
    wanted = {"care_site_id", "care_site_name", "care_site_source_value"}
    for row in tables.linked("care_site", wanted):
        own = text_value(row.get("care_site_id"))
        word = text_value(row.get("care_site_source_value")) or text_value(row.get("care_site_name")) or own
        if own and word:
            index.add("care-site", own, value=word)
            if index.add("care-site-word", word, value=own) not in (None, own):
                index.put("care-site-word", word, value="")
    for row in tables.linked("visit_occurrence", {"visit_occurrence_id", "care_site_id"}):
        visit, site = text_value(row.get("visit_occurrence_id")), text_value(row.get("care_site_id"))
        if visit and site:
            index.add("visit", visit, value=site)


def _index_concepts(tables: _Tables, reading: Reading, wanted: set[str]) -> None:
    """Remember the names of the concepts that NOTE uses: few of the millions that a vocabulary holds."""
    if not tables.has("concept"):
        return
    used = {"note_class_concept_id", "language_concept_id"}
    ids: set[str | None] = set()
    for row in tables.linked("note", used):
        ids.update(text_value(row.get(column)) for column in used)
    reading.remarks.pop("rows or files of NOTE could not be read", None)  # its rows are read again, and told about
    for row in tables.linked("concept", {"concept_id", "concept_name"}):
        own, name = text_value(row.get("concept_id")), text_value(row.get("concept_name"))
        if own in ids and own and own != "0" and name:
            reading.index.add("concept", own, value=name)


def _note(row: Row, level: str, reading: Reading) -> Record:
    note_id, patient_id = text_value(row.get("note_id")), text_value(row.get("person_id"))
    text, problem = body_value(row.get("note_text"))
    if text is None:
        return Rejected(row.source, str(problem), note_id, patient_id)
    visit = text_value(row.get("visit_occurrence_id"))
    kind = text_value(row.get("note_class_concept_id"))
    known = reading.index.get("concept", kind) if kind else None
    return Note(
        note_id=note_id or "",
        patient_id=patient_id or "",
        institution=_institution(row, visit, level, reading),
        text=text,
        source=row.source,
        encounter_id=visit if visit != "0" else None,
        note_type=known or text_value(row.get("note_source_value")) or (kind if kind != "0" else None),
        written_at=note_time(row.get("note_datetime") or row.get("note_date"), reading),
        title=text_value(row.get("note_title")),
        language=_language(text_value(row.get("language_concept_id")), reading),
    )


def _institution(row: Row, visit: str | None, level: str, reading: Reading) -> str:
    options, index = reading.options, reading.index
    if options.institution and options.institution_from is None:
        return options.institution
    if level != "care_site":
        return text_value(row.get(level)) or options.fallback_institution()
    site = index.get("visit", visit) if visit else None
    if site is None:
        return options.fallback_institution()
    word = index.get("care-site", site) or site
    return word if index.get("care-site-word", word) in (site, None) else f"{word} ({site})"


def _language(concept: str | None, reading: Reading) -> str:
    if concept in (None, "0"):
        return reading.options.default_language
    if concept == _ENGLISH:
        return "en"
    name = (reading.index.get("concept", str(concept)) or "").lower().removesuffix(" language")
    return _LANGUAGES.get(name, f"concept:{concept}")
