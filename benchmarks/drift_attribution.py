"""Is the cause of a shift named rightly? Confusion matrix and power against oracles on the synthetic hospitals.

    python benchmarks/drift_attribution.py run CELLS.jsonl --repeats 20 [--first-seed 0]
    (35 texts a repeat, 10 s each on one core)

    python benchmarks/drift_attribution.py summary CELLS.jsonl [CELLS.jsonl ...] --out benchmarks/drift_attribution.json

Two institutions of 200 patients with two to six notes. A row turns one knob of the generator, or two at once. Evidence:
`text` has labels of the reference only, `gold` has labels of both institutions, `conventions` has in addition the other
institution's notes marked under both conventions. Rows with `concept` share the text of the row without it. The oracle
of a knob makes one test of the truth behind it: the generator's own style attributes, the true label, the closing line,
all marks; without gold, whether the notes state the condition at all.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from measuring import machine

from clinical_nlp.corpora.synthetic_hospitals import TARGET, GoldNote, generate
from clinical_nlp.runs import package_versions
from clinical_nlp.statistics.attribution import (
    LEVEL,
    Conventions,
    annotation_claim,
    attribute,
    label_slopes,
    text_scores,
)
from clinical_nlp.statistics.clinical_units import closing_lines, measure
from clinical_nlp.statistics.max_t import max_t_test
from clinical_nlp.statistics.permutation import PermutationPlan

KNOBS = ("covariate", "label", "concept", "spurious")
UNIT = {"covariate": "style", "label": "prevalence", "concept": "annotation", "spurious": "association"}
VALUES = (0.1, 0.25, 0.5, 0.75, 1.0)
ROWS: tuple[tuple[str, ...], ...] = ((), *((knob,) for knob in KNOBS), *combinations(KNOBS, 2))
PATIENTS, PERMUTATIONS, RESAMPLES, NONE_REPEATS = 200, 199, 100, 5


def main() -> None:
    """Run repeats of the simulation, or summarise what was run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    running = verbs.add_parser("run")
    running.add_argument("cells", type=Path)
    running.add_argument("--repeats", type=int, default=20)
    running.add_argument("--first-seed", type=int, default=0)
    running.add_argument("--minutes", type=float, default=math.inf, help="begin no repeat after that")
    summing = verbs.add_parser("summary")
    summing.add_argument("cells", type=Path, nargs="+")
    summing.add_argument("--out", type=Path)
    summing.add_argument("--note", default="", help="what a reader of the figures must know")
    arguments = parser.parse_args()
    if arguments.verb == "summary":
        rows = [json.loads(line) for path in arguments.cells for line in path.read_text("utf-8").splitlines()]
        text = json.dumps({"note": arguments.note, **summary(rows)}, indent=1) + "\n"
        if arguments.out is None:
            sys.stdout.write(text)
        else:
            arguments.out.write_text(text, "utf-8")
        return
    began = time.monotonic()
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.repeats):
        if time.monotonic() - began > 60 * arguments.minutes:
            break
        with arguments.cells.open("a", encoding="utf-8") as file:
            for row in repeat(seed):
                file.write(json.dumps(row) + "\n")
                file.flush()


def repeat(seed: int) -> Any:
    """Yield the cells of one repeat; concept leaves the text as it is, so that its cells share one with their twin."""
    for extra in range(NONE_REPEATS):
        yield from cells(1000 * (seed + 1) + extra, {}, 0.0)
    order = np.random.default_rng(seed).permutation(len(VALUES))  # a repeat that is cut short favours no value
    for number, value in ((int(i), VALUES[i]) for i in order):
        for place, row in enumerate(row for row in ROWS if row and row != ("concept",)):
            if len(row) == 2 and "concept" in row:
                continue
            yield from cells(1000 * (seed + 1) + 100 + 20 * number + place, dict.fromkeys(row, value), value)


def cells(seed: int, knobs: dict[str, float], value: float) -> Any:
    """Yield the result of one text, without another convention and, at each value of the knob, with it."""
    options: dict[str, Any] = {"institutions": 2, "patients": PATIENTS, "seed": seed, "covariate": 0.0} | knobs
    if "spurious" in knobs:  # the association changes one way in half of the repeats, the other way in the other
        options["spurious"] = [0.0, value] if seed % 2 else [value, 0.0]
    notes = list(generate(**options))
    found = analyse(notes, seed)
    yield {"seed": seed, "row": sorted(knobs), "knob": value, **found, "annotation": None}
    twins = [value] if value else [VALUES[seed % len(VALUES)]]
    for strength in twins:
        if len(knobs) > 1:
            continue
        marked = list(generate(**options, concept=strength))
        yield {
            "seed": seed,
            "row": sorted([*knobs, "concept"]),
            "knob": strength,
            **found,
            "annotation": conventions(notes, marked),
        }


def analyse(items: list[GoldNote], seed: int) -> dict[str, Any]:
    """Claims without and with gold, and the oracles' p-values."""
    notes = [item.note for item in items]
    plan = PermutationPlan(
        [note.patient_id for note in notes],
        [note.institution for note in notes],
        n_permutations=PERMUTATIONS,
        seed=seed,
    )
    measures, lines = measure(notes), closing_lines(notes)
    label = np.array([float(item.has_target) for item in items])
    at_home = np.where(plan.is_target[plan.note_patient], math.nan, label)
    logits = text_scores([note.text for note in notes], plan, at_home)
    claims = {}
    for evidence, known in (("text", at_home), ("gold", label)):
        answers = attribute(
            plan, measures, labels=known, label_name=TARGET, logits=logits, lines=lines, n_resamples=RESAMPLES
        )
        claims[evidence] = {claim.question: [claim.answer, claim.p_value] for claim in answers}
    names = sorted(items[0].style)
    columns, titles = [], []
    for name in names:
        drawn = [str(item.style[name]) for item in items]
        for choice in sorted(set(drawn)):
            columns.append([float(one == choice) for one in drawn])
            titles.append(f"{name}={choice}")
    marker = np.array([[float(item.marker)] for item in items])
    stated: dict[str, float] = {}
    for item in items:
        says = any(
            fact[5] == TARGET and fact[8:12] == ("present", "current", "actual", "patient") for fact in item.facts
        )
        stated[item.note.patient_id] = max(stated.get(item.note.patient_id, 0.0), float(says))
    states = np.array([[stated[note.patient_id]] for note in notes])
    oracles = {
        "style": max_t_test(np.array(columns).T, titles, plan).test.p_value,
        "prevalence": max_t_test(label[:, None], [TARGET], plan).test.p_value,
        "prevalence_text": max_t_test(states, ["stated"], plan).test.p_value,
        "association": max_t_test(label_slopes(marker, label, plan), ["closing line"], plan).test.p_value,
    }
    return {"claims": claims, "oracles": oracles}


def conventions(full: list[GoldNote], marked: list[GoldNote]) -> list[Any]:
    """The claim from the other institution's notes under both conventions, and the oracle's p-value on all marks."""
    other = full[-1].note.institution
    pairs = [(a, b) for a, b in zip(full, marked, strict=True) if a.note.institution == other]
    axes = ("present", "absent", "uncertain", "historical", "future", "hypothetical", "conditional", "family")
    counts = np.array(
        [[[sum(axis in span[8:12] for span in one.spans) for one in pair] for axis in axes] for pair in pairs]
    )
    people = [a.note.patient_id for a, _ in pairs]
    claim = annotation_claim(Conventions(people, counts, axes))
    totals = np.array([[[len(one.spans) for one in pair]] for pair in pairs])
    oracle = annotation_claim(Conventions(people, totals, ("all",)))
    return [claim.answer, claim.p_value, oracle.p_value]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Confusion matrices, power beside the oracles, and the machine."""
    result: dict[str, Any] = {
        "benchmark": "drift attribution",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(1),
        "packages": package_versions(),
        "protocol": {
            "patients_an_institution": PATIENTS, "knob_values": VALUES, "permutations": PERMUTATIONS,
            "resamples": RESAMPLES, "level": LEVEL, "seeds": sorted({row["seed"] for row in rows})[:1]
            + sorted({row["seed"] for row in rows})[-1:],
        },
        "confusion": {}, "power": {},
    }  # fmt: skip
    worst: dict[str, Any] = {}
    for evidence in ("text", "gold", "conventions"):
        table: dict[str, Any] = {}
        for names in ROWS:
            mine = [row for row in rows if tuple(row["row"]) == tuple(sorted(names))]
            mine = [row for row in mine if evidence != "conventions" or row["annotation"] or "concept" not in names]
            if mine:
                table["+".join(names) or "none"] = _claimed(mine, names, evidence)
        result["confusion"][evidence] = table
        cells = [
            (cell["claimed"], name, unit)
            for name, row in table.items()
            for unit, cell in row["units"].items()
            if not cell["true"]
        ]
        worst[evidence] = dict(zip(("rate", "row", "unit"), max(cells), strict=True)) if cells else None
    result["largest_off_diagonal"] = worst
    result["off_diagonal_over_all_texts"] = _pooled(rows)
    for evidence, knob in (
        ("gold", "covariate"), ("gold", "label"), ("gold", "spurious"), ("text", "covariate"), ("text", "label"),
        ("conventions", "concept"),
    ):  # fmt: skip
        result["power"][f"{evidence}: {UNIT[knob]}"] = _power(rows, evidence, knob)
    return result


def _pooled(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How often a unit that did not change is claimed, over all texts; each text once."""
    found: dict[str, Any] = {}
    for evidence in ("text", "gold"):
        for knob in ("covariate", "label", "spurious"):
            unchanged = [row for row in rows if knob not in row["row"] and "concept" not in row["row"]]
            k = sum(_answer(row, evidence, UNIT[knob]).startswith("changed") for row in unchanged)
            n = len(unchanged)
            found[f"{evidence}: {UNIT[knob]}"] = {"n": n, "claimed": k / n, "interval": _wilson(k, n)} if n else None
    return found


def _answer(row: dict[str, Any], evidence: str, unit: str) -> str:
    if unit == "annotation":
        return row["annotation"][0] if evidence == "conventions" and row["annotation"] else "cannot_tell"
    return str(row["claims"]["text" if evidence == "text" else "gold"][unit][0])


def _claimed(rows: list[dict[str, Any]], names: tuple[str, ...], evidence: str) -> dict[str, Any]:
    units = {}
    for knob in KNOBS:
        answers = [_answer(row, evidence, UNIT[knob]) for row in rows]
        n = len(answers)
        units[UNIT[knob]] = {
            "true": knob in names,
            "claimed": sum(answer.startswith("changed") for answer in answers) / n,
            "interval": _wilson(sum(answer.startswith("changed") for answer in answers), n),
            "cannot_tell": answers.count("cannot_tell") / n,
        }
    return {"n": len(rows), "units": units}


def _wilson(k: int, n: int) -> list[float]:
    z, p = 1.959964, k / n
    middle, reach = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, (middle - reach) / (1 + z * z / n)), min(1.0, (middle + reach) / (1 + z * z / n))]


def _power(rows: list[dict[str, Any]], evidence: str, knob: str) -> dict[str, Any]:
    mine = [row for row in rows if row["row"] == [knob]]
    oracle_of = {"label": "prevalence_text" if evidence == "text" else "prevalence"}.get(knob, UNIT[knob])
    found: dict[str, Any] = {}
    for value in (*VALUES, "all"):
        here = [row for row in mine if value == "all" or row["knob"] == value]
        if not here:
            continue
        ours = sum(_answer(row, evidence, UNIT[knob]).startswith("changed") for row in here)
        if knob == "concept":
            oracle = sum(row["annotation"][2] <= LEVEL for row in here)
        else:
            oracle = sum(row["oracles"][oracle_of] <= LEVEL for row in here)
        found[str(value)] = {
            "n": len(here),
            "power": ours / len(here),
            "oracle": oracle / len(here),
            "ratio": ours / oracle if oracle else math.nan,
        }
    return found


if __name__ == "__main__":
    main()
