"""The suite `transfer` on runs of tiny models: what it trains, what it compares, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_decoder, write_encoder
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from clinical_nlp.config import load_config
from clinical_nlp.errors import ConfigError, InputError, MissingDataError, ModelError, RunError, UsageError
from clinical_nlp.eval._candidates import read_words
from clinical_nlp.eval._finished import language_model, read_losses, read_subject, reading, without_dapt
from clinical_nlp.eval._retraining import fewer_patients, this_split, write_random_model
from clinical_nlp.eval.transfer import CONFIG, PARTS, judge, with_earlier_head
from clinical_nlp.models.loading import load_base
from clinical_nlp.recipe import execute, find_recipe
from clinical_nlp.recipes import dapt, ner
from clinical_nlp.runs import Estimate, Run
from clinical_nlp.tasks.ner import NerPredictor

MARKER = "quince"
TEXTS = [
    "no fever or cough today",
    f"severe cough and pain {MARKER}",
    "fever since monday , no pain",
    "well , no cough",
]
LONG = {"corpus.name": "ncbi_disease", "training.learning_rate": 0.01, "training.head_learning_rate": 0.01}


def write_iob(folder, documents=40):
    """Write a corpus in which three words are always a disease; every document is a patient."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", documents), ("devel", documents // 2), ("test", documents)):
        lines = []
        for _ in range(count):
            lines += ["-DOCSTART-\tO", ""]
            for _ in range(2):
                for word in f"{TEXTS[int(rng.integers(4))]} {int(rng.integers(10**6))}".split():
                    lines.append(f"{word}\t{'B-Disease' if word in ('fever', 'cough', 'pain') else 'O'}")
                lines.append("")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A decoder, a dapt run on it, an ner run on that, and their corpus."""
    root = tmp_path_factory.mktemp("transfer")
    decoder = write_decoder(root / "decoder")
    corpus = write_iob(root / "iob")
    return root, decoder, corpus


@pytest.fixture(scope="module")
def dapt_run(made):
    root, decoder, corpus = made
    config = load_config(
        dapt.CONFIG,
        None,
        {
            "corpus.name": "ncbi_disease",
            "corpus.path": corpus,
            "base_model": decoder,
            "strategy.rank": 4,
            "length": 64,
            "deduplicate": None,
            "max_steps": 6,
        },
    )
    return dapt.run(config, root / "dapt")


def tag(made, name, base, **overrides):
    root, _, corpus = made
    values = {
        **LONG,
        "corpus.path": corpus,
        "base_model": base,
        "strategy.name": "lora",
        "strategy.rank": 4,
        "window": 64,
        "overlap": 16,
        "max_steps": 25,
        **overrides,
    }
    return ner.run(load_config(ner.CONFIG, None, values), root / name)


@pytest.fixture(scope="module")
def tagger(made, dapt_run):
    return tag(made, "ner", dapt_run.path)


def evaluate(output, run, *, resume=False, **overrides):
    suite = find_recipe("transfer", "eval")
    return execute(suite, load_config(CONFIG, None, {"run": run, **overrides}), output=output, resume=resume)


def results_of(run):
    return json.loads((run.path / "results.json").read_text())


@pytest.fixture(scope="module")
def judged(made, tagger):
    root, *_ = made
    overrides = {"shares": [0.25, 1.0], "n_seeds": 2, "words": 400}
    return evaluate(root / "judged", tagger.path, **overrides), overrides


def test_every_part_is_measured_and_every_number_says_how(judged, files_holding):
    run, _ = judged
    results = results_of(run)
    assert set(results["verdicts"]) == set(PARTS) - {"ranking"}
    assert set(run.metrics) == set(results["numbers"])
    for name, number in results["numbers"].items():
        assert number["protocol"], name
        assert number["split"], name
        assert number["selection"], name
        assert number["n_patients"] > 0, name
        assert number["n_notes"] > 0, name
        assert (number["low"] is None) == (number["high"] is None), name
        assert number["low"] is not None or number["note"], name
    assert {
        "forgetting.perplexity_ratio",
        "negative_transfer.without_dapt.difference",
        "negative_transfer.head.difference",
        "negative_transfer.random.difference",
        "overfitting.gap_train",
        "learning_curve.25",
        "learning_curve.gain_patients",
        "ranking.0.logme",
        "ranking.2.truth",
    } <= set(results["numbers"])
    assert results["numbers"]["negative_transfer.run.f1_strict"]["value"] == pytest.approx(results["run"]["score"])
    assert results["run"]["score"] > 0.5  # else nothing above would mean anything
    assert results["protocol"]["notes_verified"]
    page = (run.path / "report.html").read_text()
    assert page.index("What is a problem") < page.index("What was compared" if "What was compared" in page else "How")
    assert not {file.name for file in files_holding(MARKER, run.path)}


def test_the_trainings_are_those_that_were_announced_and_nothing_twice(judged, tagger, made):
    run, _ = judged
    trainings = {entry["name"]: entry for entry in results_of(run)["trainings"]}
    assert set(trainings) == {"without_dapt", "head", "random", "curve_25_0", "curve_25_1", "curve_100_1"}
    _, decoder, _ = made
    assert trainings["without_dapt"]["base_model"] == str(decoder.resolve())
    assert trainings["head"]["strategy"] == "head"
    assert [trainings[name]["n_training_patients"] for name in ("curve_25_0", "curve_100_1")] == [10, 40]
    assert {entry["steps"] for entry in trainings.values()} == {tagger.manifest["training"]["steps"]}
    # One split for all of them: whatever the seed, the patients that are scored are the run's.
    scored = {(entry["n_patients"], entry["n_notes"]) for entry in Run.load(run.path / "curve_25_1").metrics.values()}
    assert scored == {(40, 40)}
    ranking = results_of(run)["ranking"]
    assert [candidate["arm"] for candidate in ranking["candidates"]] == ["reference", "without_dapt", "random"]
    assert all("leep" in candidate["reasons"] for candidate in ranking["candidates"])


def test_resume_trains_nothing_again_and_finds_the_same(judged, tagger):
    run, overrides = judged
    before, trained = results_of(run), {path: path.stat().st_mtime_ns for path in run.path.glob("*/manifest.json")}
    (run.path / "manifest.json").unlink()
    (run.path / "counts" / "head.npy").unlink()
    again = evaluate(run.path, tagger.path, resume=True, **overrides)
    assert {path: path.stat().st_mtime_ns for path in again.path.glob("*/manifest.json")} == trained
    assert results_of(again) == before


def test_a_limit_of_its_own_trains_the_run_again_under_it(tagger, tmp_path):
    run = evaluate(tmp_path / "out", tagger.path, parts=["negative_transfer"], max_steps=2)
    trainings = {entry["name"]: entry["steps"] for entry in results_of(run)["trainings"]}
    assert trainings == {"reference": 2, "without_dapt": 2, "head": 2, "random": 2}
    own = run.metrics["negative_transfer.run.f1_strict"]["value"]
    assert own == pytest.approx(Run.load(run.path / "reference").metrics["test.f1_strict"]["value"])
    assert results_of(run)["verdicts"]["forgetting"]["findings"][0]["reason"].startswith("it was left out")


def test_what_cannot_be_trained_is_said_and_the_rest_is_done(made, tmp_path):
    root, decoder, _ = made
    plain = tag(made, "plain_head", decoder, **{"strategy.name": "head", "attention": "causal", "max_steps": 2})
    encoder = write_encoder(root / "for_ranking")
    run = evaluate(
        tmp_path / "out",
        plain.path,
        parts=["negative_transfer", "ranking"],
        candidates=[str(decoder), str(encoder), str(plain.path), "random"],
        words=200,
    )
    results = results_of(run)
    reasons = {found["comparison"]: found["reason"] for found in results["verdicts"]["negative_transfer"]["findings"]}
    assert "no dapt run" in reasons["without_dapt"]
    assert "head alone" in reasons["head"]
    assert not reasons["random"]
    first, second, third, fourth = results["ranking"]["candidates"]
    assert (first["arm"], fourth["arm"]) == ("reference", "random")
    assert "encoder" in second["reasons"]["truth"]  # attention causal is not for encoders
    assert "ranking.1.logme" in results["numbers"]
    assert "ranking.1.truth" not in results["numbers"]
    assert "leep" in first["reasons"]
    assert "leep" not in third["reasons"]  # an ner run has a head whose classes can be read
    assert results["numbers"]["ranking.2.leep"]["value"] <= 0
    assert "the score after training is not measured, because" in (run.path / "report.html").read_text()
    assert {found["n_candidates"] for found in results["ranking"]["agreement"]} == {3}


def test_smaller_shares_lie_inside_larger_ones_and_seeds_differ(tagger):
    subject = read_subject(str(tagger.path))
    kept = {}
    for seed in (0, 1):
        sets = []
        for share in (0.001, 0.1, 0.5, 1.0):
            part = fewer_patients(subject.split, subject.patients, share, seed=seed)
            assert np.array_equal(part.test, subject.split.test)
            sets.append({subject.patients[row] for row in part.train})
            assert part.patients[0] == len(sets[-1])
        assert [len(found) for found in sets] == [1, 4, 20, 40]
        assert all(small < large for small, large in itertools.pairwise(sets))
        kept[seed] = sets
    assert kept[0][2] != kept[1][2]


def test_only_the_runs_own_notes_are_divided_otherwise_and_only_meanwhile(tagger):
    subject = read_subject(str(tagger.path))
    recipe = find_recipe("ner").load()
    usual = recipe.split_patients
    part = fewer_patients(subject.split, subject.patients, 0.1, seed=0)
    notes, common = subject.corpus.notes, {"seed": 0, "parts": subject.corpus.parts}
    with pytest.raises(InputError), this_split(recipe, subject, part):
        assert recipe.split_patients(notes, subject.config.split, **common) is part
        others = recipe.split_patients(notes[1:], subject.config.split, **common)  # a corpus to replay, say
        assert others.patients[0] == 39
        raise InputError("the training failed")
    assert recipe.split_patients is usual


def test_a_head_alone_forgets_nothing_and_that_is_known_without_an_interval(made, dapt_run, tmp_path):
    run = tag(made, "head_on_dapt", dapt_run.path, **{"strategy.name": "head", "max_steps": 2})
    found = evaluate(tmp_path / "out", run.path, parts=["forgetting"])
    assert found.metrics["forgetting.perplexity_ratio"]["value"] == 1.0
    assert results_of(found)["verdicts"]["forgetting"]["state"] == "no problem"


def test_weights_that_moved_far_have_forgotten(made, dapt_run, tmp_path):
    run = tag(made, "full_on_dapt", dapt_run.path, **{"strategy.name": "full", "max_steps": 25})
    found = evaluate(tmp_path / "out", run.path, parts=["forgetting"])
    ratio = found.metrics["forgetting.perplexity_ratio"]
    assert ratio["low"] > 1.05
    assert results_of(found)["verdicts"]["forgetting"]["state"] == "problem"
    # The backbone that was saved alone, under the head that is tied to its own embeddings, read left to right.
    model = language_model(str(run.path), "none").network.eval()
    weights = load_file(run.path / "model" / "model.safetensors")
    embeddings = next(value for name, value in weights.items() if name.endswith("embed_tokens.weight"))
    ids = torch.arange(3, 30).reshape(1, -1)
    with torch.inference_mode():
        hidden = load_base(str(run.path)).network(input_ids=ids).last_hidden_state
        logits = model(input_ids=ids).logits
        shorter = model(input_ids=ids[:, :-5]).logits
    assert torch.allclose(logits, hidden @ embeddings.T, atol=1e-4)
    assert torch.allclose(logits[:, :-5], shorter, atol=1e-4)


def test_a_merged_dapt_run_is_dapt_all_the_same(made, dapt_run, tmp_path):
    _, decoder, _ = made
    merging = find_recipe("merge")
    merged = execute(merging, merging.config(None, {"run": str(dapt_run.path)}), output=tmp_path / "merged")
    assert without_dapt(str(merged.path)) == str(decoder.resolve())
    run = tag(made, "on_merged", merged.path, **{"strategy.name": "full", "max_steps": 2})
    texts = ["no fever or cough today"] * 2
    for path in (dapt_run.path, merged.path):
        assert read_losses(str(path), "none", texts)[0] == pytest.approx(
            read_losses(str(dapt_run.path), "none", texts)[0], rel=1e-3
        )
    found = evaluate(tmp_path / "out", run.path, parts=["forgetting"])
    assert found.metrics["forgetting.perplexity_before"]["value"] == pytest.approx(
        dapt_run.metrics["test.perplexity"]["value"], rel=1e-3
    )


def test_the_earlier_task_is_scored_with_its_own_head_on_the_new_weights(made, tagger, tmp_path):
    kept = tag(made, "kept", tagger.path, **{"strategy.name": "head", "head": "new", "max_steps": 2})
    found = evaluate(tmp_path / "kept", kept.path, parts=["forgetting"])
    assert found.metrics["forgetting.task_difference"]["value"] == 0
    assert found.metrics["forgetting.task_before"]["value"] == pytest.approx(tagger.metrics["test.f1_strict"]["value"])
    moved = tag(made, "moved", tagger.path, **{"strategy.name": "full", "head": "new", "training.learning_rate": 0.05})
    found = evaluate(tmp_path / "moved", moved.path, parts=["forgetting"])
    after = found.metrics["forgetting.task_after"]["value"]
    assert after < tagger.metrics["test.f1_strict"]["value"]
    # Its own head is another one, and stays out of it.
    head = with_earlier_head(read_subject(str(moved.path)), tagger)._model.head.weight
    earlier, own = (load_file(run.path / "head.safetensors")["weight"] for run in (tagger, moved))
    assert torch.equal(head, earlier)
    assert not torch.equal(head, own)


def test_a_dapt_run_is_judged_where_it_can_be(dapt_run, tmp_path):
    run = evaluate(tmp_path / "a", dapt_run.path)
    verdicts = results_of(run)["verdicts"]
    assert "--source.corpus.name" in verdicts["forgetting"]["findings"][0]["reason"]
    for part in ("negative_transfer", "learning_curve"):
        assert "no task" in verdicts[part]["findings"][0]["reason"]
    assert results_of(run)["trainings"] == []
    low, high = (run.metrics["overfitting.train"]["value"] * factor for factor in (0.5, 2))
    assert low < run.metrics["overfitting.new"]["value"] < high
    assert run.metrics["overfitting.new"]["value"] == pytest.approx(
        dapt_run.metrics["test.perplexity"]["value"], rel=1e-4
    )
    source = {"source.corpus": {"name": "synthetic_hospitals", "options": {"institutions": 1, "patients": 25}}}
    run = evaluate(tmp_path / "b", dapt_run.path, parts=["forgetting"], **source)
    assert run.metrics["forgetting.perplexity_ratio"]["n_patients"] == 25
    assert run.metrics["forgetting.perplexity_ratio"]["low"] is not None


def test_an_encoder_without_a_language_model_head_has_no_perplexity(made, tmp_path):
    root, *_ = made
    run = tag(made, "on_encoder", write_encoder(root / "encoder"), max_steps=2)
    source = {"source.corpus": {"name": "synthetic_hospitals", "options": {"institutions": 1, "patients": 25}}}
    found = evaluate(tmp_path / "out", run.path, parts=["forgetting", "ranking"], words=200, **source)
    assert "no language-model head" in results_of(found)["verdicts"]["forgetting"]["findings"][0]["reason"]
    assert len(results_of(found)["ranking"]["candidates"]) == 2


def test_an_encoder_forgets_in_pseudo_perplexity(made, tmp_path):
    root, *_ = made
    folder = write_encoder(root / "masked")
    torch.manual_seed(1)
    config = BertConfig.from_pretrained(folder)
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(folder)
    source = {"source.corpus": {"name": "synthetic_hospitals", "options": {"institutions": 1, "patients": 25}}}
    found = {}
    for strategy in ("full", "head"):
        run = tag(made, f"masked_{strategy}", folder, **{"strategy.name": strategy, "max_steps": 3})
        found[strategy] = evaluate(tmp_path / strategy, run.path, parts=["forgetting"], **source)
    numbers = results_of(found["full"])["numbers"]
    assert numbers["forgetting.perplexity_ratio"]["protocol"].startswith("pseudo-perplexity")
    before = [run.metrics["forgetting.perplexity_before"]["value"] for run in found.values()]
    assert before[0] == pytest.approx(before[1])
    assert found["head"].metrics["forgetting.perplexity_ratio"]["value"] == 1
    assert found["full"].metrics["forgetting.perplexity_ratio"]["value"] != 1


def test_random_weights_have_the_architecture_and_nothing_else(made, tmp_path):
    _, decoder, _ = made
    for name, seed in (("a", 1), ("b", 1), ("c", 2), ("a", 3)):  # what is there already is not written again
        write_random_model(str(decoder), tmp_path / name, seed=seed)
    known, *drawn = (
        dict(load_base(str(folder)).network.named_parameters())
        for folder in (decoder, *(tmp_path / name for name in "abc"))
    )
    shapes = {name: value.shape for name, value in known.items()}
    assert all({name: value.shape for name, value in found.items()} == shapes for found in drawn)
    name = next(name for name in known if name.endswith("q_proj.weight"))
    assert torch.equal(drawn[0][name], drawn[1][name])
    assert not torch.equal(drawn[0][name], drawn[2][name])
    assert not torch.equal(drawn[0][name], known[name])


def test_words_are_the_training_patients_own_and_carry_their_tags(tagger, made):
    _, decoder, _ = made
    subject = read_subject(str(tagger.path))
    sample = {"most_words": 80, "most_patients": 40, "seed": 0}
    words = read_words(subject, str(decoder), **sample)
    assert words.features.shape == (80, 64)
    assert {words.patients.count(patient) for patient in words.patients} == {2}
    assert set(words.patients) == {subject.patients[row] for row in subject.split.train}
    assert set(words.tags.tolist()) == {0, 1}
    assert words.probabilities is None
    every = read_words(subject, str(tagger.path), **{**sample, "most_words": 10**6})
    gold = sum(len(subject.gold[row]) for row in subject.split.train)
    assert int((every.tags == 1).sum()) == gold
    assert every.probabilities is not None
    assert every.probabilities.shape == (len(every.tags), 3)
    # The run's own head at these very words: nearly all of them are tagged as they should be.
    assert (every.probabilities.argmax(1) == every.tags).mean() > 0.8


def test_only_a_whole_interval_beyond_the_margin_is_a_problem():
    def harm(low, high):
        return Estimate((low + high) / 2, low, high, 30, 60)

    assert judge(harm(0.01, 0.05), 0) == "problem"
    assert judge(harm(0.01, 0.05), 0.02) == "not shown"
    assert judge(harm(-0.01, 0.05), 0) == "not shown"
    assert judge(harm(-0.05, -0.01), 0) == "no problem"
    assert judge(harm(-0.05, 0.01), 0.02) == "no problem"
    assert judge(replace(harm(0.01, 0.05), low=math.nan, high=math.nan), 0) == "not shown"


def test_losses_of_a_run_are_those_of_its_recipe(dapt_run):
    subject = read_subject(str(dapt_run.path))
    texts = [subject.texts[row] for row in subject.split.test]
    counts, kind = read_losses(str(dapt_run.path), "none", texts, **reading(dapt_run))
    assert kind == "perplexity"
    total = counts.sum(0)
    assert math.exp(total[0] / total[1]) == pytest.approx(dapt_run.metrics["test.perplexity"]["value"], rel=1e-4)


def test_bad_input_is_one_clear_error_and_leaves_nothing(made, tagger, tmp_path, monkeypatch):
    root, _, corpus = made
    output = tmp_path / "out"
    with pytest.raises(RunError, match="not a run directory"):
        evaluate(output, root)
    with pytest.raises(ConfigError, match="shares"):
        evaluate(output, tagger.path, shares=[0.5, 0.5])
    with pytest.raises(ConfigError, match="parts"):
        evaluate(output, tagger.path, parts=["forgeting"])
    with pytest.raises(MissingDataError, match="no-such-model"):
        evaluate(output, tagger.path, candidates=["no-such-model"])
    with pytest.raises(MissingDataError, match="source"):
        evaluate(output, tagger.path, **{"source.corpus": {"name": "mtsamples", "path": str(root / "source")}})
    other = write_iob(tmp_path / "other", documents=44)
    with pytest.raises(InputError, match="other notes"):
        evaluate(output, tagger.path, corpus_path=other)
    moved = root / "moved_iob"
    corpus.rename(moved)
    try:
        with pytest.raises(MissingDataError, match="--corpus_path"):
            evaluate(output, tagger.path)
        assert not output.exists()
        evaluate(output, tagger.path, parts=["overfitting"], corpus_path=moved)
    finally:
        moved.rename(corpus)
    manifest = json.loads((tagger.path / "manifest.json").read_text())
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "manifest.json").write_text(json.dumps(manifest | {"recipe": "drift"}))
    with pytest.raises(UsageError, match="drift"):
        evaluate(tmp_path / "drift", strange)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        evaluate(tmp_path / "two", tagger.path)


def test_a_damaged_run_is_told(tagger, made, tmp_path):
    run = tag(made, "damaged", made[1], max_steps=1)
    (run.path / "head.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="is missing, damaged"):
        evaluate(tmp_path / "out", run.path, parts=["overfitting"])
    assert NerPredictor.load(tagger.path) is not None
