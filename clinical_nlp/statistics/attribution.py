"""What changed between two institutions, as far as the evidence can say: style, prevalence, annotation, association.

Text alone shows that notes are written differently. It cannot show that annotators follow another convention (the
text is the same) or that style goes with a label in another way (each of both may look the same alone), and it shows
a changed prevalence only under an assumption. Each question gets one of four answers; `cannot_tell` is one of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from clinical_nlp.errors import TooFewPatientsError, UsageError
from clinical_nlp.runs import Estimate
from clinical_nlp.statistics.clinical_units import NoteMeasures, common
from clinical_nlp.statistics.intervals import FEWEST_PATIENTS
from clinical_nlp.statistics.label_shift import ASSUMPTION, LabelShift, label_shift
from clinical_nlp.statistics.max_t import MeasureShift, max_t_test, output_shift_test
from clinical_nlp.statistics.permutation import PermutationPlan
from clinical_nlp.statistics.text_measures import tokens_of

Question = Literal["style", "prevalence", "annotation", "association", "outputs", "loss"]
Answer = Literal["changed", "changed_if", "not_found", "cannot_tell"]
LEVEL = 0.05
FEWEST_INSTITUTIONS = 6
"""Below this no p-value over institutions and no word about institutions that were not compared."""
SAME_CONVENTION = "both institutions mark the label by the same convention"
_SMALLEST_CELL = 11
_OF_LINES, _OF_NOTES = 0.8, 0.2
"""Shares of the level: systems leave their marks in the closing lines of notes, and there are few of them."""
_GROSS = 0.001
"""Below this the scores contradict the assumption of label shift grossly; the test of it is approximate."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The answer to one question.

    `changed_if` holds under `condition` only. `p_value` is of the question as a whole (NaN where there is no test) and
    each question has the level for itself; `evidence` are the measures that it rests on, adjusted together.
    `estimates` are numbers by name, each with n and interval.
    """

    question: Question
    answer: Answer
    reason: str
    condition: str = ""
    p_value: float = math.nan
    n_patients: int = 0
    n_notes: int = 0
    evidence: tuple[MeasureShift, ...] = ()
    estimates: tuple[tuple[str, Estimate], ...] = ()


@dataclass(frozen=True, eq=False)
class Conventions:
    """How often each class is marked in the same notes under two conventions.

    `counts` is (n_notes, k, 2): under the reference's convention and under the other one.
    """

    patient_ids: Sequence[str]
    counts: np.ndarray
    classes: tuple[str, ...]


def attribute(
    plan: PermutationPlan,
    measures: NoteMeasures,
    *,
    labels: np.ndarray | None = None,
    label_name: str = "the label",
    labels_are_marked: bool = False,
    logits: np.ndarray | None = None,
    outputs: tuple[np.ndarray, Sequence[str]] | None = None,
    lines: np.ndarray | None = None,
    conventions: Conventions | None = None,
    cells: Sequence[object] | None = None,
    n_resamples: int = 200,
) -> tuple[Claim, ...]:
    """Answer what changed.

    Parameters
    ----------
    plan : relabellings of the notes' patients.
    measures : of the plan's notes; see `clinical_units.measure`.
    labels : (n_notes,) 0 or 1, NaN where nobody has labelled; labels of both institutions are "target gold".
    label_name : what the label says.
    labels_are_marked : whether labels come from marks in the text, so that another convention would change them.
    logits : (n_notes, 2) scores of the label from a model that has not seen the patient; see `text_scores`.
    outputs : (n_notes, k) what a task model says, and the k names.
    lines : (n_notes, k) 0 or 1; see `clinical_units.closing_lines`.
    conventions : the same notes marked twice.
    cells : one label a note, such as note type and year: style and outputs are compared within each; see `max_t_test`.
    n_resamples : patient resamples where there are no labels of the other institution.

    Returns
    -------
    One claim a question, in the order style, prevalence, association, annotation, then outputs and loss where there
    is something to ask.
    """
    n_notes = len(plan.note_patient)
    if len(measures.values) != n_notes:
        raise UsageError(f"measures of {len(measures.values)} notes for a plan of {n_notes}")
    known = np.full(n_notes, math.nan) if labels is None else np.asarray(labels, dtype=np.float64)
    if known.shape != (n_notes,) or not np.isin(known[np.isfinite(known)], (0.0, 1.0)).all():
        raise UsageError("labels must be one 0, 1 or NaN for each of the plan's notes")
    is_other = plan.is_target[plan.note_patient]
    labelled = [_both_labels(known[is_other == side]) for side in (False, True)]
    patients = plan.note_patient
    style_columns = [
        i
        for i, unit in enumerate(measures.units)
        if unit.kind == "style" and common(measures.values[:, i], patients, _SMALLEST_CELL)
    ]
    style = measures.select(np.arange(n_notes), np.array(style_columns, dtype=int))
    gold = all(labelled)
    found = _style(plan, style, known if gold else None, label_name, cells)
    annotation = annotation_claim(conventions)
    shift: LabelShift | None = None
    if gold:
        prevalence = _prevalence(plan, known, label_name, annotation, labels_are_marked)
        association = _association(plan, style, known, lines, label_name)
    else:
        shift, prevalence = _prevalence_if(plan, known, logits, labelled[0], found, label_name, n_resamples)
        association = Claim(
            "association",
            "cannot_tell",
            f"whether style goes with {label_name} in another way needs notes of both institutions with their labels",
        )
    claims = [found, prevalence, association, annotation]
    if outputs is not None:
        claims.append(_outputs(plan, outputs, cells))
    if logits is not None and labelled[0]:
        claims.append(_loss(plan, known, logits, gold, shift, found))
    return tuple(
        claim if claim.n_patients else replace(claim, n_patients=len(plan.patients), n_notes=n_notes)
        for claim in claims
    )


def _both_labels(values: np.ndarray) -> bool:
    """Whether nearly everything on a side is labelled, with both labels there."""
    finite = values[np.isfinite(values)]
    return bool(len(finite)) and len(finite) >= 0.5 * len(values) and 0 < finite.mean() < 1


def _named(shifts: Sequence[MeasureShift]) -> tuple[MeasureShift, ...]:
    return tuple(sorted((s for s in shifts if s.adjusted_p <= LEVEL), key=lambda s: (s.adjusted_p, -s.statistic)))


def _style(
    plan: PermutationPlan,
    style: NoteMeasures,
    labels: np.ndarray | None,
    label_name: str,
    cells: Sequence[object] | None,
) -> Claim:
    if not style.units:
        return Claim("style", "cannot_tell", "no measure of style is common enough in these notes")
    values, given = style.values, ""
    if labels is not None:
        values, given = _without_label_means(values, labels, plan), f" among notes of equal {label_name}"
    keys = [unit.key for unit in style.units]
    result = max_t_test(values, keys, plan, cells=cells, name="style")
    # The numbers shown are those of the notes as they are.
    plain = {s.name: s for s in max_t_test(style.values, keys, plan, cells=cells, name="style").measures}
    named = tuple(
        replace(plain[shift.name], p_value=shift.p_value, adjusted_p=shift.adjusted_p)
        for shift in _named(result.measures)
    )
    if result.test.p_value <= LEVEL:
        reason = f"notes are written differently{given}, in {len(named)} of {len(style.units)} measures of style"
        return Claim("style", "changed", reason, p_value=result.test.p_value, evidence=named)
    reason = f"none of {len(style.units)} measures of style differs beyond chance{given}"
    return Claim("style", "not_found", reason, p_value=result.test.p_value)


def _without_label_means(values: np.ndarray, labels: np.ndarray, plan: PermutationPlan) -> np.ndarray:
    """Take the mean of each label (every patient weighing 1) out of every measure; notes without label are left out."""
    found = np.full(values.shape, math.nan)
    for label in (0.0, 1.0):
        rows = np.flatnonzero(labels == label)
        inside, weight = values[rows], plan.note_weight[rows, None] * np.isfinite(values[rows])
        with np.errstate(all="ignore"):
            mean = np.nansum(inside * weight, axis=0) / weight.sum(axis=0)
        found[rows] = inside - mean
    return found


def _prevalence(
    plan: PermutationPlan, labels: np.ndarray, label_name: str, annotation: Claim, labels_are_marked: bool
) -> Claim:
    result = max_t_test(labels[:, None], [label_name], plan, name="prevalence")
    shift = result.measures[0]
    part = "labelled"
    estimates = tuple(
        (where, _mean_estimate(labels, plan, side, part)) for where, side in (("reference", False), ("other", True))
    )
    if result.test.p_value > LEVEL:
        reason = f"{label_name} is not differently common beyond chance"
        return Claim("prevalence", "not_found", reason, p_value=shift.p_value, evidence=(), estimates=estimates)
    if labels_are_marked and annotation.answer == "changed":
        reason = f"{label_name} is marked more or less often, and the convention of marking differs too"
        return Claim("prevalence", "cannot_tell", reason, p_value=shift.p_value, estimates=estimates)
    if labels_are_marked and annotation.answer == "cannot_tell":
        reason = f"{label_name} is marked more or less often"
        return Claim(
            "prevalence", "changed_if", reason, SAME_CONVENTION, shift.p_value, evidence=(shift,), estimates=estimates
        )
    reason = f"{label_name} is more or less common"
    return Claim("prevalence", "changed", reason, p_value=shift.p_value, evidence=(shift,), estimates=estimates)


def _mean_estimate(values: np.ndarray, plan: PermutationPlan, side: bool, part: str) -> Estimate:
    from scipy import stats

    rows = np.flatnonzero(np.isfinite(values) & (plan.is_target[plan.note_patient] == side))
    patients = plan.note_patient[rows]
    n = np.bincount(patients, minlength=len(plan.patients))
    sums = np.bincount(patients, weights=values[rows], minlength=len(plan.patients))
    means = sums[n > 0] / n[n > 0]
    value = float(means.mean()) if len(means) else math.nan
    if len(means) < FEWEST_PATIENTS:
        return Estimate(
            value, math.nan, math.nan, len(means), len(rows), part, f"fewer than {FEWEST_PATIENTS} patients"
        )
    reach = float(stats.t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / math.sqrt(len(means)))
    return Estimate(value, max(0.0, value - reach), min(1.0, value + reach), len(means), len(rows), part, "")


def _association(
    plan: PermutationPlan, style: NoteMeasures, labels: np.ndarray, lines: np.ndarray | None, label_name: str
) -> Claim:
    """Compare the slope of style on the label between the institutions.

    Within each institution, the product of what style and label are beyond their means, over the label's variance, has
    the slope as its mean. Its difference does not move with the institution's style nor, where the slopes are equal,
    with its prevalence; studentised, relabelled patients give its null.

    Only closing lines and what a whole note is (all in capitals, signed electronically, ...) are looked at. A share of
    the lines or words moves with what is wrong with the patient, in each style in another way: a finding more is a
    bullet more where findings are bullets. Opening lines name what was examined.
    """
    families: list[tuple[np.ndarray, list[str], float]] = []
    patients = plan.note_patient
    if lines is not None:
        rows = np.asarray(lines, dtype=np.float64)
        kept = [i for i in range(rows.shape[1]) if common(rows[:, i], patients, _SMALLEST_CELL)]
        if kept:
            families.append((rows[:, kept], [f"closing line {i + 1}" for i in range(len(kept))], _OF_LINES))
    whole = [i for i, unit in enumerate(style.units) if unit.unit == "% of notes"]
    if whole:
        families.append((style.values[:, whole], [style.units[i].key for i in whole], _OF_NOTES))
    if not families:
        return Claim("association", "cannot_tell", "no closing line or style of a whole note is common enough")
    total = sum(weight for *_, weight in families)
    p_value, named, n_measures = 1.0, [], 0
    for values, names, weight in families:
        result = max_t_test(label_slopes(values, labels, plan), names, plan, name="association")
        n_measures += len(names)
        if math.isnan(result.test.p_value):
            continue
        p_value = min(p_value, result.test.p_value * total / weight)
        named += [replace(shift, adjusted_p=min(1.0, shift.adjusted_p * total / weight)) for shift in result.measures]
    found = _named(named)
    if p_value <= LEVEL:
        reason = f"style goes with {label_name} in another way, in {len(found)} of {n_measures} measures"
        return Claim("association", "changed", reason, p_value=p_value, evidence=found)
    reason = f"none of {n_measures} measures of style goes with {label_name} in another way beyond chance"
    return Claim("association", "not_found", reason, p_value=p_value)


def label_slopes(values: np.ndarray, labels: np.ndarray, plan: PermutationPlan) -> np.ndarray:
    """Return (n_notes, k) values whose mean over an institution is the slope of style on the label there."""
    found = np.full(values.shape, math.nan)
    is_other = plan.is_target[plan.note_patient]
    for side in (False, True):
        for column in range(values.shape[1]):
            rows = np.flatnonzero((is_other == side) & np.isfinite(labels) & np.isfinite(values[:, column]))
            if not len(rows):
                continue
            weight = plan.note_weight[rows]
            label = labels[rows] - np.average(labels[rows], weights=weight)
            variance = np.average(label**2, weights=weight)
            if variance > 0:
                inside = values[rows, column]
                slope = np.average(label * inside, weights=weight) / variance
                centre = inside - np.average(inside, weights=weight)
                # Less the fitted line: the slope itself stays as the mean, its uncertainty as the spread.
                found[rows, column] = label * (centre - slope * label) / variance + slope
    return found


def annotation_claim(conventions: Conventions | None) -> Claim:
    """Are the same notes marked differently? Patients' signs are flipped; the largest class decides."""
    if conventions is None:
        return Claim(
            "annotation",
            "cannot_tell",
            "another convention leaves the text as it is; it needs the same notes marked under both conventions",
        )
    counts = np.asarray(conventions.counts, dtype=np.float64)
    if counts.shape != (len(conventions.patient_ids), len(conventions.classes), 2):
        raise UsageError(f"conventions: counts have shape {counts.shape}; they need (notes, classes, 2)")
    people, rows = np.unique(np.asarray(conventions.patient_ids, dtype=str), return_inverse=True)
    if len(people) < _SMALLEST_CELL:
        raise TooFewPatientsError(
            f"{len(people)} patients have notes marked under both conventions; {_SMALLEST_CELL} are needed"
        )
    differences = np.zeros((len(people), counts.shape[1]))
    np.add.at(differences, rows, counts[:, :, 1] - counts[:, :, 0])
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(999, len(people)))
    spread = np.sqrt((differences**2).sum(axis=0))
    usable = spread > 0
    if not usable.any():
        reason = f"the same {len(rows)} notes are marked alike under both conventions"
        return Claim("annotation", "not_found", reason, p_value=1.0, n_patients=len(people), n_notes=len(rows))
    # The sum of squares does not change with the signs, so that this statistic orders them as Student's t does.
    observed = np.abs(differences.sum(axis=0))[usable] / spread[usable]
    flipped = np.abs(signs @ differences[:, usable]) / spread[usable]
    largest = flipped.max(axis=1)
    slack = 1e-9
    adjusted = [float((1 + np.count_nonzero(largest >= value - slack)) / 1000) for value in observed]
    p_value = min(adjusted)
    shifts = []
    for place, column in enumerate(np.flatnonzero(usable)):
        alone = float((1 + np.count_nonzero(flipped[:, place] >= observed[place] - slack)) / 1000)
        first, second = (_rate(counts[:, column, side], rows, len(people)) for side in (0, 1))
        shifts.append(
            MeasureShift(
                name=conventions.classes[column], reference=float(first.mean()), other=float(second.mean()),
                difference=float((second - first).mean()), **_paired_interval(second - first),
                statistic=float(observed[place]), p_value=alone, adjusted_p=adjusted[place],
                n_patients=(len(people), len(people)), n_notes=len(rows),
            )
        )  # fmt: skip
    found = _named(shifts)
    answer: Answer = "changed" if p_value <= LEVEL else "not_found"
    reason = (
        f"the same notes are marked differently in {len(found)} of {len(conventions.classes)} classes"
        if found
        else "the same notes are not marked differently beyond chance"
    )
    return Claim(
        "annotation", answer, reason, p_value=p_value, n_patients=len(people), n_notes=len(rows), evidence=found
    )


def _rate(counts: np.ndarray, rows: np.ndarray, n_people: int) -> np.ndarray:
    return np.bincount(rows, weights=counts, minlength=n_people) / np.bincount(rows, minlength=n_people)


def _paired_interval(differences: np.ndarray) -> dict[str, Any]:
    from scipy import stats

    if len(differences) < FEWEST_PATIENTS:
        return {"low": math.nan, "high": math.nan, "note": f"no interval: fewer than {FEWEST_PATIENTS} patients"}
    reach = float(stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / math.sqrt(len(differences)))
    centre = float(differences.mean())
    return {"low": centre - reach, "high": centre + reach}


def _prevalence_if(
    plan: PermutationPlan,
    labels: np.ndarray,
    logits: np.ndarray | None,
    reference_labelled: bool,
    style: Claim,
    label_name: str,
    n_resamples: int,
) -> tuple[LabelShift | None, Claim]:
    if logits is None or not reference_labelled:
        reason = f"how common {label_name} is needs labels, or a model of it and labels at the reference"
        return None, Claim("prevalence", "cannot_tell", reason)
    scores = np.asarray(logits, dtype=np.float64)
    if scores.shape != (len(labels), 2):
        raise UsageError(f"logits have shape {scores.shape}; they need 2 scores for each of {len(labels)} notes")
    is_other = plan.is_target[plan.note_patient]
    here = np.flatnonzero(~is_other & np.isfinite(labels) & np.isfinite(scores).all(axis=1))
    there = np.flatnonzero(is_other & np.isfinite(scores).all(axis=1))
    here_scores, here_people, here_labels = _one_row_a_patient(scores[here], plan.note_patient[here], labels[here])
    there_scores, there_people, _ = _one_row_a_patient(
        scores[there], plan.note_patient[there], None if len(here_people) == len(here) else np.zeros(len(there))
    )
    try:
        shift = label_shift(
            here_scores,
            here_labels.astype(int),
            [str(p) for p in here_people],
            there_scores,
            [str(p) for p in there_people],
            names=(f"no {label_name}", label_name),
            n_resamples=n_resamples,
            seed=plan.seed,
        )
    except TooFewPatientsError as error:
        return None, Claim("prevalence", "cannot_tell", str(error))
    estimates = (("reference", shift.reference[1]), ("other", shift.other[1]))
    if math.isnan(shift.p_value):
        return shift, Claim("prevalence", "cannot_tell", shift.note, estimates=estimates)
    if style.answer == "changed":
        reason = "the notes are written differently, so that the assumption this would rest on does not hold"
        return shift, Claim("prevalence", "cannot_tell", reason, ASSUMPTION, shift.p_value, estimates=estimates)
    if shift.fit_p_value <= _GROSS:
        reason = "the model's scores are no mixture of its scores of each label, so that the assumption does not hold"
        return shift, Claim("prevalence", "cannot_tell", reason, ASSUMPTION, shift.p_value, estimates=estimates)
    if shift.p_value <= LEVEL:
        reason = f"the model's scores say that {label_name} is more or less common"
        return shift, Claim("prevalence", "changed_if", reason, ASSUMPTION, shift.p_value, estimates=estimates)
    reason = f"the model's scores do not say that {label_name} is differently common"
    return shift, Claim("prevalence", "not_found", reason, ASSUMPTION, shift.p_value, estimates=estimates)


def _one_row_a_patient(
    scores: np.ndarray, patients: np.ndarray, labels: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Average scores within patients if each patient has one label; else leave the notes as they are."""
    people, rows = np.unique(patients, return_inverse=True)
    if labels is None:
        return scores, patients, np.zeros(len(scores))
    count = np.bincount(rows)
    share = np.bincount(rows, weights=labels) / count
    if ((share > 0) & (share < 1)).any():
        return scores, patients, labels
    means = np.zeros((len(people), scores.shape[1]))
    np.add.at(means, rows, scores)
    return means / count[:, None], people, share


def _outputs(plan: PermutationPlan, outputs: tuple[np.ndarray, Sequence[str]], cells: Sequence[object] | None) -> Claim:
    scores, names = np.asarray(outputs[0], dtype=np.float64), list(outputs[1])
    kept = [i for i in range(len(names)) if common(scores[:, i], plan.note_patient, _SMALLEST_CELL)]
    if not kept:
        return Claim("outputs", "cannot_tell", "the model says too little on these notes to compare it")
    result = output_shift_test(scores[:, kept], [names[i] for i in kept], plan, cells=cells)
    found = _named(result.measures)
    if result.test.p_value <= LEVEL:
        reason = "what the model says about the notes differs; whether it is right less often, this cannot say"
        return Claim("outputs", "changed", reason, p_value=result.test.p_value, evidence=found)
    reason = "what the model says about the notes does not differ beyond chance"
    return Claim("outputs", "not_found", reason, p_value=result.test.p_value)


def _loss(
    plan: PermutationPlan, labels: np.ndarray, logits: np.ndarray, gold: bool, shift: LabelShift | None, style: Claim
) -> Claim:
    wrong = np.where(np.isfinite(labels), (logits[:, 1] > logits[:, 0]) != (labels == 1), math.nan).astype(float)
    here = _mean_estimate(wrong, plan, False, "share of wrong answers")
    if gold:
        result = max_t_test(wrong[:, None], ["share of wrong answers"], plan, name="loss")
        there = _mean_estimate(wrong, plan, True, "share of wrong answers")
        answer: Answer = "changed" if result.test.p_value <= LEVEL else "not_found"
        reason = f"the model is {'not ' if answer == 'not_found' else ''}differently often wrong beyond chance"
        evidence = result.measures if answer == "changed" else ()
        return Claim(
            "loss", answer, reason, p_value=result.test.p_value, evidence=evidence,
            estimates=(("reference", here), ("other", there)),
        )  # fmt: skip
    if shift is None or style.answer == "changed":
        reason = "how often the model is wrong needs labels of the other institution"
        return Claim("loss", "cannot_tell", reason, estimates=(("reference", here),))
    by_label = [float(np.nanmean(wrong[labels == label])) for label in (0, 1)]
    share = shift.other[1]
    ends = [by_label[0] + value * (by_label[1] - by_label[0]) for value in (share.value, share.low, share.high)]
    low, high = sorted(ends[1:])
    expected = Estimate(
        ends[0], low, high, share.n_patients, share.n_notes, f"expected, if {ASSUMPTION}",
        "interval of the prevalence alone",
    )  # fmt: skip
    reason = "how often the model is wrong needs labels of the other institution; expected under the assumption only"
    return Claim("loss", "cannot_tell", reason, ASSUMPTION, estimates=(("reference", here), ("other", expected)))


def text_scores(
    texts: Sequence[str], plan: PermutationPlan, labels: np.ndarray, *, n_words: int = 100, n_folds: int = 5
) -> np.ndarray:
    """Score a label by which words a patient's notes hold, never with a model that has seen the patient.

    Logistic regression on the presence of the words (hashed) that tell most of the label in the training folds, fitted
    on labelled patients of the reference. A patient of the other institution is scored by one fold's model too: a mean
    of models would have another distribution.

    Parameters
    ----------
    texts : one a note. labels : (n_notes,) 0, 1 or NaN; a patient has the label that most of their notes have.
    plan : whose patients. n_words : that are chosen in each fold. n_folds : of patients, balanced by label.

    Returns
    -------
    (n_notes, 2) logits, the same for all notes of a patient; NaN for patients of the reference without a label.

    Raises
    ------
    TooFewPatientsError : fewer labelled patients of one label at the reference than folds.
    """
    from scipy import sparse
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression

    counts = HashingVectorizer(analyzer=tokens_of, n_features=2**16, alternate_sign=False, norm=None).transform(texts)
    notes_of = sparse.csr_array(
        (np.ones(len(texts)), (plan.note_patient, np.arange(len(texts)))), shape=(len(plan.patients), len(texts))
    )
    present = sparse.csc_array((sparse.csr_array(notes_of @ counts) > 0).astype(np.float64))
    known = np.isfinite(labels)
    sums = np.bincount(plan.note_patient[known], weights=labels[known], minlength=len(plan.patients))
    count = np.bincount(plan.note_patient[known], minlength=len(plan.patients))
    with np.errstate(all="ignore"):
        label = np.where(count > 0, (sums / count >= 0.5).astype(float), math.nan)
    generator = np.random.default_rng([plan.seed, 3])
    by_label = [generator.permutation(np.flatnonzero(~plan.is_target & (label == value))) for value in (0.0, 1.0)]
    if min(len(rows) for rows in by_label) < n_folds:
        raise TooFewPatientsError(f"fewer than {n_folds} labelled patients of one label at the reference")
    # Balanced: a fold with more of a label would be scored by a model that has seen less of it.
    train = np.concatenate(by_label)
    folds = np.concatenate([np.arange(len(rows)) % n_folds for rows in by_label])
    others = generator.permutation(np.flatnonzero(plan.is_target))
    drawn = np.arange(len(others)) % n_folds
    scores = np.full(len(plan.patients), math.nan)
    for fold in range(n_folds):
        inside = train[folds != fold]
        left_out = np.concatenate([train[folds == fold], others[drawn == fold]])
        chosen = _telling(present, inside, label[inside], n_words)
        model = LogisticRegression(solver="liblinear", random_state=0)
        model.fit(present[inside][:, chosen].toarray(), label[inside])
        scores[left_out] = model.decision_function(present[left_out][:, chosen].toarray())
    logit = scores[plan.note_patient]
    return np.column_stack([-logit / 2, logit / 2])


def _telling(present: Any, rows: np.ndarray, labels: np.ndarray, n_words: int) -> np.ndarray:
    """Columns whose shares of patients differ most between the labels, in standard errors."""
    inside = present[rows]
    shares = [np.asarray(inside[labels == value].mean(axis=0)).ravel() for value in (0.0, 1.0)]
    n = [int((labels == value).sum()) for value in (0.0, 1.0)]
    spread = sum((share * (1 - share) / k for share, k in zip(shares, n, strict=True)), 1e-4)
    distance = np.abs(shares[1] - shares[0]) / np.sqrt(spread)
    return np.sort(np.argsort(-distance, kind="stable")[:n_words])


def new_institution(values: Sequence[float]) -> tuple[float, float, str]:
    """Prediction interval at 95 % for the value at one more institution, from the values at k of them.

    Returns
    -------
    low, high, and a note; NaN with the reason below three institutions.

    Notes
    -----
    mean +- t(k - 1) s sqrt(1 + 1 / k): institutions are taken as a sample of those that could come next. A bootstrap
    over pooled patients covers a new institution in 21 to 34 % of cases instead of 95 %.
    """
    from scipy import stats

    found = np.asarray(values, dtype=np.float64)
    k = len(found)
    if k < 3:
        return math.nan, math.nan, f"no prediction for a new institution: {k} compared, 3 are needed"
    if not np.isfinite(found).all():
        return math.nan, math.nan, "no prediction for a new institution: a value is not there"
    reach = float(stats.t.ppf(0.975, k - 1) * found.std(ddof=1) * math.sqrt(1 + 1 / k))
    return float(found.mean()) - reach, float(found.mean()) + reach, f"prediction for one more institution, from {k}"


def advise(claims: Sequence[Claim], *, text_differs: bool) -> list[str]:
    """Say what to do, no further than the claims carry."""
    answers = {claim.question: claim.answer for claim in claims}
    steps = []
    if answers.get("loss") == "changed":
        steps.append("The model is differently often wrong there: adapt it before use, and measure it again.")
    if answers.get("association") == "changed":
        steps.append(
            "Retrain with labelled notes of both institutions: a model may have learned the style instead of the label."
        )
    if answers.get("annotation") == "changed":
        steps.append("Agree on one convention, or mark a few notes by the other one, before scores are compared.")
    if answers.get("prevalence") == "changed":
        steps.append("Recalibrate: probabilities and thresholds depend on how common the label is.")
    if answers.get("prevalence") == "changed_if":
        steps.append("Recalibrate only after labels of a few patients have confirmed how common the label is there.")
    if answers.get("style") == "changed":
        steps.append(
            "Label the notes of a few patients there and score the model on them: a different style can be harmless. "
            "If the score has dropped, adapting the model to unlabelled notes of that institution (dapt) comes first, "
            "training on labelled ones second."
        )
    if not steps and text_differs:
        steps.append(
            "Label the notes of a few patients there and score the model on them: the notes differ, and what the "
            "difference does to a model is not known."
        )
    return steps or ["Nothing on this evidence; compare again when there are more patients or a new export."]
