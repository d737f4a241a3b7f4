"""ROUGE-1, ROUGE-2 and ROUGE-L between generated and reference texts, as the `rouge-score` package computes them."""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate
from rouge_score import rouge_scorer

_DESCRIPTION = "ROUGE F-measures of the rouge-score package, averaged over pairs with a reference."
_INPUTS = """
predictions : generated texts.
references : one text each.
use_stemmer : whether words are compared by their Porter stems.
use_aggregator : mean over pairs, or a list with one score a pair.
"""
_CITATION = "Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries."
KINDS = ("rouge1", "rouge2", "rougeL")


class Rouge(evaluate.Metric):
    """ROUGE F-measures; a pair without a reference is undefined (NaN) and stays out of the mean."""

    def _info(self) -> evaluate.MetricInfo:
        texts = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(texts),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        use_stemmer: bool = False,
        use_aggregator: bool = True,
    ) -> dict[str, Any]:
        scorer = rouge_scorer.RougeScorer(list(KINDS), use_stemmer=use_stemmer)
        scores: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for prediction, reference in zip(predictions, references, strict=True):
            found = scorer.score(reference, prediction) if reference.strip() else None
            for kind in KINDS:
                scores[kind].append(math.nan if found is None else found[kind].fmeasure)
        if not use_aggregator:
            return scores
        defined = [k for k, reference in enumerate(references) if reference.strip()]
        result: dict[str, Any] = {
            kind: sum(values[k] for k in defined) / len(defined) if defined else math.nan
            for kind, values in scores.items()
        }
        result["n"] = len(defined)
        if not defined:
            result["reason"] = "no pair has a reference"
        return result
