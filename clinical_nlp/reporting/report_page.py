"""The page of a report run: scores beside baselines, and drafts beside their references, with every doubt marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clinical_nlp.errors import RunError
from clinical_nlp.reporting.model_card import making, origin, phi_text
from clinical_nlp.reporting.page import (
    Marked,
    Notice,
    Points,
    Section,
    SideBySide,
    Table,
    Text,
    interval,
    page,
)
from clinical_nlp.reporting.plots import number
from clinical_nlp.runs import Run

SHOWN = 6
"""Notes shown of each sample."""
SYSTEMS = {
    "test": "this run",
    "before": "before tuning",
    "baseline_copy_longest": "longest part copied",
    "baseline_nearest": "nearest training source",
    "baseline_zero_shot": "base model, only told",
}
_NAMES = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bertscore": "BERTScore",
    "fact_f1": "clinical-fact F1",
    "fact_precision": "clinical-fact precision",
    "fact_recall": "clinical-fact recall",
    "flipped_rate": "flipped, against the reference",
    "flipped_source_rate": "flipped, against the source",
    "error_rate": "notes with any error or gap",
    "section_rougeL": "ROUGE-L by section",
    "section_missing_rate": "sections missing",
}
_FIRST = ("fact_f1", "fact_precision", "fact_recall", "invention_rate", "flipped_rate", "flipped_source_rate",
          "error_rate")  # fmt: skip
_ERRORS = ("unsupported", "flipped", "flipped_source", "numbers_wrong", "sides_wrong")


def report_page(run: Run) -> str:
    """Render the page from what the run recorded; it holds note text."""
    manifest = run.manifest
    drafts, errors, gaps = _drafts(run)
    order = sorted(range(len(drafts)), key=lambda row: (-errors[row], -gaps[row], drafts[row]["pair_id"]))
    worst = order[:SHOWN]
    rest = [row for row in range(len(drafts)) if row not in set(worst)]
    sample = sorted(np.random.default_rng(manifest.get("seed") or 0).permutation(rest)[:SHOWN].tolist()) if rest else []
    sections = [
        Section("", [_headline(run, drafts), *_below(run), *_changes(run)]),
        Section("What was measured", [_scores(run), Text(_METHOD)]),
        Section("What was cut, left out or not finished", [Points(_left_out(manifest))]),
        Section("The worst of the held-out notes", _shown(drafts, worst, errors)),
        Section("A random sample of the others", _shown(drafts, sample, errors)),
        Section("What it was made from", [Table([], origin(run))]),
        Section("How it was made", [Table([], making(run)), Text(phi_text(run))]),
    ]
    base = manifest.get("base_model")
    return page(
        f"report: {run.path.name}",
        sections,
        subtitle=f"{str(manifest.get('kind', '')).replace('_', ' ')}; base model "
        f"{base.get('name') if isinstance(base, dict) else base}",
        footer="Rendered from metrics.json, scores.parquet, generated.parquet and manifest.json of the run. Every "
        "generated text is a draft, unreviewed. Not for clinical decisions.",
    )


_METHOD = (
    "Intervals resample patients, not notes; they say nothing about other institutions. Facts are what the package's "
    "own extractor reads in a text: findings with their assertion and side, drugs with dose, procedures, plan items. "
    "Precision and recall are against the reference; the invention rate is the share of generated facts that the "
    "source does not hold. The extractor errs too: what it marks is to be looked at, and what it does not mark is not "
    "proved."
)


def _drafts(run: Run) -> tuple[list[dict[str, Any]], list[int], list[int]]:
    """Read the drafts, and of each how many errors it has and how many facts it leaves out."""
    import pyarrow.parquet as pq

    files = [run.path / name for name in ("generated.parquet", "scores.parquet")]
    for file in files:
        if not file.is_file():
            raise RunError(f"{file} is missing; run it again in a new directory")
    rows: list[dict[str, Any]] = pq.read_table(files[0]).to_pylist()
    scores = [row for row in pq.read_table(files[1]).to_pylist() if row["system"] == "test"]
    by_pair = {row["pair_id"]: sum(int(row.get(f"facts_{name}") or 0) for name in _ERRORS) for row in scores}
    missing = {row["pair_id"]: int(row["facts_missing"]) for row in scores}
    errors, gaps = ([found.get(row["pair_id"], 0) for row in rows] for found in (by_pair, missing))
    return rows, errors, gaps


def _headline(run: Run, drafts: Sequence[dict[str, Any]]) -> Notice:
    found = run.metrics

    def said(name: str) -> str:
        return _value(found.get(name))

    entry = found.get("test.fact_f1", {})
    patients = entry.get("n_patients", 0)
    return Notice(
        f"{len(drafts)} notes of {patients} held-out patients ({entry.get('part', 'test')} part). Clinical-fact F1 "
        f"{said('test.fact_f1')}; of what it states, {said('test.invention_rate')} is not in the source; "
        f"of the facts in both, {said('test.flipped_rate')} have their assertion flipped. A reader has to check every "
        "draft against its source.",
        tone="caution",
        heading="Drafts, unreviewed",
    )


def _below(run: Run) -> list[Notice]:
    """Say so where a baseline that has learned nothing states more of the right facts."""
    own = run.metrics.get("test.fact_f1", {}).get("value")
    others = {name: run.metrics.get(f"{system}.fact_f1") for system, name in SYSTEMS.items() if "baseline" in system}
    better = [
        f"{name} ({_value(entry)})"
        for name, entry in others.items()
        if own is not None and entry is not None and entry["value"] is not None and entry["value"] >= own
    ]
    if not better:
        return []
    text = f"By clinical-fact F1 it does no better than: {'; '.join(better)}. Do not use it to draft reports."
    return [Notice(text, tone="bad", heading="Below a baseline")]


def _changes(run: Run) -> list[Any]:
    rows = [
        [_name(key.removeprefix("change.")), entry["value"], interval(entry.get("low"), entry.get("high")),
         entry.get("note", "")]
        for key, entry in run.metrics.items()
        if key.startswith("change.")
    ]  # fmt: skip
    if not rows:
        return []
    caption = "After tuning minus before, on the same notes; intervals resample patients, both sides together."
    return [Table(["change", "value", "95 % interval", "remark"], rows, caption)]


def _name(metric: str) -> str:
    return _NAMES.get(metric, metric.replace("_", " "))


def _scores(run: Run) -> Table:
    """One row a metric, facts first, one column a system; what is defined for no system is named below."""
    systems = [name for name in SYSTEMS if any(key.startswith(f"{name}.") for key in run.metrics)]
    found = list(dict.fromkeys(key.partition(".")[2] for key in run.metrics if key.partition(".")[0] in systems))
    metrics = [*[name for name in _FIRST if name in found], *[name for name in found if name not in _FIRST]]
    rows, undefined = [], []
    for metric in metrics:
        entries = [run.metrics.get(f"{system}.{metric}") for system in systems]
        if all(entry is None or entry["value"] is None for entry in entries):
            reason = next((entry["note"] for entry in entries if entry is not None), "").removeprefix("undefined: ")
            undefined.append(f"{_name(metric)} ({reason})")
        else:
            rows.append([_name(metric), *[_value(entry) for entry in entries]])
    sizes = {
        system: next(entry for key, entry in run.metrics.items() if key.startswith(f"{system}.")) for system in systems
    }
    columns = [
        f"{SYSTEMS[name]} ({sizes[name]['n_notes']} notes, {sizes[name]['n_patients']} patients)" for name in systems
    ]
    caption = "Value and 95 % interval; a dash where no interval is valid or there is nothing to count."
    if undefined:
        caption += f" Not defined here: {'; '.join(undefined)}."
    return Table(["metric", *columns], rows, caption)


def _value(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["value"] is None:
        return "–"
    return f"{number(entry['value'])} ({interval(entry.get('low'), entry.get('high'))})"


def _left_out(manifest: dict[str, Any]) -> list[str]:
    window = manifest.get("window", {})
    counts = {
        **manifest.get("training", {}),
    }
    made = manifest.get("generation", {})
    points = [
        f"A source may have {window.get('source')} tokens and a report {window.get('report')}, of a window of "
        f"{window.get('tokens')}; policy for what is longer: {window.get('policy')}."
    ]
    if "trained_on" in counts:
        points.append(
            f"Training: {counts['trained_on']} of {counts['pairs']} pairs; the middle of {counts['sources_cut']} "
            f"sources was left out, {counts['sources_left_out']} pairs were left out for their source and "
            f"{counts['reports_left_out']} for their report."
        )
    if "preference_pairs" in counts:
        kinds = ", ".join(
            f"{name.removeprefix('planted_').replace('_', ' ')} {value}"
            for name, value in counts.items()
            if name.startswith(("planted_", "own_"))
        )
        points.append(f"Preference pairs: {counts['preference_pairs']} ({kinds}).")
    points += [
        f"Held-out notes: the middle of {made.get('sources_cut')} sources was left out, {made.get('sources_left_out')} "
        "notes were left out.",
        f"{made.get('not_stopped')} of {made.get('n_notes')} drafts were ended by their length and not by the model; "
        f"{made.get('empty')} are empty.",
        "Drafts were not checked against their sources when they were written (verify none)."
        if manifest.get("config", {}).get("verify") == "none"
        else f"{made.get('statements_unsupported')} statements are marked as not borne out by their source; "
        f"{made.get('sentences_dropped')} sentences were dropped for that.",
        f"{made.get('sources_also_in_training')} held-out sources are, word for word, also in the training part.",
    ]
    return points


def _shown(drafts: Sequence[dict[str, Any]], rows: Sequence[int], errors: Sequence[int]) -> list[Any]:
    if not rows:
        return [Text("There are none.")]
    return [block for row in rows for block in _compared(drafts[row], errors[row])]


def _compared(row: dict[str, Any], errors: int) -> list[SideBySide | Points]:
    """Show one note with its marks, and below it every mark in words."""
    from clinical_nlp.tasks.faithfulness import compare_facts

    found = compare_facts(row["generated"], row["reference"], source=row["source"])
    marks: list[tuple[int, int, str, str]] = []
    here: list[tuple[int, int, str, str]] = [(fact.start, fact.end, "caution", "left out") for fact in found.missing]
    for pairs, why in (
        (found.flipped_source, "the source says otherwise"),
        (found.flipped, "the reference says otherwise"),
        (found.numbers, "another number"),
        (found.sides, "another side"),
    ):
        marks += [(fact.start, fact.end, "bad", f"{why}: {_label(fact)}") for fact, _ in pairs]
    marks += [(fact.start, fact.end, "bad", f"not in the source: {_label(fact)}") for fact in found.unsupported]
    taken = {mark[:2] for mark in marks}
    marks += [
        (fact.start, fact.end, "caution", "not in the reference")
        for fact in found.extra
        if (fact.start, fact.end) not in taken
    ]
    # Of two marks on one passage the worse is shown.
    marks.sort(key=lambda mark: (mark[0], mark[2] != "bad"))
    stopped = "" if row["stopped"] else "; ended by its length"
    columns = [
        ("Source", Marked(row["source"])),
        ("Reference", Marked(row["reference"], here)),
        (f"Generated: {row['status']}{stopped}", Marked(row["generated"], marks)),
    ]
    told = "error" if errors == 1 else "errors"
    blocks: list[SideBySide | Points] = [SideBySide(columns, f"Note {row['pair_id']}: {errors} {told} found.")]
    said: dict[str, list[str]] = {}
    for start, end, _, why in [*marks, *here]:
        reason, _, detail = why.partition(": ")
        text = row["reference"] if reason == "left out" else row["generated"]
        shown = text[start:end] + (f" ({detail})" if detail else "")
        if shown not in said.setdefault(reason, []):
            said[reason].append(shown)
    if said:
        blocks.append(
            Points([f"{reason[0].upper()}{reason[1:]}: {'; '.join(shown)}" for reason, shown in said.items()])
        )
    return blocks


def _label(fact: Any) -> str:
    details = [fact.presence, fact.side, None if fact.value is None else number(fact.value), fact.unit]
    return ", ".join(str(detail) for detail in details if detail)
