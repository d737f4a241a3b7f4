"""Writing one note from a latent patient in the style of the note, with exact gold.

Spans are kept while the text grows. What happens afterwards (wrapping, typos, capitals) changes characters one for one,
so that every offset stays true.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from random import Random

from clinical_nlp.corpora.synthetic_hospitals.content import Content, Template
from clinical_nlp.corpora.synthetic_hospitals.patients import MEASURED, SIGNS, UNFELT, Patient
from clinical_nlp.corpora.synthetic_hospitals.style import Institution, Style

Axes = tuple[str, str, str, str]
"""presence, temporality, modality, experiencer"""

PRESENT: Axes = ("present", "current", "actual", "patient")
ABSENT: Axes = ("absent", "current", "actual", "patient")
UNCERTAIN: Axes = ("uncertain", "current", "actual", "patient")
HISTORICAL: Axes = ("present", "historical", "actual", "patient")
PLANNED: Axes = ("present", "future", "actual", "patient")
HYPOTHETICAL: Axes = ("present", "current", "hypothetical", "patient")
CONDITIONAL: Axes = ("present", "current", "conditional", "patient")
FAMILY: Axes = ("present", "current", "actual", "family")
FAMILY_ABSENT: Axes = ("absent", "current", "actual", "family")

Mention = tuple[str, Axes]
"""Entity key and what is said of it."""
Slot = str | Mention | list[Mention]

# start, end, entity key, axes, section, fact number, class tags, width of a side in front, start without it
Mark = tuple[int, int, str, Axes, str, int, tuple[str, ...], int]


Fact = tuple[str, str, Axes, str | None, float | None, str | None]
"""kind, entity key, axes, side, value, unit"""


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage that the next note may copy: offsets from its own start, and the facts it was written from."""

    text: str
    marks: list[Mark]
    facts: list[Fact]


@dataclass(slots=True)
class Draft:
    """A finished note before it becomes rows: text, marks, facts, and where the radiology parts are."""

    text: str
    title: str
    marks: list[Mark]
    facts: list[Fact]
    parts: dict[str, tuple[int, int]]
    memory: Passage | None


_SECTIONS: dict[str, tuple[str, tuple[str, str, str, str]]] = {
    "cc": ("chief_complaint", ("Chief Complaint", "CC", "Reason for Visit", "Presenting Complaint")),
    "hpi": ("history_of_present_illness",
            ("History of Present Illness", "HPI", "Present Illness", "History of Presenting Illness")),
    "interval": ("history_of_present_illness", ("Subjective", "Interval History", "Interval Events", "24 Hour Events")),
    "pmh": ("past_medical_history", ("Past Medical History", "PMH", "Medical History", "Past History")),
    "psh": ("past_medical_history", ("Past Surgical History", "PSH", "Surgical History", "Past Surgeries")),
    "meds": ("medications", ("Medications", "Current Medications", "Home Medications", "Meds")),
    "dc_meds": ("medications", ("Discharge Medications", "Medications on Discharge", "Discharge Meds", "Medications")),
    "allergies": ("allergies", ("Allergies", "Drug Allergies", "Allergies", "Allergy")),
    "family": ("family_history", ("Family History", "FH", "Family Medical History", "FHx")),
    "social": ("social_history", ("Social History", "SH", "Social Hx", "Habits")),
    "ros": ("review_of_systems", ("Review of Systems", "ROS", "Systems Review", "Review of Symptoms")),
    "vitals": ("physical_exam", ("Vital Signs", "Vitals", "VS", "Vital Signs")),
    "exam": ("physical_exam", ("Physical Exam", "PE", "Physical Examination", "Examination")),
    "labs": ("laboratory", ("Laboratory Data", "Labs", "Pertinent Results", "Laboratory Results")),
    "imaging": ("imaging", ("Imaging", "Imaging Studies", "Radiology", "Diagnostic Studies")),
    "assessment": ("assessment_plan", ("Assessment", "Impression and Plan", "Assessment", "Summary")),
    "plan": ("assessment_plan", ("Plan", "Recommendations", "Plan of Care", "Plan")),
    "ap": ("assessment_plan", ("Assessment and Plan", "A/P", "Assessment/Plan", "Assessment & Plan")),
    "dx": ("assessment_plan", ("Discharge Diagnosis", "Discharge Diagnoses", "Final Diagnosis", "Diagnoses")),
    "course": ("hospital_course", ("Hospital Course", "Brief Hospital Course", "Course", "Summary of Hospital Course")),
    "procedures": ("procedures",
                   ("Procedures", "Major Surgical or Invasive Procedure", "Procedures Performed", "Operations")),
    "instructions": ("discharge_instructions",
                     ("Discharge Instructions", "Instructions", "Patient Instructions", "Follow-up Instructions")),
    "indication": ("other", ("Indication", "Clinical Indication", "Clinical History", "Reason for Exam")),
    "technique": ("other", ("Technique", "Technique", "Procedure", "Protocol")),
    "comparison": ("other", ("Comparison", "Comparison", "Prior Studies", "Comparisons")),
    "findings": ("findings", ("Findings", "Findings", "Report", "Description")),
    "impression": ("impression", ("Impression", "Conclusion", "Impression", "Opinion")),
    "nursing": ("other", ("Nursing Note", "Narrative", "Shift Summary", "Nursing Assessment")),
    "nursing_plan": ("assessment_plan", ("Plan", "Plan of Care", "Nursing Plan", "Plan")),
}  # fmt: skip

_LAYOUTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "admission": (
        ("cc", "hpi", "pmh", "psh", "meds", "allergies", "family", "social", "ros", "vitals", "exam", "labs", "imaging",
         "ap"),
        ("cc", "hpi", "ros", "pmh", "psh", "family", "social", "meds", "allergies", "vitals", "exam", "labs", "imaging",
         "assessment", "plan"),
        ("hpi", "pmh", "meds", "allergies", "social", "family", "vitals", "exam", "labs", "imaging", "ap"),
    ),
    "progress": (
        ("interval", "meds", "vitals", "exam", "labs", "assessment", "plan"),
        ("interval", "vitals", "exam", "labs", "ap"),
        ("ap", "interval", "vitals", "exam", "labs", "meds"),
    ),
    "discharge": (
        ("dx", "hpi", "pmh", "course", "procedures", "dc_meds", "instructions"),
        ("dx", "procedures", "hpi", "pmh", "family", "exam", "labs", "course", "dc_meds", "instructions"),
        ("course", "dx", "dc_meds", "instructions"),
    ),
    "clinic": (
        ("cc", "interval", "pmh", "meds", "allergies", "ros", "vitals", "exam", "ap"),
        ("interval", "pmh", "psh", "family", "social", "meds", "vitals", "exam", "labs", "assessment", "plan"),
        ("cc", "hpi", "meds", "ros", "exam", "assessment", "plan"),
    ),
    "radiology": (
        ("indication", "technique", "comparison", "findings", "impression"),
        ("technique", "indication", "comparison", "findings", "impression"),
        ("indication", "comparison", "findings", "impression"),
    ),
    "nursing": (("nursing", "vitals", "nursing_plan"), ("vitals", "nursing"), ("nursing",)),
}  # fmt: skip
_OPTIONAL = frozenset(("psh", "allergies", "social", "family", "ros", "labs", "imaging", "meds", "procedures"))

_TITLES = {
    "admission": ("Admission Note", "History and Physical", "H&P", "Admission History and Physical"),
    "progress": ("Progress Note", "Daily Progress Note", "Inpatient Progress Note", "Medicine Progress Note"),
    "discharge": ("Discharge Summary", "Discharge Summary", "Summary of Hospitalization", "Hospital Discharge Summary"),
    "clinic": ("Clinic Note", "Outpatient Visit", "Office Visit", "Ambulatory Follow-up"),
    "nursing": ("Nursing Note", "Nursing Progress Note", "Shift Note", "RN Note"),
}
_STUDIES = {
    "cxr": ("Chest Radiograph", "PA and lateral views of the chest."),
    "ct_chest": ("CT Chest", "Axial images of the chest were obtained with intravenous contrast."),
    "ct_abdomen": ("CT Abdomen and Pelvis", "Helical images of the abdomen and pelvis were obtained."),
    "cth": ("CT Head", "Contiguous axial images of the head without contrast."),
    "us": ("Ultrasound", "Grayscale and color Doppler images were obtained."),
    "xr": ("Radiograph", "Two views were obtained."),
}
_UNSEEN = {
    "cxr": ("pneumothorax", "pleural_effusion", "infiltrate", "pulmonary_edema", "cardiomegaly", "pneumonia",
            "pulmonary_nodule", "atelectasis"),
    "ct_chest": ("pe", "pneumothorax", "pleural_effusion", "lymphadenopathy", "pulmonary_nodule", "ground_glass",
                 "infiltrate", "bronchiectasis"),
    "ct_abdomen": ("hydronephrosis", "nephrolithiasis", "bowel_obstruction", "ascites", "lymphadenopathy",
                   "diverticulitis", "aortic_aneurysm", "renal_cyst"),
    "cth": ("subdural", "subarachnoid", "stroke", "atrophy", "white_matter"),
    "us": ("dvt", "ascites", "hydronephrosis", "cholelithiasis", "splenomegaly", "hepatomegaly", "renal_cyst"),
    "xr": ("hip_fracture", "compression_fracture", "joint_effusion", "erosions", "osteomyelitis"),
}  # fmt: skip
_INCIDENTAL = {"cxr": ("atelectasis",), "ct_chest": ("pulmonary_nodule", "atelectasis"),
               "ct_abdomen": ("renal_cyst", "fatty_liver"), "cth": ("white_matter", "atrophy"),
               "us": ("renal_cyst", "fatty_liver"), "xr": ("osteoarthritis", "osteoporosis")}  # fmt: skip

_NUMBER_WORDS = {"PO": "by mouth", "IV": "intravenously", "SC": "subcutaneously", "IM": "intramuscularly",
                 "SL": "under the tongue"}  # fmt: skip
_SIG = {"daily": "qd", "BID": "bid", "TID": "tid", "QID": "qid", "nightly": "qhs", "PRN": "prn", "Q6H": "q6h",
        "Q4H": "q4h", "Q8H": "q8h", "Q12H": "q12h"}  # fmt: skip
_WORDS = {"daily": "once daily", "BID": "twice daily", "TID": "three times daily", "QID": "four times daily",
          "nightly": "at bedtime", "PRN": "as needed", "Q6H": "every six hours", "Q4H": "every four hours",
          "Q8H": "every eight hours", "Q12H": "every twelve hours"}  # fmt: skip
_PLACEHOLDERS = {
    "bracket": ("[**Last Name 4417**]", "[**2119-3-4**]", "[**Hospital 12**]"),
    "underscore": ("___", "___", "___"),
    "angle": ("<NAME>", "<DATE>", "<HOSPITAL>"),
    "x": ("XXXX", "XXXX", "XXXX"),
    "square": ("[NAME]", "[DATE]", "[HOSPITAL]"),
    "at": ("@NAME@", "@DATE@", "@HOSPITAL@"),
}
MARKERS = ("Note typed and reviewed by the author.", "Dictated with voice recognition software; errors may remain.")
"""Closing lines; the second follows the target condition as far as the spurious knob says."""

_SPECIALTY = {"cardiovascular": "cardiology", "respiratory": "pulmonology", "gastrointestinal": "gastroenterology",
              "genitourinary": "nephrology", "neurological": "neurology", "psychiatric": "psychiatry",
              "endocrine": "endocrinology", "musculoskeletal": "rheumatology", "dermatological": "dermatology",
              "hematological": "hematology", "infectious": "infectious disease",
              "reproductive": "gynecology"}  # fmt: skip
_SHE = {"He": "She", "he": "she", "his": "her", "him": "her"}
_HE = {"He": "He", "he": "he", "his": "his", "him": "him"}
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class Writer:
    """Writes one note. Make one, call `write` once."""

    __slots__ = (
        "_content", "_covariate", "_facts", "_favourites", "_felt", "_idioms", "_known", "_length", "_marks", "_parts",
        "_patient", "_pieces", "_pronouns", "_random", "_said", "_section", "_seen", "_spoken", "_style", "_tags",
        "_type", "_when",
    )  # fmt: skip

    def __init__(self, content: Content, institution: Institution, patient: Patient, style: Style, random: Random, *,
                 covariate: float, note_type: str, when: datetime) -> None:  # fmt: skip
        self._content, self._patient, self._style = content, patient, style
        self._idioms, self._favourites, self._covariate = content.idioms, institution.favourites, covariate
        self._random, self._type, self._when = random.random, note_type, when
        self._pieces: list[str] = []
        self._length = 0
        self._marks: list[Mark] = []
        self._facts: list[Fact] = []
        self._known: dict[tuple[object, ...], int] = {}
        self._parts: dict[str, tuple[int, int]] = {}
        self._section = "other"
        self._tags: tuple[str, ...] = ()
        self._pronouns = _SHE if patient.sex == "female" else _HE
        self._spoken: dict[str, int] = {}
        self._said: set[str] = set()
        self._seen: dict[Mention, str | None] = {}
        self._felt = [key for key in patient.findings if key not in UNFELT]

    # -- small words ------------------------------------------------------------------------------------------------

    def _pick(self, items: Sequence[str]) -> str:
        return items[int(self._random() * len(items))]

    def _text(self, text: str) -> None:
        self._pieces.append(text)
        self._length += len(text)

    def _idiom(self, category: str) -> Template:
        found = self._favourites[category] if self._random() < self._covariate else self._idioms[category]
        chosen = found[int(self._random() * len(found))]
        if category in _NEUTRAL:
            for _ in range(3):
                if chosen[0] not in self._said:
                    break
                chosen = found[int(self._random() * len(found))]
            self._said.add(chosen[0])
        return chosen

    def _fact(self, kind: str, key: str, axes: Axes, side: str | None, value: float | None, unit: str | None) -> int:
        known = (kind, key, axes, side, value)
        number = self._known.get(known)
        if number is None:
            number = self._known[known] = len(self._facts)
            self._facts.append((kind, key, axes, side, value, unit))
        return number

    def _phrase(self, key: str) -> tuple[str, tuple[str, ...]]:
        """Choose how to name an entity; the second value says whether it is lay or an abbreviation."""
        entity = self._content.entities[key]
        style, draw = self._style, self._random()
        if entity.label == "drug":
            return entity.names[1 if style["dose"] == "brand" and len(entity.names) > 1 else 0], ()
        if entity.lay and self._section not in _STRICT:
            lay = style["lay"] + (0.35 if self._type == "nursing" or self._section in _PLAIN else 0.0)
            if self._section in _TERSE:
                lay *= 0.3
            if draw < lay:
                return self._pick(entity.lay), ("lay",)
        if entity.abbreviations and self._random() < style["abbreviations"]:
            return self._pick(entity.abbreviations), ("abbreviation",)
        terms = style["terms"]
        if terms == "first":
            return entity.names[0], ()
        if terms == "ontology":
            return entity.names[-1], ()
        if terms == "rare" and len(entity.names) > 2:
            return entity.names[1 + int(self._random() * (len(entity.names) - 1))], ()
        # The first name is the one clinicians use most.
        return (entity.names[0] if draw > 0.55 else self._pick(entity.names)), ()

    def _mention(self, mention: Mention, *, capital: bool = False, number: int = -1) -> None:
        key, axes = mention
        phrase, tags = self._phrase(key)
        side, width = None, 0
        if mention in self._seen:
            side = self._seen[mention]
        elif axes[0] == "present" and axes[3] == "patient" and "lay" not in tags and key in self._patient.sides \
                and self._random() < 0.6:  # fmt: skip
            side = self._patient.sides[key]
        if self._section == "findings":
            self._seen[mention] = side
        if side:
            word = _side_word(side, self._style["side"])
            if capital:
                word, capital = word[0].upper() + word[1:], False
            width = len(word) + 1
            self._text(word + " ")
        if capital:
            phrase = phrase[0].upper() + phrase[1:]
        kind = self._content.entities[key].label
        if number < 0:
            fact = "finding" if kind == "problem" else "plan" if axes[1] == "future" else kind
            number = self._fact(fact, key, axes, side, None, None)
        start = self._length
        self._text(phrase)
        tags = (*tags, *self._tags)
        self._marks.append((start, self._length, key, axes, self._section, number, tags, width))

    def _list(self, mentions: list[Mention], last: str, capital: bool) -> None:
        for place, mention in enumerate(mentions):
            if place:
                self._text(last if place == len(mentions) - 1 else ", ")
            self._mention(mention, capital=capital and place == 0)

    def _say(self, category: str, **slots: Slot) -> None:
        """Write one idiom of a category with its slots filled."""
        capital = True
        for place, piece in enumerate(self._idiom(category)):
            if place % 2 == 0:
                if piece:
                    self._text(piece)
                    capital = False
                continue
            value: Slot | None = slots.get(piece)
            if value is None:
                value = self._pronouns.get(piece) or self._filler(piece)
            if type(value) is str:
                self._text(value[0].upper() + value[1:] if capital and value else value)
            elif type(value) is list:
                self._list(value, " or " if piece == "either" else " and ", capital)
            elif piece == "d":
                self._drug(value[0], value[1], capital=capital)  # type: ignore[index,arg-type]
            else:
                self._mention(value, capital=capital)  # type: ignore[arg-type]
            capital = False

    def _filler(self, slot: str) -> str:
        draw = self._random()
        if slot == "dur":
            days = self._patient.onset_days
            return f"{days} days" if days > 1 else "one day"
        if slot == "age":
            return _age(self._patient.age, self._style["demographic"])
        if slot == "an":
            return "an" if str(self._patient.age)[0] == "8" or self._patient.age == 18 else "a"
        if slot == "sex":
            return _sex(self._patient.sex, self._style["demographic"])
        if slot == "year":
            return str(self._when.year - 1 - int(draw * 20))
        if slot == "years":
            return str(40 + int(draw * 40))
        if slot == "day":
            return str(1 + int(draw * 5))
        if slot == "weeks":
            return ("one week", "two weeks", "1-2 weeks", "4 weeks", "three months")[int(draw * 5)]
        if slot == "specialty":
            system = self._content.entities[self._patient.conditions[0]].system or ""
            return _SPECIALTY.get(system, "primary care")
        if slot == "name":
            return "Dr. " + _PLACEHOLDERS[self._style["placeholder"]][0]
        if slot == "date":
            return self._date(self._when)
        raise KeyError(slot)

    def _date(self, when: datetime) -> str:
        style = self._style["dates"]
        if style == "iso":
            return f"{when.year}-{when.month:02d}-{when.day:02d}"
        if style == "us":
            return f"{when.month:02d}/{when.day:02d}/{when.year % 100:02d}"
        if style == "long":
            return f"{_MONTHS[when.month - 1]} {when.day}, {when.year}"
        if style == "day_month":
            return f"{when.day:02d}-{_MONTHS[when.month - 1]}-{when.year}"
        return _PLACEHOLDERS[self._style["placeholder"]][1]

    def _drug(self, key: str, axes: Axes, *, capital: bool = False) -> None:
        """Write a drug as it was prescribed; its fact carries the dose."""
        given = next((drug for drug in self._patient.drugs if drug[0] == key), None)
        dosing = self._content.dosing[key]
        dose, frequency = (given[1], given[2]) if given else (dosing.doses[0], dosing.frequencies[0])
        fact = "plan" if axes[1] == "future" else "drug"
        number = self._fact(fact, key, axes, None, float(dose), dosing.unit)
        self._mention((key, axes), capital=capital, number=number)
        style = self._style["dose"]
        if style == "tight":
            self._text(f" {dose}{dosing.unit} {dosing.route} {frequency}")
        elif style == "sig":
            self._text(f" {dose} {dosing.unit} {dosing.route.lower()} {_SIG.get(frequency, frequency)}")
        elif style == "words":
            route = _NUMBER_WORDS.get(dosing.route, dosing.route)
            self._text(f" {dose} {dosing.unit} {route} {_WORDS.get(frequency, frequency)}")
        else:
            self._text(f" {dose} {dosing.unit} {dosing.route} {frequency}")

    # -- structure --------------------------------------------------------------------------------------------------

    def _header(self, name: str, place: int) -> None:
        style = self._style["header"]
        if self._pieces:
            self._text("\n" * (1 + self._style["blank_lines"]))
        if style == "colon":
            self._text(f"{name}: ")
        elif style == "caps_colon":
            self._text(f"{name.upper()}:\n")
        elif style == "caps":
            self._text(f"{name.upper()}\n")
        elif style == "numbered":
            self._text(f"{place}. {name.upper()}:\n")
        elif style == "title":
            self._text(f"{name}\n")
        elif style == "dash":
            self._text(f"{name} - ")
        elif style == "equals":
            self._text(f"== {name} ==\n")
        else:
            self._text(f"**{name}**\n")

    def _items(self, writers: Iterable[Callable[[], None]], *, listed: bool) -> None:
        """Write items as a list in the note's own bullets, or as running text."""
        bullet = self._style["bullet"]
        for place, item in enumerate(writers):
            if bullet and listed:
                if not place and self._pieces[-1][-2:] == ": ":
                    self._pieces[-1] = self._pieces[-1][:-1]
                    self._length -= 1
                at_start = not place and self._pieces[-1][-1:] == "\n"
                mark = f"{place + 1}. " if bullet == "#. " else bullet
                self._text(mark if at_start else "\n" + mark)
            elif place:
                self._text("\n" if listed else " ")
            item()

    def _present(self, keys: Iterable[str]) -> list[Mention]:
        return [(key, PRESENT) for key in keys]

    def _some(self, items: Sequence[str], n: int) -> list[str]:
        """Take `n` items from a random start, in order: cheaper than a sample, and a list keeps its themes."""
        if len(items) <= n:
            return list(items)
        start = int(self._random() * len(items))
        return [items[(start + step) % len(items)] for step in range(n)]

    def write(self, memory: Passage | None, marker: int) -> Draft:
        """Write the note. `memory` is a passage of the patient's previous note that may be copied."""
        style = self._style
        names = style["header_names"]
        if style["letterhead"]:
            self._text(f"{style['letterhead']}\n")
        if self._type == "radiology":
            study = self._study()
            title = _STUDIES[study][0]
        else:
            study = ""
            title = _TITLES[self._type][names]
        self._text(f"{title}\n")
        if style["signature"] == "electronic" and self._type != "nursing":
            self._text(f"Date of service: {self._date(self._when)}\n")
        layouts = _LAYOUTS[self._type]
        layout = layouts[style["order"] % len(layouts)]
        kept = None
        place = 0
        for key in layout:
            if key in _OPTIONAL and style["length"] == 1 and self._random() < 0.5:
                continue
            if not self._wanted(key):
                continue
            place += 1
            self._section, header = _SECTIONS[key][0], _SECTIONS[key][1][names]
            self._header(header, place)
            start = self._length
            if key in ("hpi", "interval"):
                if memory is not None and self._random() < style["copying"]:
                    self._copy(memory)
                    self._text(" ")
                marks, own = len(self._marks), self._length
                (self._hpi if key == "hpi" else self._interval)()
                kept = (own, marks)
                kept_end = (self._length, len(self._marks))
            elif study:
                self._radiology(key, study)
            else:
                _WRITE[key](self)
            self._parts[key] = (start, self._length)
        self._section = "other"
        if style["signature"] != "none":
            name = _PLACEHOLDERS[style["placeholder"]][0]
            signed = {"electronic": f"Electronically signed by: {name}", "dashes": f"-- {name}, MD --",
                      "initials": f"{name} {self._date(self._when)}"}[style["signature"]]  # fmt: skip
            self._text("\n" * (1 + style["blank_lines"]) + signed)
        text = "".join(self._pieces)
        if kept is not None:
            (a, i), (b, j) = kept, kept_end
            marks_of = [(m[0] - a, m[1] - a, *m[2:]) for m in self._marks[i:j]]
            memory = Passage(text[a:b], marks_of, self._facts)  # type: ignore[arg-type]
        if style["wrap"]:
            text = _wrap(text, style["wrap"])
        if style["typos"]:
            text = _misspell(text, style["typos"], self._random)
        # After the typos, so that they fall on the same letters whatever the closing line is.
        text += f"\n{MARKERS[marker]}\n"
        if style["body"] == "lower":
            text = text.lower()
        elif style["body"] == "upper":
            text = text.upper()
        return Draft(text, title, self._marks, self._facts, self._parts, memory)

    def _copy(self, memory: Passage) -> None:
        """Copy a passage forward, with its gold."""
        shift = self._length
        self._text(memory.text)
        for start, end, key, axes, _, fact, tags, width in memory.marks:
            number = self._fact(*memory.facts[fact])
            self._marks.append((start + shift, end + shift, key, axes, self._section, number, (*tags, "copied"), width))

    def _wanted(self, key: str) -> bool:
        patient = self._patient
        if key == "psh":
            return bool(patient.surgeries)
        if key == "procedures":
            return bool(patient.procedures)
        if key in ("meds", "dc_meds"):
            return bool(patient.drugs)
        if key == "imaging":
            return bool(patient.imaging)
        return True

    # -- sections ---------------------------------------------------------------------------------------------------

    def _chief(self) -> None:
        symptoms = self._felt[: 1 + int(self._random() * 2)]
        self._list(self._present(symptoms or self._patient.conditions[:1]), ", ", True)
        self._text(".")

    def _opening(self) -> list[str]:
        """Say who comes with what; return the symptoms that are still unsaid."""
        patient = self._patient
        symptoms = self._felt
        first = symptoms[:2] or patient.conditions[:1]
        chronic = [key for key in patient.conditions[1:] if self._content.conditions[key].chronic][:1]
        known = (chronic or patient.conditions[-1:])[0]
        once = (chronic or patient.resolved[:1] or patient.conditions[-1:])[0]
        self._say("opening", also=self._present(first), h=(once, HISTORICAL), k=(known, PRESENT))
        return symptoms[2:]

    def _symptoms(self, keys: Sequence[str]) -> None:
        keys = list(keys)
        while keys:
            n = 1 + int(self._random() * 2)
            some, keys = keys[:n], keys[n:]
            self._text(" ")
            mentions = self._present(some)
            # A template with one slot says one finding, so it is given only when there is one.
            self._say("symptom" if n == 1 else "symptoms", f=mentions[0], also=mentions)

    def _negatives(self, category: str, keys: Sequence[str], axes: Axes = ABSENT) -> None:
        mentions = [(key, axes) for key in keys]
        if mentions:
            self._say(category, f=mentions[0], either=mentions)

    def _hpi(self) -> None:
        style = self._style
        self._symptoms(self._opening()[: style["length"] + 1])
        self._text(" ")
        self._negatives("neg_list", self._some(self._patient.absent, 1 + style["length"]))
        if self._random() < 0.35:
            self._text(" ")
            self._negatives("neg_one", self._some(self._patient.absent, 1))
        if self._random() < 0.3:
            self._conditional()
        if self._random() < 0.4 and self._patient.uncertain:
            self._text(" ")
            self._say("hedge", f=(self._pick(self._patient.uncertain), UNCERTAIN))
        drugs = self._patient.drugs
        if style["length"] > 1 and drugs and self._random() < 0.6:
            drug = drugs[int(self._random() * len(drugs))]
            if drug[3] == self._patient.conditions[0] and self._type == "admission":
                self._text(" ")
                self._say("emergency", d=(drug[0], PRESENT))
            elif self._content.conditions[drug[3]].chronic:
                self._text(" ")
                self._say("taking", d=(drug[0], PRESENT), c=(drug[3], PRESENT))
        if style["length"] == 3 and self._patient.procedures:
            self._text(" ")
            self._say("done", p=(self._patient.procedures[0], PRESENT))
        if style["length"] > 1 and self._random() < 0.4:
            self._text(" ")
            self._say("filler")

    def _conditional(self) -> None:
        keys = [key for key in ("dyspnea", "chest_pain", "chest_tightness", "limb_pain", "claudication", "palpitations")
                if key in self._patient.findings]  # fmt: skip
        if keys:
            self._text(" ")
            self._say("conditional", f=(keys[0], CONDITIONAL))

    def _interval(self) -> None:
        patient, length = self._patient, self._style["length"]
        self._say("filler")
        for key in self._some(self._felt, length):
            self._text(" ")
            if self._random() < 0.4:
                self._say("resolved", f=(key, HISTORICAL))
            else:
                self._say("persist", f=(key, PRESENT))
        self._text(" ")
        self._negatives("neg_list", self._some(patient.absent, 1 + length))
        if length > 1 and self._random() < 0.5:
            self._text(" ")
            self._say("filler")

    def _past(self) -> None:
        patient = self._patient
        chronic = [key for key in patient.conditions if self._content.conditions[key].chronic]
        keys = [*chronic, *patient.resolved] or patient.conditions[-1:]
        if self._random() < 0.5:
            self._items([lambda key=key: self._mention((key, HISTORICAL), capital=True) for key in keys],  # type: ignore[misc]
                        listed=True)  # fmt: skip
        else:
            self._items([lambda key=key: self._say("history", f=(key, HISTORICAL)) for key in keys],  # type: ignore[misc]
                        listed=len(keys) > 2)  # fmt: skip

    def _surgical(self) -> None:
        self._items([lambda key=key: self._say("surgical", p=(key, HISTORICAL))  # type: ignore[misc]
                     for key in self._patient.surgeries], listed=True)  # fmt: skip

    def _medications(self) -> None:
        self._items([lambda key=drug[0]: self._drug(key, PRESENT, capital=True)  # type: ignore[misc]
                     for drug in self._patient.drugs], listed=True)  # fmt: skip

    def _allergies(self) -> None:
        draw = self._random()
        if draw < 0.6:
            self._text(("No known drug allergies.", "NKDA.", "None known.")[int(draw * 5)])
            return
        allergen = ("Penicillin", "Sulfa", "Codeine", "Latex")[int((draw - 0.6) * 10)]
        self._text(f"{allergen} (")
        self._mention((("rash", "urticaria", "nausea", "pruritus")[int(self._random() * 4)], CONDITIONAL))
        self._text(").")

    def _family(self) -> None:
        for place, (relative, key) in enumerate(self._patient.family):
            if place:
                self._text(" ")
            self._say("family", rel=relative, relative=relative, f=(key, FAMILY))
        if self._random() < 0.6:
            self._text(" ")
            self._negatives("family_neg", self._patient.family_absent, FAMILY_ABSENT)

    def _social(self) -> None:
        self._say("social")
        self._text(" ")
        self._say("habit")
        if self._style["length"] > 1:
            self._text(" ")
            self._say("social")

    def _review(self) -> None:
        patient = self._patient
        mentions = self._present(self._some(self._felt, 2))
        if mentions:
            self._say("symptoms", f=mentions[0], also=mentions)
            self._text(" ")
        n = 2 + self._style["length"] * 2
        keys = patient.absent[:n]
        half = 1 + len(keys) // 2
        self._negatives("neg_list", keys[:half])
        if keys[half:]:
            self._text(" ")
            self._negatives("neg_list", keys[half:])

    def _vitals(self) -> None:
        has, draw = self._patient.findings, self._random
        kelvin = 38.1 + draw() * 1.4 if "fever" in has and draw() < 0.7 else 36.3 + draw() * 0.9
        rate = int((104 if "tachycardia" in has else 46 if "bradycardia" in has else 64) + draw() * 20)
        systolic = int((78 if "hypotension" in has else 138 if "hypertension" in self._patient.conditions else 108)
                       + draw() * 24)  # fmt: skip
        pressure = f"{systolic}/{int(systolic * 0.55 + draw() * 12)}"
        breaths = int((22 if "dyspnea" in has or "tachypnea" in has else 13) + draw() * 6)
        oxygen = int((86 if "hypoxemia" in has else 95) + draw() * 5)
        style = self._style["temperature"]
        heat = f"{kelvin * 1.8 + 32:.1f}" if style == "F" else f"{kelvin:.1f}"
        heat += "" if style == "C_bare" else f" {style}"
        layout = self._style["vitals"]
        if layout == "line":
            self._text(f"T {heat} HR {rate} BP {pressure} RR {breaths} SpO2 {oxygen}% RA")
        elif layout == "list":
            self._text(f"Temp: {heat}\nPulse: {rate}\nBP: {pressure}\nResp: {breaths}\nO2 sat: {oxygen}%")
        elif layout == "prose":
            self._text(f"Temperature {heat}, pulse {rate}, blood pressure {pressure}, respirations {breaths}, "
                       f"oxygen saturation {oxygen}% on room air.")  # fmt: skip
        else:
            self._text(f"T | HR | BP | RR | O2\n{heat} | {rate} | {pressure} | {breaths} | {oxygen}%")

    def _exam(self) -> None:
        patient, length = self._patient, self._style["length"]
        writers: list[Callable[[], None]] = []
        normal = int(self._random() * 3)
        for step in range(length + 1):
            template = self._idioms["exam_normal"][(normal + step) % len(self._idioms["exam_normal"])]
            writers.append(lambda text=template[0]: self._text(text))  # type: ignore[misc]
        for key in [key for key in patient.findings if key in SIGNS][: length + 1]:
            writers.append(lambda key=key: self._say("exam_pos", f=(key, PRESENT)))  # type: ignore[misc]
        keys = self._some(patient.exam_absent, 1 + length)
        writers.append(lambda: self._negatives("exam_neg", keys[:-1]))
        if len(keys) > 1:
            writers.append(lambda: self._negatives("exam_neg", keys[-1:]))
        self._items(writers, listed=length > 1)

    def _labs(self) -> None:
        has, draw, units = self._patient.findings, self._random, self._style["units"]
        white = (13 if "leukocytosis" in has else 2 if "leukopenia" in has else 5.5) + draw() * 4
        red = (7 if "pallor" in has or "iron_deficiency" in self._patient.conditions else 12) + draw() * 3
        platelets = int((30 if "thrombocytopenia" in has else 170) + draw() * 120)
        sodium = int((124 if "hyponatremia" in has else 136) + draw() * 7)
        potassium = (5.6 if "hyperkalemia" in has else 2.7 if "hypokalemia" in has else 3.6) + draw()
        sick = "elevated_creatinine" in has or "aki" in self._patient.conditions
        creatinine = (2.0 if sick else 0.7) + draw() * (3 if sick else 0.5)
        glucose = int((210 if "hyperglycemia" in has else 48 if "hypoglycemia" in has else 82) + draw() * 50)
        if units == "si":
            values = (f"WBC {white:.1f} x10^9/L, Hgb {red * 10:.0f} g/L, Plt {platelets} x10^9/L, Na {sodium} mmol/L, "
                      f"K {potassium:.1f} mmol/L, creatinine {creatinine * 88.4:.0f} umol/L, "
                      f"glucose {glucose / 18:.1f} mmol/L")  # fmt: skip
        elif units == "conventional":
            values = (f"WBC {white:.1f} K/uL, Hgb {red:.1f} g/dL, Plt {platelets} K/uL, Na {sodium} mEq/L, "
                      f"K {potassium:.1f} mEq/L, Cr {creatinine:.1f} mg/dL, Glucose {glucose} mg/dL")  # fmt: skip
        else:
            values = (f"WBC-{white:.1f} Hgb-{red:.1f} Plt Ct-{platelets} Na-{sodium} K-{potassium:.1f} "
                      f"Creat-{creatinine:.1f} Glucose-{glucose}")  # fmt: skip
        self._text(values + ".")
        for key in [key for key in has if key in MEASURED][: self._style["length"]]:
            self._text(" ")
            self._say("exam_pos", f=(key, PRESENT))

    def _images(self) -> None:
        shown = self._patient.imaging[: self._style["length"]]
        for place, (_, key) in enumerate(shown):
            if place:
                self._text(" ")
            self._say("img_pos", f=(key, PRESENT))
        if self._random() < 0.6:
            unseen = self._not_shown(shown[0][0] if shown[0][0] in _UNSEEN else "cxr")
            self._text(" ")
            self._negatives("img_neg", unseen[: 1 + int(self._random() * 2)])

    def _hedged(self) -> Callable[[], None] | None:
        if not self._patient.uncertain:
            return None
        key = self._pick(self._patient.uncertain)
        return lambda: self._say("hedge", f=(key, UNCERTAIN))

    def _assessed(self, key: str, place: int) -> None:
        """Say one condition of the assessment, with a finding it explains where the patient has one."""
        own = [item for item in self._content.conditions[key].findings if item in self._patient.findings]
        finding = own[int(self._random() * len(own))] if own and self._random() < 0.6 else None
        if finding and place == 0:
            self._say("assess", c=(key, PRESENT), f=(finding, PRESENT))
        else:
            self._say("problem", c=(key, PRESENT))

    def _treatment(self, key: str) -> None:
        """Say what is done about one condition."""
        drugs = [drug[0] for drug in self._patient.drugs if drug[3] == key][: self._style["length"]]
        for drug in drugs:
            self._text(" ")
            draw = self._random()
            if draw < 0.55:
                self._say("continue", d=(drug, PRESENT))
            elif draw < 0.88:
                self._say("start", d=(drug, PLANNED))
            else:
                self._say("stop", d=(drug, ("absent", "current", "actual", "patient")))
        tests = [test for test in self._content.conditions[key].procedures if test in self._patient.procedures]
        if tests and self._random() < 0.5:
            self._text(" ")
            self._say("order", p=(tests[0], PLANNED))

    def _assessment(self) -> None:
        keys = self._patient.conditions[: 1 + self._style["length"]]
        writers: list[Callable[[], None]] = [
            lambda key=key, place=place: self._assessed(key, place)  # type: ignore[misc]
            for place, key in enumerate(keys)
        ]
        hedged = self._hedged()
        if hedged and self._random() < 0.6:
            writers.append(hedged)
        self._items(writers, listed=True)

    def _plan(self) -> None:
        writers: list[Callable[[], None]] = []
        for key in self._patient.conditions[: 1 + self._style["length"]]:
            writers.append(lambda key=key: self._line(key))  # type: ignore[misc]
        writers.append(self._follow)
        self._items(writers, listed=True)

    def _line(self, key: str) -> None:
        self._mention((key, PRESENT), capital=True)
        self._text(":")
        before = self._length
        self._treatment(key)
        if self._length == before:
            self._text(" ")
            self._say("filler")

    def _both(self) -> None:
        def one(key: str, place: int) -> None:
            self._assessed(key, place)
            self._treatment(key)

        keys = self._patient.conditions[: 1 + self._style["length"]]
        writers: list[Callable[[], None]] = [
            lambda key=key, place=place: one(key, place)  # type: ignore[misc]
            for place, key in enumerate(keys)
        ]
        hedged = self._hedged()
        if hedged and self._random() < 0.6:
            writers.insert(1, hedged)
        if self._type == "clinic":
            writers.append(self._follow)
        self._items(writers, listed=True)

    def _follow(self) -> None:
        self._say("followup")
        if self._type in ("clinic", "discharge") and self._random() < 0.7:
            self._text(" ")
            self._warn()

    def _warn(self) -> None:
        keys = self._some(self._patient.warnings, 1 + self._style["length"])
        self._negatives("hypothetical", keys, HYPOTHETICAL)

    def _diagnoses(self) -> None:
        self._items([lambda key=key: self._mention((key, PRESENT), capital=True)  # type: ignore[misc]
                     for key in self._patient.conditions], listed=True)  # fmt: skip

    def _course(self) -> None:
        patient, length = self._patient, self._style["length"]
        self._say("course", c=(patient.conditions[0], PRESENT))
        for drug in [drug[0] for drug in patient.drugs if drug[3] == patient.conditions[0]][:2]:
            self._text(" ")
            self._say("treated", d=(drug, PRESENT))
        for procedure in patient.procedures[:length]:
            self._text(" ")
            self._say("done", p=(procedure, PRESENT))
        for key in self._some(self._felt, length):
            self._text(" ")
            if self._random() < 0.65:
                self._say("resolved", f=(key, HISTORICAL))
            else:
                self._say("persist", f=(key, PRESENT))
        if patient.uncertain and self._random() < 0.5:
            self._text(" ")
            self._say("hedge", f=(self._pick(patient.uncertain), UNCERTAIN))
        if length > 1:
            for key in patient.conditions[1 : 1 + length]:
                self._text(" ")
                self._say("problem", c=(key, PRESENT))
                given = next((drug[0] for drug in patient.drugs if drug[3] == key), None)
                if given and self._random() < 0.6:
                    self._text(" ")
                    self._say("continue", d=(given, PRESENT))
        self._text(" ")
        self._say("filler")

    def _done(self) -> None:
        self._items([lambda key=key: self._mention((key, PRESENT), capital=True)  # type: ignore[misc]
                     for key in self._patient.procedures], listed=True)  # fmt: skip

    def _instructions(self) -> None:
        self._warn()
        self._text(" ")
        self._say("followup")

    def _shift(self) -> None:
        patient, length = self._patient, self._style["length"]
        self._say("nurse_filler")
        for key in self._some(self._felt, length):
            self._text(" ")
            self._say("nurse_pos", f=(key, PRESENT))
        self._text(" ")
        self._negatives("nurse_neg", self._some(patient.absent, 1 + length))
        for drug in patient.drugs[: 1 + int(self._random() * length)]:
            self._text(" ")
            self._say("nurse_treated", d=(drug[0], PRESENT))
        pain = int(self._random() * 9)
        self._text(f" Pain {pain}/10.")
        for _ in range(length):
            self._text(" ")
            self._say("nurse_filler")

    def _shift_plan(self) -> None:
        self._say("nurse_filler")
        self._text(" ")
        self._negatives("nurse_warn", self._some(self._patient.warnings, 2), HYPOTHETICAL)

    # -- radiology --------------------------------------------------------------------------------------------------

    def _study(self) -> str:
        imaging = self._patient.imaging
        if not imaging:
            return ("cxr", "us", "xr", "cth")[int(self._random() * 4)]
        modality, key = imaging[int(self._random() * len(imaging))]
        return modality if modality != "ct" else self._region(key)

    def _region(self, key: str) -> str:
        chest = self._content.entities[key].system in ("respiratory", "cardiovascular") and key != "aortic_aneurysm"
        return "ct_chest" if chest else "ct_abdomen"

    def _shown(self, study: str) -> list[str]:
        shown = []
        for modality, key in self._patient.imaging:
            if (self._region(key) if modality == "ct" else modality) == study and key not in shown:
                shown.append(key)
        return shown

    def _not_shown(self, study: str) -> list[str]:
        patient = self._patient
        has = {key for _, key in patient.imaging}.union(patient.conditions, patient.findings, patient.uncertain)
        has.update(self._spoken)
        for key in tuple(has):
            has.update(self._content.entities[key].implies)
        unseen = [key for key in _UNSEEN.get(study, _UNSEEN["cxr"]) if key not in has]
        return self._some(unseen, len(unseen)) or ["joint_effusion"]

    def _radiology(self, key: str, study: str) -> None:
        patient, length = self._patient, self._style["length"]
        if key == "indication":
            symptoms = self._felt or patient.conditions[:1]
            self._text(f"{_age(patient.age, self._style['demographic'])} "
                       f"{_sex(patient.sex, self._style['demographic'])} with ")  # fmt: skip
            self._mention((symptoms[0], PRESENT))
            self._text(".")
            if patient.uncertain and self._random() < 0.5:
                self._text(" ")
                self._say("hedge", f=(patient.uncertain[0], UNCERTAIN))
        elif key == "technique":
            self._text(_STUDIES[study][1])
        elif key == "comparison":
            earlier = self._when - timedelta(days=20 + int(self._random() * 400))
            self._text("None." if self._random() < 0.4 else f"Study of {self._date(earlier)}.")
        elif key == "findings":
            shown = self._shown(study)
            if self._random() < 0.3:
                shown += [item for item in _INCIDENTAL[study] if item not in shown][:1]
            self._spoken = dict.fromkeys(shown, 1)
            writers: list[Callable[[], None]] = [
                lambda item=item: self._say("img_pos", f=(item, PRESENT))  # type: ignore[misc]
                for item in shown
            ]
            suspected = [item for item in patient.uncertain if item not in shown]
            if suspected and shown and self._random() < 0.6:
                writers.append(lambda: self._say("img_hedge", f=(suspected[0], UNCERTAIN)))
            unseen = self._not_shown(study)
            take = 1 + int(self._random() * (1 + length))
            writers.append(lambda: self._negatives("img_neg", unseen[:take]))
            writers.append(lambda: self._say("img_normal"))
            if length > 1 and len(unseen) > take:
                writers.append(lambda: self._negatives("img_neg", unseen[take : take + 1]))
            self._items(writers, listed=length == 3)
        else:
            self._conclusion()

    def _conclusion(self) -> None:
        """Sum up what the findings state, and nothing else: each finding with the side and certainty it has there."""
        shown = [key for key, axes in self._seen if axes == PRESENT]
        suspected = [key for key, axes in self._seen if axes == UNCERTAIN]
        unseen = [key for key, axes in self._seen if axes == ABSENT]
        writers: list[Callable[[], None]] = [
            lambda key=key: self._say("img_sum", f=(key, PRESENT))  # type: ignore[misc]
            for key in shown
        ]
        writers += [lambda key=key: self._say("img_hedge", f=(key, UNCERTAIN)) for key in suspected]  # type: ignore[misc]
        if not shown:
            writers.append(lambda: self._say("img_clear"))
        # What is absent is worth a line where nothing was seen, and to those who write at length.
        if not shown or self._style["length"] == 3:
            writers.append(lambda: self._negatives("img_neg", unseen[:1]))
        self._items(writers, listed=True)


_NEUTRAL = frozenset(("filler", "nurse_filler", "social"))
_STRICT = frozenset(("findings", "impression", "physical_exam"))
_PLAIN = frozenset(("chief_complaint", "discharge_instructions"))
_TERSE = frozenset(("past_medical_history", "assessment_plan", "impression", "imaging", "hospital_course",
                    "laboratory", "family_history", "procedures"))  # fmt: skip

_WRITE: dict[str, Callable[[Writer], None]] = {
    "cc": Writer._chief, "pmh": Writer._past, "psh": Writer._surgical, "meds": Writer._medications,
    "dc_meds": Writer._medications, "allergies": Writer._allergies, "family": Writer._family,
    "social": Writer._social, "ros": Writer._review, "vitals": Writer._vitals, "exam": Writer._exam,
    "labs": Writer._labs, "imaging": Writer._images, "assessment": Writer._assessment, "plan": Writer._plan,
    "ap": Writer._both, "dx": Writer._diagnoses, "course": Writer._course, "procedures": Writer._done,
    "instructions": Writer._instructions, "nursing": Writer._shift, "nursing_plan": Writer._shift_plan,
}  # fmt: skip


def _side_word(side: str, style: str) -> str:
    if style == "L":
        return {"left": "L", "right": "R", "bilateral": "bilat"}[side]
    return side + "-sided" if style == "left-sided" and side != "bilateral" else side


def _age(age: int, style: str) -> str:
    shown = {"year_old": f"{age} year old", "hyphen": f"{age}-year-old", "lady": f"{age}-year-old",
             "yo": f"{age} yo", "y/o": f"{age} y/o"}  # fmt: skip
    return shown[style]


def _sex(sex: str, style: str) -> str:
    female = sex == "female"
    if style == "yo":
        return "F" if female else "M"
    if style == "lady":
        return "lady" if female else "gentleman"
    if style == "y/o":
        return sex
    return "woman" if female else "man"


def _wrap(text: str, width: int) -> str:
    """Break long lines at spaces; a space becomes a line break, so that no offset moves."""
    lines = []
    for line in text.split("\n"):
        while len(line) > width:
            cut = line.rfind(" ", 1, width + 1)
            if cut < 1:
                break
            lines.append(line[:cut])
            line = line[cut + 1 :]
        lines.append(line)
    return "\n".join(lines)


_WORD = re.compile(r"(?<![*\w])[a-z]{5,}(?![\w*])")
_NEAR = {"a": "s", "e": "r", "i": "o", "o": "p", "t": "y", "n": "m", "s": "d", "r": "t", "l": "k", "c": "v", "d": "f",
         "u": "i", "m": "n", "p": "o", "g": "h", "h": "j", "b": "v", "v": "b", "y": "u", "f": "g", "k": "l", "w": "e",
         "x": "z", "z": "x", "j": "k", "q": "w"}  # fmt: skip


def _misspell(text: str, per_hundred: float, draw: Callable[[], float]) -> str:
    """Swap two letters or hit the next key in some words; the length of the text stays."""
    wanted = len(text) / 600 * per_hundred
    count = int(wanted) + (draw() < wanted % 1)
    for _ in range(count):
        found = _WORD.search(text, int(draw() * len(text)))
        if found is None:
            continue
        at = found.start() + 1 + int(draw() * (found.end() - found.start() - 2))
        pair = text[at + 1] + text[at] if draw() < 0.6 else _NEAR[text[at]] + text[at + 1]
        text = text[:at] + pair + text[at + 2 :]
    return text
