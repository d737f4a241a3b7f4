"""Reading several files so that a broken one costs only itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from clinical_nlp.notes.readers.files import UnreadableError
from clinical_nlp.notes.readers.options import Reading
from clinical_nlp.notes.schema import Record, Rejected


def over_files(
    paths: Sequence[Path], reading: Reading, records: Callable[[Path, str], Iterator[Record]]
) -> Iterator[Record]:
    """Yield the records of every file; where one cannot be read further, one `Rejected` with the place and reason.

    Raises
    ------
    UnreadableError : the only file cannot be read at all.
    """
    for path in paths:
        name = reading.name(path)
        begun = False
        try:
            for record in records(path, name):
                begun = True
                yield record
        except UnreadableError as error:
            if len(paths) == 1 and not begun:
                raise
            yield Rejected(f"{name}:{error.line}" if error.line else name, error.reason)
