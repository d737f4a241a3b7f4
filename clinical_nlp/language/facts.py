"""The clinical facts that a text states: findings, drugs, procedures, plans, other phrases, and numbers with a unit.

A fact is a concept with what is said of it. Concepts come from HPO and from three tables beside this file
(`findings.csv`, `drugs.csv`, `procedures.csv`); a clause that no vocabulary knows is kept as the stems of its content
words, so that two texts can be compared on it too. Numbers are read with their unit and what they belong to, sides with
the concept next to them.
"""

from __future__ import annotations

import csv
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from clinical_nlp.language.assertion import assert_spans
from clinical_nlp.language.mentions import Annotator
from clinical_nlp.language.sections import Section, find_sections, is_header
from clinical_nlp.language.sentences import find_sentences
from clinical_nlp.language.terminology import Match
from clinical_nlp.language.terminology.normalization import FREE, heavy, light, same_single
from clinical_nlp.notes.schema import Assertion

KINDS = ("finding", "drug", "procedure", "plan", "phrase", "number")
"""`plan` is a drug or procedure that is still to come; `phrase` is a clause that no vocabulary knows."""

_FOLDER = Path(__file__).parent
_TOKEN = re.compile(r"[^\W\d_][^\W_]*(?:['’][^\W\d_]+)?|\d+(?:[.,]\d+)*|[^\w\s]|\n")
_INSIDE = frozenset(("-", "/", "'", "’", "&", "‐", "‑", "*"))
_MAX_WORDS = 9

# Forms that are words, titles or layout when they do not stand in their own capitals.
_WORDLIKE = frozenset(
    ("as", "ms", "mr", "ed", "ie", "ai", "op", "st", "om", "add", "age", "rad", "lad", "pet", "cap", "ha", "sob", "tee",
     "hd", "ui", "pi", "sad", "pn", "pd", "hi", "si", "af", "sm", "hm", "oh", "fm", "oa", "ra", "uc", "cd", "ct",
     "pe", "mi", "ua", "lp", "oa", "am", "is", "it", "or", "us", "dm", "cp", "hf", "gad", "aids", "chd", "age", "tia")
)  # fmt: skip
_NEVER_ALONE = frozenset(("as", "ms", "mr", "ed", "ie", "op", "st", "add", "age", "am", "is", "it", "or", "us", "hi"))
"""Of these, what is not even read as an abbreviation where a text has capitals everywhere or nowhere."""

_SUFFIX = re.compile(
    r"[a-z]{3,}(?:mab|tinib|ciclib|prazole|sartan|olol|statin|conazole|cillin|mycin|floxacin|tidine|gliptin|gliflozin"
    r"|glutide|parin|xaban|dipine|setron|triptan|azepam|azolam|barbital|cycline|vir|oxetine|pramine|cept|parib|lukast"
    r"|dronate|thiazide|pril|afil|formin|gliptine|oxacin|profen|caine)$"
)
_NOT_DRUGS = frozenset(("april",))


@dataclass(frozen=True, slots=True)
class Fact:
    """What a text says at [start, end).

    `name` is the same for the same concept however it is written: an HPO id, the name of a drug, a procedure or a
    finding, or the sorted stems of a phrase. A number has the name of what it belongs to, `value` and `unit`. `side`
    is left, right, bilateral or None. `resolved` says that the text calls the finding over.
    """

    kind: str
    name: str
    label: str
    start: int
    end: int
    presence: str = "present"
    temporality: str = "current"
    modality: str = "actual"
    experiencer: str = "patient"
    side: str | None = None
    value: float | None = None
    unit: str | None = None
    resolved: bool = False


class _Token(NamedTuple):
    start: int
    end: int
    text: str  # in lower case
    stem: str  # empty for punctuation


class _Entry(NamedTuple):
    kind: str
    name: str
    single: str  # the light form of a one-word name
    form: str  # of an abbreviation, as it is written


class _Concept(NamedTuple):
    first: int
    last: int
    kind: str
    name: str


# -- vocabulary ------------------------------------------------------------------------------------------------------


def _rows(name: str) -> list[dict[str, str]]:
    with (_FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _words(text: str) -> list[str]:
    return [word for word in (token.group() for token in _TOKEN.finditer(text)) if word[0].isalnum()]


@lru_cache(maxsize=65_536)
def _stem(word: str) -> str:
    return heavy(word) if word.isalpha() or "'" in word or "’" in word else word


@lru_cache(maxsize=1)
def _vocabulary() -> dict[str, Any]:
    """Names by stem; an entry stands under the empty key of its last word."""
    root: dict[str, Any] = {}

    def add(name: str, kind: str, key: str, *, abbreviation: bool = False) -> None:
        words = [word.lower() for word in _words(name)]
        kept = words if abbreviation else [word for word in words if word not in FREE] or words
        node = root
        for word in kept:
            node = node.setdefault(_stem(word), {})
        single = light(kept[0]) if len(kept) == 1 else ""
        entries = node.setdefault("", [])
        if not any(entry.single == single for entry in entries):
            entries.append(_Entry(kind, key, single, name if abbreviation else ""))

    for row in _rows("findings.csv"):
        key = _exact(row["name"]) or row["name"]
        for name in (row["name"], *_split(row["synonyms"])):
            add(name, "finding", key)
        for name in _split(row["abbreviations"]):
            add(name, "finding", key, abbreviation=True)
    for row in _rows("drugs.csv"):
        for name in (row["name"], *_split(row["synonyms"])):
            add(name, "drug", row["name"], abbreviation=name.isupper() and len(name) < 5)
    for row in _rows("procedures.csv"):
        for name in (row["name"], *_split(row["synonyms"])):
            add(name, "procedure", row["name"])
        for name in _split(row["abbreviations"]):
            add(name, "procedure", row["name"], abbreviation=True)
    return root


@lru_cache(maxsize=1)
def _annotator() -> Annotator:
    return Annotator("hpo")


def _exact(name: str) -> str | None:
    whole = [match for match in _annotator().match(name) if (match.start, match.end) == (0, len(name))]
    return whole[0].concept_id if whole else None


def _split(cell: str) -> list[str]:
    return [part for part in cell.split(";") if part]


@lru_cache(maxsize=1)
def _plain() -> frozenset[str]:
    return frozenset((_FOLDER / "plain_words.txt").read_text(encoding="utf-8").split())


@lru_cache(maxsize=1)
def _clinical() -> frozenset[str]:
    """Stems that the names of findings, drugs and procedures are made of."""
    terminology = _annotator().terminology
    texts: list[str] = [name.text for key in sorted(terminology.matchable) for name in terminology.names(key)]
    for table in ("findings.csv", "drugs.csv", "procedures.csv"):
        texts += [cell for row in _rows(table) for cell in row.values() if cell]
    found = {_stem(word.lower()) for text in texts for word in _words(text) if len(word) > 2 and word.isalpha()}
    return frozenset(found) - {_stem(word) for word in _plain()}


def is_clinical(stem: str) -> bool:
    """Whether a stem is part of a clinical name, rather than of the language around it."""
    return stem in _clinical()


@lru_cache(maxsize=65_536)
def is_plain(word: str) -> bool:
    """Whether a lower-case word says nothing clinical by itself."""
    return word in _plain() or word in FREE or light(word) in _plain()


def values_in(text: str) -> set[float]:
    """Return every number of a text, in figures or spelled: `forty-two`, `a hundred and twenty`, `nineteen ninety`."""
    found = {float(value.replace(",", "")) for value in re.findall(_VALUE, text)}
    total: float | None = None
    for token in [*tokens_of(text), _Token(0, 0, ".", "")]:
        value = _SPELLED.get(token.text)
        if value is not None:
            found.add(float(value))
            if total is None:
                total = value
            elif total % 100 == 0 or (total % 10 == 0 and total % 100 >= 20 and value < 10):
                total += value
            else:  # `nineteen ninety`, `one twenty`
                found.add(float(total))
                total = total * 100 + value
        elif token.text in ("hundred", "thousand"):
            total = (1 if total is None else total) * (100 if token.text == "hundred" else 1000)
        elif total is not None and token.text not in ("and", "-"):
            found.add(float(total))
            total = None
    return found


@lru_cache(maxsize=20_000)
def names_of(name: str) -> frozenset[str]:
    """Return the stems of every name of a concept."""
    terminology = _annotator().terminology
    texts = [n.text for n in terminology.names(name)] if name in terminology else [name]
    return frozenset(_stem(word.lower()) for text in texts for word in _words(text) if word.isalpha())


@lru_cache(maxsize=20_000)
def initials_of(name: str) -> frozenset[str]:
    """Return what every name of a concept is shortened to: the first letters of its words, in lower case."""
    terminology = _annotator().terminology
    texts = [n.text for n in terminology.names(name)] if name in terminology else [name]
    rows = [[word.lower() for word in _words(text) if word.isalpha()] for text in texts]
    rows += [[word for word in row if word not in FREE] for row in rows]
    return frozenset("".join(word[0] for word in row) for row in rows if len(row) > 1)


@lru_cache(maxsize=1)
def _abbreviations() -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for row in _rows("findings.csv"):
        found.setdefault(_exact(row["name"]) or row["name"], set()).update(_split(row["abbreviations"].lower()))
    for row in _rows("procedures.csv"):
        found.setdefault(row["name"], set()).update(_split(row["abbreviations"].lower()))
    return {name: frozenset(forms - _NEVER_ALONE - FREE) for name, forms in found.items()}


def abbreviations_of(name: str) -> frozenset[str]:
    """Return the abbreviations that the tables have for a concept, in lower case, without those that are words."""
    return _abbreviations().get(name, frozenset())


@lru_cache(maxsize=1)
def _above() -> dict[str, tuple[str, ...]]:
    """Return the broader concepts that the table of findings names."""
    key = {row["name"]: _exact(row["name"]) or row["name"] for row in _rows("findings.csv")}
    return {
        key[row["name"]]: tuple(key[n] for n in _split(row["broader"]))
        for row in _rows("findings.csv")
        if row["broader"]
    }


@lru_cache(maxsize=20_000)
def broader(name: str) -> frozenset[str]:
    """Return the concepts that a concept is a kind of: its ancestors in HPO, and what the table of findings says."""
    terminology = _annotator().terminology
    found: set[str] = set()
    waiting = [name]
    while waiting:  # rows of the table that the matcher takes for one concept may name each other
        one = waiting.pop()
        above = {*(terminology.ancestors(one) if one in terminology else ()), *_above().get(one, ())}
        waiting += above - found
        found |= above
    return frozenset(found - {name})


# -- reading ---------------------------------------------------------------------------------------------------------


def tokens_of(text: str) -> list[_Token]:
    """Divide `text` into words, numbers, punctuation and line breaks."""
    found = []
    for token in _TOKEN.finditer(text):
        lower = token.group().lower()
        found.append(_Token(token.start(), token.end(), lower, _stem(lower) if lower[0].isalnum() else ""))
    return found


def read_facts(text: str) -> list[Fact]:
    """Read the facts of a note or a part of one, in the order of the text.

    Parameters
    ----------
    text : any length; headers are not read as facts.

    Returns
    -------
    list of Fact, sorted by place. Empty where the text states nothing.
    """
    if not text.strip():
        return []
    whole, text = text, readable(text)
    tokens = tokens_of(text)
    sections, sentences = find_sections(text), find_sentences(text)
    headers = [(s.header_start, s.header_end) for s in sections if s.named and not _is_entry(text, s)]
    skipped = _skipped(text, tokens, headers)
    concepts = _concepts(text, tokens, skipped)
    owner = [-1] * len(tokens)
    for number, concept in enumerate(concepts):
        owner[concept.first : concept.last] = [number] * (concept.last - concept.first)
    starts = [token.start for token in tokens]
    numbers, used = _numbers(text, tokens, starts, concepts, owner, sentences, headers)
    for at in used:
        skipped[at] = True
    phrases = _phrases(text, tokens, starts, sentences, owner, skipped)
    spans = [(tokens[c.first].start, tokens[c.last - 1].end) for c in concepts]
    spans += [(start, end) for start, end, _ in phrases]
    asserted = assert_spans(text, spans, sections=sections, sentences=sentences)
    sides = _sides(text, tokens, starts, spans, owner, sentences)
    facts = []
    for number, concept in enumerate(concepts):
        facts.append(_fact(whole, spans[number], concept.kind, concept.name, asserted[number], sides.get(number)))
    for number, (_, _, name) in enumerate(phrases, start=len(concepts)):
        facts.append(_fact(whole, spans[number], "phrase", name, asserted[number], sides.get(number)))
    return sorted([*facts, *numbers], key=lambda fact: (fact.start, fact.end))


_LONG_LINE, _LONG_PROSE = 40, 25
_NEW_ITEM = re.compile(r"[ \t]*(?:[-*•·▪◦+=#|]|\(?\d{1,2}[.)]\s|[A-Z][A-Za-z0-9/&() \-]{0,45}:|$)|.*[|\t]")


def unwrapped(text: str) -> str:
    """Turn the line breaks of wrapped text into spaces, character for character, so that no offset moves.

    A long line that stops without punctuation goes on in the next one, unless that begins an entry or a header.
    Capitals are no guide: some notes have them everywhere or nowhere.
    """
    lines = text.split("\n")
    if len(lines) == 1:
        return text
    pieces = [lines[0]]
    for line, following in pairwise(lines):
        end = line.rstrip()[-1:]
        goes_on = (
            len(line) >= (_LONG_PROSE if ". " in line else _LONG_LINE)
            and end not in ("", ".", "!", "?", ":", ";", "|")
            and "|" not in line
        )
        goes_on = goes_on and not _NEW_ITEM.match(following) and not is_header(following) and not is_header(line)
        pieces.append((" " if goes_on else "\n") + following)
    return "".join(pieces)


_LONG_WORD = re.compile(r"(?<![\w@*])[^\W\d_]{5,}(?![\w@*])")


@lru_cache(maxsize=1)
def _spellings() -> tuple[frozenset[str], dict[str, list[str]]]:
    """Return the words that are known, and those of five letters or more by every form with one letter left open."""
    terminology = _annotator().terminology
    texts: list[str] = [name.text for key in sorted(terminology.matchable) for name in terminology.names(key)]
    for table in ("findings.csv", "drugs.csv", "procedures.csv"):
        texts += [cell for row in _rows(table) for cell in row.values() if cell]
    texts += [row["phrase"] for row in _rows("cues.csv")]
    known = {word.lower() for text in texts for word in _words(text) if word.isalpha()} | _plain()
    forms: dict[str, list[str]] = {}
    for word in sorted(known):
        if len(word) >= 5:
            for at in range(1, len(word)):
                forms.setdefault(f"{word[:at]}?{word[at + 1 :]}", []).append(word)
    return frozenset(known), forms


@lru_cache(maxsize=65_536)
def _respelled(word: str) -> str:
    """Return the one known word that `word` is with two letters swapped or one letter wrong, else `word`."""
    known, forms = _spellings()
    if word in known or light(word) in known:
        return word
    swapped = [word[:at] + word[at + 1] + word[at] + word[at + 2 :] for at in range(len(word) - 1)]
    found = {other for other in swapped if other in known}
    found = found or {other for at in range(1, len(word)) for other in forms.get(f"{word[:at]}?{word[at + 1 :]}", ())}
    return found.pop() if len(found) == 1 else word


def readable(text: str) -> str:
    """Return `text` with wrapped lines joined and slips of the pen mended; every character keeps its place."""

    def mend(found: re.Match[str]) -> str:
        written = found[0]
        lower = written.lower()
        mended = _respelled(lower) if len(lower) == len(written) else lower
        if mended == lower:
            return written
        return mended.upper() if written.isupper() else mended.capitalize() if written[0].isupper() else mended

    return _LONG_WORD.sub(mend, unwrapped(text))


_MARKED = re.compile(r"[ \t]*(?:[-*•·▪◦+]|\d{1,2}[.)])[ \t]+$")


def _is_entry(text: str, section: Section) -> bool:
    """Whether what looks like a header is a statement: an unknown heading, or an entry of a list (`- CXR`)."""
    if section.category == "other":
        return True
    line = text.rfind("\n", 0, section.header_start) + 1
    return _MARKED.match(text[line : section.header_start]) is not None and text[section.header_end :][:1] in ("\n", "")


_OVER = re.compile(
    r"resol|subsid|no\s+longer|gone|went\s+away|clear|disappear|abated|settled|is\s+over|passed|stopped|ceased|remitted"
    r"|vanished|dissipated|recur|relief|is\s+behind",
    re.IGNORECASE,
)


def _fact(text: str, span: tuple[int, int], kind: str, name: str, assertion: Assertion, side: str | None) -> Fact:
    resolved = any(
        value in ("historical", "absent") and _OVER.search(text, start, end) for value, start, end in assertion.cues
    )
    if kind in ("drug", "procedure") and (assertion.temporality == "future" or assertion.modality == "hypothetical"):
        kind = "plan"
    return Fact(
        kind, name, text[span[0] : span[1]], *span, assertion.presence, assertion.temporality, assertion.modality,
        assertion.experiencer, side, resolved=resolved,
    )  # fmt: skip


_LAYOUT = re.compile(
    r"^[ \t]*(?:[-*•·▪◦+#]+|\(?\d{1,2}[.)])(?=\s)|\[\*\*.*?\*\*\]|<[A-Z]+>|\[[A-Z]+\]|@[A-Z]+@|_{2,}|\bX{3,}\b",
    re.MULTILINE | re.IGNORECASE,
)


def _skipped(text: str, tokens: list[_Token], headers: list[tuple[int, int]]) -> list[bool]:
    """Mark the tokens of headers, list markers and placeholders."""
    out = [False] * len(tokens)
    starts = [token.start for token in tokens]
    spans = headers + [found.span() for found in _LAYOUT.finditer(text)]
    for start, end in spans:
        for at in range(bisect_left(starts, start), bisect_left(starts, end)):
            out[at] = True
    return out


def _one_case(text: str, tokens: list[_Token]) -> list[bool]:
    """Say of each token whether capitals tell nothing there: its line is all capitals, or the text has hardly any."""
    letters = [c for c in text if c.isalpha()]
    if sum(c.isupper() for c in letters) < 0.03 * len(letters):
        return [True] * len(tokens)
    out: list[bool] = []
    position = 0
    ends = []
    for line in text.split("\n"):
        position += len(line) + 1
        ends.append((position, sum(c.isupper() for c in line) >= 8 and not any(c.islower() for c in line)))
    at = 0
    for token in tokens:
        while token.start >= ends[at][0]:
            at += 1
        out.append(ends[at][1])
    return out


def _concepts(text: str, tokens: list[_Token], skipped: list[bool]) -> list[_Concept]:
    """Find concepts of the tables and of HPO; the longer one wins, of equal ones that of the tables."""
    one_case = _one_case(text, tokens)
    found: list[tuple[int, int, int, str, str]] = []
    for first, last, entry in _look_up(text, tokens, skipped, one_case):
        found.append((-(tokens[last - 1].end - tokens[first].start), 0, first, entry.kind, entry.name))
    ends = {(-f[0], f[2]): f for f in found}
    starts = [token.start for token in tokens]
    for match in _annotator().match(text):
        first = bisect_right(starts, match.start) - 1
        lower = text[match.start : match.end].lower()
        if lower in _HEADINGS or (one_case[first] and len(lower) < 5 and (lower in _NEVER_ALONE or is_plain(lower))):
            continue
        if tokens[first].text in _DEGREES:
            # `mild fever` is a concept of its own in HPO, and is fever here.
            key = _named(" ".join(text[tokens[first].end : match.end].lower().split()).removeprefix("of "))
            if key:
                match = Match(tokens[first + 1].start, match.end, key, match.score)
                first += 1
        if (match.end - match.start, first) not in ends:
            # `absent pulmonary` or `bleeding or skin` may be the edges of two statements.
            joined = _JOINED.search(text, match.start, match.end) is not None or tokens[first].text in _DENIALS
            # `swelling in both legs` is leg swelling that has a side, which is a fact beside the concept's name.
            joined = joined or _SIDED.search(text, match.start + 1, match.end) is not None
            found.append((match.start - match.end, 2 if joined else 1, first, "finding", match.concept_id))
    concepts: list[_Concept] = []
    taken = bytearray(len(tokens))
    for size, _, first, kind, name in sorted(found, key=lambda f: (f[1] == 2, f)):
        last = bisect_left(starts, tokens[first].start - size)
        if any(taken[first:last]) or skipped[first]:
            continue
        taken[first:last] = b"\1" * (last - first)
        concepts.append(_Concept(first, last, kind, name))
    return sorted(concepts)


_DENIALS = frozenset(("absent", "no", "lack", "absence", "negative"))
_HEADINGS = frozenset(("allergies", "allergy"))
_DEGREES = frozenset(("mild", "moderate", "severe", "recurrent", "persistent", "intermittent", "episodic", "episodes",
                      "episode", "progressive", "profound", "marked", "frequent", "occasional"))  # fmt: skip


@lru_cache(maxsize=4096)
def _named(text: str) -> str | None:
    """Return the concept that `text` as a whole is a name of."""
    tokens = tokens_of(text)
    for first, last, entry in _look_up(text, tokens, [False] * len(tokens), [True] * len(tokens)):
        if (first, last) == (0, len(tokens)) and entry.kind == "finding":
            return entry.name
    return _exact(text)


_JOINED = re.compile(r"[,;]|\b(?:and|or|nor)\b", re.IGNORECASE)
_SIDED = re.compile(r"\b(?:in|of|on) (?:the )?(?:both|left|right)\b", re.IGNORECASE)


def _look_up(
    text: str, tokens: list[_Token], skipped: list[bool], one_case: list[bool]
) -> Iterator[tuple[int, int, _Entry]]:
    """Yield the longest name of the tables at every place."""
    root, count = _vocabulary(), len(tokens)
    at = 0
    while at < count:
        token = tokens[at]
        node = root.get(token.stem) if token.stem and not skipped[at] else None
        if node is None:
            if token.stem and not skipped[at] and len(token.text) > 6 and token.text not in _NOT_DRUGS \
                    and _SUFFIX.match(token.text):  # fmt: skip
                yield at, at + 1, _Entry("drug", token.text, "", "")
            at += 1
            continue
        best: tuple[int, _Entry] | None = None
        look, words = at + 1, 1
        while True:
            for entry in node.get("", ()):
                if _fits(text, tokens, at, look, entry, one_case[at]):
                    best = (look, entry)
            while look < count and (
                tokens[look].text in _INSIDE or (tokens[look].text in FREE and tokens[look].stem not in node)
            ):
                look += 1
            if look < count and tokens[look].text == "\n":
                look += 1
            if look >= count or words >= _MAX_WORDS or not tokens[look].stem:
                break
            node = node.get(tokens[look].stem)
            if node is None:
                break
            look += 1
            words += 1
        if best is None:
            at += 1
        else:
            yield at, best[0], best[1]
            at = best[0]


def _fits(text: str, tokens: list[_Token], first: int, last: int, entry: _Entry, one_case: bool) -> bool:
    """Whether the words at [first, last) are a name, and not a word that only looks like an abbreviation."""
    if entry.form:
        written = text[tokens[first].start : tokens[last - 1].end]
        lower = written.lower()
        if lower == "ct" and first and tokens[first - 1].text == "plt":
            return False
        if one_case and (lower in _NEVER_ALONE or is_plain(lower)):
            return lower == entry.form.lower() and _apart(tokens, first, last)
        if written == entry.form or (written[-1] == "s" and written[:-1] == entry.form):
            return True
        if entry.form.lower() not in (lower, lower.removesuffix("s")) or is_plain(lower):
            return False
        return one_case or (lower not in _WORDLIKE and len(lower) > 2)
    if entry.single:
        return same_single(entry.single, light(tokens[first].text))
    return True


_EDGES = frozenset(("\n", ".", ",", ";", ":", "(", ")", "-", "*", "•", "/"))


_LEADING = frozenset(
    ("no", "possible", "probable", "likely", "of", "with", "without", "or", "and", "denies", "severe", "mild")
)


def _apart(tokens: list[_Token], first: int, last: int) -> bool:
    """Whether the words stand between line breaks or punctuation, as an entry of a list does."""
    before = first == 0 or tokens[first - 1].text in _EDGES or tokens[first - 1].text in _LEADING
    return before and (last == len(tokens) or tokens[last].text in _EDGES or tokens[last].text in ("or", "and"))


# -- phrases ---------------------------------------------------------------------------------------------------------

_BREAKS = frozenset((",", ";", ":", "(", ")", "|", "[", "]", "and", "or", "but", "nor", "with", "without", "due",
                     "because", "while", "although", "which", "who", "that", "given", "from", "after", "for", "since",
                     "than", "however", "except", "then", "before", "by", "if", "when", "."))  # fmt: skip
_SIDES = {"left": "left", "right": "right", "bilateral": "bilateral", "bilaterally": "bilateral", "bilat": "bilateral",
          "lt": "left", "rt": "right", "l": "left", "r": "right", "b/l": "bilateral"}  # fmt: skip


def _phrases(
    text: str, tokens: list[_Token], starts: list[int], sentences: Sequence[tuple[int, int]], owner: list[int],
    skipped: list[bool],
) -> list[tuple[int, int, str]]:  # fmt: skip
    """Return (start, end, name) of what clauses say beyond the concepts in them."""
    found: list[tuple[int, int, str]] = []
    for begin, stop in sentences:
        piece: list[_Token] = []
        for at in range(bisect_left(starts, begin), bisect_left(starts, stop)):
            token = tokens[at]
            if owner[at] >= 0 or token.text in _BREAKS or skipped[at]:
                _close(piece, found)
            elif token.stem and not token.text[0].isdigit() and len(token.text) > 1 and token.text not in _SIDES \
                    and not is_plain(token.text):  # fmt: skip
                piece.append(token)
        _close(piece, found)
    return found


def _close(piece: list[_Token], found: list[tuple[int, int, str]]) -> None:
    if piece:
        found.append((piece[0].start, piece[-1].end, " ".join(sorted({token.stem for token in piece}))))
        piece.clear()


# -- sides -----------------------------------------------------------------------------------------------------------

_LEFT_VERB = frozenset(("the", "against", "ama", "without", "home", "hospital", "untreated", "early", "work", "him",
                        "it", "because", "to", "for"))  # fmt: skip
_RIGHT_WORD = frozenset(("now", "away", "after", "before", "here", "there", "then"))
_STOPS = re.compile(r"[,;:.()|]")


def _sides(
    text: str, tokens: list[_Token], starts: list[int], spans: list[tuple[int, int]], owner: list[int],
    sentences: Sequence[tuple[int, int]],
) -> dict[int, str]:  # fmt: skip
    """Return the side of each span that has one: the span after the word, else the one before it."""
    order = sorted(range(len(spans)), key=lambda n: spans[n])
    places = [spans[n][0] for n in order]
    sentence_starts = [sentence[0] for sentence in sentences]
    found: dict[int, str] = {}
    for at, token in enumerate(tokens):
        side = _SIDES.get(token.text)
        if side is None or owner[at] >= 0 or not _is_side(text, tokens, at):
            continue
        begin, stop = sentences[max(0, bisect_right(sentence_starts, token.start) - 1)]
        after = bisect_left(places, token.end)
        before = after - 1
        inside = before >= 0 and spans[order[before]][1] > token.end
        if inside:
            _give(found, order[before], side)
            after_end = spans[order[before]][1]
        elif after < len(order) and places[after] < stop and _near(text, token.end, places[after], 3):
            _give(found, order[after], side)
            after_end = spans[order[after]][1]
            after += 1
        else:
            if (
                before >= 0
                and spans[order[before]][0] >= begin
                and _near(text, spans[order[before]][1], token.start, 7)
            ):
                _give(found, order[before], side)
            continue
        # `left lower lobe pneumonia`: the side is that of the lobe and of the pneumonia.
        if after < len(order) and places[after] < stop and not text[after_end : places[after]].strip():
            _give(found, order[after], side)
    return found


def _give(found: dict[int, str], number: int, side: str) -> None:
    known = found.get(number)
    found[number] = side if known is None or known == side else "bilateral"


def _near(text: str, start: int, end: int, words: int) -> bool:
    between = text[start:end]
    return not _STOPS.search(between) and len(between.split()) <= words


def _is_side(text: str, tokens: list[_Token], at: int) -> bool:
    token = tokens[at]
    following = tokens[at + 1].text if at + 1 < len(tokens) else ""
    previous = tokens[at - 1].text if at else ""
    if token.text in ("l", "r"):
        glued = text[token.end : token.end + 1] in ("/", "'", ".", "&")
        sided = following == "-" and at + 2 < len(tokens) and tokens[at + 2].text == "sided"
        return (
            not glued and (following.isalpha() or sided) and previous not in ("/", "&") and not previous[:1].isdigit()
        )
    if token.text == "left":
        return following not in _LEFT_VERB or previous in ("the", "on")
    if token.text == "right":
        return following not in _RIGHT_WORD and previous != "all"
    return True


# -- numbers ---------------------------------------------------------------------------------------------------------

_UNITS = {
    "mg": "mg", "milligram": "mg", "milligrams": "mg", "mgs": "mg", "mcg": "mcg", "ug": "mcg", "µg": "mcg",
    "μg": "mcg", "microgram": "mcg", "micrograms": "mcg", "g": "g", "gm": "g", "gram": "g", "grams": "g", "kg": "kg",
    "kilograms": "kg", "ml": "ml", "cc": "ml", "milliliters": "ml", "l": "l", "liter": "l", "liters": "l",
    "litres": "l", "unit": "unit", "units": "unit", "u": "unit", "iu": "unit", "meq": "meq", "mmol": "mmol",
    "meq/l": "meq/l", "mmol/l": "mmol/l", "mg/dl": "mg/dl", "g/dl": "g/dl", "g/l": "g/l", "k/ul": "k/ul",
    "x10^9/l": "k/ul", "umol/l": "umol/l", "mcg/kg": "mcg/kg", "mg/kg": "mg/kg", "mg/ml": "mg/ml", "ng/ml": "ng/ml",
    "pg/ml": "pg/ml", "mg/h": "mg/h", "%": "%", "percent": "%", "cm": "cm", "centimeter": "cm", "centimeters": "cm",
    "mm": "mm", "millimeter": "mm", "millimeters": "mm", "inch": "in", "inches": "in", "lb": "lb", "lbs": "lb",
    "pound": "lb", "pounds": "lb", "day": "day", "days": "day", "week": "week", "weeks": "week", "wk": "week",
    "wks": "week", "month": "month", "months": "month", "mo": "month", "mos": "month", "year": "year",
    "years": "year", "yr": "year", "yrs": "year", "hour": "hour", "hours": "hour", "hr": "hour", "hrs": "hour",
    "h": "hour", "minute": "minute", "minutes": "minute", "min": "minute", "mins": "minute", "bpm": "bpm",
    "beats": "bpm", "mmhg": "mmhg", "f": "degf", "c": "degc", "degrees": "deg", "tablet": "tablet",
    "tablets": "tablet", "tab": "tablet", "tabs": "tablet", "capsule": "tablet", "capsules": "tablet",
    "puff": "puff", "puffs": "puff", "drop": "drop", "drops": "drop", "gtt": "drop", "pack": "pack", "packs": "pack",
    "times": "time", "episodes": "time", "liters/min": "l/min", "l/min": "l/min",
}  # fmt: skip
_DOSES = frozenset(("mg", "mcg", "g", "ml", "unit", "meq", "mmol", "mcg/kg", "mg/kg", "mg/ml", "tablet", "puff",
                    "drop", "mg/h"))  # fmt: skip
_TIMES = frozenset(("day", "week", "month", "year", "hour", "minute"))
_SPELLED: dict[str, float] = {word: value for value, word in enumerate(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
     "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"))}  # fmt: skip
_SPELLED.update({"thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
                 "a dozen": 12, "half": 0.5})  # fmt: skip
_MONTHS = {name: place for place, name in enumerate(
    ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"), start=1)}  # fmt: skip
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_UNIT = "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True))
_VALUE = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_WORDED = "|".join(sorted(_SPELLED, key=len, reverse=True))
_DATE = re.compile(
    rf"(?<![\w/])(?:(?P<y1>\d{{4}})-(?P<m1>\d{{1,2}})-(?P<d1>\d{{1,2}})|(?P<m2>\d{{1,2}})/(?P<d2>\d{{1,2}})/(?P<y2>\d{{2,4}})"
    rf"|(?P<m3>{_MONTH})\.? (?P<d3>\d{{1,2}})(?:st|nd|rd|th)?,? (?P<y3>\d{{4}})"
    rf"|(?P<d4>\d{{1,2}})[- ](?P<m4>{_MONTH})[- ](?P<y4>\d{{4}}))(?![\w/])",
    re.IGNORECASE,
)
_FREQUENCY = re.compile(
    r"(?<![\w-])(?:(?P<every>(?:q ?|every )(?P<n>\d{1,2}|"
    + _WORDED
    + r") ?-?(?P<u>h|hrs?|hours?|days?|weeks?)(?![a-z]))"
    r"|(?P<times>(?P<k>once|twice|thrice|one|two|three|four|five|six|\d) ?(?:times|time|x)? ?"
    r"(?:daily|a day|per day|each day|/day))"
    r"|(?P<week>(?P<w>once|twice|three times)? ?(?:weekly|a week|per week|every week))"
    r"|(?P<qid>qid|q\.i\.d\.?)|(?P<tid>tid|t\.i\.d\.?)|(?P<bid>bid|b\.i\.d\.?)"
    r"|(?P<day>daily|qd|q\.d\.|qam|qpm|every day|each day|qday|every morning|every evening)"
    r"|(?P<night>nightly|qhs|at bedtime|at night|every night|hs))(?!\w)",
    re.IGNORECASE,
)
_FREQUENCY = re.compile(_FREQUENCY.pattern.replace(" ", r"\s"), re.IGNORECASE)
_PER_DAY = {"qid": 4.0, "tid": 3.0, "bid": 2.0, "day": 1.0, "night": 1.0}
_AGE = re.compile(
    r"(?<![\w.])(?P<value>\d{1,3})[ -]?(?:(?:years?|yrs?|y)[ -]?(?:old|o\b)|y/o|yo\b|yom\b|yof\b)", re.IGNORECASE
)
_PRESSURE = re.compile(r"(?<![\w/.])(\d{2,3})/(\d{2,3})(?![\w/])")
_SCORE = re.compile(r"(?<![\w/.])(\d{1,2}(?:\.\d)?) ?(?:/|out of) ?(10|5|6)(?![\w/])", re.IGNORECASE)
_QUANTITY = re.compile(
    rf"(?<![\w.,^/])(?P<value>{_VALUE})(?: ?(?:-|–|to) ?(?P<high>{_VALUE}))?"
    rf"(?:[ -]?(?P<unit>{_UNIT})(?![a-z0-9^]))?(?![\w^])"
    rf"|(?<!\w)(?P<word>{_WORDED})(?:[ -](?:or|to) ?(?P<high2>{_WORDED}))?[ -](?:more )?(?P<unit2>{_UNIT})(?!\w)",
    re.IGNORECASE,
)
# A quantity may be broken at the end of a line.
_AGE, _QUANTITY = (re.compile(found.pattern.replace(" ", r"\s"), re.IGNORECASE) for found in (_AGE, _QUANTITY))
_MEASURED = {
    "t": "temperature", "temp": "temperature", "tmax": "temperature", "hr": "pulse", "rate": "pulse", "p": "pulse",
    "rr": "respiration", "resp": "respiration", "respirations": "respiration", "bp": "pressure",
    "pressure": "pressure", "sat": "oxygen", "sats": "oxygen", "spo2": "oxygen", "o2": "oxygen",
    "saturation": "oxygen", "saturations": "oxygen", "cr": "creatinine", "creat": "creatinine", "hgb": "hemoglobin",
    "hb": "hemoglobin", "plt": "platelets", "plts": "platelets", "na": "sodium", "k": "potassium",
    "wbc": "leukocytes", "glu": "glucose", "sugar": "glucose", "fsbs": "glucose", "ef": "ejection", "lvef": "ejection",
    "fraction": "ejection", "wt": "weight", "ht": "height",
}  # fmt: skip


_MEASURED.update({label: label for label in tuple(_MEASURED.values())})
_MEASURED.update({"hemoglobin": "hemoglobin", "glucose": "glucose", "platelet": "platelets", "wbcs": "leukocytes",
                  "count": "count", "respiratory": "respiration"})  # fmt: skip
_BEFORE_COUNT = {"white": "leukocytes", "platelet": "platelets", "respiratory": "respiration", "cell": "leukocytes"}
_MEASURES = frozenset(("blood", "heart", "white", "oxygen", "cell", "respiratory", "platelet", "serum", "count", "o2",
                       "plt", "body", "pulse", "sat", "rate"))  # fmt: skip
"""Words in front of a measured value that belong to its name."""


def _numbers(
    text: str, tokens: list[_Token], starts: list[int], concepts: list[_Concept], owner: list[int],
    sentences: Sequence[tuple[int, int]], headers: list[tuple[int, int]],
) -> tuple[list[Fact], list[int]]:  # fmt: skip
    """Return the numbers of the text as facts, and the tokens that they are written with."""
    facts: list[Fact] = []
    named: list[int] = []
    busy = bytearray(len(text) + 1)
    for start, end in headers:
        busy[start:end] = b"\1" * (end - start)
    for found in _LAYOUT.finditer(text):
        busy[found.start() : found.end()] = b"\1" * (found.end() - found.start())
    sentence_starts = [sentence[0] for sentence in sentences]
    places = [tokens[concept.first].start for concept in concepts]

    def within(start: int) -> tuple[int, int]:
        return sentences[max(0, bisect_right(sentence_starts, start) - 1)] if sentences else (0, len(text))

    def anchor(start: int, end: int, kinds: tuple[str, ...]) -> str:
        """Name the concept of the sentence that a number belongs to: the one before it, else the one after it."""
        begin, stop = within(start)
        at = bisect_left(places, start)
        for number in range(at - 1, -1, -1):
            if places[number] < begin:
                break
            if concepts[number].kind in kinds:
                return concepts[number].name
        for number in range(at, len(concepts)):
            if places[number] >= stop:
                break
            if concepts[number].kind in kinds:
                return concepts[number].name
        return ""

    def drug_before(start: int, end: int) -> str:
        """Name the drug of the sentence, else one shortly before in the same paragraph (`... TABLET\\n2 DAILY`)."""
        name = anchor(start, end, ("drug",))
        at = bisect_left(places, start) - 1
        if not name and at >= 0 and concepts[at].kind == "drug":
            between = text[places[at] : start]
            name = concepts[at].name if len(between) < 80 and "\n\n" not in between and ". " not in between else ""
        return name

    def take(start: int, end: int) -> bool:
        if any(busy[start:end]):
            return False
        busy[start:end] = b"\1" * (end - start)
        return True

    def add(name: str, start: int, end: int, value: float, unit: str | None) -> None:
        facts.append(Fact("number", name, text[start:end], start, end, value=value, unit=unit))

    for found in _DATE.finditer(text):
        if take(*found.span()):
            add("date", *found.span(), _date(found), "date")
    for found in _AGE.finditer(text):
        if take(*found.span()):
            add("age", *found.span(), float(found["value"]), "year old")
    for found in _FREQUENCY.finditer(text):
        drug = drug_before(*found.span())
        sure = found["every"] or found["times"] or found["qid"] or found["tid"] or found["bid"]
        if (drug or sure) and take(*found.span()):
            add(drug, *found.span(), _per_day(found), "/day")
    for found in _SCORE.finditer(text):
        if take(*found.span()):
            add("score", *found.span(), float(found[1]), "/" + found[2])
    for found in _PRESSURE.finditer(text):
        if take(*found.span()):
            named.extend(_measured(tokens, bisect_right(starts, found.start()) - 1, within(found.start())[0])[1])
            add("systolic", *found.span(1), float(found[1]), "mmhg")
            add("diastolic", *found.span(2), float(found[2]), "mmhg")
    for found in _QUANTITY.finditer(text):
        at = bisect_right(starts, found.start()) - 1
        if not 0 <= at < len(owner) or owner[at] >= 0 or not take(*found.span()):
            continue
        unit = _UNITS.get((found["unit"] or found["unit2"] or "").lower())
        values = [found["value"] or found["word"], found["high"] or found["high2"]]
        if unit in _DOSES:
            name = drug_before(*found.span()) or anchor(*found.span(), ("finding", "procedure"))
        elif unit in _TIMES:
            name = anchor(*found.span(), ("finding", "drug", "procedure"))
        else:
            name, words = _measured(tokens, at, within(found.start())[0])
            named.extend(words)
            name = name or anchor(*found.span(), ("finding", "procedure", "drug"))
        for value in values:
            if value is not None:
                add(name, *found.span(), _value(value), unit)
    used = [at for at, token in enumerate(tokens) if any(busy[token.start : token.end])]
    return facts, used + named


def _value(written: str) -> float:
    spelled = _SPELLED.get(written.lower())
    return float(spelled) if spelled is not None else float(written.replace(",", ""))


def _date(found: re.Match[str]) -> float:
    for k in "1234":
        year = found["y" + k]
        if year is not None:
            month = found["m" + k]
            place = int(month) if month.isdigit() else _MONTHS[month[:3].lower()]
            return float((int(year) % 100) * 10_000 + place * 100 + int(found["d" + k]))
    raise ValueError("no date")


def _per_day(found: re.Match[str]) -> float:
    if found["every"]:
        n = _value(found["n"])
        unit = found["u"].lower()
        return (24 / n if unit[0] == "h" else 1 / n if unit[0] == "d" else 1 / (7 * n)) if n else 0.0
    if found["times"]:
        return {"once": 1.0, "twice": 2.0, "thrice": 3.0}.get(found["k"].lower()) or _value(found["k"])
    if found["week"]:
        return {"twice": 2.0, "three": 3.0}.get((found["w"] or "once").lower().split()[0], 1.0) / 7
    return _PER_DAY[str(found.lastgroup)]


def _measured(tokens: list[_Token], at: int, begin: int) -> tuple[str, list[int]]:
    """Name what was measured by the word before the number, past signs and small words; and say which words do so."""
    for look in range(at - 1, max(-1, at - 5), -1):
        token = tokens[look]
        if token.start < begin or token.text == "\n" or token.text in (";", "."):
            break
        if not token.stem or token.text in FREE or token.text in _LINKS:
            continue
        if token.text[0].isdigit():
            break
        known = _MEASURED.get(token.text)
        if known is None:
            return ("", []) if is_plain(token.text) or len(token.text) < 2 else (token.stem, [])
        before = tokens[look - 1].text if look else ""
        words = [look]
        while words[-1] > 0 and tokens[words[-1] - 1].text in _MEASURES and tokens[words[-1] - 1].start >= begin:
            words.append(words[-1] - 1)
        if token.text in ("count", "rate"):
            known = _BEFORE_COUNT.get(before, known)
        return known, words
    return "", []


_LINKS = frozenset(("of", "is", "was", "at", "to", "ct", "about", "around", "were", "are", "now", "currently"))
