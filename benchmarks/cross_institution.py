"""Are the suite's contrasts right? `python benchmarks/cross_institution.py > benchmarks/cross_institution.json`.

Synthetic hospitals whose closing line goes with the target condition: at .98, .9 and .7 in the training institutions
and .1 in the held-out one; and, as the control in which no objective can work, at .9 in each of them. The held-out
institution has patients enough for five studies of 200 and for the truth: each contrast of a study is held against the
same trained models on the 800 test patients that the study does not have. About five minutes a scenario.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from typing import Any, get_args

import numpy as np
import torch
from measuring import machine

from clinical_nlp.config import load_config
from clinical_nlp.corpora.synthetic_hospitals import generate
from clinical_nlp.eval._discrimination import Panel
from clinical_nlp.eval._fine_tuning import Asked
from clinical_nlp.eval.cross_institution import (
    Bench,
    Book,
    CrossInstitutionConfig,
    Labelled,
    choose_weights,
    compare_methods,
    list_methods,
    score_methods,
)
from clinical_nlp.runs import package_versions

SCENARIOS = {"differing": (0.98, 0.9, 0.7), "equal": (0.9, 0.9, 0.9)}
STUDIES, SIZE = 5, 200


def notes(spurious: tuple[float, ...], *, patients: int, held_out: int, seed: int) -> Labelled:
    """Generate notes; an institution of training has the first `patients` of the `held_out` patients."""
    generated = generate(
        institutions=4, patients=held_out, notes_per_patient=(2, 4), seed=seed, spurious=[*spurious, 0.1]
    )
    found = []
    for item in generated:
        if item.note.institution == "hospital-4" or int(item.note.patient_id.rpartition("p")[2]) <= patients:
            found.append(item)
    coded = {(i.note.institution, i.note.encounter_id) for i in found if any(row[4] == "I50.9" for row in i.codes)}
    return Labelled(
        [item.note.text for item in found],
        np.array([item.note.institution for item in found]),
        np.array([f"{item.note.institution}\t{item.note.patient_id}" for item in found]),
        np.array([(i.note.institution, i.note.encounter_id) in coded for i in found], dtype=np.int64),
        [item.note.written_at for item in found],
        0,
    )


def scenario(spurious: tuple[float, ...], arguments: argparse.Namespace) -> dict[str, Any]:
    """Choose weights, train every method once, then make five studies of it and the truth of each."""
    data = notes(spurious, patients=arguments.patients, held_out=arguments.held_out, seed=arguments.seed)
    settings: dict[str, Any] = {
        "n_seeds": arguments.seeds,
        "n_resamples": arguments.resamples,
        "features.steps": arguments.steps,
    }
    if arguments.methods:
        settings["objectives"] = [name for name in get_args(Asked) if name in arguments.methods]
    config = load_config(CrossInstitutionConfig, None, settings)
    bench, book, target = Bench(config, data), Book(), "hospital-4"
    sources = [name for name in bench.names if name != target]
    train, adapt = bench.rows(sources, scored=False), bench.rows([target], scored=False)
    tested = bench.rows([target], scored=True)
    choices = choose_weights(bench, book, sources, "selection")
    methods = list_methods(bench, train, adapt, tested, choices)
    if arguments.methods:
        wanted = {*arguments.methods, "erm", "erm_reseeded", "in_domain"}
        methods = [method for method in methods if method.name in wanted]
    scores = score_methods(bench, book, methods, target)
    people = np.random.default_rng(arguments.seed).permutation(np.unique(data.patient[tested]))
    home = bench.rows(sources, scored=True)
    at_home = [
        bench.train(bench.notes(train, fitted_on=train), bench.notes(home, fitted_on=train), seed) for seed in range(3)
    ]
    own = bench.panel(home)
    result: dict[str, Any] = {
        "spurious": [*spurious, 0.1],
        "training_patients": len(np.unique(data.patient[train])),
        "test_patients": len(people),
        "erm_at_sources": float(own.aucs(at_home)[:, 0].mean()),
        "chosen": choices.objective,
        "weights": dict(choices.weights),
        "studies": [],
    }
    everyone = Panel(data.label[tested], data.patient[tested], config.n_resamples, config.seed)
    whole = Book()
    rows, _ = compare_methods(bench, whole, methods, scores, everyone, prefix="all", split="all test patients")
    result["all_test_patients"] = [_row(whole, row, "all") for row in rows]
    size = min(SIZE, len(people) // (arguments.studies + 1))
    for number in range(arguments.studies):
        inside = np.isin(data.patient[tested], people[number * size : (number + 1) * size])
        study, truth = Book(), Panel(data.label[tested][~inside], data.patient[tested][~inside], 1, 0)
        panel = Panel(data.label[tested][inside], data.patient[tested][inside], config.n_resamples, number)
        chosen = {name: [each[inside] for each in found] for name, found in scores.items()}
        rows, _ = compare_methods(bench, study, methods, chosen, panel, prefix="all", split=f"study {number}")
        erm = float(truth.aucs([each[~inside] for each in scores["erm"]])[:, 0].mean())
        for row in rows:
            here = float(truth.aucs([each[~inside] for each in scores[row["name"]]])[:, 0].mean())
            row["true_contrast"] = here - erm
        result["studies"].append([_row(study, row, "all") for row in rows if row["name"] != "erm"])
    flat = [row for study in result["studies"] for row in study if row["low"] is not None]
    result["contrasts"] = len(flat)
    result["intervals_that_hold_the_truth"] = sum(row["low"] <= row["true_contrast"] <= row["high"] for row in flat)
    claims = [row for row in flat if row.get("verdict") in ("higher", "lower")]
    result["claims"] = len(claims)
    result["claims_with_the_wrong_sign"] = sum(
        (row["verdict"] == "higher") != (row["true_contrast"] > 0) for row in claims
    )
    return result


def _row(book: Book, row: dict[str, Any], prefix: str) -> dict[str, Any]:
    number = book.numbers[f"{prefix}.{row['name']}"]
    contrast = book.numbers.get(f"{prefix}.{row['name']}.minus_erm", {})
    recovery = book.numbers.get(f"{prefix}.{row['name']}.recovery", {})
    found = {
        "name": row["name"],
        "tier": row["tier"],
        "n_patients": number["n_patients"],
        "auc": number["value"],
        "auc_interval": [number["low"], number["high"]],
        "minus_erm": contrast.get("value"),
        "low": contrast.get("low"),
        "high": contrast.get("high"),
        "recovery": [recovery.get(key) for key in ("value", "low", "high")],
        "recovery_note": recovery.get("note"),
        **{key: row[key] for key in ("p_seeds", "p_holm", "p_models", "verdict", "true_contrast") if key in row},
    }
    return json.loads(json.dumps(found), parse_constant=lambda _: None)  # type: ignore[no-any-return]


def main() -> None:
    """Run both scenarios and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, default=400, help="of each training institution")
    parser.add_argument("--held-out", type=int, default=2500, help="of the held-out institution; 40 %% are scored on")
    parser.add_argument("--studies", type=int, default=STUDIES)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=150, help="of a training")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=3, help="of the hospitals")
    parser.add_argument("--methods", nargs="*", default=[], help="rows to measure; default all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scenario", choices=[*SCENARIOS, "both"], default="both")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {
        "benchmark": "cross_institution",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(arguments.threads),
        "packages": package_versions(),
        "arguments": vars(arguments),
        "scenarios": {},
    }
    for name, spurious in SCENARIOS.items():
        if arguments.scenario in (name, "both"):
            began = time.perf_counter()
            result["scenarios"][name] = scenario(spurious, arguments)
            result["scenarios"][name]["seconds"] = round(time.perf_counter() - began)
    json.dump(result, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
