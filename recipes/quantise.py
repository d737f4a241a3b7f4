"""Write a run's encoder in 8-bit integers for prediction on a CPU, if its held-out patients lose nothing by it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from clinical_nlp.config import Config, load_config
from clinical_nlp.errors import ModelError, TrainingError
from clinical_nlp.extraction.shards import one_thread
from clinical_nlp.models import int8
from clinical_nlp.models.loading import load_base, read_task
from clinical_nlp.models.merging import load_merged
from clinical_nlp.models.resolve import provenance, resolve_model
from clinical_nlp.recipes import distil
from clinical_nlp.recipes import ner as ner_recipe
from clinical_nlp.recipes.merge import largest_change, score_both, some_windows, tagger
from clinical_nlp.runs import Run
from clinical_nlp.tasks import ner


class QuantiseConfig(Config):
    """Write the encoder of a finished run in 8-bit integers, adapters merged."""

    run: str = Field(min_length=1)
    """Directory of a ner run whose base model is an encoder, or of a student that a tagger taught."""
    max_loss: float = Field(default=0.005, ge=0, le=1)
    """Strict F1 on held-out patients that may be lost; with more, nothing is kept."""
    timed_notes: int = Field(default=100, ge=1)
    """Held-out notes that both read against the clock, on one thread each."""
    seed: int = 0
    """Of the patient bootstrap."""


CONFIG = QuantiseConfig


def run(config: QuantiseConfig, output: Path, *, resume: bool = False) -> Run:
    """Export, score before and after on the same patients, time both, and keep the 8-bit model if it holds."""
    earlier = Run.load(Path(config.run))
    values = read_task(earlier.path)
    configs: dict[str, Any] = {"ner": ner_recipe.CONFIG, "distil": distil.CONFIG}
    made = earlier.manifest["recipe"]
    if values["task"] != "ner" or made not in configs:
        raise ModelError(
            f"run {config.run} is a {made} run for {values['task']}; quantise knows ner, and distil for it"
        )
    if values["quantization"] != "none":
        raise ModelError(f"run {config.run} has {values['quantization']} weights already; quantise needs 32-bit ones")
    task = ner.NerTask(tuple(values["labels"]), values["window"], values["overlap"], values["bidirectional"])
    settings = load_config(configs[made], earlier.path / "config.yaml", {})
    load = load_merged if resolve_model(str(earlier.path)).adapters else load_base
    base = load(str(earlier.path), quantization="none", bidirectional=task.bidirectional)
    if base.is_decoder:
        raise ModelError(f"run {config.run} has a decoder for its base; quantise knows encoders")
    with Run.open(output, config, recipe="quantise", resume=resume) as run, one_thread():
        before = tagger(base, task, earlier.path)
        folder = run.path / "model"
        int8.export_int8(base.network, folder)
        base.tokenizer.save_pretrained(folder)
        small = replace(base, network=int8.load_int8(folder), quantization="int8")
        after = tagger(small, task, earlier.path)
        data = ner_recipe.read(settings.corpus, settings.split, settings.seed)
        change = score_both(run, before, after, task, base.tokenizer, data, config.seed)
        if not change.value >= -config.max_loss:
            (folder / int8.FILE).unlink()
            between = f" ({100 * change.low:+.2f} to {100 * change.high:+.2f})" if math.isfinite(change.low) else ""
            raise TrainingError(
                f"8-bit changes strict F1 by {100 * change.value:+.2f} points{between}, and max_loss allows "
                f"{-100 * config.max_loss:.2f}; nothing was kept"
            )
        rows = data.split.test[: config.timed_notes]
        predictors = {
            "before": ner.NerPredictor(before, task, base.tokenizer).predict,
            "after": ner.NerPredictor(after, task, base.tokenizer).predict,
        }
        patients = [data.patients[row] for row in rows]
        distil.timed(run, predictors, [data.texts[row] for row in rows], patients, data.split.reported_part)
        ner.save(run.path, after, task, small, full=False)
        run.note(
            base_model=provenance(base.resolved, run.path),
            parent_run=str(earlier.path),
            inputs={"corpus": data.corpus.card.name, "n_notes": len(data.texts)},
            split=data.split.describe(),
            quantising={
                "largest_change_of_a_logit": largest_change(before, after, some_windows(task, base.tokenizer, data)),
                "bytes": (folder / int8.FILE).stat().st_size,
                "threads": 1,
            },
        )
    from clinical_nlp.reporting.page import run_report

    run_report(run)
    return run


def report(run: Run) -> str:
    """Render the run's page, for `clinical-nlp report`."""
    from clinical_nlp.reporting.page import Notice, Section, training_page

    change, faster = (run.metrics[f"test.{name}"] for name in ("f1_strict_change", "times_faster"))
    low, high = change["low"], change["high"]
    between = "" if low is None else f" ({100 * low:+.2f} to {100 * high:+.2f}, {change['n_patients']} patients)"
    words = (
        f"In 8-bit the tagger's strict F1 changes by {100 * change['value']:+.2f} points{between}, and it reads "
        f"{faster['value']:.1f} times as many notes a second on one thread of this machine."
    )
    return training_page(run, first=Section("What is lost, what is won", [Notice(words, tone="good")]))
