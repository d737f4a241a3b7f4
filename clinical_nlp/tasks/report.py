"""The report task: pairs of source and report, the prompt and what is to be written, and reports for new sources."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from clinical_nlp.errors import ConfigError, InputError, ModelError, nearest
from clinical_nlp.models.adapters import ADAPTER, has_adapter, save_adapter
from clinical_nlp.models.loading import BaseModel, backbone_prefix, load_base, read_task
from clinical_nlp.notes.corpus import Corpus
from clinical_nlp.runs import Run, write_json
from clinical_nlp.tasks.generation import DRAFT, Draft, Verify, drafts, generate
from clinical_nlp.tasks.preferences import ErrorKind

INSTRUCTIONS = {
    "findings_impression": "Write the impression of this radiology report from its findings.",
    "dialogue_note": "Write the clinic note of this visit from its conversation.",
    "dialogue_section": "Write the section of the note that this conversation is about.",
    "notes_discharge": "Write the discharge summary of this stay from its notes.",
}
"""The kinds of report, and what the model is told for each unless the config says otherwise."""

TooLong = Literal["error", "cut_source", "leave_out"]
MARK = " [...] "
"""Stands where the middle of a source was left out."""
_PLAIN = ("{instruction}\n\n", "\n\nReport:\n")
"""The prompt of a base model without a chat template: the instruction, the source, and this."""
DISCHARGE_TYPES = ("discharge", "discharge summary", "discharge note")


@dataclass(frozen=True, slots=True)
class Pair:
    """A source and the report that was written from it; `part` is the corpus's own, where it has parts."""

    pair_id: str
    patient_id: str
    institution: str
    source: str
    target: str
    part: str | None = None


def read_pairs(corpus: Corpus, kind: str | None) -> tuple[str, list[Pair], dict[str, int]]:
    """Return the kind of report, its pairs, and how many there are and were left out, by reason.

    Parameters
    ----------
    corpus : with a table of pairs; for `notes_discharge`, with notes of encounters.
    kind : one of `INSTRUCTIONS`; None is the one kind that the corpus has.

    Raises
    ------
    ConfigError : the kind is not known, or the corpus has several and none was named.
    InputError : the corpus has no such pairs, or a pair without a source or a target.
    """
    name = corpus.card.name
    if kind is not None and kind not in INSTRUCTIONS:
        raise ConfigError(f"kind {kind!r} is not known{nearest(kind, INSTRUCTIONS)}")
    if kind == "notes_discharge":
        pairs, counts = discharge_pairs(corpus)
        if not pairs:
            raise InputError(
                f"corpus {name!r} has no encounter with a discharge summary and a note before it ({_listed(counts)})"
            )
        return kind, pairs, counts
    found = Counter(corpus.pairs["kind"].to_pylist()) if corpus.pairs is not None else Counter()
    if kind is None and len(found) > 1:
        raise ConfigError(f"corpus {name!r} has pairs of {len(found)} kinds; set kind to one of {', '.join(found)}")
    kind = kind or next(iter(found), None)
    if kind is None or kind not in found:
        has = f"it has {', '.join(found)}" if found else "it has none"
        raise InputError(
            f"corpus {name!r} has no pairs of {f'kind {kind!r}' if kind else 'source and report'} ({has}); name "
            "another corpus, or kind notes_discharge for a corpus with the notes of encounters"
        )
    if kind not in INSTRUCTIONS:
        raise ConfigError(f"kind {kind!r} is not known{nearest(kind, INSTRUCTIONS)}")
    rows = [row for row in corpus.pairs.to_pylist() if row["kind"] == kind] if corpus.pairs is not None else []
    for what in ("source", "target"):
        if empty := [row["pair_id"] for row in rows if not row[what].strip()]:
            raise InputError(
                f"corpus {name!r}: {len(empty)} of {len(rows)} pairs have an empty {what} (first: {empty[0]}); a model "
                "would learn to write nothing: correct or remove them"
            )
    names = ("pair_id", "patient_id", "institution", "source", "target", "part")
    return kind, [Pair(**{key: row[key] for key in names}) for row in rows], {"pairs": len(rows)}


def discharge_pairs(corpus: Corpus) -> tuple[list[Pair], dict[str, int]]:
    """Make a pair of each encounter: its notes in order of time, each below its type, and the discharge summary.

    The last discharge summary of an encounter is the target; notes written after it are no source. Notes without a
    date come first, in the order of the table.

    Returns
    -------
    The pairs, and counts of encounters: with a pair, without a discharge summary, without another note before it; and
    of notes that belong to no encounter or were written after the discharge summary.
    """
    counts: Counter[str] = Counter()
    encounters: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    columns = ["note_id", "patient_id", "institution", "encounter_id", "note_type", "written_at", "text"]
    for row in corpus.notes.select(columns).to_pylist():
        if row["encounter_id"] is None:
            counts["notes_without_encounter"] += 1
            continue
        encounters.setdefault((row["institution"], row["patient_id"], row["encounter_id"]), []).append(row)
    pairs = []
    for (institution, patient, _), notes in encounters.items():
        order = sorted(
            range(len(notes)), key=lambda place: (notes[place]["written_at"] is not None, *_time(notes, place))
        )
        notes = [notes[place] for place in order]
        last = [place for place, row in enumerate(notes) if (row["note_type"] or "").lower() in DISCHARGE_TYPES]
        if not last or not notes[last[-1]]["text"].strip():
            counts["encounters_without_discharge_summary"] += 1
            continue
        target, others = notes[last[-1]], [row for row in notes[: last[-1]] if row["text"].strip()]
        others = [row for row in others if (row["note_type"] or "").lower() not in DISCHARGE_TYPES]
        counts["notes_after_discharge_summary"] += len(notes) - 1 - last[-1]
        if not others:
            counts["encounters_without_other_notes"] += 1
            continue
        source = "\n\n".join(f"{(row['note_type'] or 'note').upper()}\n{row['text'].strip()}" for row in others)
        part = corpus.parts.get((institution, target["note_id"]))
        pairs.append(Pair(target["note_id"], patient, institution, source, target["text"], part))
    return pairs, {"pairs": len(pairs), **counts}


def _time(notes: Sequence[dict[str, Any]], place: int) -> tuple[Any, ...]:
    when = notes[place]["written_at"]
    return (place,) if when is None else (when, place)


def pairs_as_notes(pairs: Sequence[Pair], corpus: Corpus) -> tuple[pa.Table, dict[tuple[str, str], str]]:
    """Return pairs in the columns that a split reads, with the date of the patient's first note, and their parts."""
    first: dict[str, Any] = {}
    for patient, when in zip(
        corpus.notes["patient_id"].to_pylist(), corpus.notes["written_at"].to_pylist(), strict=True
    ):
        if when is not None and (patient not in first or when < first[patient]):
            first[patient] = when
    table = pa.table(
        {
            "note_id": pa.array([pair.pair_id for pair in pairs], pa.string()),
            "patient_id": pa.array([pair.patient_id for pair in pairs], pa.string()),
            "institution": pa.array([pair.institution for pair in pairs], pa.string()),
            "written_at": pa.array([first.get(pair.patient_id) for pair in pairs], pa.timestamp("us", "UTC")),
        }
    )
    parts = {(pair.institution, pair.pair_id): pair.part for pair in pairs if pair.part is not None}
    return table, parts


@dataclass(frozen=True, slots=True)
class Encoded:
    """Prompts, as tokens, in the order of the sources, and what had to give way for them to fit.

    `prompts` holds None where a source was left out.
    """

    prompts: list[list[int] | None]
    sources_cut: int = 0
    sources_left_out: int = 0


@dataclass(frozen=True)
class ReportTask:
    """How a source becomes a prompt, and when a report ends.

    Parameters
    ----------
    kind : of report.
    instruction : what the model is told.
    window : tokens of prompt and report together.
    max_new_tokens : tokens of the longest report; a prompt has the rest of the window.
    too_long : what happens to a source (and in training to a report) that does not fit.
    before, after, end : tokens in front of the source, behind it, and behind the report; the last has an end-of-text
        token, by any of `stops` generation ends.
    """

    kind: str
    instruction: str
    window: int
    max_new_tokens: int
    too_long: TooLong
    before: tuple[int, ...]
    after: tuple[int, ...]
    end: tuple[int, ...]
    stops: tuple[int, ...]
    pad_token_id: int
    chat: bool = False
    mark: tuple[int, ...] = field(default=())

    @property
    def room(self) -> int:
        """Tokens that a source may have."""
        return self.window - self.max_new_tokens - len(self.before) - len(self.after)

    def encode_sources(self, sources: Sequence[str], tokenizer: Any) -> Encoded:
        """Make prompts; what is too long is refused, cut in its middle or left out, as `too_long` says.

        Raises
        ------
        ConfigError : `too_long` is error, and a source does not fit.
        """
        rows = tokens_of(sources, tokenizer)
        over = [len(row) for row in rows if len(row) > self.room]
        if over and self.too_long == "error":
            raise ConfigError(
                f"{len(over)} of {len(rows)} sources are longer than the {self.room} tokens that a window of "
                f"{self.window} leaves beside a report of {self.max_new_tokens} (the longest has {max(over)}); set "
                "too_long to cut_source (their middle is left out) or leave_out, or a larger window"
            )
        prompts: list[list[int] | None] = []
        for row in rows:
            if len(row) > self.room and self.too_long == "leave_out":
                prompts.append(None)
                continue
            if len(row) > self.room:
                kept = self.room - len(self.mark)
                row = [*row[: (kept + 1) // 2], *self.mark, *row[len(row) - kept // 2 :]]
            prompts.append([*self.before, *row, *self.after])
        cut = self.too_long == "cut_source"
        return Encoded(prompts, len(over) if cut else 0, 0 if cut else len(over))

    def encode_targets(self, targets: Sequence[str], tokenizer: Any) -> list[list[int]]:
        """Return the tokens of reports, each with its end."""
        return [[*row, *self.end] for row in tokens_of([target.strip() for target in targets], tokenizer)]

    def examples(self, pairs: Sequence[Pair], tokenizer: Any) -> tuple[Any, dict[str, int]]:
        """Make training examples, and say what was cut or left out; a report is never cut, or its end is not learned.

        Returns
        -------
        A `datasets.Dataset` with `input_ids` (prompt and report), `prompt_length`, `institution` and `patient_id`, and
        counts.

        Raises
        ------
        ConfigError : `too_long` is error, and a source or a report does not fit.
        """
        from datasets import Dataset

        encoded = self.encode_sources([pair.source for pair in pairs], tokenizer)
        targets = self.encode_targets([pair.target for pair in pairs], tokenizer)
        over = [len(row) for row in targets if len(row) > self.max_new_tokens]
        if over and self.too_long == "error":
            raise ConfigError(
                f"{len(over)} of {len(targets)} training reports are longer than max_new_tokens {self.max_new_tokens} "
                f"(the longest has {max(over)}); set max_new_tokens higher, or too_long to cut_source or leave_out, "
                "which leave them out"
            )
        kept = [
            (prompt, target, pair)
            for prompt, target, pair in zip(encoded.prompts, targets, pairs, strict=True)
            if prompt is not None and len(target) <= self.max_new_tokens
        ]
        if not kept:
            raise ConfigError(
                f"none of {len(pairs)} training pairs fits a window of {self.window} with reports of "
                f"{self.max_new_tokens} tokens; set a larger window"
            )
        rows = Dataset.from_dict(
            {
                "input_ids": [[*prompt, *target] for prompt, target, _ in kept],
                "prompt_length": [len(prompt) for prompt, *_ in kept],
                "institution": [pair.institution for *_, pair in kept],
                "patient_id": [pair.patient_id for *_, pair in kept],
            }
        )
        return rows, {
            "pairs": len(pairs),
            "trained_on": len(kept),
            "sources_cut": encoded.sources_cut,
            "sources_left_out": encoded.sources_left_out,
            "reports_left_out": len(over),
        }

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make (B, L) rows padded on the right, with labels on the report and its end only.

        A causal model cannot see what comes after a token, so padding needs no mask.
        """
        import torch

        width = max(len(example["input_ids"]) for example in examples)
        ids = torch.full((len(examples), width), self.pad_token_id)
        labels = torch.full((len(examples), width), -100)
        for row, example in enumerate(examples):
            tokens, start = torch.tensor(example["input_ids"]), example["prompt_length"]
            ids[row, : len(tokens)] = tokens
            labels[row, start : len(tokens)] = tokens[start:]
        return {"input_ids": ids, "position_ids": torch.arange(width).repeat(len(examples), 1), "labels": labels}


def tokens_of(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Tokenise note text; what looks like a control token in it (`</s>`) is text, never a control token."""
    rows: list[list[int]] = []
    for begin in range(0, len(texts), 1000):
        batch = list(texts[begin : begin + 1000])
        rows += tokenizer(batch, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return rows


def report_task(
    base: BaseModel,
    *,
    kind: str,
    instruction: str,
    window: int | None,
    max_new_tokens: int | None,
    too_long: TooLong,
    targets: Sequence[str] = (),
) -> ReportTask:
    """Lay out the prompt for a base model: by its chat template where it has one, else instruction, source, `Report:`.

    Parameters
    ----------
    window : tokens of prompt and report together; default what the model has positions for, at most 4096.
    max_new_tokens : tokens of the longest report; default that of the longest training report, at most half the window.
    targets : the training reports.

    Raises
    ------
    ModelError : the tokenizer has no end-of-text token, or none that pads and is not the end of text.
    ConfigError : the window is longer than the model, or leaves no room for a source.
    """
    tokenizer = base.tokenizer
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of base_model {base.resolved.name!r} has no end-of-text token; a model cannot learn to "
            "stop: name another base model, or set eos_token in its tokenizer_config.json"
        )
    pad = _pad_token(base)
    longest = getattr(base.network.config.get_text_config(), "max_position_embeddings", None)
    if window is not None and longest is not None and window > longest:
        raise ConfigError(
            f"window {window} is longer than the {longest} positions of base_model {base.resolved.name!r}"
        )
    window = window or min(longest or _LONGEST_DEFAULT, _LONGEST_DEFAULT)
    before, after, end, chat = _layout(tokenizer, instruction)
    stops = tuple(dict.fromkeys([tokenizer.eos_token_id, *[token for token in end if token in _control(tokenizer)]]))
    task = ReportTask(
        kind=kind,
        instruction=instruction,
        window=window,
        max_new_tokens=0,
        too_long=too_long,
        before=before,
        after=after,
        end=end,
        stops=stops,
        pad_token_id=pad,
        chat=chat,
        mark=tuple(tokens_of([MARK], tokenizer)[0]),
    )
    if max_new_tokens is None:
        wanted = max((len(row) for row in task.encode_targets(targets, tokenizer)), default=window // 2)
        max_new_tokens = min(wanted, window // 2)
    task = replace(task, max_new_tokens=max_new_tokens)
    if task.room < 16:
        raise ConfigError(
            f"max_new_tokens {max_new_tokens} and the instruction leave {max(task.room, 0)} of the window's {window} "
            "tokens for a source; set max_new_tokens lower, or a larger window"
        )
    return task


_LONGEST_DEFAULT = 4096


def _control(tokenizer: Any) -> set[int]:
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def _pad_token(base: BaseModel) -> int:
    """Return a token to pad with that is not the end of text: padding that looks like it teaches never to stop."""
    tokenizer = base.tokenizer
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return int(tokenizer.pad_token_id)
    free = {*_control(tokenizer)} - {tokenizer.eos_token_id, tokenizer.bos_token_id}
    named = [token for token in sorted(free) if "pad" in tokenizer.convert_ids_to_tokens(token).lower()]
    found = tokenizer.unk_token_id if tokenizer.unk_token_id is not None else next(iter([*named, *sorted(free)]), None)
    if found is None or found == tokenizer.eos_token_id:
        raise ModelError(
            f"the tokenizer of base_model {base.resolved.name!r} has no token to pad with but its end-of-text token; "
            "set pad_token in its tokenizer_config.json to a token that no note has"
        )
    return int(found)


_SOURCE, _TARGET = "\u2402SOURCE\u2403", "\u2402REPORT\u2403"


def _layout(tokenizer: Any, instruction: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]:
    """Return the tokens before and after a source, those after a report, and whether a chat template gave them."""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    eos = tokenizer.eos_token_id
    if not getattr(tokenizer, "chat_template", None):
        bos = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
        before, after = (piece.format(instruction=instruction) for piece in _PLAIN)
        return (*bos, *ids(before)), ids(after), (eos,), False
    user = {"role": "user", "content": f"{instruction}\n\n{_SOURCE}"}
    common: dict[str, Any] = {"tokenize": False, "enable_thinking": False}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, **common)
    whole = tokenizer.apply_chat_template([user, {"role": "assistant", "content": _TARGET}], **common)
    before, found, after = prompt.partition(_SOURCE)
    _, written, closing = whole.partition(_TARGET)
    if not found or not written:
        raise ModelError("the chat template of this base model does not show its messages as they are; remove it")
    end = list(ids(closing))
    control = _control(tokenizer)
    stop = next((place for place, token in enumerate(end) if token in control), None)
    end = end[: stop + 1] if stop is not None else [*end, eos]
    return ids(before), ids(after), tuple(end), True


def save(folder: Path, network: Any, task: ReportTask, base: BaseModel, *, moves_base: bool, verify: Verify) -> None:
    """Write what was trained (adapter, or the whole model where its weights moved) and `task.json`."""
    inner = network.get_base_model() if hasattr(network, "peft_config") else network
    if moves_base:
        inner.save_pretrained(folder / "model")
        base.tokenizer.save_pretrained(folder / "model")
    elif has_adapter(network):
        save_adapter(network, folder / "adapter", name=ADAPTER, prefix=backbone_prefix(inner))
    values = {"task": "report", **asdict(task), "quantization": base.quantization, "verify": verify}
    write_json(folder / "task.json", values)


def read_report_task(folder: Path) -> tuple[ReportTask, dict[str, Any]]:
    """Return the task of a report run, and all that its `task.json` says.

    Raises
    ------
    ModelError : the run was trained for something else.
    """
    values = read_task(folder)
    if values.get("task") != "report":
        raise ModelError(f"run {folder} was trained for {values.get('task')}, not for report")
    known: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if name in ReportTask.__dataclass_fields__
    }
    try:
        return ReportTask(**known), values
    except TypeError:
        raise ModelError(f"{folder / 'task.json'} is damaged; train the run again") from None


class Reporter:
    """A trained report model, ready to draft: call it with sources."""

    def __init__(self, network: Any, tokenizer: Any, task: ReportTask, *, verify: Verify, engine: Any = None) -> None:
        self.task = task
        self.verify: Verify = verify
        self._network, self._tokenizer, self._engine = network, tokenizer, engine

    def __call__(
        self, sources: Sequence[str], *, batch_size: int = 32, num_beams: int = 1, verify: Verify | None = None
    ) -> list[Draft | None]:
        """Draft a report for each source.

        Parameters
        ----------
        batch_size : prompts generated together; the drafts do not depend on it.
        num_beams : 1 is greedy.
        verify : none, mark or drop; default as the run was trained. See `tasks.generation.verified`.

        Returns
        -------
        A `Draft` for each source, in order; None where it did not fit and the run leaves such sources out. Every draft
        is unreviewed.
        """
        encoded = self.task.encode_sources(sources, self._tokenizer)
        rows = [place for place, prompt in enumerate(encoded.prompts) if prompt is not None]
        prompts = [prompt for prompt in encoded.prompts if prompt is not None]
        common: dict[str, Any] = {"max_new_tokens": self.task.max_new_tokens, "stops": self.task.stops}
        if self._engine is None:
            made = generate(
                self._network, prompts, pad_token_id=self.task.pad_token_id, batch_size=batch_size,
                num_beams=num_beams, **common,
            )  # fmt: skip
        else:
            made = self._engine(prompts, num_beams=num_beams, **common)
        found = drafts(made, [sources[row] for row in rows], self._tokenizer, verify=verify or self.verify)
        by_row = dict(zip(rows, found, strict=True))
        return [by_row.get(row) for row in range(len(sources))]


def load_reporter(run: str | Path, *, engine: Literal["transformers", "vllm"] = "transformers") -> Reporter:
    """Load a finished report run.

    Parameters
    ----------
    run : its directory.
    engine : `vllm` is faster for many sources on a GPU, where it is installed; it needs a run that holds a whole model
        (strategy full), not an adapter.

    Raises
    ------
    ModelError : the run was trained for something else, or vLLM is not installed or cannot serve this run.
    """
    folder = Path(run)
    Run.load(folder)
    task, values = read_report_task(folder)
    if engine == "vllm":
        from clinical_nlp.tasks.generation import vllm_engine

        if not (folder / "model").is_dir():
            raise ModelError(
                f"run {folder} holds an adapter, and engine vllm needs a whole model; use engine transformers, or "
                "train with strategy full"
            )
        tokenizer = load_base(str(folder), kind="causal").tokenizer
        return Reporter(None, tokenizer, task, verify=values["verify"], engine=vllm_engine(folder / "model"))
    base = load_base(str(folder), kind="causal", quantization=values["quantization"])
    return Reporter(base.network, base.tokenizer, task, verify=values["verify"])


def write_drafts(folder: Path, pairs: Sequence[Pair], found: Sequence[Draft]) -> None:
    """Write `generated.parquet` and `generated.jsonl`: drafts beside source and reference, marked as unreviewed."""
    import pyarrow.parquet as pq

    from clinical_nlp.runs import write_atomic

    rows = [
        {
            "pair_id": pair.pair_id,
            "patient_id": pair.patient_id,
            "institution": pair.institution,
            "status": DRAFT,
            "source": pair.source,
            "reference": pair.target,
            "generated": draft.text,
            "stopped": draft.stopped,
            "tokens": draft.tokens,
            "unsupported": [{"start": start, "end": end, "reason": reason} for start, end, reason in draft.unsupported],
            "sentences_dropped": draft.dropped,
        }
        for pair, draft in zip(pairs, found, strict=True)
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=DRAFT_SCHEMA), sink)
    write_atomic(folder / "generated.parquet", sink.getvalue().to_pybytes())
    write_atomic(folder / "generated.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


DRAFT_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string()),
        pa.field("patient_id", pa.string()),
        pa.field("institution", pa.string()),
        pa.field("status", pa.string()),
        pa.field("source", pa.large_string()),
        pa.field("reference", pa.large_string()),
        pa.field("generated", pa.large_string()),
        pa.field("stopped", pa.bool_()),
        pa.field("tokens", pa.int32()),
        pa.field(
            "unsupported",
            pa.list_(pa.struct([("start", pa.int32()), ("end", pa.int32()), ("reason", pa.string())])),
        ),
        pa.field("sentences_dropped", pa.int32()),
    ]
)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in counts.items())


def preference_rows(
    task: ReportTask,
    prompts: Sequence[list[int]],
    chosen: Sequence[str],
    rejected: Sequence[str],
    tokenizer: Any,
    *,
    differing: bool = True,
) -> list[dict[str, Any] | None]:
    """Return prompt, preferred and rejected report as tokens, and which tokens count (1) in the loss.

    A pair whose reports do not fit, or are the same, is None. With `differing`, the tokens count in which the two
    reports differ: what they share is then neither learned nor unlearned.
    """
    good, bad = (task.encode_targets(texts, tokenizer) for texts in (chosen, rejected))
    rows: list[dict[str, Any] | None] = []
    for prompt, first, second in zip(prompts, good, bad, strict=True):
        if max(len(first), len(second)) > task.max_new_tokens or first == second:
            rows.append(None)
            continue
        masks = differing_tokens(first, second) if differing else ([1] * len(first), [1] * len(second))
        rows.append({"prompt_ids": list(prompt), "chosen_ids": first, "rejected_ids": second,
                     "chosen_mask": masks[0], "rejected_mask": masks[1]})  # fmt: skip
    return rows


def differing_tokens(one: Sequence[int], other: Sequence[int]) -> tuple[list[int], list[int]]:
    """Mark (1) the tokens in which two rows differ; where one has nothing, the token that stands there instead."""
    masks = [0] * len(one), [0] * len(other)
    for what, *ends in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        if what != "equal":
            for mask, (start, end) in zip(masks, (ends[:2], ends[2:]), strict=True):
                for place in range(start, min(max(end, start + 1), len(mask))):
                    mask[place] = 1
    return masks


def log_likelihoods(
    model: Any,
    rows: Sequence[tuple[list[int], list[int]]],
    *,
    pad_token_id: int,
    counted: Sequence[Sequence[int]] | None = None,
    batch_tokens: int = 4096,
) -> np.ndarray:
    """Return the log-likelihood of each report, given its prompt, in nats.

    Parameters
    ----------
    model : causal language model (or peft model around one).
    rows : (prompt, report) as tokens.
    counted : of each report, which tokens count (1); default all.

    Returns
    -------
    (n,) float64.
    """
    import torch

    found = np.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda place: (sum(map(len, rows[place])), place))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for batch in _batches(order, [sum(map(len, row)) for row in rows], batch_tokens):
            width = sum(map(len, rows[batch[-1]]))
            ids = torch.full((len(batch), width), pad_token_id)
            weight = torch.zeros((len(batch), width))
            for position, place in enumerate(batch):
                prompt, report = rows[place]
                ids[position, : len(prompt) + len(report)] = torch.tensor([*prompt, *report])
                own = torch.ones(len(report)) if counted is None else torch.tensor(counted[place], dtype=weight.dtype)
                weight[position, len(prompt) : len(prompt) + len(report)] = own
            logits = model(input_ids=ids.to(device)).logits[:, :-1].float()
            nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:].to(device), reduction="none")
            found[batch] = -(nats * weight[:, 1:].to(device)).sum(1).double().cpu().numpy()
    model.train(was_training)
    return found


def with_reference(model: Any, rows: Sequence[dict[str, Any]], *, pad_token_id: int) -> list[dict[str, Any]]:
    """Return preference rows with the log-likelihoods of what counts in them, by the model as it is."""
    whole = [dict(row) for row in rows]
    for which in ("chosen", "rejected"):
        nats = log_likelihoods(
            model, [(row["prompt_ids"], row[f"{which}_ids"]) for row in rows],
            pad_token_id=pad_token_id, counted=[row[f"{which}_mask"] for row in rows],
        )  # fmt: skip
        for row, value in zip(whole, nats, strict=True):
            row[f"ref_{which}_logps"] = float(value)
    return whole


def _batches(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group indices, given from short to long, into batches of at most so many tokens with their padding."""
    batches: list[list[int]] = []
    for place in order:
        if batches and (len(batches[-1]) + 1) * lengths[place] <= batch_tokens:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def collate_preferences(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Make one batch of preferred reports and, below them, rejected ones, with the reference's log-likelihoods."""
    import torch

    whole = [
        (row["prompt_ids"], row[f"{which}_ids"], row[f"{which}_mask"])
        for which in ("chosen", "rejected")
        for row in rows
    ]
    width = max(len(prompt) + len(report) for prompt, report, _ in whole)
    ids = torch.full((len(whole), width), pad_token_id)
    seen = torch.zeros((len(whole), width), dtype=torch.long)
    report_mask = torch.zeros((len(whole), width), dtype=torch.long)
    for place, (prompt, report, mask) in enumerate(whole):
        end = len(prompt) + len(report)
        ids[place, :end] = torch.tensor([*prompt, *report])
        seen[place, :end] = 1
        report_mask[place, len(prompt) : end] = torch.tensor(mask)
    batch = {"input_ids": ids, "attention_mask": seen, "completion_mask": report_mask}
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
    return batch


def interleaved(rng: np.random.Generator, kinds: Sequence[ErrorKind], count: int) -> list[ErrorKind]:
    """Return `count` kinds, each as often as the others, in random order within every round."""
    rounds = (rng.permutation(len(kinds)) for _ in range(-(-count // len(kinds))))
    return [kinds[int(place)] for place in itertools.islice(itertools.chain.from_iterable(rounds), count)]
