"""Spark gives the bytes of the local engine, also for what kills a worker, and reads a table of the catalog."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import MARKER, NOTES, poison_processes, tree

from clinical_nlp.errors import InputError, MissingDataError, UsageError
from clinical_nlp.extraction import extract
from clinical_nlp.extraction.shards import DIED

pytest.importorskip("pyspark", reason="pip install 'clinical_nlp[spark]'")
if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
    pytest.skip("Spark needs Java", allow_module_level=True)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A session of the user's own, with its own conventions about time."""
    from pyspark.sql import SparkSession

    folder = tmp_path_factory.mktemp("spark")
    settings = {
        "spark.ui.enabled": "false",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.local.dir": str(folder),
        "spark.sql.warehouse.dir": str(folder / "warehouse"),
        "spark.sql.session.timeZone": "America/New_York",
    }
    builder = SparkSession.builder.master("local[2]")
    for name, value in settings.items():
        builder = builder.config(name, value)
    before = os.environ.get("PYSPARK_PYTHON")
    os.environ["PYSPARK_PYTHON"] = sys.executable
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("OFF")
    yield session
    session.stop()
    if before is None:
        del os.environ["PYSPARK_PYTHON"]


def test_spark_gives_the_bytes_of_the_local_engine(session, export, options, tmp_path):
    extract(export, output=tmp_path / "local", **options)
    result = extract(export, output=tmp_path / "spark", engine="spark", **options)
    assert (result.records, result.done, result.skipped, result.rejected) == (14, 11, 1, 2)
    assert tree(tmp_path / "spark") == tree(tmp_path / "local")
    assert session.range(3).count() == 3  # A session that was there before is left open.
    assert json.loads((tmp_path / "spark" / "manifest.json").read_text())["engine"] == "spark"


@pytest.mark.usefixtures("session")
def test_an_update_on_spark(export, options, tmp_path):
    extract(export, output=tmp_path / "out", **options)
    (export / "a4.txt").write_text("No cleft palate.")
    extract(export, output=tmp_path / "fresh", **options)
    result = extract(export, output=tmp_path / "out", engine="spark", update=True, **options)
    assert result.update.patients_touched == ("A/2",)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_a_table_of_the_catalog(session, options, tmp_path):
    from pyspark.sql import functions

    names = ["note_id", "patient_id", "institution", "written_at", "language", "Body", "unread"]
    rows = [(*note[:5], note[5], b"\x00") for note in NOTES]
    frame = session.createDataFrame(rows, names).withColumn(
        "written_at", functions.expr("try_to_timestamp(written_at || ' 20:00', 'yyyy-MM-dd HH:mm')")
    )
    frame.repartition(3).createOrReplaceTempView("notes")
    settings = {**options, "format": "catalog", "engine": "spark", "columns": {"text": "body"}}
    result = extract("notes", output=tmp_path / "out", **settings)
    assert (result.records, result.done, result.skipped) == (12, 11, 1)
    # 20:00 in New York is 01:00 of the next day in Greenwich.
    table = tmp_path / "notes.parquet"
    columns = {name: [row[place] for row in sorted(NOTES)] for place, name in enumerate(names[:6])}
    days = columns["written_at"]
    columns["written_at"] = [f"{day[:8]}{int(day[8:]) + 1:02}T01:00:00Z" if day else None for day in days]
    pq.write_table(pa.table(columns), table)
    extract(table, output=tmp_path / "file", **{**options, "format": "table", "columns": {"text": "Body"}})
    for folder in ("mentions", "note_nlp", "patients"):
        assert pq.read_table(tmp_path / "out" / folder).equals(pq.read_table(tmp_path / "file" / folder)), folder
    again = extract("notes", output=tmp_path / "out", resume=True, **settings)
    assert again.records == 12
    update = extract("notes", output=tmp_path / "out", update=True, **settings)
    assert update.update.patients_touched == ()
    assert not list((tmp_path / "out").rglob("*.jsonl"))


def test_wrong_tables_are_refused_and_leave_nothing(session, options, tmp_path):
    out = tmp_path / "out"
    settings = {**options, "format": "catalog"}
    with pytest.raises(UsageError, match="--engine spark"):
        extract("notes", output=out, **settings)
    with pytest.raises(MissingDataError, match="no table 'nowhere'"):
        extract("nowhere", output=out, engine="spark", **settings)
    session.createDataFrame([(b"x", "1", "1", "A")], ["text", "note_id", "patient_id", "institution"]).createTempView(
        "raw"
    )
    with pytest.raises(UsageError, match="column 'text' of raw is binary"):
        extract("raw", output=out, engine="spark", **settings)
    session.range(0).createTempView("none")
    with pytest.raises(InputError, match="table none"):
        extract("none", output=out, engine="spark", **settings)
    session.createDataFrame([("x", "1", "1")], ["body", "note_id", "patient_id"]).createTempView("lacking")
    with pytest.raises(UsageError, match="no column 'text'"):
        extract("lacking", output=out, engine="spark", **settings)
    assert not out.exists() or not list(out.iterdir())


RUN = """
import json, sys
from clinical_nlp.extraction import extract
extract(sys.argv[1], output=sys.argv[2], engine="spark", resume=sys.argv[4] == "resume", **json.loads(sys.argv[3]))
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_session_of_its_own_with_a_note_that_kills_its_worker(export, options, tmp_path, monkeypatch):
    poison_processes(tmp_path / "patched", monkeypatch, "os.kill(os.getpid(), 9)")
    extract(export, output=tmp_path / "local", workers=2, **options)
    options = {**options, "terminology": str(options["terminology"]), "workers": 2}
    command = [sys.executable, "-c", RUN, str(export), str(tmp_path / "spark"), json.dumps(options), ""]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert tree(tmp_path / "spark") == tree(tmp_path / "local")
    reasons = pq.read_table(tmp_path / "spark" / "rejected", columns=["reason"])["reason"].to_pylist()
    assert reasons.count(DIED) == 1
    assert MARKER not in done.stdout + done.stderr
    assert not list((tmp_path / "spark").glob(".*"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_spark_killed_at_random_times(export, options, tmp_path):
    options = {**options, "terminology": str(options["terminology"]), "workers": 2, "shard_notes": 1}
    command = [sys.executable, "-c", RUN, str(export)]
    began = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole"), json.dumps(options), ""], check=True)
    lasts = time.monotonic() - began
    whole = tree(tmp_path / "whole")
    generator = random.Random(1)
    for round_ in range(4):
        output = tmp_path / str(round_)
        process = subprocess.Popen([*command, str(output), json.dumps(options), ""], start_new_session=True)
        time.sleep(generator.uniform(0.6, 1.0) * lasts)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not (output / "manifest.json").exists():
            subprocess.run([*command, str(output), json.dumps(options), "resume"], check=True)
        assert tree(output) == whole, f"round {round_}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("session")
def test_a_hundred_thousand_notes(options, tmp_path):
    generator = random.Random(0)
    findings = ["fever", "cough", "seizure", "cleft palate", "a rash", "pain"]
    forms = [
        "No {}.",
        "Has {} today.",
        "Mother had {}.",
        "Possible {}.",
        "Denies {} but has {}.",
        "{} and {} on arrival.",
    ]
    notes = {"note_id": [], "patient_id": [], "institution": [], "written_at": [], "text": []}
    for number in range(100_000):
        patient = generator.randrange(12_000)
        lines = [generator.choice(forms).format(*generator.sample(findings, 2)) for _ in range(3)]
        notes["note_id"].append(f"n{number}")
        notes["patient_id"].append(f"p{patient}")
        notes["institution"].append("ABC"[patient % 3])
        notes["written_at"].append(f"2020-{generator.randint(1, 12):02}-{generator.randint(1, 28):02}")
        notes["text"].append("\n".join(lines))
    pq.write_table(pa.table(notes), tmp_path / "notes.parquet")
    settings = {"terminology": options["terminology"], "format": "table"}
    local = extract(tmp_path / "notes.parquet", output=tmp_path / "local", workers=2, **settings)
    spark = extract(tmp_path / "notes.parquet", output=tmp_path / "spark", engine="spark", **settings)
    assert (spark.done, spark.mentions, spark.patients) == (100_000, local.mentions, local.patients)
    assert spark.mentions > 200_000
    assert tree(tmp_path / "spark") == tree(tmp_path / "local")
