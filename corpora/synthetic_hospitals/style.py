"""How an institution writes. Each attribute has one distribution that all share and one value that is its own.

A note takes the institution's own value of an attribute with probability `covariate`, else a draw from the shared
distribution, so that 0 makes all institutions the same and 1 makes each one fully its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import Any

SHARED: dict[str, tuple[Any, ...]] = {
    "header": ("colon", "caps_colon", "caps", "numbered", "title", "dash", "equals", "bold", "colon", "caps_colon"),
    "header_names": (0, 1, 2, 3),
    "order": (0, 1, 2),
    "bullet": ("- ", "* ", "#. ", "", "", "\u2022 "),
    "blank_lines": (1, 1, 0, 2),
    "wrap": (0, 0, 80, 72, 60),
    "abbreviations": (0.05, 0.2, 0.4, 0.7),
    "terms": ("first", "mixed", "mixed", "ontology", "rare"),
    "lay": (0.0, 0.05, 0.15, 0.3),
    "typos": (0.0, 0.0, 0.3, 1.0, 2.5),
    "placeholder": ("bracket", "underscore", "angle", "x", "square", "at"),
    "dates": ("iso", "us", "long", "placeholder", "day_month"),
    "temperature": ("F", "C", "F", "C_bare"),
    "vitals": ("line", "list", "prose", "table"),
    "units": ("conventional", "si", "bare"),
    "dose": ("spaced", "tight", "sig", "words", "brand"),
    "demographic": ("year_old", "hyphen", "yo", "y/o", "lady"),
    "copying": (0.0, 0.1, 0.3, 0.6),
    "length": (1, 2, 2, 3),
    "body": ("normal", "normal", "normal", "normal", "normal", "lower", "upper"),
    "letterhead": ("", "", "", "Harbor General Hospital", "St. Brigid Medical Center", "Lakeside University Hospital",
                   "County Memorial Hospital", "Mercy Valley Clinic", "Pine Ridge Health", "Northgate Infirmary",
                   "Saint Aldric Hospital", "Riverbend Medical Group"),
    "side": ("left", "L", "left-sided", "left"),
    "signature": ("electronic", "dashes", "none", "initials"),
    "note_types": ("balanced", "inpatient", "outpatient", "radiology", "nursing"),
}  # fmt: skip
"""Values of each attribute; the shared distribution is uniform over the tuple (a value given twice is twice as likely).

`typos` is per hundred words, `length` counts how much is said, `abbreviations`, `lay` and `copying` are rates."""

_FAVOURITES = {"filler": 6, "nurse_filler": 6, "social": 4, "exam_normal": 8}
"""How many idioms of a category are an institution's own, where it is not two: neutral sentences must not repeat."""

NOTE_TYPES = ("admission", "progress", "nursing", "radiology", "discharge", "clinic")

NOTE_MIX: dict[str, tuple[float, ...]] = {
    "balanced": (1.0, 1.5, 1.0, 1.5, 1.0, 1.0),
    "inpatient": (1.5, 3.0, 1.0, 0.7, 1.5, 0.3),
    "outpatient": (0.4, 0.6, 0.3, 1.0, 0.4, 4.0),
    "radiology": (0.6, 0.8, 0.5, 4.0, 0.6, 0.8),
    "nursing": (0.8, 1.5, 3.5, 0.7, 0.8, 0.5),
}
"""Weights of `NOTE_TYPES`."""

Style = dict[str, Any]


def stream(*key: object) -> Random:
    """Return the random stream of a key: equal keys give equal streams, other keys independent ones."""
    digest = blake2b("|".join(map(str, key)).encode(), digest_size=8).digest()
    return Random(int.from_bytes(digest, "little"))


@dataclass(frozen=True, slots=True)
class Institution:
    """One institution: its own style, its favourite idioms, its prevalences and its annotators' convention."""

    index: int
    name: str
    style: Style
    favourites: dict[str, tuple[tuple[str, ...], ...]]
    omitted: tuple[str, ...]
    wide: bool


ANNOTATED = ("historical", "uncertain", "family", "hypothetical", "absent", "lay", "abbreviation", "copied")
"""Classes of mention that a convention may leave out."""


def make_institution(index: int, seed: int, idioms: dict[str, tuple[tuple[str, ...], ...]]) -> Institution:
    """Draw institution `index`; two that follow each other differ in every attribute."""
    style = {}
    for name, values in SHARED.items():
        distinct = list(dict.fromkeys(values))
        cycle, place = divmod(index, len(distinct))
        random = stream(seed, "own", name, cycle)
        random.shuffle(distinct)
        style[name] = distinct[place]
    favourites = {}
    for name, found in idioms.items():
        n = min(_FAVOURITES.get(name, 2), len(found))
        favourites[name] = tuple(stream(seed, "favourite", index, name).sample(found, n))
    classes = list(ANNOTATED)
    stream(seed, "convention").shuffle(classes)
    omitted = tuple(classes[(3 * index + step) % len(classes)] for step in range(3))
    return Institution(index, f"hospital-{index + 1}", style, favourites, omitted, index % 2 == 1)


def draw_style(institution: Institution, covariate: float, random: Random) -> Style:
    """Draw the style of one note. Two draws an attribute, used or not, so that knobs share their random numbers."""
    draw = random.random
    own = institution.style
    style = {}
    for name, values in SHARED.items():
        mine = draw() < covariate
        shared = values[int(draw() * len(values))]
        style[name] = own[name] if mine else shared
    return style
