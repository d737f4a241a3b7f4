"""Progress: a live bar on a terminal, plain lines elsewhere. Shows counts and metrics, never text."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def say(message: str) -> None:
    """Print one line of progress to standard error."""
    print(message, file=sys.stderr, flush=True)


class Progress:
    """Counts towards a total; made by `progress`."""

    def __init__(self, title: str, total: int | None, unit: str, every: float) -> None:
        self._title, self._total, self._unit, self._every = title, total, unit, every
        self._done, self._began, self._last = 0, time.monotonic(), 0.0
        self._bar: Any = None
        self._task: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(title, total=total, note="")
            self._bar.start()

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
            self._line(note)

    def _line(self, note: str) -> None:
        seconds = max(time.monotonic() - self._began, 1e-9)
        of = f"/{self._total}" if self._total else ""
        say(f"{self._title}: {self._done}{of} {self._unit}  {self._done / seconds:.1f}/s  {note}".rstrip())

    def close(self) -> None:
        """End the bar, or print the last line."""
        if self._bar is not None:
            self._bar.stop()
        else:
            self._line("done")


@contextmanager
def progress(title: str, total: int | None = None, *, unit: str = "", every: float = 10.0) -> Iterator[Progress]:
    """Show progress while the block runs; on no terminal, at most one line in `every` seconds."""
    bar = Progress(title, total, unit, every)
    try:
        yield bar
    finally:
        bar.close()
