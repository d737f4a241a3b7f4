"""A worker process: takes shards from a pipe, writes their files, answers with ledger records; or gathers patients.

It is started as a plain program rather than through multiprocessing, so that a user's script or notebook is never
imported again, and it ends by itself when the process that started it is gone, however that ended.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def main(arguments: list[str]) -> None:
    """Serve until the pipe closes.

    Arguments: three pipe ends, then `notes`, the output, the terminology, the model or nothing, `measurements` or
    nothing, and the verifier and the assertion run, each or nothing; or `patients` and the config as JSON.
    """
    tasks = Connection(int(arguments[0]), writable=False)
    answers = Connection(int(arguments[1]), readable=False)
    threading.Thread(target=_die_with_parent, args=(int(arguments[2]),), daemon=True).start()

    from clinical_nlp.errors import ClinicalNlpError, RunError, UsageError

    try:
        kinds: dict[str, Callable[..., Callable[[str, Any], Any]]] = {"notes": _notes, "patients": _patients}
        work = kinds[arguments[3]](*arguments[4:])
        gc.freeze()  # the collector need not walk the terminology again and again
        answers.send(("ready", None))
        while True:
            try:
                kind, task = tasks.recv()
            except EOFError:
                return
            answers.send((kind, work(kind, task)))
    except ClinicalNlpError as error:
        kind = UsageError if isinstance(error, UsageError) else RunError
        answers.send(("failed", kind(str(error))))
    # The message of an unknown error may quote a note, so only its type is passed on.
    except Exception as error:
        answers.send(("failed", RunError(f"a worker failed with {type(error).__name__}")))


def _notes(
    output: str, terminology: str, model: str, measurements: str, verify: str, assertion: str
) -> Callable[[str, Any], Any]:
    from clinical_nlp.extraction.shards import Extractor, outcomes, to_annotate, write_shard

    extractor = Extractor(
        terminology,
        model or None,
        measurements=bool(measurements),
        verify=verify or None,
        assertion=assertion or None,
    )

    def work(kind: str, task: Any) -> Any:
        if kind == "note":
            return extractor.annotate([task])[0]
        return write_shard(Path(output), task, outcomes(task, extractor.annotate(to_annotate(task))))

    return work


def _patients(config: str) -> Callable[[str, Any], Any]:
    from clinical_nlp.extraction.gathering import Gatherer
    from clinical_nlp.extraction.plan import ExtractionConfig
    from clinical_nlp.language.terminology import load_terminology

    told = ExtractionConfig.model_validate_json(config)
    gatherer = Gatherer(told, load_terminology(told.terminology))
    return lambda kind, task: gatherer.gather(task)


def _die_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
