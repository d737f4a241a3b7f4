"""What comes of each patient: rows by the patient rule, FHIR resources, a phenopacket."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time
from itertools import groupby, islice
from typing import Any

import pyarrow as pa

from clinical_nlp.errors import RunError
from clinical_nlp.extraction.patients import PATIENTS_SCHEMA, patient_rows
from clinical_nlp.extraction.plan import SYSTEM, ExtractionConfig
from clinical_nlp.language.terminology import Terminology
from clinical_nlp.language.terminology.hpo import ROOT
from clinical_nlp.notes.schema import Patient
from clinical_nlp.notes.writers.fhir import FhirWriter, to_line
from clinical_nlp.notes.writers.phenopacket import Evidence, Feature, phenopacket, to_json

RESOURCES = ("Condition", "Observation", "Provenance")
"""The FHIR resource types that are written."""

_ONE_ID_SPACE = ("fhir", "omop", "mimic")


def patients_are_shared(config: ExtractionConfig) -> bool:
    """Say whether one patient_id is one person throughout the source, whatever the institution.

    True for the exports of one system (fhir, omop, mimic) and where a patient map says who is who. In a table or a
    folder that was put together by hand, `1` of one institution is not `1` of another: merging two people is worse
    than keeping one apart.
    """
    return config.format in _ONE_ID_SPACE or config.patient_map is not None


def packet_id(scope: str, patient_id: str) -> str:
    """Return how a patient is called where ids of all institutions meet."""
    return f"{scope}/{patient_id}" if scope else patient_id


@dataclass(frozen=True, slots=True)
class Person:
    """A patient, when the last note was written, and how many mentions of concepts their notes have.

    `scope` is the institution whose patient it is, empty where ids are the same everywhere; `with_packet` is False
    where the phenopacket is there already.
    """

    scope: str
    patient: Patient
    latest: datetime | None
    n_mentions: int
    with_packet: bool


@dataclass(frozen=True, slots=True)
class Found:
    """Some patients and the mentions of concepts in their notes, patient by patient.

    `mentions` is an Arrow stream of rows, those of a patient in the order in which evidence is listed.
    """

    people: Sequence[Person]
    mentions: bytes


@dataclass(frozen=True, slots=True)
class Gathered:
    """What came of some patients: rows of `PATIENTS_SCHEMA`, NDJSON by resource type, packets by packet id."""

    rows: pa.Table
    lines: Mapping[str, str]
    packets: tuple[tuple[str, bytes], ...]


class Gatherer:
    """Turns patients into outputs; the same patients give the same bytes, in whichever process.

    Parameters
    ----------
    config, terminology : of the batch.
    """

    def __init__(self, config: ExtractionConfig, terminology: Terminology) -> None:
        self._config, self._terminology = config, terminology
        self._fhir = FhirWriter(
            terminology=terminology.name,
            version=terminology.version,
            system=SYSTEM,
            references=config.format == "fhir" and config.patient_map is None,
            processed_on=config.processed_on,
        )
        # Inheritance and onset (`hpo_wide`) stand in patients/, but are nothing that a patient has.
        self._abnormalities = terminology.descendants(ROOT) if ROOT in terminology else None
        self.writes_packets = terminology.name == "hpo" or any(id_.startswith("HP:") for id_ in terminology.roots)

    def gather(self, found: Found) -> Gathered:
        """Do some patients.

        Raises
        ------
        RunError : a mention came with another patient than its own.
        """
        mentions = _rows(pa.ipc.open_stream(found.mentions).read_all())
        rows: list[dict[str, Any]] = []
        lines: dict[str, list[str]] = {name: [] for name in RESOURCES}
        packets = []
        for person in found.people:
            patient_id, scope = person.patient.patient_id, person.scope
            their = list(islice(mentions, person.n_mentions))
            # They are matched by count and order; nobody may be given what was found in another's notes.
            if len(their) != person.n_mentions or any(
                mention["patient_id"] != patient_id or (scope and mention["institution"] != scope) for mention in their
            ):
                raise RunError("mentions and patients do not match; do the batch again in another --output")
            own = patient_rows(patient_id, their, self._terminology, propagate=self._config.propagate)
            rows += own
            stated = [row for row in own if row["state"] in ("present", "excluded") and not row["propagated_from"]]
            features = [
                _feature(row)
                for row in stated
                if self._abnormalities is None or row["concept_id"] in self._abnormalities
            ]
            for feature in features:
                for resource in self._fhir.resources(patient_id, scope, feature):
                    lines[resource["resourceType"]].append(to_line(resource))
            if person.with_packet and self.writes_packets:
                packets.append((packet_id(scope, patient_id), self._packet(person, features)))
        return Gathered(
            pa.Table.from_pylist(rows, schema=PATIENTS_SCHEMA),
            {name: "".join(own) for name, own in lines.items()},
            tuple(packets),
        )

    def _packet(self, person: Person, features: Sequence[Feature]) -> bytes:
        created = person.latest
        if self._config.processed_on is not None:
            created = datetime.combine(self._config.processed_on, time(), UTC)
        return to_json(
            phenopacket(
                packet_id(person.scope, person.patient.patient_id),
                person.patient,
                features,
                hpo_version=self._terminology.version,
                created=created,
                created_by=SYSTEM,
            )
        )


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Return what `to_pylist` does; each date is made once, since that is what takes its time."""
    columns = {name: table[name].to_pylist() for name in table.column_names if name != "written_at"}
    dates = table["written_at"].combine_chunks().dictionary_encode()
    known = [*dates.dictionary.to_pylist(), None]
    columns["written_at"] = [known[place] for place in dates.indices.fill_null(len(known) - 1).to_pylist()]
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def _feature(row: Mapping[str, Any]) -> Feature:
    excluded = row["state"] == "excluded"
    carrying = [item for item in row["evidence"] if item["kind"] == ("denied" if excluded else "affirmed")]
    return Feature(
        concept_id=row["concept_id"],
        label=row["label"],
        excluded=excluded,
        evidence=tuple(
            Evidence(note_id, institution, written_at, tuple((item["start"], item["end"]) for item in items))
            for (institution, note_id, written_at), items in groupby(
                carrying, lambda item: (item["institution"], item["note_id"], item["written_at"])
            )
        ),
    )
