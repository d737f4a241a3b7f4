"""BERTScore with an encoder from a local folder: greedy matching of token embeddings, without idf weights.

References
----------
Zhang et al. 2020, BERTScore: Evaluating Text Generation with BERT, ICLR, eq. 1-3.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import evaluate

from clinical_nlp.errors import MissingDataError, UsageError

_DESCRIPTION = "BERTScore precision, recall and F1 from a local encoder, averaged over pairs that have both texts."
_INPUTS = """
predictions : generated texts.
references : one text each.
encoder : folder of a transformers encoder with its tokenizer.
layer : hidden layer to compare, counted from 0 (embeddings); the last one by default.
batch_size : texts encoded at once.
use_aggregator : mean over pairs, or a list with one score a pair.
"""
_CITATION = "Zhang et al. 2020, BERTScore: Evaluating Text Generation with BERT, ICLR."


class BertScore(evaluate.Metric):
    """Precision, recall and F1; a text longer than the encoder reads is encoded in windows, and counted."""

    def _info(self) -> evaluate.MetricInfo:
        texts = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(texts),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        encoder: str = "",
        layer: int | None = None,
        batch_size: int = 32,
        use_aggregator: bool = True,
    ) -> dict[str, Any]:
        if not encoder:
            raise UsageError("bertscore needs encoder=, the folder of a local encoder with its tokenizer")
        if not Path(encoder).expanduser().is_dir():
            raise MissingDataError(
                f"encoder folder {encoder} does not exist; give a folder with a model and a tokenizer"
            )
        pairs = [(p, r) for p, r in zip(predictions, references, strict=True) if p.strip() and r.strip()]
        texts = sorted({text for pair in pairs for text in pair}, key=len)
        embedded, windowed = _embed(texts, str(Path(encoder).expanduser()), layer, batch_size)
        scores: dict[str, list[float]] = {"precision": [], "recall": [], "f1": []}
        for prediction, reference in zip(predictions, references, strict=True):
            values = (math.nan,) * 3
            if prediction.strip() and reference.strip():
                values = _match(embedded[prediction], embedded[reference])
            for name, value in zip(scores, values, strict=True):
                scores[name].append(value)
        if not use_aggregator:
            return {**scores, "windowed": windowed}
        result: dict[str, Any] = {}
        for name, found in scores.items():
            defined = [value for value in found if not math.isnan(value)]
            result[name] = sum(defined) / len(defined) if defined else math.nan
        result.update(n=len(pairs), windowed=windowed)
        if not pairs:
            result["reason"] = "no pair has both a generated text and a reference"
        return result


def _embed(texts: list[str], encoder: str, layer: int | None, batch_size: int) -> tuple[dict[str, Any], int]:
    """Return for each text its unit token embeddings (n, d) and weights (n,), special tokens weighing nothing."""
    if not texts:
        return {}, 0
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=True)
    model = AutoModel.from_pretrained(encoder, local_files_only=True).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    longest = int(getattr(model.config, "max_position_embeddings", 512) or 512)
    longest = min(longest, tokenizer.model_max_length if tokenizer.model_max_length < 10**6 else longest)
    windows: list[tuple[str, list[int]]] = []
    windowed = 0
    for text in texts:
        parts = tokenizer(text, truncation=True, max_length=longest, return_overflowing_tokens=True)["input_ids"]
        windowed += len(parts) > 1
        windows += [(text, part) for part in parts]
    windows.sort(key=lambda window: len(window[1]))
    ends = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    found: dict[str, list[tuple[Any, Any]]] = {text: [] for text in texts}
    with torch.inference_mode():
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            padded = tokenizer.pad({"input_ids": [ids for _, ids in batch]}, return_tensors="pt").to(device)
            states = model(**padded, output_hidden_states=True).hidden_states[-1 if layer is None else layer]
            states = torch.nn.functional.normalize(states.float(), dim=-1).cpu()
            for row, (text, ids) in enumerate(batch):
                weights = torch.tensor([float(token not in ends) for token in ids])
                found[text].append((states[row, : len(ids)], weights))
    joined = {
        text: (torch.cat([states for states, _ in parts]), torch.cat([weights for _, weights in parts]))
        for text, parts in found.items()
    }
    return joined, windowed


def _match(generated: Any, reference: Any) -> tuple[float, float, float]:
    (own, own_weights), (theirs, their_weights) = generated, reference
    similar = own @ theirs.T
    if not own_weights.sum() or not their_weights.sum():  # nothing but special tokens
        return math.nan, math.nan, math.nan
    precision = float((similar.max(dim=1).values * own_weights).sum() / own_weights.sum())
    recall = float((similar.max(dim=0).values * their_weights).sum() / their_weights.sum())
    total = precision + recall
    return precision, recall, 2 * precision * recall / total if total else 0.0
