"""Tables as Parquet or CSV, the same bytes for the same rows, written atomically."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clinical_nlp.errors import UsageError
from clinical_nlp.runs import write_atomic

MENTION_SCHEMA = pa.schema(
    [
        pa.field("institution", pa.string(), nullable=False),
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("patient_id", pa.string(), nullable=False),
        pa.field("encounter_id", pa.string()),
        pa.field("note_type", pa.string()),
        pa.field("written_at", pa.timestamp("us", tz="UTC")),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("end", pa.int64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("concept_id", pa.string()),
        pa.field("concept_label", pa.string()),
        pa.field("label", pa.string(), nullable=False),
        pa.field("presence", pa.string(), nullable=False),
        pa.field("temporality", pa.string(), nullable=False),
        pa.field("modality", pa.string(), nullable=False),
        pa.field("experiencer", pa.string(), nullable=False),
        pa.field(
            "cues",
            pa.list_(pa.struct([("value", pa.string()), ("start", pa.int64()), ("end", pa.int64())])),
            nullable=False,
        ),
        pa.field("section", pa.string()),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("lane", pa.string(), nullable=False),
        pa.field("copied_from", pa.string()),
        pa.field("sentence_digest", pa.string()),
        pa.field(
            "verified",
            pa.struct(
                [
                    ("why", pa.string()),
                    ("verdict", pa.string()),
                    ("probability", pa.float64()),
                    ("candidates", pa.list_(pa.string())),
                ]
            ),
        ),
    ]
)
"""One row a mention, in the order of the notes. `text` equals `note.text[start:end]`; `label` is the entity type;
`lane` is dictionary, model, both or measurement; `copied_from` is the earliest note of the same patient that holds the
identical sentence, where there is one; `sentence_digest` is equal where the sentences are (white space aside), and null
for a sentence too short to tell; `verified` says why a verifier was asked about the mention, what came of it and among
which concepts (the one that the mention had is first, or there was none), and is null where it was not asked."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def write_table(path: Path, table: pa.Table) -> str:
    """Write a table atomically, as Parquet or (by its suffix) as CSV, and return the sha256 of the file.

    In CSV a text cell that a spreadsheet would run as a formula gets a leading apostrophe, and nested values are
    JSON; Parquet holds the values unchanged.
    """
    if path.suffix == ".parquet":
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        data = buffer.getvalue()
    elif path.suffix == ".csv":
        data = _csv(table)
    else:
        raise UsageError(f"{path.name}: a table is written as .parquet or .csv")
    write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


def _csv(table: pa.Table) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.schema.names)
    for batch in table.to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            writer.writerow([_cell(row[name]) for name in table.schema.names])
    return text.getvalue().encode("utf-8")


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) else value
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value
