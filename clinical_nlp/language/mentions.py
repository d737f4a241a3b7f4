"""From a note to its mentions: sections, sentences, dictionary, an NER model's spans, assertion."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from clinical_nlp.language.assertion import assert_spans
from clinical_nlp.language.measurements import find_measurements
from clinical_nlp.language.sections import Section, find_sections
from clinical_nlp.language.sentences import find_sentences
from clinical_nlp.language.terminology import Match, Matcher, load_terminology
from clinical_nlp.notes.schema import Assertion

PHENOTYPE = "phenotype"
"""The label of a mention that the dictionary alone found."""


ExtraSpan = tuple[int, int, str, float] | tuple[int, int, str, float, str | None]
"""(start, end, label, score) of an NER model, and perhaps the id of the concept that a linker links it to."""


@dataclass(frozen=True, slots=True)
class Mention:
    """A concept or entity at [start, end) of a note. `section` is None where the note has no header before it.

    `lane` says who found it: dictionary, model, both, or measurement; `concept_id` is None where only the
    model did and linked it to none.
    `sentence` is the sentence in which it begins.
    """

    start: int
    end: int
    text: str
    concept_id: str | None
    label: str
    assertion: Assertion
    section: str | None
    score: float
    lane: str
    sentence: tuple[int, int]


@lru_cache(maxsize=4)
def _matcher(name: str) -> Matcher:
    return Matcher(load_terminology(name))


class Annotator:
    """Finds what a note mentions and what it says about it. Pickles as its arguments.

    Parameters
    ----------
    terminology : `hpo`, `hpo_wide`, `icd10cm`, or a path to an .obo, .json or .csv file.
    measurements : also read values (`Na 128`, `LVEF 25 %`) as HPO concepts; see `clinical_nlp.language.measurements`.
    """

    def __init__(self, terminology: str | Path = "hpo", *, measurements: bool = False) -> None:
        self._name = str(terminology)
        self._measurements = measurements
        self._matcher = _matcher(self._name)
        self.terminology = self._matcher.terminology

    def __reduce__(self) -> tuple[Callable[..., Annotator], tuple[str, bool]]:
        return _annotator, (self._name, self._measurements)

    def match(self, text: str) -> list[Match]:
        """Return the dictionary's matches alone."""
        return self._matcher.match(text)

    def annotate(
        self,
        text: str,
        extra_spans: Sequence[ExtraSpan] = (),
        *,
        age_years: float | None = None,
        sex: str | None = None,
    ) -> list[Mention]:
        """Return the mentions of `text`, sorted by place.

        Parameters
        ----------
        text : the note, unchanged.
        extra_spans : (start, end, label, score) from an NER model. One that equals a dictionary match becomes one
            mention of both lanes, with the model's label and the higher score; another is linked to a concept only
            when its text as a whole is a name of one, or to the concept that stands fifth. What the dictionary found
            inside one that is linked to something more specific is left out. White space at its edges is left out.
        age_years : of the patient when the note was written, for measured values; the note's own word otherwise.
        sex : `F` or `M`, for measured values.

        Raises
        ------
        ValueError : an extra span is empty or outside the text.
        """
        matches = self._matcher.match(text)
        measured = []
        if self._measurements:
            found_values = find_measurements(text, self.terminology, age_years=age_years, sex=sex)
            measured = [(m.start, m.end, m.concept_id) for m in found_values if m.concept_id is not None]
        if not matches and not extra_spans and not measured:
            return []
        sections = find_sections(text)
        starts = [section.start for section in sections]
        # The header `Allergies` is no allergy; a heading of its own (`HYPERTENSION:`) has no category and may be one.
        matches = [m for m in matches if not _in_header(sections[bisect_right(starts, m.start) - 1], m.start, m.end)]
        extra_spans = [
            span
            for span in extra_spans
            if len(span) == 4 or not _in_header(sections[bisect_right(starts, span[0]) - 1], span[0], span[1])
        ]
        found = merge_spans(text, matches, extra_spans, self._matcher)
        if measured:
            found = sorted(
                found
                + [(start, end, concept_id, PHENOTYPE, 0.9, "measurement") for start, end, concept_id in measured],
                key=lambda f: (f[0], -f[1], f[2] or ""),
            )
        sentences = find_sentences(text)
        begins = [sentence[0] for sentence in sentences]
        asserted = assert_spans(text, [(f[0], f[1]) for f in found], sections=sections, sentences=sentences)
        mentions = []
        for (start, end, concept_id, label, score, lane), said in zip(found, asserted, strict=True):
            if lane in ("dictionary", "both"):
                said = _without_its_name(said, text, start)
            section = sections[bisect_right(starts, start) - 1]
            category = section.category if section.named else None
            sentence = sentences[bisect_right(begins, start) - 1]
            mentions.append(
                Mention(start, end, text[start:end], concept_id, label, said, category, score, lane, sentence)
            )
        return mentions


def _annotator(name: str, measurements: bool) -> Annotator:
    return Annotator(name, measurements=measurements)


def _without_its_name(said: Assertion, text: str, start: int) -> Assertion:
    """Return the assertion without a denial that is part of the name: `no appetite` is there."""
    if said.presence != "absent" or text[start : start + 3].lower() != "no ":
        return said
    cues = tuple(cue for cue in said.cues if not cue[1] <= start < cue[2])
    return said if cues == said.cues else replace(said, presence="present", cues=cues)


def _in_header(section: Section, start: int, end: int) -> bool:
    return section.category != "other" and section.header_start <= start and end <= section.header_end


def merge_spans(
    text: str,
    matches: Sequence[Match],
    extra_spans: Sequence[ExtraSpan],
    matcher: Matcher,
) -> list[tuple[int, int, str | None, str, float, str]]:
    """Join the two lanes into sorted (start, end, concept id, label, score, lane); equal input is listed once."""
    found: dict[tuple[int, int, str | None], tuple[str, float, str]] = {}
    by_place: dict[tuple[int, int], list[tuple[int, int, str | None]]] = {}
    for match in matches:
        key: tuple[int, int, str | None] = (match.start, match.end, match.concept_id)
        found[key] = (PHENOTYPE, match.score, "dictionary")
        by_place.setdefault(key[:2], []).append(key)
    for start, end, label, score, *rest in sorted(extra_spans, key=lambda span: span[:4]):
        if not 0 <= start < end <= len(text):
            msg = f"span ({start}, {end}) of the model is empty or outside the text of length {len(text)}"
            raise ValueError(msg)
        while start < end and text[start].isspace():
            start += 1
        while end > start and text[end - 1].isspace():
            end -= 1
        if start == end:  # nothing but white space
            continue
        same = by_place.get((start, end), [])
        for key in same:
            found[key] = (label, max(score, found[key][1]), "both")
        if not same:
            named = matcher.exact(text[start:end])
            concept_id = named or next(iter(rest), None)
            if concept_id is not None and named is None:
                above = matcher.terminology.ancestors(concept_id) | {concept_id}
                for key in [k for k in found if start <= k[0] and k[1] <= end and k[2] in above]:
                    del found[key]
            previous = found.get((start, end, concept_id))
            if previous is None or previous[1] < score:
                found[start, end, concept_id] = (label, score, "both" if named else "model")
    return [(*key, *found[key]) for key in sorted(found, key=lambda k: (k[0], -k[1], k[2] or ""))]
