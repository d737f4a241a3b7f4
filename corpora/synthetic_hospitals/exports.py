"""The corpus as hospitals export notes: FHIR R4 bulk, OMOP CDM v5.4, one table; and the gold beside them.

Nothing is written over: a folder must be new or empty."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clinical_nlp.errors import UsageError
from clinical_nlp.notes.corpus import Corpus
from clinical_nlp.notes.schema import Note, iter_notes

NoteKey = tuple[str, str]
"""(institution, note_id)"""

_LOINC = {
    "admission": ("34117-2", "History and physical note"),
    "progress": ("11506-3", "Progress note"),
    "discharge": ("18842-5", "Discharge summary"),
    "clinic": ("34131-3", "Outpatient Progress note"),
    "nursing": ("34746-8", "Nurse Note"),
    "radiology": ("18748-4", "Diagnostic imaging study"),
}
_TABLE_COLUMNS = ("note_id", "patient_id", "institution", "encounter_id", "note_type", "written_at", "title",
                  "language", "text")  # fmt: skip
_ENGLISH, _FROM_EHR, _UTF8 = 4180186, 32817, 32678
_OMOP_TYPES: dict[str, list[tuple[str, pa.DataType]]] = {
    "NOTE": [
        ("note_id", pa.int32()), ("person_id", pa.int32()), ("note_date", pa.date32()),
        ("note_datetime", pa.timestamp("us")), ("note_type_concept_id", pa.int32()),
        ("note_class_concept_id", pa.int32()), ("note_title", pa.string()), ("note_text", pa.large_string()),
        ("encoding_concept_id", pa.int32()), ("language_concept_id", pa.int32()), ("provider_id", pa.int32()),
        ("visit_occurrence_id", pa.int32()), ("visit_detail_id", pa.int32()), ("note_source_value", pa.string()),
        ("note_event_id", pa.int32()), ("note_event_field_concept_id", pa.int32()),
    ],
    "PERSON": [
        ("person_id", pa.int32()), ("gender_concept_id", pa.int32()), ("year_of_birth", pa.int32()),
        ("month_of_birth", pa.int32()), ("day_of_birth", pa.int32()), ("birth_datetime", pa.timestamp("us")),
        ("race_concept_id", pa.int32()), ("ethnicity_concept_id", pa.int32()), ("location_id", pa.int32()),
        ("provider_id", pa.int32()), ("care_site_id", pa.int32()), ("person_source_value", pa.string()),
        ("gender_source_value", pa.string()), ("gender_source_concept_id", pa.int32()),
        ("race_source_value", pa.string()), ("race_source_concept_id", pa.int32()),
        ("ethnicity_source_value", pa.string()), ("ethnicity_source_concept_id", pa.int32()),
    ],
    "VISIT_OCCURRENCE": [
        ("visit_occurrence_id", pa.int32()), ("person_id", pa.int32()), ("visit_concept_id", pa.int32()),
        ("visit_start_date", pa.date32()), ("visit_start_datetime", pa.timestamp("us")),
        ("visit_end_date", pa.date32()), ("visit_end_datetime", pa.timestamp("us")),
        ("visit_type_concept_id", pa.int32()), ("provider_id", pa.int32()), ("care_site_id", pa.int32()),
        ("visit_source_value", pa.string()), ("visit_source_concept_id", pa.int32()),
        ("admitted_from_concept_id", pa.int32()), ("admitted_from_source_value", pa.string()),
        ("discharged_to_concept_id", pa.int32()), ("discharged_to_source_value", pa.string()),
        ("preceding_visit_occurrence_id", pa.int32()),
    ],
    "CARE_SITE": [
        ("care_site_id", pa.int32()), ("care_site_name", pa.string()), ("place_of_service_concept_id", pa.int32()),
        ("location_id", pa.int32()), ("care_site_source_value", pa.string()),
        ("place_of_service_source_value", pa.string()),
    ],
}  # fmt: skip


def fhir_note_id(note: Note) -> str:
    """Return the id that a reader gives a note of the FHIR export: resource type, slash, id."""
    return f"{'DiagnosticReport' if note.note_type == 'radiology' else 'DocumentReference'}/{note.note_id}"


def exported_note_ids(corpus: Corpus, *, format: str) -> dict[NoteKey, str]:
    """Map (institution, note_id) of the corpus to the note_id that a reader gives the same note of an export.

    Parameters
    ----------
    format : fhir, omop or table. The institution is the same word in all of them.
    """
    keys = zip(corpus.notes["institution"].to_pylist(), corpus.notes["note_id"].to_pylist(), strict=True)
    if format == "table":
        return {key: key[1] for key in keys}
    if format == "omop":
        return {key: str(place + 1) for place, key in enumerate(keys)}
    if format == "fhir":
        return {(note.institution, note.note_id): fhir_note_id(note) for note in iter_notes(corpus.notes)}
    raise UsageError(f"format must be fhir, omop or table, not {format!r}")


def write_gold(corpus: Corpus, folder: Path, *, format: str) -> list[Path]:
    """Write the gold tables as Parquet, with the note ids that a reader gives the notes of an export of `format`.

    Patients keep their ids, except in OMOP, where they are person_ids.
    """
    _new_folder(folder)
    notes = exported_note_ids(corpus, format=format)
    people = _numbers(corpus.notes["patient_id"].to_pylist()) if format == "omop" else {}
    paths = []
    for name in ("spans", "codes", "pairs", "facts"):
        table = getattr(corpus, name)
        if table is None:
            continue
        if "note_id" in table.column_names:
            keys = zip(table["institution"].to_pylist(), table["note_id"].to_pylist(), strict=True)
            ids = [None if key[1] is None else notes[key] for key in keys]
            table = _replaced(table, "note_id", ids)
        if people and "patient_id" in table.column_names:
            table = _replaced(table, "patient_id", [str(people[one]) for one in table["patient_id"].to_pylist()])
        paths.append(folder / f"{name}.parquet")
        pq.write_table(table, paths[-1])
    return paths


def _replaced(table: pa.Table, name: str, values: list[str | None]) -> pa.Table:
    place = table.column_names.index(name)
    return table.set_column(place, table.schema.field(name), pa.array(values, pa.string()))


def write_fhir(corpus: Corpus, folder: Path) -> list[Path]:
    """Write FHIR R4 bulk NDJSON: one file a resource type, note text inline as base64.

    Radiology reports are DiagnosticReports, all other notes DocumentReferences; the custodian (or the performing
    organization) is the institution. Ids are those of the corpus; see `fhir_note_id`.
    """
    _new_folder(folder)
    writers = {"Organization": _organizations, "Patient": _fhir_patients, "Encounter": _fhir_encounters,
               "DocumentReference": _document_references, "DiagnosticReport": _diagnostic_reports}  # fmt: skip
    paths = []
    for kind, resources in writers.items():
        paths.append(folder / f"{kind}.000.ndjson")
        with paths[-1].open("w", encoding="utf-8", newline="\n") as file:
            for resource in resources(corpus):
                file.write(json.dumps({"resourceType": kind, **resource}, separators=(",", ":")) + "\n")
    return paths


def _organizations(corpus: Corpus) -> Iterator[dict[str, Any]]:
    for name in dict.fromkeys(corpus.notes["institution"].to_pylist()):
        yield {"id": name, "active": True, "name": name}


def _fhir_patients(corpus: Corpus) -> Iterator[dict[str, Any]]:
    for row in _people(corpus):
        yield {"id": row["patient_id"], "gender": row["sex"], "birthDate": row["birth_date"].isoformat()}


def _fhir_encounters(corpus: Corpus) -> Iterator[dict[str, Any]]:
    for encounter, notes in _encounters(corpus).items():
        first, last = notes[0], notes[-1]
        clinic = first.note_type == "clinic"
        yield {
            "id": encounter,
            "status": "finished",
            "class": {"system": "http://terminology.hl7.org/CodeSystem/v3-ActCode", "code": "AMB" if clinic else "IMP"},
            "subject": {"reference": f"Patient/{first.patient_id}"},
            "period": {"start": _instant(first), "end": _instant(last)},
            "serviceProvider": {"reference": f"Organization/{first.institution}"},
        }


def _document_references(corpus: Corpus) -> Iterator[dict[str, Any]]:
    for note in iter_notes(corpus.notes):
        if note.note_type == "radiology":
            continue
        yield {
            "id": note.note_id,
            "status": "current",
            "docStatus": "final",
            "type": _code(note),
            "subject": {"reference": f"Patient/{note.patient_id}"},
            "date": _instant(note),
            "custodian": {"reference": f"Organization/{note.institution}", "display": note.institution},
            "description": note.title,
            "content": [{"attachment": _attachment(note)}],
            "context": {
                "encounter": [{"reference": f"Encounter/{note.encounter_id}"}],
                "period": {"start": _instant(note)},
            },
        }


def _diagnostic_reports(corpus: Corpus) -> Iterator[dict[str, Any]]:
    for note in iter_notes(corpus.notes):
        if note.note_type != "radiology":
            continue
        category = {"system": "http://terminology.hl7.org/CodeSystem/v2-0074", "code": "RAD"}
        yield {
            "id": note.note_id,
            "status": "final",
            "category": [{"coding": [category]}],
            "code": {**_code(note), "text": note.title},
            "subject": {"reference": f"Patient/{note.patient_id}"},
            "encounter": {"reference": f"Encounter/{note.encounter_id}"},
            "effectiveDateTime": _instant(note),
            "issued": _instant(note),
            "performer": [{"reference": f"Organization/{note.institution}", "display": note.institution}],
            "presentedForm": [_attachment(note)],
        }


def _code(note: Note) -> dict[str, Any]:
    code, display = _LOINC[str(note.note_type)]
    return {"coding": [{"system": "http://loinc.org", "code": code, "display": display}], "text": note.note_type}


def _attachment(note: Note) -> dict[str, Any]:
    data = note.text.encode("utf-8")
    return {
        "contentType": "text/plain; charset=utf-8",
        "language": note.language,
        "data": base64.b64encode(data).decode("ascii"),
        "size": len(data),
        "hash": base64.b64encode(hashlib.sha1(data, usedforsecurity=False).digest()).decode("ascii"),
        "title": note.title,
    }


def write_omop(corpus: Corpus, folder: Path, *, parquet: bool = False) -> list[Path]:
    """Write NOTE, PERSON, VISIT_OCCURRENCE and CARE_SITE with the columns of OMOP CDM v5.4, as CSV or Parquet.

    Ids are whole numbers in the order of the corpus; see `exported_note_ids`. No vocabulary is assumed: the class of a
    note is concept 0 with its word in `note_source_value`.
    """
    _new_folder(folder)
    notes = exported_note_ids(corpus, format="omop")
    people = _numbers(corpus.notes["patient_id"].to_pylist())
    sites = _numbers(corpus.notes["institution"].to_pylist())
    visits = _numbers(corpus.notes["encounter_id"].to_pylist())
    rows: Mapping[str, Iterable[dict[str, Any]]] = {
        "NOTE": (_omop_note(note, int(notes[note.institution, note.note_id]), people, visits)
                 for note in iter_notes(corpus.notes)),
        "PERSON": (_omop_person(row, people[row["patient_id"]]) for row in _people(corpus)),
        "VISIT_OCCURRENCE": (_omop_visit(visits[encounter], found, people, sites)
                             for encounter, found in _encounters(corpus).items()),
        "CARE_SITE": ({"care_site_id": number, "care_site_name": name, "place_of_service_concept_id": 0,
                       "care_site_source_value": name} for name, number in sites.items()),
    }  # fmt: skip
    paths = []
    for table, columns in _OMOP_TYPES.items():
        names = [name for name, _ in columns]
        filled = ({name: row.get(name) for name in names} for row in rows[table])
        paths.append(folder / f"{table}.{'parquet' if parquet else 'csv'}")
        if parquet:
            pq.write_table(pa.Table.from_pylist(list(filled), schema=pa.schema(columns)), paths[-1])
        else:
            _write_csv(paths[-1], names, filled)
    return paths


def _omop_note(note: Note, number: int, people: Mapping[str, int], visits: Mapping[str, int]) -> dict[str, Any]:
    when = _naive(note)
    return {
        "note_id": number,
        "person_id": people[note.patient_id],
        "note_date": when.date(),
        "note_datetime": when,
        "note_type_concept_id": _FROM_EHR,
        "note_class_concept_id": 0,
        "note_title": note.title,
        "note_text": note.text,
        "encoding_concept_id": _UTF8,
        "language_concept_id": _ENGLISH,
        "visit_occurrence_id": visits[str(note.encounter_id)],
        "note_source_value": note.note_type,
    }


def _omop_person(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    born = row["birth_date"]
    return {
        "person_id": number,
        "gender_concept_id": 8532 if row["sex"] == "female" else 8507,
        "year_of_birth": born.year,
        "month_of_birth": born.month,
        "day_of_birth": born.day,
        "race_concept_id": 0,
        "ethnicity_concept_id": 0,
        "person_source_value": row["patient_id"],
        "gender_source_value": "F" if row["sex"] == "female" else "M",
    }


def _omop_visit(number: int, notes: list[Note], people: Mapping[str, int], sites: Mapping[str, int]) -> dict[str, Any]:
    first, last = _naive(notes[0]), _naive(notes[-1])
    return {
        "visit_occurrence_id": number,
        "person_id": people[notes[0].patient_id],
        "visit_concept_id": 9202 if notes[0].note_type == "clinic" else 9201,
        "visit_start_date": first.date(),
        "visit_start_datetime": first,
        "visit_end_date": last.date(),
        "visit_end_datetime": last,
        "visit_type_concept_id": _FROM_EHR,
        "care_site_id": sites[notes[0].institution],
        "visit_source_value": notes[0].encounter_id,
    }


def write_table(corpus: Corpus, path: Path) -> Path:
    """Write one row a note to a CSV, Parquet or JSON Lines file, by the ending of `path`."""
    if path.exists():
        raise UsageError(f"{path} exists already; name a file that does not")
    kind = path.suffix.lower()
    path.parent.mkdir(parents=True, exist_ok=True)
    table = corpus.notes.select(_TABLE_COLUMNS)
    if kind == ".parquet":
        pq.write_table(table, path)
        return path
    rows = ({**row, "written_at": row["written_at"].isoformat()} for row in table.to_pylist())
    if kind == ".csv":
        _write_csv(path, list(_TABLE_COLUMNS), rows)
    elif kind in (".jsonl", ".ndjson"):
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    else:
        raise UsageError(f"a table ends in .csv, .parquet or .jsonl, not {path.suffix or path.name!r}")
    return path


def _write_csv(path: Path, names: list[str], rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _new_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not an empty folder; name a new one, so that no old file is read with the new")
    folder.mkdir(parents=True, exist_ok=True)


def _people(corpus: Corpus) -> list[dict[str, Any]]:
    if corpus.patients is None:
        raise UsageError(f"corpus {corpus.card.name!r} has no patients table to export")
    rows: list[dict[str, Any]] = corpus.patients.to_pylist()
    return rows


def _encounters(corpus: Corpus) -> dict[str, list[Note]]:
    found: dict[str, list[Note]] = {}
    for note in iter_notes(corpus.notes):
        found.setdefault(str(note.encounter_id), []).append(note)
    return {key: sorted(notes, key=_naive) for key, notes in found.items()}


def _numbers(values: Iterable[str]) -> dict[str, int]:
    return {value: number + 1 for number, value in enumerate(dict.fromkeys(values))}


def _naive(note: Note) -> datetime:
    """Return the time of a note without its zone: OMOP has none."""
    if note.written_at is None:
        raise UsageError(f"{note.source} has no time to export")
    return note.written_at.replace(tzinfo=None)


def _instant(note: Note) -> str:
    return _naive(note).isoformat() + "Z"
