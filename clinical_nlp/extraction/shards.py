"""One shard: annotate its notes, write its files, and last the ledger record that says it is done."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from clinical_nlp.errors import RunError
from clinical_nlp.extraction import STAGE
from clinical_nlp.extraction.plan import Shard
from clinical_nlp.notes.schema import Note, Skipped
from clinical_nlp.notes.writers.note_nlp import snippet
from clinical_nlp.notes.writers.table import MENTION_SCHEMA, write_table
from clinical_nlp.runs import file_digest

NOTES_SCHEMA = pa.schema(
    [
        pa.field("number", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("institution", pa.string()),
        pa.field("note_id", pa.string()),
        pa.field("patient_id", pa.string()),
        pa.field("encounter_id", pa.string()),
        pa.field("note_type", pa.string()),
        pa.field("written_at", pa.timestamp("us", tz="UTC")),
        pa.field("language", pa.string()),
        pa.field("status", pa.string()),
        pa.field("n_characters", pa.int64()),
        pa.field("text_sha256", pa.string()),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("n_mentions", pa.int64(), nullable=False),
    ]
)
"""One row a record of the export: `outcome` is done, skipped (`reason` is the rule) or rejected."""

REJECTED_SCHEMA = pa.schema(
    [
        pa.field("number", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("note_id", pa.string()),
        pa.field("patient_id", pa.string()),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
"""What could not be used: `stage` is reading or extraction; `reason` never holds note text."""

STAGED_SCHEMA = MENTION_SCHEMA.append(pa.field("snippet", pa.string()))
"""Mentions before `copied_from` is known, with the snippet of NOTE_NLP."""

COPIED_SENTENCE = 40
"""A sentence shorter than this many characters is not evidence of copying: "No fever." recurs by itself."""

_LANES = ("dictionary", "model", "both", "measurement")


class SpanMismatchError(Exception):
    """A mention whose text is not what stands at its offsets."""


DIED = "the worker process died on this note"
"""Reason of a note that ends its process (out of memory, a crash in native code)."""


@dataclass(frozen=True, slots=True)
class Annotated:
    """The outcome of one note: mention rows, or the reason why there are none."""

    rows: tuple[dict[str, Any], ...] = ()
    reason: str | None = None


class Extractor:
    """What turns a note into mentions: the dictionary annotator, and where they are given a model, a classifier of
    assertions and a verifier."""

    def __init__(
        self,
        terminology: str,
        model: str | None = None,
        *,
        measurements: bool = False,
        verify: str | None = None,
        assertion: str | None = None,
    ) -> None:
        from clinical_nlp.language.mentions import Annotator

        self._annotator = Annotator(terminology, measurements=measurements)
        self._predictor: Any = None
        self._classifier: Any = None
        self._verification: Any = None
        if model is not None:
            self._predictor = _predictor(Path(model), self._annotator)
        if assertion is not None:
            from clinical_nlp.tasks.asserting import AssertionClassifier

            self._classifier = AssertionClassifier.load(assertion)
        if verify is not None:
            from clinical_nlp.tasks.verifying import CandidateVerifier, Verification

            known = self._annotator.terminology
            nearest = getattr(self._predictor, "nearest", lambda text: ())
            self._verification = Verification(
                CandidateVerifier.load(verify, known), known, self._annotator.match, nearest
            )

    def annotate(self, notes: Sequence[Note]) -> list[Annotated]:
        """Annotate notes; one that cannot be annotated is rejected with the name of the error, and the rest go on."""
        texts = [note.text for note in notes]
        found = [self._mentions(text, spans) for text, spans in zip(texts, self._predict(texts), strict=True)]
        if self._classifier is not None:
            found = self._asserted(texts, found)
        return [self._annotate(note, mentions) for note, mentions in zip(notes, found, strict=True)]

    def _predict(self, texts: list[str]) -> list[list[Any] | str]:
        """Return the model's spans of each text, or the name of the error that the text makes it raise."""
        if self._predictor is None or not texts:
            return [[] for _ in texts]
        with one_thread():
            try:
                return list(self._predictor.predict(texts))
            except Exception:
                return [self._predict_alone(text) for text in texts]

    def _predict_alone(self, text: str) -> list[Any] | str:
        try:
            return list(self._predictor.predict([text])[0])
        except Exception as error:
            return type(error).__name__

    def _mentions(self, text: str, spans: list[Any] | str) -> list[Any] | str:
        """Return the mentions of a text, or the name of the error that the text raises."""
        if isinstance(spans, str):
            return spans
        try:
            return list(self._annotator.annotate(text, extra_spans=spans))
        except Exception as error:
            return type(error).__name__

    def _asserted(self, texts: list[str], found: list[list[Any] | str]) -> list[list[Any] | str]:
        """Return the mentions with what the classifier makes of the rules' assertions."""
        held = {row: mentions for row, mentions in enumerate(found) if mentions and not isinstance(mentions, str)}
        if not held:
            return found
        given = (
            [texts[row] for row in held],
            [[(mention.start, mention.end) for mention in mentions] for mentions in held.values()],
            [[mention.assertion for mention in mentions] for mentions in held.values()],
        )
        with one_thread():
            try:
                said = self._classifier.predict(*given)
            except Exception as error:
                if len(held) == 1:
                    return [type(error).__name__ if row in held else own for row, own in enumerate(found)]
                return [self._asserted([text], [own])[0] for text, own in zip(texts, found, strict=True)]
        corrected = list(found)
        for (row, mentions), assertions in zip(held.items(), said, strict=True):
            corrected[row] = [replace(m, assertion=one) for m, one in zip(mentions, assertions, strict=True)]
        return corrected

    def _annotate(self, note: Note, mentions: list[Any] | str) -> Annotated:
        if isinstance(mentions, str):
            return Annotated(reason=mentions)
        try:
            return Annotated(rows=tuple(self._rows(note, mentions)))
        # The message of an unknown error may quote the note, so only its type is kept.
        except Exception as error:
            return Annotated(reason=type(error).__name__)

    def _rows(self, note: Note, mentions: list[Any]) -> Iterator[dict[str, Any]]:
        terminology = self._annotator.terminology
        digests: dict[tuple[int, int], str | None] = {}  # a note without punctuation is one long sentence
        for mention, verified in self._verified(note.text, mentions):
            covered = note.text[mention.start : mention.end]
            covered.encode("utf-8")
            if covered != mention.text or not covered or mention.lane not in _LANES:
                raise SpanMismatchError
            if mention.sentence not in digests:
                digests[mention.sentence] = _sentence_digest(note.text, mention.sentence)
            said = mention.assertion
            yield {
                "institution": note.institution,
                "note_id": note.note_id,
                "patient_id": note.patient_id,
                "encounter_id": note.encounter_id,
                "note_type": note.note_type,
                "written_at": note.written_at,
                "start": mention.start,
                "end": mention.end,
                "text": covered,
                "concept_id": mention.concept_id,
                "concept_label": mention.concept_id and terminology.label(mention.concept_id),
                "label": mention.label,
                "presence": said.presence,
                "temporality": said.temporality,
                "modality": said.modality,
                "experiencer": said.experiencer,
                "cues": [{"value": value, "start": start, "end": end} for value, start, end in said.cues],
                "section": mention.section,
                "score": round(float(mention.score), 4),
                "lane": mention.lane,
                "copied_from": None,
                "sentence_digest": digests[mention.sentence],
                "verified": verified,
                "snippet": snippet(note.text, mention.start, mention.end).encode("utf-8", "replace").decode(),
            }

    def _verified(self, text: str, mentions: list[Any]) -> list[tuple[Any, dict[str, Any] | None]]:
        if self._verification is None:
            return [(mention, None) for mention in mentions]
        with one_thread():
            return list(self._verification(text, mentions))


def _predictor(run: Path, annotator: Any) -> Any:
    """Load an ner run, or a link run, which is told what the dictionary finds."""
    from clinical_nlp.models.loading import read_task
    from clinical_nlp.tasks.linking import Linker
    from clinical_nlp.tasks.ner import NerPredictor

    if not (run / "task.json").is_file() or read_task(run).get("task") != "linking":
        return NerPredictor.load(run)
    linker = Linker.load(run, annotator.terminology)
    return SimpleNamespace(
        predict=lambda texts: linker.predict(texts, [annotator.match(text) for text in texts]), nearest=linker.nearest
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Hold torch to one thread: sums come out the same however many workers share the machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _sentence_digest(text: str, sentence: tuple[int, int]) -> str | None:
    words = " ".join(text[sentence[0] : sentence[1]].split())
    if len(words) < COPIED_SENTENCE:
        return None
    return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def to_annotate(shard: Shard) -> list[Note]:
    """Return the notes of a shard whose outcome is not known yet."""
    return [
        record for place, record in enumerate(shard.records) if isinstance(record, Note) and place not in shard.known
    ]


def outcomes(shard: Shard, annotated: Sequence[Annotated]) -> list[Annotated]:
    """Return the outcome of every note of a shard, in order, from those of `to_annotate` and those that were known."""
    new = iter(annotated)
    notes = [place for place, record in enumerate(shard.records) if isinstance(record, Note)]
    return [shard.known[place] if place in shard.known else next(new) for place in notes]


def write_shard(output: Path, shard: Shard, annotated: Sequence[Annotated]) -> dict[str, Any]:
    """Write the files of a shard and then its ledger record, each atomically.

    Parameters
    ----------
    output : the run directory.
    shard : what was processed.
    annotated : the outcome of each note of the shard, in order.

    Returns
    -------
    The ledger record: digest of the inputs, counts, and the digest of each file.

    Raises
    ------
    RunError : the disk is full or the folder cannot be written.
    """
    given = iter(annotated)
    notes: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    mentions: list[dict[str, Any]] = []
    for number, record in enumerate(shard.records, start=shard.first):
        row: dict[str, Any] = {"number": number, "source": record.source, "n_mentions": 0}
        row |= {"note_id": record.note_id, "patient_id": record.patient_id}
        if isinstance(record, Note):
            outcome = next(given)
            stage, reason = "extraction", outcome.reason
            mentions.extend(outcome.rows)
            row |= {
                "institution": record.institution,
                "encounter_id": record.encounter_id,
                "note_type": record.note_type,
                "written_at": record.written_at,
                "language": record.language,
                "status": record.status,
                "n_characters": len(record.text),
                "text_sha256": record.text_sha256,
                "outcome": "done" if reason is None else "rejected",
                "n_mentions": len(outcome.rows),
            }
        elif isinstance(record, Skipped):
            stage, reason = "reading", record.rule
            row["outcome"] = "skipped"
        else:
            stage, reason = "reading", record.reason
            row["outcome"] = "rejected"
        row["reason"] = reason
        notes.append(row)
        if row["outcome"] == "rejected":
            rejected.append({**row, "stage": stage})

    name = f"part-{shard.index:06d}.parquet"
    tables = {
        f"{STAGE}/mentions/{name}": pa.Table.from_pylist(mentions, schema=STAGED_SCHEMA),
        f"notes/{name}": pa.Table.from_pylist(notes, schema=NOTES_SCHEMA),
    }
    if rejected:
        tables[f"rejected/{name}"] = pa.Table.from_pylist(rejected, schema=REJECTED_SCHEMA)
    with clear_write_errors(output):
        files = {file: write_table(output / file, table) for file, table in tables.items()}
        counts = {outcome: sum(row["outcome"] == outcome for row in notes) for outcome in ("done", "skipped")}
        entry = {
            "shard": shard.index,
            "first": shard.first,
            "input_digest": shard.digest,
            "records": len(notes),
            **counts,
            "rejected": len(rejected),
            "rejected_in_extraction": sum(row["stage"] == "extraction" for row in rejected),
            "mentions": len(mentions),
            "verified": _counted(mentions),
            "files": files,
        }
        _enter(ledger_file(output, shard.index), entry)
    return entry


def _counted(mentions: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Count what was asked of a verifier: in all, by why it was asked, and by verdict."""
    asked = [mention["verified"] for mention in mentions if mention["verified"] is not None]
    return {"asked": len(asked), **Counter(each[key] for key in ("why", "verdict") for each in asked)}


def _enter(path: Path, entry: Mapping[str, Any]) -> None:
    """Write a ledger record by a rename, without waiting for the disk.

    The files that it names are on disk already. What a power cut takes of the ledger, whole or in part, is a shard
    that is done once more; that a process ends takes nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(entry, indent=1) + "\n", "utf-8")
    os.replace(temporary, path)


def ledger_file(output: Path, index: int) -> Path:
    """Return where the record of a shard is."""
    return output / "ledger" / f"{index:06d}.json"


def finished(output: Path, shard: Shard, *, staged: bool = True) -> dict[str, Any] | None:
    """Return the ledger record of a shard that is done and whose files still verify, else None.

    Parameters
    ----------
    output, shard : the run directory, and the shard as it is read now.
    staged : False where the outputs are already made, so that the staged files are not needed any more.

    Raises
    ------
    RunError : the shard was done from other records than these.
    """
    record = _record(output, shard.index)
    if record is None:
        return None
    if record["input_digest"] != shard.digest:
        raise RunError(
            f"{output} cannot be resumed: the export reads differently than when it was begun "
            f"(records {shard.first + 1} to {shard.first + len(shard.records)}); start again with another --output"
        )
    files = {file: digest for file, digest in record["files"].items() if staged or not file.startswith(STAGE)}
    return record if verifies(output, files) else None


def _record(output: Path, index: int) -> dict[str, Any] | None:
    """Return a ledger record; a damaged or absent one is None."""
    try:
        record = json.loads(ledger_file(output, index).read_text("utf-8"))
        return record if {"input_digest", "files", "mentions", "done"} <= set(record) else None
    except (OSError, ValueError, TypeError):
        return None


def verifies(output: Path, files: Mapping[str, str]) -> bool:
    """Say whether every file is there with the digest it was written with."""
    return all((output / file).is_file() and file_digest(output / file) == digest for file, digest in files.items())


@contextmanager
def clear_write_errors(output: Path) -> Iterator[None]:
    """Turn a full disk or a folder that cannot be written into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"no space left for {output}; free some and add --resume: nothing done is lost") from None
        raise RunError(f"{output} cannot be written ({error.strerror}); mend that and add --resume") from None
