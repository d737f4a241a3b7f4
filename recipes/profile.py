"""Write a summary of an export that holds no text: what a hospital can hand over, or keep as its reference.

`clinical-nlp drift` takes such files beside exports or instead of them. Not a run: one file, and nothing else is
written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clinical_nlp import __version__
from clinical_nlp.config import validate
from clinical_nlp.errors import TooFewPatientsError, UsageError
from clinical_nlp.progress import say
from clinical_nlp.runs import write_atomic
from clinical_nlp.statistics.comparison import SMALLEST_CELL
from clinical_nlp.statistics.exports import ExportConfig, read_sample
from clinical_nlp.statistics.profile import Profile, make_profile, profile_text


def profile(
    sources: Sequence[str | os.PathLike[str]], *, output: str | os.PathLike[str], **options: Any
) -> list[Profile]:
    """Summarise the institutions of exports; the call from Python.

    Parameters
    ----------
    sources : exports (files or folders).
    output : a new `.json` file.
    options : the keys of `ExportConfig`, such as `format`, `institution_from`, `window`.

    Raises
    ------
    TooFewPatientsError : no institution has 11 patients.
    UsageError : the file is there already, or is no `.json`.
    """
    config = validate(ExportConfig, {"sources": [os.fspath(source) for source in sources], **options})
    return write_profile(config, Path(output))[0]


def write_profile(config: ExportConfig, output: Path) -> tuple[list[Profile], int]:
    """Write the profiles of all institutions that have enough patients; return them and how many records were bad."""
    if output.suffix != ".json":
        raise UsageError(f"--output names a file that ends in .json (got {output.name!r})")
    if output.exists():
        raise UsageError(f"{output} is there already; name another file")
    noted: dict[str, Any] = {}
    sample, account = read_sample(config, None, lambda **values: noted.update(values))
    profiles, few = [], 0
    for name in sorted(sample.n_patients):
        if sample.n_patients[name] < SMALLEST_CELL:
            few += 1
        else:
            profiles.append(make_profile(sample, name, institution_means=account["institution_means"]))
    if not profiles:
        raise TooFewPatientsError(
            f"none of {few} institutions has {SMALLEST_CELL} patients, and no profile is made of fewer; take a coarser "
            "level with institution_from, or a longer period"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, profile_text(profiles, made_with=f"clinical_nlp {__version__}"))
    for item in profiles:
        say(f"{item.institution}: {item.n_patients} patients, {item.n_notes} notes")
    if few:
        say(f"{few} institutions with fewer than {SMALLEST_CELL} patients are left out")
    return profiles, account["n_rejected"]
