"""The evidence page marks what stands at the offsets, escapes everything, and loads nothing."""

import html
import re

import pytest

from clinical_nlp.errors import MissingDataError, RunError
from clinical_nlp.extraction import extract
from clinical_nlp.reporting.evidence_page import write_evidence

HOSTILE = "<script>alert('x')</script> & \"{label}\" <img src=x onerror=alert(1)>"
NOTES = {
    "n1": f"{HOSTILE}\r\nNo fever\x00. Cough.\rשלום fever אבד 😀 e\u0301 possible seizure",
    "n2": "Mother had fever. Seizure. Seizure.",
    "n3": "Nothing to report.",
    "n4": "Cough.",
}
OBO = """format-version: 1.2
data-version: hp/releases/2025-01-16
"""
TERMS = {"HP:0000118": "Phenotypic abnormality", "HP:0001250": "Seizure", "HP:0001945": "Fever", "HP:0012735": "Cough"}


@pytest.fixture
def output(tmp_path):
    export = tmp_path / "export"
    export.mkdir()
    for name, text in NOTES.items():
        (export / f"{name}.txt").write_bytes(text.encode())
    (export / "notes.csv").write_text(
        "note_id,patient_id,institution,written_at\n"
        "n1,<b>,A&B,2020-01-01\nn2,<b>,A&B,2020-01-02\nn3,<b>,A&B,\nn4,<b>,C,\n"
    )
    terms = [
        f"\n[Term]\nid: {id_}\nname: {name}\n" + ("is_a: HP:0000118\n" if id_ != "HP:0000118" else "")
        for id_, name in TERMS.items()
    ]
    (tmp_path / "hp.obo").write_text(OBO + "".join(terms))
    extract(export, format="text", terminology=tmp_path / "hp.obo", output=tmp_path / "out")
    return tmp_path / "out"


def marked(page):
    """What is marked, with its tone, as a reader sees it."""
    found = re.findall(r'<mark class="(\w+)" title="[^"]*">([^<]*)<b>', page)
    return [(tone, html.unescape(text)) for tone, text in found]


def test_marks_are_what_stands_at_the_offsets(output):
    (path,) = write_evidence(output, ["A&B/<b>"])
    assert path == output / "evidence" / "A%26B%2F%3Cb%3E.html"
    page = path.read_text("utf-8")
    assert marked(page) == [
        ("denied", "fever"),
        ("affirmed", "Cough"),
        ("affirmed", "fever"),
        ("uncertain", "seizure"),
        ("family", "fever"),
        ("affirmed", "Seizure"),
        ("affirmed", "Seizure"),
    ]
    assert "No</mark>" in page
    assert "1, 1, 0, 1" in page  # Fever: affirmed, denied, uncertain, family.
    assert "<p>n3</p>" in page  # A note in which nothing was found is named.
    assert "n4" not in page


def test_nothing_of_a_note_is_markup_and_nothing_is_loaded(output):
    (path,) = write_evidence(output, ["A&B/<b>"])
    page = path.read_text("utf-8")
    assert html.escape(HOSTILE, quote=False) in page.replace("&quot;", '"').replace("&#39;", "'")
    body = page[page.index("<body>") :]
    assert not re.search(r"<(script|img|b>)", body.replace("<b>", "").replace("</b>", ""))
    assert "Patient A&amp;B/&lt;b&gt;" in page
    assert not re.search(r"(src|href)=[\"'](?!#)|url\(|@import", page)
    assert "default-src 'none'" in page
    assert "\x00" not in page


def test_a_bare_id_gives_the_page_of_everyone_who_has_it(output):
    assert len(write_evidence(output, ["<b>"])) == 2
    assert len(write_evidence(output, ["C/<b>", "<b>"])) == 2


def test_what_cannot_be_shown_is_said(output, tmp_path):
    with pytest.raises(MissingDataError, match="'nobody' has no note"):
        write_evidence(output, ["nobody"])
    with pytest.raises(RunError, match="not a finished extraction"):
        write_evidence(tmp_path, ["<b>"])
    (tmp_path / "export" / "n2.txt").write_text("Seizure was never there.")
    with pytest.raises(RunError, match=r"1 of 4 notes .* --update") as caught:
        write_evidence(output, ["<b>"])
    assert "never" not in str(caught.value)
    (tmp_path / "export").rename(tmp_path / "elsewhere")
    with pytest.raises(MissingDataError, match="not there any more"):
        write_evidence(output, ["<b>"])
    assert not (output / "evidence").exists()
    assert not (output / ".cache").exists()
