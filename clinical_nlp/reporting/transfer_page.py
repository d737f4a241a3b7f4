"""The page of the suite `transfer`, from its `results.json`: what is a problem first, then what that rests on."""

from __future__ import annotations

from typing import Any

from clinical_nlp.reporting.page import Figure, Notice, Points, Section, Table, Text, interval, page
from clinical_nlp.reporting.plots import interval_plot, line_plot, number

_NAN = float("nan")
_TITLES = {
    "forgetting": "Forgetting",
    "negative_transfer": "Negative transfer",
    "overfitting": "Overfitting",
    "learning_curve": "Too few labels",
}
_TONES = {"problem": "bad", "not shown": "caution", "no problem": "good", "not measured": "plain"}
_STATES = {
    "problem": "a problem",
    "not shown": "not shown either way",
    "no problem": "no problem within the margin",
    "not measured": "not measured",
}
_BEGINNINGS = {
    "without_dapt": "the same training without dapt",
    "head": "training the head alone",
    "random": "the same training from random weights",
}
_SCORES = {"logme": "LogME", "h_score": "H-score", "leep": "LEEP"}


def transfer_page(results: dict[str, Any], judging: Section) -> str:
    """Render the results of `eval.transfer`; they hold no note text, and neither does the page."""
    run, protocol = results["run"], results["protocol"]
    sections = [Section("What is a problem", [*_verdicts(results), _not_claimed(results)])]
    builders = (_forgetting, _negative_transfer, _overfitting, _learning_curve, _ranking)
    sections += [section for build in builders if (section := build(results)) is not None]
    sections += [_trainings(results), _method(results), judging]
    return page(
        "Did the transfer work?",
        sections,
        subtitle=f"Run {run['path']} ({run['recipe']}, {run['strategy']}) on corpus {run['corpus']}, from "
        f"{run['base_model']}",
        footer=f"clinical_nlp evaluate transfer; seed {protocol['seed']}; every number is also in results.json with "
        "its protocol, split and selection. No note text is shown. Not for clinical decisions.",
    )


def _verdicts(results: dict[str, Any]) -> list[Any]:
    notices: list[Any] = []
    if results["run"]["recipe"] == "ner" and not results["run"]["score"]:
        text = "It finds no entity of new patients. What follows compares trainings that taught nothing; train longer."
        notices.append(Notice(text, "bad", "The run has learnt nothing"))
    states = {title: results["verdicts"][part]["state"] for part, title in _TITLES.items()}
    summary = []
    for state, words in _STATES.items():
        titles = [title for title, found in states.items() if found == state]
        if titles:
            summary.append(f"{words[0].upper()}{words[1:]}: {', '.join(titles).lower()}.")
    notices.append(Text(" ".join(summary)))
    for part, title in _TITLES.items():
        verdict = results["verdicts"][part]
        several = sum(found["state"] != "not measured" for found in verdict["findings"]) > 1
        text = " ".join(_sentence(part, found, results, several) for found in verdict["findings"])
        notices.append(Notice(text, _TONES[verdict["state"]], f"{title}: {_STATES[verdict['state']]}"))
    rules = [(title, _rule(part, results["verdicts"][part]["rule"], results)) for part, title in _TITLES.items()]
    return [*notices, Table([], rules, "The rule of each verdict.")]


def _rule(part: str, rule: str, results: dict[str, Any]) -> str:
    margins = results["protocol"]["margins"]
    if part == "overfitting" and results["run"]["recipe"] == "dapt":
        rule = rule.replace("{gap:g}", "{gap_percent:g} %")
    return rule.format(**margins, **{f"{name}_percent": 100 * value for name, value in margins.items()})


def _not_claimed(results: dict[str, Any]) -> Points:
    points = [
        "“A problem”: the whole 95 % interval lies beyond the margin. “No problem within the margin”: the whole "
        "interval lies on the harmless side of it. “Not shown either way”: the interval lies on both, or there are too "
        "few patients for one; more patients would decide it. Nothing is corrected for looking at several figures.",
        "The intervals are about other patients like those scored here. They say nothing about another institution.",
    ]
    if not results["protocol"]["notes_verified"]:
        points.append("The run does not record which notes it read, so it was not checked that these are the same.")
    return Points(points)


def _sentence(part: str, found: dict[str, Any], results: dict[str, Any], several: bool) -> str:
    what = found["comparison"]
    if found["state"] == "not measured":
        name = {
            "perplexity": "Source perplexity: not measured, because ",
            "task": "Source task: not measured, because ",
            "without_dapt": "Against the base without dapt: not measured, because ",
            "head": "Against the head alone: not measured, because ",
            "random": "Against random weights: not measured, because ",
            "development": "Development patients: not measured, because ",
        }.get(what, f"At {what} %: " if what[:1].isdigit() else "Not measured, because ")
        return f"{name}{found['reason'].rstrip('.')}."
    shown = [results["numbers"][name] for name in found["numbers"]]
    if part == "forgetting" and what == "perplexity":
        before, after, ratio = shown
        text = f"{_kind(ratio)} of source notes {_moved(before, after)}: {_percent(ratio)}, {_people(ratio)}"
    elif part == "forgetting":
        before, after, loss = shown
        text = (
            f"Score of the earlier task {_moved(before, after)} with its own head on the new weights: "
            f"{_difference(loss, 'lost', 'gained')}, {_people(loss)}"
        )
    elif part == "negative_transfer":
        own = results["numbers"]["negative_transfer.run.f1_strict"]
        other, harm = shown
        better = _difference(harm, "better than the run", "worse than the run")
        text = (
            f"{_BEGINNINGS[what].capitalize()}: F1 {number(other['value'])} where the run has {number(own['value'])}; "
            f"{better}, {_people(harm)}"
        )
    elif part == "overfitting":
        train, new, gap = shown
        if results["run"]["recipe"] == "dapt":
            text = (
                f"{_kind(train)} is {number(train['value'])} on training and {number(new['value'])} on new patients; "
                f"after / before is {number(gap['value'])} times as high on new as on training patients "
                f"({_interval(gap)}), {_people(gap)}"
            )
        else:
            text = (
                f"F1 is {number(train['value'])} on training and {number(new['value'])} on new patients: "
                f"{_difference(gap, 'lower', 'higher')}, {_people(gap)}"
            )
    else:
        over_seeds, over_patients = shown
        text = (
            f"The last step of the curve: F1 {_difference(over_seeds, 'gained', 'lost')} over seeds, "
            f"{_difference(over_patients, 'gained', 'lost')} over {_people(over_patients)}"
        )
    return f"{text}: {_STATES[found['state']]}." if several else f"{text}."


def _moved(before: dict[str, Any], after: dict[str, Any]) -> str:
    return f"{number(before['value'])} before and {number(after['value'])} after"


def _kind(entry: dict[str, Any]) -> str:
    return "Pseudo-perplexity" if entry["protocol"].startswith("pseudo") else "Perplexity"


def _interval(entry: dict[str, Any]) -> str:
    if entry["low"] is None:
        return f"no interval: {entry['note'] or 'none is valid'}"
    return f"95 % interval {interval(entry['low'], entry['high'])}"


def _percent(ratio: dict[str, Any]) -> str:
    if ratio["value"] is None:
        return "undefined"
    words = [f"{100 * (x - 1):+.1f} %".replace("-", "−") for x in (ratio["value"], ratio["low"], ratio["high"]) if x]
    return f"{words[0]} ({words[1]} to {words[2]})" if len(words) == 3 else f"{words[0]} ({_interval(ratio)})"


def _difference(entry: dict[str, Any], positive: str, negative: str) -> str:
    value, low, high = (entry[key] for key in ("value", "low", "high"))
    if value is None:
        return f"undefined ({entry['note']})"
    word = f"{number(abs(value))} {positive if value > 0 else negative}" if value else "no difference"
    if low is None:
        return f"{word} ({_interval(entry)})"
    low, high = (low, high) if value >= 0 else (-high, -low)
    return f"{word} ({interval(low, high)})"


def _people(entry: dict[str, Any]) -> str:
    return f"{entry['n_patients']} patients"


_COLUMNS = ["", "value", "95 % interval", "patients", "notes", "part", "remark"]


def _row(label: str, entry: dict[str, Any]) -> list[Any]:
    value = _NAN if entry["value"] is None else float(entry["value"])
    return [
        label,
        value,
        interval(entry["low"], entry["high"]),
        entry["n_patients"],
        entry["n_notes"],
        entry["part"],
        entry["note"],
    ]


def _point(label: str, entry: dict[str, Any]) -> tuple[str, float, float, float]:
    value, low, high = (_NAN if entry[key] is None else float(entry[key]) for key in ("value", "low", "high"))
    return label, value, low, high


def _table(results: dict[str, Any], rows: list[tuple[str, str]], caption: str = "") -> Table | None:
    shown = [_row(label, results["numbers"][name]) for label, name in rows if name in results["numbers"]]
    return Table(_COLUMNS, shown, caption) if shown else None


def _section(heading: str, blocks: list[Any]) -> Section | None:
    kept = [block for block in blocks if block is not None and not (isinstance(block, Figure) and not block.svg)]
    return Section(heading, kept) if kept else None


def _forgetting(results: dict[str, Any]) -> Section | None:
    numbers = results["numbers"]
    known = next((numbers[name] for name in numbers if name.startswith("forgetting.")), None)
    rows = [
        ("source perplexity before", "forgetting.perplexity_before"),
        ("source perplexity after", "forgetting.perplexity_after"),
        ("after / before", "forgetting.perplexity_ratio"),
        ("source task before", "forgetting.task_before"),
        ("source task after", "forgetting.task_after"),
        ("before − after", "forgetting.task_difference"),
    ]
    caption = f"Protocol: {known['protocol']}. Source: {known['split']}." if known else ""
    return _section("Forgetting: what was measured", [_table(results, rows, caption)])


def _negative_transfer(results: dict[str, Any]) -> Section | None:
    numbers, part = results["numbers"], "negative_transfer"
    rows = [("the run", f"{part}.run.f1_strict")]
    differences = []
    for name, words in _BEGINNINGS.items():
        rows += [(words, f"{part}.{name}.f1_strict"), ("… minus the run", f"{part}.{name}.difference")]
        if f"{part}.{name}.difference" in numbers:
            short = {"without_dapt": "without dapt", "head": "head alone", "random": "random weights"}[name]
            differences.append(_point(short, numbers[f"{part}.{name}.difference"]))
    plot = interval_plot(
        differences,
        title="Other beginnings minus the run",
        x_label="F1 of the other minus F1 of the run",
        reference=0.0,
    )
    figure = Figure(plot, "Right of the line the other beginning is better. Hollow: no valid interval.")
    if not differences:
        return None
    caption = "Same notes, split, seed and settings. Differences resample the same patients for both."
    return _section("Negative transfer: what was measured", [figure, _table(results, rows, caption)])


def _overfitting(results: dict[str, Any]) -> Section | None:
    numbers = results["numbers"]
    names = {"train": "training patients", "development": "development patients", "new": "new patients"}
    points = [
        _point(label, numbers[f"overfitting.{name}"])
        for name, label in names.items()
        if f"overfitting.{name}" in numbers
    ]
    reading = results["run"]["recipe"] == "dapt"
    plot = interval_plot(points, title="Scores by part", x_label="perplexity" if reading else "strict micro-F1")
    rows = [(label, f"overfitting.{name}") for name, label in names.items()]
    sign = "gain lost, new to {}" if reading else "{} − new"
    rows += [(sign.format(name), f"overfitting.gap_{name}") for name in ("train", "development")]
    caption = "Gaps are between different patients; their interval is made from the two."
    return _section("Overfitting: what was measured", [Figure(plot), _table(results, rows, caption)])


def _learning_curve(results: dict[str, Any]) -> Section | None:
    numbers, part = results["numbers"], "learning_curve."
    points = [(name, entry) for name, entry in numbers.items() if name.startswith(part) and "scores" in entry]
    if not points:
        return None
    points.sort(key=lambda pair: pair[1]["n_training_patients"])
    rows, marks = [], []
    for name, entry in points:
        label = f"{name.removeprefix(part)} %: {entry['n_training_patients']} patients"
        rows.append([*_row(label, entry)[:-1], ", ".join(number(score) for score in entry["scores"])])
        marks.append(_point(label, entry))
    seeds = max(len(entry["scores"]) for _, entry in points)
    series = {
        f"seed {seed + 1}": [
            (float(entry["n_training_patients"]), float(entry["scores"][seed]))
            for _, entry in points
            if seed < len(entry["scores"]) and entry["scores"][seed] is not None
        ]
        for seed in range(min(seeds, 4))
    }
    lines = line_plot(series, title="Learning curve", x_label="training patients", y_label="strict micro-F1")
    means = interval_plot(marks, title="Mean over seeds", x_label="strict micro-F1, mean over seeds")
    gains = [("last step, over seeds", f"{part}gain_seeds"), ("last step, over patients", f"{part}gain_patients")]
    columns = [*_COLUMNS[:3], "patients scored", "notes", "part", "each seed"]
    return _section(
        "Too few labels: the learning curve",
        [
            Figure(lines, "Each seed draws its own patients; smaller shares lie inside larger ones."),
            Figure(means, "Mean over seeds with Student's interval over seeds. Hollow: one seed, no interval."),
            Table(
                columns, rows, "The same new patients are scored everywhere; training took as many steps everywhere."
            ),
            _table(results, gains, "Gain of the last step of the curve."),
        ],
    )


def _ranking(results: dict[str, Any]) -> Section | None:
    ranking = results["ranking"]
    if not ranking:
        return None
    numbers, rows = results["numbers"], []
    for index, candidate in enumerate(ranking["candidates"]):
        cells: list[Any] = ["random weights" if candidate["random"] else candidate["name"]]
        for score in (*_SCORES, "truth"):
            entry = numbers.get(f"ranking.{index}.{score}")
            cells.append(
                "–" if entry is None else f"{number(entry['value'])} ({interval(entry['low'], entry['high'])})"
            )
        rows.append(cells)
    names = [row[0] for row in rows]
    points = [_agreement(found, names, numbers) for found in ranking["agreement"]]
    smallest = min((found["smallest_p"] for found in ranking["agreement"]), default=None)
    if smallest is not None and smallest > 0.05:
        points.append(
            f"With {ranking['agreement'][0]['n_candidates']} candidates chance alone gives a perfect order in "
            f"{100 * smallest / 2:.0f} of 100 cases, so agreement here is no evidence that a score works; that takes "
            "five candidates or more."
        )
    missing: dict[str, list[str]] = {}
    for name, candidate in zip(names, ranking["candidates"], strict=True):
        for score, reason in candidate["reasons"].items():
            what = _SCORES.get(score, "the score after training")
            missing.setdefault(f"{what} is not measured, because {reason.rstrip('.')}", []).append(name)
    points += [f"{reason} ({', '.join(whose)})." for reason, whose in missing.items()]
    strategy = "the head alone" if ranking["truth"] == "head" else "the run's own strategy"
    caption = (
        "95 % intervals in brackets. Higher is better everywhere; scores are comparable down a column only. Last "
        f"column: strict micro-F1 on new patients after training with {strategy}."
    )
    table = Table(["candidate", *_SCORES.values(), "after training"], rows, caption)
    return Section("Would the best base model have been found before training?", [table, Points(points)])


def _agreement(found: dict[str, Any], names: list[str], numbers: dict[str, Any]) -> str:
    score, chosen, best = _SCORES[found["score"]], names[found["chosen"]], names[found["best"]]
    if found["tau"] is None:
        return f"{score}: all candidates tie before or after training, so there is no order to compare."
    order = f"Kendall's τ {number(found['tau'])} over {found['n_candidates']} candidates"
    if chosen == best:
        return f"{score} puts {chosen} first, which also scored best after training; {order}."
    regret = numbers[f"ranking.{found['score']}.regret"]
    return (
        f"{score} puts {chosen} first; after training {best} scored best, "
        f"{_difference(regret, 'more', 'less')}; {order}."
    )


def _trainings(results: dict[str, Any]) -> Section:
    rows = [
        [
            entry["name"],
            entry["base_model"],
            entry["strategy"],
            entry["seed"],
            entry["n_training_patients"],
            "–" if entry["steps"] is None else entry["steps"],
            entry["reason"],
        ]
        for entry in results["trainings"]
    ]
    if not rows:
        return Section("Trainings", [Points(["Nothing was trained again."])])
    columns = ["training", "from", "strategy", "seed", "patients", "steps", "not done, because"]
    limits = results["protocol"]["limits"]
    return Section("Trainings", [Table(columns, rows, f"Each in a folder of its name; {limits}.")])


def _method(results: dict[str, Any]) -> Section:
    protocol = results["protocol"]
    points = [
        f"Split: {protocol['split']}.",
        f"Weights that are scored: {protocol['selection']}.",
        f"Score: {protocol['metric']}. Unit: the patient; intervals resample patients with all their notes, and "
        "comparisons resample the same patients on both sides.",
        "Gaps between different patients: the two intervals combined by Zou and Donner's square-and-add method.",
        "Forgetting: both sides are loaded as the run loads its base (4-bit or not), so that the figure is the "
        "training's and not the quantisation's.",
    ]
    if results["run"]["recipe"] == "ner":
        points += [
            "Random weights: the architecture's own initialisation under the run's strategy. Where that moves an "
            "adapter alone, the random weights below it stay as they are.",
            "Learning curve: every share trains for as many steps as the whole, so fewer patients are seen more often.",
            "LogME (You et al. 2021), H-score with shrinkage (Bao et al. 2019; Ibrahim et al. 2022) and LEEP (Nguyen "
            "et al. 2020) on a sample of words, about as many of each patient; all sampled words weigh alike.",
        ]
    return Section("How", [Points(points)])
