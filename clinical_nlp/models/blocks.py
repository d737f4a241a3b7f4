"""The anatomy of a transformer, read off its modules: its stack of blocks, and where attention and feed-forward end."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from clinical_nlp.errors import ConfigError

NOT_ADAPTED = (
    r"(.*\.)?((pooler|cls|lm_head|score|classifier|predictions|qa_outputs|generator_predictions|generator_lm_head"
    r"|vocab_transform|vocab_projector|head)(\..*)?|decoder)"
)
"""Paths of poolers and heads, on which no adapter is put: another task, or none, has another head there."""


@dataclass(frozen=True, slots=True)
class BlockOutputs:
    """Paths, from the network, of the linear layers that write a block's attention and feed-forward results."""

    attention: str
    feed_forward: str


def blocks_of(model: Any) -> tuple[str, int]:
    """Return the path of the stack of transformer blocks, and how many there are.

    Raises
    ------
    ConfigError : there is no such stack.
    """
    import torch

    stacks = [
        (len(module), path)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len({type(block) for block in module}) == 1
    ]
    if not stacks:
        raise ConfigError("this base model has no stack of transformer blocks; use full, lora or head")
    count = max(count for count, _ in stacks)
    return next(path for length, path in stacks if length == count), count


def linear_layers(network: Any) -> dict[str, Any]:
    """Return the linear layers of the backbone by path (no head, no part of an adapter), in order.

    A layer that carries an adapter stands under the adapter's own path.
    """
    import torch

    found = {}
    for path, module in network.named_modules():
        if "lora_" in path or "bottleneck_" in path or not isinstance(module, torch.nn.Linear):
            continue
        path = path.removesuffix(".base_layer")
        if not re.fullmatch(NOT_ADAPTED, path):
            found[path] = module
    return found


def block_outputs(network: Any) -> list[BlockOutputs]:
    """Return, block by block, the layers that write the results of attention and of the feed-forward part.

    Both give the block's width; the feed-forward's is the last linear layer of the block, attention's the last one
    below a module whose name says so.

    Raises
    ------
    ConfigError : a block has no such layers (fused or convolutional ones).
    """
    path, count = blocks_of(network)
    width = network.config.hidden_size
    linear = linear_layers(network)
    found = []
    for index in range(count):
        inside = [name for name in linear if name.startswith(f"{path}.{index}.")]
        attention = [
            name
            for name in inside
            if "att" in name.removeprefix(f"{path}.{index}.").split(".")[0] and linear[name].out_features == width
        ]
        if not attention or linear[inside[-1]].out_features != width or attention[-1] == inside[-1]:
            raise ConfigError(
                "the blocks of this base model do not end in linear layers that an adapter could follow; use lora"
            )
        found.append(BlockOutputs(attention[-1], inside[-1]))
    return found
