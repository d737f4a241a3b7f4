"""Strategies: given a base model, say which parameters train, at which learning rate, from which step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from clinical_nlp.config import NamedConfig
from clinical_nlp.errors import ConfigError
from clinical_nlp.models import bottleneck
from clinical_nlp.models.adapters import ADAPTER, add_adapter, is_adapter_weight, merge_adapters
from clinical_nlp.models.blocks import NOT_ADAPTED, block_outputs, blocks_of, linear_layers
from clinical_nlp.models.loading import Quantization


class StrategyConfig(NamedConfig):
    """Which weights may move. See `clinical-nlp list strategies`."""

    name: Literal["head", "lp_ft", "gradual", "full", "lora", "dora", "qlora", "bottleneck", "ia3"] = "qlora"
    """head, lp_ft, gradual, full, lora, dora, qlora, bottleneck or ia3."""
    rank: int = Field(default=16, ge=1)
    """lora, dora, qlora: rank of the update."""
    alpha: int = Field(default=32, ge=1)
    """lora, dora, qlora: scale of the update, divided by the rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """lora, dora, qlora, bottleneck: dropout in front of the update."""
    size: int = Field(default=48, ge=1)
    """bottleneck: width of its inner layer."""
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """bottleneck: after attention and feed-forward (houlsby), or after feed-forward alone (pfeiffer)."""
    frozen_share: float = Field(default=0.3, gt=0, lt=1)
    """lp_ft: share of the steps in which only the head learns. gradual: share after which every layer learns."""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """full, lp_ft, gradual: learning rate of each layer as a share of that of the layer above; default gradual 0.8,
    else 1."""

    @property
    def quantization(self) -> Quantization:
        """How the base is loaded under this strategy."""
        return "nf4" if self.name == "qlora" else "none"

    @property
    def moves_base(self) -> bool:
        """Whether the weights of the base themselves move, so that a run holds a whole model and not an adapter."""
        return self.name in ("full", "lp_ft", "gradual")


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that share a learning rate, and the share of the steps after which they begin to learn."""

    names: tuple[str, ...]
    learning_rate: float
    start: float = 0.0


def apply_strategy(network: Any, strategy: StrategyConfig, *, seed: int) -> Any:
    """Set which parameters of a loaded base train, adding a fresh adapter where the strategy has one.

    Parameters
    ----------
    network : what `load_base` gave; may carry frozen adapters of earlier runs.
    strategy : the strategy.
    seed : set before the adapter is initialised.

    Returns
    -------
    The network to train: the same object, a peft model around it, or (where the base moves) the base with earlier
    adapters merged in. Weights that train are float32 whatever the base is: small updates are lost in bf16.

    Raises
    ------
    ConfigError : the strategy and the loaded base do not go together.
    """
    import torch

    four_bit = any(type(module).__name__ == "Linear4bit" for module in network.modules())
    if strategy.moves_base:
        if four_bit:
            raise ConfigError(f"strategy {strategy.name!r} cannot train 4-bit weights; use qlora")
        if bottleneck.names(network):
            raise ConfigError(
                f"strategy {strategy.name!r} cannot start from a run with bottleneck adapters, which cannot be merged "
                "into the weights; use lora, dora, ia3, bottleneck or head"
            )
        network = merge_adapters(network).float()
        for parameter in network.parameters():
            parameter.requires_grad_(True)
        return network
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    if strategy.name == "head":
        return network
    if strategy.name in ("dora", "ia3", "bottleneck"):  # they act on what lies below them: see add_adapter
        network = merge_adapters(network)
    torch.manual_seed(seed)
    network = add_adapter(network, _adapter_config(network, strategy), ADAPTER)
    for name, parameter in network.named_parameters():
        if is_adapter_weight(name, ADAPTER):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        else:
            parameter.requires_grad_(False)
    return network


def _adapter_config(network: Any, strategy: StrategyConfig) -> Any:
    """Return the peft config, or that of the bottleneck, for the layers of this architecture."""
    from peft import IA3Config, LoraConfig

    if strategy.name == "bottleneck":
        return bottleneck.BottleneckConfig(size=strategy.size, placement=strategy.placement, dropout=strategy.dropout)
    if strategy.name == "ia3":
        targets, forward = _ia3_targets(network)
        return IA3Config(target_modules=targets, feedforward_modules=forward, task_type=None)
    linear = linear_layers(network)
    if not linear:
        raise ConfigError("this base model has no linear layers that an adapter could be put on; use full")
    return LoraConfig(
        r=strategy.rank,
        lora_alpha=strategy.alpha,
        lora_dropout=strategy.dropout,
        use_dora=strategy.name == "dora",
        target_modules=sorted({path.rpartition(".")[2] for path in linear}),
        exclude_modules=NOT_ADAPTED,
        bias="none",
        task_type=None,
    )


_KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "key_proj", "value_proj", "k_lin", "v_lin")


def _ia3_targets(network: Any) -> tuple[list[str], list[str]]:
    """Return the layers that (IA)3 scales, and those of them whose input it scales (Liu et al. 2022)."""
    forward = [outputs.feed_forward for outputs in block_outputs(network)]
    scaled = [path for path in linear_layers(network) if path.rpartition(".")[2] in _KEYS_AND_VALUES]
    if not scaled:
        raise ConfigError(
            "strategy 'ia3' scales keys and values, which this architecture does not keep in layers of their own; "
            "use lora"
        )
    return scaled + forward, forward


def parameter_groups(
    model: Any,
    strategy: StrategyConfig,
    *,
    head: str | None,
    learning_rate: float,
    head_learning_rate: float,
) -> list[Group]:
    """Say at which learning rate, and from which share of the steps, each trainable parameter learns.

    Parameters
    ----------
    model : after `apply_strategy`, with its head.
    strategy : the strategy.
    head : attribute of the model that holds the task head, if it has one.
    learning_rate, head_learning_rate : peak rates of the base (or adapter) and of the head.

    Returns
    -------
    Groups that cover every trainable parameter once. With `layer_decay` d, a layer k below the top one learns at
    d^k times the rate (Howard and Ruder 2018; Sun et al. 2019), the embeddings as one layer below the lowest.

    Raises
    ------
    ConfigError : lp_ft without a head.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    of_head = tuple(name for name in names if head is not None and name.startswith(f"{head}."))
    if strategy.name == "lp_ft" and not of_head:
        raise ConfigError("strategy 'lp_ft' trains the head first, and pretraining has no head; use full or gradual")
    rest = [name for name in names if name not in set(of_head)]
    groups = [Group(of_head, head_learning_rate)] if of_head else []
    if not strategy.moves_base:
        return [*groups, Group(tuple(rest), learning_rate)] if rest else groups
    depth, layers = _depth(model, rest)
    decay = strategy.layer_decay or (0.8 if strategy.name == "gradual" else 1.0)

    def start(below: int) -> float:
        if strategy.name == "lp_ft":
            return strategy.frozen_share
        if strategy.name == "gradual":
            return strategy.frozen_share * (below + bool(of_head)) / (layers + bool(of_head))
        return 0.0

    by_depth: dict[int, list[str]] = {}
    for name in rest:
        by_depth.setdefault(depth(name), []).append(name)
    merged: dict[tuple[float, float], list[str]] = {}
    for below in sorted(by_depth):
        merged.setdefault((learning_rate * decay**below, start(below)), []).extend(by_depth[below])
    return groups + [Group(tuple(found), rate, begin) for (rate, begin), found in merged.items()]


def _depth(model: Any, names: list[str]) -> tuple[Callable[[str], int], int]:
    """Return a function from parameter name to how many layers it lies below the top one, and the number of layers.

    What comes after the layers (a final norm, a language-model head) counts as the top layer, what comes before them
    as one more layer.
    """
    path, layers = blocks_of(model)
    first = next((place for place, name in enumerate(names) if name.startswith(f"{path}.")), 0)
    before = set(names[:first])

    def depth(name: str) -> int:
        if name.startswith(f"{path}."):
            return layers - 1 - int(name.removeprefix(f"{path}.").split(".")[0])
        return layers if name in before else 0

    return depth, layers


def default_learning_rate(strategy: str, parameters: int) -> float:
    """Return a peak learning rate that works for most: by strategy, and lower above 200 M parameters.

    Few weights want large steps (Biderman et al. 2024, LoRA Learns Less and Forgets Less), large models small ones;
    the scales of ia3 want the largest (Liu et al. 2022).
    """
    large = parameters > 200_000_000
    if strategy in ("full", "lp_ft", "gradual"):
        return 2e-5 if large else 2e-4
    if strategy == "head":
        return 1e-3
    if strategy == "ia3":
        return 3e-3 if large else 1e-2
    return 2e-4 if large else 1e-3


def trainable_count(model: Any) -> tuple[int, int]:
    """Return (trainable, all) parameter counts; a 4-bit weight counts as the weights that it stands for."""
    trainable = total = 0
    for parameter in model.parameters():
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
        count = parameter.numel() if shape is None else shape.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total
