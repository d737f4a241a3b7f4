"""Pairs of texts from the synthetic hospitals: one error planted through the gold, or none and the words changed.

Nothing here reads a text with the package's rules: places come from gold spans, states from gold facts, and words from
the generator's own tables and phrase banks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from clinical_nlp.corpora.synthetic_hospitals import generate
from clinical_nlp.corpora.synthetic_hospitals.content import Content, load_content

ERRORS = ("negation", "side", "number", "finding_added", "finding_dropped")
REWORDINGS = ("identical", "sentence_order", "wrapping", "bullets", "case", "headers", "naming", "template")


@dataclass(frozen=True)
class Gold:
    """A mention in a text: where, which entity, what is said of it, and its side."""

    start: int
    end: int
    key: str
    kind: str
    axes: tuple[str, ...]
    side: str | None


@dataclass(frozen=True)
class Text:
    text: str
    mentions: tuple[Gold, ...]
    where: str
    keys: frozenset[str]
    """Entities of the whole note, and what they imply."""


def texts(*, bank: str, seed: int, patients: int = 60, impressions: bool = True) -> Iterator[Text]:
    """Notes, and the impressions and findings of radiology notes, each with its gold."""
    content = load_content(bank)
    by_key = {key.partition(":")[2] or key: key for key in content.entities}
    for item in generate(patients=patients, seed=seed, bank=bank):
        facts = {row[0]: row for row in item.facts}
        golds = []
        for row in item.spans:
            fact = facts[row[13]]
            golds.append(Gold(row[2], row[3], by_key[fact[5]], row[5], tuple(row[8:12]), fact[12]))
        keys = {gold.key for gold in golds}
        for key in tuple(keys):
            keys.update(content.entities[key].implies)
            keys.update(k for k, e in content.entities.items() if key in e.implies)
        parts = [("note", 0, len(item.note.text))]
        if item.pairs and impressions:
            parts = []
            for name, part in (("findings", item.pairs[0][4]), ("impression", item.pairs[0][5])):
                start = item.note.text.rindex(part)
                parts.append((name, start, start + len(part)))
        for name, start, end in parts:
            inside = tuple(
                Gold(g.start - start, g.end - start, g.key, g.kind, g.axes, g.side)
                for g in golds
                if start <= g.start and g.end <= end
            )
            yield Text(item.note.text[start:end], inside, name, frozenset(keys))


def _sentence(text: str, start: int, end: int) -> tuple[int, int]:
    """The sentence or line around a mention, as the generator writes them: ended by a full stop or a line break."""
    begin = max(text.rfind(". ", 0, start) + 2, text.rfind(".\n", 0, start) + 2, text.rfind("\n\n", 0, start) + 2, 0)
    for found in re.finditer(r"\n(?=[ ]*(?:[-*•]|\d+\.)\s|[A-Z=*][^\n]*(?::|==|\*\*)\s)", text[:start]):
        begin = max(begin, found.end())
    if begin == 1:
        begin = 0
    stop = re.compile(r"\.(?=\s|$)|\n\n|\n(?=[ ]*(?:[-*•]|\d+\.)\s)").search(text, end)
    return begin, (stop.end() if stop and stop[0] == "." else stop.start() if stop else len(text))


def _like(new: str, text: str) -> str:
    letters = [c for c in text if c.isalpha()]
    if letters and all(c.islower() for c in letters):
        return new.lower()
    return new.upper() if letters and all(c.isupper() for c in letters) else new


def _capital(new: str, old: str) -> str:
    return new[0].upper() + new[1:] if old[:1].isupper() and new else new


_AFFIRM = (
    ("there is no evidence of", "there is evidence of"), ("no evidence of", "evidence of"), ("there is no", "there is"),
    ("negative for", "positive for"), ("denies any", "reports"), ("denies", "reports"), ("without", "with"),
    ("has had no", "has had"), ("no complaints of", "complaints of"), ("absent", "obvious"), ("free of", "full of"),
    ("not experiencing", "experiencing"), ("no c/o", "c/o"), ("has been no", "has been"), ("no", "new"),
)  # fmt: skip


def plant(item: Text, kind: str, content: Content, random: Random) -> str | None:
    """The text with one error, or None where there is nothing of the kind to change."""
    text = item.text
    mentions = list(item.mentions)
    random.shuffle(mentions)
    if kind == "finding_added":
        return _added(item, content, random)
    for gold in mentions:
        alone = sum(other.key == gold.key for other in item.mentions) == 1
        begin, end = _sentence(text, gold.start, gold.end)
        if (
            kind == "negation"
            and gold.kind == "problem"
            and alone
            and gold.axes[1:] == ("current", "actual", "patient")
        ):
            if gold.axes[0] == "present":
                start = gold.start
                side = re.search(r"(?i)\b(?:left|right|bilateral|L|R|bilat)(?:-sided)? $", text[:start])
                start = side.start() if side else start
                no = _like("No " if text[start].isupper() and start == begin else "no ", text)
                rest = text[start:]
                return text[:start] + no + (rest if rest[:2].isupper() else rest[0].lower() + rest[1:])
            if gold.axes[0] == "absent":
                before = text[begin : gold.start]
                for old, new in _AFFIRM:
                    found = re.search(rf"(?i)\b{old.replace(' ', chr(92) + 's+')}\b", before)
                    if found and "," not in before[found.end() :]:
                        start = begin + found.start()
                        new = _like(_capital(new, found[0]), text)
                        return text[:start] + new + text[begin + found.end() :]
        if kind == "side" and gold.side in ("left", "right"):
            found = re.search(r"(?i)\b(left|right|L|R)((?:-sided)?\s)$", text[: gold.start])
            if found:
                old = found[1]
                new = {"left": "right", "right": "left", "l": "r", "r": "l"}[old.lower()]
                new = new.upper() if old.isupper() else _capital(new, old)
                return text[: found.start(1)] + new + text[found.end(1) :]
        if kind == "finding_dropped" and gold.kind == "problem" and alone:
            inside = [other for other in item.mentions if begin <= other.start < end]
            if len(inside) == 1 and gold.axes[3] == "patient" and gold.axes[2] == "actual":
                left = text[:begin] + text[end:].lstrip(" ")
                if left.strip():
                    return left
    if kind == "number":
        return _renumbered(item, random)
    return None


def _renumbered(item: Text, random: Random) -> str | None:
    """Change a dose, a laboratory value or vital sign, or a duration."""
    text = item.text
    places = []
    for gold in item.mentions:
        found = re.compile(r"\s(\d+(?:\.\d+)?)\s?(?:mg|mcg|g|units|mL|puffs|mEq|%|gtt|drops)", re.IGNORECASE).match(
            text, gold.end
        )
        if gold.kind == "drug" and found:
            places.append(found.span(1))
    places += [
        found.span(1)
        for found in re.finditer(
            r"(?i)(?:WBC|Hgb|Na|K|Cr|creat|creatinine|glucose|plt|HR|pulse|RR)[ :-]+(\d+(?:\.\d+)?)", text
        )
    ]
    places += [found.span(1) for found in re.finditer(r"(?i)\b(\d+) days\b", text)]
    places = [(a, b) for a, b in places if float(text[a:b])]
    if not places:
        return None
    start, end = places[random.randrange(len(places))]
    old = text[start:end]
    decimals = len(old.partition(".")[2])
    new = f"{float(old) * random.choice((10, 2, 3)):.{decimals}f}"
    return text[:start] + new + text[end:]


def _added(item: Text, content: Content, random: Random) -> str | None:
    keys = [k for k, e in content.entities.items() if e.label == "problem" and k not in item.keys]
    entity = content.entities[random.choice(keys)]
    phrase = random.choice((*entity.names, *entity.abbreviations))
    category = random.choice(("img_pos", "exam_pos", "neg_one", "symptoms", "img_neg"))
    templates = [t for t in content.idioms[category] if set(t[1::2]) <= {"f", "also", "either", "He", "he"}]
    template = random.choice(templates)
    words = {"f": phrase, "also": phrase, "either": phrase, "He": "She", "he": "she"}
    sentence = "".join(words[piece] if place % 2 else piece for place, piece in enumerate(template))
    sentence = _like(sentence[0].upper() + sentence[1:], item.text)
    ends = [found.end() for found in re.finditer(r"(?<=[a-z])\.(?=\s|$)", item.text)] or [len(item.text)]
    at = random.choice(ends)
    return item.text[:at] + " " + sentence + item.text[at:]


# -- harmless rewording ----------------------------------------------------------------------------------------------


def reword(item: Text, kind: str, content: Content, random: Random) -> str | None:
    """The text in other words or another layout, or None where this kind does not apply."""
    text = item.text
    if kind == "identical":
        return text
    if kind == "case":
        return random.choice((text.lower(), text.upper()))
    if kind == "naming":
        return _renamed(item, content, random)
    if kind == "template":
        return _retold(item, content, random)
    if kind == "headers":
        return _reheaded(item, random)
    if kind == "wrapping":
        return _rewrapped(text, random.choice((50, 64, 90, 1000)))
    if kind in ("sentence_order", "bullets"):
        if item.where == "note" or re.search(r"(?m)^\s*(?:[-*•]|\d+\.)\s", text):
            lines = text.split("\n")
            marks = [re.match(r"\s*(?:[-*•]|\d+\.)\s", line) for line in lines]
            if item.where == "note" or not all(marks):
                return None
            bodies = [line[mark.end() :] for line, mark in zip(lines, marks, strict=True) if mark]
        else:
            bodies = [part for part in re.split(r"(?<=[a-zA-Z)]\.)\s+|\n\n", text) if part.strip()]
            bodies = [" ".join(body.split("\n")) for body in bodies]
        if kind == "sentence_order":
            random.shuffle(bodies)
            return (
                " ".join(bodies) if all(body.endswith(".") for body in bodies) else "\n".join(f"- {b}" for b in bodies)
            )
        return "\n".join(f"{random.choice('-*')} {body}" for body in bodies)
    raise KeyError(kind)


def _rewrapped(text: str, width: int) -> str:
    """Join the lines that were broken for width, and break at another one."""
    joined: list[str] = []
    for line in text.split("\n"):
        new = not line.strip() or re.match(r"\s*(?:[-*•=]|\d+\.)", line) or re.match(r"[^.]{2,40}(?::|$)", line)
        previous = joined[-1] if joined else ""
        if not new and len(previous.rpartition("\n")[2]) > 45 and previous[-1] not in ":=":
            joined[-1] = f"{previous} {line}"
        else:
            joined.append(line)
    lines = []
    for line in joined:
        while len(line) > width and (cut := line.rfind(" ", 1, width + 1)) > 8:
            lines.append(line[:cut])
            line = line[cut + 1 :]
        lines.append(line)
    return "\n".join(lines)


def _renamed(item: Text, content: Content, random: Random) -> str | None:
    text, changed = item.text, False
    for gold in sorted(item.mentions, key=lambda g: -g.start):
        entity = content.entities[gold.key]
        names = (*entity.names, *entity.abbreviations)
        old = text[gold.start : gold.end]
        if old.lower() not in {name.lower() for name in names}:
            continue  # a lay phrase, or one with a slip of the pen
        new = random.choice(names)
        if old.islower() and new != old and text[:40].islower():
            new = new.lower()
        elif text[:200].isupper():
            new = new.upper()
        elif old[:1].isupper() and not old[1:2].isupper():
            new = _capital(new, old)
        changed = changed or new.lower() != old.lower()
        text = text[: gold.start] + new + text[gold.end :]
    return text if changed else None


_SAYS = {
    "img_pos": "present", "img_neg": "absent", "img_hedge": "uncertain", "symptom": "present", "symptoms": "present",
    "neg_list": "absent", "neg_one": "absent", "exam_pos": "present", "exam_neg": "absent", "resolved": "historical",
    "persist": "present", "hypothetical": "hypothetical", "nurse_pos": "present", "nurse_neg": "absent",
    "nurse_warn": "hypothetical", "hedge": "uncertain", "start": "future", "continue": "present", "treated": "present",
    "order": "future", "done": "present", "nurse_treated": "present",
}  # fmt: skip
"""What the templates of a category say of what fills them."""


def _retold(item: Text, content: Content, random: Random) -> str | None:
    text, changed = item.text, False
    for gold in sorted(item.mentions, key=lambda g: -g.start):
        begin, end = _sentence(text, gold.start, gold.end)
        if sum(begin <= other.start < end for other in item.mentions) != 1:
            continue
        bullet = re.match(r"\s*(?:[-*•]|\d+\.)?\s*", text[begin:end])
        begin += bullet.end() if bullet else 0
        sentence = " ".join(text[begin:end].split())
        name = " ".join(text[gold.start : gold.end].split())
        for category in random.sample(sorted(_SAYS), len(_SAYS)):
            if _SAYS[category] not in gold.axes:
                continue
            found = _instance(sentence, name, gold.kind, content.idioms[category])
            if found is None:
                continue
            filler, pronoun = found
            usable = [t for t in content.idioms[category] if set(t[1::2]) <= _SLOTS | {"He", "he"}]
            template = random.choice(usable)
            words = {"He": pronoun or "She", "he": (pronoun or "She").lower()}
            new = "".join(words.get(p, filler) if k % 2 else p for k, p in enumerate(template))
            new = _like(new[0].upper() + new[1:], text)
            text = text[:begin] + new + text[end:]
            changed = changed or new != sentence
            break
    return text if changed else None


_SLOTS = frozenset(("f", "also", "either", "d", "p"))


def _instance(sentence: str, name: str, kind: str, templates: tuple[tuple[str, ...], ...]) -> tuple[str, str] | None:
    """What fills the one slot of the template that a sentence was written with: the name, its side or its dose."""
    filled = rf"(?P<f>(?:(?:left|right|bilateral|bilat|L|R)(?:-sided)? )?{re.escape(name)}"
    filled += r"(?: \d[\w./ -]*?)?)" if kind == "drug" else ")"
    for template in templates:
        slots = template[1::2]
        if not set(slots) <= _SLOTS | {"He", "he"} or sum(s in _SLOTS for s in slots) != 1:
            continue
        pattern = ""
        for place, piece in enumerate(template):
            if place % 2 == 0:
                pattern += re.escape(piece)
            elif piece in ("He", "he"):
                pattern += "(?P<He>he|she)" if "(?P<He>" not in pattern else "(?:he|she)"
            else:
                pattern += filled
        found = re.fullmatch(pattern, sentence, re.IGNORECASE)
        if found:
            filler = found["f"]
            if not filler[:2].isupper():
                filler = filler[0].lower() + filler[1:]
            return filler, found.groupdict().get("He") or ""
    return None


_HEAD = re.compile(r"(?m)^(?:\d+\. )?(?:== |\*\*)?([A-Z][A-Za-z/& ]{2,40}?)(?:: ?| ==| - |\*\*|)$")


def _reheaded(item: Text, random: Random) -> str | None:
    heads = list(_HEAD.finditer(item.text))
    heads = [h for h in heads if h[0].strip() != h[1].strip() or h[1].isupper()]
    if item.where != "note" or len(heads) < 2:
        return None
    style = random.choice(("{}:", "== {} ==", "**{}**", "{}"))
    text = item.text
    for head in reversed(heads):
        name = head[1].title() if style != "{}" else head[1].upper()
        text = text[: head.start()] + style.format(name) + text[head.end() :]
    return text if text != item.text else None
