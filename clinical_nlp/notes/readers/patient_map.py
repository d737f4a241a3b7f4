"""The explicit map that lets two exports share patients."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from clinical_nlp.errors import InputError, MissingDataError, UsageError
from clinical_nlp.notes.readers.index import DiskIndex
from clinical_nlp.notes.readers.options import ReadOptions
from clinical_nlp.notes.readers.rows import columns, near_column, rows, text_value
from clinical_nlp.notes.schema import Note, Patient, Record, Rejected

Shared = TypeVar("Shared", bound=Record | Patient)
PATIENT_MAP = "patient_map.csv"
"""Beside BRAT files: whose documents they are, which the format cannot say. `review` writes it."""
_NEEDED = ("patient_id", "shared_patient_id")


class PatientMap:
    """patient_id -> shared_patient_id, from `options.patient_map`, kept in the on-disk index.

    A row with an institution holds for the notes of that institution only and goes before a row without one;
    demographics, skipped and rejected records have no institution and follow the rows without one.

    Raises
    ------
    MissingDataError : the file does not exist.
    UsageError : it lacks a column.
    InputError : a row cannot be read, or says something else than an earlier one: half a map would split patients.
    """

    def __init__(self, options: ReadOptions, index: DiskIndex) -> None:
        self._index = index
        path = options.patient_map
        if path is None:
            return
        if not path.is_file():
            raise MissingDataError(f"patient map {path} does not exist or is no file")
        there = columns(path, path.name, options.encoding)
        missing = [name for name in _NEEDED if name not in {column.lower() for column in there}]
        if missing:
            told = [f"no column {name!r}{near_column(name, there)}" for name in missing]
            raise UsageError(f"patient map {path} has {' and '.join(told)}; it needs {' and '.join(_NEEDED)}")
        for row in rows(path, path.name, options.encoding):
            if isinstance(row, Rejected):
                raise InputError(f"patient map {row.source}: {row.reason}")
            patient_id = text_value(row.get("patient_id"))
            shared = text_value(row.get("shared_patient_id"))
            if not patient_id or not shared:
                raise InputError(f"patient map {row.source}: patient_id and shared_patient_id are needed")
            institution = text_value(row.get("institution")) or ""
            if index.add("patient-map", institution, patient_id, value=shared) not in (None, shared):
                raise InputError(f"patient map {row.source}: this patient_id is mapped twice, to different ids")

    def apply(self, record: Shared) -> Shared:
        """Return the record with the shared id of its patient; unchanged where the map has none."""
        if record.patient_id is None:
            return record
        found = None
        if isinstance(record, Note):
            found = self._index.get("patient-map", record.institution, record.patient_id)
        found = found or self._index.get("patient-map", "", record.patient_id)
        return replace(record, patient_id=found) if found else record
