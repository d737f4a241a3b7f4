"""The whole chain on one export: read it (dapt), learn a task (ner), extract from every note, and look for drift."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import Field

from clinical_nlp.adaptation.strategies import StrategyConfig
from clinical_nlp.config import Config, CorpusConfig, RecipeConfig
from clinical_nlp.errors import InputError
from clinical_nlp.extraction import Extraction, extract_with
from clinical_nlp.extraction.plan import ExtractionConfig
from clinical_nlp.progress import say
from clinical_nlp.recipe import execute, find_recipe
from clinical_nlp.recipes.dapt import DaptConfig
from clinical_nlp.recipes.drift import DriftConfig
from clinical_nlp.recipes.ner import NerConfig
from clinical_nlp.runs import Estimate, Run
from clinical_nlp.training.trainer import TrainingConfig


class AdaptConfig(RecipeConfig):
    """Adapt a base model to an export, then extract and compare institutions with it."""

    source: str = Field(min_length=1)
    """The export: a file or a folder. All its notes are read, extracted from and compared."""
    format: str = "fhir"
    """How it is laid out: fhir, omop, mimic, table, brat, iob or text."""
    institution_from: str | None = None
    """Which level of the export is the institution (custodian, serviceProvider, care_site, or a column)."""
    columns: dict[str, str] = Field(default_factory=dict)
    """For a table: which column holds what, as columns.text=body."""
    corpus: CorpusConfig = CorpusConfig()
    """The corpus whose gold spans the tagger learns from; patients that it shares with the export by id stay in one
    part throughout."""
    base_model: str = "builtin:tiny"
    """Hub id, local folder, or the directory of an earlier run."""
    dapt_strategy: StrategyConfig = StrategyConfig(name="lora", rank=32, alpha=64)
    """What may move while the model reads the notes."""
    dapt_training: TrainingConfig = TrainingConfig(epochs=3, batch_size=8)
    """How the weights are moved while the model reads the notes."""
    ner_strategy: StrategyConfig = StrategyConfig(name="qlora")
    """What may move while it learns to tag."""
    ner_training: TrainingConfig = TrainingConfig(epochs=6)
    """How the weights are moved while it learns to tag."""
    terminology: str = "hpo"
    """hpo, icd10cm, or a file of your own (.obo, .json, .csv)."""
    workers: int = Field(default=1, ge=1)
    """Processes for the extraction."""
    n_permutations: int = Field(default=999, ge=19)
    """Relabellings of patients in the drift tests."""


CONFIG = AdaptConfig


def run(config: AdaptConfig, output: Path, *, resume: bool = False) -> Run:
    """Run the four steps, each in its own folder of the output; finished steps are not done again on resume."""
    with Run.open(output, config, recipe="adapt", resume=resume) as run:
        shared: dict[str, Any] = {"split": config.split, "seed": config.seed}
        limits: dict[str, Any] = {"max_steps": config.max_steps, "max_minutes": config.max_minutes}
        export: dict[str, Any] = {"format": config.format, "institution_from": config.institution_from}
        options = {key: value for key, value in (export | {"columns": config.columns}).items() if value}

        say("step 1 of 4: dapt")
        dapt = DaptConfig(
            corpus=CorpusConfig(name="ehr_export", path=config.source, options=options),
            base_model=config.base_model,
            strategy=config.dapt_strategy,
            training=config.dapt_training,
            **shared,
            **limits,
        )
        adapted = _step("dapt", dapt, run, resume)

        say("step 2 of 4: ner")
        ner = NerConfig(
            corpus=config.corpus,
            base_model=str(adapted.path),
            baseline_notes=0,
            strategy=config.ner_strategy,
            training=config.ner_training,
            **shared,
            **limits,
        )
        tagger = _step("ner", ner, run, resume)

        say("step 3 of 4: extraction")
        extraction = extract(config, tagger.path, run.path / "extraction", resume)

        say("step 4 of 4: drift")
        drift = DriftConfig(
            sources=[config.source],
            columns=config.columns,
            model=str(adapted.path),
            n_permutations=config.n_permutations,
            seed=config.seed,
            **export,
        )
        try:
            _step("drift", drift, run, resume)
        except InputError as error:  # one institution alone has nothing to be compared with
            run.note(drift=f"not done: {error}")
            say(f"drift is left out: {error}")
        run.note(
            base_model=adapted.manifest["base_model"],
            extraction={
                "records": extraction.records,
                "done": extraction.done,
                "skipped": extraction.skipped,
                "rejected": extraction.rejected,
            },
        )
    from clinical_nlp.reporting.page import run_report

    run_report(run)
    return run


def extract(config: AdaptConfig, model: Path, output: Path, resume: bool) -> Extraction:
    """Extract from the whole export with the trained tagger."""
    settings = ExtractionConfig(
        source=config.source,
        format=config.format,
        institution_from=config.institution_from,
        columns=config.columns,
        model=str(model),
        terminology=config.terminology,
        workers=config.workers,
    )
    return extract_with(settings, output, resume=resume)


def _step(name: str, config: Config, run: Run, resume: bool) -> Run:
    """Run one recipe below this run and carry its figures up, under its name."""
    step = execute(find_recipe(name), config, output=run.path / name, resume=resume)
    prefix = f"{name}."
    run.record({prefix + key.removeprefix(prefix): estimate(value) for key, value in step.metrics.items()})
    return step


def estimate(entry: dict[str, Any]) -> Estimate:
    """Read an estimate back from `metrics.json`, where NaN stands as null."""
    numbers = {key: math.nan if entry[key] is None else entry[key] for key in ("value", "low", "high")}
    return Estimate(**{**entry, **numbers})
