"""From finished shards to the outputs: copied-forward text, NOTE_NLP, patients, phenopackets, FHIR.

Every step streams: shards one at a time, patients one at a time, and the sorts in between spill to disk inside the
output. Running it again gives the same bytes, so an interruption here costs only time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clinical_nlp.extraction import STAGE
from clinical_nlp.extraction.engines.local import gather
from clinical_nlp.extraction.gathering import (
    RESOURCES,
    Found,
    Gathered,
    Gatherer,
    Person,
    packet_id,
    patients_are_shared,
)
from clinical_nlp.extraction.patients import PATIENTS_SCHEMA
from clinical_nlp.extraction.plan import SYSTEM, ExtractionConfig
from clinical_nlp.extraction.shards import clear_write_errors, verifies
from clinical_nlp.language.terminology import Terminology
from clinical_nlp.notes.schema import Patient
from clinical_nlp.notes.writers.note_nlp import note_nlp_table
from clinical_nlp.notes.writers.phenopacket import file_name
from clinical_nlp.notes.writers.table import MENTION_SCHEMA, write_table
from clinical_nlp.runs import file_digest, sync_folder, write_json

NOTE_ID_MAP_SCHEMA = pa.schema(
    [
        pa.field("omop_note_id", pa.int64(), nullable=False),
        pa.field("institution", pa.string(), nullable=False),
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("patient_id", pa.string(), nullable=False),
    ]
)
"""Which integer stands for which note in NOTE_NLP: the note's own id where all are distinct positive integers (as in
an OMOP export), else its running number among the notes done."""

_DIGEST_OF_NOTE = "md5(concat_ws(chr(31), {}))".format(
    ", ".join(
        f"coalesce({name}::VARCHAR, chr(30))"
        for name in ("institution", "note_id", "encounter_id", "note_type", "written_at", "language", "text_sha256")
    )
)
_PEOPLE_SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("scope", "patient_id", "digest")])

_MEMORY = "512MB"
_PATIENT_ROWS = 20_000
_AT_ONCE = 200
"""Patients that are gathered at a time, in this process or in a worker."""
_FOR_WORKERS = 50_000
"""Mentions from which it is worth while to start workers for the patients: each loads the terminology first."""
_DONE = "ledger/outputs.json"


def write_outputs(
    output: Path,
    config: ExtractionConfig,
    terminology: Terminology,
    records: Sequence[Mapping[str, Any]],
    read_demographics: Callable[[], Iterator[Patient]],
    *,
    vocabulary: Mapping[str, tuple[int, int]] | None = None,
    previous: Path | None = None,
) -> dict[str, int]:
    """Write what needs all shards and return how much: patients, patient_concepts, phenopackets.

    Parameters
    ----------
    output : the run directory, with every shard done.
    config, terminology : of the batch.
    records : for each shard, its counts, in order.
    read_demographics : gives the patients of the export.
    vocabulary : concept id -> (OMOP concept, source concept), for NOTE_NLP.
    previous : an earlier output of the same settings; the phenopacket of a patient who is the same there stays the
        same file.
    """
    if (written := outputs_written(output)) is not None:
        return written
    for folder in ("mentions", "note_nlp", "patients", "phenopackets", "fhir"):
        shutil.rmtree(output / folder, ignore_errors=True)
    with clear_write_errors(output):
        scratch = output / STAGE / "duckdb"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        files = _mentions(output, config, records, scratch, vocabulary)
        n_mentions = sum(record["mentions"] for record in records)
        workers = config.workers if n_mentions >= _FOR_WORKERS else 1
        patients = _Patients(output, config, terminology, read_demographics, scratch, previous, workers)
        files |= patients.write()
        # One sync for all phenopackets: a rename of each would cost a disk flush a patient.
        os.sync()
        write_json(output / _DONE, {"counts": patients.counts, "files": files})
    return patients.counts


def outputs_written(output: Path) -> dict[str, int] | None:
    """Return the counts of outputs that were written to the end and still verify, else None."""
    try:
        written = json.loads((output / _DONE).read_text("utf-8"))
        return written["counts"] if verifies(output, written["files"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def connect(scratch: Path) -> Any:
    """Open DuckDB in bounded memory; what does not fit is on disk below `scratch`."""
    import duckdb

    connection = duckdb.connect(
        ":memory:",
        config={
            "memory_limit": _MEMORY,
            "temp_directory": str(scratch),
            "threads": 2,
            "preserve_insertion_order": True,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        },
    )
    connection.execute("SET TimeZone = 'UTC'")
    return connection


def _rows(connection: Any, query: str, size: int = 10_000) -> Iterator[dict[str, Any]]:
    """Stream the rows of a query."""
    for batch in connection.cursor().sql(query).to_arrow_reader(size):
        yield from batch.to_pylist()


class _Stream:
    """The rows of a query, taken some at a time as they come, never as Python objects."""

    def __init__(self, connection: Any, query: str, size: int = 10_000) -> None:
        self._reader = connection.cursor().sql(query).to_arrow_reader(size)
        self._rest = self._reader.schema.empty_table()

    def take(self, count: int) -> bytes:
        """Return the next `count` rows as an Arrow stream (a slice that is pickled takes the whole table along)."""
        parts = [self._rest]
        while sum(map(len, parts)) < count:
            parts.append(pa.Table.from_batches([self._reader.read_next_batch()]))
        rows = pa.concat_tables(parts)
        self._rest = rows.slice(count)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as stream:
            stream.write_table(rows.slice(0, count))
        taken: bytes = sink.getvalue().to_pybytes()
        return taken


def files_of(folder: Path) -> str:
    """Return the glob of a folder's Parquet files as SQL text; the folder's own name is taken literally."""
    literal = "".join(f"[{sign}]" if sign in "[*?" else sign for sign in str(folder)).replace("'", "''")
    return f"{literal}/*.parquet"


def person_of(config: ExtractionConfig) -> str:
    """Return the SQL of what two notes of one patient have in common."""
    return "patient_id" if patients_are_shared(config) else "institution, patient_id"


def _mentions(
    output: Path,
    config: ExtractionConfig,
    records: Sequence[Mapping[str, Any]],
    scratch: Path,
    vocabulary: Mapping[str, tuple[int, int]] | None,
) -> dict[str, str]:
    """Write mentions/, note_nlp/ and the id map from the staged shards."""
    connection = connect(scratch)
    staged, notes = files_of(output / STAGE / "mentions"), files_of(output / "notes")
    own_ids = connection.execute(
        f"""SELECT coalesce(bool_and(regexp_full_match(note_id, '[1-9][0-9]{{0,17}}')), false)
                   AND count(DISTINCT note_id) = count(*)
            FROM read_parquet('{notes}') WHERE outcome = 'done'"""
    ).fetchone()[0]
    # The earliest note (by date, then in the order of the export) that holds the sentence is the original.
    copies = _rows(
        connection,
        f"""WITH mention AS (
              SELECT institution, patient_id, note_id, written_at, file_row_number AS place, filename,
                     sentence_digest AS sentence
              FROM read_parquet('{staged}', file_row_number = true, filename = true)
              WHERE sentence_digest IS NOT NULL),
            original AS (
              SELECT {person_of(config)}, sentence,
                     arg_min({{'institution': institution, 'note_id': note_id}},
                             {{'undated': written_at IS NULL, 'at': written_at, 'file': filename, 'place': place}})
                       AS note
              FROM mention GROUP BY ALL HAVING count(DISTINCT (institution, note_id)) > 1)
            SELECT filename, place, original.note.note_id AS copied_from
            FROM mention JOIN original USING ({person_of(config)}, sentence)
            WHERE (original.note.institution, original.note.note_id) <> (institution, note_id)
            ORDER BY filename, place""",
    )
    copy = next(copies, None)
    written: dict[str, str] = {}
    n_done = n_mentions = 0
    id_map = output / "note_id_map.parquet"
    with pq.ParquetWriter(scratch / "note_id_map.parquet", NOTE_ID_MAP_SCHEMA, compression="zstd") as id_writer:
        for index, record in enumerate(records):
            name = f"part-{index:06d}.parquet"
            path = output / STAGE / "mentions" / name
            rows = pq.read_table(path)
            copied: list[str | None] = [None] * len(rows)
            while copy is not None and copy["filename"] == str(path):
                copied[copy["place"]] = copy["copied_from"]
                copy = next(copies, None)
            place = rows.schema.get_field_index("copied_from")
            rows = rows.set_column(place, rows.schema.field(place), pa.array(copied, pa.string()))
            note_rows = pq.read_table(
                output / "notes" / name,
                columns=["institution", "note_id", "patient_id"],
                filters=[("outcome", "=", "done")],
            ).to_pylist()
            note_ids = {
                (row["institution"], row["note_id"]): int(row["note_id"]) if own_ids else number
                for number, row in enumerate(note_rows, start=n_done + 1)
            }
            id_writer.write_table(
                pa.Table.from_pylist(
                    [{**row, "omop_note_id": note_ids[row["institution"], row["note_id"]]} for row in note_rows],
                    schema=NOTE_ID_MAP_SCHEMA,
                )
            )
            table = note_nlp_table(
                rows,
                note_ids=note_ids,
                first_id=n_mentions + 1,
                nlp_system=SYSTEM,
                vocabulary=vocabulary,
                nlp_date=config.processed_on,
            )
            written[f"note_nlp/{name}"] = write_table(output / "note_nlp" / name, table)
            written[f"mentions/{name}"] = write_table(output / "mentions" / name, rows.select(MENTION_SCHEMA.names))
            n_done, n_mentions = n_done + record["done"], n_mentions + record["mentions"]
    connection.close()
    os.replace(scratch / "note_id_map.parquet", id_map)
    sync_folder(output)
    return written


class _Patients:
    """Writes patients/, phenopackets/ and fhir/, some patients at a time."""

    def __init__(
        self,
        output: Path,
        config: ExtractionConfig,
        terminology: Terminology,
        read_demographics: Callable[[], Iterator[Patient]],
        scratch: Path,
        previous: Path | None,
        workers: int,
    ) -> None:
        self.counts = {"patients": 0, "patient_concepts": 0, "phenopackets": 0}
        self._previous = previous
        self._output, self._config, self._terminology = output, config, terminology
        self._read_demographics, self._scratch = read_demographics, scratch
        self._workers = workers
        self._gatherer = Gatherer(config, terminology)
        self._held: list[pa.Table] = []
        self._written: dict[str, str] = {}

    def write(self) -> dict[str, str]:
        """Write everything and return the digests of the tables."""
        connection = connect(self._scratch)
        self._load_demographics(connection)
        person = person_of(self._config)
        scoped = not patients_are_shared(self._config)
        scope_and_id = person.replace("institution", "scope")
        mentions = files_of(self._output / "mentions")
        # Demographics name no institution: where an id may be two people, they are used only if it is not.
        # The digest is of all that a patient's results depend on, so that equal digests mean equal results.
        people = _rows(
            connection,
            f"""WITH person AS (
                  SELECT min(institution) AS scope, patient_id, max(written_at) AS latest,
                         string_agg({_DIGEST_OF_NOTE}, '' ORDER BY number) AS notes
                  FROM read_parquet('{files_of(self._output / "notes")}') WHERE outcome = 'done' GROUP BY {person}),
                sure AS (
                  SELECT patient_id FROM person GROUP BY patient_id HAVING count(*) = 1),
                known AS (
                  SELECT patient_id, min(sex) AS sex, min(birth_date) AS birth_date, min(death_date) AS death_date
                  FROM demographics SEMI JOIN sure USING (patient_id) GROUP BY patient_id),
                found AS (
                  SELECT min(institution) AS scope, patient_id, count(*) AS n_mentions
                  FROM read_parquet('{mentions}') WHERE concept_id IS NOT NULL GROUP BY {person})
                SELECT person.scope, patient_id, latest, sex, birth_date, death_date,
                       coalesce(n_mentions, 0) AS n_mentions,
                       md5(notes || concat_ws('/', coalesce(sex, '-'), coalesce(birth_date::VARCHAR, '-'),
                                              coalesce(death_date::VARCHAR, '-'))) AS digest
                FROM person LEFT JOIN known USING (patient_id) LEFT JOIN found USING ({scope_and_id})
                ORDER BY {scope_and_id}""",
        )
        found = _Stream(
            connection,
            f"""SELECT institution, patient_id, note_id, written_at, "start", "end", concept_id, concept_label,
                       presence, temporality, modality, experiencer, copied_from
                FROM read_parquet('{mentions}') WHERE concept_id IS NOT NULL
                ORDER BY {person}, written_at NULLS LAST, institution, note_id, "start", "end", concept_id""",
        )
        if self._gatherer.writes_packets:
            (self._output / "phenopackets").mkdir(exist_ok=True)
        with ExitStack() as stack:
            lines = {}
            for name in RESOURCES:
                path = self._scratch / f"{name}.ndjson"
                lines[name] = stack.enter_context(open(path, "w", encoding="utf-8", newline="\n"))
            register = stack.enter_context(
                pq.ParquetWriter(self._scratch / "people.parquet", _PEOPLE_SCHEMA, compression="zstd")
            )
            batches = self._batches(people, found, scoped, register)
            for gathered in gather(batches, self._gatherer, self._config, workers=self._workers):
                for name, file in lines.items():
                    file.write(gathered.lines[name])
                self._take(gathered)
        self._flush()
        connection.close()
        (self._output / "fhir").mkdir()
        for name in (*(f"fhir/{name}.ndjson" for name in RESOURCES), "ledger/people.parquet"):
            os.replace(self._scratch / Path(name).name, self._output / name)
            self._written[name] = file_digest(self._output / name)
        return self._written

    def _unchanged(self) -> Callable[[str, str, str], bool]:
        """Return a function that says whether a patient is in the earlier output with this digest.

        It is asked in the order in which patients are written, so that neither list is held in memory.
        """
        if self._previous is None:
            return lambda scope, patient_id, digest: False
        register = pq.ParquetFile(self._previous / "ledger" / "people.parquet")
        earlier = (row for batch in register.iter_batches(_PATIENT_ROWS) for row in batch.to_pylist())
        row = next(earlier, None)

        def unchanged(scope: str, patient_id: str, digest: str) -> bool:
            nonlocal row
            while row is not None and (row["scope"], row["patient_id"]) < (scope, patient_id):
                row = next(earlier, None)
            return row is not None and (row["scope"], row["patient_id"], row["digest"]) == (scope, patient_id, digest)

        return unchanged

    def _load_demographics(self, connection: Any) -> None:
        connection.execute(
            "CREATE TABLE demographics (patient_id VARCHAR, sex VARCHAR, birth_date DATE, death_date DATE)"
        )
        held: list[tuple[Any, ...]] = []
        for patient in self._read_demographics():
            held.append((patient.patient_id, patient.sex, patient.birth_date, patient.death_date))
            if len(held) == 10_000:
                self._insert(connection, held)
                held = []
        self._insert(connection, held)

    def _insert(self, connection: Any, held: list[tuple[Any, ...]]) -> None:
        if held:
            names = ("patient_id", "sex", "birth_date", "death_date")
            columns = {name: list(values) for name, values in zip(names, zip(*held, strict=True), strict=True)}
            types = (pa.string(), pa.string(), pa.date32(), pa.date32())
            block = pa.table({name: pa.array(columns[name], kind) for name, kind in zip(names, types, strict=True)})
            connection.register("block", block)
            connection.execute("INSERT INTO demographics SELECT * FROM block")
            connection.unregister("block")

    def _batches(
        self, people: Iterator[dict[str, Any]], found: _Stream, scoped: bool, register: pq.ParquetWriter
    ) -> Iterator[Found]:
        """Take people and their mentions, both in the same order, some at a time; the people go in the register."""
        unchanged = self._unchanged()
        held: list[dict[str, Any]] = []
        batch: list[Person] = []
        for row in people:
            scope, patient_id, digest = row["scope"] if scoped else "", row["patient_id"], row["digest"]
            linked = unchanged(scope, patient_id, digest) and self._link(packet_id(scope, patient_id))
            patient = Patient(patient_id, row["sex"], row["birth_date"], row["death_date"])
            batch.append(Person(scope, patient, row["latest"], row["n_mentions"], with_packet=not linked))
            held.append({"scope": scope, "patient_id": patient_id, "digest": digest})
            self.counts["patients"] += 1
            if len(batch) == _AT_ONCE:
                yield Found(batch, found.take(sum(person.n_mentions for person in batch)))
                batch = []
            if len(held) == _PATIENT_ROWS:
                register.write_table(pa.Table.from_pylist(held, schema=_PEOPLE_SCHEMA))
                held = []
        register.write_table(pa.Table.from_pylist(held, schema=_PEOPLE_SCHEMA))
        yield Found(batch, found.take(sum(person.n_mentions for person in batch)))

    def _link(self, name: str) -> bool:
        """Take a phenopacket of the earlier output over as the same file, and say whether that could be done."""
        if self._previous is None or not self._gatherer.writes_packets:
            return False
        with contextlib.suppress(OSError):  # a file system without hard links: it is written again, with the same bytes
            os.link(self._previous / "phenopackets" / file_name(name), self._packet_path(name))
            self.counts["phenopackets"] += 1
            return True
        return False

    def _packet_path(self, name: str) -> Path:
        return self._output / "phenopackets" / file_name(name)

    def _take(self, gathered: Gathered) -> None:
        for name, data in gathered.packets:
            # Not atomic: until ledger/outputs.json says that all are written, the folder is made anew.
            self._packet_path(name).write_bytes(data)
        self.counts["phenopackets"] += len(gathered.packets)
        self.counts["patient_concepts"] += len(gathered.rows)
        self._held.append(gathered.rows)
        if sum(map(len, self._held)) >= _PATIENT_ROWS:
            self._flush()

    def _flush(self) -> None:
        name = f"patients/part-{len(self._written):06d}.parquet"
        table = pa.concat_tables(self._held or [PATIENTS_SCHEMA.empty_table()]).combine_chunks()
        if len(table) or not self._written:
            self._written[name] = write_table(self._output / name, table)
        self._held = []
