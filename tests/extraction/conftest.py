"""A small export that has one of everything, and a terminology that loads at once."""

import os
from pathlib import Path

import pytest

OBO = """format-version: 1.2
data-version: hp/releases/2025-01-16

[Term]
id: HP:0000001
name: All

[Term]
id: HP:0000118
name: Phenotypic abnormality
is_a: HP:0000001

[Term]
id: HP:0000707
name: Abnormality of the nervous system
is_a: HP:0000118

[Term]
id: HP:0001250
name: Seizure
is_a: HP:0000707

[Term]
id: HP:0000175
name: Cleft palate
is_a: HP:0000202

[Term]
id: HP:0000202
name: Orofacial cleft
is_a: HP:0000118

[Term]
id: HP:0001945
name: Fever
is_a: HP:0000118

[Term]
id: HP:0012735
name: Cough
is_a: HP:0000118
"""

MARKER = "ZEBRAMARKER"
COPIED = "The patient was admitted with fever and was seen by the team on arrival."

NOTES = [
    # note, patient, institution, date, language, text
    ("a1", "1", "A", "2020-01-01", "en", f"{COPIED}\nNo cough."),
    ("a2", "1", "A", "2020-01-05", "en", f"{COPIED} Cough today."),
    ("a3", "1", "A", "2020-02-01", "en", "No fever. Possible seizure."),
    ("a4", "2", "A", "2020-01-02", "en", "Cleft palate. No fever."),
    ("a5", "2", "A", "2020-01-03", "en", "No cleft palate."),
    ("a6", "2", "A", "2020-01-03", "de", "Kein Fieber."),
    ("a7", "3", "A", "2020-01-04", "en", f"Fever. {MARKER} is written here."),
    ("b1", "1", "B", "2020-03-01", "en", "Denies seizure. Cough."),
    ("b2", "1", "B", "", "en", "Mother had fever."),
    ("b3", "4 / ü", "B", "2020-03-02", "en", "Nothing to report."),
    ("b4", "4 / ü", "B", "2020-03-03", "en", "Seizure. " * 20),
    ("b5", "5", "B", "2020-03-04", "en", "Cough, fever, seizure.\r\nNo cleft palate."),
]


def write_export(folder: Path) -> Path:
    folder.mkdir()
    rows = ["note_id,patient_id,institution,written_at,language"]
    for note_id, patient, institution, date, language, text in NOTES:
        (folder / f"{note_id}.txt").write_bytes(text.encode())
        rows.append(f"{note_id},{patient},{institution},{date},{language}")
    (folder / "b6.txt").write_bytes(b"nobody's note")
    (folder / "b7.txt").write_bytes(b"\xff\xfe\x00\xd8 broken")
    rows.append("b7,5,B,,en")
    (folder / "notes.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "patients.csv").write_text(
        "patient_id,sex,birth_date,death_date\n2,female,1990-05-06,\n1,male,1980-01-01,\n"
    )
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file that is promised to be byte-identical."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def poison_processes(folder: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Make every Python process that is started from now on do `how` when it annotates the marked note."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        f"""
import os, sys
from clinical_nlp.language.mentions import Annotator
annotate = Annotator.annotate
def failing(self, text, extra_spans=()):
    if "{MARKER}" in text:
        {how}
    return annotate(self, text, extra_spans)
Annotator.annotate = failing
"""
    )
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


@pytest.fixture
def export(tmp_path):
    return write_export(tmp_path / "export")


@pytest.fixture
def options(tmp_path):
    (tmp_path / "hp.obo").write_text(OBO)
    return {"format": "text", "terminology": tmp_path / "hp.obo", "shard_notes": 4}
