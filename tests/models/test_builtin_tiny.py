"""The model that ships: small, whole, with offsets that can be trusted, and better than chance on notes."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_nlp.models.loading import check_offsets, load_base
from clinical_nlp.models.resolve import resolve_model
from clinical_nlp.notes.corpus import load_corpus
from clinical_nlp.tasks import pretraining


@pytest.fixture(scope="module")
def tiny():
    return load_base("builtin:tiny", kind="causal")


def test_it_is_small_enough_for_the_wheel_and_says_what_it_was_made_from():
    folder = Path(resolve_model("builtin:tiny").folder)
    # A wheel is a zip file: what counts is the deflated size.
    assert sum(len(zlib.compress(path.read_bytes())) for path in folder.iterdir()) <= 12_000_000
    card = (folder / "README.md").read_text("utf-8")
    for said in ("CC BY 4.0", "mtsamples", "synthetic_hospitals", "clinical-nlp run tiny"):
        assert said in card


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200))
def test_any_text_comes_back_and_offsets_cover_it(tiny, text):
    encoded = tiny.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    check_offsets(tiny.tokenizer, text, encoded["offset_mapping"], encoded["input_ids"])
    if text.isascii():
        assert tiny.tokenizer.decode(encoded["input_ids"]) == text


def test_special_tokens_differ(tiny):
    ids = (tiny.tokenizer.pad_token_id, tiny.tokenizer.bos_token_id, tiny.tokenizer.eos_token_id)
    assert None not in ids
    assert len(set(ids)) == 3


def test_it_has_learned_to_read_notes(tiny):
    corpus = load_corpus("synthetic_hospitals", institutions=1, patients=5, seed=99)
    rows = pretraining.encode(corpus.notes["text"].to_pylist(), tiny.tokenizer)
    nats, tokens = pretraining.note_losses(tiny.network, rows, length=512, pad_token_id=0).sum(0)
    assert math.exp(nats / tokens) < 40
