"""The suite `debiasing`: planted differences are found, erased or not as they must be, and the page says so."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest

from clinical_nlp.config import load_config
from clinical_nlp.errors import ConfigError, InputError, TooFewPatientsError, UsageError
from clinical_nlp.eval import debiasing
from clinical_nlp.eval.debiasing import divide, on_front
from clinical_nlp.invariance.erasers import Eraser
from clinical_nlp.notes.corpus import Card, Corpus
from clinical_nlp.notes.schema import CODE_SCHEMA, Note, notes_table
from clinical_nlp.recipe import execute, find_recipe
from clinical_nlp.statistics.sample import NoteSampler

SMALL = {"n_permutations": 99, "n_orders": 2, "dimensions": 16, "probes": ["linear", "quadratic"]}


def settings(**options):
    return load_config(debiasing.CONFIG, None, {**SMALL, **options})


def results_of(run):
    return json.loads((run.path / "results.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = settings(**{"corpus.options": {"institutions": 2, "patients": 150, "covariate": 0.5, "label": 0.5}})
    return execute(find_recipe("debiasing", "eval"), config, output=tmp_path_factory.mktemp("debiasing") / "run")


def test_what_leace_leaves_to_a_linear_probe_is_its_floor_and_a_quadratic_one_still_reads(finished):
    found = results_of(finished)
    raw, erased = (found["numbers"][f"leakage.{name}.linear"] for name in ("raw", "leace"))
    assert raw["low"] > 0.9
    assert erased["high"] < raw["low"]
    assert erased["value"] <= found["floor"]["auc"] + 0.05
    assert found["numbers"]["leakage.leace.quadratic"]["low"] > erased["high"]
    assert found["verdicts"]["leace"]["state"] == "readable"
    assert found["verdicts"]["leace"]["strongest"] == "quadratic"
    assert found["numbers"]["leakage.text.words"]["low"] > 0.9
    assert found["compression"]["raw"]["compression"] > found["compression"]["leace"]["compression"]


def test_three_sets_of_patients_share_nobody_and_every_number_has_its_patients(finished):
    found = results_of(finished)
    assert sum(found["protocol"]["n_patients"].values()) == 300
    for name, entry in found["numbers"].items():
        assert entry["n_patients"] >= 90, name
        assert entry["low"] is not None or entry["note"], name
        assert entry["protocol"], name
        assert entry["split"], name
    assert found["numbers"]["given_label.raw.linear"]["n_patients"] == 100
    assert finished.metrics["leakage.raw.linear"]["n_patients"] == 100


def test_the_cost_is_shown_and_the_front_is_not_beaten(finished):
    points = results_of(finished)["path"]
    assert {"raw", "leace", "mean_centring", "inlp", "inlp 1", "inlp 4"} <= {point["name"] for point in points}
    assert any(point["on_front"] for point in points)
    for point in points:
        beaten = any(other["leakage"] < point["leakage"] and other["utility"] > point["utility"] for other in points)
        assert not (beaten and point["on_front"])


def test_dominance_is_by_both_and_equal_points_do_not_beat_each_other():
    points = [{"leakage": a, "utility": b} for a, b in ((0.6, 0.8), (0.9, 0.8), (0.9, 0.9), (0.6, 0.8))]
    assert [on_front(point, points) for point in points] == [True, False, True, True]


def test_the_erasers_are_saved_with_the_run(finished):
    for name in ("leace", "mean_centring", "inlp"):
        eraser = Eraser.load(finished.path / "erasers", name)
        assert eraser.n_patients == 100
        assert np.isfinite(eraser(np.zeros((1, 16)), ["hospital-1"])).all()


def test_the_page_begins_with_what_can_be_read_and_shows_no_note(finished, files_holding):
    html = (finished.path / "report.html").read_text("utf-8")
    assert html.index("After leace: the institution can be read") < html.index("How it was measured")
    assert "a quadratic probe" in html
    assert "the whole 95 % interval of some probe lies above 0.55" in html
    assert "<script" not in html
    corpus = find_recipe("debiasing", "eval").load().load_corpus(
        "synthetic_hospitals", institutions=2, patients=150, covariate=0.5, label=0.5
    )  # fmt: skip
    for line in sorted(corpus.notes["text"][0].as_py().splitlines(), key=len)[-2:]:
        assert not files_holding(line, finished.path)


def corpus_of(texts, institutions, patients, codes=()):
    card = Card("made", "", "", "", "", "a made place", "", "")
    notes = [
        Note(f"n{i}", patient, place, text, "test")
        for i, (text, place, patient) in enumerate(zip(texts, institutions, patients, strict=True))
    ]
    same = {"encounter_id": None, "note_id": None, "system": "X"}
    rows = [{"institution": place, "patient_id": patient, "code": code, **same} for place, patient, code in codes]
    table = pa.Table.from_pylist(rows, schema=CODE_SCHEMA)
    return Corpus(notes_table(notes), card, codes=table)


def run_on(corpus, tmp_path, monkeypatch, **options):
    monkeypatch.setattr(debiasing, "load_corpus", lambda *_, **__: corpus)
    return debiasing.run(settings(**options), tmp_path / "run")


def made(n, *, words_of=("fever", "cough", "pain", "rash"), n_places=2, seed=0):
    rng = np.random.default_rng(seed)
    texts, places, patients = [], [], []
    for number in range(n):
        for _ in range(2):
            texts.append(" ".join(rng.choice(words_of, 12)))
            places.append(f"place-{number % n_places}")
            patients.append(f"p{number}")
    return texts, places, patients


def test_identical_institutions_are_not_called_readable(tmp_path, monkeypatch):
    found = results_of(run_on(corpus_of(*made(180)), tmp_path, monkeypatch, dimensions=3, label="none"))
    assert {verdict["state"] for verdict in found["verdicts"].values()} <= {"not shown", "not readable"}
    assert found["protocol"]["label"] is None
    assert found["path"] == []


def test_three_institutions_are_also_compared_two_by_two(tmp_path, monkeypatch):
    texts, places, patients = made(180, n_places=3)
    texts = [text + (" yellow" * 9 if place == "place-2" else "") for text, place in zip(texts, places, strict=True)]
    found = results_of(run_on(corpus_of(texts, places, patients), tmp_path, monkeypatch, label="none", dimensions=4))
    pairs = {key: entry for key, entry in found["numbers"].items() if key.startswith("pair.raw")}
    assert len(pairs) == 3
    assert pairs["pair.raw.place-0|place-2"]["value"] > 0.99
    assert pairs["pair.raw.place-0|place-1"]["low"] < 0.5


def test_few_patients_give_figures_without_intervals(tmp_path, monkeypatch):
    found = results_of(run_on(corpus_of(*made(24)), tmp_path, monkeypatch, label="none", dimensions=3))
    assert found["numbers"]["leakage.raw.linear"]["low"] is None
    assert "fewer than 20" in found["numbers"]["leakage.raw.linear"]["note"]
    assert {verdict["state"] for verdict in found["verdicts"].values()} == {"not shown"}
    assert any("20 patients" in reason for reason in found["missing"].values())


def test_constant_vectors_are_one_error(tmp_path, monkeypatch):
    texts, places, patients = made(60)
    with pytest.raises(InputError, match="do not vary"):
        run_on(corpus_of(["same words here"] * len(texts), places, patients), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t, h, p: (t, ["a"] * len(h), p), TooFewPatientsError, "one institution, 'a'"),
        (lambda t, h, p: ([*t, "x"], [*h, "tiny"], [*p, "new"]), TooFewPatientsError, "'tiny' has 1 patients"),
        (lambda t, h, p: (t, ["a", "b", *h[2:]], p), InputError, "patients have notes in several institutions"),
    ],
)
def test_bad_input_is_one_clear_error_and_leaves_the_folder(tmp_path, monkeypatch, change, error, words):
    with pytest.raises(error, match=words) as raised:
        run_on(corpus_of(*change(*made(30))), tmp_path, monkeypatch)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_label_is_named_or_found_and_a_wrong_one_is_told(tmp_path, monkeypatch):
    texts, places, patients = made(90)
    codes = [
        (place, patient, "A1") for place, patient in zip(places, patients, strict=True) if int(patient[1:]) % 3 == 0
    ]
    corpus = corpus_of(texts, places, patients, codes)
    found = results_of(run_on(corpus, tmp_path, monkeypatch, dimensions=3, erasers=["leace"]))
    assert found["protocol"]["label"] == "code:A1"
    with pytest.raises(UsageError, match=r"such as code:A1"):
        run_on(corpus, tmp_path / "b", monkeypatch, label="code:A2")
    with pytest.raises(UsageError, match="does not say the sex"):
        run_on(corpus, tmp_path / "c", monkeypatch, label="sex")
    with pytest.raises(ConfigError, match="erasers"):
        settings(erasers=["lease"])


def test_a_third_of_every_institutions_patients_goes_each_way():
    sampler = NoteSampler()
    for note in corpus_of(*made(90, n_places=3)).notes.to_pylist():
        note.pop("text_sha256")
        sampler.add(Note(**note))
    sample = sampler.finish()
    third = divide(sample, 0)
    for place in ("place-0", "place-1", "place-2"):
        rows = [row for row, name in enumerate(sample.institutions) if name == place]
        people = {part: {sample.patient_ids[row] for row in rows if third[row] == part} for part in range(3)}
        assert [len(members) for members in people.values()] == [10, 10, 10]
        assert not people[0] & people[1] | people[0] & people[2] | people[1] & people[2]
    assert math.isclose(len(third), 180)
