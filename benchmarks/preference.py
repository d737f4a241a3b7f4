"""What preferring references over planted errors (DPO) changes in a report model, on patients it has not seen.

    python benchmarks/preference.py --work DIR --output benchmarks/preference.json

A base model first learns to write the impression of synthetic radiology reports (SFT). From that run, others are tuned
on pairs of a reference and the same text with one clinical error. The held-out patients, their notes and the greedy
decoding are the same throughout; changes are after minus before, patients resampled with both sides. Runs that DIR
already holds are not made again. Synthetic scores are regression tests, not claims about real reports.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from clinical_nlp.config import load_config
from clinical_nlp.recipes import report
from clinical_nlp.runs import Run, package_versions, write_json

KEPT = ("fact_f1", "invention_rate", "flipped_rate", "flipped_source_rate", "side_error_rate", "error_rate", "rouge1",
        "rouge2", "rougeL")  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "planted": {"preference.pairs": 900, "preference.learning_rate": 1.5e-5},
    "own": {"preference.pairs": 0, "preference.own": 1500, "preference.epochs": 2.0},
    "planted_and_own": {"preference.pairs": 1000, "preference.own": 1000},
    "swapped": {"preference.pairs": 3000, "preference.errors": ["finding_swapped"], "preference.learning_rate": 3e-5},
    "control": {"preference.pairs": 1000, "preference.own": 1000, "preference.beta": 1e-6},
}
"""`control` has the pairs of `planted_and_own` and learns their references alone: such a beta gives DPO no gradient."""


def main() -> None:
    """Run what is missing and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--base-model", default="builtin:tiny")
    parser.add_argument("--patients", type=int, default=10_000, help="of one institution; about a third have a pair")
    parser.add_argument(
        "--epochs", type=float, default=1.5, help="of SFT; the longer it learns, the less is left to gain"
    )
    parser.add_argument("--beta", type=float, default=0.3)
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="of DPO")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    common = {
        "corpus.options": {"institutions": 1, "patients": options.patients, "covariate": 1.0,
                           "notes_per_patient": [4, 8]},
        "split": {"name": "random", "development": 0.05, "test": 0.12},
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
    rows = []
    for arm in options.arms:
        run = finished(
            options.work / arm,
            common
            | {
                "base_model": str(first.path),
                "preference.beta": options.beta,
                "preference.learning_rate": options.learning_rate,
                **ARMS[arm],
            },
        )
        rows.append(
            {
                "arm": arm,
                "settings": run.manifest["config"]["preference"],
                "training": run.manifest["training"],
                **{f"change.{name}": run.metrics[f"change.{name}"] for name in KEPT},
                **{f"after.{name}": run.metrics[f"test.{name}"] for name in KEPT},
            }
        )
        print(arm, *(f"{name} {rows[-1][f'change.{name}']['value']:+.4f}" for name in KEPT))
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        processor = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown")
    result = {
        "benchmark": "preference",
        "machine": {"processor": processor, "system": platform.platform(), "packages": package_versions()},
        "sft": {
            "split": first.manifest["split"],
            "training": first.manifest["training"],
            **{name: first.metrics[f"test.{name}"] for name in KEPT},
            **{key: value for key, value in first.metrics.items() if key.startswith("baseline")},
        },
        "rows": rows,
    }
    write_json(options.output, result)
    print(json.dumps({"written": str(options.output)}))


def finished(output: Path, settings: dict[str, Any]) -> Run:
    """Return the run of these settings, made if it is not there."""
    if (output / "manifest.json").is_file():
        return Run.load(output)
    resume = (output / "config.yaml").is_file()
    return report.run(load_config(report.CONFIG, None, settings), output, resume=resume)


if __name__ == "__main__":
    main()
