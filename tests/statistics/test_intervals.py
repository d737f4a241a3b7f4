"""Intervals: equal to a naive bootstrap, cover what they promise, and never invent a value."""

import math

import numpy as np
import pytest

from clinical_nlp.errors import UsageError
from clinical_nlp.statistics.intervals import by_patient, patient_bootstrap


def micro_f1(counts: np.ndarray) -> np.ndarray:
    return 2 * counts[..., 0] / (2 * counts[..., 0] + counts[..., 1] + counts[..., 2])


def clustered_counts(n_patients: int, generator: np.random.Generator) -> np.ndarray:
    """True positives, false positives, false negatives of patients that differ in how hard they are."""
    gold = generator.geometric(1 / 6, n_patients) + 1
    right = generator.binomial(gold, generator.beta(4.5, 1.1, n_patients))
    false = generator.binomial(gold, 1 - generator.beta(4.5, 1.1, n_patients))
    return np.stack([right, false, gold - right], axis=1).astype(float)


def test_notes_are_summed_within_patients_whatever_their_order():
    counts = np.arange(8.0).reshape(4, 2)
    summed = by_patient(["b", "a", "b", "a"], counts)
    assert summed.tolist() == [[2 + 6, 3 + 7], [0 + 4, 1 + 5]]
    order = [3, 0, 2, 1]
    again = by_patient([["b", "a", "b", "a"][i] for i in order], counts[order])
    assert again.tolist() == summed.tolist()


def test_rows_must_match_notes():
    with pytest.raises(UsageError, match="one row for each of 3 notes"):
        by_patient(["a", "b", "c"], np.zeros((2, 2)))


def test_a_resample_is_the_sum_over_drawn_patients():
    counts = clustered_counts(40, np.random.default_rng(1))
    seen: list[np.ndarray] = []

    def keep(summed: np.ndarray) -> np.ndarray:
        seen.append(summed)
        return micro_f1(summed)

    patient_bootstrap(counts, keep, n_notes=40, n_resamples=50, seed=3)
    drawn = np.random.default_rng(3).integers(0, 40, size=(50, 40))
    assert np.array_equal(seen[-1], np.stack([counts[row].sum(axis=0) for row in drawn]))


def test_chunks_change_nothing(monkeypatch):
    counts = clustered_counts(30, np.random.default_rng(2))
    whole = patient_bootstrap(counts, micro_f1, n_notes=30)
    monkeypatch.setattr("clinical_nlp.statistics.intervals._CELLS_AT_ONCE", 100)
    assert patient_bootstrap(counts, micro_f1, n_notes=30) == whole


def test_the_interval_covers_the_truth():
    generator = np.random.default_rng(5)
    truth = float(micro_f1(clustered_counts(300_000, generator).sum(axis=0)))
    runs = 250
    inside = 0
    for run in range(runs):
        estimate = patient_bootstrap(clustered_counts(40, generator), micro_f1, n_notes=40, n_resamples=400, seed=run)
        inside += estimate.low <= truth <= estimate.high
    assert 0.95 - 3 * math.sqrt(0.95 * 0.05 / runs) <= inside / runs <= 0.99


def test_notes_of_one_patient_are_not_independent_evidence():
    """Copying every patient's notes ten times must not narrow the interval."""
    counts = clustered_counts(50, np.random.default_rng(6))
    ids = [f"p{i}" for i in range(50)]
    once = patient_bootstrap(by_patient(ids, counts), micro_f1, n_notes=50)
    tenfold = patient_bootstrap(by_patient(ids * 10, np.tile(counts, (10, 1))), micro_f1, n_notes=500)
    assert (once.low, once.high) == pytest.approx((tenfold.low, tenfold.high))


@pytest.mark.parametrize(
    ("counts", "note"),
    [
        (np.zeros((30, 3)), "undefined: nothing to count"),
        (np.zeros((0, 3)), "undefined: nothing to count"),
        (clustered_counts(19, np.random.default_rng(7)), "fewer than 20 patients"),
        (np.tile([[3.0, 0.0, 0.0]], (30, 1)), "every patient scores alike: resampling shows no spread"),
        (np.vstack([np.zeros((30, 3)), np.tile([[3.0, 1.0, 0.0]], (12, 1))]), "fewer than 20 patients"),
    ],
)
def test_no_interval_is_said_not_invented(counts, note):
    estimate = patient_bootstrap(counts, micro_f1, n_notes=len(counts))
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)
    assert estimate.note == note
    assert math.isnan(estimate.value) == note.startswith("undefined")


def test_the_same_seed_gives_the_same_bits():
    counts = clustered_counts(25, np.random.default_rng(8))
    first = patient_bootstrap(counts, micro_f1, n_notes=25, seed=1)
    assert first == patient_bootstrap(counts, micro_f1, n_notes=25, seed=1)
    assert first != patient_bootstrap(counts, micro_f1, n_notes=25, seed=2)
