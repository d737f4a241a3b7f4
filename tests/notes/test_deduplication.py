"""Deduplication against brute force: nothing unlike is dropped, nothing alike is kept."""

from __future__ import annotations

import random
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_nlp.errors import UsageError
from clinical_nlp.notes.deduplication import deduplicate
from clinical_nlp.notes.schema import Note, notes_table


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + 5]) for start in range(max(1, len(words) - 4))}


def jaccard(left: str, right: str) -> float:
    a, b = shingles(left), shingles(right)
    return len(a & b) / len(a | b)


def edited_corpus(seed: int, *, families: int = 25, copies: int = 4) -> list[str]:
    generator = random.Random(seed)
    texts = []
    for _ in range(families):
        words = [f"w{generator.randrange(3000)}" for _ in range(generator.randrange(60, 300))]
        for _ in range(copies):
            copy = list(words)
            for _ in range(generator.choice([0, 1, 2, 4, 8, 20])):
                copy[generator.randrange(len(copy))] = f"x{generator.randrange(10**6)}"
            texts.append(" ".join(copy))
    generator.shuffle(texts)
    return texts


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9, 1.0])
def test_agrees_with_brute_force(threshold):
    texts = edited_corpus(int(threshold * 10))
    found = deduplicate(texts, threshold=threshold)
    kept: list[int] = []
    for index, text in enumerate(texts):
        if not any(text == texts[other] or jaccard(text, texts[other]) >= threshold for other in kept):
            kept.append(index)
    assert found.keep.tolist() == kept
    assert 10 < len(kept) < len(texts)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text(alphabet=st.sampled_from("ab .é\ud800"), max_size=30), max_size=25),
    st.sampled_from([0.3, 0.8, 1.0]),
)
def test_every_text_is_kept_or_explained(texts, threshold):
    found = deduplicate(texts, threshold=threshold)
    assert sorted([*found.keep.tolist(), *(item.index for item in found.dropped)]) == list(range(len(texts)))
    kept = set(found.keep.tolist())
    for item in found.dropped:
        assert item.duplicate_of in kept
        assert item.duplicate_of < item.index
        if item.kind == "exact":
            assert texts[item.index] == texts[item.duplicate_of]
        else:
            assert texts[item.index] != texts[item.duplicate_of]
            assert item.similarity == pytest.approx(jaccard(texts[item.index], texts[item.duplicate_of]))
            assert item.similarity >= threshold
    kept_texts = [texts[index] for index in found.keep]
    assert len(set(kept_texts)) == len(kept_texts)


def test_case_and_punctuation_make_a_near_copy_but_texts_without_words_stay():
    found = deduplicate(["No chest pain.", "no chest pain", "***", "---", "***", ""])
    assert [(item.index, item.duplicate_of, item.kind) for item in found.dropped] == [(1, 0, "near"), (4, 2, "exact")]


def test_exact_copy_of_a_near_copy_points_to_the_kept_text():
    found = deduplicate(["No chest pain.", "no chest pain", "no chest pain"])
    assert [(item.index, item.duplicate_of) for item in found.dropped] == [(1, 0), (2, 0)]


def test_order_decides_which_copy_stays():
    found = deduplicate(["a b c", "a b c", "d"], order=[1, 0, 2])
    assert found.keep.tolist() == [1, 2]
    assert [(item.index, item.duplicate_of) for item in found.dropped] == [(0, 1)]


def test_arrow_column_gives_the_same_as_a_list_and_the_report_has_no_text():
    texts = edited_corpus(1, families=8)
    notes = notes_table(
        Note(note_id=str(number), patient_id="p", institution=f"i{number % 2}", text=text, source="test")
        for number, text in enumerate(texts)
    )
    found = deduplicate(notes["text"], threshold=0.8)
    assert found.dropped == deduplicate(texts, threshold=0.8).dropped
    report = found.table(notes)
    assert report.num_rows == len(found.dropped)
    assert report["note_id"].to_pylist() == [str(item.index) for item in found.dropped]
    cells = {str(cell) for column in report.columns for cell in column.to_pylist()}
    assert not any(word in cell for cell in cells for word in ("w1", "w2", "x" + "1"))
    assert found.describe().startswith(f"{len(found.keep)} of {len(texts)} texts kept")


def test_a_long_note_and_many_template_notes_stay_linear():
    long = " ".join(f"w{number}" for number in range(20_000))
    template = " ".join(f"t{number}" for number in range(200))
    texts = [long, long + " more", *(f"{template} {number}" for number in range(2000))]
    found = deduplicate(texts)
    assert found.keep.tolist() == [0, 2]


@pytest.mark.parametrize("threshold", [0, -1, 1.1, float("nan")])
def test_threshold_is_checked(threshold):
    with pytest.raises(UsageError, match="threshold"):
        deduplicate(["a"], threshold=threshold)


def test_empty_input():
    found = deduplicate(pa.chunked_array([pa.array([], pa.large_string())]))
    assert len(found.keep) == 0
    assert found.dropped == ()
    assert found.keep.dtype == np.int64
