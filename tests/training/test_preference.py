"""Training on reports and on preferences: it learns, resumes as if uninterrupted, and starts from its reference."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy
from clinical_nlp.models.loading import load_base
from clinical_nlp.runs import Run
from clinical_nlp.tasks import report
from clinical_nlp.training.trainer import PreferenceLoss, TrainingConfig, train, trainable_state
from tests.tiny_models import write_decoder
from tests.tiny_training import Empty


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a randomly initialised decoder."""
    return write_decoder(tmp_path_factory.mktemp("decoder"), layers=1)


def preferred(folder, strategy):
    """Return a base, a task and twelve preference pairs with the log-likelihoods of the base."""
    base = load_base(str(folder), kind="causal", quantization=StrategyConfig(name=strategy).quantization)
    task = report.report_task(
        base, kind="findings_impression", instruction="", window=96, max_new_tokens=24, too_long="error"
    )
    rng = np.random.default_rng(0)
    sources = ["clear " * int(n) for n in rng.integers(1, 6, size=12)]
    prompts = task.encode_sources(sources, base.tokenizer).prompts
    rows = report.preference_rows(task, prompts, ["no effusion"] * 12, ["effusion"] * 12, base.tokenizer)
    return base, task, report.with_reference(base.network, rows, pad_token_id=0)


def margin(network, rows):
    """Mean by which the preferred report is likelier than the rejected one, against the reference."""
    now = report.with_reference(network, rows, pad_token_id=0)
    gains = [[new[name] - old[name] for new, old in zip(now, rows, strict=True)]
             for name in ("ref_chosen_logps", "ref_rejected_logps")]  # fmt: skip
    return float(np.mean(gains[0]) - np.mean(gains[1]))


def tune(output, folder, *, strategy="lora", max_steps=6, resume=False, accumulation=1, batch_size=4):
    """Train on preferences in a run of its own; return the network, its pairs and its trained weights."""
    from datasets import Dataset

    base, _, rows = preferred(folder, strategy)
    settings = StrategyConfig(name=strategy, rank=4)
    network = apply_strategy(base.network, settings, seed=0)
    assert margin(network, rows) == pytest.approx(0, abs=1e-3)
    config = TrainingConfig(
        epochs=2, batch_size=batch_size, accumulation=accumulation, learning_rate=5e-3, save_steps=2, warmup=0
    )
    with Run.open(output, Empty(), recipe="test", resume=resume) as run:
        train(
            network,
            Dataset.from_list(rows),
            partial(report.collate_preferences, pad_token_id=0),
            config=config,
            run=run,
            seed=0,
            lengths=[len(row["prompt_ids"]) for row in rows],
            tokenizer=base.tokenizer,
            strategy=settings,
            preference=PreferenceLoss(beta=0.1, sft_weight=0.1),
            max_steps=max_steps,
            resume=resume,
        )
    return network, rows, trainable_state(network)


@pytest.mark.parametrize("strategy", ["lora", "qlora", "full"])
def test_the_preferred_text_becomes_likelier_than_the_rejected_one(folder, tmp_path, strategy):
    network, rows, _ = tune(tmp_path / "run", folder, strategy=strategy)
    assert margin(network, rows) > 0.5


def test_resumed_equals_uninterrupted(folder, tmp_path, monkeypatch):
    import torch

    _, _, whole = tune(tmp_path / "whole", folder)
    from clinical_nlp.training import trainer

    original = trainer.LossTerms.training_step
    count = 0

    def dies(self, *arguments, **options):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    monkeypatch.setattr(trainer.LossTerms, "training_step", dies)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "cut", folder)
    monkeypatch.undo()
    _, _, resumed = tune(tmp_path / "cut", folder, resume=True)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_small_batches_equal_one_large(folder, tmp_path):
    import torch

    _, _, large = tune(tmp_path / "large", folder, batch_size=4, max_steps=3)
    _, _, small = tune(tmp_path / "small", folder, batch_size=2, accumulation=2, max_steps=3)
    assert all(torch.allclose(large[name], small[name], atol=1e-4) for name in large)
