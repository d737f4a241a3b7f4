"""Notes that a table stores in several rows each, put together out of core."""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

from clinical_nlp.notes.readers.files import MAX_RECORD_BYTES
from clinical_nlp.notes.readers.options import Reading
from clinical_nlp.notes.schema import Record, Rejected, Skipped


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

    Rows may come in any order. Their texts go to an unnamed temporary file in the scratch folder; what is sorted, by
    SQLite's external sort, are ids and places in it (DuckDB needs 512 MB to sort 300 MB of texts, and fails with
    less). Of several versions the last (by number) is the note, the others are skipped as `earlier-version`. Rows are
    divided by `line_separator` unless they end in a line break. A gap in the line numbers leaves a note `incomplete`;
    one line number with two texts rejects it.
    """
    with tempfile.TemporaryFile(dir=reading.index.folder) as texts, closing(_database(reading.index.folder)) as places:
        number = end = 0
        for piece in pieces:
            if isinstance(piece, Rejected):
                yield piece
                continue
            number += 1
            text = piece.text.encode("utf-8")
            about = json.dumps([piece.source, piece.fields]).encode()
            texts.write(text + about)
            row = (piece.note_id, piece.version, piece.line, number, end, len(text), len(about))
            places.execute("INSERT INTO piece VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            end += len(text) + len(about)
        ordered = places.execute(
            "SELECT note_id, version, line, place, length, about FROM piece "
            "ORDER BY note_id, CAST(version AS INTEGER), version, line, number"
        )
        yield from _notes(_stored(ordered, texts), reading)


class _Stored(NamedTuple):
    note_id: str
    version: str
    line: int
    text: str
    about: bytes


def _database(folder: Path) -> sqlite3.Connection:
    """Return an empty table in a file of the scratch folder that has no name any more."""
    handle, name = tempfile.mkstemp(prefix="lines-", suffix=".sqlite", dir=folder)
    os.close(handle)
    connection = sqlite3.connect(name, isolation_level=None, check_same_thread=False)
    for pragma in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", "temp_store=FILE"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute("PRAGMA cache_size=-16384")
    connection.execute(
        "CREATE TABLE piece (note_id TEXT, version TEXT, line INTEGER, number INTEGER, place INTEGER, length INTEGER, "
        "about INTEGER)"
    )
    connection.execute("BEGIN")
    with suppress(OSError):
        os.unlink(name)
    return connection


def _stored(ordered: Iterator[Any], texts: IO[bytes]) -> Iterator[_Stored]:
    for note_id, version, line, place, length, about in ordered:
        texts.seek(place)
        data = texts.read(length + about)
        yield _Stored(note_id, version, line, data[:length].decode("utf-8"), data[length:])


def _notes(pieces: Iterator[_Stored], reading: Reading) -> Iterator[Joined | Record]:
    for note_id, rows in groupby(pieces, key=lambda row: row.note_id):
        previous: Joined | Rejected | None = None
        for _, version in groupby(rows, key=lambda row: row.version):
            if previous is not None:
                yield Skipped(previous.source, "earlier-version", note_id)
            previous = _put_together(note_id, version, reading)
        if previous is not None:
            yield previous


def _put_together(note_id: str, rows: Iterator[_Stored], reading: Reading) -> Joined | Rejected:
    separator = reading.options.line_separator
    first = previous = next(rows)
    parts, size, complete, problem = [first.text], len(first.text), first.line in (0, 1), None
    for row in rows:
        if row.line == previous.line:
            if row.text != previous.text:
                problem = f"line {row.line} of the note is there twice, with different texts"
            continue
        complete = complete and row.line == previous.line + 1
        if not previous.text.endswith(("\n", "\r")):
            parts.append(separator)
        parts.append(row.text)
        size += len(row.text)
        if size > MAX_RECORD_BYTES:
            problem, parts = f"the note is longer than {MAX_RECORD_BYTES >> 20} MiB", []
        previous = row
    source, fields = json.loads(first.about)
    if problem:
        return Rejected(source, problem, note_id)
    return Joined(note_id, "".join(parts), source, fields, complete)
