"""How often the tests of `clinical_nlp.statistics` alarm where nothing differs, and whether power is what it promises.

`python benchmarks/drift_size.py size` simulates identical institutions (ten notes a patient on average and very
unequal, intra-patient correlation 0.3, every patient with several note types) and counts rejections at 5 % for every
test; `mix` is the same where the institutions differ in their mix of note types only, for the tests that compare within
note types; `utilisation` where one institution writes five times as many notes a patient. `split` halves one synthetic
hospital by patients at random and takes the whole verdict; `looks` simulates years of monthly tests; `power` checks
the numbers of patients that `statistics.power` names. Each verb replaces its own part of the result file, so that they
can run apart. Every rate has a Clopper-Pearson interval.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clinical_nlp.statistics.distances import calibration_shift_test, coral_test, frechet_test, histogram_test
from clinical_nlp.statistics.domain_classifier import domain_classifier_test, mlp_classifier_test
from clinical_nlp.statistics.max_t import max_t_test, output_shift_test
from clinical_nlp.statistics.mmd import mmd_test
from clinical_nlp.statistics.permutation import PermutationPlan, profile_strata
from clinical_nlp.statistics.power import power_of_classifier, power_of_difference
from clinical_nlp.statistics.ratios import length_test, utilisation_test
from clinical_nlp.statistics.sequential import control_alarms, permutations_for
from clinical_nlp.statistics.vocabulary import vocabulary_test

LEVEL, DIMENSIONS, ICC, WORDS, TYPES = 0.05, 8, 0.3, 40, 3
ALLOWED = (0.03, 0.07)


@dataclass(frozen=True)
class Simulated:
    """Notes of two institutions: all that the tests look at."""

    ids: list[str]
    sides: list[str]
    kinds: np.ndarray
    features: np.ndarray
    lengths: np.ndarray
    words: np.ndarray
    probabilities: np.ndarray
    outcomes: np.ndarray
    counts: np.ndarray


def simulate(
    seed: int, *, patients: int, mix: bool = False, notes: tuple[float, float] = (10, 10), same_types: bool = False
) -> Simulated:
    """Draw two institutions; a patient's notes share `ICC` of the variance that their types leave.

    What a note type does to the features is the same at both institutions, and with `same_types` in every run.
    """
    generator = np.random.default_rng([seed, 11])
    tastes = generator.normal(size=(TYPES, DIMENSIONS))
    if same_types:
        tastes = np.random.default_rng(11).normal(size=(TYPES, DIMENSIONS))
    parts: list[tuple[Any, ...]] = []
    ids, sides, counts = [], [], []
    for side in range(2):
        for patient in range(patients):
            # From 1 to about 40 notes, the mean as asked.
            n = 1 + int(generator.negative_binomial(1.5, 1.5 / (0.5 + notes[side])))
            preference = np.array([1.0, 1.0, 1.0 + 2 * side if mix else 1.0])
            kinds = generator.choice(TYPES, n, p=generator.dirichlet(2 * preference))
            own = generator.normal(size=DIMENSIONS) * math.sqrt(ICC)
            features = own + generator.normal(size=(n, DIMENSIONS)) * math.sqrt(1 - ICC) + 0.7 * tastes[kinds]
            lengths = np.exp(5 + 0.5 * features[:, 0])
            likely = np.exp(0.8 * np.repeat(features, 3, axis=1)[:, :20])
            words = np.stack([generator.multinomial(WORDS, row / row.sum()) for row in likely]) / WORDS
            probabilities = 1 / (1 + np.exp(-features[:, 1]))
            truth = 1 / (1 + np.exp(-(0.6 * features[:, 1] + own[2])))
            outcomes = generator.random(n) < truth
            parts.append((kinds, features, lengths, words, probabilities, outcomes))
            ids += [f"{side}-{patient}"] * n
            sides += [f"h{side}"] * n
            counts += [n] * n
    whole = [np.concatenate(part) for part in zip(*parts, strict=True)]
    return Simulated(ids, sides, *whole, np.array(counts))


def all_tests(data: Simulated, plan: PermutationPlan) -> Iterator[tuple[str, float]]:
    """Every test that needs no note types: name and p-value."""
    names = [f"x{column}" for column in range(DIMENSIONS)]
    yield "domain_classifier", domain_classifier_test(data.features, plan).p_value
    yield "mmd", mmd_test(data.features, plan).p_value
    yield "mmd_random_features", mmd_test(data.features, plan, exact_up_to=0, n_random_features=96).p_value
    yield "coral", coral_test(data.features, plan).p_value
    yield "frechet", frechet_test(data.features, plan).p_value
    numbers = histogram_test(data.features[:, 0], plan)
    yield "psi_of_a_number", numbers.population_stability.p_value
    yield "js_of_a_number", numbers.jensen_shannon.p_value
    named = histogram_test(data.kinds.astype(str), plan)
    yield "psi_of_the_note_type", named.population_stability.p_value
    yield "js_of_the_note_type", named.jensen_shannon.p_value
    yield "calibration", calibration_shift_test(data.probabilities, data.outcomes, plan).p_value
    yield "length", length_test(data.lengths, plan).p_value
    yield "utilisation", utilisation_test(data.counts, plan).p_value
    vocabulary = vocabulary_test(data.words, tuple(map(str, range(20))), plan)
    yield "vocabulary", vocabulary.jensen_shannon.p_value
    yield "vocabulary_kl", vocabulary.kullback_leibler.p_value
    yield "max_t", max_t_test(data.features, names, plan).test.p_value
    rare = data.features > np.quantile(data.features, 0.97, axis=0)
    yield "max_t_of_rare_presences", max_t_test(rare, names, plan).test.p_value
    outputs = np.column_stack([data.probabilities, data.probabilities**2])
    yield "outputs", output_shift_test(outputs, ["a", "b"], plan).test.p_value


def within_types(data: Simulated, seed: int, n_permutations: int) -> Iterator[tuple[str, float]]:
    """The tests within note types, patients exchanged within strata of like profiles."""
    kinds = data.kinds.astype(str)
    strata = profile_strata(data.ids, data.sides, kinds.tolist(), data.counts)
    plan = PermutationPlan(data.ids, data.sides, strata=strata, n_permutations=n_permutations, seed=seed)
    names = [f"x{column}" for column in range(DIMENSIONS)]
    yield "domain_classifier_within_types", domain_classifier_test(data.features, plan, cells=kinds).p_value
    yield "mmd_within_types", mmd_test(data.features, plan, cells=kinds).p_value
    yield "max_t_within_types", max_t_test(data.features, names, plan, cells=kinds).test.p_value
    yield "length_within_types", length_test(data.lengths, plan, cells=kinds).p_value
    vocabulary = vocabulary_test(data.words, tuple(map(str, range(20))), plan, cells=kinds)
    yield "vocabulary_within_types", vocabulary.jensen_shannon.p_value


def paired(data: Simulated, seed: int, n_permutations: int) -> Iterator[tuple[str, float]]:
    """Every patient seen at both institutions, by dealing their notes to the two at random."""
    generator = np.random.default_rng([seed, 12])
    sides = np.where(generator.random(len(data.ids)) < 0.5, "h0", "h1")
    plan = PermutationPlan(data.ids, sides.tolist(), n_permutations=n_permutations, seed=seed, paired=True)
    yield "domain_classifier_paired", domain_classifier_test(data.features, plan).p_value
    yield "mmd_paired", mmd_test(data.features, plan).p_value
    yield "length_paired", length_test(data.lengths, plan).p_value
    yield "max_t_paired", max_t_test(data.features, [f"x{i}" for i in range(DIMENSIONS)], plan).test.p_value


def one_run(task: tuple[str, int, int, int, bool]) -> dict[str, float]:
    """The p-values of one simulated pair of institutions."""
    verb, seed, patients, n_permutations, with_network = task
    if verb == "utilisation":
        data = simulate(seed, patients=patients, notes=(4, 20))
    else:
        data = simulate(seed, patients=patients, mix=verb == "mix")
    plan = PermutationPlan(data.ids, data.sides, n_permutations=n_permutations, seed=seed)
    found: dict[str, float] = {}
    if verb == "mix":
        found |= {"mmd (sees the mix, and should)": mmd_test(data.features, plan).p_value}
        return found | dict(within_types(data, seed, n_permutations))
    if with_network:
        found["mlp_classifier"] = mlp_classifier_test(data.features, plan, steps=150).p_value
    found |= dict(all_tests(data, plan))
    if verb == "utilisation":
        _, first = np.unique(plan.note_patient, return_index=True)
        one = PermutationPlan(
            [data.ids[i] for i in first], [data.sides[i] for i in first], n_permutations=n_permutations, seed=seed
        )
        found["mmd, one note a patient"] = mmd_test(data.features[first], one).p_value
        found["domain_classifier, one note a patient"] = domain_classifier_test(data.features[first], one).p_value
        return found
    return found | dict(within_types(data, seed, n_permutations)) | dict(paired(data, seed, n_permutations))


def rate(hits: int, runs: int) -> dict[str, Any]:
    """A share of runs with its Clopper-Pearson interval."""
    from scipy import stats

    interval = stats.binomtest(hits, runs).proportion_ci(0.95, "exact")
    return {
        "rate": hits / runs,
        "low": round(interval.low, 4),
        "high": round(interval.high, 4),
        "hits": hits,
        "runs": runs,
    }


def rejections(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rates of rejection of every test over the runs."""
    tasks = [
        (arguments.verb, seed, arguments.patients, arguments.permutations, seed < arguments.network_runs)
        for seed in range(arguments.runs)
    ]
    p_values: dict[str, list[float]] = {}
    for done, found in enumerate(in_turn(one_run, tasks, arguments.workers), 1):
        for name, value in found.items():
            p_values.setdefault(name, []).append(value)
        if done % 100 == 0:
            sys.stderr.write(f"{done} of {len(tasks)}\n")
    rates = {name: rate(sum(p <= LEVEL for p in values), len(values)) for name, values in p_values.items()}
    result: dict[str, Any] = {"rejections_at_5_percent": rates}
    if arguments.verb == "size":
        result["allowed"] = ALLOWED
        result["outside"] = [n for n, found in rates.items() if not ALLOWED[0] <= found["rate"] <= ALLOWED[1]]
    return result


# Repeated looks -------------------------------------------------------------------------------------------------------


def one_year(task: tuple[int, int]) -> list[float]:
    """The p-values of twelve months of 20 patients, each compared with the same 60 patients of the reference."""
    seed, n_permutations = task
    generator = np.random.default_rng([seed, 13])

    def patients(n: int) -> list[np.ndarray]:
        return [
            0.5 * (generator.normal() * math.sqrt(ICC) + generator.normal(size=notes) * math.sqrt(1 - ICC))
            for notes in 1 + generator.negative_binomial(1.5, 1.5 / 10.5, size=n)
        ]

    reference, found = patients(60), []
    for month in range(12):
        both = reference + patients(20)
        ids = [str(index) for index, notes in enumerate(both) for _ in notes]
        sides = ["new" if int(patient) >= 60 else "reference" for patient in ids]
        plan = PermutationPlan(ids, sides, "reference", n_permutations=n_permutations, seed=12 * seed + month)
        found.append(length_test(np.exp(np.concatenate(both)), plan).p_value)
    return found


def looks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Years without drift that have an alarm, and alarms a year."""
    n_permutations = permutations_for(12)
    years = list(in_turn(one_year, [(seed, n_permutations) for seed in range(arguments.runs)], arguments.workers))
    alarms = [sum(look.alarm for look in control_alarms(year, [0] * 12)) for year in years]
    return {
        "relabellings": n_permutations,
        "years_with_an_alarm": rate(sum(count > 0 for count in alarms), len(years)),
        "alarms_a_year": sum(alarms) / len(years),
        "years_with_an_alarm_at_5_percent_a_look": rate(sum(min(year) <= LEVEL for year in years), len(years)),
    }


# Power ----------------------------------------------------------------------------------------------------------------


def one_comparison(task: tuple[int, int, float, int, bool]) -> tuple[float, float, float, float]:
    """P-value of a difference of means; AUC, its p-value and its null's spread where the classifier is asked for."""
    seed, patients, shift, n_permutations, with_classifier = task
    data = simulate(seed, patients=patients, same_types=True)
    target = np.array(data.sides) == "h1"
    features = data.features + (shift * target)[:, None] * np.eye(DIMENSIONS)[0]
    plan = PermutationPlan(data.ids, data.sides, n_permutations=n_permutations, seed=seed)
    of_means = length_test(np.exp(features[:, 0]), plan).p_value
    if not with_classifier:
        return of_means, math.nan, math.nan, math.nan
    found = domain_classifier_test(features, plan)
    return of_means, found.statistic, found.p_value, found.null_sd


def powers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Promised from pilots of 200 patients beside observed: for the AUC that is reached and a difference of means."""
    pilots = [simulate(10_000 + seed, patients=200, same_types=True) for seed in range(3)]
    plans = [PermutationPlan(pilot.ids, pilot.sides, n_permutations=199) for pilot in pilots]
    tested = [domain_classifier_test(pilot.features, plan) for pilot, plan in zip(pilots, plans, strict=True)]
    classifier = []
    for patients, shift in ((30, 0.7), (60, 0.5), (120, 0.2), (120, 0.35)):
        tasks = [(seed, patients, shift, arguments.permutations, True) for seed in range(arguments.runs // 5)]
        found = np.array(list(in_turn(one_comparison, tasks, arguments.workers)))
        auc = float(found[:, 1].mean())
        needed = [
            power_of_classifier(result, plan, effect=auc).patients_needed
            for result, plan in zip(tested, plans, strict=True)
        ]
        spread = float(np.median([result.null_sd for result in tested])) * math.sqrt(200 / patients)
        classifier.append(
            {
                "patients": patients,
                "shift": shift,
                "mean_auc": round(auc, 4),
                "promised": round(_normal_cdf((auc - 0.5) / spread - 1.6449), 3),
                "found": rate(int((found[:, 2] <= LEVEL).sum()), len(tasks)),
                "null_sd_promised": round(spread, 4),
                "null_sd_found": round(float(found[:, 3].mean()), 4),
                "patients_needed_for_80_percent": float(np.median(needed)),
            }
        )
    of_means = []
    for shift in (0.3, 0.45):
        named = [
            power_of_difference(pilot.features[:, 0], plan, effect=shift, effect_unit="").patients_needed
            for pilot, plan in zip(pilots, plans, strict=True)
        ]
        patients = int(np.median(named))
        tasks = [(seed, patients, shift, arguments.permutations, False) for seed in range(arguments.runs)]
        found = np.array(list(in_turn(one_comparison, tasks, arguments.workers)))
        hits = int((found[:, 0] <= LEVEL).sum())
        of_means.append(
            {"shift": shift, "patients_needed": patients, "promised": 0.8, "found": rate(hits, arguments.runs)}
        )
    return {"difference_of_means": of_means, "classifier": classifier}


def _normal_cdf(value: float) -> float:
    return 0.5 * math.erfc(-value / math.sqrt(2))


# Null splits of a clustered corpus ------------------------------------------------------------------------------------


def splits(arguments: argparse.Namespace) -> dict[str, Any]:
    """Halve one synthetic hospital by patients at random, again and again, and take the whole verdict."""
    from dataclasses import replace

    from clinical_nlp.corpora.synthetic_hospitals import generate
    from clinical_nlp.statistics.clinical_units import measure
    from clinical_nlp.statistics.comparison import compare, decide
    from clinical_nlp.statistics.sample import NoteSampler
    from clinical_nlp.statistics.text_measures import hashed_features

    notes = [gold.note for gold in generate(institutions=1, patients=arguments.patients, notes_per_patient=(2, 12))]
    patients, row = np.unique([note.patient_id for note in notes], return_inverse=True)
    measures = measure(notes)
    vectors = hashed_features([note.text for note in notes])
    number = {note.note_id: index for index, note in enumerate(notes)}
    verdicts: dict[str, int] = {}
    below: dict[str, int] = {}
    for run in range(arguments.runs):
        half = np.random.default_rng([run, 14]).permutation(len(patients)) < len(patients) // 2
        sampler = NoteSampler(max_patients=len(patients), max_notes_per_patient=12, seed=run)
        for index, note in enumerate(notes):
            sampler.add(replace(note, institution="a" if half[row[index]] else "b"))
        sample = sampler.finish()
        found = compare(
            sample,
            reference="a",
            other="b",
            represent=lambda chosen: vectors[[number[note.note_id] for note in chosen]],
            measures=measures.select(np.array([number[note.note_id] for note in sample.notes])),
            n_permutations=arguments.permutations,
            seed=run,
        )
        verdict = decide([found])[0]
        verdicts[verdict.verdict] = verdicts.get(verdict.verdict, 0) + 1
        for name, test in verdict.tests.items():
            below[name] = below.get(name, 0) + (test.p_value <= LEVEL)
        if (run + 1) % 20 == 0:
            sys.stderr.write(f"{run + 1} of {arguments.runs}: {verdicts}\n")
    return {
        "notes": len(notes),
        "alarms": rate(verdicts.get("differ", 0), arguments.runs),
        "allowed": 0.08,
        "verdicts": verdicts,
        "single_tests_at_5_percent": {name: rate(count, arguments.runs) for name, count in below.items()},
    }


def in_turn(work: Callable[[Any], Any], tasks: list[Any], workers: int) -> Iterator[Any]:
    """Results in the order of the tasks."""
    if workers == 1:
        yield from map(work, tasks)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(work, tasks, chunksize=5)


def add(path: Path, part: str, arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Replace one part of the result file."""
    from measuring import machine

    from clinical_nlp.runs import package_versions

    whole = json.loads(path.read_text("utf-8")) if path.exists() else {"benchmark": "drift size"}
    packages = {name: version for name, version in package_versions().items() if name in ("numpy", "scipy", "torch")}
    given = {name: value for name, value in vars(arguments).items() if name not in ("verb", "out")}
    whole[part] = {"machine": machine(1), "packages": packages, "arguments": given, **result}
    path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", "utf-8")


def main() -> None:
    """Run one verb and add its part to the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["size", "mix", "utilisation", "split", "looks", "power"])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--network-runs", type=int, default=400)
    parser.add_argument("--patients", type=int, default=30, help="of each institution")
    parser.add_argument("--permutations", type=int, default=199)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    began = time.process_time()
    work = {"split": splits, "looks": looks, "power": powers}.get(arguments.verb, rejections)
    result = work(arguments)
    add(arguments.out, arguments.verb, arguments, {**result, "processor_seconds": round(time.process_time() - began)})


if __name__ == "__main__":
    main()
