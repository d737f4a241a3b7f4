"""The faithfulness of generated text, on facts that the generator planted and on sentences written by hand."""

import math
from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planted_pairs import ERRORS, load_content, plant, reword, texts

from clinical_nlp.tasks.faithfulness import COUNTS, RATES, compare_facts, fact_scores, scores_of


def drawn(bank, seed):
    """Texts of a bank in random order: short ones (impressions, findings) and whole notes."""
    items = list(texts(bank=bank, seed=seed, patients=20))
    Random(seed).shuffle(items)
    short = [item for item in items if item.where != "note"]
    return {"short": short, "note": [item for item in items if item.where == "note"]}


def flagged(pool, kind, change, content, n, random):
    """How many of the first `n` texts that a change applies to show an error, and of how many."""
    found = done = 0
    for item in pool:
        if done == n:
            break
        changed = change(item, kind, content, random)
        if changed is not None:
            done += 1
            found += bool(compare_facts(changed, item.text).errors)
    return found, done


@pytest.mark.parametrize("bank", ["development", "held_out"])
@pytest.mark.parametrize("seed", [21, 22])
def test_planted_errors_are_found(bank, seed):
    content, pools, random = load_content(bank), drawn(bank, seed), Random(seed)
    counts = {}
    for kind in ERRORS:
        for pool in ("short", "note"):
            found, done = flagged(pools[pool], kind, plant, content, 22, random)
            counts[kind, pool] = (found, done)
    assert sum(done for _, done in counts.values()) >= 180
    for kind in ERRORS:
        found = sum(counts[kind, pool][0] for pool in ("short", "note"))
        assert found >= 0.95 * sum(counts[kind, pool][1] for pool in ("short", "note")), (kind, counts)


@pytest.mark.parametrize("bank", ["development", "held_out"])
@pytest.mark.parametrize("seed", [31, 32])
def test_harmless_rewording_is_not_flagged(bank, seed):
    content, pools, random = load_content(bank), drawn(bank, seed), Random(seed)
    layout = ("identical", "sentence_order", "wrapping", "bullets", "case")
    kinds = [("short", kind) for kind in (*layout, "naming", "template")]
    kinds += [("note", kind) for kind in ("identical", "wrapping", "headers", "case", "naming", "template")]
    counts = {key: flagged(pools[key[0]], key[1], reword, content, 25, random) for key in kinds}
    found, done = (sum(values) for values in zip(*counts.values(), strict=True))
    assert done > 200
    assert found <= 0.02 * done, counts


@pytest.mark.parametrize(
    ("generated", "reference", "kind"),
    [
        ("Fever.", "No fever.", "flipped"),
        ("Denies fever, has cough.", "Denies fever and cough.", "flipped"),
        ("Patient reports chest pain.", "Patient denies chest pain.", "flipped"),
        ("Chest pain has resolved.", "Ongoing chest pain.", "flipped"),
        ("Fracture of the right hip is present.", "There is no fracture of the right hip.", "flipped"),
        ("No flimbosis.", "Flimbosis.", "flipped"),
        ("Mother had breast cancer.", "Patient had breast cancer.", "flipped"),
        ("Stop aspirin.", "Continue aspirin.", "flipped"),
        ("Left lower lobe pneumonia.", "Right lower lobe pneumonia.", "sides"),
        ("S/p right total knee replacement.", "S/p left total knee replacement.", "sides"),
        ("Bilateral pleural effusions.", "Left pleural effusion.", "sides"),
        ("Metoprolol 50 mg daily.", "Metoprolol 5 mg daily.", "numbers"),
        ("Warfarin 5 mg nightly.", "Warfarin 2.5 mg nightly.", "numbers"),
        ("Start lisinopril 10 mg twice daily.", "Start lisinopril 10 mg daily.", "numbers"),
        ("Will start vancomycin 1 g q12h.", "Will start vancomycin 1 g q8h.", "numbers"),
        ("Potassium 6.1.", "Potassium 4.1.", "numbers"),
        ("Symptoms for 3 weeks.", "Symptoms for 3 days.", "numbers"),
        ("A 3.5 cm mass in the liver.", "A 3.5 mm mass in the liver.", "numbers"),
        ("BP 180/110.", "BP 130/80.", "numbers"),
        ("Zoledrine 4 mg given.", "Zoledrine 40 mg given.", "numbers"),
        ("No fever. She also has a stroke.", "No fever.", "added"),
        ("Hypertension. Takes apixaban.", "Hypertension.", "added"),
        ("Cough. Underwent a Whipple.", "Cough.", "added"),
        ("Gout.", "Gout. There is a subcentimeter splenule.", "dropped"),
        ("Gout.", "Gout. Hearing voices.", "dropped"),
        ("NS was given. Night sweats are present.", "NS was given.", "added"),
        ("DOE has cleared.", "Difficulty breathing persists.", "flipped"),
        ("He forswears weight loss.", "He forswears no weight loss.", "flipped"),
        ("He has florid pneumonia.", "No pneumonia.", "flipped"),
        ("Mother has diabetes. Diabetes. No fever.", "Mother has diabetes. No fever.", "flipped"),
        ("Request L hip MRI.", "Request R hip MRI.", "sides"),
    ],
)
def test_clinical_errors_are_named(generated, reference, kind):
    assert kind in compare_facts(generated, reference).errors


@pytest.mark.parametrize(
    ("generated", "reference"),
    [
        ("CAD and HTN.", "Coronary artery disease, hypertension."),
        ("Patient denies fever and chills.", "No fever. No chills."),
        ("SOB on exertion for three days.", "Short of breath with exertion for 3 days."),
        ("Takes Lasix 40mg PO BID.", "Furosemide 40 mg by mouth twice daily."),
        ("No evidence of pneumothorax.", "Pneumothorax is not seen."),
        ("Left-sided pleural effusion.", "Pleural effusion on the left."),
        ("1. Gout\n2. COPD", "COPD. Gout."),
        ("Tylenol 650 mg every 6 hours as needed for pain.", "Acetaminophen 650 mg q6h prn pain."),
        ("EKG shows atrial fibrillation.", "Atrial fibrillation on ECG."),
        ("Temp 38.5 C, HR 110", "Temperature of 38.5 C; pulse 110."),
        ("She is 67 years old.", "67-year-old woman."),
        ("Insulin glargine 10 units at bedtime.", "Lantus 10 units qHS."),
        ("Cough is gone.", "Cough has resolved."),
        ("swelling in both legs", "Bilateral leg swelling."),
        ("The effusoin is small.", "Small effusion."),
        ("Denies night sweats.", "Denies NS."),
        ("Will consider cap.", "Will consider lung infection."),
        ("ST. BRIGID HOSPITAL\nFEVER.", "St. Brigid Hospital\nFever."),
        ("S/p T&A.", "Status post tonsillectomy."),
        ("DOE has cleared. Breathlessness since.", "Difficulty breathing has cleared. Shortness of breath since."),
        ("She acknowledges hardly holding it.", "She mentions hardly holding it."),
        ("Never had weight loss.", "He forswears weight loss."),
        ("Request spine MRI.", "Request L-spine MRI."),
    ],
)
def test_the_same_in_other_words_is_no_error(generated, reference):
    assert compare_facts(generated, reference).errors == ()
    assert compare_facts(reference, generated).errors == ()


def test_what_the_source_does_not_say_is_unsupported():
    source = "There is a left pleural effusion. No pneumothorax. Metoprolol 25 mg."
    same = compare_facts("Left effusion, no pneumothorax.", source=source)
    assert same.errors == ()
    made_up = compare_facts("Left effusion and pneumonia. Pneumothorax. Metoprolol 50 mg.", source=source)
    assert [fact.label for fact in made_up.unsupported] == ["pneumonia", "50 mg"]
    assert [(a.presence, b.presence) for a, b in made_up.flipped_source] == [("present", "absent")]
    assert made_up.extra == made_up.missing == made_up.flipped == ()


def test_facts_keep_their_place_in_the_text_as_written():
    text = "No fevre.\nHas a zorgflux\nof the left hip."
    compared = compare_facts(text, "Headache.")
    for fact in compared.extra:
        assert text[fact.start : fact.end] == fact.label


@given(st.text(max_size=300))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_is_faithful_to_itself(text):
    compared = compare_facts(text, text, source=text)
    assert compared.errors == ()
    assert compared.matched == compared.generated == compared.reference
    assert np.isfinite(compared.counts()).all()


@given(st.text(max_size=120), st.text(max_size=120))
@settings(max_examples=100, deadline=None)
def test_counts_are_possible(generated, reference):
    counts = dict(zip(COUNTS, compare_facts(generated, reference, source=reference).counts(), strict=True))
    assert counts["matched"] <= min(counts["generated"], counts["reference"])
    assert counts["unsupported"] <= counts["checked"] == counts["generated"]
    assert min(counts.values()) >= 0


def test_scores_carry_intervals_and_reasons():
    good, bad = compare_facts("Fever.", "Fever.").counts(), compare_facts("Fever.", "No fever.").counts()
    patients = [f"p{k // 2}" for k in range(60)]
    rows = np.array([bad if k % 3 == 0 else good for k in range(60)])
    scores = fact_scores(rows, patients, part="development", prefix="development.")
    assert set(scores) == {f"development.{name}" for name in (*RATES, "fact_f1")}
    f1 = scores["development.fact_f1"]
    assert f1.value == pytest.approx(2 / 3)
    assert f1.low < f1.value < f1.high
    assert (f1.n_patients, f1.n_notes, f1.part) == (30, 60, "development")
    assert scores["development.flipped_rate"].value == pytest.approx(1 / 3)
    for name in ("invention_rate", "side_error_rate", "number_error_rate"):
        assert math.isnan(scores[f"development.{name}"].value)
        assert "undefined" in scores[f"development.{name}"].note


def test_nothing_to_score_is_undefined():
    scores = fact_scores(np.zeros((0, len(COUNTS))), [], part="test")
    assert all(math.isnan(estimate.value) and estimate.note for estimate in scores.values())
    values, reasons = scores_of(np.zeros(len(COUNTS)))
    assert all(map(math.isnan, values.values()))
    assert reasons.keys() == values.keys()


def test_repeated_mentions_count_once():
    counts = Counter(dict(zip(COUNTS, compare_facts("Fever. Fever.", "Fever.").counts(), strict=True)))
    assert counts["generated"] == counts["reference"] == counts["matched"] == 1
