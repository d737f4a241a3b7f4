"""Does a model hold at the next hospital, and does any invariance objective help? With every control beside it.

Notes are classified by whether their encounter has a code. Models stand on frozen features, so that the dozens of
trainings that a claim needs (seeds, penalty weights, left-out institutions) take minutes. With `fine_tuning.base_model`
a base model is fine-tuned by every method too, on the same patients, with the same tests: hours instead of minutes.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from clinical_nlp.config import Config, CorpusConfig
from clinical_nlp.corpora.synthetic_hospitals import MARKERS
from clinical_nlp.errors import ClinicalNlpError, ConfigError, InputError, RunError, TooFewPatientsError
from clinical_nlp.eval._discrimination import FEWEST_SEEDS, Panel, methods_differ
from clinical_nlp.eval._feature_training import (
    Classifier,
    FeatureConfig,
    Notes,
    TermFeatures,
    agreed_labels,
    align_discriminatively,
    minimise_discrepancy,
    self_train,
    train_classifier,
)
from clinical_nlp.eval._fine_tuning import Asked, FineTuner, FineTuningConfig, Texts
from clinical_nlp.invariance.objectives import NEEDS, ObjectiveConfig
from clinical_nlp.models.embeddings import embed_notes
from clinical_nlp.notes.corpus import Corpus, load_corpus
from clinical_nlp.progress import progress, say
from clinical_nlp.reporting.tripod import SMALLEST_CELL, corpus_record, tripod_section
from clinical_nlp.runs import Estimate, Run, write_atomic, write_json
from clinical_nlp.statistics.permutation import holm

VERSION = 1
LEVEL = 0.05


class CodeConfig(Config):
    """What is told of a note: whether its encounter (or the note itself) has a code."""

    system: str = "ICD-10-CM"
    """Code system, as the corpus names it."""
    code: str = Field(default="I50.9", min_length=1)
    """The code; codes that begin with it count too."""


class CrossInstitutionConfig(Config):
    """Train on some institutions, score on another, with every control and an honest test of each objective."""

    version: int = VERSION
    """Of this suite's protocol; another version is not comparable."""
    corpus: CorpusConfig = CorpusConfig(
        options={"institutions": 4, "patients": 200, "notes_per_patient": [2, 4], "spurious": [0.98, 0.9, 0.7, 0.1]}
    )
    """Notes with codes and two institutions or more. By default synthetic ones whose closing line goes with the code,
    less so in the last institution."""
    label: CodeConfig = CodeConfig()
    """What is told of a note."""
    targets: list[str] = Field(default_factory=list)
    """Institutions that are held out, one after the other; default each."""
    features: FeatureConfig = FeatureConfig()
    """Frozen features and the training on them."""
    objectives: list[Asked] = Field(default=["dann", "cdan", "mmd", "coral", "irm", "vrex", "group_dro"])
    """Objectives to compare with erm."""
    weights: list[float] = Field(default=[0.1, 1.0, 10.0], min_length=1)
    """Penalty weights to choose from, in multiples of the objective's default."""
    selection: Literal["leave_one_out", "source_validation"] = "leave_one_out"
    """How a weight, and the objective of the row `chosen`, are chosen, on training patients of source institutions
    alone: by the score at a source institution that is left out (needs three), or on held-out source patients."""
    few_labels: list[int] = Field(default=[10, 25])
    """Target patients with labels in the tier `few labels`."""
    mask: list[str] = Field(default=list(MARKERS))
    """Sentences that are taken out of every note for the row `style_masked`, whatever their case: the known ceiling
    where style that goes with the label is just these."""
    test: float = Field(default=0.4, gt=0, lt=1)
    """Share of each institution's patients that are only scored on."""
    n_seeds: int = Field(default=FEWEST_SEEDS, ge=1)
    """Trainings of each method; fewer than six support no claim about methods."""
    fine_tuning: FineTuningConfig = FineTuningConfig()
    """The same table with a base model fine-tuned, once `fine_tuning.base_model` names one."""
    temporal_share: float = Field(default=0.6, gt=0, lt=1)
    """Temporal: share of the patients, by their first note, that are early."""
    n_resamples: int = Field(default=1000, ge=200)
    """Bootstrap samples of patients (and of seeds)."""
    n_permutations: int = Field(default=999, ge=99)
    """Paired permutations of two trained models."""
    seed: int = 0
    """Of the split, the trainings and the resampling."""


CONFIG = CrossInstitutionConfig


def run(config: CrossInstitutionConfig, output: Path, *, resume: bool = False) -> Run:
    """Measure the matrix, each held-out institution, and time; write `results.json` and the page."""
    if len(set(config.objectives)) < len(config.objectives):
        raise ConfigError("config key 'objectives': each can be there once")
    if config.version != VERSION:
        raise ConfigError(f"config key 'version': this is version {VERSION} of the suite (got {config.version})")
    with Run.open(output, config, recipe="cross_institution", resume=resume) as run:
        corpus = load_corpus(config.corpus.name, config.corpus.path, **config.corpus.options)
        bench = Bench(config, read_notes(corpus, config))
        unknown = [name for name in config.targets if name not in bench.names]
        if unknown:
            raise ConfigError(
                f"config key 'targets': the corpus has no institution {unknown[0]!r}; it has {', '.join(bench.names)}"
            )
        book = Book()
        targets = config.targets or list(bench.names)
        tuner = None
        if config.fine_tuning.base_model is not None:
            tuner = FineTuner(config.fine_tuning, run.path / "fine_tuned", resume=resume)
        matrix(bench, book)
        tables = [held_out(bench, book, target, tuner) for target in targets]
        temporal(bench, book)
        run.record(book.estimates)
        results = {
            "version": VERSION,
            "corpus": {"name": corpus.card.name, "institution_means": corpus.card.institution_means},
            "label": config.label.model_dump(),
            "flow": bench.flow(),
            "protocol": {
                "metric": "AUC, every patient weighing 1",
                "evaluation": "each held-out institution in turn; its test patients are the same in every row",
                "selection": bench.selection,
                "selection_reason": bench.selection_reason,
                "seeds": config.n_seeds,
                "features": config.features.model_dump(),
                "weights": config.weights,
                "level": LEVEL,
                "control": "erm against erm with other seeds",
                "multiplicity": "Holm over the rows of each held-out institution",
                "fine_tuning": None if tuner is None else tuner.protocol,
            },
            "numbers": book.numbers,
            "missing": book.missing,
            "targets": tables,
            "record": _record(corpus, bench, tuner),
        }
        write_json(run.path / "results.json", results)
        run.note(inputs={"corpus": corpus.card.name, "n_notes": corpus.notes.num_rows}, trainings=bench.n_trainings)
        if tuner is not None:
            run.note(fine_tunings=tuner.n_trainings)
    write_atomic(run.path / "report.html", report(run))
    return run


def report(run: Run) -> str:
    """Render the page from `results.json`."""
    from clinical_nlp.reporting.cross_institution_page import cross_institution_page

    results = json.loads((run.path / "results.json").read_text("utf-8"))
    return cross_institution_page(results, tripod_section(run, results))


def _record(corpus: Corpus, bench: Bench, tuner: FineTuner | None) -> dict[str, Any]:
    rows, encoder = np.array(bench.data.rows), bench.config.features.encoder
    model = bench.config.fine_tuning.base_model if tuner is not None else None if encoder == "tfidf" else encoder
    parts = {"training": rows[~bench.scored], "scored": rows[bench.scored]}
    return corpus_record(corpus, parts, judged=model, trained="training") | {
        "thresholds": ["none: an AUC ranks notes; decisions of a finished run are judged by the suite calibration"]
    }


@dataclass
class Book:
    """Every number with its protocol, split and selection; and what has none, with the reason."""

    estimates: dict[str, Estimate] = field(default_factory=dict)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, estimate: Estimate, protocol: str, *, split: str, selection: str = "none") -> None:
        """Enter a number."""
        self.estimates[name] = estimate
        self.numbers[name] = asdict(estimate) | {"protocol": protocol, "split": split, "selection": selection}


# Notes, labels, and who is scored on ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Labelled:
    """Notes with their label: whether the encounter has the code."""

    texts: list[str]
    institution: np.ndarray
    patient: np.ndarray
    label: np.ndarray
    written: list[Any]
    left_out: int
    rows: list[int] = field(default_factory=list)


def read_notes(corpus: Corpus, config: CrossInstitutionConfig) -> Labelled:
    """Label each note by its encounter's codes, or its own where codes belong to notes.

    Raises
    ------
    InputError : no codes of the system, or one label only.
    TooFewPatientsError : fewer than two institutions.
    """
    rows = [] if corpus.codes is None else corpus.codes.to_pylist()
    rows = [row for row in rows if row["system"] == config.label.system]
    if not rows:
        raise InputError(
            f"corpus {corpus.card.name!r} has no codes of system {config.label.system!r} to tell of a note"
        )
    by_note = all(row["note_id"] is not None for row in rows)
    level = "note_id" if by_note else "encounter_id"
    coded = {(row["institution"], row[level]) for row in rows if row["code"].startswith(config.label.code)}
    names = ["institution", "patient_id", "note_id", "encounter_id", "written_at", "text"]
    columns = {name: corpus.notes[name].to_pylist() for name in names}
    keys = list(zip(columns["institution"], columns[level], strict=True))
    kept = [place for place, key in enumerate(keys) if key[1] is not None]
    label = np.array([keys[place] in coded for place in kept], dtype=np.int64)
    if not len(label) or label.min() == label.max():
        raise InputError(
            f"corpus {corpus.card.name!r}: {int(label.sum())} of {len(label)} notes have code {config.label.code!r}; "
            "name one that some have and some have not (label.code)"
        )
    institution = np.array([columns["institution"][place] for place in kept])
    if len(set(institution)) < 2:
        raise TooFewPatientsError(
            f"corpus {corpus.card.name!r} has one institution ({institution[0]}); this suite compares two or more"
        )
    patient = np.array([f"{columns['institution'][place]}\t{columns['patient_id'][place]}" for place in kept])
    people: dict[str, set[str]] = {}
    for place in kept:
        people.setdefault(columns["patient_id"][place], set()).add(columns["institution"][place])
    if both := sum(len(where) > 1 for where in people.values()):
        raise InputError(
            f"{both} patients have notes in two institutions, and would be trained on here and scored on there; give "
            "each patient one institution"
        )
    texts = [columns["text"][place] for place in kept]
    written = [columns["written_at"][place] for place in kept]
    return Labelled(texts, institution, patient, label, written, len(keys) - len(kept), kept)


class Bench:
    """The notes, their split, features by what they were fitted on, and trainings, each made once."""

    def __init__(self, config: CrossInstitutionConfig, data: Labelled) -> None:
        self.config, self.data = config, data
        self.names = tuple(sorted(set(data.institution.tolist())))
        random = np.random.default_rng(config.seed)
        self.scored = np.zeros(len(data.patient), dtype=bool)
        for name in self.names:
            people = np.unique(data.patient[data.institution == name])
            if len(people) < 2:
                raise TooFewPatientsError(
                    f"institution {name!r} has one patient, who cannot be both trained and scored on; leave it out"
                )
            size = min(len(people) - 1, max(1, round(config.test * len(people))))
            self.scored |= np.isin(data.patient, random.permutation(people)[:size])
        self.n_trainings = 0
        self._features: dict[tuple[bytes, bool], np.ndarray] = {}
        self._masked = [_without(text, config.mask) for text in data.texts]
        self.selection, self.selection_reason = config.selection, ""
        if len(self.names) < 4 and config.selection == "leave_one_out":
            self.selection = "source_validation"
            self.selection_reason = (
                f"leave_one_out needs three source institutions to leave one of out (there are {len(self.names) - 1})"
            )

    def flow(self) -> list[dict[str, Any]]:
        """Count patients, notes and labels of each institution and part."""
        data = self.data
        found = []
        for name, scored in itertools.product(self.names, (False, True)):
            rows = (data.institution == name) & (self.scored == scored)
            people = len(np.unique(data.patient[rows]))
            dates = sorted(when for when, chosen in zip(data.written, rows, strict=True) if chosen and when)
            dates = dates if people >= SMALLEST_CELL else []  # the date of one of a few is theirs
            found.append(
                {
                    "institution": name,
                    "part": "scored on" if scored else "trained on",
                    "n_patients": people,
                    "n_notes": int(rows.sum()),
                    "n_with_label": int(data.label[rows].sum()),
                    "first": f"{dates[0]:%Y-%m}" if dates else None,
                    "last": f"{dates[-1]:%Y-%m}" if dates else None,
                }
            )
        return found

    def rows(self, institutions: Sequence[str], *, scored: bool) -> np.ndarray:
        """Return the rows of some institutions, of patients that are scored on or trained on."""
        return np.flatnonzero(np.isin(self.data.institution, list(institutions)) & (self.scored == scored))

    def notes(self, rows: np.ndarray, *, fitted_on: np.ndarray, masked: bool = False) -> Notes:
        """Return vectors of some notes; terms, means and spreads are those of the notes that are trained on."""
        vectors = self._vectors(fitted_on, masked)
        data = self.data
        return Notes(vectors[rows], data.institution[rows], data.patient[rows], data.label[rows])

    def _vectors(self, fitted_on: np.ndarray, masked: bool) -> np.ndarray:
        texts, features = (self._masked if masked else self.data.texts), self.config.features
        key = (fitted_on.tobytes(), masked)
        if key not in self._features and features.encoder == "tfidf":
            self._features[key] = TermFeatures([texts[row] for row in fitted_on], features.components)(texts)
        elif key not in self._features:
            if (b"", masked) not in self._features:
                self._features[b"", masked] = embed_notes(features.encoder, texts)
            states = self._features[b"", masked]
            mean, spread = states[fitted_on].mean(0), np.maximum(states[fitted_on].std(0), 1e-6)
            self._features[key] = ((states - mean) / spread).astype(np.float32)
        return self._features[key]

    def train(self, notes: Notes, test: Notes, seed: int, **options: Any) -> np.ndarray:
        """Train once and return the scores of test notes."""
        self.n_trainings += 1
        return train_classifier(notes, self.config.features, seed=seed, **options).score(test)

    def texts(self, rows: np.ndarray, *, masked: bool = False) -> Texts:
        """Return some notes as they are read by a base model."""
        data, texts = self.data, (self._masked if masked else self.data.texts)
        given = [texts[row] for row in rows.tolist()]
        return Texts(given, data.institution[rows], data.patient[rows], data.label[rows])

    def some_patients(self, rows: np.ndarray, size: int, seed: int) -> np.ndarray:
        """Return the rows of `size` random patients of some rows."""
        people = np.unique(self.data.patient[rows])
        chosen = np.random.default_rng((self.config.seed, seed)).permutation(people)[:size]
        return rows[np.isin(self.data.patient[rows], chosen)]

    def panel(self, rows: np.ndarray) -> Panel:
        """Return the test notes with their resamples."""
        return Panel(self.data.label[rows], self.data.patient[rows], self.config.n_resamples, self.config.seed)


def _without(text: str, sentences: Sequence[str]) -> str:
    for sentence in sentences:
        text = re.sub(re.escape(sentence), "", text, flags=re.IGNORECASE)
    return text


# In-domain and cross: every institution on every other ----------------------------------------------------------------


def matrix(bench: Bench, book: Book) -> None:
    """Train on one institution, score on each, all with as many training patients; source drop and target drop."""
    config, data = bench.config, bench.data
    train = {name: bench.rows([name], scored=False) for name in bench.names}
    size = min(len(np.unique(data.patient[rows])) for rows in train.values())
    protocol = f"erm, {size} training patients of each institution, mean over {config.n_seeds} seeds"
    found: dict[tuple[str, str], np.ndarray] = {}
    panels = {name: bench.panel(bench.rows([name], scored=True)) for name in bench.names}
    with progress("matrix", len(bench.names), unit="institutions") as bar:
        for number, source in enumerate(bench.names):
            rows = bench.some_patients(train[source], size, number)
            try:
                notes = bench.notes(rows, fitted_on=rows)
                scores = {name: [] for name in bench.names}  # type: dict[str, list[np.ndarray]]
                for seed in range(config.n_seeds):
                    model = train_classifier(notes, config.features, seed=_seed(config, "matrix", seed))
                    bench.n_trainings += 1
                    for name in bench.names:
                        test = bench.notes(bench.rows([name], scored=True), fitted_on=rows)
                        scores[name].append(model.score(test))
            except TooFewPatientsError as error:
                book.missing[f"matrix.{source}"] = str(error)
                continue
            for place, name in enumerate(bench.names):
                values = panels[name].over_seeds(panels[name].aucs(scores[name]), salt=100 * number + place)
                found[source, name] = values
                split = f"trained on {source}, scored on {name}"
                book.add(f"matrix.{source}.{name}", panels[name].estimate(values, part="test"), protocol, split=split)
            bar.advance(1)
    for source, target in itertools.permutations(bench.names, 2):
        split = f"trained on {source}, scored on {target}"
        if (source, target) in found and (target, target) in found:
            drop = panels[target].estimate(found[target, target] - found[source, target], part="test")
            book.add(
                f"target_drop.{source}.{target}", drop, f"{protocol}; in-domain at {target} minus cross", split=split
            )
        if (source, target) in found and (source, source) in found:
            # The two are scored on different patients: resamples are drawn apart and subtracted.
            values = found[source, source] - found[source, target]
            drop = panels[target].estimate(values, part="test of both")
            book.add(f"source_drop.{source}.{target}", drop, f"{protocol}; at {source} minus at {target}", split=split)


def _seed(config: CrossInstitutionConfig, method: str, seed: int) -> int:
    """Return a seed of its own for each method and training: methods share no draw that would pair them."""
    import zlib

    return (zlib.crc32(f"{config.seed} {method} {seed}".encode()) & 0x7FFFFFFF) or 1


# One institution held out ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One row of the table: `train` maps a seed to the scores of the test notes.

    `tier` says what it sees of the target, `contrast` whether it enters the tests against erm.
    """

    name: str
    tier: str
    train: Callable[[int], np.ndarray]
    selection: str = "none"
    contrast: bool = True


def held_out(bench: Bench, book: Book, target: str, tuner: FineTuner | None = None) -> dict[str, Any]:
    """Compare every method at one held-out institution; returns its table for the page.

    With a tuner the methods are compared a second time, fine-tuned, on the same test patients.
    """
    data = bench.data
    sources = [name for name in bench.names if name != target]
    train, adapt = bench.rows(sources, scored=False), bench.rows([target], scored=False)
    tested = bench.rows([target], scored=True)
    prefix = f"held_out.{target}"
    choices = choose_weights(bench, book, sources, prefix)
    methods = list_methods(bench, train, adapt, tested, choices)
    scores = score_methods(bench, book, methods, target)
    panel = bench.panel(tested)
    split = f"trained on {', '.join(sources)}; scored on test patients of {target}"
    rows, values = compare_methods(bench, book, methods, scores, panel, prefix=prefix, split=split)
    _drops(bench, book, panel, values, train, sources, target)
    return {
        "target": target,
        "sources": sources,
        "n_patients": panel.n_patients,
        "n_notes": len(tested),
        "n_training_patients": len(np.unique(data.patient[train])),
        "n_adaptation_patients": len(np.unique(data.patient[adapt])),
        "chosen": choices.objective,
        "weights": choices.weights,
        "rows": rows,
        "fine_tuned": None if tuner is None else fine_tuned(bench, book, tuner, choices, target),
    }


def score_methods(
    bench: Bench,
    book: Book,
    methods: Sequence[Method],
    target: str,
    *,
    prefix: str = "",
    n_seeds: int | None = None,
) -> dict[str, list[np.ndarray]]:
    """Train every method with every seed; name -> scores of the test notes, one array a seed.

    A method that cannot be trained is left out, with the reason in the book.
    """
    prefix, n_seeds = prefix or f"held_out.{target}", n_seeds or bench.config.n_seeds
    scores: dict[str, list[np.ndarray]] = {}
    with progress(prefix, len(methods) * n_seeds, unit="trainings") as bar:
        for method in methods:
            try:
                found = []
                for seed in range(n_seeds):
                    found.append(method.train(_seed(bench.config, f"{target} {method.name}", seed)))
                    bar.advance(1)
                scores[method.name] = found
            except RunError:  # it was stopped, or a folder is not ours
                raise
            except ClinicalNlpError as error:
                if method.name == "erm":  # nothing can be compared without it
                    raise
                book.missing[f"{prefix}.{method.name}"] = str(error)
    return scores


@dataclass(frozen=True)
class Choices:
    """Penalty weights and the objective that source patients chose; `scores` by (objective, weight)."""

    weights: Mapping[str, float]
    objective: str
    scores: Mapping[tuple[str, float], float]


def choose_weights(bench: Bench, book: Book, sources: Sequence[str], prefix: str) -> Choices:
    """Choose each objective's weight, and the best objective (erm among them), on training patients of the sources."""
    config, data = bench.config, bench.data
    train = bench.rows(sources, scored=False)
    folds: list[tuple[np.ndarray, np.ndarray]] = []
    if bench.selection == "leave_one_out":
        for name in sources:
            out = data.institution[train] == name
            folds.append((train[~out], train[out]))
    else:
        people = np.random.default_rng((config.seed, 5)).permutation(np.unique(data.patient[train]))
        out = np.isin(data.patient[train], people[: max(1, len(people) // 4)])
        folds.append((train[~out], train[out]))
    candidates: list[tuple[str, float]] = [("erm", 0.0)]
    if len(sources) > 1:
        candidates += list(itertools.product(config.objectives, config.weights))
    found: dict[tuple[str, float], float] = {}
    with progress("selection", len(candidates) * len(folds), unit="trainings") as bar:
        for name, weight in candidates:
            each = []
            for place, (rows, out) in enumerate(folds):
                notes, test = bench.notes(rows, fitted_on=rows), bench.notes(out, fitted_on=rows)
                seed = _seed(config, f"selection {name} {weight}", place)
                try:
                    scores = bench.train(notes, test, seed, objective=objective_of(name, weight))
                except TooFewPatientsError:
                    continue
                finally:
                    bar.advance(1)
                each.append(float(bench.panel(out).aucs([scores])[0, 0]))
            found[name, weight] = float(np.mean(each)) if each and np.isfinite(each).all() else math.nan
    weights: dict[str, float] = {}
    for name in config.objectives:
        mine = {
            weight: found[key] for key in found if key[0] == name and math.isfinite(found[key]) for weight in key[1:]
        }
        if mine:
            weights[name] = max(mine, key=mine.__getitem__)
        else:
            book.missing[f"{prefix}.{name}"] = f"no weight could be chosen: {len(sources)} source institution(s)"
    best = max((key for key in found if math.isfinite(found[key])), key=found.__getitem__, default=("erm", 0.0))
    say(f"{prefix}: chosen on source patients ({bench.selection}): {best[0]}")
    return Choices(weights, best[0], found)


def objective_of(name: str, weight: float) -> ObjectiveConfig | None:
    """Return an objective at a multiple of its default weight; None for erm."""
    if name == "erm":
        return None
    plain = ObjectiveConfig.model_validate({"name": name})
    return plain.model_copy(update={"weight": plain.strength * weight})


def list_methods(
    bench: Bench, train: np.ndarray, adapt: np.ndarray, tested: np.ndarray, choices: Choices
) -> list[Method]:
    """List the rows of the table, references first."""
    config, data = bench.config, bench.data
    notes, test = bench.notes(train, fitted_on=train), bench.notes(tested, fitted_on=train)
    target = bench.notes(adapt, fitted_on=train)
    size = min(len(np.unique(data.patient[rows])) for rows in (train, adapt))
    own = bench.some_patients(adapt, size, 1)
    matched = bench.some_patients(train, size, 2)

    def erm(seed: int) -> np.ndarray:
        return bench.train(notes, test, seed)

    def on(rows: np.ndarray, *, masked: bool = False) -> Callable[[int], np.ndarray]:
        def trained(seed: int) -> np.ndarray:
            given = bench.notes(rows, fitted_on=rows, masked=masked)
            return bench.train(given, bench.notes(tested, fitted_on=rows, masked=masked), seed)

        return trained

    def with_token(given: Notes) -> Callable[[int], np.ndarray]:
        return lambda seed: bench.train(given, test, seed, token=True)

    def adapted(adapts: Callable[..., Classifier]) -> Callable[[int], np.ndarray]:
        return lambda seed: adapts(notes, target, config.features, seed=seed).score(test)

    def aligned(name: str, both: Notes) -> Callable[[int], np.ndarray]:
        objective = objective_of(name, choices.weights[name])
        return lambda seed: bench.train(both, test, seed, objective=objective)

    nothing, unlabelled = "no target data", "unlabelled target"
    criterion = f"weight by {bench.selection} on source patients"
    rows = [
        Method("erm", nothing, erm, contrast=False),
        Method("erm_reseeded", "control", erm, contrast=False),
        Method("constant", "control", lambda seed: np.zeros(len(tested)), contrast=False),
        Method("erm_size_matched", "reference", on(matched), contrast=False),
        Method("in_domain", "reference", on(own), contrast=False),
        Method("style_masked", "reference", on(train, masked=True)),
        Method("lp_ft", nothing, lambda seed: bench.train(notes, test, seed, strategy="lp_ft")),
        Method("institution_token", nothing, with_token(notes)),
    ]
    rows += [Method(name, nothing, aligned(name, notes), criterion) for name in choices.weights]
    if choices.objective in choices.weights:
        rows.append(Method("chosen", nothing, aligned(choices.objective, notes), f"objective and {criterion}"))
    elif choices.objective == "erm":
        rows.append(Method("chosen", nothing, erm, f"objective and {criterion}"))
    both = notes.and_also(target.without_labels())
    rows += [
        Method(f"{name}_target", unlabelled, aligned(name, both), criterion)
        for name in choices.weights
        if NEEDS[name].target
    ]
    for name, adapts in (
        ("adda", align_discriminatively),
        ("mcd", minimise_discrepancy),
        ("self_training", self_train),
    ):
        rows.append(Method(name, unlabelled, adapted(adapts)))
    for count in config.few_labels:
        some = bench.notes(bench.some_patients(adapt, count, 3), fitted_on=train)
        rows.append(Method(f"few_labels_{count}", "few target labels", with_token(notes.and_also(some))))
    return rows


def compare_methods(
    bench: Bench,
    book: Book,
    methods: Sequence[Method],
    scores: Mapping[str, list[np.ndarray]],
    panel: Panel,
    *,
    prefix: str,
    split: str,
    n_seeds: int | None = None,
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Enter scores, contrasts with erm and recoveries.

    Returns
    -------
    What the page shows of each row; and the AUC of each method with its resamples.
    """
    config = bench.config
    aucs = {name: panel.aucs(found) for name, found in scores.items()}
    values = {name: panel.over_seeds(found, salt=place) for place, (name, found) in enumerate(aucs.items())}
    there = [method for method in methods if method.name in scores]
    tested = [method.name for method in there if method.contrast]
    raw = {
        name: methods_differ(aucs["erm"][:, 0].tolist(), aucs[name][:, 0].tolist())
        for name in [*tested, "erm_reseeded"]
    }
    adjusted = dict(zip(tested, holm([raw[name][0] for name in tested]), strict=True))
    drop = panel.estimate(values["in_domain"] - values["erm"], part="test") if "in_domain" in values else None
    rows = []
    for method in there:
        name = method.name
        protocol = f"{method.tier}; mean over {n_seeds or config.n_seeds} seeds, patients and seeds resampled"
        common = {"split": split, "selection": method.selection}
        book.add(f"{prefix}.{name}", panel.estimate(values[name], part="test"), protocol, **common)
        row: dict[str, Any] = {"name": name, "tier": method.tier, "selection": method.selection}
        if name != "erm":
            contrast = panel.estimate(values[name] - values["erm"], part="test")
            book.add(f"{prefix}.{name}.minus_erm", contrast, f"{protocol}; minus erm", **common)
            book.add(
                f"{prefix}.{name}.recovery", _recovery(panel, values, name, drop), f"{protocol}; recovery", **common
            )
        if name in raw:
            p_value, reason = raw[name]
            row |= {"p_seeds": p_value, "p_holm": adjusted.get(name, math.nan), "reason": reason}
            row["p_models"] = panel.models_differ(
                scores["erm"][0], scores[name][0], n_permutations=config.n_permutations
            )
            row["verdict"] = _verdict(contrast, adjusted.get(name, p_value), reason)
        rows.append(row)
    return rows, values


def _verdict(contrast: Estimate, p_value: float, reason: str) -> str:
    """Say what is shown: the sign needs both the seeds and the patients behind it."""
    if reason:
        return "no claim: " + reason
    if p_value <= LEVEL and contrast.low > 0:
        return "higher"
    if p_value <= LEVEL and contrast.high < 0:
        return "lower"
    return "not shown"


def _recovery(panel: Panel, values: Mapping[str, np.ndarray], name: str, drop: Estimate | None) -> Estimate:
    """Share of the target drop that a method wins back: (method - erm) / (in-domain - erm)."""
    none = Estimate(math.nan, math.nan, math.nan, panel.n_patients, len(panel.label), "test")
    if drop is None:
        return replace(none, note="there is no in-domain model to compare with")
    if not drop.low > 0:
        return replace(none, note="no target drop is shown, so there is nothing to recover")
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (values[name] - values["erm"]) / (values["in_domain"] - values["erm"])
    return panel.estimate(share, part="test")


# The same with a base model fine-tuned --------------------------------------------------------------------------------


def fine_tuned(bench: Bench, book: Book, tuner: FineTuner, choices: Choices, target: str) -> dict[str, Any]:
    """Compare every method that fine-tuning has, on the same test patients; returns its table for the page."""
    prefix, n_seeds = f"fine_tuned.{target}", tuner.config.n_seeds
    sources = [name for name in bench.names if name != target]
    tested, home = bench.rows([target], scored=True), bench.rows(sources, scored=True)
    at_home: list[np.ndarray] = []
    methods = list_fine_tunings(bench, book, tuner, choices, target, at_home)
    say(f"{prefix}: {len(methods)} methods of {n_seeds} trainings each, {tuner.config.base_model}")
    scores = score_methods(bench, book, methods, target, prefix=prefix, n_seeds=n_seeds)
    panel, own = bench.panel(tested), bench.panel(home)
    split = f"fine-tuned on {', '.join(sources)}; scored on test patients of {target}"
    rows, values = compare_methods(bench, book, methods, scores, panel, prefix=prefix, split=split, n_seeds=n_seeds)
    _enter_drops(
        book, panel, own, values, own.over_seeds(own.aucs(at_home), salt=999), sources, target, prefix, n_seeds
    )
    return {"base_model": tuner.config.base_model, "strategy": tuner.config.strategy.name, "rows": rows}


def list_fine_tunings(
    bench: Bench, book: Book, tuner: FineTuner, choices: Choices, target: str, at_home: list[np.ndarray]
) -> list[Method]:
    """List the rows of the fine-tuned table; erm also scores the test patients of the sources, into `at_home`."""
    config, data = bench.config, bench.data
    sources = [name for name in bench.names if name != target]
    train, adapt = bench.rows(sources, scored=False), bench.rows([target], scored=False)
    tested, home = bench.rows([target], scored=True), bench.rows(sources, scored=True)
    notes, test, there = bench.texts(train), bench.texts(tested), bench.texts(adapt)
    size = min(len(np.unique(data.patient[rows])) for rows in (train, adapt))
    own, matched = bench.some_patients(adapt, size, 1), bench.some_patients(train, size, 2)

    def tuned(name: str, given: Texts, asked: Texts = test, **options: Any) -> Callable[[int], np.ndarray]:
        return lambda seed: tuner.scores(f"{target}.{name}", seed, given, asked, **options)

    def erm(seed: int) -> np.ndarray:
        found = tuner.scores(f"{target}.erm", seed, notes, bench.texts(np.concatenate([tested, home])))
        at_home.append(found[len(tested) :])
        return found[: len(tested)]

    def self_trained(seed: int) -> np.ndarray:
        # Two teachers of seeds of their own; they see the notes of the target without labels.
        first, second = (
            tuner.scores(f"{target}.teacher", seed + place, notes, there.without_labels()) for place in (1, 2)
        )
        taught = there.with_labels(agreed_labels(first, second))
        return tuner.scores(f"{target}.self_training", seed, notes.and_also(taught), test)

    nothing, unlabelled = "no target data", "unlabelled target"
    criterion = f"weight by {bench.selection} on source patients, on frozen features"
    masked = bench.texts(train, masked=True), bench.texts(tested, masked=True)
    head_first = tuner.config.strategy.model_copy(update={"name": "lp_ft"})
    rows = [
        Method("erm", nothing, erm, contrast=False),
        Method("erm_reseeded", "control", tuned("erm_reseeded", notes), contrast=False),
        Method("constant", "control", lambda seed: np.zeros(len(tested)), contrast=False),
        Method("erm_size_matched", "reference", tuned("erm_size_matched", bench.texts(matched)), contrast=False),
        Method("in_domain", "reference", tuned("in_domain", bench.texts(own)), contrast=False),
        Method("style_masked", "reference", tuned("style_masked", *masked)),
        Method("lp_ft", nothing, tuned("lp_ft", notes, strategy=head_first)),
        Method("institution_token", nothing, tuned("institution_token", notes, token=True)),
    ]
    asked = config.objectives if tuner.config.objectives is None else tuner.config.objectives
    both = notes.and_also(there.without_labels())
    for name in asked:
        if len(sources) < 2:
            book.missing[f"fine_tuned.{target}.{name}"] = f"{len(sources)} source institution: nothing to align"
            continue
        weight = choices.weights.get(name)
        how = criterion if weight is not None else "the objective's default weight; none was chosen on source patients"
        objective = objective_of(name, 1.0 if weight is None else weight)
        rows.append(Method(name, nothing, tuned(name, notes, objective=objective), how))
        if NEEDS[name].target:
            aligned = tuned(f"{name}_target", both, objective=objective)
            rows.append(Method(f"{name}_target", unlabelled, aligned, how))
    discrepancy = ObjectiveConfig(name="mcd")
    rows.append(Method("mcd", unlabelled, tuned("mcd", both, objective=discrepancy)))
    rows.append(Method("self_training", unlabelled, self_trained))
    rows.append(Method("tent", unlabelled, tuned("tent", notes, read_first=there.texts)))
    for count in config.few_labels:
        given = notes.and_also(bench.texts(bench.some_patients(adapt, count, 3)))
        few = f"few_labels_{count}"
        rows.append(Method(few, "few target labels", tuned(few, given, token=True)))
    return rows


def _drops(
    bench: Bench,
    book: Book,
    panel: Panel,
    values: Mapping[str, np.ndarray],
    train: np.ndarray,
    sources: Sequence[str],
    target: str,
) -> None:
    """Enter source drop and target drop of erm."""
    config, prefix = bench.config, f"held_out.{target}"
    at = bench.rows(sources, scored=True)
    own, notes, home = bench.panel(at), bench.notes(train, fitted_on=train), bench.notes(at, fitted_on=train)
    seeds = [_seed(config, f"{target} erm", seed) for seed in range(config.n_seeds)]
    at_home = own.over_seeds(own.aucs([bench.train(notes, home, seed) for seed in seeds]), salt=999)
    _enter_drops(book, panel, own, values, at_home, sources, target, prefix, config.n_seeds)


def _enter_drops(
    book: Book,
    panel: Panel,
    own: Panel,
    values: Mapping[str, np.ndarray],
    at_home: np.ndarray,
    sources: Sequence[str],
    target: str,
    prefix: str,
    n_seeds: int,
) -> None:
    """Enter erm at the sources' own test patients (`at_home`, with its resamples), and the two drops."""
    protocol, trained = f"erm, mean over {n_seeds} seeds", f"trained on {', '.join(sources)}"
    split = f"{trained}; scored on their own test patients"
    book.add(f"{prefix}.erm_at_sources", own.estimate(at_home, part="test of the sources"), protocol, split=split)
    drop = panel.estimate(at_home - values["erm"], part="test of both")
    split = f"{trained}; scored on test patients of {target}"
    book.add(f"{prefix}.source_drop", drop, f"{protocol}; at the sources minus at {target}", split=split)
    if "in_domain" in values:
        drop = panel.estimate(values["in_domain"] - values["erm"], part="test")
        book.add(f"{prefix}.target_drop", drop, f"{protocol}; in-domain at {target} minus erm", split=split)


# Time -----------------------------------------------------------------------------------------------------------------


def temporal(bench: Bench, book: Book) -> None:
    """Train on early patients and on as many late ones, score both on other late patients."""
    config, data = bench.config, bench.data
    if any(when is None for when in data.written):
        absent = sum(when is None for when in data.written)
        book.missing["temporal"] = f"{absent} of {len(data.written)} notes have no date (written_at)"
        return
    first: dict[str, Any] = {}
    for patient, when in zip(data.patient.tolist(), data.written, strict=True):
        first[patient] = min(when, first.get(patient, when))
    people = sorted(first, key=lambda patient: (first[patient], patient))
    cut = round(config.temporal_share * len(people))
    early, late = people[:cut], people[cut:]
    random = np.random.default_rng((config.seed, 11))
    late = random.permutation(late).tolist()
    recent, tested = late[: len(late) // 2], late[len(late) // 2 :]
    before = random.permutation(early).tolist()[: len(recent)]
    parts = [np.flatnonzero(np.isin(data.patient, names)) for names in (before, recent, tested)]
    panel = bench.panel(parts[2])
    protocol = f"erm, {len(recent)} training patients of all institutions, mean over {config.n_seeds} seeds"
    split = f"patients whose first note is before {first[people[cut]]:%Y-%m-%d}, and after"
    values = []
    try:
        for place, (name, rows) in enumerate((("early", parts[0]), ("recent", parts[1]))):
            notes, test = bench.notes(rows, fitted_on=rows), bench.notes(parts[2], fitted_on=rows)
            found = [bench.train(notes, test, _seed(config, name, seed)) for seed in range(config.n_seeds)]
            values.append(panel.over_seeds(panel.aucs(found), salt=place))
            book.add(f"temporal.{name}", panel.estimate(values[-1], part="late"), protocol, split=split)
    except TooFewPatientsError as error:
        book.missing["temporal"] = str(error)
        return
    drop = panel.estimate(values[1] - values[0], part="late")
    book.add("temporal.drop", drop, f"{protocol}; recent minus early", split=split)
