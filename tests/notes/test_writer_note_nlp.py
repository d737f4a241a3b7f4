"""NOTE_NLP against the specification of OMOP CDM v5.4."""

from datetime import UTC, date, datetime

import pyarrow as pa
import pytest

from clinical_nlp.errors import MissingDataError, UsageError
from clinical_nlp.notes.writers.note_nlp import NOTE_NLP_SCHEMA, note_nlp_table, read_vocabulary, snippet

# From OMOP_CDMv5.4_Field_Level.csv: name, type, required.
SPECIFICATION = [
    ("note_nlp_id", "integer", True),
    ("note_id", "integer", True),
    ("section_concept_id", "integer", False),
    ("snippet", "varchar(250)", False),
    ("offset", "varchar(50)", False),
    ("lexical_variant", "varchar(250)", True),
    ("note_nlp_concept_id", "integer", False),
    ("note_nlp_source_concept_id", "integer", False),
    ("nlp_system", "varchar(250)", False),
    ("nlp_date", "date", True),
    ("nlp_datetime", "datetime", False),
    ("term_exists", "varchar(1)", False),
    ("term_temporal", "varchar(50)", False),
    ("term_modifiers", "varchar(2000)", False),
]


def mention(**changes):
    return {
        "institution": "A",
        "note_id": "n1",
        "written_at": datetime(2020, 3, 4, 23, 30, tzinfo=UTC),
        "start": 12,
        "end": 17,
        "text": "fever",
        "concept_id": "HP:0001945",
        "presence": "present",
        "temporality": "current",
        "modality": "actual",
        "experiencer": "patient",
        "section": "plan",
        "snippet": "had a fever today",
        **changes,
    }


def table(*mentions, **options):
    options = {"note_ids": {("A", "n1"): 7}, "first_id": 1, "nlp_system": "x 1", **options}
    return note_nlp_table(mentions, **options)


def test_columns_types_and_order():
    kinds = {
        "integer": pa.types.is_integer,
        "date": pa.types.is_date,
        "datetime": pa.types.is_timestamp,
    }
    assert NOTE_NLP_SCHEMA.names == [name for name, _, _ in SPECIFICATION]
    for name, kind, required in SPECIFICATION:
        field = NOTE_NLP_SCHEMA.field(name)
        assert kinds.get(kind, pa.types.is_string)(field.type), name
        assert field.nullable is not required, name
    assert table(mention()).schema.equals(NOTE_NLP_SCHEMA)


def test_lengths_are_cut_to_the_limits():
    (row,) = table(mention(text="x" * 400, snippet="y" * 400, section="s" * 4000), nlp_system="z" * 300).to_pylist()
    for name, kind, _ in SPECIFICATION:
        if kind.startswith("varchar"):
            assert row[name] is None or len(row[name]) <= int(kind[8:-1]), name


@pytest.mark.parametrize(
    ("changes", "exists", "temporal"),
    [
        ({}, "Y", "present"),
        ({"presence": "absent"}, "N", "present"),
        ({"presence": "uncertain"}, "N", "present"),
        ({"experiencer": "family"}, "N", "present"),
        ({"experiencer": "other"}, "N", "present"),
        ({"modality": "conditional"}, "N", "present"),
        ({"modality": "hypothetical"}, "N", "present"),
        ({"modality": "generic"}, "N", "present"),
        ({"temporality": "historical"}, "Y", "past"),
        ({"temporality": "future"}, "N", "future"),
    ],
)
def test_term_exists_and_temporal(changes, exists, temporal):
    (row,) = table(mention(**changes)).to_pylist()
    assert (row["term_exists"], row["term_temporal"]) == (exists, temporal)


def test_modifiers_name_every_axis_and_the_code():
    (row,) = table(mention(presence="absent", experiencer="family", temporality="historical")).to_pylist()
    assert row["term_modifiers"] == (
        "Negation=true;Subject=family;Conditional=false;Hypothetical=false;Generic=false;Uncertain=false;"
        "History=true;Section=plan;Source_code=HP:0001945"
    )


def test_dates_come_from_the_note_or_the_user_never_from_the_clock():
    dated, undated = table(mention(), mention(written_at=None)).to_pylist()
    assert dated["nlp_date"] == date(2020, 3, 4)
    assert undated["nlp_date"] == date(1970, 1, 1)
    (given,) = table(mention(), nlp_date=date(2026, 1, 2)).to_pylist()
    assert given["nlp_date"] == date(2026, 1, 2)


def test_ids_follow_one_by_one_and_concepts_come_from_the_vocabulary():
    rows = table(mention(), mention(concept_id=None), first_id=41, vocabulary={"HP:0001945": (437663, 9)}).to_pylist()
    assert [row["note_nlp_id"] for row in rows] == [41, 42]
    assert [row["note_id"] for row in rows] == [7, 7]
    assert [(row["note_nlp_concept_id"], row["note_nlp_source_concept_id"]) for row in rows] == [(437663, 9), (0, 0)]


@pytest.mark.parametrize("place", [0, 3, 200, 2000, 3990])
def test_snippet_holds_the_mention(place):
    text = "a " * 2000
    text = f"{text[:place]}FEVER{text[place + 5 :]}"
    shown = snippet(text, place, place + 5)
    assert "FEVER" in shown
    assert len(shown) <= 250


def test_vocabulary(tmp_path):
    good = tmp_path / "good.csv"
    good.write_text("concept_code,concept_id\nHP:0001945,437663\n")
    assert read_vocabulary(good) == {"HP:0001945": (437663, 0)}
    with pytest.raises(MissingDataError):
        read_vocabulary(tmp_path / "none.csv")
    for number, text in enumerate(
        ("a,b\n1,2\n", "concept_code,concept_id\nHP:1,secret\n", "concept_code,concept_id\nx\n")
    ):
        bad = tmp_path / f"{number}.csv"
        bad.write_text(text)
        with pytest.raises(UsageError) as caught:
            read_vocabulary(bad)
        assert "secret" not in str(caught.value)
