"""Speed of the patient permutation tests beside naive loops: `python benchmarks/drift_speed.py`.

Every case runs in a fresh process that holds nothing else, with the plan of relabellings built inside the clock. The
naive loop beside it does the textbook thing (index the kernel, fit the classifier or average the features anew for
every relabelling) for a few relabellings; its time for all of them is that times their number, and marked so. Wall
and processor seconds (of all threads together) are both there: other work on the machine, which the load average tells
of, makes the former longer, and on free cores it is at most the latter.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Peak, in_fresh_process, machine

from clinical_nlp.runs import package_versions

CASES: dict[str, dict[str, Any]] = {
    "mmd, ten notes a patient": {
        "test": "mmd", "notes": 10_000, "dimensions": 384, "notes_a_patient": 10, "naive": 3, "seconds_allowed": 10
    },
    "mmd, one note a patient": {
        "test": "mmd", "notes": 10_000, "dimensions": 384, "notes_a_patient": 1, "naive": 3, "seconds_allowed": 10
    },
    "domain classifier, ten notes a patient": {
        "test": "classifier", "notes": 20_000, "dimensions": 768, "notes_a_patient": 10, "naive": 2,
        "seconds_allowed": 30,
    },
    "domain classifier, one note a patient": {
        "test": "classifier", "notes": 20_000, "dimensions": 768, "notes_a_patient": 1, "naive": 2,
        "seconds_allowed": 30,
    },
    "mmd by random features, ten notes a patient": {
        "test": "mmd", "notes": 1_000_000, "dimensions": 384, "notes_a_patient": 10, "naive": 1, "seconds_allowed": 60,
        "gib_allowed": 4,
    },
}  # fmt: skip


def drawn(case: dict[str, Any]) -> tuple[np.ndarray, list[str], list[str]]:
    """Float32 vectors with a share of every patient's own, ids, and institutions, half each."""
    generator = np.random.default_rng(0)
    n, many = case["notes"], case["notes_a_patient"]
    vectors = generator.standard_normal((n, case["dimensions"]), dtype=np.float32)
    for start in range(0, n, 100_000):  # in pieces: this must not be what takes the memory
        rows = slice(start, start + 100_000)
        patients = -(-len(vectors[rows]) // many)
        own = generator.standard_normal((patients, case["dimensions"]), dtype=np.float32)
        vectors[rows] += np.float32(0.65) * np.repeat(own, many, axis=0)[: len(vectors[rows])]
    ids = [f"patient-{note // many}" for note in range(n)]
    sides = ["a" if 2 * note < n else "b" for note in range(n)]
    return vectors, ids, sides


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What the work returns, and its seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    found = work()
    spent = {"wall_seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}
    return found, {name: round(value, 2) for name, value in spent.items()}


def measured(case: dict[str, Any]) -> dict[str, Any]:
    """Run a case and its naive loop."""
    from clinical_nlp.statistics.domain_classifier import domain_classifier_test
    from clinical_nlp.statistics.mmd import mmd_test
    from clinical_nlp.statistics.permutation import PermutationPlan

    load = os.getloadavg()[0]
    vectors, ids, sides = drawn(case)
    test = mmd_test if case["test"] == "mmd" else domain_classifier_test
    case["permutations"] = 1000

    def ours() -> Any:
        return test(vectors, PermutationPlan(ids, sides, n_permutations=case["permutations"]))

    with Peak() as peak:
        result, spent = timed(ours)
    found: dict[str, Any] = {
        "case": case,
        "load_average_before": round(load, 1),
        "ours": {
            **spent,
            "peak_gib": round(peak.bytes / 2**30, 2),
            "of_which_input_gib": round(vectors.nbytes / 2**30, 2),
        },
        "p_value": result.p_value,
        "note": result.note,
    }
    naive = {"mmd": naive_mmd, "classifier": naive_classifier}[case["test"]]
    if case["notes"] > 20_000:
        naive = naive_features
    _, spent = timed(lambda: naive(vectors, np.array(sides) == "b", case["naive"]))
    scale = case["permutations"] / case["naive"]
    found["naive"] = {
        "relabellings_run": case["naive"],
        **{f"{name}_extrapolated_to_{case['permutations']}": round(value * scale) for name, value in spent.items()},
    }
    small = found["ours"]["peak_gib"] <= case.get("gib_allowed", np.inf)
    found["within"] = {
        "by_wall_seconds": small and found["ours"]["wall_seconds"] <= case["seconds_allowed"],
        "by_processor_seconds": small and found["ours"]["processor_seconds"] <= case["seconds_allowed"],
    }
    return found


def naive_mmd(vectors: np.ndarray, is_target: np.ndarray, relabellings: int) -> list[float]:
    """Index the kernel matrix of the notes anew for every relabelling; the matrix is made once."""
    squared = (vectors**2).sum(axis=1)
    distances = np.maximum(squared[:, None] + squared[None] - 2 * vectors @ vectors.T, 0)
    kernel = np.exp(-distances / (2 * np.median(distances[:500, :500])))
    generator, values = np.random.default_rng(1), []
    for _ in range(relabellings):
        target = generator.permutation(is_target)
        x, y = np.flatnonzero(target), np.flatnonzero(~target)
        xx, yy, xy = kernel[np.ix_(x, x)], kernel[np.ix_(y, y)], kernel[np.ix_(x, y)]
        within = (xx.sum() - np.trace(xx)) / (len(x) * (len(x) - 1)) + (yy.sum() - np.trace(yy)) / (
            len(y) * (len(y) - 1)
        )
        values.append(float(within - 2 * xy.mean()))
    return values


def naive_classifier(vectors: np.ndarray, is_target: np.ndarray, relabellings: int) -> list[float]:
    """Fit and score five folds of scikit-learn's ridge classifier for every relabelling."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import cross_val_predict

    generator, values = np.random.default_rng(1), []
    for _ in range(relabellings):
        target = generator.permutation(is_target)
        scores = cross_val_predict(RidgeClassifier(768.0), vectors, target, cv=5, method="decision_function")
        values.append(float(roc_auc_score(target, scores)))
    return values


def naive_features(vectors: np.ndarray, is_target: np.ndarray, relabellings: int) -> list[float]:
    """Map and average both sides' notes anew for every relabelling."""
    from clinical_nlp.statistics.random_features import RandomFeatures

    features = RandomFeatures(vectors.shape[1], 30.0)
    generator, values = np.random.default_rng(1), []
    for _ in range(relabellings):
        target = generator.permutation(is_target)
        sums = np.zeros((2, features.n_features))
        for start in range(0, len(vectors), 8192):
            mapped = features.transform(vectors[start : start + 8192])
            here = target[start : start + 8192]
            sums += np.stack([mapped[~here].sum(axis=0), mapped[here].sum(axis=0)])
        values.append(float(((sums[1] / target.sum() - sums[0] / (~target).sum()) ** 2).sum()))
    return values


def main() -> None:
    """Run all cases, each in a fresh process, and write one JSON object."""
    if sys.argv[1:2] == ["child"]:
        print(json.dumps(measured(json.load(sys.stdin)["case"])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="a part of the names of cases")
    arguments = parser.parse_args()
    found = {}
    for name, case in CASES.items():
        if arguments.only is None or arguments.only in name:
            specification = {"threads": arguments.threads, "case": case}
            found[name] = in_fresh_process(str(Path(__file__)), ".", specification, cpu=True)
            sys.stderr.write(f"{name}: {json.dumps(found[name])}\n")
    whole = {
        "benchmark": "drift speed",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(arguments.threads),
        "packages": package_versions(),
        "cases": found,
    }
    arguments.out.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
