"""Word forms: what counts as the same word in a note and in a terminology.

`light` undoes case, plural and British spelling; `heavy` also undoes derivation (`dilated`, `dilatation`); `root` also
puts words that say the same inside a longer name together (`renal`, `kidney`; `fifth`, `V`). All are pure functions of
one word; irregular words are listed in `variants.csv`, words of one meaning in `equivalents.csv`.
"""

from __future__ import annotations

import csv
import unicodedata
from functools import lru_cache
from pathlib import Path

_FOLDER = Path(__file__).parent

FREE = frozenset(
    ("of", "the", "a", "an", "in", "on", "at", "to", "his", "her", "their", "its", "my", "your", "this", "that")
)
"""Words that a phrase may have or lack: `dilatation of the aorta`."""

WEAK = frozenset(("and", "or", "with", "by", "from", "for", "as", "is", "are", "was", "were", "remains", "remained",
                  "became", "nor", "plus"))  # fmt: skip
"""Words that a phrase may have or lack only where the other words keep their order."""

# Order matters: the longest ending comes first; (ending, replacement, letters that must remain before it).
_ENDINGS: tuple[tuple[str, str, int], ...] = (
    ("plastic", "plas", 1),
    ("plasia", "plas", 1),
    ("plasias", "plas", 1),
    ("plasty", "plasty", 1),
    ("trophic", "troph", 1),
    ("trophia", "troph", 1),
    ("ectatic", "ectas", 2),
    ("ectasis", "ectas", 2),
    ("ectasia", "ectas", 2),
    ("paretic", "pares", 1),
    ("paresis", "pares", 1),
    ("icular", "icl", 3),
    ("ifying", "ific", 3),
    ("icity", "", 4),
    ("ality", "", 4),
    ("ation", "", 4),
    ("ative", "", 4),
    ("atory", "", 4),
    ("atous", "", 4),
    ("ating", "", 4),
    ("ening", "", 4),
    ("ified", "ific", 3),
    ("ility", "il", 4),
    ("ated", "", 4),
    ("ally", "", 4),
    ("ened", "", 3),
    ("ency", "", 4),
    ("ence", "", 3),
    ("ance", "", 4),
    ("ancy", "", 4),
    ("icle", "icl", 3),
    ("ious", "", 4),
    ("itic", "it", 3),
    ("itis", "it", 2),
    ("ized", "", 5),
    ("ment", "", 4),
    ("ness", "", 3),
    ("osis", "os", 2),
    ("oses", "os", 3),
    ("osed", "os", 3),
    ("otic", "os", 3),
    ("ysis", "ys", 3),
    ("ytic", "ys", 3),
    ("ial", "", 3),
    ("ium", "", 4),
    ("ify", "ific", 3),
    ("ing", "", 3),
    ("ion", "", 3),
    ("ism", "", 5),
    ("ity", "", 4),
    ("ive", "", 4),
    ("ous", "", 3),
    ("ant", "", 4),
    ("ent", "", 3),
    ("ate", "", 5),
    ("al", "", 3),
    ("ar", "", 4),
    ("ed", "", 3),
    ("ia", "", 3),
    ("ic", "", 3),
    ("ly", "", 4),
    ("um", "", 4),
    ("us", "us", 1),
    ("is", "", 4),
    ("a", "", 4),
    ("e", "", 3),
    ("y", "", 4),
)


_INNER = ("al", "ar", "ate", "e", "ial", "ic", "ion", "ive", "ment", "ous", "y")
"""Endings that may stand before another one."""


def _table(name: str) -> dict[str, str]:
    with (_FOLDER / name).open(encoding="utf-8", newline="") as file:
        return {row["form"]: row["canonical"] for row in csv.DictReader(file)}


@lru_cache(maxsize=1)
def _variants() -> dict[str, str]:
    return _table("variants.csv")


@lru_cache(maxsize=1)
def _canonical() -> frozenset[str]:
    return frozenset(_variants().values())


@lru_cache(maxsize=65_536)
def light(word: str) -> str:
    """Return `word` in lower case, American spelling and singular."""
    word = word.lower().replace("’", "'")
    if not word.isascii():
        word = "".join(c for c in unicodedata.normalize("NFKD", word) if not unicodedata.combining(c))
    if word.endswith("'s"):
        word = word[:-2]
    word = word.replace("'", "")
    size = len(word)
    if size > 4 and word.isalpha():
        if word.endswith("ae"):
            word = word[:-1]
        if size > 5:
            word = word.replace("ae", "e").replace("oe", "e") if not word.endswith("oe") else word.replace("ae", "e")
            word = word.replace("isation", "ization").replace("ising", "izing").replace("ised", "ized")
            if word.endswith(("our", "ours")):
                word = word.replace("our", "or")
        if word.endswith("mata") and size > 6:
            word = word[:-2]
        elif word.endswith("ies") and size > 5:
            word = word[:-3] + "y"
        elif word.endswith(("xes", "shes", "ches", "sses", "zes")) and not word.endswith("aches"):
            word = word[:-2]
        elif word.endswith("s") and not word.endswith(("ss", "us", "is", "ies")):
            word = word[:-1]
    elif size == 4 and word.endswith("s") and not word.endswith(("ss", "us", "is", "os", "as")):
        word = word[:-1]
    return _variants().get(word, word)


@lru_cache(maxsize=65_536)
def heavy(word: str) -> str:
    """Return the stem of `word` with derivational endings taken off; equal stems count as the same word."""
    return _stripped(light(word))


def _stripped(word: str) -> str:
    if len(word) < 5 or not word.isalpha() or word in _canonical():
        return word
    for ending, replacement, remain in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= remain:
            if ending == "y" and word[-2] in "aeou":  # delay, delayed
                break
            word = word[: len(word) - len(ending)] + replacement
            break
    if len(word) > 4 and word[-1] == word[-2] and word[-1] not in "aeiou":
        word = word[:-1]
    return word


@lru_cache(maxsize=1)
def _equivalents() -> dict[str, str]:
    table = {}
    for form, canonical in _table("equivalents.csv").items():
        table[light(form)] = _stem(light(canonical))
        if not form.endswith(("al", "ar")):  # `plant` is not plantar
            table[_stem(light(form))] = _stem(light(canonical))
    return table


def _stem(word: str) -> str:
    """Take endings off until none is left: `developmentally`, `develop`."""
    stem = _stripped(word)
    while len(stem) > 6 and stem.endswith(_INNER) and (shorter := _stripped(stem)) != stem:
        stem = shorter
    return stem


@lru_cache(maxsize=65_536)
def root(word: str) -> str:
    """Return what `word` counts as inside a name of two words or more."""
    word = light(word)
    known = _equivalents()
    return known.get(word) or known.get(stem := _stem(word), stem)


def same_single(name: str, word: str) -> bool:
    """Whether `word` alone in a text may stand for the one-word name `name`; both are light forms with equal stems.

    Alone, a stem is not enough (`man` is not mania, `ordered` not an order); an adjective of the same root is
    (`hypotonic`, `edematous`), and a participle of a noun in -ion (`confused`).
    """
    if name == word:
        return True
    if len(heavy(word)) < 4 or heavy(word) != heavy(name):
        return False
    if word.endswith("a") and name.endswith(("on", "um")) and word[:-1] == name[:-2]:  # chalazia
        return True
    return word.endswith(("ic", "tous", "ous", "rrheal")) or (word.endswith("ed") and name.endswith("ion"))
