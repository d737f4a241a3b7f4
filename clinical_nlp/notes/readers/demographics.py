"""Patients of table exports."""

from __future__ import annotations

from clinical_nlp.notes.readers.dates import parse_date
from clinical_nlp.notes.readers.options import Reading
from clinical_nlp.notes.readers.rows import Row, text_value
from clinical_nlp.notes.schema import Patient, Rejected

_SEX = {
    **dict.fromkeys(("m", "male", "8507"), "male"),
    **dict.fromkeys(("f", "female", "8532"), "female"),
    **dict.fromkeys(("o", "other", "8521", "x"), "other"),
    **dict.fromkeys(("u", "unknown", "8551", "0"), "unknown"),
}


def sex_of(value: str | None) -> str | None:
    """Return male, female, other or unknown for the usual codes (also OMOP's concepts); None where it is none."""
    return _SEX.get(value.lower()) if value else None


def patient_of(row: Row | Rejected, reading: Reading) -> Patient | None:
    """Return the patient of a row with patient_id, sex, birth_date, death_date; a bad row is counted."""
    patient_id = text_value(row.get("patient_id")) if isinstance(row, Row) else None
    if isinstance(row, Rejected) or patient_id is None:
        reading.remarks["rows of patients could not be read, or have no patient_id"] += 1
        return None
    return Patient(
        patient_id,
        sex=sex_of(text_value(row.get("sex"))),
        birth_date=parse_date(row.get("birth_date")),
        death_date=parse_date(row.get("death_date")),
    )
