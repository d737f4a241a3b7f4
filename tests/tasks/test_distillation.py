"""Distillation: the student is shown what the teacher said of the same characters, and learns it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_decoder, write_encoder

from clinical_nlp.models.loading import load_base
from clinical_nlp.tasks import coding, distillation, ner

TASK = ner.NerTask(labels=("drug", "problem"), window=32, overlap=8, bidirectional=True)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("students")
    distillation.write_student(
        ["no fever or severe cough today", "aspirin 81 mg daily"] * 5, folder / "new", layers=1, hidden=32,
        vocabulary=400, seed=0,
    )  # fmt: skip
    names = {
        "decoder": write_decoder(tmp_path_factory.mktemp("decoder")),
        "encoder": write_encoder(tmp_path_factory.mktemp("encoder")),
        "new": folder / "new",
    }
    return {name: load_base(str(path)).tokenizer for name, path in names.items()}


def said_of(texts, tokenizer, seed=0):
    """What a teacher with this tokenizer might say: any probabilities."""
    rng = np.random.default_rng(seed)
    found = []
    for text in texts:
        encoded = TASK.encode(text, tokenizer)
        scores = rng.normal(size=(len(encoded.word_spans), len(TASK.tags))).astype(np.float32)
        found.append((encoded, np.log(np.exp(scores) / np.exp(scores).sum(1, keepdims=True))))
    return found


@settings(deadline=None, max_examples=60)
@given(text=st.text(alphabet="ab é\n.5-x", max_size=80), pair=st.sampled_from([("decoder", "new"), ("new", "encoder")]))
def test_soft_targets_are_probabilities_of_words_that_the_teacher_saw(tokenizers, text, pair):
    teacher, student = (tokenizers[name] for name in pair)
    windows = distillation.soft_windows(TASK, student, [text], said_of([text], teacher))
    for window in windows:
        decided = [place for place, label in enumerate(window.window.labels) if label != -100]
        np.testing.assert_allclose(window.soft[decided].sum(1), 1, rtol=1e-5)
        others = [place for place in range(len(window.soft)) if place not in decided]
        assert not window.soft[others].any()
        assert len(window.soft) == len(window.window.input_ids)


def test_the_same_tokenizer_gives_the_teachers_own_probabilities(tokenizers):
    texts = ["no fever or severe cough " * 12]
    said = said_of(texts, tokenizers["encoder"])
    windows = distillation.soft_windows(TASK, tokenizers["encoder"], texts, said)
    assert len(windows) > 2
    seen = {}
    for window in windows:
        for place, word in enumerate(window.window.words):
            if word >= 0:
                seen[word] = window.soft[place]
    np.testing.assert_allclose(np.stack([seen[word] for word in sorted(seen)]), np.exp(said[0][1]), rtol=1e-5)


def test_a_word_that_only_continues_cannot_begin(tokenizers):
    text = "abc"
    teacher = (ner.Encoded([(0, 3)], []), np.log(np.array([[0.1, 0.5, 0.2, 0.1, 0.1]], dtype=np.float32)))
    task = ner.NerTask(("drug", "problem"), 32, 8, True)
    whole = task.encode(text, tokenizers["encoder"])
    parts = ner.Encoded([(0, 1), (1, 3)], [ner.Window(0, whole.windows[0].input_ids, [-1, 0, 1], [-100] * 3)])

    found = distillation.soft_windows(_with(task, parts), None, [text], [teacher])
    np.testing.assert_allclose(found[0].soft[1], [0.1, 0.5, 0.2, 0.1, 0.1], rtol=1e-5)
    np.testing.assert_allclose(found[0].soft[2], [0.1, 0.0, 0.7, 0.0, 0.2], rtol=1e-5)


def _with(task, encoded):
    class Fixed:
        tags = task.tags

        def encode(self, *_, **__):
            return encoded

    return Fixed()


def test_certain_soft_targets_cost_what_gold_costs(tmp_path):
    base = load_base(str(write_encoder(tmp_path / "encoder")))
    model = ner.build_model(base.network, len(TASK.tags), seed=0).eval()
    gold = TASK.encode("no fever or cough", base.tokenizer, spans=[(3, 8, "problem"), (12, 17, "problem")]).windows
    plain = model(**ner.collate(gold, 0))["loss"]
    soft = []
    for window in gold:
        rows = np.zeros((len(window.labels), len(TASK.tags)), dtype=np.float32)
        for place, label in enumerate(window.labels):
            if label >= 0:
                rows[place, label] = 1
        soft.append(distillation.SoftWindow(window, rows))
    batch = distillation.collate_windows(soft, pad_token_id=0)
    torch.testing.assert_close(model(**batch)["loss"], plain)


def test_a_student_learns_to_say_what_the_teacher_says(tmp_path):
    base = load_base(str(write_encoder(tmp_path / "encoder")))
    texts = ["no fever or cough", "severe pain today", "fever and pain", "cough today"]
    said = said_of(texts, base.tokenizer)
    windows = distillation.soft_windows(TASK, base.tokenizer, texts, said)
    model = ner.build_model(base.network, len(TASK.tags), seed=0)
    batch = distillation.collate_windows(windows, pad_token_id=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first = float(model(**batch)["loss"].detach())
    for _ in range(150):
        loss = model(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    entropy = -np.concatenate([(np.exp(p) * p).sum(1) for _, p in said]).mean()
    assert float(loss.detach()) < first
    assert float(loss.detach()) == pytest.approx(entropy, abs=0.25)


def test_documents_carry_the_probability_of_each_code(tmp_path):
    base = load_base(str(write_encoder(tmp_path / "encoder")))
    task = coding.CodingTask(("A", "B"), ("fever", "cough"), (True, True), "own", "note", 32, 100, True)
    wanted = np.array([[0.9, 0.1], [0.2, 0.7]])
    documents = distillation.SoftDocuments(task, base.tokenizer, [["fever"], ["cough", "today"]], wanted)
    batch = distillation.collate_documents([documents[0], documents[1]], pad_token_id=0)
    np.testing.assert_allclose(batch["labels"].numpy(), wanted, rtol=1e-6)
    assert batch["document"].tolist() == [0, 1, 1]
    model = coding.build_model(base.network, task, seed=0)
    assert torch.isfinite(model(**batch)["loss"])


def test_a_new_student_is_the_same_each_time(tmp_path):
    texts = [f"no {word} today, {word * 2}" for word in ("fever", "cough", "pain", "rash", "chills", "ache", "edema")]
    write = partial(distillation.write_student, texts, layers=1, hidden=32, vocabulary=400)
    write(tmp_path / "a", seed=1)
    write(tmp_path / "b", seed=1)
    write(tmp_path / "c", seed=2)
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert same[0] == same[1] != same[2]
    vocabularies = [(tmp_path / name / "tokenizer.json").read_bytes() for name in "abc"]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]
