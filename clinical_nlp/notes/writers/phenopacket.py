"""GA4GH Phenopackets v2, one JSON document a patient, in the JSON form of protobuf."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import pydantic_core

from clinical_nlp.notes.schema import Patient

SCHEMA_VERSION = "2.0"
EVIDENCE_CODE = {"id": "ECO:0007669", "label": "computational evidence used in automatic assertion"}
_ECO_VERSION = "2024-07-19"
_SEX = {"male": "MALE", "female": "FEMALE", "other": "OTHER_SEX", "unknown": "UNKNOWN_SEX"}
_LONGEST_NAME = 180


@dataclass(frozen=True, slots=True)
class Evidence:
    """One note that says so: its id, when it was written, and where in it."""

    note_id: str
    institution: str
    written_at: datetime | None
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Feature:
    """One phenotypic feature: observed, or looked for and excluded."""

    concept_id: str
    label: str
    excluded: bool
    evidence: tuple[Evidence, ...]


def phenopacket(
    packet_id: str,
    patient: Patient,
    features: Iterable[Feature],
    *,
    hpo_version: str,
    created: datetime | None,
    created_by: str,
) -> dict[str, Any]:
    """Build a phenopacket.

    Parameters
    ----------
    packet_id : unique among the packets of a run.
    patient : the subject; sex, birth and death are written where they are known.
    features : what is present or excluded; nothing uncertain, conflicting or about the family belongs here.
    hpo_version : version of the ontology that the ids are from.
    created : time to state in the meta data; the epoch where it is None.
    created_by : name and version of what made it.

    Notes
    -----
    Onset is not written: the date of a note is when something was documented, not when it began.
    """
    subject: dict[str, Any] = {"id": patient.patient_id}
    if patient.birth_date is not None:
        subject["dateOfBirth"] = f"{patient.birth_date.isoformat()}T00:00:00Z"
    if patient.death_date is not None:
        death = {"timestamp": f"{patient.death_date.isoformat()}T00:00:00Z"}
        subject["vitalStatus"] = {"status": "DECEASED", "timeOfDeath": death}
    if patient.sex is not None:
        subject["sex"] = _SEX.get(patient.sex, "UNKNOWN_SEX")
    return {
        "id": packet_id,
        "subject": subject,
        "phenotypicFeatures": [_feature(feature) for feature in features],
        "metaData": {
            "created": _timestamp(created or datetime(1970, 1, 1, tzinfo=UTC)),
            "createdBy": created_by,
            "resources": [
                {
                    "id": "hp",
                    "name": "Human Phenotype Ontology",
                    "url": "http://purl.obolibrary.org/obo/hp.owl",
                    "version": hpo_version,
                    "namespacePrefix": "HP",
                    "iriPrefix": "http://purl.obolibrary.org/obo/HP_",
                },
                {
                    "id": "eco",
                    "name": "Evidence and Conclusion Ontology",
                    "url": "http://purl.obolibrary.org/obo/eco.owl",
                    "version": _ECO_VERSION,
                    "namespacePrefix": "ECO",
                    "iriPrefix": "http://purl.obolibrary.org/obo/ECO_",
                },
            ],
            "phenopacketSchemaVersion": SCHEMA_VERSION,
        },
    }


def to_json(packet: dict[str, Any]) -> bytes:
    """Render a phenopacket; the same packet gives the same bytes."""
    return pydantic_core.to_json(packet) + b"\n"


def file_name(packet_id: str) -> str:
    """Return a file name that is safe on any system and different for different ids.

    Everything but letters, digits, `_`, `-`, `~` and inner dots is percent-encoded; a very long id is cut and ends in
    a digest of the whole.
    """
    name = quote(packet_id, safe="")
    if name.startswith("."):
        name = f"%2E{name[1:]}"
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}~{hashlib.sha256(packet_id.encode()).hexdigest()[:16]}"
    return f"{name}.json"


def _feature(feature: Feature) -> dict[str, Any]:
    rendered: dict[str, Any] = {"type": {"id": feature.concept_id, "label": feature.label}}
    if feature.excluded:
        rendered["excluded"] = True
    rendered["evidence"] = [
        {
            "evidenceCode": EVIDENCE_CODE,
            "reference": {"id": item.note_id, "description": _description(item)},
        }
        for item in feature.evidence
    ]
    return rendered


def _description(item: Evidence) -> str:
    spans = ", ".join(f"{start}-{end}" for start, end in item.spans)
    written = f"; written {_timestamp(item.written_at)}" if item.written_at else ""
    return f"note of {item.institution}{written}; characters {spans}"


@lru_cache(maxsize=65536)
def _timestamp(value: datetime) -> str:
    """RFC 3339 as protobuf writes it: no fraction, or three or six digits."""
    fraction = "auto" if not value.microsecond else "microseconds" if value.microsecond % 1000 else "milliseconds"
    return value.astimezone(UTC).isoformat(timespec=fraction).replace("+00:00", "Z")
