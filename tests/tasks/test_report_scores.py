"""Scores of reports: baselines that copy, means that resample patients, and nothing reported where nothing is there."""

from __future__ import annotations

import math

import numpy as np
import pytest

from clinical_nlp.tasks.faithfulness import COUNTS
from clinical_nlp.tasks.report_scores import Measured, changes, copy_longest, estimates, measure, nearest_targets

PART = {"part": "test", "seed": 0}


def measured(rouge, *, flipped=0.0):
    """Return measures of n notes with this ROUGE, ten asserted facts each and so many flipped."""
    n = len(rouge)
    facts = np.zeros((n, len(COUNTS)))
    facts[:, COUNTS.index("asserted")] = 10
    facts[:, COUNTS.index("flipped")] = flipped
    return Measured(
        facts=facts, rouge=np.repeat(np.asarray(rouge, float)[:, None], 3, axis=1), sections=np.zeros((n, 4))
    )


def test_the_longest_part_is_copied():
    dialogue = "Doctor: Hello, how are you?\nPatient: I have had a cough for three weeks now.\nDoctor: I see."
    assert copy_longest([dialogue], "dialogue_section") == ["I have had a cough for three weeks now."]
    assert copy_longest([dialogue], "dialogue_note") == [dialogue]
    assert copy_longest(["[doctor] hi\n[patient] it hurts a lot"], "dialogue_section") == ["it hurts a lot"]
    note = "ALLERGIES: none\n\nHISTORY OF PRESENT ILLNESS:\nCough for three weeks, worse at night.\n\nPLAN: rest\n"
    assert copy_longest([note], "notes_discharge")[0].endswith("Cough for three weeks, worse at night.")
    assert copy_longest(["No effusion."], "findings_impression") == ["No effusion."]


def test_the_nearest_training_source_gives_its_target():
    sources = ["no pleural effusion", "fracture of the left hip", "large mass in the liver"]
    found = nearest_targets(sources, ["a", "b", "c"], ["hip fracture on the left", "mass of liver"])
    assert found == ["b", "c"]


def test_a_mean_over_notes_weighs_notes_and_resamples_patients():
    patients = [f"p{i // 2}" for i in range(60)]
    rouge = np.linspace(0.2, 0.8, 60)
    found = estimates(measured(rouge), patients, **PART)["test.rouge1"]
    assert found.value == pytest.approx(rouge.mean())
    assert (found.n_patients, found.n_notes) == (30, 60)
    assert found.low < found.value < found.high


def test_a_change_is_paired_by_patient():
    rng = np.random.default_rng(0)
    rouge = rng.random(80)
    patients = [f"p{i}" for i in range(80)]
    before, after = measured(rouge, flipped=2), measured(rouge, flipped=1)
    found = changes(before, after, patients, **PART)
    assert found["change.flipped_rate"].value == pytest.approx(-0.1)
    assert found["change.rouge1"].value == 0
    shifted = changes(measured(rouge), measured(rouge + 0.1 + rng.normal(scale=0.01, size=80)), patients, **PART)
    low, high = shifted["change.rouge1"].low, shifted["change.rouge1"].high
    assert 0.09 < low < high < 0.11, "the spread between patients does not widen a paired interval"


def test_real_texts_are_measured_against_reference_and_source():
    source = "There is a left pleural effusion. No pneumothorax."
    texts = ["Left pleural effusion.", "Right pleural effusion. Pneumothorax."]
    found = measure(texts, ["Left pleural effusion."] * 2, [source] * 2)
    scores = estimates(found, ["a", "b"], **PART)
    assert found.rouge[0, 0] == 1
    assert found.facts[0, COUNTS.index("pairs_wrong")] == 0
    assert found.facts[1, COUNTS.index("pairs_wrong")] == 1
    assert math.isnan(scores["test.section_rougeL"].value)
    assert scores["test.section_rougeL"].note == "undefined: no reference has a named section"


def test_sections_are_scored_as_the_metric_does():
    from clinical_nlp.metrics import load

    wanted = ["PLAN:\nRest and fluids.\n\nMEDICATIONS:\nAspirin.", "ALLERGIES: penicillin"]
    made = ["PLAN:\nRest.\n\nFAMILY HISTORY:\nNone.", "ALLERGIES: penicillin"]
    scores = estimates(measure(made, wanted, wanted), ["a", "b"], **PART)
    whole = load("note_sections").compute(predictions=made, references=wanted)
    assert scores["test.section_rougeL"].value == pytest.approx(whole["rougeL"])
    assert scores["test.section_missing_rate"].value == pytest.approx(whole["missing_rate"])
