"""4-bit loading on a CPU: evaluation between two training steps must not change the gradients."""

from __future__ import annotations

import pytest
import torch
from tiny_models import write_decoder, write_encoder

from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy
from clinical_nlp.errors import ModelError
from clinical_nlp.models import loading

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.fixture
def decoder(tmp_path):
    return write_decoder(tmp_path)


def first_gradient(model):
    model.train()
    model.zero_grad()
    batch = torch.arange(3, 35).reshape(1, -1)
    model(input_ids=batch, labels=batch).loss.backward()
    name, parameter = next((n, p) for n, p in model.named_parameters() if "q_proj.lora_B" in n)
    assert parameter.grad is not None, name
    return parameter.grad.clone()


def evaluate(model):
    model.eval()
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, 35).reshape(1, -1)).logits


def test_evaluation_between_training_steps_leaves_gradients_as_they_were(decoder):
    base = loading.load_base(str(decoder), kind="causal", quantization="nf4")
    model = apply_strategy(base.network, StrategyConfig(name="qlora", rank=4), seed=0)
    before = first_gradient(model)
    evaluate(model)
    after = first_gradient(model)
    assert before.abs().sum() > 0
    assert torch.equal(before, after)


def test_without_the_guard_the_trap_is_there(decoder, monkeypatch):
    """The check above fails without the guard, on the processors that have the trap."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16() or torch.cuda.is_available():
        pytest.skip("this processor does not repack 4-bit weights")
    monkeypatch.setattr(loading, "_guard_four_bit", lambda network, name: None)
    base = loading.load_base(str(decoder), kind="causal", quantization="nf4")
    model = apply_strategy(base.network, StrategyConfig(name="qlora", rank=4), seed=0)
    before = first_gradient(model)
    evaluate(model)
    try:
        after = first_gradient(model)
    except (RuntimeError, AssertionError):
        return
    assert not torch.equal(before, after)


def test_every_four_bit_layer_is_guarded_also_below_an_adapter(decoder):
    base = loading.load_base(str(decoder), quantization="nf4")
    model = apply_strategy(base.network, StrategyConfig(name="qlora", rank=4), seed=0)
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_double_quantisation_is_on_and_the_language_head_is_plain(decoder):
    base = loading.load_base(str(decoder), kind="causal", quantization="nf4")
    layer = base.network.model.layers[0].self_attn.q_proj
    assert layer.weight.quant_state.nested
    assert layer.weight.quant_state.quant_type == "nf4"
    assert type(base.network.lm_head) is torch.nn.Linear


def test_a_quantised_head_is_refused(decoder):
    base = loading.load_base(str(decoder), kind="causal", quantization="nf4")
    base.network.lm_head = bitsandbytes.nn.Linear4bit(64, 300)
    with pytest.raises(ModelError, match="head"):
        loading._guard_four_bit(base.network, "x")


def test_encoders_load_in_four_bit_too(tmp_path):
    base = loading.load_base(str(write_encoder(tmp_path)), quantization="nf4")
    assert not base.is_decoder
    model = apply_strategy(base.network, StrategyConfig(name="qlora", rank=4), seed=0)
    hidden = model(input_ids=torch.arange(3, 20).reshape(1, -1)).last_hidden_state
    hidden.sum().backward()
    assert any(p.grad is not None for n, p in model.named_parameters() if "lora_A" in n)
