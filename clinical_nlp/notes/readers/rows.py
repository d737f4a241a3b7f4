"""Rows of tables, streamed: CSV in any common delimiter, JSON Lines, Parquet, a table of a DuckDB file."""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinical_nlp.notes.readers.files import MAX_RECORD_BYTES, UnreadableError, lines, open_bytes, reading
from clinical_nlp.notes.schema import Rejected

_DELIMITERS = ",;\t|"
_BATCH = 64
"""Rows a batch: small, since a row may hold a note of megabytes."""
SUFFIXES = (".csv", ".tsv", ".parquet", ".pq", ".jsonl", ".ndjson")
"""Names of tables, each also with .gz."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row; `get` looks up a column whatever its case. `source` is file:line, or file:row N."""

    source: str
    values: dict[str, Any]

    def get(self, column: str) -> Any:
        """Return the value of a column, None where the row has no such column."""
        return self.values.get(column.lower())


def suffix(path: Path) -> str:
    """Return the suffix that tells the kind of table, without .gz."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def table_name(path: Path) -> str:
    """Return the name of the table that a file holds: `NOTE.csv.gz` is `note`."""
    return path.name.split(".")[0].lower()


def rows(path: Path, name: str, encoding: str, wanted: Collection[str] | None = None) -> Iterator[Row | Rejected]:
    """Yield the rows of a file; a bad one is a `Rejected` and the next is read.

    Parameters
    ----------
    path, name : the file, and its name in `source`.
    encoding : of CSV without a byte order mark; Parquet and JSON say or fix theirs.
    wanted : columns to read (Parquet only: the others cost nothing then).

    Raises
    ------
    UnreadableError : the file, or the rest of it, cannot be read.
    """
    kind = suffix(path)
    if kind in (".parquet", ".pq"):
        yield from _parquet(path, name, wanted)
    elif kind in (".jsonl", ".ndjson"):
        yield from _json_lines(path, name)
    else:
        yield from _csv(path, name, encoding)


def columns(path: Path, name: str, encoding: str) -> list[str]:
    """Return the columns of a file as they are spelled there; of JSON Lines those of its first 100 good lines."""
    kind = suffix(path)
    if kind in (".parquet", ".pq"):
        with _parquet_errors(name):
            import pyarrow.parquet as pq

            with pq.ParquetFile(path) as file:
                return list(file.schema_arrow.names)
    if kind in (".jsonl", ".ndjson"):
        found: dict[str, None] = {}
        for count, row in enumerate(_json_lines(path, name)):
            if isinstance(row, Row):
                found.update(dict.fromkeys(row.values))
            if count == 100:
                break
        return list(found)
    with _open_csv(path, name, encoding) as text:
        return _header(text, name)[0]


def near_column(wanted: str, present: Collection[str]) -> str:
    """Return `; did you mean 'x'?` for a column that is nearly the wanted one.

    The others are not listed: the first line of a table without a header is a patient's.
    """
    by_key = {column.lower(): column for column in present}
    close = difflib.get_close_matches(wanted.lower(), sorted(by_key), n=1, cutoff=0.6)
    return f"; did you mean {by_key[close[0]]!r}?" if close else ""


def text_value(value: Any) -> str | None:
    """Return an id or short value as text: 12.0 (an integer column with gaps) is "12"; blank and NaN are None."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        value = int(value) if value.is_integer() else value
    if value is None or isinstance(value, (dict, list)):
        return None
    return str(value).strip() or None


def body_value(value: Any) -> tuple[str | None, str | None]:
    """Return (text, None) of a note's text column, or (None, reason)."""
    if isinstance(value, str):
        return value, None
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8"), None
        except UnicodeDecodeError:
            return None, "the text is not valid UTF-8"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None, "no text"
    return None, "the text column does not hold text"


class _Bounded:
    """Lines of a text stream for the csv module; one that is too long comes empty, and `too_long` says so."""

    def __init__(self, text: io.TextIOWrapper, name: str) -> None:
        self._text, self._name = text, name
        self.too_long = False

    def __iter__(self) -> Iterator[str]:
        guard = reading(self._name)
        guard.line = 1
        while True:
            guard.line += 1
            with guard:
                line = self._text.readline(MAX_RECORD_BYTES)
                if not line:
                    return
                if len(line) == MAX_RECORD_BYTES and line[-1] not in "\r\n":
                    while (rest := self._text.readline(1 << 20)) and rest[-1] not in "\r\n":
                        pass
                    self.too_long = True
                    line = "\n"
            yield line


def _open_csv(path: Path, name: str, encoding: str) -> io.TextIOWrapper:
    opened = open_bytes(path, name)
    # Bytes that do not decode become lone surrogates, so that only their own row is rejected.
    encoding = "utf-8" if opened.marked else encoding
    return io.TextIOWrapper(opened.stream, encoding=encoding, errors="surrogateescape", newline="")


def _header(text: io.TextIOWrapper, name: str) -> tuple[list[str], str, int]:
    """Return (columns, delimiter, lines used)."""
    with reading(name):
        first = text.readline(1 << 20)
    counts = {delimiter: first.count(delimiter) for delimiter in _DELIMITERS}
    delimiter = max(_DELIMITERS, key=lambda candidate: counts[candidate])
    try:
        header = next(csv.reader([first], delimiter=delimiter, strict=True), [])
    except csv.Error:
        raise UnreadableError(name, "its first line is not a header of column names") from None
    header = [column.strip() for column in header]
    if any("\n" in column for column in header):
        raise UnreadableError(name, "its first line is not a header of column names")
    return header, delimiter, 1


def _csv(path: Path, name: str, encoding: str) -> Iterator[Row | Rejected]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_BYTES))
    with _open_csv(path, name, encoding) as text:
        header, delimiter, used = _header(text, name)
        keys = [column.lower() for column in header]
        if len(set(keys)) < len(keys):
            raise UnreadableError(name, "a column name occurs twice in the header")
        bounded = _Bounded(text, name)
        # strict: a stray quote is an error here; without it two notes would silently become one.
        reader = csv.reader(iter(bounded), delimiter=delimiter, strict=True)
        while True:
            begun = reader.line_num + used + 1
            source = f"{name}:{begun}"
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error:
                ended = reader.line_num + used
                span = f" (lines {begun} to {ended})" if ended > begun else ""
                yield Rejected(source, f"not valid CSV: a quote that is not closed or not doubled{span}")
                continue
            if bounded.too_long:
                bounded.too_long = False
                yield Rejected(source, f"a line is longer than {MAX_RECORD_BYTES >> 20} MiB")
            elif not values:
                continue
            elif len(values) != len(keys):
                yield Rejected(source, f"{len(values)} columns where the header has {len(keys)}")
            elif not all(map(_decoded, values)):
                yield Rejected(source, f"bytes are not valid {encoding}; name the right one with --encoding")
            else:
                yield Row(source, dict(zip(keys, values, strict=True)))


def _decoded(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def json_object(data: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """Return (object, None) of one line of JSON, or (None, reason); never raises."""
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        return None, "not valid UTF-8"
    except RecursionError:
        return None, "JSON is nested too deeply"
    except ValueError:
        return None, "not valid JSON"
    return (value, None) if isinstance(value, dict) else (None, "not a JSON object")


def _json_lines(path: Path, name: str) -> Iterator[Row | Rejected]:
    for line in lines(path, name):
        source = f"{name}:{line.number}"
        value, problem = (None, line.problem) if line.data is None else json_object(line.data)
        if value is None:
            yield Rejected(source, str(problem))
        else:
            yield Row(source, {key.lower(): item for key, item in value.items()})


class _parquet_errors:
    """Replace pyarrow's errors, which may quote content, by one line."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        import pyarrow as pa

        if isinstance(error, (pa.ArrowException, OSError, ValueError)) and not isinstance(error, UnreadableError):
            raise UnreadableError(self._name, "is not a readable Parquet file (damaged or cut short)") from None


def _parquet(path: Path, name: str, wanted: Collection[str] | None) -> Iterator[Row | Rejected]:
    import pyarrow.parquet as pq

    with _parquet_errors(name):
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    with file:
        names = file.schema_arrow.names
        chosen = None if wanted is None else [column for column in names if column.lower() in wanted]
        batches = file.iter_batches(batch_size=_BATCH, columns=chosen)
        number = 0
        while True:
            with _parquet_errors(name):
                batch = next(batches, None)
            if batch is None:
                return
            for row in _python_rows(batch):
                number += 1
                source = f"{name}:row {number}"
                if row is None:
                    yield Rejected(source, "a value of the row cannot be read (text that is not UTF-8)")
                else:
                    yield Row(source, row)


def _python_rows(batch: Any) -> Iterator[dict[str, Any] | None]:
    import pyarrow as pa

    # Times as text: conversion to Python fails for a whole batch where one value has nanoseconds or the year 9999+.
    arrays = [column.cast(pa.string()) if pa.types.is_temporal(column.type) else column for column in batch.columns]
    batch = pa.RecordBatch.from_arrays(arrays, [column.lower() for column in batch.schema.names])
    try:
        yield from batch.to_pylist()
        return
    except (UnicodeDecodeError, ValueError, pa.ArrowException):
        pass
    for position in range(batch.num_rows):
        try:
            yield batch.slice(position, 1).to_pylist()[0]
        except (UnicodeDecodeError, ValueError, pa.ArrowException):
            yield None


class DuckDb:
    """The tables of a DuckDB file, opened read-only with bounded memory."""

    def __init__(self, path: Path, name: str, scratch: Path) -> None:
        import duckdb

        self._name = name
        settings = {"memory_limit": "256MB", "threads": "1", "temp_directory": str(scratch)}
        try:
            self._connection = duckdb.connect(str(path), read_only=True, config=settings)  # type: ignore[arg-type]
            found = self._connection.execute(
                "SELECT table_schema, table_name, column_name, data_type FROM information_schema.columns "
                "ORDER BY table_schema <> 'main', table_schema, table_name, ordinal_position"
            ).fetchall()
        except duckdb.Error:
            reason = "is not a readable DuckDB file (damaged, locked, or of a newer version)"
            raise UnreadableError(name, reason) from None
        self._tables: dict[str, tuple[str, dict[str, str]]] = {}
        for schema, table, column, kind in found:
            address = f"{_quoted(schema)}.{_quoted(table)}"
            known, types = self._tables.setdefault(table.lower(), (address, {}))
            if known == address:
                types[column] = kind

    def __contains__(self, table: str) -> bool:
        return table in self._tables

    def columns(self, table: str) -> list[str]:
        """Return the columns of a table as they are spelled."""
        return list(self._tables[table][1])

    def rows(self, table: str, wanted: Collection[str]) -> Iterator[Row | Rejected]:
        """Yield the wanted columns of a table's rows, in the order they are stored."""
        import duckdb

        address, types = self._tables[table]
        chosen = {column: kind for column, kind in types.items() if column.lower() in wanted}
        keys = [column.lower() for column in chosen]
        # Times as text: a time that Python cannot hold would end the whole table.
        listed = ", ".join(
            f"CAST({_quoted(column)} AS VARCHAR)" if kind.startswith(("TIME", "DATE")) else _quoted(column)
            for column, kind in chosen.items()
        )
        number = 0
        try:
            result = self._connection.cursor().execute(f"SELECT {listed} FROM {address}")
            while batch := result.fetchmany(_BATCH):
                for values in batch:
                    number += 1
                    yield Row(f"{self._name}/{table}:row {number}", dict(zip(keys, values, strict=True)))
        except duckdb.Error:
            raise UnreadableError(f"{self._name}/{table}", "cannot be read further from the DuckDB file") from None

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
