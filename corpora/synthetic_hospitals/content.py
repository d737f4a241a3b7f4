"""What the synthetic hospitals can write about: clinical entities, conditions, drugs, procedures, and phrase banks.

The tables beside this file are data. `entities.csv` holds findings and conditions with HPO ids and ICD-10-CM codes,
`conditions.csv` what a condition brings with it, and one phrase bank a file holds all idioms and lay phrases; the two
banks share none.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

BANKS = ("development", "held_out")

Template = tuple[str, ...]
"""Literal text and slot names in turn: even places are text, odd places are slots."""


@dataclass(frozen=True, slots=True)
class Entity:
    """A thing a note can mention. `label` is the gold span label; `names` go from common to rare.

    `implies` names what is there whenever this is: its ancestors in HPO and its plain consequences. A patient who has
    the entity is never said to lack those.
    """

    key: str
    label: str
    kind: str
    system: str | None
    hpo_id: str | None
    icd10cm_code: str | None
    names: tuple[str, ...]
    abbreviations: tuple[str, ...]
    lay: tuple[str, ...] = ()
    implies: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Condition:
    """A latent condition: how common it is, and the entities it brings. `imaging` holds (modality, entity key)."""

    key: str
    weight: float
    chronic: bool
    sex: str | None
    findings: tuple[str, ...]
    imaging: tuple[tuple[str, str], ...]
    drugs: tuple[str, ...]
    procedures: tuple[str, ...]
    differentials: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Dosing:
    """How a drug is given."""

    doses: tuple[str, ...]
    unit: str
    route: str
    frequencies: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Content:
    """Everything that can be written about, with the idioms of one bank."""

    entities: dict[str, Entity]
    conditions: dict[str, Condition]
    dosing: dict[str, Dosing]
    idioms: dict[str, tuple[Template, ...]]
    course: dict[str, str]
    """ICD-10-CM code of each condition -> acute or chronic."""


def _rows(name: str) -> Iterator[dict[str, str]]:
    with (Path(__file__).parent / name).open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _split(cell: str, separator: str = ";") -> tuple[str, ...]:
    return tuple(part for part in cell.split(separator) if part)


def bank_lines(bank: str) -> dict[str, list[str]]:
    """Return the lines of a phrase bank by category, as written."""
    categories: dict[str, list[str]] = {}
    text = (Path(__file__).parent / f"phrases_{bank}.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            lines = categories.setdefault(heading[1], [])
        elif line:
            lines.append(line)
    return categories


@lru_cache(maxsize=2)
def load_content(bank: str) -> Content:
    """Load the tables with the idioms and lay phrases of `bank`."""
    lines = bank_lines(bank)
    lay = {}
    for line in lines.pop("lay"):
        key, _, phrases = line.partition(": ")
        lay[key] = tuple(phrases.split("; "))
    entities: dict[str, Entity] = {}
    for row in _rows("entities.csv"):
        names = _split(row["names"])
        label = row["hpo_label"][:1].lower() + row["hpo_label"][1:]
        if label and label.lower() not in {name.lower() for name in names}:
            names = (*names, label)
        entities[row["key"]] = Entity(
            row["key"], "problem", row["kind"], row["system"], row["hpo_id"] or None, row["icd10cm_code"] or None,
            names, _split(row["abbreviations"]), lay.get(row["key"], ()), tuple(row["implies"].split()),
        )  # fmt: skip
    dosing = {}
    for row in _rows("drugs.csv"):
        key = "drug:" + row["key"]
        generic = _SPELLED.get(row["key"]) or row["key"].replace("_", "-" if row["key"] in _COMBINED else " ")
        entities[key] = Entity(key, "drug", "drug", None, None, None, (generic, row["brand"]), ())
        dosing[key] = Dosing(_split(row["doses"], ","), row["unit"], row["route"], _split(row["frequencies"]))
    for row in _rows("procedures.csv"):
        key = "procedure:" + row["key"]
        names, short = _split(row["names"]), _split(row["abbreviations"])
        entities[key] = Entity(key, "procedure", "procedure", None, None, None, names, short)
    conditions = {}
    for row in _rows("conditions.csv"):
        conditions[row["key"]] = Condition(
            row["key"], float(row["weight"]), row["course"] == "c", row["sex"] or None,
            tuple(row["findings"].split()),
            tuple((modality, key) for modality, _, key in (item.partition(":") for item in row["imaging"].split())),
            tuple(f"drug:{key}" for key in row["drugs"].split()),
            tuple(f"procedure:{key}" for key in row["procedures"].split()),
            tuple(row["differentials"].split()),
        )  # fmt: skip
    idioms = {name: tuple(_template(line) for line in found) for name, found in lines.items()}
    course = {
        str(entities[key].icd10cm_code): "chronic" if condition.chronic else "acute"
        for key, condition in conditions.items()
    }
    return Content(entities, conditions, dosing, idioms, course)


_SPELLED = {"vitamin_d": "vitamin D", "ivig": "IVIG"}
_COMBINED = ("fluticasone_salmeterol", "piperacillin_tazobactam", "carbidopa_levodopa", "amoxicillin_clavulanate")


def _template(line: str) -> Template:
    return tuple(re.split(r"\{(\w+)\}", line))
