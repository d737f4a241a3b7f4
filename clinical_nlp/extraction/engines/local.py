"""Work on this machine: in this process, or in several worker processes with at most one shard each."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from clinical_nlp.errors import RunError
from clinical_nlp.extraction import STAGE
from clinical_nlp.extraction.gathering import Found, Gathered, Gatherer
from clinical_nlp.extraction.plan import ExtractionConfig, Shard
from clinical_nlp.extraction.shards import DIED, Annotated, Extractor, outcomes, to_annotate, write_shard


def process(
    shards: Iterable[Shard],
    output: Path,
    *,
    terminology: str,
    model: str | None,
    measurements: bool,
    verify: str | None,
    assertion: str | None,
    workers: int,
    apart: bool = False,
) -> Iterator[dict[str, Any]]:
    """Work through shards and yield their ledger records as they are done, in any order.

    Parameters
    ----------
    shards : what is to be done; taken one at a time, so that memory stays flat.
    output : the run directory.
    terminology, model, measurements, verify, assertion : as in the config.
    workers : with 1, this process does the work, but for a shard in which an earlier process was killed.
    apart : never work in this process.
    """
    if workers > 1 or apart:
        yield from _Pool(output, terminology, model, measurements, verify, assertion, workers).process(shards)
        return
    extractor = None
    for shard in shards:
        mark = output / STAGE / "begun" / str(shard.index)
        if mark.exists():
            yield from _Pool(output, terminology, model, measurements, verify, assertion, 1).process([shard])
            mark.unlink()
            continue
        extractor = extractor or Extractor(
            terminology, model, measurements=measurements, verify=verify, assertion=assertion
        )
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        try:
            record = write_shard(output, shard, outcomes(shard, extractor.annotate(to_annotate(shard))))
        finally:
            mark.unlink()
        yield record


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    tasks: Connection
    answers: Connection
    lifeline: int
    shard: Shard | None = None
    ready: bool = False

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.lifeline)
        self.tasks.close()
        self.answers.close()


class _Pool:
    def __init__(
        self,
        output: Path,
        terminology: str,
        model: str | None,
        measurements: bool,
        verify: str | None,
        assertion: str | None,
        workers: int,
    ) -> None:
        measured = "measurements" if measurements else ""
        self._arguments = (str(output), terminology, model or "", measured, verify or "", assertion or "")
        self._output, self._size = output, workers
        self._workers: list[_Worker] = []

    def process(self, shards: Iterable[Shard]) -> Iterator[dict[str, Any]]:
        try:
            for shard in shards:
                while (worker := self._free()) is None:
                    yield from self._collect()
                self._send(worker, shard)
            while any(worker.shard for worker in self._workers):
                yield from self._collect()
        finally:
            for worker in self._workers:
                worker.stop()

    def _free(self) -> _Worker | None:
        for worker in self._workers:
            if worker.shard is None:
                return worker
        if len(self._workers) < self._size:
            self._workers.append(self._start())
            return self._workers[-1]
        return None

    def _start(self) -> _Worker:
        return _start("notes", *self._arguments)

    def _send(self, worker: _Worker, shard: Shard) -> None:
        worker.shard = shard
        # A worker that has died is noticed by its silence in `_collect`, which takes the shard up again.
        with contextlib.suppress(OSError):
            worker.tasks.send(("shard", shard))

    def _collect(self) -> Iterator[dict[str, Any]]:
        """Wait for news and yield the records of the shards that are done."""
        busy = [worker for worker in self._workers if worker.shard]
        heard = wait([worker.answers for worker in busy])
        for worker in (worker for worker in busy if worker.answers in heard):
            answer = self._answer(worker)
            if answer is not None and answer[0] == "ready":
                continue
            shard, worker.shard = worker.shard, None
            if answer is not None:
                yield answer[1]
            elif shard is not None:
                self._workers.remove(worker)
                worker.stop()
                yield write_shard(self._output, shard, outcomes(shard, self._one_by_one(shard)))

    def _answer(self, worker: _Worker) -> tuple[str, Any] | None:
        """Return what a worker says, None where it has died; a failure that it reports is raised."""
        try:
            kind, value = worker.answers.recv()
        except (EOFError, OSError):
            if not worker.ready:
                code = worker.process.wait()
                raise RunError(f"a worker process could not start (exit code {code}); try --workers 1") from None
            return None
        if kind == "failed":
            raise value
        worker.ready = True
        return kind, value

    def _one_by_one(self, shard: Shard) -> list[Annotated]:
        """Annotate the notes of a shard that killed its worker, each alone, and reject the one that kills again."""
        worker: _Worker | None = None
        annotated = []
        try:
            for note in to_annotate(shard):
                if worker is None:
                    worker = self._start()
                    self._answer(worker)
                with contextlib.suppress(OSError):
                    worker.tasks.send(("note", note))
                answer = self._answer(worker)
                if answer is None:
                    worker.stop()
                    worker = None
                    annotated.append(Annotated(reason=DIED))
                else:
                    annotated.append(answer[1])
        finally:
            if worker is not None:
                worker.stop()
        return annotated


def _start(*arguments: str) -> _Worker:
    tasks_read, tasks_write = Pipe(duplex=False)
    answers_read, answers_write = Pipe(duplex=False)
    life_read, life_write = os.pipe()
    kept = (tasks_read.fileno(), answers_write.fileno(), life_read)
    begin = (
        f"import sys; sys.path[:] = {json.dumps(sys.path)}; "
        "from clinical_nlp.extraction.engines.worker import main; main(sys.argv[1:])"
    )
    # What a library prints about its input would be note text in a log.
    process = subprocess.Popen(
        [sys.executable, "-c", begin, *map(str, kept), *arguments],
        pass_fds=kept,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    tasks_read.close()
    answers_write.close()
    os.close(life_read)
    return _Worker(process, tasks_write, answers_read, life_write)


def gather(
    batches: Iterable[Found], gatherer: Gatherer, config: ExtractionConfig, *, workers: int
) -> Iterator[Gathered]:
    """Gather patients, batch by batch, and yield what comes of them in order.

    Parameters
    ----------
    batches : of patients; about one a worker is held at a time.
    gatherer : does them in this process, with one worker.
    config : of the batch.
    workers : processes.

    Raises
    ------
    RunError : a worker died.
    """
    if workers == 1:
        yield from map(gatherer.gather, batches)
        return
    idle = [_start("patients", config.model_dump_json()) for _ in range(workers)]
    busy: deque[_Worker] = deque()
    try:
        for worker in idle:
            _heard(worker)
        for batch in batches:
            if not idle:
                idle.append(busy.popleft())
                yield _heard(idle[-1])
            worker = idle.pop()
            with contextlib.suppress(OSError):  # one that has died is noticed when it is heard
                worker.tasks.send(("patients", batch))
            busy.append(worker)
        while busy:
            idle.append(busy.popleft())
            yield _heard(idle[-1])
    finally:
        for worker in (*idle, *busy):
            worker.stop()


def _heard(worker: _Worker) -> Any:
    """Return what a worker that gathers patients answers."""
    try:
        kind, value = worker.answers.recv()
    except (EOFError, OSError):
        raise RunError("a worker process died while patients were gathered; add --resume, or try --workers 1") from None
    if kind == "failed":
        raise value
    return value
