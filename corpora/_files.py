"""What the corpus modules share: finding a file, reading a delimited one without ever showing its text, one summary."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from clinical_nlp.errors import InputError, MissingDataError
from clinical_nlp.notes.corpus import Card
from clinical_nlp.progress import say

_LONGEST_FIELD = 2**27


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


def _open(file: Path):  # type: ignore[no-untyped-def]
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return open(file, encoding="utf-8-sig", newline="")


def loaded(card: Card, counts: str) -> Card:
    """Return the card with what was read added to its size, and say it when something was left out."""
    if "left out" in counts:
        say(f"{card.name}: {counts}")
    return replace(card, size=f"{card.size} Read here: {counts}.")
