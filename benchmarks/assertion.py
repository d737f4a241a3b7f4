"""Assertion on given spans, beside medSpaCy: F1 by value with intervals, and speed.

    python benchmarks/assertion.py --output benchmarks/assertion.json [--opponent VENV/bin/python]

Synthetic notes with the phrases of the bank `held_out`, which no rule was made for, and, where CLINICAL_NLP_DATA holds
the corpora, spans of real notes that one reader judged before he saw what the rules say (`assertion_judgements.csv`
holds their places and no text). Rules were made from the mistakes of each draw of real spans before the next was drawn,
so the figures for them are those of development; when first scored, the five draws had 137 of 150, 134 of 149, 137 of
149, 144 of 150 and 138 of 150 spans right on all four axes.
The opponent is medSpaCy 1.3.1 with its default rules and sections, in an environment of its own. Both use one thread
and are timed in processor seconds, so that what else the machine does counts little.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measuring import machine

from clinical_nlp.language.assertion import assert_spans
from clinical_nlp.language.mentions import Annotator
from clinical_nlp.language.sections import find_sections
from clinical_nlp.language.sentences import find_sentences
from clinical_nlp.notes.corpus import load_corpus
from clinical_nlp.runs import package_versions, write_json
from clinical_nlp.statistics.intervals import by_patient, patient_bootstrap

HERE = Path(__file__).parent
AXES = ("presence", "temporality", "modality", "experiencer")
VALUES = {
    "absent": "presence",
    "uncertain": "presence",
    "historical": "temporality",
    "future": "temporality",
    "hypothetical": "modality",
    "conditional": "modality",
    "family": "experiencer",
}
SHARED = ("absent", "uncertain", "historical", "hypothetical", "family")  # medSpaCy has a flag for each, in this order
Axes = tuple[str, ...]


class Judged(NamedTuple):
    """A note with spans whose assertion is known."""

    patient_id: str
    text: str
    spans: list[tuple[int, int]]
    gold: list[Axes]


def held_out(seeds: Sequence[int]) -> list[Judged]:
    """Return the synthetic notes of the held-out phrase bank with their gold spans."""
    judged = []
    for seed in seeds:
        corpus = load_corpus("synthetic_hospitals", None, bank="held_out", seed=seed)
        spans: dict[tuple[str, str], list[dict[str, Any]]] = {}
        assert corpus.spans is not None
        for row in corpus.spans.to_pylist():
            if row["presence"] is not None:
                spans.setdefault((row["institution"], row["note_id"]), []).append(row)
        for note in corpus.notes.to_pylist():
            rows = spans.get((note["institution"], note["note_id"]), [])
            if rows:
                places = [(row["start"], row["end"]) for row in rows]
                gold = [tuple(row[axis] for axis in AXES) for row in rows]
                judged.append(Judged(f"{seed}/{note['patient_id']}", note["text"], places, gold))
    return judged


def real() -> list[Judged]:
    """Return the judged spans of real notes; a note stands for its patient."""
    with (HERE / "assertion_judgements.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    texts = {}
    for name in sorted({row["corpus"] for row in rows}):
        for note in load_corpus(name).notes.to_pylist():
            texts[name, note["note_id"]] = note["text"]
    notes: dict[tuple[str, str], Judged] = {}
    for row in rows:
        key = (row["corpus"], row["note_id"])
        note = notes.setdefault(key, Judged("/".join(key), texts[key], [], []))
        note.spans.append((int(row["start"]), int(row["end"])))
        note.gold.append(tuple(row[axis] for axis in AXES))
    return list(notes.values())


def ours(notes: Sequence[Judged]) -> tuple[list[list[Axes]], float]:
    """Return the axes of each span, and the processor seconds for sections, sentences and assertion together."""
    found = []
    for part in (notes[:20], notes):  # the first warms up
        began = time.process_time()
        found = [
            assert_spans(note.text, note.spans, sections=find_sections(note.text), sentences=find_sentences(note.text))
            for note in part
        ]
        seconds = time.process_time() - began
    return [[tuple(getattr(one, axis) for axis in AXES) for one in note] for note in found], seconds


def medspacy(python: str, notes: Sequence[Judged]) -> dict[str, Any]:
    """Return what the opponent's process prints."""
    done = subprocess.run(
        [python, str(HERE / "assertion_medspacy.py")],
        input=json.dumps({"notes": [[note.text, note.spans] for note in notes]}),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def f1_by_value(
    notes: Sequence[Judged], found: Sequence[Sequence[set[str]]], values: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return F1 of each value with its interval and support; `found` holds the values said of each span."""
    patients = [note.patient_id for note in notes]
    result = {}
    for value in values:
        counts = np.zeros((len(notes), 3))
        for row, (note, said) in enumerate(zip(notes, found, strict=True)):
            gold = [value in axes for axes in note.gold]
            got = [value in one for one in said]
            counts[row] = sum(map(min, gold, got)), sum(got), sum(gold)
        estimate = patient_bootstrap(
            by_patient(patients, counts),
            lambda sums: 2 * sums[..., 0] / (sums[..., 1] + sums[..., 2]),
            n_notes=len(notes),
            part="all",
        )
        result[value] = _row(estimate) | {"n_spans": int(counts[:, 2].sum()), "n_said": int(counts[:, 1].sum())}
    return result


def accuracy(
    notes: Sequence[Judged], found: Sequence[Sequence[Any]], wanted: Sequence[Sequence[Any]]
) -> dict[str, Any]:
    """Return how many spans are right in everything, with the interval."""
    counts = np.array(
        [
            [sum(a == b for a, b in zip(got, gold, strict=True)), len(gold)]
            for got, gold in zip(found, wanted, strict=True)
        ]
    )
    estimate = patient_bootstrap(
        by_patient([note.patient_id for note in notes], counts),
        lambda sums: sums[..., 0] / sums[..., 1],
        n_notes=len(notes),
        part="all",
    )
    return _row(estimate) | {"n_spans": int(counts[:, 1].sum())}


def _row(estimate: Any) -> dict[str, Any]:
    """An estimate as numbers that JSON has; what is not defined, or has no valid interval, is null."""
    ends = {name: None if np.isnan(number := getattr(estimate, name)) else round(number, 4) for name in ("low", "high")}
    return {
        "value": None if np.isnan(estimate.value) else round(estimate.value, 4),
        **ends,
        "n_patients": estimate.n_patients,
        "n_notes": estimate.n_notes,
    }


def compare(notes: Sequence[Judged], opponent: str | None) -> dict[str, Any]:
    """Score ours, and the opponent on the values that both have."""
    axes, seconds = ours(notes)
    said = [[set(one) for one in note] for note in axes]
    flags_of = [[tuple(value in one for value in SHARED) for one in note] for note in said]
    wanted = [[tuple(value in one for value in SHARED) for one in note.gold] for note in notes]
    words = sum(len(note.text.split()) for note in notes) / len(notes)
    result: dict[str, Any] = {
        "words_per_note": round(words),
        "clinical_nlp": {
            "f1": f1_by_value(notes, said, list(VALUES)),
            "all_axes_right": accuracy(notes, axes, [note.gold for note in notes]),
            "five_flags_right": accuracy(notes, flags_of, wanted),
            "notes_per_processor_second": round(len(notes) / seconds),
        },
    }
    if opponent is not None:
        other = medspacy(opponent, notes)
        theirs = [[{v for v, on in zip(SHARED, one, strict=True) if on} for one in note] for note in other["flags"]]
        result["medspacy"] = {
            "version": other["version"],
            "f1": f1_by_value(notes, theirs, SHARED),
            "five_flags_right": accuracy(notes, [[tuple(one) for one in note] for note in other["flags"]], wanted),
            "notes_per_processor_second": round(len(notes) / other["seconds"], 1),
        }
    return result


def whole_lane(notes: Sequence[Judged]) -> dict[str, float]:
    """Time the dictionary with it: sections, sentences, HPO matching and assertion, one process."""
    annotator = Annotator("hpo")
    for note in notes[:20]:
        annotator.annotate(note.text)
    began, busy = time.perf_counter(), time.process_time()
    mentions = sum(len(annotator.annotate(note.text)) for note in notes)
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    return {
        "notes_per_second": round(len(notes) / seconds),
        "notes_per_processor_second": round(len(notes) / busy),
        "mentions_per_note": round(mentions / len(notes), 1),
    }


def main() -> None:
    """Score, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--opponent", help="the Python of an environment that has medspacy==1.3.1")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1000, 1001], help="of the synthetic notes")
    options = parser.parse_args()
    synthetic = held_out(options.seeds)
    result: dict[str, Any] = {
        "benchmark": "assertion",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(1),
        "packages": package_versions(),
        "arguments": {"seeds": options.seeds, "opponent": options.opponent is not None},
        "held_out": compare(synthetic, options.opponent),
        "dictionary_and_assertion": whole_lane(synthetic),
    }
    if os.environ.get("CLINICAL_NLP_DATA"):
        result["real"] = compare(real(), options.opponent)
    write_json(options.output, result)
    for name in ("held_out", "real"):
        for system in ("clinical_nlp", "medspacy"):
            if system in result.get(name, {}):
                scores = result[name][system]
                line = ", ".join(f"{v} {row['value']} (n {row['n_spans']})" for v, row in scores["f1"].items())
                sys.stdout.write(f"{name} {system}: {line}; {scores['notes_per_processor_second']} notes/s\n")


if __name__ == "__main__":
    main()
