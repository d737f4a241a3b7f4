"""What ncbi_disease and bc5cdr share: parts as IOB files, text rebuilt from tokens, units where documents are lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from clinical_nlp.corpora._files import find, loaded, missing
from clinical_nlp.notes.corpus import Card, Corpus, corpus_path
from clinical_nlp.notes.readers.iob import document, read_iob_documents
from clinical_nlp.notes.schema import SPAN_SCHEMA, Note, notes_table

BLOCK = 20
"""Sentences a block. An abstract has nine on average, so a block of 20 keeps most of what belongs together."""

PATIENT_MEANS = (
    "an abstract has no patient. The files mark no documents, so a note is a sentence and the unit of splits and "
    f"intervals is a block of {BLOCK} consecutive sentences, about two abstracts (block bootstrap, Kuensch 1989); "
    "a random split may divide the abstract at the edge of a block, the official parts divide none. In a copy with "
    "-DOCSTART- lines the note and the unit are the abstract"
)

_FILES = (
    ("train", ("train.tsv",)),
    ("development", ("devel.tsv", "dev.tsv")),
    ("test", ("test.tsv",)),
)


def load(card: Card, path: Path | None) -> Corpus:
    """Read `train.tsv`, `devel.tsv` and `test.tsv`, as many as are there; see `read_iob` for the errors."""
    root = corpus_path(card, path)
    notes: list[Note] = []
    unit = ""
    spans: list[dict[str, Any]] = []
    parts: dict[tuple[str, str], str] = {}
    for part, names in _FILES:
        file = find(root, *names)
        if file is None:
            continue
        documents = read_iob_documents(file)
        marked = any(len(sentences) > 1 for sentences in documents)
        unit = "abstract" if marked else "sentence"
        for position, sentences in enumerate(documents):
            text, found = document(sentences)
            note = Note(
                note_id=f"{part}-{position + 1}",
                patient_id=f"{part}-{position + 1}" if marked else f"{part}-block-{position // BLOCK + 1}",
                institution=card.name,
                text=text,
                source=f"{file.name}:{position + 1}",
                note_type=unit,
            )
            notes.append(note)
            parts[note.institution, note.note_id] = part
            spans += [
                {
                    "institution": note.institution,
                    "note_id": note.note_id,
                    "start": start,
                    "end": end,
                    "text": text[start:end],
                    "label": label,
                }
                for start, end, label in found
            ]
    if not notes:
        raise missing(card, root, "train.tsv, devel.tsv or test.tsv with a sentence in it")
    return Corpus(
        notes=notes_table(notes),
        card=loaded(card, f"{len(notes)} {unit}s, {len(spans)} spans"),
        spans=pa.Table.from_pylist(spans, schema=SPAN_SCHEMA),
        parts=parts,
    )
