"""What is known of sampled notes beyond their text: labels, notes marked twice, and what a finished model says."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from clinical_nlp.errors import InputError, MissingDataError
from clinical_nlp.notes.schema import Note
from clinical_nlp.progress import progress, say
from clinical_nlp.statistics.attribution import Conventions
from clinical_nlp.statistics.sample import SampledNotes
from clinical_nlp.statistics.text_measures import word_counts


def read_labels(path: Path, sample: SampledNotes) -> tuple[np.ndarray, np.ndarray | None]:
    """Read target gold: (n_notes,) labels, and (n_notes, 2) logits where the file has probabilities; NaN for silence.

    Raises
    ------
    MissingDataError : there is no such file.
    InputError : a column is missing, a value does not fit, or no id is one of the sampled notes'.
    """
    found: dict[tuple[str, str], tuple[float, float]] = {}
    by = ""
    for line, row in _rows(path, ["label"]):
        by = by or ("note_id" if "note_id" in row else "patient_id")
        if by not in row:
            raise InputError(f"{path}: it needs a column patient_id or note_id")
        empty = (row["label"] or "").strip() == ""
        label = float("nan") if empty else _number(row, "label", path, line, 0, 1)
        if label not in (0.0, 1.0) and not empty:
            raise InputError(f"{path}, line {line}: label must be 0, 1 or empty")
        probability = _number(row, "probability", path, line, 0, 1) if row.get("probability") else float("nan")
        found[row.get("institution") or "", row[by]] = (label, probability)
    values = np.full((len(sample.notes), 2), np.nan)
    for place, note in enumerate(sample.notes):
        name = note.note_id if by == "note_id" else note.patient_id
        values[place] = found.get((note.institution, name), found.get(("", name), (np.nan, np.nan)))
    if not np.isfinite(values).any():
        raise InputError(
            f"{path}: none of its {by} values is one of the sampled notes'; are they ids of another export?"
        )
    say(f"{int(np.isfinite(values[:, 0]).sum())} of {len(sample.notes)} sampled notes have a label")
    if not np.isfinite(values[:, 1]).any():
        return values[:, 0], None
    share = np.clip(values[:, 1], 1e-6, 1 - 1e-6)
    logit = np.log(share) - np.log1p(-share)
    return values[:, 0], np.column_stack([-logit / 2, logit / 2])


def read_conventions(path: Path) -> Conventions:
    """Read how often each class is marked in the same notes under two conventions.

    Raises
    ------
    MissingDataError : there is no such file.
    InputError : a column is missing, a number is none, or there is no row.
    """
    counts: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    for line, row in _rows(path, ["note_id", "patient_id", "class", "reference", "other"]):
        pair = [_number(row, side, path, line, 0, 1e9) for side in ("reference", "other")]
        counts.setdefault((row["patient_id"], row["note_id"]), {})[row["class"]] = (pair[0], pair[1])
    if not counts:
        raise InputError(f"{path}: no row")
    classes = tuple(sorted({name for of_note in counts.values() for name in of_note}))
    table = np.array([[of_note.get(name, (0.0, 0.0)) for name in classes] for of_note in counts.values()])
    return Conventions([patient for patient, _ in counts], table, classes)


def task_outputs(folder: Path, notes: Sequence[Note]) -> tuple[np.ndarray, tuple[str, ...]] | None:
    """What a finished ner or coding run says about each note: entities per 100 words, or probabilities of codes."""
    task = json.loads((folder / "task.json").read_text("utf-8")).get("task")
    texts = [note.text for note in notes]
    if task == "ner":
        from clinical_nlp.tasks.ner import NerPredictor

        tagger = NerPredictor.load(folder)
        labels = tagger.task.labels
        found = np.zeros((len(texts), len(labels)))
        with progress("tagging", len(texts), unit="notes") as bar:
            for start in range(0, len(texts), 64):
                for row, spans in enumerate(tagger.predict(texts[start : start + 64]), start):
                    for span in spans:
                        found[row, labels.index(span[2])] += 1
                bar.advance(min(64, len(texts) - start))
        words = np.maximum(word_counts(texts), 1)[:, None]
        return 100 * found / words, tuple(f"{label}, per 100 words" for label in labels)
    if task == "coding":
        from clinical_nlp.tasks.coding import Coder

        coder = Coder.load(folder)
        blocks = []
        with progress("coding", len(texts), unit="notes") as bar:
            for start in range(0, len(texts), 64):
                block = [[text] for text in texts[start : start + 64]]
                blocks.append(coder.calibration(coder.logits(block)))
                bar.advance(len(block))
        return np.concatenate(blocks), tuple(f"probability of {code}" for code in coder.task.codes)
    return None


def _rows(path: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    if not path.is_file():
        raise MissingDataError(f"no such file: {path}")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in needed if name not in (reader.fieldnames or [])]
        if missing:
            raise InputError(f"{path}: no column {missing[0]!r}; it has {', '.join(reader.fieldnames or ['none'])}")
        for row in reader:
            yield reader.line_num, row


def _number(row: Mapping[str, str], column: str, path: Path, line: int, low: float, high: float) -> float:
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        value = float("nan")
    if not low <= value <= high:
        raise InputError(f"{path}, line {line}: {column} must be a number from {low:g} to {high:g}")
    return value
