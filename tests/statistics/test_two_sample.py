"""Two-sample tests: equal to naive loops, right size when patients cluster, power when something shifts."""

import math

import numpy as np
import pytest

from clinical_nlp.errors import UsageError
from clinical_nlp.statistics import two_sample
from clinical_nlp.statistics.permutation import PermutationPlan
from clinical_nlp.statistics.text_measures import token_shares
from clinical_nlp.statistics.two_sample import (
    domain_classifier_test,
    length_test,
    median_distance,
    mmd_test,
    utilisation_test,
    vocabulary_test,
)


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
    width = median_distance(features - features.mean(0), plan)

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
    monkeypatch.setattr(two_sample, "_CELLS_AT_ONCE", 200)
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
