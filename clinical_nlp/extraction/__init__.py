"""Phenotypes in batch: from every note of an export to every patient, resumable, with nothing lost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinical_nlp.errors import ClinicalNlpError, InputError, MissingDataError, RunError, UsageError

STAGE = ".work"
"""Folder inside the output for what is gone when the batch ends."""
CATALOG = "catalog"
"""The format of a source that is a table of the Spark session."""

if TYPE_CHECKING:
    from clinical_nlp.extraction.plan import ExtractionConfig, Shard
    from clinical_nlp.extraction.update import Previous


@dataclass(frozen=True)
class Update:
    """What an update changed: notes by what happened to them, and the patients whose results were made anew.

    A patient is named by id, as `institution/id` where ids are an institution's own; one whose last note is gone is
    among them.
    """

    added: int
    amended: int
    deleted: int
    patients_touched: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"update: {self.added} notes added, {self.amended} amended, {self.deleted} deleted; "
            f"{len(self.patients_touched)} patients touched (listed in manifest.json)"
        )


@dataclass(frozen=True)
class Extraction:
    """What a batch did, in numbers, and where the result is.

    `records` is every note that the export holds; `done + skipped + rejected` equals it. `verified` counts the mentions
    that a verifier was `asked` about, by why it was asked and by verdict; it is empty without one.
    """

    output: Path
    records: int
    done: int
    skipped: int
    rejected: int
    skipped_by_rule: Mapping[str, int] = field(default_factory=dict)
    rejected_by_reason: Mapping[str, int] = field(default_factory=dict)
    mentions: int = 0
    patients: int = 0
    patient_concepts: int = 0
    phenopackets: int = 0
    verified: Mapping[str, int] = field(default_factory=dict)
    shards: int = 0
    shards_reused: int = 0
    update: Update | None = None

    def __str__(self) -> str:
        lines = [
            f"{self.records} notes = {self.done} done + {self.skipped} skipped + {self.rejected} rejected",
            *(f"  skipped {count}: {rule}" for rule, count in self.skipped_by_rule.items()),
            *(f"  rejected {count}: {reason}" for reason, count in self.rejected_by_reason.items()),
            f"{self.mentions} mentions; {self.patients} patients with {self.patient_concepts} concepts; "
            f"{self.phenopackets} phenopackets",
            *([_verified_line(self.verified)] if self.verified else []),
            *([] if self.update is None else [str(self.update)]),
            f"result: {self.output}",
        ]
        return "\n".join(lines)


def extract(
    source: str | os.PathLike[str],
    *,
    format: str,
    output: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    verify: str | os.PathLike[str] | None = None,
    assertion: str | os.PathLike[str] | None = None,
    terminology: str | os.PathLike[str] = "hpo",
    engine: str = "local",
    workers: int = 1,
    resume: bool = False,
    update: bool = False,
    retry_rejected: bool = False,
    **options: Any,
) -> Extraction:
    """Extract phenotypes from an export.

    Parameters
    ----------
    source : file or folder of the export; for the format catalog, the name of a table of the Spark session.
    format : fhir, omop, mimic, table, brat, iob, text or catalog.
    output : directory of the result; a new one, or with `resume` one that was interrupted.
    model : directory of an ner run, whose entities are added to the dictionary's, or of a link run, which links what
        the dictionary misses.
    verify : a causal language model (directory of a dapt or report run, a local model folder, or `builtin:tiny`) that
        is asked where the lanes disagree; see `clinical_nlp.tasks.verifying`. It picks one of the listed concepts or
        none of them. No mention is added or removed: one that means none of them loses its concept and keeps its row,
        one that the model cannot decide stays as it was, and the column `verified` says which.
    assertion : directory of an assertion run. Its classifier corrects what the rules say of each mention, where it is
        as sure as the run found right on development patients; the rules decide the rest.
    terminology : hpo, hpo_wide, icd10cm or a file; `athena:DIR` is hpo with `vocabulary=DIR`.
    engine : local or spark (the session that is active, else a local one; it is left open in the first case). The
        outputs are byte for byte the same.
    workers : processes; the outputs are byte for byte the same for any number. With 2 or more, a note that kills its
        process is rejected and the rest go on; with 1 it ends the batch, and is rejected by `resume`.
    resume : go on where an earlier call was interrupted. Shards that are done and verify are not done again; the
        outputs are byte for byte those of an uninterrupted call (`manifest.json`, which holds times, apart).
    update : bring a finished output to the state of the export (the same or another source). Notes that are the same
        are not annotated again, files of patients that none of the changes touch stay; the outputs are byte for byte
        those of a fresh call. The new output is built beside the old one, which stays whole until then.
    retry_rejected : annotate the notes again that were rejected in extraction, each apart from this process.
    options : any other field of `ExtractionConfig` (languages, institution_from, columns, measurements, ...).

    Returns
    -------
    Extraction. The directory holds `mentions/`, `note_nlp/`, `note_id_map.parquet`, `patients/`, `phenopackets/` (for
    HPO), `fhir/`, `notes/` (one row a record: done, skipped or rejected), `rejected/`, `ledger/`, `plan.json`,
    `config.yaml` and `manifest.json`.

    Raises
    ------
    UsageError : an option or the source is wrong.
    InputError : the export holds no notes.
    RunError : the output is in use, finished, or was begun from other input; the disk is full.
    """
    from clinical_nlp.config import validate
    from clinical_nlp.extraction.plan import ExtractionConfig

    paths = {
        name: os.fspath(options[name]) for name in ("attachments", "patient_map", "vocabulary") if options.get(name)
    }
    config = validate(
        ExtractionConfig,
        {
            **options,
            **paths,
            "source": os.fspath(source),
            "format": format,
            "model": None if model is None else os.fspath(model),
            "verify": None if verify is None else os.fspath(verify),
            "assertion": None if assertion is None else os.fspath(assertion),
            "terminology": os.fspath(terminology),
            "engine": engine,
            "workers": workers,
        },
    )
    return extract_with(config, Path(output), resume=resume, update=update, retry_rejected=retry_rejected)


def extract_with(
    config: ExtractionConfig,
    output: Path,
    *,
    resume: bool = False,
    update: bool = False,
    retry_rejected: bool = False,
) -> Extraction:
    """Do what `extract` does, from a config."""
    from clinical_nlp.extraction.update import finish_swap, renew

    if (resume or update or retry_rejected) and output.is_dir():
        finish_swap(output)
    if (update or retry_rejected) and (output / "manifest.json").is_file():
        return renew(config, output, partial(_batch, apart=retry_rejected), same_export=not update)
    if update and not (output / "plan.json").is_file():
        raise UsageError(f"--update needs a finished output; there is none in {output}: leave --update out")
    return _batch(config, output, resume=resume or update or retry_rejected, apart=retry_rejected)


def _batch(
    config: ExtractionConfig,
    output: Path,
    *,
    resume: bool,
    apart: bool = False,
    previous: Previous | None = None,
) -> Extraction:
    """Do a batch from its beginning, or from where it was interrupted.

    `apart` keeps the annotation out of this process, and does shards with notes that it rejected again; `previous` is
    an output whose results are taken over where the notes are the same.
    """
    from clinical_nlp.config import to_yaml
    from clinical_nlp.extraction.outputs import outputs_written, write_outputs
    from clinical_nlp.extraction.plan import cut, make_plan, read_concepts, settle_plan
    from clinical_nlp.extraction.shards import finished
    from clinical_nlp.language.terminology import load_terminology
    from clinical_nlp.language.terminology.hpo import ROOT
    from clinical_nlp.notes.readers import expected_records, input_files, read_notes, read_patients
    from clinical_nlp.progress import progress, say
    from clinical_nlp.runs import Run

    whole = _is_whole(output, to_yaml(config)) if resume else False
    catalog = config.format == CATALOG
    if catalog and config.engine != "spark":
        raise UsageError("format 'catalog' names a table of a Spark session; add --engine spark")
    source, layout = Path(config.source), "table" if catalog else config.format
    if not catalog:
        if not source.exists():
            raise MissingDataError(f"{source} does not exist")
        input_files(source, layout)  # a wrong format is told before a folder is
        if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
            raise UsageError(f"--output {output} lies inside the export {source}; choose a directory outside it")
    terminology = load_terminology(config.terminology)
    if config.measurements and ROOT not in terminology:
        raise UsageError(f"measurements are read as concepts of HPO, which terminology {config.terminology!r} is not")

    def planned() -> dict[str, Any]:
        return make_plan(config, terminology=terminology, source=source, inputs=input_files(source, layout))

    if whole:
        if not catalog:
            settle_plan(output, planned())
        say(f"{output} is already finished")
        return summary_of(output)
    vocabulary = read_concepts(config, terminology)
    plan = {} if catalog else planned()
    fresh = not (output / "plan.json").exists()
    with (
        Run.open(output, config, recipe="extract", resume=resume) as run,
        open_engine(config, output / ".cache" / "spark") as session,
    ):
        if catalog:
            source = fetch_catalog(config, session, output / ".cache")
            plan = planned()
        settle_plan(output, plan)
        _clear_leftovers(output)
        if apart:  # what comes out may differ from what the outputs were made of
            (output / "ledger" / "outputs.json").unlink(missing_ok=True)
        options = config.read_options(output / STAGE / "scratch")
        staged = outputs_written(output) is None
        done: dict[int, dict[str, Any]] = {}
        n_new = 0
        with progress("extract", expected_records(source, layout), unit="notes") as bar:

            def remaining() -> Iterator[Shard]:
                stream = read_notes(source, format=layout, options=options)
                for shard in cut(stream, shard_notes=config.shard_notes, shard_characters=config.shard_characters):
                    record = finished(output, shard, staged=staged)
                    if record is None or (apart and record["rejected_in_extraction"]):
                        yield shard if previous is None else previous.with_known(shard)
                    else:
                        done[shard.index] = record
                        bar.already(record["records"])

            try:
                for record in _process(config, remaining(), output, session, apart):
                    done[record["shard"]] = record
                    n_new += 1
                    bar.advance(record["records"], mentions=record["mentions"])
            except ClinicalNlpError:
                if fresh and not done:
                    _abandon(output)
                raise
        if not done:
            if fresh:
                _abandon(output)
            raise InputError(f"{source} holds no notes that can be read as {config.format}")
        _clear_leftovers(output)  # of a worker that died in the middle of a write
        records = [done[index] for index in range(len(done))]
        counts = write_outputs(
            output,
            config,
            terminology,
            records,
            lambda: read_patients(source, format=layout, options=options),
            vocabulary=vocabulary,
            previous=None if previous is None else previous.output,
        )
        result = _summary(output, records, counts, len(done) - n_new, verify=config.verify is not None)
        run.note(
            inputs=plan["export"],
            terminology=plan["terminology"],
            base_model=config.model,
            parent_run=config.model,
            extraction={name: getattr(result, name) for name in _COUNTS},
            skipped_by_rule=result.skipped_by_rule,
            rejected_by_reason=result.rejected_by_reason,
            verified=result.verified,
            engine=config.engine,
            workers=config.workers,
        )
        if previous is not None:
            changed = previous.compare(output)
            result = replace(result, update=changed)
            run.note(update=asdict(changed))
        shutil.rmtree(output / STAGE, ignore_errors=True)
    return result


def _is_whole(output: Path, config: str) -> bool:
    begun = output / "config.yaml"
    return (output / "manifest.json").is_file() and begun.is_file() and begun.read_text("utf-8") == config


@contextmanager
def open_engine(config: ExtractionConfig, folder: Path) -> Iterator[Any]:
    """Give the Spark session that does the work, or None."""
    if config.engine == "local":
        yield None
        return
    from clinical_nlp.extraction.engines.spark import spark_session

    with spark_session(folder, config.workers) as session:
        yield session


def _process(
    config: ExtractionConfig, shards: Iterator[Shard], output: Path, session: Any, apart: bool
) -> Iterator[dict[str, Any]]:
    common: dict[str, Any] = {
        "terminology": config.terminology,
        "model": config.model,
        "measurements": config.measurements,
        "verify": config.verify,
        "assertion": config.assertion,
        "workers": config.workers,
    }
    if session is None:
        from clinical_nlp.extraction.engines import local

        return local.process(shards, output, apart=apart, **common)
    from clinical_nlp.extraction.engines import spark

    return spark.process(shards, output, session=session, **common)


def fetch_catalog(config: ExtractionConfig, session: Any, folder: Path) -> Path:
    """Bring a table of the session's catalog here, as a file that the table reader reads."""
    from clinical_nlp.extraction.engines.spark import fetch_table
    from clinical_nlp.notes.readers.table import OPTIONAL, REQUIRED

    columns = [config.columns.get(name, name) for name in (*REQUIRED, *OPTIONAL)]
    path = folder / "notes.jsonl"
    fetch_table(session, config.source, [*columns, config.institution_from or "institution"], path)
    if not path.stat().st_size:
        raise InputError(f"table {config.source} has no rows, or none of the columns of a table of notes")
    return path


_COUNTS = (
    "records",
    "done",
    "skipped",
    "rejected",
    "mentions",
    "patients",
    "patient_concepts",
    "phenopackets",
    "shards",
)


def summary_of(output: Path) -> Extraction:
    """Read from its manifest what a finished extraction did."""
    from clinical_nlp.runs import Run

    run = Run.load(output)
    told = run.manifest
    changed = told.get("update")
    return Extraction(
        output=run.path,
        **{name: told["extraction"][name] for name in _COUNTS},
        skipped_by_rule=told["skipped_by_rule"],
        rejected_by_reason=told["rejected_by_reason"],
        verified=told.get("verified", {}),
        shards_reused=told["extraction"]["shards"],
        update=changed and Update(**{**changed, "patients_touched": tuple(changed["patients_touched"])}),
    )


def _verified(records: list[dict[str, Any]]) -> dict[str, int]:
    from clinical_nlp.tasks.verifying import VERDICTS, WHYS

    return {name: sum(record["verified"].get(name, 0) for record in records) for name in ("asked", *WHYS, *VERDICTS)}


def _verified_line(counts: Mapping[str, int]) -> str:
    from clinical_nlp.tasks.verifying import VERDICTS, WHYS

    meaning = {"none": " (concept withdrawn)", "undecided": " (left as it was)", "invalid": " (left as it was)"}
    reasons = [f"{counts[why]} {why}" for why in WHYS if counts[why]]
    verdicts = [f"{counts[verdict]} {verdict}{meaning.get(verdict, '')}" for verdict in VERDICTS if counts[verdict]]
    return f"verified: {counts['asked']} mentions asked about" + "".join(
        f"{sign} {', '.join(parts)}" for sign, parts in ((",", reasons), (":", verdicts)) if parts
    )


def _summary(
    output: Path, records: list[dict[str, Any]], counts: Mapping[str, Any], reused: int, *, verify: bool
) -> Extraction:
    import pyarrow.dataset as ds

    table = ds.dataset(output / "notes", format="parquet").to_table(columns=["outcome", "reason"])
    by_reason = table.group_by(["outcome", "reason"]).aggregate([([], "count_all")]).to_pylist()
    by_reason.sort(key=lambda row: (-row["count_all"], row["reason"] or ""))

    def reasons(outcome: str) -> dict[str, int]:
        return {row["reason"]: row["count_all"] for row in by_reason if row["outcome"] == outcome}

    totals = {name: sum(record[name] for record in records) for name in ("records", "done", "skipped", "rejected")}
    if totals["done"] + totals["skipped"] + totals["rejected"] != totals["records"]:
        raise RunError(f"{output}: the records do not add up; this is a bug, please report it")
    return Extraction(
        output=output,
        **totals,
        skipped_by_rule=reasons("skipped"),
        rejected_by_reason=reasons("rejected"),
        mentions=sum(record["mentions"] for record in records),
        verified=_verified(records) if verify else {},
        **counts,
        shards=len(records),
        shards_reused=reused,
    )


def _clear_leftovers(output: Path) -> None:
    """Remove the temporary files that interrupted writes left."""
    for file in output.rglob(".*.tmp"):
        file.unlink(missing_ok=True)


def _abandon(output: Path) -> None:
    """Take back the start of a batch in which nothing was done, so that the corrected command can use the folder."""
    for folder in (STAGE, "ledger", "notes", "rejected"):
        shutil.rmtree(output / folder, ignore_errors=True)
    (output / "plan.json").unlink(missing_ok=True)
