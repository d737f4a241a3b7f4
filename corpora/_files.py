"""What the corpus modules share: finding a file, reading a delimited one without ever showing its text, one summary."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from clinical_nlp.errors import InputError, MissingDataError
from clinical_nlp.notes.corpus import Card
from clinical_nlp.notes.schema import Note, Record, Skipped, notes_table
from clinical_nlp.progress import say

_LONGEST_FIELD = 2**27
_BATCH = 4096
_REASONS = 8


def find(root: Path, *patterns: str) -> Path | None:
    """Return the one file below `root` that matches a pattern (or `root` itself, if a file that matches), else None."""
    if root.is_file():
        return root if any(root.match(pattern) for pattern in patterns) else None
    found = sorted({file for pattern in patterns for file in root.rglob(pattern) if file.is_file()})
    if len(found) > 1:
        raise InputError(f"{root} holds {len(found)} files that match {' or '.join(patterns)}; name one folder exactly")
    return found[0] if found else None


def missing(card: Card, path: Path, wanted: str) -> MissingDataError:
    """Return the error for a folder in which no part of the corpus is there."""
    return MissingDataError(f"corpus {card.name!r}: {path} has no {wanted}; {card.obtain}")


def read_text(file: Path) -> str:
    """Return the text of a UTF-8 file, line ends unchanged, a byte order mark removed."""
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8; get a fresh copy, or convert it") from None


def read_rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line on which the row ends, row) of a CSV file with a header, plain or gzip.

    Raises
    ------
    InputError : a column is missing, a row has another number of fields, or the file is damaged.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    where = f"{file}"
    try:
        with _open(file) as handle:
            reader = csv.reader(handle, strict=True)
            header = next(reader, None)
            if header is None:
                raise InputError(f"{file} is empty")
            if absent := [name for name in columns if name not in header]:
                raise InputError(f"{file} has no column {', '.join(absent)}; it needs {', '.join(columns)}")
            for fields in reader:
                where = f"{file}, line {reader.line_num}"
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise InputError(f"{where}: {len(fields)} fields under {len(header)} columns; get a fresh copy")
                yield reader.line_num, dict(zip(header, fields, strict=True))
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8 from here on; get a fresh copy, or convert it") from None
    except csv.Error:
        raise InputError(f"{where}: not valid CSV from here on; get a fresh copy") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise InputError(f"{where}: the gzip archive is damaged from here on; get a fresh copy") from None


def collect(records: Iterable[Record]) -> tuple[pa.Table, Counter[str]]:
    """Return the notes of a reader as one table, and how many records were left out for which reason."""
    tables: list[pa.Table] = []
    batch: list[Note] = []
    left_out: Counter[str] = Counter()
    for record in records:
        if isinstance(record, Note):
            batch.append(record)
        else:
            left_out[f"skipped ({record.rule})" if isinstance(record, Skipped) else f"rejected ({record.reason})"] += 1
        if len(batch) == _BATCH:
            tables.append(notes_table(batch))
            batch = []
    tables.append(notes_table(batch))
    return pa.concat_tables(tables), left_out


def listed(left_out: Counter[str]) -> str:
    """Return `; left out: 3 skipped (language:de), ...`, or nothing."""
    if not left_out:
        return ""
    common = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {reason}" for reason, count in common[:_REASONS]]
    if rest := sum(count for _, count in common[_REASONS:]):
        shown.append(f"{rest} for other reasons")
    return "; left out: " + ", ".join(shown)


def _open(file: Path):  # type: ignore[no-untyped-def]
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return open(file, encoding="utf-8-sig", newline="")


def loaded(card: Card, counts: str) -> Card:
    """Return the card with what was read added to its size, and say it when something was left out."""
    if "left out" in counts:
        say(f"{card.name}: {counts}")
    return replace(card, size=f"{card.size} Read here: {counts}.")
