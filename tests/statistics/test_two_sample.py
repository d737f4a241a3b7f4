"""Two-sample tests: equal to naive loops, right size when patients cluster, power when something shifts."""

import math

import numpy as np
import pytest

from clinical_nlp.errors import TooFewPatientsError, UsageError
from clinical_nlp.statistics import mmd
from clinical_nlp.statistics.domain_classifier import domain_classifier_test, mlp_classifier_test
from clinical_nlp.statistics.max_t import max_t_test
from clinical_nlp.statistics.mmd import median_distance, mmd_test
from clinical_nlp.statistics.permutation import PermutationPlan, profile_strata
from clinical_nlp.statistics.random_features import RandomFeatures, patient_feature_means
from clinical_nlp.statistics.ratios import length_test, utilisation_test
from clinical_nlp.statistics.text_measures import token_shares
from clinical_nlp.statistics.vocabulary import vocabulary_test


def clustered(seed, *, patients=(30, 30), notes=((5, 10), (5, 10)), dimensions=8, shift=0.0):
    """Notes whose features share 30 % of their variance within a patient, and their lengths."""
    generator = np.random.default_rng(seed)
    ids, institutions, features, lengths = [], [], [], []
    for side in range(2):
        for patient in range(patients[side]):
            n = generator.integers(notes[side][0], notes[side][1] + 1)
            own = generator.normal(size=dimensions) * math.sqrt(0.3)
            features.append(own + generator.normal(size=(n, dimensions)) * math.sqrt(0.7) + shift * side)
            lengths.append(np.exp(5 + 0.4 * generator.normal() + 0.4 * generator.normal(size=n) + shift * side))
            ids += [f"{side}-{patient}"] * n
            institutions += [f"h{side}"] * n
    return ids, institutions, np.concatenate(features), np.concatenate(lengths)


def naive_auc(features, plan, labels):
    """Cross-fitted AUC over pairs of patients, one loop a step."""
    n, d = len(plan.patients), features.shape[1]
    folds = np.random.default_rng([plan.seed, 1]).permutation(n) % 5
    won = pairs = 0.0
    for fold in range(5):
        train = [i for i in range(len(features)) if folds[plan.note_patient[i]] != fold]
        test = [i for i in range(len(features)) if folds[plan.note_patient[i]] == fold]
        weight = np.array([plan.note_weight[i] for i in train])
        centre = (features[train] * weight[:, None]).sum(0) / weight.sum()
        scale = np.sqrt((((features[train] - centre) ** 2) * weight[:, None]).sum(0) / weight.sum())
        known, new = (features[train] - centre) / scale, (features[test] - centre) / scale
        y = labels[plan.note_patient[train]].astype(float)
        y = y - (y * weight).sum() / weight.sum()
        beta = np.linalg.solve(known.T @ np.diag(weight) @ known + d * np.eye(d), known.T @ (weight * y))
        scores = dict(zip(test, np.round(new @ beta, 9), strict=True))
        for i in test:
            for j in test:
                p, q = plan.note_patient[i], plan.note_patient[j]
                if labels[p] and not labels[q]:
                    weight_of_pair = plan.note_weight[i] * plan.note_weight[j]
                    won += weight_of_pair * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
                    pairs += weight_of_pair
    return won / pairs


def test_the_classifier_equals_a_naive_loop_for_every_relabelling():
    ids, institutions, features, _ = clustered(1, patients=(12, 10), notes=((1, 4), (1, 4)), dimensions=3)
    features[5] = features[0]
    plan = PermutationPlan(ids, institutions, n_permutations=19)
    result = domain_classifier_test(features, plan)
    naive = [naive_auc(features, plan, plan.membership[:, column]) for column in range(20)]
    assert result.statistic == pytest.approx(naive[0], abs=1e-12)
    assert result.null_mean == pytest.approx(np.mean(naive[1:]), abs=1e-12)
    assert result.p_value == (1 + sum(value >= naive[0] - 1e-12 for value in naive[1:])) / 20


def naive_mmd2(features, plan, labels):
    width = median_distance(features, plan.row_person[plan.note_patient], seed=plan.seed)

    def kernel(x, y):
        squared = ((x - y) ** 2).sum()
        return np.mean([math.exp(-squared / (2 * (s * width) ** 2)) for s in (0.5, 1, 2)])

    notes = [np.flatnonzero(plan.note_patient == p) for p in range(len(plan.patients))]
    sums = {(0, 0): [], (1, 1): [], (0, 1): []}
    for p in range(len(notes)):
        for q in range(len(notes)):
            if p != q and labels[p] <= labels[q]:
                mean = np.mean([kernel(features[i], features[j]) for i in notes[p] for j in notes[q]])
                sums[int(labels[p]), int(labels[q])].append(mean)
    return np.mean(sums[0, 0]) + np.mean(sums[1, 1]) - 2 * np.mean(sums[0, 1])


def test_mmd_equals_a_naive_loop_for_every_relabelling(monkeypatch):
    monkeypatch.setattr(mmd, "_CELLS_AT_ONCE", 200)
    ids, institutions, features, _ = clustered(2, patients=(6, 8), notes=((1, 4), (1, 4)), dimensions=3)
    shuffled = np.random.default_rng(0).permutation(len(ids))
    plan = PermutationPlan([ids[i] for i in shuffled], [institutions[i] for i in shuffled], n_permutations=5)
    result = mmd_test(features[shuffled], plan)
    naive = [naive_mmd2(features[shuffled], plan, plan.membership[:, column]) for column in range(6)]
    assert result.statistic == pytest.approx(naive[0], abs=1e-12)
    assert result.null_mean == pytest.approx(np.mean(naive[1:]), abs=1e-12)


def test_mmd_of_one_text_everywhere_is_zero():
    plan = PermutationPlan(list("abcdef"), list("xxxyyy"), n_permutations=99)
    assert mmd_test(np.ones((6, 4)), plan).statistic == pytest.approx(0, abs=1e-12)
    assert mmd_test(np.ones((6, 4)), plan).p_value == 1.0
    assert domain_classifier_test(np.ones((6, 4)), plan).statistic == 0.5


@pytest.mark.parametrize("notes", [((8, 8), (8, 8)), ((2, 4), (10, 25))])
def test_size_under_identical_institutions(notes):
    """Rejections at 5 % stay within three standard errors, also when one institution writes more notes a patient."""
    runs, level = 100, 0.05
    rejected = {"domain_classifier": 0, "mmd": 0, "length": 0}
    for run in range(runs):
        ids, institutions, features, lengths = clustered(run, patients=(20, 20), notes=notes)
        plan = PermutationPlan(ids, institutions, n_permutations=99, seed=run)
        for result in (domain_classifier_test(features, plan), mmd_test(features, plan), length_test(lengths, plan)):
            rejected[result.name] += result.p_value <= level
    bound = level + 3 * math.sqrt(level * (1 - level) / runs)
    assert {name: count / runs for name, count in rejected.items() if count / runs > bound} == {}


def test_permuting_notes_instead_would_have_failed_that():
    """Why patients are the unit: with every note its own patient, the same data reject nearly always."""
    rejected = 0
    for run in range(10):
        ids, institutions, features, _ = clustered(run, patients=(25, 25), notes=((8, 8), (8, 8)), dimensions=32)
        notes = [f"{patient}/{row}" for row, patient in enumerate(ids)]
        rejected += mmd_test(features, PermutationPlan(notes, institutions, n_permutations=99)).p_value <= 0.05
    assert rejected >= 9


def test_power_under_a_known_shift():
    found = {"domain_classifier": 0, "mmd": 0, "length": 0}
    for run in range(20):
        ids, institutions, features, lengths = clustered(run, shift=0.5)
        plan = PermutationPlan(ids, institutions, n_permutations=99, seed=run)
        for result in (domain_classifier_test(features, plan), mmd_test(features, plan), length_test(lengths, plan)):
            found[result.name] += result.p_value <= 0.05
    assert min(found.values()) >= 17, found


def test_the_effect_of_length_is_the_ratio_that_was_put_in():
    generator = np.random.default_rng(4)
    ids = [f"p{i}" for i in range(400) for _ in range(3)]
    institutions = ["a" if int(patient[1:]) < 200 else "b" for patient in ids]
    words = np.exp(generator.normal(5, 0.5, len(ids))) * np.where(np.array(institutions) == "b", 1.5, 1.0)
    result = length_test(words, PermutationPlan(ids, institutions, n_permutations=99))
    assert result.low < 1.5 < result.high
    assert result.effect == pytest.approx(1.5, rel=0.1)


def test_utilisation_is_seen_apart_from_text():
    ids, institutions, features, _ = clustered(9, notes=((2, 4), (10, 25)))
    plan = PermutationPlan(ids, institutions, n_permutations=199)
    assert utilisation_test(plan.notes_per_patient[plan.note_patient], plan).p_value == pytest.approx(1 / 200)
    assert mmd_test(features, plan).p_value > 0.05


def test_constant_lengths_have_no_interval_and_no_finding():
    plan = PermutationPlan(list("abcdef"), list("xxxyyy"), n_permutations=99)
    result = length_test(np.full(6, 7), plan)
    assert (result.p_value, result.effect) == (1.0, 1.0)
    assert math.isnan(result.low)


def texts_of(generator, side, shift):
    words = ["fever", "cough", "pain", "denies", "stable", "plan", "today"]
    weights = np.ones(7)
    weights[0] += 2 * shift * side
    return " ".join(generator.choice(words, 40, p=weights / weights.sum()))


def corpus_of_words(seed, shift, patients=20):
    generator = np.random.default_rng(seed)
    ids = [f"{side}-{i}" for side in range(2) for i in range(patients) for _ in range(2)]
    return ids, [i[0] for i in ids], [texts_of(generator, int(i[0]), shift) for i in ids]


def test_vocabulary_equals_a_naive_divergence():
    ids, institutions, texts = corpus_of_words(0, 1.0)
    plan = PermutationPlan(ids, institutions, n_permutations=19)
    shares, tokens = token_shares(texts, ids)
    result = vocabulary_test(shares, tokens, plan).jensen_shannon
    dense = shares.toarray()
    for column, value in ((0, result.statistic),):
        side = plan.membership[:, column]
        means = [dense[np.isin(plan.note_patient, np.flatnonzero(side == s))].mean(axis=0) for s in (True, False)]
        middle = (means[0] + means[1]) / 2
        naive = sum(0.5 * p * math.log2(p / m) for mean in means for p, m in zip(mean, middle, strict=True) if p > 0)
        assert value == pytest.approx(naive, abs=1e-12)


def test_vocabulary_size_power_and_the_token_behind_it():
    rejected = sum(
        vocabulary_test(
            *token_shares(texts, ids), PermutationPlan(ids, sides, n_permutations=99)
        ).jensen_shannon.p_value
        <= 0.05
        for ids, sides, texts in (corpus_of_words(seed, 0.0) for seed in range(100))
    )
    assert rejected / 100 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 100)
    ids, sides, texts = corpus_of_words(1, 1.0)
    shift = vocabulary_test(*token_shares(texts, ids), PermutationPlan(ids, sides, n_permutations=99))
    assert shift.jensen_shannon.p_value == pytest.approx(0.01)
    assert shift.jensen_shannon.effect > 0
    assert shift.tokens[0].token == "fever"
    assert shift.tokens[0].per_thousand[1] > 2 * shift.tokens[0].per_thousand[0]


def test_a_token_of_few_patients_is_never_shown():
    ids, sides, texts = corpus_of_words(2, 0.0)
    texts = [
        text + " zebra" if i in [f"1-{k}" for k in range(10)] else text for i, text in zip(ids, texts, strict=True)
    ]
    plan = PermutationPlan(ids, sides, n_permutations=19)
    assert "zebra" not in {shift.token for shift in vocabulary_test(*token_shares(texts, ids), plan).tokens}
    texts = [text + " zebra" if i == "1-10" else text for i, text in zip(ids, texts, strict=True)]
    assert "zebra" in {shift.token for shift in vocabulary_test(*token_shares(texts, ids), plan).tokens}


def test_features_must_be_one_finite_row_a_note():
    plan = PermutationPlan(list("abcd"), list("xxyy"))
    with pytest.raises(UsageError, match="one row for each"):
        mmd_test(np.zeros((3, 2)), plan)
    with pytest.raises(UsageError, match="not finite"):
        domain_classifier_test(np.full((4, 2), np.nan), plan)


def test_the_same_plan_gives_the_same_bits():
    ids, institutions, features, _ = clustered(3)
    results = [domain_classifier_test(features, PermutationPlan(ids, institutions, seed=7)) for _ in range(2)]
    assert results[0] == results[1]


# Patients at both institutions, random features, cells, the second opinion -------------------------------------------


def shared_patients(seed, *, both=6, alone=(4, 5), dimensions=3, shift=0.0):
    """Patients seen at both institutions (what is their own is the same there) and patients of one only."""
    generator = np.random.default_rng(seed)
    ids, sides, features = [], [], []
    kinds = [(f"both{i}", (0, 1)) for i in range(both)]
    kinds += [(f"alone{side}{i}", (side,)) for side in (0, 1) for i in range(alone[side])]
    for patient, where in kinds:
        own = generator.normal(size=dimensions) * math.sqrt(0.6)
        for side in where:
            n = generator.integers(1, 5)
            features.append(own + generator.normal(size=(n, dimensions)) * math.sqrt(0.4) + shift * side)
            ids += [patient] * n
            sides += [f"h{side}"] * n
    return np.concatenate(features), ids, sides


def naive_paired_mmd2(features, plan, labels):
    """The statistic by loops over bundles: pairs of one patient, within or between sides, are left out."""
    width = median_distance(features, plan.row_person[plan.note_patient], seed=plan.seed)
    notes = [features[plan.note_patient == row] for row in range(len(plan.patients))]
    sums = {(False, False): [], (True, True): [], (False, True): []}
    for p in range(len(notes)):
        for q in range(len(notes)):
            if plan.patients[p] != plan.patients[q] and labels[p] <= labels[q]:
                squared = ((notes[p][:, None] - notes[q][None]) ** 2).sum(axis=2)
                sums[bool(labels[p]), bool(labels[q])].append(
                    np.mean([np.exp(-squared / (2 * (s * width) ** 2)) for s in (0.5, 1, 2)])
                )
    return np.mean(sums[False, False]) + np.mean(sums[True, True]) - 2 * np.mean(sums[False, True])


@pytest.mark.parametrize("alone", [(0, 0), (4, 5)])
def test_the_paired_plan_equals_a_naive_loop(alone):
    features, ids, sides = shared_patients(0, alone=alone)
    shuffled = np.random.default_rng(1).permutation(len(ids))
    features, ids, sides = features[shuffled], [ids[i] for i in shuffled], [sides[i] for i in shuffled]
    plan = PermutationPlan(ids, sides, n_permutations=9, paired=True)
    result = mmd_test(features, plan)
    naive = [naive_paired_mmd2(features, plan, plan.membership[:, column]) for column in range(10)]
    assert result.statistic == pytest.approx(naive[0], abs=1e-12)
    assert result.null_mean == pytest.approx(np.mean(naive[1:]), abs=1e-12)
    assert result.n_units == 6 + sum(alone)
    lengths = np.exp(features[:, 0])
    logs = {}
    for row in range(len(plan.patients)):
        logs[str(plan.patients[row]), bool(plan.is_target[row])] = features[plan.note_patient == row, 0].mean()
    if alone == (0, 0):
        differences = [logs[f"both{i}", True] - logs[f"both{i}", False] for i in range(6)]
        t = np.mean(differences) / (np.std(differences, ddof=1) / math.sqrt(6))
        assert length_test(lengths, plan).statistic == pytest.approx(abs(t))
        assert math.log(length_test(lengths, plan).effect) == pytest.approx(np.mean(differences))


def test_the_paired_plan_keeps_its_size_and_sees_what_the_patients_hide():
    """Swapping within patients cancels what is theirs: it finds a shift that the unpaired plan mostly misses."""
    rejected = {"size": [0, 0, 0, 0], "power": [0, 0, 0, 0]}
    for run in range(100):
        for kind, shift in (("size", 0.0), ("power", 0.35)):
            features, ids, sides = shared_patients(run, both=25, alone=(0, 0), shift=shift)
            plan = PermutationPlan(ids, sides, n_permutations=99, seed=run, paired=True)
            found = (
                length_test(np.exp(features[:, 0]), plan),
                mmd_test(features, plan),
                domain_classifier_test(features, plan),
            )
            for index, result in enumerate(found):
                rejected[kind][index] += result.p_value <= 0.05
            one_side = PermutationPlan([f"{i}{s}" for i, s in zip(ids, sides, strict=True)], sides, n_permutations=99)
            rejected[kind][3] += length_test(np.exp(features[:, 0]), one_side).p_value <= 0.05
    assert max(rejected["size"][:3]) <= 100 * (0.05 + 3 * math.sqrt(0.05 * 0.95 / 100))
    assert min(rejected["power"][:3]) > 50, rejected
    assert rejected["power"][0] > rejected["power"][3] + 15, rejected


@pytest.mark.parametrize("paired", [False, True])
def test_random_features_read_block_by_block_equal_all_at_once_and_come_close_to_the_kernel(monkeypatch, paired):
    features, ids, sides = shared_patients(3, both=10 if paired else 0, alone=(20, 20), dimensions=4, shift=0.6)
    plan = PermutationPlan(ids, sides, n_permutations=99, paired=paired)
    whole = mmd_test(features, plan, exact_up_to=0, n_random_features=4098)
    monkeypatch.setattr("clinical_nlp.statistics.random_features._CELLS_AT_ONCE", 4098 * 7)
    streamed = mmd_test(features, plan, exact_up_to=0, n_random_features=4098)
    assert streamed.statistic == pytest.approx(whole.statistic, abs=1e-7)
    assert streamed.null_sd == pytest.approx(whole.null_sd, rel=1e-4)
    assert streamed.p_value == whole.p_value
    exact = mmd_test(features, plan)
    assert whole.statistic == pytest.approx(exact.statistic, abs=0.4 * exact.null_sd)
    # By loops over the features of the map itself it is the same number to the last digits.
    width = median_distance(features, plan.row_person[plan.note_patient], seed=plan.seed)
    means = patient_feature_means(RandomFeatures(4, width, 4098, plan.seed), features, plan).astype(np.float64)
    total = {}
    for p in range(len(means)):
        for q in range(len(means)):
            if plan.patients[p] != plan.patients[q]:
                total.setdefault((bool(plan.is_target[p]), bool(plan.is_target[q])), []).append(means[p] @ means[q])
    naive = np.mean(total[True, True]) + np.mean(total[False, False]) - 2 * np.mean(total[True, False])
    assert whole.statistic == pytest.approx(naive, abs=1e-7)


def test_single_precision_of_many_patients_changes_nothing_that_matters(monkeypatch):
    ids, institutions, features, _ = clustered(5, patients=(60, 60))
    plan = PermutationPlan(ids, institutions, n_permutations=99)
    double = mmd_test(features, plan)
    monkeypatch.setattr(mmd, "_SINGLE_PRECISION_FROM", 0)
    single = mmd_test(features, plan)
    assert single.statistic == pytest.approx(double.statistic, abs=1e-3 * double.null_sd)
    assert single.p_value == double.p_value


def test_mmd_within_cells_equals_the_weighted_sum_over_cells():
    ids, institutions, features, _ = clustered(6, patients=(12, 12), dimensions=3)
    plan = PermutationPlan(ids, institutions, n_permutations=19)
    cells = np.random.default_rng(0).choice(["letter", "note"], len(ids))
    result = mmd_test(features, plan, cells=cells)
    parts = []
    for cell in ("letter", "note"):
        inside = np.flatnonzero(cells == cell)
        alone = PermutationPlan([ids[i] for i in inside], [institutions[i] for i in inside], n_permutations=1)
        parts.append((len(alone.patients), mmd_test(features[inside], alone).statistic))
    assert result.statistic == pytest.approx(sum(n * v for n, v in parts) / sum(n for n, _ in parts), abs=1e-12)
    assert "approximate" in result.note
    assert math.isnan(result.low)


def test_one_cell_for_all_is_the_classifier_without_cells():
    ids, institutions, features, _ = clustered(7, patients=(12, 12), dimensions=3)
    plan = PermutationPlan(ids, institutions, n_permutations=19)
    whole, one_cell = (
        domain_classifier_test(features, plan),
        domain_classifier_test(features, plan, cells=["a"] * len(ids)),
    )
    assert one_cell.statistic == pytest.approx(whole.statistic, abs=1e-12)
    assert one_cell.p_value == whole.p_value


def test_a_cell_that_misses_a_fold_is_compared_in_the_others():
    ids, institutions, features, _ = clustered(3, patients=(20, 20), notes=((2, 3), (2, 3)), dimensions=4)
    first = {patient: ids.index(patient) for patient in dict.fromkeys(ids)}
    rare = [list(first.values())[at] for at in (0, 1, 2, 20, 21, 22)]
    cells = ["rare" if row in rare else "usual" for row in range(len(ids))]
    strata = ["few" if patient in {ids[row] for row in rare} else "many" for patient in ids]
    plan = PermutationPlan(ids, institutions, strata=strata, n_permutations=19)
    found = domain_classifier_test(features, plan, cells=cells, n_folds=20)
    assert 0 <= found.effect <= 1
    assert np.isfinite([found.null_mean, found.null_sd, found.p_value]).all()


def test_a_mix_of_note_types_is_no_drift_within_cells_and_profile_strata():
    """Note types differ in text and the institutions in their mix: seen without cells, not within them."""
    rejected = {"plain": 0, "mmd": 0, "domain_classifier": 0, "max_t": 0}
    for run in range(40):
        generator = np.random.default_rng(run)
        ids, sides, kinds, rows = [], [], [], []
        for side in range(2):
            for patient in range(50):
                n = generator.integers(2, 9)
                kind = generator.random(n) < generator.beta(2 + side, 3 - side)
                own = generator.normal(size=4) * math.sqrt(0.3)
                rows.append(own + generator.normal(size=(n, 4)) * math.sqrt(0.7) + 2 * kind[:, None])
                ids += [f"{side}-{patient}"] * n
                sides += [f"h{side}"] * n
                kinds += np.where(kind, "letter", "note").tolist()
        features = np.concatenate(rows)
        count = np.array([ids.count(patient) for patient in ids])
        plain = PermutationPlan(ids, sides, n_permutations=99, seed=run)
        rejected["plain"] += mmd_test(features, plain).p_value <= 0.05
        strata = profile_strata(ids, sides, kinds, count)
        plan = PermutationPlan(ids, sides, strata=strata, n_permutations=99, seed=run)
        rejected["mmd"] += mmd_test(features, plan, cells=kinds).p_value <= 0.05
        rejected["domain_classifier"] += domain_classifier_test(features, plan, cells=kinds).p_value <= 0.05
        rejected["max_t"] += max_t_test(features, list("abcd"), plan, cells=kinds).test.p_value <= 0.05
    assert rejected.pop("plain") > 20
    assert max(rejected.values()) <= 40 * (0.05 + 3 * math.sqrt(0.05 * 0.95 / 40)), rejected


def test_the_network_sees_what_no_line_separates():
    """One institution's notes lie on two opposite sides of the other's: means and linear scores are alike."""
    ids = [f"{side}{i}" for side in "ab" for i in range(80) for _ in range(3)]
    sides = [i[0] for i in ids]
    generator = np.random.default_rng(0)
    features = generator.normal(size=(len(ids), 2))
    features[240:] = 0.5 * features[240:] + np.where(generator.random((240, 1)) < 0.5, 2.5, -2.5)
    plan = PermutationPlan(ids, sides, n_permutations=199)
    found = mlp_classifier_test(features, plan)
    assert found.p_value == pytest.approx(1 / 200)
    assert found.low > 0.8
    assert found.n_units == 80
    assert "80 other patients" in found.note
    assert domain_classifier_test(features, plan).effect < 0.65


def test_the_network_is_repeatable_leaves_the_random_state_alone_and_says_when_there_are_too_few():
    import torch

    ids, institutions, features, _ = clustered(3, patients=(10, 10))
    plan = PermutationPlan(ids, institutions, n_permutations=19)
    before = torch.random.get_rng_state()
    assert mlp_classifier_test(features, plan) == mlp_classifier_test(features, plan)
    assert torch.equal(torch.random.get_rng_state(), before)
    few = PermutationPlan(list("abcdefg"), list("xxxyyyy"), n_permutations=19)
    with pytest.raises(TooFewPatientsError, match="at least 4 patients"):
        mlp_classifier_test(np.zeros((7, 2)), few)


def test_the_interval_of_mmd_covers_zero_under_no_difference_and_the_truth_under_one(monkeypatch):
    """The kernel's width is fixed, so that the population value of two shifted Gaussians is known."""
    width, shift = 4.0, 1.0
    monkeypatch.setattr(mmd, "median_distance", lambda *_, **__: width)
    squares = [(s * width) ** 2 for s in (0.5, 1, 2)]
    truth = np.mean([2 * (s2 / (s2 + 2)) ** 4 * (1 - math.exp(-(shift**2) / (2 * (s2 + 2)))) for s2 in squares])
    covered = {0.0: 0, shift: 0}
    for run in range(40):
        for moved in covered:
            ids, institutions, features, _ = clustered(run, patients=(40, 40))
            features[np.array(institutions) == "h1", 0] += moved
            found = mmd_test(features, PermutationPlan(ids, institutions, n_permutations=99, seed=run))
            low, high = (found.null_mean + bound * found.null_sd for bound in (found.low, found.high))
            covered[moved] += low <= (truth if moved else 0.0) <= high
    assert min(covered.values()) >= 40 * (0.95 - 3 * math.sqrt(0.05 * 0.95 / 40)), covered


def test_no_interval_under_twenty_patients():
    ids, institutions, features, _ = clustered(1, patients=(19, 40))
    found = mmd_test(features, PermutationPlan(ids, institutions, n_permutations=19))
    assert math.isnan(found.low)
    assert "fewer than 20 patients" in found.note


def test_vocabulary_and_length_within_cells_are_weighted_sums_over_cells():
    ids, sides, texts = corpus_of_words(3, 0.5, patients=8)
    plan = PermutationPlan(ids, sides, n_permutations=19)
    shares, tokens = token_shares(texts, ids)
    words = np.random.default_rng(0).integers(5, 50, len(ids))
    cells = np.tile(["letter", "note"], len(ids) // 2)
    weighted = {"vocabulary": 0.0, "vocabulary_kl": 0.0, "length": 0.0}
    for cell in ("letter", "note"):
        inside = np.flatnonzero(cells == cell)
        alone = PermutationPlan([ids[i] for i in inside], [sides[i] for i in inside], n_permutations=1)
        shift = vocabulary_test(shares[inside], tokens, alone)
        weighted["vocabulary"] += shift.jensen_shannon.statistic / 2
        weighted["vocabulary_kl"] += shift.kullback_leibler.statistic / 2
        weighted["length"] += math.log(length_test(words[inside], alone).effect) / 2
    whole = vocabulary_test(shares, tokens, plan, cells=cells)
    assert whole.jensen_shannon.statistic == pytest.approx(weighted["vocabulary"], abs=1e-12)
    assert whole.kullback_leibler.statistic == pytest.approx(weighted["vocabulary_kl"], abs=1e-12)
    length = length_test(words, plan, cells=cells)
    assert math.log(length.effect) == pytest.approx(weighted["length"])
    assert length.name == "length"
    for result in (length, whole.jensen_shannon):
        assert "approximate" in result.note
        assert math.isnan(result.low)
