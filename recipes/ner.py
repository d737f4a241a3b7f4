"""Fine-tune a base model to mark entities in notes, and score it on patients it has not seen."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from clinical_nlp.adaptation.forgetting import ForgettingConfig, check_forgetting, distance_penalty, source_fisher
from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy, trainable_count
from clinical_nlp.config import CorpusConfig, RecipeConfig, SplitConfig
from clinical_nlp.errors import ConfigError, InputError, TooFewPatientsError
from clinical_nlp.invariance.attachment import MarkedExamples, TargetNote, attach_objective, read_target
from clinical_nlp.invariance.objectives import ObjectiveConfig, check_objective
from clinical_nlp.models.loading import BaseModel, backbone_prefix, can_be_prompted, load_base, read_task
from clinical_nlp.models.resolve import ResolvedModel, provenance, resolve_model
from clinical_nlp.notes.corpus import Corpus, load_corpus
from clinical_nlp.notes.splitting import Split, split_patients
from clinical_nlp.progress import is_main_process, say
from clinical_nlp.runs import Estimate, Run
from clinical_nlp.statistics.intervals import FEWEST_PATIENTS
from clinical_nlp.tasks import ner, pretraining, prompting
from clinical_nlp.training.trainer import LossTerm, TrainingConfig, train


class ReplayConfig(CorpusConfig):
    """Notes of an earlier corpus that are learned along, and on which forgetting is measured."""

    ratio: float = Field(default=0.2, ge=0, lt=1)
    """Share of the training tokens that come from this corpus; 0 only measures."""


class NerConfig(RecipeConfig):
    """Fine-tune a base model to mark entities in notes."""

    base_model: str = "builtin:tiny"
    """Hub id, local folder, or the directory of an earlier run."""
    strategy: StrategyConfig = StrategyConfig(name="qlora")
    """What may move. See `clinical-nlp list strategies`."""
    head: Literal["auto", "new", "continue"] = "auto"
    """continue: go on with the tagging head of the ner run that base_model names. new: a fresh one. auto: continue
    where base_model is a ner run, else new."""
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Whether a decoder sees to the right of a word; encoders always do."""
    labels: list[str] = Field(default_factory=list)
    """Entity types to learn; default all that the training part has."""
    window: int = Field(default=256, ge=16)
    """Tokens the model sees at once."""
    overlap: int = Field(default=64, ge=0)
    """Tokens that neighbouring windows of a long note share."""
    loss: ner.LossConfig = ner.LossConfig()
    """What a wrongly tagged word costs."""
    drop_sections: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a section of a training note is left out, drawn anew each epoch, to learn notes that lack it."""
    replay: ReplayConfig | None = None
    """Corpus that shall not be forgotten: replay.name, replay.path, replay.options, replay.ratio. It must mark every
    entity type that is learned."""
    forgetting: ForgettingConfig = ForgettingConfig()
    """What holds the weights near where they were: none, l2_sp or ewc (how the base reads source notes)."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is asked of the representation, so that the institution counts for less. See `clinical-nlp list
    objectives`."""
    training: TrainingConfig = TrainingConfig(epochs=6)
    """How the weights are moved."""
    baseline_notes: int = Field(default=30, ge=0)
    """Held-out notes on which the base model as it is, only prompted, is scored beside the run; 0: it is not."""
    score_train: bool = False
    """Also score the development part and a sample of the training patients, which shows overfitting."""


CONFIG = NerConfig


def run(config: NerConfig, output: Path, *, resume: bool = False) -> Run:
    """Train, score on held-out patients, and write the run."""
    check_overlap(config.overlap, config.window)
    check_forgetting(config.forgetting, config.strategy)
    check_objective(config.objective, config.strategy, task="ner", processes=n_processes())
    with Run.open(output, config, recipe="ner", resume=resume) as run:
        resolved = resolve_model(config.base_model)  # a wrong name is told before the notes are read
        data = read(config.corpus, config.split, config.seed)
        labels = labels_to_learn(config, data)
        earlier = fitting_head(config, resolved, labels)
        source = None if config.replay is None else read_source(config.replay, config, data, labels)
        if config.training.patience is not None:
            check_development(data, labels)
        run.record(prompted(config, data, labels, data.split.test))  # first: later, two models would be in memory

        base = load_base(
            config.base_model,
            quantization=config.strategy.quantization,
            bidirectional=config.attention == "bidirectional",
        )
        if config.attention == "causal" and not base.is_decoder:
            raise ConfigError(
                f"attention causal: base_model {config.base_model!r} is an encoder, which always sees both sides of a "
                "word; leave attention out, or name a decoder"
            )
        window = fitting_window(config, base)
        task = ner.NerTask(labels, window, config.overlap, config.attention == "bidirectional")
        target = read_target(config.objective, held_out_patients(data.split, data.patients))
        windows, owners = training_windows(config, task, base, data, source, target)
        network = apply_strategy(base.network, config.strategy, seed=config.seed)
        weights = ner.tag_weights(windows.tag_counts(), config.loss) if config.loss.name == "weighted" else None
        model = ner.build_model(network, len(task.tags), seed=config.seed, loss=config.loss, weights=weights)
        count = partial(count_matches, model, task, base.tokenizer)
        terms = [penalty(config, network)] if config.forgetting.name != "none" else []
        collate: Any = partial(ner.collate, pad_token_id=base.tokenizer.pad_token_id or 0)
        examples: Any = windows
        attached = None
        if config.objective.is_active:
            examples = MarkedExamples(windows, *zip(*(owners[note] for note in windows.notes), strict=True))
            attached = attach_objective(
                model,
                config.objective,
                examples,
                task="ner",
                batch_size=config.training.batch_size // n_processes(),
                seed=config.seed,
            )
            terms.append(attached.term)
            collate = MarkedExamples.collate(collate)

        if earlier is not None:
            fresh = {name: value.clone() for name, value in model.head.state_dict().items()}
            ner.load_head(model, earlier)
            if source is not None:
                run.record({"test.source_f1_strict_before": f1(count, source, source.split.test, config.seed)})
            if config.head == "new":
                model.head.load_state_dict(fresh)
        trainable, everything = trainable_count(model)
        say(f"{len(windows)} windows; {trainable:,} of {everything:,} parameters train ({config.strategy.name})")
        validate = partial(development_score, count, data) if config.training.patience is not None else None
        outcome = train(
            model,
            examples,
            collate,
            config=config.training,
            run=run,
            seed=config.seed,
            lengths=windows.lengths,
            tokenizer=base.tokenizer,
            strategy=config.strategy,
            head="head",
            max_steps=config.max_steps,
            max_minutes=config.max_minutes,
            resume=resume,
            terms=terms,
            objective=None if attached is None else attached.module,
            balance=None if attached is None else attached.balance,
            validate=validate,
        )

        held_out = data.split.test
        patients = [data.patients[row] for row in held_out]
        part = data.split.reported_part
        run.record(ner.score(count(data, held_out), labels, patients, part=part, seed=config.seed))
        if source is not None:
            run.record({"test.source_f1_strict": f1(count, source, source.split.test, config.seed)})
        if config.score_train:
            run.record(
                {"train.f1_strict": f1(count, data, sample_of_training(data, config.seed), config.seed, "train")}
            )
            if len(data.split.development):
                part = "development" if part == "test" else "development drawn from train"
                run.record({"dev.f1_strict": f1(count, data, data.split.development, config.seed, part)})
        if is_main_process():
            ner.save(run.path, model, task, base, full=config.strategy.moves_base)
        run.note(
            inputs={"corpus": data.corpus.card.name, "n_notes": len(data.texts), "notes_sha256": digest(data.corpus)},
            base_model=provenance(base.resolved, run.path),
            parent_run=None if base.resolved.parent_run is None else str(base.resolved.parent_run),
            training=outcome
            | {"trainable_parameters": trainable, "parameters": everything, "windows": len(windows)}
            | {"spans": windows.spans, "spans_without_word": windows.lost, "spans_under_longer": windows.covered},
            labels=list(labels),
            objective=None if attached is None else {"name": config.objective.name, "between": examples.names},
            head="new" if earlier is None or config.head == "new" else "continued",
            split=data.split.describe(),
        )
        if source is not None:
            run.note(replay={"corpus": source.corpus.card.name, "split": source.split.describe()})
    if is_main_process():
        from clinical_nlp.reporting.page import run_report

        run_report(run)
    return run


@dataclass(frozen=True, slots=True)
class Labelled:
    """A corpus with its gold spans by note, and its split."""

    corpus: Corpus
    keys: list[tuple[str, str]]
    texts: list[str]
    patients: list[str]
    gold: list[list[ner.Span]]
    split: Split

    def spans(self, rows: Sequence[int] | np.ndarray) -> Counter[str]:
        """Count the gold spans of some notes by label."""
        return Counter(label for row in rows for _, _, label in self.gold[row])


def read(name: CorpusConfig, split: SplitConfig, seed: int) -> Labelled:
    """Load a corpus that has gold spans and divide its patients."""
    corpus = load_corpus(name.name, name.path, **name.options)
    gold = gold_spans(corpus)
    parts = split_patients(corpus.notes, split, seed=seed, parts=corpus.parts)
    say(f"{corpus.card.name}: {parts.describe()}")
    if not len(parts.train) or not len(parts.test):
        empty = "reported" if len(parts.train) else "training"
        raise TooFewPatientsError(
            f"the {empty} part of corpus {corpus.card.name!r} is empty; give its split more patients, or another share"
        )
    texts, patients = corpus.notes["text"].to_pylist(), corpus.notes["patient_id"].to_pylist()
    return Labelled(corpus, note_keys(corpus), texts, patients, gold, parts)


def labels_to_learn(config: NerConfig, data: Labelled) -> tuple[str, ...]:
    """Return the entity types asked for, which the training part must have; by default all of them."""
    found = set(data.spans(data.split.train))
    if not found:
        raise InputError(f"the training part of corpus {data.corpus.card.name!r} has no gold span to learn from")
    if absent := set(config.labels) - found:
        raise ConfigError(f"labels: the training part has no span of {names(absent)}; it has {names(found)}")
    return tuple(sorted(set(config.labels) or found))


def read_source(replay: ReplayConfig, config: NerConfig, data: Labelled, labels: Sequence[str]) -> Labelled:
    """Load the corpus to replay and divide it as the run that learned it did, by the same seed.

    It must mark all the labels, or its notes would teach that the rest is nothing. Patients whom both corpora have
    stay on one side: none is replayed who is held out of the new notes, none scores who is trained on there.
    """
    split = config.split if config.split.name in ("official", "random") else SplitConfig(name="official")
    source = read(replay, split, config.seed)
    found = set(source.spans(source.split.train))
    if absent := set(labels) - found:
        raise ConfigError(
            f"replay {source.corpus.card.name!r} marks {names(found)} and the labels to learn are "
            f"{names(labels)}; {f'leave {names(absent)} out of labels, or ' if set(labels) - absent else ''}replay "
            "another corpus"
        )
    trained = {data.patients[row] for row in data.split.train}
    held_out = {data.patients[row] for part in (data.split.development, data.split.test) for row in part}
    train = np.array([row for row in source.split.train if source.patients[row] not in held_out], dtype=np.int64)
    test = np.array([row for row in source.split.test if source.patients[row] not in trained], dtype=np.int64)
    if not len(train) or not len(test):
        raise ConfigError(
            f"replay {source.corpus.card.name!r} has no patients of its own to replay or to score; name another corpus"
        )
    return replace(source, split=replace(source.split, train=train, test=test))


def check_development(data: Labelled, labels: Sequence[str]) -> None:
    """Refuse early stopping where there is nothing to stop by."""
    rows = data.split.development
    if not sum(data.spans(rows)[label] for label in labels):
        reason = "that part has no gold span" if len(rows) else "this split has none"
        raise ConfigError(
            f"training.patience stops by the score on the development part, and {reason}; set a larger "
            "split.development, or leave training.patience out"
        )


def fitting_head(config: NerConfig, resolved: ResolvedModel, labels: tuple[str, ...]) -> Path | None:
    """Return the run whose tagging head fits the labels, or None; to continue with one that does not is an error."""
    folder = resolved.parent_run
    values = read_task(folder) if folder is not None and (folder / "task.json").is_file() else {}
    if values.get("task") != "ner":
        if config.head == "continue":
            raise ConfigError(f"head continue: base_model {config.base_model!r} is no ner run; set head=new")
        return None
    attention = "bidirectional" if values["bidirectional"] else "causal"
    if tuple(values["labels"]) == labels and attention == config.attention:
        here = config.strategy.quantization
        if values["quantization"] != here and config.head != "new":
            say(f"the head was trained on a base with quantization {values['quantization']}; here: {here}")
        return folder
    if config.head == "new":
        return None
    if tuple(values["labels"]) != labels:
        raise ConfigError(
            f"the head of run {config.base_model} tags {names(values['labels'])} and the labels to learn are "
            f"{names(labels)}; set head=new for a fresh one"
        )
    raise ConfigError(
        f"the head of run {config.base_model} was trained with attention {attention}, not {config.attention}; set "
        f"attention={attention}, or head=new for a fresh one"
    )


def penalty(config: NerConfig, network: Any) -> LossTerm:
    """Return the loss term that holds the backbone near where it is now.

    What it must not forget under ewc is how it reads source notes, so the Fisher information is that of the same
    weights as a language model.
    """
    settings = config.forgetting
    if settings.name != "ewc":
        return distance_penalty(network, settings.strength)
    base = load_base(config.base_model, kind="language")
    if base.head == "fresh":
        raise ConfigError(
            f"forgetting 'ewc' asks how the base reads source notes, and base_model {config.base_model!r} has no "
            "language-model head to read with; use l2_sp"
        )
    reader = apply_strategy(base.network, config.strategy, seed=config.seed)
    task = pretraining.language_task(base, config.window, batching="bucketed")
    found = source_fisher(reader, task, base.tokenizer, settings, seed=config.seed)
    prefix = backbone_prefix(reader)
    weights = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    return distance_penalty(network, settings.strength, weights=weights)


def fitting_window(config: NerConfig, base: BaseModel) -> int:
    """Return the window, cut to the positions that the model has."""
    limit = ner.most_tokens(base.network) or config.window
    if limit < config.window:
        say(f"window {config.window} is cut to {limit}, the positions that {config.base_model} has")
        check_overlap(config.overlap, limit)
    return min(config.window, limit)


def check_overlap(overlap: int, window: int) -> None:
    """Refuse windows that would mostly repeat each other."""
    if overlap >= window // 2:
        raise ConfigError(f"overlap {overlap} must be less than half of window {window}; set a smaller overlap")


def training_windows(
    config: NerConfig,
    task: ner.NerTask,
    base: BaseModel,
    data: Labelled,
    source: Labelled | None,
    target: Sequence[TargetNote] = (),
) -> tuple[ner.NoteWindows, list[tuple[str, str]]]:
    """Encode the training notes, and whole replayed patients drawn by the seed until their share is reached.

    Returns
    -------
    The windows, target notes without gold last, and the institution and patient of each note.
    """
    owners: list[tuple[str, str]] = []
    windows = ner.NoteWindows(task, base.tokenizer, drop_sections=config.drop_sections, seed=config.seed)

    def add(prefix: str, notes: Labelled, rows: Sequence[int] | np.ndarray) -> None:
        for row in rows:
            windows.add(repr((prefix, *notes.keys[row])), notes.texts[row], notes.gold[row])
            owners.append((notes.keys[row][0], notes.patients[row]))

    add("corpus", data, data.split.train)
    if windows.lost == windows.spans:
        raise InputError(
            f"none of the {windows.spans} gold spans of the training part lies on a word of its note; are the offsets "
            "code points into this very text?"
        )
    if windows.lost or windows.covered:
        say(
            f"of {windows.spans} gold spans to learn, {windows.lost} lie on no word that the tokenizer sees and "
            f"{windows.covered} overlap a longer one; both kinds are left out of training"
        )
    if source is not None and config.replay is not None and config.replay.ratio > 0:
        own = windows.tokens
        wanted = round(config.replay.ratio / (1 - config.replay.ratio) * own)
        patients = sorted({source.patients[row] for row in source.split.train})
        taken = 0
        for index in np.random.default_rng(config.seed).permutation(len(patients)):
            if windows.tokens - own >= wanted:
                break
            add("replay", source, [row for row in source.split.train if source.patients[row] == patients[index]])
            taken += 1
        share = 1 - own / windows.tokens
        short = windows.tokens - own < wanted
        say(
            f"replay of {source.corpus.card.name}: {taken} patients, {100 * share:.1f} % of the training tokens"
            + (f" (all there are; {100 * config.replay.ratio:g} % was asked for)" if short else "")
        )
    for note in target:
        windows.add(repr(("target", note.institution, note.note_id)), note.text, None)
        owners.append((note.institution, note.patient))
    return windows, owners


def held_out_patients(split: Split, patients: Sequence[str]) -> set[str]:
    """Return the patients of the development and test parts."""
    return {patients[row] for part in (split.development, split.test) for row in part}


def n_processes() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE") or 1)


Count = Callable[[Labelled, "Sequence[int] | np.ndarray"], np.ndarray]


def count_matches(
    model: Any, task: ner.NerTask, tokenizer: Any, data: Labelled, rows: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Tag notes and count what is right; (n_rows, n_labels, 4) as `ner.count_matches`."""
    predicted = ner.predict_spans(model, task, tokenizer, [data.texts[row] for row in rows])
    return np.stack(
        [
            ner.count_matches(data.gold[row], [span[:3] for span in spans], task.labels)
            for row, spans in zip(rows, predicted, strict=True)
        ]
    )


def f1(count: Count, data: Labelled, rows: Sequence[int] | np.ndarray, seed: int, part: str | None = None) -> Estimate:
    """Strict F1 on some notes of a corpus; without a name of the part, on its reported one."""
    patients = [data.patients[row] for row in rows]
    return ner.f1_strict(count(data, rows), patients, part=part or data.split.reported_part, seed=seed)


def development_score(count: Count, data: Labelled) -> float:
    """Strict F1 on the development part, for early stopping."""
    return f1(count, data, data.split.development, seed=0).value


PROMPT = "Clinical note:\n{note}\n\nEvery {label} that the note mentions, divided by semicolons:"
_SHOTS = 3
_SHOT_CHARACTERS = 600


def prompted(config: NerConfig, data: Labelled, labels: Sequence[str], held_out: np.ndarray) -> dict[str, Estimate]:
    """Score the base model before training, told what to list: without examples, and with three training notes.

    A note is asked for each label; what the answer lists is looked for in the note. Encoders cannot be prompted, which
    the results say.
    """
    rows = held_out[: config.baseline_notes]
    if not len(rows):
        return {}
    names = {"zero_shot": 0, "few_shot": _SHOTS}
    patients = [data.patients[row] for row in rows]
    if not can_be_prompted(config.base_model):
        none = Estimate(math.nan, math.nan, math.nan, len(set(patients)), len(rows), data.split.reported_part)
        none = replace(none, note="an encoder cannot be prompted")
        return {f"test.baseline_{name}.{score}": none for name in names for score in ("f1_strict", "f1_lenient")}
    say(f"baseline: {config.base_model} prompted, {len(rows)} notes")
    base = load_base(config.base_model, kind="causal", quantization=config.strategy.quantization)
    order = np.random.default_rng(config.seed).permutation(data.split.train)
    shown = [row for row in order if data.gold[row]][:_SHOTS]
    found: dict[str, Estimate] = {}
    for name, shots in names.items():
        spans: list[list[ner.Span]] = [[] for _ in rows]
        for label in labels:
            before = "".join(_example(data, row, label) for row in shown[:shots])
            prompts = [before + PROMPT.format(note=data.texts[row], label=label) for row in rows]
            for place, line in enumerate(prompting.generate_lines(base, prompts)):
                spans[place] += prompting.place_items(data.texts[rows[place]], line, label)
        counts = [ner.count_matches(data.gold[row], said, labels) for row, said in zip(rows, spans, strict=True)]
        scores = ner.score(np.stack(counts), labels, patients, part=data.split.reported_part, seed=config.seed)
        found |= {f"test.baseline_{name}.{key}": scores[f"test.{key}"] for key in ("f1_strict", "f1_lenient")}
    return found


def _example(data: Labelled, row: int, label: str) -> str:
    text = data.texts[row]
    said = [text[start:end] for start, end, kind in sorted(data.gold[row]) if kind == label and end <= _SHOT_CHARACTERS]
    items = "; ".join(dict.fromkeys(" ".join(item.split()) for item in said))
    return PROMPT.format(note=text[:_SHOT_CHARACTERS], label=label) + f" {items}\n\n"


def sample_of_training(data: Labelled, seed: int) -> np.ndarray:
    """Return the notes of as many training patients as are reported on, drawn by the seed (all, if there are fewer)."""
    patients = sorted({data.patients[row] for row in data.split.train})
    size = min(len(patients), max(FEWEST_PATIENTS, data.split.patients[2]))
    chosen = {patients[index] for index in np.random.default_rng(seed).permutation(len(patients))[:size]}
    return np.array([row for row in data.split.train if data.patients[row] in chosen], dtype=np.int64)


def names(labels: Iterable[str]) -> str:
    """Return labels as a message lists them."""
    return ", ".join(sorted(labels))


def gold_spans(corpus: Corpus) -> list[list[ner.Span]]:
    """Return the gold spans of each note, in the order of the notes."""
    if corpus.spans is None or corpus.spans.num_rows == 0:
        raise InputError(f"corpus {corpus.card.name!r} has no gold spans to learn from")
    place = {key: index for index, key in enumerate(note_keys(corpus))}
    spans: list[list[ner.Span]] = [[] for _ in range(corpus.notes.num_rows)]
    strays = 0
    for row in corpus.spans.select(["institution", "note_id", "start", "end", "label"]).to_pylist():
        index = place.get((row["institution"], row["note_id"]))
        if index is None:
            strays += 1
        else:
            spans[index].append((row["start"], row["end"], row["label"]))
    if strays:
        raise InputError(f"{strays} gold spans of corpus {corpus.card.name!r} belong to notes that it does not have")
    return spans


def note_keys(corpus: Corpus) -> list[tuple[str, str]]:
    """Return (institution, note_id) of each note."""
    return list(zip(corpus.notes["institution"].to_pylist(), corpus.notes["note_id"].to_pylist(), strict=True))


def digest(corpus: Corpus) -> str:
    """Return one digest over the texts of a corpus, in order."""
    import hashlib

    total = hashlib.sha256()
    for value in corpus.notes["text_sha256"].to_pylist():
        total.update(value.encode())
    return total.hexdigest()
