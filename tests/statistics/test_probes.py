"""Probes: the AUC and its interval against loops, what each kind reads, controls, floors, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from clinical_nlp.errors import InputError, TooFewPatientsError, UsageError
from clinical_nlp.invariance.erasers import fit_erasers
from clinical_nlp.statistics.probes import (
    PROBES,
    ProbedNotes,
    control_labels,
    description_length,
    intraclass_correlation,
    leace_floor,
    leace_floor_of,
    patient_auc,
    probe_curve,
    train_probe,
)

VECTOR_PROBES = [kind for kind in PROBES if kind != "words"]


def drawn(patients, *, d=6, shift=0.0, scale=1.0, k=2, notes=(1, 5), seed=0, icc=0.3, prefix="p"):
    """Notes of k institutions; `shift` moves means, `scale` the spread of every institution but the first."""
    rng = np.random.default_rng(seed)
    rows, labels, people = [], [], []
    for institution in range(k):
        for number in range(patients):
            own = rng.normal(size=d) * math.sqrt(icc)
            for _ in range(int(rng.integers(*notes))):
                x = own + rng.normal(size=d) * math.sqrt(1 - icc)
                x = x * (scale if institution else 1.0)
                x[institution % d] += shift
                rows.append(x)
                labels.append(f"h{institution}")
                people.append(f"{prefix}{institution}-{number}")
    return ProbedNotes(np.array(rows), labels, people)


def naive_auc(scores, target, rows, stratum):
    counts = np.bincount(rows)
    right = pairs = 0.0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if target[i] and not target[j] and stratum[i] == stratum[j]:
                weight = 1 / counts[rows[i]] / counts[rows[j]]
                right += weight * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
                pairs += weight
    return right / pairs


@pytest.mark.parametrize("seed", range(5))
def test_the_auc_and_each_patients_influence_equal_a_loop(seed):
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.integers(0, 12, 40))
    rows = np.unique(rows, return_inverse=True)[1]
    scores = rng.integers(0, 6, 40).astype(float)  # many ties
    target = rng.random(40) < 0.5  # patients with notes of both kinds too
    stratum = rng.integers(0, 2, 40)
    auc, influence = patient_auc(scores, target, rows, stratum)
    assert auc == pytest.approx(naive_auc(scores, target, rows, stratum), abs=1e-12)
    assert influence.sum() == pytest.approx(0, abs=1e-12)
    times, patient = 200, 3  # the influence is the derivative of the AUC with respect to a patient's weight

    def weighted(extra):
        mass = 1 / np.bincount(rows)[rows] * np.where(rows == patient, 1 + extra, 1.0)
        right = pairs = 0.0
        for i in np.flatnonzero(target):
            other = np.flatnonzero(~target & (stratum == stratum[i]))
            w = mass[i] * mass[other]
            right += (w * ((scores[i] > scores[other]) + 0.5 * (scores[i] == scores[other]))).sum()
            pairs += w.sum()
        return right / pairs

    slope = (weighted(1 / times) - weighted(-1 / times)) * times / 2
    assert influence[patient] == pytest.approx(slope, abs=1e-4)


def test_with_one_note_a_patient_the_variance_is_delongs():
    rng = np.random.default_rng(0)
    scores, target = rng.normal(size=200), np.repeat([True, False], 100)
    scores[:100] += 0.7
    auc, influence = patient_auc(scores, target, np.arange(200))
    wins = scores[:100, None] > scores[None, 100:]
    delong = wins.mean(1).var(ddof=1) / 100 + wins.mean(0).var(ddof=1) / 100
    assert auc == pytest.approx(wins.mean())
    assert (influence**2).sum() == pytest.approx(delong, rel=0.02)


@pytest.mark.parametrize("kind", VECTOR_PROBES)
def test_every_probe_reads_a_shifted_mean(kind):
    curve = probe_curve(kind, drawn(80, shift=2), drawn(60, shift=2, seed=1, prefix="q"), n_permutations=199)
    assert curve.last.auc.value > 0.85
    assert curve.last.auc.low < curve.last.auc.value < curve.last.auc.high
    assert curve.last.p_value == pytest.approx(1 / 200)
    assert curve.last.null_mean == pytest.approx(0.5, abs=0.02)


def test_only_probes_that_are_not_linear_read_another_spread():
    train, test = drawn(200, scale=1.8), drawn(100, scale=1.8, seed=1, prefix="q")
    found = {kind: probe_curve(kind, train, test, sizes=[200], n_permutations=99).last.auc for kind in VECTOR_PROBES}
    assert found["linear"].low < 0.5 < found["linear"].high + 0.03
    for kind in ("quadratic", "mlp", "neighbours"):
        assert found[kind].low > 0.6, kind


def test_three_institutions_are_compared_one_against_the_rest():
    train, test = drawn(80, shift=2, k=3), drawn(60, shift=2, k=3, seed=1, prefix="q")
    curve = probe_curve("linear", train, test, n_permutations=199)
    score, names = train_probe("linear", train)
    assert names == ("h0", "h1", "h2")
    values, labels = score(test.contents), np.array(test.labels)
    each = [naive_auc(values[:, k], labels == f"h{k}", test.row, np.zeros(len(labels))) for k in range(3)]
    assert curve.last.auc.value == pytest.approx(np.mean(each), abs=1e-9)
    assert curve.last.p_value == pytest.approx(1 / 200)
    assert curve.last.null_mean == pytest.approx(0.5, abs=0.02)


def test_identical_institutions_are_at_chance_and_the_interval_and_p_value_keep_their_promise():
    covered = rejected = 0
    for seed in range(200):
        train = drawn(20, d=4, notes=(5, 12), seed=2 * seed)
        test = drawn(30, d=4, notes=(5, 12), seed=2 * seed + 1, prefix="q")
        point = probe_curve("linear", train, test, sizes=[20], n_permutations=199).last
        covered += point.auc.low <= 0.5 <= point.auc.high
        rejected += point.p_value <= 0.05
    assert covered / 200 > 0.90
    assert rejected / 200 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)


def test_the_relabelled_auc_is_that_of_relabelled_patients():
    from clinical_nlp.statistics.probes import _relabelled

    notes = drawn(6, k=2, notes=(1, 4))
    notes = ProbedNotes(notes.contents, notes.labels, notes.patients, [p[-1] in "135" for p in notes.patients])
    rng = np.random.default_rng(0)
    scores = np.round(rng.normal(size=(len(notes.row), 2)), 1)
    labels = (np.array(notes.labels) == "h1").astype(int)
    null = _relabelled(scores, labels, notes, 50, 0)
    label, stratum = notes.of_patient(labels), notes.of_patient(notes.stratum)
    generator = np.random.default_rng([0, 17])
    relabelled = np.repeat(label[:, None], 50, axis=1)
    for one in (0, 1):
        members = np.flatnonzero(stratum == one)
        relabelled[members] = generator.permuted(relabelled[members], axis=0)
    for column in range(50):
        target = relabelled[:, column][notes.row] == 1
        expected = naive_auc(scores[:, 1] - scores[:, 0], target, notes.row, notes.stratum)
        assert null[column] == pytest.approx(expected, abs=1e-12)


def test_a_curve_says_whether_it_still_rises():
    flat = probe_curve("linear", drawn(320, d=2, shift=1), drawn(300, d=2, shift=1, seed=1, prefix="q"))
    assert [point.n_train_patients for point in flat.points] == [20, 40, 80, 160, 320, 640]
    assert flat.shape == "plateau"
    steep = probe_curve(
        "linear", drawn(64, d=60, shift=1), drawn(400, d=60, shift=1, seed=1, prefix="q"), sizes=[8, 64]
    )
    assert steep.shape == "rising"
    assert steep.gain.low > 0
    assert probe_curve("linear", drawn(9), drawn(20, prefix="q"), sizes=[9]).shape == "not shown"


def test_prevalence_alone_leaks_and_not_given_the_label():
    rng = np.random.default_rng(0)

    def institution(n, prefix):
        contents, labels, people, strata = [], [], [], []
        for name, prevalence in (("a", 0.2), ("b", 0.6)):
            for number in range(n):
                has = rng.random() < prevalence
                contents.append([3 * has + rng.normal(), rng.normal()])
                labels.append(name)
                people.append(f"{prefix}{name}{number}")
                strata.append(str(has))
        return np.array(contents), labels, people, strata

    train, test = institution(400, "t"), institution(400, "u")
    plain = probe_curve("linear", ProbedNotes(*train[:3]), ProbedNotes(*test[:3]), sizes=[400], n_permutations=199).last
    given = probe_curve("linear", ProbedNotes(*train), ProbedNotes(*test), sizes=[400], n_permutations=199).last
    assert plain.auc.low > 0.6
    assert plain.p_value < 0.01
    assert given.auc.low < 0.5 < given.auc.high
    assert given.p_value > 0.01
    assert given.null_mean == pytest.approx(0.5, abs=0.01)


def test_control_labels_hang_on_recurring_lines_and_can_be_read_from_the_text_of_new_patients():
    rng = np.random.default_rng(0)
    lines = [f"Header {word}:" for word in ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]]
    texts, people = [], []
    for number in range(300):
        for _ in range(2):
            chosen = [line for line in lines if rng.random() < 0.5]
            texts.append("\n".join([*chosen, f"own words {rng.integers(10**9)} of {number}"]))
            people.append(f"p{number:03}")
    labels, n_lines = control_labels(texts, people)
    assert n_lines >= len(lines)
    assert set(labels) == {"heads", "tails"}
    assert control_labels(texts, people)[0] == labels
    assert control_labels(texts, people, seed=1)[0] != labels
    half = np.array(people) < "p150"
    notes = ProbedNotes(texts, labels, people)
    curve = probe_curve("words", notes.select(half), notes.select(~half))
    assert curve.last.auc.value > 0.9
    assert math.isnan(curve.last.p_value)
    assert "differ in the label" in curve.last.null_note
    with pytest.raises(InputError, match="no templates"):
        control_labels(["one", "two", "three"], ["a", "b", "c"])


def test_the_floor_is_the_published_one_and_generalises():
    assert leace_floor(768, 127 * 768 * 3.7, 10, 0.3) == pytest.approx(0.55, abs=0.001)
    notes = drawn(300, d=8, notes=(4, 5), icc=0.4)
    floor = leace_floor_of(notes)
    assert intraclass_correlation(notes) == pytest.approx(0.4, abs=0.05)
    assert floor.auc == pytest.approx(leace_floor(8, 2400, 4, floor.icc), abs=1e-9)
    assert floor.n_patients == 600
    assert floor.design_effect == pytest.approx(1 + 3 * floor.icc, abs=1e-9)
    assert intraclass_correlation(drawn(50, notes=(1, 2))) == 0


def test_leace_on_new_patients_ends_where_its_floor_says():
    """A fresh linear probe of many patients after LEACE on few: the analytic floor, within simulation error."""
    found, floors = [], []
    for seed in range(6):
        fit = drawn(60, d=16, shift=2, notes=(5, 6), seed=100 + seed, prefix="e")
        eraser = fit_erasers(fit.contents, fit.labels, fit.patients, ["leace"])["leace"]
        train = drawn(1000, d=16, shift=2, notes=(2, 3), seed=200 + seed)
        test = drawn(400, d=16, shift=2, notes=(2, 3), seed=300 + seed, prefix="q")
        erased = [ProbedNotes(eraser(part.contents), part.labels, part.patients) for part in (train, test)]
        found.append(probe_curve("linear", *erased, sizes=[1000], n_permutations=19).last.auc.value)
        floors.append(leace_floor_of(fit).auc)
    assert np.mean(floors) > 0.56
    assert np.mean(found) == pytest.approx(np.mean(floors), abs=0.03)


def test_description_length_of_noise_is_that_of_the_shares_and_of_a_signal_less():
    noise = description_length(drawn(150, d=4), n_orders=3)
    assert noise.uniform_bits == pytest.approx(1.0, abs=1e-9)
    assert 0.9 < noise.compression <= 1.02
    uneven = drawn(200, d=4)
    few = uneven.select(np.array([patient[1] == "0" or patient < "p1-14" for patient in uneven.patients]))
    found = description_length(few, n_orders=3)
    share = np.array([200, len({p for p in few.patients if p[1] == "1"})]) / len(few.people)
    assert found.uniform_bits == pytest.approx(stats.entropy(share, base=2))
    assert found.compression < 1.03  # log2 k would call unequal institutions compressed
    signal = description_length(drawn(150, d=4, shift=4), n_orders=3)
    assert signal.compression > 2
    assert signal.low <= signal.compression <= signal.high
    with pytest.raises(TooFewPatientsError, match="20 patients"):
        description_length(drawn(5))


def test_constant_vectors_give_a_stated_nan():
    train = ProbedNotes(np.ones((40, 3)), ["a", "b"] * 20, [f"p{i}" for i in range(40)])
    test = ProbedNotes(np.ones((40, 3)), ["a", "b"] * 20, [f"q{i}" for i in range(40)])
    point = probe_curve("linear", train, test).last
    assert math.isnan(point.auc.value)
    assert point.auc.note == "the vectors do not vary"


def test_few_patients_give_a_figure_without_an_interval():
    point = probe_curve("linear", drawn(30, shift=1), drawn(12, shift=1, seed=1, prefix="q")).last
    assert math.isfinite(point.auc.value)
    assert math.isnan(point.auc.low)
    assert point.auc.note == "fewer than 20 patients in the smallest group"


@pytest.mark.parametrize(
    ("train", "test", "error", "words"),
    [
        (drawn(20, k=1), drawn(20, k=1, prefix="q"), TooFewPatientsError, "2 institutions or more"),
        (drawn(1), drawn(20, prefix="q"), TooFewPatientsError, "at least 2 patients"),
        (drawn(20), drawn(20), InputError, "both trained and scored on"),
        (drawn(20), drawn(20, k=3, prefix="q"), InputError, "not trained on"),
    ],
)
def test_bad_input_is_one_clear_error(train, test, error, words):
    with pytest.raises(error, match=words):
        probe_curve("linear", train, test)


def test_values_that_are_not_finite_and_unknown_probes_are_refused():
    with pytest.raises(InputError, match="1 of 2 vectors"):
        ProbedNotes(np.array([[1.0], [np.nan]]), ["a", "b"], ["p", "q"])
    with pytest.raises(UsageError, match="one length"):
        ProbedNotes(np.ones((2, 1)), ["a"], ["p", "q"])
    with pytest.raises(UsageError, match="did you mean 'linear'"):
        train_probe("linaer", drawn(20))
