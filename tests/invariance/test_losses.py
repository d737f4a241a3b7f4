"""What objectives are made of, against loops written out and against autograd."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

from clinical_nlp.invariance import losses

DOUBLE = torch.float64


def rows(n, d, seed, shift=0.0):
    return torch.randn(n, d, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)) + shift


def naive_mmd(x, y, people_x, people_y, squared_width):
    def k(a, b):
        squared = sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True))
        return sum(math.exp(-squared / (2 * w * w * squared_width)) for w in losses.WIDTHS) / len(losses.WIDTHS)

    def within(z, people):
        pairs = [(i, j) for i in range(len(z)) for j in range(len(z)) if people[i] != people[j]]
        return sum(k(z[i], z[j]) for i, j in pairs) / len(pairs)

    across = sum(k(a, b) for a in x for b in y) / (len(x) * len(y))
    return within(x, people_x) + within(y, people_y) - 2 * across


@pytest.mark.parametrize("seed", range(5))
def test_mmd_equals_the_naive_loop_without_pairs_of_one_patient(seed):
    x, y = rows(7, 3, seed), rows(9, 3, seed + 50, 0.7)
    generator = np.random.default_rng(seed)
    people = generator.integers(0, 4, 7), generator.integers(4, 8, 9)
    squares = sorted(
        sum((float(a) - float(b)) ** 2 for a, b in zip(p, q, strict=True))
        for p, q in itertools.combinations(torch.cat([x, y]), 2)
    )
    width = 0.5 * squares[(len(squares) - 1) // 2]
    found = losses.mmd_loss(x, y, patients=(torch.tensor(people[0]), torch.tensor(people[1])))
    assert float(found) == pytest.approx(naive_mmd(x, y, *people, width), rel=1e-10)


def test_mmd_has_no_bias_in_small_batches():
    drawn = [float(losses.mmd_loss(rows(4, 8, 2 * s), rows(4, 8, 2 * s + 1))) for s in range(3000)]
    biased = np.mean(drawn) / (np.std(drawn) / math.sqrt(len(drawn)))
    assert abs(biased) < 3.5
    assert float(losses.mmd_loss(rows(40, 8, 1), rows(40, 8, 2, 2.0))) > 0.3


def test_mmd_of_one_patient_says_nothing():
    x = rows(3, 2, 0).requires_grad_()
    loss = losses.mmd_loss(x, rows(4, 2, 1), patients=(torch.zeros(3), torch.arange(4)))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not x.grad.any()


@pytest.mark.parametrize("seed", range(5))
def test_coral_equals_the_naive_loop(seed):
    x, y = rows(6, 4, seed), rows(11, 4, seed + 9, 0.3) * 1.7
    d = 4

    def moments(z):
        mean = [sum(float(r[i]) for r in z) / len(z) for i in range(d)]
        covariance = [
            [sum((float(r[i]) - mean[i]) * (float(r[j]) - mean[j]) for r in z) / (len(z) - 1) for j in range(d)]
            for i in range(d)
        ]
        return mean, covariance

    (m, c), (m2, c2) = moments(x), moments(y)
    wanted = sum((a - b) ** 2 for a, b in zip(m, m2, strict=True)) / d
    wanted += sum((c[i][j] - c2[i][j]) ** 2 for i in range(d) for j in range(d)) / (4 * d * d)
    assert float(losses.coral_loss(x, y)) == pytest.approx(wanted, rel=1e-10)
    assert float(losses.coral_loss(x[:1], y)) == 0.0


def cross_entropies(label):
    return lambda logits: torch.nn.functional.cross_entropy(logits, label, reduction="none")


@pytest.mark.parametrize("seed", range(5))
def test_irm_equals_the_naive_product_of_the_gradients_of_two_halves_of_patients(seed):
    generator = np.random.default_rng(seed)
    logits = rows(24, 3, seed)
    label = torch.tensor(generator.integers(0, 3, 24))
    institution, patient = generator.integers(0, 2, 24), generator.integers(0, 6, 24)
    patient = patient + 10 * institution
    wanted = []
    for name in (0, 1):
        people = sorted({p for p, i in zip(patient, institution, strict=True) if i == name})
        products = 1.0
        for half in (0, 1):
            members = [n for n in range(24) if institution[n] == name and people.index(patient[n]) % 2 == half]
            slope = 0.0
            for n in members:  # d/dw of -log softmax(w z)_y at w = 1
                z = [float(v) for v in logits[n]]
                total = sum(math.exp(v) for v in z)
                slope += sum(math.exp(v) / total * v for v in z) - z[int(label[n])]
            products *= slope / len(members)
        wanted.append(products)
    found = losses.irm_penalty(logits, cross_entropies(label), torch.tensor(institution), torch.tensor(patient))
    assert float(found) == pytest.approx(sum(wanted) / 2, rel=1e-10)


def test_irm_leaves_an_institution_of_one_patient_out():
    logits = rows(6, 2, 0).requires_grad_()
    label, institution = torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([0, 0, 0, 1, 1, 1])
    patient = torch.tensor([0, 1, 2, 7, 7, 7])
    both = losses.irm_penalty(logits, cross_entropies(label), institution, patient)
    first = losses.irm_penalty(logits[:3], cross_entropies(label[:3]), institution[:3], patient[:3])
    assert float(both) == pytest.approx(float(first))
    alone = losses.irm_penalty(logits, cross_entropies(label), institution, torch.zeros(6))
    alone.backward()
    assert float(alone.detach()) == 0.0


def test_vrex_is_the_variance_of_the_risks():
    loss, institution = torch.tensor([1.0, 3.0, 5.0, 9.0]), torch.tensor([4, 4, 2, 2])
    names, risk = losses.risks(loss, institution)
    assert names.tolist() == [2, 4]
    assert risk.tolist() == [7.0, 2.0]
    assert float(losses.vrex_penalty(risk)) == pytest.approx(np.var([7.0, 2.0]))


def test_gradients_are_those_of_the_function():
    x, y = rows(5, 3, 0).requires_grad_(), rows(6, 3, 1, 0.5).requires_grad_()
    width = torch.tensor(2.0, dtype=DOUBLE)  # with the median of the batch, which is held fixed, it fails by design
    assert torch.autograd.gradcheck(lambda a, b: losses.mmd_loss(a, b, squared_width=width), (x, y))
    assert torch.autograd.gradcheck(losses.coral_loss, (x, y))
    logits = rows(12, 3, 3).requires_grad_()
    label, institution = torch.arange(12) % 3, torch.arange(12) % 2
    irm = lambda z: losses.irm_penalty(z, cross_entropies(label), institution, torch.arange(12))  # noqa: E731
    assert torch.autograd.gradcheck(irm, (logits,))
    vrex = lambda z: losses.vrex_penalty(losses.risks(cross_entropies(label)(z), institution)[1])  # noqa: E731
    assert torch.autograd.gradcheck(vrex, (logits,))


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 2.5])
def test_the_reversed_gradient_is_minus_lambda_times_that_of_autograd(strength):
    def score(z):
        return (z.tanh() @ rows(4, 2, 5)).square().sum()

    x = rows(6, 4, 4).requires_grad_()
    (plain,) = torch.autograd.grad(score(x), x)
    assert torch.equal(losses.reverse_gradient(x, strength), x)
    (turned,) = torch.autograd.grad(score(losses.reverse_gradient(x, strength)), x)
    torch.testing.assert_close(turned, -strength * plain, rtol=0, atol=0)
    if strength:
        with pytest.raises(GradcheckError):
            torch.autograd.gradcheck(lambda z: losses.reverse_gradient(z, strength), (x,))


def test_the_schedule_of_the_reversal_is_that_of_the_paper():
    assert losses.reversal_strength(0.0) == 0.0
    assert losses.reversal_strength(0.5) == pytest.approx(2 / (1 + math.exp(-5)) - 1)
    assert losses.reversal_strength(7.0) == losses.reversal_strength(1.0) == pytest.approx(0.9999092)


def test_balanced_weights_give_every_institution_the_same_say():
    institution = torch.tensor([0, 0, 0, 1, 2, 2])
    weights = losses.balanced_weights(institution)
    assert float(weights.mean()) == pytest.approx(1.0)
    assert [float(weights[institution == name].sum()) for name in range(3)] == pytest.approx([2.0, 2.0, 2.0])


def test_balanced_weights_within_labels_make_prevalence_no_clue():
    generator = np.random.default_rng(0)
    institution = torch.tensor(generator.integers(0, 2, 400))
    label = torch.tensor((generator.random(400) < np.where(institution.numpy() == 0, 0.2, 0.6)).astype(int))
    weights = losses.balanced_weights(institution, label)
    share = [float(weights[(institution == i) & (label == 1)].sum() / weights[institution == i].sum()) for i in (0, 1)]
    assert share[0] == pytest.approx(share[1], abs=1e-5)
    alone = losses.balanced_weights(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]))
    assert alone.tolist() == [0.0, 0.0, 0.0, 0.0]
