"""A hospital's own export, in any format that a reader knows, as a corpus without gold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from clinical_nlp.corpora._files import collect, listed, loaded
from clinical_nlp.errors import InputError, UsageError, nearest
from clinical_nlp.notes.corpus import Card, Corpus, corpus_path
from clinical_nlp.notes.readers import FORMATS, ReadOptions, read_notes, read_patients
from clinical_nlp.notes.schema import PATIENT_SCHEMA

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


def load(path: Path | None = None, *, format: str, **options: Any) -> Corpus:
    """Read an export into memory.

    Parameters
    ----------
    path : folder or file of the export.
    format : fhir, omop, mimic, table, brat, iob or text.
    options : fields of `clinical_nlp.notes.readers.ReadOptions`, as `corpus.options.KEY`; lists may be written with
        commas.

    Returns
    -------
    Corpus with notes and patients. What was skipped or rejected is counted, by reason, on the card.

    Raises
    ------
    UsageError : an unknown format or option.
    InputError : the export holds no note that can be read.
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
    return Corpus(
        notes=notes,
        card=loaded(card, f"{len(notes)} notes{listed(left_out)}"),
        patients=pa.Table.from_pylist(rows, schema=PATIENT_SCHEMA),
    )


def read_options(values: Mapping[str, Any]) -> ReadOptions:
    """Turn the options of this corpus into those of the readers; one that they do not know is an error."""
    known = [item.name for item in fields(ReadOptions)]
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise UsageError(f"corpus option {name!r} is not known{nearest(name, ['format', *known])}")
        if name in _PATHS and value is not None:
            value = Path(value)
        elif name == "languages":
            value = tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else tuple(value)
        given[name] = value
    return ReadOptions(**given)
