"""Checkpoints that are whole or not there: digests are written last, and resume takes the newest that verifies."""

from __future__ import annotations

import json
from pathlib import Path

from clinical_nlp.progress import say
from clinical_nlp.runs import file_digest, write_json

DIGESTS = "digests.json"


def seal(folder: Path) -> None:
    """Write the digest of every file of a finished checkpoint; until then it does not count."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS)
    write_json(folder / DIGESTS, {str(path.relative_to(folder)): file_digest(path) for path in files})


def verifies(folder: Path) -> bool:
    """Say whether every file of a checkpoint is there and unchanged."""
    try:
        digests = json.loads((folder / DIGESTS).read_text("utf-8"))
        return bool(digests) and all(file_digest(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint that verifies; torn or damaged ones are named and passed over."""
    found = sorted(
        (path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()),
        key=lambda path: int(path.name.rpartition("-")[2]),
        reverse=True,
    )
    for path in found:
        if verifies(path):
            return path
        say(f"checkpoint {path.name} is torn or damaged; taking the one before it")
    return None
