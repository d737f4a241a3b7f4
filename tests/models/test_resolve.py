"""What a base model name may stand for, and what is refused."""

from __future__ import annotations

import json

import pytest
from tiny_models import write_decoder

from clinical_nlp.errors import MissingDataError, ModelError, RunError
from clinical_nlp.models.resolve import resolve_model


def model_folder(folder, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_a_hub_id_is_never_asked_for_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingDataError, match="offline"):
        resolve_model("someone/some-model")


def test_a_hub_id_that_is_already_in_the_cache_is_found_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "models--someone--some-model"
    folder = model_folder(root / "snapshots" / "abc")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    assert resolve_model("someone/some-model").folder == str(folder)


def test_a_folder_that_brings_code_is_refused(tmp_path):
    folder = model_folder(tmp_path / "m", auto_map={"AutoModel": "modeling.Custom"})
    with pytest.raises(ModelError, match="auto_map"):
        resolve_model(str(folder))


def test_pickled_weights_are_refused(tmp_path):
    folder = model_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        resolve_model(str(folder))


def test_a_half_written_run_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(RunError, match="half-written"):
        resolve_model(str(tmp_path))


def test_a_damaged_config_is_one_clear_line(tmp_path):
    folder = model_folder(tmp_path / "m")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        resolve_model(str(folder))


def test_unknown_builtin_names_the_nearest():
    with pytest.raises(MissingDataError, match="builtin:tiny"):
        resolve_model("builtin:tyni")


@pytest.mark.parametrize("kind", ["backbone", "causal"])
def test_a_model_that_lacks_a_layer_is_refused(kind, tmp_path):
    from safetensors.torch import load_file, save_file

    from clinical_nlp.models.loading import load_base

    folder = write_decoder(tmp_path / "model")
    load_base(str(folder), kind=kind)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks \d+ of its weights"):
        load_base(str(folder), kind=kind)


def test_the_digest_follows_the_files(tmp_path):
    folder = model_folder(tmp_path / "m")
    before = resolve_model(str(folder)).digest
    assert resolve_model(str(folder)).digest == before
    (folder / "model.safetensors").write_bytes(b"other")
    assert resolve_model(str(folder)).digest != before


@pytest.mark.parametrize(("strategy", "whole"), [("lora", False), ("full", False), ("head", True)])
def test_a_run_that_lost_its_weights_is_not_its_base_model(tmp_path, strategy, whole):
    manifest = {"recipe": "ner", "base_model": {"name": "builtin:tiny"}, "config": {"strategy": {"name": strategy}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    if whole:
        assert resolve_model(str(tmp_path)).adapters == ()
    else:
        with pytest.raises(ModelError, match=f"strategy {strategy}.* copy the whole run again"):
            resolve_model(str(tmp_path))
