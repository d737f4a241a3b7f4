"""Tagging: windows cover every word once, decoding is the inverse of encoding, scores count what they say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_tokenizer

from clinical_nlp.errors import ModelError
from clinical_nlp.models.loading import check_offsets
from clinical_nlp.tasks.ner import NerTask, best_path, count_matches, score

TASK = NerTask(labels=("drug", "problem"), window=24, overlap=8, bidirectional=True)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=300))
def test_every_word_is_decided_in_exactly_one_window(tokenizer, text):
    encoded = TASK.encode(text, tokenizer)
    decided = sorted(word for window in encoded.windows for word in window.words if word >= 0)
    assert decided == list(range(len(encoded.word_spans)))
    assert all(len(window.input_ids) <= TASK.window for window in encoded.windows)
    assert all(text[start:end].strip() for start, end in encoded.word_spans)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(encoded.word_spans))


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(
        st.sampled_from(["fever", "of", "aspirin", "81", "mg", ",", "naïve", "高血压", "𝒙y"]), min_size=1, max_size=60
    ),
    seed=st.integers(0, 10),
)
def test_decoding_gives_back_the_encoded_spans(tokenizer, words, seed):
    text, starts = "", []
    for word in words:
        starts.append(len(text))
        text += word + " "
    rng = np.random.default_rng(seed)
    spans, position = [], 0
    while position < len(words):
        length = int(rng.integers(1, 4))
        if rng.random() < 0.4 and position + length <= len(words):
            last = position + length - 1
            label = TASK.labels[rng.integers(2)]
            spans.append((starts[position], starts[last] + len(words[last]), label))
        position += length
    encoded = TASK.encode(text, tokenizer, spans=spans)
    log_probs = np.full((len(encoded.word_spans), 5), -20.0)
    for window in encoded.windows:
        for word, label in zip(window.words, window.labels, strict=True):
            if word >= 0:
                log_probs[word, label] = 0.0
    assert [item[:3] for item in TASK.decode(encoded, log_probs)] == spans


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(0, 1000))
def test_the_path_is_the_best_one_without_a_stray_inside(count, seed):
    import itertools

    scores = np.random.default_rng(seed).normal(size=(count, 5))

    def valid(path):
        return all(tag % 2 == 1 or tag == 0 or (i > 0 and path[i - 1] in (tag, tag - 1)) for i, tag in enumerate(path))

    best = max((p for p in itertools.product(range(5), repeat=count) if valid(p)),
               key=lambda p: sum(scores[i, t] for i, t in enumerate(p)))  # fmt: skip
    assert best_path(scores).tolist() == list(best)


def test_a_span_inside_a_word_takes_the_word_and_the_longest_of_overlapping_spans_wins(tokenizer):
    text = "severe aspirin-induced asthma"
    spans = [(7, 14, "drug"), (0, 29, "problem"), (2, 4, "drug")]
    encoded = TASK.encode(text, tokenizer, spans=spans)
    labels = [
        label
        for window in encoded.windows
        for word, label in zip(window.words, window.labels, strict=True)
        if word >= 0
    ]
    assert labels[0] == 3
    assert set(labels[1:]) == {4}


def test_unusable_offsets_fail_loudly(tokenizer):
    with pytest.raises(ModelError, match="offsets"):
        check_offsets(tokenizer, "one two three", [(0, 0), (4, 4), (8, 8)], [10, 11, 12])


def test_counts_and_scores_equal_the_reference():
    gold = [(0, 4, "drug"), (10, 14, "problem"), (20, 30, "problem")]
    found = [(0, 4, "drug"), (10, 15, "problem"), (40, 42, "problem")]
    counts = count_matches(gold, found, TASK.labels)
    assert counts.tolist() == [[1, 1, 1, 1, 1], [0, 2, 2, 1, 1]]
    estimates = score(counts[None], TASK.labels, ["p"], part="test", seed=0)
    assert estimates["test.f1_strict"].value == pytest.approx(2 / 6)
    assert estimates["test.f1_lenient"].value == pytest.approx(2 / 3)
    assert np.isnan(estimates["test.f1_strict"].low)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_strict_scores_equal_seqeval(seed):
    from seqeval.metrics import f1_score
    from seqeval.scheme import IOB2

    rng = np.random.default_rng(seed)

    def draw(length):
        tags, spans, position = ["O"] * length, [], 0
        while position < length:
            size = int(rng.integers(1, 4))
            if rng.random() < 0.5 and position + size <= length:
                label = TASK.labels[rng.integers(2)]
                tags[position : position + size] = [f"B-{label}", *[f"I-{label}"] * (size - 1)]
                spans.append((position, position + size, label))
            position += size
        return tags, spans

    notes = [(draw(12), draw(12)) for _ in range(4)]
    counts = np.stack([count_matches(gold[1], found[1], TASK.labels) for gold, found in notes])
    mine = score(counts, TASK.labels, [str(i) for i in range(4)], part="test", seed=0)["test.f1_strict"].value
    theirs = f1_score([g[0] for g, _ in notes], [f[0] for _, f in notes], mode="strict", scheme=IOB2)
    if np.isnan(mine):
        assert theirs == 0
    else:
        assert mine == pytest.approx(theirs)
