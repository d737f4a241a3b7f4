"""Notes to vectors: mean-pooled hidden states of any base model or run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def embed_notes(
    model: str, texts: Sequence[str], *, batch_size: int = 16, max_tokens: int = 512, quantization: str = "none"
) -> np.ndarray:
    """Embed notes.

    Parameters
    ----------
    model : base model name or run directory.
    texts : n texts; an empty text gives the vector of the special tokens alone, or zeros.
    batch_size : notes a forward pass.
    max_tokens : only the first tokens of a note are read.

    Returns
    -------
    (n, d) float32, mean of the last hidden states over the note's tokens.
    """
    import torch

    from clinical_nlp.models.loading import load_base

    base = load_base(model, quantization="nf4" if quantization == "nf4" else "none")
    base.network.eval()
    encoded = base.tokenizer(list(texts), truncation=True, max_length=max_tokens, add_special_tokens=True)["input_ids"]
    order = sorted(range(len(texts)), key=lambda index: (len(encoded[index]), index))
    device = next(base.network.parameters()).device
    vectors: Any = None
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        width = max(1, *(len(encoded[row]) for row in rows)) if rows else 1
        ids = torch.full((len(rows), width), base.tokenizer.pad_token_id or 0)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for position, row in enumerate(rows):
            ids[position, : len(encoded[row])] = torch.tensor(encoded[row], dtype=torch.long)
            mask[position, : len(encoded[row])] = 1
        with torch.inference_mode():
            hidden = base.network(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state.float()
        weight = mask.to(device).unsqueeze(-1).float()
        pooled = ((hidden * weight).sum(1) / weight.sum(1).clamp(min=1)).cpu().numpy()
        if vectors is None:
            vectors = np.zeros((len(texts), pooled.shape[1]), dtype=np.float32)
        vectors[rows] = pooled
    return vectors if vectors is not None else np.zeros((0, 0), dtype=np.float32)
