"""The page of a coding run: codes proposed and found, beside baselines, by how common a code is, and code by code."""

from __future__ import annotations

import csv
import math
from typing import Any

from clinical_nlp.reporting.model_card import making, origin, phi_text
from clinical_nlp.reporting.page import Notice, Section, Table, Text, curves, interval, page
from clinical_nlp.reporting.plots import number
from clinical_nlp.runs import Run
from clinical_nlp.statistics.multilabel import BANDS, band_name

FEWEST_SHOWN = 11
"""Patients that a code needs to be shown by itself."""
SYSTEMS = {
    "": "this run",
    "baseline_tfidf.": "bag of words, logistic regression",
    "baseline_dictionary.": "codes that the note names, no training",
    "baseline_zero_shot.": "base model, not trained",
    "baseline_few_shot.": "base model, shown examples",
}
COLUMNS = {
    "micro_f1": "micro-F1",
    "macro_f1": "macro-F1",
    "map": "MAP",
    "precision_at_5": "P@5",
    "precision_at_8": "P@8",
    "precision_at_15": "P@15",
    "auc_micro": "AUC",
}
_STATUS = {
    "valid": "valid in the release in force",
    "category": "categories: a more specific code should have been used",
    "deleted": "deleted before the release in force",
    "not yet valid": "of a later release than the one in force",
    "unknown": "in no release given",
    "unchecked": "not checked: no release of this system was given",
}


def coding_page(run: Run) -> str:
    """Render the page from metrics.json, codes.csv and the manifest; it names codes, never a note."""
    manifest, metrics = run.manifest, run.metrics
    systems = {prefix: name for prefix, name in SYSTEMS.items() if f"test.{prefix}micro_f1" in metrics}
    rows = [
        [name, *(_cell(metrics.get(f"test.{prefix}{key}")) for key in COLUMNS), _size(metrics, prefix)]
        for prefix, name in systems.items()
    ]
    part = metrics["test.micro_f1"]["part"]
    blocks: list[Any] = [
        *_verdicts(metrics, systems),
        Table(
            ["", *COLUMNS.values(), "patients, documents"],
            rows,
            f"On the {part} part. 95 % intervals resample patients; they say nothing about other institutions. Each "
            "system has its own threshold, chosen on development patients. AUC over all pairs of document and code.",
        ),
    ]
    bands = [
        [band_name(band), _cell(metrics[f"test.micro_f1.{band_name(band)}"])]
        for band in BANDS
        if f"test.micro_f1.{band_name(band)}" in metrics
    ]
    sections = [
        Section("How well it codes", blocks),
        Section("By how common a code is", [Table(["training documents with the code", "micro-F1"], bands)]),
        Section("What a reader will be given", _proposals(manifest)),
        Section("Code by code", [_codes(run)]),
        Section("The codes themselves", _check(manifest)),
    ]
    if drawn := curves(run):
        sections.append(Section("How training went", drawn))
    sections.append(Section("What it was made from", [Table([], origin(run)), Text(str(manifest.get("split", "")))]))
    sections.append(Section("How it was made", [Table([], making(run)), Text(phi_text(run))]))
    return page(
        f"coding: {run.path.name}",
        sections,
        subtitle="Proposed codes are drafts for a coder to review.",
        footer="Rendered from metrics.json, codes.csv and manifest.json of the run. Not for billing without review.",
    )


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["value"] is None:
        return "–"
    bounds = interval(entry["low"], entry["high"])
    return number(entry["value"]) if bounds == "–" else f"{number(entry['value'])} ({bounds})"


def _size(metrics: dict[str, Any], prefix: str) -> str:
    entry = metrics[f"test.{prefix}micro_f1"]
    return f"{entry['n_patients']}, {entry['n_notes']}"


def _verdicts(metrics: dict[str, Any], systems: dict[str, str]) -> list[Notice]:
    own = metrics["test.micro_f1"]
    found = []
    for prefix, name in systems.items():
        other = metrics[f"test.{prefix}micro_f1"]
        if prefix and other["n_notes"] == own["n_notes"] and (other["value"] or 0) >= (own["value"] or 0):
            found.append(
                Notice(
                    f"Its micro-F1 is not above that of: {name}. Do not use this run; train longer, on more patients, "
                    "or from a base model adapted to these notes.",
                    tone="bad",
                    heading="A baseline codes as well",
                )
            )
    if own["low"] is None or math.isnan(own["low"]):
        found.append(Notice(own["note"] or "no interval", tone="caution", heading="Too few patients for an interval"))
    return found


def _proposals(manifest: dict[str, Any]) -> list[Any]:
    counts = manifest.get("predictions") or {}
    if not counts:
        return [Text("The run holds no proposals.")]
    accepted, review = counts["accepted"], counts["to_review"]

    def share(part: int, whole: int) -> str:
        return f"{part} of {whole}" + (f" ({100 * part / whole:.0f} %)" if whole else "")

    decided = manifest.get("decided", {})
    return [
        Table(
            ["", "codes", "right by gold"],
            [
                [
                    f"probability at least {decided.get('accept', '')}",
                    accepted,
                    share(counts["accepted_and_right"], accepted),
                ],
                ["below: to review (review.csv)", review, share(counts["reviewed_and_right"], review)],
            ],
            "Of the held-out documents. predictions.parquet has each code with its probability and the places in the "
            "notes that it rests on.",
        )
    ]


def _codes(run: Run) -> Table:
    with open(run.path / "codes.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    shown = sorted((row for row in rows if int(row["patients"]) >= FEWEST_SHOWN), key=lambda row: -int(row["gold"]))
    cells = [
        [
            *(row["code"], row["label"], row["status"], int(row["train"]), int(row["gold"]), int(row["predicted"])),
            *(_number(row[name]) for name in ("precision", "recall")),
            _number(row["f1"]) + (f" ({_number(row['f1_low'])} to {_number(row['f1_high'])})" if row["f1_low"] else ""),
        ]
        for row in shown
    ]
    columns = ["code", "name", "status", "in training", "gold", "proposed", "precision", "recall", "F1 (95 %)"]
    note = (
        f"{len(shown)} codes that at least {FEWEST_SHOWN} patients have; all {len(rows)} are in codes.csv. An interval "
        "needs 20 patients."
    )
    return Table(columns, cells, note)


def _number(value: str) -> str:
    return f"{float(value):.2f}" if value else "–"


def _check(manifest: dict[str, Any]) -> list[Any]:
    codes = manifest.get("codes", {})
    rows = [[_STATUS[name], count] for name, count in codes.get("rows_by_status", {}).items()]
    blocks: list[Any] = [
        Table(["rows of codes in the corpus", "number"], rows, str(manifest["inputs"].get("codes", ""))),
        Text(
            f"{codes.get('learned')} codes can be proposed, {codes.get('with_examples')} of them with an example in "
            f"the training part; {codes.get('not_on_the_list')} gold codes of the reported documents are not among "
            "them and count as missed."
        ),
    ]
    left_out = manifest.get("left_out") or {}
    if left_out:
        blocks.append(Table(["left out", "number"], list(left_out.items())))
    return blocks
