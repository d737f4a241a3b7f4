"""The batch measured: does it stay linear and flat, what does the ledger cost, and how fast is it end to end?

    taskset -c 1 python benchmarks/batch.py --out benchmarks/batch_linear.json linear --notes 1000000
    python benchmarks/batch.py --out benchmarks/batch_speed.json speed --mtsamples $CLINICAL_NLP_DATA/mtsamples

`linear` runs the whole batch on synthetic notes with an annotator that costs nothing, so that what is left is the
batch's own. `speed` runs everything, from a Parquet table to every output, on notes of 300 and of 1,900 words; notes a
processor second are given beside notes a second, since other work on the machine stretches only the latter.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from measuring import MIB, Peak, machine, unreclaimable

from clinical_nlp.corpora.synthetic_hospitals import generate
from clinical_nlp.extraction import extract, outputs, shards
from clinical_nlp.extraction.engines import local
from clinical_nlp.notes.corpus import load_corpus
from clinical_nlp.notes.schema import Note
from clinical_nlp.runs import package_versions

_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("note_id", "patient_id", "institution")),
        pa.field("written_at", pa.timestamp("us", tz="UTC")),
        pa.field("text", pa.large_string()),
    ]
)
_NOTES_A_PATIENT = 10
_CONCEPTS = ("HP:0001945", "HP:0012735", "HP:0001250", "HP:0000822", "HP:0001903", "HP:0002094", "HP:0100749")


def texts(words: int | None, count: int, given: Sequence[str] = ()) -> list[str]:
    """Return at most `count` different texts, synthetic or given.

    With `words`, notes are joined until they have that many, and cut there.
    """
    found: list[str] = []
    held: list[str] = []
    for text in given or (item.note.text for item in generate(institutions=3, patients=1_000_000)):
        held.append(text)
        if words is None:
            found, held = [*found, *held], []
        elif sum(len(text.split()) for text in held) >= words:
            found.append(_first_words("\n\n".join(held), words))
            held = []
        if len(found) == count:
            break
    return found


def _first_words(text: str, words: int) -> str:
    end = 0
    for word in islice(text.split(), words):
        end = text.index(word, end) + len(word)
    return text[:end]


def write_notes(path: Path, pool: Sequence[str], count: int) -> None:
    """Write a table of `count` notes whose texts are taken from the pool in turn."""
    day = datetime.timedelta(days=1)
    begin = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    source = cycle(pool)
    with pq.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:
        for start in range(0, count, 10_000):
            numbers = range(start, min(start + 10_000, count))
            patients = [number // _NOTES_A_PATIENT for number in numbers]
            columns = [
                [f"n{number}" for number in numbers],
                [f"p{patient}" for patient in patients],
                [f"hospital-{patient % 3}" for patient in patients],
                [begin + day * (number % _NOTES_A_PATIENT) for number in numbers],
                list(islice(source, len(numbers))),
            ]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
            writer.write_table(pa.table(arrays, schema=_SCHEMA))


class StubExtractor:
    """Finds one mention at the beginning of every note, at no cost."""

    def __init__(self, terminology: str, model: str | None = None, **lanes: Any) -> None:
        pass

    def annotate(self, notes: Sequence[Note]) -> list[shards.Annotated]:
        """Return one mention a note."""
        return [shards.Annotated((self._mention(note),)) for note in notes]

    def _mention(self, note: Note) -> dict[str, Any]:
        number = zlib.crc32(note.note_id.encode())
        return {
            **dict.fromkeys(shards.STAGED_SCHEMA.names),
            **{name: getattr(note, name) for name in ("institution", "note_id", "patient_id", "encounter_id")},
            **{name: getattr(note, name) for name in ("note_type", "written_at")},
            "start": 0,
            "end": 5,
            "text": note.text[:5],
            "concept_id": _CONCEPTS[number % len(_CONCEPTS)],
            "concept_label": "stub",
            "label": "phenotype",
            "presence": ("present", "present", "absent", "uncertain")[number % 4],
            "temporality": "current",
            "modality": "actual",
            "experiencer": "patient",
            "cues": [],
            "score": 1.0,
            "lane": "dictionary",
            "sentence_digest": f"{number:032x}",
            "snippet": note.text[:100],
        }


class Meter:
    """Adds up the time that calls of a function take."""

    def __init__(self, module: Any, name: str) -> None:
        self.seconds = 0.0
        self._module, self._name, self._call = module, name, getattr(module, name)
        setattr(module, name, self._timed)

    def _timed(self, *arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return self._call(*arguments, **options)
        finally:
            self.seconds += time.perf_counter() - began

    def stop(self) -> None:
        """Put the function back."""
        setattr(self._module, self._name, self._call)


def linear(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the batch with the stub over half of the notes and over all, and see what grows."""
    local.Extractor = StubExtractor  # type: ignore[misc, assignment]
    pool = texts(None, 2000)
    runs = []
    for count in (arguments.notes // 2, arguments.notes):
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
            runs.append(_one_batch(Path(name), pool, count))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    half, whole = runs
    return {
        "what": "the whole batch with an annotator that costs nothing, one worker",
        "notes_of_words": round(sum(len(text.split()) for text in pool) / len(pool)),
        "half_of_the_notes": half,
        "all_notes": whole,
        "seconds_all_over_half": round(whole["seconds"] / half["seconds"], 3),
    }


def _one_batch(folder: Path, pool: Sequence[str], count: int) -> dict[str, Any]:
    write_notes(folder / "notes.parquet", pool, count)
    marks: list[tuple[int, float, float, int]] = []
    ledger, written, closing = Meter(shards, "_enter"), Meter(local, "write_shard"), Meter(outputs, "write_outputs")
    commit = local.write_shard

    def noting(output: Path, shard: Any, annotated: Any) -> Any:
        record = commit(output, shard, annotated)
        done = (marks[-1][0] if marks else 0) + record["records"]
        marks.append((done, time.perf_counter(), time.process_time(), unreclaimable()))
        return record

    local.write_shard = noting
    began, processor = time.perf_counter(), time.process_time()
    with Peak(0.05) as peak:
        result = extract(folder / "notes.parquet", format="table", output=folder / "out")
    seconds = time.perf_counter() - began
    local.write_shard = commit
    for meter in (closing, written, ledger):
        meter.stop()
    assert result.done == count == result.mentions
    halves = _halves(marks, began, 1), _halves(marks, processor, 2)
    tenths = [marks[min(len(marks) - 1, len(marks) * tenth // 10)] for tenth in range(1, 11)]
    return {
        "notes": count,
        "shards": len(marks),
        "seconds": round(seconds, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
        "notes_per_second": round(count / seconds),
        "second_half_over_first": round(halves[0], 3),
        "second_half_over_first_processor": round(halves[1], 3),
        "outputs_seconds": round(closing.seconds, 1),
        "shard_files_seconds": round(written.seconds, 1),
        "ledger_seconds": round(ledger.seconds, 2),
        "ledger_share": round(ledger.seconds / seconds, 4),
        "memory_mib_by_tenth": [round(mark[3] / MIB) for mark in tenths],
        "memory_mib_peak_with_outputs": round(peak.bytes / MIB),
    }


def _halves(marks: Sequence[tuple[int, float, float, int]], began: float, column: int) -> float:
    """Return the time of the second half of the shards over that of the first, the first shard (loading) left out."""
    times = [mark[column] for mark in marks]
    middle = len(times) // 2
    return (times[-1] - times[middle]) / (times[middle] - times[0])


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything on notes of two lengths, with one worker and two; then each tagger on short synthetic ones."""
    found = []
    given = (
        () if arguments.mtsamples is None else load_corpus("mtsamples", arguments.mtsamples).notes["text"].to_pylist()
    )
    lanes = [
        (300, arguments.short, None, given),
        (1900, arguments.long, None, given),
        (300, arguments.short, None, ()),
        (1900, arguments.long, None, ()),
        *((300, arguments.tagged, model, ()) for model in arguments.models),
    ]
    for words, count, model, source in lanes if given else lanes[2:]:
        pool = texts(words, min(count, 2000), source)
        for workers in arguments.workers:
            with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
                timed = _timed(Path(name), pool, words, count, workers, model)
                found.append({"texts": "mtsamples" if source else "synthetic", **timed})
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return {
        "what": "sections, sentences, dictionary, assertion and all outputs, from a Parquet table; start-up included",
        "load_average_at_the_end": [round(load, 2) for load in os.getloadavg()],
        "runs": found,
    }


def _timed(
    folder: Path, pool: Sequence[str], words: int, count: int, workers: int, model: Path | None
) -> dict[str, Any]:
    write_notes(folder / "notes.parquet", pool, count)
    before, began = _processor_seconds(), time.perf_counter()
    closing = Meter(outputs, "write_outputs")
    lane = {} if model is None else {"model": str(model)}
    result = extract(folder / "notes.parquet", format="table", output=folder / "out", workers=workers, **lane)
    seconds, used = time.perf_counter() - began, _processor_seconds() - before
    closing.stop()
    size = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
    shutil.rmtree(folder / "out")
    return {
        "words": words,
        "tagger": None if model is None else model.name,
        "notes": count,
        "workers": workers,
        "seconds": round(seconds, 1),
        "notes_per_second": round(count / seconds, 1),
        "processor_seconds": round(used, 1),
        "notes_per_processor_second": round(count / used, 1),
        "outputs_seconds": round(closing.seconds, 1),
        "mentions_per_note": round(result.mentions / count, 1),
        "output_mib": round(size / MIB),
    }


def _processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(item.ru_utime + item.ru_stime for item in used)


def main() -> None:
    """Run one benchmark and print or write one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file (default: standard output)")
    parser.add_argument("--scratch", help="folder for the notes and outputs (default: that of the system)")
    verbs = parser.add_subparsers(dest="verb", required=True)
    long = verbs.add_parser("linear")
    long.add_argument("--notes", type=int, default=1_000_000)
    fast = verbs.add_parser("speed")
    fast.add_argument("--short", type=int, default=10_000, help="notes of 300 words")
    fast.add_argument("--long", type=int, default=2_000, help="notes of 1,900 words")
    fast.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    fast.add_argument("--models", type=Path, nargs="*", default=[], help="ner runs to read with, one after another")
    fast.add_argument("--mtsamples", type=Path, help="folder of that corpus, to read real notes too")
    fast.add_argument("--tagged", type=int, default=400, help="notes of 300 words for each of them")
    arguments = parser.parse_args()
    run: Callable[[argparse.Namespace], dict[str, Any]] = {"linear": linear, "speed": speed}[arguments.verb]
    given = {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("out", "scratch", "run", "models", "mtsamples")
    }
    result = {
        "benchmark": f"batch {arguments.verb}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(int(os.environ.get("OMP_NUM_THREADS", "0"))),
        "packages": package_versions(),
        "arguments": given,
        **run(arguments),
    }
    body = json.dumps(result, indent=1) + "\n"
    if arguments.out is None:
        sys.stdout.write(body)
    else:
        arguments.out.write_text(body, "utf-8")


if __name__ == "__main__":
    main()
