"""Fine-tune a base model to mark entities in notes, and score it on patients it has not seen."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy, trainable_count
from clinical_nlp.config import RecipeConfig
from clinical_nlp.errors import ConfigError, InputError
from clinical_nlp.models.loading import load_base
from clinical_nlp.models.resolve import provenance, resolve_model
from clinical_nlp.notes.corpus import Corpus, load_corpus
from clinical_nlp.notes.splitting import split_patients
from clinical_nlp.progress import is_main_process, say
from clinical_nlp.runs import Run
from clinical_nlp.tasks import ner
from clinical_nlp.training.trainer import TrainingConfig, train


class NerConfig(RecipeConfig):
    """Fine-tune a base model to mark entities in notes."""

    base_model: str = "builtin:tiny"
    """Hub id, local folder, or the directory of an earlier run."""
    strategy: StrategyConfig = StrategyConfig(name="qlora")
    """What may move. See `clinical-nlp list strategies`."""
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Whether a decoder sees to the right of a word; encoders always do."""
    labels: list[str] = Field(default_factory=list)
    """Entity types to learn; default all that the training part has."""
    window: int = Field(default=256, ge=16)
    """Tokens the model sees at once."""
    overlap: int = Field(default=64, ge=0)
    """Tokens that neighbouring windows of a long note share."""
    training: TrainingConfig = TrainingConfig(epochs=6)
    """How the weights are moved."""


CONFIG = NerConfig


def run(config: NerConfig, output: Path, *, resume: bool = False) -> Run:
    """Train, score on held-out patients, and write the run."""
    if config.overlap >= config.window // 2:
        raise ConfigError(f"overlap {config.overlap} must be less than half of window {config.window}")
    with Run.open(output, config, recipe="ner", resume=resume) as run:
        resolve_model(config.base_model)  # a wrong name is told before the notes are read
        corpus = load_corpus(config.corpus.name, config.corpus.path, **config.corpus.options)
        gold = gold_spans(corpus)
        split = split_patients(corpus.notes, config.split, seed=config.seed, parts=corpus.parts)
        say(split.describe())
        texts = corpus.notes["text"].to_pylist()
        patients = corpus.notes["patient_id"].to_pylist()
        found = {label for row in split.train for _, _, label in gold[row]}
        labels = tuple(sorted(set(config.labels) & found if config.labels else found))
        if not labels:
            raise InputError("the training part has no spans of the entity types asked for")

        base = load_base(
            config.base_model,
            quantization=config.strategy.quantization,
            bidirectional=config.attention == "bidirectional",
        )
        window = min(config.window, getattr(base.network.config, "max_position_embeddings", config.window))
        task = ner.NerTask(labels, window, config.overlap, config.attention == "bidirectional")
        network = apply_strategy(base.network, config.strategy, seed=config.seed)
        model = ner.build_model(network, len(task.tags), seed=config.seed)
        windows = [
            piece
            for row in split.train
            for piece in task.encode(
                texts[row], base.tokenizer, note=int(row), spans=[span for span in gold[row] if span[2] in labels]
            ).windows
        ]
        trainable, everything = trainable_count(model)
        say(f"{len(windows)} windows; {trainable:,} of {everything:,} parameters train ({config.strategy.name})")
        outcome = train(
            model,
            windows,
            partial(ner.collate, pad_token_id=base.tokenizer.pad_token_id or 0),
            config=config.training,
            run=run,
            seed=config.seed,
            lengths=[len(piece.input_ids) for piece in windows],
            tokenizer=base.tokenizer,
            strategy=config.strategy.name,
            head="head",
            max_steps=config.max_steps,
            max_minutes=config.max_minutes,
            resume=resume,
        )

        held_out = split.test
        predicted = ner.predict_spans(model, task, base.tokenizer, [texts[row] for row in held_out])
        counts = np.stack(
            [
                ner.count_matches(gold[row], [span[:3] for span in spans], labels)
                for row, spans in zip(held_out, predicted, strict=True)
            ]
        )
        run.record(
            ner.score(counts, labels, [patients[row] for row in held_out], part=split.reported_part, seed=config.seed)
        )
        if is_main_process():
            ner.save(run.path, model, task, base, full=config.strategy.name == "full")
        run.note(
            inputs={"corpus": corpus.card.name, "n_notes": len(texts), "notes_sha256": digest(corpus)},
            base_model=provenance(base.resolved, run.path),
            parent_run=None if base.resolved.parent_run is None else str(base.resolved.parent_run),
            training=outcome | {"trainable_parameters": trainable, "parameters": everything},
            labels=list(labels),
            split=split.describe(),
        )
    if is_main_process():
        from clinical_nlp.reporting.page import run_report

        run_report(run)
    return run


def gold_spans(corpus: Corpus) -> list[list[ner.Span]]:
    """Return the gold spans of each note, in the order of the notes."""
    if corpus.spans is None or corpus.spans.num_rows == 0:
        raise InputError(f"corpus {corpus.card.name!r} has no gold spans to learn from")
    place: dict[tuple[Any, Any], int] = {}
    keys = zip(corpus.notes["institution"].to_pylist(), corpus.notes["note_id"].to_pylist(), strict=True)
    for index, key in enumerate(keys):
        place[key] = index
    spans: list[list[ner.Span]] = [[] for _ in place]
    for row in corpus.spans.select(["institution", "note_id", "start", "end", "label"]).to_pylist():
        spans[place[row["institution"], row["note_id"]]].append((row["start"], row["end"], row["label"]))
    return spans


def digest(corpus: Corpus) -> str:
    """Return one digest over the texts of a corpus, in order."""
    import hashlib

    total = hashlib.sha256()
    for value in corpus.notes["text_sha256"].to_pylist():
        total.update(value.encode())
    return total.hexdigest()
