"""What of a drift analysis may be written: no text, and no number of fewer than 11 patients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from clinical_nlp.runs import Estimate
from clinical_nlp.statistics.attribution import FEWEST_INSTITUTIONS, Claim, advise, new_institution
from clinical_nlp.statistics.comparison import SMALLEST_CELL, Comparison, UnitShift
from clinical_nlp.statistics.power import Power
from clinical_nlp.statistics.profile import Profile
from clinical_nlp.statistics.sample import SampledNotes
from clinical_nlp.statistics.text_measures import word_counts

_METRICS = {
    "domain_classifier": "domain_auc",
    "mmd": "mmd_null_sds",
    "length": "length_ratio",
    "vocabulary": "vocabulary_excess_bits",
    "vocabulary_kl": "vocabulary_kl_excess_bits",
    "units": "largest_unit_t",
    "utilisation": "notes_per_patient_ratio",
    "mlp_classifier": "mlp_auc",
    "coral": "coral_excess",
    "frechet": "frechet_excess",
    "length_psi": "length_psi_excess",
}


def estimates_of(item: Comparison) -> dict[str, Estimate]:
    """Return the figures of one comparison that `metrics.json` takes."""
    part = item.basis.replace("_", " ")
    tests = [*item.tests.values(), *([item.utilisation] if item.utilisation else []), *item.further]
    return {
        f"drift.{item.other}.{_METRICS[test.name]}": Estimate(
            test.effect,
            test.low,
            test.high,
            test.n_units,
            test.n_notes,
            "all notes" if test.name == "utilisation" else part,
            f"p {test.p_value:.4g}" + (f"; {test.note}" if test.note else ""),
        )
        for test in tests
    }


def sampled_institutions(sample: SampledNotes) -> list[dict[str, Any]]:
    """Return what was compared, one row an institution, the largest first."""
    words = np.log(np.maximum(word_counts([note.text for note in sample.notes]), 1))
    names, people = np.array(sample.institutions), np.array(sample.patient_ids)
    rows = []
    for name in sorted(sample.n_patients, key=lambda name: (-sample.n_patients[name], name)):
        found: dict[str, Any] = {"name": name, "n_patients": _small(sample.n_patients[name]), "n_notes": None}
        if found["n_patients"] is not None:
            inside = np.flatnonzero(names == name)
            logs = [words[inside[people[inside] == person]].mean() for person in np.unique(people[inside])]
            found["n_notes"] = sample.n_notes[name]
            found["words_a_note"] = float(np.exp(np.mean(logs)))
            found["note_types"] = _note_types(sample, inside)
        rows.append(found)
    return rows


def _note_types(sample: SampledNotes, rows: np.ndarray) -> dict[str, float]:
    """Share of each note type that enough patients have, every patient weighing the same."""
    of_patient: dict[str, Counter[str]] = {}
    for row in rows:
        kind = sample.notes[row].note_type or "(none given)"
        of_patient.setdefault(sample.patient_ids[row], Counter())[kind] += 1
    share: Counter[str] = Counter()
    having: Counter[str] = Counter()
    for counts in of_patient.values():
        for kind, count in counts.items():
            having[kind] += 1
            share[kind] += count / sum(counts.values()) / len(of_patient)  # type: ignore[assignment]
    return {kind: float(share[kind]) for kind in sorted(share) if having[kind] >= SMALLEST_CELL}


def profiled_institutions(profiles: Sequence[Profile]) -> list[dict[str, Any]]:
    """Return what was compared, one row a profile, the largest first."""
    return [
        {
            "name": profile.institution,
            "n_patients": profile.n_patients,
            "n_notes": profile.n_notes,
            "words_a_note": _words_in(profile),
            "note_types": _types_in(profile),
        }
        for profile in sorted(profiles, key=lambda p: (-p.n_patients, p.institution))
    ]


def _words_in(profile: Profile) -> float:
    summary = profile.summaries[0]
    if "words" not in summary.units:
        return float("nan")
    return float(np.exp(summary.unit_mean[summary.units.index("words")]))


def _types_in(profile: Profile) -> dict[str, float]:
    summary = profile.summaries[0]
    return {
        key.removeprefix("type:") or "(none given)": float(summary.unit_mean[i]) / 100
        for i, key in enumerate(summary.units)
        if key.startswith("type:")
    }


def next_institution(comparisons: Sequence[Comparison]) -> dict[str, Any] | None:
    """What one more institution might give, from three compared ones on; each against the reference."""
    aucs = [item.tests["domain_classifier"].effect for item in comparisons if item.verdict != "too_few"]
    if len(aucs) < 3:
        return None
    low, high, note = new_institution(aucs)
    return {"low": max(0.0, low), "high": min(1.0, high), "n": len(aucs), "note": note, "needed": FEWEST_INSTITUTIONS}


def comparison_entry(item: Comparison) -> dict[str, Any]:
    """Return one comparison as it is written."""
    tokens = [asdict(token) | {"n_patients": [_small(count) for count in token.n_patients]} for token in item.tokens]
    people = [_small(count) for count in item.n_patients]
    smallest = min((test.smallest_p for test in item.tests.values()), default=float("nan"))
    return {
        "reference": item.reference,
        "other": item.other,
        "n_patients": people if None not in people else [None, None],
        "n_patients_together": sum(item.n_patients),
        "n_notes": list(item.n_notes),
        "verdict": item.verdict,
        "basis": item.basis,
        "smallest_p": smallest,
        "utilisation": None if item.utilisation is None else asdict(item.utilisation),
        "all_notes": [asdict(test) for test in item.all_notes],
        "one_note": [asdict(test) for test in item.one_note],
        "further": [asdict(test) for test in item.further],
        "power": None
        if item.power is None
        else asdict(item.power) | {"n_patients": people if None not in people else [None, None]},
        "note": item.note,
        "adjusted_p": dict(item.adjusted),
        "tokens": tokens,
        "units": [_unit(shift) for shift in item.units],
        "claims": [_claim(claim, item) for claim in item.claims],
        "advice": [] if item.verdict == "too_few" else advise(item.claims, text_differs=item.verdict == "differ"),
    }


def _power(item: Power) -> dict[str, Any]:
    """What the patients at hand can show; their counts stand elsewhere, where they may."""
    found = asdict(item)
    del found["n_patients"]
    return found


def _unit(item: UnitShift) -> dict[str, Any]:
    """One clinical unit as it may be shown: no number of a side where fewer than 11 patients depart from the usual."""
    shift = item.shift
    counts = [_small(count) for count in shift.n_patients]
    hidden = [few or count is None for few, count in zip(item.few, counts, strict=True)]
    ratio = item.unit.key == "words"  # measured on the logarithmic scale
    shown = [float(np.exp(value)) if ratio else value for value in (shift.reference, shift.other, item.usual)]
    found: dict[str, Any] = {
        "key": item.unit.key,
        "name": item.unit.name,
        "unit": item.unit.unit,
        "kind": item.unit.kind,
    }
    found |= {"usual": shown[2], "scale": "ratio" if ratio else "difference"}
    found |= {"reference": None if hidden[0] else shown[0], "other": None if hidden[1] else shown[1]}
    ends = (shift.difference, shift.low, shift.high)
    change = [None if any(hidden) else float(np.exp(value)) if ratio else value for value in ends]
    found |= {"difference": change[0], "low": change[1], "high": change[2]}
    found |= {"t": float(np.copysign(shift.statistic, shift.difference)), "p_value": shift.p_value}
    return found | {
        "adjusted_p": shift.adjusted_p,
        "n_patients": counts if None not in counts else [None, None],
        "n_notes": shift.n_notes,
        "note": shift.note,
    }


def _claim(claim: Claim, item: Comparison) -> dict[str, Any]:
    names = {entry.unit.key: entry.unit.name for entry in item.units}
    return {
        "question": claim.question,
        "answer": claim.answer,
        "reason": claim.reason,
        "condition": claim.condition,
        "p_value": claim.p_value,
        "n_patients": claim.n_patients,
        "n_notes": claim.n_notes,
        "evidence": [names.get(shift.name, shift.name) for shift in claim.evidence],
        "estimates": {name: asdict(estimate) for name, estimate in claim.estimates},
    }


def _small(count: int) -> int | None:
    """Return the count, or None where so few patients must not be shown."""
    return count if count >= SMALLEST_CELL else None
