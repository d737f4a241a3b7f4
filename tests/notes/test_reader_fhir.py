"""FHIR bulk export: every document is exactly one record, and its text is the text that was sent."""

from __future__ import annotations

import base64
import codecs
import gzip
import json
import random
import zlib
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clinical_nlp.errors import InputError, MissingDataError, UsageError
from clinical_nlp.notes.readers import ReadOptions, input_files, read_notes, read_patients
from clinical_nlp.notes.readers import files as reader_files
from clinical_nlp.notes.readers.documents import document_text
from clinical_nlp.notes.schema import Note, Rejected, Skipped

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def attached(text="no fever", content_type="text/plain", *, encoding="utf-8", **more):
    data = text if isinstance(text, bytes) else text.encode(encoding)
    return {"contentType": content_type, "data": base64.b64encode(data).decode(), **more}


def document(own="d1", *attachments, **more):
    content = [{"attachment": attachment} for attachment in attachments or (attached(),)]
    resource = {
        "resourceType": "DocumentReference",
        "id": own,
        "status": "current",
        "subject": {"reference": "Patient/p1"},
        "custodian": {"reference": "Organization/north"},
        "context": {"encounter": [{"reference": "Encounter/e1"}]},
        "content": content,
    }
    return {key: value for key, value in {**resource, **more}.items() if value is not None}


def report(own="r1", *attachments, **more):
    resource = {
        "resourceType": "DiagnosticReport",
        "id": own,
        "status": "final",
        "code": {"coding": [{"code": "18748-4"}]},
        "subject": {"reference": "Patient/p1"},
        "encounter": {"reference": "Encounter/e1"},
        "presentedForm": list(attachments or (attached("clear lungs"),)),
    }
    return {key: value for key, value in {**resource, **more}.items() if value is not None}


def write(folder: Path, name: str, *resources) -> Path:
    lines = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in resources]
    data = b"".join(line + b"\n" for line in lines)
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder


def read(folder: Path, **options):
    return list(read_notes(folder, format="fhir", options=ReadOptions(**options)))


def one(folder: Path, resource, **options):
    kind = resource["resourceType"]
    (record,) = read(write(folder, f"{kind}.000.ndjson", resource), **options)
    return record


def test_a_document_becomes_a_note(tmp_path):
    note = one(
        tmp_path,
        document(
            type={"coding": [{"code": "34117-2"}, {"display": "History and physical"}], "text": "H&P"},
            date="2020-05-06T10:00:00Z",
            context={"encounter": [{"reference": "Encounter/e9"}], "period": {"start": "2020-05-05T23:30:00-04:00"}},
            description="admission",
            docStatus="preliminary",
        ),
    )
    assert note == Note(
        note_id="DocumentReference/d1",
        patient_id="p1",
        institution="north",
        text="no fever",
        source="DocumentReference.000.ndjson:1",
        encounter_id="e9",
        note_type="History and physical",
        written_at=datetime(2020, 5, 6, 3, 30, tzinfo=UTC),
        title="admission",
        language="en",
        status="preliminary",
    )


def test_a_report_becomes_a_note(tmp_path):
    note = one(
        tmp_path,
        report(
            effectivePeriod={"start": "2019-02"},
            issued="2020-01-01T00:00:00Z",
            performer=[{"reference": "Practitioner/x"}, {"reference": "Organization/lab", "display": "Lab"}],
        ),
    )
    assert (note.note_id, note.institution, note.encounter_id) == ("DiagnosticReport/r1", "lab", "e1")
    assert (note.note_type, note.written_at) == ("18748-4", datetime(2019, 2, 1, tzinfo=UTC))


def test_a_panel_without_a_form_is_no_note(tmp_path):
    assert one(tmp_path, report(presentedForm=None)).rule == "no-presentedForm"


@FUZZ
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_text_survives_unchanged(tmp_path, text):
    """All of Unicode: astral characters, CR LF, NUL; so offsets need no care."""
    visible = "x" + text
    assert one(tmp_path, document("d1", attached(visible, "text/plain; charset=utf-8"))).text == visible


@pytest.mark.parametrize(
    ("data", "content_type", "text"),
    [
        ("é".encode("latin-1"), "text/plain; charset=iso-8859-1", "é"),
        (b"\x93quoted\x94", "text/plain;charset=ISO-8859-1", "“quoted”"),
        (b"\x81x", "text/plain;charset=latin-1", "\x81x"),
        (codecs.BOM_UTF8 + "é".encode(), "text/plain", "é"),
        (codecs.BOM_UTF16_LE + "é😀".encode("utf-16-le"), "text/plain", "é😀"),
        ("é😀".encode("utf-16"), "text/plain; charset=UTF-16", "é😀"),
        (codecs.BOM_UTF16_BE + "é".encode("utf-16-be"), "text/plain; charset=utf-8", "é"),
        ("é".encode("cp1252"), 'TEXT/PLAIN; charset="windows-1252"', "é"),
        (b"plain", None, "plain"),
        (b"{\\rtf1\\ansi No {\\b fever}\\par Mother\\'e9}", "application/rtf", "No fever\nMotheré"),
        (b"{\\rtf1\\ansi No fever}", "text/plain", "No fever"),
        (b"<html><body><p>No&nbsp;fever</p><p>a<br>b &lt;5</p><script>x</script></body></html>", "text/html", None),
    ],
)
def test_character_sets_and_kinds(tmp_path, data, content_type, text):
    note = one(tmp_path, document("d1", {"contentType": content_type, "data": base64.b64encode(data).decode()}))
    assert note.text == (text or "No fever\n\na\nb <5")


CDA = """<?xml version="1.0" encoding="{0}"?><ClinicalDocument xmlns="urn:hl7-org:v3"><title>T</title><component>
<structuredBody><component><section><title>Problems</title><text><table><tr><td>Fever</td><td>no</td></tr></table>
<paragraph>é</paragraph></text><entry><x>code</x></entry></section></component></structuredBody></component>
</ClinicalDocument>"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "iso-8859-1"])
def test_ccda_keeps_the_narrative(encoding):
    text, problem = document_text(CDA.format(encoding).encode(encoding), "application/hl7-cda+xml")
    assert (text, problem) == ("Problems\n\nFever\tno\n\né", None)


def test_ccda_that_wraps_a_text():
    inner = base64.b64encode(b"No fever.\r\n").decode()
    body = f'<nonXMLBody><text mediaType="text/plain" representation="B64">{inner}</text></nonXMLBody>'
    xml = f'<ClinicalDocument xmlns="urn:hl7-org:v3"><component>{body}</component></ClinicalDocument>'
    assert document_text(xml.encode(), "text/xml") == ("No fever.\r\n", None)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_xml_entities_are_refused_in_any_encoding(encoding):
    xml = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><a>&e;</a>'
    text, problem = document_text(xml.encode(encoding), "text/xml")
    assert text is None
    assert "refused" in problem


def test_deep_xml_and_html_do_not_break():
    deep = 20_000
    assert document_text(b"<a>" * deep + b"x" + b"</a>" * deep, "text/xml")[0] in ("x", None)
    assert document_text(b"<div>" * deep + b"x", "text/html")[0] == "x"


@FUZZ
@given(
    data=st.binary(max_size=200)
    | st.builds(lambda a, b: a + b, st.sampled_from([b"{\\rtf1", b"<a", b"<!["]), st.binary()),
    content_type=st.sampled_from(
        ["text/plain", "text/html", "text/rtf", "text/xml", "a/b", None, "text/x; charset=zip"]
    ),
)
def test_no_document_raises(data, content_type):
    text, problem = document_text(data, content_type)
    assert (text is None) == (problem is not None)
    if text is not None and content_type != "text/plain":
        text.encode("utf-8", "surrogatepass")


def test_the_best_kind_counts_and_parts_are_joined(tmp_path):
    html, plain, markdown = attached("<p>h</p>", "text/html"), attached("plain"), attached("*m*", "text/markdown")
    assert one(tmp_path, document("d1", html, markdown, plain)).text == "plain"
    assert one(tmp_path, document("d1", html, markdown)).text == "*m*"
    assert one(tmp_path, document("d1", html, plain, attached("plain"), attached("more"))).text == "plain\n\nmore"
    pdf = attached(b"%PDF-1.7", "application/pdf")
    assert one(tmp_path, document("d1", pdf, html)).text == "h"
    assert one(tmp_path, document("d1", pdf)).reason == "no readable attachment (application/pdf)"
    broken = {"contentType": "text/plain", "url": "Binary/none"}
    assert one(tmp_path, document("d1", broken, html)).text == "h"


def test_languages(tmp_path):
    german, english = attached("kein Fieber", language="de-AT"), attached("no fever", language="en-US")
    assert one(tmp_path, document("d1", german, english)).text == "no fever"
    assert one(tmp_path, document("d1", german)).rule == "language:de"
    assert one(tmp_path, document("d1", german), languages=("de",)).language == "de"
    assert one(tmp_path, document("d1", german), languages=()).language == "de"
    assert one(tmp_path, document(language="fr")).rule == "language:fr"
    assert one(tmp_path, document(), default_language="es").rule == "language:es"
    for options in ({"languages": ("en", "english")}, {"languages": ("",)}, {"default_language": "German"}):
        with pytest.raises(UsageError, match="is no language code"):
            read(tmp_path, **options)
    assert one(tmp_path, document("d1", german), languages=("DE_at",)).language == "de"
    with pytest.raises(UsageError, match="for the format table alone"):
        read(tmp_path, columns={"text": "body"})


def test_errors_and_replaced_documents_are_skipped(tmp_path):
    replaces = [{"code": "replaces", "target": {"reference": "DocumentReference/old"}}]
    write(
        tmp_path,
        "DocumentReference.ndjson",
        document("old", status="superseded"),
        document("alone", status="superseded"),
        document("wrong", status="entered-in-error"),
        document("draft", docStatus="entered-in-error"),
        document("new", relatesTo=replaces),
        document("kept"),
        document(
            "void",
            status="entered-in-error",
            relatesTo=[{"code": "replaces", "target": {"reference": "DocumentReference/kept"}}],
        ),
        document("named", identifier=[{"system": "s", "value": "7"}]),
        document("after", relatesTo=[{"code": "replaces", "target": {"identifier": {"system": "s", "value": "7"}}}]),
        document("itself", relatesTo=[{"code": "replaces", "target": {"reference": "DocumentReference/itself"}}]),
        document("extended", relatesTo=[{"code": "appends", "target": {"reference": "DocumentReference/kept"}}]),
    )
    records = {record.note_id.split("/")[1]: getattr(record, "rule", None) for record in read(tmp_path)}
    assert records == {
        "old": "replaced",
        "alone": None,
        "wrong": "entered-in-error",
        "draft": "entered-in-error",
        "new": None,
        "kept": None,
        "void": "entered-in-error",
        "named": "replaced",
        "after": None,
        "itself": None,
        "extended": None,
    }
    status = {record.note_id: record.status for record in read(tmp_path) if isinstance(record, Note)}
    assert status["DocumentReference/alone"] == "superseded"
    assert status["DocumentReference/kept"] is None


def test_one_text_in_two_resource_types_of_an_encounter_is_one_note(tmp_path):
    write(
        tmp_path, "1.DocumentReference.ndjson", document("d1", attached("clear lungs")), document("d2"), document("d3")
    )
    other = {"reference": "Encounter/e2"}
    write(
        tmp_path,
        "1.DiagnosticReport.ndjson",
        report("same", attached("clear  lungs\n")),
        report("elsewhere", encounter=other),
        report("nowhere", encounter=None),
        report("another", subject={"reference": "Patient/p2"}),
    )
    records = read(tmp_path)
    assert [record.note_id for record in records if isinstance(record, Skipped)] == ["DiagnosticReport/same"]
    assert sum(isinstance(record, Note) for record in records) == 6


def test_urls_are_resolved_offline(tmp_path):
    plain = [document(f"d{n}", {"contentType": "text/plain", "url": url}) for n, url in enumerate(URLS)]
    write(tmp_path, "DocumentReference.ndjson", *plain)
    binaries = [{"resourceType": "Binary", "id": f"b{n}", "data": attached(f"text {n}")["data"]} for n in range(4)]
    write(tmp_path, "Binary.0.ndjson", binaries[0], b"not json", binaries[1])
    write(tmp_path, "Binary.1.ndjson.gz", binaries[2], binaries[3])
    (tmp_path / "files" / "sub").mkdir(parents=True)
    (tmp_path / "files" / "sub" / "note 1.txt").write_text("from a file")
    (tmp_path / "files" / "b9.txt").write_text("by id")
    (tmp_path / "secret.txt").write_text("outside")
    texts = [getattr(record, "text", None) for record in read(tmp_path, attachments=tmp_path / "files")]
    assert texts == ["text 3", "text 0", "text 2", "text 1", "from a file", "by id", None, None, None]
    without = [getattr(record, "text", None) for record in read(tmp_path)]
    assert without == [*texts[:4], None, None, None, None, None]
    assert read(tmp_path)[-2].reason == (
        "attachment has only a url; Binary/b77 is not in the export and --attachments is not given"
    )


URLS = [
    "Binary/b3",
    "https://server/fhir/Binary/b0",
    "Binary/b2/_history/1",
    "Binary/b1",
    "https://server/files/sub/note%201.txt?token=x",
    "Binary/b9",
    "../secret.txt",
    "Binary/b77",
    "https://[broken",
]


def test_contained_binary(tmp_path):
    inner = {"resourceType": "Binary", "id": "x", "contentType": "text/plain", "data": attached("inside")["data"]}
    assert one(tmp_path, document("d1", {"url": "#x"}, contained=[inner])).text == "inside"


def test_logical_references_find_their_resource(tmp_path):
    write(
        tmp_path,
        "Patient.ndjson",
        {"resourceType": "Patient", "id": "p7", "identifier": [{"system": "mrn", "value": "7"}], "gender": "female"},
        {"resourceType": "Patient", "id": "p8", "identifier": [{"system": "mrn", "value": "8"}, {"value": "t"}]},
        {
            "resourceType": "Patient",
            "id": "p9",
            "identifier": [{"system": "mrn", "value": "8"}],
            "birthDate": "1950-02-03",
        },
        b"broken",
    )
    subjects = [
        {"reference": "Patient?identifier=mrn|7"},
        {"identifier": {"system": "mrn", "value": "7"}},
        {"reference": "https://x/fhir/Patient/p7/_history/2"},
        {"reference": "urn:uuid:p7"},
        {"reference": "#me"},
        {"reference": "Patient?identifier=mrn|8"},
        {"reference": "Patient?identifier=mrn|99"},
        {"reference": "Group/p7"},
        {"display": "Somebody"},
        None,
    ]
    me = [{"resourceType": "Patient", "id": "me", "identifier": [{"system": "mrn", "value": "7"}]}]
    write(
        tmp_path,
        "DocumentReference.ndjson",
        *(document(f"d{n}", subject=subject, contained=me) for n, subject in enumerate(subjects)),
    )
    records = read(tmp_path)
    assert [record.patient_id for record in records] == [*["p7"] * 5, "8", "99", None, None, None]
    assert all(isinstance(record, Rejected) for record in records[-3:])
    found = {patient.patient_id: patient for patient in read_patients(tmp_path, format="fhir")}
    assert found["p7"].sex == "female"
    assert str(found["p9"].birth_date) == "1950-02-03"


def test_institution_levels_are_never_mixed(tmp_path, capsys):
    write(
        tmp_path,
        "Encounter.ndjson",
        {"resourceType": "Encounter", "id": "e1", "serviceProvider": {"reference": "Organization/south"}},
    )
    write(
        tmp_path,
        "DocumentReference.ndjson",
        document("d1"),
        document("d2", custodian=None),
        document("d3", custodian={"display": "Eastern"}, context=None),
    )

    def institutions(**options):
        return [record.institution for record in read(tmp_path, **options)]

    assert institutions() == ["north", "unknown", "Eastern"]
    assert "1 notes name no institution" in capsys.readouterr().err
    assert institutions(institution_from="custodian", institution="H") == ["north", "H", "Eastern"]
    assert institutions(institution_from="serviceProvider") == ["south", "south", "unknown"]
    assert institutions(institution="H") == ["H", "H", "H"]
    with pytest.raises(UsageError, match="did you mean 'custodian'"):
        institutions(institution_from="custodain")


def test_bad_records_are_rejected_and_the_rest_is_read(tmp_path):
    deep = b"[" * 100_000
    write(
        tmp_path,
        "DocumentReference.ndjson",
        document("ok"),
        b'{"resourceType": "DocumentReference", "id": "cut',
        b"",
        b'{"resourceType": "DocumentReference", "description": "\xff"}',
        b"[1]",
        deep,
        {"resourceType": "Patient", "id": "p"},
        document(None),
        document("bad64", {"contentType": "text/plain", "data": "####"}),
        document("pad", {"contentType": "text/plain", "data": "YWI"}),
        document("num", {"contentType": "text/plain", "data": 3}),
        document("none", content=[]),
        document("nodata", {"contentType": "text/plain"}),
        document("latin", attached(b"\xe9t\xe9")),
        document("charset", attached("x", "text/plain; charset=klingon")),
        document("empty", attached("")),
        document("ok"),
        document("last"),
    )
    records = read(tmp_path)
    assert [(type(item).__name__, item.source.split(":")[1]) for item in records] == [
        *[("Note", "1"), ("Rejected", "2")],
        *[("Rejected", str(number)) for number in range(4, 16)],
        *[("Skipped", "16"), ("Rejected", "17"), ("Note", "18")],
    ]
    reasons = {item.source.split(":")[1]: item.reason for item in records if isinstance(item, Rejected)}
    assert reasons["2"] == "not valid JSON"
    assert reasons["9"] == reasons["10"] == "attachment data is not valid base64"
    assert reasons["14"] == "bytes are not valid utf-8; no character set is declared"
    assert reasons["17"] == "duplicate note_id in its institution; first seen at DocumentReference.ndjson:1"


def test_damaged_gzip_gives_its_good_part_and_one_rejected(tmp_path):
    dice = random.Random(0)
    whole = [document(f"d{n}", attached(dice.randbytes(900).hex())) for n in range(99)]
    name = "DocumentReference.ndjson.gz"
    data = (write(tmp_path, name, *whole) / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    records = read(tmp_path)
    good = zlib.decompressobj(31).decompress(data[: len(data) // 2]).count(b"\n")
    assert len(records) == good + 1 > 40
    assert [record.note_id for record in records[:-1]] == [f"DocumentReference/d{n}" for n in range(good)]
    assert records[-1] == Rejected(f"{name}:{good + 1}", "the gzip file is cut short; copy it again")
    (tmp_path / name).write_bytes(data[:-8] + b"\0" * 8)
    assert read(tmp_path)[-1].reason == "the gzip file is damaged; copy it again"
    (tmp_path / name).write_bytes(data + data)
    assert sum(isinstance(record, Rejected) for record in read(tmp_path)) == 99


def test_gzip_bomb_and_endless_line(tmp_path, monkeypatch):
    monkeypatch.setattr(reader_files, "MAX_RECORD_BYTES", 1 << 16)
    monkeypatch.setattr(reader_files, "RATIO_FREE_BYTES", 1 << 20)
    long = document("long", attached("a" * (1 << 17)))
    write(tmp_path, "DocumentReference.0.ndjson", document("a"), long, document("b"))
    (tmp_path / "DocumentReference.1.ndjson.gz").write_bytes(gzip.compress(b"\0" * (64 << 20)))
    records = read(tmp_path)
    assert [type(record).__name__ for record in records] == ["Note", "Rejected", "Note", "Rejected"]
    assert records[1].reason.startswith("line is longer than")
    assert "times its size" in records[3].reason


def test_files_are_found_by_name_or_by_content(tmp_path):
    write(
        tmp_path,
        "export-17.ndjson",
        {"resourceType": "Patient", "id": "p1"},
        document("mixed"),
        b"{broken",
        report("r"),
    )
    write(tmp_path, "Observation.000.ndjson", {"resourceType": "Observation", "id": "o"}, b"{broken")
    (tmp_path / "DocumentReference").mkdir()
    write(tmp_path, "DocumentReference/part-0.ndjson", document("part"))
    write(tmp_path, "2.DocumentReference.ndjson.gz", document("packed"))
    (tmp_path / "DocumentReference.utf16.ndjson").write_bytes(json.dumps(document("wide")).encode("utf-16"))
    records = read(tmp_path)
    assert sorted(str(record.note_id).split("/")[-1] for record in records) == [
        "None",
        "mixed",
        "packed",
        "part",
        "r",
        "wide",
    ]
    assert [path.name for path in input_files(tmp_path, "fhir")] == [
        "2.DocumentReference.ndjson.gz",
        "part-0.ndjson",
        "DocumentReference.utf16.ndjson",
        "export-17.ndjson",
    ]
    (alone,) = read(tmp_path / "2.DocumentReference.ndjson.gz")
    assert alone.source == "2.DocumentReference.ndjson.gz:1"
    assert next(read_patients(tmp_path, format="fhir")).patient_id == "p1"


def test_nothing_and_nowhere(tmp_path):
    with pytest.raises(InputError, match="holds no notes"):
        read(tmp_path)
    write(tmp_path, "Patient.ndjson", {"resourceType": "Patient", "id": "p1"})
    with pytest.raises(InputError, match="holds no notes"):
        read(tmp_path)
    with pytest.raises(MissingDataError, match="no such file or folder"):
        read_notes(tmp_path / "nowhere", format="fhir")
    with pytest.raises(MissingDataError, match="attachments folder"):
        read(tmp_path, attachments=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="did you mean 'fhir'"):
        read_notes(tmp_path, format="fihr")
    (tmp_path / "DocumentReference.ndjson.gz").write_bytes(b"not gzip")
    with pytest.raises(InputError, match="is not gzip"):
        read(tmp_path)


def test_patient_map(tmp_path):
    write(
        tmp_path,
        "DocumentReference.ndjson",
        document("d1"),
        document("d2", custodian={"reference": "Organization/s"}),
        b"{",
    )
    mapping = tmp_path / "map.csv"
    mapping.write_text("patient_id,shared_patient_id,institution\np1,everywhere,\np1,south,s\n")
    assert [record.patient_id for record in read(tmp_path, patient_map=mapping)] == ["everywhere", "south", None]
    mapping.write_text("patient_id,shared_patient_id\np1,a\np1,b\n")
    with pytest.raises(InputError, match="mapped twice"):
        read(tmp_path, patient_map=mapping)
    mapping.write_text("Patient_ID,shared_patient\n")
    with pytest.raises(UsageError, match="no column 'shared_patient_id'; did you mean 'shared_patient'"):
        read(tmp_path, patient_map=mapping)
    mapping.write_text("PATIENT_ID,Shared_Patient_ID\n")
    assert [record.patient_id for record in read(tmp_path, patient_map=mapping)] == ["p1", "p1", None]


def test_the_index_leaves_nothing_behind(tmp_path):
    scratch = tmp_path / "scratch"
    write(tmp_path, "DocumentReference.ndjson", document("d1"), document("d2"))
    write(tmp_path, "Binary.ndjson.gz", {"resourceType": "Binary", "id": "b", "data": "YQ=="})
    records = read_notes(tmp_path, format="fhir", options=ReadOptions(scratch=scratch))
    next(records)
    records.close()
    assert list(scratch.iterdir()) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def damaged(draw):
    """A good resource with any of its values replaced by any JSON."""
    resource = draw(st.sampled_from([document(), report()]))
    resource = json.loads(json.dumps(resource))
    for _ in range(draw(st.integers(0, 3))):
        at = resource
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], (dict, list)) and draw(st.booleans()):
                at = at[key]
            else:
                at[key] = draw(JSON)
                break
    return json.dumps(resource).encode()


@FUZZ
@given(
    lines=st.lists(
        damaged() | st.binary(max_size=60).map(lambda data: data.replace(b"\n", b"").replace(b"\r", b"")), max_size=6
    )
)
def test_no_line_raises_and_none_is_lost(tmp_path, lines):
    present = [number for number, line in enumerate(lines, start=1) if line.strip(b" \t")]
    (tmp_path / "DocumentReference.ndjson").write_bytes(b"".join(line + b"\n" for line in lines))
    if lines and lines[0].startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF8, b"\x1f\x8b")):
        return
    if not present:
        with pytest.raises(InputError, match="holds no notes"):
            read(tmp_path)
        return
    records = read(tmp_path)
    assert [int(record.source.split(":")[1]) for record in records] == present
    for record in records:
        if isinstance(record, Note):
            record.text.encode("utf-8")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("piece", ["<a ", "<!--", "<a b='", "<![CDATA[", "</"])
def test_unclosed_tags_take_no_time(piece):
    """html.parser alone needs minutes for this."""
    text, problem = document_text((piece * 40_000).encode(), "text/html")
    assert text is None
    assert "unclosed" in problem
