"""A neural assertion classifier beside the rules, at hospitals of other idioms and with labelled patients of one's own.

    python benchmarks/assertion_neural.py --base_model FOLDER --output benchmarks/assertion_neural.json

Two questions, each with the rules on the same spans and the difference with its interval, patients resampled:

- `transfer`: trained on synthetic hospitals of the phrase bank `development`, which the rules were made from, and
  scored on those of `held_out`, which neither has seen. With and without the rules' answer as an input; and as the
  classifier alone would say it, thresholds at zero.
- `own`: trained on N labelled patients of one hospital of the bank `held_out` (a fifth of them choose the thresholds),
  scored on other patients of that hospital. So a hospital sees what N patients of its own buy.

One thread; steps are counted and not timed, so that the scores do not depend on what else the machine does. Notes a
processor second do: for the committed result three processes shared two cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from measuring import machine

from clinical_nlp.config import SplitConfig, load_config
from clinical_nlp.notes.splitting import Split
from clinical_nlp.recipes import assertion
from clinical_nlp.runs import Estimate, Run, package_versions, write_json
from clinical_nlp.tasks.asserting import AssertionClassifier, AssertionTask

MEASURES = (
    "all_axes", "macro_f1", "f1.absent", "f1.uncertain", "f1.historical", "f1.future", "f1.hypothetical",
    "f1.conditional", "f1.family",
)  # fmt: skip


def hospital(bank: str, seed: int, institutions: int, patients: int) -> assertion.Asserted:
    """Return notes of synthetic hospitals; everyone is in the training part."""
    corpus = {"name": "synthetic_hospitals", "options": {"bank": bank, "seed": seed}}
    corpus["options"] |= {"institutions": institutions, "patients": patients}  # type: ignore[operator]
    config = load_config(assertion.CONFIG, None, {"corpus": corpus})
    data = assertion.read(config.corpus, SplitConfig(name="random", development=0.01, test=0.01), 0)
    rows = np.array([row for row, spans in enumerate(data.spans) if spans], dtype=np.int64)
    return replace(data, split=replace(data.split, train=rows))


def parted(data: assertion.Asserted, train: Sequence[str], development: Sequence[str], test: Sequence[str]) -> Any:
    """Return the data with these patients in the parts."""
    rows = [
        np.array([row for row in data.split.train if data.patients[row] in set(part)], dtype=np.int64)
        for part in (train, development, test)
    ]
    split = Split(*rows, "fixed", "test", (len(train), len(development), len(test)))
    return replace(data, split=split)


def fitted(
    data: assertion.Asserted, work: Path, options: argparse.Namespace, rules: bool, steps: int
) -> tuple[Any, Run]:
    """Train a classifier as the recipe does."""
    training = {"epochs": 1000, "batch_size": 16, "precision": options.precision}
    config = load_config(
        assertion.CONFIG,
        None,
        {
            "base_model": options.base_model,
            "strategy.name": options.strategy,
            "rules": rules,
            "training": training,
            "max_steps": steps,
        },
    )
    with Run.open(Path(tempfile.mkdtemp(dir=work)) / "run", config, recipe="assertion") as run:
        classifier = assertion.fit(config, data, run)
    return classifier, run


def judged(classifier: AssertionClassifier, data: assertion.Asserted, rows: np.ndarray) -> tuple[Any, float]:
    """Return the probabilities of the spans of some notes, and the processor seconds a note."""
    began = time.process_time()
    found = classifier.probabilities(*data.questions(rows))
    return found, (time.process_time() - began) / len(rows)


def scored(
    task: AssertionTask, thresholds: Sequence[float], found: Any, data: assertion.Asserted, rows: np.ndarray
) -> dict[str, Any]:
    """Return the scores of the classifier beside the rules, on some notes."""
    said = [
        [rule if one is None else task.decide(one, rule, thresholds) for one, rule in zip(own, rules, strict=True)]
        for own, rules in zip(found, data.rule_axes(rows), strict=True)
    ]
    found = assertion.score(data, rows, said, seed=0)
    scores: dict[str, Any] = {"changed": _row(found["test.changed"])}
    for measure in MEASURES:
        if f"test.{measure}" in found:
            kinds = (("classifier", ""), ("rules", "rules."), ("gain", "gain."))
            scores[measure] = {name: _row(found[f"test.{kind}{measure}"]) for name, kind in kinds}
    return {
        "n_spans": data.count(rows),
        "words_per_note": round(sum(len(data.texts[row].split()) for row in rows) / len(rows)),
        "scores": scores,
    }


def _row(estimate: Estimate) -> dict[str, Any]:
    ends = {name: None if np.isnan(end := getattr(estimate, name)) else round(end, 4) for name in ("low", "high")}
    value = None if np.isnan(estimate.value) else round(estimate.value, 4)
    found = {"value": value, **ends, "n_patients": estimate.n_patients, "n_notes": estimate.n_notes}
    return found | ({"note": estimate.note} if estimate.note else {})


def how(run: Run) -> dict[str, Any]:
    """Return what a training was."""
    told = run.manifest["training"]
    found = {key: told[key] for key in ("steps", "passages", "tokens", "seconds", "trainable_parameters")}
    precision = run.manifest["config"]["training"]["precision"]
    return found | {"precision": precision, "thresholds": run.manifest["thresholds"]}


def shares(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide patients into four fifths to learn from and a fifth to choose the thresholds on."""
    order = np.random.default_rng(0).permutation(len(names))
    cut = max(1, round(len(names) / 5))
    return [names[k] for k in order[cut:]], [names[k] for k in order[:cut]]


def main() -> None:
    """Train, score, write after each cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True, help="folder of a small encoder")
    parser.add_argument("--strategy", default="bottleneck")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps of the transfer")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="of the trainings")
    parser.add_argument("--patients", type=int, nargs="+", default=[20, 80, 320], help="labelled patients of one's own")
    parser.add_argument("--own_steps", type=int, nargs="+", default=[100, 150, 150], help="optimiser steps of each")
    parser.add_argument("--test_patients", type=int, default=60, help="other patients of that hospital")
    parser.add_argument("--target_patients", type=int, default=30, help="of each of the three other hospitals")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    result: dict[str, Any] = {"transfer": [], "own": []}
    if options.output.is_file():  # cells that are there are not run again
        result = json.loads(options.output.read_text("utf-8"))
    result |= {
        "benchmark": "assertion_neural",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(1),
        "packages": package_versions(),
        "arguments": {"base_model": Path(options.base_model).parent.name, "strategy": options.strategy},
    }
    settings = [row["setting"] for part in ("transfer", "own") for row in result[part]]

    def keep(part: str, row: dict[str, Any]) -> None:
        result[part].append(row)
        write_json(options.output, result)
        gain = row["scores"]["all_axes"]
        sys.stdout.write(f"{part} {row['setting']}: {gain}\n")
        sys.stdout.flush()

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = hospital("development", 0, 3, 60)
        train, development = shares(sorted({source.patients[row] for row in source.split.train}))
        source = parted(source, train, development, [])
        target = hospital("held_out", 1000, 3, options.target_patients)

        def transfer(rules: bool) -> None:
            if f"rules {'an' if rules else 'no'} input, alone" in settings:
                return
            classifier, run = fitted(source, work, options, rules, options.steps)
            rows = target.split.train
            found, seconds = judged(classifier, target, rows)
            told = {"training": how(run), "notes_per_processor_second": round(1 / seconds, 1)}
            zeros = [0.0] * len(classifier.task.axes)
            for kind, thresholds in (("with thresholds", classifier.thresholds), ("alone", zeros)):
                setting = f"rules {'an' if rules else 'no'} input, {kind}"
                keep("transfer", {"setting": setting} | told | scored(classifier.task, thresholds, found, target, rows))

        transfer(True)
        most = max(options.patients)
        own = hospital("held_out", 2000, 1, most + options.test_patients)
        names = sorted({own.patients[row] for row in own.split.train})
        order = [names[k] for k in np.random.default_rng(1).permutation(len(names))]
        held_out = order[most:]
        for n, steps in zip(options.patients, options.own_steps, strict=True):
            if n in settings:
                continue
            data = parted(own, *shares(order[:n]), held_out)
            classifier, run = fitted(data, work, options, True, steps)
            found, seconds = judged(classifier, data, data.split.test)
            told = {"training": how(run), "notes_per_processor_second": round(1 / seconds, 1)}
            scores = scored(classifier.task, classifier.thresholds, found, data, data.split.test)
            keep("own", {"setting": n} | told | scores)
        transfer(False)


if __name__ == "__main__":
    main()
