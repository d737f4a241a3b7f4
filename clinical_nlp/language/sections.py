"""Sections of a note: a contiguous cover of the text, each with its header and a category.

Known headers and their categories are in `sections.csv`. A header stands at the start of a line, alone or before a
colon or dash, plain, in capitals, numbered, or marked up as markdown; a known header in capitals with a colon also
counts inside a line, as in transcriptions that lost their line breaks.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

CATEGORIES = (
    "chief_complaint",
    "history_of_present_illness",
    "past_medical_history",
    "family_history",
    "social_history",
    "medications",
    "allergies",
    "review_of_systems",
    "physical_exam",
    "laboratory",
    "imaging",
    "findings",
    "impression",
    "assessment_plan",
    "hospital_course",
    "procedures",
    "discharge_instructions",
    "other",
)

_INHERIT = "inherit"  # sub-headings that stay inside the section they stand in
_LINE = re.compile(
    r"^[ \t]*(?:[#>=*_~\-•]+[ \t]*)?(?:(?:\d{1,2}|[IVX]{1,4}|[A-Z])[.)][ \t]+)?[*_]*"
    r"(?P<name>[A-Za-z][A-Za-z0-9&/,.'’() \t\-]{1,70}?)[ \t]*[*_=]*[ \t]*"
    r"(?:(?P<mark>:[*_]*|[ \t][-–—](?=[ \t])|[-–—](?=[ \t]*$))|#*[ \t]*$)",
    re.MULTILINE,
)
_INLINE = re.compile(r"(?<=[.,;:)\]?!\"'] )(?P<name>[A-Z][A-Z0-9&/'() \-]{1,60}?)[ \t]*(?::|[-–](?=[ \t]))|"
                     r"(?<=[.,;]),?(?P<tight>[A-Z][A-Z&/'() \-]{1,60}?)[ \t]*:")  # fmt: skip
_SOAP = re.compile(r"[SOAP]:(?=[\s,])")
_SOAP_CATEGORIES = {
    "S": "history_of_present_illness",
    "O": "physical_exam",
    "A": "assessment_plan",
    "P": "assessment_plan",
}
_WORD = re.compile(r"[A-Za-z]+")
_SPACES = re.compile(r"[^a-z0-9&/]+")


@dataclass(frozen=True, slots=True)
class Section:
    """[start, end) of the whole section and [header_start, header_end) of its header, empty where it has none."""

    start: int
    end: int
    header_start: int
    header_end: int
    category: str

    @property
    def named(self) -> bool:
        """Whether the section has a header."""
        return self.header_end > self.header_start


@lru_cache(maxsize=1)
def _headers() -> dict[str, str]:
    with (Path(__file__).parent / "sections.csv").open(encoding="utf-8", newline="") as file:
        table = {_key(row["header"]): row["category"] for row in csv.DictReader(file)}
    unknown = sorted(set(table.values()) - {*CATEGORIES, _INHERIT})
    if unknown:
        msg = f"sections.csv names unknown categories: {', '.join(unknown)}"
        raise ValueError(msg)
    return table


def _key(name: str) -> str:
    return " ".join(_SPACES.sub(" ", name.lower().replace("'s", "s").replace("’s", "s")).split())


@lru_cache(maxsize=50_000)
def _category(name: str) -> str | None:
    """Return the category of a known header; `ASSESSMENT AND PLAN (continued)` counts without its bracket."""
    table = _headers()
    key = _key(name)
    if key in table:
        return table[key]
    if "(" in name:
        key = _key(re.sub(r"\([^)]*\)?", " ", name))
    return table.get(key) or (table.get(key.removesuffix("s")) if len(key) > 4 else None)


def is_header(line: str) -> bool:
    """Whether a line is a known header and nothing else."""
    line = line.strip(" \t*#:=_-")
    return 1 < len(line) < 50 and _category(line) not in (None, _INHERIT)


def find_sections(text: str) -> list[Section]:
    """Divide `text` into sections.

    Returns
    -------
    list of Section, sorted; the first starts at 0, each starts where the one before ends, the last ends at len(text).
        Text before the first header is a section without a header. Empty text has no section.
    """
    if not text:
        return []
    heads: list[tuple[int, int, int, str]] = []  # section start, header start, header end, category
    place = 0
    for line in text.split("\n"):
        if line and _may_be_header(line) and (found := _LINE.match(text, place)) is not None:
            category = _line_category(found, text)
            if category is not None:
                start = found.start() + (len(found[0]) - len(found[0].lstrip()))
                heads.append((start, found.start("name"), found.end("name"), category))
        place += len(line) + 1
    lines = {head[1] for head in heads}
    for found in _INLINE.finditer(text):
        group = "name" if found["name"] else "tight"
        category = _category(found[group])
        if category is None and group == "tight" and len(found[group]) > 3:
            # A heading of its own, as at the start of a line: `.,FETAL ANATOMY:` or `.,CYTOLOGY: ,`
            alone = text[found.end() : found.end() + 2].lstrip()[:1] == ","
            category = "other" if alone or " " in found[group].strip() else None
        if category and category != _INHERIT and found.start(group) not in lines:
            heads.append((found.start(group), found.start(group), found.end(group), category))
    soap = [found.start() for found in _SOAP.finditer(text) if _opens_line(text, found.start())]
    if (letters := {text[place] for place in soap}) & {"O", "A", "P"} and len(letters) > 1:
        for place in soap:
            if place not in lines:
                heads.append((place, place, place + 1, _SOAP_CATEGORIES[text[place]]))
    heads.sort()
    sections: list[Section] = []
    previous = (0, 0, 0, "other")
    for head in heads:
        if head[3] == _INHERIT or head[1] < previous[2]:
            continue
        if head[0] > previous[0]:
            sections.append(Section(previous[0], head[0], *previous[1:]))
        previous = head
    sections.append(Section(previous[0], len(text), *previous[1:]))
    first = sections[0]
    if first.start > 0:
        sections.insert(0, Section(0, first.start, 0, 0, "other"))
    return sections


def _opens_line(text: str, place: int) -> bool:
    """Whether only blanks stand before `place` in its line or sentence."""
    while place and text[place - 1] in " \t":
        place -= 1
    return not place or text[place - 1] in "\n.,"


@lru_cache(maxsize=1)
def _first_words() -> frozenset[str]:
    return frozenset(_WORD.findall(key)[0] for key in _headers())


def _may_be_header(line: str) -> bool:
    """Whether it is worth while to look at a line: most begin with a word that no header begins with."""
    first = _WORD.search(line)
    if first is None:
        return False
    word = first[0]
    lower = word.lower()
    known = _first_words()
    return (
        lower in known
        or (lower[-1] == "s" and lower[:-1] in known)
        or word.isupper()  # in capitals, or the number of a header (`IV.`)
        or line[first.end() : first.end() + 1] in "'’"
        or line.rstrip()[-1] in ":*_"
        or "#" in line
        or "**" in line
    )


def _opens_block(text: str, line: int) -> bool:
    """Whether the line that begins at `line` is the first, or has a blank one above it."""
    above = text[max(0, line - 120) : line].split("\n")
    return len(above) < 2 or not above[-2].strip()


def _line_category(found: re.Match[str], text: str) -> str | None:
    name, mark = found["name"].strip(), found["mark"]
    category = _category(name)
    words = name.split()
    alone = not mark or not text[found.end() : text.find("\n", found.end()) % (len(text) + 1)].strip()
    if category is not None:
        if mark and mark[0] == ":":
            return category
        # Without a colon it must look like a heading: alone on its line and not a lower-case word of prose.
        before = text[max(0, found.start() - 60) : found.start()].rstrip(" \t")
        previous = before[:-1].rpartition("\n")[2].strip()  # the line above, or its last 60 characters
        wrapped = len(previous) > 50 and previous[-1] not in ".!?:;"
        prefix = text[found.start() : found.start("name")].strip()  # number, bullet or markdown
        listed = prefix.strip("#=*_~>") or not (previous[-1:] == "." or _opens_block(text, found.start()))
        if not mark and listed and _key(name) in _ALSO_FINDINGS:
            return None
        if alone and name[-1] not in ".," and (name[0].isupper() or len(words) > 1 or prefix or not wrapped):
            return category
        dashed = mark and (name.isupper() or len(words) > 1 or _opens_block(text, found.start()))
        return category if dashed and not (wrapped and name[0].islower()) else None
    capitals = name.isupper() and len(name) > 3
    if not 1 <= len(words) <= 6 or name[-1] in ".," or ". " in name:
        return None
    if mark and mark[0] == ":":
        if capitals and (alone or len(words) > 1):
            return "other"
        if alone and len(words) > 1 and all(w[0].isupper() or w.lower() in _SMALL for w in words if w[0].isalpha()):
            return "other"
        return None
    before = text[max(0, found.start() - 2) : found.start()]
    marked = "#" in found[0][: found.start("name") - found.start()] or "**" in found[0]
    if alone and (marked or (capitals and len(words) > 1 and before in ("", "\n", "\n\n") and before != "\n")):
        return "other"
    return None


_ALSO_FINDINGS = frozenset({"pe", "ms", "px", "se"})  # `PE` in a list is an embolism
_SMALL = frozenset({"of", "and", "the", "for", "to", "in", "on", "with", "or", "at"})
