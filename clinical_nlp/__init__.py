"""Adapt language models to a hospital's own notes, extract phenotypes in batch, and see whether they still hold."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load_corpus": "clinical_nlp.notes.corpus",
    "run": "clinical_nlp.recipe",
    "extract": "clinical_nlp.extraction",
    "drift": "clinical_nlp.recipes.drift",
    "assert_spans": "clinical_nlp.language.assertion",
    "Note": "clinical_nlp.notes.schema",
    "Assertion": "clinical_nlp.notes.schema",
    "Corpus": "clinical_nlp.notes.corpus",
    "Run": "clinical_nlp.runs",
    "Estimate": "clinical_nlp.runs",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'clinical_nlp' has no attribute {name!r}")
