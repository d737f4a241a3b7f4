"""Opening what hospitals send: gzip by content, byte order marks, lines of any length, damage reported by place."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from clinical_nlp.errors import InputError, UsageError

MAX_RECORD_BYTES = 128 << 20
"""A line, field or file of text beyond this is rejected unread: it bounds memory."""
MAX_RATIO = 500
"""Above this decompression ratio (after `RATIO_FREE_BYTES`) a gzip file is taken for a bomb."""
RATIO_FREE_BYTES = 256 << 20

_BLANK = b" \t\r\n"
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class UnreadableError(InputError):
    """A file, or the rest of one, cannot be read; `reason` says why, `line` from where on (0: from the start)."""

    def __init__(self, name: str, reason: str, line: int = 0) -> None:
        super().__init__(f"{name}:{line}: {reason}" if line else f"{name}: {reason}")
        self.reason, self.line = reason, line


class Line(NamedTuple):
    """One line without its end; `data` is None where `problem` says why it was not kept. `offset` is where `data`
    begins in the unpacked, recoded stream."""

    number: int
    data: bytes | None
    problem: str | None = None
    offset: int = 0


def byte_order_mark(head: bytes) -> tuple[str, int] | None:
    """Return (encoding, length of the mark) when `head` begins with a byte order mark."""
    for mark, encoding in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return encoding, len(mark)
    return None


def text_codec(name: str) -> str | None:
    """Return Python's name of a character set, or None where it is not known or is no character set."""
    try:
        found = codecs.lookup(name.strip().strip("\"'"))
    except (LookupError, ValueError):
        return None
    return found.name if getattr(found, "_is_text_encoding", True) and found.name not in _NO_CHARSETS else None


_NO_CHARSETS = frozenset({"idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined", "mbcs", "oem"})


def decode(data: bytes, declared: str | None = None, default: str = "utf-8") -> tuple[str | None, str | None]:
    """Decode bytes once; a byte order mark wins over `declared`, which wins over `default`.

    Declared Latin-1 that uses bytes 0x80 to 0x9F is read as Windows-1252, as browsers do; every byte stays one
    character.

    Returns
    -------
    (text, None), or (None, reason).
    """
    marked = byte_order_mark(data[:4])
    if marked is not None:
        encoding, skip = marked
    else:
        name = text_codec(declared or default)
        if name is None:
            return None, "declares a character set that is not known"
        encoding, skip = name, 0
    if encoding == "iso8859-1" and data.translate(None, _C1_BYTES) != data:
        try:
            return data.decode("cp1252"), None
        except UnicodeDecodeError:
            pass
    try:
        return data[skip:].decode(encoding), None
    except (UnicodeError, ValueError):
        hint = "" if declared or marked else "; no character set is declared"
        return None, f"bytes are not valid {encoding}{hint}"


_C1_BYTES = bytes(range(0x80, 0xA0))


class _Counted(io.RawIOBase):
    """Counts the compressed bytes that were read."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        self.count += len(data)
        return len(data)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Unpacked(io.RawIOBase):
    """The bytes of a gzip file (any number of members), refusing absurd ratios."""

    def __init__(self, compressed: BinaryIO) -> None:
        self._counted = _Counted(compressed)
        self._gzip = gzip.GzipFile(fileobj=cast("BinaryIO", io.BufferedReader(self._counted)), mode="rb")
        self._out = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._gzip.read1(len(buffer))
        buffer[: len(data)] = data
        self._out += len(data)
        if self._out > RATIO_FREE_BYTES and self._out > MAX_RATIO * max(self._counted.count, 1):
            raise _Bomb
        return len(data)

    def close(self) -> None:
        self._gzip.close()
        self._counted.close()
        super().close()


class _Bomb(Exception):
    pass


class _Recoded(io.RawIOBase):
    """A stream in UTF-16 or UTF-32, as UTF-8."""

    def __init__(self, raw: BinaryIO, encoding: str) -> None:
        self._raw = raw
        self._decoder = codecs.getincrementaldecoder(encoding)(errors="strict")
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._pending:
            data = self._raw.read(1 << 16)
            self._pending = self._decoder.decode(data, final=not data).encode("utf-8", "surrogatepass")
            if not data and not self._pending:
                return 0
        part, self._pending = self._pending[: len(buffer)], self._pending[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self._raw.close()
        super().close()


class Opened(NamedTuple):
    """A stream of bytes; `marked` where a byte order mark told the encoding, and the bytes are UTF-8 now."""

    stream: BinaryIO
    marked: bool


def open_bytes(path: Path, name: str) -> Opened:
    """Open a file for streaming: gzip is unpacked (by content, not by name), UTF-16 and UTF-32 become UTF-8.

    Raises
    ------
    UnreadableError : the file cannot be opened, or is named .gz and is none.
    """
    try:
        raw: BinaryIO = path.open("rb")
        head = raw.read(4)
        raw.seek(0)
    except OSError as error:
        raise UnreadableError(name, f"cannot be opened ({error.strerror})") from None
    stream: BinaryIO = raw
    if head.startswith(b"\x1f\x8b"):
        stream = io.BufferedReader(cast("io.RawIOBase", _Unpacked(raw)), 1 << 16)
        with reading(name):
            head = cast("io.BufferedReader", stream).peek(4)[:4]
    elif path.suffix == ".gz" and head:
        raw.close()
        raise UnreadableError(name, "is named .gz but is not gzip")
    marked = byte_order_mark(head)
    if marked is not None:
        encoding, skip = marked
        with reading(name):
            stream.read(skip)
        if encoding != "utf-8":
            stream = io.BufferedReader(cast("io.RawIOBase", _Recoded(stream, encoding)), 1 << 16)
    return Opened(stream, marked is not None)


class reading:
    """Turn every way in which a stream breaks into one `UnreadableError` without content."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.line = 0

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _Bomb):
            reason = f"unpacks to more than {MAX_RATIO} times its size; unpack it yourself if that is right"
        elif isinstance(error, EOFError):
            reason = "the gzip file is cut short; copy it again"
        elif isinstance(error, (zlib.error, gzip.BadGzipFile)):
            reason = "the gzip file is damaged; copy it again"
        elif isinstance(error, UnicodeError):
            reason = "does not decode in the encoding that its byte order mark declares"
        elif isinstance(error, OSError):
            reason = f"cannot be read ({error.strerror})"
        else:
            return
        raise UnreadableError(self._name, reason, self.line) from None


def lines(path: Path, name: str) -> Iterator[Line]:
    """Yield the lines of a file that are not blank, numbered from 1.

    Raises
    ------
    UnreadableError : where the file breaks off; the lines before it were yielded.
    """
    with open_bytes(path, name).stream as stream:
        number = end = 0
        guard = reading(name)
        while True:
            guard.line = number + 1
            with guard:
                data = stream.readline(MAX_RECORD_BYTES)
            if not data:
                return
            number += 1
            begin, end = end, end + len(data)
            if len(data) == MAX_RECORD_BYTES and not data.endswith(b"\n"):
                with guard:
                    while (rest := stream.readline(1 << 20)) and not rest.endswith(b"\n"):
                        end += len(rest)
                    end += len(rest)
                yield Line(number, None, f"line is longer than {MAX_RECORD_BYTES >> 20} MiB")
            elif stripped := data.lstrip(_BLANK):
                yield Line(number, stripped.rstrip(_BLANK), offset=begin + len(data) - len(stripped))


def read_text(path: Path, encoding: str) -> tuple[str | None, str | None]:
    """Read a whole text file, line ends untouched; return (text, None) or (None, reason)."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RECORD_BYTES + 1)
    except OSError as error:
        return None, f"cannot be read ({error.strerror})"
    if len(data) > MAX_RECORD_BYTES:
        return None, f"is larger than {MAX_RECORD_BYTES >> 20} MiB"
    return decode(data, default=encoding)


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in a fixed order, hidden ones left out; one directory in memory at a time."""
    with reading(folder.name):
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if not entry.is_symlink():
                yield from walk(entry)
        elif entry.is_file():
            yield entry


def require_codec(encoding: str) -> None:
    """Refuse an encoding that Python does not know."""
    if text_codec(encoding) is None:
        raise UsageError(f"encoding {encoding!r} is not known; try utf-8, cp1252 or latin-1")
