"""Merge a run's adapter into the weights, and show on its held-out patients what merging changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from clinical_nlp.config import Config, load_config
from clinical_nlp.errors import ModelError
from clinical_nlp.models.loading import load_base, read_task
from clinical_nlp.models.merging import load_merged
from clinical_nlp.models.resolve import provenance
from clinical_nlp.progress import say
from clinical_nlp.recipes import dapt
from clinical_nlp.recipes import ner as ner_recipe
from clinical_nlp.runs import Estimate, Run
from clinical_nlp.statistics.intervals import by_patient, patient_bootstrap
from clinical_nlp.tasks import ner, pretraining


class MergeConfig(Config):
    """Merge the adapters of a finished run into its weights."""

    run: str = Field(min_length=1)
    """Directory of a dapt or ner run that holds an adapter."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision in which the merged weights are written; bf16 halves the file and rounds them."""
    seed: int = 0
    """Of the patient bootstrap."""


CONFIG = MergeConfig


def run(config: MergeConfig, output: Path, *, resume: bool = False) -> Run:
    """Score the run as it is, merge, score again on the same patients, and write the merged model."""
    earlier = Run.load(Path(config.run))
    task = read_task(earlier.path)["task"]
    steps = {"ner": merge_ner, "pretraining": merge_pretraining}
    if task not in steps:
        raise ModelError(f"run {config.run} was trained for {task}; merge knows {', '.join(steps)}")
    with Run.open(output, config, recipe="merge", resume=resume) as run:
        resolved, change = steps[task](config, earlier, run)
        run.note(
            base_model=provenance(resolved, run.path),
            parent_run=str(earlier.path),
            merging={"largest_change_of_a_logit": change, "dtype": config.dtype},
        )
    from clinical_nlp.reporting.page import run_report

    run_report(run)
    return run


def merge_ner(config: MergeConfig, earlier: Run, run: Run) -> tuple[Any, float]:
    """Merge a tagger; return what it was resolved to, and the largest change of a logit."""
    settings = load_config(ner_recipe.CONFIG, earlier.path / "config.yaml", {})
    values = read_task(earlier.path)
    task = ner.NerTask(tuple(values["labels"]), values["window"], values["overlap"], values["bidirectional"])
    common: dict[str, Any] = {"quantization": values["quantization"], "bidirectional": task.bidirectional}
    merged = load_merged(str(earlier.path), **common)
    data = ner_recipe.read(settings.corpus, settings.split, settings.seed)
    before = tagger(load_base(str(earlier.path), **common), task, earlier.path)
    after = rounded(tagger(merged, task, earlier.path), config.dtype)
    score_both(run, before, after, task, merged.tokenizer, data, config.seed)
    ner.save(run.path, after, task, merged, full=True)
    run.note(inputs={"corpus": data.corpus.card.name, "n_notes": len(data.texts)}, split=data.split.describe())
    return merged.resolved, largest_change(before, after, some_windows(task, merged.tokenizer, data))


def score_both(
    run: Run, before: Any, after: Any, task: ner.NerTask, tokenizer: Any, data: ner_recipe.Labelled, seed: int
) -> Estimate:
    """Score two taggers on the same held-out patients, record both and the change of strict F1, and return that."""
    rows = data.split.test
    counts_before, counts = (ner_recipe.count_matches(model, task, tokenizer, data, rows) for model in (before, after))
    patients = [data.patients[row] for row in rows]
    both = np.concatenate([counts_before, counts], axis=2)
    width = counts.shape[2]
    shared: dict[str, Any] = {"part": data.split.reported_part, "seed": seed}
    change = patient_bootstrap(
        by_patient(patients, both.sum(1)),
        lambda c: f1(c[..., width:]) - f1(c[..., :width]),
        n_notes=len(rows),
        **shared,
    )
    run.record({"test.f1_strict_before": ner.f1_strict(counts_before, patients, **shared)})
    run.record(ner.score(counts, task.labels, patients, **shared))
    run.record({"test.f1_strict_change": change})
    return change


def some_windows(task: ner.NerTask, tokenizer: Any, data: ner_recipe.Labelled) -> dict[str, Any]:
    """Return a batch of held-out windows, 50 at most."""
    rows = data.split.test[:50]
    windows = [window for row in rows for window in task.encode(data.texts[row], tokenizer).windows][:50]
    return ner.collate(windows, tokenizer.pad_token_id or 0)


def tagger(base: Any, task: ner.NerTask, folder: Path) -> Any:
    """Put the run's head on a loaded base."""
    model = ner.build_model(base.network, len(task.tags), seed=0)
    ner.load_head(model, folder)
    return model.eval()


def f1(counts: np.ndarray) -> np.ndarray:
    """Strict F1 from sums of true positives, predicted and gold."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 2 * counts[..., 0] / (counts[..., 1] + counts[..., 2])


def merge_pretraining(config: MergeConfig, earlier: Run, run: Run) -> tuple[Any, float]:
    """Merge a dapt run; return what it was resolved to, and the largest change of a logit."""
    settings = load_config(dapt.CONFIG, earlier.path / "config.yaml", {})
    bidirectional = settings.attention == "bidirectional"
    common: dict[str, Any] = {"quantization": settings.strategy.quantization, "bidirectional": bidirectional}
    merged = load_merged(str(earlier.path), kind="language", **common)
    task = pretraining.language_task(merged, settings.length, batching="bucketed", bidirectional=bidirectional)
    if settings.stream:
        raise ModelError(f"run {earlier.path} was streamed: its held-out notes are gone, so merging cannot be checked")
    corpus = dapt.load_corpus(settings.corpus.name, settings.corpus.path, **settings.corpus.options)
    material = dapt.in_memory(corpus, dapt.split_corpus(corpus, settings), task, merged.tokenizer)
    before = load_base(str(earlier.path), kind="language", **common).network
    after = rounded(merged.network, config.dtype)
    first, second = (task.losses(task.model(network), material.held_out) for network in (before, after))
    found: dict[str, Estimate] = pretraining.compare(
        first, second, material.patients, material.groups, part=material.part, seed=config.seed, metric=task.metric
    )
    run.record(found)
    dapt.save(run.path, merged.network, merged, task, moves_base=True)
    run.note(inputs=material.inputs, split=material.split)
    rows = [{"input_ids": row[: task.length], "seq_lengths": [len(row[: task.length])]} for row in material.held_out]
    return merged.resolved, largest_change(before, after, task.collate(rows[:50]))


def rounded(model: Any, dtype: str) -> Any:
    """Round the weights to what will be written, so that what is scored is what is kept."""
    import torch

    if dtype == "bf16":
        say("weights are rounded to bf16")
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).float()
    return model


def largest_change(before: Any, after: Any, batch: dict[str, Any]) -> float:
    """Return the largest absolute difference of a logit at a position that counts, on one batch."""
    import torch

    device = next(after.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if name not in ("labels", "shift_labels")}
    with torch.inference_mode():
        first, second = (model.eval()(**inputs) for model in (before, after))
    difference = (first["logits"].float() - second["logits"].float()).abs()
    mask = inputs.get("attention_mask")
    return float(difference.max() if mask is None or mask.ndim != 2 else difference[mask.bool()].max())
