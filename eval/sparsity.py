"""What happens to the score as sections and notes go missing, and which patients are served worse.

Takes a finished coding or ner run. Nothing is trained; the same held-out patients are scored each time. The gold of an
ner run goes with the text that is taken away: what is scored is how well the rest is still read without it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from clinical_nlp.config import Config
from clinical_nlp.errors import ConfigError, TooFewPatientsError, nearest
from clinical_nlp.eval._finished import f1, note_counts, paired, read_subject
from clinical_nlp.eval._predictions import CodedRun
from clinical_nlp.language.sections import find_sections
from clinical_nlp.notes.corpus import Corpus
from clinical_nlp.progress import say
from clinical_nlp.reporting.tripod import counted_decisions, tripod_section
from clinical_nlp.runs import Estimate, Run, write_atomic, write_json
from clinical_nlp.statistics.intervals import by_patient, patient_bootstrap
from clinical_nlp.statistics.transferability import independent_difference
from clinical_nlp.tasks import ner

VERSION = 1
"""Of the protocol; figures of one version can be compared."""
_CELL = 11
"""Patients below which no group is shown."""
_AGES = ((0, 17), (18, 44), (45, 64), (65, 79), (80, 150))


class SparsityConfig(Config):
    """Take text away from held-out patients and score again; compare groups of them."""

    run: str = Field(min_length=1)
    """Directory of a finished coding or ner run."""
    corpus_path: str | None = None
    """Where the run's corpus is now, if it has moved."""
    shares: list[float] = Field(default=[0.25, 0.5, 0.75])
    """Shares of the sections of each document that are left out at random; more go where more have gone before."""
    columns: list[str] = Field(default=["institution", "sex", "age"])
    """Subgroups: columns of the notes or of the patients; age is reckoned from the birth date and the first note."""
    n_strata: int = Field(default=3, ge=2)
    """Groups of patients by how complete their notes are."""
    margin: float = Field(default=0.02, ge=0)
    """A loss or a gap is called one where its whole interval lies beyond this."""
    seed: int = 0
    """Of intervals and of what is left out."""


CONFIG = SparsityConfig


def run(config: SparsityConfig, output: Path, *, resume: bool = False) -> Run:
    """Score the held-out patients whole, with parts of their text missing, and by group; write the page."""
    if any(not 0 < share < 1 for share in config.shares):
        raise ConfigError("config key 'shares': each is a share between 0 and 1")
    with Run.open(output, config, recipe="sparsity", resume=resume, contains_phi=False) as run:
        scored = _coding(config) if Run.load(config.run).manifest.get("recipe") == "coding" else _ner(config)
        book = Book(config, scored)
        book.add("whole", scored.whole, "micro-F1 of the held-out patients, all text")
        book.take_away()
        book.by_completeness()
        book.by_group()
        run.record(book.estimates)
        results = {
            "version": VERSION,
            "run": {
                "path": config.run,
                "recipe": scored.recipe,
                "unit": scored.unit,
                "corpus": scored.corpus.card.name,
            },
            "protocol": {
                "metric": "micro-F1",
                "split": scored.split,
                "selection": "nothing was chosen on these patients",
                "n_patients": len(set(scored.patients)),
                "n_units": len(scored.patients),
                "margin": config.margin,
                "smallest_cell": _CELL,
                "seed": config.seed,
            },
            "numbers": book.numbers,
            "findings": book.findings,
            "missing": book.missing,
            "record": scored.record
            | {"decisions": [counted_decisions("all text", scored.whole, len(set(scored.patients)))]},
        }
        write_json(run.path / "results.json", results)
        run.note(inputs={"run": config.run, "corpus": scored.corpus.card.name, "n_units": len(scored.patients)})
    write_atomic(run.path / "report.html", report(run))
    return run


def report(run: Run) -> str:
    """Render the page from `results.json`."""
    from clinical_nlp.reporting.sparsity_page import sparsity_page

    results = json.loads((run.path / "results.json").read_text("utf-8"))
    return sparsity_page(results, tripod_section(run, results))


# What is scored -------------------------------------------------------------------------------------------------------

Texts = list[list[str]]
"""Notes of each document."""
Kept = list[list[list[tuple[int, int]]]]
"""What is left of each document: of each note the [start, end) that stay, in order; none where the note goes."""


def cut(texts: Texts, kept: Kept) -> Texts:
    """Return what is left of documents, without the notes of which nothing is."""
    return [
        ["".join(text[start:end] for start, end in spans) for text, spans in zip(notes, left, strict=True) if spans]
        for notes, left in zip(texts, kept, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class Scored:
    """Held-out documents with their patients, notes and counts (true, predicted, gold), and how to count again.

    `again` takes what is left of some documents and which they are, and returns counts before and after, of the same
    gold: all codes of a document, or the spans of a note that lie in what is left.
    """

    recipe: str
    unit: str
    split: str
    corpus: Corpus
    patients: list[str]
    note_rows: list[list[int]]
    texts: Texts = field(repr=False)
    whole: np.ndarray = field(repr=False)
    again: Callable[[Kept, Sequence[int]], tuple[np.ndarray, np.ndarray]] = field(repr=False)
    record: dict[str, Any] = field(default_factory=dict, repr=False)


def _coding(config: SparsityConfig) -> Scored:
    coded = CodedRun.load(config.run, config.corpus_path)
    rows = coded.data.held_out
    gold, wanted = coded.gold(rows), np.array([len(coded.data.codes[row]) for row in rows], dtype=float)

    def count(texts: Texts, places: Sequence[int]) -> np.ndarray:
        """Counts of some documents, given their texts."""
        found = coded.coder.logits([notes or [""] for notes in texts]) >= coded.coder.threshold
        return np.stack([(found & gold[places]).sum(1), found.sum(1), wanted[places]], 1).astype(np.float64)

    def again(kept: Kept, places: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        return whole[list(places)], count(cut([texts[place] for place in places], kept), places)

    texts = coded.texts(rows)
    patients = [coded.data.patients[row] for row in rows]
    notes = [coded.data.notes[row] for row in rows]
    split, whole = coded.data.split.describe(), count(texts, range(len(rows)))
    record = coded.record() | {
        "thresholds": ["a code is proposed at the threshold that the run chose on development patients"]
    }
    return Scored("coding", coded.data.unit, split, coded.data.corpus, patients, notes, texts, whole, again, record)


def _ner(config: SparsityConfig) -> Scored:
    subject = read_subject(config.run, config.corpus_path)
    if subject.recipe != "ner":
        raise ConfigError(f"config key 'run': {config.run} is of recipe {subject.recipe!r}; name a coding or ner run")
    rows = subject.split.test
    predictor = ner.NerPredictor.load(subject.run.path)
    counts = note_counts(subject, predictor, rows).astype(np.float64)
    gold = [[span for span in subject.gold[row] if span[2] in subject.labels] for row in rows]

    def predict(texts: Sequence[str]) -> list[list[ner.Span]]:
        return [[span[:3] for span in spans] for spans in predictor.predict(texts)]

    again = span_counts([subject.texts[row] for row in rows], gold, subject.labels, predict)
    patients = [subject.patients[row] for row in rows]
    texts = [[subject.texts[row]] for row in rows]
    notes = [[int(row)] for row in rows]
    split, record = (
        subject.split.describe(),
        subject.record() | {"thresholds": ["the likeliest tags are taken; no threshold"]},
    )
    return Scored("ner", "note", split, subject.corpus, patients, notes, texts, counts, again, record)


def span_counts(
    texts: Sequence[str],
    gold: Sequence[Sequence[ner.Span]],
    labels: Sequence[str],
    predict: Callable[[Sequence[str]], list[list[ner.Span]]],
) -> Callable[[Kept, Sequence[int]], tuple[np.ndarray, np.ndarray]]:
    """Return how to count spans again: those that lie in what is left, from the whole note and from the rest alone.

    What is predicted across a cut is counted against the rest: nobody wrote it.

    Parameters
    ----------
    texts, gold : of n notes; spans are (start, end, label).
    predict : texts -> spans.
    """
    known: dict[int, list[ner.Span]] = {}

    def again(kept: Kept, places: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        new = [place for place in places if place not in known]
        known.update(zip(new, predict([texts[place] for place in new]), strict=True))
        left = [note[0] for note in kept]
        cuts = ["".join(texts[place][a:b] for a, b in spans) for place, spans in zip(places, left, strict=True)]
        before: list[np.ndarray] = []
        after: list[np.ndarray] = []
        for place, spans, found in zip(places, left, predict(cuts), strict=True):
            wanted = [span for span in gold[place] if _inside(span, spans)]
            seen = [span for span in known[place] if _inside(span, spans)]
            for given, into in ((seen, before), ([_placed(span, spans) for span in found], after)):
                into.append(ner.count_matches(wanted, given, labels)[:, :3].sum(0))
        return np.array(before, dtype=np.float64), np.array(after, dtype=np.float64)

    return again


def _inside(span: ner.Span, kept: Sequence[tuple[int, int]]) -> bool:
    return any(start <= span[0] and span[1] <= end for start, end in kept)


def _placed(span: ner.Span, kept: Sequence[tuple[int, int]]) -> ner.Span:
    """Return where a span of what is left stands in the whole note."""
    places, passed = [], 0
    for offset in (span[0], span[1] - 1):
        passed = 0
        for start, end in kept:
            if offset < passed + end - start:
                places.append(start + offset - passed)
                break
            passed += end - start
    return places[0], places[1] + 1, span[2]


# Measuring ------------------------------------------------------------------------------------------------------------


@dataclass
class Book:
    """Every number with how it came about, and what the numbers show."""

    config: SparsityConfig
    scored: Scored
    estimates: dict[str, Estimate] = field(default_factory=dict)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def _common(self, rows: np.ndarray | None = None) -> dict[str, Any]:
        n = len(self.scored.patients) if rows is None else len(rows)
        return {"n_notes": n, "part": "test", "seed": self.config.seed}

    def _people(self, counts: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return by_patient([self.scored.patients[row] for row in rows.tolist()], counts[rows])

    def enter(self, name: str, estimate: Estimate, protocol: str) -> None:
        """Enter an estimate."""
        self.estimates[name] = estimate
        about = {"protocol": protocol, "split": self.scored.split, "selection": "nothing was chosen on these patients"}
        self.numbers[name] = asdict(estimate) | about

    def add(self, name: str, counts: np.ndarray, protocol: str, rows: np.ndarray | None = None) -> Estimate:
        """Enter the score of counts."""
        rows = np.arange(len(counts)) if rows is None else rows
        estimate = patient_bootstrap(self._people(counts, rows), f1, **self._common(rows))
        self.enter(name, estimate, protocol)
        return estimate

    def judge(self, kind: str, name: str, harm: Estimate, key: str) -> None:
        """Enter whether a harm (positive is worse) lies beyond the margin."""
        state = "not shown"
        if not math.isnan(harm.low):
            margin = self.config.margin
            state = "worse" if harm.low > margin else "no worse" if harm.high <= margin else "not shown"
        self.findings.append({"kind": kind, "name": name, "state": state, "number": key})

    def take_away(self) -> None:
        """Leave out each kind of section, each note type, and shares of all sections."""
        scored, everyone = self.scored, np.arange(len(self.scored.patients))
        parts = [[_sections(text) for text in notes] for notes in scored.texts]
        for category in self._frequent([{name for note in notes for name, *_ in note if name} for notes in parts]):
            say(f"without {category}")
            left = [[_joined([span for name, *span in note if name != category]) for note in notes] for notes in parts]
            self._without("section", category, left)
        types = scored.corpus.notes["note_type"].to_pylist()
        kinds = [[types[row] for row in rows] for rows in scored.note_rows]
        names = self._frequent([{kind for kind in found if kind} for found in kinds])
        # Of an ner run nothing would be left to score: a document is one note.
        for kind in names if len(names) > 1 and scored.recipe != "ner" else []:
            say(f"without notes of type {kind}")
            kept = [
                [[(0, len(text))] if own != kind else [] for text, own in zip(notes, found, strict=True)]
                for notes, found in zip(scored.texts, kinds, strict=True)
            ]
            self._without("note type", kind, kept)
        for share in sorted(self.config.shares):
            say(f"without {100 * share:g} % of the sections")
            left = [
                [_joined([span for at, (_, *span) in enumerate(note) if self._drawn(row, place, at) >= share])
                 for place, note in enumerate(notes)]
                for row, notes in enumerate(parts)
            ]  # fmt: skip
            self._compare("share", f"{100 * share:g} %", left, everyone)

    def _drawn(self, row: int, place: int, at: int) -> float:
        key = f"{self.config.seed} {self.scored.patients[row]} {row} {place} {at}"
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "little") / 2**64

    def _frequent(self, names: Sequence[set[str]]) -> list[str]:
        """Names that documents of at least 11 patients have."""
        have: dict[str, set[str]] = defaultdict(set)
        for found, patient in zip(names, self.scored.patients, strict=True):
            for name in found:
                have[name].add(patient)
        rare = sorted(name for name, people in have.items() if len(people) < _CELL)
        if rare:
            self.missing[f"{len(rare)} kinds of section or note"] = f"fewer than {_CELL} held-out patients have them"
        return sorted(name for name, people in have.items() if len(people) >= _CELL)

    def _without(self, what: str, name: str, left: Kept) -> None:
        lengths = [sum(end - start for note in notes for start, end in note) for notes in left]
        whole = [sum(map(len, notes)) for notes in self.scored.texts]
        changed = np.flatnonzero(np.array(lengths) != np.array(whole))
        if len(changed):
            self._compare(what, name, left, changed)

    def _compare(self, what: str, name: str, left: Kept, rows: np.ndarray) -> None:
        """Score the documents that lack something, beside the same documents whole."""
        before, after = self.scored.again([left[row] for row in rows.tolist()], rows.tolist())
        key, unit = f"{what}.{name}", self.scored.unit
        words = f"micro-F1 of the {unit}s that have it, without {what} {name}"
        if what == "share":
            words = f"micro-F1 of all {unit}s, {name} of their sections left out at random"
        if self.scored.recipe == "ner":
            words += "; the spans in what is left"
        people = [self.scored.patients[row] for row in rows.tolist()]
        before, after = by_patient(people, before), by_patient(people, after)
        self.enter(f"{key}.without", patient_bootstrap(after, f1, **self._common(rows)), words)
        loss = paired(before, after, f1, **self._common(rows))
        if np.array_equal(before, after):
            loss = Estimate(0.0, math.nan, math.nan, len(before), len(rows), "test", "no prediction changed")
        self.enter(f"{key}.loss", loss, f"{words}: whole minus what is left, the same patients")
        self.judge(what, name, loss, f"{key}.loss")

    def by_completeness(self) -> None:
        """Score groups of patients by how many kinds of section their notes have, a document's mean."""
        scored = self.scored
        kinds = [len({name for text in notes for name, *_ in _sections(text) if name}) for notes in scored.texts]
        rows = np.unique(scored.patients, return_inverse=True)[1]
        mean = np.bincount(rows, weights=np.array(kinds, dtype=float)) / np.bincount(rows)
        cuts = np.unique(np.quantile(mean, np.arange(1, self.config.n_strata) / self.config.n_strata))
        group = np.searchsorted(cuts, mean, side="left")
        found: dict[str, Estimate] = {}
        for one in np.unique(group):
            inside = mean[group == one]
            if (group == one).sum() < _CELL:
                self.missing[f"completeness {inside.min():.1f} to {inside.max():.1f}"] = f"fewer than {_CELL} patients"
                continue
            label = f"{inside.min():.1f} to {inside.max():.1f}"
            chosen = np.flatnonzero(group[rows] == one)
            protocol = f"micro-F1 of patients whose {scored.unit}s have {label} kinds of section on average"
            found[label] = self.add(f"completeness.{label}", scored.whole, protocol, chosen)
        if len(found) < 2:
            self.missing["completeness"] = "all patients are about equally complete, or there are too few"
            return
        labels = list(found)
        gap = independent_difference(found[labels[-1]], found[labels[0]], part="test")
        self.enter("completeness.gap", gap, f"micro-F1 at {labels[-1]} kinds of section minus at {labels[0]}")
        self.judge("completeness", f"{labels[0]} kinds of section", gap, "completeness.gap")

    def by_group(self) -> None:
        """Score every group of every column beside all other patients."""
        for column in self.config.columns:
            try:
                values = self._column(column)
            except ConfigError:
                raise
            except TooFewPatientsError as error:
                self.missing[column] = str(error)
                continue
            people: dict[str, set[str]] = defaultdict(set)
            for value, patient in zip(values, self.scored.patients, strict=True):
                if value is not None:
                    people[value].add(patient)
            shown = {value for value, members in people.items() if len(members) >= _CELL}
            if hidden := len(people) - len(shown):
                self.missing[f"{hidden} {'groups' if hidden > 1 else 'group'} of {column}"] = (
                    f"fewer than {_CELL} patients"
                )
            if unknown := sum(value is None for value in values):
                self.missing[f"{column} of {unknown} {self.scored.unit}s"] = "not known"
            if len(people) < 2:
                self.missing[column] = "fewer than two groups to compare"
                continue
            for value in sorted(shown):
                inside = np.flatnonzero([one == value for one in values])
                outside = np.flatnonzero([one is not None and one != value for one in values])
                if len({self.scored.patients[row] for row in outside}) < _CELL:  # the gap would show who they are
                    self.missing[f"{column} {value}"] = f"fewer than {_CELL} other patients to compare with"
                    continue
                own = self.add(f"{column}.{value}", self.scored.whole, f"micro-F1 where {column} is {value}", inside)
                rest = patient_bootstrap(self._people(self.scored.whole, outside), f1, **self._common(outside))
                gap = independent_difference(rest, own, part="test")
                shared = {self.scored.patients[row] for row in inside} & {self.scored.patients[row] for row in outside}
                if shared:  # the two sides are then not independent
                    gap = Estimate(gap.value, math.nan, math.nan, gap.n_patients, gap.n_notes, "test",
                                   f"no interval: {len(shared)} patients are on both sides")  # fmt: skip
                self.enter(f"{column}.{value}.gap", gap, f"micro-F1 of all others minus that where {column} is {value}")
                self.judge("group", f"{column} {value}", gap, f"{column}.{value}.gap")

    def _column(self, name: str) -> list[str | None]:
        """Return a value for each document: of its first note, or of its patient."""
        scored = self.scored
        first = [rows[0] for rows in scored.note_rows]
        notes = scored.corpus.notes
        if name == "age":
            return self._ages(first)
        if name in notes.column_names and name not in ("text", "text_sha256", "note_id", "patient_id", "source"):
            values = notes[name].to_pylist()
            return [None if values[row] is None else str(values[row]) for row in first]
        table = scored.corpus.patients
        known = [] if table is None else [one for one in table.column_names if one != "patient_id"]
        if table is None or name not in known:
            usable = {"institution", "note_type", "language", "age", *known}
            raise ConfigError(f"config key 'columns': no column {name!r} here{nearest(name, usable)}")
        of_patient = dict(zip(table["patient_id"].to_pylist(), table[name].to_pylist(), strict=True))
        found = [of_patient.get(patient) for patient in scored.patients]
        return [None if value is None else str(value) for value in found]

    def _ages(self, first: Sequence[int]) -> list[str | None]:
        table = self.scored.corpus.patients
        if table is None or not any(born := table["birth_date"].to_pylist()):
            raise TooFewPatientsError("the corpus has no birth dates")
        of_patient: dict[str, date | None] = dict(zip(table["patient_id"].to_pylist(), born, strict=True))
        written = self.scored.corpus.notes["written_at"].to_pylist()
        found: list[str | None] = []
        for row, patient in zip(first, self.scored.patients, strict=True):
            birth, when = of_patient.get(patient), written[row]
            if birth is None or when is None:
                found.append(None)
                continue
            age = when.year - birth.year - ((when.month, when.day) < (birth.month, birth.day))
            low, high = next(((low, high) for low, high in _AGES if low <= age <= high), (None, None))
            found.append(None if low is None else f"{low} and over" if high == 150 else f"{low} to {high}")
        return found


def _sections(text: str) -> list[tuple[str, int, int]]:
    """Return the sections of a note: category, empty without a header, and where it starts and ends."""
    return [(one.category if one.named else "", one.start, one.end) for one in find_sections(text)]


def _joined(spans: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Join spans that follow on each other, so that nothing counts as cut where nothing was."""
    found: list[tuple[int, int]] = []
    for start, end in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        elif end > start:
            found.append((start, end))
    return found
