"""Spans that may name a concept though no name of it stands there: what a linker looks at."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from clinical_nlp.language.terminology.concepts import Terminology
from clinical_nlp.language.terminology.matching import Match
from clinical_nlp.language.terminology.normalization import FREE, root

FLOOR = 0.5
"""Share of words, weighed by how much they tell, that a span has in common with some name; less is not looked at."""
WORDS = 6
"""Words of a span that count."""

_TOKEN = re.compile(r"[^\W_]+(?:[-'’‐‑][^\W_]+)*|\S")
_WORD = re.compile(r"[^\W_]+")
_JOINING = FREE | {"and", "with", "by", "from", "for", "to", "or"}
"""Words that a span may hold inside, and neither begins nor ends with."""
_CLOSED = frozenset((Path(__file__).parent / "closed_words.txt").read_text("utf-8").split())
"""Words that no span holds: they end a phrase."""
_ORDINARY = frozenset(("normal", "normally", "unremarkable", "negative", "never", "intact"))
"""Words by which a text says that there is nothing; no span holds them."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A span of a text; `inside` holds the concepts of the dictionary's matches that it contains."""

    start: int
    end: int
    inside: tuple[str, ...] = ()


class Lexicon:
    """The names of a terminology as weighed words.

    Only what stands under the first root is meant: the phenotypic abnormalities of HPO, whatever else is matched.

    Attributes
    ----------
    names : (concept id, text, scope), sorted by concept; abbreviations are left out.
    bags : the roots of each name.
    """

    def __init__(self, terminology: Terminology) -> None:
        ids = terminology.descendants(terminology.roots[0]) if terminology.roots else terminology.matchable
        self.names = [
            (concept_id, name.text, name.scope)
            for concept_id in sorted(ids & terminology.matchable)
            for name in terminology.names(concept_id)
            if not name.abbreviation
        ]
        self.bags = [content(text) for _, text, _ in self.names]
        holders: dict[str, set[str]] = {}
        places: dict[str, list[int]] = {}
        for row, ((concept_id, _, _), bag) in enumerate(zip(self.names, self.bags, strict=True)):
            for word in bag:
                holders.setdefault(word, set()).add(concept_id)
                places.setdefault(word, []).append(row)
        n = len({concept_id for concept_id, _, _ in self.names}) + 1
        self._unknown = 0.8 * math.log(n)
        self._weights = {word: math.log(n / len(found)) for word, found in holders.items()}
        self._places = {word: np.array(rows) for word, rows in places.items()}
        self.totals = np.array([self.weight(bag) or 1e-6 for bag in self.bags])
        self._sums = np.zeros(len(self.names))

    def weight(self, words: Iterable[str]) -> float:
        """Return how much words tell: the less names hold one, the more."""
        return sum(self._weights.get(word, self._unknown) for word in words)

    def heaviest(self, words: Iterable[str]) -> float:
        """Return the weight of the word that tells most, 0 where there is none."""
        return max((self._weights.get(word, self._unknown) for word in words), default=0.0)

    def unknown(self, words: Iterable[str]) -> int:
        """Return how many of the words no name holds."""
        return sum(word not in self._weights for word in words)

    def nearness(self, words: frozenset[str]) -> float:
        """Return the greatest weighed Dice coefficient between the words and those of a name."""
        found = [(self._places[word], self._weights[word]) for word in sorted(words & self._weights.keys())]
        found = [(rows, weight) for rows, weight in found if weight > 2.2]  # `abnormal` alone leads nowhere
        if not found:
            return 0.0
        for rows, weight in found:
            self._sums[rows] += weight
        touched = np.concatenate([rows for rows, _ in found])
        best = (2 * self._sums[touched] / (self.totals[touched] + self.weight(words))).max()
        self._sums[touched] = 0.0
        return float(best)


def content(text: str) -> frozenset[str]:
    """Return the roots of the words that carry meaning."""
    return frozenset(root(word) for word in _WORD.findall(text) if word.lower() not in _JOINING and word != "s")


def spelled(text: str) -> str:
    """Return a span as it is embedded: lower case, single spaces."""
    return " ".join(text.lower().split())


def candidates(text: str, matches: Sequence[Match]) -> Iterator[Candidate]:
    """Yield the phrases of `text` that the dictionary has no match for, or only one inside.

    A phrase begins and ends where a closed-class word, a joining word or punctuation stands beside it.
    """
    tokens = [(found.start(), found.end()) for found in _TOKEN.finditer(text)]
    kinds = [_kind(text[start:end]) for start, end in tokens]
    taken = [(match.start, match.end, match.concept_id) for match in matches]
    n = len(tokens)
    for first in range(n):
        if kinds[first] != "word" or (first and kinds[first - 1] in ("word", "number") and _near(text, tokens, first)):
            continue
        words = 0
        for last in range(first, n):
            if kinds[last] in ("end", "mark") or (last > first and not _near(text, tokens, last)):
                break
            if kinds[last] == "joint":
                continue
            words += 1
            if words > WORDS:
                break
            following = last + 1
            if following < n and kinds[following] in ("word", "number") and _near(text, tokens, following):
                continue
            start, end = tokens[first][0], tokens[last][1]
            over = [m for m in taken if m[0] < end and start < m[1]]
            if all(start <= m[0] and m[1] <= end and (start, end) != m[:2] for m in over):
                yield Candidate(start, end, tuple(m[2] for m in over))


def worth_a_look(text: str, lexicon: Lexicon) -> bool:
    """Say whether a span shares enough with some name to be embedded. One word alone is the dictionary's business."""
    words = content(text)
    return len(words) > 1 and lexicon.nearness(words) >= FLOOR


@lru_cache(maxsize=65_536)
def _kind(token: str) -> str:
    if not token[0].isalnum():
        return "mark"
    lower = token.lower()
    if lower in _JOINING:
        return "joint"
    if lower in _CLOSED or lower in _ORDINARY:
        return "end"
    return "number" if lower.isdigit() else "word"


def _near(text: str, tokens: Sequence[tuple[int, int]], place: int) -> bool:
    """Whether no blank line stands before a token."""
    return text.count("\n", tokens[place - 1][1], tokens[place][0]) < 2
