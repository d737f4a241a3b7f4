"""Named entities: words to windows, a linear head on the hidden states, constrained decoding, span scores."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from clinical_nlp.config import NamedConfig
from clinical_nlp.errors import ConfigError, ModelError
from clinical_nlp.models.adapters import ADAPTER, has_adapter, save_adapter
from clinical_nlp.models.loading import BaseModel, backbone_prefix, check_offsets, load_base, read_task
from clinical_nlp.runs import Estimate, Run, write_json
from clinical_nlp.statistics.intervals import by_patient, patient_bootstrap
from clinical_nlp.tasks.augmentation import drop_sections

if TYPE_CHECKING:
    import torch

Span = tuple[int, int, str]
"""(start, end, label) into the unchanged note text."""
Prediction = tuple[int, int, str, float]
"""(start, end, label, score); the score is the mean probability of the span's tags."""


class LossConfig(NamedConfig):
    """What a wrongly tagged word costs."""

    name: Literal["cross_entropy", "weighted", "focal"] = "cross_entropy"
    """cross_entropy: every word alike. weighted: more for words of rare tags. focal: more for words that the model
    finds hard."""
    power: float = Field(default=0.5, ge=0, le=1)
    """weighted: a tag weighs (words of the commonest tag / its own words) to this power."""
    bound: float = Field(default=10.0, ge=1)
    """weighted: no tag weighs more than this many times the commonest one."""
    gamma: float = Field(default=2.0, ge=0)
    """focal: a word counts (1 - probability of its tag) to this power."""


_WORD = re.compile(r"[^\W_]+|[^\w\s]+|_+")


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a note that fits the model: token ids, and for each token the word whose tag it decides, or -1."""

    note: int
    input_ids: list[int]
    words: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One note: character spans of its words, and its windows. Every word is decided in exactly one window.

    Of its gold spans, `lost` have no word (empty, blank, outside the text, or on characters that the tokenizer drops)
    and `covered` touch a word of a longer one; neither kind is among the labels.
    """

    word_spans: list[tuple[int, int]]
    windows: list[Window]
    lost: int = 0
    covered: int = 0


@dataclass(frozen=True, slots=True)
class NerTask:
    """What is tagged, and how notes are cut.

    `labels` are entity types; tags are O, then B- and I- for each type. `window` and `overlap` count tokens.
    """

    labels: tuple[str, ...]
    window: int
    overlap: int
    bidirectional: bool

    @property
    def tags(self) -> list[str]:
        """Tag names in the order of the head's outputs."""
        return ["O", *(f"{kind}-{label}" for label in self.labels for kind in "BI")]

    def encode(self, text: str, tokenizer: Any, *, note: int = 0, spans: Iterable[Span] | None = None) -> Encoded:
        """Cut one note into windows; with gold `spans`, tokens carry tag indices (else -100).

        Where gold spans overlap, the longest is kept. A span that ends inside a word takes the whole word. A note
        without a token has no window.

        Raises
        ------
        ConfigError : the window has no room for the special tokens, the overlap and two tokens more.
        ModelError : the tokenizer reports no usable offsets.
        """
        before, after = special_tokens(tokenizer)
        body = self.window - len(before) - len(after)
        if body < max(2, self.overlap + 1):
            raise ConfigError(
                f"a window of {self.window} tokens leaves {max(0, body)} beside the special ones, too few for an "
                f"overlap of {self.overlap}; set a larger window or a smaller overlap"
            )
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        check_offsets(tokenizer, text, offsets, ids)
        word_spans, first_token = _words(text, offsets)
        tags, lost, covered = None, 0, 0
        if spans is not None:
            tags, lost, covered = _tags(word_spans, spans, self.labels, len(text))
        word_of = [-1] * len(ids)
        for word, token in enumerate(first_token):
            word_of[token] = word
        step = body - self.overlap
        windows = []
        for begin in range(0, max(1, len(ids) - self.overlap) if ids else 0, step):
            end = min(begin + body, len(ids))
            # A word is decided where it has the most context: each window owns its middle, the outer ones their rim.
            low = 0 if begin == 0 else begin + self.overlap // 2
            high = len(ids) if end == len(ids) else begin + step + self.overlap // 2
            words = [word_of[index] if low <= index < high else -1 for index in range(begin, end)]
            labels = [-100 if word < 0 or tags is None else tags[word] for word in words]
            windows.append(
                Window(
                    note,
                    [*before, *ids[begin:end], *after],
                    [*[-1] * len(before), *words, *[-1] * len(after)],
                    [*[-100] * len(before), *labels, *[-100] * len(after)],
                )
            )
            if end == len(ids):
                break
        return Encoded(word_spans, windows, lost, covered)

    def decode(self, encoded: Encoded, log_probs: np.ndarray) -> list[Prediction]:
        """Turn per-word tag log-probabilities (n_words, n_tags) into spans, by the best tag path without a stray I-."""
        path = best_path(log_probs)
        found: list[Prediction] = []
        begin: int | None = None
        for word in range(len(path) + 1):
            tag = path[word] if word < len(path) else 0
            continues = tag > 0 and tag % 2 == 0
            if begin is not None and not continues:
                label = self.labels[(path[begin] - 1) // 2]
                score = float(np.exp(log_probs[np.arange(begin, word), path[begin:word]]).mean())
                found.append((encoded.word_spans[begin][0], encoded.word_spans[word - 1][1], label, score))
                begin = None
            if tag % 2 == 1:
                begin = word
        return found


def most_tokens(network: Any) -> int | None:
    """Return how many tokens a backbone has positions for, or None where nothing limits them.

    RoBERTa and its kin count positions from behind the padding index, so two of their 514 are never used.
    """
    import torch

    limit = getattr(network.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    for name, module in network.named_modules():
        padded = isinstance(module, torch.nn.Embedding) and module.padding_idx is not None
        if padded and name.endswith("position_embeddings") and module.num_embeddings == limit:
            return limit - module.padding_idx - 1
    return limit


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that go before and after a text: cls or bos, and sep for models that have it."""
    before = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    after = tokenizer.sep_token_id
    return ([] if before is None else [before]), ([] if after is None else [after])


def _words(text: str, offsets: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[int]]:
    """Return words as character spans, and the first token of each; words that share a token are one word."""
    words = [match.span() for match in _WORD.finditer(text)]
    spans: list[tuple[int, int]] = []
    first: list[int] = []
    token = 0
    for start, end in words:
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        if token == len(offsets) or offsets[token][0] >= end:
            continue  # the tokenizer dropped this word (a control character, say): nothing can be said about it
        if first and first[-1] == token:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
            first.append(token)
    return spans, first


def _tags(
    word_spans: Sequence[tuple[int, int]], spans: Iterable[Span], labels: Sequence[str], length: int
) -> tuple[list[int], int, int]:
    """Return the tag of each word, how many spans have no word, and how many touch a word of a longer span."""
    tags = [0] * len(word_spans)
    lost = covered = 0
    starts = np.array([start for start, _ in word_spans], dtype=np.int64)
    ends = np.array([end for _, end in word_spans], dtype=np.int64)
    for start, end, label in sorted(spans, key=lambda span: (span[0] - span[1], span[0], span[2])):
        inside = np.flatnonzero((starts < end) & (ends > start))
        if not 0 <= start < end <= length or len(inside) == 0:
            lost += 1
            continue
        if any(tags[word] for word in inside):
            covered += 1
            continue
        kind = labels.index(label)
        for position, word in enumerate(inside):
            tags[word] = 1 + 2 * kind + (position > 0)
    return tags, lost, covered


class NoteWindows:
    """Training examples: the windows of notes, which are added one by one.

    With `drop_sections`, each epoch has its own shortened notes (see `augmentation.drop_sections`), encoded again when
    they are asked for. There are as many examples as windows of the whole notes, and `lengths` are those of the whole
    notes, so that the order of an epoch does not depend on what was dropped; an example for which the shortened note
    has no window is one token without a label.

    `tokens` counts those of the whole notes, `spans`, `lost` and `covered` their gold spans (for the last two see
    `Encoded`).
    """

    def __init__(self, task: NerTask, tokenizer: Any, *, drop_sections: float = 0.0, seed: int = 0) -> None:
        self.tokens = self.spans = self.lost = self.covered = 0
        self._task, self._tokenizer = task, tokenizer
        self._probability, self._seed, self._epoch = drop_sections, seed, 0
        self._notes: list[tuple[str, str, list[Span] | None]] = []
        self._whole: list[list[Window]] = []
        self._place: list[tuple[int, int]] = []
        self._shortened: dict[int, list[Window]] = {}

    def add(self, note_id: str, text: str, spans: Iterable[Span] | None) -> None:
        """Add a note with its gold spans of the task's labels (others are left out); None where it has no gold.

        `note_id` must be the note's alone: the sections to drop are drawn from it.
        """
        gold = None if spans is None else [span for span in spans if span[2] in self._task.labels]
        encoded = self._task.encode(text, self._tokenizer, note=len(self._notes), spans=gold)
        self.tokens += sum(len(window.input_ids) for window in encoded.windows)
        self.spans += len(gold or ())
        self.lost += encoded.lost
        self.covered += encoded.covered
        self._place += [(len(self._notes), index) for index in range(len(encoded.windows))]
        self._notes.append((note_id, text, gold))
        self._whole.append(encoded.windows)

    @property
    def notes(self) -> list[int]:
        """Which note each example is of, counted in the order in which they were added."""
        return [note for note, _ in self._place]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example, of the whole notes."""
        return [len(self._whole[note][index].input_ids) for note, index in self._place]

    def tag_counts(self) -> np.ndarray:
        """Return how many words of the whole notes have each tag, (n_tags,) int64."""
        labels = [label for note in self._whole for window in note for label in window.labels if label >= 0]
        return np.bincount(np.array(labels, dtype=np.int64), minlength=len(self._task.tags))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose notes are read next."""
        self._epoch = epoch
        self._shortened.clear()

    def __len__(self) -> int:
        return len(self._place)

    def __getitem__(self, example: int) -> Window:
        note, index = self._place[example]
        windows = self._whole[note]
        if self._probability > 0:
            if note not in self._shortened:
                self._shortened[note] = self._shorten(note)
            # What is left may be cut into tokens otherwise; should it ever take more windows, the note is read whole.
            if len(self._shortened[note]) <= len(windows):
                windows = self._shortened[note]
        if index < len(windows):
            return windows[index]
        return Window(note, self._whole[note][index].input_ids[:1], [-1], [-100])

    def _shorten(self, note: int) -> list[Window]:
        note_id, text, spans = self._notes[note]
        draw: dict[str, Any] = {"seed": self._seed, "epoch": self._epoch, "note_id": note_id}
        text, kept = drop_sections(text, spans or [], probability=self._probability, **draw)
        spans = None if spans is None else kept
        return self._task.encode(text, self._tokenizer, note=note, spans=spans).windows


def tag_weights(counts: np.ndarray, loss: LossConfig) -> np.ndarray:
    """Weights of the tags for the loss `weighted`.

    A tag with n of the training words weighs r = min(bound, (n_max / n) ** power), where n_max are the words of the
    commonest tag (O, in general), divided by the mean of r over the training words: the mean weight of a word is 1,
    so that the loss, its gradient and the learning rate keep their size.

    Parameters
    ----------
    counts : (n_tags,) words with each tag in the training part, before any section is dropped.
    loss : its `power` and `bound`. Power 0 is plain cross-entropy, 1 the inverse frequency.

    Returns
    -------
    (n_tags,) float64, all positive; the largest is at most `bound` times the smallest. A tag that no word has gets
    the largest, and nothing is ever weighed by it.

    References
    ----------
    Mahajan et al. 2018, Exploring the Limits of Weakly Supervised Pretraining, section 2.2 (square root of the
    inverse frequency).
    """
    counts = np.asarray(counts, dtype=np.float64)
    with np.errstate(divide="ignore"):
        ratio = np.minimum(loss.bound, (counts.max() / counts) ** loss.power)
    return np.asarray(ratio * counts.sum() / (ratio * counts).sum())


def best_path(log_probs: np.ndarray) -> np.ndarray:
    """Viterbi path over tags where I-x may follow only B-x or I-x; (n, 1 + 2 k) -> (n,) int."""
    count, tags = log_probs.shape
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    best = log_probs.argmax(1)
    inside = (best > 0) & (best % 2 == 0)
    before = np.concatenate([[0], best[:-1]])
    if not (inside & (before != best) & (before != best - 1)).any():
        return np.asarray(
            best, dtype=np.int64
        )  # the best tag of each word is a path already, so there is no better one
    allowed = np.zeros((tags, tags))
    for tag in range(2, tags, 2):
        allowed[:, tag] = -np.inf
        allowed[[tag - 1, tag], tag] = 0.0
    score = log_probs[0] + np.where((np.arange(tags) > 0) & (np.arange(tags) % 2 == 0), -np.inf, 0.0)
    back = np.zeros((count, tags), dtype=np.int64)
    for word in range(1, count):
        total = score[:, None] + allowed
        back[word] = total.argmax(0)
        score = total[back[word], np.arange(tags)] + log_probs[word]
    path = np.zeros(count, dtype=np.int64)
    path[-1] = score.argmax()
    for word in range(count - 1, 0, -1):
        path[word - 1] = back[word, path[word]]
    return path


def build_model(
    network: Any, tags: int, *, seed: int, loss: LossConfig | None = None, weights: np.ndarray | None = None
) -> Any:
    """Put a linear tagging head on a backbone; the head is float32, never quantised and always trains.

    Parameters
    ----------
    network : backbone that returns hidden states.
    tags : outputs of the head.
    seed : of the head's first weights.
    loss : what a wrongly tagged word costs; default cross-entropy.
    weights : (tags,) for the loss `weighted`, see `tag_weights`.

    Notes
    -----
    Every loss is a sum over words divided by the number of labelled words of the whole optimiser step, which the
    trainer gives as `num_items_in_batch`. The weighted loss too is divided by the number of words and not by the sum
    of their weights: a step of eight small batches then equals one large batch exactly. Its weights have mean 1 over
    the training words, so on average the two denominators are the same.

    References
    ----------
    Lin et al. 2017, Focal Loss for Dense Object Detection, eq. 4.
    """
    import torch

    config: Any = network.config
    chosen = loss or LossConfig()
    if (chosen.name == "weighted") != (weights is not None):
        raise ConfigError(f"loss {chosen.name!r} {'needs' if weights is None else 'takes no'} weights by tag")
    torch.manual_seed(seed)

    class Tagger(torch.nn.Module):
        tag_weights: torch.Tensor | None

        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.n_classes = tags
            self.head = torch.nn.Linear(config.hidden_size, tags)
            torch.nn.init.normal_(self.head.weight, std=0.02)
            torch.nn.init.zeros_(self.head.bias)
            by_tag = None if weights is None else torch.tensor(weights, dtype=torch.float32)
            self.register_buffer("tag_weights", by_tag, persistent=False)

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            labels: torch.Tensor | None = None,
            shift_labels: torch.Tensor | None = None,
            num_items_in_batch: Any = None,
            soft: torch.Tensor | None = None,
        ) -> dict[str, Any]:
            hidden = self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            logits = self.head(hidden.float())
            if labels is None:
                return {"logits": logits}
            if soft is None:
                total = self.cost(logits.flatten(0, 1), labels.flatten())
            else:  # a teacher's probabilities of the tags stand in the place of gold
                each = -(soft * torch.log_softmax(logits, -1)).sum(-1)
                total = each[labels != -100].sum()
            words = num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum()
            return {"loss": total / torch.as_tensor(words, device=total.device).clamp(min=1), "logits": logits}

        def cost(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            cross_entropy = torch.nn.functional.cross_entropy
            if chosen.name != "focal":
                return cross_entropy(logits, labels, weight=self.tag_weights, reduction="sum")
            return self.losses(logits, labels).sum()

        def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            """Loss of each word, (n, n_tags) and (n,) -> (n,)."""
            each = torch.nn.functional.cross_entropy(logits, labels, weight=self.tag_weights, reduction="none")
            if chosen.name != "focal":
                return each
            # Kept off 0, where a power below 1 has no gradient.
            return (1 - torch.exp(-each)).clamp(min=1e-6) ** chosen.gamma * each

        def gradient_checkpointing_enable(self, **options: Any) -> None:
            self.network.gradient_checkpointing_enable(**options)
            self.network.enable_input_require_grads()

    model = Tagger()
    if type(model.head) is not torch.nn.Linear:
        raise ModelError("the tagging head is not a plain linear layer")
    return model.to(network.device)


def collate(windows: Sequence[Window], pad_token_id: int) -> dict[str, Any]:
    """Pad windows to one width; `shift_labels` makes the trainer count every label, the first position too."""
    import torch

    width = max(len(window.input_ids) for window in windows)
    ids = torch.full((len(windows), width), pad_token_id)
    mask = torch.zeros((len(windows), width), dtype=torch.long)
    labels = torch.full((len(windows), width), -100)
    for row, window in enumerate(windows):
        length = len(window.input_ids)
        ids[row, :length] = torch.tensor(window.input_ids)
        mask[row, :length] = 1
        labels[row, :length] = torch.tensor(window.labels)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "shift_labels": labels}


def predict_spans(
    model: Any, task: NerTask, tokenizer: Any, texts: Sequence[str], *, batch_tokens: int = 8192
) -> list[list[Prediction]]:
    """Tag notes: windows sorted by length, logits stitched back to words, spans decoded a note at a time."""
    found = predict_tags(model, task, tokenizer, texts, batch_tokens=batch_tokens)
    return [task.decode(note, score) for note, score in found]


def predict_tags(
    model: Any, task: NerTask, tokenizer: Any, texts: Sequence[str], *, batch_tokens: int = 8192
) -> list[tuple[Encoded, np.ndarray]]:
    """Return each note with the log-probabilities of its words' tags, (n_words, n_tags) float32."""
    import torch

    encoded = [task.encode(text, tokenizer, note=index) for index, text in enumerate(texts)]
    windows = sorted((window for note in encoded for window in note.windows), key=lambda window: len(window.input_ids))
    scores = [np.zeros((len(note.word_spans), len(task.tags)), dtype=np.float32) for note in encoded]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    begin = 0
    with torch.inference_mode():
        while begin < len(windows):
            end = begin + 1
            while end < len(windows) and (end + 1 - begin) * len(windows[end].input_ids) <= batch_tokens:
                end += 1
            group = windows[begin:end]
            batch = collate(group, tokenizer.pad_token_id or 0)
            logits = model(batch["input_ids"].to(device), batch["attention_mask"].to(device))["logits"]
            log_probs = torch.log_softmax(logits.float(), -1).cpu().numpy()
            for row, window in enumerate(group):
                words = np.array(window.words)
                decided = np.flatnonzero(words >= 0)
                scores[window.note][words[decided]] = log_probs[row, decided]
            begin = end
    model.train(was_training)
    return list(zip(encoded, scores, strict=True))


def count_matches(gold: Sequence[Span], predicted: Sequence[Span], labels: Sequence[str]) -> np.ndarray:
    """Counts of one note, by label: strict true positives, predicted, gold, lenient true positives.

    Strict: same start, end and label. Lenient: same label and at least one character in common, each gold span found
    at most once; in the order of the text, a predicted span takes the gold span that is still free and whose edges are
    nearest. This is `ent_type` of SemEval 2013 task 9, a label at a time. Spans are a set: one that is given twice
    counts once.

    Returns
    -------
    (len(labels), 4) int64.
    """
    counts = np.zeros((len(labels), 4), dtype=np.int64)
    for index, label in enumerate(labels):
        want = sorted({(start, end) for start, end, name in gold if name == label})
        have = sorted({(start, end) for start, end, name in predicted if name == label})
        free = list(want)
        for a, b in have:
            if near := [span for span in free if a < span[1] and span[0] < b]:
                free.remove(min(near, key=lambda span: abs(a - span[0]) + abs(b - span[1])))
        counts[index] = (len({*want} & {*have}), len(have), len(want), len(want) - len(free))
    return counts


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, part / whole, np.nan)


_SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "f1_strict": lambda c: _ratio(2 * c[..., 0], c[..., 1] + c[..., 2]),
    "precision_strict": lambda c: _ratio(c[..., 0], c[..., 1]),
    "recall_strict": lambda c: _ratio(c[..., 0], c[..., 2]),
    "f1_lenient": lambda c: _ratio(2 * c[..., 3], c[..., 1] + c[..., 2]),
}


def score(
    counts: np.ndarray, labels: Sequence[str], patients: Sequence[str], *, part: str, seed: int
) -> dict[str, Estimate]:
    """Micro scores over labels, and strict and lenient F1 per label, each with its patient-bootstrap interval.

    Parameters
    ----------
    counts : (n_notes, n_labels, 4) from `count_matches`.
    patients : n_notes patient ids.
    """
    common: dict[str, Any] = {"n_notes": len(patients), "part": part, "seed": seed}
    total = by_patient(patients, counts.sum(1))
    found = {f"test.{name}": patient_bootstrap(total, formula, **common) for name, formula in _SCORES.items()}
    for index, label in enumerate(labels if len(labels) > 1 else []):
        rows = by_patient(patients, counts[:, index])
        for name in ("f1_strict", "f1_lenient"):
            found[f"test.{name}.{label}"] = patient_bootstrap(rows, _SCORES[name], **common)
    return found


def f1_strict(counts: np.ndarray, patients: Sequence[str], *, part: str, seed: int) -> Estimate:
    """Micro strict F1 alone; parameters as `score`."""
    summed = by_patient(patients, counts.sum(1))
    return patient_bootstrap(summed, _SCORES["f1_strict"], n_notes=len(patients), part=part, seed=seed)


class NerPredictor:
    """A trained tagger, ready to be used."""

    def __init__(self, model: Any, task: NerTask, tokenizer: Any) -> None:
        self.task = task
        self._model, self._tokenizer = model, tokenizer

    @classmethod
    def load(cls, run: str | Path) -> NerPredictor:
        """Load a finished `ner` run."""
        folder = Path(run)
        Run.load(folder)
        values = read_task(folder)
        if values.get("task") != "ner":
            raise ModelError(f"run {folder} was trained for {values.get('task')}, not for ner")
        try:
            task = NerTask(tuple(values["labels"]), values["window"], values["overlap"], values["bidirectional"])
            quantization = values["quantization"]
        except (KeyError, TypeError):
            raise ModelError(f"{folder / 'task.json'} is damaged; train the run again") from None
        base = load_base(str(folder), quantization=quantization, bidirectional=task.bidirectional)
        model = build_model(base.network, len(task.tags), seed=0)
        load_head(model, folder)
        return cls(model, task, base.tokenizer)

    def predict(self, texts: Sequence[str]) -> list[list[Prediction]]:
        """Return the spans of each text as (start, end, label, score), in order."""
        return predict_spans(self._model, self.task, self._tokenizer, texts)

    def tags(self, texts: Sequence[str]) -> list[tuple[Encoded, np.ndarray]]:
        """Return the words of each text with the log-probabilities of their tags, (n_words, n_tags) float32."""
        return predict_tags(self._model, self.task, self._tokenizer, texts)


def save(folder: Path, model: Any, task: NerTask, base: BaseModel, *, full: bool) -> None:
    """Write what was trained, and `task.json`."""
    save_trained(folder, model, base, full=full)
    values = {"task": "ner", "labels": list(task.labels), "window": task.window, "overlap": task.overlap}
    write_json(folder / "task.json", values | {"bidirectional": task.bidirectional, "quantization": base.quantization})


def save_trained(folder: Path, model: Any, base: BaseModel, *, full: bool) -> None:
    """Write the head of a model, and the adapter or (full) the whole backbone under it."""
    from safetensors.torch import save_file

    state = {name: value.detach().cpu().contiguous() for name, value in model.head.state_dict().items()}
    save_file(state, folder / "head.safetensors")
    if full:
        model.network.save_pretrained(folder / "model")
        base.tokenizer.save_pretrained(folder / "model")
    elif has_adapter(model.network):
        save_adapter(model.network, folder / "adapter", name=ADAPTER, prefix=backbone_prefix(model.network))


def load_head(model: Any, folder: Path) -> None:
    """Put the saved head of a run into a model of the same tags."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.head.load_state_dict(load_file(folder / "head.safetensors"))
    except (OSError, SafetensorError, RuntimeError, json.JSONDecodeError):
        raise ModelError(f"{folder / 'head.safetensors'} is missing, damaged or of another task") from None
