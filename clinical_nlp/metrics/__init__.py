"""Metrics for generated clinical text, as modules of the `evaluate` library that load from the package, offline.

`clinical_nlp.metrics.load("rouge")`, or `evaluate.load(clinical_nlp.metrics.path("rouge"), keep_in_memory=True)`.
`keep_in_memory` matters: without it `evaluate` writes every text that it scores to its cache.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinical_nlp.errors import UsageError

if TYPE_CHECKING:
    import evaluate

_CLASSES = {"rouge": "Rouge", "bertscore": "BertScore", "note_sections": "NoteSections",
            "clinical_facts": "ClinicalFacts"}  # fmt: skip
NAMES = tuple(_CLASSES)


def path(name: str) -> str:
    """Return the file of a metric, as `evaluate.load` takes it.

    Raises
    ------
    UsageError : there is no such metric.
    """
    if name not in NAMES:
        raise UsageError(f"metric must be one of {', '.join(NAMES)}, not {name!r}")
    return str(Path(__file__).parent / f"{name}.py")


def load(name: str, **options: Any) -> evaluate.EvaluationModule:
    """Load a metric by name; nothing that it scores is written to disk, and the network is not asked.

    It is the module that `evaluate.load(path(name), keep_in_memory=True)` gives, without the copy of its code that
    `evaluate` puts in a cache and finds no more once another run has moved the cache.

    Parameters
    ----------
    name : one of `NAMES`.
    options : of `evaluate.EvaluationModule`, such as `experiment_id`.

    Raises
    ------
    UsageError : there is no such metric.
    """
    path(name)
    module = import_module(f"clinical_nlp.metrics.{name}")
    metric: evaluate.EvaluationModule = getattr(module, _CLASSES[name])(**{**options, "keep_in_memory": True})
    return metric
