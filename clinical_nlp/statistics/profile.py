"""A summary of an institution's notes that holds no text, and the comparison of two such summaries.

A profile has means and covariances between patients of two things that any institution computes alike without data of
another: random features of hashed words, and clinical units. Two of them give the same tests as the notes do, with the
normal distribution of patient means in place of relabelled patients.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clinical_nlp.errors import InputError, TooFewPatientsError
from clinical_nlp.notes.schema import Note
from clinical_nlp.statistics.clinical_units import ClinicalUnit, common, measure, units_of
from clinical_nlp.statistics.comparison import FEWEST_PATIENTS, LEVEL, SMALLEST_CELL, Comparison, UnitShift
from clinical_nlp.statistics.intervals import FEWEST_PATIENTS as FEWEST_FOR_INTERVALS
from clinical_nlp.statistics.max_t import MeasureShift
from clinical_nlp.statistics.random_features import RandomFeatures
from clinical_nlp.statistics.sample import SampledNotes
from clinical_nlp.statistics.text_measures import projected_words
from clinical_nlp.statistics.two_sample import TestResult

FORMAT, VERSION = "clinical_nlp profile", 1
DIMENSIONS, WIDTH, N_FEATURES, SEED = 96, 1.0, 256, 0
"""Of the map that all profiles of this version share."""

WHAT_LEAVES = (
    "The name of the institution, how many patients and notes it has, and the years of its notes.",
    "The mean over patients, and the covariance between patients, of 256 numbers that random cosines of hashed words "
    "give: no word can be read from them, but whoever has a text can test how typical it is.",
    "The mean over patients of layout and wording measures from a fixed list (sections, abbreviations, placeholders, "
    "...), their covariance between patients, and the names of note types.",
    f"Nothing that fewer than {SMALLEST_CELL} patients share: such measures and note types carry no number.",
    "No text, no token, no id, no date but years, nothing about a single patient or note.",
    "Two profiles that differ by a few patients say something about these patients: hand over one.",
)
_DRAWS = 19_999
_BASES = ("all_notes", "one_note")


@dataclass(frozen=True, eq=False)
class Summary:
    """Patient means of one choice of notes.

    `mean` (D,) and `covariance` (D, D) are of random features. `units` have `unit_mean` (k,), `unit_covariance` (k, k)
    and `unit_patients` (k,) that have them measured, `unit_usual` and `unit_departing` (k,) the commonest value and how
    many patients have another one; `rare` are units that all but fewer than 11 patients have at one value, and that
    value.
    """

    n_notes: int
    mean: np.ndarray
    covariance: np.ndarray
    units: tuple[str, ...]
    unit_mean: np.ndarray
    unit_covariance: np.ndarray
    unit_patients: np.ndarray
    unit_usual: np.ndarray
    unit_departing: np.ndarray
    rare: dict[str, float]


@dataclass(frozen=True, eq=False)
class Profile:
    """What one institution's notes look like; `summaries` are over all sampled notes and over one random note each.

    `n_sampled` patients are summarised. `log_notes` are mean and variance of the logarithm of the number of notes a
    patient has.
    """

    institution: str
    institution_means: str
    n_patients: int
    n_notes: int
    n_sampled: int
    years: tuple[int, int] | None
    log_notes: tuple[float, float]
    features: str
    summaries: tuple[Summary, Summary]


def feature_map() -> RandomFeatures:
    """Return the random features that all profiles of this version share."""
    return RandomFeatures(DIMENSIONS, WIDTH, N_FEATURES, SEED)


def make_profile(sample: SampledNotes, institution: str, *, institution_means: str = "") -> Profile:
    """Summarise the sampled notes of one institution.

    Raises
    ------
    TooFewPatientsError : fewer than 11 patients; nothing about them may leave.
    """
    rows = np.flatnonzero(np.array(sample.institutions) == institution)
    sample = sample.select(rows)
    people, patients = np.unique(np.array(sample.patient_ids), return_inverse=True)
    if len(people) < SMALLEST_CELL:
        raise TooFewPatientsError(
            f"institution {institution!r} has fewer than {SMALLEST_CELL} patients: no profile is made of it; take a "
            "coarser level with institution_from, or a longer period"
        )
    counts = np.log(sample.notes_of_patient[np.unique(patients, return_index=True)[1]])
    years = [note.written_at.year for note in sample.notes if note.written_at is not None]
    vectors = projected_words([note.text for note in sample.notes], dimensions=DIMENSIONS, seed=SEED)
    found = measure(sample.notes)
    summaries = []
    for kept in (np.arange(len(sample.notes)), np.flatnonzero(sample.is_first)):
        here = patients[kept]
        summaries.append(
            _summary(vectors[kept], found.values[kept], found.units, here, [sample.notes[i] for i in kept])
        )
    if sample.is_first.all():  # one note each: nothing to say twice
        summaries[1] = summaries[0]
    return Profile(
        institution,
        institution_means,
        sample.n_patients.get(institution, len(people)),
        sample.n_notes.get(institution, len(rows)),
        len(people),
        (min(years), max(years)) if years else None,
        (float(counts.mean()), float(counts.var(ddof=1))),
        feature_map().digest,
        (summaries[0], summaries[1]),
    )


def _summary(
    vectors: np.ndarray, values: np.ndarray, units: Sequence[ClinicalUnit], patients: np.ndarray, notes: Sequence[Note]
) -> Summary:
    n = int(patients.max()) + 1
    features = _patient_means(feature_map().transform(vectors).astype(np.float64), patients, n)
    columns = {unit.key: values[:, i] for i, unit in enumerate(units) if unit.key != "shared_lines"}
    kept: list[str] = []
    ways: list[tuple[float, int]] = []
    rare: dict[str, float] = {}
    for unit in units_of(notes):
        column = columns.get(unit.key, np.zeros(len(notes)))
        there = np.isfinite(column)
        if len(np.unique(patients[there])) < SMALLEST_CELL:
            continue
        plain, how_many = np.unique(np.round(column[there], 6), return_counts=True)
        usual = float(plain[how_many.argmax()])
        if common(column, patients, SMALLEST_CELL, fewest_measured=SMALLEST_CELL):
            kept.append(unit.key)
            ways.append((usual, len(np.unique(patients[there & (np.round(column, 6) != usual)]))))
        elif not unit.key.startswith(("type:", "language:")):
            rare[unit.key] = usual
    table = np.column_stack([columns[key] for key in kept]) if kept else np.zeros((len(notes), 0))
    means = _patient_means(table, patients, n)
    there = np.isfinite(means)
    centre = np.nanmean(means, axis=0) if kept else np.zeros(0)
    away = np.where(there, means - centre, 0.0)
    together = there.T.astype(np.float64) @ there
    covariance = (away.T @ away) / np.maximum(together - 1, 1)
    return Summary(
        len(notes),
        features.mean(axis=0),
        np.cov(features, rowvar=False),
        tuple(kept),
        centre,
        covariance,
        there.sum(axis=0),
        np.array([usual for usual, _ in ways]),
        np.array([count for _, count in ways], dtype=np.int64),
        rare,
    )


def _patient_means(values: np.ndarray, patients: np.ndarray, n: int) -> np.ndarray:
    there = np.isfinite(values)
    sums, counts = np.zeros((n, values.shape[1])), np.zeros((n, values.shape[1]))
    np.add.at(sums, patients, np.where(there, values, 0.0))
    np.add.at(counts, patients, there)
    return np.divide(sums, counts, out=np.full(sums.shape, math.nan), where=counts > 0)


# Files ----------------------------------------------------------------------------------------------------------------


def profile_text(profiles: Sequence[Profile], *, made_with: str) -> str:
    """Return the JSON of profiles; counts are exact, other numbers have single precision."""
    return (
        json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "made_with": made_with,
                "what_leaves": list(WHAT_LEAVES),
                "map": {"dimensions": DIMENSIONS, "width": WIDTH, "n_features": N_FEATURES, "seed": SEED},
                "profiles": [_plain(profile) for profile in profiles],
            },
            indent=1,
            ensure_ascii=False,
        )
        + "\n"
    )


def _plain(profile: Profile) -> dict[str, Any]:
    plain = {**asdict(replace(profile, summaries=()))}  # type: ignore[arg-type]
    plain["summaries"] = {
        name: {
            "n_notes": summary.n_notes,
            "mean": _packed(summary.mean),
            "covariance": _packed(summary.covariance[np.triu_indices(N_FEATURES)]),
            "units": {
                key: {
                    "mean": _rounded(summary.unit_mean[i]),
                    "variance": _rounded(summary.unit_covariance[i, i]),
                    "patients": int(summary.unit_patients[i]),
                    "usual": _rounded(summary.unit_usual[i]),
                    "departing": int(summary.unit_departing[i]),
                }
                for i, key in enumerate(summary.units)
            },
            "unit_covariance": _packed(summary.unit_covariance[np.triu_indices(len(summary.units))]),
            "rare": {key: _rounded(value) for key, value in summary.rare.items()},
        }
        for name, summary in zip(_BASES, dict.fromkeys(profile.summaries), strict=False)
    }
    return plain


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _rounded(value: float) -> float:
    return float(f"{float(value):.7g}")


def is_profile(path: Path) -> bool:
    """Whether a file begins as a profile does."""
    if not path.is_file() or path.suffix != ".json":
        return False
    with path.open("rb") as file:
        return f'"format": "{FORMAT}"'.encode() in file.read(200)


def read_profiles(path: Path) -> list[Profile]:
    """Read a file of profiles.

    Raises
    ------
    InputError : it is no profile, broken, of another version, or made with another map.
    """
    try:
        whole = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a profile ({type(error).__name__}); make it with clinical-nlp profile") from None
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise InputError(f"{path}: not a profile; make it with clinical-nlp profile")
    if whole.get("version") != VERSION:
        raise InputError(
            f"{path}: profile of version {whole.get('version')}, this program reads version {VERSION}; make it again "
            "with the version of clinical_nlp that compares"
        )
    try:
        found = [_profile(item) for item in whole["profiles"]]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{path}: a profile is incomplete ({type(error).__name__}); make it again") from None
    if any(profile.features != feature_map().digest for profile in found):
        raise InputError(f"{path}: made with another map than this version's; make it again with the same version")
    return found


def _profile(item: dict[str, Any]) -> Profile:
    summaries = []
    for name in list(_BASES)[: len(item["summaries"])]:
        part = item["summaries"][name]
        units = part["units"]
        covariance, table = _square(part["covariance"], N_FEATURES), _square(part["unit_covariance"], len(units))
        summary = Summary(
            int(part["n_notes"]),
            _unpacked(part["mean"], N_FEATURES),
            covariance,
            tuple(units),
            np.array([unit["mean"] for unit in units.values()], dtype=np.float64),
            table,
            np.array([unit["patients"] for unit in units.values()], dtype=np.int64),
            np.array([unit["usual"] for unit in units.values()], dtype=np.float64),
            np.array([unit["departing"] for unit in units.values()], dtype=np.int64),
            {str(key): float(value) for key, value in part["rare"].items()},
        )
        if not all(np.isfinite(a).all() for a in (summary.mean, covariance, summary.unit_mean, table)):
            raise ValueError("not finite")
        summaries.append(summary)
    years = item["years"]
    return Profile(
        str(item["institution"]),
        str(item["institution_means"]),
        int(item["n_patients"]),
        int(item["n_notes"]),
        int(item["n_sampled"]),
        None if years is None else (int(years[0]), int(years[1])),
        (float(item["log_notes"][0]), float(item["log_notes"][1])),
        str(item["features"]),
        (summaries[0], summaries[-1]),
    )


def _square(text: str, n: int) -> np.ndarray:
    upper = np.triu_indices(n)
    found = np.zeros((n, n))
    found[upper] = _unpacked(text, len(upper[0]))
    found.T[upper] = found[upper]
    return found


def _unpacked(text: str, n: int) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float64)
    if len(values) != n:
        raise ValueError("wrong length")
    return values


# Comparing ------------------------------------------------------------------------------------------------------------


def compare_profiles(reference: Profile, other: Profile, *, seed: int = 0) -> Comparison:
    """Compare two institutions by their profiles; see `comparison.decide` for the verdict.

    Parameters
    ----------
    reference, other : the profiles.
    seed : of the draws of the null.

    Returns
    -------
    Comparison with the tests `mmd` and `units`, each over all notes and over one note a patient.

    Notes
    -----
    The squared distance of the mean features, less its expectation under no difference, is a weighted sum of centred
    chi-squares with the eigenvalues of the covariance of the difference as weights (Gretton et al. 2009, A Fast,
    Consistent Kernel Two-Sample Test, NeurIPS 22). The largest |t| of the units is compared with that of normal draws
    of their correlation over the root of a chi-square with the fewest degrees of freedom.
    """
    n_sampled = (reference.n_sampled, other.n_sampled)
    found = Comparison(
        reference.institution, other.institution, n_sampled,
        (reference.summaries[0].n_notes, other.summaries[0].n_notes), confirmatory=("mmd", "units"),
    )  # fmt: skip
    catalogue = {unit.key: unit for unit in units_of([])}
    tested = []
    for basis in range(2):
        sides = (reference.summaries[basis], other.summaries[basis])
        units, test = _unit_test(sides, n_sampled, np.random.default_rng([seed, basis, 1]))
        text = _text_test(sides, n_sampled, np.random.default_rng([seed, basis, 0]))
        named = []
        for shift in units:
            few = [shift.name not in side.units for side in sides]
            usual = next((side.rare[shift.name] for side in sides if shift.name in side.rare), 0.0)
            unit = catalogue.get(shift.name) or _named_unit(shift.name)
            named.append(UnitShift(unit, shift, usual, (few[0], few[1])))
        named.sort(key=lambda item: (item.shift.adjusted_p, -item.shift.statistic))
        tested.append(((text,) if test is None else (text, test), tuple(named)))
    utilisation = _utilisation(reference, other, n_sampled)
    unequal = utilisation.p_value <= LEVEL
    return replace(
        found,
        basis="one_note" if unequal else "all_notes",
        utilisation=utilisation,
        all_notes=tested[0][0],
        one_note=tested[1][0],
        units=tested[1 if unequal else 0][1],
    )


def _named_unit(key: str) -> ClinicalUnit:
    what, _, name = key.partition(":")
    return ClinicalUnit(
        key, f"{'Note type' if what == 'type' else 'Language'}: {name or '(none given)'}", "% of notes", "mix"
    )


def _test(
    name: str, statistic: float, null: np.ndarray, sides: tuple[Summary, Summary], n: tuple[int, int], **effect: Any
) -> TestResult:
    slack = 1e-9 * max(1e-300, float(null.std()))
    return TestResult(
        name=name,
        statistic=statistic,
        p_value=float((1 + np.count_nonzero(null >= statistic - slack)) / (len(null) + 1)),
        null_mean=float(null.mean()),
        null_sd=float(null.std(ddof=1)),
        n_units=sum(n),
        n_notes=sides[0].n_notes + sides[1].n_notes,
        n_permutations=len(null),
        smallest_p=1 / (len(null) + 1),
        note="from profiles: the null is drawn from the patients' covariance; no valid interval exists for this",
        **effect,
    )


def _text_test(sides: tuple[Summary, Summary], n: tuple[int, int], generator: np.random.Generator) -> TestResult:
    spread = sides[0].covariance / n[0] + sides[1].covariance / n[1]
    weights = np.clip(np.linalg.eigvalsh(spread), 0, None)
    statistic = float(((sides[1].mean - sides[0].mean) ** 2).sum() - weights.sum())
    # The covariance is an estimate; the chi-squares' common scale carries that, as Student's t does for one number.
    freedom = n[0] + n[1] - 2
    null = np.empty(_DRAWS)
    for start in range(0, _DRAWS, 2000):
        rows = min(2000, _DRAWS - start)
        drawn = generator.standard_normal((rows, len(weights))) ** 2
        null[start : start + rows] = (drawn - 1) @ weights / np.sqrt(generator.chisquare(freedom, rows) / freedom)
    sd = float(null.std())
    return _test(
        "mmd", statistic, null, sides, n,
        effect=statistic / sd if sd > 0 else math.nan, effect_unit="standard deviations of the null",
    )  # fmt: skip


def _unit_test(
    sides: tuple[Summary, Summary], n: tuple[int, int], generator: np.random.Generator
) -> tuple[list[MeasureShift], TestResult | None]:
    from scipy import stats

    both = [{key: i for i, key in enumerate(side.units)} for side in sides]
    keys = [
        key
        for key in dict.fromkeys([*sides[0].units, *sides[1].units])
        if all(key in index or key in side.rare or key.startswith(("type:", "language:"))
               for index, side in zip(both, sides, strict=True))
    ]  # fmt: skip
    if not keys:
        return [], None
    means, variances, counts = (np.zeros((2, len(keys))) for _ in range(3))
    correlation = np.eye(len(keys))
    for s, (side, index) in enumerate(zip(sides, both, strict=True)):
        for place, key in enumerate(keys):
            if key in index:
                i = index[key]
                means[s, place], counts[s, place] = side.unit_mean[i], side.unit_patients[i]
                variances[s, place] = side.unit_covariance[i, i]
            else:
                means[s, place], counts[s, place], variances[s, place] = side.rare.get(key, 0.0), n[s], math.nan
    # Where fewer than 11 patients depart from one value nothing else is known of them: ten are taken to depart as those
    # of the other side do, whose spread stands in too, so that the difference is too small if anything.
    for place, key in enumerate(keys):
        for s, other in ((0, 1), (1, 0)):
            if key not in both[s] and key in both[other]:
                i, side = both[other][key], sides[other]
                away = (side.unit_mean[i] - side.unit_usual[i]) * side.unit_patients[i] / side.unit_departing[i]
                means[s, place] += away * min(SMALLEST_CELL - 1, n[s]) / n[s]
                if (side.unit_mean[i] - means[s, place]) * away < 0:
                    means[s, place] = side.unit_mean[i]
    variances = np.where(np.isnan(variances), np.nanmax(variances, axis=0), variances)
    error = np.sqrt((variances / counts).sum(axis=0))
    usable = error > 0
    pooled = _correlation(sides, both, keys)
    correlation = pooled[np.ix_(usable, usable)]
    difference = means[1] - means[0]
    with np.errstate(all="ignore"):
        t = np.abs(difference) / error
        freedom = (variances / counts).sum(axis=0) ** 2 / ((variances / counts) ** 2 / (counts - 1)).sum(axis=0)
    t, freedom = np.where(usable, t, math.nan), np.where(usable, freedom, math.nan)
    values, vectors = np.linalg.eigh(correlation)
    root = vectors * np.sqrt(np.clip(values, 0, None))
    drawn = np.abs(generator.standard_normal((_DRAWS, len(correlation))) @ root.T)
    drawn /= np.sqrt((root**2).sum(axis=1))
    fewest = float(np.nanmin(freedom))
    null = drawn.max(axis=1) / np.sqrt(generator.chisquare(fewest, _DRAWS) / fewest)
    shifts = []
    for place, key in enumerate(keys):
        if not usable[place]:
            continue
        low = high = math.nan
        few = counts[:, place].min() < FEWEST_FOR_INTERVALS
        estimated = all(key in index for index in both)
        if not few and estimated:
            reach = float(stats.t.ppf(0.975, freedom[place]) * error[place])
            low, high = float(difference[place]) - reach, float(difference[place]) + reach
        note = "" if estimated else f"fewer than {SMALLEST_CELL} patients on one side"
        shifts.append(
            MeasureShift(
                name=key, reference=float(means[0, place]), other=float(means[1, place]),
                difference=float(difference[place]), low=low, high=high, statistic=float(t[place]),
                p_value=float(2 * stats.t.sf(t[place], freedom[place])),
                adjusted_p=float((1 + np.count_nonzero(null >= t[place])) / (_DRAWS + 1)),
                n_patients=(int(counts[0, place]), int(counts[1, place])),
                n_notes=sides[0].n_notes + sides[1].n_notes,
                note=f"no interval: fewer than {FEWEST_FOR_INTERVALS} patients" if few else note,
            )
        )  # fmt: skip
    largest = float(np.nanmax(t))
    return shifts, _test("units", largest, null, sides, n, effect=largest, effect_unit="largest |t|")


def _correlation(sides: tuple[Summary, Summary], both: Sequence[dict[str, int]], keys: Sequence[str]) -> np.ndarray:
    """Mean of the two sides' correlations, where both have a pair; that of one where only one has it; else none."""
    total, count = np.zeros((len(keys), len(keys))), np.zeros((len(keys), len(keys)))
    for side, index in zip(sides, both, strict=True):
        there = [place for place, key in enumerate(keys) if key in index]
        rows = [index[keys[place]] for place in there]
        sd = np.sqrt(np.clip(np.diag(side.unit_covariance)[rows], 1e-300, None))
        total[np.ix_(there, there)] += side.unit_covariance[np.ix_(rows, rows)] / np.outer(sd, sd)
        count[np.ix_(there, there)] += 1
    found = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    np.fill_diagonal(found, 1.0)
    return np.clip(found, -1, 1)


def _utilisation(reference: Profile, other: Profile, n: tuple[int, int]) -> TestResult:
    from scipy import stats

    difference = other.log_notes[0] - reference.log_notes[0]
    parts = (reference.log_notes[1] / n[0], other.log_notes[1] / n[1])
    error = math.sqrt(sum(parts))
    freedom = sum(parts) ** 2 / sum(p**2 / (k - 1) for p, k in zip(parts, n, strict=True)) if error else math.nan
    t = abs(difference) / error if error else (math.inf if abs(difference) > 1e-12 else 0.0)
    p_value = float(2 * stats.t.sf(t, freedom)) if error else float(t == 0)
    low = high = math.nan
    if error and min(n) >= FEWEST_PATIENTS:
        reach = float(stats.t.ppf(0.975, freedom) * error)
        low, high = math.exp(difference - reach), math.exp(difference + reach)
    return TestResult(
        name="utilisation", statistic=t, p_value=p_value, null_mean=math.nan, null_sd=math.nan, n_units=sum(n),
        n_notes=reference.n_notes + other.n_notes, n_permutations=0, smallest_p=0.0, effect=math.exp(difference),
        effect_unit="times as many notes a patient", low=low, high=high, note="from profiles: Welch's t",
    )  # fmt: skip
