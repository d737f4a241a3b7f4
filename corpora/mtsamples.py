"""MTSamples: transcribed sample notes of 40 medical specialties, repeated texts removed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from clinical_nlp.corpora._files import find, loaded, missing, read_rows
from clinical_nlp.notes.corpus import Card, Corpus, corpus_path
from clinical_nlp.notes.schema import Note, notes_table

CARD = Card(
    name="mtsamples",
    origin="mtsamples.com, collected by T. Boyle (Kaggle tboyle10/medicaltranscriptions)",
    licence="CC0 1.0 as stated by the uploader; the terms of mtsamples.com were not checked",
    citation="Boyle T. Medical Transcriptions. Kaggle, 2018.",
    size="4,999 rows, of which 2,357 texts are distinct.",
    institution_means="medical specialty or document type of the sample (a source, not a hospital)",
    patient_means="one distinct text; the samples name no patient, so two notes about one are not known as such",
    obtain="download mtsamples.csv from https://www.kaggle.com/datasets/tboyle10/medicaltranscriptions",
    folder="mtsamples",
)


def load(path: Path | None = None) -> Corpus:
    """Read `mtsamples.csv`, plain or gzip, as its uploader or the R package clinspacy writes it.

    A text that is listed under several specialties becomes one note, under the specialty that has the fewest rows
    (the most specific one; ties by name, then by row). Empty rows are left out. Both are counted on the card.
    """
    root = corpus_path(CARD, path)
    file = find(root, "mtsamples.csv", "mtsamples.csv.gz")
    if file is None:
        raise missing(CARD, root, "mtsamples.csv or mtsamples.csv.gz")

    rows = []
    sizes: Counter[str] = Counter()
    empty = 0
    for line, row in read_rows(file, ["medical_specialty", "transcription"]):
        specialty = row["medical_specialty"].strip() or "unknown"
        sizes[specialty] += 1
        if not row["transcription"].strip():
            empty += 1
            continue
        # The uploader's file has an unnamed index column where clinspacy's has note_id.
        number = row.get("note_id") or row.get("") or str(line)
        rows.append((sizes, specialty, number, line, row))

    chosen: dict[str, tuple[str, str, int, dict[str, str]]] = {}
    for _, specialty, number, line, row in sorted(rows, key=lambda item: (sizes[item[1]], item[1], item[3])):
        chosen.setdefault(row["transcription"], (specialty, number, line, row))
    notes = [
        Note(
            note_id=number,
            patient_id=f"mtsamples-{number}",
            institution=specialty,
            text=text,
            source=f"{file.name}:{line}",
            note_type=specialty,
            title=row.get("sample_name", "").strip() or None,
        )
        for text, (specialty, number, line, row) in sorted(chosen.items(), key=lambda item: item[1][2])
    ]
    counts = (
        f"{len(notes)} notes; left out of {sum(sizes.values())} rows: {empty} empty, {len(rows) - len(notes)} that "
        "repeat a text (kept under its rarest specialty)"
    )
    return Corpus(notes=notes_table(notes), card=loaded(CARD, counts))
