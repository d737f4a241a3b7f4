"""Coding: chunks keep every token and its place, documents do not mix, the loss accumulates, evidence points right."""

from __future__ import annotations

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_decoder, write_encoder
from tiny_training import Empty

from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy
from clinical_nlp.errors import ConfigError, ModelError
from clinical_nlp.models.loading import load_base
from clinical_nlp.runs import Run
from clinical_nlp.statistics.calibration import Calibration
from clinical_nlp.tasks import coding
from clinical_nlp.training.trainer import TrainingConfig, train, trainable_state

CODES = ("A01", "B02", "C03")
NAMES = ("fever", "severe cough", "chest pain")
WORD_OF = {"fever": "A01", "cough": "B02", "pain": "C03"}


def task(**options):
    values = {"codes": CODES, "labels": NAMES, "seen": (True, True, True), "system": "own", "unit": "note"}
    return coding.CodingTask(**{**values, "chunk": 16, "max_tokens": 200, "bidirectional": True, **options})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        "decoder": write_decoder(tmp_path_factory.mktemp("decoder")),
        "encoder": write_encoder(tmp_path_factory.mktemp("encoder")),
    }


@pytest.fixture(scope="module", params=["decoder", "encoder"])
def base(request, folders):
    return load_base(str(folders[request.param]), bidirectional=True)


def made_up(count, seed=0, least=3):
    """Texts and codes of documents; a word of the text gives the code."""
    rng = np.random.default_rng(seed)
    words = ["no", "and", "today", "since", "monday", *WORD_OF]
    texts = [rng.choice(words, size=int(rng.integers(least, 30))).tolist() for _ in range(count)]
    return [([" ".join(text)], sorted({WORD_OF[word] for word in text if word in WORD_OF})) for text in texts]


def examples_of(base, rows, **options):
    examples = coding.Documents(task(**options), base.tokenizer)
    for texts, codes in rows:
        examples.add(texts, codes)
    return examples


def model_of(base, seed=0, network=None, **options):
    described = coding.embed_descriptions(base, NAMES)
    return coding.build_model(
        base.network if network is None else network, task(**options), seed=seed, descriptions=described
    )


# Text to tokens


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(st.text(alphabet="abc é\n.5", max_size=120), min_size=1, max_size=3))
def test_every_token_is_read_once_and_has_its_place(folders, texts):
    base = load_base(str(folders["encoder"]))
    document = task().encode(texts, base.tokenizer)
    whole = [base.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for text in texts]
    expected = [
        (note, start, end, token)
        for note, found in enumerate(whole)
        for (start, end), token in zip(found["offset_mapping"], found["input_ids"], strict=True)
    ]
    flat = [token for chunk in document.chunks for token in chunk]
    assert len(flat) == document.length
    read = [(*place, token) for place, token in zip(document.places.tolist(), flat, strict=True) if place[0] >= 0]
    assert read == expected
    assert all(len(chunk) <= 16 for chunk in document.chunks)
    assert document.cut == 0


def test_what_does_not_fit_is_counted(base):
    text = "fever and cough " * 40
    tokens = len(base.tokenizer(text, add_special_tokens=False)["input_ids"])
    document = task(max_tokens=50).encode([text, "pain"], base.tokenizer)
    assert document.cut == tokens + len(base.tokenizer("pain", add_special_tokens=False)["input_ids"]) - 50
    examples = examples_of(base, [([text], ["A01"]), (["pain"], ["C03"])], max_tokens=50)
    assert (examples.cut, examples.cut_documents) == (tokens - 50, 1)


def test_a_chunk_without_room_is_refused(base):
    with pytest.raises(ConfigError, match="larger chunk"):
        task(chunk=8).encode(["fever"], base.tokenizer)


def test_chunks_of_a_document_differ_by_one_token_at_most(base):
    document = task().encode(["fever and cough " * 30], base.tokenizer)
    assert len({len(chunk) for chunk in document.chunks}) <= 2


# Scores


def logits(model, base, documents, **options):
    return coding.predict_logits(model, task(), base.tokenizer, documents, **options)


@pytest.mark.parametrize("head", ["label_attention", "pooled"])
def test_a_document_is_scored_alike_alone_and_in_a_batch(base, head):
    model = model_of(base, head=head)
    documents = [task().encode(texts, base.tokenizer) for texts, _ in made_up(9, least=1)]
    together = logits(model, base, documents)
    alone = np.concatenate([logits(model, base, [document], batch_tokens=1) for document in documents])
    np.testing.assert_allclose(together, alone, atol=2e-5)


def test_a_document_without_text_has_the_bias_as_its_score(base):
    model = model_of(base)
    found = logits(model, base, [task().encode([""], base.tokenizer), task().encode(["fever"], base.tokenizer)])
    np.testing.assert_allclose(found[0], model.head.bias.detach().numpy(), atol=1e-6)


def test_a_code_whose_words_are_nowhere_attends_to_nothing(base):
    model = model_of(base)
    document = task().encode(["fever today and monday"], base.tokenizer)
    states = torch.randn(1, document.length, base.network.config.hidden_size)
    states, mask = torch.nn.functional.normalize(states, dim=-1), torch.ones(1, document.length) > 0
    with torch.no_grad():
        _, attention = model.head(states, mask)
        assert (attention.sum(1) < 1).all()
        model.head.nothing.fill_(1e4)
        scores, attention = model.head(states, mask)
    assert float(attention.max()) == 0
    np.testing.assert_allclose(scores[0].numpy(), model.head.bias.detach().numpy(), atol=1e-6)


def test_a_token_that_does_not_count_changes_no_code(base):
    model = model_of(base)
    width = base.network.config.hidden_size
    states, mask = torch.randn(1, 6, width), torch.ones(1, 6) > 0
    closed = torch.tensor([0.0, 0.0, -1e4, 0.0, 0.0, 0.0]).reshape(1, 6, 1)
    model.head.counts.forward = lambda _: closed
    with torch.no_grad():
        scores, attention = model.head(states, mask)
        states[0, 2] = torch.randn(width)
        others, _ = model.head(states, mask)
    assert float(attention[0, 2].max()) == 0
    torch.testing.assert_close(scores, others)


def test_untrained_scores_start_at_the_log_odds_of_training(base):
    counts = np.array([30, 3, 0])
    model = coding.build_model(base.network, task(seen=(True, True, False)), seed=0, counts=counts, n_documents=60)
    bias = torch.sigmoid(model.head.bias).detach().numpy()
    assert bias[0] == pytest.approx(0.5, abs=0.02)
    assert bias[1] == pytest.approx(0.05, abs=0.01)
    assert 0 < bias[2] < 0.01


def test_a_code_without_an_example_is_scored_by_its_name_and_never_trained(base):
    rows = made_up(8)
    options = {"seen": (True, True, False)}
    model = model_of(base, **options)
    examples = examples_of(base, rows, **options)
    batch = coding.collate([examples[i] for i in range(8)], n_codes=3, pad_token_id=0)
    model(**batch)["loss"].backward()
    assert model.head.query.grad[2].abs().max() == 0
    assert model.head.classifier.grad[2].abs().max() == 0
    assert model.head.query.grad[0].abs().max() > 0
    other = coding.build_model(
        base.network, task(**options), seed=0, descriptions=np.eye(3, base.network.config.hidden_size)
    )
    documents = [task().encode(rows[0][0], base.tokenizer)]
    assert logits(model, base, documents)[0, 2] != logits(other, base, documents)[0, 2]


# The loss


@pytest.mark.parametrize("head", ["label_attention", "pooled"])
@pytest.mark.parametrize("category_loss", [0.0, 0.5])
def test_eight_small_batches_equal_one_large_one(base, head, category_loss):
    rows = made_up(8, seed=1)
    examples = examples_of(base, rows)
    described = coding.embed_descriptions(base, NAMES)
    build = partial(
        coding.build_model, base.network, task(head=head), seed=0, descriptions=described,
        groups=np.array([0, 0, 1]), group_weight=category_loss,
    )  # fmt: skip
    model = build().eval()
    one = coding.collate([examples[i] for i in range(8)], n_codes=3, pad_token_id=0)
    cells = one["labels"].numel()
    model(**one, num_items_in_batch=cells)["loss"].backward()
    expected = {name: p.grad.clone() for name, p in model.head.named_parameters()}
    model.zero_grad()
    for i in range(8):
        batch = coding.collate([examples[i]], n_codes=3, pad_token_id=0)
        model(**batch, num_items_in_batch=cells)["loss"].backward()
    for name, parameter in model.head.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_the_loss_is_binary_cross_entropy_over_codes_a_document(base):
    rows = made_up(5)
    examples = examples_of(base, rows)
    model = model_of(base).eval()
    batch = coding.collate([examples[i] for i in range(5)], n_codes=3, pad_token_id=0)
    found = model(**batch)
    chance = torch.sigmoid(found["logits"])
    plain = -(batch["labels"] * chance.log() + (1 - batch["labels"]) * (1 - chance).log()).sum(1).mean()
    torch.testing.assert_close(found["loss"], plain, rtol=1e-4, atol=1e-5)


def test_examples_that_do_not_count_change_nothing(base):
    rows = made_up(4)
    examples = examples_of(base, rows)
    model = model_of(base).eval()
    batch = coding.collate([examples[i] for i in range(4)], n_codes=3, pad_token_id=0)
    ignored = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    loss = model(**ignored, num_items_in_batch=12)["loss"]
    assert float(loss.detach()) == 0


def test_a_collapsed_head_stops_the_training(base):
    rows = made_up(4)
    examples = examples_of(base, rows)
    model = model_of(base).train()
    with torch.no_grad():
        model.head.bias.fill_(20.0)
    gold = {**coding.collate([examples[i] for i in range(4)], n_codes=3, pad_token_id=0)}
    gold["labels"] = torch.zeros_like(gold["labels"])
    gold["labels"][0, 0] = 1
    with pytest.raises(ModelError, match="collapsed"):
        for _ in range(200):
            model(**gold)


# Training


def fit(output, folder, rows, *, resume=False, strategy="lora", max_steps=10):
    settings = StrategyConfig(name=strategy, rank=4)
    base = load_base(str(folder), quantization=settings.quantization, bidirectional=True)
    described = coding.embed_descriptions(base, NAMES)
    network = apply_strategy(base.network, settings, seed=0)
    examples = examples_of(base, rows)
    model = coding.build_model(
        network, task(), seed=0, descriptions=described, counts=examples.counts(), n_documents=len(examples)
    )
    config = TrainingConfig(epochs=30, batch_size=4, learning_rate=2e-3, head_learning_rate=2e-2, save_steps=4)
    with Run.open(output, Empty(), recipe="test", resume=resume) as run:
        train(
            model,
            examples,
            partial(coding.collate, n_codes=3, pad_token_id=0),
            config=config,
            run=run,
            seed=0,
            lengths=examples.lengths,
            tokenizer=base.tokenizer,
            strategy=settings,
            head="head",
            max_steps=max_steps,
            resume=resume,
        )
        coding.save(
            run.path, model, task(), base, full=settings.moves_base,
            calibration={"slope": 1.0, "offset": 0.0}, threshold=0.0, accept=0.8,
        )  # fmt: skip
        run.note(base_model={"name": str(folder), "source": "local"})
    return model, base


def test_it_learns_which_word_is_which_code_and_shows_it(tmp_path, folders):
    model, base = fit(tmp_path / "run", folders["encoder"], made_up(80), max_steps=300)
    rows = made_up(30, seed=9)
    documents = [task().encode(texts, base.tokenizer) for texts, _ in rows]
    said = logits(model, base, documents) > 0
    gold = np.array([[code in codes for code in CODES] for _, codes in rows])
    assert (said == gold).mean() > 0.95
    right = pointed = 0
    for (texts, codes), document in zip(rows, documents, strict=True):
        chosen = [CODES.index(code) for code in codes]
        for code, spans in zip(
            chosen, coding.find_evidence(model, task(), base.tokenizer, document, texts, chosen), strict=True
        ):
            assert len(spans) <= coding.SPANS
            right += 1
            shown = " ".join(texts[span.note][span.start : span.end] for span in spans)
            pointed += any(word in shown for word, name in WORD_OF.items() if name == CODES[code])
    assert pointed > 0.9 * right


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_a_saved_run_proposes_what_the_model_proposed(tmp_path, folders, strategy):
    rows = made_up(20)
    model, base = fit(tmp_path / "run", folders["decoder"], rows, strategy=strategy)
    texts = [row for row, _ in rows]
    mine = coding.Coder(model, task(), base.tokenizer, Calibration(), 0.0, 0.8).predict(texts)
    loaded = coding.Coder.load(tmp_path / "run").predict(texts)
    assert [[item.code for item in row] for row in mine] == [[item.code for item in row] for row in loaded]
    for row, again in zip(mine, loaded, strict=True):
        for item, other in zip(row, again, strict=True):
            assert item.probability == pytest.approx(other.probability, abs=1e-5)
            assert item.review == (item.probability < 0.8)
            assert item.evidence


def test_resumed_equals_uninterrupted(tmp_path, folders):
    rows = made_up(20)
    whole, _ = fit(tmp_path / "whole", folders["encoder"], rows, max_steps=8)
    fit(tmp_path / "cut", folders["encoder"], rows, max_steps=8)
    for name in ("manifest.json", "checkpoints/checkpoint-8"):
        path = tmp_path / "cut" / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    resumed, _ = fit(tmp_path / "cut", folders["encoder"], rows, max_steps=8, resume=True)
    for name, value in trainable_state(whole).items():
        assert torch.equal(value, trainable_state(resumed)[name]), name


# Evidence


def test_attention_is_summed_by_word_and_neighbours_are_joined():
    text = "no fever.\n\nSevere cough today"
    offsets = [(0, 2), (3, 5), (5, 8), (8, 9), (11, 17), (18, 23), (24, 29)]
    document = coding.Document([[1] * 7], np.array([(0, *place) for place in offsets], dtype=np.int32))
    weights = np.array([0.02, 0.1, 0.1, 0.03, 0.3, 0.4, 0.05])
    spans = coding._spans(document, [text], weights)
    assert [text[span.start : span.end] for span in spans] == ["Severe cough", "fever"]
    assert spans[0].weight == pytest.approx(0.7)
    assert spans[1].weight == pytest.approx(0.2)


def test_evidence_of_a_document_without_words_is_none():
    document = coding.Document([[1]], np.array([(0, 0, 1)], dtype=np.int32))
    assert coding._spans(document, ["."], np.array([1.0])) == ()
    assert coding._spans(coding.Document([], np.zeros((0, 3), np.int32)), [""], np.zeros(0)) == ()
