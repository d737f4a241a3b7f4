"""Note text is in no reason, no exception, no line on standard error, and in no file that stays behind."""

from __future__ import annotations

import base64
import gzip
import json
import traceback
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clinical_nlp.errors import ClinicalNlpError
from clinical_nlp.notes.readers import FORMATS, ReadOptions, read_notes, read_patients
from clinical_nlp.notes.readers.brat import read_spans
from clinical_nlp.notes.readers.iob import read_iob
from clinical_nlp.notes.schema import Note, Rejected, Skipped

MARKER = "ZEBRAFISH"


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def fhir(**more) -> bytes:
    base = {"resourceType": "DocumentReference", "id": "d", "subject": {"reference": "Patient/p"}}
    return json.dumps({**base, **more}).encode()


def attachment(data: bytes, content_type: object = "text/plain") -> bytes:
    return fhir(content=[{"attachment": {"contentType": content_type, "data": encoded(data)}}])


M = MARKER.encode()
DOCUMENTS = [
    b'{"resourceType": "DocumentReference", "text": "' + M,
    b'"' + M + b'"',
    M + b"\xff\xfe",
    fhir(subject=None, description=MARKER),
    fhir(content=[{"attachment": {"data": MARKER + "#"}}]),
    fhir(content=[{"attachment": {"url": f"https://host/{MARKER} {MARKER}?q={MARKER}"}}]),
    fhir(content=[{"attachment": {"url": f"data:text/plain,{MARKER}"}}]),
    fhir(content=[{"attachment": {"data": encoded(M), "contentType": f"{MARKER} is not a type"}}]),
    fhir(content=[{"attachment": {"data": encoded(M), "contentType": f"text/plain; charset={MARKER}"}}]),
    attachment(M + b"\xff"),
    attachment(M + b"\xe9", "text/plain; charset=ascii"),
    attachment(b"<a>" + M, "text/xml"),
    attachment(b"<!DOCTYPE a [<!ENTITY e '" + M + b"'>]><a>&e;</a>", "text/xml"),
    attachment(M, "application/rtf"),
    attachment(b"{\\rtf1\\ansicpg99999\\'zz" + M + b"\\u99999999999", "application/rtf"),
    attachment(b"<ClinicalDocument>" + M + b"</ClinicalDocument>", "text/xml"),
    attachment(b"%PDF " + M, "application/pdf"),
    fhir(language="de", content=[{"attachment": {"data": encoded(M)}}]),
    fhir(date=MARKER, status="entered-in-error"),
]
HEADER = "note_id,patient_id,institution,text,written_at\n"
ROWS = f'1,p,i,"{MARKER}"x,\n2,p,{MARKER}\n3,,i,{MARKER},\n4,p,i,{MARKER}\udce9,\n5,p,i,"{MARKER}\n'
OMOP = "note_id,person_id,note_text,note_date\n"


def sources(folder: Path) -> list[tuple[str, Path, dict]]:
    found: list[tuple[str, Path, dict]] = []

    def add(format: str, name: str, data: bytes, **options) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        found.append((format, path, options))

    add("fhir", "all/DocumentReference.ndjson", b"\n".join(DOCUMENTS))
    for number, line in enumerate(DOCUMENTS):
        add("fhir", f"one/{number}.ndjson", line)
    packed = gzip.compress((MARKER * 99).encode() + b"\n" + DOCUMENTS[9])
    add("fhir", "cut/DocumentReference.ndjson.gz", packed[:-12])
    add("fhir", "wide/DocumentReference.ndjson", b"\xff\xfe" + MARKER.encode("utf-16-le") + b"\x00\xd8\n\x00\n\x00")
    add("table", "n.csv", (HEADER + ROWS).encode("utf-8", "surrogateescape"))
    add("table", "header.csv", f'"{MARKER}"x,b\n1,2\n'.encode())
    add("table", "n.jsonl", f'{{"note_id": "1", "text": "{MARKER}\n["{MARKER}"]\n{{"text": 1}}\n'.encode())
    add("table", "p.parquet", b"PAR1" + MARKER.encode() * 9 + b"PAR1")
    add("omop", "NOTE.csv", (OMOP + f'1,,{MARKER},\n2,3,"{MARKER}"x,\n').encode())
    for format, name in (("table", "bare.csv"), ("omop", "bare_note.csv"), ("mimic", "noteevents.csv")):
        add(format, name, f"{MARKER},p,{MARKER} text,x\n".encode())
        add(format, name, f"{MARKER},p,{MARKER} text,x\n".encode(), institution_from="ward")
    add("omop", "x.duckdb", MARKER.encode() * 1000)
    add("mimic", "discharge.csv", f'note_id,subject_id,text\n1,,{MARKER}\n1,2,"{MARKER}"x\n'.encode())
    clarity = f"NOTE_ID,PAT_ID,LINE,NOTE_TEXT\n1,,1,{MARKER}\n2,p,x,{MARKER}\n3,p,1,{MARKER}\n3,p,1,other\n"
    add("table", "HNO_NOTE_TEXT.csv", clarity.encode(), institution="H")
    add("text", "t/a.txt", MARKER.encode() + b"\xff")
    add("brat", "b/a.txt", MARKER.encode() + b"\xff")
    add("iob", "i/a.tsv", f"{MARKER}\n\n{MARKER}\t{MARKER}\n\n{MARKER}\xe9\tO\n".encode("latin-1"))
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(bytes([0, 0, 0, 0, 10, 0, 0, 0])), pa.py_buffer(M + b"\xff"))
    strings = {name: ["1"] for name in ("note_id", "patient_id", "institution")}
    pq.write_table(pa.table({**strings, "text": bad}), folder / "bad.parquet")
    found.append(("table", folder / "bad.parquet", {}))
    return found


def test_no_bad_record_tells_its_text(tmp_path, capsys, caplog, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    scratch = tmp_path / "scratch"
    told: list[str] = []
    rejected = 0
    for format, path, options in sources(tmp_path / "in"):
        try:
            for record in read_notes(path, format=format, options=ReadOptions(scratch=scratch, **options)):
                assert not isinstance(record, Note), (format, path)
                rejected += isinstance(record, Rejected)
                told.append(record.reason if isinstance(record, Rejected) else record.rule)
                told.append(repr(record))
        except ClinicalNlpError as error:
            rejected += 1
            told.append("".join(traceback.format_exception(error)))
    assert rejected > 40
    told += capsys.readouterr()
    told.append(caplog.text)
    assert not [text for text in told if MARKER in text]
    assert list(scratch.iterdir()) == []
    assert list((tmp_path / "temporary").iterdir()) == []


def test_no_gold_or_demographics_reader_tells_its_text(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(f"x {MARKER}")
    (tmp_path / "a.ann").write_text(f"T1\tX 0 1\t{MARKER}\nT2\t{MARKER}\nA1\t{MARKER}\n")
    told = [repr(item) for item in read_spans(tmp_path).rejected]
    assert len(told) == 3
    (tmp_path / "a.tsv").write_text(f"{MARKER}\t{MARKER}\n")
    with pytest.raises(ClinicalNlpError) as error:
        read_iob(tmp_path / "a.tsv")
    told.append(str(error.value))
    (tmp_path / "Patient.ndjson").write_text(f'{{"name": "{MARKER}\n{{"id": 3}}\n')
    (tmp_path / "patients.csv").write_text(f"patient_id,sex\n,{MARKER}\n")
    for format in FORMATS:
        list(read_patients(tmp_path, format=format))
    assert not [text for text in (*told, *capsys.readouterr()) if MARKER in text]


def test_nothing_stays_when_reading_is_killed(tmp_path):
    """Half way through, no file in the scratch folder has a name, so SIGKILL leaves nothing."""
    clarity = "NOTE_ID,PAT_ID,LINE,NOTE_TEXT\n" + "".join(f"{n},p,1,{MARKER}\n" for n in range(50))
    (tmp_path / "HNO_NOTE_TEXT.csv").write_text(clarity)
    scratch = tmp_path / "scratch"
    options = ReadOptions(institution="H", scratch=scratch)
    records = read_notes(tmp_path / "HNO_NOTE_TEXT.csv", format="table", options=options)
    assert isinstance(next(records), Note | Skipped)
    assert list(scratch.iterdir()) == []
    records.close()
