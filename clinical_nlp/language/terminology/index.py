"""The names of a terminology, kept for looking up windows of words."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from clinical_nlp.language.terminology.abbreviations import Sense, read_senses
from clinical_nlp.language.terminology.concepts import SCOPES, Name, Terminology
from clinical_nlp.language.terminology.normalization import FREE, WEAK, light, root
from clinical_nlp.language.terminology.spelling import FIELD
from clinical_nlp.language.terminology.variation import variations

_FOLDER = Path(__file__).parent
_WORD = re.compile(r"[^\W_]+")
_OPTIONAL = re.compile(r"\s*[\(\[][^)\]]*[\)\]]")
_JOINED = re.compile(r"[,/&+]| (?:and|or|nor|with|by|from|for|as|plus) ", re.IGNORECASE)
_WEIGHTS = (1.0, 0.95, 0.85, 0.75, 0.7, 0.7)
_VARIED = len(SCOPES)
_NO_CODE = -1
_Order = tuple[tuple[str, ...], str, bool, bool]
"""The words of a name, its light form where it is one word, whether it holds a conjunction, and a fixed order."""
_VERBS = ("decrease", "increase", "reduce", "raise", "lower", "elevate")
_TREATED = re.compile(rf"(?:{'|'.join(_VERBS)})\s+(?:his|her|their|the|your|my|its)\b")
"""What is done about a finding: `to decrease her potassium`."""
SAYS_OTHERWISE = re.compile(
    r"""
    .*\b(?:is|are|was|were)\s+(?:\w+\s+)?(?:dissected|difficult)  # by the surgeon; to see
    | .*\b(?:heart\s+(?:was\s+)?arrested|arrest\w*\s+the\s+heart)
    | elevat\w+\s+the\s+periosteum | periosteal\s+elevator.*
    | (?:(?:absent|presen(?:t|ts|ce|ces))\s+(?:in|at|on|of)|reduced\s+to)\b.*  # what it is, stands before
    | open(?:s|ed|ing)?\s+(?:his|her|the|your)\s+mouth | open\s+and\b.*
    | back\s+of\s+\w+\b.*knees?
    | develop\w*\s+cataracts? | cataracts?\s+to\s+develop  # not congenital
    | abduct\w*\s+(?:his|her|the)\s+.*
    | (?:small|large)\s+(?:(?:and|or)\s+(?:small|large)\s+)?joints?\b.*
    | apgar.*\b(?:one|1)\b.*\b(?:five|5)\b.*
    | .*\brotat(?:ion|e)\b.*\b(?:hips?|shoulders?) | (?:hips?|shoulders?)\b.*\brotation
    | (?:reduc(?:e|tion\s+in)|decrease\s+in|lower(?:ing)?)\s+(?:\w+\s+)?(?:cholesterol|ldl)  # what a drug is for
    | absence\s+of\s+ana?emia
    | trachea\b.*\bbronch\w+ | pelvis\s+of\b.* | extend\s+the\b.* | soft\s+tissues?\b.*\bskin
    | toes?,?\s+and\s+(?:heel|tandem)\s+walk\w*
    | .*\b(?:of|to|in|at|on)\s+(?:the\s+)?(?:small|large|short|long|broad|wide|thick|thin)  # breaks off
    """,
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
"""Words of a name in a phrase that says something else."""
_INVERTED = re.compile(r"([A-Za-z -]+), (?!in |at |with|present |not |on )([A-Za-z-]+(?: [A-Za-z-]+){0,2})")
_STOP = re.compile(r"[.;!?](?=[\s,]|$)")
_MASK = 2**62 - 1

ADJACENT, PASSED, FREE_WORD, COPULA, NEW_LINE, WEAK_WORD, LIST, CONJUNCTION, HARD = range(9)
"""What stands between two words, from nothing to something that no name spans."""

MAX_WORDS = 9
_NEGATIONS = ("no", "not", "without", "never", "non", "normal")


@dataclass(frozen=True)
class Index:
    """Flat tables, so that forked workers share them.

    A concept code is the concept's number in `ids`, the rank of the name, and whether the name holds a conjunction.
    """

    ids: tuple[str, ...]
    vocabulary: dict[str, int]
    values: list[int]
    partners: list[frozenset[int]]
    bags: dict[int, int]
    orders: dict[int, int]
    literals: dict[str, int]
    attributes: frozenset[int]
    negations: frozenset[int]
    numerals: frozenset[int]
    last_words: frozenset[str]
    long_words: frozenset[str]
    singles: dict[int, list[tuple[str, int]]]
    abbreviations: dict[str, list[Sense]]
    guards: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
    spared: frozenset[str]
    """Names that would count as words in a phrase that says something else: `developmental cataract`."""

    @cached_property
    def codes(self) -> dict[str, int]:
        """The number of each concept."""
        return {concept_id: number for number, concept_id in enumerate(self.ids)}

    @cached_property
    def absent(self) -> int | None:
        """The number of the word."""
        return self.vocabulary.get(root("absent"))

    @cached_property
    def digest(self) -> str:
        """sha256 over everything that the index holds, the same in every process."""
        whole = hashlib.sha256()
        for value in (self.ids, self.values, self.singles, self.abbreviations, self.guards, self.literals):
            whole.update(repr(value).encode())
        for table in (self.vocabulary, self.bags, self.orders):
            whole.update(repr(sorted(table.items())).encode())
        for numbers in (*self.partners, self.attributes, self.negations, self.numerals):
            whole.update(repr(sorted(numbers)).encode())
        for words in (self.last_words, self.long_words, self.spared):
            whole.update(repr(sorted(words)).encode())
        return whole.hexdigest()

    @cached_property
    def slashed(self) -> re.Pattern[str] | None:
        """Where short forms with a slash stand, which are no single words: `N/V`."""
        forms = sorted((form for form in self.abbreviations if "/" in form), key=lambda form: (-len(form), form))
        return re.compile(rf"(?<![\w/])(?:{'|'.join(map(re.escape, forms))})(?![\w/])") if forms else None

    def concept(self, code: int) -> tuple[str, float]:
        """Return the concept id and the weight of the name that a code stands for."""
        return self.ids[code >> 4], _WEIGHTS[code >> 1 & 7]

    def follows(self, code: int) -> bool:
        """Whether the name is none of the terminology's own, but follows from them."""
        return code >> 1 & 7 == _VARIED

    def ordered(self, words: Sequence[int]) -> int | None:
        """Return the code of the name with exactly these words in this order."""
        return self.orders.get(_order([self.values[word] for word in words]))

    def accept(self, words: Sequence[int], default: int, worst: int, free: int) -> tuple[int, float] | None:
        """Return the code and factor of a window whose words are those of a name, or None where they do not say it."""
        code = self.ordered(words)
        if code is not None:  # `blood and urine` is not blood in urine
            return (code, 1.0) if worst <= NEW_LINE or code & 1 else None
        # Another order: within one phrase, and joined by a preposition or with the modifier put last.
        if worst > NEW_LINE:
            return None
        if free and worst < COPULA:
            return (default, 0.9) if default != _NO_CODE else None
        if len(words) == 2 and worst != COPULA and words[0] not in self.attributes and words[1] not in self.attributes:
            return None
        for k in range(1, len(words)):
            code = self.ordered([*words[k:], *words[:k]])
            if code is None and words[k] in self.numerals:  # `metacarpal IV`, `4th metacarpal`
                code = self.ordered([*words[: k - 1], words[k], words[k - 1], *words[k + 1 :]])
            if code is not None:
                return code, 0.9
        return None

    def says_otherwise(self, text: str, start: int, end: int) -> bool:
        """Whether the words of a name stand at [start, end) in a phrase that says something else."""
        return (
            bool(self.guards)
            and SAYS_OTHERWISE.fullmatch(text, start, end) is not None
            and _spelled(text[start:end]) not in self.spared
        )

    def literal(self, text: str, code: int) -> int:
        """Return the concept that has `text` as its own name, where several have the same words, or `code`."""
        return self.literals.get(_spelled(text), code)

    def guarded(self, text: str, start: int, end: int) -> bool:
        """Whether what stands at [start, end) is a form that names something else, there or everywhere."""
        covered = text[start:end].lower()
        if covered.startswith(_VERBS) and _TREATED.match(covered):
            return True
        guard = self.guards.get(covered)
        if guard is None:
            return False
        near, only = guard
        before, after = text[max(0, start - 40) : start].lower(), text[end : end + 40].lower()
        if only:  # in the company of its kind, which a list may part by full stops
            return not any(word in f"{before}~{after}" for word in only)
        phrase = f"{_STOP.split(before)[-1]}~{_STOP.split(after)[0]}"
        return not near or any(word in phrase for word in near)

    @classmethod
    def build(cls, terminology: Terminology, ids: Iterable[str]) -> Index:
        """Index the names of `ids`, those that follow from them, and what clinicians call them (`additions_*.csv`)."""
        numbered = tuple(sorted(ids))
        number_of = {concept_id: number for number, concept_id in enumerate(numbered)}
        guards = {}
        bundled = terminology.name in ("hpo", "icd10cm")
        if bundled:  # a vocabulary of one's own says what it says
            guards = {row["form"].lower(): (_parts(row["near"]), _parts(row["only"])) for row in _rows("guards.csv")}
        names = [
            (i, name, SCOPES.index(name.scope))
            for i in numbered
            for name in terminology.names(i)
            if not (name.text.startswith("bone ") and terminology.label(i).startswith("Fractured"))
        ]  # HPO has lost the first word of these: `(broken) bone tibia`
        if bundled:
            for row in _rows(f"additions_{terminology.name}.csv"):
                concept_id = terminology.resolve(row["concept_id"]) or ""
                if concept_id in number_of:
                    names.append((concept_id, Name(row["name"], "exact", row["kind"] == "abbreviation"), 1))
        fixed: set[tuple[str, str]] = set()
        for concept_id, name, is_fixed in variations(terminology, numbered):
            names.append((concept_id, name, _VARIED))
            if is_fixed:
                fixed.add((concept_id, name.text))
        names += [(i, turned, _VARIED) for i, name, _ in names if (turned := _turned(name)) is not None]
        code_of = {concept_id: number << 4 | 1 << 1 for concept_id, number in number_of.items()}
        abbreviations = read_senses(terminology, code_of) if bundled else {}
        contextual = frozenset(abbreviations)
        bags: dict[tuple[str, ...], dict[_Order, int]] = {}
        labels: dict[tuple[str, ...], int] = {}
        spelled = {(i, _spelled(name.text)) for i, name, rank in names if rank <= 1}
        literals: dict[tuple[str, ...], dict[str, int]] = {}
        last_words: set[str] = set()
        long_words: set[str] = set()
        spared: set[str] = set()
        entries: list[
            tuple[bool, bool, int, str, str, str]
        ] = []  # what follows last, what had a bracket after what not
        for concept_id, name, rank in sorted(names, key=lambda n: (n[2], n[0], n[1].text)):
            text = name.text
            if guards.get(text.lower()) == ((), ()):
                continue
            if _is_abbreviation(name):
                if text.isalnum() and text not in contextual:
                    code = number_of[concept_id] << 4 | rank << 1
                    abbreviations.setdefault(text, [Sense(code, declared=True)])
                continue
            if rank < _VARIED and guards and SAYS_OTHERWISE.fullmatch(text):
                spared.add(_spelled(text))
            for variant in dict.fromkeys((text, _OPTIONAL.sub("", text))):
                entries.append((rank == _VARIED, variant != text, rank, concept_id, text, variant))
        for _, _, rank, concept_id, text, variant in sorted(entries):
            code = number_of[concept_id] << 4 | rank << 1
            for words, only in _name_words(variant):
                if words and len(words) <= MAX_WORDS and any(len(word) > 1 for word in words):
                    bag, joined = tuple(sorted(words)), _JOINED.search(variant) is not None
                    if rank == 0:
                        labels.setdefault(bag, code)
                    elif rank == 1 and bag in labels and (numbered[labels[bag] >> 4], _spelled(text)) in spelled:
                        code = labels[bag] | rank << 1  # two concepts have the name: the label decides
                    if rank < _VARIED:
                        literals.setdefault(bag, {}).setdefault(_spelled(variant), code)
                    bags.setdefault(bag, {}).setdefault((words, only, joined, (concept_id, text) in fixed), code)
            long_words.update(w for p in _WORD.findall(variant) if (w := light(p)).endswith(FIELD) and w.isalpha())
            if rank < _VARIED and (ending := _WORD.findall(variant)):
                last_words.add(light(ending[-1]))
        attributes = {root(row["form"]) for row in _rows("attributes.csv")}
        told_apart = {
            spelled: code
            for forms in literals.values()
            if len({code >> 4 for code in forms.values()}) > 1
            for spelled, code in forms.items()
        }
        return cls._packed(
            numbered, bags, told_apart, attributes, last_words, long_words, abbreviations, guards, frozenset(spared)
        )

    @classmethod
    def _packed(
        cls,
        ids: tuple[str, ...],
        bags: dict[tuple[str, ...], dict[_Order, int]],
        literals: dict[str, int],
        attributes: set[str],
        last_words: set[str],
        long_words: set[str],
        abbreviations: dict[str, list[Sense]],
        guards: dict[str, tuple[tuple[str, ...], tuple[str, ...]]],
        spared: frozenset[str],
    ) -> Index:
        vocabulary = {word: number for number, word in enumerate(sorted({word for bag in bags for word in bag}))}
        values = [
            int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big") >> 2 for word in vocabulary
        ]
        partners: list[set[int]] = [set() for _ in vocabulary]
        sums: dict[int, int] = {}
        orders: dict[int, int] = {}
        singles: dict[int, list[tuple[str, int]]] = {}
        for bag, readings in bags.items():
            numbers = tuple(sorted(vocabulary[word] for word in bag))
            if len(numbers) == 1:
                singles[numbers[0]] = [(only, code) for (_, only, *_), code in readings.items()]
                continue
            for position, number in enumerate(numbers):
                partners[number].update(numbers[:position] + numbers[position + 1 :])
            any_order = (code for (*_, order_fixed), code in readings.items() if not order_fixed)
            sums[sum(values[number] for number in numbers)] = next(any_order, _NO_CODE)
            for (words, _, joined, _), code in readings.items():
                key = _order([values[vocabulary[word]] for word in words])
                orders[key] = orders.get(key, code) | joined
        return cls(
            ids,
            vocabulary,
            values,
            [frozenset(others) for others in partners],
            sums,
            orders,
            literals,
            frozenset(vocabulary[word] for word in attributes if word in vocabulary),
            frozenset(vocabulary[word] for word in _NEGATIONS if word in vocabulary),
            frozenset(number for word, number in vocabulary.items() if word.isdigit()),
            frozenset(last_words),
            frozenset(long_words),
            singles,
            abbreviations,
            guards,
            spared,
        )


def _parts(cell: str) -> tuple[str, ...]:
    return tuple(filter(None, cell.split("|")))


def _spelled(text: str) -> str:
    return " ".join(light(word) for word in _WORD.findall(text))


def _turned(name: Name) -> Name | None:
    """Return `cochlea hypoplasia` for `hypoplasia of the cochlea`, `neonatal macrosomia` for `macrosomia, neonatal`."""
    if (inverted := _INVERTED.fullmatch(name.text)) is not None:
        return Name(f"{inverted[2]} {inverted[1]}", name.scope)
    head, of, part = name.text.partition(" of ")
    if not of or not part or " or " in name.text or " and " in name.text or "," in name.text:
        return None
    return Name(f"{part.removeprefix('the ')} {head}", name.scope)


def _order(values: Iterable[int]) -> int:
    key = 0
    for value in values:
        key = (key * 1_000_003 ^ value) & _MASK
    return key


def _name_words(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the content roots of a name, and its light form where that is one word; a hyphenated name also joined."""
    spellings = [text] if "-" not in text else [text, re.sub(r"(?<=\w)-(?=\w)", "", text)]
    for spelling in spellings:
        parts = [p for p in _WORD.findall(spelling) if p == "A" or (p != "s" and p.lower() not in FREE | WEAK)]
        yield tuple("a" if p == "A" else root(p) for p in parts), light(parts[0]) if len(parts) == 1 else ""


def _is_abbreviation(name: Name) -> bool:
    text = name.text
    return " " not in text and (name.abbreviation or (len(text) <= 5 and sum(c.isupper() for c in text) >= 2))


def _rows(name: str) -> list[dict[str, str]]:
    with (_FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
