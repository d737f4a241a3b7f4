"""What a tagger learns from: losses that accumulate exactly, sections left out, attention as asked."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_decoder, write_encoder

from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy
from clinical_nlp.config import Config, load_config
from clinical_nlp.errors import ConfigError
from clinical_nlp.language.sections import find_sections
from clinical_nlp.models.loading import load_base
from clinical_nlp.runs import Run
from clinical_nlp.tasks import ner
from clinical_nlp.tasks.augmentation import drop_sections
from clinical_nlp.training.trainer import TrainingConfig, train, trainable_state

TASK = ner.NerTask(labels=("drug", "problem"), window=40, overlap=8, bidirectional=True)
NOTE = (
    "CHIEF COMPLAINT: fever\n\nHISTORY OF PRESENT ILLNESS: severe cough since monday, on aspirin.\n\n"
    "ALLERGIES: penicillin\n\nMEDICATIONS: aspirin 81 mg\n\nASSESSMENT AND PLAN: pneumonia, likely.\n"
)
WORDS = {"fever": "problem", "cough": "problem", "pneumonia": "problem", "aspirin": "drug", "penicillin": "drug"}


def gold(text):
    return [
        (begin, begin + len(word), label)
        for word, label in WORDS.items()
        for begin in range(len(text))
        if text.startswith(word, begin)
    ]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return write_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def tokenizer(decoder):
    return load_base(str(decoder)).tokenizer


# Losses


LOSSES = [
    ner.LossConfig(),
    ner.LossConfig(name="weighted"),
    ner.LossConfig(name="weighted", power=1, bound=3),
    ner.LossConfig(name="focal"),
    ner.LossConfig(name="focal", gamma=0.5),
]


def note_windows(tokenizer, notes=16, **options):
    rng = np.random.default_rng(0)
    windows = ner.NoteWindows(TASK, tokenizer, **options)
    for index in range(notes):
        words = rng.choice(["no", "since", "monday", "and", *WORDS], size=int(rng.integers(1, 9))).tolist()
        windows.add(str(index), " ".join(words), gold(" ".join(words)))
    return windows


def tagger(decoder, loss, windows):
    base = load_base(str(decoder), bidirectional=True)
    network = apply_strategy(base.network, StrategyConfig(name="lora", rank=4), seed=0)
    weights = ner.tag_weights(windows.tag_counts(), loss) if loss.name == "weighted" else None
    return ner.build_model(network, len(TASK.tags), seed=0, loss=loss, weights=weights)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_eight_small_batches_have_the_gradient_of_one_large(decoder, tokenizer, loss):
    windows = note_windows(tokenizer)
    assert len(set(windows.lengths)) > 3
    model = tagger(decoder, loss, windows)
    batch = [windows[index] for index in range(len(windows))][:16]
    gradients = []
    for size in (16, 2):
        pieces = [ner.collate(batch[begin : begin + size], 0) for begin in range(0, 16, size)]
        words = sum((piece["labels"] != -100).sum() for piece in pieces)
        model.zero_grad()
        for piece in pieces:
            model(**piece, num_items_in_batch=words)["loss"].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    large, small = gradients
    assert any(value.abs().max() > 1e-4 for value in large.values())
    for name, value in large.items():
        assert torch.allclose(value, small[name], atol=1e-6), name


class Empty(Config):
    """A config for a run of a test."""

    seed: int = 0


@pytest.mark.parametrize("loss", [LOSSES[1], LOSSES[3]], ids=str)
def test_training_with_accumulation_eight_equals_one_batch_of_eight(tmp_path, decoder, tokenizer, loss):
    states = []
    for batch, accumulation in ((8, 1), (1, 8)):
        windows = note_windows(tokenizer, notes=20)
        model = tagger(decoder, loss, windows)
        with Run.open(tmp_path / str(batch), Empty(), recipe="test") as run:
            train(
                model,
                windows,
                partial(ner.collate, pad_token_id=0),
                config=TrainingConfig(epochs=2, batch_size=batch, accumulation=accumulation),
                run=run,
                seed=0,
                lengths=windows.lengths,
                tokenizer=tokenizer,
                strategy=StrategyConfig(name="lora", rank=4),
                head="head",
            )
        states.append(trainable_state(model))
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], atol=2e-5), name


def test_losses_are_what_their_formulas_say(decoder, tokenizer):
    windows = note_windows(tokenizer)
    batch = ner.collate([windows[index] for index in range(8)], 0)
    labels = batch["labels"].flatten()
    kept = labels != -100
    with torch.no_grad():
        logits = tagger(decoder, LOSSES[0], windows)(**batch)["logits"].flatten(0, 1)[kept]
        p = torch.softmax(logits, -1)[torch.arange(int(kept.sum())), labels[kept]]
        for loss in (*LOSSES, ner.LossConfig(name="focal", gamma=0), ner.LossConfig(name="weighted", power=0)):
            weights = torch.tensor(ner.tag_weights(windows.tag_counts(), loss))[labels[kept]]
            factor = {"cross_entropy": 1.0, "weighted": weights, "focal": (1 - p) ** loss.gamma}[loss.name]
            wanted = float((-factor * torch.log(p)).sum() / kept.sum())
            assert float(tagger(decoder, loss, windows)(**batch)["loss"]) == pytest.approx(wanted, rel=1e-5), loss


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_a_batch_without_a_label_adds_nothing(decoder, tokenizer, loss):
    windows = note_windows(tokenizer)
    model = tagger(decoder, loss, windows)
    batch = ner.collate([windows[0], windows[1]], 0)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    model(**batch, num_items_in_batch=torch.tensor(7))["loss"].backward()
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters() if p.grad is not None)


@given(
    counts=st.lists(st.integers(0, 10_000), min_size=2, max_size=9).filter(any),
    power=st.floats(0, 1),
    bound=st.floats(1, 100),
)
def test_weights_are_bounded_mean_one_and_heavier_for_rarer_tags(counts, power, bound):
    counts = np.array(counts)
    weights = ner.tag_weights(counts, ner.LossConfig(name="weighted", power=power, bound=bound))
    assert (weights > 0).all()
    assert np.isfinite(weights).all()
    assert (weights * counts).sum() == pytest.approx(counts.sum())
    assert weights.max() <= bound * weights.min() * (1 + 1e-9)
    order = np.argsort(counts)
    assert all(weights[a] >= weights[b] * (1 - 1e-9) for a, b in itertools.pairwise(order))


def test_weights_by_hand_and_weights_that_do_not_fit_the_loss(decoder):
    found = ner.tag_weights(np.array([900, 100, 0]), ner.LossConfig(name="weighted", power=0.5, bound=4))
    assert found == pytest.approx(np.array([1, 3, 4]) / 1.2)
    network = load_base(str(decoder)).network
    with pytest.raises(ConfigError, match="needs weights"):
        ner.build_model(network, 3, seed=0, loss=ner.LossConfig(name="weighted"))
    with pytest.raises(ConfigError, match="takes no weights"):
        ner.build_model(network, 3, seed=0, weights=np.ones(3))


def test_the_weights_of_a_loss_are_not_among_what_is_saved(decoder, tokenizer):
    model = tagger(decoder, LOSSES[1], note_windows(tokenizer))
    assert not any("tag_weights" in name for name in model.state_dict())


@pytest.mark.parametrize("key", ["loss.gama", "loss.bound"])
def test_a_wrong_loss_is_refused(key):
    from clinical_nlp.recipes import ner as recipe

    with pytest.raises(ConfigError, match="loss"):
        load_config(recipe.CONFIG, None, {key: 0.5})


# Sections left out


def test_the_note_has_sections():
    assert len(find_sections(NOTE)) == 5


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from([*NOTE.split("\n\n"), "no fever", "\n\n", "\r\n", "FAMILY HISTORY:\n", " "]), max_size=12
    ),
    probability=st.floats(0, 1),
    draw=st.tuples(st.integers(0, 99), st.integers(0, 9), st.text(max_size=5)),
    across=st.tuples(st.integers(0, 400), st.integers(1, 80)),
)
def test_what_is_kept_is_whole_sections_with_their_spans(pieces, probability, draw, across):
    text = "\n".join(pieces)
    spans = gold(text)
    if sum(across) <= len(text):
        spans.append((across[0], sum(across), "across"))
    seed, epoch, note_id = draw
    options = {"probability": probability, "seed": seed, "epoch": epoch, "note_id": note_id}
    kept, moved = drop_sections(text, spans, **options)
    assert (kept, moved) == drop_sections(text, spans, **options)
    assert bool(kept.strip()) == bool(text.strip())
    # Every span that is left covers the text that it covered, and spans of kept text are all there.
    before = sorted((text[a:b], label) for a, b, label in spans)
    after = [(kept[a:b], label) for a, b, label in moved]
    assert all(item in before for item in after)
    for label in WORDS.values():
        assert {s for s in moved if s[2] == label} == {s for s in gold(kept) if s[2] == label}
    if probability == 0:
        assert (kept, moved) == (text, spans)
    # What is kept is a sequence of sections, in their order.
    rests = {kept}
    for section in find_sections(text):
        rests |= {rest.removeprefix(text[section.start : section.end]) for rest in rests}
    assert "" in rests


def test_how_often_a_section_is_dropped():
    lengths = [len(drop_sections(NOTE, [], probability=0.3, seed=0, epoch=e, note_id="n")[0]) for e in range(2000)]
    sections = find_sections(NOTE)
    expected = 0.7 * len(NOTE)
    assert np.mean(lengths) == pytest.approx(expected, rel=0.03)
    assert min(lengths) >= min(section.end - section.start for section in sections)


def test_one_section_stays_when_all_are_drawn():
    for epoch in range(50):
        kept, _ = drop_sections(NOTE, [], probability=1.0, seed=0, epoch=epoch, note_id="n")
        assert kept in {NOTE[section.start : section.end] for section in find_sections(NOTE)}


def test_sections_that_a_span_reaches_across_go_together():
    begin = NOTE.index("penicillin")
    span = (begin, NOTE.index("MEDICATIONS") + 11, "across")
    for epoch in range(60):
        kept, moved = drop_sections(NOTE, [span], probability=0.5, seed=0, epoch=epoch, note_id="n")
        assert ("ALLERGIES" in kept) == ("MEDICATIONS" in kept) == bool(moved)
        assert [kept[a:b] for a, b, _ in moved] == [NOTE[span[0] : span[1]]] * len(moved)


def test_the_draw_depends_on_seed_epoch_and_note_alone(tokenizer):
    def build():
        windows = ner.NoteWindows(TASK, tokenizer, drop_sections=0.4, seed=3)
        for index in range(6):
            windows.add(f"note {index}", NOTE, gold(NOTE))
        return windows

    def epoch(windows, number, order):
        windows.set_epoch(number)
        found = {index: copy.deepcopy(windows[index]) for index in order}
        return [found[index] for index in range(len(windows))]

    first, second = build(), build()
    count = len(first)
    straight = [epoch(first, number, range(count)) for number in (0, 1, 2)]
    # Another order of access, and epochs that were never read before (a resumed run).
    assert epoch(second, 2, reversed(range(count))) == straight[2]
    assert epoch(second, 0, range(count)) == straight[0]
    assert straight[0] != straight[1]
    by_note = [[w.input_ids for w in straight[0] if w.note == note] for note in range(6)]
    assert len({str(found) for found in by_note}) > 1


def test_dropped_notes_keep_the_number_and_lengths_of_examples_and_their_labels_move_along(tokenizer):
    whole = ner.NoteWindows(TASK, tokenizer)
    dropped = ner.NoteWindows(TASK, tokenizer, drop_sections=0.5, seed=0)
    for windows in (whole, dropped):
        for index in range(8):
            windows.add(str(index), NOTE, gold(NOTE))
    assert (len(dropped), dropped.lengths) == (len(whole), whole.lengths)
    assert (dropped.tag_counts() == whole.tag_counts()).all()
    assert (whole.spans, whole.lost, whole.covered) == (8 * len(gold(NOTE)), 0, 0)
    dropped.set_epoch(1)
    empty = 0
    for note in range(8):
        text, spans = drop_sections(NOTE, gold(NOTE), probability=0.5, seed=0, epoch=1, note_id=str(note))
        wanted = TASK.encode(text, tokenizer, note=note, spans=spans).windows
        found = [dropped[index] for index in range(len(dropped)) if dropped[index].note == note]
        assert found[: len(wanted)] == wanted
        for surplus in found[len(wanted) :]:
            assert (len(surplus.input_ids), surplus.labels) == (1, [-100])
            empty += 1
    assert empty > 0


def test_resumed_training_on_dropped_sections_equals_the_uninterrupted_one(tmp_path, decoder, tokenizer, monkeypatch):
    from clinical_nlp.training import checkpoints

    class Killed(Exception):
        """Stands for the process dying."""

    def fit(output, *, resume=False):
        windows = ner.NoteWindows(TASK, tokenizer, drop_sections=0.4, seed=0)
        for index in range(5):
            windows.add(str(index), NOTE, gold(NOTE))
        model = tagger(decoder, ner.LossConfig(), windows)
        with Run.open(output, Empty(), recipe="test", resume=resume) as run:
            train(
                model,
                windows,
                partial(ner.collate, pad_token_id=0),
                config=TrainingConfig(epochs=3, batch_size=8, save_steps=2),
                run=run,
                seed=0,
                lengths=windows.lengths,
                tokenizer=tokenizer,
                strategy=StrategyConfig(name="lora", rank=4),
                head="head",
                resume=resume,
            )
        return trainable_state(model)

    straight = fit(tmp_path / "a")
    whole = checkpoints.seal

    def seal(folder):
        whole(folder)
        if folder.name == "checkpoint-6":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "seal", seal)
        with pytest.raises(Killed):
            fit(tmp_path / "b")
    resumed = fit(tmp_path / "b", resume=True)
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


# Attention


def last_token_moves_the_first(model, vocabulary=300):
    """Say how far the logits before and from a changed token move, with padding in the batch and without."""
    ids = torch.randint(3, vocabulary - 50, (2, 20), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, 12] = 7
    padded = torch.ones_like(ids)
    padded[1, 16:] = 0
    model.eval()
    moved = []
    for mask in (torch.ones_like(ids), padded):
        with torch.inference_mode():
            change = (model(ids, mask)["logits"] - model(other, mask)["logits"]).abs()
        assert float(change[:, 12:16].max()) > 1e-4
        moved.append(float(change[:, :12].max()))
    return moved


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["decoder", "builtin:tiny"])
def test_a_decoder_sees_to_the_right_exactly_when_asked(decoder, name, implementation):
    for bidirectional in (True, False):
        base = load_base(str(decoder) if name == "decoder" else name, bidirectional=bidirectional)
        base.network.set_attn_implementation(implementation)
        model = ner.build_model(base.network, 5, seed=0)
        torch.nn.init.normal_(model.head.weight, std=1.0)
        moved = last_token_moves_the_first(model)
        assert min(moved) > 1e-3 if bidirectional else max(moved) == 0, (bidirectional, moved)


def test_an_encoder_always_sees_both_sides(encoder):
    model = ner.build_model(load_base(str(encoder)).network, 5, seed=0)
    torch.nn.init.normal_(model.head.weight, std=1.0)
    assert min(last_token_moves_the_first(model)) > 1e-3
