"""MTS-Dialog: short doctor-patient dialogues, each with the note section that sums it up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from clinical_nlp.corpora._files import find, loaded, missing, read_rows
from clinical_nlp.errors import InputError, UsageError
from clinical_nlp.notes.corpus import Card, Corpus, corpus_path
from clinical_nlp.notes.schema import PAIR_SCHEMA, Note, notes_table

CARD = Card(
    name="mts_dialog",
    origin="https://github.com/abachaa/MTS-Dialog (Main-Dataset)",
    licence="CC BY 4.0",
    citation="Ben Abacha A et al. An Empirical Study of Clinical Note Generation from Doctor-Patient Encounters. "
    "EACL 2023.",
    size="1,701 pairs: train 1,201, development 100, two test sets of 200; 20 section headers. The sections were taken "
    "from MTSamples notes: do not train on this corpus and report on mtsamples, or the reverse.",
    institution_means="one constant, mts_dialog: the source of all pairs",
    patient_means="the dialogue; sections of one MTSamples note may be several dialogues, which are not linked",
    obtain="clone https://github.com/abachaa/MTS-Dialog and give its Main-Dataset folder",
    folder="mts-dialog",
)


def load(path: Path | None = None, *, test_set: int = 1) -> Corpus:
    """Read `MTS-Dialog-TrainingSet.csv`, `-ValidationSet.csv` and, where it is there, `-TestSet-1...` or `-2...`.

    Parameters
    ----------
    test_set : 1 or 2; which test set is the test part.

    Returns
    -------
    Corpus with the sections as notes (the header is `note_type` and `title`), and pairs of kind `dialogue_section`
    whose `pair_id` is the note id. Identical dialogues are one patient, unless that would join two parts.
    """
    if test_set not in (1, 2):
        raise UsageError(f"corpus option test_set must be 1 or 2 (got {test_set!r})")
    root = corpus_path(CARD, path)
    notes: list[Note] = []
    pairs: list[dict[str, Any]] = []
    parts: dict[tuple[str, str], str] = {}
    for part, stem in (("train", "TrainingSet"), ("development", "ValidationSet"), ("test", f"TestSet-{test_set}")):
        file = find(root, f"MTS-Dialog-{stem}*.csv")
        if file is None:
            continue
        patient_of: dict[str, str] = {}
        for line, row in read_rows(file, ["ID", "section_header", "section_text", "dialogue"]):
            if not row["section_text"].strip() or not row["dialogue"].strip():
                raise InputError(f"{file}, line {line}: no dialogue or no section text; get a fresh copy")
            note_id = f"{part}-{row['ID']}"
            if ("mts_dialog", note_id) in parts:
                raise InputError(f"{file}, line {line}: id {row['ID']} is there twice; get a fresh copy")
            note = Note(
                note_id=note_id,
                patient_id=patient_of.setdefault(row["dialogue"], note_id),
                institution="mts_dialog",
                text=row["section_text"],
                source=f"{file.name}:{line}",
                note_type=row["section_header"].strip(),
                title=row["section_header"].strip(),
            )
            notes.append(note)
            parts[note.institution, note_id] = part
            pairs.append(
                {
                    "pair_id": note_id,
                    "patient_id": note.patient_id,
                    "institution": note.institution,
                    "kind": "dialogue_section",
                    "source": row["dialogue"],
                    "target": note.text,
                    "part": part,
                }
            )
    if not notes:
        raise missing(CARD, root, "MTS-Dialog-TrainingSet.csv, -ValidationSet.csv or -TestSet-*.csv")
    return Corpus(
        notes=notes_table(notes),
        card=loaded(CARD, f"{len(notes)} pairs"),
        pairs=pa.Table.from_pylist(pairs, schema=PAIR_SCHEMA),
        parts=parts,
    )
