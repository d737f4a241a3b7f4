"""A sample of notes from exports: which sources and windows of time are read, and where every record went."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from clinical_nlp.config import Config, CorpusConfig
from clinical_nlp.errors import InputError, MissingDataError, UsageError
from clinical_nlp.notes.corpus import corpus_module, load_corpus
from clinical_nlp.notes.readers import FORMATS, ReadOptions, input_files, read_notes
from clinical_nlp.notes.schema import Note, Record, Rejected, Skipped, iter_notes
from clinical_nlp.progress import progress, say
from clinical_nlp.runs import file_digest, write_atomic
from clinical_nlp.statistics.sample import NoteSampler, SampledNotes


class ExportConfig(Config):
    """Notes of institutions, and how many of them to take."""

    sources: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Exports to compare: files or folders, or profiles (from `clinical-nlp profile`). Without any, the corpus is
    used."""
    format: Literal["fhir", "omop", "mimic", "table", "brat", "iob", "text"] | None = None
    """Format of the sources; without it, told from the names of their files."""
    institution_from: str | None = None
    """Where the institution is read (custodian, serviceProvider, care_site, a column); `source`: each source is one
    institution, named by its file or folder."""
    columns: dict[str, str] = Field(default_factory=dict)
    """For tables: which column holds what, as `columns.text=body`."""
    languages: list[str] = Field(default_factory=lambda: ["en"])
    """Languages of the notes to compare; others are skipped and counted."""
    patient_map: str | None = None
    """Table that says which patient ids are one person."""
    shared_patients: bool = False
    """Whether equal patient ids in different sources are one person (two extracts of one system)."""
    corpus: CorpusConfig = CorpusConfig()
    """The corpus to use without sources."""
    window: Literal["none", "month", "quarter", "year"] = "none"
    """Take the notes of each month, quarter or year of an institution as an institution of their own (drift over time);
    notes without a date are skipped and counted."""
    patient_in_two: Literal["majority", "drop", "error"] = "majority"
    """A patient of several institutions stands where most of their notes are (the rest is left out and counted), is
    left out, or stops the run."""
    max_patients: int = Field(default=1000, ge=2)
    """Patients sampled in each institution."""
    max_notes_per_patient: int = Field(default=10, ge=1)
    """Notes sampled of each patient."""
    seed: int = 0
    """Of the sample, the folds, the representation and the relabellings."""


def read_sample(
    config: ExportConfig, folder: Path | None, note: Callable[..., None]
) -> tuple[SampledNotes, dict[str, Any]]:
    """Stream all notes through the sampler; every record is a note, skipped by a rule, or rejected.

    Parameters
    ----------
    config : the sources.
    folder : where the list of rejected records is written; None: they are only counted.
    note : takes what belongs into the manifest.
    """
    sampler = NoteSampler(
        max_patients=config.max_patients, max_notes_per_patient=config.max_notes_per_patient, seed=config.seed
    )
    skipped: Counter[str] = Counter()
    rejected: list[dict[str, str | None]] = []
    sources_of: dict[str, set[int]] = {}
    n_notes = 0
    joint = config.shared_patients or config.patient_map is not None
    means = "what the sources name"
    with progress("reading", unit="records") as bar:
        for index, read in _records(config, note):
            bar.advance()
            record = _in_window(read, config.window) if isinstance(read, Note) else read
            if isinstance(record, Skipped):
                skipped[record.rule] += 1
            elif isinstance(record, Rejected):
                rejected.append({"source": record.source, "reason": record.reason, "note_id": record.note_id})
            else:
                n_notes += 1
                sources_of.setdefault(record.patient_id, set()).add(index)
                patient = record.patient_id if joint else f"{index}/{record.patient_id}"
                sampler.add(record, patient=patient)
    if not n_notes:
        raise InputError(f"no note could be read ({sum(skipped.values())} records skipped, {len(rejected)} rejected)")
    if rejected and folder is None:
        say(f"{len(rejected)} records rejected")
    elif rejected and folder is not None:
        lines = "".join(json.dumps(entry) + "\n" for entry in rejected)
        write_atomic(folder / "rejected.jsonl", lines)
        say(f"{len(rejected)} records rejected; see {folder / 'rejected.jsonl'}")
    if config.sources:
        level = config.institution_from or "the default level of the format"
        means = "the source it was read from" if level == "source" else f"the institution at {level}"
    else:
        means = corpus_module(config.corpus.name).CARD.institution_means
    if config.window != "none":
        means = f"{means.rstrip('.')}, in one {config.window}"
    sample = sampler.finish(config.patient_in_two)
    note(n_notes=n_notes, n_skipped=sum(skipped.values()), n_rejected=len(rejected))
    return sample, {
        "n_records": n_notes + sum(skipped.values()) + len(rejected),
        "n_notes": n_notes,
        "skipped": dict(sorted(skipped.items())),
        "n_rejected": len(rejected),
        "n_ids_in_several_sources": sum(len(found) > 1 for found in sources_of.values()),
        "ids_joined": joint,
        "institution_means": means,
    }


def _in_window(note: Note, window: str) -> Note | Skipped:
    """Name the institution of a note by its window of time too."""
    if window == "none":
        return note
    if note.written_at is None:
        return Skipped(note.source, "no date")
    when = note.written_at
    names = {"year": f"{when:%Y}", "quarter": f"{when:%Y}-Q{(when.month + 2) // 3}", "month": f"{when:%Y-%m}"}
    return replace(note, institution=f"{note.institution} {names[window]}")


def _records(config: ExportConfig, note: Callable[..., None]) -> Iterator[tuple[int, Record]]:
    """Yield each record with the number of its source."""
    if not config.sources:
        corpus = load_corpus(config.corpus.name, config.corpus.path, **config.corpus.options)
        note(inputs={"corpus": corpus.card.name, "n_notes": corpus.notes.num_rows})
        for row in iter_notes(corpus.notes):
            yield 0, row
        return
    paths = [Path(source) for source in config.sources]
    by_source = config.institution_from == "source"
    names = [_source_name(path) for path in paths]
    if by_source and len(set(names)) < len(names):
        raise UsageError("with institution_from=source every source needs its own name; two have the same")
    formats = [config.format or detect_format(path) for path in paths]
    for index, (path, format) in enumerate(zip(paths, formats, strict=True)):
        # `source` is this recipe's level, not the reader's: the reader sees a constant.
        options = ReadOptions(
            languages=tuple(config.languages),
            institution_from=None if by_source else config.institution_from,
            institution=names[index] if by_source else None,
            columns=config.columns,
            patient_map=None if config.patient_map is None else Path(config.patient_map),
        )
        files = input_files(path, format)
        digest = hashlib.sha256("".join(file_digest(file) for file in files).encode()).hexdigest()
        note(inputs={f"source {index + 1}": {"format": format, "n_files": len(files), "sha256": digest}})
        for record in read_notes(path, format=format, options=options):
            yield index, record


def _source_name(path: Path) -> str:
    name = path.resolve().name
    return name if path.is_dir() else name.split(".")[0]


def detect_format(source: Path) -> str:
    """Tell the format of an export from the names of its files.

    Raises
    ------
    MissingDataError : there is nothing at `source`.
    UsageError : the names say nothing.
    """
    if not source.exists():
        raise MissingDataError(f"no such file or folder: {source}")
    paths = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    names = [path.name.lower().removesuffix(".gz") for path in paths]
    stems = {name.split(".")[0] for name in names}
    if any(name.endswith(".ndjson") or name.startswith(("documentreference", "diagnosticreport")) for name in names):
        return "fhir"
    if stems & {"noteevents", "discharge", "radiology"}:
        return "mimic"
    if "note" in stems or any(name.endswith((".duckdb", ".db")) for name in names):
        return "omop"
    if any(name.endswith(".ann") for name in names):
        return "brat"
    if any(name.endswith((".csv", ".parquet", ".jsonl", ".tsv")) for name in names):
        return "table"
    if any(name.endswith(".txt") for name in names):
        return "text"
    raise UsageError(f"{source}: the format cannot be told from the file names; give --format ({', '.join(FORMATS)})")
