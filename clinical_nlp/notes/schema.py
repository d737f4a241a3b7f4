"""What passes between rooms: notes, patients, gold spans, codes, pairs and facts, and the assertion axes.

Offsets are half-open [start, end) in Unicode code points of the unchanged note text, everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa

NOTE_SCHEMA = pa.schema(
    [
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("patient_id", pa.string(), nullable=False),
        pa.field("institution", pa.string(), nullable=False),
        pa.field("encounter_id", pa.string()),
        pa.field("note_type", pa.string()),
        pa.field("written_at", pa.timestamp("us", tz="UTC")),
        pa.field("title", pa.string()),
        pa.field("language", pa.string(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("status", pa.string()),
        pa.field("text_sha256", pa.string(), nullable=False),
    ]
)
"""One row a note. `(institution, note_id)` is unique. `status` is the export's own word where it matters
(`superseded`, `preliminary`); `source` is the file and line or row of origin."""

PATIENT_SCHEMA = pa.schema(
    [
        pa.field("patient_id", pa.string(), nullable=False),
        pa.field("sex", pa.string()),
        pa.field("birth_date", pa.date32()),
        pa.field("death_date", pa.date32()),
    ]
)

PRESENCE = ("present", "absent", "uncertain")
TEMPORALITY = ("current", "historical", "future")
MODALITY = ("actual", "hypothetical", "conditional", "generic")
EXPERIENCER = ("patient", "family", "other")

SPAN_SCHEMA = pa.schema(
    [
        pa.field("institution", pa.string(), nullable=False),
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("end", pa.int64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("hpo_id", pa.string()),
        pa.field("icd10cm_code", pa.string()),
        pa.field("presence", pa.string()),
        pa.field("temporality", pa.string()),
        pa.field("modality", pa.string()),
        pa.field("experiencer", pa.string()),
        pa.field("section", pa.string()),
        pa.field("fact_id", pa.string()),
    ]
)
"""One row a gold span; `label` is the entity type. `text` equals `note.text[start:end]`."""

CODE_SCHEMA = pa.schema(
    [
        pa.field("institution", pa.string(), nullable=False),
        pa.field("patient_id", pa.string(), nullable=False),
        pa.field("encounter_id", pa.string()),
        pa.field("note_id", pa.string()),
        pa.field("code", pa.string(), nullable=False),
        pa.field("system", pa.string(), nullable=False),
    ]
)
"""One row a code of an encounter (or of a note); `system` is ICD-10-CM, ICD-9-CM or ICD-10-PCS."""

PAIR_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("patient_id", pa.string(), nullable=False),
        pa.field("institution", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("source", pa.large_string(), nullable=False),
        pa.field("target", pa.large_string(), nullable=False),
        pa.field("part", pa.string()),
    ]
)
"""One row a text pair for report generation; `kind` is findings_impression, dialogue_note, dialogue_section, ..."""

FACT_SCHEMA = pa.schema(
    [
        pa.field("fact_id", pa.string(), nullable=False),
        pa.field("institution", pa.string(), nullable=False),
        pa.field("patient_id", pa.string(), nullable=False),
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("hpo_id", pa.string()),
        pa.field("icd10cm_code", pa.string()),
        pa.field("presence", pa.string()),
        pa.field("temporality", pa.string()),
        pa.field("modality", pa.string()),
        pa.field("experiencer", pa.string()),
        pa.field("side", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("unit", pa.string()),
    ]
)
"""One row a latent fact that a note was written from; `kind` is finding, drug, procedure or plan."""


@dataclass(frozen=True, slots=True)
class Note:
    """One document about one patient. `text` is decoded once by the reader and never rewritten."""

    note_id: str
    patient_id: str
    institution: str
    text: str
    source: str
    encounter_id: str | None = None
    note_type: str | None = None
    written_at: datetime | None = None
    title: str | None = None
    language: str = "en"
    status: str | None = None

    @property
    def text_sha256(self) -> str:
        """Hex digest of the UTF-8 text; lone surrogates are kept so that no text is unhashable."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()

    def row(self) -> dict[str, Any]:
        """Return the note as a row of `NOTE_SCHEMA`."""
        return {name: getattr(self, name) for name in NOTE_SCHEMA.names}


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that was read and left out on purpose; `rule` names why (`entered-in-error`, `language:de`, ...)."""

    source: str
    rule: str
    note_id: str | None = None
    patient_id: str | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that could not be used; `reason` never holds note text."""

    source: str
    reason: str
    note_id: str | None = None
    patient_id: str | None = None


Record = Note | Skipped | Rejected
"""Every input document becomes exactly one of these."""


@dataclass(frozen=True, slots=True)
class Patient:
    """Demographics of one patient, where the export has them. `sex` is male, female, other or unknown."""

    patient_id: str
    sex: str | None = None
    birth_date: date | None = None
    death_date: date | None = None


@dataclass(frozen=True, slots=True)
class Assertion:
    """What a note says about a span, on four axes, with the cue spans that decided it.

    `presence` (present, absent, uncertain), `temporality` (current, historical, future), `modality` (actual,
    hypothetical, conditional, generic), `experiencer` (patient, family, other). `cues` holds (axis value, start, end).
    """

    presence: str = "present"
    temporality: str = "current"
    modality: str = "actual"
    experiencer: str = "patient"
    cues: tuple[tuple[str, int, int], ...] = ()


def utc(value: datetime) -> datetime:
    """Return `value` in UTC; a time without a zone is taken as UTC."""
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def notes_table(notes: Iterable[Note]) -> pa.Table:
    """Collect notes into a table of `NOTE_SCHEMA`."""
    return pa.Table.from_pylist([note.row() for note in notes], schema=NOTE_SCHEMA)


def iter_notes(table: pa.Table) -> Iterator[Note]:
    """Yield the notes of a table of `NOTE_SCHEMA`, one batch in memory at a time."""
    names = [name for name in NOTE_SCHEMA.names if name != "text_sha256"]
    for batch in table.select(names).to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            yield Note(**row)
