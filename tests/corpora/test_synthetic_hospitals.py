"""The synthetic hospitals: exact gold, and knobs that move what they govern and nothing else."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clinical_nlp.corpora.synthetic_hospitals import MARKERS, TARGET_PREVALENCE, generate, load, target_prevalence
from clinical_nlp.corpora.synthetic_hospitals.content import load_content
from clinical_nlp.corpora.synthetic_hospitals.patients import TARGET, Population
from clinical_nlp.corpora.synthetic_hospitals.style import ANNOTATED, SHARED, make_institution
from clinical_nlp.corpora.synthetic_hospitals.writing import _misspell, _wrap
from clinical_nlp.errors import UsageError
from clinical_nlp.language.sections import CATEGORIES
from clinical_nlp.notes.corpus import load_corpus
from clinical_nlp.notes.schema import EXPERIENCER, FACT_SCHEMA, MODALITY, PRESENCE, TEMPORALITY

COLUMN = {"start": 2, "end": 3, "text": 4, "label": 5, "presence": 8, "temporality": 9, "modality": 10,
          "experiencer": 11, "section": 12, "fact_id": 13}  # fmt: skip
unit = st.sampled_from((0.0, 0.3, 1.0))


def column(row, name):
    return row[COLUMN[name]]


def notes(**options):
    return list(generate(**{"institutions": 2, "patients": 40, **options}))


@given(
    seed=st.integers(-(2**40), 2**40), covariate=unit, label=unit, concept=unit, spurious=unit,
    bank=st.sampled_from(("development", "held_out")),
)  # fmt: skip
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_gold_is_exact_whatever_the_knobs(seed, covariate, label, concept, spurious, bank):
    options = {"seed": seed, "covariate": covariate, "label": label, "concept": concept, "spurious": spurious}
    for item in generate(institutions=2, patients=5, bank=bank, **options):
        text = item.note.text
        facts = {row[0]: row for row in item.facts}
        assert len(facts) == len(item.facts)
        end = 0
        for row in item.spans:
            assert text[column(row, "start") : column(row, "end")] == column(row, "text")
            assert column(row, "text").strip() == column(row, "text") != ""
            assert column(row, "start") >= end
            end = column(row, "end")
            assert column(row, "label") in ("problem", "drug", "procedure")
            assert column(row, "section") in CATEGORIES
            axes = [column(row, name) for name in ("presence", "temporality", "modality", "experiencer")]
            for value, known in zip(axes, (PRESENCE, TEMPORALITY, MODALITY, EXPERIENCER), strict=True):
                assert value in known
            assert list(facts[column(row, "fact_id")][8:12]) == axes
        assert {row[4] for row in item.facts} <= {"finding", "drug", "procedure", "plan"}
        for pair in item.pairs:
            assert pair[4] in text
            assert pair[5] in text
            assert text.index(pair[4]) >= 0
        assert (item.note.note_type == "radiology") == bool(item.pairs)
        assert "{" not in text


def test_same_seed_same_bytes_and_other_seed_other_bytes():
    one, two, other = load(patients=4), load(patients=4), load(patients=4, seed=1)
    for name in ("notes", "spans", "codes", "pairs", "facts", "patients"):
        assert getattr(one, name).equals(getattr(two, name)), name
    assert not one.notes.equals(other.notes)


def test_a_patient_is_the_same_in_a_larger_corpus():
    few = {item.note.note_id: item for item in notes(institutions=1, patients=3)}
    many = {item.note.note_id: item for item in notes(institutions=3, patients=9)}
    assert all(many[key] == item for key, item in few.items())


def test_it_streams():
    stream = generate(institutions=10**7, patients=10**7)
    assert len(list(itertools.islice(stream, 5))) == 5


def test_tables_fit_together():
    corpus = load_corpus("synthetic_hospitals", institutions=3, patients=20, notes_per_patient=[2, 6])
    ids = set(corpus.notes["note_id"].to_pylist())
    assert len(ids) == corpus.notes.num_rows
    assert set(corpus.spans["note_id"].to_pylist()) == ids
    facts = corpus.facts["fact_id"].to_pylist()
    assert len(set(facts)) == len(facts)
    assert set(corpus.spans["fact_id"].to_pylist()) == set(facts)
    assert set(corpus.codes["encounter_id"].to_pylist()) <= set(corpus.notes["encounter_id"].to_pylist())
    assert set(corpus.notes["patient_id"].to_pylist()) == set(corpus.patients["patient_id"].to_pylist())
    per_patient = Counter(corpus.notes["patient_id"].to_pylist())
    assert len(per_patient) == 60
    assert set(per_patient.values()) == {2, 3, 4, 5, 6}
    doses = [row for row in corpus.facts.to_pylist() if row["kind"] == "drug"]
    assert doses
    assert all(row["value"] > 0 and row["unit"] for row in doses)
    assert {"left", "right", None} <= set(corpus.facts["side"].to_pylist())
    assert set(corpus.notes["note_type"].to_pylist()) == {
        "admission", "progress", "discharge", "radiology", "clinic", "nursing"}  # fmt: skip


def test_every_kind_of_assertion_is_written():
    seen = Counter()
    for item in notes(patients=80):
        for row in item.spans:
            seen.update([row[8:12]])
    for kind in (
        ("present", "current", "actual", "patient"), ("absent", "current", "actual", "patient"),
        ("uncertain", "current", "actual", "patient"), ("present", "historical", "actual", "patient"),
        ("present", "future", "actual", "patient"), ("present", "current", "hypothetical", "patient"),
        ("present", "current", "conditional", "patient"), ("present", "current", "actual", "family"),
        ("absent", "current", "actual", "family"),
    ):  # fmt: skip
        assert seen[kind] > 10, kind


@pytest.mark.parametrize("bank", ["development", "held_out"])
def test_a_patient_never_lacks_what_the_patient_has(bank):
    entities = load_content(bank).entities
    by_patient = {}
    for item in notes(patients=100, bank=bank):
        for row in item.facts:
            if row[4] == "finding" and row[9:12] == ("current", "actual", "patient"):
                by_patient.setdefault(row[2], {}).setdefault(row[8], set()).add(row[5])
    for patient, states in by_patient.items():
        present = states.get("present", set())
        present |= {other for key in tuple(present) for other in entities[key].implies}
        # What a scan shows by the way may be new.
        by_the_way = {"atelectasis", "pulmonary_nodule", "renal_cyst", "fatty_liver", "white_matter", "atrophy",
                      "osteoarthritis", "osteoporosis"}  # fmt: skip
        assert not present & states.get("absent", set()) - by_the_way, patient


def test_coders_code_what_the_notes_of_the_encounter_state():
    content = load_content("development")
    chronic = {content.entities[key].icd10cm_code: condition.chronic for key, condition in content.conditions.items()}
    coded, stated = {}, {}
    for item in notes(patients=40):
        encounter = item.note.encounter_id
        coded.setdefault(encounter, set()).update(row[4] for row in item.codes)
        stated.setdefault(encounter, set())
        for fact in (dict(zip(FACT_SCHEMA.names, row, strict=True)) for row in item.facts):
            code = fact["icd10cm_code"]
            if code not in chronic:
                continue
            if (fact["presence"], fact["modality"], fact["experiencer"]) != ("present", "actual", "patient"):
                continue
            if fact["temporality"] == "current" or chronic[code]:
                stated[encounter].add(code)
    assert len(coded) > 60
    assert coded == stated


def test_patients_have_conditions_of_their_sex():
    content = load_content("development")
    population = Population(content, 0, "hospital-1", seed=0, label=0.0)
    for number in range(30):
        patient = population.patient(number, (2, 6))
        assert 2 <= len(patient.conditions) <= 5
        for key in patient.conditions:
            assert content.conditions[key].sex in (None, patient.sex)


# -- the knobs: each moves what it governs, and nothing else ---------------------------------------------------------


def test_concept_moves_annotation_only():
    plain, changed = notes(concept=0.0), notes(concept=1.0)
    for a, b in zip(plain, changed, strict=True):
        assert (a.note, a.facts, a.codes, a.pairs, a.style) == (b.note, b.facts, b.codes, b.pairs, b.style)
        assert {column(row, "end") for row in b.spans} <= {column(row, "end") for row in a.spans}
    content = load_content("development")
    for index in range(2):
        institution = make_institution(index, 0, content.idioms)
        axes = [set(row[8:12]) for item in changed if item.note.institution == institution.name for row in item.spans]
        for omitted in institution.omitted:
            assert omitted in ANNOTATED
            assert not any(omitted in values for values in axes)
    share = len([row for item in changed for row in item.spans]) / len([row for item in plain for row in item.spans])
    assert 0.4 < share < 0.95
    half = [row for item in notes(concept=0.5) for row in item.spans]
    assert len([row for item in changed for row in item.spans]) < len(half)


def test_conventions_of_institutions_differ():
    idioms = load_content("development").idioms
    assert len({make_institution(index, 0, idioms).omitted for index in range(4)}) == 4


def test_covariate_moves_style_and_not_patients():
    content = load_content("development")
    populations = {f"hospital-{index + 1}": Population(content, index, f"hospital-{index + 1}", seed=0, label=0.0)
                   for index in range(2)}  # fmt: skip
    for covariate in (0.0, 1.0):
        for item in notes(covariate=covariate):
            number = int(item.note.patient_id.rpartition("-p")[2]) - 1
            has = populations[item.note.institution].patient(number, (2, 6)).conditions
            assert item.has_target == (TARGET in has)

    own = notes(covariate=1.0)
    for name in ("hospital-1", "hospital-2"):
        styles = {tuple(item.style.items()) for item in own if item.note.institution == name}
        assert len(styles) == 1
    first, second = (make_institution(index, 0, content.idioms).style for index in range(2))
    assert all(first[name] != second[name] for name in SHARED)
    eight = [make_institution(index, 0, content.idioms).style for index in range(8)]
    assert len({tuple(style.items()) for style in eight}) == 8


def test_without_covariate_all_institutions_write_alike():
    found = notes(covariate=0.0, patients=250)
    for name, values in SHARED.items():
        share = {}
        for institution in ("hospital-1", "hospital-2"):
            drawn = [item.style[name] for item in found if item.note.institution == institution]
            share[institution] = np.array([drawn.count(value) / len(drawn) for value in dict.fromkeys(values)])
        # About 1,000 notes on each side: a share has a standard error under 0.016.
        assert np.abs(share["hospital-1"] - share["hospital-2"]).max() < 0.1, name


def test_label_moves_prevalence_and_not_style():
    plain = {item.note.note_id: item for item in notes(label=0.0)}
    moved = {item.note.note_id: item for item in notes(label=1.0)}
    assert plain.keys() == moved.keys()
    for key, item in plain.items():
        other = moved[key]
        assert (item.style, item.marker, item.note.note_type) == (other.style, other.marker, other.note.note_type)


def has_target(*, institution, label, n):
    population = Population(
        load_content("development"), institution, f"hospital-{institution + 1}", seed=0, label=label
    )
    return np.array([TARGET in population.patient(number, (2, 6)).conditions for number in range(n)])


@pytest.mark.parametrize("institution", [0, 1])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_prevalence_is_the_stated_truth(institution, label):
    truth = target_prevalence(institution, label=label)
    found = has_target(institution=institution, label=label, n=1500).mean()
    assert abs(found - truth) < 4 * (truth * (1 - truth) / 1500) ** 0.5
    if label:
        assert (truth > TARGET_PREVALENCE + 0.05) if institution == 1 else (truth < TARGET_PREVALENCE - 0.05)
    else:
        assert truth == pytest.approx(TARGET_PREVALENCE)


@pytest.mark.parametrize("spurious", [0.0, 0.5, 1.0])
def test_spurious_is_the_correlation_of_marker_and_target(spurious):
    found = notes(spurious=spurious, patients=300)
    stays = [item for item in found if item.note.encounter_id.endswith("stay")]
    target = np.array([item.has_target for item in stays], float)
    marker = np.array([item.marker for item in stays], float)
    assert abs(np.corrcoef(target, marker)[0, 1] - spurious) < 0.1
    assert abs(marker.mean() - TARGET_PREVALENCE) < 0.07


def test_spurious_moves_the_closing_line_only():
    plain, moved = notes(spurious=0.0), notes(spurious=1.0)
    changed = 0
    for a, b in zip(plain, moved, strict=True):
        assert (a.spans, a.facts, a.codes, a.pairs, a.style) == (b.spans, b.facts, b.codes, b.pairs, b.style)
        closing = [len(MARKERS[item.marker]) for item in (a, b)]
        assert a.note.text[: -closing[0] - 20] == b.note.text[: len(a.note.text) - closing[0] - 20]
        changed += a.marker != b.marker
    assert changed > 20


def test_spurious_may_differ_between_institutions():
    found = notes(spurious=[1.0, 0.0], patients=150)
    for name, expected in (("hospital-1", 1.0), ("hospital-2", 0.0)):
        here = [item for item in found if item.note.institution == name and item.note.encounter_id.endswith("stay")]
        target = [item.has_target for item in here]
        assert abs(np.corrcoef(target, [item.marker for item in here])[0, 1] - expected) < 0.15


def test_banks_leave_the_patients_alone():
    one, two = load(patients=15), load(patients=15, bank="held_out")
    assert one.patients.equals(two.patients)
    said = [{(row["encounter_id"], row["code"]) for row in corpus.codes.to_pylist()} for corpus in (one, two)]
    assert len(said[0] & said[1]) > 0.8 * len(said[0] | said[1])  # a note need not name what another one names
    assert not one.notes.equals(two.notes)


# -- small parts -----------------------------------------------------------------------------------------------------


@given(text=st.text(alphabet="abcdefgh \n*", max_size=400), width=st.integers(5, 80))
def test_wrapping_moves_no_character(text, width):
    wrapped = _wrap(text, width)
    assert len(wrapped) == len(text)
    assert all(a == b or (a, b) == (" ", "\n") for a, b in zip(text, wrapped, strict=True))


@given(text=st.text(alphabet="abcdefghijklmnop []*<>XY", max_size=300), seed=st.integers(0, 1000))
def test_typos_keep_the_length_and_the_white_space(text, seed):
    from random import Random

    wrong = _misspell(text, 50.0, Random(seed).random)
    assert len(wrong) == len(text)
    assert all(a == b or (a.islower() and b.islower()) for a, b in zip(text, wrong, strict=True))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"covariate": 1.5}, "covariate"),
        ({"concept": -0.1}, "concept"),
        ({"label": float("nan")}, "label"),
        ({"spurious": [0.1]}, "spurious"),
        ({"spurious": 2}, "spurious"),
        ({"institutions": 0}, "institutions"),
        ({"patients": 0}, "patients"),
        ({"notes_per_patient": (3, 2)}, "notes_per_patient"),
        ({"notes_per_patient": 4}, "notes_per_patient"),
        ({"bank": "other"}, "bank"),
    ],
)
def test_wrong_options_are_named_before_anything_is_written(options, named):
    with pytest.raises(UsageError, match=named):
        generate(**options)


def test_a_path_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"corpus\.path"):
        load(tmp_path)
