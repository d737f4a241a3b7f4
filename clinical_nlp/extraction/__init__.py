"""Phenotypes in batch: from every note of an export to every patient, resumable, with nothing lost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinical_nlp.errors import ClinicalNlpError, InputError, MissingDataError, RunError, UsageError

STAGE = ".work"
"""Folder inside the output for what is gone when the batch ends."""

if TYPE_CHECKING:
    from clinical_nlp.extraction.plan import ExtractionConfig, Shard
    from clinical_nlp.runs import Run


@dataclass(frozen=True)
class Extraction:
    """What a batch did, in numbers, and where the result is.

    `records` is every note that the export holds; `done + skipped + rejected` equals it.
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
    shards: int = 0
    shards_reused: int = 0

    def __str__(self) -> str:
        lines = [
            f"{self.records} notes = {self.done} done + {self.skipped} skipped + {self.rejected} rejected",
            *(f"  skipped {count}: {rule}" for rule, count in self.skipped_by_rule.items()),
            *(f"  rejected {count}: {reason}" for reason, count in self.rejected_by_reason.items()),
            f"{self.mentions} mentions; {self.patients} patients with {self.patient_concepts} concepts; "
            f"{self.phenopackets} phenopackets",
            f"result: {self.output}",
        ]
        return "\n".join(lines)


def extract(
    source: str | os.PathLike[str],
    *,
    format: str,
    output: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    terminology: str | os.PathLike[str] = "hpo",
    engine: str = "local",
    workers: int = 1,
    resume: bool = False,
    **options: Any,
) -> Extraction:
    """Extract phenotypes from an export.

    Parameters
    ----------
    source : file or folder of the export.
    format : fhir, omop, mimic, table, brat, iob or text.
    output : directory of the result; a new one, or with `resume` one that was interrupted.
    model : directory of an ner run, whose entities are added to the dictionary's.
    terminology : hpo, icd10cm or a file.
    engine : local.
    workers : processes; the outputs are byte for byte the same for any number. With 2 or more, a note that kills its
        process is rejected and the rest go on.
    resume : go on where an earlier call was interrupted. Shards that are done and verify are not done again; the
        outputs are byte for byte those of an uninterrupted call (`manifest.json`, which holds times, apart).
    options : any other field of `ExtractionConfig` (languages, institution_from, columns, propagate, ...).

    Returns
    -------
    Extraction. The directory holds `mentions/`, `note_nlp/`, `note_id_map.parquet`, `patients/`, `phenopackets/` (for
    HPO), `notes/` (one row a record: done, skipped or rejected), `rejected/`, `ledger/`, `plan.json`, `config.yaml`
    and `manifest.json`.

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
            "terminology": os.fspath(terminology),
            "engine": engine,
            "workers": workers,
        },
    )
    return extract_with(config, Path(output), resume=resume)


def extract_with(config: ExtractionConfig, output: Path, *, resume: bool = False) -> Extraction:
    """Do what `extract` does, from a config."""
    from clinical_nlp.config import to_yaml
    from clinical_nlp.extraction.engines.local import process
    from clinical_nlp.extraction.outputs import outputs_written, write_outputs
    from clinical_nlp.extraction.plan import cut, make_plan, settle_plan
    from clinical_nlp.extraction.shards import finished
    from clinical_nlp.language.terminology import load_terminology
    from clinical_nlp.notes.readers import input_files, read_notes, read_patients
    from clinical_nlp.progress import progress, say
    from clinical_nlp.runs import Run

    source = Path(config.source)
    if not source.exists():
        raise MissingDataError(f"{source} does not exist")
    terminology = load_terminology(config.terminology)
    inputs = input_files(source, config.format)
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"--output {output} lies inside the export {source}; choose a directory outside it")
    plan = make_plan(config, terminology=terminology, inputs=inputs)
    begun, whole = output / "config.yaml", output / "manifest.json"
    if resume and whole.is_file() and begun.is_file() and begun.read_text("utf-8") == to_yaml(config):
        settle_plan(output, plan)
        say(f"{output} is already finished")
        return _finished(Run.load(output))
    if config.vocabulary is not None:
        from clinical_nlp.notes.writers.note_nlp import read_vocabulary

        read_vocabulary(Path(config.vocabulary))
    fresh = not (output / "plan.json").exists()
    with Run.open(output, config, recipe="extract", resume=resume) as run:
        settle_plan(output, plan)
        _clear_leftovers(output)
        options = config.read_options(output / STAGE / "scratch")
        staged = outputs_written(output) is None
        done: dict[int, dict[str, Any]] = {}
        n_new = 0
        with progress("extract", unit="notes") as bar:

            def remaining() -> Iterator[Shard]:
                stream = read_notes(source, format=config.format, options=options)
                for shard in cut(stream, shard_notes=config.shard_notes, shard_characters=config.shard_characters):
                    if (record := finished(output, shard, staged=staged)) is None:
                        yield shard
                    else:
                        done[shard.index] = record
                        bar.advance(record["records"])

            try:
                for record in process(
                    remaining(),
                    output,
                    terminology=config.terminology,
                    model=config.model,
                    workers=config.workers,
                ):
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
        records = [done[index] for index in range(len(done))]
        counts = write_outputs(
            output,
            config,
            terminology,
            records,
            lambda: read_patients(source, format=config.format, options=options),
        )
        result = _summary(output, records, counts, len(done) - n_new)
        shutil.rmtree(output / STAGE, ignore_errors=True)
        run.note(
            inputs=plan["export"],
            terminology=plan["terminology"],
            base_model=config.model,
            parent_run=config.model,
            extraction={name: getattr(result, name) for name in _COUNTS},
            skipped_by_rule=result.skipped_by_rule,
            rejected_by_reason=result.rejected_by_reason,
        )
    return result


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


def _finished(run: Run) -> Extraction:
    """Read what a finished extraction did from its manifest."""
    told = run.manifest
    return Extraction(
        output=run.path,
        **{name: told["extraction"][name] for name in _COUNTS},
        skipped_by_rule=told["skipped_by_rule"],
        rejected_by_reason=told["rejected_by_reason"],
        shards_reused=told["extraction"]["shards"],
    )


def _summary(output: Path, records: list[dict[str, Any]], counts: Mapping[str, int], reused: int) -> Extraction:
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
        **counts,
        shards=len(records),
        shards_reused=reused,
    )


def _clear_leftovers(output: Path) -> None:
    """Remove the temporary files that an interrupted write left."""
    for file in output.rglob(".*.tmp"):
        file.unlink(missing_ok=True)


def _abandon(output: Path) -> None:
    """Take back the start of a batch in which nothing was done, so that the corrected command can use the folder."""
    for folder in (STAGE, "ledger", "notes", "rejected"):
        shutil.rmtree(output / folder, ignore_errors=True)
    (output / "plan.json").unlink(missing_ok=True)
