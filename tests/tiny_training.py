"""A tagger that learns in seconds, for tests of the real trainer."""

from __future__ import annotations

from functools import partial

import numpy as np

from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy
from clinical_nlp.config import Config
from clinical_nlp.models.loading import load_base
from clinical_nlp.runs import Run
from clinical_nlp.tasks import ner
from clinical_nlp.training.trainer import TrainingConfig, train, trainable_state

TASK = ner.NerTask(labels=("problem",), window=48, overlap=8, bidirectional=True)


class Empty(Config):
    """A config for a run of a test."""

    seed: int = 0


def tagging(model, strategy="lora"):
    """Return a base, a tagger on it and windows of twelve made-up notes."""
    settings = StrategyConfig(name=strategy, rank=4)
    base = load_base(str(model), quantization=settings.quantization, bidirectional=True)
    tagger = ner.build_model(apply_strategy(base.network, settings, seed=0), 3, seed=0)
    words = ["no", "fever", "or", "cough", "today", "and", "severe", "pain"]
    rng = np.random.default_rng(0)
    windows = []
    for note in range(12):
        chosen = rng.choice(words, size=int(rng.integers(2, 12))).tolist()
        text = " ".join(chosen)
        starts = np.cumsum([0, *[len(word) + 1 for word in chosen[:-1]]]).tolist()
        spans = [(s, s + len(w), "problem") for s, w in zip(starts, chosen, strict=True) if w in ("fever", "cough")]
        windows += TASK.encode(text, base.tokenizer, note=note, spans=spans).windows
    return base, tagger, windows


def fit(output, model, *, resume=False, strategy="lora", max_steps=8, **settings):
    """Train such a tagger in a run of its own; return the trained weights."""
    base, tagger, windows = tagging(model, strategy)
    config = TrainingConfig(**{"epochs": 4, "batch_size": 3, "learning_rate": 1e-3, "save_steps": 3, **settings})
    with Run.open(output, Empty(), recipe="test", resume=resume) as run:
        train(
            tagger,
            windows,
            partial(ner.collate, pad_token_id=0),
            config=config,
            run=run,
            seed=0,
            lengths=[len(window.input_ids) for window in windows],
            tokenizer=base.tokenizer,
            strategy=StrategyConfig(name=strategy, rank=4),
            head="head",
            max_steps=max_steps,
            resume=resume,
        )
    return trainable_state(tagger)
