"""What is left of the institution after an eraser: curves of fresh probes, and LEACE beside the floor of its formula.

    python benchmarks/leakage.py --output benchmarks/leakage.json
    python benchmarks/leakage.py --encoder FOLDER --patients 1200 --output benchmarks/leakage_encoder.json

Simulated: Gaussian notes of two institutions whose means differ, where the best linear probe on new patients is known
exactly once LEACE is fitted; over 20 fits for each number of patients. Notes: two synthetic hospitals (`covariate`
0.5, `label` 0.5), hashed TF-IDF in 64 dimensions or an encoder's states reduced to 64; three sets of patients: a
quarter for erasers, a half for training probes, a quarter for scoring them.
"""

from __future__ import annotations

import argparse
import datetime
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from measuring import machine
from scipy import stats

from clinical_nlp.corpora import synthetic_hospitals
from clinical_nlp.invariance import ERASERS
from clinical_nlp.invariance.erasers import fit_erasers
from clinical_nlp.runs import package_versions, write_json
from clinical_nlp.statistics.probes import ProbedNotes, leace_floor, leace_floor_of, probe_curve
from clinical_nlp.statistics.text_measures import hashed_features

DIMENSIONS = 64
TOLERANCE = 0.05
SHARES = (0.25, 0.75)
"""A quarter of the patients fits erasers, a half trains probes, a quarter scores them."""
PROBES = ("linear", "quadratic", "mlp", "neighbours")


def main() -> None:
    """Measure and write one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=5000, help="of each institution, eraser and probes together")
    parser.add_argument("--encoder", help="folder of an encoder; default hashed TF-IDF")
    parser.add_argument("--max-tokens", type=int, default=96, help="with an encoder: tokens read of each note")
    parser.add_argument("--fits", type=int, default=20, help="simulated fits for each number of patients")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    began, processor = time.perf_counter(), time.process_time()
    result: dict[str, Any] = {
        "benchmark": "leakage",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(options.threads),
        "packages": package_versions(),
        "arguments": {key: value for key, value in vars(options).items() if key not in ("output", "encoder")},
        "representation": "encoder states, PCA 64" if options.encoder else "hashed TF-IDF, SVD 64",
        "tolerance": TOLERANCE,
    }
    if not options.encoder:
        result["simulated"] = simulated(options.fits, options.seed)
        write_json(options.output, result)
    result["notes"] = notes(options)
    gaps = [row["linear_minus_floor"] for row in result["notes"]["leace"]]
    gaps += [row["exact_mean"] - row["floor_mean"] for row in result.get("simulated", [])]
    result["largest_distance_from_the_floor"] = max(map(abs, gaps))
    result["holds"] = result["largest_distance_from_the_floor"] <= TOLERANCE
    result["seconds"] = {"wall": time.perf_counter() - began, "processor": time.process_time() - processor}
    write_json(options.output, result)


def simulated(fits: int, seed: int) -> list[dict[str, Any]]:
    """For each d and number of patients: the exact AUC of the best linear probe after LEACE, and what its formula says.

    A note is its patient's mean (variance 0.3) plus its own part (0.7), the institutions' means 3 apart; after the
    eraser the best direction w solves S w = difference of means, and AUC = Phi(sqrt(difference' w / 2)).
    """
    found = []
    for d in (16, 64):
        for patients in (50, 150, 500, 1500):
            exact, floors, published = [], [], []
            for fit in range(fits):
                rng = np.random.default_rng([seed, d, patients, fit])
                own = np.repeat(rng.normal(size=(2 * patients, d)) * math.sqrt(0.3), 5, axis=0)
                x = own + rng.normal(size=own.shape) * math.sqrt(0.7)
                x[: len(x) // 2, 0] += 3
                labels = ["a"] * (len(x) // 2) + ["b"] * (len(x) // 2)
                people = [f"p{row // 5}" for row in range(len(x))]
                eraser = fit_erasers(x, labels, people, ["leace"])["leace"]
                linear = np.eye(d) - eraser.left @ eraser.right
                moved, spread = 3 * linear[:, 0], linear @ linear.T
                best = float(moved @ np.linalg.pinv(spread, rcond=1e-9) @ moved)
                exact.append(float(stats.norm.cdf(math.sqrt(best / 2))))
                floors.append(leace_floor_of(ProbedNotes(x, labels, people)).auc)
                published.append(leace_floor(d, len(x), 5, 0.3))
            reach = 1.96 * float(np.std(exact, ddof=1)) / math.sqrt(fits)
            row = {"d": d, "patients": 2 * patients, "notes": 10 * patients, "fits": fits}
            row |= {
                "exact_mean": np.mean(exact),
                "exact_low": np.mean(exact) - reach,
                "exact_high": np.mean(exact) + reach,
            }
            found.append(row | {"floor_mean": np.mean(floors), "floor_of_true_icc": published[0]})
    return found


def notes(options: argparse.Namespace) -> dict[str, Any]:
    """Curves of every probe on real features of synthetic notes, raw and erased."""
    corpus = synthetic_hospitals.load(
        institutions=2, patients=options.patients, seed=options.seed, covariate=0.5, label=0.5
    )
    texts, people, labels = (corpus.notes[name].to_pylist() for name in ("text", "patient_id", "institution"))
    if options.encoder:
        from clinical_nlp.models.embeddings import embed_notes

        vectors = embed_notes(options.encoder, texts, max_tokens=options.max_tokens).astype(np.float64)
    else:
        vectors = hashed_features(texts, dimensions=DIMENSIONS, seed=options.seed).astype(np.float64)
    place = {person: at for at, person in enumerate(np.random.default_rng(options.seed).permutation(np.unique(people)))}
    part_of = np.searchsorted(SHARES, [place[person] / len(place) for person in people], side="right")
    if vectors.shape[1] > DIMENSIONS:  # fitted on the eraser's patients, blind to institutions
        fit = vectors[part_of == 0]
        axes = np.linalg.eigh(np.cov(fit.T))[1][:, ::-1][:, :DIMENSIONS]
        vectors = (vectors - fit.mean(0)) @ axes
    everything = ProbedNotes(vectors, labels, people)
    fit, train, test = (everything.select(part_of == part) for part in range(3))
    found: dict[str, Any] = {
        "n_patients": {name: len(part.people) for name, part in (("eraser", fit), ("train", train), ("test", test))},
        "n_notes": len(texts),
        "dimensions": vectors.shape[1],
    }
    words = ProbedNotes(texts, labels, people)
    found["raw"] = [curve(kind, train, test, options.seed) for kind in PROBES]
    if not options.encoder:
        found["text"] = [curve("words", words.select(part_of == 1), words.select(part_of == 2), options.seed)]
    erasers = fit_erasers(fit.contents, fit.labels, fit.patients, list(ERASERS))
    for name in ("mean_centring", "inlp"):
        erased = [erase(erasers[name], part) for part in (train, test)]
        found[name] = {"n_directions": erasers[name].n_directions, "note": erasers[name].note}
        found[name]["curves"] = [curve(kind, *erased, options.seed) for kind in PROBES]
    found["leace"] = []
    most = len(fit.people)
    for share in (0.1, 0.3, 1.0):
        chosen = np.random.default_rng(options.seed + 1).permutation(most)[: math.ceil(share * most)]
        some = fit.select(np.isin(fit.row, chosen))
        eraser = fit_erasers(some.contents, some.labels, some.patients, ["leace"])["leace"]
        erased = [erase(eraser, part) for part in (train, test)]
        kinds = PROBES if share == 1.0 else ("linear",)
        curves = [curve(kind, *erased, options.seed) for kind in kinds]
        floor = leace_floor_of(some)
        last = curves[0]["points"][-1]["auc"]["value"]
        found["leace"].append({"floor": asdict(floor), "linear_minus_floor": last - floor.auc, "curves": curves})
    return found


def erase(eraser: Any, part: ProbedNotes) -> ProbedNotes:
    """Return the same notes with erased vectors."""
    return ProbedNotes(eraser(part.contents, part.labels), part.labels, part.patients)


def curve(kind: str, train: ProbedNotes, test: ProbedNotes, seed: int) -> dict[str, Any]:
    """Return one curve as plain values."""
    return asdict(probe_curve(kind, train, test, n_permutations=999, seed=seed))


if __name__ == "__main__":
    main()
