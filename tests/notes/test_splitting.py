"""A patient is never in two parts, whatever the split, the row order or the duplicates."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_nlp.config import SplitConfig
from clinical_nlp.errors import ConfigError, InputError, TooFewPatientsError, UsageError
from clinical_nlp.notes.schema import Note, notes_table
from clinical_nlp.notes.splitting import split_patients, split_without_duplicates


def make(*rows: tuple[str, str], years: list[int | None] | None = None, texts: list[str] | None = None) -> pa.Table:
    """Notes of (patient, institution)."""
    return notes_table(
        Note(
            note_id=str(number),
            patient_id=patient,
            institution=institution,
            text=texts[number] if texts else f"note {number}",
            source=f"test:{number}",
            written_at=datetime(years[number], 6, 1, tzinfo=UTC) if years and years[number] else None,
        )
        for number, (patient, institution) in enumerate(rows)
    )


def patients(notes: pa.Table, rows: np.ndarray) -> set[str]:
    return set(notes["patient_id"].take(pa.array(rows)).to_pylist())


def key_of(notes: pa.Table, rows: np.ndarray) -> set[str]:
    return set(notes["note_id"].take(pa.array(rows)).to_pylist())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from("AB")), min_size=1, max_size=120),
    st.integers(0, 5),
    st.randoms(use_true_random=False),
)
def test_random_split_keeps_patients_whole_and_ignores_row_order(rows, seed, random):
    notes = make(*((f"p{patient}", institution) for patient, institution in rows))
    n = len({patient for patient, _ in rows})
    config = SplitConfig(name="random", development=0.1, test=0.3)
    if n - max(1, round(0.3 * n)) - max(1, round(0.1 * n)) < 1:
        with pytest.raises(TooFewPatientsError):
            split_patients(notes, config, seed=seed)
        return
    split = split_patients(notes, config, seed=seed)
    parts = [patients(notes, rows) for rows in (split.train, split.development, split.test)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == n
    assert sorted(np.concatenate([split.train, split.development, split.test]).tolist()) == list(range(len(rows)))
    assert split.patients == tuple(map(len, parts))
    assert len(parts[2]) == max(1, round(0.3 * n))
    assert len(parts[1]) == max(1, round(0.1 * n))

    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled = notes.take(pa.array(order))
    again = split_patients(shuffled, config, seed=seed)
    assert key_of(shuffled, again.test) == key_of(notes, split.test)
    assert key_of(shuffled, again.development) == key_of(notes, split.development)


def test_seed_changes_the_split_and_repeats_it():
    notes = make(*((f"p{number}", "A") for number in range(100)))
    config = SplitConfig(name="random")
    splits = [split_patients(notes, config, seed=seed).test.tolist() for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]


def test_one_more_patient_moves_hardly_anyone():
    rows = [(f"p{number}", "A") for number in range(101)]
    config = SplitConfig(name="random")
    before = patients(make(*rows[:100]), split_patients(make(*rows[:100]), config, seed=0).test)
    after = patients(make(*rows), split_patients(make(*rows), config, seed=0).test)
    assert len(before ^ after) <= 2


def test_official_parts_are_used_as_they_are():
    notes = make(("a", "A"), ("b", "A"), ("c", "A"))
    parts = {("A", "0"): "test", ("A", "1"): "development", ("A", "2"): "train"}
    split = split_patients(notes, SplitConfig(), seed=0, parts=parts)
    assert (split.train.tolist(), split.development.tolist(), split.test.tolist()) == ([2], [1], [0])
    assert split.official
    assert split.reported_part == split.part == "test"


def test_official_development_is_reported_where_there_is_no_test():
    notes = make(*((f"p{number // 2}", "A") for number in range(40)))
    parts = {("A", str(number)): "train" if number < 30 else "development" for number in range(40)}
    split = split_patients(notes, SplitConfig(development=0.2), seed=0, parts=parts)
    assert split.test.tolist() == list(range(30, 40))
    assert split.reported_part == "development"
    assert split.patients == (12, 3, 5)
    assert set(split.development) < set(range(30))
    assert "scores are on the development part" in split.describe()


def test_official_test_without_development_takes_it_from_train():
    notes = make(*((f"p{number}", "A") for number in range(20)))
    parts = {("A", str(number)): "train" if number < 10 else "test" for number in range(20)}
    split = split_patients(notes, SplitConfig(development=0.2), seed=0, parts=parts)
    assert split.patients == (8, 2, 10)
    assert split.reported_part == "test"


@pytest.mark.parametrize("parts", [{}, {("A", str(number)): "train" for number in range(10)}])
def test_official_falls_back_to_random_and_says_so(parts):
    notes = make(*((f"p{number}", "A") for number in range(10)))
    split = split_patients(notes, SplitConfig(), seed=3, parts=parts)
    assert not split.official
    assert split.test.tolist() == split_patients(notes, SplitConfig(name="random"), seed=3).test.tolist()
    assert "no official parts" in split.describe()


def test_official_parts_that_divide_a_patient_are_refused():
    notes = make(("a", "A"), ("a", "A"), ("b", "A"))
    parts = {("A", "0"): "train", ("A", "1"): "test", ("A", "2"): "train"}
    with pytest.raises(InputError, match="divide 1 patients"):
        split_patients(notes, SplitConfig(), seed=0, parts=parts)


def test_official_parts_must_cover_every_note_and_hold_training_notes():
    notes = make(("a", "A"), ("b", "A"))
    with pytest.raises(InputError, match="1 of 2 notes have no official part"):
        split_patients(notes, SplitConfig(), seed=0, parts={("A", "0"): "test"})
    with pytest.raises(UsageError, match="only test is here"):
        split_patients(notes, SplitConfig(), seed=0, parts={("A", "0"): "test", ("A", "1"): "test"})


def test_held_out_institution_takes_its_patients_whole():
    rows = [(f"a{number}", "A") for number in range(10)] + [("both", "A"), ("both", "B"), ("b", "B")]
    notes = make(*rows)
    split = split_patients(notes, SplitConfig(name="institution", test_institutions=["B"]), seed=0)
    assert patients(notes, split.test) == {"both", "b"}
    assert split.test.tolist() == [10, 11, 12]
    assert "B" not in {rows[row][1] for row in (*split.train, *split.development)}
    assert "1 patients with notes at held-out and other institutions" in split.describe()


def test_institution_split_errors_name_the_key():
    notes = make(*((f"a{number}", "Alpha") for number in range(10)))
    with pytest.raises(ConfigError, match=r"needs split\.test_institutions; known: Alpha"):
        split_patients(notes, SplitConfig(name="institution"), seed=0)
    with pytest.raises(ConfigError, match="did you mean 'Alpha'"):
        split_patients(notes, SplitConfig(name="institution", test_institutions=["Alpa"]), seed=0)
    with pytest.raises(TooFewPatientsError, match="none is left"):
        split_patients(notes, SplitConfig(name="institution", test_institutions=["Alpha"]), seed=0)


def test_time_split_holds_out_patients_who_begin_after_the_cut():
    rows = [("early", "A"), ("early", "A"), ("straddling", "A"), ("straddling", "A"), ("late", "A"), ("late", "A")]
    rows += [("undated", "A"), ("more", "A")]
    notes = make(*rows, years=[2010, 2011, 2012, 2020, 2019, None, None, 2013])
    config = SplitConfig(name="time", after="2018-01-01", development=0)
    split = split_patients(notes, config, seed=0)
    assert patients(notes, split.test) == {"late"}
    assert split.test.tolist() == [4, 5]
    assert "1 patients with notes before and after 2018-01-01 stay in train" in split.describe()
    assert "1 patients without a dated note stay in train" in split.describe()


def test_a_first_note_on_the_cut_itself_is_held_out():
    notes = make(("a", "A"), ("b", "A"), ("c", "A"), years=[2017, 2018, 2016])
    split = split_patients(notes, SplitConfig(name="time", after="2018-06-01", development=0), seed=0)
    assert split.test.tolist() == [1]


def test_time_split_errors_say_what_to_do():
    notes = make(("a", "A"), ("b", "A"), years=[2010, 2012])
    with pytest.raises(ConfigError, match=r"needs split\.after"):
        split_patients(notes, SplitConfig(name="time"), seed=0)
    with pytest.raises(ConfigError, match="ISO date"):
        split_patients(notes, SplitConfig(name="time", after="soon"), seed=0)
    with pytest.raises(TooFewPatientsError, match="2010-06-01 to 2012-06-01"):
        split_patients(notes, SplitConfig(name="time", after="2030-01-01"), seed=0)
    with pytest.raises(InputError, match="no note has one"):
        split_patients(make(("a", "A")), SplitConfig(name="time", after="2030-01-01"), seed=0)


def test_too_few_patients_and_no_notes():
    with pytest.raises(TooFewPatientsError, match="patients cannot be divided"):
        split_patients(make(("a", "A"), ("b", "A")), SplitConfig(name="random", test=0.5, development=0.4), seed=0)
    with pytest.raises(TooFewPatientsError, match="no notes"):
        split_patients(make(), SplitConfig(name="random"), seed=0)
    with pytest.raises(ConfigError, match="leave patients to train on"):
        split_patients(make(("a", "A")), SplitConfig(name="random", test=0.6, development=0.5), seed=0)


STEM = "the patient was seen in clinic today for follow up of stable chest pain and was told to come back "


@pytest.mark.parametrize("seed", range(5))
def test_no_text_is_in_two_parts_after_deduplication(seed):
    texts = [
        f"{STEM * 3} number {number // 3} " + " ".join(f"w{number // 3}x{j}" for j in range(30)) for number in range(90)
    ]
    texts[1::3] = [text.upper() for text in texts[1::3]]
    notes = make(*((f"p{number}", "A") for number in range(90)), texts=texts)
    split, found = split_without_duplicates(notes, SplitConfig(name="random"), seed=seed)
    stories = [{texts[row].lower() for row in rows} for rows in (split.train, split.development, split.test)]
    assert sum(map(len, stories)) == len(set().union(*stories)) == 30
    assert len(found.dropped) == 60
    assert {duplicate.kind for duplicate in found.dropped} == {"exact", "near"}
    assert "30 of 90 texts kept" in split.describe()


def test_deduplication_keeps_the_copy_in_the_official_test_part():
    texts = ["same words in both of these two notes here"] * 2 + [f"quite another text {number}" for number in range(8)]
    notes = make(*((f"p{number}", "A") for number in range(10)), texts=texts)
    parts = {("A", str(number)): "test" if number in (1, 2) else "train" for number in range(10)}
    split, found = split_without_duplicates(notes, SplitConfig(), seed=0, parts=parts)
    assert split.test.tolist() == [1, 2]
    assert [(item.index, item.duplicate_of) for item in found.dropped] == [(0, 1)]
    assert 0 not in split.train
    assert split.official


def test_deduplicated_split_does_not_depend_on_row_order():
    texts = [f"{STEM} {number // 2} {' '.join(str(number // 2 * 50 + j) for j in range(40))}" for number in range(60)]
    notes = make(*((f"p{number}", "A") for number in range(60)), texts=texts)
    shuffled = notes.take(pa.array(np.random.default_rng(0).permutation(60)))
    split, _ = split_without_duplicates(notes, SplitConfig(name="random"), seed=1)
    again, _ = split_without_duplicates(shuffled, SplitConfig(name="random"), seed=1)
    assert key_of(notes, split.test) == key_of(shuffled, again.test)
    assert key_of(notes, split.train) == key_of(shuffled, again.train)
