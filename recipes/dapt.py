"""Domain-adaptive pretraining: let a base model read the hospital's own notes before it learns a task."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from clinical_nlp.adaptation.forgetting import ForgettingConfig, check_forgetting, distance_penalty, source_fisher
from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy, trainable_count
from clinical_nlp.config import CorpusConfig, RecipeConfig, SplitConfig
from clinical_nlp.corpora import ehr_export
from clinical_nlp.errors import ConfigError, InputError, TooFewPatientsError
from clinical_nlp.invariance.language_attachment import MarkedRows, attach_to_language_model
from clinical_nlp.invariance.objectives import ObjectiveConfig, check_objective
from clinical_nlp.models.adapters import ADAPTER, save_adapter
from clinical_nlp.models.loading import HEAD, BaseModel, backbone_prefix, head_state, load_base
from clinical_nlp.models.resolve import provenance, resolve_model
from clinical_nlp.notes.corpus import Corpus, corpus_path, load_corpus
from clinical_nlp.notes.readers import read_notes
from clinical_nlp.notes.splitting import Split, split_patients, split_without_duplicates
from clinical_nlp.notes.streaming import NoteStream, part_of_patient
from clinical_nlp.progress import is_main_process, say
from clinical_nlp.recipes.ner import digest, n_processes
from clinical_nlp.runs import Run, write_json
from clinical_nlp.tasks import pretraining
from clinical_nlp.tasks.pretraining import LanguageTask
from clinical_nlp.training import checkpoints
from clinical_nlp.training.trainer import LossTerm, TrainingConfig, train


class ReplayConfig(CorpusConfig):
    """Notes of another corpus that are read along, and on which forgetting is measured."""

    ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the training tokens that come from this corpus; 0 only measures."""


class DaptConfig(RecipeConfig):
    """Continue pretraining a language model on notes: the next token for decoders, masked tokens for encoders."""

    base_model: str = "builtin:tiny"
    """Hub id, local folder, or the directory of an earlier run."""
    strategy: StrategyConfig = StrategyConfig(name="lora", rank=32, alpha=64)
    """What may move; any but head. See `clinical-nlp list strategies`."""
    attention: Literal["causal", "bidirectional"] = "causal"
    """bidirectional: a decoder sees to the right and learns to fill in masked tokens, as a base for tagging. Encoders
    always do."""
    length: int = Field(default=512, ge=32)
    """Tokens of a row; longer notes are divided, none is cut off."""
    batching: Literal["auto", "packed", "bucketed"] = "auto"
    """packed: rows full of whole notes that do not see one another. bucketed: one note a row, with others of its
    length. auto: packed, but bucketed where rows are long or the model's attention would mix packed notes."""
    deduplicate: float | None = Field(default=0.9, gt=0, le=1)
    """Notes that share this much of their word sequences are read once, never on both sides of the split; null: off.
    With stream, exact copies only."""
    stream: bool = False
    """Read a corpus larger than memory (ehr_export): notes are divided by a hash of the patient and tokenised into a
    file in the run, which is deleted at the end."""
    scored_patients: int = Field(default=500, ge=1)
    """At most this many held-out patients are scored where notes are streamed, and of the replayed corpus."""
    replay: ReplayConfig | None = None
    """Corpus that shall not be forgotten: replay.name, replay.path, replay.options, replay.ratio."""
    forgetting: ForgettingConfig = ForgettingConfig()
    """What holds the weights near where they were: none, l2_sp or ewc."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is asked of the representation, so that the institution counts for less: dann, mmd and coral on the states
    of documents, irm, vrex and group_dro on the losses of tokens. Replayed notes do not count."""
    training: TrainingConfig = TrainingConfig(epochs=3, batch_size=8)
    """How the weights are moved."""


CONFIG = DaptConfig


@dataclass(frozen=True)
class Material:
    """What is trained and scored on: training rows, and token rows of held-out notes with who and where they are of.

    `parts_of` says in which part each of the patients asked for is.
    """

    rows: Any  # pa.Table, or the Path of an Arrow file
    development: list[list[int]]
    held_out: list[list[int]]
    patients: list[str]
    groups: dict[str, Sequence[str]]
    part: str
    split: str
    parts_of: Callable[[set[str]], dict[str, str]]
    inputs: dict[str, Any]


def run(config: DaptConfig, output: Path, *, resume: bool = False) -> Run:
    """Read, lay out in rows, train, and report perplexity on held-out patients before and after."""
    check(config)
    with Run.open(output, config, recipe="dapt", resume=resume) as run:
        resolve_model(config.base_model)  # a wrong name is told before the notes are read
        corpus = None if config.stream else load_corpus(config.corpus.name, config.corpus.path, **config.corpus.options)
        split = None if corpus is None else split_corpus(corpus, config)
        bidirectional = config.attention == "bidirectional"
        base = load_base(
            config.base_model,
            kind="causal" if bidirectional else "language",
            quantization=config.strategy.quantization,
            bidirectional=bidirectional,
            dtype="bf16" if config.training.precision == "bf16" and not config.strategy.moves_base else "auto",
        )
        task = pretraining.language_task(base, config.length, batching=config.batching, bidirectional=bidirectional)
        if corpus is None or split is None:
            material = streamed(config, task, base.tokenizer, run, resume)
        else:
            material = in_memory(corpus, split, task, base.tokenizer)
        say(material.split)
        own = task.examples([material.rows], seed=config.seed)
        tokens = int(pretraining.row_lengths(own).sum())
        source = None if config.replay is None else replayed(config, task, base.tokenizer, tokens, material.parts_of)
        sources = [material.rows, *([source.rows] if source and len(source.rows) else [])]
        examples = task.examples(sources, seed=config.seed) if len(sources) > 1 else own
        lengths = pretraining.row_lengths(examples)

        scored = [found for found in (material, source) if found is not None]
        before_model = task.model(base.network)
        before = [task.losses(before_model, found.held_out) for found in scored]
        by_loss = config.training.curriculum == "loss"
        difficulty = task.row_losses(before_model, examples).tolist() if by_loss else None
        network = apply_strategy(base.network, config.strategy, seed=config.seed)
        model, head = with_head(task, network, base)
        trainable, everything = trainable_count(model)
        terms = [penalty(config, task, network, base)] if config.forgetting.name != "none" else []
        collate: Callable[[Any], dict[str, Any]] = task.collate
        learned, attached = examples, None
        if config.objective.is_active:
            table = (examples.rows if task.masked else examples).data
            learned = MarkedRows(examples, table, counted=len(pretraining.row_lengths(own)))
            attached = attach_to_language_model(
                model,
                config.objective,
                learned,
                task="pretraining",
                batch_size=config.training.batch_size // n_processes(),
                seed=config.seed,
                shift=task.shift,
            )
            terms.append(attached.term)
            collate = MarkedRows.collate(collate)
        say(
            f"{len(lengths)} {task.batching} rows of at most {task.length} tokens; "
            f"{trainable:,} of {everything:,} parameters train ({config.strategy.name})"
        )

        def score_development() -> float:
            nats, predicted = task.losses(model, material.development).sum(0)
            return -float(nats / predicted)

        outcome = train(
            model,
            learned,
            collate,
            config=config.training,
            run=run,
            seed=config.seed,
            lengths=lengths.tolist(),
            tokenizer=base.tokenizer,
            strategy=config.strategy,
            language_model=not task.masked,
            head=head,
            max_steps=config.max_steps,
            max_minutes=config.max_minutes,
            resume=resume,
            terms=terms,
            objective=None if attached is None else attached.module,
            balance=None if attached is None else attached.balance,
            validate=score_development if material.development else None,
            difficulty=difficulty,
        )
        if attached is not None:
            del model.objective  # what is saved does without

        after = [task.losses(model, found.held_out) for found in scored]
        for number, found in enumerate(scored):
            run.record(
                pretraining.compare(
                    before[number],
                    after[number],
                    found.patients,
                    found.groups,
                    part=found.part,
                    seed=config.seed,
                    metric=task.metric if number == 0 else f"source_{task.metric}",
                )
            )
        if is_main_process():
            save(run.path, network, base, task, moves_base=config.strategy.moves_base)
        run.note(
            inputs=material.inputs
            | ({"measured": PSEUDO_PERPLEXITY} if task.masked else {})
            | ({} if source is None else {f"replay_{name}": value for name, value in source.inputs.items()}),
            base_model=provenance(base.resolved, run.path),
            parent_run=None if base.resolved.parent_run is None else str(base.resolved.parent_run),
            training=outcome | {"trainable_parameters": trainable, "parameters": everything, "rows": len(lengths)},
            objective="masked" if task.masked else "causal",
            invariance=None if attached is None else {"name": config.objective.name, "between": learned.names},
            language_model_head=base.head,
            batching=task.batching,
            split=material.split,
        )
        if config.stream and is_main_process():
            shutil.rmtree(run.path / STREAM)
    if is_main_process():
        from clinical_nlp.reporting.page import run_report

        run_report(run)
    return run


PSEUDO_PERPLEXITY = (
    f"pseudo-perplexity: each token is predicted once, while it and a further share of its note, one in "
    f"{pretraining.MASKED_SETS} tokens together, are masked; not to be compared with perplexity"
)
STREAM = "stream"
"""Folder of the run that holds the tokens of streamed notes until the run is finished."""


def check(config: DaptConfig) -> None:
    """Refuse what cannot work before anything is read."""
    if config.strategy.name == "head":
        raise ConfigError("strategy 'head' leaves the base model as it is, which dapt is to move; use lora or full")
    check_forgetting(config.forgetting, config.strategy)
    check_objective(config.objective, config.strategy, task="pretraining", processes=n_processes())
    if config.stream and config.corpus.name != ehr_export.CARD.name:
        raise ConfigError(
            f"corpus {config.corpus.name!r} is read as a whole; stream needs corpus.name {ehr_export.CARD.name}"
        )


def split_corpus(corpus: Corpus, config: DaptConfig, split: SplitConfig | None = None) -> tuple[Split, int]:
    """Divide by patient and leave copies out; return the split and how many notes were left out."""
    common: dict[str, Any] = {"seed": config.seed, "parts": corpus.parts}
    if config.deduplicate is None:
        return split_patients(corpus.notes, split or config.split, **common), 0
    found, duplicates = split_without_duplicates(
        corpus.notes, split or config.split, threshold=config.deduplicate, **common
    )
    return found, len(duplicates.dropped)


def in_memory(corpus: Corpus, divided: tuple[Split, int], task: LanguageTask, tokenizer: Any) -> Material:
    """Tokenise a loaded corpus and lay its training notes out in rows."""
    split, dropped = divided
    notes = corpus.notes
    tokens = task.encode(notes["text"].to_pylist(), tokenizer)
    patients, institutions, types = (notes[name].to_pylist() for name in ("patient_id", "institution", "note_type"))
    parts = {
        name: [int(row) for row in rows if tokens[row]]
        for name, rows in (("train", split.train), ("development", split.development), ("test", split.test))
    }
    without = sum(map(len, (split.train, split.development, split.test))) - sum(map(len, parts.values()))
    for name in ("train", "test"):
        if not parts[name]:
            raise InputError(f"no note of the {name} part has a token that the tokenizer of this base model knows")
    part_of = {patients[row]: name for name, rows in parts.items() for row in rows}
    train, test = parts["train"], parts["test"]
    return Material(
        rows=task.arrange(
            [tokens[row] for row in train], [patients[row] for row in train], [institutions[row] for row in train]
        ),
        development=[tokens[row] for row in parts["development"]],
        held_out=[tokens[row] for row in test],
        patients=[patients[row] for row in test],
        groups={"institution": [institutions[row] for row in test], "note_type": [types[row] for row in test]},
        part=split.reported_part,
        split=split.describe(),
        parts_of=lambda asked: {patient: part_of[patient] for patient in asked & part_of.keys()},
        inputs={
            "corpus": corpus.card.name,
            "n_notes": notes.num_rows,
            "n_duplicates_dropped": dropped,
            "n_without_tokens": without,
            "notes_sha256": digest(corpus),
        },
    )


def streamed(config: DaptConfig, task: LanguageTask, tokenizer: Any, run: Run, resume: bool) -> Material:
    """Read an export in batches into a file of training rows in the run; a whole one is taken up on resume."""
    folder = run.path / STREAM
    if is_main_process() and not (resume and checkpoints.verifies(folder)):
        options = dict(config.corpus.options)
        source = corpus_path(ehr_export.CARD, None if config.corpus.path is None else Path(config.corpus.path))
        if "format" not in options:
            raise ConfigError("corpus ehr_export needs corpus.options.format")
        records = read_notes(source, format=options.pop("format"), options=ehr_export.read_options(options))
        stream = NoteStream(records, config.split, seed=config.seed, limit=config.scored_patients)
        pretraining.write_stream(stream, task, tokenizer, folder)
        checkpoints.seal(folder)
    while not checkpoints.verifies(folder):  # another process is writing it
        time.sleep(1)
    facts = pretraining.read_facts(folder)
    held_out, columns = pretraining.read_held_out(folder, "test")
    development, _ = pretraining.read_held_out(folder, "development")
    return Material(
        rows=folder / "rows.arrow",
        development=development,
        held_out=held_out,
        patients=columns["patient_id"],
        groups={name: columns[name] for name in ("institution", "note_type")},
        part="test",
        split=facts["describe"],
        parts_of=lambda asked: pretraining.parts_of_patients(folder, asked),
        inputs={"corpus": ehr_export.CARD.name, "streamed": True, "n_notes": sum(facts["notes"].values())}
        | {name: facts[name] for name in ("n_duplicates_dropped", "n_without_tokens", "left_out", "rows_sha256")},
    )


def replayed(
    config: DaptConfig, task: LanguageTask, tokenizer: Any, tokens: int, parts_of: Callable[[set[str]], dict[str, str]]
) -> Material:
    """Take whole notes of the replayed corpus up to its share of the training tokens, and others to score.

    Patients whom both corpora have stay on one side: none is replayed who is held out of the notes that are read, and
    none is scored here who is trained on there. The order in which notes are taken depends on seed and patient alone.
    """
    replay = config.replay
    assert replay is not None
    corpus = load_corpus(replay.name, replay.path, **replay.options)
    split = config.split if config.split.name in ("official", "random") else SplitConfig(name="official")
    divided, dropped = split_corpus(corpus, config, split)
    patients = corpus.notes["patient_id"].to_pylist()
    there = parts_of(set(patients))
    rank = {patient: part_of_patient(patient, split, seed=config.seed)[1] for patient in set(patients)}
    train = [int(row) for row in divided.train if there.get(patients[row], "train") == "train"]
    test = [int(row) for row in divided.test if there.get(patients[row], "test") != "train"]
    excluded = len(divided.train) + len(divided.test) - len(train) - len(test)
    kept = set(sorted({patients[row] for row in test}, key=lambda patient: rank[patient])[: config.scored_patients])
    test = [row for row in test if patients[row] in kept]

    wanted = round(replay.ratio / (1 - replay.ratio) * tokens)
    texts, institutions = corpus.notes["text"], corpus.notes["institution"].to_pylist()
    taken: list[int] = []
    rows: list[list[int]] = []
    total = 0
    for row in sorted(train, key=lambda row: (rank[patients[row]], row)):
        if total >= wanted:
            break
        (ids,) = task.encode([texts[row].as_py()], tokenizer)
        if ids:
            taken.append(row)
            rows.append(ids)
            total += len(ids)
    held_out = task.encode([texts[row].as_py() for row in test], tokenizer)
    test = [row for row, ids in zip(test, held_out, strict=True) if ids]
    if not test or (wanted and not taken):
        raise TooFewPatientsError(f"corpus {replay.name!r} has no patients left to replay or to score; name another")
    ratio = total / (total + tokens)
    say(
        f"replay of {replay.name}: {len(taken)} notes of {len({patients[row] for row in taken})} patients, "
        f"{100 * ratio:.1f} % of the training tokens"
        + (f" (all there are; {100 * replay.ratio:g} % was asked for)" if total < wanted else "")
    )
    return Material(
        rows=task.arrange(rows, [patients[row] for row in taken], [institutions[row] for row in taken]),
        development=[],
        held_out=[ids for ids in held_out if ids],
        patients=[patients[row] for row in test],
        groups={},
        part=divided.reported_part,
        split=divided.describe(),
        parts_of=parts_of,
        inputs={
            "corpus": corpus.card.name,
            "notes_sha256": digest(corpus),
            "n_duplicates_dropped": dropped,
            "n_notes_of_patients_of_another_part": excluded,
            "n_notes": len(taken),
            "n_patients": len({patients[row] for row in taken}),
            "tokens": total,
            "ratio": ratio,
            "split": divided.describe(),
        },
    )


def penalty(config: DaptConfig, task: LanguageTask, network: Any, base: BaseModel) -> LossTerm:
    """Return the loss term that holds the base near where it is now; a head that the base did not have is free."""
    settings = config.forgetting
    free = set(head_state(network)) if base.head in ("fresh", "run") else set()
    weights = None
    if settings.name == "ewc":
        weights = source_fisher(network, task, base.tokenizer, settings, seed=config.seed)
        weights = {name: value for name, value in weights.items() if name not in free}
    return distance_penalty(network, settings.strength, weights=weights, free=free)


def with_head(task: LanguageTask, network: Any, base: BaseModel) -> tuple[Any, str | None]:
    """Return the model to train, and the path of a masked-LM head that the checkpoint lacked, which trains too."""
    model = task.model(network)
    if base.head not in ("fresh", "run"):
        return model, None
    state = head_state(network)
    for parameter in state.values():
        parameter.requires_grad_(True)
    ours = {id(parameter) for parameter in state.values()}
    named = {name: id(parameter) in ours for name, parameter in model.named_parameters()}
    levels = zip(*(name.split(".") for name, own in named.items() if own), strict=False)
    path = [level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels)]
    # Where the head is not one module, or is one that holds the backbone too, it learns at the rate of the base.
    whole = all(own for name, own in named.items() if name.split(".")[: len(path)] == path)
    return model, ".".join(path) if whole else None


def save(folder: Path, network: Any, base: BaseModel, task: LanguageTask, *, moves_base: bool) -> None:
    """Write the whole model where its weights moved, else the adapter, and the head that the base did not have."""
    inner = network.get_base_model() if hasattr(network, "peft_config") else network
    if moves_base:
        inner.save_pretrained(folder / "model")
        base.tokenizer.save_pretrained(folder / "model")
    else:
        save_adapter(network, folder / "adapter", name=ADAPTER, prefix=backbone_prefix(inner))
        if base.head in ("fresh", "run"):
            from safetensors.torch import save_file

            state = {name: value.detach().cpu().contiguous() for name, value in head_state(network).items()}
            save_file(state, folder / HEAD, metadata={"format": "pt"})
    objective = "masked" if task.masked else "causal"
    write_json(folder / "task.json", {"task": "pretraining", "length": task.length, "objective": objective})
