"""A tiny causal model that is taught, on the spot, which option to name after some questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def write_answering(
    folder: Path, prompts: Sequence[str] = (), answers: Sequence[int] = (), *, steps: int = 300
) -> Path:
    """Write a Llama-architecture model with the tokenizer of builtin:tiny, trained until it knows the answers.

    What it says after other prompts is no more than what it happens to say.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from clinical_nlp.models.resolve import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("builtin:tiny").folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    rows = [
        [tokenizer.bos_token_id, *tokenizer(f"{prompt} {answer}", add_special_tokens=False)["input_ids"]]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    if rows:
        _teach(model, rows, steps)
    model.save_pretrained(folder)
    return folder


def _teach(model, rows, steps):
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])  # the answer is last in every row
    mask = (torch.arange(width) >= torch.tensor([[width - len(row)] for row in rows])).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(steps):
        optimiser.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=2).logits
        loss = torch.nn.functional.cross_entropy(logits[:, 0], ids[:, -1])
        loss.backward()
        optimiser.step()
        if loss < 0.02:
            return
    raise AssertionError(f"the model has not learned the answers (loss {loss:.3f})")
