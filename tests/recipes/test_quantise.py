"""The recipe quantise: an 8-bit tagger that is used like the run it came from, or nothing where it loses too much."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_decoder, write_encoder

from clinical_nlp.config import load_config
from clinical_nlp.errors import ModelError, RunError
from clinical_nlp.extraction import extract
from clinical_nlp.models import int8
from clinical_nlp.recipes import ner, quantise
from clinical_nlp.tasks.ner import NerPredictor

CORPUS = {"corpus.options": {"patients": 40, "institutions": 1}, "baseline_notes": 0, "seed": 1}


def trained(folder, model, strategy, **settings):
    given = {"base_model": str(model), "strategy.name": strategy, "training.learning_rate": 0.005, **CORPUS, **settings}
    return ner.run(load_config(ner.CONFIG, None, given), folder)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    """A run with a head that marks many words, at random: it scores more than nothing without long training."""
    folder = tmp_path_factory.mktemp("runs")
    run = trained(folder / "ner", write_encoder(folder / "encoder"), "lora", max_steps=1)
    head = load_file(run.path / "head.safetensors")
    head["weight"] = torch.randn(head["weight"].shape, generator=torch.Generator().manual_seed(0))
    save_file(head, run.path / "head.safetensors")
    return run


@pytest.fixture(scope="module")
def small(tagger):
    settings = quantise.QuantiseConfig(run=str(tagger.path), timed_notes=5, max_loss=1)
    return quantise.run(settings, tagger.path.parent / "int8")


def test_it_is_scored_on_the_same_patients_and_timed(tagger, small):
    metrics = small.metrics
    assert metrics["test.f1_strict_before"]["value"] > 0
    change = metrics["test.f1_strict_change"]
    assert change["value"] == pytest.approx(
        metrics["test.f1_strict"]["value"] - metrics["test.f1_strict_before"]["value"]
    )
    assert change["n_patients"] == tagger.metrics["test.f1_strict"]["n_patients"]
    ratio = metrics["test.after_notes_per_second"]["value"] / metrics["test.before_notes_per_second"]["value"]
    assert metrics["test.times_faster"]["value"] == pytest.approx(ratio, rel=0.5)
    assert 0 < small.manifest["quantising"]["largest_change_of_a_logit"] < 1
    assert not (small.path / "adapter").exists()


def test_it_tags_and_extracts_like_the_run(tagger, small, tmp_path):
    texts = ["Mother denies fever, has cough and a rash.", "BP 120/80", "", "Seizures since childhood. " * 200]
    first, second = NerPredictor.load(tagger.path), NerPredictor.load(small.path)
    for (_, expected), (_, found) in zip(first.tags(texts), second.tags(texts), strict=True):
        assert abs(found - expected).max() < 1 if found.size else not expected.size
    alone = [second.tags([text])[0][1] for text in texts]
    assert all((one == many).all() for one, (_, many) in zip(alone, second.tags(texts), strict=True))

    source = tmp_path / "notes.csv"
    rows = "".join(
        f"n{k},p{k % 3},h,{text}\n" for k, text in enumerate(texts) if text for text in [text.replace(",", "")]
    )
    source.write_text("note_id,patient_id,institution,text\n" + rows, "utf-8")
    outputs = [
        extract(source, output=tmp_path / f"out{workers}", format="table", model=str(small.path), workers=workers)
        for workers in (1, 2)
    ]
    assert outputs[0].done == outputs[1].done == 3
    one, two = (sorted((output.output / "mentions").glob("*.parquet")) for output in outputs)
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_what_loses_too_much_is_not_kept(tagger, tmp_path, monkeypatch):
    whole = int8.load_int8

    def spoil(found):
        found.last_hidden_state.fill_(torch.nan)

    def broken(folder):
        network = whole(folder)
        network.register_forward_hook(lambda module, given, found: spoil(found))
        return network

    monkeypatch.setattr(int8, "load_int8", broken)
    with pytest.raises(ModelError, match="nothing was kept") as refused:
        quantise.run(quantise.QuantiseConfig(run=str(tagger.path), max_loss=0), tmp_path / "int8")
    assert "\n" not in str(refused.value)
    assert "nan" not in str(refused.value)
    assert not list(tmp_path.rglob(int8.FILE))
    with pytest.raises((ModelError, RunError)):
        NerPredictor.load(tmp_path / "int8")


def test_decoders_and_other_tasks_are_refused(small, tmp_path):
    run = trained(tmp_path / "decoder", write_decoder(tmp_path / "model"), "lora", max_steps=1)
    with pytest.raises(ModelError, match="knows encoders"):
        quantise.run(quantise.QuantiseConfig(run=str(run.path)), tmp_path / "int8")
    run = trained(tmp_path / "four_bit", write_encoder(tmp_path / "encoder"), "qlora", max_steps=1)
    with pytest.raises(ModelError, match="nf4 weights already"):
        quantise.run(quantise.QuantiseConfig(run=str(run.path)), tmp_path / "int8")
    with pytest.raises(ModelError, match="is a quantise run"):
        quantise.run(quantise.QuantiseConfig(run=str(small.path)), tmp_path / "int8")
    assert not (tmp_path / "int8").exists()
