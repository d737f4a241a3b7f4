"""A draft set right by its reference, a sentence at a time: a preferred text that differs in facts alone."""

from __future__ import annotations

from bisect import bisect_right

from clinical_nlp.language.facts import Fact
from clinical_nlp.language.sentences import find_sentences
from clinical_nlp.tasks.faithfulness import compare_facts


def corrected(draft: str, reference: str, source: str) -> str:
    """Return a draft with its errors put right and the rest in its own words.

    A sentence with a flipped assertion, a wrong number or a wrong side becomes the sentence of the reference that holds
    the right one. A sentence with a fact that the reference does not have becomes one that the draft left out, or goes
    where none is left; what is still left out is added at the end.

    Returns
    -------
    The corrected text; the reference itself where the comparison still finds an error in what came out. Where a
    preference is learned from the two, it is then about facts and not about wording, which the model chose itself.
    """
    found = compare_facts(draft, reference, source=source)
    mine, theirs = find_sentences(draft), find_sentences(reference)
    if not mine or not theirs:
        return reference

    def at(fact: Fact, spans: list[tuple[int, int]]) -> int:
        return max(0, bisect_right(spans, (fact.start, len(draft) + len(reference))) - 1)

    swaps: dict[int, int | None] = {}
    for wrong, right in (*found.flipped, *found.numbers, *found.sides):
        swaps.setdefault(at(wrong, mine), at(right, theirs))
    used = set(swaps.values())
    missing = [place for place in dict.fromkeys(at(fact, theirs) for fact in found.missing) if place not in used]
    for fact in (*found.unsupported, *found.extra, *(pair[0] for pair in found.flipped_source)):
        if at(fact, mine) not in swaps:
            swaps[at(fact, mine)] = missing.pop(0) if missing else None
    text = ""
    position = 0
    for place, (start, end) in enumerate(mine):
        gap = draft[position:start] if text else ""
        position = end
        if place not in swaps:
            text += gap + draft[start:end]
        elif (other := swaps[place]) is not None:
            text += gap + _worded(reference, theirs, other)
    gap = draft[mine[0][1] : mine[1][0]] if len(mine) > 1 else "\n"
    for place in missing:
        text += (gap if text else "") + _worded(reference, theirs, place)
    checked = compare_facts(text, reference, source=source)
    return reference if checked.errors or not text.strip() else text


def _worded(text: str, sentences: list[tuple[int, int]], place: int) -> str:
    start, end = sentences[place]
    return text[start:end]
