"""The sampler: bounded, blind to order, and every patient on one side."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_nlp.errors import InputError
from clinical_nlp.notes.schema import Note
from clinical_nlp.statistics.sample import NoteSampler

ROWS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2)), min_size=1, max_size=60)


def notes_of(rows: list[tuple[int, int]]) -> list[Note]:
    return [Note(f"n{i}", f"p{patient}", f"h{place}", "text", f"s:{i}") for i, (patient, place) in enumerate(rows)]


def sample(notes, rule="majority", **options):
    sampler = NoteSampler(**options)
    for note in notes:
        sampler.add(note)
    return sampler.finish(rule)


@settings(deadline=None)
@given(ROWS, st.randoms(use_true_random=False), st.integers(1, 4), st.integers(1, 3))
def test_the_sample_does_not_depend_on_the_order_and_keeps_its_bounds(rows, random, max_patients, max_notes):
    notes = notes_of(rows)
    first = sample(notes, max_patients=max_patients, max_notes_per_patient=max_notes)
    random.shuffle(notes)
    second = sample(notes, max_patients=max_patients, max_notes_per_patient=max_notes)
    assert first.notes == second.notes
    assert first.n_notes == second.n_notes
    for name in first.n_patients:
        inside = [p for p, i in zip(first.patient_ids, first.institutions, strict=True) if i == name]
        assert len(set(inside)) <= max_patients
        assert all(inside.count(patient) <= max_notes for patient in inside)
    assert first.is_first.sum() == len(set(first.patient_ids))


@settings(deadline=None)
@given(ROWS)
def test_every_note_is_counted_or_left_out(rows):
    found = sample(notes_of(rows))
    assert sum(found.n_notes.values()) + found.n_notes_left_out == len(rows)
    assert sum(found.n_patients.values()) == len({patient for patient, _ in rows})
    assert len(set(zip(found.patient_ids, found.institutions, strict=True))) == len(set(found.patient_ids))


def test_a_patient_of_two_institutions():
    notes = notes_of([(0, 0), (0, 0), (0, 1), (1, 1), (2, 2)])
    majority = sample(notes)
    assert majority.n_patients == {"h0": 1, "h1": 1, "h2": 1}
    assert (majority.n_in_two, majority.n_notes_left_out, majority.n_institutions) == (1, 1, 3)
    assert majority.notes_of_patient.tolist() == [2, 2, 1, 1]
    assert sample(notes, "drop").n_patients == {"h1": 1, "h2": 1}
    with pytest.raises(InputError, match=r"1 of 3 patients.*patient_in_two=majority"):
        sample(notes, "error")
    with pytest.raises(InputError, match="were left out"):
        sample(notes[:3], "drop")


def test_every_note_of_a_patient_is_the_random_one_equally_often():
    notes = notes_of([(0, 0)] * 4)
    chosen = [sample(notes, seed=seed).notes[0].note_id for seed in range(800)]
    counts = np.array([chosen.count(f"n{i}") for i in range(4)])
    assert (abs(counts - 200) < 5 * np.sqrt(150)).all()
