"""Label Studio: notes as tasks with predictions to correct, and the labelling interface for them.

What `notes/readers/label_studio.py` reads back. Every region has one label and one choice an axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from clinical_nlp.notes.writers.brat import AXES

LABELS, TEXT = "concept", "text"


def task(text: str, name: str, spans: Iterable[Mapping[str, Any]], *, model_version: str) -> dict[str, Any]:
    """Return a note as a task.

    Parameters
    ----------
    text : the note, unchanged; offsets count code points.
    name : of the note, given back with the corrections.
    spans : with start, end, label and the axes.
    model_version : what made the predictions.
    """
    result: list[dict[str, Any]] = []
    for number, span in enumerate(spans, start=1):
        place = {"start": span["start"], "end": span["end"], "text": text[span["start"] : span["end"]]}
        region = {"id": f"m{number}", "to_name": TEXT}
        result.append({**region, "from_name": LABELS, "type": "labels", "value": {**place, "labels": [span["label"]]}})
        for axis, values in AXES.items():
            value = span.get(axis) or values[0]
            result.append({**region, "from_name": axis, "type": "choices", "value": {**place, "choices": [value]}})
    return {
        "data": {"text": text, "note": name},
        "predictions": [{"model_version": model_version, "result": result}],
    }


def label_config(labels: Sequence[str]) -> str:
    """Return the labelling interface for some labels, as XML."""
    lines = ["<View>", f'  <Labels name="{LABELS}" toName="{TEXT}">']
    lines += [f'    <Label value="{escape(label)}"/>' for label in labels]
    lines += ["  </Labels>", f'  <Text name="{TEXT}" value="$text" granularity="symbol"/>']
    for axis, values in AXES.items():
        lines.append(f'  <Choices name="{axis}" toName="{TEXT}" perRegion="true" showInline="true">')
        lines += [f'    <Choice value="{value}"/>' for value in values]
        lines.append("  </Choices>")
    return "\n".join([*lines, "</View>"]) + "\n"
