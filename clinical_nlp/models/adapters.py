"""Adapters on disk: safetensors and JSON, named relative to the backbone, so that every task can lie on any other's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clinical_nlp.errors import ModelError

ADAPTER = "task"
"""Name of the adapter that is being trained; the adapters of earlier runs below it are frozen."""
_ROOT = "base_model.model."


def save_adapter(model: Any, folder: Path, *, name: str, prefix: str = "") -> None:
    """Save one adapter of a peft model.

    Parameters
    ----------
    model : PeftModel.
    folder : target folder, made if needed.
    name : which of its adapters.
    prefix : attribute path from the wrapped network to its backbone (`model.`); removed from the saved names.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    renamed = {
        _ROOT + key.removeprefix(_ROOT).removeprefix(prefix): value.detach().cpu().contiguous()
        for key, value in state.items()
    }
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config[name].to_dict()
    config |= {"task_type": None, "inference_mode": True, "base_model_name_or_path": None, "modules_to_save": None}
    text = json.dumps(config, default=lambda value: sorted(value) if isinstance(value, set) else str(value), indent=1)
    (folder / "adapter_config.json").write_text(text + "\n", "utf-8")


def adapter_config(folder: Path) -> Any:
    """Read the peft config of a saved adapter."""
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError):
        raise ModelError(f"{folder / 'adapter_config.json'} is missing or damaged; copy the run again") from None


def adapter_state(folder: Path) -> dict[str, Any]:
    """Read the weights of a saved adapter."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError):
        raise ModelError(f"{folder / 'adapter_model.safetensors'} is missing or damaged; copy the run again") from None


def load_state(model: Any, state: dict[str, Any], name: str, *, prefix: str = "") -> None:
    """Put saved weights into adapter `name` of a peft model; any name that does not fit is an error."""
    from peft import set_peft_model_state_dict

    renamed = {_ROOT + prefix + key.removeprefix(_ROOT): value for key, value in state.items()}
    outcome: Any = set_peft_model_state_dict(model, renamed, adapter_name=name)
    missing = [key for key in outcome.missing_keys if f".{name}." in key]
    if outcome.unexpected_keys or missing:
        raise ModelError(
            f"an adapter does not fit its base model ({len(outcome.unexpected_keys)} weights too many, "
            f"{len(missing)} missing); it was trained on another architecture"
        )
