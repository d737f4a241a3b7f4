"""One comparison of two institutions: all tests on one plan, the repeat on one note a patient, and what follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from clinical_nlp.notes.schema import Note
from clinical_nlp.statistics.permutation import PermutationPlan, holm, profile_strata
from clinical_nlp.statistics.sample import SampledNotes
from clinical_nlp.statistics.text_measures import token_shares, word_counts
from clinical_nlp.statistics.two_sample import (
    TestResult,
    TokenShift,
    domain_classifier_test,
    length_test,
    mmd_test,
    utilisation_test,
    vocabulary_test,
)

CONFIRMATORY = ("domain_classifier", "mmd", "length", "vocabulary")
FEWEST_PATIENTS = 12
"""Below this in either institution no verdict is given: a shift must be gross to be seen, and intervals do not hold."""
SMALLEST_CELL = 11
LEVEL = 0.05

Verdict = Literal["differ", "not_distinguished", "too_few"]
Basis = Literal["all_notes", "one_note"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found between a reference and another institution.

    `basis` names the tests that the verdict rests on: over all sampled notes, or, where patients of one institution
    have more notes, over one random note a patient, which is exact then. `adjusted` holds their p-values after Holm
    over the confirmatory tests of all comparisons of the analysis. No test is there with fewer than two patients on
    a side.
    """

    reference: str
    other: str
    n_patients: tuple[int, int]
    n_notes: tuple[int, int]
    verdict: Verdict = "too_few"
    basis: Basis = "all_notes"
    utilisation: TestResult | None = None
    all_notes: tuple[TestResult, ...] = ()
    one_note: tuple[TestResult, ...] = ()
    tokens: tuple[TokenShift, ...] = ()
    adjusted: tuple[tuple[str, float], ...] = ()

    @property
    def tests(self) -> dict[str, TestResult]:
        """The tests that the verdict rests on, by name."""
        return {test.name: test for test in (self.all_notes if self.basis == "all_notes" else self.one_note)}


def compare(
    sample: SampledNotes,
    *,
    reference: str,
    other: str,
    members: Sequence[str] | None = None,
    represent: Callable[[Sequence[Note]], np.ndarray],
    stratify: bool = False,
    n_permutations: int = 999,
    seed: int = 0,
) -> Comparison:
    """Compare the notes of two institutions.

    Parameters
    ----------
    sample : notes of patients who each stand in one institution.
    reference : the institution compared against.
    other : the other one, or a name for several.
    members : the institutions that `other` stands for, if several.
    represent : notes to vectors (n, d), blind to institutions.
    stratify : compare within like mixes of notes: means of each note type are taken out of vectors and lengths, and
        patients are permuted within `profile_strata`.
    n_permutations, seed : of the relabellings.

    Returns
    -------
    Comparison without a verdict yet; see `decide`.
    """
    ours = {other} if members is None else set(members)
    rows = np.array([i for i, name in enumerate(sample.institutions) if name == reference or name in ours], dtype=int)
    sample = sample.select(rows)
    sides = ["reference" if name == reference else "other" for name in sample.institutions]
    people = [len({p for p, s in zip(sample.patient_ids, sides, strict=True) if s == side}) for side in _SIDES]
    found = Comparison(reference, other, (people[0], people[1]), (sides.count("reference"), sides.count("other")))
    if min(people) < 2:
        return found
    vectors = represent(sample.notes)
    texts = [note.text for note in sample.notes]
    shares, tokens = token_shares(texts, sample.patient_ids)
    words = np.maximum(word_counts(texts), 1).astype(np.float64)
    strata = None
    if stratify:
        types = [note.note_type for note in sample.notes]
        strata = profile_strata(sample.patient_ids, sides, types, sample.notes_of_patient)
        vectors = _without_type_means(vectors, types)
        words = np.exp(_without_type_means(np.log(words)[:, None], types)[:, 0])

    def measure(kept: np.ndarray) -> tuple[tuple[TestResult, ...], tuple[TokenShift, ...]]:
        plan = PermutationPlan(
            [sample.patient_ids[i] for i in kept],
            [sides[i] for i in kept],
            reference="reference",
            strata=None if strata is None else strata[kept],
            n_permutations=n_permutations,
            seed=seed,
        )
        vocabulary = vocabulary_test(shares[kept], tokens, plan, smallest_cell=SMALLEST_CELL)
        tests = (
            domain_classifier_test(vectors[kept], plan),
            mmd_test(vectors[kept], plan),
            length_test(words[kept], plan),
            vocabulary.jensen_shannon,
            vocabulary.kullback_leibler,
        )
        return tests, vocabulary.tokens

    everything, all_tokens = measure(np.arange(len(texts)))
    single, one_tokens = measure(np.flatnonzero(sample.is_first))
    whole = PermutationPlan(sample.patient_ids, sides, reference="reference", n_permutations=n_permutations, seed=seed)
    total = int(sample.notes_of_patient[sample.is_first].sum())
    utilisation = replace(utilisation_test(sample.notes_of_patient, whole), n_notes=total)
    unequal = utilisation.p_value <= LEVEL
    return replace(
        found,
        basis="one_note" if unequal else "all_notes",
        utilisation=utilisation,
        all_notes=everything,
        one_note=single,
        tokens=one_tokens if unequal else all_tokens,
    )


def _without_type_means(values: np.ndarray, types: Sequence[str | None]) -> np.ndarray:
    _, kind = np.unique([name or "" for name in types], return_inverse=True)
    means = np.zeros((kind.max() + 1, values.shape[1]))
    np.add.at(means, kind, values)
    means /= np.bincount(kind)[:, None]
    return np.asarray(values - means[kind])


_SIDES = ("reference", "other")


def permutations_needed(n_comparisons: int) -> int:
    """Fewest relabellings with which one test of all comparisons can still pass Holm at the level."""
    return math.ceil(len(CONFIRMATORY) * n_comparisons / LEVEL) - 1


def decide(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Adjust the confirmatory tests of all comparisons together (Holm) and give each its verdict."""
    judged = [index for index, item in enumerate(comparisons) if item.tests]
    names = [(index, name) for index in judged for name in CONFIRMATORY]
    # Comparisons with too few patients get no verdict, and take no part in the family that verdicts come from.
    family = [key for key in names if min(comparisons[key[0]].n_patients) >= FEWEST_PATIENTS]
    p_values = holm([comparisons[index].tests[name].p_value for index, name in family])
    adjusted = dict(zip(family, p_values, strict=True))
    decided = []
    for index, item in enumerate(comparisons):
        mine = tuple((name, adjusted[index, name]) for name in CONFIRMATORY if (index, name) in adjusted)
        verdict: Verdict = "too_few"
        if mine:
            verdict = "differ" if any(p <= LEVEL for _, p in mine) else "not_distinguished"
        decided.append(replace(item, adjusted=mine, verdict=verdict))
    return decided
