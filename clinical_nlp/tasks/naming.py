"""Codes that a text names: what the dictionary finds, weighed by how often the code was given where it was found.

A model that has seen a code twice cannot read it; the dictionary can, but does not know that nobody codes a cough.
How often a code was given where the dictionary found its name (or that of a code of the same category) is counted on
training documents, and what that is worth beside the model is fitted on development documents.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from clinical_nlp.language.mentions import Annotator
from clinical_nlp.language.terminology.code_status import category
from clinical_nlp.statistics.calibration import fit_calibration

SYSTEM = "ICD-10-CM"
"""The code system whose names are known."""
_WEIGHT = 3.0
"""Documents that the first guess of how often a code is given counts for."""
_RELATED = 0.05
"""First guess for another code of the category."""
_LEAST = 0.03
"""What is given less often is left out."""


@dataclass(frozen=True)
class NamedCodes:
    """Gains in log-odds: concept that is found -> place of a code on the list -> gain."""

    gains: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    def __call__(self, documents: Sequence[Sequence[str]], n_codes: int) -> np.ndarray:
        """Return what the dictionary adds to the logits of documents (the texts of their notes), (n, n_codes)."""
        if not self.gains:
            return np.zeros((len(documents), n_codes), dtype=np.float32)
        return self.gained(named_concepts(documents), n_codes)

    def gained(self, found: Sequence[frozenset[str]], n_codes: int) -> np.ndarray:
        """Return what is added where documents name these concepts, (n, n_codes): for a code the greatest gain."""
        added = np.zeros((len(found), n_codes), dtype=np.float32)
        for row, concepts in enumerate(found):
            for concept in concepts:
                for place, gain in self.gains.get(concept, {}).items():
                    added[row, place] = max(added[row, place], gain)
        return added

    def as_json(self) -> dict[str, Any]:
        """Return the gains as they are written in `task.json`."""
        return {concept: {str(place): gain for place, gain in row.items()} for concept, row in self.gains.items()}

    @classmethod
    def from_json(cls, written: Mapping[str, Mapping[str, float]]) -> NamedCodes:
        """Return what `as_json` wrote."""
        return cls({concept: {int(place): gain for place, gain in row.items()} for concept, row in written.items()})


def named_concepts(documents: Sequence[Sequence[str]]) -> list[frozenset[str]]:
    """Return for each document the codes that a note of it names as a fact about the patient, now or in the past."""
    annotator = _annotator()
    return [
        frozenset(
            mention.concept_id
            for text in texts
            for mention in annotator.annotate(text)
            if mention.concept_id is not None
            and mention.assertion.presence != "absent"
            and mention.assertion.modality == "actual"
            and mention.assertion.experiencer == "patient"
        )
        for texts in documents
    ]


@lru_cache(maxsize=1)
def _annotator() -> Annotator:
    return Annotator("icd10cm")


def fit_named_codes(
    codes: Sequence[str],
    taught: tuple[Sequence[frozenset[str]], Sequence[Collection[str]]],
    tuned: tuple[Sequence[frozenset[str]], np.ndarray, np.ndarray],
) -> NamedCodes:
    """Count on training documents, and fit on development documents.

    Parameters
    ----------
    codes : the code list.
    taught : of training documents, the named concepts and the codes that they have.
    tuned : of development documents, the named concepts, the model's logits and the gold, both (n, n_codes).

    Notes
    -----
    With r the share of documents that have the code among those that name the concept, smoothed, the log-odds of a
    code are those of the model (Platt scaling: s * logit + c), and where it is named a + b * log(r / (1 - r)) more. a
    and b are fitted where something is named, by maximum likelihood with a normal prior of unit variance; the gain is
    that sum over s, where it is positive.
    """
    from scipy.optimize import minimize

    shares = _shares(codes, *taught)
    found, logits, gold = tuned
    odds = {
        concept: {place: float(np.log(share / (1 - share))) for place, share in row.items()}
        for concept, row in shares.items()
    }
    named = np.full(logits.shape, -np.inf)
    for row, concepts in enumerate(found):
        for concept in concepts:
            for place, value in odds.get(concept, {}).items():
                named[row, place] = max(named[row, place], value)
    hit = np.isfinite(named)
    scale = fit_calibration(logits, gold)
    if not hit.any():
        return NamedCodes()
    own, value, sign = scale.slope * logits[hit] + scale.offset, named[hit], np.where(gold[hit], -1.0, 1.0)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (own + weights[0] + weights[1] * value)
        slope = sign / (1 + np.exp(-margin))
        total = np.logaddexp(0, margin).sum() + 0.5 * (weights**2).sum()
        return float(total), np.array([slope.sum(), (slope * value).sum()]) + weights

    offset, weight = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B").x
    gains = {
        concept: {
            place: float(gain) for place, value in row.items() if (gain := (offset + weight * value) / scale.slope) > 0
        }
        for concept, row in odds.items()
    }
    return NamedCodes({concept: row for concept, row in sorted(gains.items()) if row})


def _shares(
    codes: Sequence[str], found: Sequence[frozenset[str]], given: Sequence[Collection[str]]
) -> dict[str, dict[int, float]]:
    """Return concept -> place of a code of its category -> smoothed share of the documents that have the code."""
    times: Counter[str] = Counter()
    together: Counter[tuple[str, str]] = Counter()
    for concepts, own in zip(found, given, strict=True):
        times.update(concepts)
        together.update((concept, code) for concept in concepts for code in own)
    place_of = {code: place for place, code in enumerate(codes)}
    of_category: dict[str, list[str]] = defaultdict(list)
    for code in codes:
        of_category[category(code, SYSTEM)].append(code)
    known = [concept for concept in times if concept in place_of]
    right = sum(together[concept, concept] for concept in known)
    first_guess = right / total if (total := sum(times[concept] for concept in known)) else 0.5
    shares: dict[str, dict[int, float]] = {}
    for concept in sorted({*times, *codes}):  # a code that was never named may be named yet
        row = {}
        for code in of_category[category(concept, SYSTEM)]:
            prior = first_guess if code == concept or code == category(concept, SYSTEM) else _RELATED
            share = (together[concept, code] + _WEIGHT * prior) / (times[concept] + _WEIGHT)
            if share > _LEAST:
                row[place_of[code]] = min(share, 0.99)
        shares[concept] = row
    return shares
