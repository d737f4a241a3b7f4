"""A finished output brought to a new state of its export: what is the same is taken over, and the rest done anew.

The new output is built beside the old one, in a folder inside it, by the same batch that a fresh call would run; notes
that are the same only skip their annotation. When it is whole, its files take the place of the old ones by renames
that an interrupted call can go on with. Until then the old output stays as it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from clinical_nlp.errors import RunError
from clinical_nlp.extraction import CATALOG, STAGE, Extraction, Update, summary_of
from clinical_nlp.extraction.outputs import connect, files_of, outputs_written
from clinical_nlp.extraction.plan import ExtractionConfig, Shard, make_plan
from clinical_nlp.extraction.shards import Annotated, verifies
from clinical_nlp.notes.readers import input_files
from clinical_nlp.notes.readers.index import DiskIndex
from clinical_nlp.notes.schema import Note
from clinical_nlp.progress import say
from clinical_nlp.runs import sync_folder, write_json

_NEXT = ".next"
_SWAP = ".swap.json"
_MAY_DIFFER = ("source", "attachments", "patient_map")
_PARTS_HELD = 3


class Previous:
    """What an earlier run found, note by note.

    Parameters
    ----------
    output : its finished directory.
    scratch : folder for an on-disk index.
    """

    def __init__(self, output: Path, scratch: Path) -> None:
        self.output = output
        self._scratch = scratch
        self._index: DiskIndex | None = None
        self._parts: OrderedDict[str, dict[tuple[str, str], list[dict[str, Any]]]] = OrderedDict()

    def with_known(self, shard: Shard) -> Shard:
        """Return a shard that knows the outcomes of the notes whose text the earlier run has annotated."""
        if self._index is None:
            self._index = self._indexed()
        known = {}
        for place, record in enumerate(shard.records):
            if not isinstance(record, Note):
                continue
            part, _, digest = (self._index.get("note", record.institution, record.note_id) or "").partition(" ")
            if digest and digest == record.text_sha256:
                found = self._part(part).get((record.institution, record.note_id), [])
                known[place] = Annotated(tuple(_now(row, record) for row in found))
        return replace(shard, known=known)

    def close(self) -> None:
        """Remove the index."""
        if self._index is not None:
            self._index.close()

    def _indexed(self) -> DiskIndex:
        index = DiskIndex(self._scratch)
        for path in sorted((self.output / "notes").glob("*.parquet")):
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=["institution", "note_id", "text_sha256", "outcome"]):
                    for row in batch.to_pylist():
                        if row["outcome"] == "done":
                            value = f"{path.name} {row['text_sha256']}"
                            index.put("note", row["institution"], row["note_id"], value=value)
        return index

    def _part(self, name: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
        if name not in self._parts:
            rows = pq.read_table(self.output / "mentions" / name).to_pylist()
            snippets = pq.read_table(self.output / "note_nlp" / name, columns=["snippet"])["snippet"].to_pylist()
            notes: dict[tuple[str, str], list[dict[str, Any]]] = {}
            for row, snippet in zip(rows, snippets, strict=True):
                notes.setdefault((row["institution"], row["note_id"]), []).append(row | {"snippet": snippet})
            self._parts[name] = notes
            if len(self._parts) > _PARTS_HELD:
                self._parts.popitem(last=False)
        self._parts.move_to_end(name)
        return self._parts[name]

    def compare(self, output: Path) -> Update:
        """Say what is different in the finished tables of a new output."""
        scratch = output / STAGE / "compare"
        scratch.mkdir(parents=True, exist_ok=True)
        connection = connect(scratch)
        same = ", ".join(("patient_id", "encounter_id", "note_type", "written_at", "language", "text_sha256"))

        def notes(folder: Path) -> str:
            return (
                f"(SELECT institution, note_id, row({same}) AS holds FROM read_parquet('{files_of(folder / 'notes')}') "
                "WHERE outcome = 'done')"
            )

        added, amended, deleted = connection.execute(
            f"""SELECT count(*) FILTER (was.holds IS NULL),
                       count(*) FILTER (was.holds IS NOT NULL AND now.holds IS NOT NULL
                                        AND was.holds IS DISTINCT FROM now.holds),
                       count(*) FILTER (now.holds IS NULL)
                FROM {notes(self.output)} AS was FULL JOIN {notes(output)} AS now USING (institution, note_id)"""
        ).fetchone()
        touched = connection.execute(
            f"""SELECT scope, patient_id
                FROM read_parquet('{files_of(self.output / "ledger")}') AS was
                FULL JOIN read_parquet('{files_of(output / "ledger")}') AS now USING (scope, patient_id)
                WHERE was.digest IS DISTINCT FROM now.digest ORDER BY scope, patient_id"""
        ).fetchall()
        connection.close()
        names = tuple(patient if not scope else f"{scope}/{patient}" for scope, patient in touched)
        return Update(added, amended, deleted, names)


def _now(row: dict[str, Any], note: Note) -> dict[str, Any]:
    """Return a mention as the note's record has it now."""
    fields = {name: getattr(note, name) for name in ("patient_id", "encounter_id", "note_type", "written_at")}
    return {**row, **fields, "copied_from": None}


def renew(config: ExtractionConfig, output: Path, batch: Callable[..., Extraction], *, same_export: bool) -> Extraction:
    """Build the output anew beside a finished one and put it in its place.

    Parameters
    ----------
    config : may differ from that of the finished output in the source, the attachments and the patient map.
    output : the finished output.
    batch : does a batch into a folder, given `resume` and `previous`.
    same_export : the export must be the one that the output was made from.

    Raises
    ------
    RunError : something that decides what is found is not what it was.
    """
    with _locked(output):
        return _renewed(config, output, batch, same_export=same_export)


def _renewed(
    config: ExtractionConfig, output: Path, batch: Callable[..., Extraction], *, same_export: bool
) -> Extraction:
    _check(output, _plan(config, with_export=same_export), same_export=same_export)
    if same_export and not _rejected(output):
        say(f"{output}: no note was rejected in extraction, so there is nothing to retry")
        return summary_of(output)
    fresh = output / _NEXT
    resume = fresh.is_dir() and config.format != CATALOG and _is_plan(fresh, _plan(config, with_export=True))
    if not resume:
        shutil.rmtree(fresh, ignore_errors=True)
    previous = Previous(output, fresh / STAGE / "previous")
    try:
        result = batch(config, fresh, resume=resume, previous=previous)
    finally:
        previous.close()
    write_json(output / _SWAP, {"names": sorted(path.name for path in fresh.iterdir())})
    finish_swap(output)
    return replace(result, output=output)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold a finished output against another update; the lock goes with the process, however it ends."""
    with open(output / "plan.json", "rb") as handle:
        with suppress(ImportError, OSError):  # not on Windows, or a network share without locks
            import fcntl

            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{output} is in use by another process; wait for it") from None
        yield


def _rejected(output: Path) -> bool:
    table = pq.read_table(output / "notes", columns=["outcome", "text_sha256"])
    return bool(table.filter((pc.field("outcome") == "rejected") & pc.field("text_sha256").is_valid()).num_rows)


def _plan(config: ExtractionConfig, *, with_export: bool) -> dict[str, Any]:
    from clinical_nlp.language.terminology import load_terminology

    source = Path(config.source)
    inputs = input_files(source, config.format) if with_export and config.format != CATALOG else []
    return make_plan(config, terminology=load_terminology(config.terminology), source=source, inputs=inputs)


def _is_plan(folder: Path, plan: dict[str, Any]) -> bool:
    try:
        return json.loads((folder / "plan.json").read_text("utf-8")) == plan
    except (OSError, ValueError):
        return False


def _check(output: Path, plan: dict[str, Any], *, same_export: bool) -> None:
    try:
        begun = json.loads((output / "plan.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise RunError(f"{output / 'plan.json'} is damaged; start again with another --output") from None
    for key, value in plan.items():
        was = begun.get(key)
        if key == "config":
            differ = [name for name in value if was.get(name) != value[name] and name not in _MAY_DIFFER]
            if differ:
                raise RunError(
                    f"{output} cannot be brought up to date: config key {differ[0]!r} differs from that of the output; "
                    "start again with another --output"
                )
        elif key == "export":
            if same_export and value and was != value:
                raise RunError(f"{output}: the export changed since; use --update, which retries what was rejected too")
        elif key != "patient_map" and was != value:
            raise RunError(
                f"{output} cannot be brought up to date: its {key} is not what is used now, so old and new results "
                "would differ for the same note; start again with another --output"
            )
    records = [json.loads(path.read_text("utf-8")) for path in sorted((output / "ledger").glob("[0-9]*.json"))]
    kept = {
        file: digest for record in records for file, digest in record["files"].items() if not file.startswith(STAGE)
    }
    if outputs_written(output) is None or not verifies(output, kept):
        raise RunError(f"{output}: its files are not those that were written; start again with another --output")


def finish_swap(output: Path) -> None:
    """Put a new output that is whole in the place of the old one; nothing is done where none is."""
    mark, fresh = output / _SWAP, output / _NEXT
    for leftover in output.glob(f".{_SWAP}.*.tmp"):
        leftover.unlink()
    if not mark.is_file():
        return
    # The manifest goes first and comes last: in between the output is half-written, for whoever looks.
    if (fresh / "manifest.json").is_file():
        (output / "manifest.json").unlink(missing_ok=True)
        for path in sorted(fresh.iterdir()):
            if path.name != "manifest.json":
                _remove(output / path.name)
                os.rename(path, output / path.name)
        # What the new output does not have (no record is rejected any more, pages of the old state) is not kept.
        for name in {"evidence", "rejected"} - set(json.loads(mark.read_text("utf-8"))["names"]):
            _remove(output / name)
        sync_folder(output)
        os.rename(fresh / "manifest.json", output / "manifest.json")
        sync_folder(output)
    shutil.rmtree(fresh, ignore_errors=True)
    mark.unlink()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
