"""Packing: no token lost, no document sees its neighbour, the same loss as unpacked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from clinical_nlp.tasks import pretraining


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, use_cache=False,
        )
    ).eval()  # fmt: skip


rows = st.lists(st.lists(st.integers(1, 63), min_size=1, max_size=70), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(rows)
def test_packing_keeps_every_token(documents):
    packed = pretraining.pack(documents, 32)
    assert sorted(t for row in packed["input_ids"] for t in row) == sorted(t for row in documents for t in row)
    assert all(
        len(ids) == sum(lengths) <= 32 for ids, lengths in zip(packed["input_ids"], packed["seq_lengths"], strict=True)
    )


def test_packed_loss_equals_unpacked_loss(model):
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(1, 64, (length,), generator=generator).tolist() for length in (5, 30, 9, 17, 2, 25, 12)]
    packed = pretraining.pack(documents, 32)
    assert len(packed) < len(documents)
    batch = pretraining.collate_packed([packed[i] for i in range(len(packed))], 0)
    with torch.inference_mode():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        together = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    counts = pretraining.note_losses(model, documents, length=32, pad_token_id=0)
    assert (labels != -100).sum() == counts[:, 1].sum()
    assert together.item() == pytest.approx(counts[:, 0].sum(), rel=1e-5)


def test_a_document_does_not_see_its_neighbour(model):
    first, second = list(range(1, 11)), list(range(20, 30))
    changed = [token + 30 for token in first]
    outputs = []
    for neighbour in (first, changed):
        row = {"input_ids": neighbour + second, "seq_lengths": [10, 10]}
        batch = pretraining.collate_packed([row], 0)
        with torch.inference_mode():
            outputs.append(model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0, 10:])
    assert torch.allclose(outputs[0], outputs[1], atol=1e-6)


def test_note_losses_do_not_depend_on_the_batch(model):
    documents = [[1, 2, 3], list(range(1, 41)), [5], list(range(10, 30))]
    together = pretraining.note_losses(model, documents, length=16, pad_token_id=0)
    alone = [pretraining.note_losses(model, [row], length=16, pad_token_id=0)[0] for row in documents]
    assert together == pytest.approx(torch.tensor(alone).numpy(), rel=1e-5)
    assert together[2].tolist() == [0, 0]
