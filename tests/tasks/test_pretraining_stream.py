"""Notes larger than memory: divided by patient, tokenised in batches, and never all in memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tiny_models import write_decoder

from clinical_nlp.config import SplitConfig
from clinical_nlp.errors import ConfigError, InputError, RunError, TooFewPatientsError
from clinical_nlp.models.loading import load_base
from clinical_nlp.notes.schema import Note, Rejected, Skipped
from clinical_nlp.notes.streaming import NoteStream
from clinical_nlp.tasks import pretraining

SPLIT = SplitConfig(name="random", development=0.1, test=0.2)


def notes(count: int, *, per_patient: int = 4, size: int = 30) -> Iterator[Note]:
    for number in range(count):
        text = f"note {number} " + "no fever, no cough. " * size
        yield Note(str(number), f"p{number // per_patient}", "A", text, source=f"row {number}")


def stream(records: Any, tmp_path: Path, **options: Any) -> NoteStream:
    return NoteStream(records, SPLIT, **{"seed": 0, "limit": 500, "scratch": tmp_path / "scratch", **options})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_base(str(write_decoder(tmp_path_factory.mktemp("decoder"))), kind="language")


@pytest.fixture(scope="module")
def task(base: Any) -> pretraining.LanguageTask:
    return pretraining.language_task(base, 64)


def test_a_patient_is_in_one_part_whatever_the_order_of_the_notes(tmp_path: Path) -> None:
    forward, backward = (
        {(note.patient_id, part) for batch in stream(records, tmp_path).batches(7) for part, note in batch}
        for records in (list(notes(400)), list(notes(400))[::-1])
    )
    assert forward == backward
    assert len(forward) == len({patient for patient, _ in forward}) == 100
    test = sum(part == "test" for _, part in forward)
    assert 10 <= test <= 30


def test_held_out_patients_are_bounded_and_are_those_with_the_lowest_hash(tmp_path: Path) -> None:
    everyone = stream(notes(2000), tmp_path)
    list(everyone.batches())
    few, turned = (stream(records, tmp_path, limit=5) for records in (notes(2000), list(notes(2000))[::-1]))
    yielded = [note.patient_id for batch in few.batches(50) for part, note in batch if part == "test"]
    list(turned.batches())
    assert len(few.kept("test")) == 5
    assert few.kept("test") == turned.kept("test") < everyone.kept("test")
    assert few.kept("test") <= set(yielded)
    assert len(yielded) < sum(few.notes[part] for part in ("test",)) / 2
    assert "5 of the test patients are scored" in few.describe()


def test_copies_and_unreadable_records_are_counted_and_left_out(tmp_path: Path) -> None:
    one = next(notes(1))
    copy = Note("other", "another patient", "B", one.text, source="row 9")
    records = [one, copy, Skipped("row 3", "empty-text"), Rejected("row 4", "no patient_id")]
    found = stream(records, tmp_path)
    assert sum(len(batch) for batch in found.batches()) == 1
    assert found.duplicates == 1
    assert found.left_out == {"skipped (empty-text)": 1, "rejected (no patient_id)": 1}


def test_a_split_that_needs_all_notes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs all notes at once"):
        NoteStream([], SplitConfig(name="institution", test_institutions=["A"]), seed=0, limit=1, scratch=tmp_path)


def test_the_file_holds_every_training_token_and_the_scored_notes(base: Any, task: Any, tmp_path: Path) -> None:
    found = stream(notes(60), tmp_path, limit=2)
    pretraining.write_stream(found, task, base.tokenizer, tmp_path / "stream", batch=16)
    parts = {note.note_id: part for batch in stream(notes(60), tmp_path).batches() for part, note in batch}
    texts = {note.note_id: note.text for note in notes(60)}
    rows = task.examples([tmp_path / "stream" / "rows.arrow"], seed=0)
    expected = [
        ids for note, text in texts.items() if parts[note] == "train" for ids in task.encode([text], base.tokenizer)[0]
    ]
    assert sorted(token for row in rows for token in row["input_ids"]) == sorted(expected)
    assert pretraining.row_lengths(rows).tolist() == [len(row["input_ids"]) for row in rows]
    held_out, columns = pretraining.read_held_out(tmp_path / "stream", "test")
    assert set(columns["patient_id"]) == found.kept("test")
    assert len(held_out) == 8
    assert pretraining.parts_of_patients(tmp_path / "stream", {"p0", "nobody"}).keys() == {"p0"}


def test_memory_does_not_grow_with_the_corpus(base: Any, task: Any, tmp_path: Path) -> None:
    def peak(count: int) -> tuple[int, int]:
        in_arrow: list[int] = []

        def watched() -> Iterator[Note]:
            for note in notes(count):
                in_arrow.append(pa.total_allocated_bytes())
                yield note

        tracemalloc.start()
        found = stream(watched(), tmp_path, limit=5)
        pretraining.write_stream(found, task, base.tokenizer, tmp_path / "stream", batch=40)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most, max(in_arrow)

    peak(40)  # imports, and the first use of every library
    small, large = peak(240), peak(960)
    assert (tmp_path / "stream" / "rows.arrow").stat().st_size > 1_500_000
    assert large[0] < 1.3 * small[0]  # the largest of more batches is a little larger
    assert large[1] < 1.3 * small[1] + 100_000


def test_rows_are_read_from_the_file_and_not_into_memory(base: Any, task: Any, tmp_path: Path) -> None:
    pretraining.write_stream(stream(notes(400), tmp_path), task, base.tokenizer, tmp_path / "stream", batch=100)
    before = pa.total_allocated_bytes()
    rows = task.examples([tmp_path / "stream" / "rows.arrow"], seed=0)
    assert len(rows[len(rows) - 1]["input_ids"]) <= 64
    assert pa.total_allocated_bytes() - before < 200_000


def test_a_full_disk_is_one_clear_line(base: Any, task: Any, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(RunError, match="no space left for the tokens"):
            pretraining.write_stream(stream(notes(400), tmp_path), task, base.tokenizer, tmp_path / "stream", batch=50)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_stream_without_a_patient_to_train_on_or_to_score_is_refused(base: Any, task: Any, tmp_path: Path) -> None:
    with pytest.raises(TooFewPatientsError, match="no patient fell into"):
        pretraining.write_stream(stream(notes(4), tmp_path), task, base.tokenizer, tmp_path / "stream")


def test_notes_without_tokens_are_counted_and_refused_when_there_is_nothing_else(
    base: Any, task: Any, tmp_path: Path
) -> None:
    class Deaf:
        eos_token_id = bos_token_id = 1

        def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[] if "note 1" in text else [5, 6] for text in texts]}

    pretraining.write_stream(stream(notes(100), tmp_path), task, Deaf(), tmp_path / "stream")
    assert pretraining.read_facts(tmp_path / "stream")["n_without_tokens"] == 11
    with pytest.raises(InputError, match="no note has a token"):
        silent = (Note(f"{n}", f"p{n}", "A", f"note 1 {n}", source="row") for n in range(100))
        pretraining.write_stream(stream(silent, tmp_path), task, Deaf(), tmp_path / "stream")
