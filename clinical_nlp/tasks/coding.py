"""Clinical coding: all notes of an encounter to a score, the evidence and a probability for each code of a list.

Long text is cut into chunks that the base model reads one by one; each code then attends over all their tokens. What a
code is called starts its query, so a code that nobody was taught has a score too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from clinical_nlp.errors import ConfigError, ModelError, TrainingError
from clinical_nlp.models.loading import BaseModel, check_offsets, load_base, read_task
from clinical_nlp.runs import Run, write_atomic, write_csv, write_json
from clinical_nlp.statistics.calibration import Calibration
from clinical_nlp.tasks.naming import NamedCodes
from clinical_nlp.tasks.ner import load_head, save_trained, special_tokens

if TYPE_CHECKING:
    import torch

HeadName = Literal["label_attention", "pooled"]
SPANS = 3
"""Evidence spans that a predicted code comes with."""


@dataclass(frozen=True, slots=True)
class Document:
    """What is coded, as tokens: chunks with their special tokens, and the place of each token.

    `places` has one row a token, over all chunks: index of the note, start and end in its text; -1, 0, 0 for a special
    token. `cut` counts tokens at the end that did not fit.
    """

    chunks: list[list[int]]
    places: np.ndarray
    cut: int = 0

    @property
    def length(self) -> int:
        """Tokens that the model reads."""
        return len(self.places)


@dataclass(frozen=True, slots=True)
class Evidence:
    """Where a code's attention lies: [start, end) of the text of the `note`-th note, and its share of the attention."""

    note: int
    start: int
    end: int
    weight: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """A code that is proposed; `probability` is calibrated, and `review` says that it is too low to be taken as is."""

    code: str
    label: str
    probability: float
    review: bool
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True, slots=True)
class CodingTask:
    """Which codes are scored and how text is read. `seen` tells for each code whether training had it."""

    codes: tuple[str, ...]
    labels: tuple[str, ...]
    seen: tuple[bool, ...]
    system: str
    unit: Literal["note", "encounter"]
    chunk: int
    max_tokens: int
    bidirectional: bool
    head: HeadName = "label_attention"

    def encode(self, texts: Sequence[str], tokenizer: Any) -> Document:
        """Cut the notes of one document into chunks of equal length; no chunk holds two notes.

        Raises
        ------
        ConfigError : a chunk has no room beside the special tokens.
        ModelError : the tokenizer reports no usable offsets.
        """
        before, after = special_tokens(tokenizer)
        body = self.chunk - len(before) - len(after)
        if body < 8:
            raise ConfigError(f"a chunk of {self.chunk} tokens leaves {max(0, body)} for text; set a larger chunk")
        chunks: list[list[int]] = []
        places: list[tuple[int, int, int]] = []
        room, cut = self.max_tokens, 0
        for note, text in enumerate(texts):
            encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
            check_offsets(tokenizer, text, offsets, ids)
            kept = min(len(ids), room)
            cut += len(ids) - kept
            room -= kept
            count = -(-kept // body)
            for index in range(count):
                begin, end = kept * index // count, kept * (index + 1) // count
                chunks.append([*before, *ids[begin:end], *after])
                places += [(-1, 0, 0)] * len(before)
                places += [(note, start, stop) for start, stop in offsets[begin:end]]
                places += [(-1, 0, 0)] * len(after)
        return Document(chunks, np.array(places, dtype=np.int32).reshape(-1, 3), cut)


Example = tuple[Sequence[Sequence[int] | np.ndarray], list[int] | None]
"""Chunks of tokens of a document, and the indices of its codes; None where they are not known."""


class Documents:
    """Training examples: documents with the indices of their codes."""

    def __init__(self, task: CodingTask, tokenizer: Any) -> None:
        self._task, self._tokenizer = task, tokenizer
        self._place = {code: index for index, code in enumerate(task.codes)}
        self._rows: list[Example] = []
        self.lengths: list[int] = []
        self.cut = self.cut_documents = 0

    def add(self, texts: Sequence[str], codes: Iterable[str] | None) -> None:
        """Add the notes of one document, and its codes that are on the list; None where they are not known."""
        document = self._task.encode(texts, self._tokenizer)
        self.cut += document.cut
        self.cut_documents += document.cut > 0
        chunks = [np.array(chunk, dtype=np.int32) for chunk in document.chunks]  # a tenth of the memory of lists
        known = None if codes is None else [self._place[code] for code in codes if code in self._place]
        self._rows.append((chunks, known))
        self.lengths.append(document.length)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return self._rows[index]

    def counts(self) -> np.ndarray:
        """Return how many documents have each code, (n_codes,) int64."""
        flat = [code for _, codes in self._rows for code in codes or ()]
        return np.bincount(np.array(flat, dtype=np.int64), minlength=len(self._task.codes))


def collate(examples: Sequence[Example], *, n_codes: int, pad_token_id: int) -> dict[str, Any]:
    """Pad the chunks of documents to one width; `document` says whose chunk a row is, `labels` is (n, n_codes)."""
    import torch

    chunks = [(index, chunk) for index, (rows, _) in enumerate(examples) for chunk in rows]
    width = max((len(chunk) for _, chunk in chunks), default=1)
    ids = torch.full((len(chunks), width), pad_token_id)
    mask = torch.zeros((len(chunks), width), dtype=torch.long)
    for row, (_, chunk) in enumerate(chunks):
        ids[row, : len(chunk)] = torch.as_tensor(chunk)
        mask[row, : len(chunk)] = 1
    labels = torch.zeros((len(examples), n_codes))
    for row, (_, codes) in enumerate(examples):
        if codes is None:
            labels[row] = -100.0
        else:
            labels[row, codes] = 1.0
    owners = torch.tensor([index for index, _ in chunks], dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask, "document": owners, "labels": labels, "shift_labels": labels}


def build_model(
    network: Any,
    task: CodingTask,
    *,
    seed: int,
    counts: np.ndarray | None = None,
    n_documents: int = 0,
    descriptions: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    group_weight: float = 0.0,
) -> Any:
    """Put a head that scores codes on a backbone; the head is float32, never quantised and always trains.

    `label_attention`: token states h (unit length after centring) are attended by each code l, a = softmax(h V q_l +
    g(h)), and the code is scored on what it attends to, (sum a h) . w_l + b_l, as in LAAT and PLM-ICD (there with tanh
    and without descriptions). Two things are ours: g, a small network that all codes share, says which mentions count
    at all (not what is denied, or of the family), which no code has examples enough to learn alone; and a code whose
    words are nowhere attends to nothing, a place with the learned score s and the state zero. With descriptions, q_l
    and w_l are the code's own vectors, which start at zero, plus a map of the embedding of its description, which
    starts as the identity: the untrained model then matches text with descriptions, and a code without an example is
    never more than that. `pooled`: w_l on the mean of the token states.

    Parameters
    ----------
    network : backbone that returns hidden states of d.
    task : its codes and its head.
    seed : of the head's first weights.
    counts : (n_codes,) training documents with each code, of `n_documents`; the biases start at their log-odds.
    descriptions : (n_codes, d) embeddings of what the codes are called, or None.
    groups : (n_codes,) index of the group (the ICD category) of each code, for a loss that also asks for the right one.
    group_weight : weight of that loss; the probability of a group is that of any of its codes.

    Notes
    -----
    The loss is binary cross-entropy over the codes that training has, summed over codes and averaged over documents.
    Attention is computed in float32: in half precision its softmax overflows, after which every code has the same
    score for every note (github.com/JoakimEdin/medical-coding-reproducibility, issue 6).

    References
    ----------
    Vu et al. 2020, A Label Attention Model for ICD Coding from Clinical Text; Huang et al. 2022, PLM-ICD.
    """
    import torch

    config: Any = network.config
    width, n_codes = config.hidden_size, len(task.codes)
    torch.manual_seed(seed)
    functional = torch.nn.functional

    class Head(torch.nn.Module):
        descriptions: torch.Tensor | None

        def __init__(self) -> None:
            super().__init__()
            start = torch.zeros(n_codes)
            if counts is not None:
                share = torch.tensor((counts + 0.1) / (n_documents + 1.0), dtype=torch.float32)
                start = torch.logit(share)
                start[~torch.tensor(task.seen)] = torch.logit(torch.tensor(0.1 / (n_documents + 1.0)))
            self.bias = torch.nn.Parameter(start)
            known = None if descriptions is None else functional.normalize(torch.tensor(descriptions).float(), dim=-1)
            self.register_buffer("descriptions", known, persistent=True)
            scale = 0.0 if known is not None else 0.02
            self.classifier = torch.nn.Parameter(torch.randn(n_codes, width) * scale)
            if known is not None:
                self.classify = torch.nn.Parameter(torch.eye(width) * _CLASSIFY)
            if task.head == "label_attention":
                self.query = torch.nn.Parameter(torch.randn(n_codes, width) * max(scale * 5, 0.0))
                self.key = torch.nn.Parameter(torch.eye(width))
                first, last = torch.nn.Linear(width, _GATE), torch.nn.Linear(_GATE, 1, bias=False)
                torch.nn.init.zeros_(last.weight)
                self.counts = torch.nn.Sequential(first, torch.nn.GELU(), last)
                self.nothing = torch.nn.Parameter(torch.tensor(_NOTHING))
                if known is not None:
                    self.ask = torch.nn.Parameter(torch.eye(width) * _ASK)

        def states(self, hidden: torch.Tensor) -> torch.Tensor:
            return functional.layer_norm(hidden.float(), (width,)) / math.sqrt(width)

        def forward(self, states: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            """Score (n, t, d) token states under a (n, t) mask: (n, n_codes) logits, (n, t, n_codes) attention.

            What is missing from 1 in the attention of a code went to nothing.
            """
            classifier: torch.Tensor = self.classifier
            if self.descriptions is not None:
                classifier = classifier + self.descriptions @ self.classify
            if task.head == "pooled":
                weight = mask.unsqueeze(-1).float()
                pooled = functional.normalize((states * weight).sum(1) / weight.sum(1).clamp(min=1), dim=-1)
                return pooled @ classifier.T + self.bias, None
            query: torch.Tensor = self.query
            if self.descriptions is not None:
                query = query + self.descriptions @ self.ask
            scores = (states @ self.key) @ query.T + self.counts(states * math.sqrt(width))
            scores = scores.masked_fill(~mask.unsqueeze(-1), -torch.inf)
            nothing = self.nothing.expand(len(scores), 1, n_codes)
            attention = torch.softmax(torch.cat([scores, nothing], dim=1), dim=1)[:, :-1]
            found = attention.transpose(1, 2) @ states
            return (found * classifier).sum(-1) + self.bias, attention

    class Coder(torch.nn.Module):
        seen: torch.Tensor
        groups: torch.Tensor | None

        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.n_classes = n_codes
            self.head = Head()
            self.register_buffer("seen", torch.tensor(task.seen), persistent=False)
            known = None if groups is None or not group_weight else torch.tensor(groups)
            self.register_buffer("groups", known, persistent=False)
            self._watched: list[tuple[Any, Any]] = []

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            document: torch.Tensor,
            labels: torch.Tensor | None = None,
            shift_labels: torch.Tensor | None = None,
            num_items_in_batch: Any = None,
            n_documents: int | None = None,
        ) -> dict[str, Any]:
            count = labels.shape[0] if labels is not None else int(n_documents or 0)
            states, mask = self.gather(input_ids, attention_mask, document, count)
            with torch.autocast(states.device.type, enabled=False):
                logits, attention = self.head(states, mask)
            if labels is None:
                return {"logits": logits, "attention": attention, "mask": mask}
            counted = labels[:, 0] != -100
            cells = num_items_in_batch if num_items_in_batch is not None else counted.sum() * n_codes
            total = self.cost(logits, labels, counted)
            loss = total * n_codes / torch.as_tensor(cells, device=total.device).clamp(min=1)
            self.watch(logits, labels, counted)
            return {"loss": loss, "logits": logits}

        def gather(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, document: torch.Tensor, count: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Return token states by document, (n, t, d) with chunk after chunk, and which are there, (n, t) bool."""
            there = attention_mask.bool()
            if not len(input_ids):
                empty = torch.zeros((count, 1, width), device=input_ids.device)
                return empty, torch.zeros((count, 1), dtype=torch.bool, device=input_ids.device)
            hidden = self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            flat = self.head.states(hidden[there])
            owner = document.unsqueeze(1).expand_as(there)[there]
            sizes = torch.bincount(owner, minlength=count)
            position = torch.arange(len(owner), device=owner.device) - (sizes.cumsum(0) - sizes)[owner]
            longest = max(1, int(sizes.max()))
            states = flat.new_zeros((count, longest, width)).index_put((owner, position), flat)
            return states, torch.arange(longest, device=owner.device) < sizes.unsqueeze(1)

        def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            """Loss of each document over the codes that training has, (n, n_codes) twice -> (n,)."""
            cross_entropy = functional.binary_cross_entropy_with_logits
            return cross_entropy(logits[:, self.seen], labels[:, self.seen], reduction="none").sum(1)

        def cost(self, logits: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
            logits, labels = logits[counted], labels[counted]
            cross_entropy = functional.binary_cross_entropy_with_logits
            total = cross_entropy(logits[:, self.seen], labels[:, self.seen], reduction="sum")
            if self.groups is not None:
                # log of the probability that no code of the group holds
                none = functional.logsigmoid(-logits[:, self.seen])
                size = int(self.groups.max()) + 1
                where = self.groups[self.seen].expand(len(none), -1)
                absent = none.new_zeros((len(none), size)).scatter_add(1, where, none).clamp(max=-1e-6)
                gold = torch.zeros_like(absent).scatter_reduce(1, where, labels[:, self.seen], "amax")
                present = torch.log(-torch.expm1(absent))
                total = total - group_weight * (gold * present + (1 - gold) * absent).sum()
            return total

        @torch.no_grad()
        def watch(self, logits: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor) -> None:
            """Stop a training whose head says the same of every note: all codes, or none."""
            if not self.training or not counted.any():
                return
            chosen = logits[counted][:, self.seen]
            self._watched.append((torch.sigmoid(chosen).mean(), labels[counted][:, self.seen].mean()))
            if len(self._watched) < _WATCHED:
                return
            said, gold = (float(torch.stack(values).mean()) for values in zip(*self._watched, strict=True))
            self._watched.clear()
            if not math.isfinite(said) or said > max(0.5, 5 * gold) or said < gold / 100:
                raise TrainingError(
                    f"the coding head collapsed: it gives a code the mean probability {said:.2g} where {gold:.2g} have "
                    "it; lower training.head_learning_rate and training.learning_rate"
                )

        def gradient_checkpointing_enable(self, **options: Any) -> None:
            self.network.gradient_checkpointing_enable(**options)
            self.network.enable_input_require_grads()

    return Coder().to(network.device)


_ASK, _CLASSIFY = 10.0, 10.0
"""How sharply untrained attention follows a description, and how much a match moves the log-odds."""
_NOTHING = 3.0
"""Score of attending to nothing, to start with: as a token that goes a little with the code."""
_GATE = 128
"""Width of the network that says which mentions count."""
_WATCHED = 50
"""Forward passes over which a collapse is judged."""


def embed_descriptions(base: BaseModel, labels: Sequence[str], *, batch_size: int = 64) -> np.ndarray:
    """Embed what codes are called with a base model, (n, d) float32; a code without a name has zeros.

    The mean of the last hidden states over the tokens of a name, each centred and of unit length like the token states
    that it is compared with; then the mean over all names is taken away, which only says that they are names.
    """
    import torch

    before, after = special_tokens(base.tokenizer)
    rows = base.tokenizer(list(labels), add_special_tokens=False, truncation=True, max_length=64)["input_ids"]
    width = base.network.config.hidden_size
    vectors = np.zeros((len(labels), width), dtype=np.float32)
    device = next(base.network.parameters()).device
    was_training = base.network.training
    base.network.eval()
    with torch.inference_mode():
        for begin in range(0, len(rows), batch_size):
            group = [[*before, *ids, *after] for ids in rows[begin : begin + batch_size]]
            longest = max(1, *(len(ids) for ids in group)) if group else 1
            ids = torch.full((len(group), longest), base.tokenizer.pad_token_id or 0)
            mask = torch.zeros((len(group), longest), dtype=torch.long)
            for row, tokens in enumerate(group):
                ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
                mask[row, : len(tokens)] = 1
            hidden = base.network(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state.float()
            states = torch.nn.functional.layer_norm(hidden, (width,)) / math.sqrt(width)
            weight = mask.to(device).unsqueeze(-1).float()
            pooled = (states * weight).sum(1) / weight.sum(1).clamp(min=1)
            vectors[begin : begin + len(group)] = pooled.cpu().numpy()
    base.network.train(was_training)
    named = np.array([bool(ids) for ids in rows])
    if named.any():
        vectors[named] -= vectors[named].mean(0)
    vectors[~named] = 0
    return vectors


def predict_logits(
    model: Any, task: CodingTask, tokenizer: Any, documents: Sequence[Document], *, batch_tokens: int = 8192
) -> np.ndarray:
    """Score documents, sorted by length; (n, n_codes) float32 logits in the order given."""
    logits = np.zeros((len(documents), len(task.codes)), dtype=np.float32)
    for rows, found in _batches(model, task, tokenizer, documents, batch_tokens):
        logits[rows] = found["logits"].float().cpu().numpy()
    return logits


def find_evidence(
    model: Any, task: CodingTask, tokenizer: Any, document: Document, texts: Sequence[str], codes: Sequence[int]
) -> list[tuple[Evidence, ...]]:
    """Return for each of some codes (by index) the spans that it attends to most, at most `SPANS`, best first.

    Words next to each other that both have at least a quarter of the best word's attention are one span.
    """
    if task.head != "label_attention" or not document.length:
        return [() for _ in codes]
    for _, found in _batches(model, task, tokenizer, [document], document.length):
        attention = found["attention"][0][:, list(codes)].float().cpu().numpy()
    return [_spans(document, texts, attention[:, column]) for column in range(len(codes))]


def _spans(document: Document, texts: Sequence[str], attention: np.ndarray) -> tuple[Evidence, ...]:
    """Sum attention by word and join neighbouring words of high attention."""
    weights: dict[tuple[int, int, int], float] = {}
    for (note, start, end), weight in zip(document.places.tolist(), attention.tolist(), strict=True):
        if note < 0 or end <= start:
            continue
        text = texts[note]
        while start < end and text[start].isspace():
            start += 1
        if start == end:
            continue
        while start > 0 and text[start - 1].isalnum() and text[start].isalnum():
            start -= 1
        while end < len(text) and text[end - 1].isalnum() and text[end].isalnum():
            end += 1
        weights[note, start, end] = weights.get((note, start, end), 0.0) + weight
    if not weights:
        return ()
    words = sorted(
        ((note, start, end), weight)
        for (note, start, end), weight in weights.items()
        if any(character.isalnum() for character in texts[note][start:end])
    )
    least = 0.25 * max((weight for _, weight in words), default=0.0)
    spans: list[list[float]] = []
    last: int | None = None
    for index, ((note, start, end), weight) in enumerate(words):
        if weight < least or weight <= 0:
            continue
        if (
            last == index - 1
            and spans
            and spans[-1][0] == note
            and "\n\n" not in texts[note][int(spans[-1][2]) : start]
        ):
            spans[-1][2], spans[-1][3] = max(end, spans[-1][2]), spans[-1][3] + weight
        else:
            spans.append([note, start, end, weight])
        last = index
    best = sorted(spans, key=lambda span: (-span[3], span[0], span[1]))[:SPANS]
    return tuple(Evidence(int(note), int(start), int(end), float(weight)) for note, start, end, weight in best)


def _batches(model: Any, task: CodingTask, tokenizer: Any, documents: Sequence[Document], batch_tokens: int) -> Any:
    """Yield (rows, outputs) over documents sorted by length."""
    import torch

    order = sorted(range(len(documents)), key=lambda index: (documents[index].length, index))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    begin = 0
    try:
        while begin < len(order):
            end = begin + 1
            while end < len(order) and (end + 1 - begin) * documents[order[end]].length <= batch_tokens:
                end += 1
            rows = order[begin:end]
            batch = collate(
                [(documents[row].chunks, []) for row in rows], n_codes=1, pad_token_id=tokenizer.pad_token_id or 0
            )
            with torch.inference_mode():
                found = model(
                    batch["input_ids"].to(device),
                    batch["attention_mask"].to(device),
                    batch["document"].to(device),
                    n_documents=len(rows),
                )
            yield rows, found
            begin = end
    finally:
        model.train(was_training)


class Coder:
    """A trained coding run, ready to be used: no training data is needed."""

    def __init__(
        self,
        model: Any,
        task: CodingTask,
        tokenizer: Any,
        calibration: Calibration,
        threshold: float,
        accept: float,
        named: NamedCodes | None = None,
    ) -> None:
        self.task, self.calibration, self.threshold, self.accept = task, calibration, threshold, accept
        self.named = NamedCodes() if named is None else named
        self._model, self._tokenizer = model, tokenizer

    @classmethod
    def load(cls, run: str | Path) -> Coder:
        """Load a finished `coding` run."""
        folder = Path(run)
        Run.load(folder)
        values = read_task(folder)
        if values.get("task") != "coding":
            raise ModelError(f"run {folder} was trained for {values.get('task')}, not for coding")
        task = read_coding_task(values)
        base = load_base(str(folder), quantization=values["quantization"], bidirectional=task.bidirectional)
        described = np.zeros((len(task.codes), base.network.config.hidden_size)) if values["descriptions"] else None
        model = build_model(base.network, task, seed=0, descriptions=described)
        load_head(model, folder)
        calibration = Calibration(**values["calibration"])
        named = NamedCodes.from_json(values.get("named_codes", {}))
        return cls(model, task, base.tokenizer, calibration, values["threshold"], values["accept"], named)

    @property
    def model(self) -> Any:
        """The trained module, for what works on it and not on text: dropout while predicting, moving its norms."""
        return self._model

    def predict(self, documents: Sequence[Sequence[str]]) -> list[list[Prediction]]:
        """Return the proposed codes of each document (the texts of its notes, oldest first), most probable first."""
        encoded = self.encode(documents)
        logits = predict_logits(self._model, self.task, self._tokenizer, encoded)
        return self.propose(documents, encoded, logits + self.named(documents, len(self.task.codes)))

    def encode(self, documents: Sequence[Sequence[str]]) -> list[Document]:
        """Turn documents (the texts of their notes, oldest first) into tokens."""
        return [self.task.encode(texts, self._tokenizer) for texts in documents]

    def logits(self, documents: Sequence[Sequence[str]]) -> np.ndarray:
        """Score every code of the list, (n, n_codes) float32; codes that a document names gain."""
        return self.network_logits(documents) + self.named(documents, len(self.task.codes))

    def network_logits(self, documents: Sequence[Sequence[str]]) -> np.ndarray:
        """Score every code by the network alone, (n, n_codes) float32."""
        return predict_logits(self._model, self.task, self._tokenizer, self.encode(documents))

    def propose(
        self, documents: Sequence[Sequence[str]], encoded: Sequence[Document], logits: np.ndarray
    ) -> list[list[Prediction]]:
        """Turn logits (n, n_codes) into proposals with evidence."""
        found = []
        for texts, document, row in zip(documents, encoded, logits, strict=True):
            probabilities = self.calibration(row)
            chosen = [int(code) for code in np.argsort(-row, kind="stable") if row[code] >= self.threshold]
            evidence = find_evidence(self._model, self.task, self._tokenizer, document, texts, chosen) if chosen else []
            found.append(
                [
                    Prediction(
                        self.task.codes[code],
                        self.task.labels[code],
                        float(probabilities[code]),
                        bool(probabilities[code] < self.accept),
                        spans,
                    )
                    for code, spans in zip(chosen, evidence, strict=True)
                ]
            )
        return found


def proposal_rows(proposed: Sequence[Prediction], note_ids: Sequence[str]) -> list[dict[str, Any]]:
    """Return the proposals of one document as rows, evidence by the ids of its notes."""
    return [
        {
            "code": item.code,
            "label": item.label,
            "probability": item.probability,
            "review": item.review,
            "evidence": [
                {"note_id": note_ids[span.note], "start": span.start, "end": span.end, "weight": span.weight}
                for span in item.evidence
            ],
        }
        for item in proposed
    ]


def write_proposals(folder: Path, rows: Sequence[dict[str, Any]], *, unit: str) -> None:
    """Write `predictions.parquet` (no note text: evidence is ids and offsets), and `review.csv`, doubtful ones first.

    Parameters
    ----------
    rows : from `proposal_rows`, with institution, patient_id, unit_id, and `gold` where that is known.
    unit : note or encounter; `unit_id` becomes `note_id` or `encounter_id`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    evidence = [("note_id", pa.string()), ("start", pa.int32()), ("end", pa.int32()), ("weight", pa.float32())]
    names = ["institution", "patient_id", f"{unit}_id", "code", "label"]
    schema = pa.schema(
        [
            *((name, pa.string()) for name in names),
            ("probability", pa.float64()),
            ("review", pa.bool_()),
            ("gold", pa.bool_()),
            ("evidence", pa.list_(pa.struct(evidence))),
        ]
    )
    rows = [{**row, f"{unit}_id": row["unit_id"]} for row in rows]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    write_atomic(folder / "predictions.parquet", sink.getvalue().to_pybytes())
    review = sorted((row for row in rows if row["review"]), key=lambda row: row["probability"])
    write_csv(folder / "review.csv", [*names, "probability"], review)


def read_coding_task(values: dict[str, Any]) -> CodingTask:
    """Return the task that `task.json` of a coding run describes."""
    return CodingTask(
        codes=tuple(values["codes"]),
        labels=tuple(values["labels"]),
        seen=tuple(values["seen"]),
        **{key: values[key] for key in ("system", "unit", "chunk", "max_tokens", "bidirectional", "head")},
    )


def save(folder: Path, model: Any, task: CodingTask, base: BaseModel, *, full: bool, **decided: Any) -> None:
    """Write what was trained: `head.safetensors`, `task.json`, and the adapter or (full) the whole backbone.

    `decided` is what was chosen on development patients: `calibration`, `threshold`, `accept`, `named_codes`.
    """
    from dataclasses import asdict

    save_trained(folder, model, base, full=full)
    values = asdict(task) | {"task": "coding", "quantization": base.quantization}
    write_json(folder / "task.json", values | {"descriptions": model.head.descriptions is not None} | decided)
