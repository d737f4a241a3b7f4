"""Do the probabilities hold, at every institution, and is it better to act on them than on everybody or nobody?

Takes a finished coding or ner run, or a file of anybody's predictions. One set of patients mends (temperature, limits
of sets), another is scored.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from clinical_nlp.config import Config
from clinical_nlp.errors import ConfigError, TooFewPatientsError
from clinical_nlp.eval._predictions import (
    CodedRun,
    Items,
    Predicted,
    coded_items,
    dropout_probabilities,
    read_file,
    read_run,
)
from clinical_nlp.progress import say
from clinical_nlp.reporting.tripod import decisions, tripod_section
from clinical_nlp.runs import Estimate, Run, write_atomic, write_json
from clinical_nlp.statistics.calibration import (
    abstention_curve,
    brier,
    brier_estimate,
    calibration_bin,
    calibration_error,
    calibration_line,
    fit_temperature,
)
from clinical_nlp.statistics.conformal import coverage, fit_conformal, fit_shifted_conformal, prevalence_weights
from clinical_nlp.statistics.net_benefit import net_benefit

VERSION = 1
"""Of the protocol; figures of one version can be compared."""
EVERYWHERE = "all institutions"
_CELL = 11
"""Patients below which no institution and no bin is shown."""


class CalibrationConfig(Config):
    """Judge probabilities."""

    run: str | None = None
    """Directory of a finished coding or ner run."""
    predictions: str | None = None
    """A CSV or Parquet file with patient_id, institution, probability, gold, and part where patients are divided."""
    corpus_path: str | None = None
    """Where the run's corpus is now, if it has moved."""
    at_least: float = Field(default=0.05, ge=0, lt=1)
    """Of a run: items below this probability are left out and counted; thousands of codes that nobody proposes would
    make every model look calibrated."""
    n_bins: int = Field(default=10, ge=2)
    """Bins of calibration error and reliability, about equally full."""
    miss: float = Field(default=0.1, gt=0, lt=1)
    """Conformal sets may miss the right answer in this share of items."""
    thresholds: list[float] = Field(default=[0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], min_length=1)
    """Decision thresholds for net benefit."""
    dropout_samples: int = Field(default=0, ge=0)
    """Monte Carlo dropout: passes with dropout on (coding runs); 0 for none."""
    seed: int = 0
    """Of intervals, nulls and dropout."""


CONFIG = CalibrationConfig


def run(config: CalibrationConfig, output: Path, *, resume: bool = False) -> Run:
    """Read the probabilities, mend them on one set of patients, judge them on the other, and write the page."""
    if (config.run is None) == (config.predictions is None):
        raise ConfigError("name either run or predictions: a finished coding or ner run, or a file")
    if config.dropout_samples and config.run is None:
        raise ConfigError("config key 'dropout_samples': a file of predictions has no model to sample from")
    with Run.open(output, config, recipe="calibration", resume=resume, contains_phi=False) as run:
        if config.predictions is not None:
            predicted = read_file(config.predictions, seed=config.seed)
        else:
            assert config.run is not None
            predicted = read_run(config.run, at_least=config.at_least, corpus_path=config.corpus_path)
        for name, part in (("calibration", predicted.calibration), ("test", predicted.test)):
            if not len(part.gold):
                raise TooFewPatientsError(
                    f"no item of {predicted.about['what']} is in the {name} part; give it more patients, or lower "
                    "at_least"
                )
        book = Book(config, predicted)
        sampled = _dropout(config, predicted) if config.dropout_samples else None
        judge(book, predicted, sampled)
        run.record(book.estimates)
        results = {
            "version": VERSION,
            "about": predicted.about,
            "protocol": {
                "n_patients": {"calibration": predicted.calibration.n_patients, "test": predicted.test.n_patients},
                "n_items": {"calibration": len(predicted.calibration.gold), "test": len(predicted.test.gold)},
                "n_notes": {"calibration": predicted.calibration.n_units, "test": predicted.test.n_units},
                "calibration_institutions": sorted(set(predicted.calibration.institutions)),
                "split": predicted.about["split"],
                "selection": "temperature and limits of sets are chosen on the calibration patients",
                "at_least": config.at_least if config.run else None,
                "miss": config.miss,
                "n_bins": config.n_bins,
                "smallest_cell": _CELL,
                "seed": config.seed,
            },
            "numbers": book.numbers,
            **book.tables,
            "record": predicted.record
            | {
                "decisions": book.decisions,
                "decided_on": _decided_on(config, predicted),
                "thresholds": [
                    "an item is called there at probability 0.5, fixed in advance",
                    f"a set holds every outcome of probability {max(0.0, 1 - book.tables['sets']['limit']):.3g} or "
                    "more, chosen on the calibration patients, and abstains where it holds both or none",
                ],
            },
            "hidden": book.hidden,
        }
        write_json(run.path / "results.json", results)
        run.note(inputs={"predictions": predicted.about["what"], "n_items": len(predicted.test.gold)})
    write_atomic(run.path / "report.html", report(run))
    return run


def _decided_on(config: CalibrationConfig, predicted: Predicted) -> str:
    if not predicted.about["left_out"]:
        return ""
    return (
        f"Items of a probability below {config.at_least:g} are not among them: "
        f"{predicted.about['left_out_there']} of those of the test patients were there, false negatives too."
    )


def report(run: Run) -> str:
    """Render the page from `results.json`."""
    from clinical_nlp.reporting.calibration_page import calibration_page

    results = json.loads((run.path / "results.json").read_text("utf-8"))
    return calibration_page(results, tripod_section(run, results))


@dataclass
class Book:
    """Every number with how it came about, and the tables behind the plots."""

    config: CalibrationConfig
    predicted: Predicted
    estimates: dict[str, Estimate] = field(default_factory=dict)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    hidden: list[str] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, estimate: Estimate, protocol: str, **more: Any) -> None:
        """Enter a number."""
        about = {"protocol": protocol, "split": self.predicted.about["split"], "selection": "none on these patients"}
        self.estimates[name] = estimate
        self.numbers[name] = asdict(estimate) | about | more


def judge(book: Book, predicted: Predicted, sampled: tuple[Items, np.ndarray] | None) -> None:
    """Measure everything, for all institutions together and for each with enough patients."""
    config, fit, test = book.config, predicted.calibration, predicted.test
    temperature = fit_temperature(fit.logits, fit.gold, patients=fit.patients)
    sets = fit_conformal(fit.probability, fit.gold, fit.patients, miss=config.miss)
    mended = temperature(test.logits)
    book.tables["temperature"] = {"value": temperature.value, "note": temperature.note, "n_patients": fit.n_patients}
    book.tables["sets"] = {"limit": sets.limit, "n_patients": sets.n_patients, "note": sets.note}
    for table in ("bins", "line", "net_benefit", "coverage", "abstention", "shifted"):
        book.tables[table] = {}
    places = [EVERYWHERE, *sorted(set(test.institutions))]
    if len(places) == 2:
        places = places[:1]
    for place in places:
        mask = np.array([place in (EVERYWHERE, one) for one in test.institutions])
        part = test.select(mask)
        if place != EVERYWHERE and part.n_patients < _CELL:
            book.hidden.append(place)
            continue
        say(f"judging {len(part.gold)} items of {part.n_patients} patients, {place}")
        measure(book, f"{place}.given", place, part, "as they are")
        after = Items(mended[mask], part.gold, part.patients, part.institutions, part.units)
        measure(book, f"{place}.temperature", place, after, "after temperature scaling")
        book.tables["bins"][place] = reliability(part, config.n_bins)
        found = coverage(sets(part.probability), part.gold, part.patients, part=place, seed=config.seed)
        book.add(f"{place}.coverage", found.covered, f"conformal sets for {100 * (1 - config.miss):g} %")
        book.add(f"{place}.set_size", found.size, "outcomes a conformal set holds")
        held = sets(part.probability)
        alone = np.where(held.sum(axis=1) == 1, held[:, 1].astype(float), math.nan)
        said = (part.probability >= 0.5).astype(float)
        book.decisions.append(decisions(f"{place}, at 0.5", part.gold, said, part.patients))
        book.decisions.append(decisions(f"{place}, by sets", part.gold, alone, part.patients))
        book.tables["coverage"][place] = {"empty": found.empty, "undecided": found.undecided}
        if place != EVERYWHERE:
            book.tables["shifted"][place] = shifted(book, place, fit, part)
        book.tables["net_benefit"][place] = [
            asdict(point)
            for point in net_benefit(part.probability, part.gold, part.patients, thresholds=config.thresholds,
                                     part=place, seed=config.seed)
        ]  # fmt: skip
        confidence = np.maximum(part.probability, 1 - part.probability)
        correct = (part.probability >= 0.5) == (part.gold == 1)
        points = abstention_curve(confidence, correct, part.patients, part=place, seed=config.seed)
        book.tables["abstention"][place] = [asdict(point) for point in points]
    if sampled is not None:
        items, spread = sampled
        measure(book, f"{EVERYWHERE}.dropout", EVERYWHERE, items, "mean of passes with dropout")
        correct = (items.probability >= 0.5) == (items.gold == 1)
        # Abstain where the passes disagree most, relative to the largest disagreement that two outcomes allow.
        points = abstention_curve(1 - np.clip(2 * spread, 0, 1), correct, items.patients, seed=config.seed)
        book.tables["abstention"]["passes with dropout agree"] = [asdict(point) for point in points]


def shifted(book: Book, place: str, fit: Items, part: Items) -> dict[str, Any]:
    """Sets for an institution where the outcome may be commoner or rarer, from its notes without their gold."""
    config = book.config
    try:
        weights, found = prevalence_weights(
            fit.probability, fit.gold, fit.patients, part.probability, part.patients, seed=config.seed
        )
    except TooFewPatientsError as error:
        return {"reason": str(error)}
    sets = fit_shifted_conformal(fit.probability, fit.gold, fit.patients, weights, miss=config.miss)
    scored = coverage(sets(part.probability), part.gold, part.patients, part=place, seed=config.seed)
    how = f"conformal sets for {100 * (1 - config.miss):g} %, weighted for the prevalence there, if {sets.assumption}"
    weighed = "weights from its notes without gold, by expectation maximisation"
    book.add(f"{place}.coverage_shifted", scored.covered, how, selection=weighed)
    book.add(f"{place}.set_size_shifted", scored.size, f"outcomes a set holds; {how}", selection=weighed)
    return {
        "reason": "",
        "weights": weights,
        "limits": sets.limits,
        "note": sets.note,
        "assumption": sets.assumption,
        "contradicted_p": found.fit_p_value,
        "prevalence": asdict(found.other[1]),
        "prevalence_at_calibration": asdict(found.reference[1]),
        "empty": scored.empty,
        "undecided": scored.undecided,
    }


def measure(book: Book, name: str, place: str, items: Items, how: str) -> None:
    """Calibration error with its excess, Brier score with its parts, slope and intercept."""
    config = book.config
    common: dict[str, Any] = {"n_notes": items.n_units, "part": place}
    error = calibration_error(items.probability, items.gold, items.patients, n_bins=config.n_bins, seed=config.seed)
    none = (math.nan, math.nan)
    why = error.note or "no interval: a calibration error is biased upwards in every resample"
    estimate = Estimate(error.value, *none, error.n_patients, items.n_units, place, why)
    more = {"null_mean": error.null_mean, "null_sd": error.null_sd, "excess": error.excess, "p_value": error.p_value}
    book.add(f"{name}.ece", estimate, f"expected calibration error, {config.n_bins} equally full bins, {how}", **more)
    parts = asdict(brier(items.probability, items.gold, patients=items.patients, n_bins=config.n_bins))
    score = brier_estimate(items.probability, items.gold, items.patients, seed=config.seed, **common)
    book.add(f"{name}.brier", score, f"Brier score, {how}", **parts)
    slope, intercept = calibration_line(items.probability, items.gold, items.patients, **common)
    book.add(f"{name}.slope", slope, f"calibration slope, {how}")
    book.add(f"{name}.intercept", intercept, f"calibration intercept (slope 1), {how}")


def reliability(items: Items, n_bins: int) -> list[dict[str, Any]]:
    """Said and seen in each bin, patients weighing 1; bins of fewer than 11 patients are left out."""
    bins = calibration_bin(items.probability, n_bins=n_bins)
    _, rows = np.unique(items.patients, return_inverse=True)
    weight = 1 / np.bincount(rows)[rows]
    found = []
    for one in np.unique(bins):
        inside = bins == one
        people = len(np.unique(rows[inside]))
        if people >= _CELL:
            said, seen = (float(np.average(x[inside], weights=weight[inside])) for x in (items.probability, items.gold))
            found.append({"said": said, "seen": seen, "n_patients": people, "n_items": int(inside.sum())})
    return found


def _dropout(config: CalibrationConfig, predicted: Predicted) -> tuple[Items, np.ndarray]:
    assert config.run is not None
    coded = CodedRun.load(config.run, config.corpus_path)
    rows = coded.data.held_out
    say(f"{config.dropout_samples} passes with dropout over {len(rows)} documents")
    passes = dropout_probabilities(coded, rows, samples=config.dropout_samples, seed=config.seed)
    mean, spread = passes.mean(0), passes.std(0)
    items, _ = coded_items(coded, rows, mean, config.at_least)
    document, code = np.nonzero(mean >= config.at_least)
    return items, spread[document, code]
