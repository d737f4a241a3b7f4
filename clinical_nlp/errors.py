"""One hierarchy of errors. A message says what is wrong, where, and what to do; it never holds note text."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ClinicalNlpError(Exception):
    """Anything that stops a command. The command line prints the message as one line and exits with `exit_code`."""

    exit_code = 1


class UsageError(ClinicalNlpError):
    """An argument is wrong, or names something that is not there."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration key or value is wrong."""


class MissingDataError(UsageError):
    """A file or folder that was named does not exist; the message says where it can be had."""


class InputError(ClinicalNlpError):
    """Input is there and cannot be used: an empty export, a table without the needed columns, a broken archive."""


class ModelError(UsageError):
    """A model folder, adapter or tokenizer that was named cannot be used, or is not safe to load."""


class TrainingError(ModelError):
    """Training, or what is done with its result, came to nothing that could be used."""

    exit_code = 1


class RunError(ClinicalNlpError):
    """A run directory is incomplete, in use, or does not match what was asked."""


class NoRunError(RunError, UsageError):
    """A directory that was named is no finished run."""


class TooFewPatientsError(ClinicalNlpError):
    """A statistic or a split needs more patients than there are."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest known name, or a list of the known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}"
