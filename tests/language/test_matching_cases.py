"""Sentences written for the matcher, each with exactly the concepts that it names."""

import csv
from pathlib import Path

import pytest

from clinical_nlp.language.terminology import Matcher, load_terminology

with Path(__file__).with_name("matching_cases.csv").open(encoding="utf-8", newline="") as file:
    CASES = [(row["kind"], row["text"], row["concepts"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def matcher():
    return Matcher(load_terminology("hpo"))


@pytest.mark.parametrize(("kind", "text", "concepts"), CASES, ids=[text[:40] for _, text, _ in CASES])
def test_concepts_of_a_sentence(matcher, kind, text, concepts):
    found = {matcher.terminology.label(match.concept_id) for match in matcher.match(text)}
    assert found == set(filter(None, concepts.split(";"))), kind
