"""Dates as exports write them: partial, with zones, as FHIR, SQL or HL7 v2 have them."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

from clinical_nlp.notes.readers.options import Reading

_DASHED = re.compile(
    r"(\d{4})(?:-(\d{1,2})(?:-(\d{1,2})(?:[T ]+(\d{1,2}):(\d{2})(?::(\d{2})(?:[.,](\d+))?)?)?)?)?"
    r"\s*(Z|UTC|[+-]\d{2}(?::?\d{2})?)?",
    re.IGNORECASE | re.ASCII,
)
_PACKED = re.compile(r"(\d{4})(\d{2})(\d{2})(?:(\d{2})(\d{2})(?:(\d{2})(?:\.(\d+))?)?)?\s*(Z|[+-]\d{4})?", re.ASCII)


def parse_time(value: Any) -> datetime | None:
    """Return a time in UTC, or None where the value is none.

    A partial date is its first instant (`2015-03` is 2015-03-01T00:00), a time without a zone is UTC. Read are ISO
    8601 and SQL (`2015-03-02 10:00:00+02`), and HL7 v2 (`20150302100000-0500`). A date with slashes is None: whether
    day or month comes first is not in it.
    """
    if not isinstance(value, str):
        return None
    text = value.strip()
    match = _DASHED.fullmatch(text) or _PACKED.fullmatch(text)
    if match is None:
        return None
    year, month, day, hour, minute, second, fraction, zone = match.groups()
    try:
        found = datetime(
            int(year),
            int(month or 1),
            int(day or 1),
            int(hour or 0),
            int(minute or 0),
            int(second or 0),
            int((fraction or "0")[:6].ljust(6, "0")),
            tzinfo=_zone(zone),
        )
        return found.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _zone(zone: str | None) -> timezone:
    if zone is None or zone.upper() in ("Z", "UTC"):
        return UTC
    digits = zone[1:].replace(":", "").ljust(4, "0")
    minutes = int(digits[:2]) * 60 + int(digits[2:])
    return timezone(timedelta(minutes=-minutes if zone[0] == "-" else minutes))


def parse_date(value: Any) -> date | None:
    """Return the calendar date that a value begins with; its zone does not move it. A bare year or month is None."""
    if not isinstance(value, str):
        return None
    match = _DASHED.fullmatch(value.strip()) or _PACKED.fullmatch(value.strip())
    if match is None or match[3] is None:
        return None
    try:
        return date(int(match[1]), int(match[2]), int(match[3]))
    except ValueError:
        return None


def note_time(value: Any, reading: Reading) -> datetime | None:
    """Return `parse_time(value)`; a value that is there and no date is counted, the note keeps no time."""
    found = parse_time(value)
    if found is None and value not in (None, ""):
        reading.remarks["dates of notes could not be read; written_at is empty there"] += 1
    return found
