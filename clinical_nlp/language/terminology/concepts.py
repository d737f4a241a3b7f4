"""What a terminology is: concepts with names and parents, and a table from retired ids to current ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

SCOPES = ("label", "exact", "narrow", "broad", "related")


@dataclass(frozen=True, slots=True)
class Name:
    """One way to write a concept. `scope` is label, exact, narrow, broad or related."""

    text: str
    scope: str = "exact"
    abbreviation: bool = False


@dataclass(frozen=True, slots=True)
class Concept:
    """One live entry: `names[0]` is the label."""

    concept_id: str
    names: tuple[Name, ...]
    parents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Terminology:
    """Concepts of one release of one terminology.

    Parameters
    ----------
    name : `hpo`, `icd10cm`, or the file name of a user vocabulary.
    version : the release as the source states it; empty where it does not.
    digest : sha256 of the source, hex.
    concepts : live concepts by id.
    retired : obsolete and alternative ids, each with the id that replaces it, or None where none does.
    roots : only these concepts' descendants (and not they themselves) are looked for in notes; empty means all.
    unmatched : ids that are valid and never looked for in notes.
    matched : ids that are looked for wherever they stand.
    """

    name: str
    version: str
    digest: str
    concepts: Mapping[str, Concept] = field(repr=False)
    retired: Mapping[str, str | None] = field(default_factory=dict, repr=False)
    roots: tuple[str, ...] = ()
    unmatched: frozenset[str] = field(default=frozenset(), repr=False)
    matched: frozenset[str] = field(default=frozenset(), repr=False)

    def __contains__(self, concept_id: object) -> bool:
        return concept_id in self.concepts

    def __len__(self) -> int:
        return len(self.concepts)

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Live ids, sorted."""
        return tuple(sorted(self.concepts))

    @cached_property
    def matchable(self) -> frozenset[str]:
        """Ids that may be found in a note."""
        wanted = self.concepts.keys() if not self.roots else set().union(*(self.descendants(r) for r in self.roots))
        return (frozenset(wanted) | self.matched) - self.unmatched

    @cached_property
    def _children(self) -> dict[str, list[str]]:
        children: dict[str, list[str]] = {}
        for concept_id in self.ids:
            for parent in self.concepts[concept_id].parents:
                children.setdefault(parent, []).append(concept_id)
        return children

    @cached_property
    def _above(self) -> dict[str, frozenset[str]]:
        """The ancestors that were asked for."""
        return {}

    def label(self, concept_id: str) -> str:
        """Return the preferred name. Raises KeyError for an id that is not live: `resolve` it first."""
        return self.concepts[concept_id].names[0].text

    def names(self, concept_id: str) -> tuple[Name, ...]:
        """Return every name with its scope, the label first."""
        return self.concepts[concept_id].names

    def synonyms(self, concept_id: str) -> tuple[str, ...]:
        """Return the names other than the label, in the order of the source."""
        return tuple(name.text for name in self.concepts[concept_id].names[1:])

    def parents(self, concept_id: str) -> tuple[str, ...]:
        """Return the ids one level up."""
        return self.concepts[concept_id].parents

    def children(self, concept_id: str) -> tuple[str, ...]:
        """Return the ids one level down, sorted."""
        return tuple(self._children.get(concept_id, ()))

    def ancestors(self, concept_id: str) -> frozenset[str]:
        """Return every id above, without the concept itself."""
        found = self._above.get(concept_id)
        if found is None:
            found = self._above[concept_id] = self._closure(concept_id, lambda i: self.concepts[i].parents)
        return found

    def descendants(self, concept_id: str) -> frozenset[str]:
        """Return every id below, without the concept itself."""
        return self._closure(concept_id, lambda i: self._children.get(i, ()))

    def resolve(self, concept_id: str) -> str | None:
        """Return the live id for a live, alternative or obsolete one; None where there is no such concept."""
        concept_id = concept_id.strip()
        for _ in range(10):  # replacements may chain; a circle in the source must not hang us
            if concept_id in self.concepts:
                return concept_id
            replaced = self.retired.get(concept_id)
            if replaced is None:
                break
            concept_id = replaced
        return None

    def _closure(self, concept_id: str, step) -> frozenset[str]:  # type: ignore[no-untyped-def]
        seen: set[str] = set()
        stack = list(step(concept_id))
        while stack:
            current = stack.pop()
            if current not in seen and current in self.concepts:
                seen.add(current)
                stack.extend(step(current))
        return frozenset(seen)
