"""Terminologies: HPO, ICD-10-CM or the user's own; and the matcher that finds their concepts in notes."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from clinical_nlp.errors import MissingDataError, UsageError
from clinical_nlp.language.terminology import hpo, icd10cm
from clinical_nlp.language.terminology.concepts import Concept, Name, Terminology
from clinical_nlp.language.terminology.matching import Match, Matcher
from clinical_nlp.language.terminology.table import read_table

__all__ = ["Concept", "Match", "Matcher", "Name", "Terminology", "load_terminology"]


def load_terminology(name_or_path: str | Path) -> Terminology:
    """Load `hpo`, `hpo_wide`, `icd10cm`, or a file ending in .obo, .json or .csv, once a process.

    `hpo_wide` is HPO with modes of inheritance, ages of onset and phenotypic variability looked for as well, as the
    literature is annotated; `hpo` looks for the phenotypic abnormalities of a patient alone.

    Raises
    ------
    MissingDataError : the file is not there.
    UsageError : neither a known name nor a known kind of file.
    InputError : the file cannot be read as what its ending says.
    """
    name = str(name_or_path)
    if name == "hpo":
        return _load(hpo.bundled_path(), None, "hpo")
    if name == "hpo_wide":
        return hpo.widened(load_terminology("hpo"))
    if name == "icd10cm":
        return _load(icd10cm.bundled_path(), None, "icd10cm")
    path = Path(name).expanduser()
    if path.suffix.lower() not in (".obo", ".json", ".csv", ".xml"):
        msg = f"terminology {name!r} is not known; use hpo, hpo_wide, icd10cm, or a file ending in .obo, .json or .csv"
        raise UsageError(msg)
    if not path.is_file():
        msg = f"terminology file {path} does not exist"
        raise MissingDataError(msg)
    status = path.stat()
    return _load(path, (status.st_size, status.st_mtime_ns), None)


@lru_cache(maxsize=4)
def _load(path: Path, stamp: tuple[int, int] | None, name: str | None) -> Terminology:
    """`stamp` makes a changed file a different one."""
    suffix = path.suffix.lower()
    if suffix == ".obo":
        return hpo.read_obo(path, name=name)
    if suffix == ".json":
        return hpo.read_obographs(path, name=name)
    if suffix == ".xml":
        return icd10cm.read_tabular(path)
    return read_table(path)
