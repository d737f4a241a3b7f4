"""Train a small encoder to correct the rules of assertion, and score both on the same held-out patients.

Any corpus whose spans carry an assertion can be learned from: the synthetic hospitals, BRAT files with attributes, or
the corrections that `clinical-nlp review --import` keeps. The run says whether the classifier is worth using.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy, trainable_count
from clinical_nlp.config import CorpusConfig, RecipeConfig, SplitConfig
from clinical_nlp.errors import InputError, TooFewPatientsError
from clinical_nlp.language.assertion import assert_spans
from clinical_nlp.models.loading import load_base
from clinical_nlp.models.resolve import provenance, resolve_model
from clinical_nlp.notes.corpus import Corpus, load_corpus
from clinical_nlp.notes.schema import Assertion
from clinical_nlp.notes.splitting import Split, split_patients
from clinical_nlp.progress import is_main_process, say
from clinical_nlp.recipes.ner import digest, note_keys
from clinical_nlp.runs import Estimate, Run
from clinical_nlp.statistics.intervals import by_patient, patient_bootstrap
from clinical_nlp.tasks import asserting
from clinical_nlp.tasks.asserting import AXES, Axes, axes_of
from clinical_nlp.tasks.ner import most_tokens
from clinical_nlp.training.trainer import TrainingConfig, train


class AssertionConfig(RecipeConfig):
    """Train a small encoder to correct the rules of assertion."""

    base_model: str = "builtin:tiny"
    """Hub id, local folder or earlier run; a small encoder is best."""
    strategy: StrategyConfig = StrategyConfig(name="bottleneck")
    """What of the base model may move. See `clinical-nlp list strategies`."""
    rules: bool = True
    """Whether what the rules say of a span is an input. Without it the classifier learns from the words alone."""
    window: int = Field(default=128, ge=96)
    """Tokens of a section that are read at once."""
    training: TrainingConfig = TrainingConfig(epochs=4)
    """How the weights are moved; an example is a part of a section."""


CONFIG = AssertionConfig
FEWEST = 3
"""A value is learned where the notes of so many training patients have it."""


def run(config: AssertionConfig, output: Path, *, resume: bool = False) -> Run:
    """Train, choose thresholds on development patients, score on held-out ones beside the rules, and write the run."""
    with Run.open(output, config, recipe="assertion", resume=resume) as run:
        resolve_model(config.base_model)  # a wrong name is told before the notes are read
        data = read(config.corpus, config.split, config.seed)
        classifier = fit(config, data, run, resume=resume)
        held_out = data.split.test
        run.record(score(data, held_out, decided(classifier, data, held_out), seed=config.seed))
        run.note(
            inputs={"corpus": data.corpus.card.name, "n_notes": len(data.texts), "notes_sha256": digest(data.corpus)},
            spans={"train": data.count(data.split.train), "reported": data.count(held_out)},
            split=data.split.describe(),
        )
    if is_main_process():
        from clinical_nlp.reporting.page import run_report

        run_report(run)
    return run


def fit(config: AssertionConfig, data: Asserted, run: Run, *, resume: bool = False) -> asserting.AssertionClassifier:
    """Train on the training part, choose the thresholds on the development part, and save both in the run."""
    axes = axes_to_learn(data)
    say("learned: " + "; ".join(f"{axis} ({', '.join(values)})" for axis, values in axes))
    base = load_base(config.base_model, quantization=config.strategy.quantization, bidirectional=True)
    window = min(config.window, most_tokens(base.network) or config.window)
    task = asserting.AssertionTask(axes, window, config.rules)
    passages = encode(task, base.tokenizer, data, data.split.train)
    network = apply_strategy(base.network, config.strategy, seed=config.seed)
    model = asserting.build_model(network, task, seed=config.seed)
    classifier = asserting.AssertionClassifier(model, task, base.tokenizer, [0.0] * len(axes))
    trainable, everything = trainable_count(model)
    say(f"{len(passages)} passages; {trainable:,} of {everything:,} parameters train ({config.strategy.name})")
    outcome = train(
        model,
        passages,
        partial(asserting.collate, pad_token_id=base.tokenizer.pad_token_id or 0),
        config=config.training,
        run=run,
        seed=config.seed,
        lengths=[len(passage.input_ids) for passage in passages],
        tokenizer=base.tokenizer,
        strategy=config.strategy,
        head="head",
        max_steps=config.max_steps,
        max_minutes=config.max_minutes,
        resume=resume,
        validate=None if config.training.patience is None else partial(right, classifier, data),
    )
    rows = data.split.development
    found = classifier.probabilities(*data.questions(rows))
    chosen = asserting.thresholds(task, found, data.rule_axes(rows), data.gold_axes(rows))
    if is_main_process():
        asserting.save(run.path, model, task, base, chosen, full=config.strategy.moves_base)
    run.note(
        base_model=provenance(base.resolved, run.path),
        parent_run=None if base.resolved.parent_run is None else str(base.resolved.parent_run),
        training=outcome | {"trainable_parameters": trainable, "parameters": everything, "passages": len(passages)},
        axes={axis: list(values) for axis, values in axes},
        thresholds={axis: threshold for (axis, _), threshold in zip(axes, chosen, strict=True)},
    )
    return asserting.AssertionClassifier(model, task, base.tokenizer, chosen)


# What is learned from -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asserted:
    """A corpus with the spans of each note, what annotators and what the rules say of each, and its split.

    The parts of the split hold the notes that have spans.
    """

    corpus: Corpus
    texts: list[str]
    patients: list[str]
    spans: list[list[tuple[int, int]]]
    gold: list[list[Axes]]
    rules: list[list[Assertion]]
    split: Split

    def questions(
        self, rows: Sequence[int] | np.ndarray
    ) -> tuple[list[str], list[list[tuple[int, int]]], list[list[Assertion]]]:
        """What the classifier is asked of some notes: texts, spans, and the rules' answers."""
        return [self.texts[row] for row in rows], [self.spans[row] for row in rows], [self.rules[row] for row in rows]

    def gold_axes(self, rows: Sequence[int] | np.ndarray) -> list[list[Axes]]:
        """What annotators say of the spans of some notes."""
        return [self.gold[row] for row in rows]

    def rule_axes(self, rows: Sequence[int] | np.ndarray) -> list[list[Axes]]:
        """What the rules say of the spans of some notes."""
        return [[axes_of(one) for one in self.rules[row]] for row in rows]

    def count(self, rows: Iterable[int]) -> dict[str, int]:
        """Count the gold spans of some notes by value."""
        counts = Counter(value for row in rows for axes in self.gold[row] for value in axes)
        return {value: counts[value] for values in AXES.values() for value in values if counts[value]}


def read(name: CorpusConfig, split: SplitConfig, seed: int) -> Asserted:
    """Load a corpus, ask the rules about its spans, and divide its patients.

    Raises
    ------
    InputError : no span carries an assertion, or one lies outside its note.
    TooFewPatientsError : a part of the split has no span.
    """
    corpus = load_corpus(name.name, name.path, **name.options)
    spans, gold = gold_of(corpus)
    parts = split_patients(corpus.notes, split, seed=seed, parts=corpus.parts)
    say(f"{corpus.card.name}: {parts.describe()}")
    kept = [
        np.array([row for row in rows if spans[row]], dtype=np.int64)
        for rows in (parts.train, parts.development, parts.test)
    ]
    for rows, part in zip(kept, ("training", "development", "reported"), strict=True):
        if not len(rows):
            why = "; the thresholds are chosen there, so set split.development" if part == "development" else ""
            raise TooFewPatientsError(f"the {part} part of corpus {corpus.card.name!r} has no span{why}")
    texts = corpus.notes["text"].to_pylist()
    rules = [assert_spans(text, own) for text, own in zip(texts, spans, strict=True)]
    parts = replace(parts, train=kept[0], development=kept[1], test=kept[2])
    return Asserted(corpus, texts, corpus.notes["patient_id"].to_pylist(), spans, gold, rules, parts)


def gold_of(corpus: Corpus) -> tuple[list[list[tuple[int, int]]], list[list[Axes]]]:
    """Return the spans of each note and their axes; an axis that a span leaves out has its usual value, as in BRAT."""
    if corpus.spans is None or all(corpus.spans[axis].null_count == corpus.spans.num_rows for axis in AXES):
        raise InputError(
            f"corpus {corpus.card.name!r} has no span with an assertion to learn from; BRAT files say it with "
            "attributes (Negation, or Presence, Temporality, Modality and Experiencer)"
        )
    place = {key: index for index, key in enumerate(note_keys(corpus))}
    lengths = [len(text) for text in corpus.notes["text"].to_pylist()]
    spans: list[list[tuple[int, int]]] = [[] for _ in lengths]
    gold: list[list[Axes]] = [[] for _ in lengths]
    strays = 0
    for row in corpus.spans.select(["institution", "note_id", "start", "end", *AXES]).to_pylist():
        index = place.get((row["institution"], row["note_id"]))
        if index is None or not 0 <= row["start"] < row["end"] <= lengths[index]:
            strays += 1
            continue
        spans[index].append((row["start"], row["end"]))
        presence, temporality, modality, experiencer = (row[axis] or values[0] for axis, values in AXES.items())
        gold[index].append((presence, temporality, modality, experiencer))
    if strays:
        raise InputError(f"{strays} gold spans of corpus {corpus.card.name!r} lie outside the notes that it has")
    return spans, gold


def axes_to_learn(data: Asserted) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the axes on which the training part has two values, each with the values that enough patients have."""
    patients: dict[tuple[str, str], set[str]] = {}
    for row in data.split.train:
        for axes in data.gold[row]:
            for axis, value in zip(AXES, axes, strict=True):
                patients.setdefault((axis, value), set()).add(data.patients[row])
    found = []
    for axis, values in AXES.items():
        kept = tuple(value for value in values if len(patients.get((axis, value), ())) >= FEWEST)
        if len(kept) > 1:
            found.append((axis, kept))
    if not found:
        raise InputError(
            f"on no axis of assertion does the training part of corpus {data.corpus.card.name!r} have two values in "
            f"{FEWEST} patients each; there is nothing to learn, and the rules need no training"
        )
    return tuple(found)


def encode(task: asserting.AssertionTask, tokenizer: Any, data: Asserted, rows: np.ndarray) -> list[asserting.Passage]:
    """Return the passages of some notes with their labels."""
    return [
        passage
        for row, rules in zip(rows, data.rule_axes(rows), strict=True)
        for passage in task.encode(data.texts[row], data.spans[row], rules, tokenizer, gold=data.gold[row])
    ]


# What is said ---------------------------------------------------------------------------------------------------------


def decided(classifier: asserting.AssertionClassifier, data: Asserted, rows: np.ndarray) -> list[list[Axes]]:
    """Return what is said of the spans of some notes, by the classifier or by the rules."""
    return [[axes_of(one) for one in own] for own in classifier.predict(*data.questions(rows))]


def right(classifier: asserting.AssertionClassifier, data: Asserted) -> float:
    """Return the share of development spans that the classifier has right on all axes, for early stopping."""
    rows = data.split.development
    counts = asserting.count(data.gold_axes(rows), decided(classifier, data, rows), ()).sum(0)
    return float(counts[0] / counts[1])


def score(data: Asserted, rows: np.ndarray, said: Sequence[Sequence[Axes]], *, seed: int) -> dict[str, Estimate]:
    """Score the classifier and the rules on the same notes, by each value that their gold has."""
    gold, rules = data.gold_axes(rows), data.rule_axes(rows)
    known = data.count(rows)
    values = [(axis, value) for axis, own in AXES.items() for value in own if value in known]
    patients = [data.patients[row] for row in rows]
    part = data.split.reported_part
    counts = asserting.count(gold, said, values), asserting.count(gold, rules, values)
    changed = [
        [sum(a != b for a, b in zip(mine, theirs, strict=True)), len(mine)]
        for mine, theirs in zip(said, rules, strict=True)
    ]
    found = asserting.score(*counts, values, patients, part=part, seed=seed)
    found["test.changed"] = patient_bootstrap(
        by_patient(patients, np.array(changed)), lambda sums: sums[..., 0] / sums[..., 1],
        n_notes=len(rows), part=part, seed=seed,
    )  # fmt: skip
    return found


# The page -------------------------------------------------------------------------------------------------------------


def verdict(gain: Estimate, *, nothing_changed: bool) -> tuple[str, str]:
    """Say in one sentence whether to use the classifier, and in which tone."""
    if nothing_changed:
        return (
            "On the development patients the classifier was on no axis better than the rules, which therefore decide "
            "everything: leave it out.",
            "caution",
        )
    if np.isnan(gain.low):
        return f"Too little to tell whether the classifier is better than the rules ({gain.note}).", "caution"
    if gain.low > 0:
        return "On these patients the classifier is better than the rules: use it (extract --assertion).", "good"
    if gain.high < 0:
        return "On these patients the rules are better than the classifier: leave it out.", "bad"
    return "On these patients the classifier cannot be told from the rules: leave it out.", "caution"


def report(run: Run) -> str:
    """Render the run's page, for `clinical-nlp report`."""
    from clinical_nlp.reporting.page import Notice, Section, Table, training_page

    metrics = {name: _estimate(entry) for name, entry in run.metrics.items()}
    counts = run.manifest["spans"]["reported"]
    total = sum(counts.get(value, 0) for value in AXES["presence"])
    rows: list[list[Any]] = []
    for measure, name, n in [
        ("all_axes", "right on all four axes", total),
        ("macro_f1", "mean F1 of the unusual values", None),
        *((f"f1.{value}", f"F1 of {value}", n) for value, n in counts.items()),
    ]:
        if f"test.{measure}" in metrics:
            cells = [metrics[f"test.{kind}{measure}"] for kind in ("rules.", "", "gain.")]
            rows.append([name, "" if n is None else n, *cells])
    first = metrics["test.all_axes"]
    caption = (
        f"{total} spans of {first.n_notes} notes of {first.n_patients} patients ({first.part}), the same for both. "
        "Intervals (95 %) resample patients; those of a gain resample both together."
    )
    thresholds = run.manifest["thresholds"]
    left = [axis for axis in AXES if thresholds.get(axis, asserting.LEFT_TO_RULES) > 1]
    words, tone = verdict(metrics["test.gain.all_axes"], nothing_changed=len(left) == len(AXES))
    told = f"It changed the rules' answer for {metrics['test.changed'].value:.1%} of the spans."
    if left:
        told += f" The rules alone decide {', '.join(left)}."
    table = Table(["", "spans", "rules", "classifier", "gain"], rows, caption)
    return training_page(run, first=Section("Is it worth using?", [Notice(words, tone=tone, points=[told]), table]))


def _estimate(entry: dict[str, Any]) -> Estimate:
    numbers = {key: np.nan if entry[key] is None else entry[key] for key in ("value", "low", "high")}
    return Estimate(**{**entry, **numbers})
