"""OMOP CDM v5.4 NOTE_NLP: one row a mention, with the columns, order and lengths of the specification."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clinical_nlp.errors import MissingDataError, UsageError

NOTE_NLP_SCHEMA = pa.schema(
    [
        pa.field("note_nlp_id", pa.int64(), nullable=False),
        pa.field("note_id", pa.int64(), nullable=False),
        pa.field("section_concept_id", pa.int64()),
        pa.field("snippet", pa.string()),
        pa.field("offset", pa.string()),
        pa.field("lexical_variant", pa.string(), nullable=False),
        pa.field("note_nlp_concept_id", pa.int64()),
        pa.field("note_nlp_source_concept_id", pa.int64()),
        pa.field("nlp_system", pa.string()),
        pa.field("nlp_date", pa.date32(), nullable=False),
        pa.field("nlp_datetime", pa.timestamp("us")),
        pa.field("term_exists", pa.string()),
        pa.field("term_temporal", pa.string()),
        pa.field("term_modifiers", pa.string()),
    ]
)
"""OMOP `integer` is written as 64 bits: a large hospital has more mentions than 32 bits can number."""

_UNDATED = date(1970, 1, 1)
_SNIPPET = 250
_TEMPORAL = {"current": "present", "historical": "past", "future": "future"}


def snippet(text: str, start: int, end: int) -> str:
    """Return the mention with what stands around it on one line, at most 250 characters."""
    room = max(0, _SNIPPET - (end - start))
    begin = max(0, start - room // 2)
    return " ".join(text[begin : begin + _SNIPPET].split())


def read_vocabulary(path: Path) -> dict[str, tuple[int, int]]:
    """Read which OMOP concept stands for which code of the terminology.

    Parameters
    ----------
    path : CSV with the columns `concept_code` (`HP:0001250`), `concept_id` (the standard concept) and, if wanted,
        `source_concept_id`.

    Returns
    -------
    code -> (concept_id, source_concept_id or 0).
    """
    if not path.is_file():
        raise MissingDataError(f"vocabulary {path} does not exist")
    found: dict[str, tuple[int, int]] = {}
    line = 1
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            rows = csv.DictReader(handle)
            missing = {"concept_code", "concept_id"} - set(rows.fieldnames or ())
            if missing:
                raise UsageError(f"vocabulary {path} has no column {' and no column '.join(sorted(missing))}")
            for row in rows:
                line = rows.line_num
                found[row["concept_code"].strip()] = (int(row["concept_id"]), int(row.get("source_concept_id") or 0))
    except (ValueError, AttributeError, TypeError, csv.Error):
        raise UsageError(f"vocabulary {path}, line {line}: not a code and an integer concept_id") from None
    return found


def note_nlp_table(
    mentions: pa.Table | Iterable[Mapping[str, Any]],
    *,
    note_ids: Mapping[tuple[str, str], int],
    first_id: int,
    nlp_system: str,
    vocabulary: Mapping[str, tuple[int, int]] | None = None,
    nlp_date: date | None = None,
) -> pa.Table:
    """Turn mentions into NOTE_NLP rows.

    Parameters
    ----------
    mentions : a table of `MENTION_SCHEMA` with the column `snippet`, or its rows.
    note_ids : (institution, note_id) -> the integer id of the note.
    first_id : `note_nlp_id` of the first row; the others follow one by one.
    nlp_system : name and version.
    vocabulary : code -> (concept_id, source_concept_id); a code that is not in it gets concept 0.
    nlp_date : date of processing to write; without it a row carries its note's date (1970-01-01 where the note has
        none), so that the same input always gives the same bytes.

    Notes
    -----
    `term_exists` is Y only for what is affirmed of the patient as a fact: negation, another experiencer, a
    conditional, hypothetical, generic, planned or uncertain mention gives N. The specification grades certainty and
    draws its line at very low; assertions here have one uncertain grade that includes "rule out", so the whole grade
    falls on the safe side and `term_modifiers` says which of the two it was.
    """
    vocabulary = vocabulary or {}
    table = mentions if isinstance(mentions, pa.Table) else _table(mentions)
    said = list(zip(*(table[name].to_pylist() for name in _SAID), strict=True))
    rendered = {values: _rendered(dict(zip(_SAID, values, strict=True))) for values in set(said)}
    concepts = [vocabulary.get(concept or "", (0, 0)) for concept in table["concept_id"].to_pylist()]
    ids = zip(table["institution"].to_pylist(), table["note_id"].to_pylist(), strict=True)
    dates = table["written_at"].cast(pa.date32()).fill_null(_UNDATED)
    n_rows = len(table)
    columns = {
        "note_nlp_id": range(first_id, first_id + n_rows),
        "note_id": [note_ids[key] for key in ids],
        "section_concept_id": [0] * n_rows,
        "snippet": pc.utf8_slice_codeunits(table["snippet"], 0, _SNIPPET),
        "offset": table["start"].cast(pa.string()),
        "lexical_variant": pc.utf8_slice_codeunits(table["text"], 0, 250),
        "note_nlp_concept_id": [concept for concept, _ in concepts],
        "note_nlp_source_concept_id": [source for _, source in concepts],
        "nlp_system": [nlp_system[:250]] * n_rows,
        "nlp_date": dates if nlp_date is None else [nlp_date] * n_rows,
        "nlp_datetime": [None] * n_rows,
        "term_exists": [rendered[values][0] for values in said],
        "term_temporal": [rendered[values][1] for values in said],
        "term_modifiers": [rendered[values][2] for values in said],
    }
    arrays = [
        column.combine_chunks() if isinstance(column, pa.ChunkedArray) else pa.array(column, field.type)
        for field, column in zip(NOTE_NLP_SCHEMA, columns.values(), strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=NOTE_NLP_SCHEMA)


_SAID = ("presence", "temporality", "modality", "experiencer", "section", "concept_id")
_READ = (*_SAID, "institution", "note_id", "written_at", "snippet", "start", "text")


def _table(mentions: Iterable[Mapping[str, Any]]) -> pa.Table:
    kinds: dict[str, pa.DataType] = {"written_at": pa.timestamp("us", tz="UTC"), "start": pa.int64()}
    schema = pa.schema([pa.field(name, kinds.get(name, pa.string())) for name in _READ])
    return pa.Table.from_pylist([{name: mention[name] for name in _READ} for mention in mentions], schema=schema)


def _rendered(mention: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return term_exists, term_temporal and term_modifiers of what a mention says."""
    exists = (
        mention["presence"] == "present"
        and mention["experiencer"] == "patient"
        and mention["modality"] == "actual"
        and mention["temporality"] != "future"
    )
    return "Y" if exists else "N", _TEMPORAL[mention["temporality"]], _modifiers(mention)[:2000]


def _modifiers(mention: Mapping[str, Any]) -> str:
    def flag(value: bool) -> str:
        return "true" if value else "false"

    parts = {
        "Negation": flag(mention["presence"] == "absent"),
        "Subject": mention["experiencer"],
        "Conditional": flag(mention["modality"] == "conditional"),
        "Hypothetical": flag(mention["modality"] == "hypothetical"),
        "Generic": flag(mention["modality"] == "generic"),
        "Uncertain": flag(mention["presence"] == "uncertain"),
        "History": flag(mention["temporality"] == "historical"),
        "Section": mention["section"] or "",
        "Source_code": mention["concept_id"] or "",
    }
    return ";".join(f"{name}={value}" for name, value in parts.items() if value)
