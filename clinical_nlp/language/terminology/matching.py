"""Finding a terminology's concepts in unchanged text.

A name is kept as the bag of its stemmed content words, under the sum of one 62-bit number a word, so a window over the
text is looked up by adding one number a word whatever the order. A hit counts when the words stand in the name's order,
or when only free words (`of the`) stand between them. The longest hit wins.
"""

from __future__ import annotations

import csv
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

from clinical_nlp.errors import UsageError
from clinical_nlp.language.terminology.abbreviations import Sense, chosen, definitions, in_any_case, occurrences
from clinical_nlp.language.terminology.concepts import Terminology
from clinical_nlp.language.terminology.coordination import coordinated
from clinical_nlp.language.terminology.index import (
    ADJACENT,
    CONJUNCTION,
    COPULA,
    FREE_WORD,
    HARD,
    LIST,
    MAX_WORDS,
    NEW_LINE,
    PASSED,
    WEAK_WORD,
    Index,
)
from clinical_nlp.language.terminology.index_cache import cached_index
from clinical_nlp.language.terminology.normalization import FREE, WEAK, light, root, same_single
from clinical_nlp.language.terminology.spelling import LAST, SHORTEST, mended

_FOLDER = Path(__file__).parent
_TOKEN = re.compile(r"([^\W_]+(?:[-'’‐‑][^\W_]+)*|[^\w\s])")
_WORD = re.compile(r"[^\W_]+")
_MEMO_LIMIT = 200_000
_COPULAS = ("is", "are", "was", "were", "remains", "remained", "became")
_OF = re.compile(r"\bof (?:the |his |her |its |their )?\Z", re.IGNORECASE)
_SAID = re.compile(f" (?:{'|'.join(_COPULAS)}) ", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Match:
    """A concept found at [start, end). `score` is 1 for the label as written, less for weaker names and loose forms."""

    start: int
    end: int
    concept_id: str
    score: float


_Word = tuple[int, int, int, int | None, bool]
"""Number, start and end in the token, what it names when it stands alone, and whether a phrase may skip it."""
_Piece = tuple[int, tuple[_Word, ...], tuple[int, list[Sense]] | None]
"""What a token means: the gap that it leaves, its words of the vocabulary, and its length and what it is short for."""
_NOTHING: _Piece = (HARD, (), None)
"""A token of no name, as most are."""


class Reading(NamedTuple):
    """The text as the matcher sees it: one item a vocabulary word, and the abbreviations apart.

    `gaps[k]` says what stands between words k - 1 and k; `passed` holds the words that an inserted phrase may skip.
    """

    ids: tuple[int, ...]
    singles: tuple[int | None, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    gaps: tuple[int, ...]
    passed: list[int]
    short: list[tuple[int, int, list[Sense]]]


class _Memo(dict[str, _Piece]):
    """What each token means, worked out when it is first seen."""

    def __init__(self, piece: Callable[[str], _Piece]) -> None:
        self._piece = piece

    def __missing__(self, surface: str) -> _Piece:
        found = self._piece(surface)
        found = self[surface] = _NOTHING if found == _NOTHING else found
        return found


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
        for root_id in within:
            if root_id not in terminology:
                msg = f"within: {root_id!r} is not a current id of {terminology.name} {terminology.version}".strip()
                raise UsageError(msg)
        self.ids = frozenset().union(*map(terminology.descendants, within)) if within else terminology.matchable
        self._memo = _Memo(self._piece)
        self._index = cached_index(terminology, self.ids)
        self._passed = frozenset(row["form"] for row in _rows("modifiers.csv"))

    def match(self, text: str, *, nested: bool = False) -> list[Match]:
        """Return matches sorted by place. They do not overlap, except where a coordination shares a word.

        Offsets are code points of `text`; the covered text is never empty and starts and ends with a word.

        Parameters
        ----------
        text : the note, unchanged.
        nested : also return what is found inside a longer match (`hearing loss` in `conductive hearing loss`).
        """
        index = self._index
        reading = self._read(text)
        ids, starts, ends = reading.ids, reading.starts, reading.ends
        found = self._windows(reading)
        if not found and not reading.short and "/" not in text:
            return []
        taken = bytearray(len(ids))
        matches: list[Match] = []
        kept: list[tuple[int, int]] = []
        # `absent liver enlargement` denies an enlargement: of two hits of a size the one without `absent` comes first.
        absent = index.absent
        for size, first, last, code, factor in sorted(
            found, key=lambda f: (-f[0], ids[f[1]] == absent, f[2] - f[1], f[1], f[3])
        ):
            inside = any(taken[first:last])
            if inside and not nested:
                continue
            if size > 1 and (
                _unfinished(index, text, starts[last - 1], ends[last - 1])
                or _of_another(text, starts[first], ends[last - 1])
                or index.says_otherwise(text, starts[first], ends[last - 1])
            ):
                continue
            taken[first:last] = b"\1" * (last - first)
            if index.guarded(text, starts[first], ends[last - 1]):
                continue
            if not inside:
                kept.append((first, last))
            if size > 1:
                code = index.literal(text[starts[first] : ends[last - 1]], code)
            matches.append(self._made(starts[first], ends[last - 1], code, factor))
        absorbed: set[tuple[int, int]] = set()
        plain = {(match.start, match.concept_id) for match in matches}
        for first, last, code, alone in coordinated(index, reading, kept):
            if (starts[first], index.concept(code)[0]) in plain:
                continue
            begin, end = starts[first], ends[last]
            if not index.says_otherwise(text, begin, end) and not index.guarded(text, begin, end):
                if alone is not None and not nested:
                    absorbed.add((starts[alone], ends[alone]))
                matches.append(self._made(begin, end, code, 0.8))
        if absorbed:
            matches = [match for match in matches if (match.start, match.end) not in absorbed]
        matches += self._abbreviated(text, reading, matches)
        return sorted(set(matches), key=lambda m: (m.start, -m.end, m.concept_id))

    def exact(self, text: str) -> str | None:
        """Return the concept that `text` as a whole names, or None."""
        for match in self.match(text):
            if match.start == len(text) - len(text.lstrip()) and match.end == len(text.rstrip()):
                return match.concept_id
        return None

    def _number(self, phrase: str) -> int | None:
        concept_id = self.exact(phrase)
        return None if concept_id is None else self._index.codes[concept_id]

    def _made(self, start: int, end: int, code: int, factor: float) -> Match:
        concept_id, weight = self._index.concept(code)
        return Match(start, end, concept_id, weight if factor == 1.0 else round(weight * factor, 4))

    def _abbreviated(self, text: str, reading: Reading, matches: list[Match]) -> list[Match]:
        codes = self._index.codes
        short = reading.short
        if "/" in text and (slashed := self._index.slashed) is not None:
            short = short + [(*hit.span(), self._index.abbreviations[hit[0]]) for hit in slashed.finditer(text)]
        written_out = [(m.start, m.end, codes[m.concept_id]) for m in matches]
        defined = definitions(text, written_out, self._number) if "(" in text else {}
        if not short and not defined:
            return []
        begins = sorted(m.start for m in matches)
        reach = [0, *accumulate((e for _, e in sorted((m.start, m.end) for m in matches)), max)]
        written = {codes[m.concept_id] for m in matches}
        found: list[Match] = []
        for start, end, senses in short:
            form = text[start:end]
            if form in defined or form[:-1] in defined:
                continue
            plain = "/" in form or in_any_case(form)
            if reach[bisect_left(begins, end)] <= start and (plain or not _shouted(self._index, text, start, end)):
                code = chosen(text, start, end, senses, written)
                if code is not None:
                    found.append(self._made(start, end, code, 1.0))
        for start, end, number in occurrences(text, defined):
            if reach[bisect_left(begins, end)] <= start:
                found.append(Match(start, end, self._index.ids[number], 0.9))
        return found

    # Reading the text

    def _read(self, text: str) -> Reading:
        words: list[tuple[int, int | None, int, int, int]] = []  # a number, what it names, where it stands, the gap
        passed: list[int] = []
        short: list[tuple[int, int, list[Sense]]] = []
        memo = self._memo
        if len(memo) > _MEMO_LIMIT:
            memo.clear()
        gap = HARD
        parts = _TOKEN.split(text)  # white space and tokens in turn
        begins = islice(accumulate(map(len, parts)), 0, None, 2)
        for space, start, piece in zip(parts[::2], begins, map(memo.__getitem__, parts[1::2]), strict=False):
            if piece is _NOTHING:
                gap = HARD
                continue
            after, meant, senses = piece
            if space != " " and space:
                gap = max(gap, _over(space, text[start]))
            if senses is not None:
                short.append((start, start + senses[0], senses[1]))
            if not meant:
                if after > gap:
                    gap = after
                continue
            for number, begin, end, single, skippable in meant:
                if skippable:
                    passed.append(len(words))
                words.append((number, single, start + begin, start + end, gap))
                gap = ADJACENT
            gap = after
        ids, singles, starts, ends, gaps = zip(*words, strict=True) if words else ((),) * 5
        return Reading(ids, singles, starts, ends, gaps, passed, short)

    def _piece(self, surface: str) -> _Piece:
        if not surface[0].isalnum():
            if surface in "\"'`“”‘’*_":
                return ADJACENT, (), None
            return CONJUNCTION if surface in "/&+" else LIST if surface == "," else HARD, (), None
        abbreviations = self._index.abbreviations
        meant = abbreviations.get(surface)
        if meant is None and len(surface) > 3 and surface.endswith("s"):
            meant = abbreviations.get(surface[:-1])
        if meant is None and surface[1:].islower() and in_any_case(surface):
            meant = abbreviations.get(surface.upper())
        senses = None if meant is None else (len(surface), meant)
        lower = surface.lower()
        if lower in FREE and surface != "A":
            return FREE_WORD, (), senses
        if lower in WEAK:
            gap = COPULA if lower in _COPULAS else CONJUNCTION if lower in ("and", "or", "nor") else WEAK_WORD
            return gap, (), senses
        if not surface.isalnum() and (whole := self._word("".join(_WORD.findall(surface)), 0, len(surface))):
            return ADJACENT, (whole,), senses
        if lower.startswith(("non-", "non‐", "non‑")):
            return HARD, (), senses
        words: list[_Word] = []
        for part in _WORD.finditer(surface):
            if words and part.group().lower() in FREE | WEAK | {"s"}:
                continue
            word = self._word(part.group(), part.start(), part.end())
            if word is None:
                return PASSED if lower in self._passed else HARD, tuple(words), senses
            words.append(word)
        return ADJACENT if words else HARD, tuple(words), senses

    def _word(self, surface: str, start: int, end: int) -> _Word | None:
        form = light(surface)
        number = self._index.vocabulary.get("a" if surface == "A" else root(surface))
        if number is None and len(form) >= SHORTEST and form[-2:] in LAST and form.isalpha():
            form = mended(form, self._index.long_words) or form
            number = self._index.vocabulary.get(root(form))
        if number is None:
            return None
        passed = surface.lower() in self._passed
        for name, code in self._index.singles.get(number, ()):
            if same_single(name, form):
                return number, start, end, code, passed
        return number, start, end, None, passed

    # Looking up windows

    def _windows(self, reading: Reading) -> list[tuple[int, int, int, int, float]]:
        """Return every hit as (number of words, first word, word after the last, concept code, factor of the score)."""
        found: list[tuple[int, int, int, int, float]] = []
        ids, gaps = reading.ids, reading.gaps
        index = self._index
        values, partners, bags = index.values, index.partners, index.bags
        n = len(ids)
        found += [(1, k, k + 1, code, 1.0) for k, code in enumerate(reading.singles) if code is not None]
        for first, (word, following, gap) in enumerate(zip(ids, ids[1:], gaps[1:], strict=False)):
            if gap == HARD or following not in partners[word]:
                continue
            others = partners[word]
            last = first + 1
            total = values[word]
            worst = free = 0
            stop = min(n, first + MAX_WORDS)
            while last < stop:
                gap = gaps[last]
                word = ids[last]
                if gap == HARD or word not in others:
                    break
                if gap > worst:
                    worst = gap
                if gap == FREE_WORD:
                    free = 1
                total += values[word]
                last += 1
                default = bags.get(total)
                if default is not None:
                    hit = index.accept(ids[first:last], default, worst, free)
                    if hit is not None:
                        found.append((last - first, first, last, *hit))
        if reading.passed:
            self._past(reading, found)
        return found

    def _past(self, reading: Reading, found: list[tuple[int, int, int, int, float]]) -> None:
        """Add hits around words that only say how much, how long or on which side: `pain in the left hip`."""
        ids, gaps, passed = reading.ids, reading.gaps, set(reading.passed)
        index = self._index
        values, partners, bags = index.values, index.partners, index.bags
        n = len(ids)
        begun: set[int] = set()
        for position in reading.passed:
            for first in range(max(0, position - 3), position):
                if first in passed or first in begun:
                    continue
                begun.add(first)
                words = [ids[first]]
                others = partners[ids[first]]
                if not others:
                    continue
                total = values[ids[first]]
                worst = free = 0
                skipped = False
                for last in range(first + 1, min(n, first + MAX_WORDS)):
                    gap, word = gaps[last], ids[last]
                    if gap >= WEAK_WORD:
                        break
                    free |= gap == FREE_WORD
                    worst = max(worst, gap)
                    if last in passed:
                        skipped = True
                        continue
                    if word not in others:
                        break
                    words.append(word)
                    total += values[word]
                    default = bags.get(total)
                    goes_on = last + 1 < n and gaps[last + 1] == ADJACENT and last + 1 not in passed
                    if skipped and default is not None and not goes_on:
                        hit = index.accept(words, default, worst, free)
                        if hit is not None:
                            found.append((len(words), first, last + 1, hit[0], hit[1] * 0.9))


def _over(space: str, following: str) -> int:
    """What white space stands for: a blank line or a mask (`___`) ends a phrase, a new line may."""
    lines = space.count("\n")
    if lines > 1 or "_" in space:
        return HARD
    return NEW_LINE if lines and not following[:1].islower() else ADJACENT


def _unfinished(index: Index, text: str, start: int, end: int) -> bool:
    """Whether a phrase breaks off at an adjective that no name ends with: `absence of retinal` before `pigment`."""
    if text[end : end + 1] != " " or not text[end + 1 : end + 2].isalpha():
        return False
    return text.endswith(("al", "ar", "ic"), start, end) and text[start:end].lower() not in index.last_words


def _of_another(text: str, start: int, end: int) -> bool:
    """Whether what is said is said of something else: `phalanges of the hands were short`."""
    return _SAID.search(text, start, end) is not None and _OF.search(text, max(0, start - 12), start) is not None


def _shouted(index: Index, text: str, start: int, end: int) -> bool:
    """Whether the words around are all capitals, so that capitals do not mark an abbreviation.

    Among other abbreviations they do (`PMH: HTN, OSA, GERD`); a word of the vocabulary or a long one is none.
    """
    around = re.findall(r"[A-Za-z]{3,}", text[max(0, start - 30) : start] + " " + text[end : end + 30])
    return (
        len(around) >= 2
        and all(word.isupper() for word in around)
        and any(
            len(word) > 5 or word.lower() in FREE | WEAK or root(word) in index.vocabulary
            for word in around
            if word not in index.abbreviations
        )
    )


def _rows(name: str) -> list[dict[str, str]]:
    with (_FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
