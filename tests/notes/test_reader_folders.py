"""Folders of files: text, BRAT with its gold, IOB with its gold. Spans always fit the text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinical_nlp.errors import InputError, MissingDataError, UsageError
from clinical_nlp.notes.readers import ReadOptions, read_notes, read_patients
from clinical_nlp.notes.readers.brat import read_spans
from clinical_nlp.notes.readers.iob import document, read_iob, read_iob_documents, token_spans
from clinical_nlp.notes.schema import SPAN_SCHEMA, Note, Rejected, Skipped


def read(source: Path, format: str, **options):
    return list(read_notes(source, format=format, options=ReadOptions(**options)))


# Text


def test_a_folder_of_texts(tmp_path):
    (tmp_path / "north").mkdir()
    (tmp_path / "north" / "b.v2.txt").write_bytes(b"No fever.\r\nPain.\x00")
    (tmp_path / "a.txt").write_bytes("é".encode("utf-16"))
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b" \n")
    (tmp_path / ".hidden.txt").write_text("x")
    (tmp_path / "image.png").write_text("x")
    wide, bad, empty, deep = read(tmp_path, "text")
    assert (wide.note_id, wide.patient_id, wide.institution, wide.text) == ("a", "a", "unknown", "é")
    assert isinstance(bad, Rejected)
    assert empty == Skipped("empty.txt", "empty-text", "empty", "empty")
    assert (deep.note_id, deep.source, deep.text) == ("north/b.v2", "north/b.v2.txt", "No fever.\r\nPain.\x00")
    assert read(tmp_path, "text", encoding="cp1252")[1].text == "café"
    assert read(tmp_path, "text", institution_from="folder", institution="H")[3].institution == "north"
    assert read(tmp_path, "text", institution_from="folder", institution="H")[0].institution == "H"
    (single,) = read(tmp_path / "a.txt", "text")
    assert single.source == "a.txt"
    with pytest.raises(UsageError, match="'folder'"):
        read(tmp_path, "text", institution_from="custodian")
    with pytest.raises(UsageError, match="encoding 'utf-9'"):
        read(tmp_path, "text", encoding="utf-9")


def test_a_table_says_whose_the_texts_are(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    (tmp_path / "notes.csv").write_text(
        "note_id,patient_id,institution,note_type,written_at,language\na,p,north,Progress,2020-01-02,en\nb.txt,p,south,,,de\n"
    )
    (tmp_path / "patients.csv").write_text("patient_id,sex\np,male\n")
    a, b, c = read(tmp_path, "text")
    assert (a.patient_id, a.institution, a.note_type, a.written_at.year) == ("p", "north", "Progress", 2020)
    assert b.rule == "language:de"
    assert c.reason == "no patient: notes.csv has no row with this note_id"
    assert next(read_patients(tmp_path, format="text")).sex == "male"


# BRAT


def brat(folder: Path, text: str, ann: str) -> Path:
    (folder / "doc.txt").write_bytes(text.encode())
    (folder / "doc.ann").write_bytes(ann.encode())
    return folder


def test_brat_spans(tmp_path):
    text = "😀 No fever.\nMetformin 500\nmg daily."
    brat(
        tmp_path,
        text,
        "T1\tFinding 5 10\tfever\n"
        "T2\tDose 22 25;26 28\t500 mg\n"
        "A1\tNegation T1\n"
        "N1\tReference T1 HPO:HP_0001945\tFever\n"
        "N2\tReference T2 ICD-10-CM:E11.9\tx\n"
        "R1\tDose-Drug Arg1:T2 Arg2:T1\n"
        "#1\tAnnotatorNotes T1\tsure\n"
        "*\tEquiv T1 T2\n",
    )
    gold = read_spans(tmp_path)
    assert gold.table.schema == SPAN_SCHEMA
    assert (gold.discontinuous, gold.rejected) == (1, ())
    fever, dose = gold.table.to_pylist()
    assert (fever["label"], fever["presence"], fever["hpo_id"]) == ("Finding", "absent", "HP:0001945")
    assert (dose["text"], dose["icd10cm_code"]) == ("500\nmg", "E11.9")
    (note,) = read(tmp_path, "brat")
    for span in (fever, dose):
        assert note.text[span["start"] : span["end"]] == span["text"]
        assert (span["note_id"], span["institution"]) == (note.note_id, note.institution)
    assert read_spans(tmp_path / "doc.ann").table == gold.table


def test_brat_lines_that_do_not_fit(tmp_path):
    brat(
        tmp_path,
        "No fever.",
        "T1\tFinding 3 8\tfever\nT2\tFinding 3 99\tfever\nT3\tFinding 4 8\tfever\n"
        "T4\tFinding x y\tfever\nT5\nT6\tF 8 3\tx\nA1\nfever was here\nT7 Finding 3 8 fever\n"
        "\n#1\tAnnotatorNotes T1\tfever\n*\tEquiv T1 T2\nR1\tOf Arg1:T1 Arg2:T2\nE1\tFinding:T1\n",
    )
    (tmp_path / "lone.ann").write_text("T1\tFinding 0 1\tx\n")
    gold = read_spans(tmp_path)
    assert gold.table.num_rows == 1
    assert sorted(item.source for item in gold.rejected) == [*(f"doc.ann:{line}" for line in range(2, 10)), "lone.ann"]
    assert not any("fever" in item.reason for item in gold.rejected)
    with pytest.raises(MissingDataError):
        read_spans(tmp_path / "nowhere")


@given(st.text("aé😀\r\n .", min_size=1, max_size=30), st.data())
def test_brat_offsets_are_code_points_of_the_unchanged_text(tmp_path_factory, text, data):
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    covered = text[start:end].replace("\r", " ").replace("\n", " ")
    folder = brat(tmp_path_factory.mktemp("brat"), text, f"T1\tX {start} {end}\t{covered}\n")
    (span,) = read_spans(folder).table.to_pylist()
    assert span["text"] == text[start:end]


# IOB


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("B-X I-X O", [(0, 2, "X")]),
        ("I-X I-X O", [(0, 2, "X")]),  # IOB1
        ("I-X B-X I-Y", [(0, 1, "X"), (1, 2, "X"), (2, 3, "Y")]),  # IOB1
        ("S-X B-X I-X E-X S-Y", [(0, 1, "X"), (1, 4, "X"), (4, 5, "Y")]),  # IOBES
        ("U-X B-X L-X I-X", [(0, 1, "X"), (1, 3, "X"), (3, 4, "X")]),  # BILOU
        ("O O", []),
        ("B-a-b I-a-b", [(0, 2, "a-b")]),
    ],
)
def test_iob_schemes(tags, spans):
    assert token_spans(tags.split()) == spans


def test_iob_documents_and_columns(tmp_path):
    path = tmp_path / "x.conll"
    path.write_text(
        "-DOCSTART- -X- O O\n\nNo\tDT\tO\nfever\tNN\tB-F\n\n\nHigh JJ B-F\nfever NN I-F\n\n-DOCSTART-\n\ncough\tO\n"
    )
    first, second = read_iob_documents(path)
    assert read_iob(path) == [*first, *second]
    text, spans = document(first)
    assert text == "No fever\nHigh fever"
    assert [text[start:end] for start, end, _ in spans] == ["fever", "High fever"]
    notes = read(path, "iob")
    assert [(note.note_id, note.text, note.source) for note in notes] == [
        ("x:1", text, "x.conll:3"),
        ("x:2", "cough", "x.conll:12"),
    ]


def test_iob_without_documents_reads_sentences_and_names_bad_lines(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes(b"fever\tB-F\r\n\r\nno tag\r\n\r\ncough\tQ-F\n\nok\tO\ncaf\xe9\tO\n\nlast\tO")
    records = read(path, "iob")
    assert [type(record).__name__ for record in records] == ["Note", "Rejected", "Rejected", "Rejected", "Note"]
    assert [record.source for record in records] == [f"x.tsv:{line}" for line in (1, 3, 5, 8, 10)]
    with pytest.raises(InputError, match=r"x\.tsv:3: "):
        read_iob(path)
    with pytest.raises(MissingDataError):
        read_iob(tmp_path / "none.tsv")


@given(st.lists(st.lists(st.tuples(st.text("abé😀", min_size=1), st.sampled_from("OBI")), min_size=1), min_size=1))
def test_iob_spans_fit_the_text(sentences):
    pairs = [([token for token, _ in s], [tag if tag == "O" else f"{tag}-X" for _, tag in s]) for s in sentences]
    text, spans = document(pairs)
    words = [" ".join(tokens[a:b]) for tokens, tags in pairs for a, b, _ in token_spans(tags)]
    assert [text[start:end] for start, end, _ in spans] == words


def test_folder_formats_give_notes(tmp_path):
    brat(tmp_path, "text", "")
    assert all(isinstance(record, Note) for record in read(tmp_path, "brat"))
    assert list(read_patients(tmp_path, format="brat")) == []
