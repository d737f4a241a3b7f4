"""The assertion recipe: a local word that the rules do not know is learned, and the page says what that is worth."""

import json
import random

import numpy as np
import pytest
from tiny_models import write_words

from clinical_nlp import cli
from clinical_nlp.config import load_config
from clinical_nlp.errors import InputError, ModelError, TooFewPatientsError, UsageError
from clinical_nlp.language.assertion import assert_spans
from clinical_nlp.notes.writers.brat import write_document
from clinical_nlp.recipes import assertion
from clinical_nlp.runs import Estimate, Run
from clinical_nlp.tasks.asserting import LEFT_TO_RULES, AssertionClassifier, axes_of, check_classifier

FINDINGS = ("fever", "cough", "seizures", "chest pain", "diarrhea", "vertigo")
WORDS = "subjective : . zilch no he has there is mother had fever cough seizures chest pain diarrhea vertigo"
SAID = {"Zilch {}.": "absent", "No {}.": "absent", "He has {}.": "present", "There is {}.": "present"}


def write_corrections(folder, patients=55):
    """BRAT files of two notes a patient, whose readers know that "zilch" denies."""
    draw = random.Random(0)
    rows = ["patient_id,shared_patient_id"]
    folder.mkdir()
    for note in range(2 * patients):
        text, spans = "Subjective:\n", []
        for form in draw.sample(sorted(SAID), 3):
            finding = draw.choice(FINDINGS)
            start = len(text) + form.index("{")
            text += form.format(finding) + "\n"
            spans.append({"start": start, "end": start + len(finding), "label": "problem", "presence": SAID[form]})
        write_document(folder / f"n{note:03d}.txt", text, spans)
        rows.append(f"n{note:03d},p{note // 2}")
    (folder / "patient_map.csv").write_text("\n".join(rows) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assertion")
    brat = write_corrections(folder / "brat")
    return {
        "corpus.name": "ehr_export",
        "corpus.path": str(brat),
        "corpus.options": {"format": "brat"},
        "base_model": str(write_words(folder / "encoder", WORDS)),
        "strategy": {"name": "full"},
        "training": {"epochs": 12, "learning_rate": 2e-3, "batch_size": 4},
        "split": {"name": "random", "development": 0.2, "test": 0.4},
    }


def configured(values, **changed):
    return load_config(assertion.CONFIG, None, {**values, **changed})


@pytest.fixture(scope="module")
def done(values, tmp_path_factory):
    return assertion.run(configured(values), tmp_path_factory.mktemp("run") / "run")


def test_a_local_word_is_learned(done, values):
    metrics = done.metrics
    config = configured(values)
    data = assertion.read(config.corpus, config.split, config.seed)
    assert data.split.patients[2] == 22
    rows = data.split.test
    # The rules' own figures, counted here by hand.
    gold = [axes[0] for row in rows for axes in data.gold[row]]
    said = [one.presence for row in rows for one in assert_spans(data.texts[row], data.spans[row])]
    both = sum(a == b == "absent" for a, b in zip(gold, said, strict=True))
    by_hand = 2 * both / (gold.count("absent") + said.count("absent"))
    assert metrics["test.rules.f1.absent"]["value"] == pytest.approx(by_hand)
    assert by_hand < 0.8
    assert metrics["test.f1.absent"]["value"] > 0.95
    assert metrics["test.gain.all_axes"]["low"] > 0
    assert metrics["test.gain.all_axes"]["n_patients"] == 22
    assert metrics["test.gain.all_axes"]["n_notes"] == len(rows)
    assert 0.1 < metrics["test.changed"]["value"] < 0.6
    assert done.manifest["axes"] == {"presence": ["present", "absent"]}  # no other axis has two values
    assert 0 < done.manifest["thresholds"]["presence"] < LEFT_TO_RULES
    page = (done.path / "report.html").read_text("utf-8")
    assert "the classifier is better than the rules" in page
    assert "The rules alone decide temporality, modality, experiencer" in page
    assert (done.path / "model_card.md").is_file()
    assert done.manifest["spans"]["reported"]["absent"] == gold.count("absent")


def test_a_loaded_run_says_what_was_scored(done, values):
    config = configured(values)
    data = assertion.read(config.corpus, config.split, config.seed)
    classifier = AssertionClassifier.load(done.path)
    rows = data.split.test
    found = classifier.predict(*([part[row] for row in rows] for part in (data.texts, data.spans, data.rules)))
    counts = assertion.asserting.count(data.gold_axes(rows), [[axes_of(one) for one in own] for own in found], ())
    assert counts[:, 0].sum() / counts[:, 1].sum() == pytest.approx(done.metrics["test.all_axes"]["value"])
    text = "Subjective:\nZilch fever.\nNo cough.\nMother had vertigo.\n"
    spans = [(start, start + len(word)) for word in ("fever", "cough", "vertigo") for start in [text.index(word)]]
    (said,) = classifier.predict([text], [spans], [assert_spans(text, spans)])
    assert [one.presence for one in said] == ["absent", "absent", "present"]
    assert said[0].cues == ()
    assert said[1].cues == (("absent", text.index("No"), text.index("No") + 2),)
    assert said[2].experiencer == "family"


@pytest.mark.parametrize("strategy", ["head", "lora", "bottleneck"])
def test_strategies_from_the_command_line(strategy, values, tmp_path, capsys):
    words = ["run", "assertion", "--corpus.name", "synthetic_hospitals", "--corpus.options.institutions", "1",
             "--corpus.options.patients", "14", "--base_model", values["base_model"], "--strategy.name", strategy,
             "--max_steps", "2", "--output", str(tmp_path / "run")]  # fmt: skip
    assert cli.main(words) == 0, capsys.readouterr().err
    run = Run.load(tmp_path / "run")
    assert run.metrics["test.f1.absent"]["note"] == "fewer than 20 patients"
    assert set(run.manifest["axes"]) == {"presence", "temporality", "modality", "experiencer"}
    assert AssertionClassifier.load(run.path).task.rules
    page = (run.path / "report.html").read_text("utf-8")
    assert "Too little to tell" in page or "leave it out" in page
    assert (run.path / "adapter").is_dir() == (strategy != "head")


def test_resumed_it_is_the_same_run(values, tmp_path):
    config = configured(values, max_steps=6, training={"batch_size": 8, "save_steps": 2})
    whole = assertion.run(config, tmp_path / "whole")
    again = assertion.run(config, tmp_path / "again")
    (again.path / "manifest.json").unlink()  # as if it had been killed after the last checkpoint but one
    newest = max((again.path / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    for file in sorted(newest.iterdir()):
        file.unlink()
    newest.rmdir()
    resumed = assertion.run(config, tmp_path / "again", resume=True)
    assert resumed.manifest["training"]["steps"] == 6
    assert (resumed.path / "metrics.json").read_bytes() == (whole.path / "metrics.json").read_bytes()
    assert (resumed.path / "head.safetensors").read_bytes() == (whole.path / "head.safetensors").read_bytes()


def test_verdicts():
    def gain(value, low, high, note=""):
        return assertion.verdict(Estimate(value, low, high, 30, 60, "test", note), nothing_changed=False)

    assert gain(0.1, 0.05, 0.2)[1] == "good"
    assert gain(-0.1, -0.2, -0.05)[1] == "bad"
    assert gain(0.01, -0.2, 0.05)[1] == "caution"
    assert "fewer than 20" in gain(0.1, np.nan, np.nan, "fewer than 20 patients")[0]
    same = Estimate(0.0, np.nan, np.nan, 30, 60, "test", "every patient scores alike")
    assert "leave it out" in assertion.verdict(same, nothing_changed=True)[0]


def test_what_cannot_be_learned_from(values, tmp_path):
    with pytest.raises(TooFewPatientsError, match=r"set split\.development"):
        assertion.run(configured(values, split={"name": "random", "development": 0, "test": 0.3}), tmp_path / "a")
    plain = tmp_path / "plain"
    plain.mkdir()
    for note in range(12):
        write_document(plain / f"n{note}.txt", "Fever.", [{"start": 0, "end": 5, "label": "problem"}])
    corpus = {"corpus.path": str(plain), "corpus.options": {"format": "brat"}}
    with pytest.raises(InputError, match="no span with an assertion"):
        assertion.run(configured(values, **corpus), tmp_path / "b")
    write_document(plain / "n0.txt", "Fever.", [{"start": 0, "end": 5, "label": "problem", "presence": "absent"}])
    with pytest.raises(InputError, match="two values in 3 patients"):
        assertion.run(configured(values, **corpus), tmp_path / "c")
    (plain / "n1.ann").unlink()  # nothing is known of that note
    with pytest.raises(InputError, match="no span with an assertion"):
        assertion.run(configured(values, **corpus), tmp_path / "d")


def test_what_is_no_classifier(done, tmp_path):
    assert check_classifier(str(done.path)).parent_run == done.path
    with pytest.raises(UsageError, match=r"--assertion .*: no such run directory"):
        check_classifier(str(tmp_path / "none"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text("{}")
    (other / "task.json").write_text(json.dumps({"task": "ner"}))
    with pytest.raises(UsageError, match="was trained for ner, not for assertion"):
        check_classifier(str(other))
    with pytest.raises(ModelError, match="not for assertion"):
        AssertionClassifier.load(other)
