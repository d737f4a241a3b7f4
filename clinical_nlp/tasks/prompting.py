"""Prompting a base model as it is: the baseline that every fine-tuned model is compared with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from clinical_nlp.models.loading import BaseModel
from clinical_nlp.tasks.ner import most_tokens


def score_continuations(
    base: BaseModel, prompts: Sequence[str], continuations: Sequence[Sequence[str]], *, batch_size: int = 64
) -> list[np.ndarray]:
    """Mean log-probability of the tokens of continuations after a prompt, under a causal language model.

    The prompt is read once. One that is too long for the model with its longest continuation loses its beginning.

    Parameters
    ----------
    base : loaded with kind `causal`.
    prompts : n prompts.
    continuations : for each prompt the texts that may follow; each begins where the prompt ends.

    Returns
    -------
    n arrays, one value a continuation; -inf for one without a token.
    """
    import torch

    network, tokenizer = base.network, base.tokenizer
    limit = most_tokens(network) or 1_000_000
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    results = []
    with torch.inference_mode():
        for prompt, texts in zip(prompts, continuations, strict=True):
            rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            longest = max((len(row) for row in rows), default=0)
            ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
            ids = [*start, *ids[max(0, len(ids) - max(1, limit - longest - len(start))) :]]
            read = network(input_ids=torch.tensor([ids], device=device), use_cache=True)
            first = torch.log_softmax(read.logits[0, -1].float(), -1)
            keys = read.past_key_values
            scores = np.full(len(texts), -np.inf)
            order = [index for index in np.argsort([len(row) for row in rows], kind="stable") if rows[index]]
            for begin in range(0, len(order), batch_size):
                chosen = order[begin : begin + batch_size]
                scores[chosen] = _mean_log_probs(network, keys, first, [rows[index] for index in chosen], len(ids))
            results.append(scores)
    network.train(was_training)
    return results


def _mean_log_probs(network: Any, keys: Any, first: Any, rows: Sequence[list[int]], read: int) -> list[float]:
    """Continue one read prompt by several rows at once."""
    import copy

    import torch

    width = max(len(row) for row in rows)
    tokens = torch.zeros((len(rows), width), dtype=torch.long, device=first.device)
    mask = torch.zeros((len(rows), width), dtype=torch.long, device=first.device)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row, device=first.device)
        mask[index, : len(row)] = 1
    cache = copy.deepcopy(keys)
    cache.batch_repeat_interleave(len(rows))
    before = torch.ones((len(rows), read), dtype=torch.long, device=first.device)
    logits = network(
        input_ids=tokens, attention_mask=torch.cat([before, mask], 1), past_key_values=cache, use_cache=True
    ).logits.float()
    found = torch.log_softmax(logits, -1)[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)
    total = first[tokens[:, 0]] + (found * mask[:, 1:]).sum(1)
    return [float(value) for value in total / mask.sum(1)]


def generate_lines(
    base: BaseModel, prompts: Sequence[str], *, max_new_tokens: int = 48, batch_size: int = 8
) -> list[str]:
    """Continue each prompt greedily to the end of the line, with a causal language model.

    A prompt that is too long for the model loses its beginning.
    """
    import torch

    tokenizer, network = base.tokenizer, base.network
    limit = most_tokens(network) or 1_000_000
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    room = max(1, limit - max_new_tokens - len(start))
    rows = [tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"] for prompt in prompts]
    rows = [[*start, *ids[max(0, len(ids) - room) :]] for ids in rows]
    order = sorted(range(len(rows)), key=lambda index: (len(rows[index]), index))
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    lines = [""] * len(rows)
    with torch.inference_mode():
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            width = len(rows[chosen[-1]])
            tokens = torch.full((len(chosen), width), tokenizer.pad_token_id or 0)
            mask = torch.zeros_like(tokens)
            for place, index in enumerate(chosen):
                tokens[place, width - len(rows[index]) :] = torch.tensor(rows[index])
                mask[place, width - len(rows[index]) :] = 1
            found = network.generate(
                input_ids=tokens.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                stop_strings="\n",
                tokenizer=tokenizer,
            )
            for place, index in enumerate(chosen):
                lines[index] = tokenizer.decode(found[place, width:], skip_special_tokens=True).split("\n")[0]
    network.train(was_training)
    return lines


def place_items(text: str, line: str, label: str) -> list[tuple[int, int, str]]:
    """Find what a generated line lists (items divided by semicolons) in the note: every place, as whole words.

    An item that the note does not contain marks nothing.
    """
    spans = set()
    for item in {item.strip(" .-") for item in line.split(";")} - {""}:
        pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, item.split())) + r"(?!\w)"
        spans |= {(*match.span(), label) for match in re.finditer(pattern, text, re.IGNORECASE)}
    return sorted(spans)
