"""Do the notes of two or more institutions differ, in what, and what may be claimed from that?

Every patient stands in one institution, weighs the same, and is permuted whole. Nothing is trained or selected.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
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
from clinical_nlp.statistics.comparison import (
    FEWEST_PATIENTS,
    SMALLEST_CELL,
    Comparison,
    compare,
    decide,
    permutations_needed,
)
from clinical_nlp.statistics.sample import NoteSampler, SampledNotes
from clinical_nlp.statistics.text_measures import hashed_features, word_counts


class DriftConfig(Config):
    """Compare the notes of institutions."""

    sources: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Exports to compare: files or folders. Without any, the corpus is used."""
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
    reference: str | None = None
    """Institution the others are compared with; default the one with most patients."""
    patient_in_two: Literal["majority", "drop", "error"] = "majority"
    """A patient of several institutions stands where most of their notes are (the rest is left out and counted), is
    left out, or stops the run."""
    strata: Literal["none", "profile"] = "none"
    """profile: compare within like mixes of note types and numbers of notes, so that a different mix alone is not
    called a difference (approximate; see the page)."""
    model: str | None = None
    """Represent notes by the hidden states of this model (hub id, folder, run, builtin:tiny); default hashed TF-IDF,
    which needs no model."""
    max_tokens: int = Field(default=512, ge=8)
    """With a model: tokens read of each note."""
    max_patients: int = Field(default=1000, ge=2)
    """Patients sampled in each institution."""
    max_notes_per_patient: int = Field(default=10, ge=1)
    """Notes sampled of each patient."""
    n_permutations: int = Field(default=999, ge=19)
    """Relabellings of patients; more are made where so many comparisons could not reach significance otherwise."""
    seed: int = 0
    """Of the sample, the folds, the representation and the relabellings."""


CONFIG = DriftConfig

_METRICS = {
    "domain_classifier": "domain_auc",
    "mmd": "mmd_null_sds",
    "length": "length_ratio",
    "vocabulary": "vocabulary_excess_bits",
    "vocabulary_kl": "vocabulary_kl_excess_bits",
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
        sample, account = _read(config, run)
        reference, others = _pairs(config, sample)
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
                    stratify=config.strata == "profile",
                    n_permutations=n_permutations,
                    seed=config.seed,
                )
            )
        comparisons = decide(comparisons)
        for item in comparisons:
            run.record(_estimates(item))
        write_json(run.path / "results.json", _results(config, sample, account, reference, comparisons, n_permutations))
        write_atomic(run.path / "report.html", report(run))
        if run.checkpoints.exists():
            for file in sorted(run.checkpoints.glob("*.npy")):
                file.unlink()  # vectors of notes can give their text away
            run.checkpoints.rmdir()
        for item in comparisons:
            say(_line(item))
    return Results(run, tuple(comparisons))


def report(run: Run) -> str:
    """Render the page from `results.json`."""
    from clinical_nlp.reporting.drift_page import drift_page

    return drift_page(json.loads((run.path / "results.json").read_text("utf-8")))


# Reading --------------------------------------------------------------------------------------------------------------


def _read(config: DriftConfig, run: Run) -> tuple[SampledNotes, dict[str, Any]]:
    """Stream all notes through the sampler; every record is a note, skipped by a rule, or rejected."""
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
        for index, record in _records(config, run):
            bar.advance()
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
    if rejected:
        lines = "".join(json.dumps(entry) + "\n" for entry in rejected)
        write_atomic(run.path / "rejected.jsonl", lines)
        say(f"{len(rejected)} records rejected; see {run.path / 'rejected.jsonl'}")
    if config.sources:
        level = config.institution_from or "the default level of the format"
        means = "the source it was read from" if level == "source" else f"the institution at {level}"
    else:
        means = corpus_module(config.corpus.name).CARD.institution_means
    sample = sampler.finish(config.patient_in_two)
    run.note(n_notes=n_notes, n_skipped=sum(skipped.values()), n_rejected=len(rejected))
    return sample, {
        "n_records": n_notes + sum(skipped.values()) + len(rejected),
        "n_notes": n_notes,
        "skipped": dict(sorted(skipped.items())),
        "n_rejected": len(rejected),
        "n_ids_in_several_sources": sum(len(found) > 1 for found in sources_of.values()),
        "ids_joined": joint,
        "institution_means": means,
    }


def _records(config: DriftConfig, run: Run) -> Iterator[tuple[int, Record]]:
    """Yield each record with the number of its source."""
    if not config.sources:
        corpus = corpus_module(config.corpus.name).load(
            None if config.corpus.path is None else Path(config.corpus.path), **config.corpus.options
        )
        run.note(inputs={"corpus": corpus.card.name, "n_notes": corpus.notes.num_rows})
        for note in iter_notes(corpus.notes):
            yield 0, note
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
        run.note(inputs={f"source {index + 1}": {"format": format, "n_files": len(files), "sha256": digest}})
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
    reference = config.reference or min(people, key=lambda name: (-people[name], name))
    if reference not in people:
        known = sorted(people, key=lambda name: (-people[name], name))[:20]
        raise UsageError(f"reference {reference!r} is not an institution of these notes{nearest(reference, known)}")
    others = [name for name in people if name != reference]
    pairs = [(name, [name]) for name in others if people[name] >= FEWEST_PATIENTS]
    small = [name for name in others if people[name] < FEWEST_PATIENTS]
    if len(small) == 1:
        pairs.append((small[0], small))
    elif small:
        pairs.append((f"{len(small)} small institutions together", small))
    return reference, pairs


def _representation(config: DriftConfig, run: Run) -> Callable[[Sequence[Note]], np.ndarray]:
    if config.model is None:
        return lambda notes: hashed_features([note.text for note in notes], seed=config.seed)
    return lambda notes: _embed(notes, config, run)


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
    shown = f"; domain classifier AUC {auc.effect:.3f}, p {auc.p_value:.3g}" if auc else ""
    return f"{item.other} against {item.reference}: {words[item.verdict]}{shown}"


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
        "protocol": {
            "unit": "patient: weighted equally, permuted whole",
            "split": "none: nothing is trained but the cross-fitted domain classifier (5 folds of patients)",
            "selection": "none: all tests and their order are fixed in advance",
            "representation": "hashed TF-IDF of words and word pairs, 64 SVD dimensions, fitted blind to institutions"
            if config.model is None
            else f"mean hidden state of {config.model} over the first {config.max_tokens} tokens, standardised",
            "p_values": f"(1 + k) / (B + 1) with B = {n_permutations} relabellings of patients; Holm over the "
            "confirmatory tests of all comparisons with enough patients",
            "strata": config.strata,
            "patient_in_two": config.patient_in_two,
            "max_patients": config.max_patients,
            "max_notes_per_patient": config.max_notes_per_patient,
            "fewest_patients": FEWEST_PATIENTS,
            "smallest_cell": SMALLEST_CELL,
            "seed": config.seed,
        },
        "account": account
        | {"n_patients": sum(sample.n_patients.values()), "n_patients_in_several_institutions": sample.n_in_two}
        | {"n_institutions_named": sample.n_institutions, "n_institutions": len(sample.n_patients)}
        | {"n_notes_left_out_elsewhere": sample.n_notes_left_out, "n_notes_sampled": len(sample.notes)},
        "reference": reference,
        "institutions": _institutions(sample),
        "comparisons": [_comparison(item, sample) for item in comparisons],
    }


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


def _comparison(item: Comparison, sample: SampledNotes) -> dict[str, Any]:
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
    }
