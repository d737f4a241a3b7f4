"""A stratified sample of patients, and of their notes: flagged and unflagged, by concept and institution.

A note is flagged with a concept when the extraction affirms it of the patient there. First patients are drawn, in
strata of institution and rarest flagged concept (one stratum for those with none), then, of each patient, flagged and
unflagged notes apart. Every probability is known, so that whatever readers find can be weighted back to all notes.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinical_nlp.errors import InputError, UsageError
from clinical_nlp.extraction.outputs import connect, files_of

UNFLAGGED_SHARE = 1 / 3
"""Share of the patients that is drawn where no concept is flagged: what was missed can only be seen there."""

_AFFIRMED = "presence = 'present' AND modality = 'actual' AND temporality <> 'future' AND experiencer = 'patient'"


@dataclass(frozen=True, slots=True)
class Stratum:
    """Patients of one institution whose rarest flagged concept is `concept` (None: no concept is flagged).

    `with_flagged` and `with_unflagged` are how many of them have notes of that kind, `drawn` how many were drawn.
    """

    name: str
    institution: str
    concept: str | None
    patients: int
    with_flagged: int
    with_unflagged: int
    drawn: int


@dataclass(frozen=True, slots=True)
class SampledNote:
    """A note that is to be read: `flagged` is its kind, `of_kind` how many notes of that kind the patient has."""

    file: str
    institution: str
    patient_id: str
    note_id: str
    stratum: str
    flagged: bool
    of_kind: int
    concepts: tuple[str, ...]
    text_sha256: str


@dataclass(frozen=True, slots=True)
class Sample:
    """What was drawn: the concepts that are reviewed (id -> label), the strata and the notes."""

    concepts: Mapping[str, str]
    strata: tuple[Stratum, ...]
    notes: tuple[SampledNote, ...]


Unit = tuple[str, str]
"""(institution, patient_id): what is drawn first."""


def draw(
    output: Path,
    scratch: Path,
    *,
    concepts: Sequence[str] = (),
    n_concepts: int = 20,
    n_patients: int = 120,
    notes_per_patient: int = 2,
    seed: int = 0,
) -> Sample:
    """Draw a sample from a finished extraction.

    Parameters
    ----------
    output : its directory.
    scratch : folder for what does not fit in memory.
    concepts : ids that are reviewed; without them the `n_concepts` that are present in most patients.
    n_patients : how many patients at least; a stratum has two or more where it can.
    notes_per_patient : at most so many flagged notes, and so many unflagged ones.
    seed : of the draw.

    Raises
    ------
    UsageError : a number is not positive, or a concept is not in the output.
    InputError : the output has no patients or no concepts.
    """
    if min(n_patients, notes_per_patient, n_concepts) < 1:
        raise UsageError("review needs at least one patient, note and concept")
    scratch.mkdir(parents=True, exist_ok=True)
    connection = connect(scratch)
    chosen = _concepts(connection, output, concepts, n_concepts)
    flags = _flags(connection, output, chosen)
    units: list[tuple[str, str, int]] = connection.execute(
        f"""SELECT institution, patient_id, count(*) FROM read_parquet('{files_of(output / "notes")}')
            WHERE outcome = 'done' GROUP BY ALL ORDER BY ALL"""
    ).fetchall()
    how_common = Counter(concept for notes in flags.values() for concept in set().union(*notes.values()))
    members: dict[tuple[str, str | None], list[tuple[Unit, int]]] = {}
    for institution, patient_id, n_notes in units:
        unit = (institution, patient_id)
        found = set().union(*flags.get(unit, {}).values())
        rarest = min(found, key=lambda concept: (how_common[concept], concept), default=None)
        members.setdefault((institution, rarest), []).append((unit, n_notes))
    sizes = _allocate({key: len(units) for key, units in members.items()}, n_patients)
    generator = random.Random(seed)
    strata, drawn = [], []
    for number, key in enumerate(sorted(members, key=lambda key: (key[0], key[1] or ""))):
        within = members[key]
        picked = sorted(generator.sample(within, sizes[key]))
        strata.append(
            Stratum(
                f"s{number:03d}",
                *key,
                len(within),
                sum(bool(flags.get(unit)) for unit, _ in within),
                sum(n_notes > len(flags.get(unit, {})) for unit, n_notes in within),
                len(picked),
            )
        )
        drawn += [(strata[-1].name, unit) for unit, _ in picked]
    notes = list(_draw_notes(connection, output, drawn, flags, notes_per_patient, generator))
    connection.close()
    return Sample(chosen, tuple(strata), tuple(notes))


def _concepts(connection: Any, output: Path, wanted: Sequence[str], n_concepts: int) -> dict[str, str]:
    rows = connection.execute(
        f"""SELECT concept_id, any_value(concept_label), count(DISTINCT (institution, patient_id)) AS patients
            FROM read_parquet('{files_of(output / "mentions")}')
            WHERE concept_id IS NOT NULL AND {_AFFIRMED} GROUP BY concept_id ORDER BY patients DESC, concept_id"""
    ).fetchall()
    labels = {concept: label for concept, label, _ in rows}
    if not labels:
        raise InputError(f"{output} affirms no concept of any patient, so there is nothing to draw a sample by")
    missing = [concept for concept in wanted if concept not in labels]
    if missing:
        raise UsageError(f"concept {missing[0]!r} is not affirmed in {output}; leave it out")
    return {concept: labels[concept] for concept in (wanted or list(labels)[:n_concepts])}


def _flags(connection: Any, output: Path, concepts: Mapping[str, str]) -> dict[Unit, dict[str, set[str]]]:
    """Return, for each patient with any, the flagged notes and their concepts."""
    listed = connection.execute(
        f"""SELECT DISTINCT institution, patient_id, note_id, concept_id
            FROM read_parquet('{files_of(output / "mentions")}')
            WHERE {_AFFIRMED} AND list_contains(?, concept_id)""",
        [list(concepts)],
    )
    flags: dict[Unit, dict[str, set[str]]] = {}
    while rows := listed.fetchmany(10_000):
        for institution, patient_id, note_id, concept in rows:
            flags.setdefault((institution, patient_id), {}).setdefault(note_id, set()).add(concept)
    return flags


def _allocate(sizes: Mapping[tuple[str, str | None], int], n_patients: int) -> dict[tuple[str, str | None], int]:
    """Share the patients out: a third to the unflagged strata, the rest to the others, at least two each."""
    unflagged = [key for key in sizes if key[1] is None]
    flagged = [key for key in sizes if key[1] is not None]
    for_unflagged = round(n_patients * UNFLAGGED_SHARE) if flagged else n_patients
    given: dict[tuple[str, str | None], int] = {}
    for keys, budget in (
        (unflagged, for_unflagged),
        (flagged, n_patients - for_unflagged if unflagged else n_patients),
    ):
        given.update({key: min(2, sizes[key]) for key in keys})
        left = budget - sum(given[key] for key in keys)
        while left > 0 and (open_ := [key for key in keys if given[key] < sizes[key]]):
            # The one that has least comes next; equal ones in a fixed order.
            key = min(open_, key=lambda key: (given[key], key[0], key[1] or ""))
            given[key] += 1
            left -= 1
    return given


def _draw_notes(
    connection: Any,
    output: Path,
    drawn: Sequence[tuple[str, Unit]],
    flags: Mapping[Unit, Mapping[str, set[str]]],
    notes_per_patient: int,
    generator: random.Random,
) -> Iterator[SampledNote]:
    wanted = {unit for _, unit in drawn}
    found: dict[Unit, list[tuple[str, str]]] = {unit: [] for unit in wanted}
    listed = connection.execute(
        f"""SELECT institution, patient_id, note_id, text_sha256 FROM read_parquet('{files_of(output / "notes")}')
            WHERE outcome = 'done' AND list_contains(?, patient_id) ORDER BY number""",
        [sorted({patient_id for _, patient_id in wanted})],
    )
    while rows := listed.fetchmany(10_000):
        for institution, patient_id, note_id, digest in rows:
            if (institution, patient_id) in wanted:
                found[institution, patient_id].append((note_id, digest))
    picked: list[tuple[str, Unit, bool, int, str, str]] = []
    for stratum, unit in drawn:
        own = flags.get(unit, {})
        for flagged in (True, False):
            notes = [note for note in found[unit] if (note[0] in own) == flagged]
            chosen = generator.sample(notes, min(notes_per_patient, len(notes)))
            picked += [(stratum, unit, flagged, len(notes), *note) for note in chosen]
    # In the order of strata a reader could tell what is flagged.
    generator.shuffle(picked)
    for number, (stratum, unit, flagged, of_kind, note_id, digest) in enumerate(picked, start=1):
        concepts = tuple(sorted(flags.get(unit, {}).get(note_id, ())))
        yield SampledNote(f"{number:04d}", *unit, note_id, stratum, flagged, of_kind, concepts, digest)
