"""Did the transfer work? Forgetting, negative transfer, overfitting, too few labels, and the choice of the base model.

Takes a finished ner run (for a dapt run: forgetting and overfitting). It trains the same recipe again from other
beginnings and with fewer patients, each in a folder of its own below the output, and says how often before it starts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
from pydantic import Field

from clinical_nlp.config import Config, CorpusConfig, load_config
from clinical_nlp.errors import ClinicalNlpError, ConfigError, InputError, UsageError
from clinical_nlp.eval._candidates import Words, read_words
from clinical_nlp.eval._finished import (
    Subject,
    ancestor,
    f1,
    note_counts,
    paired,
    read_losses,
    read_subject,
    reading,
    same_notes,
    some_patients,
    split_of,
)
from clinical_nlp.eval._retraining import Arms, curve_arm
from clinical_nlp.models.loading import load_base, read_task
from clinical_nlp.notes.corpus import load_corpus
from clinical_nlp.progress import say
from clinical_nlp.recipe import find_recipe
from clinical_nlp.reporting.tripod import tripod_section
from clinical_nlp.runs import Estimate, Run, write_atomic, write_json
from clinical_nlp.statistics.intervals import by_patient, patient_bootstrap
from clinical_nlp.statistics.transferability import (
    grouped_jackknife,
    h_score,
    independent_difference,
    interval_over_seeds,
    log_expected_empirical_prediction,
    log_maximum_evidence,
    rank_agreement,
)
from clinical_nlp.tasks import ner, pretraining

Part = Literal["forgetting", "negative_transfer", "overfitting", "learning_curve", "ranking"]
PARTS: tuple[Part, ...] = get_args(Part)
_OF_DAPT = ("forgetting", "overfitting")


class SourceConfig(Config):
    """What the model knew before, for forgetting."""

    corpus: CorpusConfig | None = None
    """Notes on which perplexity is measured before and after; default the corpus that the run's parent was pretrained
    on, its held-out patients."""
    patients: int = Field(default=200, ge=1)
    """At most so many patients of it are read."""


class MarginConfig(Config):
    """How large a harm must be to be called a problem; its whole interval must lie beyond."""

    perplexity: float = Field(default=0.05, ge=0)
    """Forgetting: source perplexity may rise by this share."""
    task: float = Field(default=0.02, ge=0)
    """Forgetting: score of the source task may fall by this much."""
    transfer: float = Field(default=0.0, ge=0)
    """Negative transfer: another beginning may be better by this much."""
    gap: float = Field(default=0.05, ge=0)
    """Overfitting: new patients may score lower than training patients by this much (dapt: by this share of
    perplexity)."""
    labels: float = Field(default=0.01, ge=0)
    """Too few labels: the last step of the learning curve may still gain this much."""


class TransferConfig(Config):
    """Measure whether a run forgot, was harmed by its base, overfits, or has too few labels."""

    run: str = Field(min_length=1)
    """Directory of a finished ner run (or dapt run: forgetting and overfitting alone)."""
    parts: list[Part] = Field(default_factory=lambda: list(PARTS), min_length=1)
    """What to measure; negative_transfer, learning_curve and ranking train again."""
    corpus_path: str | None = None
    """Where the run's corpus is now, if it has moved."""
    source: SourceConfig = SourceConfig()
    """What the model knew before."""
    patients: int = Field(default=200, ge=1)
    """At most so many training patients are scored for overfitting and read for the ranking."""
    shares: list[float] = Field(default=[0.1, 0.25, 0.5, 1.0], min_length=1)
    """Learning curve: shares of the training patients; smaller ones lie inside larger ones."""
    n_seeds: int = Field(default=3, ge=1)
    """Learning curve: trainings a share, each with its own draw of patients."""
    candidates: list[str] = Field(default_factory=list)
    """Ranking: base models to compare; default the run's base, the base of its dapt parent, and `random`, random
    weights of the same architecture."""
    truth: Literal["run", "head"] = "run"
    """Ranking: candidates are trained with the run's own strategy, or with the head alone."""
    words: int = Field(default=2000, ge=50)
    """Ranking: at most so many words of training patients, about as many of each."""
    max_steps: int | None = Field(default=None, ge=1)
    """Steps of each training; default as the run. Another value trains the run itself again too, to compare alike."""
    max_minutes: float | None = Field(default=None, gt=0)
    """Minutes of each training; as max_steps."""
    margins: MarginConfig = MarginConfig()
    """How large a harm must be to be called a problem."""
    seed: int = 0
    """Of intervals, samples of patients and words, and the random model."""


CONFIG = TransferConfig


def run(config: TransferConfig, output: Path, *, resume: bool = False) -> Run:
    """Measure the parts in order and write the page; what is finished is not trained again on resume."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UsageError("the suite 'transfer' runs in one process; start it without torchrun or accelerate")
    if any(not 0 < share <= 1 for share in config.shares) or len(set(config.shares)) < len(config.shares):
        raise ConfigError("config key 'shares': each is a share above 0 and at most 1, and different from the others")
    with Run.open(output, config, recipe="transfer", resume=resume) as run:
        subject = read_subject(config.run, config.corpus_path)
        parts = [part for part in PARTS if part in config.parts]
        book = Book(split=subject.split.describe(), selection=subject.selection)
        for part in PARTS:
            if part not in parts:
                book.missing(part, "", "it was left out (config key 'parts')")
            elif subject.recipe == "dapt" and part not in _OF_DAPT:
                book.missing(part, "", "a dapt run has learnt no task; name an ner run that was built on it")
        if subject.recipe == "dapt":
            parts = [part for part in parts if part in _OF_DAPT]
        arms = Arms(config, subject, run, resume)
        arms.plan(parts)
        if "forgetting" in parts:
            measure_forgetting(config, subject, book)
        if "overfitting" in parts:
            measure_overfitting(config, subject, book)
        arms.train()
        if "negative_transfer" in parts:
            measure_negative_transfer(config, subject, arms, book)
        if "learning_curve" in parts:
            measure_learning_curve(config, subject, arms, book)
        ranking = rank_candidates(config, subject, arms, book) if "ranking" in parts else None

        run.record(book.estimates)
        results = {
            "run": {
                "path": config.run,
                "recipe": subject.recipe,
                "base_model": subject.config.base_model,
                "strategy": subject.config.strategy.name,
                "corpus": subject.corpus.card.name,
                "labels": list(subject.labels),
                "score": (subject.run.metrics.get("test.f1_strict") or {}).get("value"),
            },
            "protocol": {
                "split": subject.split.describe(),
                "selection": subject.selection,
                "seed": config.seed,
                "metric": "strict micro-F1" if subject.recipe == "ner" else "perplexity",
                "limits": arms.limits_in_words,
                "margins": config.margins.model_dump(),
                "notes_verified": subject.verified,
            },
            "verdicts": book.verdicts(),
            "numbers": book.numbers,
            "trainings": arms.account(),
            "ranking": ranking,
            "record": subject.record(),
        }
        write_json(run.path / "results.json", results)
        run.note(inputs={"run": str(config.run), "corpus": subject.corpus.card.name}, trainings=len(arms.trained))
    write_atomic(run.path / "report.html", report(run))
    return run


def report(run: Run) -> str:
    """Render the page from `results.json`."""
    from clinical_nlp.reporting.transfer_page import transfer_page

    results = json.loads((run.path / "results.json").read_text("utf-8"))
    return transfer_page(results, tripod_section(run, results))


# The book: numbers and what follows from them -------------------------------------------------------------------------

State = Literal["problem", "not shown", "no problem", "not measured"]
_RULES = {
    "forgetting": "A problem if the whole 95 % interval of the rise in source perplexity lies above "
    "{perplexity_percent:g} %, or that of the fall of the source task's score above {task:g}.",
    "negative_transfer": "A problem if the whole 95 % interval of the difference to another beginning (same notes, "
    "split, seed and settings; same patients scored) lies above {transfer:g} in favour of the other one.",
    "overfitting": "A problem if the whole 95 % interval of the gap between training and new patients lies above "
    "{gap:g}.",
    "learning_curve": "A problem if the last step of the curve (at the same number of training steps) still gains more "
    "than {labels:g}, by the whole 95 % interval over seeds and by that over patients.",
}


def judge(harm: Estimate, margin: float) -> State:
    """Say what an interval of a harm (positive is worse) shows about a margin.

    problem: the whole interval lies above the margin. no problem: the whole interval lies at or below it. Anything
    else, and every harm without an interval, is not shown.
    """
    if math.isnan(harm.low) or math.isnan(harm.high):
        return "not shown"
    return "problem" if harm.low > margin else "no problem" if harm.high <= margin else "not shown"


@dataclass
class Book:
    """Every number with how it came about, and the findings that rest on them."""

    split: str
    selection: str
    estimates: dict[str, Estimate] = field(default_factory=dict)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, name: str, estimate: Estimate, protocol: str, *, split: str = "", selection: str = "") -> None:
        """Enter a number."""
        self.estimates[name] = estimate
        self.numbers[name] = asdict(estimate) | {
            "protocol": protocol,
            "split": split or self.split,
            "selection": selection or self.selection,
        }

    def find(self, part: str, comparison: str, state: State, numbers: Sequence[str]) -> None:
        """Enter what numbers show."""
        self.findings.setdefault(part, []).append(
            {"comparison": comparison, "state": state, "numbers": list(numbers), "reason": ""}
        )

    def missing(self, part: str, comparison: str, reason: str) -> None:
        """Enter that something was not measured, and why."""
        self.findings.setdefault(part, []).append(
            {"comparison": comparison, "state": "not measured", "numbers": [], "reason": reason}
        )

    def verdicts(self) -> dict[str, Any]:
        """Return, for each part but the ranking, the worst thing that was shown."""
        order: tuple[State, ...] = ("problem", "not shown", "no problem", "not measured")
        return {
            part: {
                "state": min((found["state"] for found in self.findings[part]), key=order.index),
                "findings": self.findings[part],
                "rule": rule,
            }
            for part, rule in _RULES.items()
        }


# (a) Forgetting -------------------------------------------------------------------------------------------------------


def measure_forgetting(config: TransferConfig, subject: Subject, book: Book) -> None:
    """Source perplexity and source-task score, before and after."""
    _measure_perplexity(config, subject, book)
    part, name = "forgetting", "task"
    parent = ancestor(subject.base, "ner") if subject.recipe == "ner" else None
    if parent is None:
        book.missing(part, name, "the run was not built on an ner run, so there is no earlier task to forget")
        return
    try:
        _measure_source_task(config, subject, parent, book)
    except ClinicalNlpError as error:
        book.missing(part, name, f"the earlier run {parent.path} cannot be scored: {error}")


def _measure_perplexity(config: TransferConfig, subject: Subject, book: Book) -> None:
    part, name = "forgetting", "perplexity"
    parent = ancestor(subject.base, "dapt")
    if config.source.corpus is None and parent is None:
        reason = (
            "nothing says what the model read before: its base is no dapt run; name notes with --source.corpus.name"
        )
        book.missing(part, name, reason)
        return
    try:
        notes, rows, split = _source(config, subject, parent)
    except ClinicalNlpError as error:
        if config.source.corpus is not None:
            raise type(error)(f"the source notes (--source.corpus.path): {error}") from None
        book.missing(part, name, f"the corpus of {parent.path if parent else ''} cannot be read: {error}")
        return
    texts, patients = notes["text"].to_pylist(), notes["patient_id"].to_pylist()
    rows = some_patients(rows, patients, config.source.patients, config.seed)
    found = [texts[row] for row in rows]
    how = reading(subject.run if subject.recipe == "dapt" else parent)
    try:
        before, kind = read_losses(subject.base, subject.quantization, found, **how)
        after, _ = read_losses(str(subject.run.path), subject.quantization, found, **how)
    except ClinicalNlpError as error:
        book.missing(part, name, str(error))
        return
    people = [patients[row] for row in rows]
    summed = by_patient(people, np.concatenate([before, after], axis=1))
    common: dict[str, Any] = {"n_notes": len(rows), "part": "source", "seed": config.seed}
    protocol = f"{kind} of held-out source notes, read as the base was pretrained, whatever the task's attention"
    selection = "none: patients whose notes the run did not train on"
    estimates = {
        "before": patient_bootstrap(summed, lambda c: pretraining.perplexity(c[..., :2]), **common),
        "after": patient_bootstrap(summed, lambda c: pretraining.perplexity(c[..., 2:]), **common),
        "ratio": patient_bootstrap(
            summed, lambda c: pretraining.perplexity(c[..., 2:]) / pretraining.perplexity(c[..., :2]), **common
        ),
    }
    for key, estimate in estimates.items():
        book.add(f"forgetting.perplexity_{key}", estimate, protocol, split=split, selection=selection)
    state = judge(_shifted(estimates["ratio"], -1), config.margins.perplexity)
    if summed[:, 0].tolist() == summed[:, 2].tolist():
        state = "no problem"  # not a token's probability has changed, so nothing is left to be uncertain of
    book.find(part, name, state, [f"forgetting.perplexity_{key}" for key in estimates])


def _shifted(estimate: Estimate, by: float) -> Estimate:
    return replace(estimate, value=estimate.value + by, low=estimate.low + by, high=estimate.high + by)


def _source(config: TransferConfig, subject: Subject, parent: Run | None) -> tuple[pa.Table, np.ndarray, str]:
    """Return the source notes, the rows of patients to read, whom the run has not trained on, and which those are."""
    chosen = config.source.corpus
    if parent is not None:
        settings: Any = load_config(find_recipe("dapt").load().CONFIG, parent.path / "config.yaml")
        if chosen is None or chosen == settings.corpus:
            corpus = load_corpus(settings.corpus.name, settings.corpus.path, **settings.corpus.options)
            same_notes(parent, corpus)
            split = split_of(settings, corpus)
            return (
                corpus.notes,
                _not_read(subject, corpus.notes, split.test),
                f"as run {parent.path}: {split.describe()}",
            )
    assert chosen is not None
    corpus = load_corpus(chosen.name, chosen.path, **chosen.options)
    part = next((name for name in ("test", "development") if name in corpus.parts.values()), None)
    rows = np.arange(corpus.notes.num_rows)
    if part is not None:
        keys = zip(corpus.notes["institution"].to_pylist(), corpus.notes["note_id"].to_pylist(), strict=True)
        rows = np.array([row for row, key in enumerate(keys) if corpus.parts[key] == part], dtype=np.int64)
    where = f"{part} part" if part else "all patients"
    return corpus.notes, _not_read(subject, corpus.notes, rows), f"{where} of corpus {corpus.card.name}"


def _not_read(subject: Subject, notes: pa.Table, rows: np.ndarray) -> np.ndarray:
    """Leave out texts that the run trained on, and every other note of their patients."""
    digests = subject.corpus.notes["text_sha256"].to_pylist()
    read = {digests[row] for row in subject.split.train}
    patients, own = notes["patient_id"].to_pylist(), notes["text_sha256"].to_pylist()
    known = {patients[row] for row in range(len(own)) if own[row] in read}
    kept = np.array([row for row in rows if patients[row] not in known], dtype=np.int64)
    if not len(kept):
        raise InputError("the run has trained on every patient of the source notes; name other notes")
    return kept


def _measure_source_task(config: TransferConfig, subject: Subject, parent: Run, book: Book) -> None:
    """Score the earlier task on its own test patients: the earlier run, and its head on the new backbone."""
    earlier = read_subject(str(parent.path))
    rows = _not_read(subject, earlier.corpus.notes, earlier.split.test)
    people = [earlier.patients[row] for row in rows]
    before = by_patient(people, note_counts(earlier, ner.NerPredictor.load(parent.path), rows))
    after = by_patient(people, note_counts(earlier, with_earlier_head(subject, parent), rows))
    common: dict[str, Any] = {"n_notes": len(rows), "part": "source test", "seed": config.seed}
    protocol = (
        "strict micro-F1 of the earlier task: the earlier run, and this run with the earlier head or what it became"
    )
    split = f"as run {parent.path}: {earlier.split.describe()}"
    estimates = {
        "before": patient_bootstrap(before, f1, **common),
        "after": patient_bootstrap(after, f1, **common),
        "difference": paired(before, after, f1, **common),
    }
    for key, estimate in estimates.items():
        book.add(f"forgetting.task_{key}", estimate, protocol, split=split, selection=earlier.selection)
    state = judge(estimates["difference"], config.margins.task)
    if np.array_equal(before, after):
        state = "no problem"
    book.find("forgetting", "task", state, [f"forgetting.task_{key}" for key in estimates])


def with_earlier_head(subject: Subject, parent: Run) -> ner.NerPredictor:
    """Return the run with the head of the earlier task: its own, where that one continued, else the earlier one."""
    if subject.run.manifest.get("head") == "continued":
        return ner.NerPredictor.load(subject.run.path)
    values = read_task(parent.path)
    task = ner.NerTask(tuple(values["labels"]), values["window"], values["overlap"], bool(values["bidirectional"]))
    base = load_base(str(subject.run.path), quantization=subject.quantization, bidirectional=task.bidirectional)
    model = ner.build_model(base.network, len(task.tags), seed=0)
    ner.load_head(model, parent.path)
    return ner.NerPredictor(model, task, base.tokenizer)


# (b) Negative transfer ------------------------------------------------------------------------------------------------


def measure_negative_transfer(config: TransferConfig, subject: Subject, arms: Arms, book: Book) -> None:
    """Compare the run with the same training from other beginnings, patient by patient."""
    part = "negative_transfer"
    protocol = f"strict micro-F1; {arms.limits_in_words}"
    own = arms.counts("reference")
    common: dict[str, Any] = _common(config, subject)
    book.add(f"{part}.run.f1_strict", patient_bootstrap(own, f1, **common), protocol)
    for name in ("without_dapt", "head", "random"):
        try:
            other = arms.counts(name)
        except InputError as error:
            book.missing(part, name, str(error))
            continue
        harm = paired(other, own, f1, **common)
        book.add(f"{part}.{name}.f1_strict", patient_bootstrap(other, f1, **common), protocol)
        book.add(f"{part}.{name}.difference", harm, f"{protocol}; the other minus the run, the same patients resampled")
        numbers = [f"{part}.{name}.f1_strict", f"{part}.{name}.difference"]
        book.find(part, name, judge(harm, config.margins.transfer), numbers)


def _common(config: TransferConfig, subject: Subject) -> dict[str, Any]:
    return {"n_notes": len(subject.split.test), "part": subject.split.reported_part, "seed": config.seed}


# (c) Overfitting ------------------------------------------------------------------------------------------------------


def measure_overfitting(config: TransferConfig, subject: Subject, book: Book) -> None:
    """Score training, development and new patients alike."""
    part, split = "overfitting", subject.split
    if subject.recipe == "dapt":
        _measure_overfitting_of_reading(config, subject, book)
        return
    predictor = ner.NerPredictor.load(subject.run.path)
    protocol = f"strict micro-F1 of the run; at most {config.patients} training and development patients each"
    scores: dict[str, Estimate] = {}
    for name, rows in (("train", split.train), ("development", split.development), ("new", split.test)):
        if name != "new":
            rows = some_patients(rows, subject.patients, config.patients, config.seed)
        if not len(rows):
            continue
        counts = by_patient([subject.patients[row] for row in rows], note_counts(subject, predictor, rows))
        reported = split.reported_part if name == "new" else name
        scores[name] = patient_bootstrap(counts, f1, n_notes=len(rows), part=reported, seed=config.seed)
        book.add(f"{part}.{name}", scores[name], protocol)
    for name in ("train", "development"):
        if name not in scores:
            book.missing(part, name, f"the split has no {name} patients")
            continue
        gap = independent_difference(scores[name], scores["new"])
        book.add(f"{part}.gap_{name}", gap, f"{protocol}; {name} minus new patients, different patients")
        if name == "train":  # the gap to development patients is shown: it is nobody's training
            numbers = [f"{part}.train", f"{part}.new", f"{part}.gap_train"]
            book.find(part, name, judge(gap, config.margins.gap), numbers)


def _measure_overfitting_of_reading(config: TransferConfig, subject: Subject, book: Book) -> None:
    """For dapt: by how much more did perplexity fall on training notes than on new ones?

    Training and new notes may differ in difficulty, so each part is taken relative to the base model.
    """
    part, split, how = "overfitting", subject.split, reading(subject.run)
    gains: dict[str, Estimate] = {}
    for name, rows in (("train", split.train), ("development", split.development), ("new", split.test)):
        rows = some_patients(rows, subject.patients, config.patients, config.seed)
        if not len(rows):
            continue
        texts = [subject.texts[row] for row in rows]
        try:
            before, kind = read_losses(subject.base, subject.quantization, texts, **how)
            after, _ = read_losses(str(subject.run.path), subject.quantization, texts, **how)
        except ClinicalNlpError as error:
            book.missing(part, "train", str(error))
            return
        counts = by_patient([subject.patients[row] for row in rows], np.concatenate([before, after], axis=1))
        reported = split.reported_part if name == "new" else name
        protocol = f"{kind} of the run; at most {config.patients} patients a part"
        common: dict[str, Any] = {"n_notes": len(rows), "part": reported, "seed": config.seed}
        gains[name] = patient_bootstrap(counts, lambda c: c[..., 2] / c[..., 3] - c[..., 0] / c[..., 1], **common)
        book.add(
            f"{part}.{name}",
            patient_bootstrap(counts, lambda c: pretraining.perplexity(c[..., 2:]), **common),
            protocol,
        )
    for name in ("train", "development"):
        if name not in gains:
            continue
        gap = independent_difference(gains["new"], gains[name])
        ratio = replace(gap, value=math.exp(gap.value), low=math.exp(gap.low), high=math.exp(gap.high))
        book.add(
            f"{part}.gap_{name}",
            ratio,
            f"{protocol}; perplexity after / before on new patients, divided by the same on {name} patients",
        )
        if name == "train":
            numbers = [f"{part}.train", f"{part}.new", f"{part}.gap_train"]
            book.find(part, name, judge(_shifted(ratio, -1), config.margins.gap), numbers)


# (d) Learning curve ---------------------------------------------------------------------------------------------------


def measure_learning_curve(config: TransferConfig, subject: Subject, arms: Arms, book: Book) -> None:
    """Score the same new patients after training on fewer patients, over seeds."""
    part, shares = "learning_curve", sorted(config.shares)
    protocol = f"strict micro-F1; as many training steps at every share; {arms.limits_in_words}"
    counts: dict[float, dict[int, np.ndarray]] = {share: {} for share in shares}
    common = _common(config, subject)
    for share in shares:
        reasons = []
        for seed in range(config.n_seeds):
            try:
                counts[share][seed] = arms.counts(curve_arm(share, seed))
            except InputError as error:
                reasons.append(str(error))
        if reasons:
            book.missing(part, f"{100 * share:g}", f"{len(reasons)} of {config.n_seeds} trainings failed: {reasons[0]}")
        found = [float(f1(per_patient.sum(0))) for per_patient in counts[share].values()]
        if found:
            people = len(next(iter(counts[share].values())))
            size = {"n_patients": people, "n_notes": common["n_notes"], "part": common["part"]}
            estimate = interval_over_seeds(found, **size)
            trained = arms.n_patients(curve_arm(share, 0))
            book.add(f"{part}.{100 * share:g}", estimate, f"{protocol}; mean over seeds, {trained} training patients")
            book.numbers[f"{part}.{100 * share:g}"] |= {"n_training_patients": trained, "scores": found}
    if len(shares) < 2:
        book.missing(part, "last_step", "the curve has one share only; two are needed to see whether it still rises")
        return
    most, less = counts[shares[-1]], counts[shares[-2]]
    seeds = sorted(set(most) & set(less))
    if not seeds:
        book.missing(part, "last_step", "no seed gave a score at the two largest shares")
        return
    gains = [float(f1(most[seed].sum(0)) - f1(less[seed].sum(0))) for seed in seeds]
    both = np.concatenate([np.concatenate([most[seed], less[seed]], axis=1) for seed in seeds], axis=1)

    def mean_gain(c: np.ndarray) -> np.ndarray:
        each = [f1(c[..., 6 * k : 6 * k + 3]) - f1(c[..., 6 * k + 3 : 6 * k + 6]) for k in range(len(seeds))]
        return np.asarray(np.mean(each, axis=0))

    by_people = patient_bootstrap(both, mean_gain, **common)
    by_seed = interval_over_seeds(
        gains, n_patients=by_people.n_patients, n_notes=common["n_notes"], part=common["part"]
    )
    step = f"gain from {100 * shares[-2]:g} % to {100 * shares[-1]:g} % of the training patients"
    book.add(f"{part}.gain_seeds", by_seed, f"{protocol}; {step}, over seeds")
    book.add(f"{part}.gain_patients", by_people, f"{protocol}; {step}, mean over seeds, patients resampled")
    states = {judge(estimate, config.margins.labels) for estimate in (by_seed, by_people)}
    state: State = states.pop() if len(states) == 1 else "not shown"
    book.find(part, "last_step", state, [f"{part}.gain_seeds", f"{part}.gain_patients"])


# (e) Ranking ----------------------------------------------------------------------------------------------------------

_SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "logme": log_maximum_evidence,
    "h_score": h_score,
    "leep": log_expected_empirical_prediction,
}


def rank_candidates(config: TransferConfig, subject: Subject, arms: Arms, book: Book) -> dict[str, Any]:
    """Score candidate base models before training, and compare with what training gave."""
    part, protocol = "ranking", "last hidden state at words of training patients, against their tags"
    candidates: list[dict[str, Any]] = []
    counts: dict[int, np.ndarray] = {}
    common = _common(config, subject)
    sample = {"most_words": config.words, "most_patients": config.patients, "seed": config.seed}
    for number, (name, arm) in enumerate(arms.candidates.items()):
        say(f"ranking: candidate {number + 1} of {len(arms.candidates)}")
        entry: dict[str, Any] = {"name": name, "arm": arm, "random": name == arms.random_model, "reasons": {}}
        candidates.append(entry)
        try:
            words = read_words(subject, name, **sample)
            for score in _SCORES:
                rows = words.probabilities if score == "leep" else words.features
                if rows is None:
                    entry["reasons"][score] = "LEEP reads the classes of a task head; this base model has none"
                    continue
                estimate = _score_words(_SCORES[score], rows, words, config.seed)
                about = f"{protocol}; {len(words.tags)} words; interval from leaving out tenths of the patients"
                book.add(f"{part}.{number}.{score}", estimate, about, selection="none: nothing is trained")
        except ClinicalNlpError as error:
            entry["reasons"] = dict.fromkeys(_SCORES, str(error))
        try:
            counts[number] = arms.counts(arm)
        except InputError as error:
            entry["reasons"]["truth"] = str(error)
            continue
        truth = patient_bootstrap(counts[number], f1, **common)
        book.add(f"{part}.{number}.truth", truth, f"strict micro-F1 after training it; {arms.limits_in_words}")
    agreement = []
    for score in _SCORES:
        numbers = [n for n in counts if f"{part}.{n}.{score}" in book.estimates]
        if len(numbers) < 2:
            continue
        before = [book.estimates[f"{part}.{n}.{score}"].value for n in numbers]
        after = [book.estimates[f"{part}.{n}.truth"].value for n in numbers]
        tau, smallest_p = rank_agreement(before, after)
        chosen, best = numbers[int(np.argmax(before))], numbers[int(np.argmax(after))]
        regret = paired(counts[best], counts[chosen], f1, **common)
        book.add(f"{part}.{score}.regret", regret, "strict micro-F1: best candidate minus the one that the score picks")
        agreement.append(
            {
                "score": score,
                "n_candidates": len(numbers),
                "tau": tau,
                "smallest_p": smallest_p,
                "chosen": chosen,
                "best": best,
            }
        )
    return {"candidates": candidates, "agreement": agreement, "truth": config.truth}


def _score_words(
    score: Callable[[np.ndarray, np.ndarray], float], rows: np.ndarray, words: Words, seed: int
) -> Estimate:
    return grouped_jackknife(
        lambda at: score(rows[at], words.tags[at]), words.patients, n_notes=words.n_notes, seed=seed
    )
