"""What a batch is: its config, the plan it was begun with, and the shards that the export is cut into."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from clinical_nlp.config import Config
from clinical_nlp.errors import MissingDataError, RunError, UsageError
from clinical_nlp.notes.readers import ReadOptions
from clinical_nlp.notes.schema import Note, Record, Rejected
from clinical_nlp.notes.writers.athena import athena_files, read_athena
from clinical_nlp.notes.writers.note_nlp import read_vocabulary
from clinical_nlp.progress import say
from clinical_nlp.runs import Run, file_digest, write_json

SYSTEM = f"clinical_nlp {version('clinical_nlp')}"
"""Name and version, as NOTE_NLP and the phenopackets state it."""
_ATHENA = "athena:"


class ExtractionConfig(Config):
    """Extract phenotypes from every note of an export, and gather them by patient."""

    source: str = Field(min_length=1)
    """The export: a file or a folder."""
    format: str
    """How it is laid out: fhir, omop, mimic, table, brat, iob or text; or catalog, where the source is the name of a
    table of the Spark session, with the columns of a table (engine spark)."""
    model: str | None = None
    """Directory of an ner run whose entities are added to the dictionary's, or of a link run, which links what the
    dictionary misses."""
    verify: str | None = None
    """A causal language model (directory of a dapt or report run, a local model folder, or builtin:tiny) that is asked
    where the lanes disagree, and picks from listed concepts alone; see the column `verified` of mentions."""
    assertion: str | None = None
    """Directory of an assertion run, whose classifier corrects what the rules say of a mention (present, absent, of the
    family, ...) where it is sure enough."""
    terminology: str = "hpo"
    """hpo, hpo_wide, icd10cm, or a file of your own (.obo, .json, .csv). athena:DIR is hpo with --vocabulary DIR."""
    measurements: bool = False
    """Also read measured values as concepts of HPO (`Na 128`, `LVEF 25 %`, lane measurement). Where a threshold depends
    on age or sex, the note has to say them; a value that could be normal for anyone it may be about is left alone."""
    engine: Literal["local", "spark"] = Field(default="local", exclude=True)
    """Where the work is done: processes on this machine, or Spark (the session that is active, else a local one). The
    outputs are the same bytes."""
    workers: int = Field(default=1, ge=1, exclude=True)
    """Processes, or threads of a local Spark session. With 1 the work is done in this process, and a note that kills it
    is rejected by --resume; with 2 or more, or on Spark, the rest go on at once. The outputs are the same bytes."""
    languages: list[str] = Field(default_factory=lambda: ["en"])
    """Languages to process; notes in others are skipped and counted. An empty list means all."""
    default_language: str = "en"
    """Language of a note whose export does not say."""
    encoding: str = "utf-8"
    """Character set of files that do not say theirs."""
    line_separator: str = "\n"
    """Put between the rows of a note that a table stores in several rows."""
    institution_from: str | None = None
    """Which level of the export is the institution (custodian, serviceProvider, care_site, or a column)."""
    institution: str | None = None
    """One institution name for all notes."""
    columns: dict[str, str] = Field(default_factory=dict)
    """For a table: which column holds what, as columns.text=body."""
    attachments: str | None = None
    """Folder in which attachment URLs are looked up."""
    patient_map: str | None = None
    """File that says which patients of different sources are the same person."""
    vocabulary: str | None = None
    """For the concept columns of NOTE_NLP, which are 0 without it: the folder of an unpacked Athena download (with
    CONCEPT.csv and CONCEPT_RELATIONSHIP.csv; of HPO, ICD10CM, or the NAME of ids written NAME:CODE), or a CSV with
    concept_code, concept_id and perhaps source_concept_id."""
    processed_on: date | None = None
    """Date to state as nlp_date and as the creation of phenopackets; default the date of the note, or of the patient's
    latest note, so that the same input gives the same bytes."""
    propagate: bool = False
    """Add to patients the ancestors of what is present and the descendants of what is excluded."""
    shard_notes: int = Field(default=500, ge=1)
    """Records in a shard; an interruption costs at most the shards in work."""
    shard_characters: int = Field(default=4_000_000, ge=1)
    """A shard is closed early when its notes hold this many characters."""

    @model_validator(mode="before")
    @classmethod
    def _athena(cls, values: Any) -> Any:
        """Take `athena:DIR` apart: what is looked for in notes is HPO, what the folder adds are OMOP concepts."""
        terminology = values.get("terminology") if isinstance(values, dict) else None
        if not isinstance(terminology, str) or not terminology.startswith(_ATHENA):
            return values
        folder = terminology.removeprefix(_ATHENA)
        if not folder or values.get("vocabulary") not in (None, folder):
            raise ValueError("athena:DIR names one folder, and stands for hpo with --vocabulary DIR: give one of them")
        return {**values, "terminology": "hpo", "vocabulary": folder}

    def read_options(self, scratch: Path) -> ReadOptions:
        """Return what the readers need."""
        return ReadOptions(
            languages=tuple(self.languages),
            default_language=self.default_language,
            encoding=self.encoding,
            line_separator=self.line_separator,
            institution_from=self.institution_from,
            institution=self.institution,
            columns=self.columns,
            attachments=None if self.attachments is None else Path(self.attachments),
            patient_map=None if self.patient_map is None else Path(self.patient_map),
            scratch=scratch,
        )


@dataclass(frozen=True, slots=True)
class Shard:
    """A run of consecutive records of the export; `first` is the running number of the first.

    `known` holds, by their place in `records`, the outcomes of notes that an earlier run has annotated already.
    """

    index: int
    first: int
    records: tuple[Record, ...]
    known: Mapping[int, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Digest of everything about the records that can change an output."""
        digest = hashlib.sha256()
        for record in self.records:
            fields = {name: getattr(record, name) for name in record.__slots__ if name != "text"}
            if isinstance(record, Note):
                fields["text_sha256"] = record.text_sha256
            digest.update(json.dumps([type(record).__name__, fields], default=str).encode())
        return digest.hexdigest()


def cut(records: Iterable[Record], *, shard_notes: int, shard_characters: int) -> Iterator[Shard]:
    """Cut a stream of records into shards, in order; the cuts depend on the records alone."""
    held: list[Record] = []
    index = first = characters = 0
    for record in records:
        record = _encodable(record)
        held.append(record)
        characters += len(record.text) if isinstance(record, Note) else 0
        if len(held) >= shard_notes or characters >= shard_characters:
            yield Shard(index, first, tuple(held))
            index, first, characters, held = index + 1, first + len(held), 0, []
    if held:
        yield Shard(index, first, tuple(held))


def _encodable(record: Record) -> Record:
    """Reject a note whose identifiers no output could hold (lone surrogates out of a JSON escape)."""
    names = [name for name in record.__slots__ if name != "text"]
    broken = {name: value for name in names if isinstance(value := getattr(record, name), str) and not _is_utf8(value)}
    if not broken:
        return record
    repaired: dict[str, Any] = {name: value.encode("utf-8", "replace").decode() for name, value in broken.items()}
    if not isinstance(record, Note):
        return replace(record, **repaired)
    values = {name: repaired.get(name, getattr(record, name)) for name in ("source", "note_id", "patient_id")}
    return Rejected(reason=f"not valid Unicode: {', '.join(broken)}", **values)


def _is_utf8(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def make_plan(config: ExtractionConfig, *, terminology: Any, source: Path, inputs: list[Path]) -> dict[str, Any]:
    """Return what an output depends on, as digests; a resumed batch must find the same."""
    folder = source if source.is_dir() else source.parent
    return {
        "format_version": 1,
        "system": SYSTEM,
        "code": _code_digest(with_tasks=any((config.model, config.verify, config.assertion))),
        "config": config.model_dump(mode="json"),
        "terminology": {
            "name": terminology.name,
            "version": terminology.version,
            "digest": terminology.digest,
        },
        "model": None if config.model is None else _model_digest(Path(config.model)),
        "verify": None if config.verify is None else _verifier_digest(config.verify),
        "assertion": None if config.assertion is None else _classifier_digest(config.assertion),
        "patient_map": _optional_digest(config.patient_map),
        "vocabulary": _vocabulary_digest(config.vocabulary),
        "export": {
            str(path.relative_to(folder) if path.is_relative_to(folder) else path): file_digest(path) for path in inputs
        },
    }


_CHANGED = {
    "export": "the export changed",
    "terminology": "the terminology changed",
    "model": "the model changed",
    "verify": "the model of --verify changed",
    "assertion": "the model of --assertion changed",
    "patient_map": "the patient map changed",
    "vocabulary": "the vocabulary changed",
    "system": "clinical_nlp is another version",
    "code": "the code or the word lists of clinical_nlp changed",
}


def settle_plan(output: Path, plan: dict[str, Any]) -> None:
    """Write the plan of a new batch, or check that a resumed one still has the plan it was begun with.

    Raises
    ------
    RunError : something that the outputs depend on is not what it was.
    """
    file = output / "plan.json"
    if not file.exists():
        write_json(file, plan)
        return
    try:
        begun = json.loads(file.read_text("utf-8"))
    except ValueError:
        raise RunError(f"{file} is damaged; start again with another --output") from None
    for key, value in plan.items():
        if begun.get(key) != value:
            what = _CHANGED.get(key, f"{key} changed")
            raise RunError(f"{output} cannot be resumed: {what} since it was begun; start again with another --output")


def _code_digest(*, with_tasks: bool) -> str:
    """Digest of the code and word lists that decide what is found, so that one output is never of two minds.

    The tasks, which only models need, are counted in where one is used.
    """
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for room in ("notes", "language", "extraction", *(["tasks"] if with_tasks else [])):
        for path in sorted((package / room).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(package).as_posix()} {file_digest(path)}\n".encode())
    return digest.hexdigest()


def _optional_digest(file: str | None) -> str | None:
    if file is None:
        return None
    if not Path(file).is_file():
        raise MissingDataError(f"{file} does not exist, or is no file")
    return file_digest(Path(file))


def read_concepts(config: ExtractionConfig, terminology: Any) -> dict[str, tuple[int, int]] | None:
    """Return the OMOP concepts that the vocabulary of a batch has for its terminology, or None without one."""
    if config.vocabulary is None:
        return None
    path = Path(config.vocabulary)
    if not path.is_dir():
        return read_vocabulary(path)
    found = read_athena(path, terminology.concepts, bare="ICD10CM" if config.terminology == "icd10cm" else None)
    n_standard = sum(standard > 0 for standard, _ in found.values())
    say(
        f"vocabulary {path}: of {len(terminology.concepts)} concepts of {terminology.name}, {len(found)} are OMOP "
        f"concepts and {n_standard} have one standard concept"
    )
    return found


def _vocabulary_digest(name: str | None) -> str | dict[str, str] | None:
    if name is None or not Path(name).is_dir():
        return _optional_digest(name)
    return {table: file_digest(path) for table, path in athena_files(Path(name)).items()}


def _verifier_digest(name: str) -> str | None:
    """Digest of a language model's weights and tokenizer, with those of the adapters on it."""
    from clinical_nlp.tasks.verifying import check_verifier

    return check_verifier(name).digest


def _classifier_digest(name: str) -> str:
    """Digest of an assertion run, with that of the base model that its adapter lies on."""
    from clinical_nlp.tasks.asserting import check_classifier

    resolved = check_classifier(name)
    return f"{_run_digest(Path(name))} {resolved.digest}"


def _model_digest(folder: Path) -> str:
    """Digest of a finished run that marks or links spans.

    Raises
    ------
    UsageError : it is something else.
    """
    from clinical_nlp.models.loading import read_task

    if not folder.is_dir():
        raise MissingDataError(f"--model {folder} is not a run directory")
    try:
        Run.load(folder)
        task = read_task(folder).get("task")
    except UsageError as error:
        raise UsageError(f"--model {folder}: {error}") from None
    if task not in ("ner", "linking"):
        raise UsageError(f"--model {folder}: was trained for {task}; name an ner or a link run")
    return _run_digest(folder)


def _run_digest(folder: Path) -> str:
    """Digest of a run directory without its checkpoints and logs."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if path.is_file() and inner.parts[0] not in ("checkpoints", ".cache") and path.suffix != ".jsonl":
            digest.update(f"{inner.as_posix()} {file_digest(path)}\n".encode())
    return digest.hexdigest()
