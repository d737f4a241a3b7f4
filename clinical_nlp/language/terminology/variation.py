"""Names that a terminology does not list and that clinicians write all the same.

Every rule works on the terminology's own names, so nothing is found that the terminology does not hold:

- a part of the body with an abnormality is also written `X malformation`, `X involvement`, `lesions of X`;
- what one concept is called may stand inside the names of those below it (`renal aplasia` is a synonym of renal
  agenesis, so unilateral renal agenesis is also unilateral renal aplasia);
- an anomaly, a malformation, a defect are one thing at the end of a name, and so are a disorder and a disturbance;
- a blood test is named without `circulating` and `concentration`;
- phrases of one meaning (`phrases.csv`).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from clinical_nlp.language.terminology.concepts import Name, Terminology
from clinical_nlp.language.terminology.normalization import light

_FOLDER = Path(__file__).parent
_ABNORMAL = re.compile(
    r"(?P<whole>abnormality of |anomaly of |abnormal )(?:the )?(?P<part>.+?)"
    r"(?P<shape> morphology)?(?: physiology| system)?$",
    re.IGNORECASE,
)
_HEADS = ("abnormality",)
_SHAPE_HEADS = ("malformation", "defect", "deformity", "lesion", "involvement", "manifestation")
_FIXED_HEADS = ("change", "problem", "dysfunction", "impairment")
"""Only right after the part: `bowel problems`, but not `a change in bowel habits`."""
_EXCHANGED = (
    ("abnormality", "malformation", "defect"),
    ("abnormality", "disorder", "dysfunction"),
)
"""Last words that say the same of what stands before them."""
_OF_BLOOD = re.compile(r"\bcirculating | in (?:the )?(?:blood|serum|plasma)$", re.IGNORECASE)
_AMOUNT = re.compile(r" (?:concentrations?|levels?|activity)$", re.IGNORECASE)
_TEST = re.compile(
    r"(?P<how>abnormal|decreased|elevated|high|increased|low|raised|reduced) (?:blood |serum |plasma )?"
    r"(?P<what>(?!drug|gas|ion)\S.+?) (?:concentrations?|levels?)",
    re.IGNORECASE,
)
"""What a name says of a blood test and a clinician does not."""
_WORD = re.compile(r"[^\W_]+")


def variations(terminology: Terminology, ids: Iterable[str]) -> Iterator[tuple[str, Name, bool]]:
    """Yield (concept id, name, whether its order is fixed); some repeat what the terminology has."""
    phrases = [(re.compile(rf"\b{re.escape(a)}(?=s?\b)", re.IGNORECASE), b) for a, b in _phrases()]
    exchange = _Exchange(terminology)
    for concept_id in ids:
        for name in terminology.names(concept_id):
            if name.abbreviation or name.scope not in ("label", "exact"):
                continue
            for text, fixed in _abnormal(name.text):
                yield concept_id, Name(text, "broad"), fixed
            for text in _ended(name.text):
                yield concept_id, Name(text, "broad"), True
            short = _measured(name.text)
            if short != name.text:
                yield concept_id, Name(short, "exact"), False
            for pattern, other in phrases:
                for text in dict.fromkeys((name.text, short)):
                    if pattern.search(text):
                        yield concept_id, Name(pattern.sub(other, text), "exact"), False
            for text in exchange.of(concept_id, name.text):
                yield concept_id, Name(text, "exact"), False


def _abnormal(text: str) -> Iterator[tuple[str, bool]]:
    found = _ABNORMAL.match(text)
    if found and len(found["part"].split()) <= 3:
        whole = not found["whole"].lower().startswith("abnormal ")
        for head in _HEADS + (_SHAPE_HEADS if whole or found["shape"] else ()):
            yield f"{found['part']} {head}", False
        if not found["shape"]:
            for head in _FIXED_HEADS:
                yield f"{found['part']} {head}", True


def _ended(text: str) -> Iterator[str]:
    """Yield `ossicular anomaly` for `ossicular malformation`."""
    before, _, last = text.rpartition(" ")
    head = light(last)
    if before and " of " not in text:
        for heads in _EXCHANGED:
            if head in map(light, heads):
                yield from (f"{before} {other}" for other in heads if light(other) != head)


def _measured(text: str) -> str:
    """Return `elevated creatine kinase` for `elevated circulating creatine kinase concentration`."""
    short = _OF_BLOOD.sub("", text)
    if short == text and (test := _TEST.fullmatch(text)) is not None:
        return f"{test['how']} {test['what']}"
    return _AMOUNT.sub("", short) if short != text and short.count(" ") > 1 else text


class _Exchange:
    """Short names of a concept, exchanged for each other inside the names of its descendants."""

    def __init__(self, terminology: Terminology) -> None:
        self._terminology = terminology
        self._names: dict[tuple[str, ...], list[str]] = {}
        for concept_id in terminology.ids:
            for name in terminology.names(concept_id):
                words = self._words(name)
                if words and concept_id not in self._names.setdefault(words, []):
                    self._names[words].append(concept_id)

    def _words(self, name: Name) -> tuple[str, ...]:
        if name.abbreviation or name.scope not in ("label", "exact") or not name.text.replace(" ", "").isalpha():
            return ()
        words = tuple(light(word) for word in name.text.split())
        return words if len(words) <= 2 else ()

    def of(self, concept_id: str, text: str) -> Iterator[str]:
        tokens = list(_WORD.finditer(text))
        if len(tokens) < 2:
            return
        words = [light(token.group()) for token in tokens]
        ancestors = None
        for size in (2, 1):
            for first in range(len(words) - size + 1):
                holders = self._names.get(tuple(words[first : first + size]))
                if not holders or size == len(words):
                    continue
                if ancestors is None:
                    ancestors = self._terminology.ancestors(concept_id)
                for holder in holders:
                    if holder in ancestors:
                        before, after = text[: tokens[first].start()], text[tokens[first + size - 1].end() :]
                        for name in self._terminology.names(holder):
                            other = self._words(name)
                            if other and other != tuple(words[first : first + size]):
                                yield f"{before}{name.text}{after}"


@lru_cache(maxsize=1)
def _phrases() -> list[tuple[str, str]]:
    with (_FOLDER / "phrases.csv").open(encoding="utf-8", newline="") as file:
        return [(row["phrase"], row["also"]) for row in csv.DictReader(file)]
