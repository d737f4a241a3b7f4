"""Scores of reports: overlap, sections and clinical facts a note, with intervals that resample patients; baselines."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clinical_nlp.language.sections import find_sections
from clinical_nlp.runs import Estimate, write_atomic
from clinical_nlp.statistics.intervals import by_patient, patient_bootstrap
from clinical_nlp.tasks.faithfulness import COUNTS, compare_facts, fact_scores

ROUGE = ("rouge1", "rouge2", "rougeL")
SECTIONS = ("section_rougeL", "section_reference", "section_missing", "section_extra")
SCORES = "scores.parquet"
_TURN = re.compile(r"^[ \t]*(?:\[[^\]\n]{1,40}\]|[A-Z][A-Za-z_. ]{0,30}:)", re.MULTILINE)
"""How a turn of a conversation begins: `Doctor:` or `[doctor]`."""


@dataclass(frozen=True)
class Measured:
    """What the scores of n reports are made of.

    Parameters
    ----------
    facts : (n, len(COUNTS)) from `compare_facts`.
    rouge : (n, 3) F-measures.
    sections : (n, 4) ROUGE-L summed over the sections of the reference (a missing one scores 0), how many those are,
        how many of them are missing, and how many others there are; 0 where the reference has no named section.
    bertscore : (n,) F-measures, or None without an encoder.
    """

    facts: np.ndarray
    rouge: np.ndarray
    sections: np.ndarray
    bertscore: np.ndarray | None = None

    def table(self) -> tuple[np.ndarray, list[str]]:
        """Return all columns together, and their names."""
        parts = [self.facts, self.rouge, self.sections]
        names = [*(f"facts_{name}" for name in COUNTS), *ROUGE, *SECTIONS]
        if self.bertscore is not None:
            parts, names = [*parts, self.bertscore[:, None]], [*names, "bertscore"]
        return np.concatenate(parts, axis=1), names


def measure(
    generated: Sequence[str],
    references: Sequence[str],
    sources: Sequence[str],
    *,
    bertscore_model: str | None = None,
) -> Measured:
    """Compare generated reports with their references and sources.

    Parameters
    ----------
    bertscore_model : folder of an encoder; without it there is no BERTScore.
    """
    from clinical_nlp.metrics import load

    facts = [
        compare_facts(made, wanted, source=source).counts()
        for made, wanted, source in zip(generated, references, sources, strict=True)
    ]
    overlap = load("rouge")
    texts: dict[str, Any] = {"predictions": list(generated), "references": list(references), "use_aggregator": False}
    rouge = overlap.compute(**texts)
    bert = None
    if bertscore_model is not None:
        values = load("bertscore").compute(**texts, encoder=bertscore_model)["f1"]
        bert = np.nan_to_num(np.asarray(values, dtype=np.float64))  # an empty text is like nothing
    return Measured(
        facts=np.array(facts).reshape(-1, len(COUNTS)),
        rouge=np.array([rouge[name] for name in ROUGE], dtype=np.float64).T.reshape(-1, len(ROUGE)),
        sections=_sections(generated, references, overlap),
        bertscore=bert,
    )


def _sections(generated: Sequence[str], references: Sequence[str], overlap: Any) -> np.ndarray:
    """Compare section by section, as the metric note_sections does, where the reference has a named section."""
    from clinical_nlp.metrics.note_sections import sections_by_category

    counts = np.zeros((len(generated), len(SECTIONS)))
    pairs: list[tuple[str, str]] = []
    places: list[int] = []
    for row, (made, wanted) in enumerate(zip(generated, references, strict=True)):
        if not any(section.named for section in find_sections(wanted)):
            continue
        mine, theirs = sections_by_category(made), sections_by_category(wanted)
        counts[row, 1:] = len(theirs), len(theirs.keys() - mine.keys()), len(mine.keys() - theirs.keys())
        for category in sorted(theirs.keys() & mine.keys()):
            pairs.append((mine[category], theirs[category]))
            places.append(row)
    if pairs:
        made_texts, wanted_texts = zip(*pairs, strict=True)
        found = overlap.compute(predictions=list(made_texts), references=list(wanted_texts), use_aggregator=False)[
            "rougeL"
        ]
        np.add.at(counts[:, 0], places, np.asarray(found, dtype=np.float64))
    return counts


_Statistic = Callable[[np.ndarray], np.ndarray]


def _mean(column: int) -> _Statistic:
    """Mean over notes of a column; the last column counts notes."""
    return lambda c: c[..., column] / c[..., -1]


def _ratio(over: int, under: int) -> _Statistic:
    return lambda c: c[..., over] / c[..., under]


def _f1(both: int, one: int, other: int) -> _Statistic:
    return lambda c: 2 * c[..., both] / (c[..., one] + c[..., other])


def _statistics(names: Sequence[str]) -> dict[str, tuple[_Statistic, str]]:
    """Return the statistics that are no fact scores, by name, each with the reason why it may be undefined."""
    place = {name: at for at, name in enumerate(names)}
    found = {name: (_mean(place[name]), "no notes") for name in (*ROUGE, "bertscore") if name in place}
    none = "no reference has a named section"
    found["section_rougeL"] = (_ratio(place["section_rougeL"], place["section_reference"]), none)
    found["section_missing_rate"] = (_ratio(place["section_missing"], place["section_reference"]), none)
    return found


def estimates(
    found: Measured, patients: Sequence[str], *, part: str, seed: int, prefix: str = "test."
) -> dict[str, Estimate]:
    """Turn measures into scores, each with its patient-bootstrap interval.

    Returns
    -------
    dict of Estimate: rouge1, rouge2, rougeL (means over notes); section_rougeL (mean over the sections of the
        references; a missing one scores 0) and section_missing_rate; bertscore, if measured; those of `fact_scores`.
    """
    table, names = found.table()
    summed = by_patient(patients, np.concatenate([table, np.ones((len(table), 1))], axis=1))
    common: dict[str, Any] = {"n_notes": len(patients), "part": part, "seed": seed}
    result = {}
    for name, (statistic, reason) in _statistics(names).items():
        estimate = patient_bootstrap(summed, statistic, **common)
        if math.isnan(estimate.value):
            values = {each.name: getattr(estimate, each.name) for each in fields(estimate)}
            estimate = Estimate(**{**values, "note": f"undefined: {reason}"})
        result[prefix + name] = estimate
    return result | fact_scores(found.facts, patients, part=part, seed=seed, prefix=prefix)


_CHANGES = {
    "invention_rate": ("unsupported", "checked"),
    "flipped_rate": ("flipped", "asserted"),
    "flipped_source_rate": ("flipped_source", "asserted_source"),
    "number_error_rate": ("numbers_wrong", "numbers_compared"),
    "side_error_rate": ("sides_wrong", "sides_compared"),
    "error_rate": ("pairs_wrong", "pairs"),
}


def changes(before: Measured, after: Measured, patients: Sequence[str], *, part: str, seed: int) -> dict[str, Estimate]:
    """Estimate `change.*`, scores after minus before on the same notes; patients are resampled with both sides."""
    (first, names), (second, _) = before.table(), after.table()
    ones = np.ones((len(first), 1))
    width = first.shape[1] + 1
    summed = by_patient(patients, np.concatenate([first, ones, second, ones], axis=1))
    place = {name: at for at, name in enumerate(names)}
    wanted = {name: statistic for name, (statistic, _) in _statistics(names).items()}
    wanted["fact_f1"] = _f1(*(place[f"facts_{name}"] for name in ("matched", "generated", "reference")))
    wanted |= {
        name: _ratio(place[f"facts_{over}"], place[f"facts_{under}"]) for name, (over, under) in _CHANGES.items()
    }

    def change(statistic: _Statistic) -> _Statistic:
        return lambda c: statistic(c[..., width:]) - statistic(c[..., :width])

    return {
        f"change.{name}": patient_bootstrap(summed, change(statistic), n_notes=len(patients), part=part, seed=seed)
        for name, statistic in wanted.items()
    }


def write_scores(folder: Path, rows: Sequence[tuple[str, Sequence[str], Sequence[str], Measured]]) -> None:
    """Write `scores.parquet`: what every score is made of, one row a system and note, without text.

    Parameters
    ----------
    rows : of each system its name, the ids of its pairs, their patients, and what was measured.
    """
    import pyarrow.parquet as pq

    tables = []
    for system, pairs, patients, found in rows:
        values, names = found.table()
        columns: dict[str, Any] = {
            "system": [system] * len(pairs),
            "pair_id": list(pairs),
            "patient_id": list(patients),
        }
        columns |= {name: values[:, at] for at, name in enumerate(names)}
        tables.append(pa.table(columns))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(tables), sink)
    write_atomic(folder / SCORES, sink.getvalue().to_pybytes())


# -- baselines -------------------------------------------------------------------------------------------------------


def copy_longest(sources: Sequence[str], kind: str) -> list[str]:
    """Copy the longest part of each source.

    The longest named section where the source has sections; of a conversation its longest turn for a section of a note,
    and the whole of it for a whole note; the whole source where nothing divides it.
    """
    return [_longest(source, kind) for source in sources]


def _longest(source: str, kind: str) -> str:
    if kind == "dialogue_note":
        return source
    if kind == "dialogue_section":
        starts = [0, *[found.start() for found in _TURN.finditer(source) if found.start()], len(source)]
        turns = [source[begin:end] for begin, end in itertools.pairwise(starts)]
        return max((_TURN.sub("", turn, count=1).strip() for turn in turns), key=len)
    sections = find_sections(source)
    return max((source[part.header_end : part.end].strip() for part in sections), key=len, default=source)


def nearest_targets(sources: Sequence[str], targets: Sequence[str], asked: Sequence[str]) -> list[str]:
    """Return, for each source that is asked for, the target of the training source with the nearest TF-IDF vector."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True)
    known = vectorizer.fit_transform(sources)
    found: list[str] = []
    for begin in range(0, len(asked), 500):
        likeness = vectorizer.transform(asked[begin : begin + 500]) @ known.T
        found += [targets[int(row)] for row in np.asarray(likeness.argmax(axis=1)).ravel()]
    return found
