"""Adapters: laid on a base and on one another, on disk as safetensors and JSON named relative to the backbone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clinical_nlp.errors import ConfigError, ModelError
from clinical_nlp.models import bottleneck

ADAPTER = "task"
"""Name of the adapter that is being trained; the adapters of earlier runs below it are frozen."""
_ROOT = "base_model.model."


def add_adapter(network: Any, config: Any, name: str) -> Any:
    """Lay an adapter on a network that may carry others; all stay active.

    Low-rank updates add up, so they lie side by side. Anything else (dora, ia3, bottleneck) acts on what lies below it,
    so earlier low-rank updates are merged into the weights first.

    Returns
    -------
    A peft model around the network; for a bottleneck, the network itself.

    Raises
    ------
    ModelError : earlier adapters would have to be merged and cannot be.
    """
    from peft import PeftModel

    if isinstance(config, bottleneck.BottleneckConfig):
        network = merge_adapters(network)
        bottleneck.add(network, config, name)
        return network
    # peft warns where a model has no pooler or head that could be left out.
    warnings.filterwarnings("ignore", message="You have passed exclude_modules", category=UserWarning)
    if isinstance(network, PeftModel):
        if all(_adds_up(each) for each in (config, *network.peft_config.values())):
            tuner: Any = network.base_model
            earlier = list(tuner.active_adapters)
            network.add_adapter(name, config)
            tuner.set_adapter([*earlier, name])
            return network
        network = merge_adapters(network)
    return PeftModel(network, config, adapter_name=name)


def _adds_up(config: Any) -> bool:
    return str(getattr(config.peft_type, "value", config.peft_type)) == "LORA" and not config.use_dora


def merge_adapters(network: Any) -> Any:
    """Merge the adapters of a network into its weights, if it has any.

    Raises
    ------
    ModelError : the weights are 4-bit, or a bottleneck lies below the adapter, so that no weights equal the two.
    """
    from peft import PeftModel

    if not isinstance(network, PeftModel):
        return network
    if any(type(module).__name__ == "Linear4bit" for module in network.modules()):
        raise ModelError(
            "an adapter on 4-bit weights cannot be merged in place; run the recipe merge on that run, and start from "
            "what it writes"
        )
    if bottleneck.names(network):
        raise ModelError(
            "an adapter on top of a bottleneck adapter cannot be merged into the weights; start from another run"
        )
    merged: Any = network
    return merged.merge_and_unload()


def has_adapter(network: Any, name: str = ADAPTER) -> bool:
    """Say whether a network carries adapter `name`."""
    return name in getattr(network, "peft_config", {}) or name in bottleneck.names(network)


def is_adapter_weight(parameter: str, name: str) -> bool:
    """Say whether a parameter, by its path, belongs to adapter `name`."""
    return f".{name}." in parameter or parameter.endswith(f".{name}") or f".{bottleneck.PREFIX}{name}." in parameter


def save_adapter(model: Any, folder: Path, *, name: str, prefix: str = "") -> None:
    """Save one adapter of a network.

    Parameters
    ----------
    model : peft model, or a network with a bottleneck.
    folder : target folder, made if needed.
    name : which of its adapters.
    prefix : attribute path from the wrapped network to its backbone (`model.`); removed from the saved names.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if name in bottleneck.names(model):
        state = bottleneck.state(model, name)
        config = bottleneck.config_of(model, name).to_dict()
    else:
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        config = model.peft_config[name].to_dict()
        config |= {"task_type": None, "inference_mode": True, "base_model_name_or_path": None, "modules_to_save": None}
    renamed = {
        _ROOT + key.removeprefix(_ROOT).removeprefix(prefix): value.detach().cpu().contiguous()
        for key, value in state.items()
    }
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if isinstance(config.get("target_modules"), (list, set)):  # paths that begin at the backbone fit any task's network
        for key in ("target_modules", "feedforward_modules"):
            if config.get(key):
                config[key] = sorted(path.removeprefix(prefix) for path in config[key])
    text = json.dumps(config, default=lambda value: sorted(value) if isinstance(value, set) else str(value), indent=1)
    (folder / "adapter_config.json").write_text(text + "\n", "utf-8")


def adapter_config(folder: Path) -> Any:
    """Read the config of a saved adapter: peft's, or that of a bottleneck."""
    from peft import PeftConfig

    path = folder / "adapter_config.json"
    try:
        values = json.loads(path.read_text("utf-8"))
        if values["peft_type"] == "BOTTLENECK":
            return bottleneck.BottleneckConfig(**{key: values[key] for key in ("size", "placement", "dropout")})
        return PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError):
        raise ModelError(f"{path} is missing or damaged; copy the run again") from None


def adapter_state(folder: Path) -> dict[str, Any]:
    """Read the weights of a saved adapter."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError):
        raise ModelError(f"{folder / 'adapter_model.safetensors'} is missing or damaged; copy the run again") from None


def stack_adapters(network: Any, folders: Sequence[Path], *, prefix: str = "") -> Any:
    """Lay the saved adapters of earlier runs on a network, innermost first, all frozen and all active.

    Parameters
    ----------
    prefix : attribute path from the network to its backbone (`model.`).
    """
    for index, folder in enumerate(folders):
        name = f"parent{index}"
        try:
            network = add_adapter(network, adapter_config(folder), name)
        except (ConfigError, ValueError) as error:  # peft raises ValueError where the layers it names are not there
            raise ModelError(f"the adapter in {folder} does not fit its base model ({type(error).__name__})") from None
        load_state(network, adapter_state(folder), name, prefix=prefix)
    for parameter in network.parameters() if folders else ():
        parameter.requires_grad_(False)
    return network


def load_state(model: Any, state: dict[str, Any], name: str, *, prefix: str = "") -> None:
    """Put saved weights into adapter `name` of a network; any name that does not fit is an error."""
    if name in bottleneck.names(model):
        renamed = {prefix + key.removeprefix(_ROOT): value for key, value in state.items()}
        unexpected, missing = bottleneck.load_state(model, renamed, name)
    else:
        from peft import set_peft_model_state_dict

        renamed = {_ROOT + prefix + key.removeprefix(_ROOT): value for key, value in state.items()}
        outcome: Any = set_peft_model_state_dict(model, renamed, adapter_name=name)
        unexpected = len(outcome.unexpected_keys)
        missing = len([key for key in outcome.missing_keys if f".{name}." in key or key.endswith(f".{name}")])
    if unexpected or missing:
        raise ModelError(
            f"an adapter does not fit its base model ({unexpected} weights too many, {missing} missing); it was "
            "trained on another architecture"
        )
