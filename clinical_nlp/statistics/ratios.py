"""Are notes longer, do patients have more of them? Ratios of the geometric means of a positive quantity.

How many notes a patient has is a difference of its own (`utilisation_test`). With very unequal numbers of notes the
tests over all notes are approximate; a plan over one random note a patient is exact, and a report gives both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from clinical_nlp.errors import UsageError
from clinical_nlp.statistics.max_t import absolute_t, max_t_test, studentised
from clinical_nlp.statistics.permutation import PermutationPlan
from clinical_nlp.statistics.two_sample import TestResult, as_result, patient_means

_FEWEST_FOR_T = 5


def ratio_test(
    name: str, values: np.ndarray, plan: PermutationPlan, *, effect_unit: str, cells: Sequence[object] | None = None
) -> TestResult:
    """Ratio of the geometric means of a positive quantity, one value a patient, two-sided.

    The permuted statistic is Welch's |t| of the patients' mean logarithms: studentised, it keeps its level when the
    spread of patients differs between the institutions, as it does when one writes more notes a patient.

    Parameters
    ----------
    name : of the result.
    values : (n_notes,) positive; averaged on the logarithmic scale within each patient.
    plan : the relabellings.
    effect_unit : words for the effect, e.g. "times as many words a note".
    cells : see `max_t_test`.

    Returns
    -------
    TestResult; `effect` is other / reference, with Welch's interval.

    References
    ----------
    Chung and Romano 2013, Exact and asymptotically robust permutation tests, Annals of Statistics 41.
    """
    from scipy import stats

    values = np.asarray(values, dtype=np.float64)
    if values.shape != plan.note_patient.shape or not (values > 0).all():
        raise UsageError(f"{name}: values must be positive, one for each of the plan's notes")
    if cells is not None:
        measure = max_t_test(np.log(values)[:, None], [name], plan, cells=cells, name=name)
        return replace(
            measure.test,
            effect=math.exp(measure.measures[0].difference),
            effect_unit=effect_unit,
            note=measure.measures[0].note,
        )
    logs = patient_means(np.log(values)[:, None], plan)
    difference, error, freedom = (found[0] for found in studentised(logs, plan))
    low = high = math.nan
    note = ""
    if error[0] == 0:
        note = "no interval: the patients of each institution are all alike"
    elif min(plan.n_patients) < _FEWEST_FOR_T:
        note = f"no interval: fewer than {_FEWEST_FOR_T} patients in an institution"
    if not note:
        reach = stats.t.ppf(0.975, freedom[0]) * error[0]
        low, high = math.exp(difference[0] - reach), math.exp(difference[0] + reach)
    statistic = absolute_t(difference, error)
    return as_result(
        name, plan, statistic, effect=math.exp(difference[0]), effect_unit=effect_unit, low=low, high=high, note=note
    )


def length_test(words: np.ndarray, plan: PermutationPlan, *, cells: Sequence[object] | None = None) -> TestResult:
    """Are the notes longer? `words` (n_notes,) counts words a note, at least 1; see `ratio_test`."""
    return ratio_test("length", words, plan, effect_unit="times as many words a note", cells=cells)


def utilisation_test(notes_per_patient: np.ndarray, plan: PermutationPlan) -> TestResult:
    """Do patients have more notes? `notes_per_patient` (n_notes,) repeats each patient's count; see `ratio_test`."""
    return ratio_test("utilisation", notes_per_patient, plan, effect_unit="times as many notes a patient")
