"""The ner recipe with each option: what it changes, what is recorded, and what is refused with which words."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_models import write_decoder, write_encoder

from clinical_nlp.config import load_config
from clinical_nlp.errors import ClinicalNlpError, ConfigError, InputError
from clinical_nlp.notes.corpus import Card, Corpus
from clinical_nlp.notes.schema import SPAN_SCHEMA, Note, notes_table
from clinical_nlp.recipes import ner
from clinical_nlp.runs import Run
from clinical_nlp.tasks.ner import NerPredictor

TEXTS = ["no fever or cough today", "severe cough and pain", "fever on aspirin , no pain", "well , stop aspirin"]
DISEASES = ("fever", "cough", "pain")


def write_iob(folder, parts=("train", "devel", "test"), seed=0, chemical=False, documents=60):
    """Write a corpus in IOB form: Disease, and Chemical if asked."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tags = dict.fromkeys(DISEASES, "B-Disease") | ({"aspirin": "B-Chemical"} if chemical else {})
    for part in parts:
        lines = []
        for _ in range(documents):
            text = f"{TEXTS[int(rng.integers(4))]} day {rng.integers(10**6)}"
            lines += [f"{word}\t{tags.get(word, 'O')}" for word in text.split()] + [""]
        (folder / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"decoder": str(write_decoder(root / "decoder")), "encoder": str(write_encoder(root / "encoder"))}


@pytest.fixture(scope="module")
def iob(tmp_path_factory):
    root = tmp_path_factory.mktemp("iob")
    return {
        "disease": str(write_iob(root / "disease")),
        "earlier": str(write_iob(root / "earlier", seed=1)),
        "both": str(write_iob(root / "both", seed=2, chemical=True)),
        "undeveloped": str(write_iob(root / "undeveloped", ("train", "test"))),
    }


@pytest.fixture(scope="module")
def first(models, iob, tmp_path_factory):
    """A run to go on from."""
    return tag(models, iob, tmp_path_factory.mktemp("first") / "run", max_steps=25, **{"strategy.name": "lora"})


def tag(models, iob, output, base="decoder", corpus="disease", **overrides):
    fixed = {"strategy.rank": 4, "window": 48, "overlap": 8, "max_steps": 3, "training.batch_size": 8}
    names = {"corpus.name": "ncbi_disease", "corpus.path": iob[corpus], "base_model": models.get(base, base)}
    return ner.run(load_config(ner.CONFIG, None, {**fixed, **names, **overrides}), output)


def replay(iob, name, **more):
    return {"replay.name": "ncbi_disease", "replay.path": iob[name], **more}


def notes_of(iob, name):
    settings = {"corpus.name": "ncbi_disease", "corpus.path": iob[name]}
    config = load_config(ner.CONFIG, None, settings)
    return config, ner.read(config.corpus, config.split, 0)


IDS = torch.arange(10, 34).reshape(1, -1)


def logits(model, ids=IDS):
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        found = model(ids, torch.ones_like(ids))["logits"][0]
    model.train(was_training)
    return found


def before_training(monkeypatch):
    """Keep what the model says before its first step, its head then, and the windows it is given."""
    kept = {}
    train = ner.train

    def watched(model, windows, *arguments, **options):
        kept.update(model=model, windows=windows, logits=logits(model), head=model.head.weight.detach().clone())
        return train(model, windows, *arguments, **options)

    monkeypatch.setattr(ner, "train", watched)
    return kept


@pytest.mark.parametrize("loss", ["cross_entropy", "weighted", "focal"])
def test_each_loss_trains_and_loads(models, iob, tmp_path, loss):
    run = tag(models, iob, tmp_path / "run", corpus="both", **{"loss.name": loss, "drop_sections": 0.3})
    assert {"test.f1_strict.Chemical", "test.f1_lenient.Disease", "test.f1_lenient"} <= run.metrics.keys()
    assert len(NerPredictor.load(run.path).predict(TEXTS)) == 4
    training = run.manifest["training"]
    assert training["spans"] > 60
    assert training["spans_without_word"] == training["spans_under_longer"] == 0


def test_losses_differ_in_what_they_learn(models, iob, tmp_path):
    heads = [
        (tag(models, iob, tmp_path / loss, corpus="both", loss=loss).path / "head.safetensors").read_bytes()
        for loss in ("cross_entropy", "weighted", "focal")
    ]
    assert len(set(heads)) == 3


# Earlier runs


@pytest.mark.parametrize(
    ("base", "strategy"),
    [
        ("decoder", "head"),
        ("decoder", "lora"),
        ("decoder", "dora"),
        ("decoder", "qlora"),
        ("decoder", "bottleneck"),
        ("decoder", "ia3"),
        ("decoder", "full"),
        ("decoder", "lp_ft"),
        ("decoder", "gradual"),
        ("encoder", "lora"),
        ("encoder", "bottleneck"),
        ("encoder", "full"),
    ],
)
def test_a_continued_run_predicts_the_same_before_its_first_step(models, iob, tmp_path, monkeypatch, base, strategy):
    settings = {"strategy.name": strategy}
    earlier = tag(models, iob, tmp_path / "a", base, **settings)
    wanted = logits(NerPredictor.load(earlier.path)._model)
    kept = before_training(monkeypatch)
    run = tag(models, iob, tmp_path / "b", str(earlier.path), **settings)
    assert torch.allclose(kept["logits"], wanted, atol=1e-5)
    assert run.manifest["head"] == "continued"
    # It learned, and what was saved is what was trained.
    final = logits(kept["model"])
    assert not torch.allclose(final, wanted, atol=1e-4)
    assert torch.allclose(logits(NerPredictor.load(run.path)._model), final, atol=1e-5)


def test_a_new_head_starts_afresh_on_the_earlier_adapter(models, iob, first, tmp_path, monkeypatch):
    kept = before_training(monkeypatch)
    tag(models, iob, tmp_path / "plain", **{"strategy.name": "head"})
    fresh = kept["head"]
    run = tag(models, iob, tmp_path / "new", str(first.path), head="new", **{"strategy.name": "head"})
    assert run.manifest["head"] == "new"
    assert torch.equal(kept["head"], fresh)
    assert any(".parent0" in name for name, _ in kept["model"].network.named_parameters())


def test_another_label_set_is_one_error_that_names_both(models, iob, first, tmp_path):
    with pytest.raises(ConfigError) as error:
        tag(models, iob, tmp_path / "run", str(first.path), corpus="both")
    assert "tags Disease and the labels to learn are Chemical, Disease; set head=new" in str(error.value)
    assert "\n" not in str(error.value)
    run = tag(models, iob, tmp_path / "new", str(first.path), corpus="both", head="new")
    assert json.loads((run.path / "task.json").read_text())["labels"] == ["Chemical", "Disease"]
    same = tag(models, iob, tmp_path / "same", str(first.path), corpus="both", labels=["Disease"])
    assert same.manifest["head"] == "continued"


def test_what_cannot_be_continued_is_refused(models, iob, first, tmp_path):
    with pytest.raises(ConfigError, match="is no ner run; set head=new"):
        tag(models, iob, tmp_path / "a", head="continue")
    with pytest.raises(ConfigError, match="attention bidirectional, not causal"):
        tag(models, iob, tmp_path / "b", str(first.path), attention="causal")


def test_a_continued_head_on_another_quantization_is_said(models, iob, first, tmp_path, capsys):
    tag(models, iob, tmp_path / "a", str(first.path), **{"strategy.name": "qlora"})
    assert "quantization none; here: nf4" in "".join(capsys.readouterr())


# Replay


def test_replay_adds_training_patients_of_the_earlier_corpus_alone(models, iob, first, tmp_path, monkeypatch):
    kept = before_training(monkeypatch)
    run = tag(models, iob, tmp_path / "run", str(first.path), **replay(iob, "earlier", **{"replay.ratio": 1 / 3}))
    notes = [(note_id, text) for note_id, text, _ in kept["windows"]._notes]
    replayed = [(note_id, text) for note_id, text in notes if note_id.startswith("('replay'")]
    own = len(notes) - len(replayed)
    assert own == 60
    assert len(replayed) == 40  # half as many tokens again: whole patients, blocks of 20 sentences here
    assert all("'train-" in note_id for note_id, _ in replayed)
    before, after = run.metrics["test.source_f1_strict_before"], run.metrics["test.source_f1_strict"]
    assert before["n_notes"] == after["n_notes"] == 60
    assert before["part"] == after["part"] == "test"
    # The head fits, so the score before is that of the earlier run on the same notes.
    counts = []
    _, data = notes_of(iob, "earlier")
    spans = NerPredictor.load(first.path).predict([data.texts[row] for row in data.split.test])
    for row, found in zip(data.split.test, spans, strict=True):
        counts.append(ner.ner.count_matches(data.gold[row], [span[:3] for span in found], ["Disease"]))
    wanted = ner.ner.f1_strict(np.stack(counts), [data.patients[row] for row in data.split.test], part="test", seed=0)
    assert before["value"] == pytest.approx(wanted.value)
    assert run.manifest["replay"]["corpus"] == "ncbi_disease"


def test_replay_without_a_fitting_head_has_no_score_before(models, iob, tmp_path, monkeypatch):
    kept = before_training(monkeypatch)
    run = tag(models, iob, tmp_path / "run", **replay(iob, "earlier", **{"replay.ratio": 0}))
    assert "test.source_f1_strict_before" not in run.metrics
    assert "test.source_f1_strict" in run.metrics
    assert len(kept["windows"]._notes) == 60


def test_replaying_more_than_there_is_is_said(models, iob, tmp_path, capsys):
    tag(models, iob, tmp_path / "run", **replay(iob, "earlier", **{"replay.ratio": 0.9}))
    assert "% of the training tokens (all there are; 90 % was asked for)" in "".join(capsys.readouterr())


def test_a_corpus_that_cannot_be_replayed_is_refused(models, iob, tmp_path):
    with pytest.raises(
        ConfigError, match=r"marks Disease and the labels to learn are Chemical, Disease; leave Chemical"
    ):
        tag(models, iob, tmp_path / "a", corpus="both", **replay(iob, "earlier"))
    config, data = notes_of(iob, "disease")
    held_out = replace(data.split, train=data.split.test, test=data.split.train)
    replayed = load_config(ner.CONFIG, None, replay(iob, "disease")).replay
    with pytest.raises(ConfigError, match="has no patients of its own"):
        ner.read_source(replayed, config, replace(data, split=held_out), ("Disease",))


def test_patients_whom_both_corpora_have_stay_on_one_side(iob):
    config, data = notes_of(iob, "disease")
    config = config.model_copy(update={"split": ner.SplitConfig(name="random", test=0.5), "seed": 1})
    replayed = load_config(ner.CONFIG, None, replay(iob, "disease")).replay
    source = ner.read_source(replayed, config, data, ("Disease",))
    trained = {data.patients[row] for row in data.split.train}
    held_out = {data.patients[row] for row in (*data.split.test, *data.split.development)}
    assert not held_out & {source.patients[row] for row in source.split.train}
    assert not trained & {source.patients[row] for row in source.split.test}


# Early stopping and scores


def test_early_stopping_keeps_the_best_on_the_development_part(models, iob, tmp_path):
    overrides = {"training.patience": 1, "training.epochs": 12, "training.head_learning_rate": 3e-3, "max_steps": None}
    run = tag(models, iob, tmp_path / "run", score_train=True, **overrides)
    training = run.manifest["training"]
    assert run.metrics["dev.f1_strict"]["value"] == pytest.approx(training["best_score"])
    assert training["best_epoch"] <= 12
    assert run.metrics["dev.f1_strict"]["part"] == "development"
    assert run.metrics["train.f1_strict"]["part"] == "train"
    assert {"n_patients", "n_notes", "low", "high"} <= run.metrics["train.f1_strict"].keys()


def test_train_and_development_scores_are_recorded_only_when_asked(models, iob, tmp_path):
    assert not [key for key in tag(models, iob, tmp_path / "a").metrics if key.startswith(("train.", "dev."))]
    run = tag(models, iob, tmp_path / "b", corpus="undeveloped", score_train=True, **{"split.development": 0})
    assert "train.f1_strict" in run.metrics
    assert "dev.f1_strict" not in run.metrics


def test_early_stopping_without_a_development_part_is_refused(models, iob, tmp_path):
    with pytest.raises(ConfigError, match=r"this split has none; set a larger split\.development"):
        overrides = {"training.patience": 2, "split.development": 0}
        tag(models, iob, tmp_path / "run", corpus="undeveloped", **overrides)


def test_the_sample_of_training_patients_is_drawn_by_the_seed(iob):
    _, data = notes_of(iob, "earlier")
    first = ner.sample_of_training(data, 0)
    assert first.tolist() == ner.sample_of_training(data, 0).tolist()
    assert set(first.tolist()) <= set(data.split.train.tolist())


# Attention


@pytest.mark.parametrize("strategy", ["lora", "full"])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_attention_survives_saving_and_loading(models, iob, tmp_path, attention, strategy):
    run = tag(models, iob, tmp_path / "run", attention=attention, **{"strategy.name": strategy})
    for implementation in ("sdpa", "eager"):
        model = NerPredictor.load(run.path)._model
        model.network.set_attn_implementation(implementation)
        ids = torch.arange(10, 30).reshape(1, -1)
        other = ids.clone()
        other[0, 12] = 99
        with torch.inference_mode():
            change = [model(each, torch.ones_like(each))["logits"] for each in (ids, other)]
        moved = float((change[0] - change[1])[0, :12].abs().max())
        assert (moved > 1e-5) if attention == "bidirectional" else (moved == 0)


def test_a_causal_encoder_is_refused(models, iob, tmp_path):
    with pytest.raises(ConfigError, match="is an encoder, which always sees both sides"):
        tag(models, iob, tmp_path / "run", "encoder", attention="causal")


# Bad input


def given(monkeypatch, texts, spans, patients=None, parts=None):
    """Let the recipe read these notes and (note, start, end, label)."""
    notes = notes_table(
        [
            Note(note_id=str(i), patient_id=str(i if patients is None else patients[i]), institution="h", text=text,
                 source="test")
            for i, text in enumerate(texts)
        ]
    )  # fmt: skip
    rows = [
        {"institution": "h", "note_id": str(note), "start": start, "end": end, "text": "", "label": label}
        for note, start, end, label in spans
    ]
    card = Card("given", "", "", "", "", "", "", "")
    table = pa.Table.from_pylist(rows, schema=SPAN_SCHEMA)
    named = {("h", str(note)): part for note, part in (parts or {}).items()}
    monkeypatch.setattr(ner, "load_corpus", lambda *_, **__: Corpus(notes=notes, card=card, spans=table, parts=named))


SPANS = [(note, 3, 8, "Disease") for note in range(30)]


def test_labels_that_the_training_part_does_not_have_are_named(models, iob, tmp_path):
    with pytest.raises(ConfigError, match="labels: the training part has no span of Disese; it has Disease"):
        tag(models, iob, tmp_path / "a", labels=["Disese", "Disease"])


def test_spans_without_a_word_are_counted_and_said(models, iob, tmp_path, monkeypatch, capsys):
    bad = [(0, 2, 3, "Disease"), (1, 40, 44, "Disease"), (2, 5, 5, "Disease"), (3, 0, 8, "Disease")]
    given(monkeypatch, ["no fever"] * 30, SPANS + bad, parts={i: "train" if i < 20 else "test" for i in range(30)})
    run = tag(models, iob, tmp_path / "a", **{"split.development": 0})
    assert run.manifest["training"]["spans_without_word"] == 3
    assert run.manifest["training"]["spans_under_longer"] == 1
    shown = "".join(capsys.readouterr())
    assert "of 24 gold spans to learn, 3 lie on no word that the tokenizer sees and 1 overlap a longer one" in shown
    assert "fever" not in shown


def test_spans_of_which_none_has_a_word_are_an_error(models, iob, tmp_path, monkeypatch):
    given(monkeypatch, ["no fever"] * 30, [(note, 100, 105, "Disease") for note in range(30)])
    with pytest.raises(InputError, match=r"none of the \d+ gold spans"):
        tag(models, iob, tmp_path / "a")


@pytest.mark.parametrize(
    ("spans", "error", "match"),
    [
        ([], InputError, "no gold spans"),
        ([*SPANS, (99, 0, 2, "Disease")], InputError, "1 gold spans .* notes that it does not have"),
        (SPANS[20:], InputError, "training part of corpus 'given' has no gold span"),
    ],
)
def test_a_corpus_without_usable_spans_is_refused(models, iob, tmp_path, monkeypatch, spans, error, match):
    given(monkeypatch, ["no fever"] * 30, spans, parts={i: "train" if i < 20 else "test" for i in range(30)})
    with pytest.raises(error, match=match):
        tag(models, iob, tmp_path / "a")


@pytest.mark.parametrize(
    ("split", "parts"),
    [
        ({"split.name": "random", "split.test": 0}, None),
        ({"split.name": "random", "split.test": 0.5, "split.development": 0.49}, "few"),
        ({}, "test only"),
    ],
)
def test_an_empty_part_is_refused(models, iob, tmp_path, monkeypatch, split, parts):
    texts, spans = (["no fever"] * 2, SPANS[:2]) if parts == "few" else (["no fever"] * 30, SPANS)
    named = dict.fromkeys(range(30), "test") if parts == "test only" else None
    given(monkeypatch, texts, spans, parts=named)
    with pytest.raises(ClinicalNlpError, match=r"part|patients") as error:
        tag(models, iob, tmp_path / "a", **split)
    assert "\n" not in str(error.value)


def test_early_stopping_by_a_development_part_without_spans_is_refused(models, iob, tmp_path, monkeypatch):
    given(monkeypatch, ["no fever"] * 30, SPANS, parts={0: "development"} | dict.fromkeys(range(1, 20), "train")
          | dict.fromkeys(range(20, 30), "test"))  # fmt: skip
    monkeypatch.setattr(ner, "gold_spans", lambda corpus, read=ner.gold_spans: [[], *read(corpus)[1:]])
    with pytest.raises(ConfigError, match="that part has no gold span"):
        tag(models, iob, tmp_path / "a", **{"training.patience": 1})


def test_a_note_longer_than_any_window_is_read_whole(models, iob, tmp_path, monkeypatch):
    long = "no fever today , no cough . " * 200
    given(monkeypatch, [long] * 30, [(note, 28 * 199 + 3, 28 * 199 + 8, "Disease") for note in range(30)])
    run = tag(models, iob, tmp_path / "a", max_steps=1)
    assert run.manifest["training"]["windows"] > 30 * len(long) / 48 / 2
    assert run.manifest["training"]["spans_without_word"] == 0


def test_a_window_beyond_the_positions_of_the_model_is_cut_and_said(models, iob, tmp_path, capsys):
    run = tag(models, iob, tmp_path / "a", window=4096, max_steps=1)
    assert json.loads((run.path / "task.json").read_text())["window"] == 256
    assert "window 4096 is cut to 256, the positions that" in "".join(capsys.readouterr())
    with pytest.raises(ConfigError, match="overlap 200 must be less than half of window 256"):
        tag(models, iob, tmp_path / "b", window=4096, overlap=200)


def test_a_finished_run_says_what_it_was(models, iob, first):
    assert Run.load(first.path).manifest["head"] == "new"
