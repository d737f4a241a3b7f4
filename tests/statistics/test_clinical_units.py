"""Clinical units: each measure says what a reader would say of a small note, and nothing of the text is kept."""

import math

import numpy as np
import pytest

from clinical_nlp.notes.schema import Note
from clinical_nlp.statistics.clinical_units import closing_lines, common, measure, units_of


def note(
    text: str, number: int = 0, *, patient: str | None = None, kind: str | None = None, language: str = "en"
) -> Note:
    return Note(
        note_id=f"n{number}", patient_id=patient or f"p{number}", institution="a", text=text, source="here",
        note_type=kind, language=language,
    )  # fmt: skip


def value(text: str, key: str) -> float:
    """The measure of the first of two notes, the other one making every unit vary."""
    found = measure([note(text), note(EVERYTHING, 1)])
    return float(found.values[0, [unit.key for unit in found.units].index(key)])


EVERYTHING = """County Hospital
CC:
- Pt c/o pain. [** Name **] ___ <NAME> XXXX [NAME] @NAME@ on 2020-01-31, 1/31/2020, January 31, 2020, 31 January 2020.
* Haemoglobin 11 mg/dL, creatinine 90 umol/L. T 37.1 C. Aspirin 81mg po bid daily by mouth. um , pt pt
• patient with history of edema, hx of edema, 80 yo, a 90-year-old, L knee, left knee
1. one | two | three
[doctor] hello .
DOCTOR: hello
MEDICATIONS:
none
Electronically signed by X
"""


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("CHIEF COMPLAINT:\npain\n\nMEDICATIONS:\nnone", "section:medications", 100.0),
        ("CHIEF COMPLAINT:\npain", "section:medications", 0.0),
        ("CHIEF COMPLAINT:\npain\n\nMEDICATIONS:\nnone", "header:capitals", 100.0),
        ("Chief Complaint\npain\n\nMedications\nnone", "header:colon", 0.0),
        ("no headers in here", "header:colon", math.nan),
        ("one two three four", "words", math.log(4)),
        ("Pt seen. The patient is well. Patient left.", "short:patient", 100 / 3),
        ("nobody is named", "short:patient", math.nan),
        ("aspirin 81mg, heparin 5 mg", "tight_doses", 50.0),
        ("temp 37.2 C", "celsius", 100.0),
        ("temp 98.6 F", "celsius", 0.0),
        ("[** Name **] and [** Date **] and ___", "placeholder:double_star", 200 / 3),
        ("ultrasound of the oedema and tumour", "british", 100.0),
        ("edema and a tumor", "british", 0.0),
        ("SEEN AND EXAMINED TODAY", "all_capitals", 100.0),
        ("- one\n- two\nthree\nfour", "bullet:dash", 50.0),
        ("[doctor] how are you ?\n[patient] fine .", "speaker:bracket", 100.0),
        ("DOCTOR: how are you?\nPATIENT: fine.", "speaker:colon", 100.0),
        ("how are you ?", "spaced_punctuation", 100.0),
        ("how are you?", "spaced_punctuation", 0.0),
        ("seen on 2020-02-03 and 2/3/2020", "date:iso", 50.0),
        ("pt c/o sob", "abbreviations", 100.0),
        ("Lungs clear.\nElectronically signed by: Dr. A", "signed_electronically", 100.0),
        ("um i mean it was fine you know", "fillers", 300 / 8),
    ],
)
def test_a_measure_says_what_a_reader_would(text, key, expected):
    assert value(text, key) == pytest.approx(expected, nan_ok=True)


def test_wrapped_lines_are_told_from_long_and_from_short_ones():
    line = "The patient was seen and examined on rounds this morning"
    wrapped, unwrapped = "\n".join([line] * 5), " ".join([line] * 5)
    found = measure([note(wrapped), note(unwrapped, 1), note("short", 2)])
    column = found.values[:, [unit.key for unit in found.units].index("wrapped")]
    np.testing.assert_allclose(column, [100, 0, math.nan])


def test_note_types_and_languages_are_units_where_there_are_several():
    keys = [unit.key for unit in measure([note("a b", 0, kind="Progress"), note("a b", 1, kind="discharge")]).units]
    assert {"type:progress", "type:discharge"} < set(keys)
    assert not [key for key in keys if key.startswith("language:")]
    assert "language:de" in [unit.key for unit in measure([note("a"), note("b", 1, language="de")]).units]
    assert len({unit.key for unit in units_of([])}) == len(units_of([]))


def test_shared_lines_count_patients_not_notes_and_ignore_digits():
    line = "Seen and examined on day {}"
    mine = [note(line.format(3), i, patient="same") for i in range(5)]
    found = measure([*mine, note("something else entirely here", 9)])
    assert "shared_lines" not in [unit.key for unit in found.units]  # all zero: one patient has that line
    three = [note(line.format(i), i) for i in range(3)]
    found = measure([*three, note("something else entirely here", 9)])
    column = found.values[:, [unit.key for unit in found.units].index("shared_lines")]
    assert column.tolist() == [100, 100, 100, 0]


def test_closing_lines_of_few_patients_are_not_looked_at():
    notes = [
        note(f"text\n{'Own line ' + 'abc'[i] if i < 3 else 'Typed by a machine, 3 pages.'}\n\n", i) for i in range(14)
    ]
    assert closing_lines(notes).tolist() == [[0.0]] * 3 + [[1.0]] * 11
    assert closing_lines(notes[:13]).shape == (13, 0)


def test_common_needs_patients_not_notes():
    column = np.r_[np.zeros(40), np.ones(40)]
    one_patient = np.r_[np.arange(40), np.full(40, 99)]
    assert common(column, np.arange(80), 11)
    assert not common(column, one_patient, 11)
    assert not common(np.full(80, math.nan), np.arange(80), 11)


def test_empty_and_odd_notes_are_measured_without_an_error():
    found = measure([note("", 0), note("\n\n", 1), note("\x00 é ①", 2), note(EVERYTHING, 3)])
    assert len(found.values) == 4
    assert not np.isinf(found.values).any()
    assert measure([]).values.shape == (0, 0)
