"""The suite `calibration`: from a file and from runs; what it calls off, what it refuses."""

from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import write_encoder

from clinical_nlp.config import load_config
from clinical_nlp.errors import ConfigError, InputError, MissingDataError, TooFewPatientsError, UsageError
from clinical_nlp.eval import calibration
from clinical_nlp.eval._predictions import CodedRun, dropout_on, read_file, read_run
from clinical_nlp.recipe import execute, find_recipe
from clinical_nlp.recipes import coding, ner
from clinical_nlp.reporting.page import run_report
from clinical_nlp.runs import Run

COLUMNS = ("patient_id", "institution", "probability", "gold", "note_id")


def rows(places, *, patients=120, seed=0):
    """Predictions with logit z where truth has logit shift + slope * z, by institution."""
    rng = np.random.default_rng(seed)
    found = []
    for place, (shift, slope) in places.items():
        for number in range(patients):
            own = rng.normal()
            for note in range(int(rng.integers(1, 5))):
                z = own + rng.normal() - 0.5
                gold = int(rng.random() < 1 / (1 + np.exp(-(shift + slope * z))))
                name = f"{place}-{number}"
                found.append((name, place, 1 / (1 + np.exp(-z)), gold, f"{name}-{note}"))
    return found


def write(path, found, columns=COLUMNS):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(found)
    return str(path)


def judged(tmp_path, **options):
    config = load_config(calibration.CONFIG, None, options)
    run = execute(find_recipe("calibration", "eval"), config, output=tmp_path / "out")
    return run, json.loads((run.path / "results.json").read_text("utf-8"))


def test_the_institution_whose_probabilities_are_off_is_named_and_the_others_are_not(tmp_path):
    path = write(
        tmp_path / "p.csv", rows({"north": (0, 1), "south": (0, 1), "west": (-1.2, 0.4)}, patients=300, seed=1)
    )
    run, found = judged(tmp_path, predictions=path)
    numbers = found["numbers"]
    assert numbers["west.given.ece"]["p_value"] < 0.05
    assert numbers["west.given.slope"]["high"] < 1
    assert numbers["west.given.intercept"]["high"] < 0
    for place in ("north", "south"):
        assert numbers[f"{place}.given.ece"]["p_value"] > 0.05
        assert numbers[f"{place}.given.slope"]["low"] < 1 < numbers[f"{place}.given.slope"]["high"]
    html = (run.path / "report.html").read_text("utf-8")
    assert "west: the probabilities are off" in html
    assert "north: no miscalibration is shown" in html
    assert html.index("west: the probabilities are off") < html.index("Said and seen")
    assert "<script" not in html
    for name, entry in numbers.items():
        assert entry["n_patients"] > 20, name
        assert entry["low"] is not None or entry["note"], name
    run_report(Run.load(run.path))
    assert (run.path / "report.html").read_text("utf-8") == html


def test_extreme_probabilities_are_mended_by_the_temperature(tmp_path):
    path = write(tmp_path / "p.csv", rows({"one": (0, 0.25)}, patients=500))
    _, found = judged(tmp_path, predictions=path)
    assert found["temperature"]["value"] == pytest.approx(4, abs=2)
    before, after = (found["numbers"][f"all institutions.{how}.ece"] for how in ("given", "temperature"))
    assert before["excess"] > 0.02 > after["excess"]
    assert before["p_value"] < 0.01 < after["p_value"]
    assert found["numbers"]["all institutions.temperature.slope"]["value"] == pytest.approx(1, abs=0.3)
    assert list(found["bins"]) == ["all institutions"]  # one institution is not shown twice


def test_parts_that_the_file_gives_are_kept_and_small_institutions_are_not_shown(tmp_path):
    found = rows({"one": (0, 1)}, patients=80)
    by_number = [(*row, "calibration" if int(row[0].split("-")[1]) % 2 else "test") for row in found]
    by_number += [("t-1", "tiny", 0.5, 1, "x", "test")]
    table = pa.table(dict(zip((*COLUMNS, "part"), map(list, zip(*by_number, strict=True)), strict=True)))
    pq.write_table(table, tmp_path / "p.parquet")
    _, results = judged(tmp_path, predictions=str(tmp_path / "p.parquet"))
    assert results["protocol"]["n_patients"] == {"calibration": 40, "test": 41}
    assert results["hidden"] == ["tiny"]
    assert results["protocol"]["split"] == "as the file says"
    assert not any(name.startswith("tiny.") for name in results["numbers"])


def as_common(prevalence, place, part, *, patients, seed):
    """Predictions that are right at prevalence 0.3; text as everywhere, the outcome as common as given."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(patients):
        own = rng.normal()
        for note in range(int(rng.integers(1, 4))):
            gold = int(rng.random() < prevalence)
            x = 1.5 * gold + np.sqrt(0.3) * own + np.sqrt(0.7) * rng.normal()
            odds = np.exp(np.log(0.3 / 0.7) + 1.5 * x - 1.125)
            name = f"{place}-{part}-{number}"
            found.append((name, place, odds / (1 + odds), gold, f"{name}-{note}", part))
    return found


def test_where_the_outcome_is_commoner_sets_are_weighted_for_it_and_keep_the_promise(tmp_path):
    found = as_common(0.3, "home", "calibration", patients=250, seed=1)
    found += as_common(0.3, "home", "test", patients=150, seed=2) + as_common(
        0.75, "there", "test", patients=300, seed=3
    )
    path = write(tmp_path / "p.csv", found, (*COLUMNS, "part"))
    run, results = judged(tmp_path, predictions=path)
    numbers, shifted = results["numbers"], results["shifted"]
    assert numbers["there.coverage"]["high"] < 0.9 < numbers["there.coverage_shifted"]["high"]
    assert numbers["there.coverage_shifted"]["value"] > numbers["there.coverage"]["value"] + 0.03
    assert shifted["there"]["prevalence"]["value"] == pytest.approx(0.75, abs=0.1)
    assert shifted["there"]["prevalence"]["low"] < shifted["there"]["prevalence"]["value"]
    assert shifted["there"]["weights"][1] == pytest.approx(0.75 / 0.3, rel=0.15)
    assert 0.65 < shifted["home"]["weights"][1] < 1.35 < shifted["there"]["weights"][1]
    assert "all institutions" not in shifted
    assert "P(text | label) is the same" in numbers["there.coverage_shifted"]["protocol"]
    page = (run.path / "report.html").read_text("utf-8")
    assert "how common, estimated without gold" in page
    assert "keep the promise if P(text | label) is the same in both institutions" in page


def test_without_enough_calibration_patients_of_a_label_there_are_no_weighted_sets_and_the_page_says_why(tmp_path):
    found = [(*row[:3], 0, *row[4:]) for row in as_common(0.3, "home", "calibration", patients=30, seed=1)]
    found += as_common(0.3, "home", "test", patients=30, seed=2) + as_common(0.5, "there", "test", patients=30, seed=3)
    path = write(tmp_path / "p.csv", found, (*COLUMNS, "part"))
    run, results = judged(tmp_path, predictions=path)
    assert results["shifted"]["there"] == {
        "reason": "label 'present' has 0 patients at the reference; label shift needs 5"
    }
    assert "label shift needs 5" in (run.path / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("found", "columns", "error", "words"),
    [
        ([("p", "h", 0.5)], COLUMNS[:3], InputError, "no column 'gold'"),
        ([("p", "h", 1.5, 1)], COLUMNS[:4], InputError, "1 probabilities are not between"),
        ([("p", "h", "nan", 1)], COLUMNS[:4], InputError, "1 rows have no probability"),
        ([("p", "h", 0.5, 2)], COLUMNS[:4], InputError, "neither 0 nor 1"),
        ([("p", "h", "a", 1)], COLUMNS[:4], InputError, "must be numbers"),
        ([("p", "h", 0.5, None)], COLUMNS[:4], InputError, "1 rows have no gold"),
        ([], COLUMNS[:4], InputError, "no rows"),
        (
            [("p", "h", 0.5, 1, "test"), ("p", "h", 0.5, 1, "calibration")],
            (*COLUMNS[:4], "part"),
            InputError,
            "both parts",
        ),
        ([("p", "h", 0.5, 1, "dev")], (*COLUMNS[:4], "part"), InputError, "calibration or test, not 'dev'"),
    ],
)
def test_a_file_that_does_not_fit_is_one_clear_error(tmp_path, found, columns, error, words):
    path = write(tmp_path / "p.csv", found, columns)
    with pytest.raises(error, match=words) as raised:
        read_file(path, seed=0)
    assert "\n" not in str(raised.value)


def test_what_is_missing_or_said_twice_is_told(tmp_path):
    with pytest.raises(MissingDataError, match="does not exist"):
        judged(tmp_path, predictions="nowhere.csv")
    with pytest.raises(ConfigError, match="either run or predictions"):
        judged(tmp_path)
    with pytest.raises(ConfigError, match="no model to sample"):
        judged(tmp_path, predictions="x.csv", dropout_samples=3)
    path = write(tmp_path / "p.csv", [("p", "h", 0.5, 1)], COLUMNS[:4])
    with pytest.raises(TooFewPatientsError, match="calibration part"):
        judged(tmp_path, predictions=path)


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    root = tmp_path_factory.mktemp("coded")
    values = {
        "corpus.options": {"institutions": 2, "patients": 40},
        "base_model": str(write_encoder(root / "encoder")),
        "strategy.name": "lora",
        "strategy.rank": 2,
        "strategy.dropout": 0.2,
        "max_steps": 4,
        "chunk": 64,
        "max_tokens": 256,
        "training.batch_size": 4,
        "baselines": [],
    }
    return coding.run(load_config(coding.CONFIG, None, values), root / "run")


def test_a_coding_run_is_scored_again_on_the_patients_it_held_out(coded, tmp_path):
    predicted = read_run(str(coded.path), at_least=0.0)
    run = CodedRun.load(str(coded.path))
    people = {run.data.patients[row] for row in run.data.held_out}
    assert set(predicted.test.patients) == people
    assert not people & set(predicted.calibration.patients)
    assert len(predicted.test.gold) == len(run.data.held_out) * len(run.coder.task.codes)
    table = predicted.test.probability.reshape(len(run.data.held_out), -1)
    place = {run.data.names[row]: at for at, row in enumerate(run.data.held_out)}
    for row in pq.read_table(coded.path / "predictions.parquet").to_pylist():
        at = place[row["institution"], row["encounter_id"]]
        assert table[at, run.coder.task.codes.index(row["code"])] == pytest.approx(row["probability"], abs=1e-4)
    low = float(np.quantile(predicted.test.probability, 0.3))
    finished, found = judged(tmp_path, run=str(coded.path), at_least=low, dropout_samples=3)
    assert found["numbers"]["all institutions.dropout.ece"]["n_patients"] > 10
    assert "passes with dropout agree" in found["abstention"]
    kept = read_run(str(coded.path), at_least=low)
    hidden = int(predicted.test.gold.sum() - kept.test.gold.sum())
    assert kept.about["left_out_there"] == hidden > 0
    assert f"{hidden} of those of the test patients were there" in found["record"]["decided_on"]
    at_half, by_sets = found["record"]["decisions"][:2]
    counts = ("true_positives", "false_positives", "true_negatives", "false_negatives")
    assert sum(at_half[key] for key in counts) == len(kept.test.gold)
    assert at_half["true_positives"] == int((kept.test.gold[kept.test.probability >= 0.5] == 1).sum())
    assert at_half["abstained_positive"] == at_half["abstained_negative"] == 0
    abstained = by_sets["abstained_positive"] + by_sets["abstained_negative"]
    everywhere = found["coverage"]["all institutions"]
    assert (abstained > 0) == (everywhere["empty"] + everywhere["undecided"] > 0)
    assert (finished.path / "report.html").is_file()


def test_dropout_is_at_work_only_inside_the_block(coded):
    run = CodedRun.load(str(coded.path))
    texts = run.texts(run.data.held_out[:2])
    plain = run.coder.logits(texts)
    with dropout_on(run.coder.model) as layers:
        assert layers > 0
        assert not np.allclose(run.coder.logits(texts), plain)
    assert np.array_equal(run.coder.logits(texts), plain)


def test_an_ner_run_is_judged_by_its_words(tmp_path):
    values = {
        "corpus.options": {"institutions": 2, "patients": 30},
        "base_model": str(write_encoder(tmp_path / "encoder")),
        "strategy.name": "full",
        "max_steps": 4,
        "training.batch_size": 4,
    }
    tagged = ner.run(load_config(ner.CONFIG, None, values), tmp_path / "ner")
    predicted = read_run(str(tagged.path), at_least=0.0)
    assert set(predicted.test.institutions) == {"hospital-1", "hospital-2"}
    assert 0 < predicted.test.gold.mean() < 1
    assert ((predicted.test.probability >= 0) & (predicted.test.probability <= 1)).all()
    with pytest.raises(UsageError, match="judges coding and ner runs"):
        read_run(str(judged(tmp_path, run=str(tagged.path), at_least=0.0)[0].path), at_least=0.0)
