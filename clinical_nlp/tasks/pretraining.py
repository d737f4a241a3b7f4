"""Continued pretraining: notes to packed rows in which no document sees another, and perplexity on held-out notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clinical_nlp.errors import ModelError, TooFewPatientsError
from clinical_nlp.progress import progress
from clinical_nlp.runs import Estimate
from clinical_nlp.statistics.intervals import by_patient, patient_bootstrap


def encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Tokenise notes; each begins with the model's bos, where it has one, and ends with its eos."""
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer of this base model has no end-of-text token; a model cannot learn to stop")
    before = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    rows: list[list[int]] = []
    for begin in range(0, len(texts), 1000):
        batch = tokenizer(list(texts[begin : begin + 1000]), add_special_tokens=False, verbose=False)["input_ids"]
        rows += [[*before, *ids, tokenizer.eos_token_id] for ids in batch]
    return rows


def pack(rows: Sequence[list[int]], length: int) -> Any:
    """Pack token rows into rows of at most `length` tokens; long notes are split, nothing is dropped.

    Returns
    -------
    `datasets.Dataset` with `input_ids` and `seq_lengths` (tokens of each document in the row).

    Raises
    ------
    ModelError : a token was lost, which would be a fault of the packing.
    """
    import datasets
    from trl import pack_dataset

    if not rows:
        raise TooFewPatientsError("no notes to train on: the training part is empty")
    datasets.disable_progress_bars()
    packed = pack_dataset(datasets.Dataset.from_dict({"input_ids": list(rows)}), length, strategy="bfd_split")
    packed = packed.with_format(None)
    before, after = sum(map(len, rows)), sum(map(sum, packed["seq_lengths"]))
    if before != after:
        raise ModelError(f"packing lost {before - after} of {before} tokens")
    return packed


def collate_packed(examples: list[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Make (B, L) rows with positions restarted at each document and no attention mask.

    transformers isolates documents from restarted positions only when no mask is passed. The first token of a document
    is not a target, since its predecessor belongs to another one; padding forms a document of its own.
    """
    import torch

    width = max(len(example["input_ids"]) for example in examples)
    ids = torch.full((len(examples), width), pad_token_id)
    positions = torch.zeros((len(examples), width), dtype=torch.long)
    labels = torch.full((len(examples), width), -100)
    for row, example in enumerate(examples):
        tokens = torch.tensor(example["input_ids"])
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = tokens
        begin = 0
        for length in [*example["seq_lengths"], width - len(tokens)]:
            positions[row, begin : begin + length] = torch.arange(length)
            if begin < width:
                labels[row, begin] = -100
            begin += length
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def note_losses(
    model: Any, rows: Sequence[list[int]], *, length: int, pad_token_id: int, batch_tokens: int = 8192
) -> np.ndarray:
    """Negative log-likelihood of each note under a causal language model.

    Parameters
    ----------
    model : causal language model (or peft model around one).
    rows : n token rows.
    length : notes are cut into pieces of this many tokens; each piece is predicted from its own beginning.

    Returns
    -------
    (n, 2) float64: nats, and number of predicted tokens.
    """
    import torch

    pieces = [
        (index, row[begin : begin + length])
        for index, row in enumerate(rows)
        for begin in range(0, len(row), length)
        if len(row[begin : begin + length]) > 1
    ]
    pieces.sort(key=lambda piece: (len(piece[1]), piece[0]))
    counts = np.zeros((len(rows), 2))
    device = next(model.parameters()).device
    model.eval()
    begin = 0
    with progress("perplexity", len(pieces), unit="pieces") as bar, torch.inference_mode():
        while begin < len(pieces):
            end = begin + 1
            while end < len(pieces) and (end + 1 - begin) * len(pieces[end][1]) <= batch_tokens:
                end += 1
            batch = pieces[begin:end]
            width = len(batch[-1][1])
            ids = torch.full((len(batch), width), pad_token_id)
            mask = torch.zeros((len(batch), width), dtype=torch.long)
            for position, (_, tokens) in enumerate(batch):
                ids[position, : len(tokens)] = torch.tensor(tokens)
                mask[position, : len(tokens)] = 1
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:].to(device), reduction="none")
            weight = mask[:, 1:].to(device)
            nats = (loss * weight).sum(1).double().cpu().numpy()
            for position, (index, tokens) in enumerate(batch):
                counts[index] += (nats[position], len(tokens) - 1)
            bar.advance(len(batch))
            begin = end
    return counts


def perplexity(counts: np.ndarray) -> np.ndarray:
    """Perplexity from (..., 2) sums of nats and tokens."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.exp(counts[..., 0] / counts[..., 1])


def compare(
    before: np.ndarray,
    after: np.ndarray,
    patients: Sequence[str],
    groups: dict[str, Sequence[str]],
    *,
    part: str,
    seed: int,
) -> dict[str, Estimate]:
    """Estimate perplexity before and after, their ratio on the same patients, and the same by group.

    Parameters
    ----------
    before, after : (n, 2) from `note_losses` on the same notes.
    patients : n patient ids, the unit that is resampled.
    groups : name (institution, note_type) -> n values; reported for groups of at least 11 patients.
    """
    both = np.concatenate([before, after], axis=1)
    people = np.asarray(patients)

    def estimates(rows: np.ndarray, suffix: str) -> dict[str, Estimate]:
        summed = by_patient(people[rows].tolist(), both[rows])
        common: dict[str, Any] = {"n_notes": int(rows.sum()), "part": part, "seed": seed}
        return {
            f"test.perplexity{suffix}": patient_bootstrap(summed, lambda c: perplexity(c[..., 2:]), **common),
            f"test.perplexity_before{suffix}": patient_bootstrap(summed, lambda c: perplexity(c[..., :2]), **common),
            f"test.perplexity_ratio{suffix}": patient_bootstrap(
                summed, lambda c: perplexity(c[..., 2:]) / perplexity(c[..., :2]), **common
            ),
        }

    found = estimates(np.ones(len(people), dtype=bool), "")
    for group, values in groups.items():
        column = np.asarray([value or "" for value in values])
        names = sorted(set(column.tolist()) - {""})
        for name in names if len(names) > 1 else []:
            rows = column == name
            if len(set(people[rows].tolist())) >= 11:
                found |= estimates(rows, f".{group}.{name}")
    return found
