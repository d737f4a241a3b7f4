"""Abbreviations, read in context.

A short form means what the note itself says it means (`mental retardation (MR)`). Otherwise the short forms of
`abbreviations.csv` need a word of their field close by and none of another field, and those that the terminology
declares need three letters, or their concept to be written out somewhere in the note.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clinical_nlp.language.terminology.concepts import Terminology

_DEFINED = re.compile(r"\(([A-Z][A-Za-z0-9]{1,9})\)")
_SHORT = re.compile(r"(?<![\w-])[A-Z][A-Za-z0-9]{1,10}(?![\w-])")
_WORD = re.compile(r"[^\W_]+")
_NEAR = 80
_OTHER = re.compile(r"[^a-z0-9%+]+")
_STOP = re.compile(r"[.;:!?](?=\s)|\n")


_NO_WORDS = frozenset(
    ("ADHD", "AFIB", "AKI", "CAD", "COPD", "ESRD", "GERD", "IDDM", "NAFLD", "NIDDM", "NSTEMI", "OSA", "PNA", "SBO",
     "SLE", "SOB", "STEMI", "TIA", "UGIB", "UTI")
)  # fmt: skip
_VOWELS = frozenset("AEIOUY")


def in_any_case(form: str) -> bool:
    """Whether a short form is one in capitals or not, since it is no word: `htn`, `DVT` in a line of capitals."""
    upper = form.upper()
    return upper in _NO_WORDS or (len(form) > 2 and form.isalnum() and form.isascii() and _VOWELS.isdisjoint(upper))


@dataclass(frozen=True, slots=True)
class Sense:
    """What a short form may mean: the concept's code, and words around it of which one must and none may stand."""

    code: int
    near: tuple[str, ...] = ()
    not_near: tuple[str, ...] = ()
    declared: bool = False


def read_senses(terminology: Terminology, code_of: Mapping[str, int]) -> dict[str, list[Sense]]:
    """Return the senses of `abbreviations.csv` whose concepts have a code."""
    senses: dict[str, list[Sense]] = {}
    with (Path(__file__).parent / "abbreviations.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            code = code_of.get(terminology.resolve(row["concept_id"]) or "")
            if code is not None:
                near, not_near = (tuple(map(_cue, filter(None, row[key].split("|")))) for key in ("near", "not_near"))
                senses.setdefault(row["form"], []).append(Sense(code, near, not_near))
    return senses


def _cue(word: str) -> str:
    """A word of up to three letters stands alone, a longer one may go on."""
    plain = _OTHER.sub(" ", word).strip()
    return f" {plain} " if len(plain) < 4 else f" {plain}"


def definitions(
    text: str, spans: Sequence[tuple[int, int, int]], named: Callable[[str], int | None]
) -> dict[str, int | None]:
    """Return the short forms that `text` defines, each with the number of its concept, or None for something else.

    Parameters
    ----------
    text : the note.
    spans : (start, end, number) of the concepts that are written out in it.
    named : the number of the concept that a phrase names as a whole, or None.
    """
    defined: dict[str, int | None] = {}
    by_end: dict[int, list[tuple[int, int]]] | None = None
    for found in _DEFINED.finditer(text):
        short, stop = found[1], found.start()
        while stop > 0 and text[stop - 1] == " ":
            stop -= 1
        if by_end is None:
            by_end = {}
            for start, end, number in spans:
                by_end.setdefault(end, []).append((start, number))
        for start, number in sorted(by_end.get(stop, ())):
            begins = [word.start() for word in _WORD.finditer(text, start, stop)]
            begin = next((b for b in begins if _stands_for(short, text[b:stop])), None)
            meant = number if begin == start else None if begin is None else named(text[begin:stop])
            if meant is not None:
                defined.setdefault(short, meant)
                break
        else:
            words = list(_WORD.finditer(text, max(0, stop - 120), stop))[-len(short) - 3 :]
            if _initials(short, [word[0][0].lower() for word in words]):
                defined.setdefault(short, None)
    return defined


def chosen(text: str, start: int, end: int, senses: Sequence[Sense], written: set[int]) -> int | None:
    """Return the code of the first sense that what stands around [start, end) allows, or None."""
    around = sentence = None
    for sense in senses:
        if sense.declared:
            if end - start > 2 or sense.code >> 4 in written:
                return sense.code
            continue
        if not sense.near and not sense.not_near:
            return sense.code
        if around is None or sentence is None:
            before, after = text[max(0, start - _NEAR) : start].lower(), text[end : end + _NEAR].lower()
            around = _OTHER.sub(" ", f" {before} {after} ")
            sentence = _OTHER.sub(" ", f" {_STOP.split(before)[-1]} {_STOP.split(after)[0]} ")
        if any(word in sentence for word in sense.not_near):
            continue
        if not sense.near or any(word in around for word in sense.near):
            return sense.code
    return None


def occurrences(text: str, defined: Mapping[str, int | None]) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, number) of the short forms that `text` defines, also in the plural."""
    if not any(number is not None for number in defined.values()):
        return
    for found in _SHORT.finditer(text):
        form = found[0] if found[0] in defined else found[0][:-1] if found[0].endswith("s") else ""
        number = defined.get(form)
        if number is not None:
            yield found.start(), found.start() + len(form), number


def _stands_for(short: str, long: str) -> bool:
    """Whether the letters of `short` stand in `long` in order and both begin alike (Schwartz and Hearst 2003)."""
    letters, text = short.lower(), long.lower()
    if len(short) >= len(long) or text[0] != letters[0]:
        return False
    at = 0
    for letter in letters[1:]:
        at = text.find(letter, at + 1)
        if at < 0:
            return False
    return True


def _initials(short: str, initials: Sequence[str]) -> bool:
    """Whether words with these initials, up to the last one, may be short for the capitals of `short`."""
    letters = [letter.lower() for letter in short if letter.isupper()]
    if len(letters) < 2 or not initials or initials[-1] != letters[-1]:
        return False
    for begin, initial in enumerate(initials):
        rest = iter(initials[begin:])
        if initial == letters[0] and all(letter in rest for letter in letters):
            return True
    return False
