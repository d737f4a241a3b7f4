import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_nlp.language import sections
from clinical_nlp.language.sections import CATEGORIES, find_sections


def named(text):
    return [(text[s.header_start : s.header_end], s.category) for s in find_sections(text) if s.named]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CHIEF COMPLAINT: pain", [("CHIEF COMPLAINT", "chief_complaint")]),
        ("Family History:\nnone", [("Family History", "family_history")]),
        ("family history: none", [("family history", "family_history")]),
        ("## Assessment and Plan\nx", [("Assessment and Plan", "assessment_plan")]),
        ("**Impression:** x", [("Impression", "impression")]),
        ("**Medications**\nx", [("Medications", "medications")]),
        ("1. PHYSICAL EXAM\nx\n2. LABS\ny", [("PHYSICAL EXAM", "physical_exam"), ("LABS", "laboratory")]),
        ("Allergies\nnone", [("Allergies", "allergies")]),
        ("pmh\n- gout", [("pmh", "past_medical_history")]),
        ("Gout in 2006.\nmedications\n- x", [("medications", "medications")]),
        ("HPI\nx", [("HPI", "history_of_present_illness")]),
        ("PLAN - rest", [("PLAN", "assessment_plan")]),
        (
            "Hospital Course:\n\nPast Medical History:\nx",
            [("Hospital Course", "hospital_course"), ("Past Medical History", "past_medical_history")],
        ),
        ("Discharge Instructions:\nrest", [("Discharge Instructions", "discharge_instructions")]),
        ("WOUND CARE NOTES:\nclean", [("WOUND CARE NOTES", "other")]),
        (
            "SUBJECTIVE:, pain., FAMILY HISTORY: , none",
            [("SUBJECTIVE", "history_of_present_illness"), ("FAMILY HISTORY", "family_history")],
        ),
        ("PHYSICAL EXAM:\nHEENT: normal\nCARDIOVASCULAR: normal", [("PHYSICAL EXAM", "physical_exam")]),
        ("FAMILY HISTORY:\nMOTHER: gout", [("FAMILY HISTORY", "family_history")]),
        ("MEDS:, aspirin.,PMH: ,gout", [("MEDS", "medications"), ("PMH", "past_medical_history")]),
        ("PMH - nil. FH - gout", [("PMH", "past_medical_history"), ("FH", "family_history")]),
        ("FHX: , gout.,FETAL ANATOMY: normal", [("FHX", "family_history"), ("FETAL ANATOMY", "other")]),
        (
            "S: cough\nO: clear\nA: cold\nP: rest",
            [
                ("S", "history_of_present_illness"),
                ("O", "physical_exam"),
                ("A", "assessment_plan"),
                ("P", "assessment_plan"),
            ],
        ),
        ("Drug history\nnone\nO/E\nwell", [("Drug history", "medications"), ("O/E", "physical_exam")]),
        ("PC: cough\nHPC: two days\nDHx: nil", [("PC", "chief_complaint"), ("HPC", "history_of_present_illness"),
                                              ("DHx", "medications")]),
        ("A & P\nrest", [("A & P", "assessment_plan")]),
        ("PMH:\nasthma\npe\nuti\nMS\n", [("PMH", "past_medical_history")]),
        ("FH: gout.\nPE\nwell", [("FH", "family_history"), ("PE", "physical_exam")]),
        ("pmh - gout\nfamily history - nil", [("pmh", "past_medical_history"), ("family history", "family_history")]),
        ("Allergies - latex\n\nHabits - none", [("Allergies", "allergies"), ("Habits", "social_history")]),
        ("III. PHYSICAL EXAMINATION\nwell", [("PHYSICAL EXAMINATION", "physical_exam")]),
        ("=== Plan ===\nrest", [("Plan", "assessment_plan")]),
        ("PMH: gout.\nDx: cold vs. flu\nDispo: home", [("PMH", "past_medical_history"), ("Dx", "impression"),
                                                       ("Dispo", "discharge_instructions")]),
    ],
)  # fmt: skip
def test_headers(text, expected):
    assert named(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "The plan: rest is advised",
        "He takes his medications daily.",
        "history of asthma and gout in the past",
        "Her family history is unknown.",
        "BP: 120/80",
        "Hepatitis A: immune.",
        "Vitamin A: low\nVitamin B: normal",
        "He was in good condition - no change.",
        "no assessment was possible\n",
        "He was sent home on the same list of\nmedications.\n",
    ],
)
def test_prose_is_no_header(text):
    assert named(text) == []


def test_empty_section_does_not_swallow_the_next():
    text = "Social History:\nFamily History:\ngout\n"
    sections = find_sections(text)
    assert [s.category for s in sections] == ["social_history", "family_history"]
    assert text[sections[0].start : sections[0].end] == "Social History:\n"


def test_leading_text_has_its_own_section():
    first, second = find_sections("Seen today.\nPlan:\nrest")
    assert (first.category, first.named) == ("other", False)
    assert second.category == "assessment_plan"


PIECES = [
    "Family History:",
    "PLAN",
    "\n",
    "\n\n",
    " ",
    "x.",
    "1. ",
    "**",
    "# ",
    ":",
    "-",
    "ROS",
    "no fever",
    "ALLERGIES:,",
]


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=300), st.lists(st.sampled_from(PIECES), max_size=30).map("".join)))
def test_cover(text):
    sections = find_sections(text)
    assert "".join(text[s.start : s.end] for s in sections) == text
    position = 0
    for s in sections:
        assert s.start == position < s.end
        assert s.start <= s.header_start <= s.header_end <= s.end
        assert s.category in CATEGORIES
        position = s.end
    assert position == len(text)
    assert find_sections(text) == sections


@pytest.mark.parametrize("unit", ["A", " ", "\n", "ABC: ", "ABC ", "a. ", "- x\n", "PLAN:\n", "( ", "* "])
def test_time_is_linear(unit):
    started = time.process_time()
    find_sections(unit * 20_000)
    assert time.process_time() - started < 5


def test_a_carriage_return_hides_no_header():
    found = find_sections("Foo Bar:\r\nText.\r\nPlan:\r\nGo.\r\n")
    assert [(section.header_start, section.header_end) for section in found] == [(0, 7), (17, 21)]


_NAMES = [
    "Plan",
    "plan",
    "PLANS",
    "Foo Bar",
    "FOO BAR",
    "Foo of Bar",
    "Patient's History",
    "HPI",
    "H&P",
    "**Foo**",
    "É",
]
_NAMES += ["# Foo", "1. ", "IV. ", "A. ", "(continued)", "medications", "Medicationss", "word", "_", "’s"]
_MARKS = ["- ", "* ", ":", ": ", " - ", ":**", "\r", "\t", "\u00a0", "  ", ",", ".", "\n", "\n\n"]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(_NAMES + _MARKS), max_size=14).map("".join))
def test_lines_that_are_passed_over_hold_no_header(text):
    found = find_sections(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "_may_be_header", lambda line: True)
        assert find_sections(text) == found
