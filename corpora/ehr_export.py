"""A hospital's own export, in any format that a reader knows; with a table of codes, or the spans of BRAT files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from clinical_nlp.corpora._files import collect, listed, loaded, read_rows
from clinical_nlp.errors import InputError, MissingDataError, UsageError, nearest
from clinical_nlp.notes.corpus import Card, Corpus, corpus_path
from clinical_nlp.notes.readers import FORMATS, ReadOptions, read_notes, read_patients
from clinical_nlp.notes.readers.brat import read_spans
from clinical_nlp.notes.schema import CODE_SCHEMA, PATIENT_SCHEMA

CARD = Card(
    name="ehr_export",
    origin="your own export",
    licence="yours; notes stay where they are",
    citation="none",
    size="As exported.",
    institution_means="what the export names at the level chosen with institution_from",
    patient_means="the patient of the export, or of the patient map where one is given",
    obtain="give the folder or file of the export as corpus.path and its format as corpus.options.format",
    contains_phi=True,
)
_DEFAULT_LEVEL = {
    "fhir": "custodian",
    "omop": "care_site",
    "mimic": "the constant BIDMC",
    "table": "the column for institution",
}
_PATHS = ("attachments", "patient_map", "scratch")


def load(path: Path | None = None, *, format: str, codes: str | None = None, **options: Any) -> Corpus:
    """Read an export into memory.

    Parameters
    ----------
    path : folder or file of the export.
    format : fhir, omop, mimic, table, brat, iob or text.
    codes : CSV file (plain or gzip) of the codes of encounters or notes, see `read_codes`.
    options : fields of `clinical_nlp.notes.readers.ReadOptions`, as `corpus.options.KEY`; lists may be written with
        commas.

    Returns
    -------
    Corpus with notes, patients, codes, and the spans of BRAT files. What was skipped or rejected is counted, by reason,
    on the card.

    Raises
    ------
    UsageError : an unknown format or option.
    InputError : the export holds no note that can be read, or a row of codes cannot.
    """
    if format not in FORMATS:
        raise UsageError(f"format {format!r} is not known{nearest(format, FORMATS)}")
    source = corpus_path(CARD, path)
    chosen = read_options(options)
    notes, left_out = collect(read_notes(source, format=format, options=chosen))
    if not len(notes):
        raise InputError(f"{source} holds no {format} note that can be read{listed(left_out)}")
    rows = [
        {name: getattr(patient, name) for name in PATIENT_SCHEMA.names}
        for patient in read_patients(source, format=format, options=chosen)
    ]
    level = chosen.institution_from or (
        f"the constant {chosen.institution}" if chosen.institution else _DEFAULT_LEVEL.get(format, "none")
    )
    card = replace(CARD, institution_means=f"what the {format} export names at the level chosen: {level}")
    table = None if codes is None else read_codes(Path(codes), notes, left_out)
    spans = read_gold(source, chosen, notes, left_out) if format == "brat" else None
    counts = f"{len(notes)} notes" + ("" if table is None else f", {len(table)} codes")
    counts += "" if spans is None else f", {len(spans)} spans"
    return Corpus(
        notes=notes,
        card=loaded(card, counts + listed(left_out)),
        codes=table,
        spans=spans,
        patients=pa.Table.from_pylist(rows, schema=PATIENT_SCHEMA),
    )


def read_codes(path: Path, notes: pa.Table, left_out: Counter[str]) -> pa.Table:
    """Read a table of codes and join it with the notes.

    Its columns are `code`; `encounter_id`, `note_id` or both; `system` (ICD-10-CM where there is no such column); and
    `institution`, which may be left out where no id is there at two institutions. Rows of encounters and notes that
    the export does not hold are counted in `left_out`.

    Raises
    ------
    MissingDataError : there is no such file.
    InputError : a column is missing, a row names neither code nor owner, or an id is there at several institutions.
    """
    if not path.is_file():
        raise MissingDataError(f"table of codes {path} does not exist")
    owners: dict[tuple[str, str], dict[str, str]] = {}
    for note in notes.select(["institution", "patient_id", "encounter_id", "note_id"]).to_pylist():
        for kind in ("encounter_id", "note_id"):
            if note[kind] is not None:
                owners.setdefault((kind, note[kind]), {})[note["institution"]] = note["patient_id"]
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for line, row in read_rows(path, ["code"]):
        code, note_id, encounter = (row.get(name, "").strip() for name in ("code", "note_id", "encounter_id"))
        if not code or not (note_id or encounter):
            raise InputError(f"{path}, line {line}: no code, or neither note_id nor encounter_id; fill it in")
        patients = owners.get(("note_id", note_id) if note_id else ("encounter_id", encounter), {})
        institution = row.get("institution", "").strip()
        if institution:
            patients = {name: patient for name, patient in patients.items() if name == institution}
        if len(patients) > 1:
            raise InputError(
                f"{path}, line {line}: its id is there at {len(patients)} institutions; add a column institution"
            )
        if not patients:
            left_out["skipped (code of what the export does not hold)"] += 1
            continue
        [(institution, patient)] = patients.items()
        system = row.get("system", "").strip() or "ICD-10-CM"
        found.setdefault(
            (institution, encounter, note_id, system, code),
            {
                "institution": institution,
                "patient_id": patient,
                "encounter_id": encounter or None,
                "note_id": note_id or None,
                "code": code,
                "system": system,
            },
        )
    return pa.Table.from_pylist(list(found.values()), schema=CODE_SCHEMA)


def read_gold(source: Path, options: ReadOptions, notes: pa.Table, left_out: Counter[str]) -> pa.Table | None:
    """Read the spans of BRAT files, for the notes that were read.

    Returns
    -------
    None where a text has no `.ann` file beside it: of such a note nothing is known, and it must not be learned as one
    without spans. How many there are is counted in `left_out`.
    """
    folder = source if source.is_dir() else source.parent
    if bare := sum(not (folder / name).with_suffix(".ann").is_file() for name in notes["source"].to_pylist()):
        left_out["without .ann file, so that no spans are read"] += bare
        return None
    found = read_spans(source, options)
    left_out.update(f"rejected ({item.reason})" for item in found.rejected)
    here = set(zip(notes["institution"].to_pylist(), notes["note_id"].to_pylist(), strict=True))
    keys = zip(found.table["institution"].to_pylist(), found.table["note_id"].to_pylist(), strict=True)
    return found.table.filter(pa.array([key in here for key in keys], pa.bool_()))


def read_options(values: Mapping[str, Any]) -> ReadOptions:
    """Turn the options of this corpus into those of the readers; one that they do not know is an error."""
    known = [item.name for item in fields(ReadOptions)]
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise UsageError(f"corpus option {name!r} is not known{nearest(name, ['format', 'codes', *known])}")
        if name in _PATHS and value is not None:
            value = Path(value)
        elif name == "languages":
            value = tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else tuple(value)
        given[name] = value
    return ReadOptions(**given)
