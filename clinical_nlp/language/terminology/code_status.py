"""Codes against the release in force: valid, a category, deleted, not yet there, or unknown. None is ever dropped."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from clinical_nlp.errors import ConfigError
from clinical_nlp.language.terminology import Terminology, load_terminology

STATUSES = ("valid", "category", "deleted", "not yet valid", "unknown", "unchecked")
"""valid: may be billed. category: has codes below it, one of which should have been used. deleted, not yet valid: in an
earlier or later release that was given, not in the one in force. unknown: in none. unchecked: no release was given."""


@dataclass(frozen=True, slots=True)
class Release:
    """A release of a code system, and from when it is in force."""

    since: date
    terminology: Terminology


@dataclass(frozen=True)
class CodeBook:
    """The releases of one code system, oldest first; `codes` gives names to codes, `status` checks them.

    Parameters
    ----------
    system : ICD-10-CM, ICD-10-PCS, ICD-9-CM, or the name of the user's own list.
    releases : may be empty: nothing is checked then, and codes have no names.
    """

    system: str
    releases: tuple[Release, ...] = ()

    @property
    def version(self) -> str:
        """What codes were checked against, for a report."""
        return "; ".join(f"{r.terminology.name} {r.terminology.version}".strip() for r in self.releases) or "nothing"

    def normal(self, code: str) -> str:
        """Return the code as the releases write it (upper case, with its dot), or as given where none has it."""
        for release in reversed(self.releases):
            if (found := release.terminology.resolve(code)) is not None:
                return found
        return code.strip()

    def in_force(self, day: date | None) -> Release | None:
        """Return the release in force on a day; the oldest for days before all, the newest without a day."""
        if not self.releases:
            return None
        if day is None:
            return self.releases[-1]
        return self.releases[max(0, bisect_right([release.since for release in self.releases], day) - 1)]

    def status(self, code: str, day: date | None = None) -> str:
        """Return one of `STATUSES` for a code that was given on a day."""
        release = self.in_force(day)
        if release is None:
            return "unchecked"
        found = release.terminology.resolve(code)
        if found is not None:
            return "category" if release.terminology.children(found) else "valid"
        elsewhere = [other for other in self.releases if other.terminology.resolve(code) is not None]
        if not elsewhere:
            return "unknown"
        return "not yet valid" if all(other.since > release.since for other in elsewhere) else "deleted"

    def label(self, code: str) -> str:
        """Return what a code is called, by the newest release that has it; else what is above it is called, or ''."""
        for end in (len(code), *range(len(code) - 1, 2, -1)):
            for release in reversed(self.releases):
                found = release.terminology.resolve(code[:end].rstrip("."))
                if found is not None:
                    return release.terminology.label(found)
        return ""

    def names(self, code: str) -> tuple[str, ...]:
        """Return all names of a code that the newest release with it has, the label first."""
        for release in reversed(self.releases):
            found = release.terminology.resolve(code)
            if found is not None:
                return tuple(name.text for name in release.terminology.names(found))
        return ()

    def known(self) -> tuple[str, ...]:
        """Return the codes of the newest release that have nothing below them, sorted."""
        if not self.releases:
            return ()
        newest = self.releases[-1].terminology
        return tuple(code for code in newest.ids if not newest.children(code))


def load_code_book(system: str, *, path: str | None = None, releases: Mapping[str, str] | None = None) -> CodeBook:
    """Load what codes of a system are checked against.

    Parameters
    ----------
    system : of the codes.
    path : the user's own list of codes, a CSV with id and label.
    releases : first day in force (ISO date) -> file of that release (ICD-10-CM tabular XML, or CSV with id and label).
        Without either, ICD-10-CM takes the release that comes with the package, and other systems are not checked.

    Raises
    ------
    ConfigError : both are given, or a key is no date.
    """
    if path is not None and releases:
        raise ConfigError("codes.path and codes.releases exclude each other: a list of your own has no releases")
    found = []
    for since, file in (releases or {}).items():
        try:
            day = date.fromisoformat(str(since))
        except ValueError:
            raise ConfigError(f"codes.releases: {since!r} is no date such as 2025-10-01") from None
        found.append(Release(day, load_terminology(Path(file))))
    if path is not None:
        found = [Release(date.min, load_terminology(Path(path)))]
    elif not found and system == "ICD-10-CM":
        found = [Release(date.min, load_terminology("icd10cm"))]
    return CodeBook(system, tuple(sorted(found, key=lambda release: release.since)))


def category(code: str, system: str) -> str:
    """Return the category that a code belongs to: three characters (ICD-9-CM: E codes four, procedures two).

    A code of another system is its own category, unless it has a dot: then it is what stands before it.
    """
    whole = code.partition(".")[0]
    if system == "ICD-10-PCS":
        return code[:3]
    if system == "ICD-9-CM" and whole == code:
        return code[:4] if code.startswith("E") else code[:3]
    return whole if "." in code or not re.fullmatch(r"ICD-.*", system) else code[:3]


def group_indices(codes: Sequence[str], system: str) -> list[int]:
    """Return the index of each code's category, in the order in which categories come up."""
    place: dict[str, int] = {}
    return [place.setdefault(category(code, system), len(place)) for code in codes]
