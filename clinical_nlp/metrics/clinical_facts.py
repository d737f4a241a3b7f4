"""Faithfulness of generated clinical text: facts lost, invented, turned round or altered, by the package's rules."""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate
import numpy as np

from clinical_nlp.tasks.faithfulness import COUNTS, compare_facts, scores_of

_DESCRIPTION = "Precision, recall and F1 of clinical facts, and rates of invention, flipped assertions, numbers, sides."
_INPUTS = """
predictions : generated texts.
references : one text each.
sources : what the texts were generated from, one each; without them nothing counts as invented.
"""


class ClinicalFacts(evaluate.Metric):
    """Scores of `clinical_nlp.tasks.faithfulness`, over all pairs; NaN, with a reason, where nothing can be counted."""

    def _info(self) -> evaluate.MetricInfo:
        texts = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(texts)
        )

    def _compute(
        self, predictions: list[str], references: list[str], sources: list[str] | None = None
    ) -> dict[str, Any]:
        given = [None] * len(predictions) if sources is None else sources
        rows = [
            compare_facts(prediction, reference, source=source).counts()
            for prediction, reference, source in zip(predictions, references, given, strict=True)
        ]
        summed = np.sum(rows, axis=0) if rows else np.zeros(len(COUNTS))
        scores, reasons = scores_of(summed)
        result: dict[str, Any] = dict(scores)
        result["n"] = len(rows)
        if any(math.isnan(value) for value in scores.values()):
            result["reasons"] = reasons
        return result
