"""Masked pretraining: what is masked, what is scored, and a loss that does not depend on how it is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import write_decoder, write_encoder

from clinical_nlp.errors import ModelError
from clinical_nlp.models.loading import load_base, release_mapping
from clinical_nlp.tasks import pretraining

TEXTS = [f"Patient {number} has a cough. " * (number + 1) for number in range(6)]


def with_mask_token(folder: Path) -> Path:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_mask_token(write_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def base(encoder: Path) -> Any:
    return load_base(str(encoder), kind="language")


def make_task(base: Any, **options: Any) -> pretraining.LanguageTask:
    return pretraining.language_task(base, 64, **options)


def arranged(task: pretraining.LanguageTask, tokenizer: Any) -> Any:
    rows = task.encode(TEXTS, tokenizer)
    return task.arrange(rows, [f"p{i}" for i in range(6)], ["A"] * 6)


def test_a_missing_head_is_made_from_a_fixed_seed_and_tied(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = load_base(str(encoder), kind="masked")
    assert torch.equal(before, torch.random.get_rng_state())
    assert capsys.readouterr().err.count("no masked-LM head") == 1
    torch.manual_seed(6)
    second = load_base(str(encoder), kind="masked")
    assert first.head == "fresh"
    for one, two in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(one, two)
    network = first.network
    assert network.cls.predictions.decoder.weight is network.bert.embeddings.word_embeddings.weight


def test_another_weight_that_is_missing_stays_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = with_mask_token(write_encoder(tmp_path / "encoder"))
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layer.1.output.dense.weight" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks"):
        load_base(str(folder), kind="masked")


def test_half_a_head_is_an_error(encoder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    whole = load_base(str(encoder), kind="masked")
    whole.network.save_pretrained(tmp_path)
    whole.tokenizer.save_pretrained(tmp_path)
    assert load_base(str(tmp_path), kind="masked").head == "checkpoint"
    weights = load_file(tmp_path / "model.safetensors")
    save_file({n: t for n, t in weights.items() if "transform.dense.weight" not in n}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="lacks 1 of its weights"):
        load_base(str(tmp_path), kind="masked")


def test_a_decoder_is_no_masked_language_model(tmp_path: Path) -> None:
    folder = str(write_decoder(tmp_path))
    with pytest.raises(ModelError, match="no masked language model"):
        load_base(folder, kind="masked")
    assert load_base(folder, kind="language").network.config.model_type == "llama"


@pytest.mark.parametrize("kind", ["backbone", "masked", "causal"])
def test_no_weight_is_a_view_on_the_file(kind: Any, encoder: Path, tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("mappings cannot be listed here")
    folder = write_decoder(tmp_path / "decoder") if kind == "causal" else encoder
    loaded = load_base(str(folder), kind=kind)
    assert str(folder) not in maps.read_text()
    assert next(loaded.network.parameters()).dtype == torch.float32


def test_tied_weights_stay_tied_when_the_file_is_released(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    folder = write_decoder(tmp_path)
    network = LlamaForCausalLM.from_pretrained(folder)
    expected = {name: value.clone() for name, value in network.state_dict().items()}
    release_mapping(network)
    assert network.lm_head.weight.data_ptr() == network.model.embed_tokens.weight.data_ptr()
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


def test_bf16_is_held_where_it_is_asked_for(encoder: Path) -> None:
    assert next(load_base(str(encoder), dtype="bf16").network.parameters()).dtype == torch.bfloat16


def test_what_is_masked_is_drawn_from_seed_epoch_and_row(base: Any) -> None:
    task = make_task(base)
    table = arranged(task, base.tokenizer)
    rows, again, other = (task.examples([table], seed=seed) for seed in (0, 0, 1))
    assert rows[1] == again[1]
    assert rows[1] != other[1]
    first = [rows[index] for index in range(len(rows))]
    rows.set_epoch(1)
    second = [rows[index] for index in range(len(rows))]
    assert first != second
    rows.set_epoch(0)
    assert [rows[index] for index in range(len(rows))] == first


def test_fifteen_percent_are_targets_and_80_10_10_of_them_are_changed(base: Any) -> None:
    task = make_task(base)
    rows = task.examples([arranged(task, base.tokenizer)], seed=0)
    original = rows.rows
    shown, targets = [], []
    for epoch in range(150):
        rows.set_epoch(epoch)
        for index in range(len(rows)):
            row, source = rows[index], np.asarray(original[index]["input_ids"])
            labels, ids = np.asarray(row["labels"]), np.asarray(row["input_ids"])
            chosen = labels != -100
            assert np.array_equal(labels[chosen], source[chosen])
            assert np.array_equal(ids[~chosen], source[~chosen])
            assert not np.isin(source[chosen], task.special).any()
            eligible = int((~np.isin(source, task.special)).sum())
            assert chosen.sum() == max(1, round(0.15 * eligible))
            shown += ids[chosen].tolist()
            targets += source[chosen].tolist()
    shown, targets = np.asarray(shown), np.asarray(targets)
    assert (shown == task.mask_token_id).mean() == pytest.approx(0.8, abs=0.015)
    assert (shown == targets).mean() == pytest.approx(0.1, abs=0.012)


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
def test_every_token_lies_in_one_row_with_its_patient(base: Any, batching: Any) -> None:
    task = make_task(base, batching=batching)
    tokens = task.encode(TEXTS, base.tokenizer)
    table = arranged(task, base.tokenizer)
    found: dict[str, list[int]] = {}
    for row in table.to_pylist():
        assert len(row["input_ids"]) == sum(row["seq_lengths"]) <= 64
        assert len(row["patient_id"]) == len(row["institution"]) == len(row["seq_lengths"])
        assert batching == "packed" or len(row["seq_lengths"]) == 1
        for (begin, end), patient in zip(pretraining._spans(row["seq_lengths"]), row["patient_id"], strict=True):
            piece = row["input_ids"][begin:end]
            assert (piece[0], piece[-1]) == (task.before[0], task.after[0])
            found.setdefault(patient, []).extend(piece[1:-1])
    assert {patient: sorted(ids) for patient, ids in found.items()} == {
        f"p{index}": sorted(ids) for index, ids in enumerate(tokens)
    }


def test_only_masked_tokens_go_through_the_head_and_the_loss_is_that_of_the_whole(base: Any) -> None:
    task = make_task(base)
    rows = task.examples([arranged(task, base.tokenizer)], seed=0)
    batch = task.collate([rows[index] for index in range(len(rows))])
    model = task.model(base.network).eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.inference_mode():
        plain = base.network(**inputs).logits
        expected = torch.nn.functional.cross_entropy(plain.flatten(0, 1), batch["labels"].flatten())
        found = model(**batch)
        halves = model(**batch, num_items_in_batch=2 * (batch["labels"] != -100).sum())
    assert found["logits"].shape[0] == (batch["labels"] != -100).sum()
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert halves["loss"].item() == pytest.approx(expected.item() / 2, rel=1e-5)


def test_pseudo_perplexity_scores_each_token_once_and_masked(base: Any) -> None:
    task = make_task(base)
    tokens = task.encode(TEXTS, base.tokenizer)
    model = task.model(base.network)
    together = task.losses(model, tokens)
    assert together[:, 1].tolist() == [len(ids) for ids in tokens]
    alone = np.concatenate([task.losses(model, [ids]) for ids in reversed(tokens)])[::-1]
    assert together == pytest.approx(alone, rel=1e-4)
    ids = np.asarray(task.documents(tokens[3], even=True)[0])
    scored = np.zeros(len(ids), int)
    for shown, labels in pretraining._masked_in_turn(ids, task):
        chosen = np.asarray(labels) != -100
        assert set(np.asarray(shown)[chosen]) == {task.mask_token_id}
        assert np.array_equal(np.asarray(shown)[~chosen], ids[~chosen])
        assert chosen.mean() <= 0.16
        scored += chosen
    assert scored.tolist() == [0, *[1] * (len(ids) - 2), 0]


def test_an_unmasked_decoder_predicts_a_masked_token_from_the_one_before(tmp_path: Path) -> None:
    base = load_base(str(write_decoder(tmp_path)), kind="causal", bidirectional=True)
    task = make_task(base, bidirectional=True)
    assert task.masked
    assert task.shift
    assert task.mask_token_id == base.tokenizer("_")["input_ids"][-1]
    rows = task.examples([arranged(task, base.tokenizer)], seed=0)
    batch = task.collate([rows[0]])
    with torch.inference_mode():
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        plain = base.network.eval()(**inputs).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(plain.flatten(0, 1), batch["labels"][:, 1:].flatten())
        assert task.model(base.network)(**batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_rows_are_ordered_by_their_loss_under_the_base_model(base: Any) -> None:
    task = make_task(base, batching="bucketed")
    rows = task.examples([arranged(task, base.tokenizer)], seed=0)
    losses = task.row_losses(task.model(base.network), rows)
    assert len(losses) == len(rows)
    content = [row["input_ids"][1:-1] for row in rows.rows]
    counts = task.losses(task.model(base.network), content)
    assert losses == pytest.approx(counts[:, 0] / counts[:, 1], rel=1e-4)
