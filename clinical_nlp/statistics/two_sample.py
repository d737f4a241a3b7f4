"""What the tests of two institutions share: their result, averages within patients, and who is compared with whom.

The tests stand in modules of their own: `domain_classifier`, `mmd`, `max_t`, `ratios`, `vocabulary`, and `distances`.
Each permutes whole patients by one `PermutationPlan` and lets every patient weigh the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clinical_nlp.errors import TooFewPatientsError, UsageError
from clinical_nlp.statistics.permutation import PermutationPlan

Groups = list[tuple[np.ndarray, np.ndarray, float]]
"""Of each group of notes that are compared with each other: the notes, the rows of the plan, the weight."""


@dataclass(frozen=True, slots=True)
class TestResult:
    """One test of one comparison.

    `statistic` is what was permuted; `null_mean` and `null_sd` are over the permutations. `effect` says the same in
    a unit that means something (`effect_unit`), with an interval where a valid one exists; otherwise `low` and
    `high` are NaN and `note` says why. `n_units` counts what was permuted: patients.
    """

    __test__ = False  # not a pytest class

    name: str
    statistic: float
    p_value: float
    null_mean: float
    null_sd: float
    n_units: int
    n_notes: int
    n_permutations: int
    smallest_p: float
    effect: float
    effect_unit: str
    low: float = math.nan
    high: float = math.nan
    unit: str = "patient"
    note: str = ""


def as_result(
    name: str,
    plan: PermutationPlan,
    values: np.ndarray,
    *,
    effect: float,
    effect_unit: str,
    low: float = math.nan,
    high: float = math.nan,
    note: str = "",
) -> TestResult:
    """Return the result of a test from the statistic of every relabelling, the observed one first."""
    permuted = values[1:][np.isfinite(values[1:])]
    return TestResult(
        name=name,
        statistic=float(values[0]),
        p_value=plan.p_value(values),
        null_mean=float(permuted.mean()) if len(permuted) else math.nan,
        null_sd=float(permuted.std(ddof=1)) if len(permuted) > 1 else math.nan,
        n_units=plan.n_people,
        n_notes=len(plan.note_patient),
        n_permutations=plan.n_permutations,
        smallest_p=plan.smallest_p,
        effect=effect,
        effect_unit=effect_unit,
        low=low,
        high=high,
        note=note,
    )


def checked_features(features: np.ndarray, plan: PermutationPlan) -> np.ndarray:
    """Return (n_notes, d) float64 features, or say what is wrong with them."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) != len(plan.note_patient):
        raise UsageError(f"features have shape {features.shape}; they need one row for each of the plan's notes")
    if not np.isfinite(features).all():
        raise UsageError("features hold values that are not finite")
    return features


def patient_means(values: np.ndarray, plan: PermutationPlan) -> np.ndarray:
    """Average notes (n_notes, k) within the rows of the plan: (n_rows, k)."""
    return np.asarray(averaging(plan) @ values)


def averaging(plan: PermutationPlan) -> Any:
    """(n_rows, n_notes) sparse; multiplied with values of the notes it averages them within patients."""
    from scipy import sparse

    shape = (len(plan.patients), len(plan.note_patient))
    return sparse.csr_array((plan.note_weight, (plan.note_patient, np.arange(shape[1]))), shape=shape)


def both_sides(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the sums of (n_rows, k) values over the rows of the reference and of the other side: (2, k, columns)."""
    target = values.T @ labels
    return np.stack([values.sum(axis=0)[:, None] - target, target])


def compared_groups(cells: Sequence[object] | None, plan: PermutationPlan) -> tuple[Groups, str]:
    """The notes that are compared with each other, their rows and weight; and what the result has to say of it.

    Cells count where every relabelling has two patients on each side at least. So the choice, and the weights, which
    are the cells' shares of patients, are the same for all of them.
    """
    if cells is None:
        return [(np.arange(len(plan.note_patient)), np.arange(len(plan.patients)), 1.0)], ""
    if len(cells) != len(plan.note_patient):
        raise UsageError(f"{len(cells)} cells for {len(plan.note_patient)} notes")
    _, cell = np.unique(np.asarray(cells, dtype=str), return_inverse=True)
    found, left_out = [], 0
    for number in range(int(cell.max(initial=-1)) + 1):
        notes = np.flatnonzero(cell == number)
        rows = np.unique(plan.note_patient[notes])
        n_target = plan.membership[rows].sum(axis=0)
        if min(int(n_target.min()), len(rows) - int(n_target.max())) >= 2:
            found.append((notes, rows))
        else:
            left_out += len(notes)
    if not found:
        raise TooFewPatientsError("no cell (note type and year) has at least 2 patients on both sides; use wider cells")
    total = sum(len(rows) for _, rows in found)
    note = "no interval: approximate, since it conditions on the note's type"
    if left_out:
        note += f"; {left_out} notes of cells with too few patients are left out"
    return [(notes, rows, len(rows) / total) for notes, rows in found], note
