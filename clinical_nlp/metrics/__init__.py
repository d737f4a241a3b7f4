"""Metrics for generated clinical text, as modules of the `evaluate` library that load from the package, offline.

`clinical_nlp.metrics.load("rouge")` is `evaluate.load(clinical_nlp.metrics.path("rouge"), keep_in_memory=True)`.
`keep_in_memory` matters: without it `evaluate` writes every text that it scores to its cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinical_nlp.errors import UsageError

if TYPE_CHECKING:
    import evaluate

NAMES = ("rouge", "bertscore", "note_sections", "clinical_facts")


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

    Parameters
    ----------
    name : one of `NAMES`.
    options : handed to `evaluate.load`, such as `experiment_id`.

    Raises
    ------
    UsageError : there is no such metric.
    """
    file = path(name)
    import evaluate

    return evaluate.load(file, **{**options, "keep_in_memory": True})
