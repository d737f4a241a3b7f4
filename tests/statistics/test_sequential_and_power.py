"""Alarms a year stay within the level, and the number of patients that is named does what it promises."""

import math

import numpy as np
import pytest

from clinical_nlp.errors import UsageError
from clinical_nlp.statistics.domain_classifier import domain_classifier_test
from clinical_nlp.statistics.permutation import PermutationPlan
from clinical_nlp.statistics.power import power_of_classifier, power_of_difference
from clinical_nlp.statistics.ratios import length_test
from clinical_nlp.statistics.sequential import control_alarms, permutations_for


def test_looks_by_hand():
    looks = control_alarms([0.004, 0.005, math.nan, 0.9], [2024, 2024, 2024, 2025], looks_per_year=12)
    assert [look.alarm for look in looks] == [True, False, False, False]
    assert [look.adjusted_p for look in looks[:2]] == pytest.approx([0.048, 0.06])
    assert math.isnan(looks[2].adjusted_p)
    assert looks[2].note == "no p-value"
    assert looks[3].adjusted_p == 1.0
    assert all((look.adjusted_p <= 0.05) == look.alarm for look in looks)


def test_what_could_not_alarm_is_said_and_the_permutations_that_can():
    assert permutations_for(12) == 239
    assert control_alarms([1 / 240], [2024])[0].alarm
    look = control_alarms([0.01], [2024], smallest_p=[0.01])[0]
    assert "could not alarm" in look.note
    assert "239" in look.note


def test_more_looks_than_planned_are_refused():
    with pytest.raises(UsageError, match=r"13 looks in 2024.*looks_per_year=13"):
        control_alarms([0.5] * 13, [2024] * 13)
    with pytest.raises(UsageError, match="2 p-values for 1 years"):
        control_alarms([0.5, 0.5], [2024])
    with pytest.raises(UsageError, match="level"):
        control_alarms([0.5], [2024], level=0)


def test_false_alarms_a_year_with_one_reference_for_all_months():
    """Looks share their reference, as in use; bare looks at 5 % alarm in far more years."""
    generator = np.random.default_rng(0)
    years, bare, controlled = 400, 0, 0
    for _ in range(years):
        reference, months = generator.normal(size=60), generator.normal(size=(12, 20))
        draws = 299
        looks = []
        for month in months:
            pooled = np.concatenate([reference, month])
            columns = np.stack([generator.permutation(pooled) for _ in range(draws)])
            permuted = np.abs(columns[:, :60].mean(1) - columns[:, 60:].mean(1))
            looks.append((1 + (permuted >= abs(reference.mean() - month.mean())).sum()) / (draws + 1))
        bare += min(looks) <= 0.05
        controlled += any(look.alarm for look in control_alarms(looks, [2024] * 12))
    assert controlled / years <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / years)
    assert bare / years > 0.25


def lengths(generator, patients, ratio):
    ids, sides, values = [], [], []
    for side in range(2):
        for patient in range(patients):
            n = generator.integers(1, 8)
            values.append(
                np.exp(5 + 0.4 * generator.normal() + 0.4 * generator.normal(size=n)) * (ratio if side else 1)
            )
            ids += [f"{side}-{patient}"] * n
            sides += [f"h{side}"] * n
    return np.concatenate(values), ids, sides


def test_the_patients_named_find_the_difference_as_often_as_promised():
    generator = np.random.default_rng(1)
    pilot, ids, sides = lengths(generator, 150, 1.0)
    plan = PermutationPlan(ids, sides, n_permutations=99)
    power = power_of_difference(np.log(pilot), plan, effect=math.log(1.3), effect_unit="log ratio of words")
    assert power.enough
    n = int(power.patients_needed)
    assert 20 < n < 80
    runs, found = 300, 0
    for run in range(runs):
        values, ids, sides = lengths(generator, n, 1.3)
        found += length_test(values, PermutationPlan(ids, sides, n_permutations=99, seed=run)).p_value <= 0.05
    assert found / runs == pytest.approx(0.8, abs=3 * math.sqrt(0.8 * 0.2 / runs) + 0.03)


def test_too_few_patients_are_told_so_with_the_number_that_would_do():
    generator = np.random.default_rng(2)
    values, ids, sides = lengths(generator, 8, 1.0)
    plan = PermutationPlan(ids, sides, n_permutations=99)
    power = power_of_difference(np.log(values), plan, effect=math.log(1.3), effect_unit="log ratio of words")
    assert not power.enough
    assert power.patients_needed > 8
    assert power.sentence.startswith("too few patients to tell: with 8 and 8 patients")
    assert f"about {power.patients_needed:.0f} in each institution" in power.sentence
    again = power_of_difference(np.log(values), plan, effect=power.detectable, effect_unit="")
    assert again.found_now == pytest.approx(0.8, abs=1e-6)
    tiny = PermutationPlan(list("abcd"), list("xxyy"), n_permutations=99)
    nothing = power_of_difference(np.array([1.0, 2.0, 1.5, 3.0]), tiny, effect=50.0, effect_unit="")
    assert nothing.found_now == 0.0, "with 2 and 2 patients no p-value is within 5 %"
    assert nothing.patients_needed >= 4


def test_power_of_the_classifier_scales_with_patients():
    generator = np.random.default_rng(3)
    ids = [f"{side}{i}" for side in "ab" for i in range(40) for _ in range(3)]
    plan = PermutationPlan(ids, [i[0] for i in ids], n_permutations=299)
    result = domain_classifier_test(generator.normal(size=(240, 4)), plan)
    small, large = (power_of_classifier(result, plan, effect=effect) for effect in (0.55, 0.6))
    assert small.patients_needed == pytest.approx(4 * large.patients_needed, rel=0.05)
    at_limit = power_of_classifier(result, plan, effect=large.detectable)
    assert at_limit.found_now == pytest.approx(0.8)
    assert at_limit.patients_needed == pytest.approx(40, abs=1)


def test_nothing_varies_is_nan_with_the_reason():
    plan = PermutationPlan(list("abcdef"), list("xxxyyy"), n_permutations=19)
    power = power_of_difference(np.ones(6), plan, effect=1.0, effect_unit="words")
    assert math.isnan(power.patients_needed)
    assert "does not vary" in power.sentence
    power = power_of_classifier(domain_classifier_test(np.ones((6, 2)), plan), plan)
    assert math.isnan(power.found_now)


def test_what_does_not_fit_is_said():
    plan = PermutationPlan(list("abcd"), list("xxyy"), n_permutations=19)
    with pytest.raises(UsageError, match="other than 0"):
        power_of_difference(np.arange(4.0), plan, effect=0.0, effect_unit="")
    with pytest.raises(UsageError, match="finite"):
        power_of_difference(np.full(4, math.nan), plan, effect=1.0, effect_unit="")
    with pytest.raises(UsageError, match="0 < level < power < 1"):
        power_of_difference(np.arange(4.0), plan, effect=1.0, effect_unit="", power=0.01)
    with pytest.raises(UsageError, match="AUC between"):
        power_of_classifier(domain_classifier_test(np.zeros((4, 1)), plan), plan, effect=0.4)
