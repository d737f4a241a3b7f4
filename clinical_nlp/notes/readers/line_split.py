"""Notes that a table stores in several rows each, put together out of core."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from clinical_nlp.errors import InputError
from clinical_nlp.notes.readers.files import MAX_RECORD_BYTES
from clinical_nlp.notes.readers.options import Reading
from clinical_nlp.notes.schema import Record, Rejected, Skipped

_BATCH_BYTES = 8 << 20


class Piece(NamedTuple):
    """One row: its note, the version of the note it belongs to ("" where there are none), and its place in it."""

    note_id: str
    version: str
    line: int
    text: str
    source: str
    fields: dict[str, Any]


class Joined(NamedTuple):
    """A note put together; `fields` and `source` are those of its first row."""

    note_id: str
    text: str
    source: str
    fields: dict[str, Any]
    complete: bool


def join(pieces: Iterator[Piece | Rejected], reading: Reading) -> Iterator[Joined | Record]:
    """Yield the notes ordered by id, after the rows that were rejected.

    Rows may come in any order. They are sorted in a DuckDB file in the scratch folder, with bounded memory; the file
    holds note text and is removed at the end. Of several versions the last (by number) is the note, the others are
    skipped as `earlier-version`. Rows are divided by `line_separator` unless they end in a line break. A gap in the
    line numbers leaves a note `incomplete`; one line number with two texts rejects it.
    """
    import duckdb

    with tempfile.TemporaryDirectory(prefix="lines-", dir=reading.index.folder) as folder:
        settings = {"memory_limit": "512MB", "threads": "1", "temp_directory": f"{folder}/spill"}
        connection = duckdb.connect(str(Path(folder) / "lines.duckdb"), config=settings)  # type: ignore[arg-type]
        try:
            connection.execute(
                "CREATE TABLE piece (note_id VARCHAR, version VARCHAR, line BIGINT, number BIGINT, text VARCHAR, "
                "source VARCHAR, fields VARCHAR)"
            )
            yield from _store(pieces, connection)
            # Rows are fetched as they are sorted; DuckDB's Arrow output would copy the whole result.
            ordered = connection.execute(
                "SELECT * FROM piece ORDER BY note_id, try_cast(version AS BIGINT) NULLS FIRST, version, line, number"
            )
            yield from _notes(ordered, reading)
        except duckdb.Error:
            raise InputError(
                f"{reading.source.name}: the rows of its notes cannot be sorted in the scratch folder "
                f"{reading.index.folder}; see that there is space for the table's size twice over"
            ) from None
        finally:
            connection.close()


def _store(pieces: Iterator[Piece | Rejected], connection: Any) -> Iterator[Rejected]:
    batch: list[tuple[Any, ...]] = []
    size = 0
    number = 0
    for piece in pieces:
        if isinstance(piece, Rejected):
            yield piece
            continue
        number += 1
        size += len(piece.text) + 200
        note_id, version, line, text, source, fields = piece
        batch.append((note_id, version, line, number, text, source, json.dumps(fields)))
        if size > _BATCH_BYTES:
            _insert(batch, connection)
            batch, size = [], 0
    _insert(batch, connection)


def _insert(batch: list[tuple[Any, ...]], connection: Any) -> None:
    import pyarrow as pa

    if batch:
        names = ("note_id", "version", "line", "number", "text", "source", "fields")
        table = pa.table(dict(zip(names, map(list, zip(*batch, strict=True)), strict=True)))
        connection.register("batch", table)
        connection.execute("INSERT INTO piece SELECT * FROM batch")
        connection.unregister("batch")


def _notes(ordered: Any, reading: Reading) -> Iterator[Joined | Record]:
    names = ("note_id", "version", "line", "number", "text", "source", "fields")
    pieces = (dict(zip(names, row, strict=True)) for row in iter(ordered.fetchone, None))
    for note_id, rows in groupby(pieces, key=lambda row: row["note_id"]):
        previous: Joined | Rejected | None = None
        for _, version in groupby(rows, key=lambda row: row["version"]):
            if previous is not None:
                yield Skipped(previous.source, "earlier-version", note_id)
            previous = _put_together(note_id, version, reading)
        if previous is not None:
            yield previous


def _put_together(note_id: str, rows: Iterator[dict[str, Any]], reading: Reading) -> Joined | Rejected:
    separator = reading.options.line_separator
    parts: list[str] = []
    first: dict[str, Any] | None = None
    previous: dict[str, Any] | None = None
    size, complete, problem = 0, True, None
    for row in rows:
        first = first or row
        if previous is not None and row["line"] == previous["line"]:
            if row["text"] != previous["text"]:
                problem = f"line {row['line']} of the note is there twice, with different texts"
            continue
        if previous is not None:
            complete = complete and row["line"] == previous["line"] + 1
            if parts and not parts[-1].endswith(("\n", "\r")):
                parts.append(separator)
        size += len(row["text"])
        if size > MAX_RECORD_BYTES:
            problem, parts = f"the note is longer than {MAX_RECORD_BYTES >> 20} MiB", []
        else:
            parts.append(row["text"])
        previous = row
    assert first is not None  # groupby yields no empty group
    if problem:
        return Rejected(first["source"], problem, note_id)
    complete = complete and first["line"] in (0, 1)
    return Joined(note_id, "".join(parts), first["source"], json.loads(first["fields"]), complete)
