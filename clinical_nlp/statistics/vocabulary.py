"""Do the notes use other words, and which?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clinical_nlp.errors import UsageError
from clinical_nlp.statistics.permutation import PermutationPlan
from clinical_nlp.statistics.two_sample import TestResult, as_result, averaging, compared_groups

_CELLS_AT_ONCE = 8_000_000


@dataclass(frozen=True, slots=True)
class TokenShift:
    """How much one token adds to the divergence: bits beyond what relabelled patients give, and its two rates."""

    token: str
    excess_bits: float
    per_thousand: tuple[float, float]
    n_patients: tuple[int, int]


@dataclass(frozen=True, slots=True)
class VocabularyShift:
    """Jensen-Shannon test, Kullback-Leibler divergence as a description, and the tokens behind them."""

    jensen_shannon: TestResult
    kullback_leibler: TestResult
    tokens: tuple[TokenShift, ...]


def vocabulary_test(
    frequencies: np.ndarray,
    tokens: tuple[str, ...],
    plan: PermutationPlan,
    *,
    cells: Sequence[object] | None = None,
    n_tokens: int = 15,
    smallest_cell: int = 11,
    smoothing: float = 0.1,
) -> VocabularyShift:
    """Do the notes use other words? Divergence of the average note's token distribution, in bits.

    Every divergence of samples is above zero; what counts is its excess over relabelled patients (`effect`).

    Parameters
    ----------
    frequencies : (n_notes, v) sparse or dense; the share of each token in a note, rows sum to 1.
    tokens : v names.
    plan : the relabellings.
    cells : one label a note, such as note type and year: divergences are computed within each cell and summed with
        the cells' shares of patients as fixed weights, and so are rates. Goes with a plan over `profile_strata`.
    n_tokens : how many of the most diverging tokens to return.
    smallest_cell : a token is returned only if at least that many patients of one institution have it.
    smoothing : share of the pooled distribution mixed in before the Kullback-Leibler divergence of the other
        institution from the reference, which is infinite otherwise.

    References
    ----------
    Lin 1991, Divergence Measures Based on the Shannon Entropy, IEEE Transactions on Information Theory 37.
    Jelinek and Mercer 1980 (the smoothing).
    """
    from scipy import sparse

    notes = sparse.csr_array(frequencies)
    if notes.shape != (len(plan.note_patient), len(tokens)):
        raise UsageError(f"frequencies have shape {notes.shape}; {len(plan.note_patient)} notes, {len(tokens)} tokens")
    groups, note = compared_groups(cells, plan)
    divergence, directed = np.zeros(plan.n_permutations + 1), np.zeros(plan.n_permutations + 1)
    observed, expected = np.zeros(len(tokens)), np.zeros(len(tokens))
    rates, counts = np.zeros((2, len(tokens))), np.zeros((2, len(tokens)), dtype=int)
    at_once = max(1, _CELLS_AT_ONCE // max(1, 4 * len(tokens)))
    for inside, rows, weight in groups:
        local = np.searchsorted(rows, plan.note_patient[inside])
        mean = sparse.csr_array(
            (1.0 / np.bincount(local)[local], (local, np.arange(len(inside)))), shape=(len(rows), len(inside))
        )
        patients = sparse.csr_array(mean @ notes[inside])
        columns = patients.T.tocsr()
        total = np.asarray(patients.sum(axis=0)).ravel()
        pooled = total / len(rows)
        for start in range(0, len(divergence), at_once):
            here = slice(start, start + at_once)
            labels = plan.membership[rows, here].astype(np.float64)
            n_target = labels.sum(axis=0)
            sums = columns @ labels
            target = sums / n_target
            reference = np.maximum(total[:, None] - sums, 0) / (len(rows) - n_target)
            middle = (target + reference) / 2
            parts = (_information(target, middle) + _information(reference, middle)) / 2
            mixed = [(1 - smoothing) * side + smoothing * pooled[:, None] for side in (target, reference)]
            divergence[here] += weight * parts.sum(axis=0)
            directed[here] += weight * _information(*mixed).sum(axis=0)
            if start == 0:
                observed += weight * parts[:, 0]
                rates += weight * np.stack([reference[:, 0], target[:, 0]])
            expected += weight * parts.sum(axis=1)
    have = sparse.csr_array(averaging(plan) @ notes) > 0
    for side in (False, True):
        counts[int(side)] = np.asarray(have[plan.is_target == side].sum(axis=0)).ravel()
    expected = (expected - observed) / plan.n_permutations
    excess = observed - expected
    shown = [i for i in np.argsort(-excess, kind="stable") if counts[:, i].max() >= smallest_cell and excess[i] > 0]
    shifts = tuple(
        TokenShift(
            tokens[i],
            float(excess[i]),
            (float(1000 * rates[0, i]), float(1000 * rates[1, i])),
            (int(counts[0, i]), int(counts[1, i])),
        )
        for i in shown[:n_tokens]
    )
    note = note or "no interval: resampling patients adds divergence of its own"
    unit = "bits a token beyond relabelled patients"

    def described(name: str, values: np.ndarray) -> TestResult:
        return as_result(name, plan, values, effect=float(values[0] - values[1:].mean()), effect_unit=unit, note=note)

    return VocabularyShift(described("vocabulary", divergence), described("vocabulary_kl", directed), shifts)


def _information(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Elementwise left log2(left / right), 0 where left is 0."""
    ratio = np.divide(left, right, out=np.ones_like(left), where=(left > 0) & (right > 0))
    return left * np.log2(ratio)
