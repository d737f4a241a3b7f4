"""What of the institution can still be read in note vectors, before and after each eraser, and what that costs.

Three sets of patients: erasers are fitted on the first, fresh probes trained on the second, scored on the third. One
probe that finds nothing shows nothing; linear ones stand beside others, as curves over the patients they learnt from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from pydantic import Field

from clinical_nlp.config import Config, CorpusConfig
from clinical_nlp.errors import ClinicalNlpError, InputError, TooFewPatientsError, UsageError
from clinical_nlp.invariance.erasers import Eraser, EraserFitter, EraserName
from clinical_nlp.notes.corpus import Corpus, load_corpus
from clinical_nlp.notes.schema import iter_notes
from clinical_nlp.progress import say
from clinical_nlp.reporting.tripod import corpus_record, tripod_section
from clinical_nlp.runs import Estimate, Run, write_atomic, write_json
from clinical_nlp.statistics.probes import (
    Floor,
    ProbeCurve,
    ProbedNotes,
    control_labels,
    description_length,
    leace_floor_of,
    probe_curve,
)
from clinical_nlp.statistics.sample import NoteSampler, SampledNotes
from clinical_nlp.statistics.text_measures import hashed_features

VERSION = 1
"""Of the protocol; figures of one version can be compared."""

Probe = Literal["linear", "quadratic", "mlp", "neighbours"]
PARTS = ("eraser", "probe train", "probe test")
_FEWEST = 6
_STEPS = (1, 2, 4, 8, 16, 32)
"""Directions of inlp along its path from everything readable to little of anything."""


class DebiasingConfig(Config):
    """Probe note vectors for the institution, raw and erased."""

    corpus: CorpusConfig = CorpusConfig(options={"patients": 240, "covariate": 0.5, "label": 0.5})
    """Notes of two institutions or more."""
    model: str | None = None
    """Represent notes by the hidden states of this model (hub id, folder, run, builtin:tiny); default hashed TF-IDF,
    which needs no model."""
    max_tokens: int = Field(default=256, ge=8)
    """With a model: tokens read of each note."""
    dimensions: int = Field(default=64, ge=2)
    """Principal components that are kept; fitted on the patients of the erasers, without looking at institutions."""
    erasers: list[EraserName] = Field(default_factory=lambda: list(get_args(EraserName)))
    """What is tried; see `clinical_nlp.invariance.ERASERS`."""
    probes: list[Probe] = Field(default_factory=lambda: list(get_args(Probe)), min_length=1)
    """Who reads."""
    label: str = "auto"
    """The task whose usefulness is watched, a label of the patient: code:CODE, concept:HP:NUMBER, sex, none; auto: the
    code (else concept) whose share of the erasers' patients is nearest to a third."""
    patient_in_two: Literal["majority", "drop", "error"] = "error"
    """A patient of several institutions stops the suite, stands where most of their notes are, or is left out."""
    max_patients: int = Field(default=1000, ge=_FEWEST)
    """Patients sampled in each institution."""
    max_notes_per_patient: int = Field(default=10, ge=1)
    """Notes sampled of each patient."""
    margin: float = Field(default=0.05, ge=0, lt=0.5)
    """An AUC of 0.5 plus this is called readable; the whole interval must lie beyond."""
    n_permutations: int = Field(default=999, ge=19)
    """Relabellings of the scored patients."""
    n_orders: int = Field(default=5, ge=1)
    """Orders of the patients over which the code length is averaged."""
    seed: int = 0
    """Of the split, the probes and the relabellings."""


CONFIG = DebiasingConfig


def run(config: DebiasingConfig, output: Path, *, resume: bool = False) -> Run:
    """Divide the patients, fit the erasers, train and score the probes, and write the page."""
    with Run.open(output, config, recipe="debiasing", resume=resume) as run:
        corpus = load_corpus(config.corpus.name, config.corpus.path, **config.corpus.options)
        sample = _sample(config, corpus)
        third = divide(sample, config.seed)
        texts = [note.text for note in sample.notes]
        vectors, represented = _vectors(config, texts, third, run)
        notes = ProbedNotes(vectors, sample.institutions, sample.patient_ids)
        fitted, train, test = (notes.select(third == part) for part in range(3))
        erasers = _fit(config, fitted, run)
        label, values = _label(config, corpus, sample, third)
        measured = _Measured(config, train, test, third, texts, sample, values)

        measured.representation("raw", train, test)
        for name, eraser in erasers.items():
            say(f"probing after {name}")
            measured.representation(name, _erased(eraser, train), _erased(eraser, test))
        measured.text_only()
        measured.control()
        if "leace" in erasers:
            measured.floor(leace_floor_of(fitted), erasers["leace"])
        path = measured.path(fitted) if values is not None else []

        run.record(measured.estimates)
        results = {
            "version": VERSION,
            "corpus": {
                "name": corpus.card.name,
                "institution_means": corpus.card.institution_means,
                "n_patients": sample.n_patients,
                "n_notes": sample.n_notes,
                "n_in_two": sample.n_in_two,
            },
            "protocol": _protocol(config, notes, third, represented, label),
            "numbers": measured.numbers,
            "curves": measured.curves,
            "compression": measured.compression,
            "floor": measured.found_floor,
            "erasers": {
                name: {"n_directions": one.n_directions, "shrinkage": one.shrinkage, "note": one.note}
                for name, one in erasers.items()
            },
            "missing": measured.missing,
            "path": path,
            "verdicts": verdicts(measured, config, ["raw", *erasers]),
        }
        results["record"] = _record(config, corpus, sample, third)
        write_json(run.path / "results.json", results)
        run.note(inputs={"corpus": corpus.card.name, "n_notes": len(texts)})
    write_atomic(run.path / "report.html", report(run))
    return run


def report(run: Run) -> str:
    """Render the page from `results.json`."""
    from clinical_nlp.reporting.debiasing_page import debiasing_page

    results = json.loads((run.path / "results.json").read_text("utf-8"))
    return debiasing_page(results, tripod_section(run, results))


# Patients and vectors -------------------------------------------------------------------------------------------------


def _sample(config: DebiasingConfig, corpus: Corpus) -> SampledNotes:
    sampler = NoteSampler(
        max_patients=config.max_patients, max_notes_per_patient=config.max_notes_per_patient, seed=config.seed
    )
    for note in iter_notes(corpus.notes):
        sampler.add(note)
    sample = sampler.finish(config.patient_in_two)
    if len(sample.n_patients) < 2:
        raise TooFewPatientsError(
            f"corpus {corpus.card.name!r} has one institution, {next(iter(sample.n_patients))!r}: there is nothing to "
            "read; name a corpus with two, or another level with institution_from"
        )
    least = min(sample.n_patients, key=lambda name: (sample.n_patients[name], name))
    if sample.n_patients[least] < _FEWEST:
        raise TooFewPatientsError(
            f"institution {least!r} has {sample.n_patients[least]} patients and needs {_FEWEST}: two to fit erasers, "
            "two to train probes, two to score them; leave it out or bring more"
        )
    return sample


def divide(sample: SampledNotes, seed: int) -> np.ndarray:
    """(n_notes,) 0, 1 or 2 for the patients of the erasers, of the probes and of the score; a third of each place's."""
    part: dict[str, int] = {}
    generator = np.random.default_rng([seed, 23])
    for name in sorted(sample.n_patients):
        people = sorted({p for p, i in zip(sample.patient_ids, sample.institutions, strict=True) if i == name})
        for place, at in enumerate(generator.permutation(len(people))):
            part[people[at]] = place % 3
    return np.array([part[patient] for patient in sample.patient_ids])


def _record(config: DebiasingConfig, corpus: Corpus, sample: SampledNotes, third: np.ndarray) -> dict[str, Any]:
    keys = zip(corpus.notes["institution"].to_pylist(), corpus.notes["note_id"].to_pylist(), strict=True)
    place = {key: row for row, key in enumerate(keys)}
    rows = np.array([place[note.institution, note.note_id] for note in sample.notes])
    parts = {name: rows[third == part] for part, name in enumerate(PARTS)}
    return corpus_record(corpus, parts, judged=config.model, trained=PARTS[1])


def _vectors(config: DebiasingConfig, texts: Sequence[str], third: np.ndarray, run: Run) -> tuple[np.ndarray, str]:
    if config.model is None:
        found = hashed_features(texts, dimensions=config.dimensions, seed=config.seed).astype(np.float64)
        return found, f"hashed TF-IDF of words and word pairs, SVD to {found.shape[1]} dimensions"
    from clinical_nlp.models.embeddings import embed_notes
    from clinical_nlp.models.resolve import provenance, resolve_model

    run.note(base_model=provenance(resolve_model(config.model), run.path))
    say(f"reading {len(texts)} notes with {config.model}")
    vectors = embed_notes(config.model, texts, max_tokens=config.max_tokens).astype(np.float64)
    whole = vectors.shape[1]
    if not np.isfinite(vectors).all():
        raise InputError(f"model {config.model!r} gives values that are not finite; check it, or use another")
    if config.dimensions < whole:
        fitted = vectors[third == 0]
        centre = fitted.mean(0)
        axes = np.linalg.eigh(np.cov(fitted.T))[1][:, ::-1][:, : config.dimensions]
        vectors = (vectors - centre) @ axes
        from safetensors.numpy import save

        arrays = {"centre": centre, "axes": np.ascontiguousarray(axes)}
        (run.path / "erasers").mkdir(exist_ok=True)
        write_atomic(run.path / "erasers" / "projection.safetensors", save(arrays))
    return vectors, f"mean hidden states of {config.model}, {whole} dimensions, the first {vectors.shape[1]} components"


def _fit(config: DebiasingConfig, fitted: ProbedNotes, run: Run) -> dict[str, Eraser]:
    fitter = EraserFitter().update(fitted.contents, fitted.labels, fitted.patients)
    erasers = {}
    for name in config.erasers:
        try:
            erasers[name] = fitter.fit(name)
        except TooFewPatientsError:
            if name != "inlp":
                raise
            made = fitter.fit(name, n_directions=min(8, config.dimensions - 1))
            erasers[name] = replace(made, note="too few patients to know when to stop")
        erasers[name].save(run.path / "erasers")
    return {str(name): eraser for name, eraser in erasers.items()}


def _erased(eraser: Eraser, notes: ProbedNotes) -> ProbedNotes:
    return replace(notes, contents=eraser(notes.contents, notes.labels))


# The task whose usefulness is watched ---------------------------------------------------------------------------------


def _label(
    config: DebiasingConfig, corpus: Corpus, sample: SampledNotes, third: np.ndarray
) -> tuple[str | None, list[str] | None]:
    """Name of the task label, and its value for every note's patient."""
    if config.label == "none":
        return None, None
    kind = config.label.partition(":")[0]
    have = _carriers(corpus)
    if config.label == "sex":
        sex = {} if corpus.patients is None else {p["patient_id"]: p["sex"] for p in corpus.patients.to_pylist()}
        if not any(sex.values()):
            raise UsageError(f"label sex: corpus {corpus.card.name!r} does not say the sex of its patients")
        return "sex", [str(sex.get(patient)) for patient in sample.patient_ids]
    if config.label == "auto":
        people = {patient for patient, part in zip(sample.patient_ids, third, strict=True) if part == 0}
        shares = {name: len(carriers & people) / len(people) for name, carriers in have.items()}
        usable = [name for name, share in shares.items() if 0.1 <= share <= 0.9]
        if not usable:
            return None, None
        codes = [name for name in usable if name.startswith("code:")]
        name = min(codes or usable, key=lambda one: (abs(shares[one] - 1 / 3), one))
    elif kind in ("code", "concept") and config.label in have:
        name = config.label
    else:
        example = min(have, default="")
        raise UsageError(
            f"label {config.label!r}: corpus {corpus.card.name!r} has no such label; give code:CODE, concept:HP:NUMBER"
            + (f" (such as {example})" if example else "")
            + ", sex, auto or none"
        )
    return name, [str(patient in have[name]) for patient in sample.patient_ids]


def _carriers(corpus: Corpus) -> dict[str, set[str]]:
    """Patients who have each code, and each concept that is said to be present."""
    found: dict[str, set[str]] = {}
    if corpus.codes is not None:
        for row in corpus.codes.select(["patient_id", "code"]).to_pylist():
            found.setdefault(f"code:{row['code']}", set()).add(row["patient_id"])
    if corpus.spans is not None:
        keys = corpus.notes.select(["institution", "note_id", "patient_id"]).to_pylist()
        patient_of = {(row["institution"], row["note_id"]): row["patient_id"] for row in keys}
        columns = ["institution", "note_id", "hpo_id", "presence"]
        for row in corpus.spans.select(columns).to_pylist():
            if row["hpo_id"] and row["presence"] in (None, "present"):
                patient = patient_of.get((row["institution"], row["note_id"]))
                if patient is not None:
                    found.setdefault(f"concept:{row['hpo_id']}", set()).add(patient)
    return found


# Measuring ------------------------------------------------------------------------------------------------------------


@dataclass
class _Measured:
    """Everything that is measured, with how."""

    config: DebiasingConfig
    train: ProbedNotes
    test: ProbedNotes
    third: np.ndarray
    texts: Sequence[str]
    sample: SampledNotes
    values: list[str] | None
    estimates: dict[str, Estimate] = field(default_factory=dict)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: dict[str, dict[str, Any]] = field(default_factory=dict)
    compression: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    found_floor: dict[str, Any] | None = None

    def add(self, name: str, estimate: Estimate, protocol: str, **more: Any) -> None:
        """Enter a number."""
        about = {"protocol": protocol, "split": "patients of each institution in thirds, at random", **more}
        self.estimates[name] = estimate
        self.numbers[name] = asdict(estimate) | about | {"selection": "none on the scored patients"}

    def curve(self, key: str, kind: str, train: ProbedNotes, test: ProbedNotes, *, full: bool = False) -> ProbeCurve:
        """Train a probe on growing sets, or (full) on all patients only."""
        common: dict[str, Any] = {"n_permutations": self.config.n_permutations, "seed": self.config.seed}
        sizes = [len(train.people)] if full else None
        curve = probe_curve(kind, train, test, sizes=sizes, **common)
        self.curves[key] = asdict(curve)
        return curve

    def leakage(self, key: str, curve: ProbeCurve, protocol: str) -> None:
        """Enter the last point of a curve."""
        last = curve.last
        more = {"p_value": last.p_value, "null_mean": last.null_mean, "null_sd": last.null_sd, "shape": curve.shape}
        self.add(key, last.auc, f"{protocol}; probe trained on {last.n_train_patients} other patients", **more)

    def representation(self, name: str, train: ProbedNotes, test: ProbedNotes) -> None:
        """Probe one representation for the institution, given the label, for the label; its code length."""
        for kind in self.config.probes:
            curve = self.curve(f"leakage.{name}.{kind}", kind, train, test)
            self.leakage(f"leakage.{name}.{kind}", curve, f"AUC of a fresh {kind} probe for the institution")
        if len(set(self.sample.institutions)) > 2:
            self._pairs(name, train, test)
        try:
            length = description_length(train, n_orders=self.config.n_orders, seed=self.config.seed)
            self.compression[name] = asdict(length)
        except TooFewPatientsError as error:
            self.missing[f"compression.{name}"] = str(error)
        if self.values is None:
            return
        given = [replace(one, strata=self._values(part)) for part, one in ((1, train), (2, test))]
        for kind in self.config.probes:
            protocol = f"AUC of a fresh {kind} probe for the institution among patients alike in the label"
            self._try(f"given_label.{name}.{kind}", kind, given, protocol)
        self.useful(name, train, test)
        within = [replace(one, labels=self._values(part), strata=one.labels) for part, one in ((1, train), (2, test))]
        protocol = "AUC of a fresh linear probe for the task label among patients of one institution"
        self._try(f"utility_within.{name}", "linear", within, protocol)

    def useful(self, name: str, train: ProbedNotes, test: ProbedNotes) -> None:
        """Probe one representation for the task label."""
        parts = [replace(one, labels=self._values(part)) for part, one in ((1, train), (2, test))]
        self._try(f"utility.{name}", "linear", parts, "AUC of a fresh linear probe for the task label")

    def _values(self, part: int) -> list[str]:
        """Task label of every note of a part."""
        assert self.values is not None
        return [value for value, third in zip(self.values, self.third, strict=True) if third == part]

    def _try(self, key: str, kind: str, parts: Sequence[ProbedNotes], protocol: str) -> None:
        """Train on all patients of the first part and score the second; note what stands in the way."""
        try:
            self.leakage(key, self.curve(key, kind, parts[0], parts[1], full=True), protocol)
        except ClinicalNlpError as error:
            self.missing[key] = str(error)

    def _pairs(self, name: str, train: ProbedNotes, test: ProbedNotes) -> None:
        places = sorted(set(self.sample.institutions))
        for left in range(len(places)):
            for right in range(left):
                pair = (places[right], places[left])
                parts = [one.select(np.isin(np.asarray(one.labels), pair)) for one in (train, test)]
                key = f"pair.{name}.{pair[0]}|{pair[1]}"
                self._try(key, "linear", parts, f"AUC of a linear probe between {pair[0]} and {pair[1]}")

    def _texts(self, part: int, labels: Sequence[str]) -> ProbedNotes:
        rows = np.flatnonzero(self.third == part).tolist()
        return ProbedNotes([self.texts[i] for i in rows], [labels[i] for i in rows],
                           [self.sample.patient_ids[i] for i in rows])  # fmt: skip

    def text_only(self) -> None:
        """Probe the words themselves."""
        say("probing the words of the notes")
        reads = "AUC of TF-IDF with logistic regression for the"
        parts = [self._texts(part, self.sample.institutions) for part in (1, 2)]
        self.leakage("leakage.text.words", self.curve("leakage.text.words", "words", *parts), f"{reads} institution")
        if self.values is not None:
            parts = [self._texts(part, self.values) for part in (1, 2)]
            self._try("utility.text", "words", parts, f"{reads} task label")

    def control(self) -> None:
        """Let the same probes read meaningless labels that hang on template lines."""
        try:
            labels, n_lines = control_labels(self.texts, self.sample.patient_ids, seed=self.config.seed)
        except InputError as error:
            self.missing["control"] = str(error)
            return
        protocol = f"AUC for a random function of {n_lines} recurring lines, raw vectors"
        parts = [replace(one, labels=[label for label, third in zip(labels, self.third, strict=True) if third == part])
                 for part, one in ((1, self.train), (2, self.test))]  # fmt: skip
        for kind in self.config.probes:
            self._try(f"control.raw.{kind}", kind, parts, protocol)

    def floor(self, floor: Floor, eraser: Eraser) -> None:
        """Enter what LEACE can reach with so many patients."""
        self.found_floor = asdict(floor) | {"n_directions": eraser.n_directions}

    def path(self, fitted: ProbedNotes) -> list[dict[str, Any]]:
        """Leakage (the strongest probe) against usefulness for every representation, and along inlp's path."""
        fitter = EraserFitter().update(fitted.contents, fitted.labels, fitted.patients)
        dimensions = fitted.contents.shape[1]
        for step in [one for one in _STEPS if one < dimensions and "inlp" in self.config.erasers]:
            eraser = fitter.fit("inlp", n_directions=step)
            train, test = _erased(eraser, self.train), _erased(eraser, self.test)
            for kind in self.config.probes:
                key = f"path.inlp {step}.{kind}"
                self._try(key, kind, [train, test], f"AUC for the institution after {step} directions of inlp")
            self.useful(f"inlp {step}", train, test)
        found = []
        for name in ["raw", *self.config.erasers, *(f"inlp {step}" for step in _STEPS)]:
            prefix = "path" if name.startswith("inlp ") else "leakage"
            leaks = {k: self.estimates[f"{prefix}.{name}.{k}"].value for k in self.config.probes
                     if f"{prefix}.{name}.{k}" in self.estimates}  # fmt: skip
            useful = self.estimates.get(f"utility.{name}")
            if leaks and useful is not None and not any(map(math.isnan, (*leaks.values(), useful.value))):
                strongest = max(leaks, key=leaks.__getitem__)
                found.append({"name": name, "leakage": leaks[strongest], "probe": strongest, "utility": useful.value})
        return [point | {"on_front": on_front(point, found)} for point in found]


def on_front(point: dict[str, Any], points: Sequence[dict[str, Any]]) -> bool:
    """Whether no other point is at least as good in leakage and utility, and better in one."""
    return not any(
        other["leakage"] <= point["leakage"]
        and other["utility"] >= point["utility"]
        and (other["leakage"], other["utility"]) != (point["leakage"], point["utility"])
        for other in points
    )


State = Literal["readable", "not shown", "not readable"]


def verdicts(measured: _Measured, config: DebiasingConfig, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Say what the probes show about each representation.

    readable: the interval of some probe lies wholly above 0.5 + margin. not readable: those of all probes lie at or
    below it, and no curve may still rise by more than its margin. Anything else is not shown.
    """
    limit = 0.5 + config.margin
    found = {}
    for name in names:
        points = {kind: measured.estimates[f"leakage.{name}.{kind}"] for kind in config.probes}
        shapes = [measured.curves[f"leakage.{name}.{kind}"]["shape"] for kind in config.probes]
        known = {kind: one for kind, one in points.items() if not math.isnan(one.value)}
        state: State = "not shown"
        if any(one.low > limit for one in known.values()):
            state = "readable"
        elif len(known) == len(points) and all(one.high <= limit for one in known.values()):
            state = "not readable" if all(shape == "plateau" for shape in shapes) else "not shown"
        strongest = max(known.items(), key=lambda item: item[1].value)[0] if known else None
        found[name] = {"state": state, "strongest": strongest, "limit": limit}
    return found


def _protocol(
    config: DebiasingConfig, notes: ProbedNotes, third: np.ndarray, represented: str, label: str | None
) -> dict[str, Any]:
    parts = {name: notes.select(third == part) for part, name in enumerate(PARTS)}
    return {
        "representation": represented,
        "dimensions": int(notes.contents.shape[1]),
        "institutions": sorted(set(notes.labels)),
        "n_patients": {name: len(part.people) for name, part in parts.items()},
        "n_notes": {name: len(part.row) for name, part in parts.items()},
        "split": "patients of each institution in thirds, at random",
        "selection": "probes choose their strength on a fifth of their own training patients",
        "label": label,
        "margin": config.margin,
        "n_permutations": config.n_permutations,
        "model": config.model,
        "seed": config.seed,
    }
