"""Scores by section for generated notes: ROUGE of each section, sections that are missing or were not asked for."""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate
from rouge_score import rouge_scorer

from clinical_nlp.language.sections import find_sections

_DESCRIPTION = "ROUGE F-measures by section category; a section that the generated note lacks scores 0."
_INPUTS = """
predictions : generated notes.
references : one note each.
use_stemmer : whether words are compared by their Porter stems.
"""
KINDS = ("rouge1", "rouge2", "rougeL")


def sections_by_category(note: str) -> dict[str, str]:
    """Return the text of each section category of a note, without headers; text before any header is `other`."""
    found: dict[str, list[str]] = {}
    for section in find_sections(note):
        body = note[section.header_end if section.named else section.start : section.end].strip(" \t\n:=*#-")
        if body:
            found.setdefault(section.category, []).append(body)
    return {category: "\n".join(bodies) for category, bodies in found.items()}


class NoteSections(evaluate.Metric):
    """Mean over the sections of the references, and by category; missing and extra sections are counted."""

    def _info(self) -> evaluate.MetricInfo:
        texts = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(texts)
        )

    def _compute(self, predictions: list[str], references: list[str], use_stemmer: bool = False) -> dict[str, Any]:
        scorer = rouge_scorer.RougeScorer(list(KINDS), use_stemmer=use_stemmer)
        by_category: dict[str, dict[str, list[float]]] = {}
        missing: dict[str, int] = {}
        extra: dict[str, int] = {}
        for prediction, reference in zip(predictions, references, strict=True):
            own, theirs = sections_by_category(prediction), sections_by_category(reference)
            for category in own.keys() - theirs.keys():
                extra[category] = extra.get(category, 0) + 1
            for category, text in theirs.items():
                scores = by_category.setdefault(category, {kind: [] for kind in KINDS})
                if category not in own:
                    missing[category] = missing.get(category, 0) + 1
                found = scorer.score(text, own.get(category, ""))
                for kind in KINDS:
                    scores[kind].append(found[kind].fmeasure)
        result: dict[str, Any] = {}
        for kind in KINDS:
            values = [value for scores in by_category.values() for value in scores[kind]]
            result[kind] = sum(values) / len(values) if values else math.nan
        sections = {
            category: {
                **{kind: sum(values) / len(values) for kind, values in scores.items()},
                "n": len(scores["rouge1"]),
            }
            for category, scores in sorted(by_category.items())
        }
        result["n"] = sum(section["n"] for section in sections.values())
        result.update(sections=sections, missing=dict(sorted(missing.items())), extra=dict(sorted(extra.items())))
        result["missing_rate"] = sum(missing.values()) / result["n"] if result["n"] else math.nan
        if not result["n"]:
            result["reason"] = "no reference has a section with text"
        return result
