"""A worker process: takes shards from a pipe, writes their files, answers with ledger records.

It is started as a plain program rather than through multiprocessing, so that a user's script or notebook is never
imported again, and it ends by itself when the process that started it is gone, however that ended.
"""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path


def main(arguments: list[str]) -> None:
    """Serve until the pipe closes. Arguments: three pipe ends, the output, the terminology, the model or nothing."""
    tasks = Connection(int(arguments[0]), writable=False)
    answers = Connection(int(arguments[1]), readable=False)
    threading.Thread(target=_die_with_parent, args=(int(arguments[2]),), daemon=True).start()
    output = Path(arguments[3])

    from clinical_nlp.errors import ClinicalNlpError
    from clinical_nlp.extraction.shards import Extractor, outcomes, to_annotate, write_shard

    try:
        extractor = Extractor(arguments[4], arguments[5] or None)
        answers.send(("ready", None))
        while True:
            try:
                kind, task = tasks.recv()
            except EOFError:
                return
            if kind == "note":
                answers.send(("note", extractor.annotate([task])[0]))
            else:
                annotated = outcomes(task, extractor.annotate(to_annotate(task)))
                answers.send(("shard", write_shard(output, task, annotated)))
    except ClinicalNlpError as error:
        answers.send(("failed", f"{error}"))
    # The message of an unknown error may quote a note, so only its type is passed on.
    except Exception as error:
        answers.send(("failed", f"a worker failed with {type(error).__name__}"))


def _die_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
