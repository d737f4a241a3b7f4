"""Clinical coding beside a bag of words, on case reports and on synthetic notes; and whether its evidence is right.

    CLINICAL_NLP_DATA=data python benchmarks/coding.py --encoder FOLDER --work DIR --output benchmarks/coding.json

CodiEsp is scored on its development part (250 cases), the synthetic hospital on new patients. Evidence can only be
checked where the corpus says where a code stands: on the synthetic notes, a code that is proposed and right counts as
well placed where one of its three spans overlaps a gold mention of that code that the patient has. Runs that DIR
already holds are not made again; rows of other cases stay as they were in the output.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from clinical_nlp.config import load_config
from clinical_nlp.notes.corpus import load_corpus
from clinical_nlp.recipes import coding
from clinical_nlp.runs import Estimate, Run, package_versions, write_json
from clinical_nlp.statistics.intervals import by_patient, patient_bootstrap

CASES: dict[str, dict[str, Any]] = {
    "codiesp, encoder, head": {
        "corpus.name": "codiesp", "strategy.name": "head", "training.epochs": 5,
        "baselines": ["tfidf", "zero_shot", "dictionary"],
    },
    "synthetic, encoder, full": {
        "corpus.options": {"institutions": 1, "patients": 800}, "strategy.name": "full", "training.epochs": 4,
        "training.learning_rate": 2e-4, "training.head_learning_rate": 2e-3, "training.save_steps": 60,
        "baselines": ["tfidf", "dictionary"],
    },
    "codiesp, builtin:tiny, qlora": {
        "corpus.name": "codiesp", "base_model": "builtin:tiny", "strategy.name": "qlora", "training.epochs": 2,
        "baselines": ["zero_shot", "few_shot"], "baseline_documents": 25,
    },
}  # fmt: skip

SHOWN = ("micro_f1", "map", "precision_at_5", "precision_at_8", "precision_at_15", "auc_micro")


def main() -> None:
    """Make the runs that are missing and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--encoder", required=True, help="folder of an encoder")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    known = json.loads(options.output.read_text("utf-8"))["rows"] if options.output.is_file() else []
    rows = [row for row in known if row["case"] not in options.cases]
    for name in options.cases:
        settings = {"base_model": options.encoder, "training.precision": "bf16", **CASES[name]}
        config = load_config(coding.CONFIG, None, settings)
        folder = options.work / name.replace(", ", "-").replace(":", "-")
        done = (folder / "manifest.json").is_file()
        run = Run.load(folder) if done else coding.run(config, folder, resume=(folder / "config.yaml").is_file())
        figures = {key: entry for key, entry in run.metrics.items() if key.rpartition(".")[2] in SHOWN}
        row: dict[str, Any] = {
            "case": name,
            "finished": run.manifest["finished_at"],
            "settings": CASES[name],
            "steps": run.manifest["training"]["steps"],
            "seconds": run.manifest["duration_seconds"],
            "codes": run.manifest["codes"],
            "metrics": figures,
        }
        if config.corpus.name == "synthetic_hospitals":
            row["evidence"] = evidence(run, config)
        rows.append(row)
        said = {key: round(figures[f"test.{key}"]["value"], 3) for key in ("micro_f1", "map")}
        print(name, said, row.get("evidence", ""), flush=True)
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        processor = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown")
    machine = {"processor": processor, "system": platform.platform(), "packages": package_versions()}
    rows.sort(key=lambda row: list(CASES).index(row["case"]))
    write_json(options.output, {"benchmark": "coding", "machine": machine, "rows": rows})


def evidence(run: Run, config: coding.CodingConfig) -> dict[str, Any]:
    """Share of right proposals with a span on a gold mention, by patient."""
    corpus = load_corpus(config.corpus.name, **config.corpus.options)
    gold = defaultdict(list)
    for span in corpus.spans.to_pylist():
        if (span["presence"], span["modality"], span["experiencer"]) == ("present", "actual", "patient"):
            gold[span["note_id"], span["icd10cm_code"]].append((span["start"], span["end"]))
    rows = [row for row in pq.read_table(run.path / "predictions.parquet").to_pylist() if row["gold"]]
    placed = [
        any(
            span["start"] < end and start < span["end"]
            for span in row["evidence"]
            for start, end in gold[span["note_id"], row["code"]]
        )
        for row in rows
    ]
    counts = by_patient([row["patient_id"] for row in rows], np.array([[hit, 1] for hit in placed], float))
    share: Estimate = patient_bootstrap(counts, lambda c: c[..., 0] / c[..., 1], n_notes=len(rows))
    return {"right_codes": len(rows), "well_placed": int(sum(placed)), "share": share.value, "low": share.low,
            "high": share.high, "patients": share.n_patients}  # fmt: skip


if __name__ == "__main__":
    main()
