"""FHIR R4 resources against a library that knows the specification."""

import json
from datetime import UTC, date, datetime

import pytest

from clinical_nlp.notes.writers.fhir import FhirWriter, to_line
from clinical_nlp.notes.writers.phenopacket import Evidence, Feature

WHEN = datetime(2020, 5, 6, 7, 8, 9, 120000, tzinfo=UTC)
EVIDENCE = (
    Evidence("DocumentReference/n1", "North", WHEN, ((3, 8), (20, 25))),
    Evidence("DiagnosticReport/n2", "North", datetime(2020, 4, 1, tzinfo=UTC), ((0, 5),)),
    Evidence("a note / of no resource", "North", None, ((0, 5),)),
)
PRESENT = Feature("HP:0001250", "Seizure", False, EVIDENCE)
EXCLUDED = Feature("HP:0001945", "Fever", True, EVIDENCE[:1])


def resources(feature, patient="p-1", scope="", **options):
    settings = {"terminology": "hpo", "version": "2025-01-16", "system": "x 1", "references": True, **options}
    return list(FhirWriter(**settings).resources(patient, scope, feature))


@pytest.mark.parametrize("references", [True, False])
@pytest.mark.parametrize("feature", [PRESENT, EXCLUDED, Feature("C1", "Own", False, EVIDENCE[2:])])
@pytest.mark.parametrize("patient", ["p-1", "p 1 / ü"])
def test_the_specification_reads_every_resource(feature, patient, references):
    from fhir.resources.R4B import get_fhir_model_class

    for resource in resources(feature, patient, "North", references=references):
        line = to_line(resource)
        assert line.count("\n") == 1
        read = get_fhir_model_class(resource["resourceType"]).model_validate_json(line)
        assert json.loads(read.model_dump_json())["id"] == resource["id"]


def test_what_is_present_is_an_unconfirmed_condition_that_rests_on_an_observation():
    observation, condition, provenance = resources(PRESENT)
    assert condition["verificationStatus"]["coding"][0]["code"] == "unconfirmed"
    assert "clinicalStatus" not in condition
    assert "onsetDateTime" not in condition
    assert condition["recordedDate"] == "2020-04-01T00:00:00Z"
    assert condition["evidence"] == [{"detail": [{"reference": f"Observation/{observation['id']}"}]}]
    assert condition["code"]["coding"] == [
        {
            "system": "http://human-phenotype-ontology.org",
            "version": "2025-01-16",
            "code": "HP:0001250",
            "display": "Seizure",
        }
    ]
    assert observation["status"] == "preliminary"
    assert observation["valueCodeableConcept"]["text"] == "Present"
    assert observation["effectivePeriod"] == {"start": "2020-04-01T00:00:00Z", "end": "2020-05-06T07:08:09.120Z"}
    assert [item["reference"] for item in provenance["target"]] == [
        f"Observation/{observation['id']}",
        f"Condition/{condition['id']}",
    ]
    assert provenance["recorded"] == "2020-05-06T07:08:09.120Z"
    assert [item["what"]["display"] for item in provenance["entity"]] == [
        "characters 3-8, 20-25",
        "characters 0-5",
        "characters 0-5",
    ]
    assert observation["subject"] == condition["subject"] == {"reference": "Patient/p-1"}


def test_what_is_excluded_is_no_condition():
    observation, provenance = resources(EXCLUDED)
    assert observation["valueCodeableConcept"]["text"] == "Absent"
    assert provenance["target"] == [{"reference": f"Observation/{observation['id']}"}]


def test_ids_are_stable_and_of_one_patient_and_institution():
    ids = {
        resources(PRESENT, patient, scope)[0]["id"]
        for patient, scope in [("p-1", ""), ("p-1", "A"), ("p-1", "B"), ("p-2", "")]
    }
    assert len(ids) == 4
    assert resources(PRESENT) == resources(PRESENT)
    assert resources(PRESENT, processed_on=date(2026, 1, 2))[2]["recorded"] == "2026-01-02T00:00:00Z"
    undated = Feature("HP:0001250", "Seizure", False, EVIDENCE[2:])
    assert resources(undated)[2]["recorded"] == "1970-01-01T00:00:00Z"
    assert "recordedDate" not in resources(undated)[1]
