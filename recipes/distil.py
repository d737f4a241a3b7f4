"""Teach a small student what a fine-tuned teacher says of unlabelled notes, and show what is lost and what is won."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from clinical_nlp.adaptation.strategies import StrategyConfig, apply_strategy, trainable_count
from clinical_nlp.config import Config, CorpusConfig, RecipeConfig
from clinical_nlp.errors import ConfigError, InputError, ModelError, TooFewPatientsError
from clinical_nlp.models.loading import BaseModel, load_base, read_task
from clinical_nlp.models.resolve import provenance
from clinical_nlp.notes.corpus import load_corpus
from clinical_nlp.progress import is_main_process, progress, say
from clinical_nlp.recipes import coding as coding_recipe
from clinical_nlp.recipes import ner as ner_recipe
from clinical_nlp.runs import Estimate, Run, write_atomic
from clinical_nlp.statistics import multilabel
from clinical_nlp.statistics.calibration import fit_calibration
from clinical_nlp.statistics.intervals import by_patient, patient_bootstrap
from clinical_nlp.tasks import coding, distillation, ner
from clinical_nlp.training.trainer import TrainingConfig, train


class StudentConfig(Config):
    """A student that is made anew, where no base_model is named: a small unmasked Llama."""

    layers: int = Field(default=2, ge=1)
    """Its layers."""
    hidden: int = Field(default=128, ge=32, multiple_of=32)
    """Its width."""
    vocabulary: int = Field(default=6000, ge=200)
    """Pieces of its vocabulary, which is made from the unlabelled notes."""


class DistilConfig(RecipeConfig):
    """Teach a student what a finished ner or coding run says of unlabelled notes."""

    teacher: str = ""
    """Directory of the finished ner or coding run that is the teacher."""
    base_model: str | None = None
    """The student: hub id, local folder or earlier run; without one, a small model is made (see student)."""
    student: StudentConfig = StudentConfig()
    """Size of the student that is made."""
    strategy: StrategyConfig = StrategyConfig(name="full")
    """What of the student may move."""
    unlabelled: CorpusConfig | None = None
    """Notes for the teacher to read; default the training patients of `corpus`. Patients of the corpus that are held
    out are left out here too."""
    timed_notes: int = Field(default=100, ge=10)
    """Held-out notes (or encounters) on which both are timed."""
    training: TrainingConfig = TrainingConfig(epochs=12, batch_size=32)
    """How the student's weights are moved."""


CONFIG = DistilConfig
TEACHER = "teacher.npz"
"""What the teacher said, kept so that a resumed run does not ask again; it holds probabilities and no text."""
_NEW = 2e-3
"""Peak learning rate of a student that starts from nothing."""


def run(config: DistilConfig, output: Path, *, resume: bool = False) -> Run:
    """Let the teacher read, train the student, score and time both on held-out patients, write the student's run."""
    if not config.teacher:
        raise ConfigError("distil needs a teacher: --teacher RUN, the directory of a finished ner or coding run")
    with Run.open(output, config, recipe="distil", resume=resume) as run:
        folder = Path(config.teacher)
        Run.load(folder)
        kind = read_task(folder).get("task")
        if kind not in ("ner", "coding"):
            raise ModelError(f"teacher {folder} was trained for {kind}; distil needs a ner or a coding run")
        made = Run.load(folder).manifest.get("config") or {}
        mine = config.model_dump(mode="json")
        same = all(made.get(key) == mine[key] for key in ("corpus", "split", "seed"))
        if not same:
            say("the teacher had another corpus, split or seed: it may have learned from patients held out here")
        (distil_ner if kind == "ner" else distil_coding)(config, run, resume)
        run.note(teacher={"run": str(folder), "task": kind, "config": made, "held_out_the_same": same})
    if is_main_process():
        from clinical_nlp.reporting.page import run_report

        run_report(run)
    return run


def distil_ner(config: DistilConfig, run: Run, resume: bool) -> None:
    """Distil a tagger."""
    teacher = ner.NerPredictor.load(config.teacher)
    data = ner_recipe.read(config.corpus, config.split, config.seed)
    if missing := set(teacher.task.labels) - set(data.spans(data.split.test)):
        say(f"the reported part has no gold span of {ner_recipe.names(missing)}, which the teacher tags")
    held_out = data.split.test
    others = {data.patients[row] for part in (data.split.development, held_out) for row in part}
    texts = unlabelled(config, others, [data.texts[row] for row in data.split.train])
    said = unflattened(recalled(run, lambda: flattened(labelled(teacher, texts))))

    base = student(config, run, texts)
    values = read_task(Path(config.teacher))
    window = min(values["window"], ner.most_tokens(base.network) or values["window"])
    task = ner.NerTask(teacher.task.labels, window, min(values["overlap"], window // 4), True)
    windows = distillation.soft_windows(task, base.tokenizer, texts, said)
    model = ner.build_model(
        apply_strategy(base.network, config.strategy, seed=config.seed), len(task.tags), seed=config.seed
    )
    fit(
        config, run, resume, model, base, windows,
        partial(distillation.collate_windows, pad_token_id=base.tokenizer.pad_token_id or 0),
        [len(window.window.input_ids) for window in windows],
    )  # fmt: skip

    pupil = ner.NerPredictor(model, task, base.tokenizer)
    notes = [data.texts[row] for row in held_out]
    patients = [data.patients[row] for row in held_out]
    part, labels = data.split.reported_part, task.labels
    counts = {}
    for name, predictor in (("teacher", teacher), ("student", pupil)):
        predicted = predictor.predict(notes)
        counts[name] = np.stack(
            [
                ner.count_matches(data.gold[row], [span[:3] for span in spans], labels)
                for row, spans in zip(held_out, predicted, strict=True)
            ]
        )
    run.record(ner.score(counts["student"], labels, patients, part=part, seed=config.seed))
    totals = {name: found.sum(1)[:, :3].astype(float) for name, found in counts.items()}
    run.record(kept(totals, patients, part, config.seed))
    some = slice(config.timed_notes)
    timed(run, {"teacher": teacher.predict, "student": pupil.predict}, notes[some], patients[some], part)
    if is_main_process():
        ner.save(run.path, model, task, base, full=True)
    run.note(
        inputs={"corpus": data.corpus.card.name, "unlabelled_notes": len(texts)}
        | {"notes_sha256": ner_recipe.digest(data.corpus)},
        base_model=provenance(base.resolved, run.path),
        split=data.split.describe(),
        labels=list(labels),
    )


def distil_coding(config: DistilConfig, run: Run, resume: bool) -> None:
    """Distil a coder."""
    teacher = coding.Coder.load(config.teacher)
    made = Run.load(config.teacher).manifest["config"]
    settings = coding_recipe.CodingConfig.model_validate(
        {**made, "corpus": config.corpus.model_dump(), "split": config.split.model_dump(), "seed": config.seed}
    )
    book = coding_recipe.load_code_book(
        settings.codes.system, path=settings.codes.path, releases=settings.codes.releases
    )
    data = coding_recipe.read(settings, book)
    coding_recipe.check_development(data)
    data.columns = (
        *teacher.task.codes,
        *sorted({c for row in (*data.development, *data.held_out) for c in data.codes[row]} - {*teacher.task.codes}),
    )
    if config.unlabelled is not None:
        raise ConfigError("unlabelled is for ner teachers; a coding student reads the training patients of corpus")
    documents = [data.texts(row) for row in data.train]
    logits = recalled(run, lambda: {"logits": teacher.network_logits(documents)})["logits"]
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))

    base = student(config, run, [text for texts in documents for text in texts])
    chunk = min(teacher.task.chunk, ner.most_tokens(base.network) or teacher.task.chunk)
    task = replace(teacher.task, chunk=chunk, bidirectional=True, seen=(True,) * len(teacher.task.codes))
    examples = distillation.SoftDocuments(task, base.tokenizer, documents, probabilities)
    named = config.base_model is not None  # what an untrained student makes of a name says nothing
    model = coding.build_model(
        apply_strategy(base.network, config.strategy, seed=config.seed),
        task,
        seed=config.seed,
        counts=probabilities.sum(0),
        n_documents=len(documents),
        descriptions=coding.embed_descriptions(base, task.labels) if named else None,
    )
    fit(
        config, run, resume, model, base, examples,
        partial(distillation.collate_documents, pad_token_id=base.tokenizer.pad_token_id or 0), examples.lengths,
    )  # fmt: skip

    tuned, notes = ([data.texts(row) for row in rows] for rows in (data.development, data.held_out))
    gold = data.gold(data.held_out)
    patients = [data.patients[row] for row in data.held_out]
    part = data.split.reported_part
    pupil = coding.Coder(
        model, task, base.tokenizer, teacher.calibration, teacher.threshold, teacher.accept, teacher.named
    )
    tuning, truth = pupil.logits(tuned), data.gold(data.development)
    threshold = multilabel.choose_threshold(coding_recipe.widened(tuning, len(data.columns)), truth)
    calibration = fit_calibration(tuning, truth[:, : len(task.codes)])
    pupil = coding.Coder(model, task, base.tokenizer, calibration, threshold, teacher.accept, teacher.named)
    found = {
        name: coding_recipe.widened(coder.logits(notes), len(data.columns))
        for name, coder in (("teacher", teacher), ("student", pupil))
    }
    counts = np.append(np.rint(probabilities.sum(0)), np.zeros(len(data.columns) - len(task.codes)))
    run.record(
        multilabel.score(found["student"], gold, threshold, patients, train_counts=counts, part=part, seed=config.seed)
    )
    totals = {}
    for name, limit in (("teacher", teacher.threshold), ("student", threshold)):
        chosen = found[name] >= limit
        totals[name] = np.stack([(chosen & gold).sum(1), chosen.sum(1), gold.sum(1)], 1).astype(float)
    run.record(kept(totals, patients, part, config.seed))
    some = slice(config.timed_notes)
    timed(run, {"teacher": teacher.logits, "student": pupil.logits}, notes[some], patients[some], part)
    if is_main_process():
        kept_of: dict[str, Any] = {"calibration": {"slope": calibration.slope, "offset": calibration.offset}}
        kept_of |= {"threshold": threshold, "accept": teacher.accept, "named_codes": teacher.named.as_json()}
        coding.save(run.path, model, task, base, full=True, **kept_of)
    run.note(
        inputs={"corpus": data.corpus.card.name, "unlabelled_documents": len(documents)}
        | {"notes_sha256": ner_recipe.digest(data.corpus)},
        base_model=provenance(base.resolved, run.path),
        split=data.split.describe(),
    )


def unlabelled(config: DistilConfig, held_out: set[str], training: list[str]) -> list[str]:
    """Return the notes for the teacher to read, none of a patient who is held out."""
    if config.unlabelled is None:
        return training
    corpus = load_corpus(config.unlabelled.name, config.unlabelled.path, **config.unlabelled.options)
    rows = corpus.notes.select(["patient_id", "text"]).to_pylist()
    texts = [row["text"] for row in rows if row["patient_id"] not in held_out]
    if len(texts) < len(rows):
        say(f"{len(rows) - len(texts)} unlabelled notes are of patients who are held out, and are not read")
    if not texts:
        raise TooFewPatientsError(f"corpus {corpus.card.name!r} has no note of a patient who is not held out")
    return texts


def labelled(teacher: ner.NerPredictor, texts: Sequence[str]) -> list[tuple[ner.Encoded, np.ndarray]]:
    """Let the teacher read, some notes at a time."""
    found: list[tuple[ner.Encoded, np.ndarray]] = []
    with progress("teacher reads", len(texts), unit="notes") as bar:
        for begin in range(0, len(texts), 64):
            found += teacher.tags(texts[begin : begin + 64])
            bar.advance(len(texts[begin : begin + 64]))
    return found


def recalled(run: Run, ask: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return what the teacher said, from the run where it was asked before."""
    path = run.path / TEACHER
    if not path.is_file():
        found = ask()
        if not is_main_process():
            return found
        data = io.BytesIO()
        np.savez(data, allow_pickle=False, **found)
        write_atomic(path, data.getvalue())
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def flattened(said: Sequence[tuple[ner.Encoded, np.ndarray]]) -> dict[str, np.ndarray]:
    """Put the words of all notes, and what was said of them, one after the other."""
    spans = [span for encoded, _ in said for span in encoded.word_spans]
    return {
        "words": np.array([len(log_probs) for _, log_probs in said], dtype=np.int64),
        "spans": np.array(spans, dtype=np.int64).reshape(-1, 2),
        "log_probs": np.concatenate([log_probs for _, log_probs in said]),
    }


def unflattened(arrays: dict[str, np.ndarray]) -> list[tuple[ner.Encoded, np.ndarray]]:
    """Undo `flattened`."""
    ends = np.cumsum(arrays["words"])
    return [
        (ner.Encoded([(int(a), int(b)) for a, b in arrays["spans"][begin:end]], []), arrays["log_probs"][begin:end])
        for begin, end in zip(ends - arrays["words"], ends, strict=True)
    ]


def student(config: DistilConfig, run: Run, texts: Sequence[str]) -> BaseModel:
    """Load the student, or make one."""
    if config.base_model is not None:
        return load_base(config.base_model, quantization=config.strategy.quantization, bidirectional=True)
    if config.strategy.name != "full":
        raise ConfigError(f"a student that is made anew trains in full, not by {config.strategy.name}")
    folder = run.path / "student"
    if not (folder / "model.safetensors").is_file():
        distillation.write_student(texts, folder, **config.student.model_dump(), seed=config.seed)
    return load_base(str(folder), bidirectional=True)


def fit(
    config: DistilConfig, run: Run, resume: bool, model: Any, base: BaseModel, examples: Any, collate: Any,
    lengths: Sequence[int],
) -> None:  # fmt: skip
    """Train the student on what the teacher said."""
    if not lengths:
        raise InputError("the teacher had no note to read")
    trainable, everything = trainable_count(model)
    say(f"student: {trainable:,} of {everything:,} parameters train, on {len(lengths)} examples")
    training = config.training
    if config.base_model is None and training.learning_rate is None:
        training = training.model_copy(update={"learning_rate": _NEW})
    outcome = train(
        model, examples, collate, config=training, run=run, seed=config.seed, lengths=lengths,
        tokenizer=base.tokenizer, strategy=config.strategy, head="head", max_steps=config.max_steps,
        max_minutes=config.max_minutes, resume=resume,
    )  # fmt: skip
    run.note(training=outcome | {"trainable_parameters": trainable, "parameters": everything})


def kept(totals: dict[str, np.ndarray], patients: Sequence[str], part: str, seed: int) -> dict[str, Estimate]:
    """Return F1 of the teacher and what share of it the student keeps, both from the same resampled patients.

    `totals` holds (n, 3) true, predicted and gold of each note by teacher and by student.
    """
    both = by_patient(patients, np.concatenate([totals["teacher"], totals["student"]], 1))

    def f1(counts: np.ndarray) -> np.ndarray:
        return multilabel.f1(counts[..., 0], counts[..., 1], counts[..., 2])

    def share(counts: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(f1(counts[..., 3:]) / f1(counts[..., :3]))

    common: dict[str, Any] = {"n_notes": len(patients), "part": part, "seed": seed}
    return {
        "test.teacher_f1": patient_bootstrap(both, lambda counts: f1(counts[..., :3]), **common),
        "test.student_f1": patient_bootstrap(both, lambda counts: f1(counts[..., 3:]), **common),
        "test.f1_kept": patient_bootstrap(both, share, **common),
    }


def timed(
    run: Run,
    predictors: Mapping[str, Callable[[Sequence[Any]], Any]],
    notes: Sequence[Any],
    patients: Sequence[str],
    part: str,
) -> None:
    """Time a slow and then a fast one on the same held-out notes, in turns, and record notes a second and the ratio.

    Each is the median of three rounds; there is no interval.
    """
    rates: dict[str, list[float]] = {name: [] for name in predictors}
    for _ in range(3):
        for name, predict in predictors.items():
            rates[name] += distillation.notes_per_second(predict, notes, rounds=1)
    slow, fast = rates.values()
    values = {f"{name}_notes_per_second": float(np.median(found)) for name, found in rates.items()}
    values["times_faster"] = float(np.median([b / a for a, b in zip(slow, fast, strict=True)]))
    note = "median of three rounds in turns; not an estimate over patients"
    run.record(
        {
            f"test.{name}": Estimate(value, math.nan, math.nan, len(set(patients)), len(notes), part, note)
            for name, value in values.items()
        }
    )


def report(run: Run) -> str:
    """Render the run's page, for `clinical-nlp report`."""
    from clinical_nlp.reporting.page import Notice, Section, Table, training_page

    metrics = run.metrics
    share, faster = metrics["test.f1_kept"]["value"], metrics["test.times_faster"]["value"]
    same = run.manifest.get("teacher", {}).get("held_out_the_same")
    seen = (
        "neither has seen" if same else "it has not seen (the teacher may have: its corpus, split or seed was another)"
    )
    words = "The student's F1 is not defined." if share is None else (
        f"The student keeps {100 * share:.1f} % of the teacher's F1 on patients {seen}, and reads "
        f"{faster:.1f} times as many notes a second."
    )  # fmt: skip
    names = {
        "F1": ("teacher_f1", "student_f1"),
        "notes a second, this machine": ("teacher_notes_per_second", "student_notes_per_second"),
    }
    rows = [[title, *(metrics[f"test.{name}"]["value"] for name in pair)] for title, pair in names.items()]
    tone = "good" if share is not None and share >= 0.95 else "caution"
    return training_page(
        run,
        first=Section("What is lost, what is won", [Notice(words, tone=tone), Table(["", "teacher", "student"], rows)]),
    )
