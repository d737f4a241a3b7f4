"""What a base model name stands for: the built-in one, an earlier run, a local folder, or a hub id."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import os
from dataclasses import dataclass
from pathlib import Path

from clinical_nlp.errors import MissingDataError, ModelError, nearest
from clinical_nlp.models import int8
from clinical_nlp.runs import Run, file_digest

BUILTIN = {"builtin:tiny": "tiny"}
"""Models that ship with the package."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """Where the weights are, and which adapters of earlier runs lie on them (first one innermost)."""

    name: str
    folder: str
    adapters: tuple[Path, ...] = ()
    parent_run: Path | None = None
    digest: str | None = None
    is_hub: bool = False


def resolve_model(name: str) -> ResolvedModel:
    """Resolve a base model name.

    Parameters
    ----------
    name : `builtin:tiny`, the directory of an earlier run, a local model folder, or a hub id.

    Raises
    ------
    MissingDataError : nothing of that name is there, and the hub may not be asked (offline is the default).
    ModelError : the folder holds code or pickled weights, or no model.
    RunError : the name is a half-written run.
    """
    if name.startswith("builtin:"):
        if name not in BUILTIN:
            raise MissingDataError(f"base_model {name!r} is not known{nearest(name, BUILTIN)}")
        folder = Path(str(importlib.resources.files("clinical_nlp.models").joinpath(BUILTIN[name])))
        if not (folder / "model.safetensors").is_file():
            raise ModelError(
                f"{name} is not in this installation; rebuild it with `clinical-nlp run tiny --output DIR`"
            )
        return ResolvedModel(name, str(folder), digest=folder_digest(folder))
    folder = Path(name)
    if folder.is_dir():
        if (folder / "config.yaml").is_file() or (folder / "manifest.json").is_file():
            return _resolve_run(folder)
        check_folder(folder)
        return ResolvedModel(name, str(folder), digest=folder_digest(folder))
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        cached = _cached_snapshot(name)
        if cached is None:
            raise MissingDataError(
                f"base_model {name!r} is no local folder and offline mode is on: give the path of a copy, "
                "or add --allow-download"
            )
        return ResolvedModel(name, str(cached), digest=folder_digest(cached))
    return ResolvedModel(name, name, is_hub=True)


def _cached_snapshot(name: str) -> Path | None:
    """Return the folder of a hub model that is already in the local hub cache, without asking the hub."""
    root = os.environ.get("HF_HUB_CACHE")
    if root is None:
        root = os.path.join(os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface")), "hub")
    snapshots = Path(root) / f"models--{name.replace('/', '--')}"
    reference = snapshots / "refs" / "main"
    if not reference.is_file():
        return None
    folder = snapshots / "snapshots" / reference.read_text("utf-8").strip()
    if not folder.is_dir():
        return None
    check_folder(folder)
    return folder


def _resolve_run(folder: Path) -> ResolvedModel:
    run = Run.load(folder)
    if (folder / "model").is_dir():
        check_folder(folder / "model")
        return ResolvedModel(str(folder), str(folder / "model"), (), folder, folder_digest(folder / "model"))
    base = run.manifest.get("base_model")
    if not base:
        raise ModelError(
            f"run {folder} holds no model (recipe {run.manifest.get('recipe')}); name one that trained one"
        )
    strategy = ((run.manifest.get("config") or {}).get("strategy") or {}).get("name", "head")
    if strategy != "head" and not (folder / "adapter").is_dir():
        raise ModelError(f"run {folder} (strategy {strategy}) has lost its folder of weights; copy the whole run again")
    # A base that is a folder is looked for beside the run first, so that runs can be moved together.
    beside = (folder / base["relative"]).resolve() if base.get("relative") else None
    inner = resolve_model(str(beside) if beside is not None and beside.is_dir() else base["name"])
    if base.get("digest") and inner.digest and base["digest"] != inner.digest:
        raise ModelError(f"run {folder} was trained on another version of {base['name']}; its weights have changed")
    adapters = (*inner.adapters, folder / "adapter") if (folder / "adapter").is_dir() else inner.adapters
    digest = hashlib.sha256(f"{inner.digest}{[folder_digest(path) for path in adapters]}".encode()).hexdigest()
    return ResolvedModel(str(folder), inner.folder, adapters, folder, digest, inner.is_hub)


def provenance(resolved: ResolvedModel, run: Path) -> dict[str, str | None]:
    """Return what a run's manifest says of its base model, so that `resolve_model` can find and check it again."""
    folder = Path(resolved.name)
    relative = os.path.relpath(folder.resolve(), run.resolve()) if folder.is_dir() else None
    return {"name": resolved.name, "relative": relative, "digest": resolved.digest}


def check_folder(folder: Path) -> None:
    """Refuse a model folder that would run code or unpickle: `auto_map`, or no safetensors weights."""
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{folder} is not a model folder (it has no config.json)")
    try:
        values = json.loads(config.read_text("utf-8"))
    except ValueError:
        raise ModelError(f"{config} is damaged (not valid JSON); copy the model again") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise ModelError(f"{config} names no model_type; copy the model again")
    if "auto_map" in values:
        raise ModelError(
            f"{config} asks for code of its own (auto_map), which is never run; use a standard architecture"
        )
    if not list(folder.glob("*.safetensors")) and not (folder / int8.FILE).is_file():
        raise ModelError(f"{folder} has no safetensors weights; pickled weights are never read, convert them first")


def folder_digest(folder: Path) -> str:
    """Return one sha256 over the names and contents of the files that make the model."""
    suffixes = (".safetensors", ".onnx", ".json", ".model", ".txt")
    paths = [path for path in sorted(folder.iterdir()) if path.suffix in suffixes]
    return _digest(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))


@functools.lru_cache(maxsize=32)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Digest files; those of a large model are read once, as long as size and time of change stay the same."""
    total = hashlib.sha256()
    for path, _, _ in files:
        total.update(f"{path.name} {file_digest(path)}\n".encode())
    return total.hexdigest()
