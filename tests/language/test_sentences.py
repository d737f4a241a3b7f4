import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_nlp.language.sentences import find_sentences


def sentences(text):
    return [text[start:end] for start, end in find_sentences(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No fever. Has cough.", ["No fever.", "Has cough."]),
        ("Seen by Dr. Smith today. Stable.", ["Seen by Dr. Smith today.", "Stable."]),
        ("Gave 2.5 mg of drug. Better.", ["Gave 2.5 mg of drug.", "Better."]),
        ("Grew E. coli in urine. Treated.", ["Grew E. coli in urine.", "Treated."]),
        ("Takes it b.i.d. for pain. Fine.", ["Takes it b.i.d. for pain.", "Fine."]),
        ("Given 5 mg. The pain stopped.", ["Given 5 mg.", "The pain stopped."]),
        ("pain was relieved by\nrest and ice.", ["pain was relieved by\nrest and ice."]),
        ("- fever\n- cough\n", ["- fever", "- cough"]),
        ("1. Aspirin\n2. Heparin", ["1. Aspirin", "2. Heparin"]),
        ("no fever\nno cough\nchills", ["no fever", "no cough", "chills"]),
        ("no fever. has cough", ["no fever.", "has cough"]),
        ("Fever\n \nCough", ["Fever", "Cough"]),
        ("Impression: pneumonia\nPlan: rest", ["Impression: pneumonia", "Plan: rest"]),
        ("See [1]. Ultrasound normal.", ["See [1].", "Ultrasound normal."]),
        ("fever; no cough", ["fever;", "no cough"]),
        ("(He is well.) Home.", ["(He is well.)", "Home."]),
        ("SUBJECTIVE:, Pain., PLAN:, Rest.", ["SUBJECTIVE:, Pain.,", "PLAN:, Rest."]),
        ("Na\t128\tlow\nK\t4.0\tnormal", ["Na\t128\tlow", "K\t4.0\tnormal"]),
        ("Name | Value\nNa | 128", ["Name | Value", "Na | 128"]),
        ("? pneumonia", ["? pneumonia"]),
        ("No pain.No fever.", ["No pain.", "No fever."]),
        ("Dx: 1. Asthma 2. Gout. Stable.", ["Dx:", "1. Asthma", "2. Gout.", "Stable."]),
        ("Risks include:,1.  Bleeding.,2.  Pain.", ["Risks include:,", "1.  Bleeding.,", "2.  Pain."]),
        ("Weight down to 2. Kilograms", ["Weight down to 2.", "Kilograms"]),
        ("No fever . Denies cough .", ["No fever .", "Denies cough ."]),
        ("any fever ? [patient] no", ["any fever ?", "[patient] no"]),
        ("Imp: ? PE ? CAP", ["Imp: ? PE ? CAP"]),
        (
            "[doctor] any pain in the chest or belly today or the day\n[patient] no",
            ["[doctor] any pain in the chest or belly today or the day", "[patient] no"],
        ),
        ("Never lift.,* Call if worse.", ["Never lift.,", "* Call if worse."]),
        ("Cough;fever", ["Cough;fever"]),
        ("What now?! Rest.", ["What now?!", "Rest."]),
        ("", []),
        (" \n\t", []),
    ],
)
def test_sentences(text, expected):
    assert sentences(text) == expected


def test_wrapped_lines_are_joined():
    prose = "The patient was seen in the clinic and has been complaining of pain in the Left knee that came"
    words = prose.split()
    lines, line = [], ""
    for word in words * 4:
        if len(line) + len(word) > 60:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    assert len(sentences("\n".join([*lines, line]) + ".")) == 1


PIECES = [
    "No fever",
    ".",
    "!",
    "\n",
    "\n\n",
    " ",
    "Dr. ",
    "2.5 mg",
    "- ",
    "1. ",
    ";",
    "a",
    "Has",
    ":",
    "\t",
    "|",
    ",",
    "\x00",
]


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=300), st.lists(st.sampled_from(PIECES), max_size=40).map("".join)))
def test_cover(text):
    spans = find_sentences(text)
    position = 0
    for start, end in spans:
        assert position <= start < end <= len(text)
        assert text[start:end] == text[start:end].strip()
        assert not text[position:start].strip()  # nothing but white space lies between
        position = end
    assert not text[position:].strip()


@pytest.mark.parametrize("unit", ["A", " ", "\n", "a. ", "- x\n", "word ", ". ", "( ", "x, \n"])
def test_time_is_linear(unit):
    started = time.process_time()
    find_sentences(unit * 20_000)
    assert time.process_time() - started < 5
