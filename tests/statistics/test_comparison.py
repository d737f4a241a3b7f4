"""A comparison: who gets a verdict, on what it rests, and what a different mix of notes does to it."""

import math

import numpy as np
import pytest

from clinical_nlp.notes.schema import Note
from clinical_nlp.statistics.comparison import CONFIRMATORY, compare, decide, permutations_needed
from clinical_nlp.statistics.domain_classifier import domain_classifier_test
from clinical_nlp.statistics.mmd import mmd_test
from clinical_nlp.statistics.permutation import PermutationPlan, holm, profile_strata
from clinical_nlp.statistics.sample import NoteSampler
from clinical_nlp.statistics.text_measures import hashed_features

WORDS = ["fever", "cough", "pain", "denies", "stable", "plan", "today", "follow", "up", "noted"]


def sampled(seed, *, patients=(15, 15), notes=(3, 3), style=0.0):
    generator = np.random.default_rng(seed)
    sampler = NoteSampler(seed=seed)
    for side in range(2):
        for patient in range(patients[side]):
            own = generator.dirichlet(np.full(10, 5.0))
            for note in range(notes[side]):
                text = " ".join(generator.choice(WORDS, 40, p=own))
                if side and generator.random() < style:
                    text = "___ " + text.replace("denies", "neg for")
                sampler.add(Note(f"{side}-{patient}-{note}", f"{side}-{patient}", f"h{side}", text, "s"))
    return sampler.finish()


def compared(sample, **options):
    def represent(notes):
        return hashed_features([note.text for note in notes], dimensions=16)

    found = compare(sample, reference="h0", other="h1", represent=represent, n_permutations=99, **options)
    return decide([found])[0]


def test_a_style_is_found_and_identical_institutions_mostly_are_not():
    assert compared(sampled(0, style=0.8)).verdict == "differ"
    false = sum(compared(sampled(seed)).verdict == "differ" for seed in range(1, 9))
    assert false <= 8 * 0.05 + 3 * math.sqrt(8 * 0.05 * 0.95)


def test_eleven_patients_get_no_verdict_however_different():
    found = compared(sampled(0, patients=(11, 40), style=1.0))
    assert found.verdict == "too_few"
    assert found.adjusted == ()
    assert set(CONFIRMATORY) <= set(found.tests)


def test_one_patient_gets_no_test():
    found = compared(sampled(0, patients=(1, 40)))
    assert (found.verdict, found.tests, found.utilisation) == ("too_few", {}, None)


def test_unequal_numbers_of_notes_move_the_verdict_to_one_note_a_patient():
    found = compared(sampled(3, notes=(2, 9)))
    assert found.utilisation.p_value <= 0.05
    assert found.basis == "one_note"
    assert {test.n_notes for test in found.tests.values()} == {30}
    assert found.verdict == "not_distinguished"


def test_holm_spans_all_comparisons_with_a_verdict():
    pair = compared(sampled(0, style=0.3))
    alone, twice, beside_few = (
        decide([pair]),
        decide([pair, pair]),
        decide([pair, compared(sampled(1, patients=(5, 5)))]),
    )
    assert dict(beside_few[0].adjusted) == dict(alone[0].adjusted)
    smallest = min(CONFIRMATORY, key=lambda name: pair.tests[name].p_value)
    assert dict(alone[0].adjusted)[smallest] == pytest.approx(min(1, len(CONFIRMATORY) * pair.tests[smallest].p_value))
    assert dict(twice[0].adjusted)[smallest] == pytest.approx(
        min(1, 2 * len(CONFIRMATORY) * pair.tests[smallest].p_value)
    )


def test_profile_strata_keep_a_different_mix_of_note_types_from_being_called_drift():
    """Two hospitals whose notes of one type are alike, but that write the types in other shares."""
    runs, plain, stratified = 25, 0, 0
    centres = np.random.default_rng(1).normal(size=(3, 6)) * 1.5
    for seed in range(runs):
        generator = np.random.default_rng(seed)
        ids, sides, kinds, features = [], [], [], []
        for side in range(2):
            for patient in range(40):
                share = np.exp(np.array([1.2, 0, -1.2]) * (side - 0.5) + generator.normal(size=3) * 0.8)
                types = generator.choice(3, 5, p=share / share.sum())
                own = generator.normal(size=6) * math.sqrt(0.3)
                features.append(centres[types] + own + generator.normal(size=(5, 6)) * math.sqrt(0.7))
                ids += [f"{side}-{patient}"] * 5
                sides += [f"h{side}"] * 5
                kinds += [str(kind) for kind in types]
        x = np.concatenate(features)
        within = x - np.stack([x[np.array(kinds) == kind].mean(axis=0) for kind in kinds])
        strata = profile_strata(ids, sides, kinds, np.full(len(ids), 5))
        plain += mmd_test(x, PermutationPlan(ids, sides, n_permutations=99, seed=seed)).p_value <= 0.05
        plan = PermutationPlan(ids, sides, strata=strata, n_permutations=99, seed=seed)
        stratified += mmd_test(within, plan).p_value <= 0.05
    assert plain >= 0.9 * runs
    assert stratified / runs <= 0.07 + 3 * math.sqrt(0.07 * 0.93 / runs)


@pytest.mark.parametrize("n_comparisons", [1, 2, 30])
def test_enough_relabellings_for_a_finding_to_be_possible(n_comparisons):
    smallest = 1 / (permutations_needed(n_comparisons) + 1)
    others = [1.0] * (len(CONFIRMATORY) * n_comparisons - 1)
    assert holm([smallest, *others])[0] <= 0.05
    assert holm([1 / permutations_needed(n_comparisons), *others])[0] > 0.05


def test_within_cells_the_comparison_is_that_of_its_tests_on_cells_and_strata():
    """One mechanism: the same cells, strata and plan that the tests take."""
    sample = sampled(0, style=0.8)
    cells = ["letter" if note.note_id.endswith("0") else "note" for note in sample.notes]
    found = compared(sample, cells=cells)
    assert found.verdict == "differ"
    sides = ["reference" if name == "h0" else "other" for name in sample.institutions]
    strata = profile_strata(sample.patient_ids, sides, cells, sample.notes_of_patient)
    plan = PermutationPlan(sample.patient_ids, sides, reference="reference", strata=strata, n_permutations=99)
    vectors = hashed_features([note.text for note in sample.notes], dimensions=16)
    alone = mmd_test(vectors, plan, cells=cells)
    assert found.tests["mmd"] == alone
    assert found.tests["domain_classifier"] == domain_classifier_test(vectors, plan, cells=cells)
    assert all("approximate" in item.shift.note for item in found.units)
    assert found.further == ()


def test_where_no_cell_has_patients_of_both_sides_there_is_no_verdict_but_the_reason():
    sample = sampled(0, style=0.8)
    found = compared(sample, cells=list(sample.institutions))
    assert (found.verdict, found.tests, found.claims, found.power) == ("too_few", {}, (), None)
    assert "wider cells" in found.note


def test_second_opinions_and_power_stand_beside_the_verdict():
    found = compared(sampled(0, style=0.8))
    assert [test.name for test in found.further] == ["mlp_classifier", "coral", "frechet", "length_psi"]
    assert found.power.n_patients == (15, 15)
    assert found.power.level == pytest.approx(0.05 / len(CONFIRMATORY))
    assert found.power.found_now < 0.8
    assert 0.6 < found.power.detectable < 1
    assert found.power.patients_needed > 15
    more = compared(sampled(0, patients=(60, 60))).power
    assert more.found_now > found.power.found_now
    assert more.detectable < found.power.detectable
