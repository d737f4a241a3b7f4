"""Merge a run's adapters into weights: onto the dequantised base, since that is what the adapter was trained on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from clinical_nlp.errors import ModelError
from clinical_nlp.models import bottleneck
from clinical_nlp.models.adapters import merge_adapters, stack_adapters
from clinical_nlp.models.loading import BaseModel, Quantization, backbone_prefix, load_base


def load_merged(
    name: str,
    *,
    kind: Literal["backbone", "language"] = "backbone",
    quantization: Quantization,
    bidirectional: bool = False,
) -> BaseModel:
    """Load a run with its adapters merged into float32 weights.

    Merging into the original weights of a base that was 4-bit in training gives another model, since the adapter has
    learned to make up for what quantisation did to them. So the base is quantised as it was, dequantised, and merged.

    Parameters
    ----------
    name : directory of a run that holds an adapter.
    kind, bidirectional : see `load_base`.
    quantization : how the base was loaded when the run was trained.

    Raises
    ------
    ModelError : the run has no adapter, or one that cannot be merged (bottleneck).
    """
    base = load_base(name, kind=kind, quantization=quantization, bidirectional=bidirectional, dtype="fp32")
    if not base.resolved.adapters:
        raise ModelError(f"run {name} has no adapter that could be merged; its weights are whole already")
    network = base.network
    if bottleneck.names(network):
        raise ModelError(f"run {name} has a bottleneck adapter, a network of its own that no weights can stand for")
    network = dequantize(network.unload() if hasattr(network, "peft_config") else network).float()
    prefix = "" if kind == "backbone" else backbone_prefix(network)
    network = merge_adapters(stack_adapters(network, base.resolved.adapters, prefix=prefix))
    return replace(base, network=network, quantization="none")


def dequantize(network: Any) -> Any:
    """Replace every 4-bit layer by a plain one with the weights that it stands for; other networks stay as they are."""
    import torch

    layers = {path: module for path, module in network.named_modules() if type(module).__name__ == "Linear4bit"}
    if not layers:
        return network
    from bitsandbytes.functional import dequantize_4bit

    for path, layer in layers.items():
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device=weight.device)
        plain.weight.data = weight
        if layer.bias is not None:
            plain.bias.data = layer.bias.data.float()
        parent, _, child = path.rpartition(".")
        setattr(network.get_submodule(parent) if parent else network, child, plain)
    # What says "4-bit" would be written to disk, and refuse the next loading.
    network.config.quantization_config = None
    del network.config.quantization_config
    for attribute in ("is_quantized", "is_loaded_in_4bit", "hf_quantizer", "quantization_method"):
        if attribute in network.__dict__:
            delattr(network, attribute)
    return network
