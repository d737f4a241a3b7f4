"""Strategies: given a base model, say which parameters train."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from clinical_nlp.config import NamedConfig
from clinical_nlp.errors import ConfigError
from clinical_nlp.models.adapters import ADAPTER
from clinical_nlp.models.loading import Quantization


class StrategyConfig(NamedConfig):
    """Which weights may move. See `clinical-nlp list strategies`."""

    name: Literal["head", "full", "lora", "qlora"] = "qlora"
    """head, full, lora or qlora."""
    rank: int = Field(default=16, ge=1)
    """lora, qlora: rank of the update."""
    alpha: int = Field(default=32, ge=1)
    """lora, qlora: scale of the update, divided by the rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """lora, qlora: dropout in front of the update."""

    @property
    def quantization(self) -> Quantization:
        """How the base is loaded under this strategy."""
        return "nf4" if self.name == "qlora" else "none"


def apply_strategy(network: Any, strategy: StrategyConfig, *, seed: int) -> Any:
    """Set which parameters of a loaded base train, adding a fresh adapter where the strategy has one.

    Parameters
    ----------
    network : what `load_base` gave; may carry frozen adapters of earlier runs.
    strategy : the strategy.
    seed : set before the adapter is initialised.

    Returns
    -------
    The network to train: the same object, a peft model around it, or (full) the base with earlier adapters merged in.

    Raises
    ------
    ConfigError : the strategy and the loaded base do not go together.
    """
    import torch
    from peft import LoraConfig, PeftModel

    four_bit = any(type(module).__name__ == "Linear4bit" for module in network.modules())
    if strategy.name == "full":
        if four_bit:
            raise ConfigError("strategy 'full' cannot train 4-bit weights; use qlora")
        if isinstance(network, PeftModel):
            network = network.merge_and_unload()
        for parameter in network.parameters():
            parameter.requires_grad_(True)
        return network
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    if strategy.name == "head":
        return network
    torch.manual_seed(seed)
    targets = _linear_names(network)
    config = LoraConfig(
        r=strategy.rank,
        lora_alpha=strategy.alpha,
        lora_dropout=strategy.dropout,
        target_modules=targets,
        exclude_modules=r".*pooler.*" if any("pooler" in name for name, _ in network.named_modules()) else None,
        bias="none",
        task_type=None,
    )
    if isinstance(network, PeftModel):
        tuner: Any = network.base_model
        parents = list(tuner.active_adapters)
        network.add_adapter(ADAPTER, config)
        tuner.set_adapter([*parents, ADAPTER])
    else:
        network = PeftModel(network, config, adapter_name=ADAPTER)
    for name, parameter in network.named_parameters():
        # Updates of a rank-16 adapter are lost in bf16, so the adapter is float32 whatever the base is.
        if f".{ADAPTER}." in name or name.endswith(f".{ADAPTER}"):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        else:
            parameter.requires_grad_(False)
    return network


def _linear_names(network: Any) -> list[str]:
    """Return the last name parts of all linear layers of the backbone (no head), sorted."""
    import torch

    names = set()
    for path, module in network.named_modules():
        last = path.rpartition(".")[2]
        if "lora_" in path or last in ("lm_head", "score", "classifier", "decoder", "predictions"):
            continue
        if last == "base_layer":
            last = path.split(".")[-2]
        if isinstance(module, torch.nn.Linear):
            names.add(last)
    if not names:
        raise ConfigError("this base model has no linear layers that an adapter could be put on; use full")
    return sorted(names)


def default_learning_rate(strategy: str, parameters: int) -> float:
    """Return a peak learning rate that works for most: by strategy, and lower above 200 M parameters.

    Few weights want large steps (Biderman et al. 2024, LoRA Learns Less and Forgets Less), large models small ones.
    """
    large = parameters > 200_000_000
    if strategy == "full":
        return 2e-5 if large else 2e-4
    if strategy == "head":
        return 1e-3
    return 2e-4 if large else 1e-3


def trainable_count(model: Any) -> tuple[int, int]:
    """Return (trainable, all) parameter counts."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trainable, sum(parameter.numel() for parameter in model.parameters())
