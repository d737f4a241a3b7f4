"""What readers work on: written for BRAT and Label Studio, read back, and kept as a corpus to train on."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clinical_nlp.errors import InputError, MissingDataError, UsageError, nearest
from clinical_nlp.extraction.plan import SYSTEM
from clinical_nlp.extraction.rereading import NoteKey, config_of, reread
from clinical_nlp.extraction.review.accuracy import (
    ALL,
    Accuracy,
    Agreement,
    Reading,
    ReadNote,
    agreement,
    weighted_accuracy,
)
from clinical_nlp.extraction.review.sampling import Sample, SampledNote, Stratum, draw
from clinical_nlp.notes.readers import ReadOptions
from clinical_nlp.notes.readers.brat import read_spans
from clinical_nlp.notes.readers.files import read_text
from clinical_nlp.notes.readers.label_studio import read_annotations
from clinical_nlp.notes.readers.patient_map import PATIENT_MAP
from clinical_nlp.notes.schema import Note, Rejected
from clinical_nlp.notes.writers.brat import AXES, entity_type, write_document, write_settings
from clinical_nlp.notes.writers.label_studio import label_config, task
from clinical_nlp.notes.writers.table import write_table
from clinical_nlp.progress import say
from clinical_nlp.runs import file_digest, write_atomic, write_csv, write_json

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FEWEST_SHOWN = 11
_SYSTEMS = {"hpo": "HPO", "icd10cm": "ICD10CM"}
_README = """\
Notes of patients: keep this folder where the notes may be.

In every note, mark each place that speaks of one of these concepts, whoever it is said of and whether it is affirmed or
not, and set presence (present, absent, uncertain), temporality, modality and experiencer where they are not the usual
ones (present, current, actual, patient). What is marked already was found by software: correct it, delete what is
wrong, add what is missing.

{concepts}

BRAT: each reader works in brat/NAME. When you are done, put an empty file named done into that folder, and delete the
.ann file of every note that you did not read; a note whose .ann file is there counts as read.

Label Studio: create a project for each reader with label_studio/label_config.xml, import label_studio/NAME.json, and
put the JSON export of the project in its place. Tasks that were not submitted count as not read.

To settle differences, let a further reader (adjudicated, say) see both, and import with --truth adjudicated.
"""


@dataclass(frozen=True)
class Drawn:
    """What was drawn for readers, in numbers, and where it is."""

    folder: Path
    patients: int
    notes: int
    flagged_notes: int
    strata: int
    concepts: int
    readers: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.notes} notes of {self.patients} patients in {self.strata} strata, {self.flagged_notes} of them "
            f"flagged with one of {self.concepts} concepts; readers: {', '.join(self.readers)}\n"
            f"result: {self.folder} (holds whole notes; README.txt says how to go on)"
        )


@dataclass(frozen=True)
class Reviewed:
    """What came back: notes read by each reader, what did not fit, agreement and weighted accuracy."""

    folder: Path
    read: Mapping[str, int]
    rejected: tuple[Rejected, ...]
    truth: str
    agreement: tuple[Agreement, ...]
    accuracy: tuple[Accuracy, ...]
    labels: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{count} notes read by {name}" for name, count in self.read.items()]
        if self.rejected:
            lines.append(f"{len(self.rejected)} annotations do not fit their note and were left out: see rejected.csv")
        for item in self.agreement:
            if item.concept == ALL:
                lines.append(f"{' and '.join(item.readers)}: {item.measure:<16}  {item.estimate}")
        hidden = 0
        for result in self.accuracy:
            if result.institution == ALL and result.concept != ALL and result.estimate.n_patients < _FEWEST_SHOWN:
                hidden += 1
            elif result.institution == ALL:
                concept = "all concepts" if result.concept == ALL else f"{result.concept} {self.labels[result.concept]}"
                lines.append(f"{result.measure:<12} {result.estimate}  {concept}")
        if hidden:
            lines.append(f"{hidden} figures are from fewer than {_FEWEST_SHOWN} patients; all are in accuracy.csv")
        lines.append(f"truth: {self.truth}; result: {self.folder} (corpus/ holds the corrections, to train on)")
        return "\n".join(lines)


def export_review(
    output: str | Path,
    folder: str | Path,
    *,
    concepts: Sequence[str] = (),
    n_concepts: int = 20,
    n_patients: int = 120,
    notes_per_patient: int = 2,
    readers: Sequence[str] = ("reader-1", "reader-2"),
    seed: int = 0,
) -> Drawn:
    """Draw a sample of a finished extraction and write it, pre-annotated, for every reader.

    Parameters
    ----------
    output : directory of the extraction; its export must still be where it was.
    folder : new folder for what readers work on. It holds whole notes.
    concepts, n_concepts, n_patients, notes_per_patient, seed : see `sampling.draw`.
    readers : their names; each gets the whole sample.

    Returns
    -------
    Drawn. The folder holds `brat/READER/`, `label_studio/READER.json` with `label_config.xml`, `sample.parquet`,
    `review.json` and `README.txt`.

    Raises
    ------
    UsageError : the folder is not empty, or a name or number does not do.
    RunError : the extraction is not finished, or its export has changed since.
    """
    output, folder = Path(output), Path(folder)
    config_of(output)
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty; give a new folder for what readers work on")
    for reader in readers:
        if not _NAME.fullmatch(reader):
            raise UsageError(f"reader {reader!r}: a name has letters, digits, '.', '_' and '-' only")
    if not readers or len(set(readers)) < len(readers):
        raise UsageError("review needs at least one reader, and each name once")
    scratch = output / ".cache" / "review"
    try:
        sample = draw(
            output,
            scratch,
            concepts=concepts,
            n_concepts=n_concepts,
            n_patients=n_patients,
            notes_per_patient=notes_per_patient,
            seed=seed,
        )
    finally:
        shutil.rmtree(output / ".cache", ignore_errors=True)
    mentions = _mentions(output, sample)
    texts = {
        (note.institution, note.note_id): note.text
        for note in reread(output, {_key(note): note.text_sha256 for note in sample.notes})
    }
    write_table(folder / "sample.parquet", pa.Table.from_pylist([asdict(note) for note in sample.notes]))
    types = _types(sample.concepts)
    written: dict[str, str] = {}
    tasks = []
    for note in sample.notes:
        text, spans = texts[_key(note)], mentions.get(_key(note), [])
        named = [{**span, "label": types[span["concept_id"]]} for span in spans]
        for reader in readers:
            write_document(folder / "brat" / reader / f"{note.file}.txt", text, named)
        written[note.file] = file_digest(folder / "brat" / readers[0] / f"{note.file}.ann")
        shown = [{**span, "label": _shown(span["concept_id"], sample.concepts)} for span in spans]
        tasks.append(task(text, note.file, shown, model_version=SYSTEM))
    labels = [_shown(concept, sample.concepts) for concept in sample.concepts]
    write_settings(folder / "brat", {types[concept]: label for concept, label in zip(types, labels, strict=True)})
    write_atomic(folder / "label_studio" / "label_config.xml", label_config(labels))
    for reader in readers:
        write_json(folder / "label_studio" / f"{reader}.json", tasks)
    listed = "\n".join(f"  {_shown(concept, sample.concepts)}" for concept in sample.concepts)
    write_atomic(folder / "README.txt", _README.format(concepts=listed))
    write_json(
        folder / "review.json",
        {
            "format_version": 1,
            "system": SYSTEM,
            "outputs": file_digest(output / "ledger" / "outputs.json"),
            "seed": seed,
            "readers": list(readers),
            "concepts": sample.concepts,
            "strata": [asdict(stratum) for stratum in sample.strata],
            "annotations": written,
            "contains_phi": True,
        },
    )
    return Drawn(
        folder,
        patients=len({(note.institution, note.patient_id) for note in sample.notes}),
        notes=len(sample.notes),
        flagged_notes=sum(note.flagged for note in sample.notes),
        strata=len(sample.strata),
        concepts=len(sample.concepts),
        readers=tuple(readers),
    )


def _key(note: SampledNote) -> NoteKey:
    return (note.institution, note.note_id)


def _shown(concept: str, labels: Mapping[str, str]) -> str:
    return f"{concept} {labels[concept]}"


def _types(concepts: Iterable[str]) -> dict[str, str]:
    """Return concept -> its BRAT entity type; different concepts have different ones."""
    types: dict[str, str] = {}
    for concept in concepts:
        name = entity_type(concept)
        while name in types.values():
            name += "_"
        types[concept] = name
    return types


def _mentions(output: Path, sample: Sample) -> dict[NoteKey, list[dict[str, Any]]]:
    wanted = {_key(note) for note in sample.notes}
    table = pq.read_table(
        output / "mentions",
        columns=["institution", "note_id", "start", "end", "concept_id", *AXES],
        filters=pc.field("concept_id").isin(list(sample.concepts))
        & pc.field("note_id").isin([key[1] for key in wanted]),
    )
    found: dict[NoteKey, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        key = (row["institution"], row["note_id"])
        if key in wanted:
            found.setdefault(key, []).append(row)
    return found


@dataclass(frozen=True)
class _Given:
    """What a folder of `export_review` says about itself."""

    told: Mapping[str, Any]
    notes: Mapping[str, SampledNote]
    strata: tuple[Stratum, ...]

    @property
    def concepts(self) -> dict[str, str]:
        return dict(self.told["concepts"])


def _given(folder: Path) -> _Given:
    if not (folder / "review.json").is_file():
        raise MissingDataError(f"{folder} holds no review.json; give the folder that --export wrote")
    try:
        told = json.loads((folder / "review.json").read_text("utf-8"))
        rows = pq.read_table(folder / "sample.parquet").to_pylist()
        names = [item.name for item in fields(SampledNote)]
        notes = {
            row["file"]: SampledNote(**{name: row[name] for name in names} | {"concepts": tuple(row["concepts"])})
            for row in rows
        }
        return _Given(told, notes, tuple(Stratum(**stratum) for stratum in told["strata"]))
    except (ValueError, KeyError, TypeError, OSError, pa.ArrowException):
        raise InputError(f"{folder}: review.json or sample.parquet is damaged; export again") from None


_Spans = dict[str, list[dict[str, Any]]]
"""Note (its file name in the sample) -> spans with start, end, concept and axes."""


def import_review(output: str | Path, folder: str | Path, *, truth: str | None = None, seed: int = 0) -> Reviewed:
    """Read the corrections of a sample back and measure with them.

    Parameters
    ----------
    output : directory of the extraction that the sample was drawn from.
    folder : that `export_review` wrote, with what readers gave back. A further folder in `brat/`, or a further file
        in `label_studio/`, is a further reader.
    truth : the reader whose word counts. Without one the only reader's, else the mean of all who read a note.
    seed : of the resampling.

    Returns
    -------
    Reviewed. `results.json`, `accuracy.csv`, `rejected.csv` and `corpus/` (BRAT, of the truth's or the first reader's
    notes, with `patient_map.csv`) are written into the folder.

    Raises
    ------
    InputError : nobody has read anything, or what came back is not what was given.
    """
    output, folder = Path(output), Path(folder)
    config_of(output)
    given = _given(folder)
    if given.told["outputs"] != file_digest(output / "ledger" / "outputs.json"):
        say(f"{output} is not as it was when the sample was drawn; the figures are of what it said then")
    rejected: list[Rejected] = []
    texts: dict[str, str] = {}
    readers: dict[str, _Spans] = {}
    for name in _names(folder, given):
        spans = _from_label_studio(folder, name, given, texts, rejected)
        spans = spans or _from_brat(folder, name, given, texts, rejected)
        if spans:
            readers[name] = spans
    if not readers:
        raise InputError(
            f"{folder}: nobody has read a note yet; a reader who works in BRAT puts a file named done into brat/NAME, "
            "one who works in Label Studio gives back the JSON export"
        )
    if truth is not None and truth not in readers:
        raise UsageError(f"reader {truth!r} has read nothing{nearest(truth, readers)}")
    by_reader = {name: _readings(spans, given) for name, spans in readers.items()}
    names = sorted(by_reader)
    compared = [
        item
        for place, first in enumerate(names)
        for second in names[place + 1 :]
        if truth not in (first, second) or len(names) == 2
        for item in agreement((first, by_reader[first]), (second, by_reader[second]), list(given.concepts), seed=seed)
    ]
    judges = {truth: by_reader[truth]} if truth is not None else by_reader
    measured = weighted_accuracy(_votes(judges, given), given.strata, list(given.concepts), seed=seed)
    result = Reviewed(
        folder,
        read={name: len(spans) for name, spans in readers.items()},
        rejected=tuple(rejected),
        truth=truth or ("the only reader" if len(readers) == 1 else f"mean of {len(readers)} readers"),
        agreement=tuple(compared),
        accuracy=tuple(measured),
        labels=given.concepts,
    )
    _write_results(result)
    system = _SYSTEMS.get(config_of(output).terminology, "LOCAL")
    _write_corpus(folder / "corpus", readers[truth or names[0]], texts, given, system)
    return result


def _names(folder: Path, given: _Given) -> list[str]:
    """Return everyone who may have read: those the sample was made for, and who was added."""
    brat = [path.name for path in (folder / "brat").glob("*") if path.is_dir()]
    tasks = [path.stem for path in (folder / "label_studio").glob("*.json")]
    return sorted({*given.told["readers"], *brat, *tasks})


def _from_label_studio(
    folder: Path, reader: str, given: _Given, texts: dict[str, str], rejected: list[Rejected]
) -> _Spans:
    path = folder / "label_studio" / f"{reader}.json"
    if not path.is_file():
        return {}
    by_label = {_shown(concept, given.concepts): concept for concept in given.concepts}
    found: _Spans = {}
    for item in read_annotations(path):
        source = f"label_studio/{path.name}: task {item.name}"
        if not _is_note(item.name, item.text, source, given, rejected):
            continue
        texts[item.name] = item.text
        rejected += item.rejected
        found[item.name] = _with_concepts(item.spans, by_label, source, item.name, rejected)
    return found


def _from_brat(folder: Path, reader: str, given: _Given, texts: dict[str, str], rejected: list[Rejected]) -> _Spans:
    own = folder / "brat" / reader
    present = [path for path in sorted(own.glob("*.ann")) if path.stem in given.notes]
    untouched = all(file_digest(path) == given.told["annotations"].get(path.stem) for path in present)
    if not present or (untouched and not (own / "done").exists()):
        return {}
    marked = read_spans(own, ReadOptions())
    rejected += [
        Rejected(f"brat/{reader}/{item.source}", item.reason, item.note_id)
        for item in marked.rejected
        if item.note_id in given.notes
    ]
    by_note: dict[str, list[dict[str, Any]]] = {}
    for row in marked.table.to_pylist():
        by_note.setdefault(row["note_id"], []).append(row)
    by_type = {name: concept for concept, name in _types(given.concepts).items()}
    found: _Spans = {}
    for path in present:
        source = f"brat/{reader}/{path.name}"
        text, _ = read_text(path.with_suffix(".txt"), "utf-8")
        if not _is_note(path.stem, text or "", source, given, rejected):
            continue
        texts[path.stem] = text or ""
        found[path.stem] = _with_concepts(by_note.get(path.stem, ()), by_type, source, path.stem, rejected)
    return found


def _is_note(name: str, text: str, source: str, given: _Given, rejected: list[Rejected]) -> bool:
    """Check that a note is of the sample, and that its text is what was given out."""
    if name not in given.notes:
        rejected.append(Rejected(source, "is not a note of the sample"))
        return False
    if Note("", "", "", text, "").text_sha256 != given.notes[name].text_sha256:
        rejected.append(Rejected(source, "the text is not the one that was given out", name))
        return False
    return True


def _with_concepts(
    spans: Iterable[Mapping[str, Any]], concept_of: Mapping[str, str], source: str, name: str, rejected: list[Rejected]
) -> list[dict[str, Any]]:
    kept = []
    for span in spans:
        concept = concept_of.get(span["label"])
        if concept is None:
            rejected.append(Rejected(source, "the type is not one of the concepts that are reviewed", name))
            continue
        axes = {axis: span.get(axis) or values[0] for axis, values in AXES.items()}
        kept.append({"start": span["start"], "end": span["end"], "concept": concept, **axes})
    return kept


def _patient(note: SampledNote) -> str:
    return json.dumps([note.institution, note.patient_id])


def _readings(spans: _Spans, given: _Given) -> dict[str, Reading]:
    return {
        name: Reading(
            _patient(given.notes[name]),
            frozenset((span["start"], span["end"], span["concept"], span["presence"]) for span in own),
            frozenset(span["concept"] for span in own if _affirms(span)),
        )
        for name, own in spans.items()
    }


def _affirms(span: Mapping[str, Any]) -> bool:
    """Say whether a span affirms its concept of the patient, as the sample's flags do."""
    usual = all(span[axis] == AXES[axis][0] for axis in ("presence", "modality", "experiencer"))
    return usual and span["temporality"] != "future"


def _votes(readers: Mapping[str, Mapping[str, Reading]], given: _Given) -> list[ReadNote]:
    notes = []
    for name, note in sorted(given.notes.items()):
        votes = [readings[name].affirmed for readings in readers.values() if name in readings]
        if votes:
            true = {concept: sum(concept in vote for vote in votes) / len(votes) for concept in set().union(*votes)}
            notes.append(
                ReadNote(
                    _patient(note),
                    note.institution,
                    note.stratum,
                    note.flagged,
                    note.of_kind,
                    frozenset(note.concepts),
                    true,
                )
            )
    return notes


def _write_results(result: Reviewed) -> None:
    write_json(
        result.folder / "results.json",
        {
            "protocol": {
                "unit": "a note and a concept: does the note affirm the concept of the patient",
                "truth": result.truth,
                "weights": "inverse probability of being drawn, by patient and by note within the patient",
                "intervals": "95 %, patients resampled within strata",
            },
            "notes_read": dict(result.read),
            "agreement": [asdict(item) for item in result.agreement],
            "accuracy": [asdict(item) for item in result.accuracy],
        },
    )
    columns = ["measure", "concept", "label", "institution", "value", "low", "high", "n_patients", "n_notes", "note"]
    rows = [
        {**asdict(item.estimate), **asdict(item), "label": result.labels.get(item.concept, "")}
        for item in result.accuracy
    ]
    write_csv(result.folder / "accuracy.csv", columns, rows)
    write_csv(
        result.folder / "rejected.csv", ["source", "note_id", "reason"], [asdict(item) for item in result.rejected]
    )


def _write_corpus(folder: Path, spans: _Spans, texts: Mapping[str, str], given: _Given, system: str) -> None:
    """Keep corrections as a corpus: BRAT with one type and the concept as a reference, and whose notes they are."""
    shutil.rmtree(folder, ignore_errors=True)
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["patient_id", "shared_patient_id"])
    for name, own in sorted(spans.items()):
        marks = [
            {
                **span,
                "label": "phenotype",
                "reference": _reference(span["concept"], system),
                "name": given.concepts[span["concept"]],
            }
            for span in sorted(own, key=lambda span: (span["start"], span["end"], span["concept"]))
        ]
        write_document(folder / f"{name}.txt", texts[name], marks)
        rows.writerow([name, f"{given.notes[name].institution}/{given.notes[name].patient_id}"])
    write_atomic(folder / PATIENT_MAP, text.getvalue())


def _reference(concept: str, system: str) -> str:
    return f"{'HPO' if concept.startswith('HP:') else system}:{concept}"
