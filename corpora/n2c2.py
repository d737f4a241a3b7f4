"""n2c2 2018 track 2: discharge summaries with medication and adverse drug event mentions, in BRAT form."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa

from clinical_nlp.corpora._files import collect, listed, loaded, missing
from clinical_nlp.errors import InputError
from clinical_nlp.notes.corpus import Card, Corpus, corpus_path
from clinical_nlp.notes.readers import ReadOptions, read_notes
from clinical_nlp.notes.readers.brat import read_spans
from clinical_nlp.notes.readers.patient_map import PATIENT_MAP

CARD = Card(
    name="n2c2",
    origin="n2c2 2018 shared task, track 2 (adverse drug events and medication extraction), from MIMIC-III",
    licence="n2c2 data use agreement: no redistribution",
    citation="Henry S et al. 2018 n2c2 shared task on adverse drug events and medication extraction in electronic "
    "health records. J Am Med Inform Assoc 2020;27:3-12.",
    size="505 discharge summaries: train 303, test 202.",
    institution_means="one constant, BIDMC: all notes are from Beth Israel Deaconess Medical Center",
    patient_means="the document; the release names no patient, so two summaries of one patient are not known as such",
    obtain="apply at https://portal.dbmi.hms.harvard.edu and give the folder that holds training_20180910 and "
    "gold-standard-test-data",
    folder="n2c2",
    contains_phi=True,
)
_PARTS = (("train", "training_*"), ("test", "gold-standard*"))


def load(path: Path | None = None) -> Corpus:
    """Read `training_20180910/` and `gold-standard-test-data/`, BRAT files at any depth below; a part may be missing.

    Another folder of BRAT files (one's own annotations in the same form) is read whole, without official parts; its
    `patient_map.csv`, where there is one, says whose documents they are.
    A span of several fragments becomes one, from its first start to its last end; annotation lines that do not fit
    their text are left out. Both are counted on the card.

    Returns
    -------
    Corpus with notes, spans (labels Drug, Strength, Form, Dosage, Frequency, Route, Duration, Reason, ADE) and parts.
    """
    root = corpus_path(CARD, path)
    folders = [(part, folder) for part, pattern in _PARTS for folder in sorted(root.glob(pattern)) if folder.is_dir()]
    folders = [(part, folder) for part, folder in folders or [("", root)] if any(folder.rglob("*.ann"))]
    if not folders:
        raise missing(CARD, root, "BRAT files (DOCUMENT.txt beside DOCUMENT.ann)")
    options = ReadOptions(institution="BIDMC")
    notes: list[pa.Table] = []
    spans: list[pa.Table] = []
    parts: dict[tuple[str, str], str] = {}
    left_out: Counter[str] = Counter()
    several = 0
    for part, folder in folders:
        table, without = collect(read_notes(folder, format="brat", options=options))
        if bare := sum(not (folder / f"{note_id}.ann").is_file() for note_id in table["note_id"].to_pylist()):
            raise InputError(
                f"{folder}: {bare} texts have no .ann file beside them; without one nothing is known of them"
            )
        found = read_spans(folder, options)
        left_out += without
        left_out.update(f"rejected ({item.reason})" for item in found.rejected)
        several += found.discontinuous
        mapped = (folder / PATIENT_MAP).is_file()
        table = _by_file_name(table, "note_id", *(() if mapped else ("patient_id",)))
        names = table["note_id"].to_pylist()
        if len(set(names)) != len(names) or any(("BIDMC", name) in parts for name in names):
            raise InputError(f"{folder}: a document is there twice; name the folder that holds each one once")
        notes.append(table)
        spans.append(_by_file_name(found.table, "note_id"))
        if part:
            parts.update({("BIDMC", name): part for name in names})
    every = pa.concat_tables(notes)
    if not len(every):
        raise InputError(f"{root} holds no document that can be read{listed(left_out)}")
    gold = pa.concat_tables(spans)
    counts = f"{len(every)} documents, {len(gold)} spans ({several} of several fragments){listed(left_out)}"
    return Corpus(notes=every, card=loaded(CARD, counts), spans=gold, parts=parts)


def _by_file_name(table: pa.Table, *columns: str) -> pa.Table:
    """Name documents by their file alone: a part may hold them one folder deeper (gold-standard-test-data/test)."""
    for column in columns:
        index = table.schema.get_field_index(column)
        names = pa.array([name.rpartition("/")[2] for name in table[column].to_pylist()], pa.string())
        table = table.set_column(index, table.schema.field(index), names)
    return table
