"""The index of a terminology kept on disk: built once on a machine, not once in every process.

It holds names of concepts and nothing of a note. A cache that cannot be written or read is gone without.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from clinical_nlp.language.terminology.abbreviations import Sense
from clinical_nlp.language.terminology.concepts import Terminology
from clinical_nlp.language.terminology.index import Index
from clinical_nlp.runs import write_atomic

_KEPT = 8
_WRITING = 600
"""Seconds after which nobody writes at a temporary file any more."""
_SETS = ("attributes", "negations", "numerals", "last_words", "long_words", "spared")
_TABLES = ("vocabulary", "bags", "orders", "literals")


def cached_index(terminology: Terminology, ids: Iterable[str]) -> Index:
    """Return the index of `ids`, from the cache where it is there and whole.

    The cache is `$CLINICAL_NLP_CACHE` (empty: none), else `clinical_nlp` in the user's cache folder. Its files are
    keyed by the digest of the terminology, the ids, and this package's rules for names.
    """
    ids = sorted(ids)
    folder = _folder()
    if folder is None:
        return Index.build(terminology, ids)
    whole = "\n".join((terminology.name, terminology.digest, _rules_digest(), *ids))
    path = folder / f"index-{hashlib.sha256(whole.encode()).hexdigest()[:32]}.json"
    found = _read(path)
    if found is None:
        found = Index.build(terminology, ids)
        with contextlib.suppress(OSError):
            _write(path, found)
    return found


def _folder() -> Path | None:
    named = os.environ.get("CLINICAL_NLP_CACHE")
    if named is not None:
        return Path(named) if named else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clinical_nlp"
    except RuntimeError:  # nobody's home
        return None


@lru_cache(maxsize=1)
def _rules_digest() -> str:
    """Return the digest of everything that names are indexed by: another release of this package builds its own."""
    whole = hashlib.sha256()
    for file in sorted(Path(__file__).parent.iterdir()):
        if file.suffix in (".py", ".csv"):
            whole.update(file.name.encode() + b"\0" + file.read_bytes())
    return whole.hexdigest()


def _write(path: Path, index: Index) -> None:
    told: dict[str, Any] = {"ids": index.ids, "values": index.values}
    told |= {name: sorted(getattr(index, name)) for name in _SETS}
    told |= {name: [list(table), list(table.values())] for name in _TABLES for table in (getattr(index, name),)}
    told["partners"] = [sorted(others) for others in index.partners]
    told["singles"] = list(index.singles.items())
    told["guards"] = index.guards
    told["abbreviations"] = {form: [asdict(sense) for sense in senses] for form, senses in index.abbreviations.items()}
    data = json.dumps(told, separators=(",", ":")).encode()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left in path.parent.glob(".index-*.tmp"):  # by a process that was killed while it wrote
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _WRITING:
                left.unlink()
    write_atomic(path, hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
    old = sorted(path.parent.glob("index-*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in old[_KEPT:]:
        file.unlink(missing_ok=True)


def _sense(told: dict[str, Any]) -> Sense:
    return Sense(told["code"], tuple(told["near"]), tuple(told["not_near"]), told["declared"])


def _read(path: Path) -> Index | None:
    try:
        digest, _, data = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if digest.decode("ascii", "replace") != hashlib.sha256(data).hexdigest():
        return None
    told = json.loads(data)
    fields: dict[str, Any] = {"ids": tuple(told["ids"]), "values": told["values"]}
    fields |= {name: frozenset(told[name]) for name in _SETS}
    fields |= {name: dict(zip(*told[name], strict=True)) for name in _TABLES}
    fields["partners"] = [frozenset(others) for others in told["partners"]]
    fields["singles"] = {number: [(form, code) for form, code in forms] for number, forms in told["singles"]}
    fields["guards"] = {form: (tuple(near), tuple(only)) for form, (near, only) in told["guards"].items()}
    fields["abbreviations"] = {
        form: [_sense(sense) for sense in senses] for form, senses in told["abbreviations"].items()
    }
    return Index(**fields)
