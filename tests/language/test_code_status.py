"""Codes against releases: what is in force on a day decides, and nothing is dropped."""

from __future__ import annotations

from datetime import date

import pytest

from clinical_nlp.errors import ConfigError, InputError, MissingDataError
from clinical_nlp.language.terminology.code_status import CodeBook, category, group_indices, load_code_book


@pytest.fixture(scope="module")
def bundled():
    return load_code_book("ICD-10-CM")


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("R50.9", "valid"),
        ("r509", "valid"),
        ("R50", "category"),
        ("S72.001A", "valid"),
        ("S72.001", "category"),  # lacks its seventh character
        ("Q99.99", "unknown"),
        ("", "unknown"),
    ],
)
def test_a_code_of_the_bundled_release(bundled, code, status):
    assert bundled.status(code) == status
    assert bundled.status(code, date(1999, 1, 1)) == status


def test_codes_are_written_as_the_release_writes_them(bundled):
    assert bundled.normal(" r509 ") == "R50.9"
    assert bundled.normal("zz9") == "zz9"


def test_an_unknown_code_has_the_name_of_what_is_above_it(bundled):
    assert bundled.label("R50.9") == "Fever, unspecified"
    assert bundled.label("R50.9999") == "Fever, unspecified"
    assert bundled.label("R50.7") == bundled.label("R50")
    assert bundled.label("WWW") == ""


@pytest.fixture
def two_releases(tmp_path):
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    old.write_text("id,label,parents\nA1,first,\nA1.1,part,A1\nB2,gone,\n", "utf-8")
    new.write_text("id,label,parents\nA1,first,\nA1.1,part,A1\nC3,fresh,\n", "utf-8")
    return load_code_book("ICD-10-CM", releases={"2024-10-01": str(new), "2020-10-01": str(old)})


@pytest.mark.parametrize(
    ("code", "day", "status"),
    [
        ("B2", date(2021, 5, 1), "valid"),
        ("B2", date(2024, 9, 30), "valid"),
        ("B2", date(2024, 10, 1), "deleted"),
        ("B2", None, "deleted"),
        ("C3", date(2021, 5, 1), "not yet valid"),
        ("C3", date(2025, 5, 1), "valid"),
        ("C3", date(2001, 5, 1), "not yet valid"),
        ("A1", date(2021, 5, 1), "category"),
        ("Z9", date(2021, 5, 1), "unknown"),
    ],
)
def test_the_release_in_force_on_the_day_decides(two_releases, code, day, status):
    assert two_releases.status(code, day) == status


def test_names_come_from_the_newest_release_that_has_the_code(two_releases):
    assert two_releases.label("B2") == "gone"
    assert two_releases.known() == ("A1.1", "C3")


def test_other_systems_are_not_checked_unless_a_list_is_given(tmp_path):
    assert load_code_book("ICD-9-CM").status("428.0") == "unchecked"
    own = tmp_path / "codes.csv"
    own.write_text("id,label\n428.0,Congestive heart failure\n", "utf-8")
    book = load_code_book("ICD-9-CM", path=str(own))
    assert (book.status("428.0"), book.status("428.1")) == ("valid", "unknown")


def test_bad_lists_are_one_clear_error(tmp_path):
    own = tmp_path / "codes.csv"
    own.write_text("code,name\nA,b\n", "utf-8")
    with pytest.raises(InputError, match="has no column 'id'"):
        load_code_book("own", path=str(own))
    with pytest.raises(ConfigError, match="is no date"):
        load_code_book("ICD-10-CM", releases={"October": str(own)})
    with pytest.raises(ConfigError, match="exclude each other"):
        load_code_book("ICD-10-CM", path=str(own), releases={"2024-10-01": str(own)})
    with pytest.raises(MissingDataError, match="does not exist"):
        load_code_book("ICD-10-CM", releases={"2024-10-01": str(tmp_path / "none.xml")})


@pytest.mark.parametrize(
    ("code", "system", "expected"),
    [
        ("R50.9", "ICD-10-CM", "R50"),
        ("I10", "ICD-10-CM", "I10"),
        ("BW03ZZZ", "ICD-10-PCS", "BW0"),
        ("428.0", "ICD-9-CM", "428"),
        ("E884.9", "ICD-9-CM", "E884"),
        ("99.04", "ICD-9-CM", "99"),
        ("anything", "own", "anything"),
        ("a.b", "own", "a"),
    ],
)
def test_category_of_a_code(code, system, expected):
    assert category(code, system) == expected


def test_groups_are_numbered_in_order():
    assert group_indices(["R50.9", "I10", "R50.2"], "ICD-10-CM") == [0, 1, 0]


def test_a_book_without_releases_knows_nothing():
    book = CodeBook("own")
    assert (book.status("x"), book.label("x"), book.known(), book.in_force(None)) == ("unchecked", "", (), None)
