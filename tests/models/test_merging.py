"""Merging: onto what the adapter was trained on, with the same logits, and back from disk."""

from __future__ import annotations

import pytest
import torch
from tiny_models import write_decoder, write_encoder

from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy
from clinical_nlp.errors import ModelError
from clinical_nlp.models import loading, merging
from clinical_nlp.models.adapters import ADAPTER, save_adapter, stack_adapters
from clinical_nlp.models.loading import backbone_prefix, load_base
from clinical_nlp.models.resolve import ResolvedModel

IDS = torch.arange(3, 40).reshape(1, -1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"decoder": str(write_decoder(folder / "decoder")), "encoder": str(write_encoder(folder / "encoder"))}


def hidden(network):
    with torch.inference_mode():
        return network.eval()(input_ids=IDS, output_hidden_states=True).hidden_states[-1]


def adapter(folder, model, strategy, kind):
    settings = StrategyConfig(name=strategy, rank=4)
    loaded = load_base(model, kind=kind, quantization=settings.quantization)
    network = apply_strategy(loaded.network, settings, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    inner = network.get_base_model() if hasattr(network, "get_base_model") else network
    save_adapter(network, folder, name=ADAPTER, prefix=backbone_prefix(inner) if kind == "language" else "")
    return network


@pytest.mark.parametrize("strategy", ["lora", "dora", "qlora", "ia3"])
@pytest.mark.parametrize(
    ("model", "kind"),
    [("decoder", "backbone"), ("decoder", "language"), ("encoder", "backbone"), ("encoder", "language")],
)
def test_merged_gives_what_the_adapter_gave(models, tmp_path, monkeypatch, strategy, model, kind):
    network = adapter(tmp_path / "adapter", models[model], strategy, kind)
    resolved = ResolvedModel("run", models[model], (tmp_path / "adapter",))
    with monkeypatch.context() as patch:
        patch.setattr(loading, "resolve_model", lambda name: resolved)
        merged = merging.load_merged("run", kind=kind, quantization="nf4" if strategy == "qlora" else "none")
    assert not hasattr(merged.network, "peft_config")
    assert torch.allclose(hidden(merged.network), hidden(network), atol=1e-4)
    merged.network.save_pretrained(tmp_path / "merged")
    merged.tokenizer.save_pretrained(tmp_path / "merged")
    again = load_base(str(tmp_path / "merged"), kind=kind).network
    assert torch.allclose(hidden(again), hidden(network), atol=1e-4)
    if strategy == "qlora":  # the trap: on the original weights it is another model
        plain = load_base(models[model], kind=kind).network
        prefix = backbone_prefix(plain) if kind == "language" else ""
        naive = stack_adapters(plain, [tmp_path / "adapter"], prefix=prefix)
        assert not torch.allclose(hidden(naive), hidden(network), atol=1e-3)


def test_what_cannot_be_merged_is_refused(models, tmp_path, monkeypatch):
    adapter(tmp_path / "adapter", models["decoder"], "bottleneck", "backbone")
    resolved = ResolvedModel("run", models["decoder"], (tmp_path / "adapter",))
    monkeypatch.setattr(loading, "resolve_model", lambda name: resolved)
    with pytest.raises(ModelError, match="bottleneck"):
        merging.load_merged("run", kind="backbone", quantization="none")
    monkeypatch.setattr(loading, "resolve_model", lambda name: ResolvedModel("run", models["decoder"]))
    with pytest.raises(ModelError, match="no adapter"):
        merging.load_merged("run", kind="backbone", quantization="none")
