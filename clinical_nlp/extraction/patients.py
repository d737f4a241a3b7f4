"""The patient rule: from what notes say about a concept to its state for the patient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import pyarrow as pa

from clinical_nlp.language.terminology import Terminology

STATES = ("present", "excluded", "conflicting", "uncertain", "family_only")

PATIENTS_SCHEMA = pa.schema(
    [
        pa.field("patient_id", pa.string(), nullable=False),
        pa.field("institutions", pa.list_(pa.string()), nullable=False),
        pa.field("concept_id", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("state", pa.string(), nullable=False),
        pa.field("first_documented", pa.timestamp("us", tz="UTC")),
        pa.field("last_documented", pa.timestamp("us", tz="UTC")),
        pa.field("n_mentions", pa.int64(), nullable=False),
        pa.field("n_notes", pa.int64(), nullable=False),
        pa.field("n_copied", pa.int64(), nullable=False),
        pa.field("n_affirmed", pa.int64(), nullable=False),
        pa.field("n_denied", pa.int64(), nullable=False),
        pa.field("n_uncertain", pa.int64(), nullable=False),
        pa.field("n_family", pa.int64(), nullable=False),
        pa.field("propagated_from", pa.list_(pa.string()), nullable=False),
        pa.field(
            "evidence",
            pa.list_(
                pa.struct(
                    [
                        ("institution", pa.string()),
                        ("note_id", pa.string()),
                        ("written_at", pa.timestamp("us", tz="UTC")),
                        ("start", pa.int64()),
                        ("end", pa.int64()),
                        ("kind", pa.string()),
                        ("copied", pa.bool_()),
                    ]
                )
            ),
            nullable=False,
        ),
    ]
)
"""One row a patient and concept. `first_documented` and `last_documented` are the dates of the notes that carry the
state (never onset); `evidence` keeps every dated assertion, also those of another kind. A row that only propagation
gave has no mentions of its own and names the concepts it comes from."""

_KINDS_OF = {
    "present": ("affirmed",),
    "excluded": ("denied",),
    "conflicting": ("affirmed", "denied"),
    "uncertain": ("uncertain",),
    "family_only": ("family",),
}

LIFELONG = (
    "HP:0001197",  # Abnormality of prenatal development or birth
    "HP:0000202",  # Orofacial cleft
    "HP:0001159",  # Syndactyly
    "HP:0010442",  # Polydactyly
    "HP:0000589",  # Coloboma
    "HP:0002414",  # Spina bifida
    "HP:0001274",  # Agenesis of corpus callosum
    "HP:0001360",  # Holoprosencephaly
    "HP:0000104",  # Renal agenesis
    "HP:0000085",  # Horseshoe kidney
    "HP:0001636",  # Tetralogy of Fallot
    "HP:0001669",  # Transposition of the great arteries
    "HP:0001651",  # Dextrocardia
    "HP:0001696",  # Situs inversus totalis
    "HP:0001249",  # Intellectual disability
    "HP:0000717",  # Autism
)
"""Concepts that a patient has for life or never: to affirm and to deny one is a conflict, not a resolved episode.
Taken with everything below them, and with every concept whose label says "congenital". The list is short on purpose:
what surgery or time can remove (a septal defect, a club foot) is not on it."""


@lru_cache(maxsize=4)
def _lifelong_of(terminology: _ById) -> frozenset[str]:
    known = terminology.terminology
    roots = [concept_id for concept_id in LIFELONG if concept_id in known]
    roots += [concept_id for concept_id in known.ids if "congenital" in known.label(concept_id).lower()]
    return frozenset(roots).union(*(known.descendants(concept_id) for concept_id in roots))


class _ById:
    """A terminology as a cache key: its concepts are a mapping, which has no hash."""

    def __init__(self, terminology: Terminology) -> None:
        self.terminology = terminology

    def __hash__(self) -> int:
        return hash(self.terminology.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.terminology.digest == self.terminology.digest


def lifelong_concepts(terminology: Terminology) -> frozenset[str]:
    """Return the concepts of a terminology that are for life; see `LIFELONG`."""
    return _lifelong_of(_ById(terminology))


def evidence_kind(presence: str, temporality: str, modality: str, experiencer: str) -> str | None:
    """Return what a mention is evidence of: affirmed, denied, uncertain, family, or nothing (None).

    Nothing is what is planned or feared, hypothetical, conditional or generic, said of somebody else, or denied of
    the family.
    """
    if modality != "actual" or temporality == "future":
        return None
    if experiencer == "patient":
        return {"present": "affirmed", "absent": "denied", "uncertain": "uncertain"}[presence]
    return "family" if experiencer == "family" and presence != "absent" else None


def patient_states(evidence: Mapping[str, Counter[str]], terminology: Terminology) -> dict[str, str]:
    """Apply the patient rule to one patient.

    Parameters
    ----------
    evidence : concept id -> how often it was affirmed, denied, uncertain or said of the family.
    terminology : for ancestors and for what is lifelong; concepts that it does not hold have neither.

    Returns
    -------
    concept id -> state, in the order given; a concept without any evidence has no state. A concept is

    - *present* if it was ever affirmed as a fact about the patient, now or in the past,
    - *conflicting* if it is lifelong and was both affirmed and denied, or if it was denied and never affirmed while
      something below it was affirmed (no heart disease, and a heart attack),
    - *excluded* if it was denied and never affirmed (a later "possible" does not undo a denial),
    - *uncertain*, or *family_only*, if there is nothing firmer.

    A fever that was there and is denied later is a resolved episode: it stays present, with both dates in the
    evidence.
    """
    lifelong = lifelong_concepts(terminology)
    above_affirmed: set[str] = set()
    for concept, counts in evidence.items():
        if counts["affirmed"] and concept in terminology:
            above_affirmed |= terminology.ancestors(concept)
    states = {}
    for concept, counts in evidence.items():
        if counts["affirmed"]:
            states[concept] = "conflicting" if counts["denied"] and concept in lifelong else "present"
        elif counts["denied"]:
            states[concept] = "conflicting" if concept in above_affirmed else "excluded"
        elif counts["uncertain"]:
            states[concept] = "uncertain"
        elif counts["family"]:
            states[concept] = "family_only"
    return states


def propagate_states(states: Mapping[str, str], terminology: Terminology) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return what follows from the states: presence upwards, exclusion downwards.

    A state that was stated firmly (present, excluded, conflicting) is never overruled; an uncertain or family_only one
    is. Presence goes no further than the roots that are looked for in notes ("Phenotypic abnormality" says nothing).

    Returns
    -------
    concept id -> (state, the concepts it follows from, sorted), sorted by concept id.
    """
    sources: dict[str, tuple[str, set[str]]] = {}
    silent = set(terminology.roots).union(*(terminology.ancestors(root) for root in terminology.roots))
    for concept, state in states.items():
        if concept not in terminology or state not in ("present", "excluded"):
            continue
        reached = terminology.ancestors(concept) if state == "present" else terminology.descendants(concept)
        for other in reached - silent:
            if states.get(other, "uncertain") in ("uncertain", "family_only"):
                sources.setdefault(other, (state, set()))[1].add(concept)
    return {concept: (sources[concept][0], tuple(sorted(sources[concept][1]))) for concept in sorted(sources)}


def patient_rows(
    patient_id: str, mentions: Iterable[Mapping[str, Any]], terminology: Terminology, *, propagate: bool = False
) -> list[dict[str, Any]]:
    """Turn the mentions of one patient into rows of `PATIENTS_SCHEMA`, sorted by concept.

    Parameters
    ----------
    patient_id : whose mentions they are.
    mentions : rows of `MENTION_SCHEMA` with a concept, in the order in which the evidence is to be listed.
    terminology : retired ids are resolved in it.
    propagate : add what follows by `propagate_states`; the dates are those of the concepts it comes from.
    """
    evidence: dict[str, list[dict[str, Any]]] = {}
    labels: dict[str, str] = {}
    for mention in mentions:
        kind = evidence_kind(mention["presence"], mention["temporality"], mention["modality"], mention["experiencer"])
        if kind is None:
            continue
        concept = terminology.resolve(mention["concept_id"]) or mention["concept_id"]
        labels[concept] = terminology.label(concept) if concept in terminology else mention["concept_label"]
        evidence.setdefault(concept, []).append(
            {
                **{name: mention[name] for name in ("institution", "note_id", "written_at", "start", "end")},
                "kind": kind,
                "copied": mention["copied_from"] is not None,
            }
        )
    counts = {concept: Counter(item["kind"] for item in evidence[concept]) for concept in sorted(evidence)}
    states = patient_states(counts, terminology)
    rows = {
        concept: _row(patient_id, concept, labels[concept], state, evidence[concept], counts[concept])
        for concept, state in states.items()
    }
    if propagate:
        for concept, (state, sources) in propagate_states(states, terminology).items():
            own, label = evidence.get(concept, []), terminology.label(concept)
            row = _row(patient_id, concept, label, state, own, counts.get(concept, Counter()))
            row["propagated_from"] = list(sources)
            first = [date for source in sources if (date := rows[source]["first_documented"])]
            last = [date for source in sources if (date := rows[source]["last_documented"])]
            row["first_documented"], row["last_documented"] = min(first, default=None), max(last, default=None)
            row["institutions"] = sorted({name for source in sources for name in rows[source]["institutions"]})
            rows[concept] = row
    return [rows[concept] for concept in sorted(rows)]


def _row(
    patient_id: str, concept: str, label: str, state: str, evidence: list[dict[str, Any]], counts: Counter[str]
) -> dict[str, Any]:
    dates: list[datetime] = [
        item["written_at"] for item in evidence if item["kind"] in _KINDS_OF[state] and item["written_at"] is not None
    ]
    return {
        "patient_id": patient_id,
        "institutions": sorted({item["institution"] for item in evidence}),
        "concept_id": concept,
        "label": label,
        "state": state,
        "first_documented": min(dates, default=None),
        "last_documented": max(dates, default=None),
        "n_mentions": len(evidence),
        "n_notes": len({(item["institution"], item["note_id"]) for item in evidence}),
        "n_copied": sum(item["copied"] for item in evidence),
        "n_affirmed": counts["affirmed"],
        "n_denied": counts["denied"],
        "n_uncertain": counts["uncertain"],
        "n_family": counts["family"],
        "propagated_from": [],
        "evidence": evidence,
    }
