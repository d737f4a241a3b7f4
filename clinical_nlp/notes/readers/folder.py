"""What the folder formats (brat, iob, text) share: which note, patient and institution a file is."""

from __future__ import annotations

from clinical_nlp.errors import UsageError
from clinical_nlp.notes.readers.options import ReadOptions


def check_institution_from(options: ReadOptions, *, format: str) -> None:
    """Refuse a level that a folder of files does not have."""
    if options.institution_from not in (None, "folder"):
        raise UsageError(
            f"institution_from {options.institution_from!r} is not known for {format}; the only level is 'folder', the "
            "first folder below the source"
        )


def institution_of(relative: str, options: ReadOptions) -> str:
    """Return the institution of a file: with `institution_from="folder"` the first folder below the source."""
    if options.institution_from == "folder" and "/" in relative:
        return relative.split("/", 1)[0]
    return options.fallback_institution()


def stem(relative: str) -> str:
    """Return a path without its last suffix: `a/b.txt` is the note `a/b`."""
    head, _, name = relative.rpartition("/")
    name = name.rsplit(".", 1)[0] if "." in name[1:] else name
    return f"{head}/{name}" if head else name
