"""A corpus: a named source of notes with whatever gold it has, and the card that says what it is."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_type_hints

import pyarrow as pa

from clinical_nlp.errors import MissingDataError, UsageError, nearest

CORPORA = (
    "synthetic_hospitals",
    "mtsamples",
    "aci_bench",
    "mts_dialog",
    "codiesp",
    "ncbi_disease",
    "bc5cdr",
    "mimic_iv_note",
    "n2c2",
    "ehr_export",
)
"""The shipped corpora; each is the module `clinical_nlp.corpora.<name>` with a `CARD` and a `load(path, **options)`."""


@dataclass(frozen=True, slots=True)
class Card:
    """What a corpus is. `institution_means` says what the institution column really holds (hospital, journal, ...)."""

    name: str
    origin: str
    licence: str
    citation: str
    size: str
    institution_means: str
    patient_means: str
    obtain: str
    folder: str | None = None
    contains_phi: bool = False


@dataclass(frozen=True, slots=True)
class Corpus:
    """Notes (`NOTE_SCHEMA`) with the gold tables that this source has; an absent table is None.

    `parts` maps (institution, note_id) to the corpus's own part (train, development, test) where it has official ones.
    """

    notes: pa.Table
    card: Card
    spans: pa.Table | None = None
    codes: pa.Table | None = None
    pairs: pa.Table | None = None
    facts: pa.Table | None = None
    patients: pa.Table | None = None
    parts: Mapping[tuple[str, str], str] = field(default_factory=dict)


_PLAIN: dict[Any, tuple[type, str]] = {int: (Integral, "a whole number"), float: (Real, "a number"), str: (str, "text")}


def load_corpus(name: str, path: str | os.PathLike[str] | None = None, **options: Any) -> Corpus:
    """Load a corpus by name.

    Parameters
    ----------
    name : one of `CORPORA`.
    path : folder or file of the corpus; without it, `$CLINICAL_NLP_DATA/<folder of the card>`.
    options : what the corpus module's `load` takes.

    Raises
    ------
    UsageError : the corpus is not known, or an option is not one of its own or of another kind.
    MissingDataError : the data are not there; the message says where they can be had.
    """
    load = corpus_module(name).load
    taken = inspect.signature(load).parameters
    known = [key for key, parameter in taken.items() if parameter.kind is parameter.KEYWORD_ONLY]
    others = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    for key in options:
        if key not in known and not others:
            what = nearest(key, known) if known else "; it has none"
            raise UsageError(f"corpus {name!r} has no option {key!r}{what}")
    kinds = get_type_hints(load)
    for key in options.keys() & known:
        kind, called = _PLAIN.get(kinds.get(key), (object, ""))
        value = options[key]
        if not isinstance(value, kind) or (called and isinstance(value, bool)):
            raise UsageError(f"corpus {name!r}: option {key!r} is {called}, not {value!r}")
    for key in known:
        if key not in options and taken[key].default is inspect.Parameter.empty:
            raise UsageError(f"corpus {name!r} needs the option {key!r} (corpus.options.{key})")
    return load(None if path is None else Path(path), **options)  # type: ignore[no-any-return]


def corpus_module(name: str) -> Any:
    """Import the module of a shipped corpus."""
    if name not in CORPORA:
        raise UsageError(f"corpus {name!r} is not known{nearest(name, CORPORA)}")
    return importlib.import_module(f"clinical_nlp.corpora.{name}")


def corpus_path(card: Card, path: Path | None) -> Path:
    """Return where the files of a corpus are: `path`, else `$CLINICAL_NLP_DATA/<folder>`; it must exist."""
    if path is None:
        root = os.environ.get("CLINICAL_NLP_DATA")
        if not root or not card.folder:
            raise MissingDataError(
                f"corpus {card.name!r} needs a path (--corpus.path, or CLINICAL_NLP_DATA holding "
                f"{card.folder or 'it'}); {card.obtain}"
            )
        path = Path(root) / card.folder
    if not path.exists():
        raise MissingDataError(f"corpus {card.name!r}: no such file or folder: {path}; {card.obtain}")
    return path
