"""Pretraining end to end: encoders, unmasked decoders, bucketed rows, streamed exports, and replay."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_dapt_ner import write_iob
from tiny_models import write_decoder, write_encoder

from clinical_nlp.config import load_config
from clinical_nlp.errors import ConfigError, InputError, RunError
from clinical_nlp.models.loading import HEAD, head_state, load_base
from clinical_nlp.notes.corpus import load_corpus
from clinical_nlp.recipes import dapt, ner
from clinical_nlp.runs import Run
from clinical_nlp.tasks import pretraining
from clinical_nlp.training import checkpoints

MARKER = "Zqplantedmarkerqz"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("models")
    encoder = write_encoder(root / "encoder")
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.add_special_tokens({"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"})
    tokenizer.save_pretrained(encoder)
    return {"decoder": str(write_decoder(root / "decoder")), "encoder": str(encoder)}


@pytest.fixture(scope="module")
def iob(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_iob(tmp_path_factory.mktemp("iob"))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 60 patients with three notes each."""
    path = tmp_path_factory.mktemp("export") / "notes.csv"
    rng = np.random.default_rng(0)
    words = ["fever", "cough", "pain", "no", "denies", "well", MARKER]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["note_id", "patient_id", "institution", "note_type", "text"])
        for number in range(180):
            text = " ".join(rng.choice(words, 12))
            writer.writerow([number, f"p{number // 3}", "AB"[number % 2], "progress", f"{number}: {text}"])
    return path


def adapt(models: dict[str, str], output: Path, base: str = "decoder", resume: bool = False, **keys: Any) -> Run:
    overrides: dict[str, Any] = {
        "base_model": models.get(base, base),
        "strategy.rank": 4,
        "length": 64,
        "deduplicate": None,
        "max_steps": 12,
        "training.batch_size": 4,
        **keys,
    }
    return dapt.run(load_config(dapt.CONFIG, None, overrides), output, resume=resume)


def on_iob(iob: Path) -> dict[str, Any]:
    return {"corpus.name": "ncbi_disease", "corpus.path": str(iob)}


def on_export(export: Path) -> dict[str, Any]:
    return {"corpus.name": "ehr_export", "corpus.path": str(export), "corpus.options": {"format": "table"}}


@pytest.fixture(scope="module")
def masked_run(models: dict[str, str], iob: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return adapt(models, tmp_path_factory.mktemp("masked") / "run", "encoder", **on_iob(iob))


def test_an_encoder_learns_masked_tokens_and_says_which_figure_it_is(masked_run: Run) -> None:
    metrics = masked_run.metrics
    assert "test.perplexity" not in metrics
    assert metrics["test.pseudo_perplexity"]["value"] < metrics["test.pseudo_perplexity_before"]["value"]
    assert masked_run.manifest["objective"] == "masked"
    assert masked_run.manifest["language_model_head"] == "fresh"
    assert (masked_run.path / HEAD).is_file()


def test_a_further_run_goes_on_with_the_adapter_and_the_head(
    models: dict[str, str], iob: Path, masked_run: Run, tmp_path: Path
) -> None:
    base = load_base(str(masked_run.path), kind="language")
    assert base.head == "run"
    fresh = load_base(models["encoder"], kind="language")
    kept, new = head_state(base.network), head_state(fresh.network)
    assert kept.keys() == new.keys()
    assert any(not torch.equal(value, new[name]) for name, value in kept.items())
    further = adapt(models, tmp_path / "run", str(masked_run.path), **on_iob(iob))
    first, second = masked_run.metrics["test.pseudo_perplexity"], further.metrics["test.pseudo_perplexity_before"]
    assert second["value"] == pytest.approx(first["value"], rel=1e-5)


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_a_tagger_starts_from_an_adapted_encoder(
    models: dict[str, str], iob: Path, masked_run: Run, tmp_path: Path, strategy: str
) -> None:
    run = masked_run
    if strategy == "full":
        run = adapt(models, tmp_path / "dapt", "encoder", **on_iob(iob), **{"strategy.name": "full"})
        assert load_base(str(run.path), kind="language").head == "checkpoint"
    below = load_base(str(run.path)).network
    plain = load_base(models["encoder"]).network
    ids = torch.arange(3, 20).reshape(1, -1)
    with torch.inference_mode():
        assert not torch.allclose(below(input_ids=ids).last_hidden_state, plain(input_ids=ids).last_hidden_state)
    keys = {**on_iob(iob), "base_model": str(run.path), "strategy.name": "head", "max_steps": 2, "window": 64}
    tagger = ner.run(load_config(ner.CONFIG, None, {**keys, "overlap": 16}), tmp_path / "ner")
    assert tagger.metrics["test.f1_strict"]["n_notes"] == 40


def test_masked_accumulation_equals_the_large_batch(models: dict[str, str], iob: Path, tmp_path: Path) -> None:
    states = []
    for batch, accumulation in ((4, 1), (1, 4)):
        run = adapt(
            models, tmp_path / str(batch), "encoder", **on_iob(iob),
            **{"training.batch_size": batch, "training.accumulation": accumulation, "max_steps": 4,
               "batching": "bucketed", "base_model": deaf(models["encoder"], tmp_path)},
        )  # fmt: skip
        states.append(load_base(str(run.path)).network.state_dict())
    assert all(torch.allclose(value, states[1][name], atol=1e-5) for name, value in states[0].items())


def deaf(folder: str, tmp_path: Path) -> str:
    """Copy a model and take its dropout away, which no two orders of forward passes draw alike."""
    import shutil

    target = tmp_path / "without_dropout"
    if not target.exists():
        shutil.copytree(folder, target)
        config = json.loads((target / "config.json").read_text())
        config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        (target / "config.json").write_text(json.dumps(config))
    return str(target)


def test_a_masked_run_that_was_killed_ends_as_if_it_had_not_been(
    models: dict[str, str], iob: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {**on_iob(iob), "training.save_steps": 5, "max_steps": 12}
    whole = adapt(models, tmp_path / "whole", "encoder", **keys)
    seal = checkpoints.seal

    def fall(folder: Path) -> None:
        seal(folder)
        if folder.name == "checkpoint-5":
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "seal", fall)
    with pytest.raises(KeyboardInterrupt):
        adapt(models, tmp_path / "torn", "encoder", **keys)
    monkeypatch.setattr(checkpoints, "seal", seal)
    again = adapt(models, tmp_path / "torn", "encoder", resume=True, **keys)
    for name in (HEAD, "adapter/adapter_model.safetensors"):
        assert (again.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_an_unmasked_decoder_and_bucketed_rows(models: dict[str, str], iob: Path, tmp_path: Path) -> None:
    both = {"attention": "bidirectional", "strategy.name": "full"}
    run = adapt(models, tmp_path / "unmasked", **on_iob(iob), **both)
    assert run.metrics["test.pseudo_perplexity_ratio"]["value"] < 1
    assert load_base(str(run.path), bidirectional=True).network.config.is_causal is False
    assert load_base(str(run.path)).network.config.is_causal is True
    run = adapt(models, tmp_path / "bucketed", batching="bucketed", **on_iob(iob))
    assert run.metrics["test.perplexity_ratio"]["value"] < 1
    assert run.manifest["batching"] == "bucketed"


def test_a_streamed_export_is_read_once_and_leaves_no_tokens(
    models: dict[str, str], export: Path, tmp_path: Path, files_holding: Any
) -> None:
    run = adapt(models, tmp_path / "run", stream=True, **on_export(export))
    assert run.metrics["test.perplexity_ratio"]["value"] < 1
    assert run.manifest["inputs"]["n_notes"] == 180
    assert not (run.path / dapt.STREAM).exists()
    assert files_holding(MARKER, tmp_path) == []


def test_streamed_and_in_memory_runs_train_on_the_same_tokens(
    models: dict[str, str], export: Path, tmp_path: Path
) -> None:
    split = {"split.name": "random"}
    streamed = adapt(models, tmp_path / "a", stream=True, **on_export(export), **split)
    loaded = adapt(models, tmp_path / "b", **on_export(export), **split)
    # Shares of a hash and counts of ranks differ by a patient or two.
    one, two = (run.metrics["test.perplexity_before"] for run in (streamed, loaded))
    assert one["value"] == pytest.approx(two["value"], rel=0.05)


def test_an_interrupted_stream_is_taken_up_where_it_is_whole(
    models: dict[str, str], export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fall(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    keys = {"stream": True, **on_export(export)}
    train = dapt.train
    monkeypatch.setattr(dapt, "train", fall)
    with pytest.raises(KeyboardInterrupt):
        adapt(models, tmp_path / "run", **keys)
    assert checkpoints.verifies(tmp_path / "run" / dapt.STREAM)
    monkeypatch.setattr(dapt, "train", train)
    monkeypatch.setattr(pretraining, "write_stream", fall)
    run = adapt(models, tmp_path / "run", resume=True, **keys)
    assert run.metrics["test.perplexity_ratio"]["value"] < 1


def test_replay_measures_forgetting_and_keeps_to_its_share(
    models: dict[str, str], iob: Path, export: Path, tmp_path: Path
) -> None:
    source = {"replay.name": "ehr_export", "replay.path": str(export), "replay.options": {"format": "table"}}
    trained = {"max_steps": None, "training.epochs": 8, "training.learning_rate": 0.01}
    for ratio in (0.0, 0.4):
        run = adapt(models, tmp_path / str(ratio), **on_iob(iob), **source, **trained, **{"replay.ratio": ratio})
        facts, metrics = run.manifest["inputs"], run.metrics
        assert facts["replay_ratio"] == pytest.approx(ratio, abs=0.03)
        assert metrics["test.source_perplexity"]["n_patients"] == 12
        if ratio == 0:
            plain = metrics["test.source_perplexity"]["value"]
        else:
            assert metrics["test.source_perplexity"]["value"] < plain
    assert {"test.source_perplexity_before", "test.source_perplexity_ratio"} <= metrics.keys()


def test_no_patient_is_replayed_who_is_held_out(models: dict[str, str], export: Path, tmp_path: Path) -> None:
    """Earlier notes of the same patients: whoever is scored on one side is not trained on, on the other."""
    base = load_base(models["decoder"], kind="language")
    task = pretraining.language_task(base, 64)
    keys = {**on_export(export), "split.name": "random", "base_model": models["decoder"], "deduplicate": None}
    keys |= {"replay.name": "ehr_export", "replay.path": str(export), "replay.options": {"format": "table"}}
    config = load_config(dapt.CONFIG, None, {**keys, "replay.ratio": 0.5})
    split, _ = dapt.split_corpus(load_corpus("ehr_export", export, format="table"), config)
    patients = [f"p{number // 3}" for number in range(180)]
    trained = {patients[row] for row in split.train}
    held_out = {*sorted(trained)[:9], *sorted({patients[row] for row in split.test})[:5]}
    source = dapt.replayed(
        config, task, base.tokenizer, 10**6, lambda asked: {p: "test" if p in held_out else "train" for p in asked}
    )
    replayed = {patient for row in source.rows.to_pylist() for patient in row["patient_id"]}
    assert replayed == trained - held_out
    assert set(source.patients) <= held_out


def test_precision_bf16_holds_a_frozen_base_in_bf16(models: dict[str, str], iob: Path, tmp_path: Path) -> None:
    for base in ("decoder", "encoder"):
        keys = {"training.precision": "bf16", "max_steps": 6, **on_iob(iob)}
        run = adapt(models, tmp_path / base, base, **keys)
        ratio = next(value for name, value in run.metrics.items() if name.endswith("perplexity_ratio"))
        assert ratio["value"] < 1


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"strategy.name": "head"}, ConfigError, "leaves the base model as it is"),
        ({"stream": True}, ConfigError, "read as a whole"),
        ({"corpus.name": "ehr_export", "corpus.path": "here", "stream": True}, ConfigError, "options.format"),
    ],
)
def test_what_cannot_work_is_refused(
    models: dict[str, str], tmp_path: Path, keys: dict[str, Any], error: type[Exception], message: str
) -> None:
    (tmp_path / "here").mkdir()
    keys = {name: str(tmp_path / value) if name == "corpus.path" else value for name, value in keys.items()}
    with pytest.raises(error, match=message):
        adapt(models, tmp_path / "run", **keys)
    assert not (tmp_path / "run").exists() or error is RunError


def test_a_corpus_without_tokens_is_refused(
    models: dict[str, str], iob: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "encode", lambda texts, tokenizer, **options: [[] for _ in texts])
    with pytest.raises(InputError, match="no note of the train part has a token"):
        adapt(models, tmp_path / "run", **on_iob(iob))


@pytest.mark.parametrize(("family", "expected"), [("BERT", "network.cls.predictions"), ("DistilBERT", None)])
def test_a_head_of_several_modules_does_not_take_the_base_along(
    models: dict[str, str], tmp_path: Path, family: str, expected: str | None
) -> None:
    folder = models["encoder"]
    if family == "DistilBERT":
        from transformers import AutoTokenizer, DistilBertConfig, DistilBertModel

        DistilBertModel(DistilBertConfig(vocab_size=300, dim=32, n_layers=1, n_heads=2, hidden_dim=64)).save_pretrained(
            tmp_path
        )
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
        folder = str(tmp_path)
    base = load_base(folder, kind="language")
    model, head = dapt.with_head(pretraining.language_task(base, 64), base.network, base)
    assert head == expected
    assert all(parameter.requires_grad for parameter in head_state(base.network).values())
    assert model.network is base.network
