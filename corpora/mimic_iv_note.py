"""MIMIC-IV-Note: discharge summaries and radiology reports, with the ICD codes of their admissions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from clinical_nlp.corpora._files import collect, find, listed, loaded, missing
from clinical_nlp.errors import InputError, UsageError, nearest
from clinical_nlp.notes.corpus import Card, Corpus, corpus_path
from clinical_nlp.notes.readers import ReadOptions, read_notes, read_patients
from clinical_nlp.notes.readers.rows import Row, rows, text_value
from clinical_nlp.notes.schema import CODE_SCHEMA, PATIENT_SCHEMA, Record, Skipped

CARD = Card(
    name="mimic_iv_note",
    origin="https://physionet.org/content/mimic-iv-note (Beth Israel Deaconess Medical Center)",
    licence="PhysioNet Credentialed Health Data License 1.5.0: no redistribution, models trained on it included",
    citation="Johnson A et al. MIMIC-IV-Note: deidentified free-text clinical notes, version 2.2. PhysioNet, 2023.",
    size="331,794 discharge summaries of 145,915 patients; 2,321,355 radiology reports of 237,427 patients.",
    institution_means="one constant, BIDMC: every note is from one hospital",
    patient_means="subject_id",
    obtain="apply at https://physionet.org/content/mimic-iv-note/2.2/ and give the folder that holds discharge.csv.gz; "
    "put patients.csv.gz, diagnoses_icd.csv.gz and procedures_icd.csv.gz of MIMIC-IV below it for dates and codes",
    folder="mimic-iv-note",
    contains_phi=True,
)
_TABLES = ("discharge", "radiology")
_ICD_TABLES = (("diagnoses_icd", True), ("procedures_icd", False))
_CODE = re.compile(r"[0-9A-Z]{2,7}")


def load(path: Path | None = None, *, tables: str | Sequence[str] = _TABLES) -> Corpus:
    """Read the notes, and patients and codes where their tables are there.

    Parameters
    ----------
    path : folder with `discharge.csv.gz` and `radiology.csv.gz` (or .csv) at any depth, as many as are there; with
        `patients.csv.gz` below it, `written_at` is moved back into each patient's anchor_year_group (see
        `clinical_nlp.notes.readers.mimic`), without it a split by time means nothing.
    tables : which of the two; a comma-separated string will do. Both together are 2.7 million texts in memory.

    Returns
    -------
    Corpus with notes, patients, and codes of the admissions that have a note here (dotted; ICD-9-CM for both
    diagnoses and procedures of version 9, else ICD-10-CM and ICD-10-PCS). Rows that cannot be used are counted, by
    reason, on the card.
    """
    chosen = [part.strip() for part in tables.split(",")] if isinstance(tables, str) else list(tables)
    for name in chosen:
        if name not in _TABLES:
            raise UsageError(f"corpus option tables: {name!r} is not known{nearest(name, _TABLES)}")
    root = corpus_path(CARD, path)
    if not any(_table(root, name) for name in chosen):
        raise missing(CARD, root, " or ".join(f"{name}.csv.gz" for name in chosen))
    options = ReadOptions(institution="BIDMC")
    notes, left_out = collect(_of_tables(read_notes(root, format="mimic", options=options), chosen))
    if not len(notes):
        raise InputError(f"{root} holds no note that can be read{listed(left_out)}")
    codes = _codes(root, notes, left_out)
    patients = None
    if _table(root, "patients") is not None:
        found = read_patients(root, format="mimic", options=options)
        patients = pa.Table.from_pylist([asdict(patient) for patient in found], schema=PATIENT_SCHEMA)
    counts = f"{len(notes)} notes, {0 if codes is None else len(codes)} codes, dates "
    counts += "by anchor_year_group" if patients is not None else "as released: moved by years, no patients.csv.gz"
    return Corpus(notes=notes, card=loaded(CARD, counts + listed(left_out)), codes=codes, patients=patients)


def _table(root: Path, name: str) -> Path | None:
    return find(root, f"{name}.csv.gz", f"{name}.csv")


def _of_tables(records: Iterable[Record], chosen: Sequence[str]) -> Iterator[Record]:
    for record in records:
        table = Path(record.source).name.split(".")[0]
        if table in chosen:
            yield record
        else:
            yield Skipped(record.source, f"table {table} was not asked for")


def _codes(root: Path, notes: pa.Table, left_out: Counter[str]) -> pa.Table | None:
    files = [(file, diagnosis) for name, diagnosis in _ICD_TABLES if (file := _table(root, name)) is not None]
    if not files:
        return None
    encounters = set(notes["encounter_id"].to_pylist()) - {None}
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for file, diagnosis in files:
        for row in rows(file, file.name, "utf-8"):
            if not isinstance(row, Row):
                left_out[f"rejected ({file.name}: {row.reason})"] += 1
                continue
            subject, encounter, code, version = (
                text_value(row.get(name)) for name in ("subject_id", "hadm_id", "icd_code", "icd_version")
            )
            if subject is None or encounter is None or code is None or not _CODE.fullmatch(code.upper()):
                left_out[f"rejected (row of {file.name} without a patient, an admission or a valid code)"] += 1
            elif version not in ("9", "10"):
                left_out[f"rejected (row of {file.name} whose icd_version is not 9 or 10)"] += 1
            elif encounter not in encounters:
                left_out["skipped (code of an admission that has no note here)"] += 1
            else:
                system, dotted = _dotted(code.upper(), version, diagnosis)
                found.setdefault(
                    (encounter, system, dotted),
                    {
                        "institution": "BIDMC",
                        "patient_id": subject,
                        "encounter_id": encounter,
                        "code": dotted,
                        "system": system,
                    },
                )
    return pa.Table.from_pylist(list(found.values()), schema=CODE_SCHEMA)


def _dotted(code: str, version: str, diagnosis: bool) -> tuple[str, str]:
    """Return (system, code with the dot that MIMIC leaves out); ICD-10-PCS has none."""
    if version == "10" and not diagnosis:
        return "ICD-10-PCS", code
    system = "ICD-10-CM" if version == "10" else "ICD-9-CM"
    whole = 2 if not diagnosis else 4 if version == "9" and code.startswith("E") else 3
    return system, code if len(code) <= whole else f"{code[:whole]}.{code[whole:]}"
