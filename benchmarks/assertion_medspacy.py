"""medSpaCy's ConText and sections on given spans, for `assertion.py --opponent`; runs in medSpaCy's own environment.

Standard input: {"notes": [[text, [[start, end], ...]], ...]}. Standard output, last line: {"flags": [[...]],
"seconds": s, "version": v}; the flags of a span are negated, uncertain, historical, hypothetical, family.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from importlib.metadata import version

FLAGS = ("is_negated", "is_uncertain", "is_historical", "is_hypothetical", "is_family")


def main() -> None:
    """Read, annotate, print."""
    warnings.filterwarnings("ignore")
    from loguru import logger

    logger.remove()  # its debug log holds note text
    import medspacy
    from spacy.util import filter_spans

    nlp = medspacy.load(medspacy_enable=["medspacy_pyrush", "medspacy_sectionizer", "medspacy_context"])
    later = [nlp.get_pipe(name) for name in nlp.pipe_names if name != "medspacy_tokenizer"]
    notes = json.load(sys.stdin)["notes"]
    flags: list[list[list[bool]]] = []
    seconds = 0.0
    for part in (notes[:20], notes):  # the first warms up
        flags, seconds = [], 0.0
        for text, spans in part:
            found = {}
            began = time.process_time()
            left = [tuple(span) for span in spans]
            while left:  # entities may not overlap, so spans that do take another pass
                doc = nlp.make_doc(text)
                entities = {}
                for start, end in left:
                    entity = doc.char_span(start, end, label="PROBLEM", alignment_mode="expand")
                    entities.setdefault((entity.start, entity.end), (entity, []))[1].append((start, end))
                chosen = filter_spans([entity for entity, _ in entities.values()])
                doc.ents = chosen
                for pipe in later:
                    doc = pipe(doc)
                for entity in doc.ents:
                    for place in entities[entity.start, entity.end][1]:
                        found[place] = [bool(getattr(entity._, flag)) for flag in FLAGS]
                left = [place for place in left if place not in found]
            seconds += time.process_time() - began
            flags.append([found[tuple(span)] for span in spans])
    print(json.dumps({"flags": flags, "seconds": seconds, "version": version("medspacy")}))


if __name__ == "__main__":
    main()
