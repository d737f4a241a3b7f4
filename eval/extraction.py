"""How good an extraction is, against the gold spans of a corpus: mentions, assertions, patients."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pydantic import Field

from clinical_nlp.config import Config, CorpusConfig
from clinical_nlp.errors import InputError, NoRunError
from clinical_nlp.extraction import extract_with
from clinical_nlp.extraction.patients import evidence_kind, patient_states
from clinical_nlp.extraction.plan import ExtractionConfig
from clinical_nlp.language.terminology import Terminology, load_terminology
from clinical_nlp.notes.corpus import Corpus, load_corpus
from clinical_nlp.notes.schema import EXPERIENCER, MODALITY, PRESENCE, TEMPORALITY
from clinical_nlp.reporting.tripod import corpus_record, tripod_section
from clinical_nlp.runs import Estimate, Run, write_json
from clinical_nlp.statistics.intervals import by_patient, patient_bootstrap


class ExtractionSuiteConfig(Config):
    """Extract from the notes of a corpus with gold spans, and score mentions, assertions and patients."""

    corpus: CorpusConfig = CorpusConfig(options={"bank": "held_out", "seed": 1000})
    """A corpus whose gold spans carry concept ids; the default one has phrases and patients that no rule was made for
    (rules were tuned on the other phrases and on patients of seed 0)."""
    model: str | None = None
    """Directory of an ner run whose entities are added to the dictionary's."""
    terminology: str = "hpo"
    """hpo, icd10cm, or a file of your own (.obo, .json, .csv)."""
    workers: int = Field(default=1, ge=1)
    """Processes for the extraction."""
    seed: int = 0
    """Of the patient bootstrap."""


CONFIG = ExtractionSuiteConfig


def run(config: ExtractionSuiteConfig, output: Path, *, resume: bool = False) -> Run:
    """Write the notes as one table, extract from it, score it, and write the page."""
    with Run.open(output, config, recipe="extraction", resume=resume) as run:
        corpus = load_corpus(config.corpus.name, config.corpus.path, **config.corpus.options)
        table = run.path / "notes.parquet"
        pq.write_table(corpus.notes.drop(["text_sha256"]), table)
        extraction = run.path / "extraction"
        if not (extraction / "manifest.json").is_file():
            settings = ExtractionConfig(
                source=str(table),
                format="table",
                model=config.model,
                terminology=config.terminology,
                languages=[],
                workers=config.workers,
            )
            extract_with(settings, extraction, resume=resume)
        measured = score(extraction, corpus, seed=config.seed)
        table.unlink()  # the notes have served; no second copy of them stays
        run.record(measured)
        protocol = {
            "gold": corpus.card.name,
            "part": "all notes of the corpus",
            "selection": "none, nothing is trained",
        }
        record = corpus_record(corpus, {"scored": range(corpus.notes.num_rows)}, judged=config.model, trained=None)
        record |= {
            "trained": "The dictionary is not trained; what trained a model is not known here."
            if config.model
            else "Nothing is trained.",
            "thresholds": ["a mention is right where its concept is that of the gold span; nothing was chosen here"],
        }
        write_json(run.path / "results.json", {"protocol": protocol, "estimates": measured, "record": record})
        run.note(inputs={"corpus": corpus.card.name, "n_notes": corpus.notes.num_rows})
    from clinical_nlp.reporting.page import run_report

    run_report(run)
    return run


def report(run: Run) -> str:
    """Render the page from what was measured and `results.json`."""
    from clinical_nlp.reporting.page import training_page

    results = json.loads((run.path / "results.json").read_text("utf-8"))
    return training_page(run, last=tripod_section(run, results))


AXES = {"presence": PRESENCE, "temporality": TEMPORALITY, "modality": MODALITY, "experiencer": EXPERIENCER}
_GOLD_ID = {"hpo": "hpo_id", "icd10cm": "icd10cm_code"}


Key = tuple[str, str]
"""(institution, note_id)."""
_FHIR = ("DocumentReference/", "DiagnosticReport/")


class _Span(NamedTuple):
    start: int
    end: int
    concept_id: str
    axes: tuple[str | None, ...]


def score(
    output_dir: str | os.PathLike[str], corpus: Corpus, *, seed: int = 0, part: str = "all"
) -> dict[str, Estimate]:
    """Score an extraction against the gold spans of the corpus it was made from.

    Parameters
    ----------
    output_dir : the finished directory of `extract`.
    corpus : with `spans`; its notes are found in the output by note id. A note that the output rejected counts as one
        in which nothing was found; notes that the output does not have (another part, another language) are left out.
    seed : of the patient bootstrap.
    part : what to call the part that was scored.

    Returns
    -------
    `mention_exact_{precision,recall,f1}` (same offsets and concept), `mention_overlap_{...}` (same concept, one to one,
    offsets overlap), `{presence,temporality,modality,experiencer}_accuracy` on the overlap matches, and
    `patient_{precision,recall,f1}` over (patient, concept, state), both sides by the patient rule. Concepts must be
    equal: a more general one is an error. Intervals resample patients.

    Raises
    ------
    InputError : the corpus has no gold, or none of its notes are in the output.
    """
    folder = Path(output_dir)
    if not (folder / "manifest.json").is_file():
        raise NoRunError(f"{folder} is not a finished extraction")
    terminology_name = json.loads((folder / "plan.json").read_text("utf-8"))["config"]["terminology"]
    terminology = load_terminology(terminology_name)
    if corpus.spans is None:
        raise InputError(f"corpus {corpus.card.name!r} has no gold spans to score against")
    gold = _gold(corpus.spans, _GOLD_ID.get(terminology.name, "hpo_id"), terminology)
    joined = _join(folder, corpus)
    found = _found(folder, joined, terminology)

    notes = sorted(set(joined.values()))
    rows = corpus.notes.select(["institution", "note_id", "patient_id"]).to_pylist()
    patient_of = {(row["institution"], row["note_id"]): row["patient_id"] for row in rows}
    patients = [patient_of[note] for note in notes]
    mention_counts = np.zeros((len(notes), 6))
    axis_counts = np.zeros((len(notes), 2 * len(AXES)))
    for row, note in enumerate(notes):
        wanted, got = gold.get(note, []), found.get(note, [])
        pairs = _match(wanted, got)
        exact = len({span[:3] for span in wanted} & {span[:3] for span in got})
        mention_counts[row, :3] = exact, len({span[:3] for span in got}), len({span[:3] for span in wanted})
        mention_counts[row, 3:] = len(pairs), len(got), len(wanted)
        for left, right in pairs:
            for axis in range(len(AXES)):
                if left.axes[axis] is not None:
                    axis_counts[row, 2 * axis] += left.axes[axis] == right.axes[axis]
                    axis_counts[row, 2 * axis + 1] += 1

    def estimate(counts: np.ndarray, statistic: Any) -> Estimate:
        return patient_bootstrap(counts, statistic, n_notes=len(notes), part=part, seed=seed)

    by_mention, by_axis = by_patient(patients, mention_counts), by_patient(patients, axis_counts)
    state_counts = _state_counts(notes, patient_of, gold, found, terminology)
    results: dict[str, Estimate] = {}
    for name, counts in (
        ("mention_exact", by_mention[:, :3]),
        ("mention_overlap", by_mention[:, 3:]),
        ("patient", state_counts),
    ):
        results[f"{name}_precision"] = estimate(counts, lambda sums: sums[..., 0] / sums[..., 1])
        results[f"{name}_recall"] = estimate(counts, lambda sums: sums[..., 0] / sums[..., 2])
        results[f"{name}_f1"] = estimate(counts, lambda sums: 2 * sums[..., 0] / (sums[..., 1] + sums[..., 2]))
    for axis, name in enumerate(AXES):
        counts = by_axis[:, 2 * axis : 2 * axis + 2]
        results[f"{name}_accuracy"] = estimate(counts, lambda sums: sums[..., 0] / sums[..., 1])
    return results


def _gold(spans: pa.Table, column: str, terminology: Terminology) -> dict[Key, list[_Span]]:
    gold: dict[Key, list[_Span]] = defaultdict(list)
    for row in spans.to_pylist():
        if row[column] is not None:
            concept = terminology.resolve(row[column]) or row[column]
            axes = tuple(row[axis] for axis in AXES)
            gold[row["institution"], row["note_id"]].append(_Span(row["start"], row["end"], concept, axes))
    return {note: _sorted(found) for note, found in gold.items()}


def _join(folder: Path, corpus: Corpus) -> dict[Key, Key]:
    """Map each note that the output accounts for to the corpus's note: by institution and id, else by id alone.

    A corpus that was written as an export may come back with another name of the institution (a FHIR reference) and
    the resource type before its id.
    """
    rows = corpus.notes.select(["institution", "note_id"]).to_pylist()
    exact = {(row["institution"], row["note_id"]) for row in rows}
    times = Counter(note_id for _, note_id in exact)
    alone = {note_id: (institution, note_id) for institution, note_id in exact if times[note_id] == 1}
    table = ds.dataset(folder / "notes", format="parquet").to_table(columns=["institution", "note_id", "outcome"])
    joined: dict[Key, Key] = {}
    for row in table.to_pylist():
        if row["outcome"] == "skipped" or row["note_id"] is None:
            continue
        key = (row["institution"], row["note_id"])
        bare = next((key[1].removeprefix(kind) for kind in _FHIR if key[1].startswith(kind)), key[1])
        note = key if key in exact else alone.get(key[1], alone.get(bare))
        if note is not None:
            joined[key] = note
    if not joined:
        raise InputError(f"{folder} holds none of the notes of corpus {corpus.card.name!r}")
    return joined


def _found(folder: Path, joined: Mapping[Key, Key], terminology: Terminology) -> dict[Key, list[_Span]]:
    table = ds.dataset(folder / "mentions", format="parquet").to_table(
        columns=["institution", "note_id", "start", "end", "concept_id", *AXES]
    )
    found: dict[Key, list[_Span]] = defaultdict(list)
    for row in table.to_pylist():
        note = joined.get((row["institution"], row["note_id"]))
        if note is not None and row["concept_id"] is not None:
            concept = terminology.resolve(row["concept_id"]) or row["concept_id"]
            found[note].append(_Span(row["start"], row["end"], concept, tuple(row[axis] for axis in AXES)))
    return {note: _sorted(spans) for note, spans in found.items()}


def _sorted(spans: list[_Span]) -> list[_Span]:
    return sorted(spans, key=lambda span: (span[:3], tuple(value or "" for value in span.axes)))


def _match(wanted: Sequence[_Span], got: Sequence[_Span]) -> list[tuple[_Span, _Span]]:
    """Pair gold and found spans of one concept, one to one, the largest overlap of each gold span first."""
    free = list(got)
    pairs = []
    for left in wanted:
        overlaps = [
            (min(left.end, right.end) - max(left.start, right.start), -place)
            for place, right in enumerate(free)
            if right.concept_id == left.concept_id
        ]
        size, place = max(overlaps, default=(0, 0))
        if size > 0:
            pairs.append((left, free.pop(-place)))
    return pairs


def _state_counts(
    notes: Sequence[Key],
    patient_of: Mapping[Key, str],
    gold: Mapping[Key, list[_Span]],
    found: Mapping[Key, list[_Span]],
    terminology: Terminology,
) -> np.ndarray:
    """Return (n_patients, 3): states that agree, states found, states in gold; patients in sorted order."""
    patients = sorted({patient_of[note] for note in notes})
    states: list[dict[str, dict[str, str]]] = []
    for side in (gold, found):
        evidence: dict[str, dict[str, Counter[str]]] = {patient: {} for patient in patients}
        for note in notes:
            for span in side.get(note, []):
                axes = (value or default[0] for value, default in zip(span.axes, AXES.values(), strict=True))
                if (kind := evidence_kind(*axes)) is not None:
                    evidence[patient_of[note]].setdefault(span.concept_id, Counter())[kind] += 1
        states.append({patient: patient_states(evidence[patient], terminology) for patient in patients})
    return np.array(
        [
            [len(wanted.items() & got.items()), len(got), len(wanted)]
            for wanted, got in ((states[0][patient], states[1][patient]) for patient in patients)
        ],
        dtype=np.float64,
    )
