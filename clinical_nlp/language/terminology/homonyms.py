"""Forms that name several concepts: `ASD`, or a term of a user's vocabulary that stands under two ids."""

from __future__ import annotations

import re

from clinical_nlp.language.terminology.abbreviations import read_senses
from clinical_nlp.language.terminology.concepts import Terminology
from clinical_nlp.language.terminology.normalization import light

_WORD = re.compile(r"[^\W_]+")
_OWN = ("label", "exact")


class Homonyms:
    """The forms of a terminology that mean more than one of its concepts.

    Labels, exact synonyms and abbreviations count, with the senses of `abbreviations.csv` for HPO. A form that is the
    label of one concept means that one, whatever else has it as a synonym.
    """

    def __init__(self, terminology: Terminology) -> None:
        wanted = sorted(terminology.matchable)
        holders: dict[str, set[str]] = {}
        labels: dict[str, set[str]] = {}
        for concept_id in wanted:
            for name in terminology.names(concept_id):
                if name.scope in _OWN:
                    form = name.text if name.abbreviation else _spelled(name.text)
                    holders.setdefault(form, set()).add(concept_id)
                    if name.scope == "label":
                        labels.setdefault(form, set()).add(concept_id)
        if terminology.name == "hpo":
            codes = {concept_id: code << 4 for code, concept_id in enumerate(wanted)}
            for form, senses in read_senses(terminology, codes).items():
                holders.setdefault(form, set()).update(wanted[sense.code >> 4] for sense in senses)
        self._forms = {
            form: tuple(sorted(ids)) for form, ids in holders.items() if len(ids) > 1 and len(labels.get(form, ())) != 1
        }

    def __call__(self, text: str) -> tuple[str, ...]:
        """Return the concepts that `text` as a whole names, sorted, where there are several; else nothing."""
        return self._forms.get(text) or self._forms.get(_spelled(text), ())


def _spelled(text: str) -> str:
    return " ".join(light(word) for word in _WORD.findall(text))
