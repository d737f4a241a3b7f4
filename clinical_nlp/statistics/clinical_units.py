"""What a note looks like, in units that a reader of notes knows: sections, abbreviations, placeholders, layout.

Each measure is one number a note, made without looking at institutions. A share of something (of dates, of headers)
is NaN in a note that has none of it. Only fixed word lists and patterns are counted; no text is kept.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from clinical_nlp.language.sections import CATEGORIES, find_sections
from clinical_nlp.language.sentences import find_sentences
from clinical_nlp.notes.schema import Note

Kind = Literal["style", "amount", "content", "mix"]


@dataclass(frozen=True, slots=True)
class ClinicalUnit:
    """One measure of a note.

    `unit` says what its number is of. `kind` says what moves it: style (how things are written, whatever they are),
    amount (how much is written), content (also what is wrong with the patient), mix (which notes there are). Only
    style may be called a difference in style; the others move with the patients too.
    """

    key: str
    name: str
    unit: str
    kind: Kind


@dataclass(frozen=True, eq=False)
class NoteMeasures:
    """(n_notes, k) values, NaN where a note has nothing to measure, and the k units."""

    values: np.ndarray
    units: tuple[ClinicalUnit, ...]

    def select(self, rows: np.ndarray, columns: np.ndarray | None = None) -> NoteMeasures:
        """Return some notes, and of them some units."""
        if columns is None:
            return NoteMeasures(self.values[rows], self.units)
        return NoteMeasures(self.values[rows][:, columns], tuple(self.units[i] for i in columns))


_WORD = re.compile(r"[^\W\d_]+(?:['’/\-][^\W\d_]+)*")
_NUMBER = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*")
_BULLETS = {
    "dash": re.compile(r"^[ \t]*[-–—][ \t]"),
    "star": re.compile(r"^[ \t]*\*[ \t]"),
    "dot": re.compile(r"^[ \t]*[•·▪◦‣●○][ \t]?"),
    "number": re.compile(r"^[ \t]*(?:#?\d{1,2}[.)]|#\.?)[ \t]"),
}
_PLACEHOLDERS = {
    "double_star": ("[** **]", re.compile(r"\[\*\*.*?\*\*\]")),
    "underscores": ("___", re.compile(r"(?<![\w])_{3,}(?![\w])")),
    "angle": ("<NAME>", re.compile(r"<[A-Za-z][A-Za-z_ ]{1,20}>")),
    "x": ("XXXX", re.compile(r"\b[Xx]{3,}\b")),
    "square": ("[NAME]", re.compile(r"\[(?:name|date|hospital|location|age|id|phone)[a-z0-9_ ]*\]", re.I)),
    "at": ("@NAME@", re.compile(r"@[A-Za-z][A-Za-z_ ]{1,20}@")),
}  # fmt: skip
_SPEAKER = {
    "bracket": re.compile(r"^[ \t]*\[(?:doctor|dr|patient|patient_guest|guest|nurse|speaker[ _]?\w*)\]", re.I),
    "colon": re.compile(r"^[ \t]*(?:doctor|dr\.?|patient|pt|guest[ _]\w+|nurse|clinician|speaker[ _]?\w*):", re.I),
}
_FILLER = re.compile(r"\b(?:um+|uh+|hm+|mm-?hmm|uh-?huh|you know|i mean)\b", re.I)
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_DATES = {
    "iso": ("2020-01-31", re.compile(r"\b\d{4}-\d{2}-\d{2}\b")),
    "slash": ("1/31/2020", re.compile(r"\b\d{1,2}/\d{1,2}/\d{2,4}\b")),
    "month_first": ("January 31, 2020", re.compile(rf"\b{_MONTH}\.? \d{{1,2}}(?:st|nd|rd|th)?,? +\d{{4}}\b", re.I)),
    "day_first": ("31 January 2020", re.compile(rf"\b\d{{1,2}}[ -]{_MONTH}\.?[ -]\d{{2,4}}\b", re.I)),
}
_DOSE = re.compile(r"\b\d+(?:\.\d+)?( ?)(?:mg|mcg|g|ml|units?|meq|mmol)\b", re.I)
_TEMPERATURE = re.compile(
    r"\b(?:temp(?:erature)?|t)\b[^\n|]{0,12}?(\d{2,3}(?:\.\d)?)(?: ?(?:°|deg(?:rees)?)? ?([fc])\b)?", re.I
)
_CONVENTIONAL = re.compile(r"\bmg/dl\b|\bg/dl\b|\bmeq/l\b|\bk/ul\b|\blbs?\b", re.I)
_SI = re.compile(r"\b[mµu]mol/l\b|\bg/l\b|\bmmol/mol\b|\bx ?10\^?9/l\b|\bkg\b", re.I)
_BRITISH = re.compile(
    r"(?:an?aem\w+|haem\w+|oedema\w*|oesoph\w+|diarrhoea\w*|dyspnoea\w*|orthopaed\w+|paediatr\w+|gynaec\w+|tumours?"
    r"|colour\w*|centres?|litres?|metres?|fibres?|ischaem\w+|leuka\w+|hypoglycaem\w+|hyperglycaem\w+|faec\w+"
    r"|anaesth\w+|caesar\w+|behaviour\w*|odour\w*|labour\w*|catheteris\w+|normalis\w+|hospitalis\w+|stabilis\w+"
    r"|recognis\w+|organis\w+|localis\w+|mobilis\w+|\w+glycaemi\w+|\w+kalaemi\w+|\w+natraemi\w+)"
)
_AMERICAN = re.compile(
    r"(?:anem\w+|hem[aoe]\w+|edema\w*|esoph\w+|diarrhea\w*|dyspnea\w*|orthoped\w+|pediatr\w+|gynec\w+|tumors?"
    r"|color\w*|centers?|liters?|meters?|fibers?|ischem\w+|leuke\w+|hypoglycem\w+|hyperglycem\w+|feces|fecal"
    r"|anesth\w+|cesar\w+|behavior\w*|odors?|labor(?:ing|ed)?|catheteriz\w+|normaliz\w+|hospitaliz\w+|stabiliz\w+"
    r"|recogniz\w+|organiz\w+|localiz\w+|mobiliz\w+|\w+glycemi\w+|\w+kalemi\w+|\w+natremi\w+)")  # fmt: skip
_TOKEN = re.compile(r"[a-z0-9]+(?:[/\-][a-z0-9]*)*")
_LISTED = (
    "pt pts hx pmh psh fh fhx sh shx hpi ros dx ddx tx rx sx fx abx s/p c/o h/o y/o yo f/u r/o w/o w/ b/l d/c n/v a/p "
    "prn bid tid qid qd qhs qod po iv im sc sq sl npo sob doe cp ha loc htn dm dm2 t2dm hld cad chf hf afib mi cabg "
    "pci copd osa dvt pe pna uti ckd esrd aki gerd gib tia cva ms ra oa ca bp hr rr o2 sat wbc hgb plt cr bun nkda "
    "cxr ct mri ekg ecg echo ef lad jvd rrr ctab nad perrl eomi nt nd wnl bilat abd resp neuro temp le ue rle lle ruq "
    "luq rlq llq nc cc pcp icu er pod"
)
_ABBREVIATIONS = frozenset(_LISTED.split())
_PAIRS: tuple[tuple[str, Kind, str, str, str], ...] = (
    ("patient", "style", "'pt' for 'patient'", r"\bpts?\b", r"\bpatient'?s?\b"),
    ("history", "style", "'hx' or 'h/o' for 'history'", r"\b(?:hx|h/o|pmh)\b", r"\bhistory\b"),
    ("side", "style", "'L' and 'R' for 'left' and 'right'", r"(?<![\w./])(?:L|R)(?![\w.:/])(?= [a-z])",
     r"\b(?:left|right)(?:-sided)?\b"),
    ("age", "style", "'yo' or 'y/o' for 'year-old'", r"\b\d+ ?-?(?:y/?o)\b", r"\b\d+[ -]years?[ -]old\b"),
    ("frequency", "content", "'bid', 'qd' for 'twice daily', 'daily'", r"\b(?:bid|tid|qid|qd|qhs|qod)\b",
     r"\b(?:(?:once|twice) (?:a day|daily)|(?:three|four) times (?:a day|daily)|daily|nightly|every \w+ hours)\b"),
    ("by_mouth", "content", "'po' for 'by mouth'", r"\bpo\b", r"\b(?:by mouth|orally)\b"),
)  # fmt: skip
_SHORT = {key: (re.compile(short, 0 if key == "side" else re.I), re.compile(long, re.I))
          for key, _, _, short, long in _PAIRS}  # fmt: skip
_SIGNED = re.compile(r"^[ \t]*(?:(?:electronically )?(?:signed|authenticated)\b|/s/|_{5,}|-{2,} ?\w)", re.I | re.M)
_ELECTRONIC = re.compile(r"\belectronically signed\b|/es/|\be-signed\b", re.I)
_LETTERHEAD = re.compile(r"\b(?:hospital|medical (?:center|centre|group)|infirmary|clinic|health(?:care)?)\b", re.I)
_PUNCTUATION = re.compile(r"[.,;:!?()\"]")
_SPACED = re.compile(r"(?<=\S) [.,?!](?=\s|$)")
_FEWEST_CHARACTERS_WRAPPED = 45


def measure(notes: Sequence[Note]) -> NoteMeasures:
    """Measure notes; see `ClinicalUnit`.

    Returns
    -------
    NoteMeasures. Units that hold for no note at all are left out. Shared lines are found over all these notes
    together (blind to institutions): they depend on how many patients there are.
    """
    counted = [_measured(note) for note in notes]
    units = units_of(notes)
    table = np.array([[found[unit.key] for unit in _UNITS] for found in counted]).reshape(-1, len(_UNITS))
    columns = [*table.T]
    for unit in units[len(_UNITS) :]:
        what, _, name = unit.key.partition(":")
        own = [(_kind(note) if what == "type" else note.language) == name for note in notes]
        columns.append(100.0 * np.array(own))
    units, columns = (*units, SHARED_LINES), [*columns, _shared_lines(notes)]
    values = np.column_stack(columns) if notes else np.zeros((0, len(units)))
    kept = [i for i in range(len(units)) if np.isfinite(values[:, i]).any() and np.nanmax(np.abs(values[:, i])) > 0]
    return NoteMeasures(values[:, kept], tuple(units[i] for i in kept))


def units_of(notes: Sequence[Note]) -> tuple[ClinicalUnit, ...]:
    """Return the units of the fixed list, and one for each note type and language where these notes have several."""
    found = list(_UNITS)
    kinds = sorted({_kind(note) for note in notes})
    languages = sorted({note.language for note in notes})
    if len(kinds) > 1:
        found += [ClinicalUnit(f"type:{k}", f"Note type: {k or '(none given)'}", "% of notes", "mix") for k in kinds]
    if len(languages) > 1:
        found += [ClinicalUnit(f"language:{name}", f"Language: {name}", "% of notes", "mix") for name in languages]
    return tuple(found)


def _kind(note: Note) -> str:
    return (note.note_type or "").strip().lower()


def common(
    column: np.ndarray, note_patient: np.ndarray, fewest_patients: int, *, fewest_measured: int | None = None
) -> bool:
    """Whether enough patients are measured, and enough differ from the commonest value, so that no few decide.

    Parameters
    ----------
    column : (n_notes,), NaN where not measured. note_patient : (n_notes,) int. fewest_patients : that must differ.
    fewest_measured : that must be measured; default twice as many, for two institutions.
    """
    there = np.isfinite(column)
    needed = 2 * fewest_patients if fewest_measured is None else fewest_measured
    if len(np.unique(note_patient[there])) < needed:
        return False
    rounded = np.round(column, 6)
    values, counts = np.unique(rounded[there], return_counts=True)
    unusual = there & (rounded != values[counts.argmax()])
    return len(np.unique(note_patient[unusual])) >= fewest_patients


def closing_lines(notes: Sequence[Note], *, fewest_patients: int = 11) -> np.ndarray:
    """Which notes end with which line that many patients share, whichever their institution.

    Dictation systems and signatures show there.

    Returns
    -------
    (n_notes, k) 0 or 1; the lines themselves are not kept.
    """
    ends = [next((_digest(line) for line in reversed(note.text.splitlines()) if line.strip()), "") for note in notes]
    patients: dict[str, set[str]] = {}
    for note, line in zip(notes, ends, strict=True):
        patients.setdefault(line, set()).add(note.patient_id)
    kept = sorted(line for line, who in patients.items() if line and len(who) >= fewest_patients)
    return np.array([[float(line == one) for one in kept] for line in ends]).reshape(len(notes), len(kept))


def _digest(line: str) -> str:
    """Sixteen hexadecimal digits of a line without case, digits and white space."""
    import hashlib

    folded = re.sub(r"\d+", "0", re.sub(r"\W+", " ", line.lower())).strip()
    return hashlib.blake2b(folded.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _shared_lines(notes: Sequence[Note]) -> np.ndarray:
    """Percentage of lines of a note that also stand, but for digits and case, in notes of two other patients."""
    lines = [[_digest(line) for line in note.text.splitlines() if len(line.split()) >= 3] for note in notes]
    patients: dict[str, set[str]] = {}
    for note, mine in zip(notes, lines, strict=True):
        for line in mine:
            patients.setdefault(line, set()).add(note.patient_id)
    return np.array([_percent(sum(len(patients[line]) > 2 for line in mine), len(mine)) for mine in lines])


def _percent(part: float, whole: float) -> float:
    return 100.0 * part / whole if whole else math.nan


@lru_cache(maxsize=100_000)
def _spelling(word: str) -> str:
    return "british" if _BRITISH.fullmatch(word) else "american" if _AMERICAN.fullmatch(word) else ""


def _measured(note: Note) -> dict[str, float]:
    text, lower = note.text, note.text.lower()
    words = _WORD.findall(text)
    n_words = max(1, len(text.split()))
    lines = [line for line in text.splitlines() if line.strip()]
    found: dict[str, float] = {"words": math.log(n_words)}

    def rate(key: str, count: float) -> None:
        found[key] = 100.0 * count / n_words

    sections = find_sections(text)
    headed = [section for section in sections if section.named]
    present = {section.category for section in headed}
    for category in CATEGORIES[:-1]:
        found[f"section:{category}"] = 100.0 * (category in present)
    headers = [text[section.header_start : section.header_end] for section in headed]
    after = [text[section.header_end : section.header_end + 3] for section in headed]
    before = [text[max(0, section.header_start - 4) : section.header_start].rpartition("\n")[2] for section in headed]
    rate("headers", len(headers))
    found["header:capitals"] = _percent(sum(name.isupper() for name in headers), len(headers))
    found["header:lower"] = _percent(sum(name.islower() for name in headers), len(headers))
    found["header:colon"] = _percent(sum(":" in rest for rest in after), len(headers))
    found["header:marked"] = _percent(sum(any(c in lead for c in "*#=_") for lead in before), len(headers))
    found["header:numbered"] = _percent(sum(any(c.isdigit() for c in lead) for lead in before), len(headers))
    found["header:dash"] = _percent(sum("-" in rest for rest in after), len(headers))
    short = sum(len(name.replace("/", "")) <= 4 for name in headers)
    found["header:short"] = _percent(short, len(headers))

    sentences = find_sentences(text)
    found["sentence_words"] = n_words / max(1, len(sentences))
    starts = [text[start] for start, _ in sentences if text[start].isalpha()]
    found["lower_starts"] = _percent(sum(c.islower() for c in starts), len(starts))
    letters = [c for c in text if c.isalpha()]
    upper = sum(c.isupper() for c in letters)
    share = _percent(upper, len(letters))
    found["all_capitals"] = 100.0 * (share > 90)
    found["no_capitals"] = 100.0 * (share < 0.1)
    found["capital_words"] = math.nan
    if 0.1 <= share <= 90:
        found["capital_words"] = _percent(sum(len(w) > 1 and w.isupper() for w in words), len(words))

    width = max((len(line) for line in lines), default=0)
    long = sum(len(line) >= _FEWEST_CHARACTERS_WRAPPED for line in lines)
    wrapped = width <= 100 and long >= 3
    found["wrapped"] = 100.0 * wrapped if wrapped or width > 100 else math.nan
    found["wrap_width"] = float(width) if wrapped else math.nan
    breaks = text.count("\n")
    blank = sum(not line.strip() for line in text.splitlines())
    found["blank_lines"] = _percent(blank, breaks + 1)
    for mark, pattern in _BULLETS.items():
        found[f"bullet:{mark}"] = _percent(sum(bool(pattern.match(line)) for line in lines), len(lines))
    for key, pattern in _SPEAKER.items():
        found[f"speaker:{key}"] = _percent(sum(bool(pattern.match(line)) for line in lines), len(lines))
    found["table_lines"] = _percent(sum(line.count("|") > 1 for line in lines), len(lines))
    rate("fillers", len(_FILLER.findall(text)))
    marks = len(_PUNCTUATION.findall(text))
    rate("punctuation", marks)
    found["spaced_punctuation"] = _percent(len(_SPACED.findall(text)), marks)

    rate("abbreviations", sum(token in _ABBREVIATIONS for token in _TOKEN.findall(lower)))
    for key, (brief, full) in _SHORT.items():
        count = len(brief.findall(text))
        found[f"short:{key}"] = _percent(count, count + len(full.findall(text)))
    rate("numbers", len(_NUMBER.findall(text)))
    doses = _DOSE.findall(text)
    found["tight_doses"] = _percent(sum(not gap for gap in doses), len(doses))
    temperatures = _TEMPERATURE.findall(text)
    found["celsius"] = _percent(sum(25 <= float(value) < 46 for value, _ in temperatures), len(temperatures))
    found["bare_temperature"] = _percent(sum(not mark for _, mark in temperatures), len(temperatures))
    si, conventional = len(_SI.findall(text)), len(_CONVENTIONAL.findall(text))
    found["si_units"] = _percent(si, si + conventional)
    spellings = Counter(_spelling(word) for word in _WORD.findall(lower))
    found["british"] = _percent(spellings["british"], spellings["british"] + spellings["american"])

    holders = {key: len(pattern.findall(text)) for key, (_, pattern) in _PLACEHOLDERS.items()}
    rate("placeholders", sum(holders.values()))
    for key, count in holders.items():
        found[f"placeholder:{key}"] = _percent(count, sum(holders.values()))
    dates = {key: len(pattern.findall(text)) for key, (_, pattern) in _DATES.items()}
    rate("dates", sum(dates.values()))
    for key, count in dates.items():
        found[f"date:{key}"] = _percent(count, sum(dates.values()))
    found["signed"] = 100.0 * bool(_SIGNED.search(text[-400:]))
    found["signed_electronically"] = 100.0 * bool(_ELECTRONIC.search(text[-400:]))
    found["letterhead"] = 100.0 * bool(lines and len(lines[0]) < 80 and _LETTERHEAD.search(lines[0]))
    return found


def _unit(kind: Kind, unit: str) -> Callable[[str, str], ClinicalUnit]:
    return lambda key, name: ClinicalUnit(key, name, unit, kind)


_style_of_headers = _unit("style", "% of headers")
_style_of_lines = _unit("style", "% of lines")
_style_of_notes = _unit("style", "% of notes")

_UNITS: tuple[ClinicalUnit, ...] = (
    ClinicalUnit("words", "Words a note", "words", "amount"),
    *(
        ClinicalUnit(f"section:{name}", f"Section: {name.replace('_', ' ')}", "% of notes", "content")
        for name in CATEGORIES[:-1]
    ),
    ClinicalUnit("headers", "Section headers", "per 100 words", "amount"),
    _style_of_headers("header:capitals", "Headers in capitals"),
    _style_of_headers("header:lower", "Headers in lower case"),
    _style_of_headers("header:colon", "Headers with a colon"),
    _style_of_headers("header:dash", "Headers with a dash"),
    _style_of_headers("header:marked", "Headers marked up (**, ##, ==)"),
    _style_of_headers("header:numbered", "Headers with a number"),
    _style_of_headers("header:short", "Headers abbreviated (CC, HPI, PE)"),
    ClinicalUnit("sentence_words", "Words a sentence", "words", "amount"),
    ClinicalUnit("lower_starts", "Sentences that begin in lower case", "% of sentences", "style"),
    _style_of_notes("all_capitals", "Notes all in capitals"),
    _style_of_notes("no_capitals", "Notes without capitals"),
    ClinicalUnit("capital_words", "Words in capitals", "% of words", "content"),
    ClinicalUnit("wrapped", "Notes with lines wrapped at a fixed width", "% of notes with long lines", "style"),
    ClinicalUnit("wrap_width", "Width of wrapped lines", "characters", "style"),
    _style_of_lines("blank_lines", "Blank lines"),
    _style_of_lines("bullet:dash", "Lines with a dash as bullet"),
    _style_of_lines("bullet:star", "Lines with a star as bullet"),
    _style_of_lines("bullet:dot", "Lines with a dot as bullet"),
    _style_of_lines("bullet:number", "Numbered lines"),
    _style_of_lines("speaker:bracket", "Speaker labels such as [doctor]"),
    _style_of_lines("speaker:colon", "Speaker labels such as DOCTOR:"),
    _style_of_lines("table_lines", "Lines of a table with bars"),
    ClinicalUnit("fillers", "Spoken fillers (um, uh, you know)", "per 100 words", "amount"),
    ClinicalUnit("punctuation", "Punctuation marks", "per 100 words", "amount"),
    ClinicalUnit("spaced_punctuation", "Punctuation after a space", "% of marks", "style"),
    ClinicalUnit("abbreviations", "Abbreviations", "per 100 words", "content"),
    *(ClinicalUnit(f"short:{key}", f"Short form: {name}", "% of such words", kind) for key, kind, name, _, _ in _PAIRS),
    ClinicalUnit("numbers", "Numbers", "per 100 words", "content"),
    ClinicalUnit("tight_doses", "Doses without a space (25mg)", "% of doses", "content"),
    ClinicalUnit("celsius", "Temperatures in Celsius", "% of temperatures", "style"),
    ClinicalUnit("bare_temperature", "Temperatures without a unit", "% of temperatures", "style"),
    ClinicalUnit("si_units", "SI units (mmol/L) for conventional (mg/dL)", "% of such units", "style"),
    ClinicalUnit("british", "British spelling for American", "% of such words", "style"),
    ClinicalUnit("placeholders", "De-identification placeholders", "per 100 words", "amount"),
    *(
        ClinicalUnit(f"placeholder:{key}", f"Placeholders such as {shown}", "% of placeholders", "style")
        for key, (shown, _) in _PLACEHOLDERS.items()
    ),
    ClinicalUnit("dates", "Dates", "per 100 words", "content"),
    *(
        ClinicalUnit(f"date:{key}", f"Dates such as {shown}", "% of dates", "style")
        for key, (shown, _) in _DATES.items()
    ),
    _style_of_notes("signed", "Notes with a signature line"),
    _style_of_notes("signed_electronically", "Notes signed electronically"),
    _style_of_notes("letterhead", "Notes with a letterhead"),
)
SHARED_LINES = ClinicalUnit("shared_lines", "Lines that other patients' notes share", "% of lines", "content")
