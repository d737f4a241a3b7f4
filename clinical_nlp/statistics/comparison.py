"""One comparison of two institutions: all tests on one plan, the repeat on one note a patient, and what follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from clinical_nlp.errors import TooFewPatientsError
from clinical_nlp.notes.schema import Note
from clinical_nlp.statistics.attribution import Claim, Conventions, attribute, text_scores
from clinical_nlp.statistics.clinical_units import ClinicalUnit, NoteMeasures, closing_lines, common, measure
from clinical_nlp.statistics.distances import coral_test, frechet_test, histogram_test
from clinical_nlp.statistics.domain_classifier import domain_classifier_test, mlp_classifier_test
from clinical_nlp.statistics.max_t import MeasureShift, max_t_test
from clinical_nlp.statistics.mmd import mmd_test
from clinical_nlp.statistics.permutation import PermutationPlan, holm, profile_strata
from clinical_nlp.statistics.power import Power, power_of_classifier
from clinical_nlp.statistics.ratios import length_test, utilisation_test
from clinical_nlp.statistics.sample import SampledNotes
from clinical_nlp.statistics.text_measures import token_shares, word_counts
from clinical_nlp.statistics.two_sample import TestResult
from clinical_nlp.statistics.vocabulary import TokenShift, vocabulary_test

CONFIRMATORY = ("domain_classifier", "mmd", "length", "vocabulary", "units")
FEWEST_PATIENTS = 12
"""Below this in either institution no verdict is given: a shift must be gross to be seen, and intervals do not hold."""
SMALLEST_CELL = 11
LEVEL = 0.05

Verdict = Literal["differ", "not_distinguished", "too_few"]
Basis = Literal["all_notes", "one_note"]


@dataclass(frozen=True, slots=True)
class UnitShift:
    """How one clinical unit differs, and on which sides fewer than 11 patients depart from its commonest value.

    On such a side the number of the shift must not be shown; `usual` is the commonest value.
    """

    unit: ClinicalUnit
    shift: MeasureShift
    usual: float = math.nan
    few: tuple[bool, bool] = (False, False)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found between a reference and another institution.

    `basis` names the tests that the verdict rests on: over all sampled notes, or, where patients of one institution
    have more notes, over one random note a patient, which is exact then. `adjusted` holds their p-values after Holm
    over the confirmatory tests of all comparisons of the analysis. No test is there with fewer than two patients on
    a side. `units` are what changed in units that a reader knows, ranked; their p-values are adjusted together.
    `claims` says what may be concluded. `further` are tests and distances that no verdict rests on, with p-values that
    are not adjusted. `power` is what so many patients can show. `note` says why there is no test although both
    institutions have patients.
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
    units: tuple[UnitShift, ...] = ()
    claims: tuple[Claim, ...] = ()
    confirmatory: tuple[str, ...] = CONFIRMATORY
    further: tuple[TestResult, ...] = ()
    power: Power | None = None
    note: str = ""

    @property
    def tests(self) -> dict[str, TestResult]:
        """The tests that the verdict rests on, by name."""
        return {test.name: test for test in (self.all_notes if self.basis == "all_notes" else self.one_note)}


@dataclass(frozen=True, eq=False)
class Gold:
    """What is known of the notes of a sample beyond their text; each None where there is nothing.

    `labels` (n_notes,) 0, 1 or NaN; `logits` (n_notes, 2) of the label; `outputs` (n_notes, k) of a task model and
    their names; `conventions` are notes marked twice.
    """

    label_name: str = "the label"
    labels: np.ndarray | None = None
    labels_are_marked: bool = True
    logits: np.ndarray | None = None
    outputs: tuple[np.ndarray, tuple[str, ...]] | None = None
    conventions: Conventions | None = None

    def select(self, rows: np.ndarray) -> Gold:
        """Return what is known of some notes."""
        return replace(
            self,
            labels=None if self.labels is None else self.labels[rows],
            logits=None if self.logits is None else self.logits[rows],
            outputs=None if self.outputs is None else (self.outputs[0][rows], self.outputs[1]),
        )


def compare(
    sample: SampledNotes,
    *,
    reference: str,
    other: str,
    members: Sequence[str] | None = None,
    represent: Callable[[Sequence[Note]], np.ndarray],
    measures: NoteMeasures | None = None,
    gold: Gold | None = None,
    cells: Sequence[str] | None = None,
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
    measures : of the sample's notes (see `clinical_units.measure`); made here if not given.
    gold : what else is known of the sample's notes.
    cells : one label a note of the sample, such as note type and year: only notes of one cell are compared, cells are
        summed with fixed weights, and patients are permuted within `profile_strata` of their mix of cells. Approximate,
        and without intervals.
    n_permutations, seed : of the relabellings.

    Returns
    -------
    Comparison without a verdict yet; see `decide`.
    """
    ours = {other} if members is None else set(members)
    rows = np.array([i for i, name in enumerate(sample.institutions) if name == reference or name in ours], dtype=int)
    sample = sample.select(rows)
    within = None if cells is None else np.asarray(cells, dtype=str)[rows]
    gold = Gold() if gold is None else gold.select(rows)
    sides = ["reference" if name == reference else "other" for name in sample.institutions]
    people = [len({p for p, s in zip(sample.patient_ids, sides, strict=True) if s == side}) for side in _SIDES]
    found = Comparison(reference, other, (people[0], people[1]), (sides.count("reference"), sides.count("other")))
    if min(people) < 2:
        return found
    vectors = represent(sample.notes)
    texts = [note.text for note in sample.notes]
    shares, tokens = token_shares(texts, sample.patient_ids)
    looked_at = measure(sample.notes) if measures is None else measures.select(rows)
    values = looked_at.values
    words = np.maximum(word_counts(texts), 1).astype(np.float64)
    strata = None
    if within is not None:
        strata = profile_strata(sample.patient_ids, sides, within.tolist(), sample.notes_of_patient)

    def test(kept: np.ndarray) -> _Tested:
        plan = PermutationPlan(
            [sample.patient_ids[i] for i in kept],
            [sides[i] for i in kept],
            reference="reference",
            strata=None if strata is None else strata[kept],
            n_permutations=n_permutations,
            seed=seed,
        )
        cell = None if within is None else within[kept].tolist()
        try:
            vocabulary = vocabulary_test(shares[kept], tokens, plan, cells=cell, smallest_cell=SMALLEST_CELL)
        except TooFewPatientsError as error:
            if cell is None:
                raise
            return _Tested(plan, why=str(error))
        tests = [
            domain_classifier_test(vectors[kept], plan, cells=cell),
            mmd_test(vectors[kept], plan, cells=cell),
            length_test(words[kept], plan, cells=cell),
            vocabulary.jensen_shannon,
            vocabulary.kullback_leibler,
        ]
        raw, patients = values[kept], plan.note_patient
        columns = [i for i in range(len(looked_at.units)) if common(raw[:, i], patients, SMALLEST_CELL)]
        units: tuple[UnitShift, ...] = ()
        if columns:
            keys = [looked_at.units[i].key for i in columns]
            found = max_t_test(raw[:, columns], keys, plan, cells=cell, name="units")
            tests.append(found.test)
            units = tuple(
                sorted(
                    (
                        _unit_shift(looked_at.units[i], shift, raw[:, i], plan)
                        for i, shift in zip(columns, found.measures, strict=True)
                        if not math.isnan(shift.adjusted_p)  # one side may have nothing to measure
                    ),
                    key=lambda item: (item.shift.adjusted_p, -item.shift.statistic),
                )
            )
        return _Tested(plan, tuple(tests), vocabulary.tokens, units)

    everything, single = test(np.arange(len(texts))), test(np.flatnonzero(sample.is_first))
    whole = PermutationPlan(sample.patient_ids, sides, reference="reference", n_permutations=n_permutations, seed=seed)
    total = int(sample.notes_of_patient[sample.is_first].sum())
    utilisation = replace(utilisation_test(sample.notes_of_patient, whole), n_notes=total)
    unequal = utilisation.p_value <= LEVEL
    chosen = single if unequal else everything
    claims: tuple[Claim, ...] = ()
    further: tuple[TestResult, ...] = ()
    if min(people) >= FEWEST_PATIENTS and chosen.tests:
        kept = np.flatnonzero(sample.is_first) if unequal else np.arange(len(texts))
        known = gold.select(kept)
        if known.labels is not None and known.logits is None:
            known = replace(known, logits=_word_scores([texts[i] for i in kept], chosen.plan, known.labels))
        claims = attribute(
            chosen.plan,
            NoteMeasures(values[kept], looked_at.units),
            labels=known.labels,
            label_name=known.label_name,
            labels_are_marked=known.labels_are_marked,
            logits=known.logits,
            outputs=known.outputs,
            lines=closing_lines([sample.notes[i] for i in kept]),
            conventions=known.conventions,
            cells=None if within is None else within[kept].tolist(),
        )
        if within is None:
            further = _further(vectors[kept], words[kept], chosen.plan)
    power = None
    if chosen.tests:
        power = power_of_classifier(chosen.tests[0], chosen.plan, level=LEVEL / len(CONFIRMATORY))
    return replace(
        found,
        basis="one_note" if unequal else "all_notes",
        utilisation=utilisation,
        all_notes=everything.tests,
        one_note=single.tests,
        tokens=chosen.tokens,
        units=chosen.units,
        claims=claims,
        further=further,
        power=power,
        note=chosen.why,
    )


def _further(vectors: np.ndarray, words: np.ndarray, plan: PermutationPlan) -> tuple[TestResult, ...]:
    """Second opinions, each as its excess over relabelled patients; no verdict rests on them."""
    lengths = histogram_test(words, plan, name="length")
    return (
        mlp_classifier_test(vectors, plan),
        coral_test(vectors, plan),
        frechet_test(vectors, plan),
        lengths.population_stability,
    )


def _word_scores(texts: Sequence[str], plan: PermutationPlan, labels: np.ndarray) -> np.ndarray | None:
    """Score the label by words where the reference has enough labelled patients for that."""
    at_home = np.where(plan.is_target[plan.note_patient], math.nan, labels)
    try:
        return text_scores(texts, plan, at_home)
    except TooFewPatientsError:
        return None


class _Tested(NamedTuple):
    plan: PermutationPlan
    tests: tuple[TestResult, ...] = ()
    tokens: tuple[TokenShift, ...] = ()
    units: tuple[UnitShift, ...] = ()
    why: str = ""


def _unit_shift(unit: ClinicalUnit, shift: MeasureShift, column: np.ndarray, plan: PermutationPlan) -> UnitShift:
    rounded = np.round(column, 6)
    values, counts = np.unique(rounded[np.isfinite(rounded)], return_counts=True)
    usual = float(values[counts.argmax()])
    departing = np.unique(plan.note_patient[np.isfinite(rounded) & (rounded != usual)])
    few = [int((plan.is_target[departing] == side).sum()) < SMALLEST_CELL for side in (False, True)]
    return UnitShift(unit, shift, usual, (few[0], few[1]))


_SIDES = ("reference", "other")


def permutations_needed(n_comparisons: int) -> int:
    """Fewest relabellings with which one test of all comparisons can still pass Holm at the level."""
    return math.ceil(len(CONFIRMATORY) * n_comparisons / LEVEL) - 1


def decide(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Adjust the confirmatory tests of all comparisons together (Holm) and give each its verdict."""
    judged = [index for index, item in enumerate(comparisons) if item.tests]
    # A test that could not be made has no p-value and counts in the family all the same.
    names = [(index, name) for index in judged for name in comparisons[index].confirmatory]
    # Comparisons with too few patients get no verdict, and take no part in the family that verdicts come from.
    family = [key for key in names if min(comparisons[key[0]].n_patients) >= FEWEST_PATIENTS]
    made = [comparisons[index].tests.get(name) for index, name in family]
    p_values = holm([math.nan if test is None else test.p_value for test in made])
    adjusted = dict(zip(family, p_values, strict=True))
    decided = []
    for index, item in enumerate(comparisons):
        mine = tuple((name, adjusted[index, name]) for name in item.confirmatory if (index, name) in adjusted)
        verdict: Verdict = "too_few"
        if mine:
            verdict = "differ" if any(p <= LEVEL for _, p in mine) else "not_distinguished"
        decided.append(replace(item, adjusted=mine, verdict=verdict))
    return decided
