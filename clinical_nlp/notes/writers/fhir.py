"""FHIR R4: what notes affirm of a patient as Conditions, what they affirm or deny as Observations, with Provenance.

One resource a patient and concept, as JSON objects for NDJSON files. A Condition is `unconfirmed`: software read it in
notes and nobody has looked at it. The Observation says present or absent and names the notes; the Condition rests on
the Observation. Uncertain, conflicting and family findings become neither. Dates are those of the notes: nothing
states an onset, nor that a finding is still active.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, time
from functools import lru_cache
from typing import Any

from pydantic_core import to_json  # a fourth of the time of the standard library's

from clinical_nlp.notes.writers.phenopacket import Feature

SYSTEMS = {"hpo": "http://human-phenotype-ontology.org", "icd10cm": "http://hl7.org/fhir/sid/icd-10-cm"}
"""Terminology -> the URI of its code system in FHIR; codes of a file of one's own have none."""

_VERIFICATION = "http://terminology.hl7.org/CodeSystem/condition-ver-status"
_ANSWERS = {False: ("LA9633-4", "Present"), True: ("LA9634-2", "Absent")}
_ID = re.compile(r"[A-Za-z0-9.-]{1,64}")
_REFERENCE = re.compile(r"(DocumentReference|DiagnosticReport)/[A-Za-z0-9.-]{1,64}")


class FhirWriter:
    """Turns features of patients into resources.

    Parameters
    ----------
    terminology : its name (`hpo`, `icd10cm`, or another).
    version : of the terminology.
    system : name and version of the software.
    references : patient and note ids are ids of FHIR resources, and are referred to as such; otherwise they are
        written as identifiers.
    processed_on : when the resources are made; where it is None, the date of the latest note, or the epoch.
    """

    def __init__(
        self, *, terminology: str, version: str, system: str, references: bool, processed_on: date | None = None
    ) -> None:
        self._coding = {"system": SYSTEMS[terminology], "version": version} if terminology in SYSTEMS else {}
        self._software, self._references, self._processed_on = system, references, processed_on

    def resources(self, patient_id: str, scope: str, feature: Feature) -> Iterator[dict[str, Any]]:
        """Yield the Observation, the Condition where the feature is present, and the Provenance of both.

        Parameters
        ----------
        patient_id : whose feature it is.
        scope : the institution whose id that is; empty where ids are the same everywhere.
        feature : with its evidence.
        """
        key = to_json([scope, patient_id, feature.concept_id])
        own_id = hashlib.sha256(key).hexdigest()[:32]
        code = {
            "coding": [{**self._coding, "code": feature.concept_id, "display": feature.label}],
            "text": feature.label,
        }
        subject = self._subject(patient_id, scope)
        dates = sorted(item.written_at for item in feature.evidence if item.written_at is not None)
        answer, display = _ANSWERS[feature.excluded]
        observation: dict[str, Any] = {
            "resourceType": "Observation",
            "id": f"obs-{own_id}",
            "status": "preliminary",
            "code": code,
            "subject": subject,
        }
        if dates:
            observation["effectivePeriod"] = {"start": _instant(dates[0]), "end": _instant(dates[-1])}
        observation["valueCodeableConcept"] = {
            "coding": [{"system": "http://loinc.org", "code": answer, "display": display}],
            "text": display,
        }
        observation["method"] = {"text": f"read in notes by {self._software}, unreviewed"}
        notes = {(item.institution, item.note_id): item for item in feature.evidence}
        observation["derivedFrom"] = [self._note(*note) for note in notes]
        yield observation
        targets = [f"Observation/{observation['id']}"]
        if not feature.excluded:
            condition: dict[str, Any] = {
                "resourceType": "Condition",
                "id": f"cond-{own_id}",
                "verificationStatus": {"coding": [{"system": _VERIFICATION, "code": "unconfirmed"}]},
                "code": code,
                "subject": subject,
            }
            if dates:
                condition["recordedDate"] = _instant(dates[0])
            condition["evidence"] = [{"detail": [{"reference": targets[0]}]}]
            yield condition
            targets.append(f"Condition/{condition['id']}")
        yield {
            "resourceType": "Provenance",
            "id": f"prov-{own_id}",
            "target": [{"reference": target} for target in targets],
            "recorded": _instant(self._recorded(dates)),
            "agent": [
                {
                    "type": {
                        "coding": [
                            {
                                "system": "http://terminology.hl7.org/CodeSystem/provenance-participant-type",
                                "code": "assembler",
                            }
                        ]
                    },
                    "who": {"display": self._software},
                }
            ],
            "entity": [
                {
                    "role": "source",
                    "what": {
                        **self._note(item.institution, item.note_id),
                        "display": "characters " + ", ".join(f"{start}-{end}" for start, end in item.spans),
                    },
                }
                for item in feature.evidence
            ],
        }

    def _recorded(self, dates: list[datetime]) -> datetime:
        if self._processed_on is not None:
            return datetime.combine(self._processed_on, time(), UTC)
        return dates[-1] if dates else datetime(1970, 1, 1, tzinfo=UTC)

    def _subject(self, patient_id: str, scope: str) -> dict[str, Any]:
        if self._references and _ID.fullmatch(patient_id):
            return {"reference": f"Patient/{patient_id}"}
        return {"type": "Patient", "identifier": _identifier(patient_id, scope)}

    def _note(self, institution: str, note_id: str) -> dict[str, Any]:
        if self._references and _REFERENCE.fullmatch(note_id):
            # Observation.derivedFrom may not name a DiagnosticReport; as an identifier it may.
            if note_id.startswith("DocumentReference/"):
                return {"reference": note_id}
            return {"identifier": _identifier(note_id, institution)}
        return {"type": "DocumentReference", "identifier": _identifier(note_id, institution)}


def _identifier(value: str, scope: str) -> dict[str, Any]:
    return {"value": value, **({"assigner": {"display": scope}} if scope else {})}


def to_line(resource: dict[str, Any]) -> str:
    """Render a resource as one line of NDJSON; the same resource gives the same line."""
    return to_json(resource).decode("utf-8") + "\n"


@lru_cache(maxsize=65536)
def _instant(value: datetime) -> str:
    fraction = "milliseconds" if value.microsecond else "seconds"
    return value.astimezone(UTC).isoformat(timespec=fraction).replace("+00:00", "Z")
