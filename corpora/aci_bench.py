"""ACI-BENCH: role-played doctor-patient encounters, each with its dialogue and its clinic note."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from clinical_nlp.corpora._files import find, loaded, missing, read_rows
from clinical_nlp.errors import InputError, UsageError, nearest
from clinical_nlp.notes.corpus import Card, Corpus, corpus_path
from clinical_nlp.notes.schema import PAIR_SCHEMA, Note, notes_table

CARD = Card(
    name="aci_bench",
    origin="https://github.com/wyim/aci-bench (data/challenge_data, data/src_experiment_data)",
    licence="CC BY 4.0",
    citation="Yim W et al. ACI-BENCH: a novel ambient clinical intelligence dataset. Sci Data 2023;10:586.",
    size="207 encounters: train 67, development 20, three test sets of 40.",
    institution_means="the capture system of the encounter: virtassist, virtscribe or aci (a source, not a hospital)",
    patient_means="the encounter; encounters are role-played and each has its own patient",
    obtain="clone https://github.com/wyim/aci-bench and give its data folder",
    folder="aci-bench",
)
_TRANSCRIPTS = ("challenge", "asr", "asrcorr", "humantrans")
_SYSTEMS = ("aci", "virtscribe")


def load(path: Path | None = None, *, transcripts: str = "challenge", test_set: int = 1) -> Corpus:
    """Read the CSV files of the challenge, or the same encounters as another capture wrote them down.

    Parameters
    ----------
    path : folder with the files, or a folder above them.
    transcripts : challenge (`train.csv`, `valid.csv`), or asr, asrcorr, humantrans (`train_aci_asr.csv` and the like):
        speech recognition, the same corrected, human transcripts. Encounter ids are those of the challenge wherever
        the challenge metadata are there, so that the forms of one encounter can be paired.
    test_set : 1, 2 or 3; which of the three test sets is the test part, where the file is there.

    Returns
    -------
    Corpus with the clinic notes, and pairs of kind `dialogue_note`.
    """
    if transcripts not in _TRANSCRIPTS:
        raise UsageError(f"corpus option transcripts={transcripts!r} is not known{nearest(transcripts, _TRANSCRIPTS)}")
    if test_set not in (1, 2, 3):
        raise UsageError(f"corpus option test_set must be 1, 2 or 3 (got {test_set!r})")
    root = corpus_path(CARD, path)
    notes: list[Note] = []
    pairs: list[dict[str, Any]] = []
    parts: dict[tuple[str, str], str] = {}
    for part, stem in (("train", "train"), ("development", "valid"), ("test", f"test{test_set}")):
        challenge_name = _encounters(root, stem)
        for file in _files(root, stem, transcripts):
            key = "encounter_id" if transcripts == "challenge" else "id"
            for line, row in read_rows(file, ["dataset", key, "dialogue", "note"]):
                if not row["note"].strip() or not row["dialogue"].strip():
                    raise InputError(f"{file}, line {line}: no dialogue or no note; get a fresh copy")
                encounter = challenge_name.get(row[key], row[key])
                note = Note(
                    note_id=encounter,
                    patient_id=encounter,
                    institution=row["dataset"],
                    text=row["note"],
                    source=f"{file.name}:{line}",
                    encounter_id=encounter,
                    note_type="clinic note",
                )
                if (note.institution, encounter) in parts:
                    raise InputError(f"{file}, line {line}: encounter {encounter} is there twice; get a fresh copy")
                notes.append(note)
                parts[note.institution, encounter] = part
                pairs.append(
                    {
                        "pair_id": encounter,
                        "patient_id": encounter,
                        "institution": note.institution,
                        "kind": "dialogue_note",
                        "source": row["dialogue"],
                        "target": row["note"],
                        "part": part,
                    }
                )
    if not notes:
        raise missing(CARD, root, f"train, valid or test file of the {transcripts} transcripts")
    return Corpus(
        notes=notes_table(notes),
        card=loaded(CARD, f"{len(notes)} encounters, {transcripts} transcripts"),
        pairs=pa.Table.from_pylist(pairs, schema=PAIR_SCHEMA),
        parts=parts,
    )


def _files(root: Path, stem: str, transcripts: str) -> list[Path]:
    wanted: list[tuple[str, ...]]
    if transcripts == "challenge":
        wanted = [(f"{stem}.csv", f"clinicalnlp_*_{stem}.csv", f"clef_*_{stem}.csv")]
    else:
        wanted = [(f"{stem}_{system}_{transcripts}.csv",) for system in _SYSTEMS]
    return [file for patterns in wanted if (file := find(root, *patterns)) is not None]


def _encounters(root: Path, stem: str) -> dict[str, str]:
    """Map the source's own id of an encounter to its id in the challenge."""
    file = find(root, f"{stem}_metadata.csv", f"clinicalnlp_*_{stem}_metadata.csv", f"clef_*_{stem}_metadata.csv")
    if file is None:
        return {}
    return {row["id"]: row["encounter_id"] for _, row in read_rows(file, ["id", "encounter_id"])}
