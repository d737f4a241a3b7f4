"""CodiEsp: clinical case reports from Spanish journals with ICD-10 codes, in their English machine translation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa

from clinical_nlp.corpora._files import loaded, missing, read_text
from clinical_nlp.errors import InputError, MissingDataError
from clinical_nlp.notes.corpus import Card, Corpus, corpus_path
from clinical_nlp.notes.schema import CODE_SCHEMA, Note, notes_table

CARD = Card(
    name="codiesp",
    origin="https://zenodo.org/records/3837305 (SciELO case reports, coded by professional coders)",
    licence="CC BY 4.0",
    citation="Miranda-Escalada A et al. Overview of automatic clinical coding: annotations, guidelines, and solutions "
    "for non-English clinical cases at CodiEsp track of CLEF eHealth 2020.",
    size="1,000 cases: train 500, development 250, test 250. Codes are CIE-10-ES, the Spanish edition of ICD-10-CM "
    "and ICD-10-PCS; many procedure codes stop after four characters. The spans in *X.tsv point into the Spanish text "
    "and are not read.",
    institution_means="ISSN of the journal that published the case (a source, not a hospital)",
    patient_means="the case report; two cases of one article are two patients (15 articles have one in train and "
    "one in development)",
    obtain="download codiesp.zip from https://zenodo.org/records/3837305 and give its folder "
    "final_dataset_v4_to_publish",
    folder="codiesp",
)
_DOCUMENT = re.compile(r"S(\d{4}-\d{3}[\dX])\d{13}-\d+")
_FOLDERS = (("train", "train"), ("development", "dev"), ("test", "test"))


def load(path: Path | None = None) -> Corpus:
    """Read `{train,dev,test}/text_files_en/*.txt` with `{train,dev,test}{D,P}.tsv`; a part may be missing.

    Returns
    -------
    Corpus with notes, and codes (`*D.tsv` as ICD-10-CM, `*P.tsv` as ICD-10-PCS, upper case).

    Raises
    ------
    MissingDataError : no part is there, or a part has texts and no code tables.
    InputError : a malformed row, a code of a document that is not there, or a file name that is not a document id.
    """
    root = corpus_path(CARD, path)
    if (root / "final_dataset_v4_to_publish").is_dir():
        root = root / "final_dataset_v4_to_publish"
    notes: list[Note] = []
    codes: list[dict[str, Any]] = []
    parts: dict[tuple[str, str], str] = {}
    repeated = 0
    for part, folder in _FOLDERS:
        files = sorted((root / folder / "text_files_en").glob("*.txt"))
        if not files and any((root / folder / f"{folder}{letter}.tsv").is_file() for letter in "DP"):
            raise MissingDataError(
                f"corpus {CARD.name!r}: {root / folder} has code tables and no text_files_en; {CARD.obtain}"
            )
        journals: dict[str, str] = {}
        for file in files:
            match = _DOCUMENT.fullmatch(file.stem)
            if match is None:
                raise InputError(f"{file} is not named by a document id such as S0004-06142005000500011-1")
            note = Note(
                note_id=file.stem,
                patient_id=file.stem,
                institution=match[1],
                text=read_text(file),
                source=f"{folder}/text_files_en/{file.name}",
                encounter_id=file.stem,
                note_type="case report",
            )
            if (note.institution, note.note_id) in parts:
                raise InputError(f"document {file.stem} is in two parts of {root}; get a fresh copy")
            notes.append(note)
            journals[file.stem] = match[1]
            parts[match[1], file.stem] = part
        for letter, system in (("D", "ICD-10-CM"), ("P", "ICD-10-PCS")) if files else ():
            rows, twice = _codes(root / folder / f"{folder}{letter}.tsv", system, journals)
            codes += rows
            repeated += twice
    if not notes:
        raise missing(CARD, root, "{train,dev,test}/text_files_en/*.txt")
    counts = f"{len(notes)} cases, {len(codes)} codes"
    if repeated:
        counts += f"; left out: {repeated} repeated code rows"
    return Corpus(
        notes=notes_table(notes),
        card=loaded(CARD, counts),
        codes=pa.Table.from_pylist(codes, schema=CODE_SCHEMA),
        parts=parts,
    )


def _codes(file: Path, system: str, journals: dict[str, str]) -> tuple[list[dict[str, Any]], int]:
    if not file.is_file():
        raise MissingDataError(f"corpus {CARD.name!r}: {file} is missing beside its texts; {CARD.obtain}")
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    lines = [line for line in enumerate(read_text(file).splitlines(), 1) if line[1].strip()]
    for line, content in lines:
        fields = content.split("\t")
        if len(fields) != 2 or not all(field.strip() for field in fields):
            raise InputError(f"{file}, line {line}: expected a document id and a code, separated by a tab")
        document, code = fields[0].strip(), fields[1].strip().upper()
        if document not in journals:
            raise InputError(f"{file}, line {line}: its document has no text in text_files_en; get a fresh copy")
        rows.setdefault(
            (document, code),
            {
                "institution": journals[document],
                "patient_id": document,
                "encounter_id": document,
                "note_id": document,
                "code": code,
                "system": system,
            },
        )
    return list(rows.values()), len(lines) - len(rows)
