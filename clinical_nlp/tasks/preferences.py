"""Texts that differ in one clinical fact: what a model learns to prefer, or a test of a metric.

An error is planted in what an expert wrote: a common one, or one that the model made itself. It changes one fact and
leaves the rest of the text as it was, so that a model that learns to prefer the original learns the fact and no style.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np

from clinical_nlp.errors import UsageError
from clinical_nlp.language.facts import Fact, read_facts
from clinical_nlp.language.sentences import find_sentences
from clinical_nlp.tasks.faithfulness import FactComparison, compare_facts

ErrorKind = Literal["negation", "side", "number", "finding_added", "finding_dropped", "finding_swapped"]
KINDS: tuple[ErrorKind, ...] = get_args(ErrorKind)
"""What can be planted."""

VOCABULARY = (
    "pneumothorax", "pleural effusion", "pneumonia", "pulmonary embolism", "fever", "chest pain", "shortness of breath",
    "abdominal pain", "nausea", "vomiting", "headache", "dizziness", "hypertension", "type 2 diabetes mellitus",
    "atrial fibrillation", "peripheral edema", "skin rash", "weight loss", "hematuria", "anemia", "asthma", "seizure",
    "deep venous thrombosis", "cough", "syncope", "back pain", "acute kidney injury", "urinary tract infection",
)  # fmt: skip
"""Findings that are added where the caller names none."""


@dataclass(frozen=True, slots=True)
class Planted:
    """A text with one error in it. [start, end) is what changed in `text` (empty where something was taken out).

    `fact` is the fact of the original that was altered or dropped; None where a finding was added.
    """

    text: str
    kind: str
    start: int
    end: int
    fact: Fact | None


def plant_error(
    text: str,
    kind: str,
    rng: np.random.Generator,
    *,
    vocabulary: Sequence[str] | None = None,
    source: str | None = None,
) -> Planted | None:
    """Plant one error in `text`.

    Parameters
    ----------
    text : a note, a section or an impression; the rest of it stays as it is, byte for byte.
    kind : one of `KINDS`. negation: a finding becomes denied, or a denied one present. side: left and right change
        places. number: a dose, a value or a duration becomes another. finding_added: a sentence with a finding that
        the text does not mention. finding_dropped: the only sentence or list entry that states a finding goes.
        finding_swapped: a finding takes the name of another: one that the text or `source` states otherwise (as
        denied, as present), else one of `vocabulary`.
    rng : draws the place and the change.
    vocabulary : findings to add from; common ones by default.
    source : what the text was written from, whose findings are the likeliest to be mixed up.

    Returns
    -------
    Planted, or None where the text has nothing of this kind to change.

    Raises
    ------
    UsageError : `kind` is not one of `KINDS`.
    """
    if kind not in KINDS:
        raise UsageError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    facts = read_facts(text)
    words = VOCABULARY if vocabulary is None else vocabulary
    if kind == "finding_added":
        return _add(text, facts, rng, words)
    if kind == "finding_swapped":
        return _swap(text, facts, rng, words, source)
    places = list(range(len(facts)))
    rng.shuffle(places)
    for place in places:
        planted = _PLANTS[kind](text, facts, facts[place], rng)
        if planted is not None and planted.text != text:
            return planted
    return None


def _replaced(text: str, start: int, end: int, new: str, kind: str, fact: Fact | None) -> Planted:
    return Planted(text[:start] + new + text[end:], kind, start, start + len(new), fact)


def _of_the_patient(fact: Fact) -> bool:
    return (fact.modality, fact.experiencer) == ("actual", "patient") and not fact.resolved


def _cased(new: str, old: str) -> str:
    if old.isupper() and len(old) > 1:
        return new.upper()
    return new[:1].upper() + new[1:] if old[:1].isupper() else new


def _in_its_place(new: str, old: str) -> str:
    """Write words as they are written in the place of others."""
    new = " ".join(new.split())
    return _cased(new if new[:2].isupper() else new[:1].lower() + new[1:], old)


# -- negation --------------------------------------------------------------------------------------------------------

_SWAPS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(rf"(?<!\w){pattern}(?!\w)", re.IGNORECASE), new)
    for pattern, new in (
        (r"denies any", "reports"), (r"denies", "reports"), (r"denied", "reported"), (r"denying", "reporting"),
        (r"negative for", "positive for"), (r"there is no evidence of", "there is evidence of"),
        (r"no evidence of", "evidence of"), (r"there is no", "there is"), (r"there are no", "there are"),
        (r"has no", "has"), (r"had no", "had"), (r"has not had", "has had"), (r"without any", "with"),
        (r"without", "with"), (r"absent", "present"), (r"no complaints of", "complaints of"), (r"not", ""),
        (r"no", ""),
    )
)  # fmt: skip


def _negate(text: str, facts: Sequence[Fact], fact: Fact, rng: np.random.Generator) -> Planted | None:
    if fact.kind != "finding" or not _of_the_patient(fact):
        return None
    begin, _ = _sentence(text, fact)
    others = [f for f in facts if f.name == fact.name and f.presence != fact.presence]
    if others or fact.presence == "uncertain":
        return None
    if fact.presence == "absent":
        best: tuple[int, int, str] | None = None
        for pattern, new in _SWAPS:
            for found in pattern.finditer(text, begin, fact.start):
                if best is None or found.end() > best[1]:
                    best = (found.start(), found.end(), new)
        if best is None:
            return None
        start, stop, new = best
        if not new and stop < len(text) and text[stop] == " ":
            stop += 1
        new = _cased(new, text[start : best[1]])
        candidate = _replaced(text, start, stop, new, "negation", fact)
        if not new and text[start].isupper():
            first = candidate.text[start : start + 1].upper()
            changed = candidate.text[:start] + first + candidate.text[start + 1 :]
            candidate = Planted(changed, "negation", start, start + 1, fact)
    else:
        start = fact.start
        before = re.search(r"(?:left|right|bilateral|mild|moderate|severe|small|large|stable|new)(?:-sided)?\s+$",
                           text[begin:start], re.IGNORECASE)  # fmt: skip
        if before:
            start = begin + before.start()
        at_begin = not re.search(r"\w", text[begin:start])
        no = "No " if at_begin and text[start].isupper() else "no "
        old = text[start : fact.end]
        rest = old if old[:2].isupper() or not at_begin else old[0].lower() + old[1:]
        no = no.upper() if old.isupper() and len(old) > 6 else no
        candidate = _replaced(text, start, fact.end, no + rest, "negation", fact)
    # The change must turn the fact round, and not only move words.
    now = [f.presence for f in read_facts(candidate.text) if f.name == fact.name]
    return candidate if now and fact.presence not in now else None


# -- sides and numbers -----------------------------------------------------------------------------------------------

_SIDE = re.compile(r"(?<!\w)(left|right|lt|rt|L|R)(?=[\s-])", re.IGNORECASE)
_OTHER = {"left": "right", "right": "left", "lt": "rt", "rt": "lt", "l": "r", "r": "l"}


def _turn(text: str, facts: Sequence[Fact], fact: Fact, rng: np.random.Generator) -> Planted | None:
    if fact.side not in ("left", "right"):
        return None
    begin, end = _sentence(text, fact)
    words = [found for found in _SIDE.finditer(text, begin, end) if found[1].lower().startswith(fact.side[0])]
    if not words:
        return None
    word = min(words, key=lambda found: abs(found.start() - fact.start))
    new = _OTHER[word[1].lower()]
    new = new.upper() if word[1].isupper() else _cased(new, word[1])
    return _replaced(text, word.start(1), word.end(1), new, "side", fact)


_DIGITS = re.compile(r"\d+(?:\.\d+)?")


def _alter(text: str, facts: Sequence[Fact], fact: Fact, rng: np.random.Generator) -> Planted | None:
    if fact.kind != "number" or fact.unit in ("date", "year old") or fact.value is None:
        return None
    found = _DIGITS.search(text, fact.start, fact.end)
    if found is None or float(found[0]) == 0:
        return None
    old = float(found[0])
    factors = [10.0, 0.1, 2.0, 0.5] if fact.unit in ("mg", "mcg", "g", "unit", "ml", "meq") else [2.0, 0.5, 1.5, 3.0]
    rng.shuffle(factors)
    decimals = len(found[0].partition(".")[2])
    for factor in factors:
        new = f"{old * factor:.{decimals}f}"
        if float(new) not in (0.0, old):
            return _replaced(text, found.start(), found.end(), new, "number", fact)
    return None


# -- findings added and dropped --------------------------------------------------------------------------------------

_ADDED = ("{} is present.", "There is {}.", "Also {}.", "New {} noted.")


def _add(text: str, facts: Sequence[Fact], rng: np.random.Generator, vocabulary: Sequence[str]) -> Planted | None:
    known = {fact.name for fact in facts}
    free = _not_known(vocabulary, known)
    if not free or not text.strip():
        return None
    term = free[int(rng.integers(len(free)))]
    sentence = _ADDED[int(rng.integers(len(_ADDED)))].format(term)
    sentence = sentence[0].upper() + sentence[1:]
    letters = [c for c in text if c.isalpha()]
    if letters and all(c.islower() for c in letters):
        sentence = sentence.lower()
    elif letters and all(c.isupper() for c in letters):
        sentence = sentence.upper()
    ends = [end for start, end in find_sentences(text) if text[end - 1] in ".!?"] or [len(text.rstrip())]
    at = ends[int(rng.integers(len(ends)))]
    return _replaced(text, at, at, " " + sentence, "finding_added", None)


def _not_known(vocabulary: Sequence[str], known: Collection[str]) -> list[str]:
    """Return the findings of a vocabulary that a text does not state."""
    return [term for term in vocabulary if (names := _names(term)) and not names & set(known)]


@lru_cache(maxsize=4096)
def _names(term: str) -> frozenset[str]:
    return frozenset(fact.name for fact in read_facts(term))


def _swap(
    text: str, facts: Sequence[Fact], rng: np.random.Generator, vocabulary: Sequence[str], source: str | None
) -> Planted | None:
    findings = [fact for fact in facts if fact.kind == "finding" and _of_the_patient(fact)]
    known = {fact.name for fact in facts}
    stated = [(text[fact.start : fact.end], fact) for fact in findings]
    read_from = " ".join((source or "").lower().split())

    def copied(words: str) -> bool:
        return " ".join(words.lower().split()) in read_from

    if source is not None:
        theirs = [fact for fact in read_facts(source) if fact.kind == "finding" and _of_the_patient(fact)]
        stated += [(source[fact.start : fact.end], fact) for fact in theirs]
    for place in rng.permutation(len(findings)):
        fact = findings[int(place)]
        others = [words for words, other in stated if other.name != fact.name and other.presence != fact.presence]
        old = text[fact.start : fact.end]
        # Both names stand in the source, or neither does: else copying would be learned or unlearned, and not the fact.
        others = [words for words in others or _not_known(vocabulary, known) if copied(words) == copied(old)]
        if not others or sum(other.name == fact.name for other in facts) > 1:
            continue
        new = _in_its_place(others[int(rng.integers(len(others)))], old)
        planted = _replaced(text, fact.start, fact.end, new, "finding_swapped", fact)
        # Chest pain is pain, and no error where that was stated.
        if compare_facts(planted.text, text, source=source).errors:
            return planted
    return None


def _drop(text: str, facts: Sequence[Fact], fact: Fact, rng: np.random.Generator) -> Planted | None:
    if fact.kind != "finding" or sum(other.name == fact.name for other in facts) > 1:
        return None
    begin, end = _sentence(text, fact)
    inside = [f for f in facts if begin <= f.start < end and f.kind != "number"]
    if len(inside) > 1:
        return None
    line = text.rfind("\n", 0, begin) + 1
    stop = end
    if re.fullmatch(r"[ \t]*(?:[-*•]|\d{1,2}[.)])?[ \t]*", text[line:begin]) and text[end : end + 1] in ("\n", ""):
        begin = line
        stop = end + 1 if end < len(text) else end
        if stop == len(text) and begin:
            begin -= 1
    elif text[stop : stop + 1] == " ":
        stop += 1
    left = text[:begin] + text[stop:]
    return Planted(left, "finding_dropped", begin, begin, fact) if left.strip() else None


def _sentence(text: str, fact: Fact) -> tuple[int, int]:
    for start, end in find_sentences(text):
        if start <= fact.start < end:
            return start, end
    return fact.start, fact.end


_PLANTS: dict[str, Callable[[str, Sequence[Fact], Fact, np.random.Generator], Planted | None]] = {
    "negation": _negate, "side": _turn, "number": _alter, "finding_dropped": _drop,
}  # fmt: skip


# -- errors of a model carried over ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Carried:
    """A reference that states what a draft turned round. [start, end) is what changed in `text`.

    `names` are those of the fact that is wrong now, and of the fact whose place it took.
    """

    text: str
    start: int
    end: int
    names: tuple[str, str]


def carry_errors(draft: str, reference: str, source: str) -> list[Carried]:
    """Plant what a draft turned round in its reference, each alone.

    What the draft states as present or as absent, and the reference or the source otherwise, takes the place of what
    it was written for: the nearest fact of its kind, as present or absent as the wrong one, that the draft has left
    out. Such an error is one that the model is known to make, and the words around it are those of an expert.

    Parameters
    ----------
    draft : what a model wrote.
    reference : what an expert wrote; all but one fact of it stays as it is, byte for byte.
    source : what both were written from.

    Returns
    -------
    One text for each finding, drug or procedure turned round that has such a place.
    """
    found = compare_facts(draft, reference, source=source)
    if not (found.flipped or found.flipped_source):
        return []
    stated = {(fact.name, fact.presence) for fact in read_facts(draft)}
    left_out = [
        fact for fact in read_facts(reference) if _of_the_patient(fact) and (fact.name, fact.presence) not in stated
    ]
    carried: dict[str, Carried] = {}
    for wrong, _ in (*found.flipped, *found.flipped_source):
        alike = [fact for fact in left_out if (fact.kind, fact.presence) == (wrong.kind, wrong.presence)]
        if not alike or wrong.kind == "phrase" or wrong.presence == "uncertain" or not _of_the_patient(wrong):
            continue
        right = min(alike, key=lambda fact: abs(fact.start - wrong.start))
        new = _in_its_place(draft[wrong.start : wrong.end], reference[right.start : right.end])
        text = reference[: right.start] + new + reference[right.end :]
        if _n_wrong(compare_facts(text, reference, source=source)):
            carried.setdefault(text, Carried(text, right.start, right.start + len(new), (wrong.name, right.name)))
    return list(carried.values())


def _n_wrong(found: FactComparison) -> int:
    """Count what a text says falsely; what it leaves out or says beyond the reference is no error of this kind."""
    return sum(map(len, (found.flipped, found.flipped_source, found.unsupported, found.numbers, found.sides)))


@dataclass(frozen=True, slots=True)
class Preference:
    """A source, and two texts for it that differ in one fact."""

    source: str
    chosen: str
    rejected: str


def mirrored(preference: Preference, names: tuple[str, str]) -> Preference | None:
    """Let two findings change names throughout, so that what was wrong of each is right, and the other way round.

    A model that learned from the one preference alone could do so without reading: by writing the rejected finding
    less, wherever. Beside its mirror image that gains nothing, and what is left to learn is what the source says.

    Parameters
    ----------
    names : of the two findings (`Fact.name`), each written as the texts write it; a text that does not name it takes
        the words of another of the three.

    Returns
    -------
    Preference, or None where the findings share words, or the new rejected text is no worse than the new chosen one.
    """
    texts = (preference.source, preference.chosen, preference.rejected)
    words = [{name: _words_for(text, name) for name in names} for text in texts]
    known = {name: next((own[name] for own in reversed(words) if own[name]), None) for name in names}
    turned: list[str] = []
    for text, own in zip(texts, words, strict=True):
        new = {name: own[other] or known[other] for name, other in (names, names[::-1])}
        if None in new.values() or (text_now := _renamed(text, new)) is None:
            return None
        turned.append(text_now)
    source, chosen, rejected = turned
    right, wrong = (_n_wrong(compare_facts(text, source=source)) for text in (chosen, rejected))
    return Preference(source, chosen, rejected) if right < wrong else None


def _words_for(text: str, name: str) -> str | None:
    found = (" ".join(text[fact.start : fact.end].split()) for fact in read_facts(text) if fact.name == name)
    return next(found, None)


def _renamed(text: str, words: Mapping[str, str | None]) -> str | None:
    """Write other words for every mention of some concepts; None where mentions overlap."""
    parts, position = [], 0
    for fact in sorted((fact for fact in read_facts(text) if fact.name in words), key=lambda fact: fact.start):
        if fact.start < position:
            return None
        new = words[fact.name] or ""
        parts += [text[position : fact.start], _in_its_place(new, text[fact.start : fact.end])]
        position = fact.end
    return "".join([*parts, text[position:]])
