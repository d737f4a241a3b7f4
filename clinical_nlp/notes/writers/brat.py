"""BRAT standoff: `DOC.txt` is a note, `DOC.ann` what is marked in it, with the assertion axes as attributes.

What `notes/readers/brat.py` reads. Usual values (present, current, actual, patient) are not written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clinical_nlp.notes.schema import EXPERIENCER, MODALITY, PRESENCE, TEMPORALITY
from clinical_nlp.runs import write_atomic

AXES = {"presence": PRESENCE, "temporality": TEMPORALITY, "modality": MODALITY, "experiencer": EXPERIENCER}
"""The assertion axes; the first value of each is the usual one."""

_LINE = re.compile(r"[^\n\r]+")


def entity_type(label: str) -> str:
    """Return a label as BRAT can show it: letters, digits, `_` and `-`."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", label) or "_"


def write_document(path: Path, text: str, spans: Iterable[Mapping[str, Any]]) -> None:
    """Write `path` (a .txt) and the .ann beside it.

    Parameters
    ----------
    path : of the text.
    text : the note, unchanged.
    spans : with start, end, label and, where they are known, the axes and `reference` (`HPO:HP:0001250`). A span over
        several lines is written in fragments, one a line.
    """
    lines = []
    for number, span in enumerate(spans, start=1):
        pieces = [
            (span["start"] + found.start(), span["start"] + found.end())
            for found in _LINE.finditer(text[span["start"] : span["end"]])
        ]
        places = ";".join(f"{start} {end}" for start, end in pieces)
        covered = " ".join(text[start:end] for start, end in pieces)
        lines.append(f"T{number}\t{entity_type(span['label'])} {places}\t{covered}")
        for axis, values in AXES.items():
            value = span.get(axis)
            if value not in (None, values[0]):
                lines.append(f"A{len(lines) + 1}\t{axis.capitalize()} T{number} {value}")
        if span.get("reference"):
            lines.append(f"N{number}\tReference T{number} {span['reference']}\t{span.get('name', '')}")
    write_atomic(path, text)
    write_atomic(path.with_suffix(".ann"), "".join(f"{line}\n" for line in lines))


def write_settings(folder: Path, types: Mapping[str, str]) -> None:
    """Write `annotation.conf` and `visual.conf`.

    Parameters
    ----------
    folder : of the documents, or above them.
    types : entity type -> how it is shown.
    """
    attributes = [f"{axis.capitalize()}\tArg:<ENTITY>, Value:{'|'.join(values[1:])}" for axis, values in AXES.items()]
    sections: Sequence[tuple[str, Sequence[str]]] = (
        ("entities", list(types)),
        ("relations", ()),
        ("events", ()),
        ("attributes", attributes),
    )
    settings = "\n".join(f"[{name}]\n" + "".join(f"{line}\n" for line in lines) for name, lines in sections)
    write_atomic(folder / "annotation.conf", settings)
    shown = [f"{name} | {' '.join(label.replace('|', ' ').split())}" for name, label in types.items()]
    write_atomic(folder / "visual.conf", "[labels]\n" + "".join(f"{line}\n" for line in shown) + "\n[drawing]\n")
