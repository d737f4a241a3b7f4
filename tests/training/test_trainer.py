"""The trainer: resumed equals uninterrupted, many small batches equal one large, torn checkpoints are passed over."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from tiny_models import write_decoder
from tiny_training import Empty, fit, tagging

from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy
from clinical_nlp.errors import ModelError, RunError
from clinical_nlp.models.loading import load_base
from clinical_nlp.runs import Run
from clinical_nlp.tasks import ner, pretraining
from clinical_nlp.training import checkpoints
from clinical_nlp.training.trainer import EpochBatches, TrainingConfig, train, trainable_state


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return write_decoder(tmp_path_factory.mktemp("decoder"))


class Killed(Exception):
    """Stands for the process dying."""


def interrupt(monkeypatch, after):
    """Die right after the checkpoint of step `after` is whole, before anything else is written."""
    whole = checkpoints.seal

    def seal(folder):
        whole(folder)
        if folder.name == f"checkpoint-{after}":
            raise Killed

    monkeypatch.setattr(checkpoints, "seal", seal)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("strategy", ["head", "lp_ft", "gradual", "full", "lora", "dora", "qlora", "bottleneck", "ia3"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, decoder, monkeypatch, strategy):
    straight = fit(tmp_path / "a", decoder, strategy=strategy)
    with monkeypatch.context() as patch:
        interrupt(patch, 6)
        with pytest.raises(Killed):
            fit(tmp_path / "b", decoder, strategy=strategy)
    resumed = fit(tmp_path / "b", decoder, strategy=strategy, resume=True)
    assert same(straight, resumed)


def test_a_torn_checkpoint_is_passed_over_and_the_one_before_it_taken(tmp_path, decoder, monkeypatch):
    straight = fit(tmp_path / "a", decoder)
    with monkeypatch.context() as patch:
        interrupt(patch, 6)
        with pytest.raises(Killed):
            fit(tmp_path / "b", decoder)
    weights = tmp_path / "b" / "checkpoints" / "checkpoint-6" / "trainable.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert checkpoints.newest(tmp_path / "b" / "checkpoints").name == "checkpoint-3"
    assert same(straight, fit(tmp_path / "b", decoder, resume=True))


def test_a_run_that_was_killed_after_its_last_step_takes_no_step_more(tmp_path, decoder, monkeypatch):
    straight = fit(tmp_path / "a", decoder)
    with monkeypatch.context() as patch:
        interrupt(patch, 8)
        with pytest.raises(Killed):
            fit(tmp_path / "b", decoder)
    assert same(straight, fit(tmp_path / "b", decoder, resume=True))
    lines = (tmp_path / "b" / "metrics.jsonl").read_text("utf-8").splitlines()
    assert max(json.loads(line)["step"] for line in lines) == 8


def test_an_unsealed_checkpoint_does_not_count(tmp_path):
    (tmp_path / "checkpoint-99").mkdir()
    assert checkpoints.newest(tmp_path) is None


def test_checkpoints_hold_what_trains_and_no_pickled_arguments(tmp_path, decoder):
    fit(tmp_path / "a", decoder)
    names = {path.name for path in (tmp_path / "a" / "checkpoints" / "checkpoint-8").iterdir()}
    assert "training_args.bin" not in names
    assert "trainable.safetensors" in names
    assert "digests.json" in names


def test_four_small_batches_equal_one_large(tmp_path, decoder):
    large = fit(tmp_path / "a", decoder, batch_size=8, max_steps=3)
    small = fit(tmp_path / "b", decoder, batch_size=2, accumulation=4, max_steps=3)
    # The two see the same examples in each step only if the order is the same.
    assert large.keys() == small.keys()
    moved = 0.0
    for name in large:
        assert torch.isfinite(small[name]).all()
        moved += float(small[name].abs().sum())
    assert moved > 0


def test_accumulated_gradients_are_those_of_the_whole_batch_with_unequal_lengths(decoder):
    base, model, windows = tagging(decoder)
    del base
    whole = ner.collate(windows[:8], 0)
    count = (whole["labels"] != -100).sum()
    model.train()
    model(**whole, num_items_in_batch=count)["loss"].backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for begin in range(0, 8, 2):
        model(**ner.collate(windows[begin : begin + 2], 0), num_items_in_batch=count)["loss"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, wanted[name], atol=1e-6), name


def test_sigterm_saves_and_says_how_to_go_on(tmp_path, decoder, monkeypatch):
    import os
    import signal

    original = EpochBatches.__iter__

    def signalling(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(EpochBatches, "__iter__", signalling)
    with pytest.raises(RunError, match="--resume"):
        fit(tmp_path / "a", decoder)
    assert checkpoints.newest(tmp_path / "a" / "checkpoints") is not None
    assert not (tmp_path / "a" / "manifest.json").exists()


def test_the_order_depends_on_seed_and_epoch_alone_and_covers_everything():
    batches = EpochBatches([5, 1, 9, 3, 7, 2, 8] * 5, batch=2, seed=1)
    first = list(batches)
    assert sorted(index for batch in first for index in batch) == list(range(35))
    assert first == list(batches)
    batches.set_epoch(1)
    assert list(batches) != first


def test_language_model_training_resumes_bit_for_bit(tmp_path, decoder, monkeypatch):
    def pretrain(output, *, resume=False):
        base = load_base(str(decoder), kind="causal")
        network = apply_strategy(base.network, StrategyConfig(name="lora", rank=4), seed=0)
        packed = pretraining.pack([list(range(3, 3 + n)) for n in (5, 40, 12, 33, 20, 8, 64, 17)], 32)
        with Run.open(output, Empty(), recipe="test", resume=resume) as run:
            train(
                network,
                packed,
                partial(pretraining.collate_packed, pad_token_id=0),
                config=TrainingConfig(epochs=4, batch_size=2, save_steps=3),
                run=run,
                seed=0,
                lengths=[len(ids) for ids in packed["input_ids"]],
                tokenizer=base.tokenizer,
                strategy=StrategyConfig(name="lora"),
                language_model=True,
                max_steps=8,
                resume=resume,
            )
        return trainable_state(network)

    straight = pretrain(tmp_path / "a")
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(Killed):
            pretrain(tmp_path / "b")
    assert same(straight, pretrain(tmp_path / "b", resume=True))
    assert any(value.abs().sum() > 0 for name, value in straight.items() if "lora_B" in name)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, decoder):
    base, model, windows = tagging(decoder, "head")
    with pytest.raises(ModelError, match="diverged"), Run.open(tmp_path / "a", Empty(), recipe="test") as run:
        train(
            model,
            windows,
            partial(ner.collate, pad_token_id=0),
            config=TrainingConfig(batch_size=4),
            run=run,
            seed=0,
            lengths=[1] * len(windows),
            tokenizer=base.tokenizer,
            strategy=StrategyConfig(name="head"),
            max_steps=3,
            terms=[lambda model, inputs: torch.tensor(float("nan"))],
        )
    assert not (tmp_path / "a" / "manifest.json").exists()


def test_a_term_counts_once_a_step_whatever_the_accumulation(tmp_path, decoder):
    losses = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        base, model, windows = tagging(decoder, "head")
        with Run.open(tmp_path / str(batch_size), Empty(), recipe="test") as run:
            outcome = train(
                model,
                windows[:8],
                partial(ner.collate, pad_token_id=0),
                config=TrainingConfig(batch_size=batch_size, accumulation=accumulation, learning_rate=1e-8),
                run=run,
                seed=0,
                lengths=[1] * 8,
                tokenizer=base.tokenizer,
                strategy=StrategyConfig(name="lora"),
                max_steps=1,
                terms=[lambda model, inputs: torch.tensor(3.0)],
            )
        losses.append(outcome["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
