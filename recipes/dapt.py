"""Domain-adaptive pretraining: let a base model read the hospital's own notes before it learns a task."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy, trainable_count
from clinical_nlp.config import RecipeConfig
from clinical_nlp.models.adapters import ADAPTER, save_adapter
from clinical_nlp.models.loading import backbone_prefix, load_base
from clinical_nlp.models.resolve import provenance, resolve_model
from clinical_nlp.notes.corpus import load_corpus
from clinical_nlp.notes.splitting import split_patients, split_without_duplicates
from clinical_nlp.progress import is_main_process, say
from clinical_nlp.recipes.ner import digest
from clinical_nlp.runs import Run, write_json
from clinical_nlp.tasks import pretraining
from clinical_nlp.training.trainer import TrainingConfig, train


class DaptConfig(RecipeConfig):
    """Continue pretraining a causal language model on notes."""

    base_model: str = "builtin:tiny"
    """Hub id, local folder, or the directory of an earlier run."""
    strategy: StrategyConfig = StrategyConfig(name="lora", rank=32, alpha=64)
    """What may move: lora, qlora or full. See `clinical-nlp list strategies`."""
    length: int = Field(default=512, ge=32)
    """Tokens of a packed row; longer notes are split, none is cut off."""
    deduplicate: float | None = Field(default=0.9, gt=0, le=1)
    """Notes that share this much of their word sequences are read once, never on both sides of the split; null: off."""
    training: TrainingConfig = TrainingConfig(epochs=3, batch_size=8)
    """How the weights are moved."""


CONFIG = DaptConfig


def run(config: DaptConfig, output: Path, *, resume: bool = False) -> Run:
    """Read, pack, train, and report perplexity on held-out patients before and after."""
    with Run.open(output, config, recipe="dapt", resume=resume) as run:
        resolve_model(config.base_model)  # a wrong name is told before the notes are read
        corpus = load_corpus(config.corpus.name, config.corpus.path, **config.corpus.options)
        notes, dropped = corpus.notes, 0
        common: dict[str, Any] = {"seed": config.seed, "parts": corpus.parts}
        if config.deduplicate is None:
            split = split_patients(notes, config.split, **common)
        else:
            split, duplicates = split_without_duplicates(notes, config.split, threshold=config.deduplicate, **common)
            dropped = len(duplicates.dropped)
        say(split.describe())

        base = load_base(config.base_model, kind="causal", quantization=config.strategy.quantization)
        rows = pretraining.encode(notes["text"].to_pylist(), base.tokenizer)
        length = min(config.length, getattr(base.network.config, "max_position_embeddings", config.length))
        held_out = [rows[row] for row in split.test]
        pad = base.tokenizer.pad_token_id or 0
        losses = partial(pretraining.note_losses, rows=held_out, length=length, pad_token_id=pad)
        before = losses(base.network)
        network = apply_strategy(base.network, config.strategy, seed=config.seed)
        packed = pretraining.pack([rows[row] for row in split.train], length)
        trainable, everything = trainable_count(network)
        say(f"{len(packed)} packed rows; {trainable:,} of {everything:,} parameters train ({config.strategy.name})")
        outcome = train(
            network,
            packed,
            partial(pretraining.collate_packed, pad_token_id=pad),
            config=config.training,
            run=run,
            seed=config.seed,
            lengths=[len(ids) for ids in packed["input_ids"]],
            tokenizer=base.tokenizer,
            strategy=config.strategy,
            language_model=True,
            max_steps=config.max_steps,
            max_minutes=config.max_minutes,
            resume=resume,
        )

        after = losses(network)
        taken = notes.take(np.asarray(split.test))
        groups = {name: taken[name].to_pylist() for name in ("institution", "note_type")}
        patients = taken["patient_id"].to_pylist()
        run.record(pretraining.compare(before, after, patients, groups, part=split.reported_part, seed=config.seed))
        if is_main_process():
            if config.strategy.name == "full":
                network.save_pretrained(run.path / "model")
                base.tokenizer.save_pretrained(run.path / "model")
            else:
                prefix = backbone_prefix(network.get_base_model())
                save_adapter(network, run.path / "adapter", name=ADAPTER, prefix=prefix)
            write_json(run.path / "task.json", {"task": "pretraining", "length": length})
        run.note(
            inputs={"corpus": corpus.card.name, "n_notes": notes.num_rows, "n_duplicates_dropped": dropped},
            notes_sha256=digest(corpus),
            base_model=provenance(base.resolved, run.path),
            parent_run=None if base.resolved.parent_run is None else str(base.resolved.parent_run),
            training=outcome | {"trainable_parameters": trainable, "parameters": everything},
            split=split.describe(),
        )
    if is_main_process():
        from clinical_nlp.reporting.page import run_report

        run_report(run)
    return run
