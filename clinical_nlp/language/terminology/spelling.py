"""Slips of the pen in long words of the field: one letter missing, doubled, wrong or in the wrong place."""

from __future__ import annotations

from collections.abc import Container, Iterator
from string import ascii_lowercase

SHORTEST = 8
FIELD = (
    "algia", "alysis", "asia", "cardia", "cele", "cephaly", "cytosis", "dactyly", "ectasia", "ectasis", "ectomy",
    "edema", "ema", "emia", "esthesia", "genesis", "genic", "ismus", "itic", "itis", "kinesia", "malacia", "megaly",
    "nemia", "nopia", "nychia", "oma", "opathy", "opia", "oplegia", "osis", "otic", "paresis", "pathy", "penia",
    "phagia", "phasia", "philia", "phobia", "plasia", "plastic", "plegia", "plegic", "pnea", "porosis", "ptosis",
    "ptysis", "rrhage", "rrhagia", "rrhea", "sclerosis", "stenosis", "stomia", "telorism", "thermia", "tonia",
    "tonic", "trophic", "trophy", "uresis", "uria", "vascular", "ventricular",
)  # fmt: skip
"""Endings that only words of the field have, so that a slip in one of them is not some other word."""
LAST = frozenset(ending[-2:] for ending in FIELD)
_HELD = 2
"""Letters at either end that must be right: prefixes and endings tell real words apart (hyper-, hypo-)."""


def mended(word: str, known: Container[str]) -> str | None:
    """Return the one word of `known` that is a single slip away from `word`, or None where there is none or several.

    Parameters
    ----------
    word : lower-case letters only, at least `SHORTEST` of them, and itself no word of the language.
    known : words to choose from, all in lower case.
    """
    found = {other for other in _slips(word) if other in known}
    return found.pop() if len(found) == 1 else None


def _slips(word: str) -> Iterator[str]:
    for k in range(_HELD, len(word) - _HELD + 1):
        before, after = word[:k], word[k:]
        for letter in ascii_lowercase:
            yield before + letter + after
        if k < len(word) - _HELD:
            yield before + after[1:]
            for letter in ascii_lowercase:
                yield before + letter + after[1:]
            if k < len(word) - _HELD - 1:
                yield before + after[1] + after[0] + after[2:]
