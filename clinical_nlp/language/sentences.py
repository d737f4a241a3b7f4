"""Sentences of messy clinical text: wrapped lines, bullets, tables, missing punctuation, abbreviations."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from clinical_nlp.language.sections import is_header


def _words(kind: str) -> frozenset[str]:
    with (Path(__file__).parent / "sentence_words.csv").open(encoding="utf-8", newline="") as file:
        return frozenset(row["form"] for row in csv.DictReader(file) if row["kind"] == kind)


_ABBREVIATIONS = _words("abbreviation")  # end a sentence only before a capital
_TITLES = _words("title")  # never end one
_JOINERS = _words("joiner")  # no line of a list ends with one
_STOP = re.compile(
    r"[.!?;](?:(?<=;)(?=\s)|(?<!;)[.!?]*[\"'”’)\]]*(?=,?\s|,[A-Z0-9*•]|$)|(?<=[a-z]{3}\.)(?=[A-Z][a-z]+\s))"
)
_ONE = re.compile(r"[^.!?;)]*+[.!?;]?+\s*+\Z")  # nothing in it can end a sentence but its end
_REPLY = re.compile(
    r"[ \t]*(?:absent|present|none|no|yes|negative|positive|denied|nil)[.,;]"
)  # `Facial droop:⏎absent.`
_SPEAKER = re.compile(r"[ \t]*\[[A-Za-z_]{2,20}\][ \t]")
_ASKED = re.compile(r"\s+\[")  # `any fever ? [patient]`
_BULLET = re.compile(r"[ \t]*(?:[-*•·▪◦‣–—○►+#]+(?=[ \t]|[A-Za-z])|\(?\d{1,2}[.)](?=\s)|[A-Za-z][.)](?=\s)|\[.?\])")
_ITEM = re.compile(r"(\d{1,2})[.)](?=\s+\S)")
_HEADER = re.compile(r"[ \t]*[A-Z][A-Za-z0-9/&() \-]{0,45}:")


def find_sentences(text: str) -> list[tuple[int, int]]:
    """Divide `text` into sentences.

    Returns
    -------
    list of (start, end), sorted, disjoint, never empty, without outer white space. Every other character is in one.
    """
    spans: list[tuple[int, int]] = []
    for start, end in _units(text):
        if _ONE.match(text, start, end):
            _append(text, start, end, spans)
            continue
        for item in _items(text, start, end):
            _split_unit(text, *item, spans)
    return spans


def _units(text: str) -> list[tuple[int, int]]:
    """Join wrapped lines; what comes back holds no line break that ends a sentence."""
    units: list[tuple[int, int]] = []
    place = 0
    block: list[tuple[int, str]] = []
    for line in text.split("\n"):
        if line and not line.isspace():
            block.append((place, line))
        elif block:
            _join_block(block, units)
            block = []
        place += len(line) + 1
    if block:
        _join_block(block, units)
    return units


def _join_block(block: list[tuple[int, str]], units: list[tuple[int, int]]) -> None:
    lines = [line.rstrip() for _, line in block]
    width = max(map(len, lines))
    start = block[0][0]
    for k in range(1, len(block)):
        if not _wrapped(lines[k - 1], block[k][1], width):
            units.append((start, block[k][0] - 1))
            start = block[k][0]
    units.append((start, block[-1][0] + len(block[-1][1])))


def _wrapped(upper: str, lower: str, width: int) -> bool:
    """Whether the break between two lines is only layout. `upper` ends with a word."""
    last = upper.rsplit(None, 1)[-1]
    first = lower.split(None, 1)[0]
    # A writer's or printer's wrap: the next word would not have fitted.
    full = 40 <= width <= 140 and len(upper) + 1 + len(first) >= width - 1
    if last[-1] in ".!?;|":
        return False
    if last[-1] == ":":
        return full and _REPLY.match(lower) is not None
    joins = last[-1] in ",-/(&+" or last.lower() in _JOINERS
    goes_on = len(upper) >= 25 and (first[0].islower() or first[0] in ",;)")
    if not (joins or full or goes_on):
        return False
    if _BULLET.match(lower) or _HEADER.match(lower) or "\t" in lower.strip() or "|" in lower:
        return False
    return not (_SPEAKER.match(lower) or is_header(lower) or is_header(upper))


def _items(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Divide a unit before the items of a list on one line: `Diagnoses: 1. Asthma. 2. Gout`."""
    places: list[int] = []
    run: list[int] = []
    for found in _ITEM.finditer(text, start, end):
        before = found.start() - (text[found.start() - 1 : found.start()] == "(")
        if before > start and text[before - 1] not in " \t\n:;,.":
            continue
        number = int(found[1])
        if number == len(run) + 1:
            run.append(before)
        elif number == 1:
            run = [before]
        else:
            continue
        if number == 2:
            places += run
        elif number > 2 or text[start:before].rstrip(" \t,")[-1:] == ":":
            places.append(before)
    cuts = sorted({start, *places})
    return list(zip(cuts, [*cuts[1:], end], strict=True))


def _split_unit(text: str, start: int, end: int, spans: list[tuple[int, int]]) -> None:
    cursor = start
    for found in _STOP.finditer(text, start, end):
        stop = found.end()
        if stop < end and text[stop] == ",":
            stop += 1
        if stop >= end:
            break
        # In text that was divided into words a mark stands alone; else it begins something, as in `? pneumonia`.
        alone = found.start() == start or text[found.start() - 1].isspace()
        if alone and found[0] != "." and not (found[0] == "?" and _ASKED.match(text, stop)):
            continue
        if found[0][0] == "." and not _ends(text, cursor, found.start(), stop, end):
            continue
        _append(text, cursor, stop, spans)
        cursor = stop
    _append(text, cursor, end, spans)


def _ends(text: str, cursor: int, dot: int, stop: int, end: int) -> bool:
    """Whether the full stop at `dot` ends a sentence, and not an abbreviation, an initial or an item number."""
    begin = dot
    if dot > cursor and not text[dot - 1].isspace():
        begin -= len(text[max(cursor, dot - 50) : dot].rsplit(None, 1)[-1])  # no longer word matters
    word = text[begin:dot].strip("(\"'[").lower()
    while stop < end and (text[stop].isspace() or text[stop] == ","):
        stop += 1
    rest = text[stop : min(end, stop + 4)]
    if not rest:
        return False
    if word.isdigit() and not text[cursor:begin].strip():
        return False  # `1. Aspirin`
    if len(word) == 1 and word.isalpha() and text[begin:dot].strip("(\"'[").isupper():
        return False  # an initial, `E. coli`
    if word in _TITLES:
        return False
    if word in _ABBREVIATIONS or ("." in word and len(word) <= 6):
        return rest[0].isupper() and (rest[1:2].islower() or rest[1:2].isspace() or rest[:3].isalpha())
    return True


def _append(text: str, start: int, end: int, spans: list[tuple[int, int]]) -> None:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    if end > start:
        spans.append((start, end))
