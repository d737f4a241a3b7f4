"""The recipes end to end on tiny models: runs that can be loaded, built upon, resumed and trusted."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_models import write_decoder, write_encoder

from clinical_nlp.config import load_config
from clinical_nlp.errors import ConfigError, RunError
from clinical_nlp.models.loading import load_base
from clinical_nlp.recipes import dapt, ner
from clinical_nlp.runs import Run
from clinical_nlp.tasks.ner import NerPredictor

TEXTS = ["no fever or cough today", "severe cough and pain", "fever since monday , no pain", "well , no cough"]


def write_iob(folder, documents=40):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", documents), ("devel", documents // 2), ("test", documents)):
        lines = []
        for _ in range(count):
            for word in TEXTS[int(rng.integers(4))].split():
                lines.append(f"{word}\t{'B-Disease' if word in ('fever', 'cough', 'pain') else 'O'}")
            lines.append("")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"decoder": str(write_decoder(root / "decoder")), "encoder": str(write_encoder(root / "encoder"))}


@pytest.fixture(scope="module")
def iob(tmp_path_factory):
    return write_iob(tmp_path_factory.mktemp("iob"))


@pytest.fixture(scope="module")
def dapt_run(models, iob, tmp_path_factory):
    config = load_config(
        dapt.CONFIG,
        None,
        {
            "corpus.name": "ncbi_disease",
            "corpus.path": str(iob),
            "base_model": models["decoder"],
            "strategy.rank": 4,
            "length": 64,
            "deduplicate": None,
            "max_steps": 12,
        },
    )
    return dapt.run(config, tmp_path_factory.mktemp("dapt") / "run")


def tag(models, iob, output, base="decoder", **overrides):
    config = load_config(
        ner.CONFIG,
        None,
        {
            "corpus.name": "ncbi_disease",
            "corpus.path": str(iob),
            "base_model": models.get(base, base),
            "strategy.rank": 4,
            "window": 64,
            "overlap": 16,
            "max_steps": 12,
            **overrides,
        },
    )
    return ner.run(config, output)


def test_dapt_lowers_perplexity_and_says_on_whom(dapt_run):
    metrics = dapt_run.metrics
    assert metrics["test.perplexity"]["value"] < metrics["test.perplexity_before"]["value"]
    assert metrics["test.perplexity"]["part"] == "test"
    assert metrics["test.perplexity"]["n_patients"] > 0
    assert (dapt_run.path / "adapter" / "adapter_model.safetensors").is_file()
    assert json.loads((dapt_run.path / "adapter" / "adapter_config.json").read_text())["task_type"] is None


@pytest.mark.parametrize(
    ("base", "strategy"),
    [("decoder", "qlora"), ("decoder", "full"), ("encoder", "lora"), ("encoder", "full"), ("encoder", "head")],
)
def test_a_saved_tagger_predicts_what_the_trained_one_did(models, iob, tmp_path, monkeypatch, base, strategy):
    kept = {}
    saved = ner.ner.save

    def save(folder, model, task, loaded, *, full):
        kept["spans"] = ner.ner.predict_spans(model, task, loaded.tokenizer, TEXTS)
        saved(folder, model, task, loaded, full=full)

    monkeypatch.setattr(ner.ner, "save", save)
    run = tag(models, iob, tmp_path / "run", base, **{"strategy.name": strategy})
    again = NerPredictor.load(run.path).predict(TEXTS)
    assert [[s[:3] for s in spans] for spans in again] == [[s[:3] for s in spans] for spans in kept["spans"]]
    assert [s[3] for spans in again for s in spans] == pytest.approx([s[3] for x in kept["spans"] for s in x], abs=1e-5)
    assert run.metrics["test.f1_strict"]["n_notes"] == 40


@pytest.mark.parametrize("strategy", ["lora", "qlora", "full"])
def test_a_tagger_lies_on_a_dapt_run_whose_adapter_stays_as_it_was(models, iob, dapt_run, tmp_path, strategy):
    run = tag(models, iob, tmp_path / "run", str(dapt_run.path), **{"strategy.name": strategy})
    assert Run.load(run.path).manifest["parent_run"] == str(dapt_run.path)
    below = load_base(str(dapt_run.path)).network
    above = load_base(str(run.path)).network
    parents = {n: p for n, p in below.named_parameters() if ".parent0" in n}
    assert parents
    if strategy != "full":
        stacked = dict(above.named_parameters())
        assert all(torch.equal(value, stacked[name]) for name, value in parents.items())
        assert any(".parent1" in name for name in stacked)
    # The tagger reads what the dapt run learned: without its adapter the hidden states differ.
    ids = torch.arange(3, 20).reshape(1, -1)
    plain = load_base(models["decoder"]).network
    with torch.inference_mode():
        assert not torch.allclose(below(input_ids=ids).last_hidden_state, plain(input_ids=ids).last_hidden_state)


def test_a_parent_that_changed_since_is_refused(models, iob, tmp_path):
    decoder = write_decoder(tmp_path / "decoder")
    run = tag({"decoder": str(decoder)}, iob, tmp_path / "run", max_steps=1)
    write_decoder(decoder, layers=1)
    with pytest.raises(Exception, match="another version"):
        NerPredictor.load(run.path)


def test_a_run_and_its_parent_can_be_moved_together(models, iob, tmp_path):
    decoder = write_decoder(tmp_path / "a" / "decoder")
    run = tag({"decoder": str(decoder)}, iob, tmp_path / "a" / "run", max_steps=1)
    before = NerPredictor.load(run.path).predict(TEXTS)
    (tmp_path / "a").rename(tmp_path / "b")
    assert NerPredictor.load(tmp_path / "b" / "run").predict(TEXTS) == before


def test_the_same_seed_gives_the_same_run_and_another_seed_another(models, iob, tmp_path):
    first, second, third = (
        (tag(models, iob, tmp_path / str(index), seed=seed).path / "head.safetensors").read_bytes()
        for index, seed in enumerate((0, 0, 1))
    )
    assert first == second
    assert first != third


def test_what_does_not_go_together_is_refused(models, iob, tmp_path):
    with pytest.raises(ConfigError, match="overlap"):
        tag(models, iob, tmp_path / "run", overlap=40)
    with pytest.raises(RunError, match="already holds"):
        tag(models, iob, tag(models, iob, tmp_path / "run", max_steps=1).path)
