"""Penalties against forgetting: the Fisher information is the true one, the distance is what the formula says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from clinical_nlp.adaptation.forgetting import ForgettingConfig, check_forgetting, diagonal_fisher, distance_penalty
from clinical_nlp.adaptation.strategies import StrategyConfig
from clinical_nlp.errors import ConfigError, ModelError


class Softmax(torch.nn.Module):
    """Logits W x for one-hot tokens x with weights of their own: the Fisher information is known exactly."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[0.5, -1.0], [0.0, 0.3], [-0.2, 1.1]]))
        self.register_buffer("features", torch.tensor([[1.0, 2.0], [0.5, -1.0], [0.0, 3.0]]))

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.features[input_ids] @ self.weight.T)


def test_fisher_converges_to_the_closed_form():
    model = Softmax()
    note = {"input_ids": torch.tensor([[0, 1]]), "labels": torch.tensor([[-100, 2]])}
    # Shifted: the one target is predicted from the first token, so F_kd = p_k (1 - p_k) x_d^2.
    batches = [(note, 1.0)] * 4000
    found = diagonal_fisher(model, batches, shifted=True, seed=0)["weight"]
    x = model.features[0]
    p = torch.softmax(model.weight.detach() @ x, -1)
    wanted = (p * (1 - p))[:, None] * x[None].square()
    assert torch.allclose(found, wanted / wanted.mean(), rtol=0.06)
    assert found.mean() == pytest.approx(1.0, rel=1e-4)
    assert torch.equal(found, diagonal_fisher(model, batches, shifted=True, seed=0)["weight"])


def test_a_weight_of_zero_leaves_a_note_out_and_no_notes_are_refused():
    model = Softmax()
    first = {"input_ids": torch.tensor([[0, 1]]), "labels": torch.tensor([[0, 1]])}
    second = {"input_ids": torch.tensor([[2, 1]]), "labels": torch.tensor([[0, 1]])}
    alone = diagonal_fisher(model, [(first, 1.0)] * 50, shifted=False, seed=0)["weight"]
    weighted = diagonal_fisher(model, [(first, 1.0)] * 50 + [(second, 0.0)] * 50, shifted=False, seed=0)["weight"]
    assert torch.allclose(alone, weighted)
    with pytest.raises(ModelError, match=r"forgetting\.corpus"):
        diagonal_fisher(model, [], shifted=False, seed=0)


def test_the_penalty_is_half_the_weighted_sum_of_squares_from_where_the_weights_were():
    model = torch.nn.ModuleDict({"network": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 1)})
    weights = {"network.weight": torch.tensor([[1.0, 2.0], [0.0, 1.0]])}
    head = {"head.weight", "head.bias"}
    ewc = distance_penalty(model, 3.0, weights=weights)
    l2_sp = distance_penalty(model, 3.0, free=head)
    assert float(ewc(model, {}).detach()) == 0.0
    with torch.no_grad():
        model["network"].weight += torch.tensor([[0.1, 0.2], [0.3, 0.4]])
        model["network"].bias += 1.0
        model["head"].weight += 5.0
    assert float(ewc(model, {}).detach()) == pytest.approx(1.5 * (0.01 + 2 * 0.04 + 0.16))
    assert float(l2_sp(model, {}).detach()) == pytest.approx(1.5 * (0.01 + 0.04 + 0.09 + 0.16 + 2))
    l2_sp(model, {}).backward()
    assert torch.allclose(model["network"].bias.grad, torch.full((2,), 3.0))
    assert model["head"].weight.grad is None


@pytest.mark.parametrize("strategy", ["head", "lora", "dora", "qlora", "bottleneck", "ia3"])
def test_a_penalty_that_would_do_nothing_is_refused(strategy):
    with pytest.raises(ConfigError, match="does not move them"):
        check_forgetting(ForgettingConfig(name="l2_sp"), StrategyConfig(name=strategy))
    check_forgetting(ForgettingConfig(), StrategyConfig(name=strategy))


def test_ewc_needs_source_notes():
    with pytest.raises(ConfigError, match=r"forgetting\.corpus"):
        check_forgetting(ForgettingConfig(name="ewc"), StrategyConfig(name="full"))
    check_forgetting(ForgettingConfig(name="ewc", corpus="mtsamples"), StrategyConfig(name="gradual"))
