"""Test-time adaptation: norm layers alone, less entropy, and everything put back where the model collapses."""

from __future__ import annotations

import pytest
import torch
from tiny_models import write_decoder
from tiny_training import tagging

from clinical_nlp.errors import InputError, ModelError
from clinical_nlp.invariance.norm_adaptation import adapt_norms, norm_weights
from clinical_nlp.tasks import ner


def trained(seed=0):
    """Return a classifier with a norm layer that has learned two classes, and a drawer of batches."""

    def batch(number, shift=0.0, one_sided=False):
        generator = torch.Generator().manual_seed(number)
        label = torch.randint(0, 2, (64,), generator=generator) * (not one_sided)
        x = torch.randn(64, 6, generator=generator) + shift
        x[:, 0] += 3.0 * label - 1.5
        return x, label

    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.LayerNorm(16), torch.nn.GELU(), torch.nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(150):
        x, label = batch(step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), label).backward()
        optimizer.step()
    return model, batch


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_norm_layers_alone_move_and_predictions_get_surer():
    model, batch = trained()
    model[0].weight.requires_grad_(False)
    batches, before = [batch(1000 + n, 0.5)[0] for n in range(12)], state(model)
    found = adapt_norms(model, batches, model, learning_rate=0.01)
    moved = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert moved == {"1.weight", "1.bias"} == set(norm_weights(model))
    assert not found.collapsed
    assert found.steps == 12
    assert found.entropy_after < found.entropy_before
    assert found.diversity_after >= 0.7 * found.diversity_before
    assert not model[0].weight.requires_grad  # as it was
    assert model[3].weight.requires_grad
    assert model.training
    assert all(value.grad is None for value in model.parameters())


def test_a_collapse_puts_every_weight_back():
    model, batch = trained()
    before = state(model)
    found = adapt_norms(model, [batch(2000 + n)[0] for n in range(30)], model, learning_rate=3.0)
    assert found.collapsed
    assert found.steps < 30
    assert (found.entropy_after, found.diversity_after) == (found.entropy_before, found.diversity_before)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_a_prediction_that_is_not_a_number_counts_as_a_collapse():
    model, batch = trained()
    before = state(model)
    calls = []

    def logits(x):
        calls.append(1)
        return model(x) * (float("nan") if len(calls) > 3 else 1.0)

    assert adapt_norms(model, [batch(n)[0] for n in range(2)], logits).collapsed
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_without_norms_notes_or_predictions_it_is_refused():
    plain = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match="norm layers"):
        adapt_norms(plain, [torch.zeros(1, 2)], plain)
    model, _ = trained()
    with pytest.raises(InputError, match="there are none"):
        adapt_norms(model, [], model)
    with pytest.raises(InputError, match="no word or note"):
        adapt_norms(model, [torch.zeros(0, 6)], model)


@pytest.mark.parametrize("strategy", ["lora", "qlora"])
def test_it_moves_the_norms_of_a_tagger_on_any_base(tmp_path, strategy):
    _, tagger, windows = tagging(write_decoder(tmp_path / "decoder"), strategy)
    batches = [ner.collate(windows[begin : begin + 4], 0) for begin in range(0, 12, 4)]

    def logits(batch):
        return tagger(batch["input_ids"], batch["attention_mask"])["logits"][batch["labels"] != -100]

    before = state(tagger)
    found = adapt_norms(tagger, batches, logits)
    moved = {name for name, value in state(tagger).items() if not torch.equal(value, before[name])}
    assert found.steps == 3
    assert found.collapsed or moved
    assert moved <= set(norm_weights(tagger))
    assert any("norm" in name for name in norm_weights(tagger))
