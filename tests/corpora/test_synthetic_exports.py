"""The exports of the synthetic hospitals, read back by the package's own readers; the gold still fits."""

import base64
import json

import pyarrow.parquet as pq
import pytest

from clinical_nlp.corpora.synthetic_hospitals import (
    exported_note_ids,
    load,
    write_fhir,
    write_gold,
    write_omop,
    write_table,
)
from clinical_nlp.corpora.synthetic_hospitals.__main__ import main
from clinical_nlp.errors import UsageError
from clinical_nlp.notes.readers import read_notes, read_patients
from clinical_nlp.notes.schema import Note


@pytest.fixture(scope="module")
def corpus():
    return load(institutions=2, patients=8)


def write(corpus, target, how):
    if how == "fhir":
        write_fhir(corpus, target)
    elif how == "table":
        target = target / "notes.csv"
        write_table(corpus, target)
    elif how in ("parquet", "jsonl"):
        target = target / f"notes.{how}"
        write_table(corpus, target)
    else:
        write_omop(corpus, target, parquet=how == "omop-parquet")
    return target


@pytest.mark.parametrize("how", ["fhir", "omop", "omop-parquet", "table", "parquet", "jsonl"])
def test_every_note_comes_back_unchanged_and_its_gold_fits(corpus, tmp_path, how):
    source = write(corpus, tmp_path / "export", how)
    kind = how.partition("-")[0] if how.startswith(("fhir", "omop")) else "table"
    write_gold(corpus, tmp_path / "gold", format=kind)
    found = list(read_notes(source, format=kind))
    assert all(isinstance(record, Note) for record in found)
    ids = exported_note_ids(corpus, format=kind)
    read = {(note.institution, note.note_id): note for note in found}
    assert len(read) == corpus.notes.num_rows
    for row in corpus.notes.to_pylist():
        note = read[row["institution"], ids[row["institution"], row["note_id"]]]
        assert note.text == row["text"]
        assert note.written_at == row["written_at"]
    spans = pq.read_table(tmp_path / "gold" / "spans.parquet").to_pylist()
    assert len(spans) == corpus.spans.num_rows
    for span in spans:
        assert read[span["institution"], span["note_id"]].text[span["start"] : span["end"]] == span["text"]
    people = {note.patient_id for note in found}
    assert {row["patient_id"] for row in pq.read_table(tmp_path / "gold" / "codes.parquet").to_pylist()} == people


@pytest.mark.parametrize("kind", ["fhir", "omop"])
def test_patients_come_back(corpus, tmp_path, kind):
    source = write(corpus, tmp_path / "export", kind)
    found = sorted((str(one.sex), one.birth_date) for one in read_patients(source, format=kind))
    assert found == sorted((row["sex"], row["birth_date"]) for row in corpus.patients.to_pylist())


def test_fhir_holds_what_a_server_would_send(corpus, tmp_path):
    write_fhir(corpus, tmp_path / "export")
    resources = {}
    for path in (tmp_path / "export").iterdir():
        for line in path.read_text().splitlines():
            resource = json.loads(line)
            assert path.name.startswith(resource["resourceType"])
            resources[f"{resource['resourceType']}/{resource['id']}"] = resource
    for resource in resources.values():
        if resource["resourceType"] in ("DocumentReference", "DiagnosticReport"):
            report = resource["resourceType"] == "DiagnosticReport"
            attachment = resource["presentedForm"][0] if report else resource["content"][0]["attachment"]
            assert len(base64.b64decode(attachment["data"])) == attachment["size"]
            encounter = resource["encounter"] if report else resource["context"]["encounter"][0]
            organization = resource["performer"][0] if report else resource["custodian"]
            for reference in (resource["subject"], encounter, organization):
                assert reference["reference"] in resources


def test_exports_are_deterministic(corpus, tmp_path):
    for how in ("fhir", "omop", "table"):
        one, two = (write(corpus, tmp_path / f"{how}{place}", how) for place in range(2))
        pairs = [(one, two)] if one.is_file() else [(path, two / path.name) for path in sorted(one.iterdir())]
        assert all(a.read_bytes() == b.read_bytes() for a, b in pairs)


def test_nothing_is_written_over(corpus, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.txt").write_text("old")
    for writer in (write_fhir, write_omop):
        with pytest.raises(UsageError, match="not an empty folder"):
            writer(corpus, tmp_path / "full")
    with pytest.raises(UsageError, match="exists already"):
        write_table(corpus, tmp_path / "full" / "old.txt")
    with pytest.raises(UsageError, match=r"\.csv, \.parquet or \.jsonl"):
        write_table(corpus, tmp_path / "notes.xls")
    with pytest.raises(UsageError, match="format"):
        exported_note_ids(corpus, format="hl7")


def test_command_line(tmp_path, capsys):
    target = tmp_path / "export"
    common = ["--institutions", "2", "--patients", "3", "--seed", "5", "--output"]
    assert main(["--format", "fhir", *common, str(target), "--gold", str(tmp_path / "gold")]) == 0
    assert "notes of 6 patients from 2 institutions" in capsys.readouterr().out
    assert (tmp_path / "gold" / "facts.parquet").exists()
    assert main(["--format", "omop", *common, str(target)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["--covariate", "7", *common, str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()
