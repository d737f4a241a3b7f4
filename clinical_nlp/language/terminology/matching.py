"""Finding a terminology's concepts in unchanged text.

A name is kept as the bag of its stemmed content words, under the sum of one 62-bit number a word, so a window over the
text is looked up by adding one number a word whatever the order. A hit counts when the words stand in the name's order,
or when only free words (`of the`) stand between them. The longest hit wins.
"""

from __future__ import annotations

import csv
import hashlib
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from clinical_nlp.errors import UsageError
from clinical_nlp.language.terminology.concepts import SCOPES, Name, Terminology
from clinical_nlp.language.terminology.normalization import FREE, WEAK, heavy, light, same_single

_FOLDER = Path(__file__).parent
_TOKEN = re.compile(r"[^\W_]+(?:[-'’‐‑][^\W_]+)*|[^\w\s]|\n")
_WORD = re.compile(r"[^\W_]+")
_OPTIONAL = re.compile(r"\s*[\(\[][^)\]]*[\)\]]")
_JOINED = re.compile(r"[,/&+]| (?:and|or|nor) ", re.IGNORECASE)
_ABNORMAL = re.compile(r"(?:abnormal(?:ity)?|anomaly) (?:of )?(?:the )?(.+?)(?: morphology)?$", re.IGNORECASE)
_ADJACENT, _FREE, _WEAK, _CONJUNCTION, _HARD = range(5)
_MAX_WORDS = 9
_MEMO_LIMIT = 200_000
_WEIGHT = dict(zip(SCOPES, (1.0, 0.95, 0.85, 0.75, 0.7), strict=True))


@dataclass(frozen=True, slots=True)
class Match:
    """A concept found at [start, end). `score` is 1 for the label as written, less for weaker names and loose forms."""

    start: int
    end: int
    concept_id: str
    score: float


class _Entry(NamedTuple):
    """All names with one bag of words: the concept by word order, and the one to take for any other order."""

    words: tuple[int, ...]
    orders: dict[tuple[int, ...], tuple[str, float]]
    default: tuple[str, float]
    joined: frozenset[tuple[int, ...]]  # the orders of names that hold a conjunction or comma themselves


class _Word(NamedTuple):
    """A word of the vocabulary at [start, end) of a token, and what it names when it stands alone."""

    number: int
    start: int
    end: int
    single: tuple[str, float] | None


class _Piece(NamedTuple):
    """What a token of the text means: a gap after it, and words of the vocabulary in it."""

    gap: int
    words: tuple[_Word, ...] = ()
    abbreviation: tuple[str, float] | None = None


class _Reading(NamedTuple):
    """The text as the matcher sees it: one item a vocabulary word, and the abbreviations apart."""

    ids: list[int]
    singles: list[tuple[str, float] | None]
    starts: list[int]
    ends: list[int]
    gaps: list[int]
    short: list[tuple[int, int, str, float]]


class Matcher:
    """Finds concepts of `terminology`. Two matchers over one terminology give equal results.

    Parameters
    ----------
    terminology : its `matchable` concepts are looked for; no other id is ever returned.
    within : look for the descendants of these concepts instead, for instance modes of inheritance too.

    Raises
    ------
    UsageError : an id in `within` is not a current one.
    """

    def __init__(self, terminology: Terminology, *, within: Iterable[str] = ()) -> None:
        self.terminology = terminology
        within = tuple(within)
        for root in within:
            if root not in terminology:
                msg = f"within: {root!r} is not a current id of {terminology.name} {terminology.version}".strip()
                raise UsageError(msg)
        self.ids = frozenset().union(*map(terminology.descendants, within)) if within else terminology.matchable
        self._memo: dict[str, _Piece] = {}
        self._build()

    def match(self, text: str) -> list[Match]:
        """Return matches sorted by place. They do not overlap, except where a coordination shares a word.

        Offsets are code points of `text`; the covered text is never empty and starts and ends with a word.
        """
        ids, singles, starts, ends, gaps, short = self._read(text)
        found = self._windows(ids, singles, gaps)
        if not found and not short:
            return []
        taken = bytearray(len(ids))
        matches: list[Match] = []
        kept: list[tuple[int, int]] = []
        for size, first, concept_id, score in sorted(found, key=lambda f: (-f[0], f[1], f[2])):
            last = first + size
            if any(taken[first:last]):
                continue
            taken[first:last] = b"\1" * size
            if text[starts[first] : ends[last - 1]].lower() in self._guarded:
                continue
            kept.append((first, last))
            matches.append(Match(starts[first], ends[last - 1], concept_id, score))
        matches += self._coordinated(kept, ids, starts, ends, gaps)
        if short:
            begins = sorted(m.start for m in matches)
            reach = [0, *accumulate((e for _, e in sorted((m.start, m.end) for m in matches)), max)]
            for start, end, concept_id, score in short:
                if reach[bisect_left(begins, end)] <= start and not _shouted(text, start, end):
                    matches.append(Match(start, end, concept_id, score))
        return sorted(set(matches), key=lambda m: (m.start, -m.end, m.concept_id))

    def exact(self, text: str) -> str | None:
        """Return the concept that `text` as a whole names, or None."""
        for match in self.match(text):
            if match.start == len(text) - len(text.lstrip()) and match.end == len(text.rstrip()):
                return match.concept_id
        return None

    # Reading the text

    def _read(self, text: str) -> _Reading:
        ids: list[int] = []
        singles: list[tuple[str, float] | None] = []
        starts: list[int] = []
        ends: list[int] = []
        gaps: list[int] = []
        short: list[tuple[int, int, str, float]] = []
        memo = self._memo
        if len(memo) > _MEMO_LIMIT:
            memo.clear()
        gap = _HARD
        newline_at = -2
        for token in _TOKEN.finditer(text):
            surface = token.group()
            piece = memo.get(surface)
            if piece is None:
                piece = memo[surface] = self._piece(surface)
            if piece.abbreviation is not None:
                short.append((token.start(), token.end(), *piece.abbreviation))
            if not piece.words:
                if surface == "\n":
                    at = token.start()
                    if newline_at >= 0 and not text[newline_at:at].strip():
                        gap = _HARD
                    newline_at = at
                if piece.gap > gap:
                    gap = piece.gap
                continue
            base = token.start()
            for number, start, end, single in piece.words:
                ids.append(number)
                singles.append(single)
                starts.append(base + start)
                ends.append(base + end)
                gaps.append(gap)
                gap = _ADJACENT
            if piece.gap:
                gap = piece.gap
        return _Reading(ids, singles, starts, ends, gaps, short)

    def _piece(self, surface: str) -> _Piece:
        if not surface[0].isalnum():
            if surface in "\"'`“”‘’*_":
                return _Piece(_ADJACENT)
            if surface in "/&+":
                return _Piece(_CONJUNCTION)
            return _Piece(_CONJUNCTION if surface == "," else _WEAK if surface == "\n" else _HARD)
        short = self._abbreviations.get(surface)
        if short is None and len(surface) > 3 and surface.endswith("s"):
            short = self._abbreviations.get(surface[:-1])
        lower = surface.lower()
        if lower in FREE and surface != "A":
            return _Piece(_FREE, (), short)
        if lower in WEAK:
            return _Piece(_CONJUNCTION if lower in ("and", "or", "nor") else _WEAK, (), short)
        if not surface.isalnum() and (whole := self._word("".join(_WORD.findall(surface)), 0, len(surface))):
            return _Piece(_ADJACENT, (whole,), short)
        words: list[_Word] = []
        for part in _WORD.finditer(surface):
            if words and part.group().lower() in FREE | WEAK | {"s"}:
                continue
            word = self._word(part.group(), part.start(), part.end())
            if word is None:
                return _Piece(_HARD, tuple(words), short)
            words.append(word)
        return _Piece(_ADJACENT if words else _HARD, tuple(words), short)

    def _word(self, surface: str, start: int, end: int) -> _Word | None:
        number = self._vocabulary.get("a" if surface == "A" else heavy(surface))
        if number is None:
            return None
        form = light(surface)
        for name, concept_id, weight in self._singles.get(number, ()):
            if same_single(name, form):
                return _Word(number, start, end, (concept_id, weight))
        return _Word(number, start, end, None)

    # Looking up windows

    def _windows(
        self, ids: list[int], singles: list[tuple[str, float] | None], gaps: list[int]
    ) -> list[tuple[int, int, str, float]]:
        """Return every hit as (number of words, first word, concept, score)."""
        found = []
        values, partners, index = self._values, self._partners, self._index
        n = len(ids)
        for first in range(n):
            word = ids[first]
            single = singles[first]
            if single is not None:
                found.append((1, first, *single))
            others = partners[word]
            if not others:
                continue
            total = values[word]
            worst = free = 0
            last = first + 1
            stop = min(n, first + _MAX_WORDS)
            while last < stop:
                gap = gaps[last]
                word = ids[last]
                if gap == _HARD or word not in others:
                    break
                if gap > worst:
                    worst = gap
                if gap == _FREE:
                    free = 1
                total += values[word]
                last += 1
                entry = index.get(total)
                if entry is not None:
                    hit = _accept(entry, tuple(ids[first:last]), worst, free)
                    if hit is not None:
                        found.append((last - first, first, *hit))
        return found

    def _coordinated(
        self, kept: list[tuple[int, int]], ids: list[int], starts: list[int], ends: list[int], gaps: list[int]
    ) -> Iterator[Match]:
        """`hypoplastic and absent nails`, `short hands and feet`: a kept match lends its head or its modifier."""
        index, values = self._index, self._values
        taken = {k for first, last in kept for k in range(first, last)}
        for first, last in kept:
            if last - first < 2:
                continue
            if first > 0 and gaps[first] == _CONJUNCTION and first - 1 not in taken:
                for head in range(first + 1, last):  # modifier before the conjunction, head inside the match
                    words = (ids[first - 1], *ids[head:last])
                    entry = index.get(sum(values[w] for w in words))
                    if entry is not None and (hit := entry.orders.get(words)):
                        yield Match(starts[first - 1], ends[last - 1], hit[0], round(hit[1] * 0.8, 4))
                        break
            if last < len(ids) and gaps[last] == _CONJUNCTION and last not in taken:
                for modifier in range(last - 1, first, -1):  # modifier inside the match, head after the conjunction
                    words = (*ids[first:modifier], ids[last])
                    entry = index.get(sum(values[w] for w in words))
                    if entry is not None and (hit := entry.orders.get(words)):
                        yield Match(starts[first], ends[last], hit[0], round(hit[1] * 0.8, 4))
                        break

    # Building

    def _build(self) -> None:
        terminology = self.terminology
        self._guarded = frozenset(row["form"].lower() for row in _rows("guards.csv"))
        names: list[tuple[str, Name]] = []
        for concept_id in terminology.ids:
            if concept_id in self.ids:
                names += [(concept_id, name) for name in terminology.names(concept_id)]
        if terminology.name == "hpo":
            for row in _rows("additions_hpo.csv"):
                concept_id = terminology.resolve(row["concept_id"]) or ""
                if concept_id in self.ids:
                    names.append((concept_id, Name(row["name"], "exact", row["kind"] == "abbreviation")))
        names += [extra for concept_id, name in names for extra in _general(concept_id, name)]
        self._abbreviations: dict[str, tuple[str, float]] = {}
        stems: dict[str, int] = {}
        bags: dict[tuple[str, ...], list[tuple[tuple[str, ...], str, float, str, bool]]] = {}
        for concept_id, name in sorted(names, key=lambda n: (SCOPES.index(n[1].scope), n[0], n[1].text)):
            text = name.text
            if text.lower() in self._guarded:
                continue
            if _is_abbreviation(name):
                if text.isalnum():
                    self._abbreviations.setdefault(text, (concept_id, _WEIGHT[name.scope]))
                continue
            variants = dict.fromkeys((text, _OPTIONAL.sub("", text)))
            for variant in variants:
                for words, only in _name_words(variant):
                    if words and len(words) <= _MAX_WORDS and any(len(word) > 1 for word in words):
                        joined = _JOINED.search(variant) is not None
                        reading = (words, concept_id, _WEIGHT[name.scope], only, joined)
                        bags.setdefault(tuple(sorted(words)), []).append(reading)
        for bag in bags:
            for word in bag:
                stems.setdefault(word, 0)
        self._vocabulary = {word: number for number, word in enumerate(sorted(stems))}
        self._values = [
            int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big") >> 2
            for word in self._vocabulary
        ]
        partners: list[set[int]] = [set() for _ in self._vocabulary]
        self._index: dict[int, _Entry] = {}
        self._singles: dict[int, list[tuple[str, str, float]]] = {}
        for bag, readings in bags.items():
            numbers = tuple(sorted(self._vocabulary[word] for word in bag))
            orders: dict[tuple[int, ...], tuple[str, float]] = {}
            joined_orders: set[tuple[int, ...]] = set()
            for words, concept_id, weight, _, joined in readings:
                order = tuple(self._vocabulary[word] for word in words)
                orders.setdefault(order, (concept_id, weight))
                if joined:
                    joined_orders.add(order)
            default = (readings[0][1], readings[0][2])
            if len(numbers) == 1:
                self._singles[numbers[0]] = [(only, concept_id, weight) for _, concept_id, weight, only, _ in readings]
                continue
            for position, number in enumerate(numbers):
                partners[number].update(numbers[:position] + numbers[position + 1 :])
            self._index[sum(self._values[number] for number in numbers)] = _Entry(
                numbers, orders, default, frozenset(joined_orders)
            )
        self._partners = [frozenset(others) for others in partners]


def _accept(entry: _Entry, words: tuple[int, ...], worst: int, free: int) -> tuple[str, float] | None:
    hit = entry.orders.get(words)
    if hit is not None:  # `blood and urine` is not blood in urine
        return hit if worst != _CONJUNCTION or words in entry.joined else None
    # Another order: within one phrase, and joined by a preposition or with the modifier put last.
    if worst >= _WEAK:
        return None
    if not free:
        if len(words) == 2:
            return None
        turned = (words[k:] + words[:k] for k in range(1, len(words)))
        hit = next((entry.orders[order] for order in turned if order in entry.orders), None)
        return (hit[0], round(hit[1] * 0.9, 4)) if hit else None
    if tuple(sorted(words)) != entry.words:
        return None
    return entry.default[0], round(entry.default[1] * 0.9, 4)


def _general(concept_id: str, name: Name) -> Iterator[tuple[str, Name]]:
    """`Abnormality of the ear` is also written `ear anomaly`, `ear malformation`, `malformed ears`."""
    found = _ABNORMAL.match(name.text)
    if found and name.scope in ("label", "exact"):
        for head in ("abnormality", "malformation", "defect"):
            yield concept_id, Name(f"{found[1]} {head}", "broad")


def _name_words(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the content stems of a name, and its light form where that is one word; a hyphenated name also joined."""
    spellings = [text] if "-" not in text else [text, re.sub(r"(?<=\w)-(?=\w)", "", text)]
    for spelling in spellings:
        parts = [p for p in _WORD.findall(spelling) if p == "A" or p.lower() not in FREE | WEAK | {"s"}]
        yield tuple("a" if p == "A" else heavy(p) for p in parts), light(parts[0]) if len(parts) == 1 else ""


def _is_abbreviation(name: Name) -> bool:
    text = name.text
    return " " not in text and (name.abbreviation or (len(text) <= 5 and sum(c.isupper() for c in text) >= 2))


def _shouted(text: str, start: int, end: int) -> bool:
    """Whether the words around are all capitals, so that capitals do not mark an abbreviation."""
    around = re.findall(r"[A-Za-z]{3,}", text[max(0, start - 30) : start] + " " + text[end : end + 30])
    return len(around) >= 2 and all(word.isupper() for word in around)


def _rows(name: str) -> list[dict[str, str]]:
    with (_FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
