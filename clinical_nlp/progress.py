"""Progress: a live bar on a terminal, plain lines elsewhere. Shows counts and metrics, never text."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def is_main_process() -> bool:
    """Return whether this process prints and writes: the only one, or rank 0 of `accelerate launch`."""
    return int(os.environ.get("WORLD_SIZE") or 1) <= 1 or int(os.environ.get("RANK") or 0) == 0


def say(message: str) -> None:
    """Print one line of progress to standard error, from the main process only."""
    if not is_main_process():
        return
    if _shown:
        _shown[-1].console.print(message, markup=False, highlight=False, soft_wrap=True)
    else:
        print(message, file=sys.stderr, flush=True)


_shown: list[Any] = []
"""The live bar, if there is one; a line said meanwhile is printed above it."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_shown.clear)  # a worker must not wait for the lock of its parent's bar


class Progress:
    """Counts towards a total; made by `progress`."""

    def __init__(self, title: str, total: int | None, unit: str, every: float, done: int) -> None:
        self._title, self._total, self._unit, self._every = title, total, unit, every
        self._done, self._before, self._began, self._last = done, done, time.monotonic(), 0.0
        self._bar: Any = None
        self._task: Any = None
        # rich allows one live display at a time: a bar inside a bar prints lines.
        if sys.stderr.isatty() and is_main_process() and not _shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(title, total=total, completed=done, note="")
            self._bar.start()
            _shown.append(self._bar)

    def advance(self, count: int = 1, **shown: float | int | str) -> None:
        """Count `count` more units; `shown` are figures to print beside the count."""
        self._done += count
        note = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
        )
        if self._bar is not None:
            self._bar.update(self._task, advance=count, note=note)
            return
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            self._line(note, going=True)

    def already(self, count: int) -> None:
        """Count units that an earlier process had done: they say nothing about how fast this one is."""
        self._done += count
        self._before += count
        if self._bar is not None:
            self._bar.update(self._task, advance=count)

    def _line(self, note: str, *, going: bool = False) -> None:
        seconds = max(time.monotonic() - self._began, 1e-9)
        of = f"/{self._total}" if self._total else ""
        rate = (self._done - self._before) / seconds
        left = ""
        if going and self._total and self._before < self._done < self._total:
            left = f"{_spell((self._total - self._done) / rate)} left  "
        say(f"{self._title}: {self._done}{of} {self._unit}  {rate:.1f}/s  {left}{note}".rstrip())

    def close(self, last: str = "done") -> None:
        """End the bar, or print the last line."""
        if self._bar is not None:
            _shown.remove(self._bar)
            self._bar.stop()
            self._bar = None
        elif last == "done" or self._done > self._before:
            self._line(last)


def _spell(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return "under a minute"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.0f} h"


@contextmanager
def progress(
    title: str, total: int | None = None, *, unit: str = "", every: float = 10.0, done: int = 0
) -> Iterator[Progress]:
    """Show progress while the block runs; on no terminal, at most one line in `every` seconds.

    `done` is what an earlier process had done already; it counts towards the total and not towards the rate.
    """
    bar = Progress(title, total, unit, every, done)
    try:
        yield bar
    except BaseException:
        bar.close("stopped")
        raise
    bar.close()
