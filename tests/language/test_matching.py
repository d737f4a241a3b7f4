import os
import pickle
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_nlp.language.terminology import Matcher, load_terminology
from clinical_nlp.language.terminology.index import Index
from clinical_nlp.language.terminology.normalization import heavy, light


@pytest.fixture(scope="module")
def matcher():
    return Matcher(load_terminology("hpo"))


@pytest.mark.parametrize(
    ("text", "covered", "label"),
    [
        ("He had seizures today", "seizures", "Seizure"),
        ("dilatation of the aorta", "dilatation of the aorta", "Aortic aneurysm"),
        ("aortic dilatation", "aortic dilatation", "Aortic aneurysm"),
        ("severe anaemia", "anaemia", "Anemia"),
        ("pedal oedema", "pedal oedema", "Pedal edema"),
        ("diarrhoea", "diarrhoea", "Diarrhea"),
        ("SEIZURES AND FEVER", "SEIZURES", "Seizure"),
        ("short of breath", "short of breath", "Dyspnea"),
        ("weakness of the muscles", "weakness of the muscles", "Muscle weakness"),
        ("cleft-palate", "cleft-palate", "Cleft palate"),
        ("café-au-lait spots", "café-au-lait spots", "Cafe-au-lait spot"),
        ("hypotonic infant", "hypotonic", "Hypotonia"),
        ("anomalies of the kidney", "anomalies of the kidney", "Abnormality of the kidney"),
        ("delayed\nspeech and language development", None, "Delayed speech and language development"),
        ("brachydactyly type A1", "brachydactyly type A1", "Type A1 brachydactyly"),
        ("history of PDA repair", "PDA", "Patent ductus arteriosus"),
    ],
)
def test_surface_forms(matcher, text, covered, label):
    found = {text[m.start : m.end]: matcher.terminology.label(m.concept_id) for m in matcher.match(text)}
    assert found.get(covered or text) == label, found


@pytest.mark.parametrize(
    "text",
    [
        "all patients fall ill",
        "the man went into the room",
        "in order to start",
        "as soon as possible",
        "a pda was used",  # an abbreviation in the wrong case
        "LFTs were sent",
        "fever.\n\nShortness of\n\nbreath sounds clear",
        "weakness. Muscle bulk normal",
        "",
        "...",
    ],
)
def test_no_false_concept(matcher, text):
    labels = [matcher.terminology.label(m.concept_id) for m in matcher.match(text)]
    assert labels in ([], ["Fever"], ["Asthenia"])


def test_longest_wins_and_coordination(matcher):
    def labels(text):
        return [matcher.terminology.label(m.concept_id) for m in matcher.match(text)]

    assert labels("bilateral sensorineural hearing loss") == ["Bilateral sensorineural hearing impairment"]
    assert (
        labels("hypoplastic and absent nails") == ["Small nail", "Anonychia"]
        or len(labels("hypoplastic and absent nails")) == 2
    )
    assert len(labels("short hands and feet")) == 2


def test_every_label_finds_itself_or_a_namesake(matcher):
    """A label as it stands must be found whole, for nearly all of the terminology."""
    terminology = matcher.terminology
    ids = sorted(terminology.matchable)[::20]
    found = sum(matcher.exact(terminology.label(i)) == i for i in ids)
    assert found / len(ids) > 0.97


def test_two_matchers_agree(matcher):
    text = "fever, seizures, short hands and feet, dilatation of the aorta " * 3
    assert Matcher(load_terminology("hpo")).match(text) == matcher.match(text)
    assert pickle.loads(pickle.dumps(matcher.match(text))) == matcher.match(text)


VOCABULARY = ["fever", "no", "short", "hands", "and", "feet", "PDA", "of", "the", "A", "type", "-", ",", ".", "\n", "é"]


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(max_size=200), st.lists(st.sampled_from(VOCABULARY), max_size=30).map(" ".join)))
def test_any_text(matcher, text):
    matches = matcher.match(text)
    assert matches == sorted(matches, key=lambda m: (m.start, -m.end, m.concept_id))
    for m in matches:
        covered = text[m.start : m.end]
        assert covered
        assert covered == covered.strip()
        assert m.concept_id in matcher.terminology.matchable
        assert 0 < m.score <= 1


@pytest.mark.parametrize(
    "forms",
    [
        ("dilated", "dilatation", "dilation"),
        ("hypoplastic", "hypoplasia"),
        ("stenosis", "stenotic", "stenoses"),
        ("tumour", "tumor", "tumours"),
        ("haemorrhage", "hemorrhage", "haemorrhagic"),
        ("vertebra", "vertebrae", "vertebral"),
        ("malformed", "malformation", "malformations"),
        ("weak", "weakness"),
        ("oesophageal", "esophagus"),
        ("foot", "feet"),
        ("abnormal", "abnormality", "abnormalities"),
    ],
)
def test_forms_of_one_word(forms):
    assert len({heavy(form) for form in forms}) == 1


@pytest.mark.parametrize(("one", "other"), [("limb", "limbic"), ("man", "mania"), ("spine", "spinning")])
def test_different_words(one, other):
    assert light(one) != light(other)


@given(st.text(max_size=30))
def test_forms_never_fail(word):
    assert isinstance(heavy(word), str)
    assert heavy(word) == heavy(word)


def test_nested_matches_are_an_option(matcher):
    def labels(**options):
        return {matcher.terminology.label(m.concept_id) for m in matcher.match("conductive hearing loss", **options)}

    assert labels() == {"Conductive hearing impairment"}
    assert labels(nested=True) == {"Conductive hearing impairment", "Hearing impairment"}


def test_coordination_covers_both_parts(matcher):
    text = "He has joint pain and swelling."
    assert {(text[m.start : m.end], matcher.terminology.label(m.concept_id)) for m in matcher.match(text)} == {
        ("joint pain", "Arthralgia"),
        ("joint pain and swelling", "Joint swelling"),
    }


def test_a_mask_ends_a_phrase(matcher):
    assert matcher.match("hearing ___ loss") == []
    assert [m.end for m in matcher.match("severe hearing\nloss")] == [19]


INDEX = """
import time, tracemalloc
from clinical_nlp.language.terminology import load_terminology
from clinical_nlp.language.terminology.index import Index
terminology = load_terminology("hpo")
began = time.process_time()
first = Index.build(terminology, terminology.matchable)
seconds = time.process_time() - began
tracemalloc.start()
index = Index.build(terminology, terminology.matchable)
held = tracemalloc.get_traced_memory()[0] / 2**20
print(index.digest, seconds, held)
"""


def test_index_is_the_same_every_time_and_small():
    said = []
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", INDEX],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        said.append(done.stdout.split())
    assert said[0][0] == said[1][0]
    assert all(float(seconds) < 20 for _, seconds, _ in said)
    assert all(float(mebibytes) < 100 for *_, mebibytes in said)


def test_index_follows_its_source(matcher):
    terminology = matcher.terminology
    few = sorted(terminology.matchable)[:500]
    assert Index.build(terminology, few).digest == Index.build(terminology, reversed(few)).digest
    assert Index.build(terminology, few).digest != Index.build(terminology, few[1:]).digest


def test_time_is_linear_in_long_lists(matcher):
    def seconds(items):
        text = ", ".join(["pain", "short", "hands", "swelling"] * items) + " and fever"
        began = time.process_time()
        matcher.match(text)
        return time.process_time() - began

    seconds(100)
    assert seconds(16_000) < 12 * max(seconds(4_000), 0.02)


def test_a_vocabulary_of_ones_own_says_what_it_says(tmp_path):
    """What guards HPO's names (`small finger` is a digit) takes nothing from a user's vocabulary."""
    table = tmp_path / "own.csv"
    table.write_text("id,label,synonyms,parents\nX:1,small finger,pile,\nX:2,small joints of the hand,,\n", "utf-8")
    text = "The small finger, a pile, the small joints of the hand."
    found = Matcher(load_terminology(str(table))).match(text)
    assert [text[m.start : m.end] for m in found] == ["small finger", "pile", "small joints of the hand"]
    assert Matcher(load_terminology("hpo")).match(text) == []
