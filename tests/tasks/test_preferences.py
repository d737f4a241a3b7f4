"""Planted errors: one fact changes, the rest of the text stays."""

import numpy as np
import pytest
from planted_pairs import texts

from clinical_nlp.errors import UsageError
from clinical_nlp.language.facts import read_facts
from clinical_nlp.tasks.faithfulness import compare_facts
from clinical_nlp.tasks.preferences import KINDS, VOCABULARY, plant_error

NAMED = {"negation": "flipped", "side": "sides", "number": "numbers", "finding_added": "added",
         "finding_dropped": "dropped"}  # fmt: skip


def draw(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("text", "kind", "planted"),
    [
        ("No fever.", "negation", "Fever."),
        ("Fever.", "negation", "No fever."),
        ("Patient denies chest pain.", "negation", "Patient reports chest pain."),
        ("There is no evidence of pneumonia.", "negation", "There is evidence of pneumonia."),
        ("NO PNEUMOTHORAX.", "negation", "PNEUMOTHORAX."),
        ("Small left effusion.", "side", "Small right effusion."),
        ("R hydronephrosis.", "side", "L hydronephrosis."),
        ("LEFT HIP FRACTURE.", "side", "RIGHT HIP FRACTURE."),
        ("Cough. Fever.", "finding_dropped", ("Cough. ", "Fever.")),
        ("- cough\n- fever", "finding_dropped", ("- cough", "- fever")),
        ("Cough. No fever.", "finding_swapped", ("Fever. No fever.", "Cough. No cough.")),
        ("Left pneumonia. No PE.", "finding_swapped", ("Left PE. No PE.", "Left pneumonia. No pneumonia.")),
    ],
)
def test_errors_as_written(text, kind, planted):
    found = plant_error(text, kind, draw())
    assert found.text in (planted if isinstance(planted, tuple) else (planted,))
    assert found.kind == kind
    assert found.fact in read_facts(text)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Seen by the team.", "negation"),
        ("Return if fever.", "negation"),
        ("Pleural effusion.", "side"),
        ("Fever.", "number"),
        ("Seen on 2020-03-04.", "number"),
        ("Fever.", "finding_dropped"),
        ("Seen by the team.", "finding_swapped"),
        ("", "finding_added"),
        ("", "negation"),
    ],
)
def test_nothing_to_change(text, kind):
    assert plant_error(text, kind, draw()) is None


def test_a_number_changes_and_its_unit_stays():
    values = set()
    for seed in range(20):
        found = plant_error("Metoprolol 12.5 mg BID.", "number", draw(seed))
        assert found.text.startswith("Metoprolol ")
        assert found.text.endswith(" mg BID.")
        values.add(found.text[11:-8])
    assert len(values) > 1
    assert "12.5" not in values


def test_added_findings_come_from_the_vocabulary_and_are_new():
    text = "Fever and cough."
    for seed in range(20):
        found = plant_error(text, "finding_added", draw(seed), vocabulary=("pyrexia", "cough", "gallstones"))
        assert "gallstones" in found.text.lower()
        assert found.text.replace(found.text[found.start : found.end], "") == text
    assert plant_error(text, "finding_added", draw(), vocabulary=("fever",)) is None
    assert all(read_facts(term) for term in VOCABULARY)


@pytest.mark.parametrize("bank", ["development", "held_out"])
def test_what_changed_is_where_it_says_and_is_that_kind(bank):
    random = draw(5)
    planted = dict.fromkeys(KINDS, 0)
    for item in list(texts(bank=bank, seed=8, patients=6))[:60]:
        for kind in KINDS:
            found = plant_error(item.text, kind, random)
            if found is None:
                continue
            planted[kind] += 1
            text = item.text
            head = len(text) - len(text[found.start :])
            assert found.text[:head] == text[:head]
            assert text.endswith(found.text[found.end :])
            errors = compare_facts(found.text, text).errors
            assert errors if kind == "finding_swapped" else NAMED[kind] in errors, kind
    assert min(planted.values()) >= 10, planted


def test_the_same_draw_plants_the_same_error():
    text = "Left effusion. No fever. Metoprolol 25 mg."
    for kind in KINDS:
        assert plant_error(text, kind, draw(3)) == plant_error(text, kind, draw(3))


def test_unknown_kind_is_named():
    with pytest.raises(UsageError, match="negation, side"):
        plant_error("Fever.", "spelling", draw())


def test_findings_are_swapped_with_those_that_the_source_states_otherwise():
    source = "Left effusion. No pneumothorax. Gallstones. No cough."
    written = {plant_error("Left effusion.", "finding_swapped", draw(seed), source=source).text for seed in range(20)}
    assert written == {"Left pneumothorax.", "Left cough."}
    assert {plant_error("No cough.", "finding_swapped", draw(seed), source=source).text for seed in range(20)} == {
        "No effusion.",
        "No gallstones.",
    }
