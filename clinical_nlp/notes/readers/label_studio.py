"""Label Studio's JSON export: the annotations of tasks that `notes/writers/label_studio.py` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinical_nlp.errors import InputError
from clinical_nlp.notes.readers.files import read_text
from clinical_nlp.notes.schema import EXPERIENCER, MODALITY, PRESENCE, TEMPORALITY, Rejected

_AXES = {"presence": PRESENCE, "temporality": TEMPORALITY, "modality": MODALITY, "experiencer": EXPERIENCER}


@dataclass(frozen=True, slots=True)
class Annotated:
    """What one annotation of one task says: spans with start, end, label and axes, and the regions that do not fit."""

    name: str
    text: str
    spans: tuple[dict[str, Any], ...]
    rejected: tuple[Rejected, ...]


def read_annotations(path: Path) -> Iterator[Annotated]:
    """Yield the annotations of an export, one a task; cancelled ones and tasks without any are left out.

    Of several annotations of a task the latest counts. Offsets are code points; an export that counts UTF-16 units
    (older versions of Label Studio) is recognised by the text of the region.

    Parameters
    ----------
    path : the JSON file.

    Raises
    ------
    InputError : the file is no such export.
    """
    body, problem = read_text(path, "utf-8")
    try:
        if body is None:
            raise ValueError(problem)
        tasks = json.loads(body)
        if not isinstance(tasks, list):
            raise ValueError("no list")
        for task in tasks:
            done = [item for item in task.get("annotations") or () if not item.get("was_cancelled")]
            if done:
                latest = max(done, key=lambda item: (item.get("updated_at") or "", item.get("id") or 0))
                yield _annotated(task["data"], latest["result"], path.name)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is not a JSON export of Label Studio with the tasks that were given to it") from None


def _annotated(data: Mapping[str, Any], result: list[Mapping[str, Any]], source: str) -> Annotated:
    name, text = str(data["note"]), str(data["text"])
    regions: dict[str, dict[str, Any]] = {}
    rejected = []
    for item in result:
        value, own = item.get("value") or {}, regions.setdefault(str(item.get("id")), {})
        if item.get("type") == "labels":
            place = _place(text, value)
            if place is None:
                reason = "the text at the offsets is not what the region says"
                rejected.append(Rejected(f"{source}: region {item.get('id')}", reason, name))
            elif value.get("labels"):
                own |= {"start": place[0], "end": place[1], "label": str(value["labels"][0])}
        elif item.get("type") == "choices" and item.get("from_name") in _AXES:
            chosen = value.get("choices") or ()
            if chosen and chosen[0] in _AXES[item["from_name"]]:
                own[item["from_name"]] = chosen[0]
    spans = sorted(
        (span for span in regions.values() if "label" in span), key=lambda span: (span["start"], span["end"])
    )
    return Annotated(name, text, tuple(spans), tuple(rejected))


def _place(text: str, value: Mapping[str, Any]) -> tuple[int, int] | None:
    start, end, said = int(value["start"]), int(value["end"]), str(value.get("text", ""))
    units = text.encode("utf-16-le", "surrogatepass")
    for first, last in (
        (start, end),
        tuple(len(units[: 2 * place].decode("utf-16-le", "replace")) for place in (start, end)),
    ):
        covered = text[first:last]
        if 0 <= first < last <= len(text) and (not said or covered.split() == said.split()):
            kept = covered.strip()
            begin = first + covered.index(kept) if kept else first
            return (begin, begin + len(kept)) if kept else None
    return None
