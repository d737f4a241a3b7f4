"""What preferring references over texts with one error (DPO) changes in a report model, on patients it has not seen.

    python benchmarks/preference.py --work DIR --output benchmarks/preference.json --arms hard --scored-notes 2400
    python benchmarks/preference.py --work DIR --output benchmarks/preference_own.json --arms own own_control \\
        --chosen-on 1000
    python benchmarks/preference.py --work DIR --output benchmarks/preference_own_second.json --arms own own_control \\
        --seed 3 --patients 6000 --test 0.25 --development 0.3 --epochs 2 --looked-at "nothing; chosen elsewhere"

A base model first learns to write the impression of synthetic radiology reports (SFT). From that run, others are tuned
on pairs of texts that differ in one fact. The held-out patients, their notes and the greedy decoding are the same
throughout; changes are after minus before, patients resampled with both sides. The patients of `--chosen-on` held-out
notes, on whom settings were chosen, are left out of every figure. Runs that DIR already holds are not made again.
Synthetic scores are regression tests, not claims about real reports.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from measuring import machine

from clinical_nlp.config import load_config
from clinical_nlp.recipes import report
from clinical_nlp.runs import Run, package_versions, write_json
from clinical_nlp.tasks.faithfulness import COUNTS
from clinical_nlp.tasks.report_scores import ROUGE, SCORES, SECTIONS, Measured, changes, estimates

KEPT = ("fact_f1", "invention_rate", "flipped_rate", "flipped_source_rate", "side_error_rate", "error_rate", "rouge1",
        "rouge2", "rougeL")  # fmt: skip
SWAPPED: dict[str, Any] = {
    "preference.pairs": 1200,
    "preference.candidates": 3,
    "preference.tokens": "differing",
    "preference.errors": ["finding_swapped", "negation"],
    "preference.learning_rate": 2.5e-5,
}
OWN: dict[str, Any] = {
    "preference.pairs": 0,
    "preference.own": 4058,
    "preference.learning_rate": 1.5e-4,
    "preference.epochs": 2.0,
}
ARMS: dict[str, dict[str, Any]] = {
    "hard": SWAPPED,
    "hard_control": SWAPPED | {"preference.beta": 1e-6},
    "planted": {"preference.pairs": 900, "preference.tokens": "all", "preference.candidates": 1},
    "own": OWN,
    "own_control": OWN | {"preference.beta": 1e-6},
}
"""`hard`: of four errors planted for each pair the one that the model finds likeliest, and only the tokens that differ
count. `planted`: errors of every kind as they come, and both texts count as they are. `own`: what the model turned
round in drafts for all patients of the development and training parts, planted in their references, and the mirror
images. A control has the same pairs and learns their preferred texts alone: such a beta gives DPO no gradient."""
LOOKED_AT = (
    "own was scored once; four settings with drafts of which one error was taken back were looked at before, on the "
    "patients left out; hard and two like it at higher rates had been scored on held-out patients of all kinds"
)


def main() -> None:
    """Run what is missing and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--base-model", default="builtin:tiny")
    parser.add_argument("--patients", type=int, default=14_000, help="of one institution; about 40 %% have a pair")
    parser.add_argument("--test", type=float, default=0.45, help="share of the patients that is held out")
    parser.add_argument(
        "--development", type=float, default=0.05, help="share that SFT does not see, and whose drafts come first"
    )
    parser.add_argument(
        "--epochs", type=float, default=1.5, help="of SFT; the longer it learns, the less is left to gain"
    )
    parser.add_argument("--scored-notes", type=int, help="of the held-out patients; default all")
    parser.add_argument("--chosen-on", type=int, default=0, help="held-out notes whose patients are not reported")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--looked-at", default=LOOKED_AT, help="what was scored on these patients before, in words")
    parser.add_argument("--seed", type=int, default=1, help="of the hospital, its patients, the split and the training")
    options = parser.parse_args()
    import torch

    common = {
        "corpus.options": {"institutions": 1, "patients": options.patients, "covariate": 1.0,
                           "notes_per_patient": [4, 8], "seed": options.seed},
        "split": {"name": "random", "development": options.development, "test": options.test},
        "strategy.name": "full",
        "training.batch_size": 16,
        "training.precision": "bf16",
        "generation_batch": 64,
        "verify": "none",
        "instructions.findings_impression": "Impression.",
        "seed": options.seed,
    }  # fmt: skip
    first = finished(
        options.work / "sft",
        common
        | {
            "base_model": options.base_model,
            "training.epochs": options.epochs,
            "training.learning_rate": 1.5e-3,
            "training.save_steps": 250,
        },
    )
    written = pq.read_table(first.path / SCORES, filters=[("system", "=", "test")])["patient_id"].to_pylist()
    order = np.random.default_rng(5).permutation(len(written))
    known = {written[int(place)] for place in order[: options.chosen_on]}
    rows: list[dict[str, Any]] = []
    runs: dict[str, Run] = {}
    for arm in options.arms:
        settings = {"base_model": str(first.path), "scored_notes": options.scored_notes, **ARMS[arm]}
        run = finished(options.work / arm, common | settings)
        runs[arm] = run
        rows.append(
            {
                "arm": arm,
                "settings": run.manifest["config"]["preference"],
                "training": run.manifest["training"],
                **reported(run, known, options.seed),
            }
        )
        if (tuned := arm.removesuffix("_control")) != arm and tuned in runs:
            rows[-1] |= against(runs[tuned], run, known, options.seed)
        print(arm, *(f"{name} {rows[-1][f'change.{name}']['value']:+.4f}" for name in KEPT), flush=True)
        result = {
            "benchmark": "preference",
            "machine": machine(torch.get_num_threads()) | {"packages": package_versions()},
            "sft": {"split": first.manifest["split"], "training": first.manifest["training"]},
            "patients_left_out": len(known),
            "settings_looked_at": options.looked_at,
            "rows": rows,
        }
        write_json(options.output, result)
    print(json.dumps({"written": str(options.output)}))


def reported(run: Run, left_out: set[str], seed: int) -> dict[str, Any]:
    """Return the scores before and after and their changes, without the patients on whom settings were chosen."""
    before, patients = measured(run, "before", left_out)
    after, _ = measured(run, "test", left_out)
    common: dict[str, Any] = {"part": "test", "seed": seed}
    found = changes(before, after, patients, **common)
    for prefix, side in (("before.", before), ("after.", after)):
        found |= estimates(side, patients, prefix=prefix, **common)
    return {
        f"{when}.{name}": finite(asdict(found[f"{when}.{name}"]))
        for when in ("before", "after", "change")
        for name in KEPT
    }


def against(run: Run, control: Run, left_out: set[str], seed: int) -> dict[str, Any]:
    """Return the scores of a run minus those of its control, on the same notes."""
    without, patients = measured(control, "test", left_out)
    found = changes(without, measured(run, "test", left_out)[0], patients, part="test", seed=seed)
    return {f"against_control.{name}": finite(asdict(found[f"change.{name}"])) for name in KEPT}


def measured(run: Run, system: str, left_out: set[str]) -> tuple[Measured, list[str]]:
    """Return what the scores of a run are made of, and the patient of each note."""
    rows = pq.read_table(run.path / SCORES, filters=[("system", "=", system)]).to_pylist()
    rows = [row for row in rows if row["patient_id"] not in left_out]
    columns = ([f"facts_{name}" for name in COUNTS], ROUGE, SECTIONS)
    parts = (np.array([[row[name] for name in names] for row in rows]) for names in columns)
    return Measured(*parts), [row["patient_id"] for row in rows]


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """Write what is undefined as null."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}


def finished(output: Path, settings: dict[str, Any]) -> Run:
    """Return the run of these settings, made if it is not there."""
    if (output / "manifest.json").is_file():
        return Run.load(output)
    resume = (output / "config.yaml").is_file()
    return report.run(load_config(report.CONFIG, None, settings), output, resume=resume)


if __name__ == "__main__":
    main()
