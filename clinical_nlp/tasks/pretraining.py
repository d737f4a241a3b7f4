"""Continued pretraining, causal or masked: notes to rows in which no document sees another, and perplexity.

A row holds whole notes or pieces of them ("documents"), packed or one a row; every row says how long each document is
and which patient and institution it is from. What a model must be given so that documents do not see one another
depends on its attention; `collate_packed` knows.
"""

from __future__ import annotations

import errno
import itertools
import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from clinical_nlp.errors import InputError, ModelError, RunError, TooFewPatientsError, TrainingError
from clinical_nlp.notes.streaming import NoteStream
from clinical_nlp.progress import progress
from clinical_nlp.runs import Estimate, file_digest, write_json
from clinical_nlp.statistics.intervals import by_patient, patient_bootstrap

MASKED_SHARE = 0.15
"""Tokens of a document that are to be predicted (Devlin et al. 2019)."""
MASKED_SETS = 7
"""Disjoint sets that are masked in turn for pseudo-perplexity: the least that mask no more than `MASKED_SHARE`."""

Batching = Literal["packed", "bucketed"]

ROW_SCHEMA = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32())),
        pa.field("seq_lengths", pa.list_(pa.int32())),
        pa.field("patient_id", pa.list_(pa.string())),
        pa.field("institution", pa.list_(pa.string())),
    ]
)
"""One row of a training batch; the last three have one value a document, in the order of the tokens."""


@dataclass(frozen=True, slots=True)
class LanguageTask:
    """How one base model reads notes, and what it predicts: the next token, or masked ones.

    `before` and `after` stand around every document. `first_position` is where the architecture begins to count.
    `shift` means that a masked token is predicted from the state of the token before it, as a decoder learned to.
    """

    masked: bool
    length: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    pad_token_id: int
    batching: Batching = "packed"
    attention: str = "sdpa"
    first_position: int = 0
    shift: bool = False
    mask_token_id: int = -1
    special: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), compare=False, repr=False)
    replacements: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), compare=False, repr=False)

    @property
    def metric(self) -> str:
        """Name of what is reported: pseudo-perplexity is another quantity than perplexity."""
        return "pseudo_perplexity" if self.masked else "perplexity"

    def encode(self, texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
        """Tokenise notes; a note without any token gives an empty row."""
        rows = encode(texts, tokenizer, framed=False)
        if self.masked:
            return rows
        return [[*self.before, *ids, *self.after] if ids else [] for ids in rows]

    def documents(self, row: list[int], *, even: bool) -> list[list[int]]:
        """Cut a row into documents of at most `length` tokens; none is dropped.

        `even` makes them equally long, for rows of one document each; else all but the last one are full, which packs
        best.
        """
        room = self.length - (len(self.before) + len(self.after) if self.masked else 0)
        if even and row:
            count = -(-len(row) // room)
            bounds = [len(row) * index // count for index in range(count + 1)]
        else:
            bounds = [*range(0, len(row), room), len(row)]
        pieces = [row[begin:end] for begin, end in itertools.pairwise(bounds) if end > begin]
        return [[*self.before, *piece, *self.after] for piece in pieces] if self.masked else pieces

    def arrange(self, rows: Sequence[list[int]], patients: Sequence[str], institutions: Sequence[str]) -> pa.Table:
        """Lay token rows of n notes into training rows.

        Parameters
        ----------
        rows : n rows from `encode`.
        patients, institutions : of each note.

        Returns
        -------
        Table of `ROW_SCHEMA`.
        """
        even = self.batching == "bucketed"
        pieces = [(note, ids) for note, row in enumerate(rows) for ids in self.documents(row, even=even)]
        if not pieces:
            return ROW_SCHEMA.empty_table()
        notes = np.array([note for note, _ in pieces])
        if even:
            lengths = np.array([len(ids) for _, ids in pieces])
            documents = pa.array([[index] for index in range(len(pieces))], pa.list_(pa.int32()))
            table = {
                "input_ids": pa.array([ids for _, ids in pieces], pa.list_(pa.int32())),
                "seq_lengths": pa.ListArray.from_arrays(documents.offsets, pa.array(lengths, pa.int32())),
            }
        else:
            packed = pack([ids for _, ids in pieces], self.length).data.table.combine_chunks()
            documents = packed["document"].chunk(0)
            table = {name: packed[name].chunk(0) for name in ("input_ids", "seq_lengths")}
        owners = pa.array(notes[documents.flatten().to_numpy()])
        for name, values in (("patient_id", patients), ("institution", institutions)):
            each = pa.array(values, pa.string()).take(owners)
            table[name] = pa.ListArray.from_arrays(documents.offsets, each)
        return pa.table(table, schema=ROW_SCHEMA)

    def examples(self, sources: Sequence[pa.Table | Path], *, seed: int) -> Any:
        """Return training rows, in memory or in files that are read memory-mapped, as one dataset.

        Masked ones are masked anew in every epoch.
        """
        import datasets

        parts: list[Any] = [
            datasets.Dataset.from_file(str(source))
            if isinstance(source, Path)
            else datasets.Dataset(datasets.table.InMemoryTable(source))
            for source in sources
        ]
        data = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
        return MaskedRows(data, self, seed=seed) if self.masked else data

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of rows from `examples`."""
        if self.batching == "bucketed":
            return collate_padded(examples, self.pad_token_id)
        return collate_packed(
            examples,
            self.pad_token_id,
            attention=self.attention,
            bidirectional=self.masked,
            first_position=self.first_position,
        )

    def model(self, network: Any) -> Any:
        """Return what is trained: the network itself, or one that predicts only masked tokens."""
        return masked_language_model(network, shift=self.shift) if self.masked else network

    def losses(self, model: Any, rows: Sequence[list[int]]) -> np.ndarray:
        """Return (n, 2) nats and predicted tokens of n rows from `encode`, under what `model` gave."""
        if self.masked:
            return masked_note_losses(model, rows, self)
        return note_losses(model, rows, length=self.length, pad_token_id=self.pad_token_id)

    def row_losses(self, model: Any, examples: Any) -> np.ndarray:
        """Return the mean loss of each of n training rows under `model`, (n,) float64, for an order by difficulty."""
        rows = examples.rows if isinstance(examples, MaskedRows) else examples
        means = np.zeros(len(rows))
        framed = self.masked and (len(self.before), len(self.after))
        for begin in range(0, len(rows), 256):
            documents, owners = [], []
            for index in range(begin, min(begin + 256, len(rows))):
                row = rows[index]
                for start, end in _spans(row["seq_lengths"]):
                    inner = slice(start + framed[0], end - framed[1]) if framed else slice(start, end)
                    documents.append(row["input_ids"][inner])
                    owners.append(index - begin)
            counts = np.zeros((owners[-1] + 1, 2))
            np.add.at(counts, owners, self.losses(model, documents))
            means[begin : begin + len(counts)] = counts[:, 0] / np.maximum(counts[:, 1], 1)
        return means

    def candidates(self, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Return the positions of a row that may be masked: no special tokens, and none that nothing predicts."""
        allowed = ~np.isin(ids, self.special)
        if self.shift:
            allowed[starts] = False
        return np.flatnonzero(allowed)


def language_task(
    base: Any, length: int, *, batching: Literal["auto", "packed", "bucketed"] = "auto", bidirectional: bool = False
) -> LanguageTask:
    """Work out how a loaded base model reads notes.

    Parameters
    ----------
    base : `BaseModel` with its language-model head.
    length : tokens of a row; less where the model has fewer positions.
    batching : auto packs rows of at most 1024 tokens and buckets longer ones (see `choose_batching`).
    bidirectional : the base is a decoder that was loaded to see to the right, and learns to fill in masked tokens.

    Raises
    ------
    ModelError : the tokenizer lacks a token that is needed, or the attention of this model cannot isolate packed
        documents.
    """
    tokenizer, config = base.tokenizer, base.network.config
    masked = bidirectional or not base.is_decoder
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if base.is_decoder:
        if end is None:
            raise ModelError("the tokenizer of this base model has no end-of-text token; a model cannot learn to stop")
    else:
        begin, end = (
            own if own is not None else other
            for own, other in ((tokenizer.cls_token_id, begin), (tokenizer.sep_token_id, end))
        )
    first = config.pad_token_id + 1 if config.model_type in _COUNTS_FROM_PAD else 0
    positions = getattr(config, "max_position_embeddings", None)
    room = min(length, positions - first) if positions else length
    attention = config._attn_implementation
    special = np.unique([token for token in (*tokenizer.all_special_ids, begin, end) if token is not None])
    rows = base.network.get_input_embeddings().num_embeddings
    return LanguageTask(
        masked=masked,
        length=room,
        before=() if begin is None else (begin,),
        after=() if end is None else (end,),
        pad_token_id=tokenizer.pad_token_id or 0,
        batching=choose_batching(config, batching, room, masked=masked),
        attention=attention,
        first_position=first,
        shift=bidirectional,
        mask_token_id=_mask_token(tokenizer) if masked else -1,
        special=special,
        replacements=np.setdiff1d(np.arange(min(len(tokenizer), rows)), special),
    )


_COUNTS_FROM_PAD = frozenset({"roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "xlm-roberta-xl", "mpnet"})
"""Architectures whose first position is the one after the padding token's id."""


def _mask_token(tokenizer: Any) -> int:
    """Return the mask token; a decoder has none and takes the underscore (BehnamGhader et al. 2024, LLM2Vec)."""
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    underscore = tokenizer("_", add_special_tokens=False)["input_ids"]
    if len(underscore) != 1:
        raise ModelError("the tokenizer of this base model has no mask token, which masked pretraining needs")
    return int(underscore[0])


def choose_batching(
    config: Any, batching: Literal["auto", "packed", "bucketed"], length: int, *, masked: bool
) -> Batching:
    """Decide how rows are laid out, and refuse what would mix documents.

    A packed row pays attention over all its length squared on SDPA and eager, and only over its documents on flash;
    a bucketed row pays for its padding. Measured on SDPA, one CPU core, 96 notes of mtsamples (mean 979 tokens), four
    rows a step, non-padding tokens a second packed over bucketed: builtin:tiny 0.94 at length 512, 1.00 at 1024, 0.73
    at 2048; MiniLM-L6 0.97 at 512. `auto` therefore packs up to 1024, where the two are alike and packed rows all have
    one size, and buckets above.

    Raises
    ------
    ModelError : packed rows were asked for, and this model's attention cannot keep their documents apart.
    """
    window = getattr(config, "sliding_window", None) or 0
    flash = "flash" in config._attn_implementation
    # A block mask replaces the mask of a sliding window, so local layers would see whole documents.
    sliding = masked and not flash and 0 < window < length
    takes_blocks = config._attn_implementation in ("sdpa", "eager") and (
        not getattr(config, "is_causal", True) or config.model_type in _PACKABLE_ENCODERS
    )
    mixes = masked and (sliding or not (flash or takes_blocks))
    if batching == "packed" and mixes:
        raise ModelError(
            f"this base model ({config.model_type}, {config._attn_implementation} attention) cannot keep packed "
            "documents apart when it sees to the right; use batching bucketed"
        )
    if batching != "auto":
        return batching
    return "bucketed" if mixes or (length > LONGEST_PACKED and not flash) else "packed"


LONGEST_PACKED = 1024
_PACKABLE_ENCODERS = frozenset(
    {"bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "albert", "mpnet", "modernbert"}
)
"""Encoders that take a block mask; deberta, for one, makes its own of what it is given."""


class MaskedRows:
    """Training rows with masked tokens: of `MASKED_SHARE`, 80 % become the mask token, 10 % another one, 10 % stay.

    What is masked is drawn from (seed, epoch, row), so a resumed run and one on more processes see the same.
    """

    def __init__(self, rows: Any, task: LanguageTask, *, seed: int) -> None:
        self.rows, self._task, self._seed, self._epoch = rows, task, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose masks are drawn next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[int(index)]
        rng = np.random.default_rng((self._seed, self._epoch, int(index)))
        ids, task = np.asarray(row["input_ids"]), self._task
        allowed = task.candidates(ids, np.cumsum([0, *row["seq_lengths"][:-1]]))
        count = min(len(allowed), max(1, round(MASKED_SHARE * len(allowed))))
        chosen = rng.permutation(allowed)[:count]
        labels = np.full(len(ids), -100)
        labels[chosen] = ids[chosen]
        fate = rng.random(count)
        other = rng.choice(task.replacements, count)
        shown = ids.copy()
        shown[chosen] = np.where(fate < 0.8, task.mask_token_id, np.where(fate < 0.9, other, ids[chosen]))
        return {"input_ids": shown.tolist(), "seq_lengths": row["seq_lengths"], "labels": labels.tolist()}


def masked_language_model(network: Any, *, shift: bool = False) -> Any:
    """Wrap a language model so that its head sees only the tokens to be predicted, and the loss is exact.

    The forward takes `labels` (-100: not to be predicted) and `num_items_in_batch`, by which the summed loss is divided
    (else by the number of labels), and returns `loss` and `logits` (n_labels, vocabulary) in row-major order. A head
    is most of the work of a small encoder, and 85 % of what it says would be thrown away.

    Parameters
    ----------
    network : masked language model, or with `shift` a decoder that sees to the right; peft models too.
    shift : predict each token from the state of the one before it.
    """
    import torch

    inner = network.get_base_model() if hasattr(network, "peft_config") else network

    class MaskedLanguageModel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.config = inner.config

        def forward(
            self, input_ids: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None, **inputs: Any
        ) -> dict[str, torch.Tensor]:
            if shift:
                labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            chosen = labels != -100

            def keep_chosen(module: Any, arguments: Any, output: Any) -> Any:
                output.last_hidden_state = output.last_hidden_state[chosen][None]
                return output

            handle = inner.base_model.register_forward_hook(keep_chosen)
            try:
                logits = self.network(input_ids=input_ids, **inputs).logits[0].float()
            finally:
                handle.remove()
            total = torch.nn.functional.cross_entropy(logits, labels[chosen], reduction="sum")
            return {
                "loss": total / (chosen.sum() if num_items_in_batch is None else num_items_in_batch),
                "logits": logits,
            }

        def gradient_checkpointing_enable(self, **options: Any) -> None:
            inner.gradient_checkpointing_enable(**options)
            inner.enable_input_require_grads()

    return MaskedLanguageModel()


def encode(texts: Sequence[str], tokenizer: Any, *, framed: bool = True) -> list[list[int]]:
    """Tokenise notes; `framed` ones begin with the model's bos, where it has one, and end with its eos."""
    if framed and tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer of this base model has no end-of-text token; a model cannot learn to stop")
    before = [tokenizer.bos_token_id] if framed and tokenizer.bos_token_id is not None else []
    after = [tokenizer.eos_token_id] if framed else []
    rows: list[list[int]] = []
    for begin in range(0, len(texts), 1000):
        batch = tokenizer(list(texts[begin : begin + 1000]), add_special_tokens=False, verbose=False)["input_ids"]
        rows += [[*before, *ids, *after] for ids in batch]
    return rows


def pack(rows: Sequence[list[int]], length: int) -> Any:
    """Pack token rows into rows of at most `length` tokens; long notes are split, nothing is dropped.

    Returns
    -------
    `datasets.Dataset` with `input_ids`, and for each document in the row `seq_lengths` (its tokens) and `document`
    (the index of the row that it is, or is a piece of).

    Raises
    ------
    ModelError : a token was lost, which would be a fault of the packing.
    """
    import datasets
    import pyarrow.compute as pc
    from trl import pack_dataset

    if not rows:
        raise TooFewPatientsError("no notes to train on: the training part is empty")
    datasets.disable_progress_bars()
    sizes = np.fromiter(map(len, rows), np.int32, len(rows))
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    tokens = np.concatenate([np.asarray(row, np.int32) for row in rows])
    owners = np.repeat(np.arange(len(rows), dtype=np.int32), sizes)
    columns = {"input_ids": tokens, "document": owners}
    table = pa.table({name: pa.ListArray.from_arrays(offsets, values) for name, values in columns.items()})
    packed = pack_dataset(datasets.Dataset(datasets.table.InMemoryTable(table)), length, strategy="bfd_split")
    table = packed.data.table.combine_chunks()
    sizes_packed = table["seq_lengths"].chunk(0)
    ends = np.cumsum(sizes_packed.flatten().to_numpy(), dtype=np.int64)
    if len(tokens) != ends[-1]:
        raise TrainingError(f"packing lost {len(tokens) - ends[-1]} of {len(tokens)} tokens")
    owner = table["document"].chunk(0).flatten().to_numpy()[np.concatenate([[0], ends[:-1]])]
    bounds = np.concatenate([[0], np.cumsum(pc.list_value_length(sizes_packed).to_numpy())]).astype(np.int32)
    columns = {
        "input_ids": table["input_ids"].chunk(0),
        "seq_lengths": pa.ListArray.from_arrays(bounds, sizes_packed.flatten()),
        "document": pa.ListArray.from_arrays(bounds, pa.array(owner)),
    }
    return datasets.Dataset(datasets.table.InMemoryTable(pa.table(columns)))


def _spans(lengths: Sequence[int]) -> list[tuple[int, int]]:
    ends = np.cumsum(lengths).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def collate_packed(
    examples: list[dict[str, Any]],
    pad_token_id: int,
    *,
    attention: str = "sdpa",
    bidirectional: bool = False,
    first_position: int = 0,
) -> dict[str, Any]:
    """Make (B, L) rows of packed documents with what keeps them apart under this model's attention.

    Positions restart at each document. A causal model on SDPA or eager isolates documents from them, but only when no
    attention mask is passed. A bidirectional one (an encoder, or a decoder with `is_causal` False) ignores them there,
    so it gets an explicit (B, 1, L, L) block mask: boolean for SDPA, additive for eager. Flash attention takes no such
    mask, and reads documents from restarted positions only in a batch of one row; it gets their boundaries
    (`cu_seq_lens_*`, `max_length_*`). That path has been checked against a plain implementation of the same arguments,
    and has not been run on flash attention itself.

    Padding forms a document of its own. Labels are `labels` of the example where it has them (masked tokens), else the
    tokens but the first of each document, whose predecessor belongs to another one.
    """
    import torch

    width = max(len(example["input_ids"]) for example in examples)
    shape = (len(examples), width)
    ids = torch.full(shape, pad_token_id)
    positions = torch.full(shape, first_position)
    labels = torch.full(shape, -100)
    documents = torch.zeros(shape, dtype=torch.int32)
    lengths: list[int] = []
    for row, example in enumerate(examples):
        tokens = torch.tensor(example["input_ids"])
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = torch.tensor(example.get("labels", example["input_ids"]))
        own = [length for length in (*example["seq_lengths"], width - len(tokens)) if length]
        for number, (begin, end) in enumerate(_spans(own)):
            positions[row, begin:end] += torch.arange(end - begin)
            documents[row, begin:end] = number
            if "labels" not in example:
                labels[row, begin] = -100
        lengths += own
    batch: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "labels": labels}
    if "flash" in attention:
        bounds = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
        return batch | {
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
    if bidirectional:
        same = documents[:, None, :, None] == documents[:, None, None, :]
        least = torch.finfo(torch.float32).min
        batch["attention_mask"] = torch.where(same, 0.0, least) if attention == "eager" else same
    return batch


def collate_padded(examples: list[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Make (B, L) rows of one document each, padded on the right.

    A causal model cannot see what comes after a token, so padding needs no mask, without which attention is twice as
    fast. Examples with `labels` (masked tokens) are for models that see both sides, and get one.
    """
    import torch

    width = max(len(example["input_ids"]) for example in examples)
    ids = torch.full((len(examples), width), pad_token_id)
    mask = torch.zeros((len(examples), width), dtype=torch.long)
    labels = torch.full((len(examples), width), -100)
    for row, example in enumerate(examples):
        size = len(example["input_ids"])
        ids[row, :size] = torch.tensor(example["input_ids"])
        mask[row, :size] = 1
        labels[row, :size] = torch.tensor(example.get("labels", example["input_ids"]))
        if "labels" not in example:
            labels[row, 0] = -100
    if "labels" not in examples[0]:
        return {"input_ids": ids, "position_ids": torch.arange(width).repeat(len(examples), 1), "labels": labels}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def row_lengths(examples: Any) -> np.ndarray:
    """Return the tokens of each training row, read without loading the rows."""
    import pyarrow.compute as pc

    rows = examples.rows if isinstance(examples, MaskedRows) else examples
    return pc.list_value_length(rows.data.column("input_ids")).to_numpy()


HELD_OUT_SCHEMA = pa.schema(
    [
        pa.field("tokens", pa.list_(pa.int32())),
        pa.field("part", pa.string()),
        pa.field("patient_id", pa.string()),
        pa.field("institution", pa.string()),
        pa.field("note_type", pa.string()),
    ]
)
_PATIENTS_SCHEMA = pa.schema([pa.field("patient_id", pa.string()), pa.field("part", pa.string())])


def write_stream(stream: NoteStream, task: LanguageTask, tokenizer: Any, folder: Path, *, batch: int = 1000) -> None:
    """Tokenise and arrange a stream of notes into Arrow files, one batch in memory at a time.

    `rows.arrow` are the training rows, `held_out.arrow` the notes of the development and test patients,
    `patients.arrow` who is in which part, `stream.json` the counts. Tokens are note text: the folder belongs inside a
    run, and is to be deleted with it or before.

    Raises
    ------
    RunError : the disk is full.
    TooFewPatientsError : no patient to train on, or none to score.
    InputError : no note has a token that the tokenizer knows.
    """
    shutil.rmtree(folder, ignore_errors=True)
    without_tokens = 0
    try:
        folder.mkdir(parents=True)
        with (
            pa.OSFile(str(folder / "rows.arrow"), "wb") as one,
            pa.OSFile(str(folder / "held_out.arrow"), "wb") as two,
            pa.OSFile(str(folder / "patients.arrow"), "wb") as three,
            pa.ipc.new_stream(one, ROW_SCHEMA) as rows,
            pa.ipc.new_stream(two, HELD_OUT_SCHEMA) as held_out,
            pa.ipc.new_stream(three, _PATIENTS_SCHEMA) as patients,
            progress("read", None, unit="notes") as bar,
        ):
            for notes in stream.batches(batch):
                tokens = task.encode([note.text for _, note in notes], tokenizer)
                found = [(part, note, ids) for (part, note), ids in zip(notes, tokens, strict=True) if ids]
                without_tokens += len(notes) - len(found)
                train = [(note, ids) for part, note, ids in found if part == "train"]
                rows.write_table(
                    task.arrange(
                        [ids for _, ids in train],
                        [note.patient_id for note, _ in train],
                        [note.institution for note, _ in train],
                    )
                )
                others = [
                    {"tokens": ids, "part": part}
                    | {name: getattr(note, name) for name in ("patient_id", "institution", "note_type")}
                    for part, note, ids in found
                    if part != "train"
                ]
                held_out.write_table(pa.Table.from_pylist(others, HELD_OUT_SCHEMA))
                seen = [{"patient_id": patient, "part": part} for patient, part in stream.new_patients]
                patients.write_table(pa.Table.from_pylist(seen, _PATIENTS_SCHEMA))
                stream.new_patients.clear()
                bar.advance(len(notes))
        facts = {
            "describe": stream.describe(),
            "notes": dict(stream.notes),
            "patients": dict(stream.patients),
            "kept": {part: sorted(stream.kept(part)) for part in ("development", "test")},
            "n_duplicates_dropped": stream.duplicates,
            "n_without_tokens": without_tokens,
            "left_out": dict(stream.left_out),
            "rows_sha256": file_digest(folder / "rows.arrow"),
        }
        write_json(folder / "stream.json", facts)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunError(f"no space left for the tokens of the notes in {folder}; free some, add --resume") from None
        raise
    for part, remedy in (("train", "a smaller split.test"), ("test", "a larger split.test")):
        if not stream.notes[part]:
            raise TooFewPatientsError(f"no patient fell into the {part} part; give more patients, or {remedy}")
    if without_tokens == sum(stream.notes.values()):
        raise InputError("no note has a token that this tokenizer knows")


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what `write_stream` counted."""
    return dict(json.loads((folder / "stream.json").read_text("utf-8")))


def read_held_out(folder: Path, part: str) -> tuple[list[list[int]], dict[str, list[Any]]]:
    """Return the token rows of a part of `write_stream`, and the patient, institution and type of each note."""
    kept = set(read_facts(folder)["kept"][part])
    names = ("patient_id", "institution", "note_type")
    rows: list[list[int]] = []
    columns: dict[str, list[Any]] = {name: [] for name in names}
    with pa.memory_map(str(folder / "held_out.arrow")) as file:
        for batch in pa.ipc.open_stream(file):
            for row in batch.to_pylist():
                if row["part"] == part and row["patient_id"] in kept:
                    rows.append(row["tokens"])
                    for name in names:
                        columns[name].append(row[name])
    return rows, columns


def parts_of_patients(folder: Path, asked: set[str]) -> dict[str, str]:
    """Return the part of those of the patients asked for who are in a stream that `write_stream` wrote."""
    found: dict[str, str] = {}
    with pa.memory_map(str(folder / "patients.arrow")) as file:
        for batch in pa.ipc.open_stream(file):
            found.update((row["patient_id"], row["part"]) for row in batch.to_pylist() if row["patient_id"] in asked)
    return found


def note_losses(
    model: Any, rows: Sequence[list[int]], *, length: int, pad_token_id: int, batch_tokens: int = 8192
) -> np.ndarray:
    """Negative log-likelihood of each note under a causal language model.

    Parameters
    ----------
    model : causal language model (or peft model around one).
    rows : n token rows.
    length : notes are cut into pieces of this many tokens; each piece is predicted from its own beginning.

    Returns
    -------
    (n, 2) float64: nats, and number of predicted tokens.
    """
    import torch

    pieces = [
        (index, row[begin : begin + length])
        for index, row in enumerate(rows)
        for begin in range(0, len(row), length)
        if len(row[begin : begin + length]) > 1
    ]
    pieces.sort(key=lambda piece: (len(piece[1]), piece[0]))
    counts = np.zeros((len(rows), 2))
    device = next(model.parameters()).device
    model.eval()
    with progress("perplexity", len(pieces), unit="pieces") as bar, torch.inference_mode():
        for batch in _by_length(pieces, batch_tokens):
            width = len(batch[-1][1])
            ids = torch.full((len(batch), width), pad_token_id)
            mask = torch.zeros((len(batch), width), dtype=torch.long)
            for position, (_, tokens) in enumerate(batch):
                ids[position, : len(tokens)] = torch.tensor(tokens)
                mask[position, : len(tokens)] = 1
            logits = model(input_ids=ids.to(device)).logits[:, :-1].float()  # padding is on the right: nothing sees it
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:].to(device), reduction="none")
            weight = mask[:, 1:].to(device)
            nats = (loss * weight).sum(1).double().cpu().numpy()
            for position, (index, tokens) in enumerate(batch):
                counts[index] += (nats[position], len(tokens) - 1)
            bar.advance(len(batch))
    return counts


def masked_note_losses(
    model: Any, rows: Sequence[list[int]], task: LanguageTask, *, batch_tokens: int = 8192
) -> np.ndarray:
    """Negative log-likelihood of each note's tokens, each predicted once while it and a seventh of the rest are masked.

    The tokens of a document are divided into `MASKED_SETS` disjoint sets, drawn from the document itself, so the same
    at every call. Each set is replaced by mask tokens in turn, and its tokens are scored. The exponential of the mean
    is the pseudo-perplexity reported here. Masking one token at a time (Salazar et al. 2020, Masked Language Model
    Scoring) would show more of the context, give lower values and take as many forward passes as there are tokens:
    the two are not to be compared, nor either of them with the perplexity of a causal model.

    Parameters
    ----------
    model : from `masked_language_model`.
    rows : n token rows without special tokens around them.

    Returns
    -------
    (n, 2) float64: nats, and number of predicted tokens.
    """
    import torch

    pieces = [(note, ids) for note, row in enumerate(rows) for ids in task.documents(row, even=True)]
    pieces.sort(key=lambda piece: (len(piece[1]), piece[0]))
    counts = np.zeros((len(rows), 2))
    parameter = next(model.parameters())
    half = any(value.dtype == torch.bfloat16 for value in model.parameters())
    model.eval()
    with progress("pseudo-perplexity", len(pieces), unit="pieces") as bar, torch.inference_mode():
        for batch in _by_length(pieces, max(1, batch_tokens // MASKED_SETS)):
            notes, examples = [], []
            for note, ids in batch:
                for shown, labels in _masked_in_turn(np.asarray(ids), task):
                    notes.append(note)
                    examples.append({"input_ids": shown, "labels": labels})
            if examples:
                inputs = {
                    name: value.to(parameter.device)
                    for name, value in collate_padded(examples, task.pad_token_id).items()
                }
                targets = inputs["labels"]
                with torch.autocast(parameter.device.type, dtype=torch.bfloat16, enabled=half):
                    logits = model(**inputs)["logits"]
                chosen = targets != -100
                nats = torch.nn.functional.cross_entropy(logits, targets[chosen], reduction="none").double().cpu()
                owners = np.asarray(notes)[chosen.nonzero()[:, 0].cpu().numpy()]
                np.add.at(counts, owners, np.stack([nats.numpy(), np.ones(len(nats))], axis=1))
            bar.advance(len(batch))
    return counts


def _masked_in_turn(ids: np.ndarray, task: LanguageTask) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the (masked tokens, labels) of each set of one document."""
    allowed = task.candidates(ids, np.zeros(1, np.int64))
    order = np.random.default_rng(zlib.crc32(ids.astype("<i4").tobytes())).permutation(allowed)
    for begin in range(min(MASKED_SETS, len(order))):
        chosen = order[begin::MASKED_SETS]
        shown, labels = ids.copy(), np.full(len(ids), -100)
        labels[chosen] = ids[chosen]
        shown[chosen] = task.mask_token_id
        yield shown.tolist(), labels.tolist()


def _by_length(pieces: Sequence[tuple[int, list[int]]], batch_tokens: int) -> Iterator[list[tuple[int, list[int]]]]:
    """Yield batches of pieces, sorted by length, of at most so many tokens with their padding, or of one piece."""
    begin = 0
    while begin < len(pieces):
        end = begin + 1
        while end < len(pieces) and (end + 1 - begin) * len(pieces[end][1]) <= batch_tokens:
            end += 1
        yield list(pieces[begin:end])
        begin = end


def perplexity(counts: np.ndarray) -> np.ndarray:
    """Perplexity from (..., 2) sums of nats and tokens."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.exp(counts[..., 0] / counts[..., 1])


def compare(
    before: np.ndarray,
    after: np.ndarray,
    patients: Sequence[str],
    groups: dict[str, Sequence[str]],
    *,
    part: str,
    seed: int,
    metric: str = "perplexity",
) -> dict[str, Estimate]:
    """Estimate perplexity before and after, their ratio on the same patients, and the same by group.

    Parameters
    ----------
    before, after : (n, 2) from `note_losses` on the same notes.
    patients : n patient ids, the unit that is resampled.
    groups : name (institution, note_type) -> n values; reported for groups of at least 11 patients.
    metric : what it is called.
    """
    both = np.concatenate([before, after], axis=1)
    people = np.asarray(patients)

    def estimates(rows: np.ndarray, suffix: str) -> dict[str, Estimate]:
        summed = by_patient(people[rows].tolist(), both[rows])
        common: dict[str, Any] = {"n_notes": int(rows.sum()), "part": part, "seed": seed}
        return {
            f"test.{metric}{suffix}": patient_bootstrap(summed, lambda c: perplexity(c[..., 2:]), **common),
            f"test.{metric}_before{suffix}": patient_bootstrap(summed, lambda c: perplexity(c[..., :2]), **common),
            f"test.{metric}_ratio{suffix}": patient_bootstrap(
                summed, lambda c: perplexity(c[..., 2:]) / perplexity(c[..., :2]), **common
            ),
        }

    found = estimates(np.ones(len(people), dtype=bool), "")
    for group, values in groups.items():
        column = np.asarray([value or "" for value in values])
        names = sorted(set(column.tolist()) - {""})
        for name in names if len(names) > 1 else []:
            rows = column == name
            if len(set(people[rows].tolist())) >= 11:
                found |= estimates(rows, f".{group}.{name}")
    return found
