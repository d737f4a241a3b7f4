"""Probabilities beside gold, of a finished run or a file: one item a decision, with its patient and institution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clinical_nlp.config import load_config
from clinical_nlp.errors import InputError, MissingDataError, UsageError
from clinical_nlp.eval._finished import read_subject
from clinical_nlp.language.terminology.code_status import load_code_book
from clinical_nlp.recipes import coding
from clinical_nlp.reporting.tripod import corpus_record
from clinical_nlp.runs import Run
from clinical_nlp.tasks import ner
from clinical_nlp.tasks.coding import Coder

REQUIRED = ("patient_id", "institution", "probability", "gold")


@dataclass(frozen=True, eq=False)
class Items:
    """Decisions of one set of patients: (n,) probabilities of the outcome, whether it is there, whose they are.

    `units` numbers the note or document that an item is of.
    """

    probability: np.ndarray = field(repr=False)
    gold: np.ndarray = field(repr=False)
    patients: tuple[str, ...] = field(repr=False)
    institutions: tuple[str, ...] = field(repr=False)
    units: np.ndarray = field(repr=False)

    @property
    def logits(self) -> np.ndarray:
        """(n,) log odds; probabilities of exactly 0 or 1 are taken as 1e-6 off."""
        inside = np.clip(self.probability, 1e-6, 1 - 1e-6)
        return np.asarray(np.log(inside) - np.log1p(-inside))

    @property
    def n_units(self) -> int:
        """Notes or documents."""
        return len(np.unique(self.units))

    @property
    def n_patients(self) -> int:
        """Patients."""
        return len(set(self.patients))

    def select(self, mask: np.ndarray) -> Items:
        """Return some of the items."""
        rows = np.flatnonzero(mask).tolist()
        return Items(
            self.probability[mask],
            self.gold[mask],
            tuple(self.patients[row] for row in rows),
            tuple(self.institutions[row] for row in rows),
            self.units[mask],
        )


@dataclass(frozen=True)
class Predicted:
    """What calibrates and what is scored, different patients, and how both came about."""

    calibration: Items
    test: Items
    about: dict[str, Any]
    record: dict[str, Any] = field(default_factory=dict)


def read_file(path: str, *, seed: int) -> Predicted:
    """Read a table of predictions; patients are divided in halves where it has no column `part`.

    Raises
    ------
    MissingDataError : there is no such file.
    InputError : a column is missing or empty, a value does not fit, or a patient is in both parts.
    """
    import pyarrow as pa
    import pyarrow.csv as pc
    import pyarrow.parquet as pq

    file = Path(path)
    if not file.is_file():
        raise MissingDataError(f"predictions {path} does not exist")
    try:
        table = pq.read_table(file) if file.suffix == ".parquet" else pc.read_csv(file)
    except (pa.ArrowInvalid, pa.ArrowKeyError):
        raise InputError(f"predictions {path} cannot be read as CSV or Parquet") from None
    missing = [name for name in REQUIRED if name not in table.column_names]
    if missing:
        raise InputError(f"predictions {path} has no column {missing[0]!r}; it needs {', '.join(REQUIRED)}")
    columns = {name: table[name].to_pylist() for name in table.column_names if name in (*REQUIRED, "part", "note_id")}
    for name in REQUIRED:
        if empty := sum(value is None for value in columns[name]):
            raise InputError(f"predictions {path}: {empty} rows have no {name}")
    if not columns["patient_id"]:
        raise InputError(f"predictions {path} has no rows")
    try:
        probability = np.array([float(value) for value in columns["probability"]])
        gold = np.array([float(value) for value in columns["gold"]])
    except (TypeError, ValueError):
        raise InputError(f"predictions {path}: probability and gold must be numbers") from None
    if wrong := int((~((probability >= 0) & (probability <= 1))).sum()):
        raise InputError(f"predictions {path}: {wrong} probabilities are not between 0 and 1 (or not a number)")
    if wrong := int((~np.isin(gold, (0, 1))).sum()):
        raise InputError(f"predictions {path}: {wrong} values of gold are neither 0 nor 1")
    patients = tuple(str(value) for value in columns["patient_id"])
    notes = columns.get("note_id")
    units = np.arange(len(gold)) if notes is None else np.unique([str(n) for n in notes], return_inverse=True)[1]
    items = Items(probability, gold, patients, tuple(str(value) for value in columns["institution"]), units)
    if "part" in columns:
        parts = np.array([str(value) for value in columns["part"]])
        if other := sorted(set(parts.tolist()) - {"calibration", "test"}):
            raise InputError(f"predictions {path}: part is calibration or test, not {other[0]!r}")
        divided = "as the file says"
    else:
        people = sorted(set(patients))
        order = np.random.default_rng([seed, 29]).permutation(len(people))
        half = {people[at] for at in order[: len(people) // 2]}
        parts = np.array(["calibration" if patient in half else "test" for patient in patients])
        divided = "half of the patients each, at random"
    calibration, test = items.select(parts == "calibration"), items.select(parts == "test")
    if shared := set(calibration.patients) & set(test.patients):
        raise InputError(f"predictions {path}: {len(shared)} patients are in both parts; divide by patient")
    about = {"what": file.name, "item": "a row of the file", "split": divided, "left_out": 0, "model": None}
    return Predicted(calibration, test, about)


def read_run(path: str, *, at_least: float, corpus_path: str | None = None) -> Predicted:
    """Score the development and held-out patients of a finished coding or ner run again.

    Raises
    ------
    UsageError : a run of another recipe.
    """
    recipe = Run.load(path).manifest.get("recipe")
    if recipe == "coding":
        return _coding(CodedRun.load(path, corpus_path), at_least)
    if recipe == "ner":
        return _ner(path, at_least, corpus_path)
    raise UsageError(f"run {path} is of recipe {recipe!r}; calibration judges coding and ner runs, or a file")


@dataclass(frozen=True)
class CodedRun:
    """A finished coding run with its documents and split, made again."""

    path: str
    config: coding.CodingConfig
    data: coding.Coded
    coder: Coder

    @classmethod
    def load(cls, path: str, corpus_path: str | None = None) -> CodedRun:
        """Read run, corpus and split.

        Raises
        ------
        InputError : the corpus holds other notes than the run was trained on.
        """
        finished = Run.load(path)
        if finished.manifest.get("recipe") != "coding":
            raise UsageError(f"run {path} is of recipe {finished.manifest.get('recipe')!r}; name a coding run")
        config = load_config(coding.CONFIG, finished.path / "config.yaml")
        if corpus_path is not None:
            corpus = config.corpus.model_copy(update={"path": corpus_path})
            config = config.model_copy(update={"corpus": corpus})
        codes = config.codes
        data = coding.read(config, load_code_book(codes.system, path=codes.path, releases=codes.releases))
        recorded = (finished.manifest.get("inputs") or {}).get("notes_sha256")
        if recorded and recorded != coding.digest(data.corpus):
            raise InputError(
                f"corpus {data.corpus.card.name!r} holds other notes than run {path} was trained on; give the same "
                "files (--corpus_path), or train again"
            )
        return cls(path, config, data, Coder.load(path))

    def gold(self, rows: Sequence[int]) -> np.ndarray:
        """(documents, codes of the run) bool."""
        codes = self.coder.task.codes
        return np.array([[code in self.data.codes[row] for code in codes] for row in rows], dtype=bool)

    def record(self) -> dict[str, Any]:
        """Collect what a reader needs to judge an evaluation of the run; see `reporting.tripod`."""
        documents = {"train": self.data.train, "development": self.data.development, "test": self.data.held_out}
        parts = {name: [note for row in rows for note in self.data.notes[row]] for name, rows in documents.items()}
        return corpus_record(self.data.corpus, parts, judged=self.path)

    def texts(self, rows: Sequence[int]) -> list[list[str]]:
        """Return the notes of documents."""
        return [self.data.texts(row) for row in rows]


def _coding(run: CodedRun, at_least: float) -> Predicted:
    parts, left_out = [], 0
    for rows in (run.data.development, run.data.held_out):
        probability = run.coder.calibration(run.coder.logits(run.texts(rows)))
        items, dropped = coded_items(run, rows, probability, at_least)
        left_out += dropped
        parts.append(items)
    about: dict[str, Any] = {"what": run.path, "item": "a code of a document", "split": run.data.split.describe()}
    about["left_out_there"] = int(run.gold(run.data.held_out).sum() - parts[1].gold.sum())
    model = "probabilities as the run gives them (Platt scaling on the same development patients)"
    about |= {"left_out": left_out, "model": model}
    return Predicted(parts[0], parts[1], about, run.record())


def coded_items(run: CodedRun, rows: Sequence[int], probability: np.ndarray, at_least: float) -> tuple[Items, int]:
    """Return codes of documents with at least that probability, and how many others there are."""
    document, code = np.nonzero(probability >= at_least)
    gold = run.gold(rows)
    items = Items(
        probability[document, code].astype(np.float64),
        gold[document, code].astype(np.float64),
        tuple(run.data.patients[rows[at]] for at in document.tolist()),
        tuple(run.data.names[rows[at]][0] for at in document.tolist()),
        document,
    )
    return items, int(probability.size - len(document))


def _ner(path: str, at_least: float, corpus_path: str | None) -> Predicted:
    subject = read_subject(path, corpus_path)
    predictor = ner.NerPredictor.load(subject.run.path)
    institutions = subject.corpus.notes["institution"].to_pylist()
    outside = predictor.task.tags.index("O")
    parts, left_out = [], 0
    for rows in (subject.split.development, subject.split.test):
        found = predictor.tags([subject.texts[row] for row in rows])
        values, gold, patients, places, units = [], [], [], [], []
        there = 0
        for row, (encoded, scores) in zip(rows.tolist(), found, strict=True):
            chance = 1 - np.exp(scores[:, outside].astype(np.float64))
            spans = [span for span in subject.gold[row] if span[2] in subject.labels]
            inside = np.array([any(a < end and start < b for start, end, _ in spans) for a, b in encoded.word_spans])
            kept = np.flatnonzero(chance >= at_least)
            left_out += len(chance) - len(kept)
            values.append(np.clip(chance[kept], 0, 1))
            gold.append(inside[kept].astype(np.float64) if len(inside) else np.zeros(0))
            patients += [subject.patients[row]] * len(kept)
            places += [institutions[row]] * len(kept)
            units.append(np.full(len(kept), row))
            there += int(inside.sum() - inside[kept].sum()) if len(inside) else 0
        joined = [np.concatenate(each) if each else np.zeros(0) for each in (values, gold, units)]
        parts.append(Items(joined[0], joined[1], tuple(patients), tuple(places), joined[2]))
    about: dict[str, Any] = {"what": path, "item": "a word, inside an entity or not", "split": subject.split.describe()}
    about |= {"left_out": left_out, "left_out_there": there, "model": "probabilities as the run gives them"}
    return Predicted(parts[0], parts[1], about, subject.record())


@contextmanager
def dropout_on(model: Any) -> Iterator[int]:
    """Keep dropout at work in evaluation while the block runs; yields how many layers drop anything.

    Decoders such as Llama have none of their own; an adapter trained with `strategy.dropout` brings some.
    """
    import torch

    layers = [one for one in model.modules() if isinstance(one, torch.nn.Dropout) and one.p > 0]

    def awake(layer: Any, _: Any) -> None:
        layer.training = True

    hooks = [layer.register_forward_pre_hook(awake) for layer in layers]
    try:
        yield len(layers)
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            layer.training = False


def dropout_probabilities(run: CodedRun, rows: Sequence[int], *, samples: int, seed: int) -> np.ndarray:
    """(samples, documents, codes) probabilities of passes with dropout on.

    Raises
    ------
    UsageError : nothing in the model drops.

    References
    ----------
    Gal and Ghahramani 2016, Dropout as a Bayesian Approximation, ICML.
    """
    import torch

    with dropout_on(run.coder.model) as layers, torch.random.fork_rng():
        if not layers:
            raise UsageError(
                f"run {run.path} has no dropout to sample from; train with strategy.dropout above 0, or leave "
                "dropout_samples at 0"
            )
        torch.manual_seed(seed)
        texts = run.texts(rows)
        return np.stack([run.coder.calibration(run.coder.logits(texts)) for _ in range(samples)])
