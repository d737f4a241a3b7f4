"""What a reader may be told, and what one reading shares between its steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from clinical_nlp.notes.readers.index import DiskIndex

UNKNOWN_INSTITUTION = "unknown"
"""Institution of a note whose export does not name one at the level that was asked for."""


@dataclass(frozen=True)
class ReadOptions:
    """How an export is read.

    Parameters
    ----------
    languages : notes in other languages are skipped (`language:de`); compared by primary subtag (`en-US` is `en`).
        Empty means every language.
    default_language : language of a note whose export does not say.
    institution_from : the level the institution is taken from: custodian (default) or serviceProvider for fhir,
        care_site (default) or a column of NOTE for omop, a column for table and mimic, folder for brat, iob and text.
        Levels are never mixed: a note without this level gets `institution` if given, else "unknown".
    institution : a constant. Without `institution_from` it is the institution of every note.
    columns : for tables, `{"text": "body"}` says that the note text is in the column `body`.
    attachments : folder with the files that attachment URLs of a FHIR export point to.
    patient_map : table (CSV, JSONL or Parquet) with the columns patient_id and shared_patient_id, optionally
        institution; ids that it does not name stay as they are.
    scratch : folder for on-disk indexes, which are removed at the end; a temporary one if None.
    encoding : character set of files that do not say theirs (tables, text, BRAT, IOB); a byte order mark wins.
    line_separator : put between the rows of a note that a table stores in several rows, unless a row ends in one.
    """

    languages: tuple[str, ...] = ("en",)
    default_language: str = "en"
    institution_from: str | None = None
    institution: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    attachments: Path | None = None
    patient_map: Path | None = None
    scratch: Path | None = None
    encoding: str = "utf-8"
    line_separator: str = "\n"

    def fallback_institution(self) -> str:
        """Return the institution of a note whose export does not name one."""
        return self.institution or UNKNOWN_INSTITUTION


DEFAULT_OPTIONS = ReadOptions()


@dataclass(frozen=True)
class Reading:
    """One pass over a source: the options, the on-disk index, and how often something worth telling was seen."""

    source: Path
    options: ReadOptions
    index: DiskIndex
    remarks: Counter[str] = field(default_factory=Counter)

    def name(self, path: Path) -> str:
        """Return the file's name as it stands in `Note.source`: relative to the source, so equal on every machine."""
        return path.relative_to(self.source).as_posix() if path != self.source else path.name
