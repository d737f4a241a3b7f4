"""Streaming generation: notes with their gold, one at a time, and the tables of a corpus from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import accumulate
from typing import Any

import pyarrow as pa

from clinical_nlp.corpora.synthetic_hospitals.content import BANKS, Content, load_content
from clinical_nlp.corpora.synthetic_hospitals.patients import TARGET, TARGET_PREVALENCE, Population
from clinical_nlp.corpora.synthetic_hospitals.patients import Patient as Latent
from clinical_nlp.corpora.synthetic_hospitals.style import (
    NOTE_MIX,
    NOTE_TYPES,
    Institution,
    Style,
    draw_style,
    make_institution,
    stream,
)
from clinical_nlp.corpora.synthetic_hospitals.writing import Draft, Passage, Writer
from clinical_nlp.errors import UsageError
from clinical_nlp.notes.schema import (
    CODE_SCHEMA,
    FACT_SCHEMA,
    NOTE_SCHEMA,
    PAIR_SCHEMA,
    PATIENT_SCHEMA,
    SPAN_SCHEMA,
    Note,
    Patient,
)

Row = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class GoldNote:
    """A note with its gold.

    `spans`, `facts` and `pairs` are rows in the column order of `SPAN_SCHEMA`, `FACT_SCHEMA` and `PAIR_SCHEMA`;
    `codes`, rows of `CODE_SCHEMA`, belong to the note's encounter and come with the encounter's first note only. Codes
    follow from what the notes of the encounter say, as coders may code nothing else: a condition is coded where one
    says that the patient has it now, a chronic one also where it is said to be of the past; findings are not coded.
    `style` and `marker` are how the note was written, `has_target` whether the patient has the target condition, said
    or not: the truth behind `covariate`, `spurious` and `label`.
    """

    note: Note
    patient: Patient
    spans: tuple[Row, ...]
    facts: tuple[Row, ...]
    codes: tuple[Row, ...]
    pairs: tuple[Row, ...]
    style: Style
    marker: int
    has_target: bool


def generate(
    *,
    institutions: int = 3,
    patients: int = 60,
    notes_per_patient: tuple[int, int] = (2, 6),
    seed: int = 0,
    covariate: float = 0.5,
    label: float = 0.0,
    concept: float = 0.0,
    spurious: float | Sequence[float] = 0.0,
    bank: str = "development",
) -> Iterator[GoldNote]:
    """Yield notes with their gold; memory does not grow with their number.

    Every draw comes from a stream keyed by seed, institution, patient, note and purpose, so that a knob changes nothing
    but what it governs: `covariate` how notes are written, `label` which conditions patients have, `concept` which
    mentions the annotators mark (the text stays byte for byte), `spurious` the closing line of a note.

    Parameters
    ----------
    institutions, patients : how many institutions, and how many patients in each.
    notes_per_patient : least and most notes a patient.
    seed : any integer.
    covariate : 0 all institutions draw from one distribution of styles, 1 each has one style of its own.
    label : 0 equal prevalences; 1 log-prevalences of conditions move by normal draws of standard deviation 1.5, and the
        log-odds of the target condition by 0.5 to 1.5 up or down.
    concept : probability that an annotator follows the institution's own convention of leaving a class out.
    spurious : correlation of the closing line with the target condition, where `label` is 0; one for all institutions,
        or one for each.
    bank : "development" or "held_out", the phrases that notes are written with.

    Raises
    ------
    UsageError : an option is out of its range.
    """
    if institutions < 1 or patients < 1:
        raise UsageError(f"institutions and patients must be at least 1, not {institutions} and {patients}")
    low, high = _range(notes_per_patient)
    knobs = {"covariate": covariate, "label": label, "concept": concept}
    follow = [spurious] * institutions if isinstance(spurious, int | float) else list(spurious)
    if len(follow) != institutions:
        raise UsageError(f"spurious has {len(follow)} values for {institutions} institutions; give one or one for each")
    for name, value in [*knobs.items(), *(("spurious", value) for value in follow)]:
        if not 0 <= value <= 1:
            raise UsageError(f"{name} must lie between 0 and 1, not {value!r}")
    if bank not in BANKS:
        raise UsageError(f"bank must be one of {', '.join(BANKS)}, not {bank!r}")
    content = load_content(bank)

    def notes() -> Iterator[GoldNote]:
        for index in range(institutions):
            institution = make_institution(index, seed, content.idioms)
            population = Population(content, index, institution.name, seed=seed, label=label)
            for number in range(patients):
                latent = population.patient(number, (low, high))
                yield from _patient_notes(
                    content, institution, latent, number,
                    seed=seed, covariate=covariate, concept=concept, spurious=follow[index],
                )  # fmt: skip

    return notes()


def _range(notes_per_patient: tuple[int, int]) -> tuple[int, int]:
    try:
        low, high = (int(n) for n in notes_per_patient)
    except (TypeError, ValueError):
        low = high = 0
    if not 1 <= low <= high:
        raise UsageError(f"notes_per_patient must be a range such as (2, 6), not {notes_per_patient!r}")
    return low, high


def _note_types(institution: Institution, n: int, covariate: float, *key: object) -> list[str]:
    """Draw which notes a patient gets, in the order of a stay: at most one admission and one discharge."""
    random = stream(*key, "types")
    drawn = []
    for _ in range(n):
        mix = draw_mix(institution, covariate, random.random(), random.random())
        drawn.append(random.choices(NOTE_TYPES, cum_weights=list(accumulate(NOTE_MIX[mix])))[0])
    for single in ("admission", "discharge"):
        places = [place for place, kind in enumerate(drawn) if kind == single]
        for place in places[1:]:
            drawn[place] = "progress"
    return sorted(drawn, key=_ORDER.__getitem__)


_ORDER = {"admission": 0, "radiology": 1, "nursing": 2, "progress": 3, "discharge": 4, "clinic": 5}
_DAYS = {"admission": 0, "radiology": 0, "nursing": 1, "progress": 2, "discharge": 7, "clinic": 21}


def draw_mix(institution: Institution, covariate: float, mine: float, which: float) -> str:
    """Return the note-type mix of one note: the institution's own, or one that all share."""
    names = tuple(NOTE_MIX)
    return str(institution.style["note_types"]) if mine < covariate else names[int(which * len(names))]


def _patient_notes(content: Content, institution: Institution, latent: Latent, number: int, *, seed: int,
                   covariate: float, concept: float, spurious: float) -> Iterator[GoldNote]:  # fmt: skip
    person = Patient(latent.patient_id, latent.sex, latent.birth_date)
    has_target = TARGET in latent.conditions
    memory: Passage | None = None
    found: list[GoldNote] = []
    for place, kind in enumerate(_note_types(institution, latent.n_notes, covariate, seed, institution.index, number)):
        key = (seed, institution.index, number, place)
        style = draw_style(institution, covariate, stream(*key, "style"))
        marker = stream(*key, "marker")
        follows, free = marker.random() < spurious, marker.random() < TARGET_PREVALENCE
        mark = int(has_target if follows else free)
        when = latent.admitted + timedelta(days=_DAYS[kind] + (place if kind != "admission" else 0), hours=place)
        writer = Writer(content, institution, latent, style, stream(*key, "writing"), covariate=covariate,
                        note_type=kind, when=when)  # fmt: skip
        draft = writer.write(memory, mark)
        memory = draft.memory
        encounter = f"{latent.patient_id}-{'clinic' if kind == 'clinic' else 'stay'}"
        found.append(
            _gold(content, institution, latent, person, draft, f"{latent.patient_id}-n{place + 1}", encounter, kind,
                  when, style, mark, has_target, concept, key)
        )  # fmt: skip
    stated: dict[str, set[str]] = {}
    for item in found:
        stated.setdefault(str(item.note.encounter_id), set()).update(_stated(content, item.facts))
    for item in found:
        encounter = str(item.note.encounter_id)
        codes = sorted(stated.pop(encounter, ()))
        rows = tuple((institution.name, latent.patient_id, encounter, None, code, "ICD-10-CM") for code in codes)
        yield replace(item, codes=rows)


_CODE, _AXES = FACT_SCHEMA.names.index("icd10cm_code"), FACT_SCHEMA.names.index("presence")
_NOW, _BEFORE = (("present", time, "actual", "patient") for time in ("current", "historical"))


def _stated(content: Content, facts: tuple[Row, ...]) -> set[str]:
    """Return the codes of conditions that a note says the patient has; of the past, only those that stay."""
    course = content.course
    said = ((row[_CODE], row[_AXES : _AXES + 4]) for row in facts if row[_CODE] in course)
    return {code for code, axes in said if axes == _NOW or (axes == _BEFORE and course[code] == "chronic")}


def _gold(content: Content, institution: Institution, latent: Latent, person: Patient, draft: Draft, note_id: str,
          encounter: str, kind: str, when: datetime, style: Style, marker: int, has_target: bool, concept: float,
          key: tuple[object, ...]) -> GoldNote:  # fmt: skip
    text, name, entities = draft.text, institution.name, content.entities
    omitted = institution.omitted
    draw = stream(*key, "annotator").random if concept else None
    spans = []
    for start, end, entity_key, axes, section, fact, tags, width in sorted(draft.marks):
        if draw is not None:
            follows = draw() < concept
            if follows and not _marked(axes, tags, omitted):
                continue
            if follows and institution.wide:
                start -= width
        entity = entities[entity_key]
        spans.append((name, note_id, start, end, text[start:end], entity.label, entity.hpo_id, entity.icd10cm_code,
                      *axes, section, f"{note_id}-f{fact}"))  # fmt: skip
    facts = tuple(
        (f"{note_id}-f{place}", name, latent.patient_id, note_id, what, entity_key.partition(":")[2] or entity_key,
         entities[entity_key].hpo_id, entities[entity_key].icd10cm_code, *axes, side, value, unit)
        for place, (what, entity_key, axes, side, value, unit) in enumerate(draft.facts)
    )  # fmt: skip
    pairs: tuple[Row, ...] = ()
    if kind == "radiology":
        (a, b), (c, d) = draft.parts["findings"], draft.parts["impression"]
        pairs = ((f"{note_id}-pair", latent.patient_id, name, "findings_impression", text[a:b].strip(),
                  text[c:d].strip(), None),)  # fmt: skip
    note = Note(note_id=note_id, patient_id=latent.patient_id, institution=name, text=text,
                source=f"synthetic_hospitals:{note_id}", encounter_id=encounter, note_type=kind, written_at=when,
                title=draft.title)  # fmt: skip
    return GoldNote(note, person, tuple(spans), facts, (), pairs, style, marker, has_target)


def _marked(axes: tuple[str, str, str, str], tags: tuple[str, ...], omitted: tuple[str, ...]) -> bool:
    """Whether a convention that leaves `omitted` out marks a mention."""
    if axes[0] in omitted or axes[1] in omitted or axes[2] in omitted or axes[3] in omitted:
        return False
    return not any(tag in omitted for tag in tags)


def tables(notes: Iterable[GoldNote]) -> dict[str, pa.Table]:
    """Collect generated notes into the tables of a corpus: notes, spans, codes, pairs, facts and patients."""
    # Rows are kept, not the notes: tuples of plain values cost the garbage collector nothing.
    rows: dict[str, list[Row]] = {name: [] for name in ("notes", "spans", "codes", "pairs", "facts")}
    people: dict[Row, None] = {}
    for item in notes:
        rows["notes"].append(tuple([getattr(item.note, name) for name in NOTE_SCHEMA.names]))
        rows["spans"] += item.spans
        rows["codes"] += item.codes
        rows["pairs"] += item.pairs
        rows["facts"] += item.facts
        person = item.patient
        people[person.patient_id, person.sex, person.birth_date, person.death_date] = None
    rows["patients"] = list(people)
    schemas = {"notes": NOTE_SCHEMA, "spans": SPAN_SCHEMA, "codes": CODE_SCHEMA, "pairs": PAIR_SCHEMA,
               "facts": FACT_SCHEMA, "patients": PATIENT_SCHEMA}  # fmt: skip
    return {name: _table(rows[name], schema) for name, schema in schemas.items()}


def _table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    if not rows:
        return schema.empty_table()
    columns = [pa.array(column, type=field.type) for column, field in zip(zip(*rows, strict=True), schema, strict=True)]
    return pa.Table.from_arrays(columns, schema=schema)
