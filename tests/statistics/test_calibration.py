"""Calibration error, Brier score, recalibration lines, temperatures, sets and net benefit: loops, limits and edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from clinical_nlp.errors import InputError, UsageError
from clinical_nlp.statistics.calibration import (
    abstention_curve,
    brier,
    brier_estimate,
    calibration_bin,
    calibration_error,
    calibration_line,
    expected_calibration_error,
    fit_temperature,
    top_label,
)
from clinical_nlp.statistics.conformal import coverage, fit_conformal, fit_shifted_conformal, prevalence_weights
from clinical_nlp.statistics.net_benefit import net_benefit


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def drawn(patients, *, items=(1, 6), spread=1.0, slope=1.0, shift=0.0, seed=0):
    """Logits with a part of the patient's own, and outcomes that follow `shift + slope * logit`."""
    rng = np.random.default_rng(seed)
    logits, people = [], []
    for number in range(patients):
        own = rng.normal() * spread
        for _ in range(int(rng.integers(*items))):
            logits.append(own + rng.normal())
            people.append(f"p{number:04}")
    logits = np.array(logits)
    return logits, (rng.random(len(logits)) < sigmoid(shift + slope * logits)).astype(int), people


def naive_ece(p, y, n_bins):
    total = 0.0
    for k in range(n_bins):
        low, high = k / n_bins, (k + 1) / n_bins
        inside = [i for i in range(len(p)) if low <= p[i] < high or (k == n_bins - 1 and p[i] == 1)]
        if inside:
            total += len(inside) / len(p) * abs(np.mean([p[i] for i in inside]) - np.mean([y[i] for i in inside]))
    return total


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=1, max_size=60), st.integers(1, 20))
def test_ece_of_equal_width_equals_a_loop(pairs, n_bins):
    p, y = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    # Where a product is rounded onto an edge, the loop's division may put it on the other side.
    off_edge = np.abs(p * n_bins - np.round(p * n_bins)) > 1e-9
    keep = off_edge | np.isin(p, (0.0, 1.0))
    if keep.any():
        found = expected_calibration_error(p[keep], y[keep], n_bins=n_bins, scheme="width")
        assert found == pytest.approx(naive_ece(p[keep], y[keep], n_bins), abs=1e-9)


def test_ece_agrees_with_scikit_learns_curve():
    logits, y, _ = drawn(300)
    p = sigmoid(logits)
    seen, said = calibration_curve(y, p, n_bins=10, strategy="uniform")
    share = np.bincount(calibration_bin(p, n_bins=10, scheme="width"), minlength=10) / len(p)
    expected = (share[share > 0] * np.abs(seen - said)).sum()
    assert expected_calibration_error(p, y, n_bins=10, scheme="width") == pytest.approx(expected, abs=1e-12)


def test_the_edges_of_ece():
    # Exactly 1.0 belongs to the last bin, with its neighbours; it opens none of its own.
    assert calibration_bin(np.array([0.0, 0.95, 1.0]), scheme="width").tolist() == [0, 14, 14]
    assert expected_calibration_error(np.array([1.0, 1.0]), np.array([1, 1])) == 0
    assert expected_calibration_error(np.array([1.0, 1.0]), np.array([1, 0]), scheme="width") == 0.5
    # The probability of the outcome is compared, not the confidence: 0.1 said and seen in a tenth is right.
    assert expected_calibration_error(np.full(10, 0.1), np.eye(10)[0], scheme="width") == pytest.approx(0)
    # Equal probabilities are not torn apart, whatever their order.
    p, y = np.repeat([0.2, 0.8], 50), np.tile([0, 1], 50)
    order = np.random.default_rng(0).permutation(100)
    assert expected_calibration_error(p, y) == pytest.approx(expected_calibration_error(p[order], y[order]))
    assert expected_calibration_error(p, y) == pytest.approx(0.3)
    assert math.isnan(expected_calibration_error(np.zeros(0), np.zeros(0)))
    # A patient with a hundred items weighs what one with a single item weighs.
    p, y = np.full(101, 0.5), np.array([1] * 100 + [0])
    assert expected_calibration_error(p, y) == pytest.approx(0.5 - 1 / 101)
    assert expected_calibration_error(p, y, patients=["a"] * 100 + ["b"]) == pytest.approx(0)


def test_several_classes_compare_the_likeliest():
    confidence, correct = top_label(np.array([[0.2, 0.7, 0.1], [0.5, 0.3, 0.2]]), np.array([1, 2]))
    assert confidence.tolist() == [0.7, 0.5]
    assert correct.tolist() == [1, 0]
    with pytest.raises(UsageError, match="3 classes"):
        top_label(np.array([[0.2, 0.8]]), np.array([1]))


def test_the_excess_of_a_perfect_model_is_nothing_though_its_error_is_not():
    excess, rejected, errors = [], 0, []
    for seed in range(300):
        logits, y, people = drawn(60, seed=seed)
        found = calibration_error(sigmoid(logits), y, people, n_draws=199)
        errors.append(found.value)
        excess.append(found.excess)
        rejected += found.p_value <= 0.05
    assert np.mean(errors) > 0.07
    assert abs(np.mean(excess)) < 0.006
    assert rejected / 300 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


def test_the_null_moves_patients_not_items():
    """Outcomes of a patient agree beyond the model: with items as the unit a calibrated model is rejected often."""
    rejected = by_item = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        people = np.repeat([f"p{i}" for i in range(50)], 8)
        p = np.repeat(rng.uniform(0.2, 0.8, 50), 8)
        y = np.repeat(rng.random(50) < p[::8], 8).astype(int)  # calibrated, and all of a patient alike
        rejected += calibration_error(p, y, people, n_bins=5, n_draws=199).p_value <= 0.05
        by_item += calibration_error(p, y, [str(i) for i in range(400)], n_bins=5, n_draws=199).p_value <= 0.05
    assert rejected / 200 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)
    assert by_item / 200 > 0.5


def test_a_model_that_is_off_is_found():
    logits, y, people = drawn(200, slope=0.3)
    found = calibration_error(sigmoid(logits), y, people)
    assert found.p_value == pytest.approx(1 / 1000)
    assert found.excess > 0.05
    few = calibration_error(sigmoid(logits[:30]), y[:30], people[:30])
    assert math.isnan(few.excess)
    assert "fewer than 20" in few.note


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=1, max_size=50))
def test_brier_is_its_definition_and_its_parts_add_up(pairs):
    p, y = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    found = brier(p, y)
    assert found.score == pytest.approx(brier_score_loss(y, p, pos_label=1), abs=1e-12)
    total = found.reliability - found.resolution + found.uncertainty + found.within
    assert total == pytest.approx(found.score, abs=1e-12)
    assert found.reliability >= 0
    assert 0 <= found.resolution <= found.uncertainty + 1e-12


def test_brier_of_two_values_by_hand():
    p, y = np.repeat([0.2, 0.6], 10), np.array([1, 1, 1, 1] + [0] * 6 + [1] * 8 + [0] * 2)
    found = brier(p, y)
    assert found.reliability == pytest.approx((0.2**2 + 0.2**2) / 2)
    assert found.resolution == pytest.approx(0.04)
    assert found.uncertainty == pytest.approx(0.24)
    assert found.within == pytest.approx(0, abs=1e-12)
    assert brier_estimate(p, y, [f"p{i}" for i in range(20)], n_notes=20, part="test").value == pytest.approx(
        found.score
    )


def test_slope_and_intercept_are_those_of_logistic_regression_and_their_intervals_cover():
    logits, y, people = drawn(200, items=(1, 2), slope=0.6, shift=0.4)
    slope, _ = calibration_line(sigmoid(logits), y, people, n_notes=len(y), part="test")
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logits[:, None], y)
    assert slope.value == pytest.approx(model.coef_[0, 0], abs=1e-4)
    covered = np.zeros(2)
    for seed in range(150):
        logits, y, people = drawn(60, seed=seed)
        pair = calibration_line(sigmoid(logits), y, people, n_notes=len(y), part="test")
        covered += [one.low <= truth <= one.high for one, truth in zip(pair, (1, 0), strict=True)]
    assert (covered / 150 > 0.9).all()


def test_lines_that_do_not_exist_say_so():
    people = [f"p{i}" for i in range(40)]
    alike = calibration_line(np.full(40, 0.3), np.tile([0, 1], 20), people, n_notes=40, part="test")
    assert alike[0].note == "undefined: all probabilities are alike"
    assert alike[1].value == pytest.approx(-math.log(0.3 / 0.7))
    split = calibration_line(np.repeat([0.2, 0.8], 20), np.repeat([0, 1], 20), people, n_notes=40, part="test")
    assert split[0].note == "undefined: outcomes are separated"
    one = calibration_line(np.linspace(0.1, 0.9, 40), np.ones(40), people, n_notes=40, part="test")
    assert "all outcomes are alike" in one[0].note


@pytest.mark.parametrize("classes", [2, 4])
def test_the_temperature_is_the_one_that_is_likeliest(classes):
    rng = np.random.default_rng(classes)
    logits = rng.normal(size=(400, classes)) * 3
    chances = np.exp(logits / 2.5) / np.exp(logits / 2.5).sum(1, keepdims=True)
    gold = (chances.cumsum(1) > rng.random((400, 1))).argmax(1)
    given = logits[:, 1] - logits[:, 0] if classes == 2 else logits
    found = fit_temperature(given, gold)

    def loss(t):
        scaled = logits / t[0]
        return np.mean(np.log(np.exp(scaled).sum(1)) - scaled[np.arange(400), gold])

    best = optimize.minimize(loss, [1.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}).x[0]
    assert found.value == pytest.approx(best, rel=1e-4)
    assert found.value == pytest.approx(2.5, abs=0.6)
    assert np.allclose(found(logits).sum(1), 1)
    assert (found(logits).argmax(1) == logits.argmax(1)).all()


def test_the_temperature_of_a_model_that_is_always_right_stops_at_its_bound():
    found = fit_temperature(np.array([2.0, -2.0]), np.array([1, 0]))
    assert "bound" in found.note
    assert np.isfinite(found(np.array([2.0, -1000.0]))).all()
    assert fit_temperature(np.zeros(4), np.array([0, 1, 0, 1])).note == "nothing to fit"
    with pytest.raises(InputError, match="not finite"):
        fit_temperature(np.array([np.inf, 0.0]), np.array([1, 0]))


def naive_net_benefit(p, y, t):
    true = sum(1 for a, b in zip(p, y, strict=True) if a >= t and b == 1)
    false = sum(1 for a, b in zip(p, y, strict=True) if a >= t and b == 0)
    return true / len(p) - false / len(p) * t / (1 - t)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=1, max_size=40),
    st.floats(0.01, 0.99),
)
def test_net_benefit_equals_a_loop(pairs, t):
    p, y = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    found = net_benefit(p, y, [str(i) for i in range(len(p))], thresholds=[t], n_resamples=2)[0]
    assert found.model.value == pytest.approx(naive_net_benefit(p, y, t), abs=1e-9)
    assert found.treat_all.value == pytest.approx(naive_net_benefit(np.ones(len(p)), y, t), abs=1e-9)
    assert found.over_treat_all.value == pytest.approx(found.model.value - found.treat_all.value, abs=1e-9)
    assert found.avoided.value == pytest.approx(100 * found.over_treat_all.value * (1 - t) / t, abs=1e-6)


def test_the_bands_of_net_benefit_resample_patients_with_all_of_their_items():
    logits, y, people = drawn(80)
    found = net_benefit(sigmoid(logits), y, people, thresholds=[0.3], n_resamples=400, seed=3)[0]
    names, rows = np.unique(people, return_inverse=True)
    rng = np.random.default_rng(0)
    loop = []
    for _ in range(400):
        chosen = rng.integers(0, len(names), len(names))
        items = np.concatenate([np.flatnonzero(rows == one) for one in chosen])
        loop.append(naive_net_benefit(sigmoid(logits)[items], y[items], 0.3))
    assert found.model.low == pytest.approx(np.quantile(loop, 0.025), abs=0.02)
    assert found.model.high == pytest.approx(np.quantile(loop, 0.975), abs=0.02)
    with pytest.raises(UsageError, match="between 0 and 1"):
        net_benefit(sigmoid(logits), y, people, thresholds=[1.0])


def test_the_conformal_limit_is_the_order_statistic_with_one_item_a_patient():
    rng = np.random.default_rng(0)
    p, y = rng.random(50), rng.integers(0, 2, 50)
    found = fit_conformal(p, y, [str(i) for i in range(50)], miss=0.1)
    scores = np.sort(np.where(y == 1, 1 - p, p))
    assert found.limit == pytest.approx(scores[math.ceil(0.9 * 51) - 1])
    few = fit_conformal(p[:5], y[:5], list("abcde"), miss=0.1)
    assert few.limit == math.inf
    assert "5 patients cannot assure 90 %" in few.note
    assert few(p).all()


def test_conformal_sets_keep_their_promise_for_clustered_patients():
    """Coverage of one note of a new patient, with patients that have one to thirty notes each."""
    kept = []
    for seed in range(300):
        logits, y, people = drawn(60, items=(1, 31), spread=2, seed=seed)
        sets = fit_conformal(sigmoid(logits), y, people, miss=0.2)
        logits, y, people = drawn(60, items=(1, 31), spread=2, seed=10_000 + seed)
        kept.append(coverage(sets(sigmoid(logits)), y, people).covered.value)
    error = np.std(kept) / math.sqrt(len(kept))
    assert 0.8 - 3 * error < np.mean(kept) < 0.8 + 1 / 61 + 3 * error


def written(patients, prevalence, seed, *, fitted=0.3, separation=1.5):
    """Notes of a model that is right at prevalence `fitted`: text as everywhere, the outcome as common as given."""
    rng = np.random.default_rng(seed)
    p, y, people = [], [], []
    for number in range(patients):
        has, own = rng.random() < prevalence, rng.normal()
        for _ in range(int(rng.integers(1, 12))):
            truth = int(has if rng.random() < 0.7 else rng.random() < prevalence)
            x = separation * truth + math.sqrt(0.4) * own + math.sqrt(0.6) * rng.normal()
            p.append(sigmoid(math.log(fitted / (1 - fitted)) + separation * x - separation**2 / 2))
            y.append(truth)
            people.append(str(number))
    return np.array(p), np.array(y), people


def covered(sets, y, people):
    inside = sets[np.arange(len(y)), y]
    return float(np.mean([inside[np.array(people) == one].mean() for one in sorted(set(people))]))


def test_equal_weights_are_no_shift_and_one_item_a_patient_is_the_weighted_order_statistic():
    p, y, people = written(40, 0.3, 1)
    plain, shifted = fit_conformal(p, y, people, miss=0.1), fit_shifted_conformal(p, y, people, [1.0, 1.0], miss=0.1)
    assert shifted.limits == (plain.limit, plain.limit)
    assert np.array_equal(plain(p), shifted(p))
    rng = np.random.default_rng(0)
    p, y = rng.random(60), rng.integers(0, 2, 60)
    found = fit_shifted_conformal(p, y, [str(i) for i in range(60)], [0.5, 3.0], miss=0.2)
    scores, factors = np.where(y == 1, 1 - p, p), np.where(y == 1, 3.0, 0.5)
    for kind, factor in enumerate((0.5, 3.0)):
        total = factors.sum() + factor
        wanted = min(s for s in scores if factors[scores <= s].sum() / total >= 0.8 - 1e-12)
        assert found.limits[kind] == pytest.approx(wanted)
    few = fit_shifted_conformal(p[:6], y[:6], list("abcdef"), [1.0, 4.0], miss=0.1)
    assert few.limits[1] == math.inf
    assert "every set holds class" in few.note
    with pytest.raises(UsageError, match="2 numbers of at least 0"):
        fit_shifted_conformal(p, y, [str(i) for i in range(60)], [1.0])
    with pytest.raises(UsageError, match="2 numbers of at least 0"):
        fit_shifted_conformal(p, y, [str(i) for i in range(60)], [-1.0, 1.0])


@pytest.mark.parametrize("there", [0.7, 0.1])
def test_sets_keep_their_promise_where_the_outcome_is_commoner_or_rarer(there):
    """Coverage of one note of a new patient; plain sets beside it, which break the promise where it is commoner."""
    plain, shifted, sizes = [], [], []
    for seed in range(250):
        p, y, people = written(80, 0.3, seed)
        q, z, others = written(40, there, 10_000 + seed)
        weights = [(1 - there) / 0.7, there / 0.3]
        sets = fit_shifted_conformal(p, y, people, weights, miss=0.2)(q)
        held = fit_conformal(p, y, people, miss=0.2)(q)
        shifted.append(covered(sets, z, others))
        plain.append(covered(held, z, others))
        sizes.append(sets.sum() - held.sum())
    error = np.std(shifted) / math.sqrt(len(shifted))
    assert 0.8 - 3 * error < np.mean(shifted) < 0.8 + 0.03 + 3 * error
    if there > 0.3:
        assert np.mean(plain) < 0.75
    else:
        assert np.mean(sizes) < 0  # a promise kept with smaller sets


def test_weights_from_notes_without_gold_keep_the_promise_too():
    shifted, weights = [], []
    for seed in range(16):
        p, y, people = written(150, 0.3, seed)
        q, z, others = written(150, 0.7, 10_000 + seed)
        found, why = prevalence_weights(p, y, people, q, others, seed=seed)
        shifted.append(covered(fit_shifted_conformal(p, y, people, found, miss=0.2)(q), z, others))
        weights.append(found[1])
        assert why.other[1].low < why.other[1].value < why.other[1].high
    assert np.mean(weights) == pytest.approx(0.7 / 0.3, rel=0.12)
    error = np.std(shifted) / math.sqrt(len(shifted))
    assert np.mean(shifted) > 0.8 - 3 * error


def test_coverage_counts_patients_alike_and_names_empty_sets():
    sets = np.array([[True, False], [True, True], [False, False], [False, True]])
    found = coverage(sets, np.array([0, 0, 1, 1]), ["a", "a", "b", "c"])
    assert found.covered.value == pytest.approx((1 + 0 + 1) / 3)
    assert found.size.value == pytest.approx((1.5 + 0 + 1) / 3)
    assert found.empty == 0.25
    assert found.undecided == 0.25


def test_fewer_answers_are_better_ones_and_ties_stay_together():
    logits, y, people = drawn(150, slope=2)
    p = sigmoid(logits)
    confidence, correct = np.maximum(p, 1 - p), ((p >= 0.5) == y).astype(int)
    points = abstention_curve(confidence, correct, people)
    assert points[0].share == 1
    assert points[0].error.value == pytest.approx(1 - correct.mean())
    assert points[-1].error.value < points[0].error.value
    tied = abstention_curve(np.full(30, 0.7), np.tile([0, 1, 1], 10), [str(i) for i in range(30)], shares=[0.5])
    assert tied[0].share == 1


@pytest.mark.parametrize("call", [expected_calibration_error, brier])
def test_what_is_no_probability_is_refused(call):
    with pytest.raises(InputError, match="1 of 2"):
        call(np.array([0.5, np.nan]), np.array([0, 1]))
    with pytest.raises(InputError, match="not between"):
        call(np.array([0.5, 1.5]), np.array([0, 1]))
    with pytest.raises(UsageError, match="0 or 1"):
        call(np.array([0.5, 0.5]), np.array([0, 2]))
    with pytest.raises(UsageError, match="one outcome"):
        call(np.array([0.5, 0.5]), np.array([0]))
