"""Facts of a text: concepts however they are written, numbers with what they belong to, sides, phrases."""

import pytest

from clinical_nlp.language.facts import broader, is_clinical, read_facts, readable


def named(text, kind=None):
    return [fact for fact in read_facts(text) if kind is None or fact.kind == kind]


@pytest.mark.parametrize(
    "names",
    [
        ("CAD", "coronary artery disease", "coronary heart disease", "Coronary Artery Disease"),
        ("SOB", "shortness of breath", "dyspnea", "SHORTNESS OF BREATH", "short of breath"),
        ("Lasix", "furosemide", "FUROSEMIDE"),
        ("CXR today", "chest x-ray today", "a chest radiograph today"),
        ("HTN", "hypertension", "high blood pressure", "htn"),
        ("mild fever", "fever", "recurrent fever", "pyrexia"),
    ],
)
def test_one_name_for_one_concept(names):
    found = [{fact.name for fact in read_facts(f"Has {name}.") if fact.kind != "phrase"} for name in names]
    assert len(found[0]) == 1
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Metoprolol 12.5 mg BID.", [("metoprolol", 12.5, "mg"), ("metoprolol", 2.0, "/day")]),
        ("Heparin 5,000 units every eight hours.", [("heparin", 5000.0, "unit"), ("heparin", 3.0, "/day")]),
        ("Vancomycin 1 g q12h.", [("vancomycin", 1.0, "g"), ("vancomycin", 2.0, "/day")]),
        ("Three days of cough.", [("HP:0012735", 3.0, "day")]),
        ("BP 120/80, HR 88.", [("systolic", 120.0, "mmhg"), ("diastolic", 80.0, "mmhg"), ("pulse", 88.0, None)]),
        ("WBC-12.3 Hgb-9.1", [("leukocytes", 12.3, None), ("hemoglobin", 9.1, None)]),
        ("Pain 7/10.", [("score", 7.0, "/10")]),
        ("A 67-year-old man.", [("age", 67.0, "year old")]),
        ("Seen on 2018-11-22.", [("date", 181122.0, "date")]),
        ("Seen on November 22, 2018.", [("date", 181122.0, "date")]),
        ("1. Gout\n2. COPD", []),
        ("Type 2 diabetes, A1c, L4.", []),
    ],
)
def test_numbers(text, expected):
    assert [(fact.name, fact.value, fact.unit) for fact in named(text, "number")] == expected


@pytest.mark.parametrize(
    ("text", "side"),
    [
        ("Left pleural effusion.", "left"),
        ("Pleural effusion on the right.", "right"),
        ("Bilateral pleural effusions.", "bilateral"),
        ("L-sided pleural effusion.", "left"),
        ("Pleural effusion, he left the hospital.", None),
        ("Drained 2 L from the pleural effusion.", None),
        ("Right now there is a pleural effusion.", None),
    ],
)
def test_sides(text, side):
    assert [fact.side for fact in read_facts(text) if fact.name == "HP:0002202"] == [side]


@pytest.mark.parametrize(
    ("text", "presence", "resolved"),
    [
        ("No fever.", "absent", False),
        ("Fever.", "present", False),
        ("Possible fever.", "uncertain", False),
        ("Fever has resolved.", "present", True),
        ("Fever has not resolved.", "present", False),
        ("Denied having fever.", "absent", False),
        ("Unable to detect fever.", "absent", False),
        ("DENIES COUGH, CHILLS OR\nFEVER.", "absent", False),
        ("Pertinent negatives include cough, chills and fever.", "absent", False),
    ],
)
def test_what_is_said_of_a_finding(text, presence, resolved):
    (fact,) = [fact for fact in read_facts(text) if fact.name == "HP:0001945"]
    assert (fact.presence, fact.resolved) == (presence, resolved)


def test_an_unknown_phrase_is_kept_by_its_stems():
    (fact,) = read_facts("There is no zorgflux of the widget.")
    assert (fact.kind, fact.name, fact.presence) == ("phrase", "widget zorgflux", "absent")
    assert not is_clinical("zorgflux")
    assert read_facts("The patient was seen and examined.") == []


def test_an_unknown_drug_is_known_by_its_ending():
    (drug,) = named("Start zobrimab.", "plan")
    assert drug.name == "zobrimab"


def test_headers_are_no_facts_but_entries_of_a_list_are():
    assert [fact.label for fact in read_facts("Allergies:\nPlan:\n- CXR\n- gout")] == ["CXR", "gout"]


def test_a_concept_knows_what_it_is_a_kind_of():
    (productive,) = read_facts("productive cough")
    (cough,) = read_facts("cough")
    assert cough.name in broader(productive.name)
    assert not broader("no concept")


@pytest.mark.parametrize(
    "text", ["consoliadtion", "No fevre.\nA\nB", "x" * 50 + "\nand so on", "İİİİİİİ ﬁﬁﬁﬁﬁﬁ", "\n\n\t", ""]
)
def test_readable_keeps_every_place(text):
    mended = readable(text)
    assert len(mended) == len(text)
    for fact in read_facts(text):
        assert text[fact.start : fact.end] == fact.label


def test_slips_of_the_pen_are_mended():
    assert readable("Left consoliadtion.") == "Left consolidation."
    assert readable("PNEUMOTHIRAX") == "PNEUMOTHORAX"
    assert readable("Zorgfluxian") == "Zorgfluxian"
