"""Every strategy on a decoder and on an encoder, for NER: score, trained parameters, peak memory, time.

    CLINICAL_NLP_DATA=data python benchmarks/strategies.py --encoder FOLDER --output benchmarks/strategies.json

Each cell is one run of the recipe `ner` in a process of its own, one after the other, with the same patients, seed and
number of steps; only the strategy, with its default learning rate, differs. Rows that the output already holds are not
run again. Peak memory is what the process could not give back (anonymous and shared pages, not mapped files), sampled
while it trains and scores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from clinical_nlp.adaptation import STRATEGIES
from clinical_nlp.runs import package_versions, write_json

CORPORA: dict[str, tuple[int, list[str]]] = {
    "ncbi_disease": (400, []),
    "synthetic_hospitals": (40, ["--corpus.options.patients", "60"]),
}
"""Steps of a cell (notes are longer than sentences, so that tokens are about as many), and options of the corpus."""


def main() -> None:
    """Run the cells that are missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="folder of an encoder")
    parser.add_argument("--decoder", default="builtin:tiny")
    parser.add_argument("--corpora", nargs="+", default=list(CORPORA), choices=list(CORPORA))
    parser.add_argument("--steps", type=int, help="optimiser steps of a cell, at most; default by corpus")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    result = json.loads(options.output.read_text("utf-8")) if options.output.is_file() else {"rows": []}
    result["benchmark"] = "strategies"
    result["machine"] = {
        "processor": _processor(),
        "threads": options.threads,
        "system": platform.platform(),
        "packages": package_versions(),
    }
    done = {(row["corpus"], row["base"], row["strategy"], row["attention"]) for row in result["rows"]}
    cells = [
        (corpus, base, strategy, attention)
        for corpus in options.corpora
        for base in ("decoder", "encoder")
        for strategy in STRATEGIES
        for attention in (
            ("bidirectional", "causal")
            if base == "decoder" and strategy in ("full", "lora", "qlora") and corpus == "ncbi_disease"
            else ("bidirectional",)
        )
    ]
    for corpus, base, strategy, attention in cells:
        if (corpus, base, strategy, attention) in done:
            continue
        model = options.encoder if base == "encoder" else options.decoder
        row = {
            "corpus": corpus,
            "base": base,
            "model": Path(model).name if base == "encoder" else model,
            "strategy": strategy,
            "attention": attention,
        }
        row |= run_cell(corpus, model, strategy, attention, options)
        print(json.dumps(row), flush=True)
        result["rows"].append(row)
        write_json(options.output, result)


def run_cell(corpus: str, model: str, strategy: str, attention: str, options: argparse.Namespace) -> dict[str, object]:
    """Run one cell in its own process and return its figures."""
    folder = Path(tempfile.mkdtemp(prefix="strategies"))
    steps, settings = CORPORA[corpus]
    command = [sys.executable, "-m", "clinical_nlp", "run", "ner", "--corpus.name", corpus, *settings]
    command += ["--base_model", model, "--strategy.name", strategy, "--max_steps", str(options.steps or steps)]
    command += ["--attention", attention] if attention == "causal" else []
    command += ["--seed", str(options.seed), "--output", str(folder / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    began, peak = time.monotonic(), 0
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, _kept(process.pid))
        time.sleep(0.2)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} failed: {process.stderr.read() if process.stderr else ''}")
    manifest = json.loads((folder / "run" / "manifest.json").read_text("utf-8"))
    score = json.loads((folder / "run" / "metrics.json").read_text("utf-8"))["test.f1_strict"]
    training = manifest["training"]
    shutil.rmtree(folder)
    return {
        "f1_strict": {key: score[key] for key in ("value", "low", "high", "n_patients", "n_notes", "part")},
        "trained_parameters": training["trainable_parameters"],
        "parameters": training["parameters"],
        "peak_memory_mib": round(peak / 1024),
        "steps": training["steps"],
        "tokens": training["tokens"],
        "training_seconds": training["seconds"],
        "seconds": round(time.monotonic() - began, 1),
    }


def _kept(pid: int) -> int:
    """Return the KiB that a process holds and the system cannot reclaim."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("utf-8")
    except OSError:
        return 0
    return sum(int(value) for value in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+)", status, re.M))


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
