"""Do the notes of two or more institutions differ, in what, and what may be claimed from that?

Every patient stands in one institution, weighs the same, and is permuted whole. Nothing is trained or selected.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from clinical_nlp.config import Config, CorpusConfig, validate
from clinical_nlp.errors import InputError, MissingDataError, UsageError, nearest
from clinical_nlp.notes.corpus import corpus_module
from clinical_nlp.notes.readers import FORMATS, ReadOptions, input_files, read_notes
from clinical_nlp.notes.schema import Note, Record, Rejected, Skipped, iter_notes
from clinical_nlp.progress import progress, say
from clinical_nlp.runs import Estimate, Run, file_digest, write_atomic, write_json
from clinical_nlp.statistics.attribution import (
    FEWEST_INSTITUTIONS,
    Claim,
    Conventions,
    advise,
    new_institution,
)
from clinical_nlp.statistics.clinical_units import measure
from clinical_nlp.statistics.comparison import (
    FEWEST_PATIENTS,
    SMALLEST_CELL,
    Comparison,
    Gold,
    UnitShift,
    compare,
    decide,
    permutations_needed,
)
from clinical_nlp.statistics.profile import Profile, compare_profiles, is_profile, make_profile, read_profiles
from clinical_nlp.statistics.sample import NoteSampler, SampledNotes
from clinical_nlp.statistics.text_measures import hashed_features, word_counts


class ExportConfig(Config):
    """Notes of institutions, and how many of them to take."""

    sources: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Exports to compare: files or folders, or profiles (from `clinical-nlp profile`). Without any, the corpus is
    used."""
    format: Literal["fhir", "omop", "mimic", "table", "brat", "iob", "text"] | None = None
    """Format of the sources; without it, told from the names of their files."""
    institution_from: str | None = None
    """Where the institution is read (custodian, serviceProvider, care_site, a column); `source`: each source is one
    institution, named by its file or folder."""
    columns: dict[str, str] = Field(default_factory=dict)
    """For tables: which column holds what, as `columns.text=body`."""
    languages: list[str] = Field(default_factory=lambda: ["en"])
    """Languages of the notes to compare; others are skipped and counted."""
    patient_map: str | None = None
    """Table that says which patient ids are one person."""
    shared_patients: bool = False
    """Whether equal patient ids in different sources are one person (two extracts of one system)."""
    corpus: CorpusConfig = CorpusConfig()
    """The corpus to use without sources."""
    window: Literal["none", "month", "quarter", "year"] = "none"
    """Take the notes of each month, quarter or year of an institution as an institution of their own (drift over time);
    notes without a date are skipped and counted."""
    patient_in_two: Literal["majority", "drop", "error"] = "majority"
    """A patient of several institutions stands where most of their notes are (the rest is left out and counted), is
    left out, or stops the run."""
    max_patients: int = Field(default=1000, ge=2)
    """Patients sampled in each institution."""
    max_notes_per_patient: int = Field(default=10, ge=1)
    """Notes sampled of each patient."""
    seed: int = 0
    """Of the sample, the folds, the representation and the relabellings."""


class DriftConfig(ExportConfig):
    """Compare the notes of institutions."""

    reference: str | None = None
    """Institution the others are compared with; default the one with most patients."""
    strata: Literal["none", "profile"] = "none"
    """profile: compare within like mixes of note types and numbers of notes, so that a different mix alone is not
    called a difference (approximate; see the page)."""
    model: str | None = None
    """Represent notes by the hidden states of this model (hub id, folder, run, builtin:tiny); default hashed TF-IDF,
    which needs no model."""
    max_tokens: int = Field(default=512, ge=8)
    """With a model: tokens read of each note."""
    labels: str | None = None
    """CSV file with columns patient_id or note_id (institution where ids recur) and label (0 or 1): target gold. With a
    column probability, that of a model which has not seen the patient; else words are used."""
    label_name: str = "the label"
    """What the label says, for the page."""
    labels_are_marked: bool = True
    """Whether labels come from marks in the text, so that another annotation convention would change them."""
    conventions: str | None = None
    """CSV file with columns note_id, patient_id, class, reference, other: how often each class is marked in the same
    notes under the convention of the reference and under the other one."""
    n_permutations: int = Field(default=999, ge=19)
    """Relabellings of patients; more are made where so many comparisons could not reach significance otherwise."""


CONFIG = DriftConfig

_METRICS = {
    "domain_classifier": "domain_auc",
    "mmd": "mmd_null_sds",
    "length": "length_ratio",
    "vocabulary": "vocabulary_excess_bits",
    "vocabulary_kl": "vocabulary_kl_excess_bits",
    "units": "largest_unit_t",
    "utilisation": "notes_per_patient_ratio",
}
_EMBEDDED_AT_ONCE = 1024


@dataclass(frozen=True)
class Results:
    """What a drift analysis found: its run and one comparison a pair of institutions."""

    run: Run
    comparisons: tuple[Comparison, ...]

    @property
    def path(self) -> Path:
        """The run directory, with `report.html` and `results.json`."""
        return self.run.path

    def __str__(self) -> str:
        return "\n".join(map(_line, self.comparisons))


def drift(sources: Sequence[str | os.PathLike[str]], *, output: str | os.PathLike[str], **options: Any) -> Results:
    """Compare the notes of institutions; the call from Python.

    Parameters
    ----------
    sources : exports (files or folders), together holding two institutions or more.
    output : a new run directory.
    options : the keys of `DriftConfig`, such as `format`, `reference`, `model`.

    Returns
    -------
    Results, with one `Comparison` for each institution beside the reference.

    Raises
    ------
    ConfigError : an option is not known or does not fit.
    InputError : there is only one institution.
    """
    config = validate(DriftConfig, {"sources": [os.fspath(source) for source in sources], **options})
    return _analyse(config, Path(output), resume=False)


def run(config: DriftConfig, output: Path, *, resume: bool = False) -> Run:
    """Sample the notes, compare every institution with the reference, and write the page."""
    return _analyse(config, output, resume=resume).run


def _analyse(config: DriftConfig, output: Path, *, resume: bool) -> Results:
    with Run.open(output, config, recipe="drift", resume=resume, contains_phi=False) as run:
        if config.model is not None:  # before hours of reading
            from clinical_nlp.models.resolve import provenance, resolve_model

            run.note(base_model=provenance(resolve_model(config.model), run.path))
        profiled = [Path(source) for source in config.sources if is_profile(Path(source))]
        if profiled:
            return _analyse_profiles(config, run, profiled)
        sample, account = read_sample(config, run.path, run.note)
        reference, others = _pairs(config, sample)
        gold = _gold(config, sample, run)
        say(f"measuring {len(sample.notes)} notes")
        measures = measure(sample.notes)
        represent = _representation(config, run)
        n_permutations = max(config.n_permutations, permutations_needed(len(others)))
        comparisons = []
        for name, members in others:
            say(f"comparing {name} with {reference}")
            comparisons.append(
                compare(
                    sample,
                    reference=reference,
                    other=name,
                    members=members,
                    represent=represent,
                    measures=measures,
                    gold=gold,
                    stratify=config.strata == "profile",
                    n_permutations=n_permutations,
                    seed=config.seed,
                )
            )
        comparisons = decide(comparisons)
        results = _results(config, sample, account, reference, comparisons, n_permutations)
        _finish(run, comparisons, results)
        if run.checkpoints.exists():
            for file in sorted(run.checkpoints.glob("*.npy")):
                file.unlink()  # vectors of notes can give their text away
            run.checkpoints.rmdir()
    return Results(run, tuple(comparisons))


def _finish(run: Run, comparisons: Sequence[Comparison], results: dict[str, Any]) -> None:
    for item in comparisons:
        run.record(_estimates(item))
    write_json(run.path / "results.json", results)
    write_atomic(run.path / "report.html", report(run))
    for item in comparisons:
        say(_line(item))


def _analyse_profiles(config: DriftConfig, run: Run, profiled: Sequence[Path]) -> Results:
    """Compare by profiles: those that were given, and those of the exports beside them, which are made here."""
    for key in ("model", "labels", "conventions"):
        if getattr(config, key) is not None:
            raise UsageError(
                f"{key} needs notes, and {profiled[0]} is a profile; leave {key} out, or give exports only"
            )
    if config.strata != "none":
        raise UsageError("strata=profile needs notes of every institution; profiles are compared with strata=none")
    profiles = [item for path in profiled for item in read_profiles(path)]
    n_profiles = len(profiles)
    exports = [source for source in config.sources if Path(source) not in profiled]
    means = sorted({profile.institution_means for profile in profiles if profile.institution_means})
    account: dict[str, Any] = {"n_records": 0, "n_notes": 0, "skipped": {}, "n_rejected": 0}
    account |= {"n_ids_in_several_sources": 0, "ids_joined": False}
    small = 0
    if exports:
        sample, account = read_sample(config.model_copy(update={"sources": exports}), run.path, run.note)
        for name in sorted(sample.n_patients):
            if sample.n_patients[name] < SMALLEST_CELL:
                small += 1
            else:
                profiles.append(make_profile(sample, name, institution_means=account["institution_means"]))
        means.append(account["institution_means"])
    names = [profile.institution for profile in profiles]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"institution {twice[0]!r} is there twice (a profile of it and its notes?); give it once")
    if len(profiles) < 2:
        raise InputError(
            f"{len(profiles)} institution of {SMALLEST_CELL} patients or more in the sources: give the profile or the "
            "export of a second one"
        )
    people = {profile.institution: profile.n_patients for profile in profiles}
    reference = _reference(config, people)
    first = next(profile for profile in profiles if profile.institution == reference)
    others = sorted((p for p in profiles if p is not first), key=lambda p: (-p.n_patients, p.institution))
    comparisons = decide([compare_profiles(first, other, seed=config.seed) for other in others])
    run.note(inputs={f"profile {i + 1}": {"sha256": file_digest(path)} for i, path in enumerate(profiled)})
    results = {
        "protocol": _protocol(config)
        | {
            "representation": "random features of hashed words, the same map everywhere; see the profile files",
            "p_values": "(1 + k) / (B + 1) with B = 19,999 draws of the null from the patients' covariance; Holm over "
            "the confirmatory tests of all comparisons with enough patients",
            "from_profiles": True,
        },
        "account": {"skipped": {}, **account}
        | {
            "n_patients": sum(people.values()),
            "n_notes": sum(profile.n_notes for profile in profiles),
            "n_patients_in_several_institutions": 0,
            "n_institutions_named": len(profiles) + small,
            "n_institutions": len(profiles) + small,
            "n_notes_left_out_elsewhere": 0,
            "n_notes_sampled": sum(profile.summaries[0].n_notes for profile in profiles),
            "n_profiles": n_profiles,
            "institution_means": "; ".join(dict.fromkeys(means)) or "what the profiles name",
        },
        "reference": reference,
        "institutions": [
            {
                "name": profile.institution,
                "n_patients": profile.n_patients,
                "n_notes": profile.n_notes,
                "words_a_note": _words_in(profile),
                "note_types": _types_in(profile),
            }
            for profile in sorted(profiles, key=lambda p: (-p.n_patients, p.institution))
        ],
        "comparisons": [_comparison(item) for item in comparisons],
    }
    _finish(run, comparisons, results)
    return Results(run, tuple(comparisons))


def _words_in(profile: Profile) -> float:
    summary = profile.summaries[0]
    if "words" not in summary.units:
        return float("nan")
    return float(np.exp(summary.unit_mean[summary.units.index("words")]))


def _types_in(profile: Profile) -> dict[str, float]:
    summary = profile.summaries[0]
    return {
        key.removeprefix("type:") or "(none given)": float(summary.unit_mean[i]) / 100
        for i, key in enumerate(summary.units)
        if key.startswith("type:")
    }


def report(run: Run) -> str:
    """Render the page from `results.json`."""
    from clinical_nlp.reporting.drift_page import drift_page

    return drift_page(json.loads((run.path / "results.json").read_text("utf-8")))


# Reading --------------------------------------------------------------------------------------------------------------


def read_sample(
    config: ExportConfig, folder: Path | None, note: Callable[..., None]
) -> tuple[SampledNotes, dict[str, Any]]:
    """Stream all notes through the sampler; every record is a note, skipped by a rule, or rejected.

    Parameters
    ----------
    config : the sources.
    folder : where the list of rejected records is written; None: they are only counted.
    note : takes what belongs into the manifest.
    """
    sampler = NoteSampler(
        max_patients=config.max_patients, max_notes_per_patient=config.max_notes_per_patient, seed=config.seed
    )
    skipped: Counter[str] = Counter()
    rejected: list[dict[str, str | None]] = []
    sources_of: dict[str, set[int]] = {}
    n_notes = 0
    joint = config.shared_patients or config.patient_map is not None
    means = "what the sources name"
    with progress("reading", unit="records") as bar:
        for index, read in _records(config, note):
            bar.advance()
            record = _in_window(read, config.window) if isinstance(read, Note) else read
            if isinstance(record, Skipped):
                skipped[record.rule] += 1
            elif isinstance(record, Rejected):
                rejected.append({"source": record.source, "reason": record.reason, "note_id": record.note_id})
            else:
                n_notes += 1
                sources_of.setdefault(record.patient_id, set()).add(index)
                patient = record.patient_id if joint else f"{index}/{record.patient_id}"
                sampler.add(record, patient=patient)
    if not n_notes:
        raise InputError(f"no note could be read ({sum(skipped.values())} records skipped, {len(rejected)} rejected)")
    if rejected and folder is None:
        say(f"{len(rejected)} records rejected")
    elif rejected and folder is not None:
        lines = "".join(json.dumps(entry) + "\n" for entry in rejected)
        write_atomic(folder / "rejected.jsonl", lines)
        say(f"{len(rejected)} records rejected; see {folder / 'rejected.jsonl'}")
    if config.sources:
        level = config.institution_from or "the default level of the format"
        means = "the source it was read from" if level == "source" else f"the institution at {level}"
    else:
        means = corpus_module(config.corpus.name).CARD.institution_means
    if config.window != "none":
        means = f"{means.rstrip('.')}, in one {config.window}"
    sample = sampler.finish(config.patient_in_two)
    note(n_notes=n_notes, n_skipped=sum(skipped.values()), n_rejected=len(rejected))
    return sample, {
        "n_records": n_notes + sum(skipped.values()) + len(rejected),
        "n_notes": n_notes,
        "skipped": dict(sorted(skipped.items())),
        "n_rejected": len(rejected),
        "n_ids_in_several_sources": sum(len(found) > 1 for found in sources_of.values()),
        "ids_joined": joint,
        "institution_means": means,
    }


def _in_window(note: Note, window: str) -> Note | Skipped:
    """Name the institution of a note by its window of time too."""
    if window == "none":
        return note
    if note.written_at is None:
        return Skipped(note.source, "no date")
    when = note.written_at
    names = {"year": f"{when:%Y}", "quarter": f"{when:%Y}-Q{(when.month + 2) // 3}", "month": f"{when:%Y-%m}"}
    return replace(note, institution=f"{note.institution} {names[window]}")


def _records(config: ExportConfig, note: Callable[..., None]) -> Iterator[tuple[int, Record]]:
    """Yield each record with the number of its source."""
    if not config.sources:
        corpus = corpus_module(config.corpus.name).load(
            None if config.corpus.path is None else Path(config.corpus.path), **config.corpus.options
        )
        note(inputs={"corpus": corpus.card.name, "n_notes": corpus.notes.num_rows})
        for row in iter_notes(corpus.notes):
            yield 0, row
        return
    paths = [Path(source) for source in config.sources]
    by_source = config.institution_from == "source"
    names = [_source_name(path) for path in paths]
    if by_source and len(set(names)) < len(names):
        raise UsageError("with institution_from=source every source needs its own name; two have the same")
    formats = [config.format or detect_format(path) for path in paths]
    for index, (path, format) in enumerate(zip(paths, formats, strict=True)):
        # `source` is this recipe's level, not the reader's: the reader sees a constant.
        options = ReadOptions(
            languages=tuple(config.languages),
            institution_from=None if by_source else config.institution_from,
            institution=names[index] if by_source else None,
            columns=config.columns,
            patient_map=None if config.patient_map is None else Path(config.patient_map),
        )
        files = input_files(path, format)
        digest = hashlib.sha256("".join(file_digest(file) for file in files).encode()).hexdigest()
        note(inputs={f"source {index + 1}": {"format": format, "n_files": len(files), "sha256": digest}})
        for record in read_notes(path, format=format, options=options):
            yield index, record


def _source_name(path: Path) -> str:
    name = path.resolve().name
    return name if path.is_dir() else name.split(".")[0]


def detect_format(source: Path) -> str:
    """Tell the format of an export from the names of its files.

    Raises
    ------
    MissingDataError : there is nothing at `source`.
    UsageError : the names say nothing.
    """
    if not source.exists():
        raise MissingDataError(f"no such file or folder: {source}")
    paths = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    names = [path.name.lower().removesuffix(".gz") for path in paths]
    stems = {name.split(".")[0] for name in names}
    if any(name.endswith(".ndjson") or name.startswith(("documentreference", "diagnosticreport")) for name in names):
        return "fhir"
    if stems & {"noteevents", "discharge", "radiology"}:
        return "mimic"
    if "note" in stems or any(name.endswith((".duckdb", ".db")) for name in names):
        return "omop"
    if any(name.endswith(".ann") for name in names):
        return "brat"
    if any(name.endswith((".csv", ".parquet", ".jsonl", ".tsv")) for name in names):
        return "table"
    if any(name.endswith(".txt") for name in names):
        return "text"
    raise UsageError(f"{source}: the format cannot be told from the file names; give --format ({', '.join(FORMATS)})")


# Comparing ------------------------------------------------------------------------------------------------------------


def _pairs(config: DriftConfig, sample: SampledNotes) -> tuple[str, list[tuple[str, list[str]]]]:
    """Choose the reference, and what it is compared with: each institution of enough patients, the rest together."""
    people = sample.n_patients
    if len(people) < 2:
        raise InputError(
            f"all notes are from one institution, {next(iter(people))!r}: give a second source, name another level "
            "with institution_from, or institution_from=source to take each source as one institution"
        )
    reference = _reference(config, people)
    others = [name for name in people if name != reference]
    pairs = [(name, [name]) for name in others if people[name] >= FEWEST_PATIENTS]
    small = [name for name in others if people[name] < FEWEST_PATIENTS]
    if len(small) == 1:
        pairs.append((small[0], small))
    elif small:
        pairs.append((f"{len(small)} small institutions together", small))
    return reference, pairs


def _reference(config: DriftConfig, people: Mapping[str, int]) -> str:
    """Return the reference: as named, the earliest window, or the institution of most patients."""
    chosen = min(people) if config.window != "none" else min(people, key=lambda name: (-people[name], name))
    reference = config.reference or chosen
    if reference not in people:
        known = sorted(people, key=lambda name: (-people[name], name))[:20]
        raise UsageError(f"reference {reference!r} is not an institution of these notes{nearest(reference, known)}")
    return reference


def _representation(config: DriftConfig, run: Run) -> Callable[[Sequence[Note]], np.ndarray]:
    if config.model is None:
        return lambda notes: hashed_features([note.text for note in notes], seed=config.seed)
    return lambda notes: _embed(notes, config, run)


def _gold(config: DriftConfig, sample: SampledNotes, run: Run) -> Gold:
    """Read what is known of the sampled notes beyond their text."""
    labels = logits = conventions = outputs = None
    if config.labels is not None:
        labels, logits = _labels(Path(config.labels), sample)
    if config.conventions is not None:
        conventions = _conventions(Path(config.conventions))
    if config.model is not None and (Path(config.model) / "task.json").is_file():
        outputs = _task_outputs(Path(config.model), sample.notes)
    return Gold(config.label_name, labels, config.labels_are_marked, logits, outputs, conventions)


def _rows(path: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    import csv

    if not path.is_file():
        raise MissingDataError(f"no such file: {path}")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in needed if name not in (reader.fieldnames or [])]
        if missing:
            raise InputError(f"{path}: no column {missing[0]!r}; it has {', '.join(reader.fieldnames or ['none'])}")
        for row in reader:
            yield reader.line_num, row


def _number(row: Mapping[str, str], column: str, path: Path, line: int, low: float, high: float) -> float:
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        value = float("nan")
    if not low <= value <= high:
        raise InputError(f"{path}, line {line}: {column} must be a number from {low:g} to {high:g}")
    return value


def _labels(path: Path, sample: SampledNotes) -> tuple[np.ndarray, np.ndarray | None]:
    """(n_notes,) labels, and (n_notes, 2) logits where the file has probabilities; NaN where it says nothing."""
    found: dict[tuple[str, str], tuple[float, float]] = {}
    by = ""
    for line, row in _rows(path, ["label"]):
        by = by or ("note_id" if "note_id" in row else "patient_id")
        if by not in row:
            raise InputError(f"{path}: it needs a column patient_id or note_id")
        empty = (row["label"] or "").strip() == ""
        label = float("nan") if empty else _number(row, "label", path, line, 0, 1)
        if label not in (0.0, 1.0) and not empty:
            raise InputError(f"{path}, line {line}: label must be 0, 1 or empty")
        probability = _number(row, "probability", path, line, 0, 1) if row.get("probability") else float("nan")
        found[row.get("institution") or "", row[by]] = (label, probability)
    values = np.full((len(sample.notes), 2), np.nan)
    for place, note in enumerate(sample.notes):
        name = note.note_id if by == "note_id" else note.patient_id
        values[place] = found.get((note.institution, name), found.get(("", name), (np.nan, np.nan)))
    if not np.isfinite(values).any():
        raise InputError(
            f"{path}: none of its {by} values is one of the sampled notes'; are they ids of another export?"
        )
    say(f"{int(np.isfinite(values[:, 0]).sum())} of {len(sample.notes)} sampled notes have a label")
    if not np.isfinite(values[:, 1]).any():
        return values[:, 0], None
    share = np.clip(values[:, 1], 1e-6, 1 - 1e-6)
    logit = np.log(share) - np.log1p(-share)
    return values[:, 0], np.column_stack([-logit / 2, logit / 2])


def _conventions(path: Path) -> Conventions:
    counts: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    for line, row in _rows(path, ["note_id", "patient_id", "class", "reference", "other"]):
        pair = [_number(row, side, path, line, 0, 1e9) for side in ("reference", "other")]
        counts.setdefault((row["patient_id"], row["note_id"]), {})[row["class"]] = (pair[0], pair[1])
    if not counts:
        raise InputError(f"{path}: no row")
    classes = tuple(sorted({name for of_note in counts.values() for name in of_note}))
    table = np.array([[of_note.get(name, (0.0, 0.0)) for name in classes] for of_note in counts.values()])
    return Conventions([patient for patient, _ in counts], table, classes)


def _task_outputs(folder: Path, notes: Sequence[Note]) -> tuple[np.ndarray, tuple[str, ...]] | None:
    """What a finished ner or coding run says about each note: entities per 100 words, or probabilities of codes."""
    task = json.loads((folder / "task.json").read_text("utf-8")).get("task")
    texts = [note.text for note in notes]
    if task == "ner":
        from clinical_nlp.tasks.ner import NerPredictor

        tagger = NerPredictor.load(folder)
        labels = tagger.task.labels
        found = np.zeros((len(texts), len(labels)))
        with progress("tagging", len(texts), unit="notes") as bar:
            for start in range(0, len(texts), 64):
                for row, spans in enumerate(tagger.predict(texts[start : start + 64]), start):
                    for span in spans:
                        found[row, labels.index(span[2])] += 1
                bar.advance(min(64, len(texts) - start))
        words = np.maximum(word_counts(texts), 1)[:, None]
        return 100 * found / words, tuple(f"{label}, per 100 words" for label in labels)
    if task == "coding":
        from clinical_nlp.tasks.coding import Coder

        coder = Coder.load(folder)
        blocks = []
        with progress("coding", len(texts), unit="notes") as bar:
            for start in range(0, len(texts), 64):
                block = [[text] for text in texts[start : start + 64]]
                blocks.append(coder.calibration(coder.logits(block)))
                bar.advance(len(block))
        return np.concatenate(blocks), tuple(f"probability of {code}" for code in coder.task.codes)
    return None


def _embed(notes: Sequence[Note], config: DriftConfig, run: Run) -> np.ndarray:
    """Embed distinct texts in shards that an interrupted run finds again, standardised over all of these notes."""
    from clinical_nlp.models.embeddings import embed_notes

    text_of = {note.text_sha256: note.text for note in notes}
    digests = sorted(text_of)
    vectors: dict[str, np.ndarray] = {}
    run.checkpoints.mkdir(exist_ok=True)
    with progress("embedding", len(digests), unit="texts") as bar:
        for start in range(0, len(digests), _EMBEDDED_AT_ONCE):
            shard = digests[start : start + _EMBEDDED_AT_ONCE]
            file = run.checkpoints / f"{hashlib.sha256(''.join(shard).encode()).hexdigest()[:32]}.npy"
            if file.is_file():
                block = np.load(file, allow_pickle=False)
            else:
                block = embed_notes(str(config.model), [text_of[key] for key in shard], max_tokens=config.max_tokens)
                with open(file.with_suffix(".tmp"), "wb") as handle:
                    np.save(handle, block, allow_pickle=False)
                os.replace(file.with_suffix(".tmp"), file)
            vectors.update(zip(shard, block, strict=True))
            bar.advance(len(shard))
    table = np.stack([vectors[note.text_sha256] for note in notes]).astype(np.float64)
    # A few hidden dimensions of language models are far larger than the rest and would be all that a distance sees.
    scale = table.std(axis=0)
    return (table - table.mean(axis=0)) / np.where(scale > 1e-6, scale, 1.0)


# Writing --------------------------------------------------------------------------------------------------------------


def _line(item: Comparison) -> str:
    words = {"differ": "differ", "not_distinguished": "cannot be told apart", "too_few": "too few patients to tell"}
    auc = item.tests.get("domain_classifier")
    units = [entry.unit.name.lower() for entry in item.units if entry.shift.adjusted_p <= 0.05][:3]
    what = f" (most in: {'; '.join(units)})" if item.verdict == "differ" and units else ""
    shown = f"; domain classifier AUC {auc.effect:.3f}, p {auc.p_value:.3g}" if auc else ""
    return f"{item.other} against {item.reference}: {words[item.verdict]}{what}{shown}"


def _estimates(item: Comparison) -> dict[str, Estimate]:
    part = item.basis.replace("_", " ")
    tests = [*item.tests.values(), *([item.utilisation] if item.utilisation else [])]
    return {
        f"drift.{item.other}.{_METRICS[test.name]}": Estimate(
            test.effect,
            test.low,
            test.high,
            test.n_units,
            test.n_notes,
            "all notes" if test.name == "utilisation" else part,
            f"p {test.p_value:.4g}" + (f"; {test.note}" if test.note else ""),
        )
        for test in tests
    }


def _small(count: int) -> int | None:
    """Return the count, or None where so few patients must not be shown."""
    return count if count >= SMALLEST_CELL else None


def _protocol(config: DriftConfig) -> dict[str, Any]:
    return {
        "unit": "patient: weighted equally, permuted whole",
        "split": "none: nothing is trained but the cross-fitted domain classifier (5 folds of patients)",
        "selection": "none: all tests and their order are fixed in advance",
        "strata": config.strata,
        "patient_in_two": config.patient_in_two,
        "max_patients": config.max_patients,
        "max_notes_per_patient": config.max_notes_per_patient,
        "fewest_patients": FEWEST_PATIENTS,
        "smallest_cell": SMALLEST_CELL,
        "window": config.window,
        "seed": config.seed,
        "from_profiles": False,
    }


def _results(
    config: DriftConfig,
    sample: SampledNotes,
    account: dict[str, Any],
    reference: str,
    comparisons: Sequence[Comparison],
    n_permutations: int,
) -> dict[str, Any]:
    """Collect everything the page shows; counts of fewer than 11 patients are null."""
    return {
        "protocol": _protocol(config)
        | {
            "representation": "hashed TF-IDF of words and word pairs, 64 SVD dimensions, fitted blind to institutions"
            if config.model is None
            else f"mean hidden state of {config.model} over the first {config.max_tokens} tokens, standardised",
            "p_values": f"(1 + k) / (B + 1) with B = {n_permutations} relabellings of patients; Holm over the "
            "confirmatory tests of all comparisons with enough patients",
        },
        "account": account
        | {"n_patients": sum(sample.n_patients.values()), "n_patients_in_several_institutions": sample.n_in_two}
        | {"n_institutions_named": sample.n_institutions, "n_institutions": len(sample.n_patients)}
        | {"n_notes_left_out_elsewhere": sample.n_notes_left_out, "n_notes_sampled": len(sample.notes)},
        "reference": reference,
        "new_institution": _next_one(comparisons),
        "institutions": _institutions(sample),
        "comparisons": [_comparison(item) for item in comparisons],
    }


def _next_one(comparisons: Sequence[Comparison]) -> dict[str, Any] | None:
    """What one more institution might give, from three compared ones on; each against the reference."""
    aucs = [item.tests["domain_classifier"].effect for item in comparisons if item.verdict != "too_few"]
    if len(aucs) < 3:
        return None
    low, high, note = new_institution(aucs)
    return {"low": max(0.0, low), "high": min(1.0, high), "n": len(aucs), "note": note, "needed": FEWEST_INSTITUTIONS}


def _institutions(sample: SampledNotes) -> list[dict[str, Any]]:
    words = np.log(np.maximum(word_counts([note.text for note in sample.notes]), 1))
    names, people = np.array(sample.institutions), np.array(sample.patient_ids)
    rows = []
    for name in sorted(sample.n_patients, key=lambda name: (-sample.n_patients[name], name)):
        found: dict[str, Any] = {"name": name, "n_patients": _small(sample.n_patients[name]), "n_notes": None}
        if found["n_patients"] is not None:
            inside = np.flatnonzero(names == name)
            logs = [words[inside[people[inside] == person]].mean() for person in np.unique(people[inside])]
            found["n_notes"] = sample.n_notes[name]
            found["words_a_note"] = float(np.exp(np.mean(logs)))
            found["note_types"] = _note_types(sample, inside)
        rows.append(found)
    return rows


def _note_types(sample: SampledNotes, rows: np.ndarray) -> dict[str, float]:
    """Share of each note type that enough patients have, every patient weighing the same."""
    of_patient: dict[str, Counter[str]] = {}
    for row in rows:
        kind = sample.notes[row].note_type or "(none given)"
        of_patient.setdefault(sample.patient_ids[row], Counter())[kind] += 1
    share: Counter[str] = Counter()
    having: Counter[str] = Counter()
    for counts in of_patient.values():
        for kind, count in counts.items():
            having[kind] += 1
            share[kind] += count / sum(counts.values()) / len(of_patient)  # type: ignore[assignment]
    return {kind: float(share[kind]) for kind in sorted(share) if having[kind] >= SMALLEST_CELL}


def _comparison(item: Comparison) -> dict[str, Any]:
    tokens = [asdict(token) | {"n_patients": [_small(count) for count in token.n_patients]} for token in item.tokens]
    people = [_small(count) for count in item.n_patients]
    smallest = min((test.smallest_p for test in item.tests.values()), default=float("nan"))
    return {
        "reference": item.reference,
        "other": item.other,
        "n_patients": people if None not in people else [None, None],
        "n_patients_together": sum(item.n_patients),
        "n_notes": list(item.n_notes),
        "verdict": item.verdict,
        "basis": item.basis,
        "smallest_p": smallest,
        "utilisation": None if item.utilisation is None else asdict(item.utilisation),
        "all_notes": [asdict(test) for test in item.all_notes],
        "one_note": [asdict(test) for test in item.one_note],
        "adjusted_p": dict(item.adjusted),
        "tokens": tokens,
        "units": [_unit(shift) for shift in item.units],
        "claims": [_claim(claim, item) for claim in item.claims],
        "advice": [] if item.verdict == "too_few" else advise(item.claims, text_differs=item.verdict == "differ"),
    }


def _unit(item: UnitShift) -> dict[str, Any]:
    """One clinical unit as it may be shown: no number of a side where fewer than 11 patients depart from the usual."""
    shift = item.shift
    counts = [_small(count) for count in shift.n_patients]
    hidden = [few or count is None for few, count in zip(item.few, counts, strict=True)]
    ratio = item.unit.key == "words"  # measured on the logarithmic scale
    shown = [float(np.exp(value)) if ratio else value for value in (shift.reference, shift.other, item.usual)]
    found: dict[str, Any] = {
        "key": item.unit.key,
        "name": item.unit.name,
        "unit": item.unit.unit,
        "kind": item.unit.kind,
    }
    found |= {"usual": shown[2], "scale": "ratio" if ratio else "difference"}
    found |= {"reference": None if hidden[0] else shown[0], "other": None if hidden[1] else shown[1]}
    ends = (shift.difference, shift.low, shift.high)
    change = [None if any(hidden) else float(np.exp(value)) if ratio else value for value in ends]
    found |= {"difference": change[0], "low": change[1], "high": change[2]}
    found |= {"t": float(np.copysign(shift.statistic, shift.difference)), "p_value": shift.p_value}
    return found | {
        "adjusted_p": shift.adjusted_p,
        "n_patients": counts if None not in counts else [None, None],
        "n_notes": shift.n_notes,
        "note": shift.note,
    }


def _claim(claim: Claim, item: Comparison) -> dict[str, Any]:
    names = {entry.unit.key: entry.unit.name for entry in item.units}
    return {
        "question": claim.question,
        "answer": claim.answer,
        "reason": claim.reason,
        "condition": claim.condition,
        "p_value": claim.p_value,
        "n_patients": claim.n_patients,
        "n_notes": claim.n_notes,
        "evidence": [names.get(shift.name, shift.name) for shift in claim.evidence],
        "estimates": {name: asdict(estimate) for name, estimate in claim.estimates},
    }
