"""Are there enough patients to tell, and if not, how many would do?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from clinical_nlp.errors import UsageError
from clinical_nlp.statistics.max_t import studentised
from clinical_nlp.statistics.permutation import PermutationPlan
from clinical_nlp.statistics.two_sample import TestResult, patient_means

_MOST = 10_000_000


@dataclass(frozen=True, slots=True)
class Power:
    """What the patients at hand can show.

    `found_now` is the chance that the effect is found with the patients at hand, `patients_needed` in each
    institution find it with the chance `power`, and `detectable` is the effect that the patients at hand find with
    that chance. All three are NaN, with the reason in `note`, where nothing is known of how patients vary.
    """

    effect: float
    effect_unit: str
    n_patients: tuple[int, int]
    found_now: float
    patients_needed: float
    detectable: float
    power: float
    level: float
    note: str = ""

    @property
    def enough(self) -> bool:
        """Whether the patients at hand do."""
        return self.found_now >= self.power

    @property
    def sentence(self) -> str:
        """The same in words."""
        have = f"{self.n_patients[0]} and {self.n_patients[1]} patients"
        effect = f"{self.effect:.3g} {self.effect_unit}"
        if math.isnan(self.found_now):
            return f"whether {have} are enough is not known: {self.note}"
        if self.enough:
            return f"{have} are enough: {effect} would be found with a chance of {self.found_now:.0%}"
        needed = f"about {self.patients_needed:.0f} in each institution would do"
        return (
            f"too few patients to tell: with {have}, {effect} would be found with a chance of {self.found_now:.0%}; "
            f"{needed} (chance {self.power:.0%})"
        )


def power_of_classifier(
    result: TestResult, plan: PermutationPlan, *, effect: float = 0.6, power: float = 0.8, level: float = 0.05
) -> Power:
    """Power of `domain_classifier_test` where its classifier reaches an AUC of `effect`.

    The spread over relabellings already knows how alike the notes of a patient are and how many each has; it shrinks
    with the square root of the number of patients. More patients also train a better classifier, so that the same
    difference between the institutions needs fewer than a fixed AUC says.

    Parameters
    ----------
    result : of the test.
    plan : that it ran on.
    effect : the AUC on unseen patients that is to be found, above 0.5.
    power : wanted chance of finding it.
    level : of the test (one-sided); divide it by the number of tests where Holm's adjustment follows.
    """
    _check(power, level)
    if not 0.5 < effect < 1:
        raise UsageError(f"effect must be an AUC between 0.5 and 1 (got {effect})")
    now = _harmonic(plan.n_patients)
    unit = "AUC of the domain classifier"
    if not result.null_sd > 0:
        return _unknown(effect, unit, plan, power, level, "the classifier's score does not vary")
    # An AUC can be told sooner than its spread at 0.5 says when it is near 1; the normal form is for the middle.
    quantiles = _normal(1 - level) + _normal(power)
    needed = now * (quantiles * result.null_sd / (effect - 0.5)) ** 2
    return Power(
        effect,
        unit,
        plan.n_patients,
        _chance((effect - 0.5) / result.null_sd - _normal(1 - level), plan, level),
        float(_reachable(math.ceil(needed), level)),
        min(1.0, 0.5 + quantiles * result.null_sd),
        power,
        level,
    )


def power_of_difference(
    values: np.ndarray,
    plan: PermutationPlan,
    *,
    effect: float,
    effect_unit: str,
    power: float = 0.8,
    level: float = 0.05,
) -> Power:
    """Power of the two-sided test of a difference in means, as `max_t_test` and `ratio_test` make it.

    Parameters
    ----------
    values : (n_notes,) the quantity; its logarithm for a ratio, `effect` then being the logarithm of the ratio.
    plan : the patients at hand; in a paired plan the numbers are of pairs.
    effect : the difference that is to be found, in the unit of the values; its sign does not matter.
    effect_unit : words for it.
    power, level : see `power_of_classifier`.

    References
    ----------
    Welch 1938, The significance of the difference between two means when the population variances are unequal,
    Biometrika 29; power from the noncentral t distribution with its degrees of freedom.
    """
    _check(power, level)
    values = np.asarray(values, dtype=np.float64)
    if values.shape != plan.note_patient.shape or not np.isfinite(values).all():
        raise UsageError("values must be finite, one for each of the plan's notes")
    if effect == 0 or not math.isfinite(effect):
        raise UsageError(f"effect must be a difference other than 0 (got {effect})")
    observed = PermutationPlan(
        plan.patient_ids, plan.institutions, plan.names[0], n_permutations=1, seed=plan.seed, paired=plan.paired
    )
    _, errors, freedom = studentised(patient_means(values[:, None], plan), observed)
    error, wanted = float(errors[0, 0]), abs(effect)
    if not error > 0:
        return _unknown(wanted, effect_unit, plan, power, level, "the quantity does not vary between patients")
    now = _harmonic(plan.n_patients)
    sides = 1 if len(plan.twins) else 2

    def chance(difference: float, patients: float, degrees: float) -> float:
        from scipy import stats

        noncentral = difference / (error * math.sqrt(now / patients))
        critical = stats.t.ppf(1 - level / 2, degrees)
        return float(stats.nct.sf(critical, degrees, noncentral) + stats.nct.cdf(-critical, degrees, noncentral))

    low, high = 2, 4
    while high < _MOST and chance(wanted, high, sides * (high - 1)) < power:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if chance(wanted, middle, sides * (middle - 1)) < power else (low, middle)
    small, large = 0.0, error
    while chance(large, now, float(freedom[0, 0])) < power:
        small, large = large, 2 * large
    for _ in range(60):
        middle_effect = (small + large) / 2
        if chance(middle_effect, now, float(freedom[0, 0])) < power:
            small = middle_effect
        else:
            large = middle_effect
    return Power(
        wanted,
        effect_unit,
        plan.n_patients,
        chance(wanted, now, float(freedom[0, 0])) if plan.smallest_p <= level else 0.0,
        float(_reachable(high, level)),
        large,
        power,
        level,
    )


def _check(power: float, level: float) -> None:
    if not 0 < level < power < 1:
        raise UsageError(f"level and power must satisfy 0 < level < power < 1 (got {level} and {power})")


def _unknown(effect: float, unit: str, plan: PermutationPlan, power: float, level: float, why: str) -> Power:
    return Power(effect, unit, plan.n_patients, math.nan, math.nan, math.nan, power, level, why)


def _harmonic(n_patients: tuple[int, int]) -> float:
    """Patients in each of two equal institutions that would tell as much."""
    return 2 / (1 / n_patients[0] + 1 / n_patients[1])


def _normal(probability: float) -> float:
    from scipy import stats

    return float(stats.norm.ppf(probability))


def _chance(above: float, plan: PermutationPlan, level: float) -> float:
    from scipy import stats

    # Relabellings too few for any p-value within the level find nothing, however large the effect.
    return float(stats.norm.cdf(above)) if plan.smallest_p <= level else 0.0


def _reachable(patients: int, level: float) -> int:
    """At least so many that some relabelling of equal sides is as rare as the level asks."""
    while patients < 30 and 2 / math.comb(2 * patients, patients) > level:
        patients += 1
    return patients
