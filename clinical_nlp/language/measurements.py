"""Measured values that are findings: `Na 128`, `BMI 41`, `LVEF 25 %`.

A value becomes a concept only where nothing that is left open could make it normal. The analyte is named, the unit is
stated or no other unit makes the value possible, and every group of patients that the note allows (age, sex,
pregnancy) agrees. A reference range or a flag in the note wins over the tables. Treatment goals, orders, doses and
other specimens are not measurements of the patient's blood, and a normal value excludes nothing.

`analytes.csv` holds names, units with the factor to the first one, what is possible in a living patient, and the
concepts of a value under and over a stated range; `thresholds.csv` the abnormal bands by group. A group without a band
is one that cannot be judged by the value alone (body mass index under two years). The bands are set where adult
reference intervals of hospital laboratories agree, so a value just outside one laboratory's interval may be let go.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from clinical_nlp.language.terminology import Terminology

_FOLDER = Path(__file__).parent
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_FILLER = (
    r"(?:level|value|count|count of|reading|was|were|is|are|of|at|has been|remained|remains|came back|"
    r"measured|today|on admission|on arrival|on presentation|initially|initial|now|noted to be|"
    r"found to be|currently|current|low at|high at|elevated at|elevated to|down to|up to|dropped to|"
    r"fell to|rose to|increased to|decreased to|improved to|improved|corrected|rose|fell|dropped|"
    r"increased|decreased|went|peaked at|nadir|as low as|as high as|slightly low at|slightly elevated at|"
    r"critically low at|is now|was only|only|approximately|about|around|estimated at|calculated at|from)"
)
_VALUE = re.compile(
    rf"(?:\s*[:=,]?\s*(?:{_FILLER}\s+){{0,3}}|\s*[:=]\s*|\s*\(\s*)"
    rf"(?P<compared><=|>=|[<>≤≥]|less than|greater than|over|above|below|under)?\s*~?"
    rf"(?P<value>{_NUMBER})(?!\d|/\d|\.\d|,\d)"
    rf"(?:\s*(?:-|–|to)\s*(?P<upper>{_NUMBER})(?!\d|/\d|\.\d|\s*(?:-|–)>))?",
    re.IGNORECASE,
)
_RANGE = re.compile(
    rf"\s*(?:[HL]\s*)?(?P<open>[\(\[])?\s*(?P<word>ref(?:erence)?\.?(?:\s*(?:range|interval))?|normal(?:\s*range)?|nl|range|n)?"
    rf"\s*[:=,]?\s*(?:(?P<low>{_NUMBER})\s*(?:-|–|to)\s*(?P<high>{_NUMBER})|(?P<bound>[<>≤≥])\s*(?P<limit>{_NUMBER}))"
    r"[^\)\]\d]{0,12}(?P<close>[\)\]])?",
    re.IGNORECASE,
)
_FLAG = re.compile(r"\s*[\(\[]?\s*\*?(?P<flag>HH|LL|H|L|high|low|elevated|normal|WNL)\b\*?\s*[\)\]]?")
_ARROW = re.compile(
    rf"\s*(?:-+>|=>|→|➔|⟶|,?\s*then|to|"
    rf",?\s*(?:improved|improving|corrected|rose|fell|up|down|increased|decreased|dropped) to)\s*"
    rf"(?P<value>{_NUMBER})(?!\d|/\d|\.\d|,\d)",
    re.IGNORECASE,
)
_OTHER_UNIT = re.compile(r"\s*(?:-\s*)?(?P<unit>%|[a-zA-Zµ]{1,6}(?:/[a-zA-Zµ0-9]{1,6})?)")
_UNIT_WORDS = frozenset(
    (
        "%", "mg", "g", "mcg", "ug", "µg", "gm", "gram", "grams", "kg", "lb", "lbs", "meq", "mmol", "ml", "cc",
        "units", "unit", "u", "iu", "tab", "tabs", "tablet", "tablets", "mg/kg", "puffs", "drops", "liters",
        "litres", "l", "hours", "hrs", "days", "weeks", "months", "years", "times", "x", "mm", "cm", "mg/day",
        "g/day", "mg/h", "meq/h", "ml/h", "ml/hr", "pm", "am", "minutes", "min", "seconds", "mg/dl", "mmol/l",
        "g/dl", "g/l", "u/l", "lpm", "mmhg", "th", "st", "nd", "rd", "percent",
    )
)  # fmt: skip
"""Units that no listed analyte has where they are not among its own: doses, rates, times."""
_NOT_MEASURED_BEFORE = re.compile(
    r"(?:\b(?:goals?|targets?|targeting|keep|keeping|maintain|maintaining|aim|aiming|titrate|titrated|if|unless|until|when|"
    r"whenever|should|call|notify|alert|hold|replete|wean|threshold|cutoff|cut-off|transfuse|received?|gave|given|"
    r"chance of|risk of|mother's|maternal|father's|donor)\b[^.;,:\n]{0,24}"
    r"|\b(?:normal|ideal|desired|expected|room|stage|vitamin|iv|po|oral|starts?|started|adds?|added|takes?)\s*|\b[UF])$",
    re.IGNORECASE,
)
_SPECIMEN = re.compile(
    r"\b(?:urine|urinary|urinalysis|UA|CSF|cerebrospinal|spinal fluid|lumbar puncture|pleural|ascitic|peritoneal|fluid|"
    r"stool|fecal|sweat|dialysate|drain|synovial|effluent|thoracentesis|paracentesis|24[- ]?(?:hour|h|hr)|spot)\b"
    r"[^.;\n]*$",
    re.IGNORECASE,
)
_NOT_MEASURED_AFTER = re.compile(
    r"^[^.;,\n]{0,12}\b(?:goal|target|or higher|or lower|if)\b|^[^.;\n]{0,20}\brespectively", re.IGNORECASE
)
_AGE = re.compile(
    r"\b(?P<n>\d{1,3})[\s-]*(?P<unit>years?|yrs?|yo|y\.?\s?o\.?|months?|mos?|weeks?|wks?|days?)"
    r"[\s-]*(?:old|of age|o\b|\.?o\.?)?"
    r"(?=[\s,.;)/-]|$)(?P<sex>[\s,-]*(?:[a-z-]+[\s,]+){0,3}?(?:female|male|man|woman|boy|girl|lady|gentleman|[MF])\b)?",
    re.IGNORECASE,
)
_AGE_STATED = re.compile(r"old|of age|yo\b|y\.?\s?o|y/o|female|male|man|woman|boy|girl|lady|gentleman", re.IGNORECASE)
_NEWBORN = re.compile(r"\b(?:newborn|neonate|neonatal|day of life|DOL)\b", re.IGNORECASE)
_PREGNANT = re.compile(
    r"(?<!not )(?<!non-)(?<!non)(?<!denies )(?<!never )(?<!prior )(?<!previous )(?<!history of )(?<!last )(?<!her )"
    r"\b(?:pregnant|gravid|intrauterine pregnancy|antepartum|(?:first|second|third) trimester|"
    r"G\d\s?P\d[\d\s-]*(?:at|@)|\d{1,2}(?:\s?[+&]?\s?\d/7)?[\s-]*(?:weeks?|wks?)(?:[\s']*(?:pregnant|gestation|GA|gravid)))\b",
    re.IGNORECASE,
)
_FEMALE = frozenset(("female", "woman", "girl", "lady", "f"))
_GROWTH_NAMES = {
    "head circumference": ("HP:0000252", "HP:0000256"),
    "occipitofrontal circumference": ("HP:0000252", "HP:0000256"),
    "ofc": ("HP:0000252", "HP:0000256"),
    "hc": ("HP:0000252", "HP:0000256"),
    "height": ("HP:0004322", "HP:0000098"),
    "stature": ("HP:0004322", "HP:0000098"),
    "length": ("HP:0004322", "HP:0000098"),
    "weight": ("HP:0004325", "HP:0004324"),
}
_GROWTH = re.compile(
    r"\b(?P<name>head circumference|occipitofrontal circumference|OFC|HC|height|stature|length|weight)\b"
    r"(?P<between>[^.;\n%]{0,45}?)"
    r"(?:(?P<compared><|>|≤|≥|less than|greater than|below|under|above|over)?\s*(?:the\s+)?"
    r"(?P<rank>\d{1,2}(?:\.\d+)?)\s*(?:st|nd|rd|th)?\s*-?\s*(?:percentile|centile|%ile|%tile)"
    r"|(?P<sd>[-−–+]\s?\d(?:\.\d+)?)\s*(?:SDS?\b|standard deviations?|z)"
    r"|z-?score\s*(?:of|:|=|is|was)?\s*(?P<z>[-−–+]?\s?\d(?:\.\d+)?))",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Measurement:
    """A value at [start, end) of a note, from the analyte's name to the value.

    `concept_id` is None where the value is normal or cannot be judged; `reason` says which: normal, unit, implausible,
    group (age, sex or pregnancy would decide), or goal.
    """

    start: int
    end: int
    analyte: str
    value: float
    concept_id: str | None
    reason: str


@dataclass(frozen=True)
class _Band:
    sex: str
    age_from: float
    age_to: float
    at_least: float | None
    above: float | None
    below: float | None
    concept_id: str | None

    def holds(self, low: float, high: float) -> bool:
        """Whether every value of [low, high] is in the band."""
        if self.at_least is None and self.above is None and self.below is None:
            return False
        if self.at_least is not None and low < self.at_least:
            return False
        if self.above is not None and low <= self.above:
            return False
        return self.below is None or high < self.below


@dataclass(frozen=True)
class _Analyte:
    name: str
    units: dict[str, str]
    lowest: float
    highest: float
    low_concept: str | None
    high_concept: str | None
    bands: list[_Band] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Patient:
    ages: tuple[float, float]
    sexes: tuple[str, ...]


def find_measurements(
    text: str, terminology: Terminology, *, age_years: float | None = None, sex: str | None = None
) -> list[Measurement]:
    """Return the measured values of a note by place, each with the concept that it shows or the reason why none.

    Parameters
    ----------
    text : the note, unchanged.
    terminology : no concept outside it is returned.
    age_years : of the patient when the note was written; otherwise what the note itself says, if it says one age.
    sex : `F` or `M`; otherwise what the note says beside the age.
    """
    if not any(character.isdigit() for character in text):
        return []
    patient = None
    found: list[Measurement] = []
    taken = 0
    for name in _names().finditer(text):
        if name.start() < taken:
            continue
        if patient is None:
            patient = _patient(text, age_years, sex)
        for measurement in _read(text, name, patient):
            concept_id = measurement.concept_id
            if concept_id is not None and concept_id not in terminology.matchable:
                continue
            found.append(measurement)
            taken = measurement.end
    found += (m for m in _growth(text) if m.concept_id is None or m.concept_id in terminology.matchable)
    return sorted(found, key=lambda m: (m.start, m.end))


def _read(text: str, name: re.Match[str], patient: _Patient) -> Iterator[Measurement]:
    blood_pressure = name.lastgroup == "pressure"
    sentence = text[max(0, name.start() - 120) : name.start()]
    if not blood_pressure and _SPECIMEN.search(sentence):
        return
    analyte = None if blood_pressure else _analytes()[_by_name()[_key(name.group())]]
    goal = _NOT_MEASURED_BEFORE.search(sentence[-40:]) is not None
    if analyte is None:
        yield from _blood_pressure(text, name, patient, goal)
        return
    value = _VALUE.match(text, name.end())
    if value is None or (value.end() - value.start() == len(value["value"]) and name.group()[-1:].isalnum()):
        return
    position = value.end()
    compared = (value["compared"] or "").lower()
    stated = _number(value["value"])
    upper = _number(value["upper"]) if value["upper"] else None
    if upper is not None and (upper < stated or "from" in value.group().lower()):
        upper, position = None, value.end("value")
    unit, unit_end = _unit(text, position, analyte)
    position = unit_end
    reference = _RANGE.match(text, position)
    if reference is not None and not (reference["open"] or reference["word"]):
        reference = None
    flag = None if reference else _FLAG.match(text, position)
    if _NOT_MEASURED_AFTER.match(text[position : position + 34]):
        goal = True
    values = [(name.start(), unit_end if unit else value.end("upper" if upper is not None else "value"), stated, upper)]
    after = max(position, reference.end() if reference else 0, flag.end() if flag else 0)
    while (arrow := _ARROW.match(text, after)) is not None:
        values.append((arrow.start("value"), arrow.end("value"), _number(arrow["value"]), None))
        later, after = _unit(text, arrow.end("value"), analyte)
        unit = unit or later
    for start, end, low, high in values:
        concept_id, reason = (None, "goal") if goal else _judged(
            analyte, low, high, compared, unit, reference, flag, patient)  # fmt: skip
        yield Measurement(start, end, analyte.name, low, concept_id, reason)


def _judged(
    analyte: _Analyte,
    stated: float,
    upper: float | None,
    compared: str,
    unit: str | None,
    reference: re.Match[str] | None,
    flag: re.Match[str] | None,
    patient: _Patient,
) -> tuple[str | None, str]:
    if unit == "other":
        return None, "unit"
    highest = stated if upper is None else upper
    if reference is not None:
        return _against(analyte, stated, highest, reference)
    if flag is not None:
        word = flag["flag"].lower()
        if word in ("normal", "wnl"):
            return None, "normal"
        concept_id = analyte.low_concept if word.startswith("l") else analyte.high_concept
        return concept_id, "flag" if concept_id else "group"
    readings = set()
    for factor in dict.fromkeys([analyte.units[unit]] if unit else analyte.units.values()):
        low, high = _converted(stated, factor), _converted(highest, factor)
        if compared in ("<", "<=", "≤", "less than", "below", "under"):
            low = analyte.lowest
        elif compared in (">", ">=", "≥", "greater than", "over", "above"):
            high = analyte.highest
        if analyte.lowest <= low <= high <= analyte.highest:
            readings.add((low, high))
    if not readings:
        return None, "implausible"
    outcomes = {outcome for low, high in readings for outcome in _outcomes(analyte, low, high, patient)}
    if outcomes == {None}:
        return None, "normal"
    if None in outcomes or "?" in outcomes or not outcomes:
        return None, "group"
    if len(outcomes) > 1:  # classes of obesity beside obesity
        return (analyte.high_concept, "value") if analyte.name == "BMI" and "HP:0025502" not in outcomes and (
            analyte.low_concept not in outcomes) else (None, "group")  # fmt: skip
    return outcomes.pop(), "value"


def _outcomes(analyte: _Analyte, low: float, high: float, patient: _Patient) -> Iterator[str | None]:
    """Yield what each group says that the patient may belong to: a concept, None for normal, or `?` for undecided."""
    groups: dict[tuple[str, float, float], list[_Band]] = {}
    for band in analyte.bands:
        if band.sex in patient.sexes and band.age_from < patient.ages[1] and patient.ages[0] < band.age_to:
            groups.setdefault((band.sex, band.age_from, band.age_to), []).append(band)
    if not groups:
        yield "?"
    for bands in groups.values():
        if all(band.concept_id is None for band in bands):
            yield "?"
        else:
            yield next((band.concept_id for band in bands if band.holds(low, high)), None)


def _against(analyte: _Analyte, low: float, high: float, reference: re.Match[str]) -> tuple[str | None, str]:
    """Judge by the range that the note states, in the unit of the value."""
    if reference["bound"]:
        limit, under = _number(reference["limit"]), reference["bound"] in "<≤"
        if under:
            return (analyte.high_concept, "range") if low > limit else (None, "normal")
        return (analyte.low_concept, "range") if high < limit else (None, "normal")
    if high < _number(reference["low"]):
        return analyte.low_concept, "range"
    if low > _number(reference["high"]):
        return analyte.high_concept, "range"
    return None, "normal"


def _blood_pressure(text: str, name: re.Match[str], patient: _Patient, goal: bool) -> Iterator[Measurement]:
    value = re.compile(
        rf"\s*[:=]?\s*(?:{_FILLER}\s+){{0,3}}(?P<compared>[<>])?\s*(?P<systolic>\d{{2,3}})\s*/\s*(?P<diastolic>\d{{2,3}})\b",
        re.IGNORECASE,
    ).match(text, name.end())
    if value is None:
        return
    systolic, diastolic = int(value["systolic"]), int(value["diastolic"])
    concept_id, reason = None, "normal"
    if goal or value["compared"] or _NOT_MEASURED_AFTER.match(text[value.end() : value.end() + 24]):
        reason = "goal"
    elif not (40 <= systolic <= 300 and 10 <= diastolic < systolic):
        reason = "implausible"
    elif patient.ages[0] < 18 and not (systolic >= 180 or (patient.ages[1] > 100 and systolic >= 160)):
        reason = "group"
    elif systolic >= 140 or diastolic >= 90:
        concept_id, reason = "HP:0032263", "value"
    elif systolic < 90 and patient.ages[0] >= 18:
        concept_id, reason = "HP:0002615", "value"
    yield Measurement(name.start(), value.end(), "blood pressure", float(systolic), concept_id, reason)


def _growth(text: str) -> Iterator[Measurement]:
    for found in _GROWTH.finditer(text):
        between = found["between"].lower()
        if re.search(r"\b(?:height|stature|length|weight|circumference|ofc|bmi|gain|loss|goal|for)\b", between):
            continue
        low, high = _GROWTH_NAMES[found["name"].lower()]
        concept_id: str | None
        if found["rank"]:
            rank, compared = float(found["rank"]), (found["compared"] or "").lower()
            under = compared in ("<", "≤", "less than", "below", "under")
            over = compared in (">", "≥", "greater than", "above", "over")
            concept_id = low if (rank < 3 and not over) or (rank == 3 and under) else None
            if (rank > 97 and not under) or (rank == 97 and over):
                concept_id = high
            value = rank
        else:
            value = float(re.sub(r"\s", "", (found["sd"] or found["z"])).replace("−", "-").replace("–", "-"))
            concept_id = low if value < -2 else high if value > 2 else None
        yield Measurement(found.start(), found.end(), found["name"].lower(), value, concept_id,
                          "value" if concept_id else "normal")  # fmt: skip


_ANY_AGE, _NO_NEWBORN = (0.0, 130.0), (0.1, 130.0)


def _patient(text: str, age_years: float | None, sex: str | None) -> _Patient:
    """Return what is known of the patient: the interval of the age, and the groups of sex that are possible."""
    said_sexes: set[str] = set()
    ages: list[tuple[float, float]] = []
    if age_years is None or sex is None:
        for found in _AGE.finditer(text):
            if not _AGE_STATED.search(found.group()) or _RELATIVE.search(
                text[max(0, found.start() - 30) : found.start()]
            ):
                continue
            number, unit = int(found["n"]), found["unit"].lower()
            year = (
                1.0
                if unit.startswith("y")
                else 1 / 12
                if unit.startswith("m")
                else 1 / 52.2
                if unit[0] == "w"
                else 1 / 365
            )
            if number * year < 120:
                ages.append((number * year, (number + 1) * year))
            if found["sex"]:
                word = re.findall(r"[a-z]+", found["sex"].lower())[-1]
                said_sexes.add("F" if word in _FEMALE else "M")
    if age_years is not None:
        span = (age_years, age_years + 1e-6)
    elif ages:
        low, high = min(a for a, _ in ages), max(b for _, b in ages)
        span = (low, high) if high - low < 3 else _ANY_AGE
    elif _NEWBORN.search(text):
        span = (0.0, 1.0)
    else:
        span = _ANY_AGE
    if span == _ANY_AGE and not _NEWBORN.search(text):  # a note on a newborn says so
        span = _NO_NEWBORN
    known = sex or (said_sexes.pop() if len(said_sexes) == 1 else None)
    sexes = ("any", known) if known in ("F", "M") else ("any", "F", "M")
    if known != "M" and span[1] > 12 and span[0] < 55 and _PREGNANT.search(text):
        sexes = (*sexes, "pregnant")
    return _Patient(span, sexes)


_RELATIVE = re.compile(
    r"\b(?:mother|father|brother|sister|son|daughter|wife|husband|aunt|uncle|cousin|grand\w+|parent|sibling|died at|"
    r"onset|since|diagnosed|age of|at age|when (?:he|she) was|twin)\b[^.;\n]*$",
    re.IGNORECASE,
)


def _unit(text: str, position: int, analyte: _Analyte) -> tuple[str | None, int]:
    """Return the analyte's unit at `position` and where it ends; `other` for a unit that it does not have."""
    for unit in sorted(filter(None, analyte.units), key=len, reverse=True):
        found = re.compile(rf"\s*{re.escape(unit)}(?![A-Za-z/])").match(text, position) or re.compile(
            rf"\s*{re.escape(unit)}(?![A-Za-z/])", re.IGNORECASE
        ).match(text, position)
        if found is not None:
            return unit, found.end()
    if "" in analyte.units and not _OTHER_UNIT.match(text, position):
        return "", position
    other = _OTHER_UNIT.match(text, position)
    if other is not None and other["unit"] != "L" and other["unit"].lower() in _UNIT_WORDS:
        return "other", other.end()
    return ("" if "" in analyte.units else None), position


def _converted(value: float, factor: str) -> float:
    if factor == "F":
        return (value - 32) / 1.8
    return value * float(factor)


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _key(name: str) -> str:
    return name if len(name) <= 4 else re.sub(r"\s+", " ", name.lower())


@lru_cache(maxsize=1)
def _analytes() -> dict[str, _Analyte]:
    found = {}
    for row in _rows("analytes.csv"):
        units = {}
        for part in row["units"].split(";"):
            unit, _, factor = part.rpartition("=")
            if factor == "?":  # `degrees` of either scale
                continue
            units[unit] = factor
        found[row["analyte"]] = _Analyte(row["analyte"], units, float(row["lowest"]), float(row["highest"]),
                                         row["low_concept"] or None, row["high_concept"] or None)  # fmt: skip
    for row in _rows("thresholds.csv"):
        at_least, above, below = (float(row[key]) if row[key] else None for key in ("at_least", "above", "below"))
        ages = float(row["age_from"]), float(row["age_to"])
        band = _Band(row["sex"], *ages, at_least, above, below, row["concept_id"] or None)
        found[row["analyte"]].bands.append(band)
    return found


@lru_cache(maxsize=1)
def _by_name() -> dict[str, str]:
    return {_key(name): row["analyte"] for row in _rows("analytes.csv") for name in row["names"].split("|")}


@lru_cache(maxsize=1)
def _names() -> re.Pattern[str]:
    """Match the name of any analyte, the longest first; short forms only as they are written."""
    names: Iterable[str] = sorted(_by_name(), key=lambda name: (-len(name), name))
    parts = []
    for name in names:
        escaped = re.escape(name).replace(r"\ ", r"\s+")
        parts.append(escaped if len(name) <= 4 else f"(?i:{escaped})")
    return re.compile(rf"(?<![\w/.+-])(?:(?P<pressure>BP|(?i:blood\s+pressure))|{'|'.join(parts)})(?![\w/])")


def _rows(name: str) -> Sequence[dict[str, str]]:
    with (_FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
