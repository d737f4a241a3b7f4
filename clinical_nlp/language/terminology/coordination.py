"""Names that a conjunction has cut up: `hypoplastic and absent nails`, `short hands and feet`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from clinical_nlp.language.terminology.index import (
    ADJACENT,
    CONJUNCTION,
    COPULA,
    FREE_WORD,
    LIST,
    PASSED,
    WEAK_WORD,
    Index,
)

if TYPE_CHECKING:
    from clinical_nlp.language.terminology.matching import Reading

_REACH = 6
"""Words of the first and of the last conjunct that are looked at."""
_REPLACED = 2
"""Words that what is borrowed may stand away from the conjunction."""
_FARTHEST = 8
"""Conjuncts between the one that borrows and the one that lends."""
_LONGEST = 3
"""Words of a name that one conjunct may bring along."""


def coordinated(
    index: Index, reading: Reading, kept: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, int, int | None]]:
    """Yield (first word, last word, concept code, word that no longer stands alone or None) of such names.

    A conjunct may borrow the end of a later one (`renal, cardiac and skeletal anomalies`) or the beginning of an
    earlier one (`dysgenesis of the corpus callosum and vermis`), where only single words stand between the two. What
    is borrowed must complete a name in that name's own order; a word of a longer match is not taken out of it, and what
    names a concept by itself takes a beginning only across one `and` or `or` (`joint pain and swelling`). A name that
    only follows from others (`neck changes`) takes no end across a mere comma, and a beginning only before `of`.
    """
    owner = {word: span for span in kept for word in range(*span)}
    for chain in _chains(reading, owner):
        single = [stop - start == 1 for start, stop in chain]
        for number, (start, stop) in enumerate(chain):
            for other in range(number + 1, min(len(chain), number + _FARTHEST)):
                if (hit := _with_end(index, reading, owner, start, stop, *chain[other])) is not None:
                    yield *hit, None
                    break
                if not single[other]:
                    break
            held = owner.get(start)
            if held is not None and (held[1] - held[0] > 1 or len(chain) > 2 or reading.gaps[start] < CONJUNCTION):
                continue
            for other in range(number - 1, max(-1, number - _FARTHEST), -1):
                if (hit := _with_beginning(index, reading, *chain[other], start, stop)) is not None:
                    yield *hit, start if held is not None else None
                    break
                if not single[other]:
                    break


def _chains(reading: Reading, owner: Mapping[int, tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Return runs of conjuncts, each as [start, stop) of words; at least one gap of a run is more than a comma.

    Two adjectives may do with a comma: `short, broad thumbs`.
    """
    gaps, n = reading.gaps, len(reading.ids)
    joints = [k for k in range(1, n) if LIST <= gaps[k] <= CONJUNCTION]
    chains = []
    run: list[int] = []
    for position, joint in enumerate(joints):
        run.append(joint)
        following = joints[position + 1] if position + 1 < len(joints) else n + _REACH
        near = following - joint < _REACH and all(gaps[k] < WEAK_WORD for k in range(joint + 1, following))
        if near and not (gaps[joint] == CONJUNCTION and gaps[following] == LIST):  # `a and b, c` is two lists
            continue
        if any(gaps[k] == CONJUNCTION for k in run):
            begin, end = run[0] - 1, run[-1] + 1
            while begin > 0 and run[0] - begin < _REACH and gaps[begin] < WEAK_WORD:
                begin -= 1
            while end < n and end - run[-1] < _REACH and gaps[end] < WEAK_WORD:
                end += 1
            chains.append([*zip([begin, *run], [*run, end], strict=True)])
        elif len(run) == 1 and joint in owner and owner[joint][0] == joint and owner[joint][1] - joint > 1:
            begin = joint - 2 if joint > 1 and gaps[joint - 1] == ADJACENT else joint - 1
            if not any(word in owner for word in range(begin, joint)):
                chains.append([(begin, joint), (joint, owner[joint][1])])
        run = []
    return chains


def _with_end(
    index: Index,
    reading: Reading,
    owner: Mapping[int, tuple[int, int]],
    start: int,
    stop: int,
    other: int,
    end: int,
) -> tuple[int, int, int] | None:
    """Complete the last words before `stop` with words of the conjunct [other, end), all but its first."""
    ids = reading.ids
    for first in range(max(start, stop - _LONGEST), stop):
        held = owner.get(stop - 1)
        if held is not None and held[1] - held[0] > 1 and first >= held[0]:
            continue
        partners = index.partners[ids[first]]
        for head in range(other + 1, min(end, other + 1 + _REPLACED)):
            # `liver and spleen were enlarged`: what is said of the last of two nouns is said of the first too.
            said = reading.gaps[head] == COPULA and head == other + 1
            if (reading.gaps[head] > PASSED and not said) or ids[head - 1] in index.negations:
                break
            if ids[head] not in partners:
                continue
            for last in range(min(end, head + _LONGEST), head, -1):
                own, borrowed = ids[first:stop], ids[head:last]
                code = index.ordered((*borrowed, *own) if said else (*own, *borrowed))
                if code is not None and (
                    not index.follows(code) or any(reading.gaps[k] == CONJUNCTION for k in range(stop, other + 1))
                ):
                    return first, last - 1, code
    return None


def _with_beginning(
    index: Index,
    reading: Reading,
    other: int,
    end: int,
    start: int,
    stop: int,
) -> tuple[int, int, int] | None:
    """Complete the first words from `start` with words of the conjunct [other, end), all but its last."""
    ids = reading.ids
    phrase = any(reading.gaps[k] == FREE_WORD for k in range(other + 1, end))
    for last in range(min(stop, start + _LONGEST), start, -1):
        if last < stop and reading.gaps[last] == ADJACENT:  # the phrase goes on
            continue
        for first in range(max(other, end - _REACH), end - 1):
            if ids[start] not in index.partners[ids[first]]:
                continue
            for until in range(end - 1, max(first, end - 1 - _REPLACED), -1):
                words = [*ids[first:until], *ids[start:last]]
                code = index.ordered(words)
                if code is None and phrase:
                    code = index.bags.get(sum(index.values[word] for word in words), -1)
                if code is not None and code >= 0 and (phrase or not index.follows(code)):
                    return first, last - 1, code
    return None
