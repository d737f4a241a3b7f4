"""Random features: the kernel they stand for, the same map everywhere, block by block equal to all at once."""

import math

import numpy as np
import pytest

from clinical_nlp.errors import UsageError
from clinical_nlp.statistics import random_features
from clinical_nlp.statistics.random_features import RandomFeatures, patient_feature_means, unbiased_mmd2


def kernel(x, y, width):
    squared = ((x - y) ** 2).sum()
    return np.mean([math.exp(-squared / (2 * (s * width) ** 2)) for s in (0.5, 1, 2)])


def test_inner_products_are_the_kernel_within_their_standard_error():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 40, 5))
    estimates = []
    for seed in range(20):
        features = RandomFeatures(5, 2.5, 1026, seed)
        estimates.append((features.transform(x) * features.transform(y)).sum(axis=1))
    exact = np.array([kernel(a, b, 2.5) for a, b in zip(x, y, strict=True)])
    error = np.array(estimates) - exact
    assert error.std() < 1 / math.sqrt(513)
    assert np.abs(error.mean(axis=0)).max() < 5 / math.sqrt(513 * 20)
    assert (RandomFeatures(5, 2.5).transform(x) ** 2).sum(axis=1) == pytest.approx(np.ones(40), abs=1e-5)


def test_the_map_is_frozen():
    """Two hospitals with other versions of numpy must compute the same; a changed digest breaks every profile."""
    features = RandomFeatures(3, 1.0, 6, seed=1)
    assert features.frequencies[:, 0] == pytest.approx([3.2486906, -1.2235128, -1.0563436], abs=1e-5)
    assert features.digest == RandomFeatures(3, 1.0, 6, seed=1).digest
    others = [RandomFeatures(3, 1.0, 6, seed=2), RandomFeatures(3, 1.1, 6, seed=1), RandomFeatures(3, 1.0, 8, seed=1)]
    assert len({features.digest, *(other.digest for other in others)}) == 4


@pytest.mark.parametrize("cells", [6, 60, 10**7])
@pytest.mark.parametrize("sort", [True, False])
def test_blocks_give_the_means_of_a_loop(monkeypatch, cells, sort):
    monkeypatch.setattr(random_features, "_CELLS_AT_ONCE", cells)
    generator = np.random.default_rng(3)
    rows = np.repeat(np.arange(7), [1, 2, 30, 1, 3, 1, 9])
    rows = rows if sort else generator.permutation(rows)
    vectors = generator.normal(size=(len(rows), 4))
    features = RandomFeatures(4, 1.5, 12)
    means = patient_feature_means(features, vectors, rows)
    for patient in range(7):
        loop = np.mean([features.transform(vectors[[i]])[0] for i in np.flatnonzero(rows == patient)], axis=0)
        assert means[patient] == pytest.approx(loop, abs=1e-6)


def test_the_statistic_from_sums_equals_a_loop_and_ignores_a_shift():
    generator = np.random.default_rng(4)
    sides = generator.normal(size=(5, 3)), generator.normal(size=(4, 3)) + 1

    def from_sums(shift):
        moved = [side + shift for side in sides]
        return unbiased_mmd2(*[tuple(f(m) for m in moved) for f in (lambda m: m.sum(0), lambda m: (m**2).sum(), len)])

    within = [np.mean([a @ b for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in sides]
    naive = sum(within) - 2 * np.mean([a @ b for a in sides[0] for b in sides[1]])
    assert from_sums(0.0) == pytest.approx(naive)
    assert from_sums(np.array([3.0, -2.0, 7.0])) == pytest.approx(naive)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1.0), "dimensions"),
        ((2, 0.0), "width"),
        ((2, math.nan), "width"),
        ((2, 1.0, 7), "n_features must be even"),
    ],
)
def test_what_is_no_map_is_said(arguments, message):
    with pytest.raises(UsageError, match=message):
        RandomFeatures(*arguments)


def test_what_cannot_be_mapped_is_said():
    features = RandomFeatures(2, 1.0, 6)
    with pytest.raises(UsageError, match="2 columns"):
        features.transform(np.zeros((3, 4)))
    with pytest.raises(UsageError, match="one row for each of 2 notes"):
        patient_feature_means(features, np.zeros((3, 2)), np.array([0, 1]))
    with pytest.raises(UsageError, match="not finite"):
        patient_feature_means(features, np.array([[0.0, math.nan]]), np.array([0]))
    with pytest.raises(UsageError, match="without a gap"):
        patient_feature_means(features, np.zeros((2, 2)), np.array([0, 2]))
