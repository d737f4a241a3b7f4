import pytest

from clinical_nlp.language.terminology import Matcher, load_terminology


@pytest.fixture(scope="module")
def matcher():
    return Matcher(load_terminology("hpo"))


def found(matcher, text):
    return [(text[m.start : m.end], matcher.terminology.label(m.concept_id)) for m in matcher.match(text)]


def test_a_note_says_what_its_short_forms_mean(matcher):
    text = "Severe mental retardation (MR) since birth. MR of the mother is unknown; two sibs with MRs."
    assert found(matcher, text) == [
        ("Severe mental retardation", "Intellectual disability, severe"),
        *[("MR", "Intellectual disability")] * 3,
    ]


def test_a_short_form_of_something_else_is_not_read(matcher):
    assert ("BO", "Body odor") not in found(matcher, "Branchio-oto (BO) syndrome. BO runs in families. No odor.")
    assert ("PDA", "Patent ductus arteriosus") not in found(matcher, "She uses a personal digital assistant (PDA). PDA")
    assert ("PDA", "Patent ductus arteriosus") in found(matcher, "PDA on echo")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("history of RA on methotrexate", "Rheumatoid arthritis"),
        ("96% on RA", None),
        ("acute MI with stent", "Myocardial infarction"),
        ("chest pain, r/o PE, D-dimer sent", "Pulmonary embolism"),
        ("PE: General: well appearing", None),
        ("no cervical LAD", "Lymphadenopathy"),
        ("stent to the proximal LAD", None),
        ("ASD closed with a device", "Atrial septal defect"),
        ("ASD, speech and social skills poor", "Autism"),
        ("BO noted", None),
        ("bloating, N/V x3", "Nausea and vomiting"),
    ],
)
def test_context_decides(matcher, text, label):
    short = {concept for surface, concept in found(matcher, text) if surface.isupper()}
    assert short == ({label} if label else set())


def test_capitals_mark_nothing_in_a_shouted_line(matcher):
    assert ("CP", "Chest pain") not in found(matcher, "PATIENT DENIES CP TODAY AND NO OTHER COMPLAINTS")
    assert ("CP", "Chest pain") in found(matcher, "Patient denies CP today")


def test_capitals_mark_abbreviations_among_abbreviations(matcher):
    short = {surface for surface, _ in found(matcher, "PMH: HTN, OSA, GERD, COPD, TIA, CHF, DVT")}
    assert short == {"HTN", "OSA", "GERD", "COPD", "TIA", "CHF", "DVT"}
    assert found(matcher, "VITALS: BP 120/80 HR 70 RR 12 O2 SAT 98% RA") == []
