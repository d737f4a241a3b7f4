"""Label shift: what was put in is found again, under the assumption; against loops and the library; bad input."""

import math

import numpy as np
import pytest

from clinical_nlp.errors import TooFewPatientsError, UsageError
from clinical_nlp.statistics.label_shift import (
    estimate_prevalence,
    fit_temperature_scaling,
    label_shift,
)


def scores(generator, labels, *, distance=2.0, scale=1.0):
    """Logits of two classes whose log-likelihood ratio is `distance` apart, blown up by `scale`."""
    middle = generator.normal(distance * (labels - 0.5), 1.0) * distance
    return scale * np.column_stack([-middle / 2, middle / 2])


def test_expectation_maximisation_is_the_maximum_of_the_likelihood():
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet([1, 1], 60)
    prior = np.array([0.7, 0.3])
    found = estimate_prevalence(probabilities, prior)
    grid = np.linspace(0.0005, 0.9995, 2000)
    likelihood = [np.log(probabilities / prior @ np.array([1 - share, share])).sum() for share in grid]
    assert found[1] == pytest.approx(grid[int(np.argmax(likelihood))], abs=1e-3)
    assert found.sum() == pytest.approx(1)


def test_no_evidence_leaves_the_prior_and_weights_are_repeats():
    prior = np.array([0.2, 0.3, 0.5])
    np.testing.assert_allclose(estimate_prevalence(np.tile(prior, (9, 1)), prior), prior, atol=1e-6)
    rows = np.random.default_rng(1).dirichlet([1, 1, 1], 5)
    weights = np.array([1, 2, 3, 1, 1])
    repeated = estimate_prevalence(np.repeat(rows, weights, axis=0), prior)
    np.testing.assert_allclose(estimate_prevalence(rows, prior, weights), repeated, atol=1e-6)


@pytest.mark.parametrize("scale", [0.2, 1.0, 30.0])
def test_calibration_undoes_the_scale_of_the_scores(scale):
    generator = np.random.default_rng(2)
    labels = (generator.random(4000) < 0.3).astype(int)
    fitted = fit_temperature_scaling(scores(generator, labels, scale=scale), labels)
    probabilities = fitted(scores(generator, labels, scale=scale))[:, 1]
    assert fitted.temperature == pytest.approx(scale, rel=0.15)
    for low, high in ((0, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1)):
        inside = (probabilities >= low) & (probabilities < high)
        assert labels[inside].mean() == pytest.approx(probabilities[inside].mean(), abs=0.06)


def test_calibration_agrees_with_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(3)
    labels = (generator.random(500) < 0.4).astype(int)
    logits = scores(generator, labels, scale=3.0)
    difference = (logits[:, 1] - logits[:, 0])[:, None]
    other = LogisticRegression(C=1e6).fit(difference, labels).predict_proba(difference)[:, 1]
    np.testing.assert_allclose(fit_temperature_scaling(logits, labels)(logits)[:, 1], other, atol=0.01)


def test_perfectly_separated_scores_stay_finite():
    labels = np.r_[np.zeros(30), np.ones(30)].astype(int)
    logits = np.column_stack([-(labels - 0.5) * 50, (labels - 0.5) * 50])
    probabilities = fit_temperature_scaling(logits, labels)(logits)
    assert np.isfinite(probabilities).all()
    assert 0.9 < probabilities[labels == 1, 1].min() < 1


def simulate(seed, prevalences, *, patients=150, resamples=40, distance=2.0, other_shift=0.0):
    generator = np.random.default_rng(seed)
    sides = []
    for side, share in enumerate(prevalences):
        labels = (generator.random(patients) < share).astype(int)
        sides.append((labels, scores(generator, labels, distance=distance) + side * other_shift * np.array([-1, 1])))
    return label_shift(
        sides[0][1], sides[0][0], [f"a{i}" for i in range(patients)],
        sides[1][1], [f"b{i}" for i in range(patients)],
        names=("no", "yes"), n_resamples=resamples, seed=seed,
    )  # fmt: skip


def test_size_coverage_and_power_under_the_assumption():
    null = [simulate(seed, (0.3, 0.3)).p_value for seed in range(40)]
    assert np.mean(np.array(null) <= 0.05) <= 0.18  # 2 of 40 expected; more than 7 has a chance of 0.001
    shifted = [simulate(1000 + seed, (0.3, 0.5)) for seed in range(25)]
    assert np.mean([found.p_value <= 0.05 for found in shifted]) >= 0.7
    covered = [found.other[1].low <= 0.5 <= found.other[1].high for found in shifted]
    assert np.mean(covered) >= 0.8
    assert np.mean([found.other[1].value for found in shifted]) == pytest.approx(0.5, abs=0.03)


def test_a_broken_assumption_gives_a_wrong_prevalence_which_is_why_it_is_named():
    found = [simulate(seed, (0.3, 0.3), other_shift=2.5) for seed in range(10)]
    assert np.mean([item.p_value <= 0.05 for item in found]) > 0.5
    assert all("P(text | label)" in item.assumption for item in found)
    assert all("if P(text | label)" in item.other[0].part for item in found)


def test_few_patients_have_estimates_without_interval_or_p_value():
    found = simulate(0, (0.5, 0.5), patients=15)
    assert math.isnan(found.p_value)
    assert math.isnan(found.other[1].low)
    assert "fewer than 20 patients" in found.note
    assert 0 <= found.other[1].value <= 1


def test_bad_input_is_one_clear_error():
    logits, labels = np.zeros((30, 2)), np.r_[np.zeros(15), np.ones(15)].astype(int)
    people, others = [f"p{i}" for i in range(30)], [f"q{i}" for i in range(30)]
    broken = logits.copy()
    broken[3, 0] = math.nan
    with pytest.raises(UsageError, match="not finite"):
        label_shift(logits, labels, people, broken, others, names=("a", "b"))
    with pytest.raises(UsageError, match="give one a label"):
        label_shift(logits[:, :1], labels, people, logits, others, names=("a", "b"))
    with pytest.raises(TooFewPatientsError, match="label 'b' has 0 patients"):
        label_shift(logits, np.zeros(30, dtype=int), people, logits, others, names=("a", "b"))
