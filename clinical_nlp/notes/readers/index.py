"""Keys and small values of one reading on disk, so that memory does not grow with the export."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import tempfile
from pathlib import Path
from types import TracebackType


class DiskIndex:
    """A map from (kind, key parts) to a short string, in a SQLite file that is gone at the end.

    Keys are stored as 128-bit digests, never as text. Where the system allows it the file is unlinked as soon as it
    is open, so that nothing of it is left even after SIGKILL.
    """

    def __init__(self, scratch: Path | None = None) -> None:
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
        self.folder = Path(scratch or tempfile.gettempdir())
        handle, name = tempfile.mkstemp(prefix="index-", suffix=".sqlite", dir=self.folder)
        os.close(handle)
        self._file = Path(name)
        self._connection = sqlite3.connect(name, isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", "temp_store=MEMORY"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute("PRAGMA cache_size=-16384")
        self._connection.execute("CREATE TABLE entry (key BLOB PRIMARY KEY, value TEXT) WITHOUT ROWID")
        self._connection.execute("BEGIN")
        with contextlib.suppress(OSError):
            self._file.unlink()

    def add(self, kind: str, *key: str, value: str = "") -> str | None:
        """Store `value` unless the key is there; return the value that was there, or None where the key is new."""
        if (present := self.get(kind, *key)) is not None:
            return present
        self._connection.execute("INSERT INTO entry VALUES (?, ?)", (_digest(kind, key), _storable(value)))
        return None

    def get(self, kind: str, *key: str) -> str | None:
        """Return the value of a key, or None."""
        row = self._connection.execute("SELECT value FROM entry WHERE key = ?", (_digest(kind, key),)).fetchone()
        return None if row is None else row[0]

    def put(self, kind: str, *key: str, value: str) -> None:
        """Store `value`, in place of an earlier one."""
        self._connection.execute("INSERT OR REPLACE INTO entry VALUES (?, ?)", (_digest(kind, key), _storable(value)))

    def close(self) -> None:
        """Forget everything."""
        self._connection.close()
        self._file.unlink(missing_ok=True)

    def __enter__(self) -> DiskIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _digest(kind: str, key: tuple[str, ...]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in (kind, *key):
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def _storable(value: str) -> str:
    return value.encode("utf-8", "replace").decode("utf-8")
