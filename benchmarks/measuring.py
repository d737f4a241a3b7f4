"""What the benchmarks measure with: time and tokens of a training, memory, fresh processes, the machine."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from clinical_nlp.runs import hardware, package_versions

MIB = 2**20


def machine(threads: int) -> dict[str, Any]:
    """Return what the figures depend on: processor, cores that may be used, threads, memory, GPUs, system."""
    import torch

    may_use = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {**hardware(), "cores_used": may_use, "threads": threads, "system": platform.platform()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu_memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return found


def write_result(path: str | None, benchmark: str, arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write one JSON object with the result and everything it depends on, to a file or to standard output."""
    given = {name: value for name, value in vars(arguments).items() if name not in ("verb", "out", "run")}
    whole = {
        "benchmark": f"training {benchmark}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(arguments.threads),
        "packages": package_versions(),
        "arguments": given,
        **result,
    }
    text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
    if path is None:
        sys.stdout.write(text)
    else:
        temporary = Path(f"{path}.tmp")
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)


def unreclaimable() -> int:
    """Bytes of this process that the kernel cannot drop: anonymous and shared memory, no file mappings; 0 off Linux."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return 1024 * sum(int(line.split()[1]) for line in file if line.startswith(("RssAnon", "RssShmem")))
    except OSError:
        return 0


def settled() -> int:
    """Return `unreclaimable` after the garbage is collected and the allocator has given back what is free."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return unreclaimable()


class Peak:
    """The highest `unreclaimable` while the block runs, looked up every few milliseconds by a thread."""

    def __init__(self, interval: float = 0.004) -> None:
        self._interval, self._stop = interval, threading.Event()
        self.bytes = self.before = 0

    def __enter__(self) -> Peak:
        self.bytes = self.before = unreclaimable()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self.bytes = max(self.bytes, unreclaimable())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, unreclaimable())


class Stopwatch:
    """Times a training in the block from the first look-up of an embedding to the end of its last optimiser step.

    Building the trainer, fetching the first batch and the last checkpoint are outside, for every trainer alike.

    Parameters
    ----------
    network : the model that is trained.
    skip : optimiser steps that are left out at the beginning.
    """

    def __init__(self, network: Any, skip: int = 0) -> None:
        self._network, self._skip = network, skip
        self._began: _Moment | None = None
        self._ended: _Moment | None = None
        self.steps, self.seconds, self.processor_seconds = 0, 0.0, 0.0

    def __enter__(self) -> Stopwatch:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        def looked_up(*_: Any) -> None:
            if self._began is None and self._skip == 0:
                self._began = _Moment()

        def stepped(*_: Any) -> None:
            self.steps += 1
            self._ended = _Moment()
            if self.steps == self._skip:
                self._began = self._ended

        self._hooks = [
            self._network.get_input_embeddings().register_forward_pre_hook(looked_up),
            register_optimizer_step_post_hook(stepped),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._began is not None and self._ended is not None:
            self.seconds, self.processor_seconds = self._ended.since(self._began)
        self.steps = max(0, self.steps - self._skip)


class _Moment:
    """A point in time; on a GPU the one at which it has done the work that was queued before."""

    def __init__(self) -> None:
        import torch

        self._wall, self._processor, self._event = time.perf_counter(), time.process_time(), None
        if torch.cuda.is_available():
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def since(self, earlier: _Moment) -> tuple[float, float]:
        """Return wall and processor seconds from an earlier moment to this one."""
        wall = self._wall - earlier._wall
        if self._event is not None and earlier._event is not None:
            self._event.synchronize()
            wall = earlier._event.elapsed_time(self._event) / 1000
        return wall, self._processor - earlier._processor


class Counter:
    """A collator that counts the tokens it hands on, with and without padding."""

    def __init__(self, collate: Callable[[list[Any]], Any], pad_token_id: int) -> None:
        self._collate, self._pad = collate, pad_token_id
        self.padded = self.real = self.targets = 0

    def __call__(self, examples: list[Any]) -> Any:
        batch = self._collate(examples)
        self.padded += batch["input_ids"].numel()
        self.real += int((batch["input_ids"] != self._pad).sum())
        self.targets += int((batch["labels"][:, 1:] != -100).sum())
        return batch


def in_fresh_process(script: str, work: str, specification: dict[str, Any], *, cpu: bool = False) -> dict[str, Any]:
    """Run `script child WORK` with the specification on its standard input; return the JSON object it prints last.

    Returns
    -------
    What the child found, or `{"failed": reason}` when it ended otherwise (out of memory, for one).
    """
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["OMP_NUM_THREADS"] = str(specification["threads"])
    if cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, script, "child", work],
        input=json.dumps(specification),
        capture_output=True,
        text=True,
        env=environment,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return dict(json.loads(lines[-1]))
    sys.stderr.write(done.stderr)
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
    return {"failed": f"exit {done.returncode}: {reason}"}
