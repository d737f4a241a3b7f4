"""Build `builtin:tiny`: its byte-level tokenizer and its weights, from synthetic notes and the open corpora.

The open corpora are read from `$CLINICAL_NLP_DATA`, training parts only, duplicates removed; mtsamples is left out, as
the target that recipes adapt to, and so is every development and test part.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from clinical_nlp.adaptation.strategies import StrategyConfig
from clinical_nlp.config import Config
from clinical_nlp.errors import MissingDataError
from clinical_nlp.models.loading import load_base
from clinical_nlp.notes.corpus import load_corpus
from clinical_nlp.notes.deduplication import deduplicate
from clinical_nlp.progress import say
from clinical_nlp.runs import Run, write_json
from clinical_nlp.tasks import pretraining
from clinical_nlp.training.trainer import TrainingConfig, train


class TinyConfig(Config):
    """Train the built-in model from nothing."""

    corpora: list[str] = Field(default=["codiesp", "aci_bench", "ncbi_disease", "bc5cdr"])
    """Open corpora whose training parts are read."""
    repeats: int = Field(default=4, ge=1)
    """How often the open corpora are read for each time that the synthetic notes are."""
    institutions: int = Field(default=12, ge=1)
    """Synthetic institutions, each with its own style."""
    patients: int = Field(default=250, ge=1)
    """Synthetic patients an institution."""
    vocabulary: int = Field(default=4096, ge=300)
    """Tokens of the byte-level vocabulary."""
    hidden: int = Field(default=256, ge=32)
    """Width of the model."""
    layers: int = Field(default=6, ge=1)
    """Number of layers."""
    length: int = Field(default=512, ge=32)
    """Tokens of a packed row."""
    held_out: float = Field(default=0.01, gt=0, lt=0.5)
    """Share of documents kept to report perplexity on."""
    seed: int = 0
    """One seed for data, initialisation and order."""
    max_steps: int | None = Field(default=1400, ge=1)
    """Stop after this many optimiser steps."""
    max_minutes: float | None = Field(default=None, gt=0)
    """Stop and save after this many minutes."""
    training: TrainingConfig = TrainingConfig(
        epochs=1, learning_rate=1.5e-3, batch_size=8, weight_decay=0.1, precision="bf16", save_steps=100
    )
    """How the weights are moved."""


CONFIG = TinyConfig
_OTHER_PATIENTS = 1_000_000
"""Added to the seed of the synthetic notes, so that the model has not read the patients that recipes default to."""


def run(config: TinyConfig, output: Path, *, resume: bool = False) -> Run:
    """Collect text, train the tokenizer, train the model, report perplexity, and write `model/` in bf16."""
    import torch

    with Run.open(output, config, recipe="tiny", resume=resume, contains_phi=False) as run:
        documents, counts = collect(config)
        say(", ".join(f"{name} {count} documents" for name, count in counts.items()))
        start = run.path / "start"
        if not (start / "config.json").is_file():
            initialise(config, [text for _, text, _ in documents], start)
        base = load_base(str(start), kind="causal")
        rng = np.random.default_rng(config.seed)
        order = rng.permutation(len(documents))
        n_held_out = max(1, round(config.held_out * len(documents)))
        held_out, training = order[:n_held_out], np.sort(order[n_held_out:])
        tokens = pretraining.encode([text for _, text, _ in documents], base.tokenizer)
        rows = [tokens[row] for row in training for _ in range(documents[row][2])]
        packed = pretraining.pack(rows, config.length)
        say(
            f"{sum(map(len, rows)):,} tokens in {len(packed)} packed rows; {base.network.num_parameters():,} parameters"
        )
        pad = base.tokenizer.pad_token_id
        losses = partial(
            pretraining.note_losses, rows=[tokens[row] for row in held_out], length=config.length, pad_token_id=pad
        )
        before = losses(base.network)
        outcome = train(
            base.network,
            packed,
            partial(pretraining.collate_packed, pad_token_id=pad),
            config=config.training,
            run=run,
            seed=config.seed,
            lengths=[len(ids) for ids in packed["input_ids"]],
            tokenizer=base.tokenizer,
            strategy=StrategyConfig(name="full"),
            language_model=True,
            max_steps=config.max_steps,
            max_minutes=config.max_minutes,
            resume=resume,
        )
        network = base.network.to(torch.bfloat16)
        sources = [documents[row][0] for row in held_out]
        units = [f"document {row}" for row in held_out]
        run.record(
            pretraining.compare(
                before, losses(network), units, {"source": sources}, part="held-out documents", seed=config.seed
            )
        )
        network.save_pretrained(run.path / "model")
        base.tokenizer.save_pretrained(run.path / "model")
        write_json(run.path / "task.json", {"task": "pretraining", "length": config.length})
        run.note(inputs=counts, training=outcome)
    return run


def collect(config: TinyConfig) -> tuple[list[tuple[str, str, int]], dict[str, int]]:
    """Return (source, text, times it is read) for every distinct document, and the number of documents by source."""
    found: list[tuple[str, str, int]] = []
    for name in config.corpora:
        try:
            corpus = load_corpus(name)
        except MissingDataError as error:
            say(f"{name} is left out: {error}")
            continue
        notes = corpus.notes.to_pylist()
        texts = [
            row["text"] for row in notes if corpus.parts.get((row["institution"], row["note_id"]), "train") == "train"
        ]
        if corpus.pairs is not None:
            pairs: list[dict[str, Any]] = corpus.pairs.to_pylist()
            texts += [row["source"] for row in pairs if row["part"] in (None, "train")]
            texts += [row["target"] for row in pairs if row["part"] in (None, "train")]
        found += [(name, text, config.repeats) for text in texts]
    synthetic = load_corpus(
        "synthetic_hospitals",
        institutions=config.institutions,
        patients=config.patients,
        seed=_OTHER_PATIENTS + config.seed,
        covariate=1.0,
        bank="development",
    )
    found += [("synthetic_hospitals", text, 1) for text in synthetic.notes["text"].to_pylist()]
    found = [item for item in found if item[1].strip()]
    kept = deduplicate([text for _, text, _ in found], threshold=0.9).keep
    unique = [found[index] for index in kept]
    counts: dict[str, int] = {}
    for name, _, _ in unique:
        counts[name] = counts.get(name, 0) + 1
    return unique, counts


def initialise(config: TinyConfig, texts: list[str], folder: Path) -> None:
    """Train the byte-level tokenizer and write a freshly initialised Llama-architecture model beside it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=2048
    )
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast),
            hidden_size=config.hidden,
            intermediate_size=config.hidden * 11 // 4,
            num_hidden_layers=config.layers,
            num_attention_heads=max(1, config.hidden // 64),
            num_key_value_heads=max(1, config.hidden // 64),
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=fast.pad_token_id,
            bos_token_id=fast.bos_token_id,
            eos_token_id=fast.eos_token_id,
        )
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    say(f"tokenizer: {len(fast)} tokens; {json.dumps({'parameters': model.num_parameters()})}")
