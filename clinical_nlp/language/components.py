"""The language room as spaCy components, for anybody's pipeline.

`nlp.add_pipe("clinical_sections")`, `"clinical_sentences"`, `"clinical_phenotypes"` and `"clinical_assertion"` work on
any English pipeline, a blank one included, after importing this module. They read `doc.text` and never change it.

Extensions: `doc._.sections` (list of Section), `span._.section` (category or None), `span._.concept_id`,
`span._.match_score`, `span._.assertion` (Assertion).
"""

from __future__ import annotations

from bisect import bisect_right

from spacy.language import Language
from spacy.tokens import Doc, Span
from spacy.util import filter_spans

from clinical_nlp.language.assertion import assert_spans
from clinical_nlp.language.mentions import PHENOTYPE, Annotator
from clinical_nlp.language.sections import Section, find_sections
from clinical_nlp.language.sentences import find_sentences
from clinical_nlp.notes.schema import Assertion

SPANS_KEY = "phenotypes"


def _section_of(span: Span) -> str | None:
    sections: list[Section] = span.doc._.sections or find_sections(span.doc.text)
    if not sections:
        return None
    section = sections[bisect_right([s.start for s in sections], span.start_char) - 1]
    return section.category if section.named else None


def _extend() -> None:
    Doc.set_extension("sections", default=None, force=True)
    Span.set_extension("section", getter=_section_of, force=True)
    Span.set_extension("concept_id", default=None, force=True)
    Span.set_extension("match_score", default=None, force=True)
    Span.set_extension("assertion", default=None, force=True)


_extend()


@Language.component("clinical_sections", assigns=["doc._.sections"])
def clinical_sections(doc: Doc) -> Doc:
    """Set `doc._.sections`."""
    doc._.sections = find_sections(doc.text)
    return doc


@Language.component("clinical_sentences", assigns=["token.is_sent_start", "doc.sents"])
def clinical_sentences(doc: Doc) -> Doc:
    """Set sentence starts; a boundary inside a spaCy token moves to the next token."""
    starts = [start for start, _ in find_sentences(doc.text)]
    at = 0
    for token in doc:
        first = token.i == 0
        while at < len(starts) and starts[at] <= token.idx:
            first = first or not token.is_space
            at += 1
        token.is_sent_start = first
    return doc


@Language.factory(
    "clinical_phenotypes",
    assigns=["doc.spans", "doc.ents", "span._.concept_id"],
    default_config={"terminology": "hpo", "set_ents": True},
)
class ClinicalPhenotypes:
    """Set `doc.spans["phenotypes"]` and, unless `set_ents` is off, add those that overlap no entity to `doc.ents`."""

    def __init__(self, nlp: Language, name: str, terminology: str, set_ents: bool) -> None:
        self._annotator = Annotator(terminology)
        self._set_ents = set_ents

    def __call__(self, doc: Doc) -> Doc:
        spans: list[Span] = []
        for match in self._annotator.match(doc.text):
            span = doc.char_span(
                match.start, match.end, label=PHENOTYPE, kb_id=match.concept_id, alignment_mode="expand"
            )
            if span is None:
                continue
            span._.concept_id = match.concept_id
            span._.match_score = match.score
            spans.append(span)
        doc.spans[SPANS_KEY] = spans
        if self._set_ents:
            # Entities of other components stay: whoever stands earlier in the pipeline wins.
            taken = {token.i for entity in doc.ents for token in entity}
            free = [span for span in filter_spans(spans) if not any(token.i in taken for token in span)]
            doc.ents = (*doc.ents, *free)
        return doc


@Language.component("clinical_assertion", assigns=["span._.assertion"])
def clinical_assertion(doc: Doc) -> Doc:
    """Set `span._.assertion` of every entity and of every span in `doc.spans`."""
    spans = [*doc.ents, *(span for group in doc.spans.values() for span in group)]
    spans = [span for span in spans if len(span) and span.text.strip()]
    places = [(span.start_char, span.end_char) for span in spans]
    sections = doc._.sections or find_sections(doc.text)
    results: list[Assertion] = assert_spans(doc.text, places, sections=sections)
    for span, assertion in zip(spans, results, strict=True):
        span._.assertion = assertion
    return doc
