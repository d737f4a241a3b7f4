"""Named entities: words to windows, a linear head on the hidden states, constrained decoding, span scores."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clinical_nlp.errors import ModelError
from clinical_nlp.models.loading import BaseModel, backbone_prefix, check_offsets, load_base, read_task
from clinical_nlp.runs import Estimate, Run, write_json
from clinical_nlp.statistics.intervals import by_patient, patient_bootstrap

if TYPE_CHECKING:
    import torch

Span = tuple[int, int, str]
"""(start, end, label) into the unchanged note text."""
Prediction = tuple[int, int, str, float]
"""(start, end, label, score); the score is the mean probability of the span's tags."""

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
    """One note: character spans of its words, and its windows. Every word is decided in exactly one window."""

    word_spans: list[tuple[int, int]]
    windows: list[Window]


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

        Where gold spans overlap, the longest is kept. A span that ends inside a word takes the whole word.
        """
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        check_offsets(tokenizer, text, offsets, ids)
        word_spans, first_token = _words(text, offsets)
        tags = _tags(word_spans, spans, self.labels) if spans is not None else None
        word_of = [-1] * len(ids)
        for word, token in enumerate(first_token):
            word_of[token] = word
        before, after = special_tokens(tokenizer)
        body = self.window - len(before) - len(after)
        step = max(1, body - self.overlap)
        windows = []
        for begin in range(0, max(1, len(ids) - self.overlap), step):
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
        return Encoded(word_spans, windows)

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


def _tags(word_spans: Sequence[tuple[int, int]], spans: Iterable[Span], labels: Sequence[str]) -> list[int]:
    tags = [0] * len(word_spans)
    starts = np.array([start for start, _ in word_spans], dtype=np.int64)
    ends = np.array([end for _, end in word_spans], dtype=np.int64)
    for start, end, label in sorted(spans, key=lambda span: (span[0] - span[1], span[0], span[2])):
        inside = np.flatnonzero((starts < end) & (ends > start))
        if len(inside) == 0 or any(tags[word] for word in inside):
            continue
        kind = labels.index(label)
        for position, word in enumerate(inside):
            tags[word] = 1 + 2 * kind + (position > 0)
    return tags


def best_path(log_probs: np.ndarray) -> np.ndarray:
    """Viterbi path over tags where I-x may follow only B-x or I-x; (n, 1 + 2 k) -> (n,) int."""
    count, tags = log_probs.shape
    if count == 0:
        return np.zeros(0, dtype=np.int64)
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


def build_model(network: Any, tags: int, *, seed: int) -> Any:
    """Put a linear tagging head on a backbone; the head is float32, never quantised and always trains."""
    import torch

    config: Any = network.config
    torch.manual_seed(seed)

    class Tagger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.head = torch.nn.Linear(config.hidden_size, tags)
            torch.nn.init.normal_(self.head.weight, std=0.02)
            torch.nn.init.zeros_(self.head.bias)

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            labels: torch.Tensor | None = None,
            shift_labels: torch.Tensor | None = None,
            num_items_in_batch: Any = None,
        ) -> dict[str, Any]:
            hidden = self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            logits = self.head(hidden.float())
            if labels is None:
                return {"logits": logits}
            total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            # Divided by the labelled words of the whole optimiser step, so that accumulation equals one large batch.
            words = num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum()
            return {"loss": total / torch.as_tensor(words, device=total.device).clamp(min=1), "logits": logits}

        def gradient_checkpointing_enable(self, **options: Any) -> None:
            self.network.gradient_checkpointing_enable(**options)
            self.network.enable_input_require_grads()

    model = Tagger()
    if type(model.head) is not torch.nn.Linear:
        raise ModelError("the tagging head is not a plain linear layer")
    return model.to(next(network.parameters()).device)


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
    import torch

    encoded = [task.encode(text, tokenizer, note=index) for index, text in enumerate(texts)]
    windows = sorted((window for note in encoded for window in note.windows), key=lambda window: len(window.input_ids))
    scores = [np.zeros((len(note.word_spans), len(task.tags)), dtype=np.float32) for note in encoded]
    device = next(model.parameters()).device
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
                for position, word in enumerate(window.words):
                    if word >= 0:
                        scores[window.note][word] = log_probs[row, position]
            begin = end
    return [task.decode(note, score) for note, score in zip(encoded, scores, strict=True)]


def count_matches(gold: Sequence[Span], predicted: Sequence[Span], labels: Sequence[str]) -> np.ndarray:
    """Counts of one note, by label: strict true positives, predicted, gold, predicted that overlap, gold that overlap.

    Strict: same start, end and label. Overlap: at least one character in common and the same label.

    Returns
    -------
    (len(labels), 5) int64.
    """
    counts = np.zeros((len(labels), 5), dtype=np.int64)
    for index, label in enumerate(labels):
        want = {(start, end) for start, end, name in gold if name == label}
        have = {(start, end) for start, end, name in predicted if name == label}
        touched = sum(any(a < d and c < b for c, d in want) for a, b in have)
        reached = sum(any(a < d and c < b for c, d in have) for a, b in want)
        counts[index] = (len(want & have), len(have), len(want), touched, reached)
    return counts


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, part / whole, np.nan)


def _f1(counts: np.ndarray) -> np.ndarray:
    return _ratio(2 * counts[..., 0], counts[..., 1] + counts[..., 2])


def score(
    counts: np.ndarray, labels: Sequence[str], patients: Sequence[str], *, part: str, seed: int
) -> dict[str, Estimate]:
    """Micro scores over labels and per label, each with its patient-bootstrap interval.

    Parameters
    ----------
    counts : (n_notes, n_labels, 5) from `count_matches`.
    patients : n_notes patient ids.
    """
    common: dict[str, Any] = {"n_notes": len(patients), "part": part, "seed": seed}

    def lenient(c: np.ndarray) -> np.ndarray:
        precision, recall = _ratio(c[..., 3], c[..., 1]), _ratio(c[..., 4], c[..., 2])
        return _ratio(2 * precision * recall, precision + recall)

    total = by_patient(patients, counts.sum(1))
    found = {
        "test.f1_strict": patient_bootstrap(total, _f1, **common),
        "test.precision_strict": patient_bootstrap(total, lambda c: _ratio(c[..., 0], c[..., 1]), **common),
        "test.recall_strict": patient_bootstrap(total, lambda c: _ratio(c[..., 0], c[..., 2]), **common),
        "test.f1_lenient": patient_bootstrap(total, lenient, **common),
    }
    for index, label in enumerate(labels if len(labels) > 1 else []):
        found[f"test.f1_strict.{label}"] = patient_bootstrap(by_patient(patients, counts[:, index]), _f1, **common)
    return found


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
        task = NerTask(tuple(values["labels"]), values["window"], values["overlap"], values["bidirectional"])
        base = load_base(str(folder), quantization=values["quantization"], bidirectional=task.bidirectional)
        model = build_model(base.network, len(task.tags), seed=0)
        _load_head(model, folder)
        return cls(model, task, base.tokenizer)

    def predict(self, texts: Sequence[str]) -> list[list[Prediction]]:
        """Return the spans of each text as (start, end, label, score), in order."""
        return predict_spans(self._model, self.task, self._tokenizer, texts)


def save(folder: Path, model: Any, task: NerTask, base: BaseModel, *, full: bool) -> None:
    """Write what was trained: `head.safetensors`, `task.json`, and the adapter or (full) the whole backbone."""
    from peft import PeftModel
    from safetensors.torch import save_file

    from clinical_nlp.models.adapters import ADAPTER, save_adapter

    state = {name: value.detach().cpu().contiguous() for name, value in model.head.state_dict().items()}
    save_file(state, folder / "head.safetensors")
    if full:
        model.network.save_pretrained(folder / "model")
        base.tokenizer.save_pretrained(folder / "model")
    elif isinstance(model.network, PeftModel) and ADAPTER in model.network.peft_config:
        save_adapter(model.network, folder / "adapter", name=ADAPTER, prefix=backbone_prefix(model.network))
    values = {"task": "ner", "labels": list(task.labels), "window": task.window, "overlap": task.overlap}
    write_json(folder / "task.json", values | {"bidirectional": task.bidirectional, "quantization": base.quantization})


def _load_head(model: Any, folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.head.load_state_dict(load_file(folder / "head.safetensors"))
    except (OSError, SafetensorError, RuntimeError, json.JSONDecodeError):
        raise ModelError(f"{folder / 'head.safetensors'} is missing, damaged or of another task") from None
