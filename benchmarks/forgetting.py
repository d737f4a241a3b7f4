"""What a model forgets of its first notes when it reads those of one institution, and what keeps it from that.

    CLINICAL_NLP_DATA=data python benchmarks/forgetting.py --work DIR --output benchmarks/forgetting.json

A base model first reads the source notes (MTSamples), all weights moving. Then it reads the notes of one synthetic
institution: plainly, with replay, with EWC and with L2-SP, each time with every weight moving, the same learning rate
and the same new notes. Perplexity of both kinds of notes is on held-out patients, before and after the second reading.
Steps that DIR already holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from clinical_nlp.config import load_config
from clinical_nlp.recipes import dapt
from clinical_nlp.runs import Run, package_versions, write_json

SOURCE = "mtsamples"
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "replay-0.3": {"replay.ratio": 0.3},
    "replay-0.5": {"replay.ratio": 0.5},
    "ewc": {"forgetting.name": "ewc", "forgetting.corpus": SOURCE, "forgetting.strength": 1.0},
    "l2_sp": {"forgetting.name": "l2_sp", "forgetting.strength": 1.0},
}


def main() -> None:
    """Run what is missing and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--base-model", default="builtin:tiny")
    parser.add_argument("--source-steps", type=int, default=250)
    parser.add_argument("--patients", type=int, default=150)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--scored", type=int, default=100, help="held-out patients of the source that are scored")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--strengths", nargs="+", type=float, help="of ewc and l2_sp, instead of 1")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    common = {"strategy.name": "full", "training.precision": "bf16", "seed": options.seed}
    first = finished(
        options.work / "source",
        common | {"base_model": options.base_model, "corpus.name": SOURCE, "max_steps": options.source_steps},
    )
    rows = []
    for arm in options.arms:
        for strength in options.strengths or [1.0] if "forgetting.name" in ARMS[arm] else [None]:
            settings = ARMS[arm] | ({} if strength is None else {"forgetting.strength": strength})
            run = finished(
                options.work / (arm if strength is None else f"{arm}-{strength:g}"),
                common
                | {
                    "base_model": str(first.path),
                    "corpus.name": "synthetic_hospitals",
                    "corpus.options": {"institutions": 1, "patients": options.patients, "seed": 7},
                    "training.epochs": options.epochs,
                    "scored_patients": options.scored,
                    "replay.name": SOURCE,
                    "replay.ratio": 0.0,
                    **settings,
                },
            )
            rows.append(
                {
                    "arm": arm,
                    "settings": settings,
                    "steps": run.manifest["training"]["steps"],
                    "seconds": run.manifest["training"]["seconds"],
                    **{
                        name: run.metrics[f"test.{name}"]
                        for name in (
                            "source_perplexity_before", "source_perplexity", "source_perplexity_ratio",
                            "perplexity_before", "perplexity", "perplexity_ratio",
                        )
                    },
                }
            )  # fmt: skip
            print(arm, settings, *(f"{key} {rows[-1][key]['value']:.3f}" for key in rows[-1] if "ratio" in key))
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        processor = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown")
    result = {
        "benchmark": "forgetting",
        "machine": {"processor": processor, "system": platform.platform(), "packages": package_versions()},
        "source": {"corpus": SOURCE, "perplexity": first.metrics["test.perplexity"]},
        "rows": rows,
    }
    write_json(options.output, result)
    print(json.dumps({"written": str(options.output)}))


def finished(output: Path, settings: dict[str, Any]) -> Run:
    """Return the run of these settings, made if it is not there."""
    if (output / "manifest.json").is_file():
        return Run.load(output)
    resume = (output / "config.yaml").is_file()
    return dapt.run(load_config(dapt.CONFIG, None, settings), output, resume=resume)


if __name__ == "__main__":
    main()
