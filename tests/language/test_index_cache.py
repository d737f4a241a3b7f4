"""The index on disk: equal to a built one, never trusted when damaged, never in the way."""

import dataclasses
import os

import pytest

from clinical_nlp.language.terminology import Matcher, load_terminology
from clinical_nlp.language.terminology.index import Index
from clinical_nlp.language.terminology.index_cache import cached_index

OBO = """format-version: 1.2
data-version: hp/releases/2025-01-16

[Term]
id: HP:0000118
name: Phenotypic abnormality

[Term]
id: HP:0001250
name: Seizure
synonym: "Epileptic fit" EXACT []
is_a: HP:0000118

[Term]
id: HP:0001251
name: Ataxia of gait
is_a: HP:0000118
"""


@pytest.fixture
def terminology(tmp_path):
    (tmp_path / "hp.obo").write_text(OBO)
    return load_terminology(tmp_path / "hp.obo")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CLINICAL_NLP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_read_equals_what_was_built(folder, monkeypatch):
    terminology = load_terminology("hpo")
    ids = sorted(terminology.matchable)[::7]
    first = cached_index(terminology, ids)
    monkeypatch.setattr(Index, "build", None)  # the second is not built
    second = cached_index(terminology, reversed(ids))
    assert first.digest == second.digest
    for field in dataclasses.fields(Index):
        assert getattr(first, field.name) == getattr(second, field.name), field.name
    assert [type(sense.near) for senses in second.abbreviations.values() for sense in senses].count(list) == 0


def test_other_ids_have_another_index(folder, terminology):
    cached_index(terminology, terminology.matchable)
    cached_index(terminology, ["HP:0001250"])
    assert len(list(folder.iterdir())) == 2
    assert cached_index(terminology, ["HP:0001250"]).ids == ("HP:0001250",)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-10], lambda data: b"", lambda data: data.replace(b"seiz", b"feiz")]
)
def test_a_damaged_file_is_built_anew(folder, terminology, damage):
    whole = cached_index(terminology, terminology.matchable)
    (file,) = folder.iterdir()
    good = file.read_bytes()
    file.write_bytes(damage(good))
    assert file.read_bytes() != good
    assert cached_index(terminology, terminology.matchable).digest == whole.digest
    assert file.read_bytes() == good


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(folder, terminology):
    folder.mkdir()
    left, written = folder / ".index-1.json.77.tmp", folder / ".index-2.json.78.tmp"
    for file in (left, written):
        file.write_bytes(b"half")
    os.utime(left, (0, 0))
    cached_index(terminology, terminology.matchable)
    assert not left.exists()
    assert written.exists()


def test_without_a_place_for_it_nothing_is_written_and_all_is_found(tmp_path, monkeypatch, terminology):
    (tmp_path / "file").write_text("")
    for setting in ("", str(tmp_path / "file" / "below")):
        monkeypatch.setenv("CLINICAL_NLP_CACHE", setting)
        before = set(os.listdir(tmp_path))
        matches = Matcher(terminology).match("An epileptic fit and an ataxia of gait.")
        assert [match.concept_id for match in matches] == ["HP:0001250", "HP:0001251"]
        assert set(os.listdir(tmp_path)) == before


def test_indexes_of_long_ago_are_removed(folder, terminology):
    folder.mkdir()
    for number in range(12):
        file = folder / f"index-{number:032x}.json"
        file.write_text("old")
        os.utime(file, (number, number))
    cached_index(terminology, terminology.matchable)
    left = sorted(folder.iterdir())
    assert len(left) == 8
    assert not (folder / f"index-{0:032x}.json").exists()
