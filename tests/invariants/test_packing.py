"""Packed documents do not see one another: the loss of each equals its loss alone, on every kind of model.

Every test also shows the trap: the inputs that look right, and let documents leak into their neighbours.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from clinical_nlp.errors import ModelError
from clinical_nlp.tasks import pretraining

TOLERANCE = 1e-5
PAD = 1
SIZES = (5, 30, 9, 17, 2, 12)
SMALL: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 80,
    "pad_token_id": PAD,
    "initializer_range": 0.3,  # a model whose attention matters, so that a leak shows
}
ENCODERS = {
    "bert": ("BertConfig", {}),
    "roberta": ("RobertaConfig", {}),
    "xlm-roberta": ("XLMRobertaConfig", {}),
    "camembert": ("CamembertConfig", {}),
    "electra": ("ElectraConfig", {"embedding_size": 32}),
    "distilbert": ("DistilBertConfig", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}),
    "albert": ("AlbertConfig", {"embedding_size": 32}),
    "mpnet": ("MPNetConfig", {}),
    "modernbert": ("ModernBertConfig", {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}),
}


def decoder(attention: str, *, bidirectional: bool) -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(**SMALL, use_cache=False)
    if bidirectional:
        config.is_causal = False
    return hf.LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()


def encoder(family: str, attention: str) -> Any:
    name, more = ENCODERS[family]
    torch.manual_seed(0)
    config = getattr(hf, name)(**SMALL, **more)
    return hf.AutoModelForMaskedLM.from_config(config, attn_implementation=attention).eval()


def documents(*, masked: bool) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    found = []
    for size in SIZES:
        ids = rng.integers(4, 90, size)
        example = {"input_ids": ids.tolist(), "seq_lengths": [size]}
        if masked:
            # The last token of one document is a target, beside the first of the next.
            example["labels"] = np.where(np.arange(size) % 3 == (size - 1) % 3, ids, -100).tolist()
        found.append(example)
    return found


def rows(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pack the documents into two rows of unequal length, so that one is padded."""
    return [
        {name: [value for example in part for value in example[name]] for name in part[0]}
        for part in (examples[:3], examples[3:])
    ]


def by_document(model: Any, batch: dict[str, Any], *, masked: bool, shift: bool = False) -> np.ndarray:
    """Return the loss at every target, in the order of the documents."""
    labels = batch["labels"]
    with torch.inference_mode():
        if masked:
            logits = pretraining.masked_language_model(model, shift=shift)(**batch)["logits"]
            targets = labels[labels != -100]
        else:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            logits, labels = model(**inputs).logits[:, :-1], labels[:, 1:]
            logits, targets = logits[labels != -100], labels[labels != -100]
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").numpy()


def check(model: Any, attention: str, *, masked: bool, first_position: int = 0, shift: bool = False) -> np.ndarray:
    """Compare packed with alone; return the losses alone."""
    examples = documents(masked=masked)
    if shift:  # nothing of its own document comes before a first token
        for example in examples:
            example["labels"][0] = -100
    alone = [
        by_document(model, pretraining.collate_padded([example], PAD), masked=masked, shift=shift)
        for example in examples
    ]
    packed = pretraining.collate_packed(
        rows(examples), PAD, attention=attention, bidirectional=masked, first_position=first_position
    )
    together = by_document(model, packed, masked=masked, shift=shift)
    assert np.abs(together - np.concatenate(alone)).max() < TOLERANCE
    return np.concatenate(alone)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decoder(attention: str) -> None:
    model = decoder(attention, bidirectional=False)
    alone = check(model, attention, masked=False)
    # The trap: an all-ones mask beside restarted positions.
    batch = pretraining.collate_packed(rows(documents(masked=False)), PAD, attention=attention)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert np.abs(by_document(model, batch, masked=False) - alone).max() > 0.1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_unmasked_decoder(attention: str) -> None:
    model = decoder(attention, bidirectional=True)
    alone = check(model, attention, masked=True, shift=True)
    # The trap: restarted positions, which isolate documents while the model is causal.
    examples = documents(masked=True)
    for example in examples:
        example["labels"][0] = -100
    batch = pretraining.collate_packed(rows(examples), PAD, attention=attention)
    assert np.abs(by_document(model, batch, masked=True, shift=True) - alone).max() > 0.1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_encoder(family: str, attention: str) -> None:
    if family == "mpnet" and attention == "sdpa":
        pytest.skip("this architecture has eager attention only")
    model = encoder(family, attention)
    assert family in pretraining._PACKABLE_ENCODERS
    first = PAD + 1 if family in pretraining._COUNTS_FROM_PAD else 0
    alone = check(model, attention, masked=True, first_position=first)
    packed = rows(documents(masked=True))
    # The traps: restarted positions without a mask, and on eager attention a boolean mask, which is added as 0 and 1.
    batch = pretraining.collate_packed(packed, PAD, attention=attention, first_position=first)
    assert np.abs(by_document(model, batch, masked=True) - alone).max() > 0.1
    if attention == "eager":
        batch = pretraining.collate_packed(packed, PAD, attention="sdpa", bidirectional=True, first_position=first)
        assert np.abs(by_document(model, batch, masked=True) - alone).max() > 0.1


@pytest.mark.parametrize("kind", ["decoder", "unmasked decoder", "encoder"])
def test_flash_arguments_say_where_documents_end(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain attention that reads the same arguments as flash attention gives the loss of each document alone."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def boundaries(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        causal = options["is_causal"] if options.get("is_causal") is not None else module.is_causal
        if "cu_seq_lens_q" not in options:
            spans = [(0, query.shape[2])]
            parts = [(q, k, v) for q, k, v in zip(query, key, value, strict=True)]
        else:
            assert mask is None
            bounds = options["cu_seq_lens_q"].tolist()
            spans = list(itertools.pairwise(bounds))
            assert options["max_length_q"] == max(end - begin for begin, end in spans)
            parts = [tuple(x.transpose(0, 1).flatten(1, 2) for x in (query, key, value))]
        results = []
        for q, k, v in parts:
            pieces = [
                torch.nn.functional.scaled_dot_product_attention(
                    q[:, begin:end], k[:, begin:end], v[:, begin:end], is_causal=causal
                )
                for begin, end in spans
            ]
            results.append(torch.cat(pieces, dim=1))
        out = torch.stack(results).transpose(1, 2)
        return out.reshape(query.shape[0], query.shape[2], *out.shape[2:]), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "reads_boundaries", boundaries)
    masked = kind != "decoder"
    model = encoder("bert", "sdpa") if kind == "encoder" else decoder("sdpa", bidirectional=masked)
    model.set_attn_implementation("reads_boundaries")
    check(model, "flash_attention_2", masked=masked, shift=kind == "unmasked decoder")


def test_a_model_that_cannot_keep_documents_apart_is_refused_or_bucketed() -> None:
    deberta = hf.DebertaV2Config(**SMALL)
    deberta._attn_implementation = "eager"
    local = hf.ModernBertConfig(**SMALL, local_attention=16)
    local._attn_implementation = "sdpa"
    for config in (deberta, local):
        with pytest.raises(ModelError, match="use batching bucketed"):
            pretraining.choose_batching(config, "packed", 64, masked=True)
        assert pretraining.choose_batching(config, "auto", 64, masked=True) == "bucketed"
    assert pretraining.choose_batching(local, "auto", 8, masked=True) == "packed"
