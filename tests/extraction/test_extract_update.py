"""An output brought up to date equals a fresh one, and only the patients that a change touches are made anew."""

import fcntl
import json
import os
import random
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import COPIED, tree

from clinical_nlp.errors import ConfigError, RunError, UsageError
from clinical_nlp.extraction import extract
from clinical_nlp.extraction.shards import Extractor


def change(export):
    """Add, amend and delete: patients A/1 and B/5, the new B/6, and A/3, whose only note is gone."""
    (export / "a2.txt").write_text(f"{COPIED} No cough today.")
    (export / "a7.txt").unlink()
    (export / "a0.txt").write_text(COPIED)  # the first of the export and, by its date, of the patient
    (export / "b8.txt").write_text("Seizure.")
    table = (export / "notes.csv").read_text("utf-8")
    table = table.replace("a7,3,A,2020-01-04,en\n", "").replace("b5,5,B,2020-03-04,en", "b5,5,B,2020-03-05,en")
    (export / "notes.csv").write_text(f"{table}a0,1,A,2019-12-31,en\nb8,6,B,2020-04-01,en\n", "utf-8")


TOUCHED = ("A/1", "A/3", "B/5", "B/6")


@pytest.fixture
def annotated(monkeypatch):
    """What is annotated, by note id."""
    found = []
    annotate = Extractor.annotate

    def noting(self, notes):
        found.extend(note.note_id for note in notes)
        return annotate(self, notes)

    monkeypatch.setattr(Extractor, "annotate", noting)
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_an_update_equals_a_fresh_run_and_touches_only_the_changed(export, options, tmp_path, annotated, workers):
    out = tmp_path / "out"
    extract(export, output=out, **options)
    before = {path.name: path.stat().st_ino for path in (out / "phenopackets").iterdir()}
    change(export)
    annotated.clear()
    result = extract(export, output=out, update=True, workers=workers, **options)
    if workers == 1:
        assert annotated == ["a0", "a2", "b8"]  # the date of b5 is not its text
    fresh = extract(export, output=tmp_path / "fresh", **options)
    assert tree(out) == tree(tmp_path / "fresh")
    assert (result.records, result.done, result.mentions) == (fresh.records, fresh.done, fresh.mentions)
    assert (result.update.added, result.update.amended, result.update.deleted) == (2, 2, 1)
    assert result.update.patients_touched == TOUCHED
    assert "2 notes added, 2 amended, 1 deleted; 4 patients touched" in str(result)
    assert json.loads((out / "manifest.json").read_text())["update"]["patients_touched"] == list(TOUCHED)
    kept = {path.name for path in (out / "phenopackets").iterdir() if path.stat().st_ino == before.get(path.name)}
    assert kept == {"A%2F2.json", "B%2F1.json", "B%2F4%20%2F%20%C3%BC.json"}
    # And again, with nothing to do.
    annotated.clear()
    again = extract(export, output=out, update=True, **options)
    assert not annotated
    assert again.update.patients_touched == ()
    assert tree(out) == tree(tmp_path / "fresh")


def test_five_percent_added_two_amended_one_deleted(options, tmp_path):
    from clinical_nlp.corpora.synthetic_hospitals import generate

    rows = []
    for item in generate(institutions=2, patients=60):
        note = item.note
        rows.append({name: getattr(note, name) for name in ("note_id", "patient_id", "institution", "text")})
        rows[-1] |= {"written_at": note.written_at, "patient_id": f"{note.institution}-{note.patient_id}"}
    generator = random.Random(2)
    kept = len(rows) * 20 // 21
    old, added = rows[:kept], rows[kept:]
    assert len(added) >= 0.04 * kept
    changed = generator.sample(range(kept), 3 * kept // 100)
    amended, deleted = changed[: 2 * kept // 100], set(changed[2 * kept // 100 :])
    new = [dict(row) for row in old]
    for place in amended:
        new[place]["text"] += "\nAddendum: no seizure."
    new = [row for place, row in enumerate(new) if place not in deleted]
    for row in added:
        new.insert(generator.randrange(len(new)), row)
    settings = {**options, "format": "table", "shard_notes": 50}
    pq.write_table(pa.Table.from_pylist(old), tmp_path / "old.parquet")
    pq.write_table(pa.Table.from_pylist(new), tmp_path / "new.parquet")
    extract(tmp_path / "old.parquet", output=tmp_path / "out", **settings)
    result = extract(tmp_path / "new.parquet", output=tmp_path / "out", update=True, **settings)
    extract(tmp_path / "new.parquet", output=tmp_path / "fresh", **settings)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")
    assert (result.update.added, result.update.amended, result.update.deleted) == (
        len(added),
        len(amended),
        len(deleted),
    )
    places = [*added, *(old[place] for place in changed)]
    assert set(result.update.patients_touched) == {f"{row['institution']}/{row['patient_id']}" for row in places}


def test_demographics_and_another_folder_count_as_changes(export, options, tmp_path):
    extract(export, output=tmp_path / "out", **options)
    moved = shutil.move(export, tmp_path / "november")
    table = (tmp_path / "november" / "patients.csv").read_text()
    (tmp_path / "november" / "patients.csv").write_text(table.replace("1990-05-06", "1990-05-07"))
    result = extract(moved, output=tmp_path / "out", update=True, **options)
    assert result.update.patients_touched == ("A/2",)
    extract(moved, output=tmp_path / "fresh", **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_the_order_of_undated_copies_counts_as_a_change(options, tmp_path):
    (tmp_path / "export").mkdir()
    table = tmp_path / "export" / "notes.csv"
    for name in "ab":
        (tmp_path / "export" / f"{name}.txt").write_text(COPIED)
    table.write_text("note_id,patient_id,written_at\na,1,2020-01-01\nb,1,2020-01-02\n")
    extract(tmp_path / "export", output=tmp_path / "out", **options)
    table.write_text("note_id,patient_id,written_at\na,1,2020-01-03\nb,1,2020-01-02\n")
    extract(tmp_path / "export", output=tmp_path / "out", update=True, **options)
    copied = {row["note_id"]: row["copied_from"] for row in pq.read_table(tmp_path / "out" / "mentions").to_pylist()}
    assert copied == {"a": "b", "b": None}


def test_what_cannot_be_brought_up_to_date_is_refused_and_left_alone(export, options, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="leave --update out"):
        extract(export, output=out, update=True, **options)
    extract(export, output=out, **options)
    before = tree(out)
    with pytest.raises(RunError, match="'propagate' differs"):
        extract(export, output=out, update=True, propagate=True, **options)
    with pytest.raises(ConfigError):
        extract(export, output=out, update=True, propagat=True, **options)
    change(export)
    with pytest.raises(RunError, match="use --update"):
        extract(export, output=out, retry_rejected=True, **options)
    terminology = options["terminology"].read_text()
    options["terminology"].write_text(terminology.replace("Cleft palate", "Split palate"))
    with pytest.raises(RunError, match="its terminology is not what is used now"):
        extract(export, output=out, update=True, **options)
    options["terminology"].write_text(terminology)
    with open(out / "plan.json", "rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="in use by another process"):
            extract(export, output=out, update=True, **options)
    assert tree(out) == before
    part = min((out / "rejected").iterdir())
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match="not those that were written"):
        extract(export, output=out, update=True, **options)


SWEEP = """
import json, os, signal, sys
from pathlib import Path
import duckdb, pyarrow.parquet
import clinical_nlp.extraction.update, clinical_nlp.extraction.engines.local, clinical_nlp.language.mentions
import clinical_nlp.notes.readers.text, shutil
from clinical_nlp.extraction import extract

source, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr)
            os._exit(1)
    return os.waitpid(pid, 0)[1]

def dying(output, point):
    count = 0
    def counting(call):
        def counted(*arguments, **options):
            nonlocal count
            count += 1
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        return counted
    for name in ("replace", "rename", "link", "unlink", "rmdir"):
        setattr(os, name, counting(getattr(os, name)))
    extract(source, output=output, update=True, **options)

point, points = int(sys.argv[4]), 0
while True:
    output = folder / str(points)
    shutil.copytree(folder / "old", output)
    status = child(lambda: dying(output, point))
    if status == 0:
        break
    assert os.WIFSIGNALED(status), status
    assert child(lambda: extract(source, output=output, update=True, **options)) == 0, points
    point, points = point + int(sys.argv[4]), points + 1
print(points)
"""


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_an_update_that_is_killed_at_any_change_of_the_disk_can_be_done_again(export, options, tmp_path, every):
    options = {**options, "terminology": str(options["terminology"]), "shard_notes": 20}
    (tmp_path / "killed").mkdir()
    extract(export, output=tmp_path / "killed" / "old", **options)
    change(export)
    extract(export, output=tmp_path / "fresh", **options)
    done = subprocess.run(
        [sys.executable, "-c", SWEEP, str(export), str(tmp_path / "killed"), json.dumps(options), str(every)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    points = int(done.stdout)
    assert points * every > 60
    fresh = tree(tmp_path / "fresh")
    for point in range(points):
        assert tree(tmp_path / "killed" / str(point)) == fresh, f"killed at change {point}"
