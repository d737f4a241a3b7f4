"""Permutations move whole patients, within strata, and the smallest p is what can be attained."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_nlp.errors import InputError, TooFewPatientsError, UsageError
from clinical_nlp.statistics.permutation import PermutationPlan, holm

NOTES = st.lists(st.tuples(st.integers(0, 15), st.integers(0, 2)), min_size=1, max_size=60)


def plan_of(sizes: tuple[int, int], *, notes: int = 2, **options: object) -> PermutationPlan:
    patients = [f"{side}{i}" for side, size in zip("ab", sizes, strict=True) for i in range(size)]
    ids = [patient for patient in patients for _ in range(notes)]
    return PermutationPlan(ids, [patient[0] for patient in ids], **options)


@settings(deadline=None, max_examples=50)
@given(NOTES)
def test_every_relabelling_keeps_the_number_of_patients(rows):
    ids = ["a-1", "a-2", "b-1", "b-2"] + [f"{'ab'[patient % 2]}{patient}" for patient, _ in rows]
    strata = [0, 0, 0, 0] + [patient % 3 for patient, _ in rows]
    plan = PermutationPlan(ids, [i[0] for i in ids], strata=strata, n_permutations=20)
    assert np.array_equal(plan.membership[:, 0], plan.is_target)
    for stratum in set(plan.patient_stratum):
        inside = plan.membership[plan.patient_stratum == stratum]
        assert (inside.sum(axis=0) == inside[:, 0].sum()).all()
    assert plan.note_weight.sum() == pytest.approx(len(plan.patients))


def test_the_reference_is_column_zero_false():
    plan = plan_of((3, 4), reference="b")
    assert plan.names == ("b", "a")
    assert plan.n_patients == (4, 3)
    assert plan.is_target.sum() == 3


def test_relabellings_are_uniform():
    plan = plan_of((2, 2), n_permutations=6000)
    seen = {tuple(column): 0 for column in itertools.product([False, True], repeat=4) if sum(column) == 2}
    for column in plan.membership[:, 1:].T:
        seen[tuple(column.tolist())] += 1
    assert all(abs(count - 1000) < 5 * math.sqrt(1000) for count in seen.values())


@pytest.mark.parametrize(
    ("sizes", "n_permutations", "smallest"),
    [((3, 3), 999, 2 / 20), ((2, 4), 999, 1 / 15), ((40, 40), 999, 1 / 1000), ((1000, 3000), 199, 1 / 200)],
)
def test_smallest_p(sizes, n_permutations, smallest):
    assert plan_of(sizes, n_permutations=n_permutations).smallest_p == pytest.approx(smallest)


def test_a_patient_on_both_sides_is_refused_with_the_remedy_and_not_named():
    with pytest.raises(InputError, match=r"1 of 3 patients.*patient_in_two=drop") as caught:
        PermutationPlan(["secret", "secret", "p", "q"], ["a", "b", "a", "b"])
    assert "secret" not in str(caught.value)


def test_a_paired_plan_swaps_within_patients_and_exchanges_the_others():
    ids = ["b1", "b2", "b3", "b1", "b2", "b3", "x", "y", "z", "x"]
    sides = ["k", "k", "k", "h", "h", "h", "h", "h", "k", "h"]
    plan = PermutationPlan(ids, sides, n_permutations=4000, paired=True)
    assert plan.n_people == 6
    assert plan.n_patients == (5, 4)
    assert [str(plan.patients[row]) for row in plan.twins[:, 0]] == ["b1", "b2", "b3"]
    assert plan.is_target[plan.twins].tolist() == [[False, True]] * 3
    first, second = plan.membership[plan.twins[:, 0]], plan.membership[plan.twins[:, 1]]
    assert (first ^ second).all()
    assert first[:, 1:].mean(axis=1) == pytest.approx([0.5] * 3, abs=0.04)
    assert np.corrcoef(first[:, 1:])[np.triu_indices(3, 1)] == pytest.approx([0.0] * 3, abs=0.08)
    alone = np.setdiff1d(np.arange(9), plan.twins)
    assert (plan.membership[alone].sum(axis=0) == 1).all()
    assert plan.membership[alone, 1:].mean(axis=1) == pytest.approx([1 / 3] * 3, abs=0.04)
    assert plan.note_weight[[6, 9]].tolist() == [0.5, 0.5]
    assert plan.smallest_p == pytest.approx(1 / (8 * 3))


def test_pairs_alone_have_a_mirrored_relabelling():
    plan = PermutationPlan(list("pqrpqr"), list("aaabbb"), n_permutations=999, paired=True)
    assert plan.smallest_p == pytest.approx(2 / 8)


def test_what_cannot_be_compared_is_said():
    with pytest.raises(UsageError, match="exactly 2 institutions \\(got 3\\)"):
        PermutationPlan(["p", "q", "r"], ["a", "b", "c"])
    with pytest.raises(UsageError, match="reference 'z'"):
        plan_of((2, 2), reference="z")
    with pytest.raises(TooFewPatientsError, match="got 1 and 5"):
        plan_of((1, 5))
    with pytest.raises(InputError, match="same for all notes of a patient"):
        plan_of((2, 2), strata=[0, 1, 0, 0, 0, 0, 0, 0])
    with pytest.raises(UsageError, match="n_permutations"):
        plan_of((2, 2), n_permutations=0)


def test_p_counts_the_observed_and_ties():
    plan = plan_of((3, 3), n_permutations=9)
    assert plan.p_value(np.array([5.0, *range(9)])) == pytest.approx((1 + 4) / 10)
    assert plan.p_value(np.full(10, 3.0)) == 1.0
    assert plan.p_value(np.array([1 / 3, *[1 / 3 - 1e-16] * 9])) == 1.0
    assert math.isnan(plan.p_value(np.array([math.nan, *range(9)])))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    adjusted = holm([0.01, math.nan])
    assert adjusted[0] == pytest.approx(0.02)
    assert math.isnan(adjusted[1])
