"""The notes of a finished output, read from their export again: an output holds no note as a whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clinical_nlp.config import validate
from clinical_nlp.errors import MissingDataError, NoRunError, RunError
from clinical_nlp.extraction import CATALOG, fetch_catalog, open_engine
from clinical_nlp.extraction.plan import ExtractionConfig
from clinical_nlp.notes.readers import read_notes
from clinical_nlp.notes.schema import Note

NoteKey = tuple[str, str]
"""(institution, note_id)."""


def config_of(output: Path) -> ExtractionConfig:
    """Return the config that a finished output was made with.

    Raises
    ------
    RunError : the folder is no finished output.
    """
    if not (output / "manifest.json").is_file() or not (output / "plan.json").is_file():
        raise NoRunError(f"{output} is not a finished extraction")
    try:
        return validate(ExtractionConfig, json.loads((output / "plan.json").read_text("utf-8"))["config"])
    except (ValueError, KeyError):
        raise NoRunError(f"{output / 'plan.json'} is damaged; extract again") from None


def reread(output: Path, wanted: Mapping[NoteKey, str]) -> Iterator[Note]:
    """Yield some of the notes of a finished output, in the order of the export.

    Parameters
    ----------
    output : a finished output; its config says where the export is.
    wanted : note -> sha256 of its text, as the table `notes` has it.

    Raises
    ------
    MissingDataError : the export is not where it was.
    RunError : a note is gone from the export or has another text now.
    """
    config = config_of(output)
    left = dict(wanted)
    if not left:
        return
    with _source(config, output / ".cache") as (source, layout):
        options = config.read_options(output / ".cache" / "scratch")
        for record in read_notes(source, format=layout, options=options):
            if isinstance(record, Note) and left.get(key := (record.institution, record.note_id)) is not None:
                if left[key] == record.text_sha256:
                    del left[key]
                    yield record
                if not left:
                    return
    raise RunError(
        f"{len(left)} of {len(wanted)} notes are not in {config.source} as they were when {output} was made; "
        "bring it up to date first (clinical-nlp extract ... --update)"
    )


@contextmanager
def _source(config: ExtractionConfig, folder: Path) -> Iterator[tuple[Path, Any]]:
    try:
        if config.format != CATALOG:
            if not Path(config.source).exists():
                raise MissingDataError(f"the export {config.source} is not there any more; its notes are needed here")
            yield Path(config.source), config.format
            return
        spark = config.model_copy(update={"engine": "spark"})
        with open_engine(spark, folder / "spark") as session:
            yield fetch_catalog(spark, session, folder), "table"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
