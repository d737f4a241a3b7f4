"""A finished run that is judged: its notes and split made again, what lies below it, and scores by patient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clinical_nlp.config import load_config
from clinical_nlp.errors import InputError, MissingDataError, UsageError
from clinical_nlp.models.loading import BaseModel, load_base, read_task
from clinical_nlp.notes.corpus import Corpus, load_corpus
from clinical_nlp.notes.splitting import Split, split_patients, split_without_duplicates
from clinical_nlp.recipe import find_recipe
from clinical_nlp.reporting.tripod import corpus_record
from clinical_nlp.runs import Estimate, Run
from clinical_nlp.statistics.intervals import patient_bootstrap
from clinical_nlp.tasks import ner, pretraining

LENGTH = 512
"""Tokens that a language model reads at once when its perplexity is measured, unless its dapt run says otherwise."""


@dataclass(frozen=True)
class Subject:
    """A finished run, its notes and its split, made again."""

    run: Run
    recipe: str
    config: Any
    base: str
    corpus: Corpus
    split: Split
    labels: tuple[str, ...]
    verified: bool

    @property
    def selection(self) -> str:
        """How the weights that are scored were chosen."""
        patience = getattr(self.config.training, "patience", None)
        if patience:
            return f"best epoch on the development part (patience {patience})"
        return "weights at the end of training; nothing was chosen on the scored patients"

    @property
    def quantization(self) -> Any:
        """How the run loads its base."""
        return self.config.strategy.quantization

    @cached_property
    def texts(self) -> list[str]:
        """Text of every note."""
        return list(self.corpus.notes["text"].to_pylist())

    @cached_property
    def patients(self) -> list[str]:
        """Patient of every note."""
        return list(self.corpus.notes["patient_id"].to_pylist())

    def record(self) -> dict[str, Any]:
        """Collect what a reader needs to judge an evaluation of the run; see `reporting.tripod`."""
        parts = {"train": self.split.train, "development": self.split.development, "test": self.split.test}
        return corpus_record(self.corpus, parts, judged=self.run.path)

    @cached_property
    def gold(self) -> list[list[ner.Span]]:
        """Gold spans of every note."""
        from clinical_nlp.recipes.ner import gold_spans

        return gold_spans(self.corpus)


def read_subject(path: str, corpus_path: str | None = None) -> Subject:
    """Load a run, its corpus and its split, and make sure that the notes are those that it was trained on.

    Raises
    ------
    RunError, UsageError : no finished run, or one of another recipe.
    MissingDataError : its corpus is no longer where it was.
    InputError : the corpus holds other notes than then.
    """
    finished = Run.load(path)
    recipe = finished.manifest.get("recipe")
    if recipe not in ("ner", "dapt"):
        below = [name for name in ("ner", "dapt") if (finished.path / name / "manifest.json").is_file()]
        hint = f"; name the one inside it, {finished.path / below[0]}" if below else ""
        raise UsageError(f"run {path} is of recipe {recipe!r}; transfer judges ner and dapt runs{hint}")
    settings: Any = load_config(find_recipe(recipe).load().CONFIG, finished.path / "config.yaml")
    corpus_config = settings.corpus
    if corpus_path is not None:
        corpus_config = corpus_config.model_copy(update={"path": corpus_path})
        settings = settings.model_copy(update={"corpus": corpus_config})
    try:
        corpus = load_corpus(corpus_config.name, corpus_config.path, **corpus_config.options)
    except MissingDataError as error:
        raise MissingDataError(f"the corpus of run {path} is not found (--corpus_path DIR if moved): {error}") from None
    verified = same_notes(finished, corpus)
    split = split_of(settings, corpus)
    labels = tuple(read_task(finished.path)["labels"]) if recipe == "ner" else ()
    return Subject(finished, recipe, settings, base_of(finished), corpus, split, labels, verified)


def same_notes(finished: Run, corpus: Corpus) -> bool:
    """Return whether the run says which notes it read; raise if they were others."""
    from clinical_nlp.recipes.ner import digest

    manifest = finished.manifest
    recorded = manifest.get("notes_sha256") or (manifest.get("inputs") or {}).get("notes_sha256")
    if recorded and recorded != digest(corpus):
        raise InputError(
            f"corpus {corpus.card.name!r} holds other notes than run {finished.path} was trained on; give the same "
            "files (--corpus_path), or train again"
        )
    return bool(recorded)


def split_of(settings: Any, corpus: Corpus) -> Split:
    """Make the split of a run again from its settings."""
    if getattr(settings, "stream", False):
        raise InputError("notes that were streamed are divided by a rule of their own, which is not repeated here")
    common: dict[str, Any] = {"seed": settings.seed, "parts": corpus.parts}
    threshold = getattr(settings, "deduplicate", None)
    if threshold is None:
        return split_patients(corpus.notes, settings.split, **common)
    return split_without_duplicates(corpus.notes, settings.split, threshold=threshold, **common)[0]


def base_of(finished: Run) -> str:
    """Return the name under which the base model of a run is found now: beside the run first, as runs are moved."""
    base = finished.manifest.get("base_model") or {}
    beside = (finished.path / base["relative"]).resolve() if base.get("relative") else None
    return str(beside) if beside is not None and beside.is_dir() else str(base.get("name"))


def ancestor(name: str, recipe: str) -> Run | None:
    """Return the run itself, or the nearest one below it, that this recipe made."""
    while (Path(name) / "manifest.json").is_file():
        found = Run.load(name)
        if found.manifest.get("recipe") == recipe:
            return found
        name = base_of(found)
    return None


def task_of(finished: Run) -> str | None:
    """Return what a run was trained to do (pretraining, ner, ...), or None where it was for nothing in particular."""
    return read_task(finished.path).get("task") if (finished.path / "task.json").is_file() else None


def without_dapt(name: str) -> str:
    """Return what lies below the dapt runs (merged or not) at the top of a chain."""
    while (Path(name) / "manifest.json").is_file() and task_of(Run.load(name)) == "pretraining":
        name = base_of(Run.load(name))
    return name


def note_counts(subject: Subject, predictor: ner.NerPredictor, rows: np.ndarray) -> np.ndarray:
    """Return (notes, 3): strict matches, predicted and gold spans of each note, over the run's labels."""
    found = predictor.predict([subject.texts[row] for row in rows])
    return np.stack(
        [
            ner.count_matches(subject.gold[row], [span[:3] for span in spans], subject.labels)[:, :3].sum(0)
            for row, spans in zip(rows, found, strict=True)
        ]
    )


def f1(counts: np.ndarray) -> np.ndarray:
    """Micro-F1 of (..., 3) summed matches, predicted and gold spans; NaN where there is neither of the last two."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(2 * counts[..., 0] / (counts[..., 1] + counts[..., 2]))


def paired(
    first: np.ndarray, second: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], **common: Any
) -> Estimate:
    """Estimate statistic(first) - statistic(second) on the same patients, resampled together."""
    width = first.shape[1]
    both = np.concatenate([first, second], axis=1)
    return patient_bootstrap(both, lambda c: statistic(c[..., :width]) - statistic(c[..., width:]), **common)


def some_patients(rows: np.ndarray, patients: Sequence[str], most: int, seed: int) -> np.ndarray:
    """Return the rows of at most so many patients, drawn at random."""
    people = sorted({patients[row] for row in rows})
    if len(people) <= most:
        return np.asarray(rows)
    kept = {people[index] for index in np.random.default_rng(seed).permutation(len(people))[:most]}
    return np.array([row for row in rows if patients[row] in kept], dtype=np.int64)


def reading(finished: Run | None) -> dict[str, Any]:
    """Return how a dapt run reads notes, for `read_losses`: tokens at once, and whether it fills in masked ones."""
    if finished is None:
        return {}
    values = read_task(finished.path)
    return {"length": values.get("length", LENGTH), "masked": values.get("objective") == "masked"}


def read_losses(
    name: str, quantization: Any, texts: Sequence[str], *, length: int = LENGTH, masked: bool = False
) -> tuple[np.ndarray, str]:
    """Return (notes, 2) nats and tokens under a model's language-model head, and what their ratio is called.

    With `masked` a decoder fills in tokens from both sides, as an encoder always does.

    Raises
    ------
    InputError, ModelError : the model has no language-model head.
    """
    base = language_model(name, quantization, masked=masked)
    task = pretraining.language_task(base, length, bidirectional=masked and base.is_decoder)
    return task.losses(task.model(base.network), task.encode(texts, base.tokenizer)), task.metric.replace("_", "-")


def language_model(name: str, quantization: Any, *, masked: bool = False) -> BaseModel:
    """Load a base model or a run with its language-model head.

    A task run whose weights themselves moved has saved a backbone alone; it is put under the head of what lies below
    it. Where output and input embeddings are one matrix, that matrix is the backbone's.

    Raises
    ------
    InputError, ModelError : it has no language-model head.
    """
    host = _with_head(name)
    base = load_base(host, kind="language", quantization=quantization, bidirectional=masked)
    if base.head == "fresh":
        raise InputError(f"base model {host} has no language-model head")
    if host == name:
        return base
    network = base.network.get_base_model() if hasattr(base.network, "peft_config") else base.network
    attribute = network.base_model_prefix
    setattr(network, attribute, None)  # let go before the other one is loaded
    backbone = load_base(name, quantization=quantization, bidirectional=masked).network
    setattr(network, attribute, backbone)
    if getattr(network.config, "tie_word_embeddings", False):
        network.get_output_embeddings().weight = backbone.get_input_embeddings().weight
    return replace(base, network=network)


def _with_head(name: str) -> str:
    """Return the name itself, or what lies below it and has the language-model head that it lacks."""
    current, lacks = name, False
    while (Path(current) / "manifest.json").is_file():
        found = Run.load(current)
        whole = (found.path / "model").is_dir()
        if task_of(found) in ("pretraining", None):
            if lacks or whole:
                break
        elif whole:
            lacks = True
        current = base_of(found)
    return current if lacks else name
