"""What a note says about a span: present or denied, now or once, real or hypothetical, of the patient or another.

The method is that of ConText: cue phrases in `cues.csv` act forward or backward over a limited number of words until a
phrase that ends their scope; longer phrases that only look like cues (pseudo cues) hide the cues inside them. The
nearest cue in force decides each axis. Sections set defaults.

A row of `cues.csv` is a phrase with its kind (cue, pseudo, end, or a member of a class), axis, value, direction and
scope in words. Direction `over` is forward and reaches over a verb that would affirm (`nobody in the family has`); an
end of value `list` ends only an enumeration.

Where annotation guidelines decide a case they are followed:

- A finding that may or may not be there is uncertain, also where it is thought improbable (`unlikely`, `doubt`, `low
  suspicion for`): i2b2 2010 calls both possible, while NegEx counts `unlikely` as a negation. `Consistent with`
  affirms.
- `History of` and a past-history section make a mention historical, as in ConText; a duration (`2-week history of`,
  `started two years ago`) does not. What has resolved was there: present and historical (i2b2 2010 would say absent).
- A problem that comes only under a condition is conditional (i2b2 2010: `dyspnea on exertion`); one that is there and
  gets worse (`worse with walking`) is not. What is denied has no condition.
- A problem that a drug, a visit, a precaution or a vaccine is for in case it comes is hypothetical (i2b2 2010: `prn
  anxiety`), and so are risks. What a note teaches about a disease, or a clinic's name, is generic.
- Relatives by blood are family; a spouse, a donor or a contact is other. An informant (`mother reports`) changes
  nothing.

References
----------
Harkema et al. 2009, ConText: an algorithm for determining negation, experiencer and temporal status from clinical
reports, J Biomed Inform 42(5).
Chapman et al. 2001, A simple algorithm for identifying negated findings (NegEx), J Biomed Inform 34(5).
Uzuner et al. 2011, 2010 i2b2/VA challenge on concepts, assertions, and relations in clinical text, JAMIA 18(5).
"""

from __future__ import annotations

import csv
import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from clinical_nlp.language.sections import Section, find_sections
from clinical_nlp.language.sentences import find_sentences
from clinical_nlp.notes.schema import Assertion

_TOKEN = re.compile(r"[^\W\d_]+(?:['’/][^\W\d_]+)*|\d+(?:[.,]\d+)*|[^\w\s]")
_SPLIT = re.compile(f"({_TOKEN.pattern})")
_MEMO_LIMIT = 100_000
_AXES = ("presence", "temporality", "modality", "experiencer")
_PLAIN = {"presence": "present", "temporality": "current", "modality": "actual", "experiencer": "patient"}
_STRENGTH = {"absent": 2, "uncertain": 1}
_DEFAULTS = {
    "family_history": ("experiencer", "family"),
    "past_medical_history": ("temporality", "historical"),
    "allergies": ("modality", "conditional"),
}
"""What a mention means in a section when no cue says otherwise; a reaction under allergies happens on exposure."""

_CURRENT = re.compile(r"(?!.*(?:past|resolved|prev|prior)).*(?:problem|active|current|chronic|comorbid)", re.I | re.S)
_PLANS = re.compile(r"plan|recommend|orders?\b|to do\b|follow", re.IGNORECASE)
_PROCEDURE = re.compile(
    r"(?:scopy|ectomy|otomy|ostomy|plasty|graphy|gram|centesis|biopsy|surgery|repair|replacement|transplant(?:ation)?"
    r"|resection|excision|ablation|bypass|stent(?:ing)?|therapy|dialysis|transfusion|injection|study|scan|ultrasound"
    r"|x-?ray|echo|\b(?:CT|MRI|PET|EEG|EMG|EKG|ECG|CABG|PCI|EGD|ERCP|CXR|CBC|BMP|CMP|labs?|panel|culture|referral"
    r"|consult(?:ation)?|evaluation|follow-?up|test(?:ing)?))s?\Z",
    re.IGNORECASE,
)
"""What is done and not had: under a plan it is to come."""

_DONE = re.compile(
    r"[ \t]*[:=-]?[ \t]*(?:was|were|ha[sd]|have|show(?:s|ed|ing)|reveal(?:s|ed)|demonstrate[sd]|done|performed"
    r"|completed|reviewed|normal|negative|positive|today|yesterday|results?|ago|on \d)\b",
    re.IGNORECASE,
)
_ANSWER = re.compile(
    r"[ \t]*[:=\-–—|?\t]+[ \t]*\n?[ \t]*"
    r"(?:(?P<absent>no(?:ne)?|neg(?:ative)?|denie[sd]|absent|nil|not present|n|0|never|nope)"
    r"|(?P<present>yes|pos(?:itive)?|present|y|\+|x)|(?P<uncertain>possible|possibly|unsure|unknown|unclear|maybe|\?))"
    r"(?=[ \t]*(?:[)\].,;|\n\t]|$)"
    r"| (?:today|now|currently|at (?:this|present|the)|recently|reported|noted|known|seen)\b)"
    r"|[ \t]*\((?:(?P<minus>-|–|−|neg|negative|absent|no|none|denied|denies)|(?P<plus>\+|pos|positive|present|yes)"
    r"|(?P<query>\?|possible|probable|suspected))\)"
    r"|(?:[ \t]+(?:is|was|are|level|score|scale|rated|at|of|currently|today|now))*[ \t:=]+(?P<zero>0[ \t]?/[ \t]?10)\b"
    r"|[ \t]*(?:(?P<sign_minus>[-–−])|(?P<sign_plus>\+{1,3}))(?=[ \t]*(?:[,;]|[.]?[ \t]*(?:\n|$)))",
    re.IGNORECASE,
)
_SIGNED = re.compile(r"[+\-–−][ \t]*[,;]")
_SIGNS = {
    "minus": "absent",
    "plus": "present",
    "query": "uncertain",
    "zero": "absent",
    "sign_minus": "absent",
    "sign_plus": "present",
}
_REPLY = re.compile(
    r"[\s\"”]*(?P<speaker>\[?[a-z_][a-z_. ]{0,20}[\]:][ \t:]*)?(?:(?:um|uh|well|oh|hmm|mmm|so|and)[,. ]+)*"
    r"(?:(?P<absent>(?:no|nope|nah|never|negative|none|denie[sd])"
    r"(?=[ \t]*(?:[,.;!\n]|$)|\s+(?:i|s?he|it|not|none|no)\b)"
    r"|not (?:really|at all|that i|so far|lately|right now)\b"
    r"|i (?:do(?:n['’]t| n['’]t| not)|have(?:n['’]t| n['’]t| not))(?=[ \t]*(?:[,.;!\n]|$)))"
    r"|(?P<present>(?:yes|yeah|yep|yup|mm-?hmm|uh-?huh)\b|(?:i (?:do|have|am)|s?he (?:does|has))(?=[ \t]*[,.\n])"
    r"|(?:sometimes|a (?:little|bit)|definitely|occasionally)\b))",
    re.IGNORECASE,
)
"""The answer to a question, with or without the name of the speaker before it; `PE? No fever.` holds none."""
_ASKS = re.compile(r"\b(?:any|are you|do you|have you|did you|is there|were there|was there)\b", re.IGNORECASE)
_OPEN_QUESTION = re.compile(
    r"(?:\[?[a-z_][a-z_. ]{0,20}[\]:][ \t:]*)?(?:(?:okay|ok|so|and|um|uh|well|all right|alright)[,. ]+)*"
    r"(?:how (?!about)|what(?!'s? (?:about|if))|when|where|why|which|who)\b",
    re.IGNORECASE,
)
_KNOWN = re.compile(r"\b(?:the|your|that|this|these|those|his|her|my)\s+(?:\w+\s+)?$", re.IGNORECASE)
_BOX = re.compile(
    r"(?:(?P<minus>\((?:-|–)\)|\[(?:-| |)\]|(?<!\w)-ve|⊖)|(?P<plus>\(\+\)|\[[xX+✓]\]|(?<!\w)\+ve|(?<![\w+])\+)"
    r"|(?P<query>\(\?\)|\[\?\]))[ \t]*$"
)
_PLUSSED = re.compile(r"(?:^|[\s,;(])\+[ \t]?[^\W\d_]")
_MINUS = re.compile(r"(?<![^\s,;(])(?P<minus>[-–−])")
"""A sign that stands at the word itself (`+cough, -fever`) denies only beside one that affirms."""
_BULLET = re.compile(r"(?:[-*•·▪◦–—○►]|\(?\d{1,2}[.)]|[a-zA-Z][.)])[ \t]*\w")


_CLAUSE_ENDS = frozenset(
    (".", ",", ";", ")", "and", "but", "by", "on", "at", "per", "today", "however", "as", "then", "in", "bilaterally",
     "throughout")
)  # fmt: skip
_NEAR = 60
_HISTORY = re.compile(r"hist|hx|h/o", re.IGNORECASE)
_PRN = re.compile(r"p\.?r\.?n\.?", re.IGNORECASE)
_DENIES = re.compile(r"den(?:y|ie[sd]|ying)\b|neg(?:ative)?\b", re.IGNORECASE)
_NUMBER, _YEAR = "@number", "@year"  # what a number or a year stands as in a cue phrase
_STOPPED = re.compile(r"(?<!\bdr)(?<!\bvs)(?<!\be\.g)(?<!\bi\.e)[.!?]\s", re.IGNORECASE)
_OR = re.compile(r"\b(?:or|nor)\b", re.IGNORECASE)
_CONTINUES = re.compile(r"\b(?:or|nor)\s+(?:any\s+)?$", re.IGNORECASE)
_PARTED = re.compile(
    r"[,;:]|\b(?:with|but)\b|\bor\b.*\band\b|\band\s+(?:an?|the|there|some|mild|moderate|severe|small|large)\b",
    re.IGNORECASE | re.DOTALL,
)
"""What a denial does not reach over to something that is said to be there."""
_WITH = re.compile(r"\W*with\b", re.IGNORECASE)
_OTHER_TEST = re.compile(
    r"\b(?:and|but|with)\b.*\b(?:scans?|tests?|cultures?|biops(?:y|ies)|panels?|screen(?:ing)?|serolog(?:y|ies)|stud(?:y|ies)"
    r"|ultrasound|x-?rays?|MRI|CT|cytology|exam(?:ination)?)\s*$",
    re.IGNORECASE | re.DOTALL,
)
"""A test of its own between the finding and what was negative."""
_OPENERS = frozenset(
    ("no", "denies", "without", "old", "prior", "previous", "remote", "resolved", "possible", "probable", "suspected",
     "presumed", "questionable", "likely")
)  # fmt: skip
"""A span of an annotator or a model may begin with its own cue."""
_CLAUSE_STARTS = frozenset((".", ",", ";", ":", "(", "-", "and", "but"))
_TIMED = re.compile(r"in (?:19|20)\d\d|(?:\w+ ){1,3}(?:years?|yrs?|months?|decades?) ago", re.IGNORECASE)
_AGO = frozenset(("ago", "back"))
_SENTENCE_STARTS = frozenset((".", ";", ":", "]", "-", "(", "•", "*"))
_ANCHOR = "^"  # a phrase that counts only where a sentence or an item begins
_LIST_HEAD = re.compile(r":[,\s]*(?:\(?1[.)]|[-*•])[ \t]*\w")


class _Rule(NamedTuple):
    kind: str  # cue, pseudo or end
    axis: str  # empty: all axes (of an end), none (of a pseudo cue that hides an end)
    value: str
    direction: str
    scope: int


class _Cue(NamedTuple):
    """A rule found at [first, last) of the tokens and [start, end) of the text."""

    rule: _Rule
    first: int
    last: int
    start: int
    end: int


@lru_cache(maxsize=1)
def _trie() -> dict[str, Any]:
    """Cue phrases by word.

    A phrase may hold classes (`@relative`, and `@adverb?` where the class may be missing), whose members are rows of
    kind `class`, and may begin with `^`.
    """
    with (Path(__file__).parent / "cues.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    members: dict[str, list[str]] = {}
    for row in rows:
        if row["kind"] == "class":
            members.setdefault(row["value"], []).append(row["phrase"])
    root: dict[str, Any] = {}
    for row in rows:
        if row["kind"] == "class":
            continue
        rule = _Rule(row["kind"], row["axis"], row["value"], row["direction"], int(row["scope"]))
        key = "end " + rule.axis if rule.kind == "end" else rule.axis
        parts = [
            [*members[part[:-1]], ""] if part[:1] == "@" and part[-1] == "?" else members.get(part, [part])
            for part in row["phrase"].lower().split()
        ]
        nodes = [root]
        for choices in parts:
            # Each member once from each place reached: the phrases of a class share their beginnings.
            reached = []
            for words in (_words_of(choice) for choice in choices):
                for node in nodes:
                    for word in words:
                        node = node.setdefault(word, {})
                    reached.append(node)
            nodes = reached
        for node in nodes:
            rules = node.setdefault("", {}).setdefault(key, [])
            if rule not in rules:
                rules.append(rule)
                rules.sort(key=_by_kind)
    return root


def _words_of(part: str) -> Sequence[str]:
    return (part,) if part in (_NUMBER, _YEAR, _ANCHOR) else _TOKEN.findall(part)


def _by_kind(rule: _Rule) -> bool:
    return rule.kind != "pseudo"


class _Read(dict[str, str]):
    """What each token counts as in a cue phrase: numbers and years are one word each, slips of typing are mended."""

    def __missing__(self, token: str) -> str:
        word = _slips().get(token, token)
        if word[0].isdecimal():
            word = _YEAR if len(word) == 4 and word[:2] in ("19", "20") else _NUMBER
        if len(self) < _MEMO_LIMIT:
            self[token] = word
        return word


@lru_cache(maxsize=1)
def _read() -> _Read:
    return _Read()


@lru_cache(maxsize=1)
def _first_words() -> frozenset[str]:
    """The words that a cue phrase may begin with."""
    root = _trie()
    return frozenset(root) | frozenset(root.get(_ANCHOR, {}))


@lru_cache(maxsize=1)
def _slips() -> dict[str, str]:
    """The words of cues, of six letters or more, by what they look like with two letters exchanged in typing."""
    words: set[str] = set()
    nodes = [_trie()]
    while nodes:
        for word, node in nodes.pop().items():
            if word:
                words.add(word)
                nodes.append(node)
    found: dict[str, str] = {}
    for word in sorted(words):
        if len(word) < 6 or not word.isalpha():
            continue
        for at in range(len(word) - 1):
            slip = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
            if slip not in words and slip not in _NO_SLIPS:
                found[slip] = word
    return found


_NO_SLIPS = frozenset(
    ("arises", "arising", "casual", "compliant", "denise", "martial", "nuclear", "preformed", "trails")
)  # words of their own


def assert_spans(
    text: str,
    spans: Sequence[tuple[int, int]],
    *,
    sections: Sequence[Section] | None = None,
    sentences: Sequence[tuple[int, int]] | None = None,
) -> list[Assertion]:
    """Say for each span what the note asserts about it.

    Parameters
    ----------
    text : the note, unchanged.
    spans : (start, end) in code points of `text`, in any order; they may overlap.
    sections, sentences : as `find_sections` and `find_sentences` give them; found here where absent.

    Returns
    -------
    list of Assertion, one a span, in the order given. `cues` holds (axis value, start, end) of the phrases that
        decided; a section default is given with the place of the section's header.

    Raises
    ------
    ValueError : a span is empty or outside the text.
    """
    for start, end in spans:
        if not 0 <= start < end <= len(text):
            msg = f"span ({start}, {end}) is empty or outside the text of length {len(text)}"
            raise ValueError(msg)
    if not spans:
        return []
    sections = find_sections(text) if sections is None else sections
    sentences = find_sentences(text) if sentences is None else sentences
    section_starts = [section.start for section in sections]
    sentence_starts = [sentence[0] for sentence in sentences]
    groups: dict[tuple[int, int], list[int]] = {}
    for number, (start, _) in enumerate(spans):
        place = (bisect_right(section_starts, start) - 1, max(0, bisect_right(sentence_starts, start) - 1))
        groups.setdefault(place, []).append(number)
    results: list[Assertion | None] = [None] * len(spans)
    for (section_at, sentence_at), members in groups.items():
        section = sections[section_at]
        begin, stop = sentences[sentence_at] if sentences else (0, len(text))
        inside = [spans[number] for number in members]
        begin = min(max(begin, section.start), min(s for s, _ in inside))
        stop = max(min(stop, section.end), max(e for _, e in inside))
        cues = _cues(text, begin, stop, inside)
        cue_starts = [cue.start for cue in cues]
        carried: list[_Cue] | None = None
        for number in members:
            span = spans[number]
            # Only cues near the span can reach it; a note without punctuation is one long sentence.
            near = bisect_right(cue_starts, span[0])
            chosen = _decide(text, begin, stop, span, cues[max(0, near - _NEAR) : near + _NEAR])
            if len(chosen) < len(_AXES) and _BULLET.match(text, sentences[sentence_at][0] if sentences else 0):
                if carried is None:
                    carried = _lead(text, sentences, sentence_at, section)
                for cue in carried:
                    if cue.rule.axis not in chosen:
                        chosen[cue.rule.axis] = (cue.rule.value, cue.start, cue.end)
            _answered(text, begin, stop, span, chosen)
            if section.category == "allergies" and text[span[0] : span[0] + 6].lower() == "allerg":
                chosen.setdefault("modality", ("actual", *span))  # the allergy is there, its reactions may come
            header = text[section.header_start : section.header_end]
            planned = section.category == "assessment_plan" and _PLANS.search(header) is not None
            if (
                planned
                and "temporality" not in chosen
                and not _DONE.match(text, span[1])
                and _PROCEDURE.search(text, *span)
            ):
                chosen["temporality"] = ("future", section.header_start, section.header_end)
            results[number] = _assertion(chosen, section, header)
    return [result for result in results if result is not None]


def _answered(text: str, begin: int, stop: int, span: tuple[int, int], chosen: dict[str, tuple[str, int, int]]) -> None:
    """Let the reply to a question decide: `Any chest pain? No.`, with speakers or without a question mark."""
    marked = text[stop - 1] == "?"
    said = chosen.get("presence")
    if said is not None and said[0] != "present" and not (marked and said[1:] == (stop - 1, stop)):
        return
    if marked and _OPEN_QUESTION.match(text, begin, stop):
        chosen.pop("presence", None)  # `how long does the pain last?`
    elif marked or (text[stop : stop + 1] == "\n" and _ASKS.search(text, max(begin, span[0] - 300), span[0])):
        reply = _REPLY.match(text, stop)
        known = _KNOWN.search(text, max(begin, span[0] - 50), span[0]) is not None  # `is the pain worse? no`
        if reply is not None and not known and (marked or reply["speaker"]):
            group = "absent" if reply["absent"] else "present"
            chosen["presence"] = (group, *reply.span(group))


def _assertion(chosen: dict[str, tuple[str, int, int]], section: Section, header: str) -> Assertion:
    default = _DEFAULTS.get(section.category)
    if default is not None and default[1] == "historical" and _CURRENT.match(header):
        default = None  # a problem list is filed with the past history and is not past
    denied = "presence" in chosen and chosen["presence"][0] == "absent"
    if default is not None and default[0] not in chosen and not (denied and default[0] != "experiencer"):
        chosen[default[0]] = (default[1], section.header_start, section.header_end)
    values = {axis: chosen[axis][0] for axis in chosen}
    cues = tuple(sorted((c for a, c in chosen.items() if c[0] != _PLAIN[a]), key=lambda c: (c[1], c[0])))
    return Assertion(**values, cues=cues)


def _cues(text: str, begin: int, stop: int, spans: list[tuple[int, int]]) -> list[_Cue]:
    """Return the cues of one sentence in order, pseudo cues and cues inside a span taken out."""
    parts = _SPLIT.split(_folded(text[begin:stop]))  # what stands between tokens, and tokens, in turn
    edges = list(accumulate(map(len, parts), initial=begin))
    token_starts, token_ends = edges[1::2], edges[2::2]
    words = list(map(_read().__getitem__, parts[1::2]))
    root = _trie()
    anchored = root.get(_ANCHOR, {})
    ordered = sorted(spans)
    span_starts = [span[0] for span in ordered]
    furthest = list(accumulate((span[1] for span in ordered), max))
    found: list[_Cue] = []
    count = len(words)
    reached: dict[str, int] = {}
    covered = 0
    hidden: dict[str, int] = {}
    first_words = _first_words()
    for at in [at for at, word in enumerate(words) if word in first_words]:
        node = root.get(words[at])
        opening = anchored.get(words[at]) if at == 0 or words[at - 1] in _SENTENCE_STARTS else None
        if node is None and opening is None:
            continue
        # The longest phrase from here for each axis; one that lies inside an earlier phrase of its axis is dropped.
        longest: dict[str, tuple[int, list[_Rule]]] = {}
        for branch in (node, opening):
            look = at + 1
            while branch is not None:
                for key, rules in branch.get("", {}).items():
                    if (key not in longest or look >= longest[key][0]) and not (
                        rules[0].kind == "pseudo" and _enters(span_starts, token_starts[at], token_starts[look - 1])
                    ):
                        longest[key] = (look, rules)
                branch = branch.get(words[look]) if look < count else None
                look += 1
        taken = covered
        for key, (last, rules) in longest.items():
            if last <= reached.get(key, 0):
                continue
            if rules[0].kind == "end" and (at < taken or last < longest.get(key[4:], (0,))[0]):
                continue
            if rules[0].kind == "pseudo":
                # Nothing may start inside a pseudo cue, so what begins here and ends later is hidden too.
                hidden[key] = last
                while found and found[-1].last > at and found[-1].rule.axis == key:
                    found.pop()  # `is not` before `not relieved by`
            reached[key] = last
            covered = max(covered, last)
            if at < hidden.get(key, 0) and rules[0].kind != "pseudo":
                continue
            start, end = token_starts[at], token_ends[last - 1]
            place = bisect_right(span_starts, start) - 1
            # A cue inside a span is part of its name, unless a longer span opens with it.
            if place >= 0 and furthest[place] >= end:
                opens = words[at] in _OPENERS and span_starts[place] == start and furthest[place] > end
                opens = opens and words[last : last + 1] != ["-"]  # `old-age dementia`
                if not opens:
                    continue
            following = words[last] if last < count else "."
            closes = at > 0 and (words[at - 1] not in _CLAUSE_STARTS or following == ".")
            closes = closes and (following in _CLAUSE_ENDS or words[last - 1] in _AGO)
            twofold = len({rule.direction for rule in rules if rule.kind == "cue"}) > 1
            for rule in rules:
                if rule.kind == "pseudo":
                    continue
                if rule.direction == "both":
                    found += [_Cue(rule._replace(direction=d), at, last, start, end) for d in ("backward", "forward")]
                # A word that works both ways (`denied`, `likely`) looks back only where its clause ends, a time
                # (`ten years ago`) wherever it does not open one.
                elif not twofold or (rule.direction == "backward") == closes:
                    found.append(_Cue(rule, at, last, start, end))
    return found


def _enters(span_starts: list[int], first: int, last: int) -> bool:
    """Whether words that begin at `first` to `last` reach into a span: `without complications` denies complications."""
    place = bisect_right(span_starts, last) - 1
    return place >= 0 and span_starts[place] > first


def _folded(text: str) -> str:
    """Return `text` in lower case with plain apostrophes, of the same length."""
    lower = text.lower()
    if len(lower) != len(text):  # the dotted capital I of Turkish becomes two
        lower = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    return lower.replace("’", "'")


def _decide(
    text: str, begin: int, stop: int, span: tuple[int, int], cues: list[_Cue]
) -> dict[str, tuple[str, int, int]]:
    """Return (value, cue start, cue end) by axis for one span, axes without a cue left out."""
    start, end = span
    chosen: dict[str, tuple[str, int, int]] = {}
    skip = -1
    answer = _ANSWER.match(text, end, stop)
    box = _BOX.search(text, max(begin, start - 6), start)
    if box is None and start > begin and text[start - 1] in "-–−" and _PLUSSED.search(text, begin, stop):
        box = _MINUS.match(text, start - 1, start)
    for found in (box, answer):
        if found is not None and found.lastgroup and "presence" not in chosen:
            group = found.lastgroup
            # A minus that ends a line is a dash, unless other signs stand before it.
            bare = group == "sign_minus" and text[found.end() : stop].lstrip(" \t")[:1] not in (",", ";")
            if bare and not _SIGNED.search(text, max(begin, start - 300), start):
                continue
            value = _SIGNS.get(group, group)
            chosen["presence"] = (value, found.start(group), found.end(group))
            skip = found.start(group)
    before: dict[str, _Cue] = {}
    after: dict[str, _Cue] = {}
    closed: set[str] = set()
    listed = False
    # Forward cues: walk left from the span; the nearest in force wins, an end closes its axis.
    for cue in reversed(cues):
        rule = cue.rule
        if cue.start == skip:
            continue
        if cue.end > start and (
            cue.end >= end or cue.start > start or (rule.kind == "cue" and rule.direction == "backward")
        ):
            continue
        if rule.kind == "end":
            # `no rash, the shakes or fever`: an article or adjective ends a list only where no `or` is to come, and not
            # the list of a verb (`denies fever, severe headache`).
            if rule.value == "list":
                listed = listed or not _OR.search(text, cue.end, min(stop, start + 200))
                continue
            closed.update((rule.axis,) if rule.axis else _AXES if cue.end - cue.start > 1 else ("presence", "modality"))
        elif rule.kind == "cue" and rule.axis not in closed:
            if rule.axis in before:
                # `nobody in the family has`, `nor did he have`: the subject denies what its verb would affirm.
                verb = before[rule.axis]
                if rule.direction == "over" and verb.rule.value == "present" and "," not in text[cue.end : verb.start]:
                    before[rule.axis] = cue
            elif rule.direction == "backward" and _TIMED.match(text, cue.start):
                continue  # `history of MI in 1999, CHF`
            elif rule.direction == "backward" or (
                listed and rule.axis == "presence" and not _DENIES.match(text, cue.start)
            ):
                closed.add(rule.axis)
            elif _PRN.fullmatch(text, cue.start, cue.end) and "\n" in text[cue.end : start]:
                continue  # the next line of a list of drugs
            elif _reaches(text, cue.end, start, rule.scope, rule.axis):
                before[rule.axis] = cue
    closed = set()
    for cue in cues:
        rule = cue.rule
        if cue.start < end or cue.start == skip:
            continue
        if rule.kind == "end":
            closed.update((rule.axis,) if rule.axis else _AXES)
        elif rule.kind == "cue" and rule.axis not in closed and rule.axis not in after:
            if rule.direction == "backward":
                between = text[end : cue.start]
                headed = rule.axis != "presence" and ":" in between  # `anemia: scan to be done`
                # `gout, cramps with walking`: what brings one item on says nothing about the item before.
                timed = rule.axis == "temporality" and (cue.start > 0 and _TIMED.match(text, cue.start) is not None)
                other = (timed or rule.value == "conditional") and "," in between.rstrip(" ,")
                elsewhere = rule.value == "absent" and (
                    _OTHER_TEST.search(between) is not None
                    or (_WITH.match(between) is not None and text[cue.start : cue.start + 5].lower() == "ruled")
                )  # `the last scan was negative`, `pain with MI ruled out`
                if not headed and not other and not elsewhere and _reaches(text, end, cue.start, rule.scope, ""):
                    after[rule.axis] = cue
            elif rule.value != _PLAIN[rule.axis]:
                closed.add(rule.axis)
    for axis in _AXES:
        if axis in chosen:
            continue
        forward, backward = before.get(axis), after.get(axis)
        winner = forward or backward
        if forward is not None and backward is not None:
            winner = _stronger(text, forward, backward, start, end)
        if winner is not None:
            chosen[axis] = (winner.rule.value, winner.start, winner.end)
    # A risk is not doubted as well (`there could be a risk of`), and what is denied has no condition.
    presence, modality = chosen.get("presence"), chosen.get("modality")
    if presence is not None and modality is not None:
        if presence[0] == "uncertain" and modality[0] in ("hypothetical", "generic"):
            del chosen["presence"]
        elif presence[0] == "absent" and modality[0] == "conditional":
            del chosen["modality"]
        elif modality[0] == "hypothetical" and text[slice(*presence[1:])].lower() == "or any":
            del chosen["presence"]  # `call for fever or any vomiting` goes on with what to call for, and denies nothing
    times = chosen.get("temporality")
    if times is not None:
        inside = any(
            axis != "temporality" and start <= times[1] and times[2] <= end and (start, end) != times[1:]
            for axis, (_, start, end) in chosen.items()
        )  # `history of` inside `family history of` or `no history of`
        said = presence is not None and presence[0] == "absent" and presence[1] < times[1]
        never = (
            said and times[0] == "historical" and _HISTORY.search(text, *times[1:])
        )  # `denies a personal history of`
        taught = times[0] == "future" and modality is not None and modality[0] == "generic"  # `epilepsy group advised`
        if inside or never or taught:
            del chosen["temporality"]
    return chosen


def _stronger(text: str, forward: _Cue, backward: _Cue, start: int, end: int) -> _Cue:
    """`no fever is present` and `no rash or fever noted` are absent, `no fever, cough present` says cough is there."""
    if backward.rule.value == "actual":  # `screening for depression was positive`
        return backward
    nearer = backward.start - end < start - forward.end
    listed = _CONTINUES.search(text, forward.end, start) or _OR.search(text, end, backward.start)
    # `no large effusion identified` is one phrase; what a comma or `and` parts from the denial may be there.
    apart = _PARTED.search(text, forward.end, start) is not None
    if backward.rule.value == "present" and nearer and apart and not listed:
        return backward
    gain = _STRENGTH.get(backward.rule.value, 0) - _STRENGTH.get(forward.rule.value, 0)
    return backward if gain > 0 else forward


def _reaches(text: str, start: int, end: int, scope: int, axis: str) -> bool:
    """Whether the words between cue and span are few enough, and no heading stands between them."""
    if end - start >= 12 * scope:
        return False
    between = text[start:end]
    # A sentence that ended without the splitter's notice, as in text without capitals.
    if _STOPPED.search(text, start, end):
        return False
    if axis in ("presence", "modality", "temporality"):
        colon = between.find(":")
        if colon >= 0 and between[:colon].strip(" \t*"):
            return False
    return between.count(" ") <= scope


def _lead(text: str, sentences: Sequence[tuple[int, int]], at: int, section: Section) -> list[_Cue]:
    """Cues of the line that opens a bulleted list: `Denies:` or `Return if:` above it."""
    for index in range(at - 1, max(-1, at - 40), -1):
        start, end = sentences[index]
        gap = text[end : sentences[index + 1][0]]
        if start < section.start or gap.count("\n") > 2:
            return []
        # A transcription that lost its line breaks has the first item in the same sentence: `include:,1. Bleeding.`
        inline = _LIST_HEAD.search(text, start, end)
        if text[start:end].rstrip(" ,")[-1:] == ":" or inline is not None:
            cues = _cues(text, start, inline.start() + 1 if inline is not None else end, [])
            kept: dict[str, _Cue] = {}
            for cue in cues:
                if cue.rule.kind == "end":
                    kept.pop(cue.rule.axis, None)
                elif (
                    cue.rule.kind == "cue"
                    and cue.rule.direction != "backward"
                    and _reaches(text, cue.end, end, cue.rule.scope, "")
                ):
                    kept[cue.rule.axis] = cue
            return list(kept.values())
        if not _BULLET.match(text, start):
            return []
    return []
