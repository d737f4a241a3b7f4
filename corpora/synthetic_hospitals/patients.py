"""Latent patients: who they are, what they have, what was done. Nothing here depends on style or annotation."""

from __future__ import annotations

import math
from bisect import bisect
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import accumulate

from clinical_nlp.corpora.synthetic_hospitals.content import Content
from clinical_nlp.corpora.synthetic_hospitals.style import stream

TARGET = "heart_failure"
"""The condition that the spurious marker follows."""
TARGET_PREVALENCE = 0.3
"""Its prevalence in every institution at `label` 0."""

_FAMILIAL = (
    "hypertension", "diabetes_2", "coronary_disease", "myocardial_infarction", "stroke", "colon_cancer",
    "breast_cancer", "lung_cancer", "asthma", "depression", "dementia", "hyperlipidemia", "rheumatoid", "glaucoma",
    "heart_failure", "osteoporosis", "hypothyroidism", "epilepsy", "migraine", "prostate_cancer", "gout", "lupus",
    "atrial_fibrillation", "aortic_aneurysm", "sickle_cell", "ckd",
)  # fmt: skip
_RELATIVES = ("mother", "father", "brother", "sister", "maternal grandmother", "paternal grandfather", "aunt", "uncle")
_SURGERIES = (
    "procedure:appendectomy", "procedure:hernia_repair", "procedure:tonsillectomy", "procedure:cholecystectomy",
    "procedure:knee_replacement", "procedure:cataract_surgery", "procedure:pci", "procedure:laminectomy",
)  # fmt: skip
_COMMON = (
    "fever", "chills", "chest_pain", "dyspnea", "cough", "nausea", "vomiting", "diarrhea", "abdominal_pain",
    "constipation", "headache", "dizziness", "dysuria", "hematuria", "rash", "palpitations", "edema", "weight_loss",
    "syncope", "night_sweats", "blurred_vision", "back_pain", "suicidal", "melena", "hemoptysis", "anorexia",
    "malaise", "weakness", "stridor", "incontinence", "cramps", "tinnitus", "urticaria", "ataxia",
    "jaundice", "hallucinations", "bleeding", "sore_throat", "numbness",
)  # fmt: skip
_EXAM_ABSENT = (
    "edema", "wheezing", "crackles", "murmur", "jvd", "rash", "cyanosis", "jaundice", "lymphadenopathy", "pallor",
    "hepatomegaly", "splenomegaly", "ascites", "neck_stiffness", "tremor", "petechiae", "joint_swelling",
    "facial_droop", "hemiparesis", "goiter", "stridor", "respiratory_distress", "cachexia", "diaphoresis", "ataxia",
    "skin_ulcer", "erythema",
)  # fmt: skip
_WARNINGS = (
    "fever", "chest_pain", "dyspnea", "vomiting", "bleeding", "syncope", "confusion", "headache", "abdominal_pain",
    "chills", "weakness", "melena", "rash", "edema", "dizziness", "suicidal",
)  # fmt: skip
SIGNS = frozenset(_EXAM_ABSENT) | {
    "tachycardia", "tachypnea", "bradycardia", "hypotension", "aphasia", "dysarthria", "rigidity", "bradykinesia",
    "abdominal_distention", "limited_motion", "scaling", "dry_skin", "bruising", "hypoxemia", "fever", "confusion",
    "breast_lump", "gait", "agitation", "urticaria", "flank_pain", "orthostasis",
}  # fmt: skip
"""Findings that an examination can show."""
MEASURED = frozenset((
    "leukocytosis", "leukopenia", "thrombocytopenia", "elevated_creatinine", "hyperkalemia", "hypokalemia",
    "hyponatremia", "hyperglycemia", "hypoglycemia", "proteinuria", "elevated_transaminases", "reduced_ef", "lvh",
))  # fmt: skip
"""Findings that a laboratory or a test shows, not the patient."""
UNFELT = MEASURED | {
    "crackles", "murmur", "jvd", "hepatomegaly", "splenomegaly", "ascites", "petechiae", "pallor", "rigidity",
    "bradykinesia", "orthostasis", "hypotension", "hydronephrosis", "tachypnea", "cyanosis", "hypoxemia",
}  # fmt: skip
"""Findings that a patient does not complain of."""
_LATERAL = frozenset((
    "pleural_effusion", "infiltrate", "atelectasis", "pneumothorax", "hip_fracture", "dvt", "hydronephrosis",
    "nephrolithiasis", "cataract", "hemiparesis", "facial_droop", "flank_pain", "limb_pain", "cellulitis", "subdural",
    "ovarian_cyst", "breast_cancer", "breast_lump", "otitis", "otalgia", "pulmonary_nodule", "joint_effusion",
    "joint_swelling", "hearing_loss", "eye_pain", "adrenal_nodule", "renal_cyst", "procedure:knee_replacement",
    "procedure:hernia_repair", "procedure:cataract_surgery", "procedure:orif",
))  # fmt: skip


@dataclass(slots=True)
class Patient:
    """A latent patient. Lists hold entity keys; a drug is (key, dose, frequency, condition)."""

    patient_id: str
    sex: str
    birth_date: date
    age: int
    admitted: datetime
    conditions: list[str]
    findings: list[str]
    drugs: list[tuple[str, str, str, str]]
    procedures: list[str]
    imaging: list[tuple[str, str]]
    absent: list[str]
    exam_absent: list[str]
    uncertain: list[str]
    family: list[tuple[str, str]]
    family_absent: list[str]
    surgeries: list[str]
    resolved: list[str]
    warnings: list[str]
    sides: dict[str, str]
    n_notes: int
    onset_days: int


class Population:
    """The latent patients of one institution, with prevalences moved away from the shared ones by `label`."""

    def __init__(self, content: Content, institution: int, name: str, *, seed: int, label: float) -> None:
        self._content, self._seed, self._name = content, seed, name
        self.target_prevalence = target_prevalence(institution, seed=seed, label=label)
        others = [key for key in content.conditions if key != TARGET]
        random = stream(seed, "prevalence", institution)
        weights = [content.conditions[key].weight * math.exp(1.5 * label * random.gauss(0, 1)) for key in others]
        self._others, self._cumulative = others, list(accumulate(weights))

    def patient(self, number: int, notes_per_patient: tuple[int, int]) -> Patient:
        """Draw patient `number`; the same number is the same patient whatever the other knobs are."""
        content = self._content
        random = stream(self._seed, self._name, number, "latent")
        draw = random.random
        has_target = draw() < self.target_prevalence
        n_conditions = 2 + int(draw() * 4)
        sex = "female" if draw() < 0.52 else "male"
        age = int(min(96, max(18, 22 + 70 * math.sqrt(draw()))))
        admitted = datetime(2018, 1, 1, 8, tzinfo=UTC) + timedelta(days=int(draw() * 2000))
        born = date(admitted.year - age - 1, 1 + int(draw() * 12), 1 + int(draw() * 28))
        n_notes = notes_per_patient[0] + int(draw() * (notes_per_patient[1] - notes_per_patient[0] + 1))
        onset = 1 + int(draw() * 13)
        conditions = [TARGET] if has_target else []
        total = self._cumulative[-1]
        while len(conditions) < n_conditions:
            key = self._others[bisect(self._cumulative, draw() * total)]
            if key not in conditions and content.conditions[key].sex in (None, sex):
                conditions.append(key)
        random.shuffle(conditions)
        # The reason for the encounter leads: something acute where there is one.
        conditions.sort(key=lambda key: content.conditions[key].chronic)

        findings: list[str] = []
        drugs: list[tuple[str, str, str, str]] = []
        procedures: list[str] = []
        imaging: list[tuple[str, str]] = []
        uncertain: list[str] = []
        for place, key in enumerate(conditions):
            condition = content.conditions[key]
            share = 0.7 if place == 0 else 0.35
            findings += [item for item in condition.findings if draw() < share and item not in findings]
            for drug in condition.drugs:
                if draw() < 0.55 and all(drug != other[0] for other in drugs):
                    dosing = content.dosing[drug]
                    dose = dosing.doses[int(draw() * len(dosing.doses))]
                    drugs.append((drug, dose, dosing.frequencies[int(draw() * len(dosing.frequencies))], key))
            procedures += [item for item in condition.procedures if draw() < 0.5 and item not in procedures]
            imaging += [item for item in condition.imaging if draw() < 0.75 and item not in imaging]
            uncertain += [item for item in condition.differentials if draw() < 0.4 and item not in conditions]
        if not findings:
            findings = ["fatigue"]
        has = {*findings, *conditions, *uncertain, *(key for _, key in imaging)}
        for key in tuple(has):
            has.update(content.entities[key].implies)
        pertinent = [item for key in conditions for item in content.conditions[key].findings
                     if item not in has and item not in UNFELT]  # fmt: skip
        absent = random.sample([item for item in _COMMON if item not in has], 8)
        absent = list(dict.fromkeys([*pertinent[:4], *absent]))
        absent = [item for item in absent if sex == "female" or content.entities[item].system != "reproductive"]
        exam_absent = random.sample([item for item in _EXAM_ABSENT if item not in has], 6)
        family = []
        for _ in range(1 + int(draw() * 2)):
            relative = _RELATIVES[int(draw() * len(_RELATIVES))]
            key = _FAMILIAL[int(draw() * len(_FAMILIAL))]
            wanted = content.conditions[key].sex
            if wanted == ("male" if relative in ("mother", "sister", "maternal grandmother", "aunt") else "female"):
                relative = "father" if wanted == "male" else "mother"
            family.append((relative, key))
        in_family = {key for _, key in family}
        family_absent = [key for key in random.sample(_FAMILIAL, 3) if key not in in_family]
        # A surgery of the past is not one of the present encounter.
        surgeries = [key for key in random.sample(_SURGERIES, 2) if draw() < 0.5 and key not in procedures]
        past = []
        for _ in range(2):
            key = self._others[bisect(self._cumulative, draw() * total)]
            condition = content.conditions[key]
            if key not in has and not condition.chronic and condition.sex in (None, sex) and key not in past:
                past.append(key)
        warnings = random.sample(_WARNINGS, 5)
        sides = {}
        for key in (*findings, *conditions, *(key for _, key in imaging), *surgeries, *procedures):
            if key in _LATERAL and key not in sides:
                u = draw()
                sides[key] = "left" if u < 0.45 else "right" if u < 0.9 else "bilateral"
        return Patient(
            f"{self._name}-p{number + 1:06d}", sex, born, age, admitted, conditions, findings, drugs, procedures,
            imaging, absent, exam_absent, uncertain, family, family_absent, surgeries, past, warnings, sides, n_notes,
            onset,
        )  # fmt: skip


def target_prevalence(institution: int, *, seed: int = 0, label: float = 0.0) -> float:
    """Return the true prevalence of `TARGET` in an institution (index from 0): the truth that the label knob sets."""
    size = 0.5 + stream(seed, "target", institution).random()
    logit = math.log(TARGET_PREVALENCE / (1 - TARGET_PREVALENCE)) + label * size * (1 if institution % 2 else -1)
    return 1 / (1 + math.exp(-logit))
