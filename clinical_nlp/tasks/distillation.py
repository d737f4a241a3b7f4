"""Distillation: what a teacher says of unlabelled notes, as the training examples of a smaller student."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clinical_nlp.tasks import coding, ner

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class SoftWindow:
    """A window of a note with the teacher's probabilities of the tags at each token, (n_tokens, n_tags) float32."""

    window: ner.Window
    soft: np.ndarray


def soft_windows(
    task: ner.NerTask,
    tokenizer: Any,
    texts: Sequence[str],
    said: Sequence[tuple[ner.Encoded, np.ndarray]],
) -> list[SoftWindow]:
    """Cut notes for the student, each word with what the teacher says of the word that covers its first character.

    Tokenizers may divide a text into other words. Where a word of the teacher is several of the student's, only the
    first can begin an entity: in the others the probability of B- goes to I-.

    Parameters
    ----------
    task : of the student; its tags are the teacher's.
    texts : n notes.
    said : for each note its words and the log-probabilities of their tags, from `ner.predict_tags`.
    """
    found = []
    for text, (teacher, log_probs) in zip(texts, said, strict=True):
        encoded = task.encode(text, tokenizer)
        probs = np.exp(log_probs.astype(np.float64))
        starts = [start for start, _ in teacher.word_spans]
        rows = np.zeros((len(encoded.word_spans), len(task.tags)), dtype=np.float32)
        known = np.zeros(len(rows), dtype=bool)
        for word, (start, _) in enumerate(encoded.word_spans):
            place = bisect_right(starts, start) - 1
            if place < 0 or teacher.word_spans[place][1] <= start:
                continue
            known[word] = True
            rows[word] = probs[place]
            if start > teacher.word_spans[place][0]:
                rows[word, 2::2] += rows[word, 1::2]
                rows[word, 1::2] = 0
        for window in encoded.windows:
            decided = [word if word >= 0 and known[word] else -1 for word in window.words]
            soft = np.zeros((len(decided), len(task.tags)), dtype=np.float32)
            places = [place for place, word in enumerate(decided) if word >= 0]
            soft[places] = rows[[decided[place] for place in places]]
            labels = [0 if word >= 0 else -100 for word in decided]
            found.append(SoftWindow(ner.Window(window.note, window.input_ids, decided, labels), soft))
    return found


def collate_windows(windows: Sequence[SoftWindow], *, pad_token_id: int) -> dict[str, Any]:
    """Pad windows to one width, with the teacher's probabilities as `soft`, (n, width, n_tags)."""
    import torch

    batch = ner.collate([window.window for window in windows], pad_token_id)
    soft = torch.zeros((*batch["input_ids"].shape, windows[0].soft.shape[1]))
    for row, window in enumerate(windows):
        soft[row, : len(window.soft)] = torch.from_numpy(window.soft)
    return {**batch, "soft": soft}


class SoftDocuments:
    """Training examples for coding: documents with the teacher's probability of each code."""

    def __init__(
        self, task: coding.CodingTask, tokenizer: Any, documents: Sequence[Sequence[str]], probabilities: np.ndarray
    ) -> None:
        encoded = [task.encode(texts, tokenizer) for texts in documents]
        self._chunks = [document.chunks for document in encoded]
        self._probabilities = probabilities.astype(np.float32)
        self.lengths = [document.length for document in encoded]

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, index: int) -> tuple[list[list[int]], np.ndarray]:
        return self._chunks[index], self._probabilities[index]


def collate_documents(examples: Sequence[tuple[list[list[int]], np.ndarray]], *, pad_token_id: int) -> dict[str, Any]:
    """Pad the chunks of documents to one width; `labels` are the teacher's probabilities, (n, n_codes)."""
    import torch

    n_codes = len(examples[0][1])
    plain: list[coding.Example] = [(chunks, []) for chunks, _ in examples]
    batch: dict[str, Any] = coding.collate(plain, n_codes=n_codes, pad_token_id=pad_token_id)
    labels: torch.Tensor = torch.from_numpy(np.stack([row for _, row in examples]))
    return {**batch, "labels": labels, "shift_labels": labels}


def write_student(texts: Sequence[str], folder: Path, *, layers: int, hidden: int, vocabulary: int, seed: int) -> None:
    """Write a small model that knows nothing yet, with a byte-level vocabulary of the texts it will read.

    It has the architecture of Llama and is meant to be loaded with `bidirectional`: rotary positions let it learn from
    few notes what stands next to what, which learned positions take far longer for. The same texts and seed give the
    same bytes. (A WordPiece vocabulary would not: its trainer numbers the pieces in the order of a hash table.)

    Parameters
    ----------
    texts : the unlabelled notes.
    layers, hidden : size of the model; one attention head for each 32 of `hidden`.
    vocabulary : most pieces, the 256 bytes among them.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=2048, **special)
    torch.manual_seed(seed)
    heads = max(1, hidden // 32)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        pad_token_id=fast.pad_token_id,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
    )
    config.is_causal = False
    LlamaModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def notes_per_second(predict: Callable[[Sequence[Any]], Any], notes: Sequence[Any], *, rounds: int = 3) -> list[float]:
    """Time `predict` on the same notes several times after a first one that does not count."""
    import time

    predict(notes[: max(1, len(notes) // 10)])
    rates = []
    for _ in range(rounds):
        began = time.perf_counter()
        predict(notes)
        rates.append(len(notes) / (time.perf_counter() - began))
    return rates
