"""Do the notes of two or more institutions differ, in what, and what may be claimed from that?

Every patient stands in one institution, weighs the same, and is permuted whole. Nothing is trained or selected.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from clinical_nlp.config import validate
from clinical_nlp.errors import InputError, UsageError, nearest
from clinical_nlp.notes.corpus import corpus_module
from clinical_nlp.notes.schema import Note
from clinical_nlp.progress import progress, say
from clinical_nlp.reporting.drift_results import (
    comparison_entry,
    estimates_of,
    next_institution,
    profiled_institutions,
    sampled_institutions,
)
from clinical_nlp.reporting.tripod import judged_run, notes_record, text_origin, tripod_section
from clinical_nlp.runs import Run, file_digest, write_atomic, write_json
from clinical_nlp.statistics.clinical_units import measure
from clinical_nlp.statistics.comparison import (
    FEWEST_PATIENTS,
    LEVEL,
    SMALLEST_CELL,
    Comparison,
    Gold,
    compare,
    decide,
    permutations_needed,
)
from clinical_nlp.statistics.evidence import read_conventions, read_labels, task_outputs
from clinical_nlp.statistics.exports import ExportConfig, read_sample
from clinical_nlp.statistics.profile import compare_profiles, is_profile, make_profile, read_profiles
from clinical_nlp.statistics.sample import SampledNotes
from clinical_nlp.statistics.sequential import control_alarms
from clinical_nlp.statistics.text_measures import hashed_features


class DriftConfig(ExportConfig):
    """Compare the notes of institutions."""

    reference: str | None = None
    """Institution the others are compared with; default the one with most patients."""
    strata: Literal["none", "profile", "profile_year"] = "none"
    """profile: compare notes of one type only, and shuffle patients of like mixes and numbers of notes, so that a
    different mix alone is not called a difference (approximate; see the page). profile_year: of one type and year."""
    model: str | None = None
    """Represent notes by the hidden states of this model (hub id, folder, run, builtin:tiny); default hashed TF-IDF,
    which needs no model."""
    max_tokens: int = Field(default=512, ge=8)
    """With a model: tokens read of each note."""
    labels: str | None = None
    """CSV file with columns patient_id or note_id (institution where ids recur) and label (0 or 1): target gold. With a
    column probability, that of a model which has not seen the patient; else words are used."""
    label_name: str = "the label"
    """What the label says, for the page."""
    labels_are_marked: bool = True
    """Whether labels come from marks in the text, so that another annotation convention would change them."""
    conventions: str | None = None
    """CSV file with columns note_id, patient_id, class, reference, other: how often each class is marked in the same
    notes under the convention of the reference and under the other one."""
    n_permutations: int = Field(default=999, ge=19)
    """Relabellings of patients; more are made where so many comparisons could not reach significance otherwise."""


CONFIG = DriftConfig

_EMBEDDED_AT_ONCE = 1024
_LEVELS = [f"a difference is claimed at p {LEVEL} after Holm; fixed in advance"]


@dataclass(frozen=True)
class Results:
    """What a drift analysis found: its run and one comparison a pair of institutions."""

    run: Run
    comparisons: tuple[Comparison, ...]

    @property
    def path(self) -> Path:
        """The run directory, with `report.html` and `results.json`."""
        return self.run.path

    def __str__(self) -> str:
        return "\n".join(map(_line, self.comparisons))


def drift(sources: Sequence[str | os.PathLike[str]], *, output: str | os.PathLike[str], **options: Any) -> Results:
    """Compare the notes of institutions; the call from Python.

    Parameters
    ----------
    sources : exports (files or folders), together holding two institutions or more.
    output : a new run directory.
    options : the keys of `DriftConfig`, such as `format`, `reference`, `model`.

    Returns
    -------
    Results, with one `Comparison` for each institution beside the reference.

    Raises
    ------
    ConfigError : an option is not known or does not fit.
    InputError : there is only one institution.
    """
    config = validate(DriftConfig, {"sources": [os.fspath(source) for source in sources], **options})
    return _analyse(config, Path(output), resume=False)


def run(config: DriftConfig, output: Path, *, resume: bool = False) -> Run:
    """Sample the notes, compare every institution with the reference, and write the page."""
    return _analyse(config, output, resume=resume).run


def _analyse(config: DriftConfig, output: Path, *, resume: bool) -> Results:
    if config.strata == "profile_year" and config.window != "none":
        raise UsageError("strata=profile_year: windows of time share no year; compare them with strata=profile")
    with Run.open(output, config, recipe="drift", resume=resume, contains_phi=False) as run:
        if config.model is not None:  # before hours of reading
            from clinical_nlp.models.resolve import provenance, resolve_model

            run.note(base_model=provenance(resolve_model(config.model), run.path))
        profiled = [Path(source) for source in config.sources if is_profile(Path(source))]
        if profiled:
            return _analyse_profiles(config, run, profiled)
        sample, account = read_sample(config, run.path, run.note)
        reference, others = _pairs(config, sample)
        gold = _gold(config, sample, run)
        say(f"measuring {len(sample.notes)} notes")
        measures = measure(sample.notes)
        represent = _representation(config, run)
        n_permutations = max(config.n_permutations, permutations_needed(len(others)))
        if config.window != "none":
            n_permutations = max(n_permutations, permutations_needed(_looks_a_year(config, sample)))
        comparisons = []
        for name, members in others:
            say(f"comparing {name} with {reference}")
            comparisons.append(
                compare(
                    sample,
                    reference=reference,
                    other=name,
                    members=members,
                    represent=represent,
                    measures=measures,
                    gold=gold,
                    cells=_cells(config, sample),
                    n_permutations=n_permutations,
                    seed=config.seed,
                )
            )
        comparisons = decide(comparisons)
        results = _results(config, sample, account, reference, comparisons, n_permutations)
        results["record"] = _record(config, sample)
        if config.window != "none":
            results["looks"] = _looks(comparisons, _looks_a_year(config, sample))
        _finish(run, comparisons, results)
        if run.checkpoints.exists():
            for file in sorted(run.checkpoints.glob("*.npy")):
                file.unlink()  # vectors of notes can give their text away
            run.checkpoints.rmdir()
    return Results(run, tuple(comparisons))


def _finish(run: Run, comparisons: Sequence[Comparison], results: dict[str, Any]) -> None:
    for item in comparisons:
        run.record(estimates_of(item))
    write_json(run.path / "results.json", results)
    write_atomic(run.path / "report.html", report(run))
    for item in comparisons:
        say(_line(item))


def _analyse_profiles(config: DriftConfig, run: Run, profiled: Sequence[Path]) -> Results:
    """Compare by profiles: those that were given, and those of the exports beside them, which are made here."""
    for key in ("model", "labels", "conventions"):
        if getattr(config, key) is not None:
            raise UsageError(
                f"{key} needs notes, and {profiled[0]} is a profile; leave {key} out, or give exports only"
            )
    if config.strata != "none":
        raise UsageError(
            f"strata={config.strata} needs notes of every institution; profiles are compared with strata=none"
        )
    profiles = [item for path in profiled for item in read_profiles(path)]
    n_profiles = len(profiles)
    exports = [source for source in config.sources if Path(source) not in profiled]
    means = sorted({profile.institution_means for profile in profiles if profile.institution_means})
    account: dict[str, Any] = {"n_records": 0, "n_notes": 0, "skipped": {}, "n_rejected": 0}
    account |= {"n_ids_in_several_sources": 0, "ids_joined": False}
    small = 0
    if exports:
        sample, account = read_sample(config.model_copy(update={"sources": exports}), run.path, run.note)
        for name in sorted(sample.n_patients):
            if sample.n_patients[name] < SMALLEST_CELL:
                small += 1
            else:
                profiles.append(make_profile(sample, name, institution_means=account["institution_means"]))
        means.append(account["institution_means"])
    names = [profile.institution for profile in profiles]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"institution {twice[0]!r} is there twice (a profile of it and its notes?); give it once")
    if len(profiles) < 2:
        raise InputError(
            f"{len(profiles)} institution of {SMALLEST_CELL} patients or more in the sources: give the profile or the "
            "export of a second one"
        )
    people = {profile.institution: profile.n_patients for profile in profiles}
    reference = _reference(config, people)
    first = next(profile for profile in profiles if profile.institution == reference)
    others = sorted((p for p in profiles if p is not first), key=lambda p: (-p.n_patients, p.institution))
    comparisons = decide([compare_profiles(first, other, seed=config.seed) for other in others])
    run.note(inputs={f"profile {i + 1}": {"sha256": file_digest(path)} for i, path in enumerate(profiled)})
    results = {
        "protocol": _protocol(config)
        | {
            "representation": "random features of hashed words, the same map everywhere; see the profile files",
            "p_values": "(1 + k) / (B + 1) with B = 19,999 draws of the null from the patients' covariance; Holm over "
            "the confirmatory tests of all comparisons with enough patients",
            "from_profiles": True,
        },
        "account": {"skipped": {}, **account}
        | {
            "n_patients": sum(people.values()),
            "n_notes": sum(profile.n_notes for profile in profiles),
            "n_patients_in_several_institutions": 0,
            "n_institutions_named": len(profiles) + small,
            "n_institutions": len(profiles) + small,
            "n_notes_left_out_elsewhere": 0,
            "n_notes_sampled": sum(profile.summaries[0].n_notes for profile in profiles),
            "n_profiles": n_profiles,
            "institution_means": "; ".join(dict.fromkeys(means)) or "what the profiles name",
        },
        "reference": reference,
        "institutions": profiled_institutions(profiles),
        "comparisons": [comparison_entry(item) for item in comparisons],
        "record": {"judged": None, "trained": "Nothing is trained.", "thresholds": _LEVELS},
    }
    _finish(run, comparisons, results)
    return Results(run, tuple(comparisons))


def report(run: Run) -> str:
    """Render the page from `results.json`."""
    from clinical_nlp.reporting.drift_page import drift_page

    results = json.loads((run.path / "results.json").read_text("utf-8"))
    return drift_page(results, tripod_section(run, results))


# Comparing ------------------------------------------------------------------------------------------------------------


def _pairs(config: DriftConfig, sample: SampledNotes) -> tuple[str, list[tuple[str, list[str]]]]:
    """Choose the reference, and what it is compared with: each institution of enough patients, the rest together."""
    people = sample.n_patients
    if len(people) < 2:
        raise InputError(
            f"all notes are from one institution, {next(iter(people))!r}: give a second source, name another level "
            "with institution_from, or institution_from=source to take each source as one institution"
        )
    reference = _reference(config, people)
    others = [name for name in people if name != reference]
    pairs = [(name, [name]) for name in others if people[name] >= FEWEST_PATIENTS]
    small = [name for name in others if people[name] < FEWEST_PATIENTS]
    if len(small) == 1:
        pairs.append((small[0], small))
    elif small:
        pairs.append((f"{len(small)} small institutions together", small))
    return reference, pairs


def _cells(config: DriftConfig, sample: SampledNotes) -> list[str] | None:
    """Say within what notes are compared: nothing, their type, or type and year."""
    if config.strata == "none":
        return None
    types = [note.note_type or "(none given)" for note in sample.notes]
    if config.strata == "profile":
        return types
    years = [f"{note.written_at:%Y}" if note.written_at else "no date" for note in sample.notes]
    return [f"{kind}, {year}" for kind, year in zip(types, years, strict=True)]


def _reference(config: DriftConfig, people: Mapping[str, int]) -> str:
    """Return the reference: as named, the earliest window, or the institution of most patients."""
    chosen = min(people) if config.window != "none" else min(people, key=lambda name: (-people[name], name))
    reference = config.reference or chosen
    if reference not in people:
        known = sorted(people, key=lambda name: (-people[name], name))[:20]
        raise UsageError(f"reference {reference!r} is not an institution of these notes{nearest(reference, known)}")
    return reference


def _representation(config: DriftConfig, run: Run) -> Callable[[Sequence[Note]], np.ndarray]:
    if config.model is None:
        return lambda notes: hashed_features([note.text for note in notes], seed=config.seed)
    return lambda notes: _embed(notes, config, run)


def _gold(config: DriftConfig, sample: SampledNotes, run: Run) -> Gold:
    """Read what is known of the sampled notes beyond their text."""
    labels = logits = conventions = outputs = None
    if config.labels is not None:
        labels, logits = read_labels(Path(config.labels), sample)
    if config.conventions is not None:
        conventions = read_conventions(Path(config.conventions))
    if config.model is not None and (Path(config.model) / "task.json").is_file():
        outputs = task_outputs(Path(config.model), sample.notes)
    return Gold(config.label_name, labels, config.labels_are_marked, logits, outputs, conventions)


def _embed(notes: Sequence[Note], config: DriftConfig, run: Run) -> np.ndarray:
    """Embed distinct texts in shards that an interrupted run finds again, standardised over all of these notes."""
    from clinical_nlp.models.embeddings import embed_notes

    text_of = {note.text_sha256: note.text for note in notes}
    digests = sorted(text_of)
    vectors: dict[str, np.ndarray] = {}
    run.checkpoints.mkdir(exist_ok=True)
    with progress("embedding", len(digests), unit="texts") as bar:
        for start in range(0, len(digests), _EMBEDDED_AT_ONCE):
            shard = digests[start : start + _EMBEDDED_AT_ONCE]
            file = run.checkpoints / f"{hashlib.sha256(''.join(shard).encode()).hexdigest()[:32]}.npy"
            if file.is_file():
                block = np.load(file, allow_pickle=False)
            else:
                block = embed_notes(str(config.model), [text_of[key] for key in shard], max_tokens=config.max_tokens)
                with open(file.with_suffix(".tmp"), "wb") as handle:
                    np.save(handle, block, allow_pickle=False)
                os.replace(file.with_suffix(".tmp"), file)
            vectors.update(zip(shard, block, strict=True))
            bar.advance(len(shard))
    table = np.stack([vectors[note.text_sha256] for note in notes]).astype(np.float64)
    # A few hidden dimensions of language models are far larger than the rest and would be all that a distance sees.
    scale = table.std(axis=0)
    return (table - table.mean(axis=0)) / np.where(scale > 1e-6, scale, 1.0)


# Writing --------------------------------------------------------------------------------------------------------------


def _line(item: Comparison) -> str:
    words = {"differ": "differ", "not_distinguished": "cannot be told apart", "too_few": "too few patients to tell"}
    auc = item.tests.get("domain_classifier")
    units = [entry.unit.name.lower() for entry in item.units if entry.shift.adjusted_p <= 0.05][:3]
    what = f" (most in: {'; '.join(units)})" if item.verdict == "differ" and units else ""
    shown = f"; domain classifier AUC {auc.effect:.3f}, p {auc.p_value:.3g}" if auc else ""
    return f"{item.other} against {item.reference}: {words[item.verdict]}{what}{shown}"


def _protocol(config: DriftConfig) -> dict[str, Any]:
    return {
        "unit": "patient: weighted equally, permuted whole",
        "split": "none: nothing is trained but the cross-fitted domain classifier (5 folds of patients)",
        "selection": "none: all tests and their order are fixed in advance",
        "strata": config.strata,
        "patient_in_two": config.patient_in_two,
        "max_patients": config.max_patients,
        "max_notes_per_patient": config.max_notes_per_patient,
        "fewest_patients": FEWEST_PATIENTS,
        "smallest_cell": SMALLEST_CELL,
        "window": config.window,
        "seed": config.seed,
        "from_profiles": False,
    }


def _looks_a_year(config: DriftConfig, sample: SampledNotes) -> int:
    """How many looks a year of windows has, at all institutions together."""
    watched = {name.rpartition(" ")[0] for name in sample.n_patients}
    return {"month": 12, "quarter": 4}.get(config.window, 1) * len(watched)


def _looks(comparisons: Sequence[Comparison], looks_a_year: int) -> list[dict[str, Any]]:
    """Take the windows as repeated looks, whose false alarms are counted per year; small ones together are no look."""
    windows = [item for item in comparisons if item.other.rpartition(" ")[2][:4].isdecimal()]
    windows.sort(key=lambda item: (item.other.rpartition(" ")[2], item.other))
    p_values, smallest = [], []
    for item in windows:
        made = [item.tests[name] for name in item.confirmatory if name in item.tests]
        judged = bool(made) and item.verdict != "too_few"
        # One p-value a look: that any of its tests differs (Bonferroni).
        p_values.append(min(1.0, len(item.confirmatory) * min(t.p_value for t in made)) if judged else float("nan"))
        smallest.append(len(item.confirmatory) * max(t.smallest_p for t in made) if judged else 0.0)
    years = [int(item.other.rpartition(" ")[2][:4]) for item in windows]
    looks = control_alarms(p_values, years, looks_per_year=looks_a_year, smallest_p=smallest)
    return [asdict(look) | {"other": item.other} for item, look in zip(windows, looks, strict=True)]


def _record(config: DriftConfig, sample: SampledNotes) -> dict[str, Any]:
    """Collect what a reader needs to judge the comparison; small institutions stand together, or not at all."""
    columns: dict[str, list[Any]] = {"patient_id": list(sample.patient_ids)}
    for name in ("text_sha256", "written_at", "note_type", "encounter_id"):
        columns[name] = [getattr(note, name) for note in sample.notes]
    names = np.array(sample.institutions)
    kept = {name for name, count in sample.n_patients.items() if count >= SMALLEST_CELL}
    parts = {name: np.flatnonzero(names == name) for name in sorted(kept)}
    rest = np.array([name not in kept for name in sample.institutions])
    if len({sample.patient_ids[row] for row in np.flatnonzero(rest)}) >= SMALLEST_CELL:
        parts["small institutions together"] = np.flatnonzero(rest)
    record = {
        "notes": notes_record(pa.table(columns), parts) | {"n_notes_unused": None},
        "trained": "Nothing is trained but the cross-fitted domain classifiers, which score other patients than they "
        "were fitted on.",
        "judged": None if config.model is None else judged_run(config.model),
        "thresholds": _LEVELS,
    }
    if not config.sources:
        record["open_text"] = text_origin(corpus_module(config.corpus.name).CARD)
    return record


def _results(
    config: DriftConfig,
    sample: SampledNotes,
    account: dict[str, Any],
    reference: str,
    comparisons: Sequence[Comparison],
    n_permutations: int,
) -> dict[str, Any]:
    """Collect everything the page shows; counts of fewer than 11 patients are null."""
    return {
        "protocol": _protocol(config)
        | {
            "representation": "hashed TF-IDF of words and word pairs, 64 SVD dimensions, fitted blind to institutions"
            if config.model is None
            else f"mean hidden state of {config.model} over the first {config.max_tokens} tokens, standardised",
            "p_values": f"(1 + k) / (B + 1) with B = {n_permutations} relabellings of patients; Holm over the "
            "confirmatory tests of all comparisons with enough patients",
        },
        "account": account
        | {"n_patients": sum(sample.n_patients.values()), "n_patients_in_several_institutions": sample.n_in_two}
        | {"n_institutions_named": sample.n_institutions, "n_institutions": len(sample.n_patients)}
        | {"n_notes_left_out_elsewhere": sample.n_notes_left_out, "n_notes_sampled": len(sample.notes)},
        "reference": reference,
        "new_institution": next_institution(comparisons) if config.window == "none" else None,
        "institutions": sampled_institutions(sample),
        "comparisons": [comparison_entry(item) for item in comparisons],
    }
