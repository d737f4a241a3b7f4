"""Bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2021): a small two-layer network behind a linear layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from clinical_nlp.errors import ConfigError
from clinical_nlp.models.blocks import block_outputs, linear_layers

PREFIX = "bottleneck_"


@dataclass(frozen=True, slots=True)
class BottleneckConfig:
    """Inner width, where the adapters stand, and dropout in front of them."""

    size: int = 48
    placement: str = "houlsby"
    dropout: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return what is written beside the weights."""
        return {"peft_type": "BOTTLENECK", **asdict(self)}


def add(network: Any, config: BottleneckConfig, name: str) -> None:
    """Put an adapter `name` behind the chosen layers: y becomes y + grow(gelu(shrink(y))), with grow zero at first.

    The small network is a child of the layer and runs in a hook on its output, so the layer keeps its class (a 4-bit
    one too) and its weights keep their names.

    Raises
    ------
    ConfigError : the architecture has no layers to put it on.
    """
    import torch

    width = network.config.hidden_size
    linear = linear_layers(network)
    for outputs in block_outputs(network):
        paths = [outputs.feed_forward] if config.placement == "pfeiffer" else [outputs.attention, outputs.feed_forward]
        for path in paths:
            layer = linear[path]
            shrink, grow = torch.nn.Linear(width, config.size), torch.nn.Linear(config.size, width)
            torch.nn.init.normal_(shrink.weight, std=0.02)
            for tensor in (shrink.bias, grow.weight, grow.bias):
                torch.nn.init.zeros_(tensor)
            small = torch.nn.Sequential()
            small.add_module("dropout", torch.nn.Dropout(config.dropout))
            small.add_module("shrink", shrink)
            small.add_module("gelu", torch.nn.GELU())
            small.add_module("grow", grow)
            layer.add_module(f"{PREFIX}{name}", small.to(layer.weight.device))
            layer.register_forward_hook(_Behind(f"{PREFIX}{name}", config))


class _Behind:
    """The hook: adds what the adapter makes of a layer's output, in the adapter's own precision."""

    def __init__(self, child: str, config: BottleneckConfig) -> None:
        self.child, self.config = child, config

    def __call__(self, layer: Any, inputs: Any, output: Any) -> Any:
        small = getattr(layer, self.child)
        return output + small(output.to(small.shrink.weight.dtype)).to(output.dtype)


def names(network: Any) -> list[str]:
    """Return the names of the bottleneck adapters that a network carries, in the order they were added."""
    found: dict[str, None] = {}
    for path, _ in network.named_modules():
        part = path.rpartition(".")[2]
        if part.startswith(PREFIX):
            found[part.removeprefix(PREFIX)] = None
    return list(found)


def config_of(network: Any, name: str) -> BottleneckConfig:
    """Return the config that adapter `name` of a network was added with."""
    for module in network.modules():
        if f"{PREFIX}{name}" in module._modules:
            return next(
                hook.config
                for hook in module._forward_hooks.values()
                if getattr(hook, "child", None) == f"{PREFIX}{name}"
            )
    raise KeyError(name)


def state(network: Any, name: str) -> dict[str, Any]:
    """Return the weights of adapter `name`, named without it."""
    return {
        key.replace(f".{PREFIX}{name}.", f".{PREFIX[:-1]}.").replace(".base_layer.", "."): value
        for key, value in network.state_dict().items()
        if f".{PREFIX}{name}." in key
    }


def load_state(network: Any, weights: dict[str, Any], name: str) -> tuple[int, int]:
    """Put saved weights into adapter `name`; return how many were too many and how many are missing."""
    import torch

    own = {
        key.replace(f".{PREFIX}{name}.", f".{PREFIX[:-1]}.").replace(".base_layer.", "."): value
        for key, value in network.named_parameters()
        if f".{PREFIX}{name}." in key
    }
    with torch.no_grad():
        for key in own.keys() & weights.keys():
            if own[key].shape != weights[key].shape:
                raise ConfigError("a bottleneck adapter has another width than its base model")
            own[key].copy_(weights[key])
    return len(weights.keys() - own.keys()), len(own.keys() - weights.keys())
