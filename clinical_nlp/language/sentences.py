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
        for item in _items(text, start, end):
            _split_unit(text, *item, spans)
    return spans


def _units(text: str) -> list[tuple[int, int]]:
    """Join wrapped lines; what comes back holds no line break that ends a sentence."""
    units: list[tuple[int, int]] = []
    lines = []
    position = 0
    for line in text.split("\n"):
        lines.append((position, position + len(line)))
        position += len(line) + 1
    block: list[tuple[int, int]] = []
    for start, end in lines:
        if text[start:end].strip():
            block.append((start, end))
        else:
            _join_block(text, block, units)
            block = []
    _join_block(text, block, units)
    return units


def _join_block(text: str, block: list[tuple[int, int]], units: list[tuple[int, int]]) -> None:
    if not block:
        return
    widths = [len(text[s:e].rstrip()) for s, e in block]
    width = max(widths)
    start, end = block[0]
    for k in range(1, len(block)):
        next_start, next_end = block[k]
        if _wrapped(text, block[k - 1], block[k], widths[k - 1], width):
            end = next_end
        else:
            units.append((start, end))
            start, end = next_start, next_end
    units.append((start, end))


def _wrapped(text: str, line: tuple[int, int], following: tuple[int, int], size: int, width: int) -> bool:
    """Whether the line break between two lines is only layout."""
    upper = text[line[0] : line[1]].rstrip()
    lower = text[following[0] : following[1]]
    if _BULLET.match(lower) or _HEADER.match(lower) or upper[-1] in ".!?:;|" or "\t" in lower.strip() or "|" in lower:
        return False
    if _SPEAKER.match(lower) or is_header(lower) or is_header(upper):
        return False
    first = lower.lstrip()
    word = first.split(None, 1)[0]
    last = upper.rsplit(None, 1)[-1]
    if last[-1] in ",-/(&+" or last.lower() in _JOINERS:
        return True
    # A writer's or printer's wrap: the next word would not have fitted.
    full = 40 <= width <= 140 and size + 1 + len(word) >= width - 1
    if first[0].islower() or first[0] in ",;)":
        return full or size >= 25
    return full


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
    while begin > cursor and not text[begin - 1].isspace():
        begin -= 1
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
