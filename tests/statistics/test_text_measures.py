"""Measures of text: shares are shares, numbers are masked, institutions play no part."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_nlp.statistics.text_measures import (
    CODE,
    NUMBER,
    RARE,
    hashed_features,
    token_shares,
    tokens_of,
    word_counts,
)


@given(st.text())
def test_tokens_hold_no_digit_value_and_no_white_space(text):
    for token in tokens_of(text):
        assert token in (NUMBER, CODE) or not any(c.isnumeric() or c.isspace() for c in token)


@settings(deadline=None)
@given(st.lists(st.text(), min_size=1, max_size=8))
def test_shares_of_a_note_sum_to_one(texts):
    shares, tokens = token_shares(texts, [str(i) for i in range(len(texts))], fewest_patients=2)
    assert shares.shape == (len(texts), len(tokens))
    assert np.allclose(shares.sum(axis=1), 1)


def test_a_name_of_few_patients_is_rare():
    texts = ["seen by Smithers", "seen by Jones", "seen by Smithers"]
    _, tokens = token_shares(texts, ["p", "q", "p"], fewest_patients=2)
    assert tokens == (RARE, "by", "seen")


def test_placeholders_are_tokens():
    assert tokens_of("BP 120/80, [**Name**] ___") == ["bp", NUMBER, "/", NUMBER, ",", "[**", "name", "**]", "___"]


def test_identifiers_are_codes():
    assert tokens_of("MRN A1234x visit_99 patient's q6h") == ["mrn", CODE, CODE, "patient's", CODE]


def test_features_are_deterministic_and_need_no_text_in_every_note():
    texts = [f"patient {word} reports pain" for word in ("a", "b", "c", "d")] + [""]
    first, second = hashed_features(texts, dimensions=3), hashed_features(texts, dimensions=3)
    assert first.shape == (5, 3)
    assert first.dtype == np.float32
    assert np.array_equal(first, second)
    assert word_counts(texts).tolist() == [4, 4, 4, 4, 0]
