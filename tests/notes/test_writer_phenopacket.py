"""Phenopackets against the reference implementation."""

import json
from datetime import UTC, date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinical_nlp.notes.schema import Patient
from clinical_nlp.notes.writers.phenopacket import Evidence, Feature, file_name, phenopacket, to_json


def packet(**patient):
    when = datetime(2020, 5, 6, 7, 8, 9, 120000, tzinfo=UTC)
    evidence = (Evidence("n/1", "North", when, ((3, 8), (20, 25))), Evidence("n/2", "North", None, ((0, 5),)))
    return phenopacket(
        "North/p 1",
        Patient("p 1", **patient),
        [
            Feature("HP:0001250", "Seizure", False, evidence),
            Feature("HP:0001945", "Fever", True, evidence[:1]),
        ],
        hpo_version="2025-01-16",
        created=when,
        created_by="x 1",
    )


@pytest.mark.parametrize("sex", [None, "male", "female", "other", "unknown"])
def test_the_reference_reads_it_and_writes_it_back_the_same(sex):
    from google.protobuf.json_format import MessageToDict, Parse
    from phenopackets import Phenopacket

    ours = packet(sex=sex, birth_date=date(1931, 2, 3), death_date=date(2021, 1, 1))
    read = Parse(to_json(ours), Phenopacket())
    back = MessageToDict(read)
    if sex == "unknown":
        back["subject"]["sex"] = "UNKNOWN_SEX"  # A default, which protobuf leaves out.
    assert back == ours
    assert [feature.excluded for feature in read.phenotypic_features] == [False, True]
    assert read.meta_data.phenopacket_schema_version == "2.0"


def test_every_namespace_has_its_resource():
    ours = packet()
    prefixes = {resource["namespacePrefix"] for resource in ours["metaData"]["resources"]}
    used = {feature["type"]["id"].partition(":")[0] for feature in ours["phenotypicFeatures"]}
    used |= {
        item["evidenceCode"]["id"].partition(":")[0]
        for feature in ours["phenotypicFeatures"]
        for item in feature["evidence"]
    }
    assert used == prefixes


def test_bytes_depend_on_nothing_else():
    assert to_json(packet()) == to_json(packet())
    assert json.loads(to_json(packet())) == packet()


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300), unique=True, max_size=5))
def test_file_names_are_safe_and_distinct(ids):
    names = [file_name(packet_id) for packet_id in ids]
    assert len(set(names)) == len(ids)
    for name in names:
        assert not set(name) & set('/\\:*?"<>| \n\0')
        assert not name.startswith(".")
        assert len(name.encode()) < 255
        assert name.endswith(".json")


def test_file_name_cannot_leave_the_folder():
    assert file_name("../../etc/passwd") == "%2E.%2F..%2Fetc%2Fpasswd.json"
    assert file_name("..") == "%2E..json"
