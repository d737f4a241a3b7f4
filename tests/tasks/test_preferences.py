"""Planted errors: one fact changes, the rest of the text stays."""

import numpy as np
import pytest
from planted_pairs import texts

from clinical_nlp.errors import UsageError
from clinical_nlp.language.facts import read_facts
from clinical_nlp.tasks.faithfulness import compare_facts
from clinical_nlp.tasks.preferences import (
    KINDS,
    VOCABULARY,
    Preference,
    carry_errors,
    mirrored,
    plant_error,
)

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


@pytest.mark.parametrize(
    ("draft", "reference", "source", "carried"),
    [
        ("Fever. No fever.", "Fever. No cough.", "Fever. No cough.", ["Fever. No fever."]),
        ("Cough. No fever.", "Fever, as before. No cough.", "Fever. No cough.",
         ["Cough, as before. No cough.", "Fever, as before. No fever."]),
        ("Fever. No pneumonia.", "Cough.\nPneumonia.\nNo fever.", "Cough. Pneumonia. No fever.",
         ["Fever.\nPneumonia.\nNo fever.", "Cough.\nPneumonia.\nNo pneumonia."]),
    ],
)  # fmt: skip
def test_what_a_draft_turned_round_is_planted_in_its_reference(draft, reference, source, carried):
    found = carry_errors(draft, reference, source)
    assert sorted(each.text for each in found) == sorted(carried)
    for each in found:
        assert reference.startswith(each.text[: each.start])
        assert reference.endswith(each.text[each.end :])
        wrong, right = each.names
        assert wrong in {fact.name for fact in read_facts(each.text[each.start : each.end])}
        assert right in {fact.name for fact in read_facts(reference)}
        assert compare_facts(each.text, reference, source=source).flipped_source


@pytest.mark.parametrize(
    ("draft", "reference", "source"),
    [
        ("Fever. No cough.", "Fever. No cough.", "Fever. No cough."),
        ("No cough.", "Fever. No cough.", "Fever. No cough."),  # left out, and nothing false
        ("Pneumonia. No cough.", "Fever. No cough.", "Fever. No cough."),  # invented, and nothing turned round
        ("Fever.", "No fever.", "No fever."),  # the reference has nothing that is present
        ("", "Fever.", "Fever."),
    ],
)
def test_drafts_of_which_nothing_can_be_carried_over(draft, reference, source):
    assert carry_errors(draft, reference, source) == []


def test_in_the_mirror_what_was_wrong_is_right():
    one = Preference("Moderate hydronephrosis. No renal stone.", "Hydronephrosis. No kidney stone.",
                     "Hydronephrosis. No hydronephrosis.")  # fmt: skip
    (wrong,), (right,) = ({fact.name for fact in read_facts(term)} for term in ("hydronephrosis", "renal stone"))
    other = mirrored(one, (wrong, right))
    assert other.source == "Moderate renal stone. No hydronephrosis."
    assert other.chosen == "Kidney stone. No hydronephrosis."
    assert other.rejected in ("Kidney stone. No kidney stone.", "Renal stone. No renal stone.")
    assert compare_facts(other.chosen, source=other.source).errors == ()
    assert mirrored(mirrored(one, (wrong, right)), (wrong, right)).source == one.source


def test_names_that_no_text_has_have_no_mirror_image():
    one = Preference("Fever.", "Fever.", "No fever.")
    (fever,), (cough,) = ({fact.name for fact in read_facts(term)} for term in ("fever", "cough"))
    assert mirrored(one, (cough, fever)) is None
