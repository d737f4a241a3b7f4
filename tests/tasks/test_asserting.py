"""The assertion classifier: passages and their spans, equal numbers in any company, the rules where it is unsure."""

import math
import time

import numpy as np
import pytest
from tiny_models import write_encoder

from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy
from clinical_nlp.errors import ConfigError
from clinical_nlp.language.assertion import assert_spans
from clinical_nlp.models.loading import load_base
from clinical_nlp.notes.corpus import load_corpus
from clinical_nlp.notes.schema import Assertion
from clinical_nlp.tasks import asserting
from clinical_nlp.tasks.asserting import AXES, LEFT_TO_RULES, AssertionTask, axes_of, corrected

USUAL = ("present", "current", "actual", "patient")
TASK = AssertionTask(tuple(AXES.items()), 128, rules=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(str(write_encoder(tmp_path_factory.mktemp("encoder"))), bidirectional=True)


@pytest.fixture(scope="module")
def notes():
    """Texts of synthetic notes with the places of their spans and what the rules say."""
    corpus = load_corpus("synthetic_hospitals", institutions=2, patients=4)
    found = {}
    for row in corpus.spans.to_pylist():
        found.setdefault((row["institution"], row["note_id"]), []).append((row["start"], row["end"]))
    rows = corpus.notes.to_pylist()
    texts = [row["text"] for row in rows]
    spans = [found.get((row["institution"], row["note_id"]), []) for row in rows]
    rules = [[axes_of(one) for one in assert_spans(text, own)] for text, own in zip(texts, spans, strict=True)]
    assert sum(map(len, spans)) > 300
    return texts, spans, rules


def said(passage, base, place):
    return base.tokenizer.decode(list(passage.input_ids[place[0] : place[1]]))


@pytest.mark.parametrize("window", [100, 128, 250])
def test_every_span_is_judged_once_from_its_own_tokens(base, notes, window):
    task = AssertionTask(tuple(AXES.items()), window, rules=True)
    for text, spans, rules in zip(*notes, strict=True):
        passages = task.encode(text, spans, rules, base.tokenizer, gold=rules)
        assert sorted(number for passage in passages for number in passage.numbers) == list(range(len(spans)))
        for passage in passages:
            assert len(passage.input_ids) <= window
            for number, own, sentence, rule, label in zip(
                passage.numbers, passage.spans, passage.sentences, passage.rules, passage.labels, strict=True
            ):
                start, end = spans[number]
                assert said(passage, base, own) == text[start:end]
                assert sentence[0] <= own[0] < own[1] <= sentence[1] <= len(passage.input_ids)
                assert said(passage, base, sentence) in text
                assert tuple(values[place] for values, place in zip(AXES.values(), rule, strict=True)) == rules[number]
                assert label == rule


def test_a_passage_begins_with_what_its_section_is_called(base):
    text = "HPI: well.\n\nFAMILY HISTORY:\nSeizures in the mother.\n"
    start = text.index("Seizures")
    (passage,) = TASK.encode(text, [(start, start + 8)], [USUAL], base.tokenizer)
    assert said(passage, base, (0, passage.sentences[0][0])).startswith("<s>" + "family history"[: asserting._TITLE])


def test_a_sentence_longer_than_the_window_is_cut_around_the_span(base):
    text = "x " * 400 + "fever " + "y " * 400 + "cough."
    spans = [(text.index(word), text.index(word) + 5) for word in ("fever", "cough")]
    passages = TASK.encode(text, spans, [USUAL, USUAL], base.tokenizer)
    assert [passage.numbers for passage in passages] == [(0,), (1,)]
    assert [said(passage, base, passage.spans[0]) for passage in passages] == ["fever", "cough"]
    assert all(len(passage.input_ids) <= TASK.window for passage in passages)
    # A span longer than the window is read in part.
    (passage,) = TASK.encode(text, [(0, 1000)], [USUAL], base.tokenizer)
    assert len(passage.input_ids) <= TASK.window
    assert passage.spans[0][1] <= len(passage.input_ids)


def test_a_note_without_end_is_read_where_its_spans_are(base):
    text = "word " * 200_000 + "fever " + "word " * 200_000 + "No cough. " * 2_000
    places = [text.index("fever"), *(start + 3 for start in range(text.index("No cough"), len(text), 10))]
    spans = [(start, start + 5) for start in places]
    began = time.process_time()
    passages = TASK.encode(text, spans, [USUAL] * len(spans), base.tokenizer)
    assert time.process_time() - began < 20
    assert sorted(number for passage in passages for number in passage.numbers) == list(range(len(spans)))
    assert {said(p, base, own) for p in passages for own in p.spans} == {"fever", "cough"}
    assert sum(len(passage.input_ids) for passage in passages) < 60_000


def test_a_window_without_room_is_refused(base):
    with pytest.raises(ConfigError, match="too small"):
        AssertionTask(tuple(AXES.items()), 40, rules=True).encode("Fever.", [(0, 5)], [USUAL], base.tokenizer)


def model_of(base, task=TASK):
    return asserting.build_model(apply_strategy(base.network, StrategyConfig(name="head"), seed=0), task, seed=0)


def test_an_untrained_head_follows_the_rules(base, notes):
    found = asserting.predict(model_of(base), TASK, base.tokenizer, *notes)
    for rules, probabilities in zip(notes[2], found, strict=True):
        for axes, chances in zip(rules, probabilities, strict=True):
            assert TASK.decide(chances, axes, [0.0] * 4) == axes
            assert all(math.isclose(part.sum(), 1, abs_tol=1e-3) for part in chances)


def test_numbers_do_not_depend_on_what_else_is_judged(base, notes):
    model = model_of(base)
    texts, spans, rules = (part[:12] for part in notes)
    together = asserting.predict(model, TASK, base.tokenizer, texts, spans, rules)
    backwards = asserting.predict(model, TASK, base.tokenizer, texts[::-1], spans[::-1], rules[::-1])[::-1]
    for row, text in enumerate(texts):
        (alone,) = asserting.predict(model, TASK, base.tokenizer, [text], [spans[row]], [rules[row]])
        for one, two, three in zip(together[row], backwards[row], alone, strict=True):
            assert all(np.array_equal(a, b) and np.array_equal(a, c) for a, b, c in zip(one, two, three, strict=True))


def test_training_and_judging_read_the_same_numbers(base, notes):
    import torch

    model = model_of(base)
    texts, spans, rules = notes
    row = max(range(len(texts)), key=lambda row: len(spans[row]))
    passages = TASK.encode(texts[row], spans[row], rules[row], base.tokenizer, gold=rules[row])
    with torch.inference_mode():
        logits = model.eval()(**asserting.collate(passages, 0))["logits"]
    (found,) = asserting.predict(model, TASK, base.tokenizer, [texts[row]], [spans[row]], [rules[row]])
    for place, passage in enumerate(passages):
        for column, number in enumerate(passage.numbers):
            parts = [torch.softmax(part, -1).numpy() for part in logits[place, column].split(TASK.sizes)]
            for a, b in zip(found[number], parts, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-4)


def test_small_batches_add_up_to_a_large_one(base, notes):
    model = model_of(base)
    texts, spans, rules = notes
    passages = [p for row in range(8) for p in TASK.encode(texts[row], spans[row], rules[row], base.tokenizer,
                                                           gold=rules[row])]  # fmt: skip
    passages[0] = passages[0]._replace(labels=((-100,) * 4,) * len(passages[0].labels))
    items = sum((np.array(passage.labels) != -100).sum() for passage in passages)
    large = model(**asserting.collate(passages, 0))["loss"].item()
    small = sum(model(**asserting.collate([p], 0), num_items_in_batch=items)["loss"].item() for p in passages)
    assert small == pytest.approx(large, rel=1e-4)


def test_the_rules_decide_where_the_classifier_is_unsure_or_has_not_learned():
    task = AssertionTask((("presence", ("present", "absent")),), 128, rules=True)
    family = ("present", "historical", "actual", "family")
    assert task.decide([np.array([0.3, 0.7])], family, [0.7]) == ("absent", *family[1:])
    assert task.decide([np.array([0.3, 0.7])], family, [0.71]) == family
    uncertain = ("uncertain", *family[1:])  # the classifier has never seen that value
    assert task.decide([np.array([0.01, 0.99])], uncertain, [0.5]) == uncertain


def test_cues_stay_where_both_say_the_same():
    rules = Assertion("absent", "historical", cues=(("absent", 0, 2), ("historical", 5, 9)))
    assert corrected(rules, axes_of(rules)) is rules
    assert corrected(rules, ("present", "historical", "actual", "family")) == Assertion(
        "present", "historical", "actual", "family", cues=(("historical", 5, 9),)
    )


def test_thresholds_are_the_highest_of_those_with_most_spans_right():
    task = AssertionTask((("presence", ("present", "absent")), ("experiencer", ("patient", "family"))), 128, rules=True)

    def chances(absent, family):
        return [np.array([1 - absent, absent]), np.array([1 - family, family])]

    absent = ("absent", *USUAL[1:])
    # presence: at .9 right where the rules are not, at .8 as right, at .7 right, at .6 wrong. experiencer: wrong.
    found = [[chances(0.9, 0.95), chances(0.2, 0.1), chances(0.7, 0.1), chances(0.6, 0.1), None]]
    rules = [[USUAL, USUAL, USUAL, USUAL, USUAL]]
    gold = [[absent, USUAL, absent, USUAL, absent]]
    assert asserting.thresholds(task, found, rules, gold) == [0.7, LEFT_TO_RULES]


def test_scores_by_hand():
    absent, family = ("absent", *USUAL[1:]), (*USUAL[:3], "family")
    gold = [[absent, USUAL], [absent, family], [USUAL]]
    mine = [[absent, absent], [absent, USUAL], [USUAL]]
    values = [("presence", "present"), ("presence", "absent"), ("experiencer", "family")]
    counts = asserting.count(gold, mine, values)
    assert counts.tolist() == [[0, 0, 1, 1, 2, 1, 0, 0, 0, 1, 2], [1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 2],
                               [1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1]]  # fmt: skip
    rules = asserting.count(gold, gold, values)
    found = asserting.score(counts, rules, values, ["a", "b", "b"], part="test", seed=0)
    assert found["test.f1.absent"].value == pytest.approx(2 * 2 / (3 + 2))
    assert found["test.f1.present"].value == pytest.approx(2 * 2 / (2 + 3))
    assert found["test.f1.family"].value == 0
    assert found["test.all_axes"].value == pytest.approx(3 / 5)
    assert found["test.rules.all_axes"].value == 1
    assert found["test.gain.all_axes"].value == pytest.approx(-2 / 5)
    assert found["test.macro_f1"].value == pytest.approx((0.8 + 0) / 2)
    assert all(one.n_patients == 2 and one.n_notes == 3 and math.isnan(one.low) for one in found.values())


def test_the_gain_of_the_same_answers_is_nothing():
    rng = np.random.default_rng(0)
    gold = [[("absent" if rng.random() < 0.3 else "present", *USUAL[1:]) for _ in range(4)] for _ in range(60)]
    wrong = [[USUAL for _ in note] for note in gold]
    values = [("presence", "present"), ("presence", "absent")]
    counts, none = asserting.count(gold, gold, values), asserting.count(gold, wrong, values)
    patients = [str(row // 2) for row in range(60)]
    same = asserting.score(counts, counts, values, patients, part="test", seed=0)
    assert same["test.gain.all_axes"].value == 0
    better = asserting.score(counts, none, values, patients, part="test", seed=0)
    gain = better["test.gain.all_axes"]
    assert 0 < gain.low < gain.value < gain.high
    assert gain.n_patients == 30
