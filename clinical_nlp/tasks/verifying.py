"""Mentions on which the lanes disagree, put to a causal language model that may only pick from listed concepts.

Asked, each as a question of its own (see `Question.why`):

- overlap: the dictionary and a model mark overlapping text and mean different concepts by it;
- alone: a model alone links the text to a concept;
- unlinked: a model marks the text and links it to no concept, though names of some are near;
- ambiguous: the text names several concepts of the dictionary, and the note does not itself say which.

What the dictionary and a model both found, what the dictionary alone found without ambiguity, and what was read from
measured values is never shown to the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clinical_nlp.errors import ClinicalNlpError, UsageError
from clinical_nlp.language.mentions import Mention
from clinical_nlp.language.terminology import Match, Terminology
from clinical_nlp.language.terminology.homonyms import Homonyms
from clinical_nlp.models import int8
from clinical_nlp.models.loading import BaseModel, can_be_prompted, load_base, load_tokenizer, read_task
from clinical_nlp.models.resolve import ResolvedModel, resolve_model
from clinical_nlp.tasks.prompting import score_continuations

Why = Literal["overlap", "alone", "unlinked", "ambiguous"]
WHYS = ("overlap", "alone", "unlinked", "ambiguous")
VERDICTS = ("kept", "changed", "none", "undecided", "invalid")
"""What came of a question: the concept stayed; another candidate took its place; none of them is meant, so the concept
is withdrawn and the mention stays; the model could not tell, or its answer did not hold, and all stays as it was."""

CANDIDATES = 5
"""Concepts that are listed at most, beside "none of these": the answer is one digit."""
SURE = 0.5
"""A choice less probable than this is undecided."""
SHORTEST = 1024
"""Tokens that a model must be able to read: the instruction, the examples and a question in any script."""
AROUND = 200
"""Characters of the sentence that are shown on each side of a mention."""
_LABEL = 120
_NONE = "none of these"
# Numbers are scored, not labels: a model that cannot read the question goes by place, which the second order shows, but
# of labels it prefers the common ones in any order (tried: a 135M model decided 43 of 54 questions on gsc-plus by label
# and was right in 7, where the lanes were in 27; by number it decided none).
_NUMBERS = tuple(f" {number}" for number in range(1, CANDIDATES + 2))
_CACHED = 20_000
_GENERATIVE = ("pretraining", "report")

_ASK = """\
Which concept does the text between << and >> mean? Answer with the number of one option.

Sentence: There was <<drooping of the upper lid>> on the left since birth.
1. Ptosis
2. Blepharitis
3. none of these
Answer: 1

Sentence: The <<mole>> was counted by the laboratory as one of four samples.
1. none of these
2. Melanocytic nevus
Answer: 1

Sentence: He came with <<shortness of breath>> on exertion.
1. Cough
2. none of these
3. Dyspnea
Answer: 3

Sentence: {sentence}
{options}
Answer:"""


@dataclass(frozen=True, slots=True)
class Question:
    """One mention and the concepts that it may mean; the first is the one that it has, if it has one."""

    why: Why
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model picked: a concept, or None for none of them. It is `decided` where that is to be acted on."""

    concept_id: str | None
    probability: float
    decided: bool


# What is asked --------------------------------------------------------------------------------------------------------


def questions(
    text: str,
    mentions: Sequence[Mention],
    matches: Sequence[Match],
    homonyms: Callable[[str], Sequence[str]],
    nearest: Callable[[str], Sequence[str]],
) -> dict[int, Question]:
    """Return what is to be asked about the mentions of a note, by their place in `mentions`.

    Parameters
    ----------
    text : the note.
    mentions : of all lanes, joined.
    matches : what the dictionary finds by itself, which tells the lanes of overlapping mentions apart.
    homonyms : the concepts that a form names, where there are several.
    nearest : the concepts whose names a linker finds nearest to a text; nothing where there is no linker.
    """
    own = {(match.start, match.end, match.concept_id) for match in matches}
    foreign = [m for m in mentions if m.lane != "measurement" and m.concept_id is not None and _key(m) not in own]
    found = {}
    for place, mention in enumerate(mentions):
        by_dictionary = _key(mention) in own
        if mention.lane == "measurement" or (mention.lane == "both" and by_dictionary):
            continue
        across: Iterable[Any] = foreign if by_dictionary else matches
        others = [o.concept_id for o in across if o.start < mention.end and mention.start < o.end]
        others = [concept_id for concept_id in dict.fromkeys(others) if concept_id != mention.concept_id]
        why: Why
        if others and mention.concept_id is None:  # the dictionary has said what stands there
            continue
        if others:
            why = "overlap"
        elif by_dictionary:
            why, others = "ambiguous", list(homonyms(mention.text))
            if not others or f"({mention.text})" in text:
                continue
        elif mention.lane == "both":
            continue
        else:
            why = "unlinked" if mention.concept_id is None else "alone"
        if mention.lane == "model":
            others += nearest(mention.text)
        beside = {m.concept_id for m in mentions if (m.start, m.end) == (mention.start, mention.end)}
        others = [concept_id for concept_id in others if concept_id not in beside]
        candidates = tuple(dict.fromkeys([*filter(None, [mention.concept_id]), *others]))[:CANDIDATES]
        if candidates:
            found[place] = Question(why, candidates)
    return found


def _key(mention: Mention) -> tuple[int, int, str | None]:
    return mention.start, mention.end, mention.concept_id


def prompt(text: str, mention: Mention, labels: Sequence[str]) -> str:
    """Return the question as the model reads it: the sentence with the mention marked, and the numbered options.

    Of the note only the sentence is shown, its line breaks and angle brackets as spaces, so that nothing in it can
    stand where an option or an answer stands.
    """
    begin, end = mention.sentence
    parts = (
        text[max(begin, mention.start - AROUND) : mention.start],
        text[mention.start : mention.end],
        text[mention.end : max(mention.end, min(end, mention.end + AROUND))],
    )
    before, marked, after = (" ".join(part.replace("<", " ").replace(">", " ").split()) for part in parts)
    left = " " if before and text[mention.start - 1].isspace() else ""
    right = " " if after and text[mention.end].isspace() else ""
    sentence = f"{before}{left}<<{marked}>>{right}{after}".encode("utf-8", "replace").decode()  # lone surrogates
    options = "\n".join(f"{number}. {' '.join(label.split())[:_LABEL]}" for number, label in enumerate(labels, start=1))
    return _ASK.format(sentence=sentence, options=options)


# The model ------------------------------------------------------------------------------------------------------------


def check_verifier(name: str) -> ResolvedModel:
    """Resolve what `--verify` names, and refuse what cannot answer.

    Parameters
    ----------
    name : `builtin:tiny`, a run of this package that trained a causal language model (dapt, report), or a local folder.

    Raises
    ------
    UsageError : it is not there or incomplete, is no causal language model, was trained for something else than
        writing, predicts in 8-bit only, or reads fewer than `SHORTEST` tokens.
    """
    try:
        resolved = resolve_model(name)
        if resolved.is_hub or resolved.digest is None:
            raise UsageError("is a hub id; give a local folder, whose weights can be told from others")
        for folder in (Path(name), *(adapter.parent for adapter in resolved.adapters)):
            told = read_task(folder).get("task") if (folder / "task.json").is_file() else None
            if told is not None and told not in _GENERATIVE:
                raise UsageError(f"was trained for {told}, not to write; name a dapt or report run, or its base model")
        if (Path(resolved.folder) / int8.FILE).is_file():
            raise UsageError("is 8-bit and only predicts; name the run that it was made from")
        if not can_be_prompted(name):
            raise UsageError("is no causal language model; name one that writes")
        for adapter in resolved.adapters:
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                if not (adapter / file).is_file():
                    raise UsageError(f"lacks {adapter / file}; copy the run again")
        if len({*map(tuple, _numbers(load_tokenizer(resolved)))} - {()}) <= CANDIDATES:
            raise UsageError("has a tokenizer that does not tell digits apart; name another model")
        if _positions(resolved) < SHORTEST:
            raise UsageError(f"reads fewer than {SHORTEST} tokens; name another model")
    except ClinicalNlpError as error:
        raise UsageError(f"--verify {name}: {error}") from None
    return resolved


def _numbers(tokenizer: Any) -> list[list[int]]:
    """Return the tokens of each answer."""
    return [tokenizer(number, add_special_tokens=False)["input_ids"] for number in _NUMBERS]


def _positions(resolved: ResolvedModel) -> float:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(resolved.folder, trust_remote_code=False, local_files_only=True)
    return getattr(config, "max_position_embeddings", None) or float("inf")


class CandidateVerifier:
    """A causal language model that answers questions by the number of an option, and cannot say anything else.

    Parameters
    ----------
    base : loaded with kind `causal`.
    terminology : gives the labels.
    """

    def __init__(self, base: BaseModel, terminology: Terminology) -> None:
        self._base, self._terminology = base, terminology
        self._known: dict[tuple[str, ...], list[np.ndarray]] = {}
        self._lengths = np.array([len(row) for row in _numbers(base.tokenizer)], dtype=float)

    @classmethod
    def load(cls, name: str, terminology: Terminology) -> CandidateVerifier:
        """Load the model that `check_verifier` accepts, in the precision of the run."""
        resolved = check_verifier(name)
        told = Path(name) / "task.json"
        quantization: Any = read_task(told.parent).get("quantization", "none") if told.is_file() else "none"
        return cls(load_base(resolved.name, kind="causal", quantization=quantization), terminology)

    def ask(self, text: str, mention: Mention, question: Question) -> Answer:
        """Return which candidate the mention means.

        The options are listed in two orders, and none has the same number in both (the reverse of three would leave
        the second where it is). A model that goes by the place of an option therefore picks another one in the second
        order; that, a tie, and a choice that is less probable than `SURE` are undecided.
        """
        labels = [*(self._terminology.label(concept_id) for concept_id in question.candidates), _NONE]
        order = turned(len(labels))
        first, second = self._both(
            prompt(text, mention, labels), prompt(text, mention, [labels[place] for place in order]), len(labels)
        )
        second = second[np.argsort(order)]
        probabilities = ((first + second) / 2).round(4)
        best = int(probabilities.argmax())
        agreed = all(_clearly(one.round(4), best) for one in (first, second))
        options = (*question.candidates, None)
        probability = float(probabilities[best])
        return Answer(options[best], probability, agreed and probability >= SURE)

    def _both(self, first: str, second: str, size: int) -> list[np.ndarray]:
        """Return the probabilities of the options in either order; each prompt is read alone."""
        if (first, second) not in self._known:
            if len(self._known) >= _CACHED:
                self._known.clear()
            scores = score_continuations(self._base, [first, second], [_NUMBERS[:size]] * 2)
            self._known[first, second] = [_softmax(row * self._lengths[:size]) for row in scores]
        return self._known[first, second]


def turned(size: int) -> list[int]:
    """Return the second order of so many options: each is half a list away from where it was."""
    return [*range(size // 2, size), *range(size // 2)]


def _softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max())
    return np.asarray(powers / powers.sum())


def _clearly(probabilities: np.ndarray, best: int) -> bool:
    return bool((np.delete(probabilities, best) < probabilities[best]).all())


# What comes of it -----------------------------------------------------------------------------------------------------


def settle(
    text: str, mention: Mention, question: Question, answer: Answer, terminology: Terminology
) -> tuple[Mention, dict[str, Any]]:
    """Act on an answer, if it holds by itself: nothing of how it was made is trusted.

    The concept must be one of those listed and alive in the terminology, the probability one, and the words of the
    mention must stand at its offsets in the note.

    Returns
    -------
    The mention, at its old place and of its old lane. A concept that took another's place is scored by its
    probability. With it the row of the output's column `verified`.
    """
    chosen = answer.concept_id
    listed = chosen is None or (chosen in question.candidates and chosen in terminology)
    quoted = 0 <= mention.start < mention.end and text[mention.start : mention.end] == mention.text
    sound = 0 <= answer.probability <= 1
    told = {
        "why": question.why,
        "verdict": "invalid",
        "probability": answer.probability if sound else None,
        "candidates": list(question.candidates),
    }
    if not (listed and quoted and sound):
        return mention, told
    if not answer.decided:
        return mention, told | {"verdict": "undecided"}
    if chosen is None:
        return replace(mention, concept_id=None), told | {"verdict": "none"}
    if chosen == mention.concept_id:
        return mention, told | {"verdict": "kept"}
    return replace(mention, concept_id=chosen, score=answer.probability), told | {"verdict": "changed"}


class Verification:
    """All of the above for the mentions of a note.

    Parameters
    ----------
    verifier : answers.
    terminology : of the dictionary.
    match : the dictionary's matches of a note.
    nearest : see `questions`.
    """

    def __init__(
        self,
        verifier: CandidateVerifier,
        terminology: Terminology,
        match: Callable[[str], Sequence[Match]],
        nearest: Callable[[str], Sequence[str]] = lambda text: (),
    ) -> None:
        self._verifier, self._terminology = verifier, terminology
        self._match, self._nearest = match, nearest
        self._homonyms = Homonyms(terminology)

    def __call__(self, text: str, mentions: Sequence[Mention]) -> list[tuple[Mention, dict[str, Any] | None]]:
        """Return the mentions, as many and in the same order, each with what came of its question, if it had one."""
        if not mentions:
            return []
        asked = questions(text, mentions, self._match(text), self._homonyms, self._nearest)
        settled: list[tuple[Mention, dict[str, Any] | None]] = []
        for place, mention in enumerate(mentions):
            if place not in asked:
                settled.append((mention, None))
                continue
            answer = self._verifier.ask(text, mention, asked[place])
            settled.append(settle(text, mention, asked[place], answer, self._terminology))
        return settled
