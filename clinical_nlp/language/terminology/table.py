"""A user's own vocabulary: a CSV of id, label, synonyms and parents."""

from __future__ import annotations

import csv
import hashlib
import io
from pathlib import Path

from clinical_nlp.errors import InputError
from clinical_nlp.language.terminology.concepts import Concept, Name, Terminology


def read_table(path: Path) -> Terminology:
    """Read a CSV with a header `id,label[,synonyms][,parents]`; several synonyms or parents are separated by `|`.

    Raises
    ------
    InputError : a column is missing, an id is empty, repeated or its own ancestor, a label is empty, or a parent is
        not in the file; the message names the line.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        columns = [column.strip().lower() for column in reader.fieldnames or ()]
        rows = []
        for values in reader:
            row = {k: v for k, v in zip(columns, values.values(), strict=False) if isinstance(v, str)}
            rows.append((reader.line_num, row))
    except (UnicodeDecodeError, csv.Error):
        msg = f"{path} is not a UTF-8 CSV file; save it as CSV with a header line id,label,synonyms,parents"
        raise InputError(msg) from None
    missing = [column for column in ("id", "label") if column not in columns]
    if missing:
        msg = f"{path}:1 has no column {missing[0]!r}; the header is id,label,synonyms,parents"
        raise InputError(msg)
    concepts: dict[str, Concept] = {}
    lines: dict[str, int] = {}
    for line, row in rows:
        concept_id, label = row.get("id", "").strip(), row.get("label", "").strip()
        if not concept_id or not label:
            msg = f"{path}:{line} has an empty {'id' if not concept_id else 'label'}; fill it in or remove the line"
            raise InputError(msg)
        if concept_id in concepts:
            msg = f"{path}:{line} repeats id {concept_id!r} of line {lines[concept_id]}; give every concept one line"
            raise InputError(msg)
        names = [Name(label, "label"), *(Name(s) for s in _parts(row.get("synonyms")) if s != label)]
        concepts[concept_id] = Concept(concept_id, tuple(names), tuple(_parts(row.get("parents"))))
        lines[concept_id] = line
    if not concepts:
        msg = f"{path} has a header and no concepts"
        raise InputError(msg)
    terminology = Terminology(path.stem, "", hashlib.sha256(data).hexdigest(), concepts)
    for concept_id, concept in concepts.items():
        for parent in concept.parents:
            if parent not in concepts:
                msg = f"{path}:{lines[concept_id]} names parent {parent!r}, which has no line of its own"
                raise InputError(msg)
        if concept_id in terminology.ancestors(concept_id):
            msg = f"{path}:{lines[concept_id]} makes {concept_id!r} its own ancestor"
            raise InputError(msg)
    return terminology


def _parts(value: str | None) -> list[str]:
    return [part.strip() for part in (value or "").split("|") if part.strip()]
