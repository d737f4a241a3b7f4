"""HPO recognition beside FastHPOCR 0.1.4, on one corpus in one run: what is found, and how fast.

    clinical-nlp run link --base_model models/minilm --corpus mtsamples --precision 0.6 --output runs/link
    taskset -c 0 python benchmarks/phenotypes.py --corpus $CLINICAL_NLP_DATA/gsc-plus --work DIR \\
        --link runs/link --output benchmarks/phenotypes.json

The corpus is a folder with `corpus/NAME` (a text) and `ann/NAME` (lines that hold HPO ids). Counted is, document by
document, whether an id of the gold is found; obsolete ids are resolved on both sides; micro-averaged. Gold that stands
outside phenotypic abnormalities (inheritance, onset, variability) counts, unless a row says otherwise. FastHPOCR gets
a virtual environment in DIR, or is found with --opponent PYTHON; its index is kept in DIR, since it takes ten minutes
to build. Speed is the best of several passes over the corpus, in processor seconds of one process; that of the neural
lane (--link RUN) is told for spans that it has not seen before (one pass) and for ones that it has.

The documents are in two halves by the digest of their names: the errors of the first were looked at while the neural
lane was made, those of the second were not. Earlier rules of the dictionary were made with sight of the whole corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from clinical_nlp.language.mentions import merge_spans
from clinical_nlp.language.terminology import Matcher, Terminology, load_terminology
from clinical_nlp.language.terminology.hpo import bundled_path
from clinical_nlp.runs import Run, package_versions, write_json
from clinical_nlp.statistics.intervals import patient_bootstrap
from clinical_nlp.tasks.linking import Linker

OPPONENT = r"""
import json, sys, time
from pathlib import Path
obo, index, texts, passes = sys.argv[1:5]
from FastHPOCR.IndexHPO import IndexHPO
from FastHPOCR.HPOAnnotator import HPOAnnotator
result = {"index_seconds": None}
if not (Path(index) / "hp.index").is_file():
    began = time.process_time()
    IndexHPO(obo, index).index()
    result["index_seconds"] = round(time.process_time() - began, 1)
began = time.process_time()
annotator = HPOAnnotator(str(Path(index) / "hp.index"))
result["load_seconds"] = round(time.process_time() - began, 1)
documents = json.loads(Path(texts).read_text("utf-8"))
for longest in (True, False):
    seconds = []
    for _ in range(int(passes)):
        began = time.process_time()
        found = {name: annotator.annotate(text, longestMatch=longest) for name, text in documents.items()}
        seconds.append(time.process_time() - began)
    result["longest" if longest else "all"] = {
        "seconds": min(seconds),
        "found": {name: sorted({a.getHPOUri() for a in spans}) for name, spans in found.items()},
    }
print(json.dumps(result))
"""


def main() -> None:
    """Run both recognisers over the corpus and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with corpus/ and ann/")
    parser.add_argument("--work", type=Path, required=True, help="folder for the opponent and its index")
    parser.add_argument("--opponent", type=Path, help="Python that has FastHPOCR; made in --work otherwise")
    parser.add_argument("--no-opponent", action="store_true", help="measure this package alone")
    parser.add_argument("--link", type=Path, help="a link run, for the row of the neural lane")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    documents = {file.name: file.read_text("utf-8") for file in sorted((options.corpus / "corpus").iterdir())}
    terminology = load_terminology("hpo")
    gold = {name: _resolved(terminology, _ids(options.corpus / "ann" / name)) for name in documents}
    rows = [_ours(name, documents, gold, options.passes) for name in ("hpo", "hpo_wide")]
    if options.link is not None:
        rows.append(_linked(options.link, documents, gold))
    if not options.no_opponent:
        rows += _theirs(options, terminology, documents, gold)
    for row in rows:
        scores = row["scores"]["whole gold"]
        shown = ", ".join(f"{key} {scores[key]['value']:.3f}" for key in ("f1", "precision", "recall"))
        print(f"{row['system']}: {shown}, {row['documents_a_second']} documents a second", flush=True)
    write_json(
        options.output,
        {
            "benchmark": "phenotypes",
            "machine": {"processor": _processor(), "system": platform.platform(), "python": platform.python_version()},
            "packages": package_versions(),
            "terminology": {"version": terminology.version, "digest": terminology.digest},
            "corpus": {
                "name": options.corpus.name,
                "documents": len(documents),
                "characters": sum(map(len, documents.values())),
                "gold": sum(map(len, gold.values())),
                "gold_phenotypic_abnormality": sum(len(ids & terminology.matchable) for ids in gold.values()),
            },
            "rows": rows,
        },
    )


def _ours(name: str, documents: dict[str, str], gold: dict[str, set[str]], passes: int) -> dict[str, Any]:
    terminology = load_terminology(name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    matcher = Matcher(terminology)
    built = time.process_time() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    seconds = []
    for _ in range(passes):
        began = time.process_time()
        found = {doc: matcher.match(text) for doc, text in documents.items()}
        seconds.append(time.process_time() - began)
    ids = {doc: {match.concept_id for match in matches} for doc, matches in found.items()}
    return {
        "system": f"clinical_nlp, {name}",
        "index_seconds": round(built, 2),
        "index_mib_of_peak": round(grown, 1),
        **_speed(documents, min(seconds)),
        "scores": _scores(gold, ids, terminology),
    }


def _linked(run: Path, documents: dict[str, str], gold: dict[str, set[str]]) -> dict[str, Any]:
    """Score dictionary and link run together as extraction joins them, without the sections and assertions."""
    import torch

    torch.set_num_threads(1)
    terminology = load_terminology("hpo_wide")
    matcher, linker = Matcher(terminology), Linker.load(run, terminology)
    texts = list(documents.values())
    seconds = []
    for _ in range(2):
        began = time.process_time()
        matches = [matcher.match(text) for text in texts]
        spans = linker.predict(texts, matches)
        seconds.append(time.process_time() - began)
    ids: dict[str, set[str]] = {}
    counts = []
    for doc, text, found, linked in zip(documents, texts, matches, spans, strict=True):
        ids[doc] = {i for *_, i, _, _, _ in merge_spans(text, found, linked, matcher) if i is not None}
        added = ids[doc] - {match.concept_id for match in found}
        counts.append((len(added & gold[doc]), len(added)))
    precision = patient_bootstrap(
        np.array(counts, dtype=float), lambda c: c[..., 0] / c[..., 1], n_notes=len(counts), part="all"
    )
    made = [Run.load(run)]
    while (base := Path(made[-1].manifest["base_model"]["name"])).joinpath("manifest.json").is_file():
        made.append(Run.load(base))
    return {
        "system": "clinical_nlp, hpo_wide with the neural lane",
        "link": {
            "threshold": made[0].manifest["threshold"],
            "metrics": made[0].metrics,
            "questions": made[0].manifest["questions"],
            "training_from_last_to_first": [step.manifest["training"] for step in made],
            "first_base_model_digest": made[-1].manifest["base_model"]["digest"],
        },
        "ids_that_the_lane_adds": {
            "added": int(sum(added for _, added in counts)),
            "right": int(sum(right for right, _ in counts)),
            "precision": {key: getattr(precision, key) for key in ("value", "low", "high")},
        },
        **_speed(documents, seconds[1]),
        "documents_a_second_when_every_span_is_new": round(len(documents) / seconds[0], 1),
        "scores": _scores(gold, ids, terminology),
    }


def _theirs(
    options: argparse.Namespace, terminology: Terminology, documents: dict[str, str], gold: dict[str, set[str]]
) -> list[dict[str, Any]]:
    python = options.opponent or _environment(options.work)
    texts = options.work / "texts.json"
    texts.write_text(json.dumps(documents), "utf-8")
    index = options.work / f"index-{terminology.digest[:12]}"
    index.mkdir(exist_ok=True)
    arguments = [str(python), "-W", "ignore", "-c", OPPONENT, str(bundled_path()), str(index), str(texts)]
    done = subprocess.run([*arguments, str(options.passes)], capture_output=True, text=True, check=False)
    texts.unlink()
    if done.returncode:
        sys.exit(f"FastHPOCR failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no message'}")
    said = json.loads(done.stdout.strip().splitlines()[-1])
    if said["index_seconds"] is not None:
        (index / "seconds.json").write_text(json.dumps(said["index_seconds"]))
    elif (index / "seconds.json").is_file():
        said["index_seconds"] = json.loads((index / "seconds.json").read_text())
    rows = []
    for kind in ("longest", "all"):
        ids = {name: _resolved(terminology, set(found)) for name, found in said[kind]["found"].items()}
        rows.append(
            {
                "system": f"FastHPOCR 0.1.4, {kind} matches",
                "index_seconds": said["index_seconds"],
                "load_seconds": said["load_seconds"],
                **_speed(documents, said[kind]["seconds"]),
                "scores": _scores(gold, ids, terminology),
            }
        )
    return rows


def _environment(work: Path) -> Path:
    """Make the opponent's environment once; pronto is needed and undeclared."""
    python = work / "opponent" / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(work / "opponent")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "FastHPOCR==0.1.4", "pronto"], check=True)
    return python


def _scores(gold: dict[str, set[str]], found: dict[str, set[str]], terminology: Terminology) -> dict[str, Any]:
    phenotypes = load_terminology("hpo").matchable
    shown: dict[str, Any] = {}
    halves = {half: [doc for doc in gold if _half(doc) == half] for half in (0, 1)}
    for name, only, docs in (
        ("whole gold", None, list(gold)),
        ("phenotypic abnormalities alone", phenotypes, list(gold)),
        ("whole gold, half that was looked at", None, halves[0]),
        ("whole gold, half that was not looked at", None, halves[1]),
    ):
        counts = []
        for doc in docs:
            ids = gold[doc]
            right, said = (ids, found[doc]) if only is None else (ids & only, found[doc] & only)
            counts.append((len(right & said), len(said - right), len(right - said)))
        table = np.array(counts, dtype=float)
        shown[name] = {
            "true": int(table[:, 0].sum()),
            "false": int(table[:, 1].sum()),
            "missed": int(table[:, 2].sum()),
        }
        for measure, statistic in _MEASURES.items():
            estimate = patient_bootstrap(table, statistic, n_notes=len(table), part="all")
            shown[name][measure] = {key: getattr(estimate, key) for key in ("value", "low", "high")}
        shown[name]["documents"] = len(table)
    return shown


_MEASURES = {
    "precision": lambda c: c[..., 0] / (c[..., 0] + c[..., 1]),
    "recall": lambda c: c[..., 0] / (c[..., 0] + c[..., 2]),
    "f1": lambda c: 2 * c[..., 0] / (2 * c[..., 0] + c[..., 1] + c[..., 2]),
}


def _speed(documents: dict[str, str], seconds: float) -> dict[str, Any]:
    return {
        "documents_a_second": round(len(documents) / seconds),
        "kilobytes_a_second": round(sum(len(text.encode()) for text in documents.values()) / seconds / 1000),
    }


def _half(doc: str) -> int:
    return int(hashlib.sha256(doc.encode()).hexdigest(), 16) % 2


def _ids(file: Path) -> set[str]:
    return {found.replace("_", ":") for found in re.findall(r"HP[_:]\d{7}", file.read_text("utf-8"))}


def _resolved(terminology: Terminology, ids: set[str]) -> set[str]:
    return {terminology.resolve(i) or i for i in ids}


def _processor() -> str:
    if not os.path.exists("/proc/cpuinfo"):
        return platform.processor()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
