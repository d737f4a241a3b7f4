"""BRAT standoff: `DOC.txt` is a note, `DOC.ann` its gold.

    read_spans(path: Path, options: ReadOptions = ReadOptions()) -> BratSpans
        .table          pa.Table of SPAN_SCHEMA, ordered by file and line
        .discontinuous  how many spans had several fragments
        .rejected       tuple of Rejected: annotation lines that do not fit their text

The format has no patients: every document is its own, unless `patient_map` says otherwise, or a `patient_map.csv` in
the folder does, as `review` writes it. The note id is the path below the source without `.txt`.

A discontinuous span (`Drug 10 15;16 20`) becomes one span from its first start to its last end, with the text
between, and is counted: most are spans that a line break divided. Offsets are code points into the unchanged text;
a span whose text is not what the annotation says is rejected. `A Negation T1` sets presence to absent, and
`A Presence T1 uncertain` (also Temporality, Modality, Experiencer) that axis to one of its values; an `N` line with an
HPO or ICD-10-CM reference sets that id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from clinical_nlp.errors import MissingDataError
from clinical_nlp.notes.readers.files import read_text, walk
from clinical_nlp.notes.readers.folder import check_institution_from, institution_of, stem
from clinical_nlp.notes.readers.options import DEFAULT_OPTIONS, Reading, ReadOptions
from clinical_nlp.notes.schema import (
    EXPERIENCER,
    MODALITY,
    PRESENCE,
    SPAN_SCHEMA,
    TEMPORALITY,
    Note,
    Patient,
    Record,
    Rejected,
)

_AXES = {"presence": PRESENCE, "temporality": TEMPORALITY, "modality": MODALITY, "experiencer": EXPERIENCER}
_LINE = re.compile(r"[TAMNRE][^\s]*$|[#*]")
_BODY = re.compile(r"(\S+) (\d+ \d+(?:;\d+ \d+)*)")


@dataclass(frozen=True, slots=True)
class BratSpans:
    """Gold spans of a folder; `table` is of `SPAN_SCHEMA`, `discontinuous` counts the spans of several fragments."""

    table: pa.Table
    discontinuous: int
    rejected: tuple[Rejected, ...]


def files(source: Path) -> Iterator[Path]:
    """Yield the texts."""
    if source.is_file():
        yield source
    else:
        yield from (path for path in walk(source) if path.suffix == ".txt")


def read(reading: Reading) -> Iterator[Record]:
    """Yield one record a text."""
    check_institution_from(reading.options, format="brat")
    for path in files(reading.source):
        name = reading.name(path)
        text, problem = read_text(path, reading.options.encoding)
        note_id = stem(name)
        if text is None:
            yield Rejected(name, str(problem), note_id, note_id)
            continue
        yield Note(
            note_id=note_id,
            patient_id=note_id,
            institution=institution_of(name, reading.options),
            text=text,
            source=name,
            language=reading.options.default_language,
        )


def patients(reading: Reading) -> Iterator[Patient]:
    """Yield nothing: the format has no demographics."""
    yield from ()


def read_spans(path: Path, options: ReadOptions = DEFAULT_OPTIONS) -> BratSpans:
    """Read the gold of a folder (recursively) or of one `.ann` or `.txt` file.

    Parameters
    ----------
    path : folder, or one file with its partner beside it.
    options : the options the notes are read with, so that (institution, note_id) agree.

    Returns
    -------
    BratSpans, see the module's docstring for the policies.

    Raises
    ------
    MissingDataError : the path does not exist.
    """
    if not path.exists():
        raise MissingDataError(f"no such file or folder: {path}")
    check_institution_from(options, format="brat")
    rows: list[dict[str, Any]] = []
    rejected: list[Rejected] = []
    discontinuous = 0
    root = path if path.is_dir() else path.parent
    found = walk(path) if path.is_dir() else iter([path.with_suffix(".ann")])
    for ann in found:
        if ann.suffix != ".ann":
            continue
        name = ann.relative_to(root).as_posix()
        text, problem = read_text(ann.with_suffix(".txt"), options.encoding)
        body, ann_problem = read_text(ann, options.encoding)
        note_id = stem(name)
        if text is None or body is None:
            reason = f"the text beside it {problem}" if text is None else str(ann_problem)
            rejected.append(Rejected(name, reason, note_id))
            continue
        spans, bad, divided = _parse(body, text, name, note_id)
        institution = institution_of(name, options)
        rows.extend({"institution": institution, "note_id": note_id, **span} for span in spans)
        rejected.extend(bad)
        discontinuous += divided
    return BratSpans(pa.Table.from_pylist(rows, schema=SPAN_SCHEMA), discontinuous, tuple(rejected))


def _parse(body: str, text: str, name: str, note_id: str) -> tuple[list[dict[str, Any]], list[Rejected], int]:
    spans: dict[str, dict[str, Any]] = {}
    rejected: list[Rejected] = []
    later: list[tuple[int, list[str]]] = []
    discontinuous = 0
    for number, line in enumerate(body.split("\n"), start=1):
        fields = line.rstrip("\r").split("\t")
        if fields[0][:1] in ("A", "M", "N"):
            later.append((number, fields))
        if line.strip() and not _LINE.match(fields[0]):
            rejected.append(
                Rejected(f"{name}:{number}", "not a line of BRAT (its ID comes first, then a tab)", note_id)
            )
            continue
        if fields[0][:1] != "T":
            continue
        match = _BODY.fullmatch(fields[1]) if len(fields) > 1 else None
        if match is None:
            rejected.append(Rejected(f"{name}:{number}", "not a text-bound annotation (ID, type and offsets)", note_id))
            continue
        fragments = [tuple(map(int, part.split(" "))) for part in match[2].split(";")]
        ordered = all(start < end for start, end in fragments) and fragments == sorted(fragments)
        if not ordered or fragments[-1][1] > len(text):
            rejected.append(
                Rejected(f"{name}:{number}", f"offsets do not fit a text of {len(text)} characters", note_id)
            )
            continue
        covered = " ".join(text[start:end] for start, end in fragments)
        if len(fields) > 2 and covered.split() != fields[2].split():
            rejected.append(Rejected(f"{name}:{number}", "the text at the offsets is not what the line says", note_id))
            continue
        discontinuous += len(fragments) > 1
        start, end = fragments[0][0], fragments[-1][1]
        spans[fields[0]] = {"start": start, "end": end, "text": text[start:end], "label": match[1]}
    for number, fields in later:
        parts = fields[1].split(" ") if len(fields) > 1 else []
        if len(parts) < 2:
            rejected.append(Rejected(f"{name}:{number}", "not an attribute or a reference", note_id))
        elif parts[1] in spans:
            _attribute(spans[parts[1]], fields[0][0], parts)
    return list(spans.values()), rejected, discontinuous


def _attribute(span: dict[str, Any], kind: str, parts: list[str]) -> None:
    if kind != "N":
        axis = parts[0].lower()
        if axis in ("negation", "negated"):
            span["presence"] = "absent"
        elif parts[2:] and parts[2] in _AXES.get(axis, ()):
            span[axis] = parts[2]
        return
    reference = parts[2] if len(parts) > 2 else ""
    system, _, code = reference.partition(":")
    if found := re.search(r"HP[:_](\d{7})", reference):
        span["hpo_id"] = f"HP:{found[1]}"
    elif system.upper().replace("-", "").replace("_", "") in ("ICD10CM", "ICD10"):
        span["icd10cm_code"] = code
