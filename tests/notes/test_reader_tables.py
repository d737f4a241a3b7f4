"""Tables, Clarity, OMOP and MIMIC: rows become notes; bad ones are rejected with their place, the rest is read."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from datetime import UTC, date, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clinical_nlp.errors import InputError, UsageError
from clinical_nlp.notes.readers import ReadOptions, expected_records, input_files, read_notes, read_patients
from clinical_nlp.notes.readers import rows as reader_rows
from clinical_nlp.notes.readers.dates import parse_date, parse_time
from clinical_nlp.notes.schema import Note, Rejected, Skipped

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HEADER = "note_id,patient_id,institution,text\n"


def read(source: Path, format="table", **options):
    return list(read_notes(source, format=format, options=ReadOptions(**options)))


def csv_of(rows, **dialect):
    out = io.StringIO()
    csv.writer(out, **dialect).writerows(rows)
    return out.getvalue()


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_any_delimiter_quoted_breaks_and_long_fields(tmp_path, delimiter):
    text = 'line, one;\r\n"quoted"\ttab|\n\n' + "long " * 60_000
    rows = [["Note_ID", "PATIENT_ID", "institution", "text"], ["1", "p", "i", text], ["2", "q", "i", "x\0y"]]
    (tmp_path / "n.csv").write_bytes(("\ufeff" + csv_of(rows, delimiter=delimiter)).encode())
    assert [(note.note_id, note.text) for note in read(tmp_path)] == [("1", text), ("2", "x\0y")]


@FUZZ
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5))
def test_text_survives_csv_json_lines_and_parquet(tmp_path, texts):
    rows = [{"note_id": str(n), "patient_id": "p", "institution": "i", "text": "x" + t} for n, t in enumerate(texts)]
    (tmp_path / "n.csv").write_bytes(csv_of([list(rows[0]), *map(dict.values, rows)]).encode())
    (tmp_path / "n.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "n.parquet")
    for name in ("n.csv", "n.jsonl", "n.parquet"):
        assert [note.text for note in read(tmp_path / name)] == [row["text"] for row in rows]


def test_bad_rows_are_rejected_and_the_rest_is_read(tmp_path):
    table = (
        HEADER
        + '1,p,i,ok\n2,p,i\n3,p,i,a,b\n4,p,i,"un"doubled\n5,,i,x\n6,p,i,caf\xe9\n,p,i,x\n7,p,,x\n\n1,p,i,again\n'
        + "8,p,i,\n"
        + '1,p,j,elsewhere\n9,p,i,last\n10,p,i,"never closed\n'
    )
    (tmp_path / "n.csv").write_bytes(table.encode("latin-1"))
    records = read(tmp_path)
    assert [(type(record).__name__, int(record.source.split(":")[1])) for record in records] == [
        ("Note", 2),
        *[("Rejected", line) for line in range(3, 10)],
        ("Rejected", 11),
        ("Skipped", 12),
        ("Note", 13),
        ("Note", 14),
        ("Rejected", 15),
    ]
    reasons = {int(item.source.split(":")[1]): item.reason for item in records if isinstance(item, Rejected)}
    assert reasons[3] == "3 columns where the header has 4"
    assert reasons[6] == "no patient_id"
    assert "--encoding" in reasons[7]
    assert reasons[9] == "no institution"
    assert reasons[11].endswith("first seen at n.csv:2")
    assert read(tmp_path, encoding="latin-1")[5].text == "caf\xe9"


def test_a_stray_quote_never_joins_two_notes(tmp_path):
    (tmp_path / "n.csv").write_text(HEADER + '1,p,i,"open\n2,q,i,"closed"\n3,r,i,"x"\n')
    notes = {note.note_id: note.text for note in read(tmp_path) if isinstance(note, Note)}
    assert notes == {"3": "x"}


def test_json_lines(tmp_path):
    good = {"note_id": 1, "patient_id": 2.0, "institution": "i", "text": "a"}
    lines = [json.dumps(good), "{", "[]", json.dumps({**good, "text": None}), json.dumps({**good, "text": 5})]
    lines.append(json.dumps({**good, "note_id": 3, "text": "\ud83d"}))
    (tmp_path / "n.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    note, *rejected = read(tmp_path)
    assert (note.note_id, note.patient_id) == ("1", "2")
    assert [item.reason.split(",")[0] for item in rejected] == [
        "not valid JSON",
        "not a JSON object",
        "no text",
        "the text column does not hold text",
        "holds lone surrogates",
    ]


def test_parquet_types_and_broken_values(tmp_path):
    bad = pa.StringArray.from_buffers(
        2, pa.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0])), pa.py_buffer(b"ok\xff\xfe")
    )
    table = pa.table(
        {
            "note_id": pa.array([1.0, 2.0]),
            "patient_id": pa.array([b"p", b"q"]),
            "institution": ["i", "i"],
            "text": bad,
            "written_at": pa.array([1, 2**62], pa.timestamp("ns", "UTC")),
        }
    )
    pq.write_table(table, tmp_path / "n.parquet")
    first, second = read(tmp_path)
    assert (first.note_id, first.patient_id, first.text) == ("1", "p", "ok")
    assert first.written_at == datetime(1970, 1, 1, tzinfo=UTC)
    assert second.source == "n.parquet:row 2"
    assert "UTF-8" in second.reason


def test_a_broken_file_costs_only_itself(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 rubbish")
    with pytest.raises(InputError, match=r"a\.parquet: is not a readable Parquet file"):
        read(tmp_path)
    (tmp_path / "b.csv").write_text(HEADER + "1,p,i,x\n")
    (tmp_path / "c.csv").write_text("something,else\n1,2\n")
    (tmp_path / "d.csv").write_text("")
    records = {record.source: type(record).__name__ for record in read(tmp_path)}
    assert records == {"c.csv": "Rejected", "a.parquet": "Rejected", "b.csv:2": "Note"}
    data = gzip.compress((HEADER + "".join(f"{n},p,i,{random.Random(n).random()}\n" for n in range(5000))).encode())
    (tmp_path / "b.csv").write_bytes(data[:-5000])
    *notes, last = [record for record in read(tmp_path) if record.source.startswith("b.csv")]
    assert len(notes) > 1000
    assert all(isinstance(note, Note) for note in notes)
    assert last.reason == "the gzip file is cut short; copy it again"


def test_missing_columns_are_named_with_the_nearest(tmp_path):
    (tmp_path / "n.csv").write_text("note_id,patient,institution,body\n1,p,i,x\n")
    with pytest.raises(UsageError) as error:
        read(tmp_path)
    assert "no column 'patient_id'; did you mean 'patient'?" in str(error.value)
    assert "no column 'text'" in str(error.value)
    with pytest.raises(UsageError, match=r"columns\.txet is not known; did you mean 'text'"):
        read(tmp_path, columns={"txet": "body"})
    with pytest.raises(UsageError, match=r"'bdoy' \(for text\); did you mean 'body'"):
        read(tmp_path, columns={"text": "bdoy", "patient_id": "patient"})
    (note,) = read(tmp_path, columns={"text": "body", "patient_id": "PATIENT"})
    assert note.text == "x"


def test_institution_of_a_table(tmp_path):
    (tmp_path / "n.csv").write_text("note_id,patient_id,text,ward\n1,p,x,A\n2,p,y,\n")
    with pytest.raises(UsageError, match="--institution"):
        read(tmp_path)
    assert [note.institution for note in read(tmp_path, institution="H")] == ["H", "H"]
    assert [note.institution for note in read(tmp_path, institution_from="ward")] == ["A", "unknown"]
    assert [note.institution for note in read(tmp_path, institution_from="ward", institution="H")] == ["A", "H"]


def test_demographics_beside_a_table(tmp_path):
    (tmp_path / "n.csv").write_text(HEADER + "1,p,i,x\n")
    (tmp_path / "patients.csv").write_text(
        "patient_id,sex,birth_date,death_date\np,F,1950-02-03,\np,M,,\nq,?,1950,2020-01-01\n"
    )
    (p, q) = read_patients(tmp_path, format="table")
    assert (p.patient_id, p.sex, p.birth_date) == ("p", "female", date(1950, 2, 3))
    assert (q.sex, q.birth_date, q.death_date) == (None, None, date(2020, 1, 1))
    assert len(read(tmp_path)) == 1


def test_endless_csv_line(tmp_path, monkeypatch):
    monkeypatch.setattr(reader_rows, "MAX_RECORD_BYTES", 1 << 16)
    monkeypatch.setattr(reader_rows.csv, "field_size_limit", lambda *_: 0)
    (tmp_path / "n.csv").write_text(HEADER + "1,p,i,x\n2,p,i," + "y" * (1 << 17) + "\n3,p,i,z\n")
    assert [type(record).__name__ for record in read(tmp_path)] == ["Note", "Rejected", "Note"]


@FUZZ
@given(st.binary(max_size=300))
def test_rubbish_never_raises_anything_else(tmp_path, data):
    for name, format in (("n.csv", "table"), ("n.jsonl", "table"), ("n.parquet", "table"), ("NOTE.csv", "omop")):
        (tmp_path / name).write_bytes(HEADER.encode() + data if name == "n.csv" else data)
        try:
            for record in read(tmp_path / name, format):
                assert record.source.startswith(name)
        except (InputError, UsageError):
            pass
        (tmp_path / name).unlink()


# Notes in several rows


def test_clarity_rows_are_joined_in_order(tmp_path):
    dice = random.Random(0)
    expected: dict[str, str] = {}
    rows = []
    for note in range(200):
        parts = [f"part {part} of {note}\n" if part % 2 else f"part {part}" for part in range(dice.randint(1, 6))]
        expected[str(note)] = "".join(part if part.endswith("\n") else part + "\n" for part in parts).removesuffix("\n")
        expected[str(note)] += "\n" if parts[-1].endswith("\n") else ""
        rows += [[str(note), str(note + 500), line, part] for line, part in enumerate(parts, start=1)]
    dice.shuffle(rows)
    header = ["NOTE_ID", "NOTE_CSN_ID", "LINE", "NOTE_TEXT"]
    (tmp_path / "HNO_NOTE_TEXT.1.csv").write_text(csv_of([header, *rows[:300]]), newline="")
    (tmp_path / "HNO_NOTE_TEXT.2.csv").write_text(csv_of([header, *rows[300:]]), newline="")
    info = [[str(note), f"P{note % 7}", f"E{note}", "Progress", "2020-01-02 03:04:05", "N"] for note in range(200)]
    columns = ["NOTE_ID", "PAT_ID", "PAT_ENC_CSN_ID", "NOTE_TYPE", "CREATE_INSTANT_DTTM", "LOC_ID"]
    (tmp_path / "HNO_INFO.csv").write_text(csv_of([columns, *info]), newline="")
    notes = read(tmp_path, institution_from="LOC_ID", scratch=tmp_path / "scratch")
    assert {note.note_id: note.text for note in notes} == expected
    assert [note.note_id for note in notes] == sorted(expected)
    assert notes[0].institution == "N"
    assert (notes[1].patient_id, notes[1].note_type) == ("P1", "Progress")
    assert list((tmp_path / "scratch").iterdir()) == []
    with pytest.raises(UsageError, match="name no institution"):
        read(tmp_path)
    with pytest.raises(UsageError, match="did you mean 'loc_id'"):
        read(tmp_path, institution_from="LOC")


def test_versions_gaps_and_contradictions(tmp_path):
    rows = [
        *[["1", "9", 1, "old"], ["1", "10", 1, "new"], ["1", "10", 2, ""], ["1", "10", 3, "end"]],
        *[["2", "1", 1, "a"], ["2", "1", 3, "c"], ["3", "1", 1, "a"], ["3", "1", 1, "b"]],
        *[["4", "1", 1, "same"], ["4", "1", 1, "same"], ["5", "1", "x", "no line"]],
    ]
    header = ["NOTE_ID", "NOTE_CSN_ID", "LINE", "NOTE_TEXT"]
    (tmp_path / "HNO_NOTE_TEXT.csv").write_text(csv_of([header, *rows]))
    records = read(tmp_path / "HNO_NOTE_TEXT.csv", institution="H", patient_map=None)
    assert [type(record).__name__ for record in records] == ["Rejected", "Skipped", *["Rejected"] * 4]  # no patients
    (tmp_path / "HNO_INFO.csv").write_text("NOTE_ID,PAT_ID\n" + "".join(f"{n},P\n" for n in range(1, 6)))
    bad, earlier, new, gap, twice, same = read(tmp_path, institution="H")
    assert bad == Rejected("HNO_NOTE_TEXT.csv:12", "the line number is no number", "5")
    assert earlier == Skipped("HNO_NOTE_TEXT.csv:2", "earlier-version", "1")
    assert (new.text, new.status) == ("new\n\nend", None)
    assert (gap.text, gap.status) == ("a\nc", "incomplete")
    assert "line 1 of the note is there twice" in twice.reason
    assert same.text == "same"


def test_any_table_can_be_split_into_lines(tmp_path):
    (tmp_path / "n.csv").write_text("note_id,patient_id,institution,text,seq\n1,p,i,b,2\n2,p,i,x,1\n1,p,i,a,1\n")
    notes = read(tmp_path, columns={"line": "seq"}, line_separator=" ")
    assert [(note.note_id, note.text) for note in notes] == [("1", "a b"), ("2", "x")]


# OMOP


@pytest.fixture
def omop(tmp_path):
    folder = tmp_path / "cdm"
    folder.mkdir()
    (folder / "NOTE.csv").write_text(
        "note_id,person_id,note_date,note_datetime,note_title,note_text,language_concept_id,visit_occurrence_id,"
        "note_class_concept_id\n"
        '1,10,2020-01-02,2020-01-02 03:04:05,Title,"a\nb",4180186,5,7\n'
        "2,11,2020-01-02,,,two,99,6,0\n3,11,2020-01-02,,,three,0,,\n4,,2020-01-02,,,four,0,5,\n5,12,2020-01-02,,,five,98,8,\n"
    )
    (folder / "visit_occurrence.csv").write_text("visit_occurrence_id,care_site_id\n5,100\n6,101\n8,102\n")
    (folder / "care_site.csv").write_text(
        "care_site_id,care_site_name,care_site_source_value\n100,Main,M\n101,Branch,M\n102,Clinic,\n"
    )
    (folder / "concept.csv").write_text(
        "concept_id,concept_name\n7,Discharge summary\n99,Spanish language\n98,Klingon\n"
    )
    (folder / "person.csv").write_text(
        "person_id,gender_concept_id,year_of_birth,month_of_birth,day_of_birth\n10,8507,1950,2,3\n11,8532,1960,,\n"
    )
    (folder / "death.csv").write_text("person_id,death_date\n11,2021-01-01\n")
    return folder


def check_omop(records):
    one, two, three, four, five = records
    assert (one.note_id, one.patient_id, one.encounter_id, one.title, one.text) == ("1", "10", "5", "Title", "a\nb")
    assert (one.institution, one.note_type) == ("M (100)", "Discharge summary")
    assert one.written_at == datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert two.rule == "language:es"
    assert (three.institution, three.encounter_id, three.written_at) == (
        "unknown",
        None,
        datetime(2020, 1, 2, tzinfo=UTC),
    )
    assert four.reason == "no patient_id"
    assert five.rule == "language:concept:98"


def test_omop_csv(omop):
    check_omop(read(omop, "omop"))
    ten, eleven = read_patients(omop, format="omop")
    assert (ten.sex, ten.birth_date, ten.death_date) == ("male", date(1950, 2, 3), None)
    assert (eleven.sex, eleven.birth_date, eleven.death_date) == ("female", None, date(2021, 1, 1))
    assert len(input_files(omop, "omop")) == 6
    spanish = read(omop, "omop", languages=("es",))[1]
    assert (spanish.institution, spanish.language) == ("M (101)", "es")
    assert {note.institution for note in read(omop, "omop", institution="H") if isinstance(note, Note)} == {"H"}
    with pytest.raises(UsageError, match="did you mean 'note_title'"):
        read(omop, "omop", institution_from="note_titel")
    (omop / "NOTE.csv").write_text("note_id,person,note_text\n1,2,x\n")
    with pytest.raises(UsageError, match="no column 'person_id'; did you mean 'person'"):
        read(omop, "omop")


def test_omop_parquet_and_duckdb_say_the_same(omop, tmp_path):
    import duckdb

    parquet = tmp_path / "parquet"
    parquet.mkdir()
    with duckdb.connect(str(tmp_path / "cdm.duckdb")) as connection:
        for path in omop.iterdir():
            name = path.stem.upper()
            connection.execute(f"CREATE TABLE {name} AS SELECT * FROM read_csv('{path}')")
            (parquet / path.stem.lower()).mkdir()
            connection.execute(f"COPY {name} TO '{parquet / path.stem.lower() / 'part-0.parquet'}' (FORMAT parquet)")
    check_omop(read(parquet, "omop"))
    check_omop(read(tmp_path / "cdm.duckdb", "omop"))
    assert list(read_patients(tmp_path / "cdm.duckdb", format="omop")) == list(read_patients(omop, format="omop"))
    (tmp_path / "bad.duckdb").write_bytes(b"rubbish" * 1000)
    with pytest.raises(InputError, match="is not a readable DuckDB file"):
        read(tmp_path / "bad.duckdb", "omop")


# MIMIC


def test_mimic_iv(tmp_path, capsys):
    header = "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text\n"
    rows = '10-DS-1,10,,DS,1,2180-05-01 00:00:00,,"Name: ___\nX"\n10-DS-2,10,5,AD,2,2180-05-11 00:00:00,,Y\n'
    (tmp_path / "discharge.csv.gz").write_bytes(gzip.compress((header + rows).encode()))
    (tmp_path / "radiology.csv").write_text(header + "11-RR-1,11,,RR,1,2150-01-01 00:00:00,,Z\n")
    (tmp_path / "discharge_detail.csv").write_text(
        "note_id,subject_id,field_name,field_value,field_ordinal\n1,1,a,b,1\n"
    )
    first, second, third = read(tmp_path, "mimic")
    assert (first.institution, first.note_type, first.text) == ("BIDMC", "Discharge summary", "Name: ___\nX")
    assert first.written_at == datetime(2180, 5, 1, tzinfo=UTC)
    assert "3 notes keep MIMIC's shifted times" in capsys.readouterr().err
    (tmp_path / "patients.csv").write_text(
        "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod\n10,F,50,2180,2014 - 2016,2181-01-01\n"
    )
    first, second, third = read(tmp_path, "mimic")
    assert first.written_at.year == 2014
    assert (second.written_at - first.written_at).days == 10
    assert third.written_at.year == 2150
    assert second.encounter_id == "5"
    (patient,) = read_patients(tmp_path, format="mimic")
    assert (patient.sex, patient.death_date.year) == ("female", 2015)


def test_mimic_iii(tmp_path):
    header = "ROW_ID,SUBJECT_ID,HADM_ID,CHARTDATE,CHARTTIME,STORETIME,CATEGORY,DESCRIPTION,CGID,ISERROR,TEXT\n"
    rows = '1,2,3,2151-08-04,,,"Discharge summary","Report",,,"No fever.\n"\n2,2,3,2151-08-05,,,Nursing,,,1,wrong\n'
    (tmp_path / "NOTEEVENTS.csv").write_text(header + rows)
    note, wrong = read(tmp_path, "mimic")
    assert (note.note_id, note.encounter_id, note.note_type, note.title) == ("1", "3", "Discharge summary", "Report")
    assert note.written_at == datetime(2151, 8, 4, tzinfo=UTC)
    assert wrong.rule == "entered-in-error"


# Dates


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2015", datetime(2015, 1, 1)),
        ("2015-03", datetime(2015, 3, 1)),
        ("2015-03-02", datetime(2015, 3, 2)),
        ("2015-03-02T10:11", datetime(2015, 3, 2, 10, 11)),
        ("2015-03-02T10:11:12.1234567Z", datetime(2015, 3, 2, 10, 11, 12, 123456)),
        ("2015-03-02T10:11:12-05:00", datetime(2015, 3, 2, 15, 11, 12)),
        ("2015-03-02 10:11:12+02", datetime(2015, 3, 2, 8, 11, 12)),
        ("2015-03-02 10:11:12 UTC", datetime(2015, 3, 2, 10, 11, 12)),
        ("20150302", datetime(2015, 3, 2)),
        ("20150302101112+0100", datetime(2015, 3, 2, 9, 11, 12)),
        ("2015-02-30", None),
        ("02/03/2015", None),
        ("0001-01-01T00:00:00+14:00", None),
        ("yesterday", None),
        (5, None),
        ("٢٠١٥", None),
    ],
)
def test_times(value, expected):
    assert parse_time(value) == (None if expected is None else expected.replace(tzinfo=UTC))


def test_a_date_is_not_moved_by_its_zone():
    assert parse_date("1950-02-03T23:30:00-05:00") == date(1950, 2, 3)
    assert parse_date("1950-02") is None


@FUZZ
@given(st.text(max_size=30) | st.datetimes().map(str) | st.datetimes().map(lambda value: value.isoformat() + "+23:59"))
def test_no_date_raises(value):
    found = parse_time(value)
    assert found is None or found.tzinfo is UTC
    parse_date(value)


def test_a_table_in_parquet_tells_how_many_records_to_expect(tmp_path):
    rows = {"note_id": ["1", "2"], "patient_id": ["a", "b"], "institution": ["h", "h"], "text": ["x", "y"]}
    pq.write_table(pa.table(rows), tmp_path / "one.parquet")
    pq.write_table(pa.table({**rows, "note_id": ["3", "4"]}), tmp_path / "two.parquet")
    pq.write_table(pa.table({"patient_id": ["a"]}), tmp_path / "patients.parquet")
    assert expected_records(tmp_path, "table") == 4 == len(list(read_notes(tmp_path, format="table")))
    (tmp_path / "two.parquet").write_bytes(b"no parquet")
    assert expected_records(tmp_path, "table") is None
    (tmp_path / "three.csv").write_text("note_id,patient_id,institution,text\n")
    assert expected_records(tmp_path, "table") is None
