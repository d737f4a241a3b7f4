"""Claims: which question gets which answer from which evidence, with their error rates, and bad input."""

import math

import numpy as np
import pytest

from clinical_nlp.errors import TooFewPatientsError, UsageError
from clinical_nlp.statistics.attribution import (
    SAME_CONVENTION,
    Conventions,
    advise,
    annotation_claim,
    attribute,
    label_slopes,
    new_institution,
    text_scores,
)
from clinical_nlp.statistics.clinical_units import ClinicalUnit, NoteMeasures
from clinical_nlp.statistics.label_shift import ASSUMPTION
from clinical_nlp.statistics.max_t import max_t_test
from clinical_nlp.statistics.permutation import PermutationPlan

UNITS = tuple(ClinicalUnit(f"u{i}", f"Unit {i}", "%", "style") for i in range(6))


class Hospitals:
    """Two of them: style in six measures, a label, a closing line that may follow the label, a model's scores."""

    def __init__(self, seed, *, style=0.0, prevalence=(0.3, 0.3), follows=(0.0, 0.0), patients=80, notes=3):
        generator = np.random.default_rng(seed)
        people, sides, values, labels, lines, logits = [], [], [], [], [], []
        for side in (0, 1):
            for patient in range(patients):
                label = float(generator.random() < prevalence[side])
                own = generator.normal(size=6)
                score = generator.normal(2.5 * (label - 0.5)) * 2.5
                for _ in range(notes):
                    people.append(f"{side}-{patient}")
                    sides.append("ab"[side])
                    values.append(own + generator.normal(size=6) + style * side * np.eye(6)[0])
                    labels.append(label)
                    mark = label if generator.random() < follows[side] else float(generator.random() < 0.3)
                    lines.append([mark, 1 - mark])
                    logits.append([-score / 2, score / 2])
        self.plan = PermutationPlan(people, sides, n_permutations=199, seed=seed)
        self.measures = NoteMeasures(np.array(values), UNITS)
        self.labels, self.logits = np.array(labels), np.array(logits)
        self.lines = np.array(lines)

    def claims(self, *, gold, **options):
        labels = self.labels if gold else np.where(self.plan.is_target[self.plan.note_patient], math.nan, self.labels)
        found = attribute(
            self.plan, self.measures, labels=labels, logits=self.logits, lines=self.lines, n_resamples=60, **options
        )
        return {claim.question: claim for claim in found}


def answers(claims):
    return {question: claim.answer for question, claim in claims.items()}


def test_text_alone_cannot_tell_annotation_nor_association_whatever_happens():
    for options in ({}, {"style": 2.0}, {"prevalence": (0.2, 0.7)}, {"follows": (0.0, 1.0)}):
        found = answers(Hospitals(0, **options).claims(gold=False))
        assert found["annotation"] == found["association"] == "cannot_tell"


def test_without_labels_prevalence_is_claimed_only_under_its_assumption():
    found = Hospitals(2, prevalence=(0.2, 0.6)).claims(gold=False)
    assert (found["prevalence"].answer, found["prevalence"].condition) == ("changed_if", ASSUMPTION)
    estimate = dict(found["prevalence"].estimates)["other"]
    assert estimate.low < 0.6 < estimate.high
    both = Hospitals(1, prevalence=(0.2, 0.6), style=2.0).claims(gold=False)
    assert both["style"].answer == "changed"
    assert both["prevalence"].answer == "cannot_tell"
    assert "assumption" in both["prevalence"].reason
    assert found["loss"].answer == "cannot_tell"
    assert "prevalence alone" in dict(found["loss"].estimates)["other"].note


def test_without_any_label_or_model_only_style_has_an_answer():
    hospitals = Hospitals(2, style=2.0)
    found = answers({c.question: c for c in attribute(hospitals.plan, hospitals.measures)})
    assert found == {"style": "changed", "prevalence": "cannot_tell", "association": "cannot_tell",
                     "annotation": "cannot_tell"}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"style": 1.5}, {"style"}),
        ({"prevalence": (0.2, 0.6)}, {"prevalence"}),
        ({"follows": (0.0, 0.8)}, {"association"}),
        ({"style": 1.5, "prevalence": (0.2, 0.6)}, {"style", "prevalence"}),
        ({"prevalence": (0.2, 0.6), "follows": (0.0, 0.8)}, {"prevalence", "association"}),
    ],
)
def test_with_labels_each_cause_is_named_and_no_other(options, expected):
    found = [answers(Hospitals(seed, patients=150, **options).claims(gold=True)) for seed in range(6)]
    for question in ("style", "prevalence", "association"):
        rate = np.mean([item[question] == "changed" for item in found])
        assert rate >= 5 / 6 if question in expected else rate <= 2 / 6, (question, rate)
    assert all(item["annotation"] == "cannot_tell" for item in found)


def test_an_association_that_both_have_is_no_difference_even_if_prevalence_differs():
    rejected = [
        Hospitals(seed, prevalence=(0.2, 0.5), follows=(0.5, 0.5)).claims(gold=True)["association"].answer == "changed"
        for seed in range(40)
    ]
    assert np.mean(rejected) <= 0.15  # 2 of 40 expected


def test_a_share_of_lines_that_moves_with_the_label_is_no_association():
    """Where findings are bullets, a patient with more findings has more of them: style, not a spurious association."""
    hospitals = Hospitals(3, patients=150)
    is_other = hospitals.plan.is_target[hospitals.plan.note_patient]
    values = hospitals.measures.values.copy()
    values[:, 0] += 3 * hospitals.labels * is_other
    for unit, answer in (("% of lines", "not_found"), ("% of notes", "changed")):
        units = (ClinicalUnit("u0", "Bullets", unit, "style"), *UNITS[1:])
        found = attribute(hospitals.plan, NoteMeasures(values, units), labels=hospitals.labels, lines=hospitals.lines)
        assert {claim.question: claim.answer for claim in found}["association"] == answer


def test_slopes_are_those_of_least_squares():
    hospitals = Hospitals(3, follows=(0.2, 0.9))
    values, plan = hospitals.lines, hospitals.plan
    found = max_t_test(label_slopes(values, hospitals.labels, plan), ["a", "b"], plan).measures[0]
    is_other = plan.is_target[plan.note_patient]
    for side, slope in ((False, found.reference), (True, found.other)):
        rows = is_other == side  # equal notes a patient: weights are all alike
        assert slope == pytest.approx(np.polyfit(hospitals.labels[rows], values[rows, 0], 1)[0])


def test_a_marked_label_is_only_as_good_as_the_convention():
    generator = np.random.default_rng(4)
    once = generator.poisson(3, (40, 2, 1)).astype(float)
    people = [f"q{i}" for i in range(40)]
    same = Conventions(people, np.concatenate([once, once], axis=2), ("absent", "family"))
    other = Conventions(people, np.concatenate([once, once * [[1.0], [0.0]]], axis=2), ("absent", "family"))
    hospitals = Hospitals(5, prevalence=(0.2, 0.6))
    for conventions, answer in ((None, "changed_if"), (same, "changed"), (other, "cannot_tell")):
        found = hospitals.claims(gold=True, labels_are_marked=True, conventions=conventions)["prevalence"]
        assert found.answer == answer
        assert (found.condition == SAME_CONVENTION) == (answer == "changed_if")
    claim = annotation_claim(other)
    assert [shift.name for shift in claim.evidence] == ["family"]
    assert claim.evidence[0].high < 0
    assert annotation_claim(same).answer == "not_found"


def test_the_annotation_test_keeps_its_level_with_clustered_notes():
    rejected = []
    for seed in range(200):
        generator = np.random.default_rng(seed)
        own = np.repeat(generator.normal(size=(15, 1)), 4, axis=0)  # what a patient's notes share
        counts = generator.poisson(3, (60, 2, 2)) + np.stack([np.zeros((60, 2)), own + np.zeros((60, 2))], axis=2)
        people = [f"p{i // 4}" for i in range(60)]
        rejected.append(annotation_claim(Conventions(people, counts, ("x", "y"))).answer == "changed")
    assert np.mean(rejected) <= 0.1


def test_constant_measures_and_few_labels_are_stated_not_invented():
    hospitals = Hospitals(6)
    constant = NoteMeasures(np.ones((len(hospitals.labels), 6)), UNITS)
    found = {c.question: c for c in attribute(hospitals.plan, constant, labels=hospitals.labels)}
    assert found["style"].answer == found["association"].answer == "cannot_tell"
    assert math.isnan(found["style"].p_value)
    few = np.full(len(hospitals.labels), math.nan)
    few[:9], few[:3] = 0.0, 1.0
    found = {c.question: c for c in attribute(hospitals.plan, hospitals.measures, labels=few, logits=hospitals.logits)}
    assert found["prevalence"].answer == "cannot_tell"


def test_bad_input_is_one_clear_error():
    hospitals = Hospitals(7, patients=30)
    with pytest.raises(UsageError, match="0, 1 or NaN"):
        attribute(hospitals.plan, hospitals.measures, labels=hospitals.labels + 1)
    with pytest.raises(UsageError, match="2 scores for each"):
        labels = np.where(hospitals.plan.is_target[hospitals.plan.note_patient], math.nan, hospitals.labels)
        attribute(hospitals.plan, hospitals.measures, labels=labels, logits=hospitals.logits[:, :1])
    with pytest.raises(UsageError, match="measures of 1 notes"):
        attribute(hospitals.plan, NoteMeasures(np.ones((1, 6)), UNITS))
    with pytest.raises(TooFewPatientsError, match="3 patients have notes marked"):
        annotation_claim(Conventions(["a", "b", "c"], np.ones((3, 1, 2)), ("x",)))
    with pytest.raises(UsageError, match="counts have shape"):
        annotation_claim(Conventions(["a"], np.ones((1, 2)), ("x",)))


def test_text_scores_find_a_word_and_never_look_at_the_other_institution():
    hospitals = Hospitals(8)
    generator = np.random.default_rng(8)
    texts = [
        " ".join([*generator.choice(["seen", "stable", "clear", "well"], 9), "orthopnoea" if label else "fine"])
        for label in hospitals.labels
    ]
    is_other = hospitals.plan.is_target[hospitals.plan.note_patient]
    at_home = np.where(is_other, math.nan, hospitals.labels)
    logits = text_scores(texts, hospitals.plan, at_home)
    assert ((logits[:, 1] > 0) == (hospitals.labels == 1)).mean() > 0.98
    wrong = np.where(is_other, 1 - hospitals.labels, hospitals.labels)
    np.testing.assert_array_equal(logits, text_scores(texts, hospitals.plan, wrong))
    with pytest.raises(TooFewPatientsError, match="fewer than 5"):
        text_scores(texts, hospitals.plan, np.zeros(len(texts)))


def test_a_new_institution_is_covered_and_needs_three():
    assert math.isnan(new_institution([0.1, 0.2])[0])
    assert "3 are needed" in new_institution([0.1, 0.2])[2]
    assert "not there" in new_institution([0.1, 0.2, math.nan])[2]
    generator = np.random.default_rng(9)
    for k in (3, 5, 10):
        draws = generator.normal(size=(2000, k + 1))
        inside = [low <= row[-1] <= high for row in draws for low, high, _ in [new_institution(row[:-1])]]
        assert np.mean(inside) == pytest.approx(0.95, abs=0.02)


def test_advice_goes_no_further_than_the_claims():
    nothing = Hospitals(11).claims(gold=False)
    assert "Nothing on this evidence" in advise(tuple(nothing.values()), text_differs=False)[0]
    style = Hospitals(0, style=2.0).claims(gold=False).values()
    words = " ".join(advise(tuple(style), text_differs=True))
    assert "Label the notes of a few patients" in words
    assert "Retrain" not in words
    assert "Recalibrate" not in words
    prevalence = Hospitals(2, prevalence=(0.2, 0.6)).claims(gold=False).values()
    assert "only after labels" in " ".join(advise(tuple(prevalence), text_differs=True))
