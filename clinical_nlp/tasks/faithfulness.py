"""Whether a generated text says what its reference and its source say: facts lost, added, turned round or altered.

Both texts are read with the package's own rules (`clinical_nlp.language.facts`). Mentions that stand in the same words
in both texts are set against each other first, so that one changed mention among many is seen; what remains is compared
by concept. A clause that no vocabulary knows counts as new when its words are, so that harmless rewording stays free.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from clinical_nlp.language.facts import (
    Fact,
    abbreviations_of,
    broader,
    initials_of,
    is_clinical,
    is_plain,
    names_of,
    read_facts,
    readable,
    tokens_of,
    values_in,
)
from clinical_nlp.language.sentences import find_sentences
from clinical_nlp.language.terminology.normalization import FREE
from clinical_nlp.runs import Estimate
from clinical_nlp.statistics.intervals import by_patient, patient_bootstrap

COUNTS = (
    "matched", "generated", "reference", "missing", "extra", "unsupported", "checked", "flipped", "asserted",
    "flipped_source", "asserted_source", "numbers_wrong", "numbers_compared", "numbers_unsupported", "numbers_checked",
    "sides_wrong", "sides_compared", "pairs", "pairs_wrong",
)  # fmt: skip
"""Columns of `FactComparison.counts`, one row a pair; sums over pairs make every score."""

ERRORS = ("flipped", "numbers", "sides", "added", "dropped", "invented")
"""Kinds of error that a comparison can show."""

_OPPOSITE = frozenset((("affirmed", "denied"), ("denied", "affirmed"), ("affirmed", "over"), ("over", "affirmed")))
_NEW = 1.0
_NEW_ALONE = 0.5
_NEW_ATTACHED = 2.0


@dataclass(frozen=True, slots=True)
class FactComparison:
    """What differs between a generated text, its reference and its source.

    `matched`, `generated` and `reference` count distinct facts, numbers apart. A pair in `flipped`, `flipped_source`,
    `numbers` and `sides` holds the generated fact first.
    """

    matched: int = 0
    generated: int = 0
    reference: int = 0
    missing: tuple[Fact, ...] = ()
    extra: tuple[Fact, ...] = ()
    unsupported: tuple[Fact, ...] = ()
    flipped: tuple[tuple[Fact, Fact], ...] = ()
    flipped_source: tuple[tuple[Fact, Fact], ...] = ()
    numbers: tuple[tuple[Fact, Fact], ...] = ()
    sides: tuple[tuple[Fact, Fact], ...] = ()
    compared: dict[str, int] = field(default_factory=dict)

    @property
    def errors(self) -> tuple[str, ...]:
        """The kinds of error in the pair, as in `ERRORS`; empty where nothing is wrong."""
        shown = {
            "flipped": self.flipped or self.flipped_source, "numbers": self.numbers, "sides": self.sides,
            "added": self.extra, "dropped": self.missing, "invented": self.unsupported,
        }  # fmt: skip
        return tuple(kind for kind in ERRORS if shown[kind])

    def counts(self) -> np.ndarray:
        """Return the counts of this pair, (len(COUNTS),) float64."""
        unsupported = sum(fact.kind != "number" for fact in self.unsupported)
        own = {
            "matched": self.matched, "generated": self.generated, "reference": self.reference,
            "missing": len(self.missing), "extra": len(self.extra), "unsupported": unsupported,
            "flipped": len(self.flipped), "flipped_source": len(self.flipped_source),
            "numbers_wrong": len(self.numbers), "numbers_unsupported": len(self.unsupported) - unsupported,
            "sides_wrong": len(self.sides), "pairs": 1, "pairs_wrong": int(bool(self.errors)),
        }  # fmt: skip
        return np.array([own.get(name, self.compared.get(name, 0)) for name in COUNTS], dtype=np.float64)


# -- a text as it is compared ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Said:
    """A fact with the sentence it stands in, and what it says about the patient."""

    fact: Fact
    sentence: int
    state: str  # affirmed, denied or over
    whose: str  # patient, other, or open: what may come
    stems: frozenset[str]
    attached: bool = False  # a phrase with nothing but a space between it and a concept


@dataclass(frozen=True, slots=True)
class _Text:
    said: tuple[_Said, ...]
    numbers: tuple[_Said, ...]
    spans: tuple[tuple[int, int], ...]  # of each sentence
    keys: tuple[tuple[str, ...], ...]  # the words of each sentence
    words: tuple[frozenset[str], ...]  # the stems of each sentence
    stems: tuple[frozenset[str], ...]  # with those of the other names of its concepts
    letters: tuple[frozenset[str], ...]  # short words of each sentence that are no concept and no plain word
    read: frozenset[str]  # concepts as they are written
    all_stems: frozenset[str]
    values: frozenset[float]


@lru_cache(maxsize=16)
def _read(text: str) -> _Text:
    written, text = text, readable(text)
    sentences = find_sentences(text)
    starts = [start for start, _ in sentences]
    words: list[list[str]] = [[] for _ in sentences]
    stems: list[set[str]] = [set() for _ in sentences]
    letters: list[set[str]] = [set() for _ in sentences]
    facts = read_facts(written)
    concepts = [fact for fact in facts if fact.kind not in ("phrase", "number")]
    starts_of, ends_of = [fact.start for fact in concepts], [fact.end for fact in concepts]
    for token in tokens_of(text):
        at = bisect_right(starts, token.start) - 1
        if at >= 0 and token.stem:
            if not words[at] and token.text.isdigit() and text[token.end : token.end + 1] in (".", ")"):
                continue  # the number of a list item
            joined = token.text in ("l", "r") and _JOINED.match(text, token.end) is not None
            words[at].append(token.text + "-" * joined)
            stems[at].add(token.stem)
            before = bisect_right(starts_of, token.start) - 1
            if 1 < len(token.text) < 6 and token.text.isalpha() and not is_plain(token.text) and not (
                before >= 0 and token.start < ends_of[before]
            ):  # fmt: skip
                letters[at].add(token.text)
    plain = tuple(frozenset(found) for found in stems)
    said, numbers = [], []
    for fact in facts:
        at = max(0, bisect_right(starts, fact.start) - 1)
        if fact.kind == "number":
            numbers.append(_Said(fact, at, "affirmed", "patient", frozenset()))
            continue
        state = "over" if fact.resolved else "denied" if fact.presence == "absent" else "affirmed"
        whose = "patient" if fact.experiencer == "patient" else "other"
        if fact.modality != "actual" or (fact.kind == "finding" and fact.temporality == "future"):
            whose = "open"
        if sentences and text[sentences[at][1] - 1] == "?":  # asked, not said
            whose = "open"
        if (
            fact.kind == "finding"
            and state == "affirmed"
            and sentences
            and _carried_by(text, sentences[at], fact.start)
        ):
            whose = "open"
        own = _content(fact)
        attached = False
        if fact.kind == "phrase":
            after = bisect_right(starts_of, fact.start)
            attached = after < len(concepts) and not _BREAK.search(text, fact.end, starts_of[after])
            attached = attached or (after > 0 and not _BREAK.search(text, ends_of[after - 1], fact.start))
        said.append(_Said(fact, at, state, whose, own, attached))
        if fact.kind != "phrase":
            stems[at] |= names_of(fact.name)
    sets = tuple(frozenset(found) for found in stems)
    return _Text(
        said=tuple(said), numbers=tuple(numbers), spans=tuple(sentences), keys=tuple(map(tuple, words)), words=plain,
        stems=sets, letters=tuple(map(frozenset, letters)), read=frozenset(fact.label.lower() for fact in concepts),
        all_stems=frozenset().union(*sets), values=frozenset(values_in(text)),
    )  # fmt: skip


_JOINED = re.compile(r"-(?!sided)", re.IGNORECASE)
_CARRIER = re.compile(r"(?<!\w)(?:he|she|they|patient|pt|client|resident)\s+([^\W\d_]+(?:s|ed))\s", re.IGNORECASE)


def _carried_by(text: str, sentence: tuple[int, int], start: int) -> bool:
    """Whether a verb that is not known carries what stands at `start`: `he disclaims fever` affirms nothing."""
    for found in _CARRIER.finditer(text, sentence[0], start):
        verb = found[1].lower()
        if not is_plain(verb) and not any(is_clinical(token.stem) for token in tokens_of(verb)):
            return True
    return False


_BREAK = re.compile(r"[,;:.()|]|\b(?:and|or|but|nor)\b", re.IGNORECASE)


def _content(fact: Fact) -> frozenset[str]:
    if fact.kind == "phrase":
        return frozenset(fact.name.split())
    return frozenset(token.stem for token in tokens_of(fact.label) if token.stem and not is_plain(token.text))


def _weight(stems: Iterable[str], unknown: float = 0.5) -> float:
    return sum(1.0 if is_clinical(stem) else unknown for stem in stems)


def _opposite(one: _Said, other: _Said) -> bool:
    if "open" in (one.whose, other.whose):
        return False
    return (one.state, other.state) in _OPPOSITE or one.whose != other.whose


def _alike(one: _Said, other: _Said) -> bool:
    return one.whose == other.whose and (one.state, other.state) not in _OPPOSITE


# -- comparing -------------------------------------------------------------------------------------------------------


def compare_facts(generated: str, reference: str | None = None, *, source: str | None = None) -> FactComparison:
    """Compare the facts of a generated text with those of its reference, of its source, or of both.

    Parameters
    ----------
    generated : the text to judge.
    reference : what an expert wrote; without it `missing`, `extra`, `flipped`, `numbers` and `sides` stay empty.
    source : what the text was generated from; without it `unsupported` and `flipped_source` stay empty.

    Returns
    -------
    FactComparison. A fact that a text repeats counts once.
    """
    made = _read(generated)
    result: dict[str, object] = {}
    compared: dict[str, int] = {}
    if reference is not None:
        result.update(_against_reference(made, _read(reference), compared))
    if source is not None:
        result.update(_against_source(made, _read(source), compared))
    if reference is None:
        result["generated"] = len(_distinct(made))
    return FactComparison(**result, compared=compared)  # type: ignore[arg-type]


def _distinct(text: _Text) -> list[_Said]:
    """Facts that count: one a concept and state, phrases only with a clinical word in them."""
    seen: dict[tuple[str, str, str], _Said] = {}
    for said in text.said:
        if said.fact.kind != "phrase" or any(is_clinical(stem) for stem in said.stems):
            seen.setdefault((said.fact.name, said.state, said.whose), said)
    return list(seen.values())


def _against_reference(made: _Text, wanted: _Text, compared: dict[str, int]) -> dict[str, object]:
    rest_made, rest_wanted = _without_shared(made, wanted)
    shared = set(made.keys) & set(wanted.keys)
    flipped: list[tuple[Fact, Fact]] = []
    sides: list[tuple[Fact, Fact]] = []
    new: list[_Said] = []
    lost: list[_Said] = []
    again_made: list[_Said] = []
    again_wanted: list[_Said] = []
    names = dict.fromkeys(s.fact.name for s in (*rest_made, *rest_wanted) if s.fact.kind != "phrase")
    left: dict[str, tuple[list[_Said], list[_Said]]] = {}
    for name in names:
        own = [s for s in rest_made if s.fact.name == name]
        theirs = [s for s in rest_wanted if s.fact.name == name]
        left[name] = _pair_off(own, theirs, sides)
    _pair_near(left)
    for own, theirs in left.values():
        for said in tuple(own):
            turned = next((other for other in theirs if _opposite(said, other)), None)
            if turned is not None:
                flipped.append((said.fact, turned.fact))
                own.remove(said)
                theirs.remove(turned)
        if own and theirs:  # the same concept, neither alike nor opposite: what may come, against what is
            own, theirs = own[len(theirs) :], theirs[len(own) :]
        again_made += _unpaired(own, wanted, flipped, new, swap=False)
        again_wanted += _unpaired(theirs, made, flipped, lost, swap=True)
    _relate(new, lost, again_made, again_wanted, flipped)
    new = [s for s in new if made.keys[s.sentence] not in shared and not _worded(s, wanted, shared)]
    lost = [s for s in lost if wanted.keys[s.sentence] not in shared and not _worded(s, made, shared)]
    new, explained = _without_initials(new, wanted, shared)
    lost, explained_made = _without_initials(lost, made, shared)
    more, less = _phrases(rest_made, rest_wanted, made, wanted, flipped, sides)
    more = [said for said in more if said.fact.label.lower() not in explained_made]
    less = [said for said in less if said.fact.label.lower() not in explained]
    _reworked(made, wanted, flipped, sides)
    numbers, numbers_new, numbers_lost, numbers_compared = _numbers(made, wanted)
    generated, reference = _distinct(made), _distinct(wanted)
    wrong = {id(pair[0]) for pair in (*flipped, *sides)} | {id(pair[1]) for pair in (*flipped, *sides)}
    matched = _matched(generated, reference, wrong)
    compared["asserted"] = compared.get("asserted", 0) + matched + len(flipped)
    compared["sides_compared"] = max(_sides_compared(made, wanted), len(sides))  # a wrong one was compared
    compared["numbers_compared"] = numbers_compared
    return {
        "matched": matched, "generated": len(generated), "reference": len(reference), "flipped": tuple(flipped),
        "extra": tuple(_once(said.fact for said in (*new, *more, *numbers_new))),
        "missing": tuple(_once(said.fact for said in (*lost, *less, *numbers_lost))),
        "sides": tuple(sides), "numbers": tuple(numbers),
    }  # fmt: skip


def _once(facts: Iterable[Fact]) -> list[Fact]:
    seen: dict[tuple[object, ...], Fact] = {}
    for fact in facts:
        seen.setdefault((fact.kind, fact.name, fact.presence, fact.value, fact.unit), fact)
    return list(seen.values())


def _without_shared(made: _Text, wanted: _Text) -> tuple[list[_Said], list[_Said]]:
    """Leave out mentions that stand in the same sentence in both texts and say the same there."""

    def key(text: _Text, said: _Said) -> tuple[object, ...]:
        return (text.keys[said.sentence], said.fact.name, said.state, said.whose, said.fact.side)

    count = Counter(key(made, said) for said in made.said) & Counter(key(wanted, said) for said in wanted.said)
    rests = []
    for text in (made, wanted):
        left = count.copy()
        rest = []
        for said in text.said:
            k = key(text, said)
            if left[k] > 0:
                left[k] -= 1
            else:
                rest.append(said)
        rests.append(rest)
    return rests[0], rests[1]


def _pair_off(own: list[_Said], theirs: list[_Said], sides: list[tuple[Fact, Fact]]) -> tuple[list[_Said], list[_Said]]:
    """Pair mentions of one concept that say the same, those of one side first; note pairs whose sides differ."""
    own, theirs = list(own), list(theirs)
    for strict in (True, False):
        for said in tuple(own):
            fits = (o for o in theirs if _alike(said, o) and (not strict or o.fact.side == said.fact.side))
            other = next(fits, None)
            if other is None:
                continue
            own.remove(said)
            theirs.remove(other)
            if said.fact.side != other.fact.side and said.fact.side and other.fact.side:
                sides.append((said.fact, other.fact))
    return own, theirs


def _pair_near(left: dict[str, tuple[list[_Said], list[_Said]]]) -> None:
    """Pair what is left of a concept with what is left of a broader or narrower one, where both say the same of it."""
    for name in left:
        for said in tuple(left[name][0]):
            near = (
                left[other][1] for other in left if other != name and (other in broader(name) or name in broader(other))
            )
            found = next(((pool, other) for pool in near for other in pool if _alike(said, other)), None)
            if found is not None:
                left[name][0].remove(said)
                found[0].remove(found[1])


def _unpaired(
    rest: list[_Said], text: _Text, flipped: list[tuple[Fact, Fact]], new: list[_Said], *, swap: bool
) -> list[_Said]:
    """Sort mentions without a counterpart: said otherwise elsewhere, not said at all, or (returned) said again."""
    again = []
    for said in rest:
        others = [other for other in text.said if other.fact.name == said.fact.name]
        if any(_alike(said, other) for other in others):
            again.append(said)
            continue
        turned = next((other for other in others if _opposite(said, other)), None)
        if turned is None:
            new.append(said)
            continue
        pair = (turned.fact, said.fact) if swap else (said.fact, turned.fact)
        if not any(known[0].name == pair[0].name for known in flipped):
            flipped.append(pair)
    return again


def _relate(
    new: list[_Said], lost: list[_Said], again_made: list[_Said], again_wanted: list[_Said],
    flipped: list[tuple[Fact, Fact]],
) -> None:  # fmt: skip
    """Take out pairs of a concept and a broader one; what they say may be turned round.

    A mention that its text repeats elsewhere is spare: it may be what the other text names more or less precisely.
    """
    for said in tuple(new):
        for pool in (lost, again_wanted):
            other = next((o for o in pool if _near(said, o) and (_alike(said, o) or _opposite(said, o))), None)
            if other is not None:
                if _opposite(said, other):
                    flipped.append((said.fact, other.fact))
                new.remove(said)
                pool.remove(other)
                break
    for said in tuple(lost):
        other = next((o for o in again_made if _near(said, o) and _alike(said, o)), None)
        if other is not None:
            lost.remove(said)
            again_made.remove(other)


def _near(one: _Said, other: _Said) -> bool:
    return other.fact.name in broader(one.fact.name) or one.fact.name in broader(other.fact.name)


def _worded(said: _Said, text: _Text, shared: Collection[tuple[str, ...]] = ()) -> bool:
    """Whether one sentence of the other text, none of the `shared` ones, holds all words of a concept."""
    own = {token.stem for token in tokens_of(said.fact.label.lower()) if token.stem and token.text not in FREE}
    return bool(own) and any(own <= w for w, key in zip(text.words, text.keys, strict=True) if key not in shared)


def _without_initials(
    rest: list[_Said], text: _Text, shared: Collection[tuple[str, ...]]
) -> tuple[list[_Said], frozenset[str]]:
    """Leave out concepts whose initials stand in a changed sentence of the other text and are read as nothing there.

    An abbreviation of the tables may be a word that is not read as one without its capitals (`cap`).

    Returns
    -------
    The other concepts, and the initials that were found.
    """
    changed = [at for at, key in enumerate(text.keys) if key not in shared]
    letters = frozenset().union(*(text.letters[at] for at in changed))
    words = frozenset().union(*(text.keys[at] for at in changed)) - text.read
    found = [
        (letters & (initials_of(said.fact.name) | initials_of(said.fact.label)))
        | (words & abbreviations_of(said.fact.name))
        for said in rest
    ]
    return [said for said, own in zip(rest, found, strict=True) if not own], frozenset().union(*found)


def _phrases(
    rest_made: list[_Said], rest_wanted: list[_Said], made: _Text, wanted: _Text, flipped: list[tuple[Fact, Fact]],
    sides: list[tuple[Fact, Fact]],
) -> tuple[list[_Said], list[_Said]]:  # fmt: skip
    own = [said for said in rest_made if said.fact.kind == "phrase"]
    theirs = [said for said in rest_wanted if said.fact.kind == "phrase"]
    for said in tuple(own):
        best = max(theirs, key=lambda other: _overlap(said.stems, other.stems), default=None)
        if best is None or _overlap(said.stems, best.stems) < 0.5:
            continue
        if _opposite(said, best):
            if not _carried(said, made, best, wanted):
                flipped.append((said.fact, best.fact))
        elif said.fact.side and best.fact.side and said.fact.side != best.fact.side:
            sides.append((said.fact, best.fact))
        own.remove(said)
        theirs.remove(best)
    changed = [{s.sentence for s in rest} for rest in (rest_made, rest_wanted)]
    more = [said for said in own if _novel(said, wanted, made, changed[1])]
    less = [said for said in theirs if _novel(said, made, wanted, changed[0])]
    return more, less


def _carried(said: _Said, made: _Text, other: _Said, wanted: _Text) -> bool:
    """Whether a phrase stands with a concept that both texts assert alike: it is said of that, not by itself."""
    own = [s for s in made.said if s.sentence == said.sentence and s.fact.kind != "phrase"]
    theirs = [s for s in wanted.said if s.sentence == other.sentence and s.fact.kind != "phrase"]
    return any(a.fact.name == b.fact.name and _alike(a, b) for a in own for b in theirs)


_NEGATIONS = frozenset(("no", "denies", "denied", "deny", "denying", "without", "negative", "absent", "never"))
_AFFIRMATIONS = frozenset(
    ("reports", "reported", "report", "reporting", "with", "positive", "present", "has", "have", "is")
)
_SIDE_WORDS = {"left": "left", "right": "right", "l": "left", "r": "right", "lt": "left", "rt": "right",
               "bilateral": "bilateral", "bilat": "bilateral"}  # fmt: skip


def _reworked(made: _Text, wanted: _Text, flipped: list[tuple[Fact, Fact]], sides: list[tuple[Fact, Fact]]) -> None:
    """See sentences that are the same but for a negation or a side, whatever else could be read in them."""
    shared = Counter(made.keys) & Counter(wanted.keys)
    done = {pair[k].start for pair in (*flipped, *sides) for k in (0, 1)}
    by_rest: dict[tuple[str, ...], list[int]] = {}
    for at, key in enumerate(wanted.keys):
        if not shared[key]:
            by_rest.setdefault(_bare(key), []).append(at)
    for at, key in enumerate(made.keys):
        bare = _bare(key)
        if shared[key] or not bare or not by_rest.get(bare):
            continue
        other = by_rest[bare].pop(0)
        pair = (_whole(made, at, key), _whole(wanted, other, wanted.keys[other]))
        spans = [text.spans[place] for text, place in ((made, at), (wanted, other))]
        if any(start <= place < end for start, end in spans for place in done):
            continue
        theirs = wanted.keys[other]
        if any(word in _NEGATIONS for word in key) != any(word in _NEGATIONS for word in theirs):
            flipped.append(pair)
        elif [_SIDE_WORDS[w] for w in key if w in _SIDE_WORDS] != [_SIDE_WORDS[w] for w in theirs if w in _SIDE_WORDS]:
            sides.append(pair)


def _bare(key: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(w for w in key if w not in _NEGATIONS and w not in _AFFIRMATIONS and w not in _SIDE_WORDS)


def _whole(text: _Text, at: int, key: tuple[str, ...]) -> Fact:
    start, end = text.spans[at]
    presence = "absent" if any(word in _NEGATIONS for word in key) else "present"
    return Fact("phrase", " ".join(_bare(key)), " ".join(key), start, end, presence)


def _overlap(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other) if one or other else 0.0


def _novel(said: _Said, other: _Text, own: _Text, changed: set[int]) -> bool:
    """Whether a phrase says what the other text has no words for; a sentence of its own needs less to be new."""
    new = said.stems - other.all_stems
    names = {s.fact.name for s in own.said if s.sentence == said.sentence and s.fact.kind != "phrase"}
    carried = any(s.fact.name in names for s in other.said)
    if carried:  # words around a concept that both texts have: another way to say it, unless they name something
        return _weight(new, 0.0 if said.attached else 0.34) >= (_NEW_ATTACHED if said.attached else _NEW)
    weight = _weight(new)
    if weight >= _NEW:
        return True
    if weight < _NEW_ALONE:
        return False
    mine = own.stems[said.sentence]
    return not any(_telling(mine & other.stems[at]) for at in changed)


def _telling(stems: Iterable[str]) -> bool:
    return any(not is_plain(stem) and not stem.isdigit() for stem in stems)


# -- numbers and sides -----------------------------------------------------------------------------------------------


def _numbers(made: _Text, wanted: _Text) -> tuple[list[tuple[Fact, Fact]], list[_Said], list[_Said], int]:
    """Pair numbers by value, unit and what they belong to; those left over that belong to one thing differ."""
    own, theirs = list(made.numbers), list(wanted.numbers)
    compared = 0
    levels = (
        lambda a, b: a.value == b.value and a.unit == b.unit and a.name == b.name,
        lambda a, b: a.value == b.value and a.unit == b.unit,
        lambda a, b: a.value == b.value and (a.unit is None or b.unit is None),
    )
    for same in levels:
        for said in tuple(own):
            other = next((o for o in theirs if same(said.fact, o.fact)), None)
            if other is not None:
                own.remove(said)
                theirs.remove(other)
                compared += 1
    wrong: list[tuple[Fact, Fact]] = []
    for alike in (
        lambda a, b: a.name == b.name and a.unit == b.unit,
        lambda a, b: a.name == b.name and a.value == b.value,
        lambda a, b: a.unit == b.unit,
    ):
        for said in tuple(own):
            other = next((o for o in theirs if alike(said.fact, o.fact)), None)
            if other is not None:
                own.remove(said)
                theirs.remove(other)
                wrong.append((said.fact, other.fact))
                compared += 1
    known = {(s.fact.value, s.fact.unit) for s in wanted.numbers}
    given = {(s.fact.value, s.fact.unit) for s in made.numbers}
    own = [said for said in own if (said.fact.value, said.fact.unit) not in known]
    theirs = [said for said in theirs if (said.fact.value, said.fact.unit) not in given]
    return wrong, own, theirs, compared


def _sides_compared(made: _Text, wanted: _Text) -> int:
    known = {said.fact.name for said in wanted.said if said.fact.side}
    return len({said.fact.name for said in made.said if said.fact.side and said.fact.name in known})


def _matched(generated: Sequence[_Said], reference: Sequence[_Said], wrong: set[int]) -> int:
    """Count facts of the two texts that can be paired one to one."""
    left = [said for said in reference if id(said.fact) not in wrong]
    own = [said for said in generated if id(said.fact) not in wrong]
    matched = 0
    for same in (
        lambda a, b: a.fact.name == b.fact.name,
        lambda a, b: a.fact.name in broader(b.fact.name) or b.fact.name in broader(a.fact.name),
        lambda a, b: "phrase" in (a.fact.kind, b.fact.kind) and _overlap(a.stems, b.stems) >= 0.5,
    ):
        for said in tuple(own):
            other = next((o for o in left if same(said, o) and _alike(said, o)), None)
            if other is not None:
                own.remove(said)
                left.remove(other)
                matched += 1
    return matched


# -- against the source ----------------------------------------------------------------------------------------------


def _against_source(made: _Text, source: _Text, compared: dict[str, int]) -> dict[str, object]:
    by_name: dict[str, list[_Said]] = {}
    above: set[str] = set()
    for said in source.said:
        by_name.setdefault(said.fact.name, []).append(said)
        above |= broader(said.fact.name)
    unsupported: list[Fact] = []
    flipped: list[tuple[Fact, Fact]] = []
    facts = _distinct(made)
    asserted = 0
    for said in facts:
        known = by_name.get(said.fact.name)
        if known:
            asserted += 1
            if not any(_alike(said, other) for other in known):
                turned = next((other for other in known if _opposite(said, other)), None)
                if turned is not None:
                    flipped.append((said.fact, turned.fact))
        elif said.fact.kind == "phrase":
            if _weight(said.stems - source.all_stems) >= _NEW:
                unsupported.append(said.fact)
        elif said.fact.name not in above and not _worded(said, source):
            unsupported.append(said.fact)
    values = {said.fact.value for said in source.numbers} | source.values
    numbers = {(said.fact.value, said.fact.unit): said.fact for said in made.numbers}
    unsupported += [fact for (value, _), fact in numbers.items() if value not in values]
    compared["checked"], compared["asserted_source"] = len(facts), asserted
    compared["numbers_checked"] = len(numbers)
    return {"unsupported": tuple(unsupported), "flipped_source": tuple(flipped)}


# -- scores ----------------------------------------------------------------------------------------------------------

RATES = {
    "fact_precision": ("matched", "generated"),
    "fact_recall": ("matched", "reference"),
    "invention_rate": ("unsupported", "checked"),
    "flipped_rate": ("flipped", "asserted"),
    "flipped_source_rate": ("flipped_source", "asserted_source"),
    "number_error_rate": ("numbers_wrong", "numbers_compared"),
    "number_invention_rate": ("numbers_unsupported", "numbers_checked"),
    "side_error_rate": ("sides_wrong", "sides_compared"),
    "error_rate": ("pairs_wrong", "pairs"),
}
"""Scores that are one count over another; `fact_f1` comes from three."""
_REASONS = {
    "matched": "no facts", "generated": "the generated texts state no fact",
    "reference": "the references state no fact",
    "checked": "no generated fact was checked against a source", "asserted": "no concept is in both texts",
    "asserted_source": "no concept is in both generated text and source",
    "numbers_compared": "no number is in both texts", "numbers_checked": "no generated number was checked",
    "sides_compared": "no side is stated in both texts", "pairs": "no pairs",
}  # fmt: skip


def _ratio(over: str, under: str) -> Callable[[np.ndarray], np.ndarray]:
    top, bottom = COUNTS.index(over), COUNTS.index(under)
    return lambda counts: counts[..., top] / counts[..., bottom]


def _f1(counts: np.ndarray) -> np.ndarray:
    matched, generated, reference = (counts[..., COUNTS.index(name)] for name in ("matched", "generated", "reference"))
    return 2 * matched / (generated + reference)


_STATISTICS = {name: (_ratio(*columns), columns[1]) for name, columns in RATES.items()}
_STATISTICS["fact_f1"] = (_f1, "matched")


def scores_of(summed: np.ndarray) -> tuple[dict[str, float], dict[str, str]]:
    """Return the scores of counts that are summed over pairs, and the reason for each that is NaN.

    Parameters
    ----------
    summed : (len(COUNTS),) as `FactComparison.counts` gives them, added up.
    """
    with np.errstate(all="ignore"):
        scores = {name: float(statistic(summed)) for name, (statistic, _) in _STATISTICS.items()}
    reasons = {name: _REASONS[_STATISTICS[name][1]] for name, value in scores.items() if not math.isfinite(value)}
    return {name: math.nan if name in reasons else value for name, value in scores.items()}, reasons


def fact_scores(
    counts: np.ndarray, patients: Sequence[str], *, part: str, seed: int = 0, prefix: str = "test."
) -> dict[str, Estimate]:
    """Turn counts into scores with patient-bootstrap intervals.

    Parameters
    ----------
    counts : (n, len(COUNTS)), one row a pair, from `FactComparison.counts`.
    patients : the patient of each pair.
    part : what was scored.
    seed : of the resampling.
    prefix : put before each name.

    Returns
    -------
    dict of Estimate: fact_precision, fact_recall, fact_f1, invention_rate (unsupported over generated facts),
        flipped_rate and flipped_source_rate (over concepts that both texts assert), number_error_rate,
        number_invention_rate, side_error_rate, and error_rate (pairs with any error). NaN, with the reason in `note`,
        where there is nothing to count.
    """
    counts = np.asarray(counts, dtype=np.float64).reshape(-1, len(COUNTS))
    summed = by_patient(patients, counts)
    scores = {}
    for name, (statistic, under) in _STATISTICS.items():
        estimate = patient_bootstrap(summed, statistic, n_notes=len(counts), part=part, seed=seed)
        if math.isnan(estimate.value):
            estimate = Estimate(math.nan, math.nan, math.nan, estimate.n_patients, len(counts), part,
                                f"undefined: {_REASONS[under]}")  # fmt: skip
        scores[prefix + name] = estimate
    return scores
