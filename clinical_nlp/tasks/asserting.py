"""Assertion by a small encoder: parts of sections to tokens, a softmax an axis for each span, the rules where unsure.

A part of a section is read once, with the section's name, and every span in it is judged from the mean of its own
tokens beside the mean of its sentence's. What the rules say of the span is an input too, so that the classifier learns
where to correct them. Where it is less sure than a threshold, on axes that it was not trained on, and where the rules
say what it has never seen, the rules decide.

Tried and left out: a passage for each span with markers around it, which takes four times as long to read and was no
better after the same time of training; and hiding the rules' answer from half of the training spans, which made the
classifier worse where the idioms are new to it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clinical_nlp.errors import ClinicalNlpError, ConfigError, ModelError, UsageError
from clinical_nlp.language.sections import Section, find_sections
from clinical_nlp.language.sentences import find_sentences
from clinical_nlp.models.loading import BaseModel, check_offsets, load_base, read_task
from clinical_nlp.models.resolve import ResolvedModel, resolve_model
from clinical_nlp.notes.schema import EXPERIENCER, MODALITY, PRESENCE, TEMPORALITY, Assertion
from clinical_nlp.runs import Estimate, Run, write_json
from clinical_nlp.statistics.intervals import by_patient, patient_bootstrap
from clinical_nlp.tasks.ner import load_head, save_trained, special_tokens

AXES: Mapping[str, tuple[str, ...]] = {
    "presence": PRESENCE,
    "temporality": TEMPORALITY,
    "modality": MODALITY,
    "experiencer": EXPERIENCER,
}
"""The axes with their values; the first of each is the usual one."""

Axes = tuple[str, str, str, str]
"""One value an axis."""

LEAD, FOLLOW = 24, 12
"""Tokens that are read before and after sentences, where there are any: the head of a list, a reply to a question."""
_TITLE = 12
_REACH, _BESIDE, _STRETCH = 2000, 400, 8000
"""Characters: of a long sentence on each side of a span, around a stretch, and of a stretch; notes may be very long."""
_ROWS = 16
_STEP = 8
"""Batches have `_ROWS` rows of a multiple of `_STEP` tokens, so that what a span gives does not depend on others."""
_TRUST = 3.0
"""How far the untrained head follows the rules, in log-odds."""


class Passage(NamedTuple):
    """A part of a section as the model reads it.

    `spans` and `sentences` are [first, last) token places of each span and of its sentence; `rules` and `labels` have a
    column an axis, as indices of the axis's values, labels -100 where nothing is to be learned; `numbers` say which of
    the note's spans these are.
    """

    input_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    sentences: tuple[tuple[int, int], ...]
    rules: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[int, ...], ...]
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AssertionTask:
    """What is judged, and how it is read.

    `axes` are those that are learned, each with the values that the training part has; `window` counts tokens; `rules`
    says whether their answer is an input.
    """

    axes: tuple[tuple[str, tuple[str, ...]], ...]
    window: int
    rules: bool
    bidirectional: bool = True

    @property
    def sizes(self) -> list[int]:
        """Values of each axis: the head's outputs, in this order."""
        return [len(values) for _, values in self.axes]

    def encode(
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
        rules: Sequence[Axes],
        tokenizer: Any,
        *,
        gold: Sequence[Axes] | None = None,
    ) -> list[Passage]:
        """Return passages in which each span is judged once, with its whole sentence where the window has room for it.

        Parameters
        ----------
        text : the note, unchanged.
        spans : (start, end) in any order. One on whose characters the tokenizer has no token is in no passage.
        rules, gold : the axes of each span.

        Raises
        ------
        ConfigError : the window has no room for the section's name and a few tokens more.
        ModelError : the tokenizer reports no usable offsets.
        """
        before, after = special_tokens(tokenizer)
        spare = self.window - _TITLE - len(before) - 2 * max(1, len(after))
        least = LEAD + FOLLOW
        if spare < least:
            raise ConfigError(f"a window of {self.window} tokens is too small; set {2 * (_TITLE + least)} or more")
        passages = []
        for stretch in _stretches(text, spans):
            piece = text[stretch.begin : stretch.end]
            encoding = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
            check_offsets(tokenizer, piece, offsets, ids)
            starts = np.array([start for start, _ in offsets], dtype=np.int64) + stretch.begin
            ends = np.array([stop for _, stop in offsets], dtype=np.int64) + stretch.begin
            placed = []
            for start, stop, number in stretch.sentences:
                first, last = _tokens(starts, ends, *spans[number])
                if first < last:
                    around = _tokens(starts, ends, start, stop)
                    placed.append(_Placed(min(first, around[0]), max(last, around[1]), first, last, number))
            title = tokenizer(stretch.title, add_special_tokens=False)["input_ids"][:_TITLE]
            prefix = [*before, *title, *(after or before)]
            for low, high, held in _windows(sorted(placed), len(ids), self.window - len(prefix) - len(after)):
                shift = len(prefix) - low
                passages.append(
                    Passage(
                        (*prefix, *ids[low:high], *after),
                        tuple(_within(one.first, one.last, low, high, shift) for one in held),
                        tuple(_within(one.begin, one.end, low, high, shift) for one in held),
                        tuple(_indices(rules[one.number]) for one in held),
                        tuple(self._labels(gold[one.number]) if gold else () for one in held),
                        tuple(one.number for one in held),
                    )
                )
        return passages

    def _labels(self, gold: Axes) -> tuple[int, ...]:
        said = dict(zip(AXES, gold, strict=True))
        return tuple(values.index(said[axis]) if said[axis] in values else -100 for axis, values in self.axes)

    def decide(self, probabilities: Sequence[np.ndarray], rules: Axes, thresholds: Sequence[float]) -> Axes:
        """Return the axes of a span: the classifier's where it is as sure as the threshold says, else the rules'.

        Parameters
        ----------
        probabilities : an array an axis that is learned.
        rules : what the rules say.
        thresholds : a probability an axis that is learned.
        """
        said = dict(zip(AXES, rules, strict=True))
        for (axis, values), chances, threshold in zip(self.axes, probabilities, thresholds, strict=True):
            best = int(chances.argmax())
            if said[axis] in values and chances[best] >= threshold:
                said[axis] = values[best]
        return said["presence"], said["temporality"], said["modality"], said["experiencer"]


class _Placed(NamedTuple):
    """The tokens [begin, end) of a sentence, [first, last) of a span in it, and the span's number."""

    begin: int
    end: int
    first: int
    last: int
    number: int


class _Stretch(NamedTuple):
    """[begin, end) of a note in a section called `title`, with (start, stop, number of a span) of sentences."""

    title: str
    begin: int
    end: int
    sentences: list[tuple[int, int, int]]


def _stretches(text: str, spans: Sequence[tuple[int, int]]) -> Iterator[_Stretch]:
    """Yield what of a note is read, so that each span is in one stretch; what is far from all spans is not read."""
    sections, sentences = find_sections(text), find_sentences(text)
    section_starts = [section.start for section in sections]
    sentence_starts = [start for start, _ in sentences]
    held: dict[int, list[tuple[int, int, int]]] = {}
    for number, (start, end) in enumerate(spans):
        place = max(0, bisect_right(section_starts, start) - 1)
        own = sentences[max(0, bisect_right(sentence_starts, start) - 1)] if sentences else (start, end)
        low = min(start, max(own[0], start - _REACH, _body(sections[place])))
        held.setdefault(place, []).append((low, max(end, min(own[1], end + _REACH)), number))
    for place, found in sorted(held.items()):
        section, found = sections[place], sorted(found)
        at = 0
        while at < len(found):
            upto = at + 1
            while upto < len(found) and found[upto][1] <= found[at][0] + _STRETCH:
                upto += 1
            stop = max(stop for _, stop, _ in found[at:upto])
            begin = max(min(_body(section), found[at][0]), found[at][0] - _BESIDE)
            end = max(stop, min(section.end, stop + _BESIDE))
            yield _Stretch(_title(text, section), begin, end, found[at:upto])
            at = upto


def _body(section: Section) -> int:
    return section.header_end if section.named else section.start


def _tokens(starts: np.ndarray, ends: np.ndarray, low: int, high: int) -> tuple[int, int]:
    """Return the first of the tokens that have a character of [low, high), and the one after the last."""
    first, last = int(np.searchsorted(ends, low, side="right")), int(np.searchsorted(starts, high, side="left"))
    while first < last and ends[first] <= starts[first]:  # a token of no character
        first += 1
    return first, last


def _title(text: str, section: Section) -> str:
    """Return what a section is called: its kind, and the words of its header where they are others."""
    if not section.named:
        return ""
    header = " ".join(text[section.header_start : section.header_end].lower().strip(" :\t\n").split())
    kind = section.category.replace("_", " ")
    return header if kind in ("other", header) else f"{kind} {header}"


def _windows(placed: Sequence[_Placed], size: int, room: int) -> Iterator[tuple[int, int, list[_Placed]]]:
    """Yield [low, high) of at most `room` of `size` tokens, with the spans judged there; each span is in one window.

    A window holds whole sentences with a little before and after them; of a sentence that is longer, what is around
    the span.
    """
    at = 0
    while at < len(placed):
        one = placed[at]
        if one.end - one.begin > room:
            low = max(0, min((one.first + one.last - room) // 2, size - room))
        else:
            low = max(0, one.begin - LEAD, one.end - room)
        upto = at + 1
        while upto < len(placed) and _fits(placed[upto], low + room, one.begin):
            upto += 1
        high = min(size, low + room, max(other.end for other in placed[at:upto]) + FOLLOW)
        yield low, high, list(placed[at:upto])
        at = upto


def _fits(other: _Placed, high: int, begin: int) -> bool:
    """Whether a span is in a window up to `high`, with its sentence, if that is not the one the window begins with."""
    return other.last <= high and (other.end <= high or other.begin == begin)


def _within(first: int, last: int, low: int, high: int, shift: int) -> tuple[int, int]:
    """Return [first, last) as it lies in a window; at least one token."""
    first = min(max(first, low), high - 1)
    return first + shift, max(first + 1, min(last, high)) + shift


def _indices(said: Axes) -> tuple[int, ...]:
    return tuple(values.index(value) for values, value in zip(AXES.values(), said, strict=True))


def axes_of(assertion: Assertion) -> Axes:
    """Return the values of an assertion alone."""
    return assertion.presence, assertion.temporality, assertion.modality, assertion.experiencer


def corrected(assertion: Assertion, axes: Axes) -> Assertion:
    """Return an assertion with other values; cues of the rules stay on the axes where they say the same."""
    if axes_of(assertion) == axes:
        return assertion
    return Assertion(*axes, cues=tuple(cue for cue in assertion.cues if cue[0] in axes))


# The model ------------------------------------------------------------------------------------------------------------


def build_model(network: Any, task: AssertionTask, *, seed: int) -> Any:
    """Put a head on a backbone: from the means of a span and of its sentence, and the rules' answer, to the axes.

    The head is float32 and always trains. Its first weights follow the rules, where they are an input.

    Notes
    -----
    The loss is the cross-entropy summed over spans and axes, divided by the decisions of the whole optimiser step that
    have a label, which the trainer gives as `num_items_in_batch`.
    """
    import torch

    config: Any = network.config
    torch.manual_seed(seed)
    offsets = dict(zip(AXES, np.cumsum([0, *map(len, AXES.values())]), strict=False))
    n_rules = sum(map(len, AXES.values())) if task.rules else 0

    class Asserter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.n_classes = sum(task.sizes)
            self.head = torch.nn.Linear(2 * config.hidden_size + n_rules, sum(task.sizes))
            torch.nn.init.normal_(self.head.weight, std=0.02)
            torch.nn.init.zeros_(self.head.bias)
            if task.rules:
                follow = torch.zeros(sum(task.sizes), n_rules)
                row = 0
                for axis, values in task.axes:
                    for value in values:
                        follow[row, int(offsets[axis]) + AXES[axis].index(value)] = _TRUST
                        row += 1
                with torch.no_grad():
                    self.head.weight[:, 2 * config.hidden_size :] = follow

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            sentences: torch.Tensor,
            spans: torch.Tensor,
            rules: torch.Tensor,
            labels: torch.Tensor | None = None,
            shift_labels: torch.Tensor | None = None,
            num_items_in_batch: Any = None,
        ) -> dict[str, Any]:
            hidden = self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
            logits = self.judge(torch.cat([spans @ hidden, sentences @ hidden], -1), rules)
            if labels is None:
                return {"logits": logits}
            total = torch.zeros((), device=logits.device)
            for axis, part in enumerate(logits.split(task.sizes, dim=-1)):
                total = total + torch.nn.functional.cross_entropy(
                    part.flatten(0, 1), labels[..., axis].flatten(), reduction="sum"
                )
            items = num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum()
            return {"loss": total / torch.as_tensor(items, device=total.device).clamp(min=1), "logits": logits}

        def judge(self, vectors: torch.Tensor, rules: torch.Tensor) -> torch.Tensor:
            """Logits of all axes from (..., 2 d) vectors and (..., 13) answers of the rules."""
            return self.head(torch.cat([vectors, rules], -1) if task.rules else vectors)

        def gradient_checkpointing_enable(self, **options: Any) -> None:
            self.network.gradient_checkpointing_enable(**options)
            self.network.enable_input_require_grads()

    return Asserter().to(network.device)


def answers(rules: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return what the rules say as numbers, (n, 13) float32: one for each value that they name, else zero."""
    found = np.zeros((len(rules), sum(map(len, AXES.values()))), dtype=np.float32)
    starts = np.cumsum([0, *map(len, AXES.values())])[:-1]
    if len(rules):
        np.put_along_axis(found, np.array(rules, dtype=np.int64) + starts, 1.0, axis=1)
    return found


def collate(passages: Sequence[Passage], pad_token_id: int) -> dict[str, Any]:
    """Pad passages to one width and one number of spans; a span is a row of weights that average its tokens.

    `shift_labels` makes the trainer count every label, the first position too.
    """
    import torch

    rows, width = len(passages), max(len(passage.input_ids) for passage in passages)
    most, axes = max(len(passage.spans) for passage in passages), len(passages[0].labels[0])
    ids = torch.full((rows, width), pad_token_id)
    mask = torch.zeros((rows, width), dtype=torch.long)
    weights = torch.zeros(2, rows, most, width)
    rules = torch.zeros(rows, most, sum(map(len, AXES.values())))
    labels = torch.full((rows, most, axes), -100)
    for row, passage in enumerate(passages):
        ids[row, : len(passage.input_ids)] = torch.tensor(passage.input_ids)
        mask[row, : len(passage.input_ids)] = 1
        for kind, places in enumerate((passage.spans, passage.sentences)):
            for column, (first, last) in enumerate(places):
                weights[kind, row, column, first:last] = 1 / (last - first)
        rules[row, : len(passage.spans)] = torch.from_numpy(answers(passage.rules))
        labels[row, : len(passage.spans)] = torch.tensor(passage.labels)
    found = {"input_ids": ids, "attention_mask": mask, "spans": weights[0], "sentences": weights[1], "rules": rules}
    return found | {"labels": labels, "shift_labels": labels}


# Judging --------------------------------------------------------------------------------------------------------------


def predict(
    model: Any,
    task: AssertionTask,
    tokenizer: Any,
    texts: Sequence[str],
    spans: Sequence[Sequence[tuple[int, int]]],
    rules: Sequence[Sequence[Axes]],
) -> list[list[list[np.ndarray] | None]]:
    """Return for each span of each note its probabilities, an array an axis; None where it has no token.

    A passage that several notes have is read once. The numbers of a span do not depend on what else is judged.
    """
    import torch

    found: list[list[list[np.ndarray] | None]] = [[None] * len(own) for own in spans]
    wanted: dict[tuple[int, ...], list[tuple[int, Passage]]] = {}
    for note, text in enumerate(texts):
        if spans[note]:
            for passage in task.encode(text, spans[note], rules[note], tokenizer):
                wanted.setdefault(passage.input_ids, []).append((note, passage))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    places: list[tuple[int, int]] = []
    vectors: list[Any] = []
    said: list[tuple[int, ...]] = []
    with torch.inference_mode():
        for group, hidden in _read(model.network, list(wanted), tokenizer.pad_token_id or 0, device):
            for ids, states in zip(group, hidden, strict=True):
                for note, passage in wanted[ids]:
                    for span, sentence, own, number in zip(
                        passage.spans, passage.sentences, passage.rules, passage.numbers, strict=True
                    ):
                        vectors.append(torch.cat([states[slice(*span)].mean(0), states[slice(*sentence)].mean(0)]))
                        said.append(own)
                        places.append((note, number))
        size = 4 * _ROWS
        for begin in range(0, len(vectors), size):
            part = vectors[begin : begin + size]
            filled = part + [part[-1]] * (size - len(part))
            rule_rows = answers(said[begin : begin + size] + [said[-1]] * (len(filled) - len(part)))
            logits = model.judge(torch.stack(filled), torch.from_numpy(rule_rows).to(device))
            split = [torch.softmax(axis.float(), -1).cpu().numpy() for axis in logits.split(task.sizes, dim=-1)]
            for row, (note, number) in enumerate(places[begin : begin + size]):
                found[note][number] = [axis[row].round(4) for axis in split]
    model.train(was_training)
    return found


def _read(
    network: Any, passages: Sequence[tuple[int, ...]], pad_token_id: int, device: Any
) -> Iterator[tuple[list[tuple[int, ...]], Any]]:
    """Yield passages, some at a time, with their hidden states; every batch of a width has the same shape."""
    import torch

    groups: dict[int, list[tuple[int, ...]]] = {}
    for ids in passages:
        groups.setdefault(-(-len(ids) // _STEP) * _STEP, []).append(ids)
    for width, members in sorted(groups.items()):
        for begin in range(0, len(members), _ROWS):
            part = members[begin : begin + _ROWS]
            batch = torch.full((_ROWS, width), pad_token_id)
            mask = torch.zeros((_ROWS, width), dtype=torch.long)
            for row, ids in enumerate(part + [part[-1]] * (_ROWS - len(part))):
                batch[row, : len(ids)] = torch.tensor(ids)
                mask[row, : len(ids)] = 1
            hidden = network(input_ids=batch.to(device), attention_mask=mask.to(device)).last_hidden_state.float()
            yield part, hidden[: len(part)]


def thresholds(
    task: AssertionTask,
    probabilities: Sequence[Sequence[Sequence[np.ndarray] | None]],
    rules: Sequence[Sequence[Axes]],
    gold: Sequence[Sequence[Axes]],
) -> list[float]:
    """Return for each axis how sure the classifier has to be: what makes most spans right, the highest of several.

    A threshold above 1 leaves an axis to the rules.

    Parameters
    ----------
    probabilities : from `predict`, of development notes.
    rules, gold : the axes of each span.
    """
    found = []
    for place, (axis, values) in enumerate(task.axes):
        column = list(AXES).index(axis)
        sure, gain = [], []
        for note in range(len(gold)):
            for chances, said, wanted in zip(probabilities[note], rules[note], gold[note], strict=True):
                if chances is None or said[column] not in values:
                    continue
                best = int(chances[place].argmax())
                sure.append(float(chances[place][best]))
                gain.append(int(values[best] == wanted[column]) - int(said[column] == wanted[column]))
        candidates = np.array(sorted({LEFT_TO_RULES, *sure}, reverse=True))
        order = np.argsort(-np.array(sure), kind="stable")
        total = np.concatenate([[0], np.cumsum(np.array(gain, dtype=np.int64)[order])])
        taken = np.searchsorted(-np.array(sure)[order], -candidates, side="right")
        found.append(float(candidates[int(total[taken].argmax())]))
    return found


LEFT_TO_RULES = 2.0
"""A threshold that no probability reaches."""


# Scores ---------------------------------------------------------------------------------------------------------------


def count(
    gold: Sequence[Sequence[Axes]], said: Sequence[Sequence[Axes]], values: Sequence[tuple[str, str]]
) -> np.ndarray:
    """Return for each note and each (axis, value) the right, said and gold spans, then the spans right on every axis.

    Returns
    -------
    (n_notes, 3 * len(values) + 2) int64; the last two columns are spans right on all four axes, and all spans.
    """
    columns = [list(AXES).index(axis) for axis, _ in values]
    counts = np.zeros((len(gold), 3 * len(values) + 2), dtype=np.int64)
    for row, (wanted, got) in enumerate(zip(gold, said, strict=True)):
        for place, (column, (_, value)) in enumerate(zip(columns, values, strict=True)):
            is_gold = np.array([axes[column] == value for axes in wanted], dtype=bool)
            is_said = np.array([axes[column] == value for axes in got], dtype=bool)
            counts[row, 3 * place : 3 * place + 3] = (is_gold & is_said).sum(), is_said.sum(), is_gold.sum()
        counts[row, -2:] = sum(map(tuple.__eq__, map(tuple, wanted), map(tuple, got))), len(wanted)
    return counts


def score(
    counts: np.ndarray,
    beside: np.ndarray,
    values: Sequence[tuple[str, str]],
    patients: Sequence[str],
    *,
    part: str,
    seed: int,
) -> dict[str, Estimate]:
    """F1 of each value and the share of spans right on all axes, of the classifier, of the rules, and the difference.

    Parameters
    ----------
    counts, beside : from `count`, of the classifier and of the rules, on the same spans.
    patients : of each note.

    Returns
    -------
    `test.f1.VALUE`, `test.rules.f1.VALUE`, `test.gain.f1.VALUE` and the like of `all_axes` and `macro_f1`, the mean F1
    of the values that are not the usual ones of their axis. A gain is of the same resampled patients.
    """
    width = counts.shape[1]
    both = by_patient(patients, np.concatenate([counts, beside], axis=1))
    common: dict[str, Any] = {"n_notes": len(patients), "part": part, "seed": seed}
    found: dict[str, Estimate] = {}
    for name, measure in _measures(values).items():

        def own(sums: np.ndarray, measure: _Measure = measure) -> np.ndarray:
            return measure(sums[..., :width])

        def rules(sums: np.ndarray, measure: _Measure = measure) -> np.ndarray:
            return measure(sums[..., width:])

        def gain(sums: np.ndarray, measure: _Measure = measure) -> np.ndarray:
            return measure(sums[..., :width]) - measure(sums[..., width:])

        for kind, statistic in (("", own), ("rules.", rules), ("gain.", gain)):
            found[f"test.{kind}{name}"] = patient_bootstrap(both, statistic, **common)
    return found


_Measure = Callable[[np.ndarray], np.ndarray]


def _measures(values: Sequence[tuple[str, str]]) -> dict[str, _Measure]:
    """Return what is reported, as functions of the summed counts of `count`."""

    def f1(sums: np.ndarray, place: int) -> np.ndarray:
        right, said, gold = (sums[..., 3 * place + column] for column in range(3))
        return _ratio(2 * right, said + gold)

    unusual = [place for place, (axis, value) in enumerate(values) if value != AXES[axis][0]]
    found: dict[str, _Measure] = {"all_axes": lambda sums: _ratio(sums[..., -2], sums[..., -1])}
    if unusual:
        # Of a value that no resampled patient has nothing is known; the others are averaged.
        found["macro_f1"] = lambda sums: np.nanmean([f1(sums, place) for place in unusual], axis=0)
    return found | {f"f1.{value}": partial(f1, place=place) for place, (_, value) in enumerate(values)}


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, part / whole, np.nan)


# The finished classifier ----------------------------------------------------------------------------------------------


class AssertionClassifier:
    """A trained classifier, ready to be used beside the rules.

    Parameters
    ----------
    thresholds : a probability for each of the task's axes, below which the rules decide.
    """

    def __init__(self, model: Any, task: AssertionTask, tokenizer: Any, thresholds: Sequence[float]) -> None:
        self.task, self.thresholds = task, tuple(thresholds)
        self._model, self._tokenizer = model, tokenizer

    @classmethod
    def load(cls, run: str | Path) -> AssertionClassifier:
        """Load a finished `assertion` run.

        Raises
        ------
        ModelError : the run is of another recipe, or damaged.
        RunError : it is half-written.
        """
        folder = Path(run)
        task, told = _told(folder)
        base = load_base(str(folder), quantization=told["quantization"], bidirectional=True)
        model = build_model(base.network, task, seed=0)
        load_head(model, folder)
        return cls(model, task, base.tokenizer, told["thresholds"])

    def predict(
        self,
        texts: Sequence[str],
        spans: Sequence[Sequence[tuple[int, int]]],
        rules: Sequence[Sequence[Assertion]],
    ) -> list[list[Assertion]]:
        """Return what each note asserts of each of its spans.

        Parameters
        ----------
        texts : notes, unchanged.
        spans : (start, end) of each note, in any order.
        rules : what `assert_spans` says of them.
        """
        if all(threshold > 1 for threshold in self.thresholds):  # the rules decide everything
            return [list(own) for own in rules]
        return [
            [
                one if chances is None else corrected(one, self.task.decide(chances, axes_of(one), self.thresholds))
                for one, chances in zip(own, found, strict=True)
            ]
            for own, found in zip(rules, self.probabilities(texts, spans, rules), strict=True)
        ]

    def probabilities(
        self,
        texts: Sequence[str],
        spans: Sequence[Sequence[tuple[int, int]]],
        rules: Sequence[Sequence[Assertion]],
    ) -> list[list[list[np.ndarray] | None]]:
        """Return what `predict` decides by; see the function of that name."""
        said = [[axes_of(one) for one in own] for own in rules]
        return predict(self._model, self.task, self._tokenizer, texts, spans, said)


def _told(folder: Path) -> tuple[AssertionTask, dict[str, Any]]:
    """Return what a finished run was trained to do, and its `task.json`."""
    Run.load(folder)
    told = read_task(folder)
    if told.get("task") != "assertion":
        raise ModelError(f"run {folder} was trained for {told.get('task')}, not for assertion")
    try:
        axes = tuple((axis, tuple(values)) for axis, values in told["axes"].items())
        whole = len(told["thresholds"]) == len(axes) and "quantization" in told
        task = AssertionTask(axes, told["window"], told["rules"])
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole or not (folder / "head.safetensors").is_file():
        raise ModelError(f"run {folder} is damaged; copy it again")
    return task, told


def check_classifier(name: str) -> ResolvedModel:
    """Resolve what `--assertion` names, and refuse what is no finished run of the recipe.

    Raises
    ------
    UsageError : it is not there, half-written, damaged, or was trained for something else; or its base model is gone.
    """
    try:
        if not Path(name).is_dir():
            raise UsageError("no such run directory")
        _told(Path(name))
        return resolve_model(name)
    except ClinicalNlpError as error:
        raise UsageError(f"--assertion {name}: {error}") from None


def save(
    folder: Path, model: Any, task: AssertionTask, base: BaseModel, thresholds: Sequence[float], *, full: bool
) -> None:
    """Write what was trained: `head.safetensors`, `task.json`, and the adapter or (full) the whole backbone."""
    save_trained(folder, model, base, full=full)
    write_json(
        folder / "task.json",
        {
            "task": "assertion",
            "axes": {axis: list(values) for axis, values in task.axes},
            "window": task.window,
            "rules": task.rules,
            "thresholds": list(thresholds),
            "quantization": base.quantization,
        },
    )
