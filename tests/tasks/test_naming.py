import numpy as np
import pytest

from clinical_nlp.tasks.naming import NamedCodes, fit_named_codes, named_concepts

CODES = ("E11.65", "E11.9", "I10", "R05.9")


def documents(n):
    """Notes in which hypertension is always coded, diabetes as E11.65, and a cough hardly ever."""
    found = [frozenset({"I10", "E11.9", "R05.9"} if row % 2 else ()) for row in range(n)]
    given = [("I10", "E11.65", *(("R05.9",) if row % 20 == 1 else ())) if row % 2 else () for row in range(n)]
    return found, given


def gold(given):
    return np.array([[code in own for code in CODES] for own in given])


@pytest.fixture(scope="module")
def named():
    found, given = documents(200)
    rng = np.random.default_rng(0)
    logits = rng.normal(-2, 1, (200, len(CODES))) + gold(given)
    return fit_named_codes(CODES, (found, given), (found, logits, gold(given)))


def test_what_the_dictionary_is_right_about_gains_and_what_it_is_wrong_about_does_not(named):
    gains = {concept: {CODES[place]: gain for place, gain in row.items()} for concept, row in named.gains.items()}
    assert gains["I10"]["I10"] > 2
    assert gains["E11.9"]["E11.65"] > 2  # what the notes call E11.9 was always coded as E11.65
    assert gains["E11.9"].get("E11.9", 0) < 1
    assert gains.get("R05.9", {}).get("R05.9", 0) < 1
    assert set(gains["I10"]) == {"I10"}  # a code of another category is nobody's name


def test_only_facts_about_the_patient_count():
    (found,) = named_concepts([["Hypertension. No diabetes.", "Mother had breast cancer. Return if fever occurs."]])
    assert found == {"I10"}
    assert named_concepts([[], [""]]) == [frozenset(), frozenset()]


def test_a_document_gains_where_it_names_a_code_and_nowhere_else(named):
    added = named([["Known hypertension."], ["No hypertension."], []], len(CODES))
    assert added.shape == (3, 4)
    assert added[0, 2] == pytest.approx(named.gains["I10"][2])
    assert added[0, [0, 1, 3]].tolist() == [0, 0, 0]
    assert not added[1:].any()


def test_it_comes_back_from_json(named):
    assert NamedCodes.from_json(named.as_json()) == NamedCodes({c: dict(row) for c, row in named.gains.items()})
    assert NamedCodes.from_json({}) == NamedCodes()


def test_nothing_is_fitted_where_nothing_is_named():
    _, given = documents(40)
    nothing = [frozenset()] * 40
    logits = np.zeros((40, len(CODES)))
    assert fit_named_codes(CODES, (nothing, given), (nothing, logits, gold(given))) == NamedCodes()


def test_the_dictionary_decides_where_the_model_is_worse_than_none():
    found, given = documents(40)
    against = -gold(given).astype(float)
    named = fit_named_codes(CODES, (found, given), (found, against, gold(given)))
    both = against + named.gained(found, len(CODES))
    assert both[1::2, 2].min() > both[::2, 2].max()
