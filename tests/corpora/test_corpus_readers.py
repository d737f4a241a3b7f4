"""The corpora that go through the readers: MIMIC-IV-Note, n2c2 and a hospital's own export."""

from __future__ import annotations

import csv
import gzip
import io
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow.compute as pc
import pytest

from clinical_nlp.config import SplitConfig
from clinical_nlp.errors import ClinicalNlpError, InputError, MissingDataError, UsageError
from clinical_nlp.notes.corpus import load_corpus
from clinical_nlp.notes.schema import CODE_SCHEMA, NOTE_SCHEMA, PATIENT_SCHEMA, SPAN_SCHEMA
from clinical_nlp.notes.splitting import split_patients

MARKER = "Zebra-Quagga-77"


def write_gz(file: Path, *rows: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = io.StringIO(newline="")
    csv.writer(lines).writerows(rows)
    file.write_bytes(gzip.compress(lines.getvalue().encode()))


def mimic_folder(folder: Path, *, patients: bool = True, codes: bool = True) -> None:
    header = ["note_id", "subject_id", "hadm_id", "note_type", "note_seq", "charttime", "storetime", "text"]
    write_gz(
        folder / "note/discharge.csv.gz",
        header,
        [
            "1-DS-1",
            "1",
            "100",
            "DS",
            "1",
            "2180-05-07 00:00:00",
            "2180-05-09 15:26:00",
            "Name: ___\n\nChief, complaint",
        ],
        ["1-DS-2", "1", "101", "DS", "2", "2184-02-29 00:00:00", "", "second ___"],
        ["2-DS-1", "2", "200", "DS", "1", "2110-03-01 00:00:00", "", "other"],
    )
    write_gz(
        folder / "note/radiology.csv.gz",
        header,
        ["1-RR-1", "1", "", "RR", "1", "2180-05-06 23:00:00", "2180-05-06 23:30:00", "CHEST ___"],
    )
    if patients:
        write_gz(
            folder / "hosp/patients.csv.gz",
            ["subject_id", "gender", "anchor_age", "anchor_year", "anchor_year_group", "dod"],
            ["1", "F", "52", "2180", "2014 - 2016", "2184-03-01"],
            ["2", "M", "60", "2110", "2008 - 2010", ""],
        )
    if codes:
        write_gz(
            folder / "hosp/diagnoses_icd.csv.gz",
            ["subject_id", "hadm_id", "seq_num", "icd_code", "icd_version"],
            ["1", "100", "1", "5723", "9"],
            ["1", "100", "2", "E8497", "9"],
            ["1", "101", "1", "I5021", "10"],
            ["1", "101", "2", "I10", "10"],
            ["1", "101", "3", "I10", "10"],
            ["2", "999", "1", "I10", "10"],
            ["2", "200", "1", MARKER, "10"],
            ["2", "200", "1", "I10", "11"],
            ["2", "200"],
        )
        write_gz(
            folder / "hosp/procedures_icd.csv.gz",
            ["subject_id", "hadm_id", "seq_num", "chartdate", "icd_code", "icd_version"],
            ["1", "100", "1", "2180-05-06", "0010", "9"],
            ["2", "200", "1", "2110-03-01", "0DJ08ZZ", "10"],
        )


def test_mimic_notes_codes_and_dates(tmp_path, capsys):
    mimic_folder(tmp_path)
    corpus = load_corpus("mimic_iv_note", tmp_path)
    assert corpus.notes.schema == NOTE_SCHEMA
    assert corpus.notes["note_id"].to_pylist() == ["1-DS-1", "1-DS-2", "2-DS-1", "1-RR-1"]
    assert set(corpus.notes["institution"].to_pylist()) == {"BIDMC"}
    assert corpus.notes["text"].to_pylist()[0] == "Name: ___\n\nChief, complaint"
    assert corpus.notes["encounter_id"].to_pylist() == ["100", "101", "200", None]
    # Moved by whole years into the anchor year group, give or take a day; exact within a patient.
    written = corpus.notes["written_at"].to_pylist()
    for when, expected in zip(written, ["2014-05-07", "2018-02-28", "2008-03-01", "2014-05-06"], strict=True):
        assert abs(when - datetime.fromisoformat(f"{expected}T12:00+00:00")) < timedelta(days=2)
    assert written[0] - written[3] == timedelta(hours=1)
    assert corpus.codes.schema == CODE_SCHEMA
    codes = [(row["encounter_id"], row["system"], row["code"]) for row in corpus.codes.to_pylist()]
    assert codes == [
        ("100", "ICD-9-CM", "572.3"),
        ("100", "ICD-9-CM", "E849.7"),
        ("101", "ICD-10-CM", "I50.21"),
        ("101", "ICD-10-CM", "I10"),
        ("100", "ICD-9-CM", "00.10"),
        ("200", "ICD-10-PCS", "0DJ08ZZ"),
    ]
    assert corpus.patients.schema == PATIENT_SCHEMA
    assert [day and day.year for day in corpus.patients["death_date"].to_pylist()] == [2018, None]
    said = corpus.card.size + capsys.readouterr().err
    assert "1 rejected (row of diagnoses_icd.csv.gz without a patient, an admission or a valid code)" in said
    assert "1 rejected (row of diagnoses_icd.csv.gz whose icd_version is not 9 or 10)" in said
    assert "1 skipped (code of an admission that has no note here)" in said
    assert "1 rejected (diagnoses_icd.csv.gz: 2 columns" in said
    assert MARKER not in said
    split = split_patients(corpus.notes, SplitConfig(name="time", after="2012-01-01", development=0), seed=0)
    assert split.test.tolist() == [0, 1, 3]


def test_mimic_without_patients_keeps_the_released_dates_and_says_so(tmp_path):
    mimic_folder(tmp_path, patients=False, codes=False)
    corpus = load_corpus("mimic_iv_note", tmp_path, tables="radiology")
    assert corpus.notes["note_id"].to_pylist() == ["1-RR-1"]
    assert corpus.notes["written_at"].to_pylist()[0].year == 2180
    assert "dates as released" in corpus.card.size
    assert "3 skipped (table discharge was not asked for)" in corpus.card.size
    assert corpus.codes is None
    assert corpus.patients is None


def test_mimic_bad_note_rows_are_counted_not_lost(tmp_path):
    mimic_folder(tmp_path)
    file = tmp_path / "note/discharge.csv.gz"
    lines = gzip.decompress(file.read_bytes()) + f"3-DS-1,3,300\r\n4-DS-1,,400,DS,1,,,{MARKER}\r\n".encode()
    file.write_bytes(gzip.compress(lines))
    corpus = load_corpus("mimic_iv_note", tmp_path, tables=["discharge"])
    assert len(corpus.notes) == 3
    assert corpus.card.size.count("rejected") >= 2
    assert MARKER not in corpus.card.size


def test_mimic_options(tmp_path):
    mimic_folder(tmp_path)
    with pytest.raises(UsageError, match="did you mean 'radiology'"):
        load_corpus("mimic_iv_note", tmp_path, tables="radiolgy")
    (tmp_path / "note/radiology.csv.gz").unlink()
    with pytest.raises(MissingDataError, match=r"radiology\.csv\.gz; apply at"):
        load_corpus("mimic_iv_note", tmp_path, tables="radiology")


def brat(folder: Path, name: str, text: str, ann: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(text, "utf-8")
    (folder / f"{name}.ann").write_text(ann, "utf-8")


def test_n2c2_parts_and_spans(tmp_path):
    text = "Given é aspirin 81 mg\ndaily."
    brat(
        tmp_path / "training_20180910",
        "100035",
        text,
        "T1\tDrug 8 15\taspirin\nT2\tStrength 16 18;19 21\t81 mg\nR1\tStrength-Drug Arg1:T2 Arg2:T1\n",
    )
    brat(tmp_path / "gold-standard-test-data/test", "200001", "No drug.", "")
    corpus = load_corpus("n2c2", tmp_path)
    assert corpus.notes.schema == NOTE_SCHEMA
    assert corpus.spans.schema == SPAN_SCHEMA
    assert corpus.parts == {("BIDMC", "100035"): "train", ("BIDMC", "200001"): "test"}
    spans = [(row["note_id"], row["start"], row["end"], row["text"], row["label"]) for row in corpus.spans.to_pylist()]
    assert spans == [("100035", 8, 15, "aspirin", "Drug"), ("100035", 16, 21, "81 mg", "Strength")]
    assert corpus.notes["patient_id"].to_pylist() == ["100035", "200001"]
    assert "1 of several fragments" in corpus.card.size


def test_n2c2_counts_lines_that_do_not_fit_and_refuses_unmarked_texts(tmp_path):
    brat(tmp_path / "training_20180910", "1", f"Given {MARKER}.", f"T1\tDrug 0 900\t{MARKER}\nT2\tDrug 0 5\tGiven\n")
    corpus = load_corpus("n2c2", tmp_path)
    assert len(corpus.spans) == 1
    assert "left out: 1 rejected" in corpus.card.size
    assert MARKER not in corpus.card.size
    (tmp_path / "training_20180910/2.txt").write_text("unmarked")
    with pytest.raises(InputError, match=r"1 texts have no \.ann"):
        load_corpus("n2c2", tmp_path)


def test_n2c2_reads_a_plain_folder_and_refuses_a_document_in_two_parts(tmp_path):
    brat(tmp_path / "mine", "1", "Given drug.", "T1\tDrug 6 10\tdrug\n")
    corpus = load_corpus("n2c2", tmp_path / "mine")
    assert corpus.parts == {}
    assert len(corpus.spans) == 1
    brat(tmp_path / "both/training_1", "1", "a", "")
    brat(tmp_path / "both/gold-standard", "1", "a", "")
    with pytest.raises(InputError, match="twice"):
        load_corpus("n2c2", tmp_path / "both")


def test_a_corpus_of_which_nothing_can_be_read_is_an_error(tmp_path):
    brat(tmp_path / "training_1", "1", "", "")
    (tmp_path / "training_1/1.txt").write_bytes(b"\xff\xff" + MARKER.encode())
    with pytest.raises(InputError, match="no document that can be read; left out: 1 rejected") as caught:
        load_corpus("n2c2", tmp_path)
    assert MARKER not in str(caught.value)
    mimic_folder(tmp_path)
    write_gz(tmp_path / "note/radiology.csv.gz", ["note_id", "subject_id", "text"], ["", "", MARKER])
    with pytest.raises(InputError, match="no note that can be read; left out: 3 skipped") as caught:
        load_corpus("mimic_iv_note", tmp_path, tables="radiology")
    assert MARKER not in str(caught.value)


def export(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "notes.csv"
    file.write_text(
        "id,person,ward,body,language\n"
        f"1,p1,North,{MARKER} one,en\n2,p1,South,two,en\n3,p2,North,drei,de\n4,,North,{MARKER},en\n",
        "utf-8",
    )
    return file


COLUMNS = {"note_id": "id", "patient_id": "person", "text": "body"}


def test_ehr_export_is_a_corpus_without_gold(tmp_path):
    file = export(tmp_path)
    corpus = load_corpus("ehr_export", file, format="table", columns=COLUMNS, institution_from="ward")
    assert corpus.notes.schema == NOTE_SCHEMA
    assert corpus.notes["institution"].to_pylist() == ["North", "South"]
    assert corpus.spans is corpus.codes is corpus.pairs is None
    assert corpus.parts == {}
    assert "1 skipped (language:de)" in corpus.card.size
    assert "1 rejected (" in corpus.card.size
    assert MARKER not in corpus.card.size
    assert "ward" in corpus.card.institution_means
    both = load_corpus("ehr_export", file, format="table", columns=COLUMNS, institution="X", languages="en, de")
    assert len(both.notes) == 3
    assert pc.unique(both.notes["institution"]).to_pylist() == ["X"]


def test_ehr_export_errors(tmp_path):
    file = export(tmp_path)
    with pytest.raises(UsageError, match="did you mean 'table'"):
        load_corpus("ehr_export", file, format="tabel")
    with pytest.raises(UsageError, match="did you mean 'languages'"):
        load_corpus("ehr_export", file, format="table", language="en")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClinicalNlpError):
        load_corpus("ehr_export", tmp_path / "empty", format="text")
    with pytest.raises(InputError, match="no table note that can be read; left out: 2 skipped") as caught:
        load_corpus("ehr_export", file, format="table", columns=COLUMNS, institution="X", languages="fr")
    assert MARKER not in str(caught.value)


def coded_export(folder: Path, codes: str) -> dict[str, object]:
    notes = folder / "notes.csv"
    notes.write_text(
        "note_id,patient_id,institution,encounter_id,text\n"
        "n1,p1,North,e1,Fever.\nn2,p1,North,e1,Cough.\nn3,p2,South,e1,Pain.\nn4,p3,South,e2,Rash.\n",
        "utf-8",
    )
    (folder / "codes.csv").write_text(codes, "utf-8")
    return {"path": notes, "format": "table", "codes": str(folder / "codes.csv")}


def test_ehr_export_takes_a_table_of_codes(tmp_path, capsys):
    rows = (
        "encounter_id,note_id,institution,code,system\n"
        "e1,,North,R50.9,\ne1,,North,R50.9,\n,n4,,R21,ICD-10-CM\ne9,,,I10,\ne2,,South,0DJD8ZZ,ICD-10-PCS\n"
    )
    corpus = load_corpus("ehr_export", **coded_export(tmp_path, rows))
    assert corpus.codes.schema == CODE_SCHEMA
    found = [(row["patient_id"], row["encounter_id"], row["note_id"], row["code"], row["system"])
             for row in corpus.codes.to_pylist()]  # fmt: skip
    assert found == [
        ("p1", "e1", None, "R50.9", "ICD-10-CM"),
        ("p3", None, "n4", "R21", "ICD-10-CM"),
        ("p3", "e2", None, "0DJD8ZZ", "ICD-10-PCS"),
    ]
    assert "1 skipped (code of what the export does not hold)" in corpus.card.size


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("encounter_id,icd\ne2,I10\n", "has no column code"),
        ("encounter_id,code\ne2,\n", "codes.csv, line 2: no code"),
        ("code\nI10\n", "codes.csv, line 2: no code, or neither note_id nor encounter_id"),
        ("encounter_id,code\ne1,I10\n", "line 2: its id is there at 2 institutions; add a column institution"),
    ],
)
def test_a_bad_table_of_codes_is_one_error(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        load_corpus("ehr_export", **coded_export(tmp_path, rows))
    with pytest.raises(MissingDataError, match="does not exist"):
        load_corpus("ehr_export", **{**coded_export(tmp_path, rows), "codes": str(tmp_path / "none.csv")})
