"""Strategies: each trains exactly what it says, on a decoder and an encoder, and comes back from disk as it was."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_models import write_decoder, write_encoder

from clinical_nlp.adaptation import STRATEGIES
from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy, parameter_groups, trainable_count
from clinical_nlp.errors import ConfigError, ModelError
from clinical_nlp.models.adapters import ADAPTER, has_adapter, save_adapter, stack_adapters
from clinical_nlp.models.loading import backbone_prefix, load_base
from clinical_nlp.tasks import ner

ADAPTERS = ["lora", "dora", "qlora", "bottleneck", "ia3"]
ATTENTION = {"decoder": r"self_attn\.[qkvo]_proj", "encoder": r"attention\.(self\.(query|key|value)|output\.dense)"}
FORWARD = {"decoder": r"mlp\.(gate|up|down)_proj", "encoder": r"(intermediate|(?<!attention\.)output)\.dense"}
OUTPUTS = {
    "decoder": r"(self_attn\.o_proj|mlp\.down_proj)",
    "encoder": r"(attention\.output\.dense|(?<!attention\.)output\.dense)",
}
SCALED = {
    "decoder": r"(self_attn\.[kv]_proj|mlp\.down_proj)",
    "encoder": r"(attention\.self\.(key|value)|(?<!attention\.)output\.dense)",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"decoder": str(write_decoder(folder / "decoder")), "encoder": str(write_encoder(folder / "encoder"))}


def adapted(models, kind, strategy, *, seed=0, base="backbone", **settings):
    settings = StrategyConfig(name=strategy, rank=4, size=8, **settings)
    loaded = load_base(models[kind], kind=base, quantization=settings.quantization)
    return apply_strategy(loaded.network, settings, seed=seed), settings


def said(kind, strategy):
    """The pattern of the parameters that a strategy says it trains."""
    linear = rf"layers?\.\d+\.({ATTENTION[kind]}|{FORWARD[kind]})"
    return {
        "head": r"(?!)",
        "full": r".*",
        "lp_ft": r".*",
        "gradual": r".*",
        "lora": rf".*{linear}\.lora_[AB]\.task\.weight",
        "qlora": rf".*{linear}\.lora_[AB]\.task\.weight",
        "dora": rf".*{linear}\.lora_([AB]|magnitude_vector)\.task\.weight",
        "bottleneck": rf".*layers?\.\d+\.{OUTPUTS[kind]}\.bottleneck_task\.(shrink|grow)\.(weight|bias)",
        "ia3": rf".*layers?\.\d+\.{SCALED[kind]}\.ia3_l\.task",
    }[strategy]


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_a_strategy_trains_exactly_what_it_says(models, kind, strategy):
    network, settings = adapted(models, kind, strategy)
    pattern = re.compile(said(kind, strategy))
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == bool(pattern.fullmatch(name)), name
        assert not parameter.requires_grad or parameter.dtype == torch.float32
    layers = 2
    found = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    linear = 7 if kind == "decoder" else 6
    expected = {
        "lora": 2 * linear * layers,
        "qlora": 2 * linear * layers,
        "dora": 3 * linear * layers,
        "bottleneck": 8 * layers,
        "ia3": 3 * layers,
        "head": 0,
    }
    assert len(found) == expected.get(strategy, len(list(network.parameters())))

    # After a step of training with every weight given a gradient, nothing else has moved.
    if strategy == "head":
        return
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    model = ner.build_model(network, 3, seed=0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # the inner half of an update has no gradient until the outer half has left zero
        optimizer.zero_grad()
        model(ids, torch.ones_like(ids), torch.ones_like(ids))["loss"].backward()
        optimizer.step()
    unused = ("pooler",)  # nothing reads it
    for name, value in network.named_parameters():
        moved = not torch.equal(value, before[name])
        assert moved == (bool(pattern.fullmatch(name)) and not any(part in name for part in unused)), name
    assert settings.name == strategy


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("strategy", ADAPTERS)
def test_the_same_seed_gives_the_same_adapter_which_changes_nothing_at_first(models, kind, strategy):
    plain = load_base(models[kind], quantization="nf4" if strategy == "qlora" else "none").network.eval()
    first, second, third = (adapted(models, kind, strategy, seed=seed)[0].eval() for seed in (5, 5, 6))
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.inference_mode():
        assert torch.allclose(first(input_ids=ids).last_hidden_state, plain(input_ids=ids).last_hidden_state, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    differs = any(not torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters(), strict=True))
    assert differs == (strategy != "ia3")  # which begins at ones


def shaken(network):
    """Give the adapter weights that do something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def hidden(network, ids):
    with torch.inference_mode():
        return network(input_ids=ids).last_hidden_state


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("strategy", ADAPTERS)
@pytest.mark.parametrize("above", [None, *ADAPTERS])
def test_adapters_come_back_from_disk_alone_and_stacked(models, tmp_path, kind, strategy, above):
    ids = torch.arange(3, 40).reshape(1, -1)
    network, settings = adapted(models, kind, strategy)
    save_adapter(shaken(network), tmp_path / "first", name=ADAPTER)
    folders, reference, quantization = [tmp_path / "first"], hidden(network, ids), settings.quantization
    if above is not None:
        upper = StrategyConfig(name=above, rank=2, size=4)
        quantization = upper.quantization
        base = load_base(models[kind], quantization=quantization).network
        if quantization == "nf4" and strategy in ("dora", "ia3"):
            with pytest.raises(ModelError, match="merge"):
                apply_strategy(stack_adapters(base, folders), upper, seed=3)
            return
        network = apply_strategy(stack_adapters(base, folders), upper, seed=3)
        save_adapter(shaken(network), tmp_path / "second", name=ADAPTER)
        folders, reference = [*folders, tmp_path / "second"], hidden(network, ids)
    again = stack_adapters(load_base(models[kind], quantization=quantization).network, folders).eval()
    assert torch.allclose(hidden(again, ids), reference, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    plain = load_base(models[kind], quantization=quantization).network.eval()
    assert not torch.allclose(hidden(plain, ids), reference, atol=1e-2)


@pytest.mark.parametrize("strategy", ADAPTERS)
def test_an_adapter_of_a_language_model_fits_its_backbone(models, tmp_path, strategy):
    network, settings = adapted(models, "decoder", strategy, base="causal")
    inner = network.get_base_model() if hasattr(network, "get_base_model") else network
    save_adapter(shaken(network), tmp_path / "a", name=ADAPTER, prefix=backbone_prefix(inner))
    backbone = load_base(models["decoder"], quantization=settings.quantization).network
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.inference_mode():
        wanted = network(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(hidden(stack_adapters(backbone, [tmp_path / "a"]).eval(), ids), wanted, atol=1e-5)


def test_a_moving_base_takes_earlier_adapters_in_and_refuses_what_it_cannot(models, tmp_path):
    ids = torch.arange(3, 40).reshape(1, -1)
    for strategy in ("lora", "dora", "ia3", "bottleneck"):
        network, _ = adapted(models, "decoder", strategy)
        folder = tmp_path / strategy
        save_adapter(shaken(network), folder, name=ADAPTER)
        base = stack_adapters(load_base(models["decoder"]).network, [folder])
        if strategy == "bottleneck":
            with pytest.raises(ConfigError, match="bottleneck"):
                apply_strategy(base, StrategyConfig(name="full"), seed=0)
            continue
        merged = apply_strategy(base, StrategyConfig(name="full"), seed=0)
        assert not has_adapter(merged)
        assert not hasattr(merged, "peft_config")
        assert (hidden(merged.eval(), ids) - hidden(network, ids)).abs().max() < 1e-3, strategy
    base = load_base(models["decoder"], quantization="nf4").network
    with pytest.raises(ConfigError, match="4-bit"):
        apply_strategy(base, StrategyConfig(name="gradual"), seed=0)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_groups_cover_every_weight_once_and_lower_layers_learn_later_and_slower(models, kind):
    for strategy in STRATEGIES:
        network, settings = adapted(models, kind, strategy)
        model = ner.build_model(network, 3, seed=0)
        groups = parameter_groups(model, settings, head="head", learning_rate=1.0, head_learning_rate=9.0)
        names = [name for group in groups for name in group.names]
        assert sorted(names) == sorted(name for name, value in model.named_parameters() if value.requires_grad)
        assert (groups[0].names, groups[0].learning_rate) == (("head.weight", "head.bias"), 9.0)
        assert groups[0].start == 0.0
    network, settings = adapted(models, kind, "gradual", layer_decay=0.5, frozen_share=0.6)
    model = ner.build_model(network, 3, seed=0)
    groups = parameter_groups(model, settings, head="head", learning_rate=1.0, head_learning_rate=9.0)[1:]
    by_name = {name: group for group in groups for name in group.names}
    layer = {index: next(by_name[name] for name in by_name if f".{index}." in name) for index in (0, 1)}
    embeddings = next(group for name, group in by_name.items() if "embed" in name)
    assert (layer[1].learning_rate, layer[0].learning_rate, embeddings.learning_rate) == (1.0, 0.5, 0.25)
    assert (layer[1].start, layer[0].start, embeddings.start) == pytest.approx((0.2, 0.4, 0.6))
    network, settings = adapted(models, kind, "lp_ft", frozen_share=0.25)
    with pytest.raises(ConfigError, match="no head"):
        parameter_groups(network, settings, head=None, learning_rate=1.0, head_learning_rate=1.0)
    model = ner.build_model(network, 3, seed=0)
    starts = {
        group.start for group in parameter_groups(model, settings, head="head", learning_rate=1, head_learning_rate=1)
    }
    assert starts == {0.0, 0.25}


def test_four_bit_weights_count_as_what_they_stand_for(models):
    four, _ = adapted(models, "decoder", "qlora")
    whole, _ = adapted(models, "decoder", "lora")
    assert trainable_count(four) == trainable_count(whole)


def test_an_architecture_without_its_own_keys_and_values_is_refused_for_ia3():
    from transformers import GPTNeoXConfig, GPTNeoXModel

    config = GPTNeoXConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ConfigError, match="lora"):
        apply_strategy(GPTNeoXModel(config), StrategyConfig(name="ia3"), seed=0)
