"""What cannot be tested is one clear error or a stated NaN, the same from every test."""

import math

import numpy as np
import pytest

from clinical_nlp.errors import ClinicalNlpError, InputError, TooFewPatientsError, UsageError
from clinical_nlp.statistics.distances import calibration_shift_test, coral_test, frechet_test, histogram_test
from clinical_nlp.statistics.domain_classifier import domain_classifier_test, mlp_classifier_test
from clinical_nlp.statistics.max_t import max_t_test, output_shift_test
from clinical_nlp.statistics.mmd import mmd_test
from clinical_nlp.statistics.permutation import PermutationPlan
from clinical_nlp.statistics.ratios import ratio_test

ON_FEATURES = {
    "domain_classifier": domain_classifier_test,
    "mmd": mmd_test,
    "mmd_random_features": lambda features, plan: mmd_test(features, plan, exact_up_to=0, n_random_features=12),
    "coral": coral_test,
    "frechet": frechet_test,
    "mlp": mlp_classifier_test,
}


def plan_of(sizes=(25, 25), notes=2, **options):
    ids = [f"{side}{i}" for side, size in zip("ab", sizes, strict=True) for i in range(size) for _ in range(notes)]
    return PermutationPlan(ids, [i[0] for i in ids], n_permutations=19, **options)


@pytest.mark.parametrize(
    ("ids", "sides", "error", "message"),
    [
        (["p", "q"], ["a", "a"], UsageError, r"exactly 2 institutions \(got 1\)"),
        ([], [], UsageError, r"exactly 2 institutions \(got 0\)"),
        (
            ["p", "q", "r"],
            ["a", "a", "b"],
            TooFewPatientsError,
            r"at least 2 patients in each institution \(got 2 and 1",
        ),
        (["p", None, "", math.nan], list("aabb"), InputError, "3 of 4 notes have no patient id: fill the column"),
        (["p", "q", "r", "s"], ["a", "a", "b", None], InputError, "1 of 4 notes have no institution"),
        (["p", "q"], ["a", "b", "b"], UsageError, "2 patient ids for 3 institutions"),
        (["secret", "q", "secret", "s"], list("aabb"), InputError, "1 of 3 patients have notes in both institutions"),
    ],
)
def test_what_is_no_comparison_is_one_error(ids, sides, error, message):
    with pytest.raises(error, match=message) as caught:
        PermutationPlan(ids, sides)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ON_FEATURES)
def test_constant_embeddings_find_nothing_and_say_so(name):
    result = ON_FEATURES[name](np.full((100, 4), 0.1), plan_of())
    assert result.p_value == 1.0
    assert math.isnan(result.effect) or result.effect in (0.5, pytest.approx(0.0, abs=1e-9))
    assert not math.isnan(result.effect) or result.note


@pytest.mark.parametrize("name", ON_FEATURES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_that_are_not_finite_are_refused(name, value):
    features = np.random.default_rng(0).normal(size=(100, 4))
    features[37, 2] = value
    with pytest.raises(UsageError, match="not finite"):
        ON_FEATURES[name](features, plan_of())


@pytest.mark.parametrize("name", ON_FEATURES)
def test_embeddings_of_other_notes_are_refused(name):
    with pytest.raises(ClinicalNlpError, match="one row for each"):
        ON_FEATURES[name](np.zeros((99, 4)), plan_of())
    with pytest.raises(ClinicalNlpError, match="one row for each"):
        ON_FEATURES[name](np.zeros(100), plan_of())


@pytest.mark.parametrize("name", ON_FEATURES)
def test_four_patients_a_side_run_without_an_interval(name):
    features = np.random.default_rng(0).normal(size=(16, 4))
    result = ON_FEATURES[name](features, plan_of((4, 4)))
    assert 0 < result.p_value <= 1
    assert result.smallest_p <= result.p_value
    assert math.isnan(result.low)
    assert math.isnan(result.high)
    assert result.note


def test_a_quantity_that_is_nan_everywhere_is_nan_with_the_reason():
    values = np.column_stack([np.arange(100.0), np.full(100, math.nan)])
    first, second = max_t_test(values, ["words", "nothing"], plan_of()).measures
    assert first.p_value <= 0.05
    assert math.isnan(second.p_value)
    assert second.note == "measured on fewer than 2 patients of an institution"
    assert second.n_notes == 0
    nothing = max_t_test(values[:, 1:], ["nothing"], plan_of())
    assert math.isnan(nothing.test.p_value)


def test_outputs_that_are_missing_are_left_out_of_their_average():
    scores = np.random.default_rng(0).normal(size=(100, 1))
    scores[::4] = math.nan
    found = output_shift_test(scores, ["risk"], plan_of())
    assert found.measures[0].n_notes == 75
    assert not math.isnan(found.test.p_value)


def test_other_quantities_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="must be positive"):
        ratio_test("length", np.zeros(100), plan_of(), effect_unit="")
    with pytest.raises(UsageError, match="between 0 and 1"):
        calibration_shift_test(np.full(100, math.nan), np.zeros(100), plan_of())
    assert histogram_test([None] * 100, plan_of()).jensen_shannon.p_value == 1.0


def test_a_paired_plan_needs_no_patient_seen_twice_but_two_on_each_side():
    assert len(plan_of(paired=True).twins) == 0
    with pytest.raises(TooFewPatientsError, match="got 1 and 1"):
        PermutationPlan(["p", "p"], ["a", "b"], paired=True)
