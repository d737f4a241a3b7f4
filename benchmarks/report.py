"""Collect the figures of finished report runs in one file, with what they were made from and on which machine.

clinical-nlp run report --corpus mts_dialog --max_new_tokens 256 --too_long cut_source --output runs/mts_dialog
python benchmarks/report.py --runs runs/mts_dialog runs/aci_bench --output benchmarks/report.json
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from clinical_nlp.runs import Run, package_versions, write_json

KEPT = ("corpus", "kind", "window", "split", "training", "generation", "duration_seconds")


def main() -> None:
    """Read the runs and write the file; no text of a note is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for run in map(Run.load, options.runs):
        manifest = run.manifest
        rows.append(
            {
                "run": run.path.name,
                "config": without_folders(manifest["config"]),
                **{name: manifest[name] for name in KEPT if name in manifest},
                "metrics": run.metrics,
            }
        )
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        processor = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown")
    machine = {"processor": processor, "system": platform.platform(), "packages": package_versions()}
    write_json(options.output, {"benchmark": "report", "machine": machine, "rows": rows})
    print(json.dumps({"written": str(options.output)}))


def without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config in which a path is its last part: where files lie on a machine is nobody's concern."""
    shown = {**config, "corpus": {**config["corpus"], "path": None}}
    for name in ("base_model", "bertscore_model"):
        shown[name] = config[name] and Path(config[name]).name
    return shown


if __name__ == "__main__":
    main()
