"""The loss in pieces is the model's own loss, with the same gradients."""

from __future__ import annotations

import pytest
import torch
from tiny_models import write_decoder

from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy
from clinical_nlp.models.loading import load_base
from clinical_nlp.tasks import pretraining
from clinical_nlp.training import linear_cross_entropy
from clinical_nlp.training.linear_cross_entropy import use_linear_cross_entropy


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return str(write_decoder(tmp_path_factory.mktemp("decoder")))


def batch():
    rows = [[1, *range(5, 5 + size), 2] for size in (30, 7, 19, 1)]
    return pretraining.collate_padded([{"input_ids": row} for row in rows], 0)


@pytest.mark.parametrize("strategy", ["full", "lora"])
@pytest.mark.parametrize("num_items", [None, 100])
@pytest.mark.parametrize("piece", [1, 2**23])
def test_loss_and_gradients_are_those_of_the_model(decoder, monkeypatch, strategy, num_items, piece):
    monkeypatch.setattr(linear_cross_entropy, "PIECE_BYTES", piece)
    found = []
    for replaced in (False, True):
        network = apply_strategy(load_base(decoder, kind="causal").network, StrategyConfig(name=strategy), seed=0)
        assert not replaced or use_linear_cross_entropy(network)
        loss = network(**batch(), num_items_in_batch=num_items)["loss"]
        (3 * loss).backward()
        found.append((loss.detach(), {name: p.grad for name, p in network.named_parameters() if p.requires_grad}))
    (own, gradients), (ours, others) = found
    assert torch.allclose(own, ours, rtol=1e-5)
    assert gradients.keys() == others.keys()
    for name, value in gradients.items():
        assert torch.allclose(value, others[name], atol=1e-6), name


def test_without_labels_the_model_answers_as_before(decoder):
    network = load_base(decoder, kind="causal").network
    inputs = {"input_ids": batch()["input_ids"]}
    before = network(**inputs).logits
    use_linear_cross_entropy(network)
    assert torch.equal(network(**inputs).logits, before)


def test_a_batch_without_targets_costs_nothing(decoder):
    network = load_base(decoder, kind="causal").network
    use_linear_cross_entropy(network)
    inputs = batch()
    inputs["labels"][:] = -100
    loss = network(**inputs)["loss"]
    loss.backward()
    assert float(loss.detach()) == 0.0


def test_a_head_that_shapes_its_logits_keeps_its_own_loss(decoder):
    network = load_base(decoder, kind="causal").network
    network.config.final_logit_softcapping = 30.0
    assert not use_linear_cross_entropy(network)
