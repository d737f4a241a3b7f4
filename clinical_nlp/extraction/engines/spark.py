"""Shards on Spark: each shard is one row, annotated through `mapInArrow`; the driver alone writes.

The driver reads the export, cuts it into shards and commits each with `write_shard`, as the local engine does. What
Spark repeats (a task that is tried again, or twice at once) can therefore change nothing in the output, and executors
need no access to the output folder. They need this package, and the terminology file and model at the same path.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from clinical_nlp.errors import MissingDataError, RunError, UsageError
from clinical_nlp.extraction.plan import Shard
from clinical_nlp.extraction.shards import DIED, STAGED_SCHEMA, Annotated, Extractor, outcomes, to_annotate, write_shard
from clinical_nlp.notes.schema import Note, iter_notes, notes_table

_IN_FLIGHT = 2
_ROW = "shard long, mentions binary, reasons string"
_FOUND = STAGED_SCHEMA.append(pa.field("place", pa.int64()))
_PROBE = Note("probe", "probe", "probe", "No fever.", "probe")
_TEXT_TIMES = {"timestampFormat": "yyyy-MM-dd'T'HH:mm:ss.SSSSSSXXX", "timeZone": "UTC"}


@contextlib.contextmanager
def spark_session(folder: Path, workers: int) -> Iterator[Any]:
    """Give the session that is active, or that of `spark-submit` or Spark Connect, else a local one.

    Parameters
    ----------
    folder : where a local session keeps its scratch files, which hold note text; it is stopped at the end.
    workers : threads of a local session.

    Raises
    ------
    MissingDataError : pyspark is not installed, or no local session can be started.
    """
    try:
        from pyspark import SparkContext
        from pyspark.sql import SparkSession
    except ImportError:
        raise MissingDataError("--engine spark needs pyspark: pip install 'clinical_nlp[spark]'") from None
    active = SparkSession.getActiveSession()
    if active is not None:
        yield active
        return
    begun_elsewhere = {"PYSPARK_GATEWAY_PORT", "SPARK_REMOTE"} & set(os.environ)
    if begun_elsewhere or getattr(SparkContext, "_active_spark_context", None) is not None:
        yield SparkSession.builder.getOrCreate()
        return
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "OFF",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.memory": "2g",
        "spark.driver.maxResultSize": "0",
        "spark.rpc.message.maxSize": "1024",
        "spark.local.dir": str(folder),
        "spark.sql.warehouse.dir": str(folder / "warehouse"),
        "spark.driver.extraJavaOptions": f'"-Djava.io.tmpdir={folder}"',
    }
    builder = SparkSession.builder.master(f"local[{workers}]").appName("clinical-nlp extract")
    for name, value in settings.items():
        builder = builder.config(name, value)
    with _environment(
        PYSPARK_PYTHON=sys.executable, PYSPARK_DRIVER_PYTHON=sys.executable, PYTHONPATH=os.pathsep.join(sys.path)
    ):
        try:
            session = builder.getOrCreate()
        except Exception as error:
            raise MissingDataError(
                f"a local Spark session could not be started ({type(error).__name__}); is Java 17 or newer installed?"
            ) from None
        try:
            yield session
        finally:
            session.stop()


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def process(
    shards: Iterable[Shard],
    output: Path,
    *,
    session: Any,
    terminology: str,
    model: str | None,
    measurements: bool,
    verify: str | None,
    assertion: str | None,
    workers: int,
) -> Iterator[dict[str, Any]]:
    """Work through shards on Spark and yield their ledger records in order.

    Parameters
    ----------
    shards : what is to be done; no more than two waves are held at a time.
    output : the run directory, on the driver.
    session : a Spark session.
    terminology, model, measurements, verify, assertion : as in the config; the paths are ones that the executors know
        too.
    workers : shards that are worked on at a time, where the session does not say.
    """
    batch = _Batch(
        session,
        terminology=terminology,
        model=_absolute(model),
        measurements=measurements,
        verify=_absolute(verify),
        assertion=_absolute(assertion),
    )
    batch.probe()
    size = _parallelism(session, workers)
    stream = iter(shards)
    with ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="spark") as pool:
        waiting: deque[tuple[list[Shard], Future[list[list[Annotated]]]]] = deque()
        try:
            while True:
                while len(waiting) < _IN_FLIGHT and (wave := list(islice(stream, size))):
                    waiting.append((wave, pool.submit(batch.annotate, [to_annotate(shard) for shard in wave])))
                if not waiting:
                    return
                wave, done = waiting.popleft()
                for shard, annotated in zip(wave, done.result(), strict=True):
                    yield write_shard(output, shard, outcomes(shard, annotated))
        finally:
            for _, done in waiting:
                done.cancel()


def _absolute(model: str | None) -> str | None:
    """Return a path as executors find it; a model that comes with the package has none."""
    return str(Path(model).resolve()) if model is not None and Path(model).is_dir() else model


def _parallelism(session: Any, workers: int) -> int:
    try:
        return max(1, session.sparkContext.defaultParallelism)
    except Exception:  # Spark Connect has no context
        return workers


class _Batch:
    """Annotates lists of notes on Spark; a note that ends its worker process is found and rejected."""

    def __init__(self, session: Any, **how: Any) -> None:
        self._session = session
        self._work = partial(_annotate, **how)

    def probe(self) -> None:
        """Annotate a harmless note, so that what is wrong with the cluster is not taken for the notes' fault.

        Raises
        ------
        RunError : the executors cannot do it.
        """
        try:
            (outcome,) = self._run([[_PROBE]])[0]
        except Exception as error:
            reason = type(error).__name__
        else:
            if outcome.reason is None:
                return
            reason = outcome.reason
        raise RunError(
            f"Spark cannot annotate a note ({reason}): its executors need this version of clinical_nlp, and the "
            "terminology and model at the same path"
        )

    def annotate(self, notes: Sequence[Sequence[Note]]) -> list[list[Annotated]]:
        """Annotate several lists of notes, each as one task."""
        if not any(notes):
            return [[] for _ in notes]
        try:
            return self._run(notes)
        except Exception:
            return [self._apart(each) for each in notes]

    def _apart(self, notes: Sequence[Note]) -> list[Annotated]:
        """Annotate notes of which one may end its process, by halves."""
        if not notes:
            return []
        try:
            return self._run([notes])[0]
        except Exception:
            if len(notes) > 1:
                middle = len(notes) // 2
                return [*self._apart(notes[:middle]), *self._apart(notes[middle:])]
            self.probe()
            return [Annotated(reason=DIED)]

    def _run(self, notes: Sequence[Sequence[Note]]) -> list[list[Annotated]]:
        tasks = pa.table(
            {
                "shard": pa.array(range(len(notes)), pa.int64()),
                "notes": pa.array([_to_ipc(notes_table(each)) for each in notes], pa.binary()),
            }
        )
        found = self._session.createDataFrame(tasks).mapInArrow(self._work, _ROW).toArrow()
        rows = {row["shard"]: row for row in found.to_pylist()}
        return [_annotated(rows[place], len(each)) for place, each in enumerate(notes)]


def _annotated(row: Mapping[str, Any], n_notes: int) -> list[Annotated]:
    reasons: list[str | None] = json.loads(row["reasons"])
    if len(reasons) != n_notes:
        raise RunError("Spark gave back another number of notes than it was given; this is a bug, please report it")
    rows: list[list[dict[str, Any]]] = [[] for _ in reasons]
    for mention in _from_ipc(row["mentions"]).to_pylist():
        rows[mention.pop("place")].append(mention)
    return [Annotated(tuple(rows[place]), reason) for place, reason in enumerate(reasons)]


@lru_cache(maxsize=1)
def _extractor(**how: Any) -> Extractor:
    return Extractor(**how)


def _annotate(batches: Iterator[pa.RecordBatch], **how: Any) -> Iterator[pa.RecordBatch]:
    """Annotate on an executor, with an `Extractor` made as `how` says: rows of `_ROW` from rows of (shard, notes)."""
    names = [part.partition(" ")[0] for part in _ROW.split(", ")]
    # What a library prints about its input would be note text in the executor's log.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            for batch in batches:
                for task in batch.to_pylist():
                    extractor = _extractor(**how)
                    annotated = extractor.annotate(list(iter_notes(_from_ipc(task["notes"]))))
                    rows = [row | {"place": place} for place, note in enumerate(annotated) for row in note.rows]
                    mentions = _to_ipc(pa.Table.from_pylist(rows, schema=_FOUND))
                    reasons = json.dumps([note.reason for note in annotated])
                    columns = [pa.array([task["shard"]], pa.int64()), pa.array([mentions]), pa.array([reasons])]
                    yield pa.RecordBatch.from_arrays(columns, names)
        # The message may quote a note, and Spark prints it on the driver.
        except Exception as error:
            failed = type(error).__name__
        else:
            return
    raise RuntimeError(f"a worker failed with {failed}")


def _to_ipc(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _from_ipc(data: bytes) -> pa.Table:
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()


def fetch_table(session: Any, name: str, columns: Iterable[str], path: Path) -> None:
    """Write what a reader may ask of a catalog table to a file of JSON Lines on the driver, in a fixed order.

    Parameters
    ----------
    session : a Spark session whose catalog holds the table.
    name : `table`, `schema.table` or `catalog.schema.table`.
    columns : names that may be read, in any case; the others are not fetched.
    path : the file, inside the run directory since it holds text.

    Raises
    ------
    MissingDataError : there is no such table.
    UsageError : a column that would be read is binary or nested.
    """
    from pyspark.sql import functions
    from pyspark.sql.types import ArrayType, BinaryType, MapType, StructType

    try:
        table = session.table(name)
        fields = list(table.schema.fields)
    except Exception:
        raise MissingDataError(f"the Spark session's catalog holds no table {name!r} that can be read") from None
    wanted = {column.lower() for column in columns}
    chosen = [field for field in fields if field.name.lower() in wanted]
    for field in chosen:
        if isinstance(field.dataType, BinaryType | ArrayType | MapType | StructType):
            kind = field.dataType.simpleString()
            raise UsageError(f"column {field.name!r} of {name} is {kind}; give a view that casts it to a string")
    if not chosen:
        path.write_text("", "utf-8")
        return
    quoted = [functions.col("`" + field.name.replace("`", "``") + "`") for field in chosen]
    rows = table.select(functions.to_json(functions.struct(*quoted), _TEXT_TIMES).alias("row")).orderBy("row")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows.toLocalIterator(prefetchPartitions=True):
            file.write(f"{row[0]}\n")
