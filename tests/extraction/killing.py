"""Kill extractions and resume them; run by test_extract_kill.py in a process of its own.

    python killing.py points SOURCE FOLDER OPTIONS EVERY     at every EVERY-th write, fsync and rename of this process
    python killing.py workers SOURCE FOLDER OPTIONS EVERY    the same in a worker, which the others survive
    python killing.py random SOURCE FOLDER OPTIONS COUNT     at random moments, the whole process group

The libraries are imported once; each extraction runs in a fork. Prints one line a kill: where, how many shards were
committed then, how many of them the resumed call took over, and whether the output is that of an undisturbed call.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import tree


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class HalfWritten:
    """A file that is killed in the middle of what is written to it."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def __enter__(self) -> HalfWritten:
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.__exit__(*error)

    def write(self, data: Any) -> None:
        self._handle.write(data[: len(data) // 2])
        self._handle.flush()
        die()


def arm(point: int, once: Path | None = None) -> Callable[[], int]:
    """Die at the `point`-th write, fsync or rename of this process; with `once`, only if that file is not there yet.

    Returns a function that says how many there were.
    """
    count = 0

    def reached() -> bool:
        nonlocal count
        count += 1
        if count != point:
            return False
        if once is not None:
            try:
                os.close(os.open(once, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return False
        return True

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if reached():
                die()
            return call(*arguments, **options)

        return counted

    for name in ("replace", "rename", "fsync"):
        setattr(os, name, counting(getattr(os, name)))
    opened = io.open

    def opening(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        handle = opened(file, mode, *arguments, **options)
        return HalfWritten(handle) if "w" in mode and isinstance(file, str | Path) and reached() else handle

    builtins.open = io.open = opening  # type: ignore[assignment]
    return lambda: count


def fork(work: Callable[[], Any]) -> int:
    """Start work in a process group of its own and return its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setpgid(0, 0)
        work()
        status = 0
    except BaseException as error:
        print(type(error).__name__, error, file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def finish(child: int) -> int:
    return os.waitpid(child, 0)[1]


def committed(output: Path) -> int:
    return len(list((output / "ledger").glob("[0-9]*.json")))


def resumed(source: str, output: Path, options: dict[str, Any]) -> tuple[int, int]:
    """Resume an extraction; return how many shards it took over, and of how many."""
    from clinical_nlp.extraction import extract

    answer = output.with_name(f"{output.name}.json")

    def work() -> None:
        result = extract(source, output=output, resume=(output / "config.yaml").exists(), **options)
        answer.write_text(json.dumps([result.shards_reused, result.shards]))

    assert finish(fork(work)) == 0
    reused, shards = json.loads(answer.read_text())
    return reused, shards


def main() -> None:
    """Print one line a kill."""
    mode, source, folder, options = sys.argv[1], sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4])
    number = int(sys.argv[5])
    import duckdb
    import pyarrow.parquet

    import clinical_nlp.extraction.engines.local
    import clinical_nlp.extraction.outputs
    import clinical_nlp.language.mentions
    import clinical_nlp.notes.readers.text
    from clinical_nlp.extraction import extract

    for library in (duckdb, pyarrow.parquet, clinical_nlp.language.mentions):
        assert library
    began = time.monotonic()
    assert finish(fork(lambda: extract(source, output=folder / "whole", **options))) == 0
    lasts = time.monotonic() - began
    whole, n_shards = tree(folder / "whole"), committed(folder / "whole")
    generator = random.Random(number)

    def report(where: str, output: Path, done: int, reused: int) -> None:
        same = "same" if tree(output) == whole else "different"
        print(where, done, reused, same, flush=True)
        shutil.rmtree(output)

    if mode == "random":
        for place in range(number):
            output = folder / f"r{place}"
            child = fork(lambda output=output: extract(source, output=output, **options))  # type: ignore[misc]
            # After a random number of commits and a random while: most of the time alone goes into starting workers.
            shards = generator.randint(0, n_shards)
            while committed(output) < shards and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                time.sleep(0.0005)
            time.sleep(generator.uniform(0.0, 0.3 * lasts if shards in (0, n_shards) else 0.03))
            os.killpg(child, signal.SIGKILL)
            finish(child)
            done, ended = committed(output), (output / "manifest.json").exists()
            reused = done if ended else resumed(source, output, options)[0]
            report("ended" if ended else "killed", output, done, reused)
        return
    point = number
    while True:
        output = folder / f"p{point}"
        if mode == "workers":
            once = folder / f"once{point}"
            os.environ["KILLED_AT"] = f"{point} {once}"
            assert finish(fork(lambda output=output: extract(source, output=output, **options))) == 0  # type: ignore[misc]
            if not once.exists():
                break
            report(str(point), output, 0, 0)
        else:

            def work(output: Path = output, point: int = point) -> None:
                arm(point)
                extract(source, output=output, **options)

            if not os.WIFSIGNALED(finish(fork(work))):
                break
            done = committed(output) if not (output / "manifest.json").exists() else -1
            reused = -1 if done < 0 else resumed(source, output, options)[0]
            report(str(point), output, done, reused)
        point += number


if __name__ == "__main__":
    main()
