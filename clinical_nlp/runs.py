"""Run directories: everything one execution produced, written atomically, recognised when half-written.

A run is complete when `manifest.json` is there. It is written last; until then `config.yaml` alone marks a run in
progress, which can be resumed and is refused as a base model or as an output.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import IO, Any

from clinical_nlp.config import Config, to_yaml
from clinical_nlp.errors import NoRunError, RunError, UsageError
from clinical_nlp.progress import is_main_process

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "spacy",
    "pyarrow",
    "numpy",
)
_CACHE_VARIABLES = (
    "HF_HOME",
    "HF_DATASETS_CACHE",
    "HF_METRICS_CACHE",
    "HF_MODULES_CACHE",
    "HF_EVALUATE_CACHE",
    "TMPDIR",
)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A reported number with its patient-bootstrap interval and what it was measured on.

    `low` and `high` are NaN where no interval is valid (too few patients); `note` then says why.
    """

    value: float
    low: float
    high: float
    n_patients: int
    n_notes: int
    part: str = "test"
    note: str = ""

    def __str__(self) -> str:
        interval = "no interval" if math.isnan(self.low) else f"{self.low:.3f} to {self.high:.3f}"
        return f"{self.value:.3f} ({interval}; {self.n_patients} patients, {self.n_notes} notes, {self.part})"


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a crash leaves the old content or the new, never a part (temporary file, fsync, rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as handle:
            handle.write(data.encode("utf-8") if isinstance(data, str) else data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV, atomically; other keys are left out, numbers have four digits, NaN is an empty cell."""
    import csv
    import io

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        plain = {key: "" if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        writer.writerow({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in plain.items()})
    write_atomic(path, text.getvalue())


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the file system can (some network shares refuse it)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the given order; NaN becomes null."""
    write_atomic(path, json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(inner) for inner in value), key=str)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (Path, datetime.date)):
        return str(value)
    return value


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, read in blocks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _huggingface_home() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("HF_HOME") or cache / "huggingface")


def contain_caches(folder: Path) -> None:
    """Point every cache and temporary folder of the libraries below `folder`, imported or not.

    The hub cache (models, no note text) stays where the user has it. `contained_caches` undoes it.
    """
    os.environ.setdefault("HF_HUB_CACHE", str(_huggingface_home() / "hub"))
    import multiprocessing.util

    # Workers talk through sockets in this folder. It holds no data, is made once, and a socket's path may not be
    # longer than 107 bytes, which a run directory may be.
    multiprocessing.util.get_temp_dir()
    folder = folder.resolve()
    for variable in _CACHE_VARIABLES:
        os.environ[variable] = str(folder / variable.lower())
        (folder / variable.lower()).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _tell_libraries()


@contextmanager
def contained_caches(folder: Path) -> Iterator[None]:
    """Contain the caches while the block runs (see `contain_caches`), then delete `folder` and put things back."""
    before = {variable: os.environ.get(variable) for variable in _CACHE_VARIABLES}
    shutil.rmtree(folder, ignore_errors=True)
    contain_caches(folder)
    try:
        yield
    finally:
        for variable, value in before.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value
        _tell_libraries()
        shutil.rmtree(folder, ignore_errors=True)


def _tell_libraries() -> None:
    """Give the current cache folders to the libraries that read the environment only when they are imported.

    A second run in one process would otherwise write its notes into the caches of the first.
    """
    tempfile.tempdir = None
    home = _huggingface_home()
    for name, attributes in {
        "datasets": ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"),
        "evaluate": ("HF_EVALUATE_CACHE", "HF_METRICS_CACHE", "HF_MODULES_CACHE"),
    }.items():
        config: Any = sys.modules.get(f"{name}.config")
        if config is None:
            continue
        for attribute in attributes:
            default = home / attribute.removeprefix("HF_").removesuffix("_CACHE").lower()
            setattr(config, attribute, Path(os.environ.get(attribute) or default))
    fingerprint: Any = sys.modules.get("datasets.fingerprint")
    if fingerprint is not None:
        fingerprint._TEMP_DIR_FOR_TEMP_CACHE_FILES = None


def package_versions() -> dict[str, str]:
    """Return the installed versions of this package and of what it is built on."""
    found = {"python": platform.python_version()}
    for name in ("clinical_nlp", *_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Return processor, cores, memory and GPUs; torch is asked only if it is already imported."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    found: dict[str, Any] = {"processor": model, "cores": os.cpu_count()}
    if hasattr(os, "sysconf"):
        found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    torch = sys.modules.get("torch")
    if torch is not None:
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return found


class Run:
    """One run directory; open it with `Run.open`, read a finished one with `Run.load`."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._metrics: dict[str, Any] = {}
        self._began = time.monotonic()

    @property
    def metrics(self) -> dict[str, Any]:
        """Flat name -> `{value, low, high, n_patients, n_notes, part}` (see `metrics.json`)."""
        if not self._metrics and (self.path / "metrics.json").is_file():
            try:
                found = json.loads((self.path / "metrics.json").read_text("utf-8"))
            except ValueError:
                found = None
            if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
                raise RunError(f"{self.path / 'metrics.json'} is damaged; run it again in a new directory")
            self._metrics = found
        return self._metrics

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Run:
        """Read a finished run; a half-written one is refused."""
        folder = Path(path)
        if not (folder / "manifest.json").is_file():
            if (folder / "config.yaml").is_file():
                raise NoRunError(f"{folder} is a half-written run: it was interrupted; finish it with --resume")
            raise NoRunError(f"{folder} is not a run directory (it has no manifest.json)")
        try:
            manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        except ValueError:
            manifest = None
        if not isinstance(manifest, dict):
            raise NoRunError(f"{folder / 'manifest.json'} is damaged; run it again in a new directory")
        return cls(folder, manifest)

    @classmethod
    @contextmanager
    def open(
        cls,
        output: str | os.PathLike[str],
        config: Config,
        *,
        recipe: str,
        resume: bool = False,
        contains_phi: bool = True,
    ) -> Iterator[Run]:
        """Open a run directory for writing and finish it with its manifest when the block ends well.

        When the block fails before it wrote anything, the directory is left as it was found; after that it stays,
        marked as half-written by the missing manifest. Of several processes only rank 0 writes.

        Raises
        ------
        RunError : the directory holds something else, a finished run, a half-written one without `resume`,
            or was begun with another config; or another process is writing it.
        """
        folder = Path(output)
        manifest = {
            "recipe": recipe,
            "seed": getattr(config, "seed", None),
            "config": config.model_dump(mode="json"),
            "inputs": {},
            "base_model": None,
            "parent_run": None,
            "outputs_contain_phi": contains_phi,
            "packages": package_versions(),
        }
        if not is_main_process():
            with contained_caches(folder / f".cache-{os.environ['RANK']}"):
                yield _Follower(folder, manifest)
            return
        made = not folder.exists()
        if not made and not folder.is_dir():
            raise UsageError(f"output {folder} is a file; name a directory")
        folder.mkdir(parents=True, exist_ok=True)
        with _claimed(folder, to_yaml(config), resume):
            run = cls(folder, manifest)
            try:
                with contained_caches(folder / ".cache"):
                    yield run
                run._finish()
            finally:
                if not _produced(folder):
                    _unclaim(folder, made)

    def note(self, **facts: Any) -> None:
        """Add facts to the manifest (`inputs`, `base_model`, `tokens`, ...)."""
        for key, value in facts.items():
            if isinstance(value, dict) and isinstance(self.manifest.get(key), dict):
                self.manifest[key].update(value)
            else:
                self.manifest[key] = value

    def log(self, **values: Any) -> None:
        """Append one line of training metrics to `metrics.jsonl`."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as handle:
            handle.write(json.dumps(_plain(values)) + "\n")

    def record(self, estimates: Mapping[str, Estimate]) -> None:
        """Add estimates to `metrics.json`, keyed `part.metric` (`test.f1_strict`)."""
        self._metrics = {**self.metrics, **{name: _plain(estimate) for name, estimate in estimates.items()}}
        write_json(self.path / "metrics.json", self._metrics)

    def _finish(self) -> None:
        self.manifest["hardware"] = hardware()
        self.manifest["duration_seconds"] = round(time.monotonic() - self._began, 1)
        self.manifest["finished_at"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json(self.path / "manifest.json", self.manifest)


class _Follower(Run):
    """The run as the processes other than rank 0 see it: they read it and write nothing."""

    def log(self, **values: Any) -> None:
        """Leave the line to rank 0."""

    def record(self, estimates: Mapping[str, Estimate]) -> None:
        """Keep the figures in memory only."""
        self._metrics = {**self._metrics, **{name: _plain(estimate) for name, estimate in estimates.items()}}


def _produced(folder: Path) -> bool:
    """Return whether a directory holds anything beside the marks of a run that has just begun."""
    return any(
        path.name not in ("config.yaml", "error.txt") and not path.name.startswith((".cache", ".config.yaml."))
        for path in folder.iterdir()
    )


@contextmanager
def _claimed(folder: Path, config: str, resume: bool) -> Iterator[None]:
    """Mark a directory as a run in progress, or refuse it; `config.yaml` is the mark and carries the lock."""
    began = folder / "config.yaml"
    if (folder / "manifest.json").exists():
        raise RunError(f"{folder} already holds a finished run; choose another --output")
    if _produced(folder) and not began.exists():
        raise RunError(f"{folder} is not empty and not a run; choose another --output")
    with open(began, "a+b") as handle:
        _lock(handle, folder)
        handle.seek(0)
        same = handle.read() == config.encode("utf-8")
        if _produced(folder):
            if not resume:
                raise RunError(
                    f"{folder} holds an interrupted run; add --resume to finish it, or choose another --output"
                )
            if not same:
                raise RunError(f"{folder} was begun with another config ({began}); resume with the same one")
            _mend(folder / "metrics.jsonl")
        (folder / "error.txt").unlink(missing_ok=True)
        if not same:
            # In place, since the lock is on this file; nothing is produced before it is on disk.
            handle.truncate(0)
            handle.write(config.encode("utf-8"))
            handle.flush()
            os.fsync(handle.fileno())
            sync_folder(folder)
        yield


def _lock(handle: IO[bytes], folder: Path) -> None:
    """Hold an open file for this process; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"{folder} is in use by another process; wait for it, or choose another --output") from None
    except OSError:  # a network share without locks
        return


def _mend(log: Path) -> None:
    """Cut a line that a crash left half-written off the end of `metrics.jsonl`."""
    if log.is_file() and not (data := log.read_bytes()).endswith(b"\n"):
        write_atomic(log, data[: data.rfind(b"\n") + 1])


def _unclaim(folder: Path, made: bool) -> None:
    """Take the marks off again when nothing was produced, so that the same --output can be used after a mistake."""
    (folder / "config.yaml").unlink(missing_ok=True)
    if made:
        with suppress(OSError):
            folder.rmdir()
