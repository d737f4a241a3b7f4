"""Tagging: windows cover every word once, decoding is the inverse of encoding, scores count what they say."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_tokenizer

from clinical_nlp.errors import ConfigError, ModelError
from clinical_nlp.models.loading import check_offsets
from clinical_nlp.tasks.ner import NerTask, best_path, count_matches, most_tokens, predict_spans, score

TASK = NerTask(labels=("drug", "problem"), window=24, overlap=8, bidirectional=True)
NOTES = st.one_of(
    st.text(max_size=300),
    st.lists(
        st.sampled_from(
            [
                "no fever",
                "\r\n",
                "\n",
                "\t",
                "\x00",
                "\x1f",
                "\u200d",
                "\ufeff",
                "naïve",
                "e\u0301",
                "𝒙",
                "高血压",
                "👩‍⚕️",
                " ",
            ]
        ),
        max_size=60,
    ).map("".join),
)
"""Any text, and text that is dense in line ends, control characters, joiners and code points above 16 bits."""


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def cleaning_tokenizer():
    """A BERT-like tokenizer, which drops control characters and has cls and sep."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    words = [
        *special.values(),
        *"abcdefghijklmnopqrstuvwxyz0123456789.,",
        *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
    ]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="session", params=["bytes", "cleaning", "builtin"])
def any_tokenizer(request, tokenizer, cleaning_tokenizer):
    if request.param == "builtin":
        from clinical_nlp.models.loading import load_tokenizer
        from clinical_nlp.models.resolve import resolve_model

        return load_tokenizer(resolve_model("builtin:tiny"))
    return tokenizer if request.param == "bytes" else cleaning_tokenizer


@settings(max_examples=100, deadline=None)
@given(text=NOTES, room=st.integers(1, 40), overlap=st.integers(0, 30))
def test_every_word_is_decided_in_exactly_one_window(any_tokenizer, text, room, overlap):
    task = replace(TASK, window=overlap + room + 3, overlap=overlap)
    encoded = task.encode(text, any_tokenizer)
    decided = sorted(word for window in encoded.windows for word in window.words if word >= 0)
    assert decided == list(range(len(encoded.word_spans)))
    assert all(len(window.input_ids) <= task.window for window in encoded.windows)
    assert all(text[start:end].strip() for start, end in encoded.word_spans)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(encoded.word_spans))


class TokenTagger:
    """Make a model whose logits depend on the token alone, so that only the stitching could change a tag."""

    @staticmethod
    def make(vocabulary, seed):
        import torch

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(seed)
                self.table = torch.nn.Embedding(vocabulary, len(TASK.tags))

            def forward(self, input_ids, attention_mask):
                return {"logits": 4 * self.table(input_ids)}

        return Model()


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(NOTES, min_size=1, max_size=4),
    room=st.integers(1, 20),
    overlap=st.integers(0, 20),
    seed=st.integers(0, 5),
)
def test_stitched_windows_give_the_spans_of_one_window(any_tokenizer, texts, room, overlap, seed):
    model = TokenTagger.make(len(any_tokenizer), seed)
    whole = predict_spans(model, replace(TASK, window=5000, overlap=0), any_tokenizer, texts)
    cut = predict_spans(
        model, replace(TASK, window=overlap + room + 3, overlap=overlap), any_tokenizer, texts, batch_tokens=100
    )
    assert cut == whole
    for text, spans in zip(texts, whole, strict=True):
        assert all(0 <= start < end <= len(text) and text[start:end].strip() for start, end, _, _ in spans)


def test_prediction_leaves_the_model_in_the_mode_it_was_in(tokenizer):
    model = TokenTagger.make(len(tokenizer), 0)
    for training in (True, False):
        model.train(training)
        predict_spans(model, TASK, tokenizer, ["no fever"])
        assert model.training is training


def test_a_note_without_a_token_has_no_window_and_no_span(tokenizer, cleaning_tokenizer):
    assert TASK.encode("", tokenizer).windows == []
    assert TASK.encode("\x00\x01", cleaning_tokenizer).windows == []
    assert predict_spans(TokenTagger.make(len(tokenizer), 0), TASK, tokenizer, ["", "fever", " "])[0] == []


@pytest.mark.parametrize(("window", "overlap"), [(4, 0), (3, 0), (2, 0), (11, 9)])
def test_a_window_without_room_is_refused(cleaning_tokenizer, window, overlap):
    task = replace(TASK, window=window, overlap=overlap)
    if window == 4:
        assert task.encode("fever", cleaning_tokenizer).windows
        return
    with pytest.raises(ConfigError, match="set a larger window"):
        task.encode("fever", cleaning_tokenizer)


def test_spans_that_no_word_carries_are_counted(cleaning_tokenizer):
    text = "no \x01\x02 fever  and cough"
    spans = [
        (6, 11, "problem"),
        (6, 16, "drug"),  # longer, so that it is kept and the one above is not
        (3, 5, "drug"),  # characters that the tokenizer drops
        (13, 13, "drug"),  # empty
        (11, 13, "drug"),  # blank
        (20, 99, "drug"),  # beyond the text
        (-3, 2, "drug"),
        (5, 2, "drug"),
    ]
    encoded = TASK.encode(text, cleaning_tokenizer, spans=spans)
    assert (encoded.lost, encoded.covered) == (6, 1)
    assert sorted(label for window in encoded.windows for label in window.labels if label > 0) == [1, 2]


def test_roberta_has_two_positions_fewer_than_it_says():
    import torch
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, RobertaConfig, RobertaModel

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    roberta = RobertaModel(RobertaConfig(vocab_size=30, max_position_embeddings=34, pad_token_id=1, **small)).eval()
    assert most_tokens(roberta) == 32
    with torch.inference_mode():
        roberta(input_ids=torch.full((1, 32), 5))
        with pytest.raises(RuntimeError):
            roberta(input_ids=torch.full((1, 33), 5))
    assert most_tokens(BertModel(BertConfig(vocab_size=30, max_position_embeddings=34, **small))) == 34
    assert most_tokens(LlamaModel(LlamaConfig(vocab_size=30, max_position_embeddings=64, **small))) == 64


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
    assert counts.tolist() == [[1, 1, 1, 1], [0, 2, 2, 1]]
    estimates = score(counts[None], TASK.labels, ["p"], part="test", seed=0)
    assert estimates["test.f1_strict"].value == pytest.approx(2 / 6)
    assert estimates["test.f1_lenient"].value == pytest.approx(2 / 3)
    assert estimates["test.f1_lenient.problem"].value == pytest.approx(1 / 2)
    assert np.isnan(estimates["test.f1_strict"].low)


def test_one_gold_span_is_found_once_and_the_nearest_is_taken():
    counts = count_matches([(0, 10, "drug")], [(0, 3, "drug"), (4, 6, "drug")], ["drug"])
    assert counts.tolist() == [[0, 2, 1, 1]]
    gold = [(0, 3, "drug"), (4, 9, "drug")]
    assert count_matches(gold, [(2, 9, "drug")], ["drug"]).tolist() == [[0, 1, 2, 1]]
    assert count_matches([gold[0], gold[0]], [gold[0], gold[0]], ["drug"]).tolist() == [[1, 1, 1, 1]]


Marked = tuple[list[str], list[tuple[int, int, str]]]


@st.composite
def marked(draw: st.DrawFn, length: int = 12) -> Marked:
    """Draw one sentence of tags and its spans, which do not overlap."""
    tags, spans, position = ["O"] * length, [], 0
    while position < length:
        size = draw(st.integers(1, 4))
        label = draw(st.sampled_from([None, "drug", "problem", "test"]))
        if label and position + size <= length:
            tags[position : position + size] = [f"B-{label}", *[f"I-{label}"] * (size - 1)]
            spans.append((position, position + size, label))
        position += size
    return tags, spans


LABELS = ("drug", "problem", "test")
PAIRS = st.lists(st.tuples(marked(), marked()), min_size=1, max_size=5)


def estimates_of(pairs: list[tuple[Marked, Marked]]) -> dict[str, float]:
    counts = np.stack([count_matches(gold[1], found[1], LABELS) for gold, found in pairs])
    found = score(counts, LABELS, [str(index) for index in range(len(pairs))], part="test", seed=0)
    return {name: estimate.value for name, estimate in found.items()}


def equal(mine: float, theirs: float) -> bool:
    """The references say 0 for nothing to count, which is NaN here."""
    return theirs == 0 if np.isnan(mine) else mine == pytest.approx(theirs)


@settings(max_examples=200, deadline=None)
@given(PAIRS)
def test_strict_scores_per_label_equal_seqeval(pairs):
    from seqeval.metrics import classification_report
    from seqeval.scheme import IOB2

    mine = estimates_of(pairs)
    gold, found = [g[0] for g, _ in pairs], [f[0] for _, f in pairs]
    theirs = classification_report(gold, found, mode="strict", scheme=IOB2, output_dict=True, zero_division=0)
    assert equal(mine["test.f1_strict"], theirs["micro avg"]["f1-score"])
    assert equal(mine["test.precision_strict"], theirs["micro avg"]["precision"])
    assert equal(mine["test.recall_strict"], theirs["micro avg"]["recall"])
    for label in LABELS:
        value = mine[f"test.f1_strict.{label}"]
        assert equal(value, theirs[label]["f1-score"]) if label in theirs else np.isnan(value)


@settings(max_examples=200, deadline=None)
@given(PAIRS)
def test_strict_and_lenient_scores_per_label_equal_nervaluate(pairs):
    from nervaluate.evaluator import Evaluator

    mine = estimates_of(pairs)
    gold, found = ([note[side][0] for note in pairs] for side in (0, 1))
    results = Evaluator(gold, found, tags=list(LABELS), loader="list").evaluate()["entities"]
    for label in LABELS:
        for name, scheme in (("f1_strict", "strict"), ("f1_lenient", "ent_type")):
            value = mine[f"test.{name}.{label}"]
            assert equal(value, results[label][scheme].f1) if label in results else np.isnan(value)
