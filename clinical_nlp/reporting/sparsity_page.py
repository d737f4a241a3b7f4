"""The page of the suite `sparsity`, from its `results.json`: what a missing part costs and who is served worse."""

from __future__ import annotations

from typing import Any

from clinical_nlp.reporting.page import Figure, Notice, Points, Section, Table, Text, interval, page
from clinical_nlp.reporting.plots import interval_plot, line_plot, number
from clinical_nlp.runs import Estimate

_NAN = float("nan")
_STATES = {"worse": "worse", "no worse": "no worse within the margin", "not shown": "not shown either way"}


def sparsity_page(results: dict[str, Any], judging: Section) -> str:
    """Render the results of `eval.sparsity`; they hold no note text, and neither does the page."""
    run, protocol = results["run"], results["protocol"]
    sections = [
        Section("What is shown", [*_verdict(results), Points(_limits(results))]),
        *_missing_text(results),
        _completeness(results),
        _groups(results),
        _method(results),
        judging,
    ]
    return page(
        "What if text is missing, and for whom?",
        sections,
        subtitle=f"Run {run['path']} ({run['recipe']}) on corpus {run['corpus']}",
        footer=f"clinical_nlp evaluate sparsity, protocol version {results['version']}, seed {protocol['seed']}; every "
        "number is also in results.json. No note text is shown. Not for clinical decisions.",
    )


def _or_nan(value: float | None) -> float:
    return _NAN if value is None else value


def _estimate(entry: dict[str, Any]) -> Estimate:
    return Estimate(_or_nan(entry["value"]), _or_nan(entry["low"]), _or_nan(entry["high"]), entry["n_patients"],
                    entry["n_notes"], entry["part"], entry["note"])  # fmt: skip


def _of(results: dict[str, Any], *kinds: str) -> list[dict[str, Any]]:
    return [found for found in results["findings"] if found["kind"] in kinds]


def _words(results: dict[str, Any], found: dict[str, Any]) -> str:
    entry = results["numbers"][found["number"]]
    said = f"{found['name'].replace('_', ' ')} ({number(entry['value'])}"
    return f"{said}, {interval(entry['low'], entry['high'])}; {entry['n_patients']} patients)"


def _verdict(results: dict[str, Any]) -> list[Notice]:
    whole = results["numbers"]["whole"]
    start = (
        f"Micro-F1 of {whole['n_patients']} held-out patients with all their text is {number(whole['value'])} "
        f"({interval(whole['low'], whole['high']) if whole['low'] is not None else whole['note']})."
    )
    notices = []
    topics = (
        ("Missing text", ("section", "note type", "share"), "The score falls without: "),
        ("Sparse patients", ("completeness",), "The least complete patients are served worse: "),
        ("Groups of patients", ("group",), "Served worse than all others: "),
    )
    for title, kinds, opening in topics:
        found = _of(results, *kinds)
        if not found:
            continue
        worse = [one for one in found if one["state"] == "worse"]
        unclear = sum(one["state"] == "not shown" for one in found)
        if worse:
            text, tone, heading = opening + "; ".join(_words(results, one) for one in worse) + ".", "bad", "worse"
        elif unclear:
            text = f"No loss beyond the margin is shown, and {unclear} of {len(found)} comparisons could hide one."
            tone, heading = "caution", "not shown either way"
            same = sum(results["numbers"][one["number"]]["note"] == "no prediction changed" for one in found)
            if same:
                text += f" In {same} of them no prediction changed; a model that says the same of everybody does that."
        else:
            text, tone, heading = "Every loss lies within the margin.", "good", "no worse within the margin"
        notices.append(Notice(text, tone, f"{title}: {heading}"))
    return [Notice(start, "plain"), *notices]


def _limits(results: dict[str, Any]) -> list[str]:
    margin = f"{results['protocol']['margin']:g}"
    points = [
        f"“Worse”: the whole 95 % interval lies above {margin}. “No worse”: it lies at or below. Nothing is corrected "
        f"for the {len(results['findings'])} comparisons: at a margin of 0, about one in forty that are alike is "
        "called worse by chance.",
        "Text was taken away after training. A model that was trained without it might do without it. "
        + (
            "Gold goes with the text that is taken away: scored is how well the rest is still read, the same spans "
            "before and after."
            if results["run"]["recipe"] == "ner"
            else "Gold is what the whole record says."
        ),
        "A gap between groups may come from sicker patients, shorter notes or other institutions; this does not tell "
        "them apart.",
    ]
    return points


def _missing_text(results: dict[str, Any]) -> list[Section]:
    found = _of(results, "section", "note type")
    shares = _of(results, "share")
    if not found and not shares:
        text = "No kind of section or note is frequent enough, and no share of the sections was asked for."
        return [Section("Without a part of the text", [Text(text)])]
    rows, drawn = [], []
    for one in found:
        loss = results["numbers"][one["number"]]
        left = results["numbers"][one["number"].removesuffix("loss") + "without"]
        name = one["name"].replace("_", " ")
        rows.append([one["kind"], name, _estimate(left), _estimate(loss), _STATES[one["state"]], loss["n_patients"],
                     loss["n_notes"]])  # fmt: skip
        drawn.append((name[:28], _or_nan(loss["value"]), _or_nan(loss["low"]), _or_nan(loss["high"])))
    blocks: list[Any] = []
    if drawn:
        plot = interval_plot(drawn, title="Loss without a part", x_label="micro-F1 lost, 95 % interval", reference=0.0)
        blocks.append(Figure(plot, "Hollow: no interval."))
        columns = [
            "kind",
            "left out",
            "micro-F1 without",
            "lost (95 % interval)",
            "",
            "patients",
            results["run"]["unit"] + "s",
        ]
        blocks.append(Table(columns, rows, "Only patients who have that part; the same ones with and without."))
    sections = [Section("Without a part of the text", blocks)] if blocks else []
    if shares:
        whole = results["numbers"]["whole"]
        line = [(0.0, _or_nan(whole["value"]))]
        rows = []
        for one in shares:
            loss = results["numbers"][one["number"]]
            left = results["numbers"][one["number"].removesuffix("loss") + "without"]
            line.append((float(one["name"].removesuffix(" %")), _or_nan(left["value"])))
            rows.append([one["name"], _estimate(left), _estimate(loss), _STATES[one["state"]], loss["n_patients"]])
        plot = line_plot({"micro-F1": line}, title="Score over missing sections", x_label="sections left out, %",
                         y_label="micro-F1")  # fmt: skip
        table = Table(
            ["left out", "micro-F1", "lost (95 % interval)", "", "patients"], rows, "Sections left out at random."
        )
        sections.append(Section("With fewer and fewer sections", [Figure(plot), table]))
    return sections


def _completeness(results: dict[str, Any]) -> Section:
    numbers = results["numbers"]
    rows, drawn = [], []
    for key, entry in numbers.items():
        if key.startswith("completeness.") and key != "completeness.gap":
            name = key.removeprefix("completeness.")
            rows.append([name, _estimate(entry), entry["n_patients"], entry["n_notes"]])
            drawn.append((name, _or_nan(entry["value"]), _or_nan(entry["low"]), _or_nan(entry["high"])))
    if not rows:
        return Section("By completeness", [Text(_why(results, "completeness"))])
    plot = interval_plot(drawn, title="Score by completeness", x_label="micro-F1, 95 % interval")
    table = Table(["kinds of section", "micro-F1 (95 % interval)", "patients", results["run"]["unit"] + "s"], rows,
                  "Patients by how many kinds of section their documents have on average.")  # fmt: skip
    blocks: list[Any] = [Figure(plot, "Hollow: no interval."), table]
    if gap := numbers.get("completeness.gap"):
        known = interval(gap["low"], gap["high"]) if gap["low"] is not None else gap["note"]
        said = f"{number(gap['value'])} ({known})"
        blocks.insert(0, Text(f"Most complete minus least complete: {said}, {gap['n_patients']} patients."))
    return Section("By completeness", blocks)


def _why(results: dict[str, Any], name: str) -> str:
    return f"Not measured: {results['missing'].get(name, 'nothing to compare')}."


def _groups(results: dict[str, Any]) -> Section:
    rows, drawn = [], []
    for one in _of(results, "group"):
        gap = results["numbers"][one["number"]]
        own = results["numbers"][one["number"].removesuffix(".gap")]
        rows.append([one["name"], _estimate(own), _estimate(gap), _STATES[one["state"]], own["n_patients"],
                     own["n_notes"]])  # fmt: skip
        drawn.append((one["name"][:28], _or_nan(gap["value"]), _or_nan(gap["low"]), _or_nan(gap["high"])))
    blocks: list[Any] = []
    if drawn:
        plot = interval_plot(drawn, title="Gaps", x_label="others minus group, 95 % interval", reference=0.0)
        columns = ["group", "micro-F1", "others minus group", "", "patients", results["run"]["unit"] + "s"]
        blocks = [
            Figure(plot, "To the right: served worse than all others. Hollow: no interval."),
            Table(columns, rows),
        ]
    notes = [f"{name}: {reason}." for name, reason in results["missing"].items()]
    return Section(
        "By group of patients", [*blocks, *([Points(notes)] if notes else [])] or [Text("No group was compared.")]
    )


def _method(results: dict[str, Any]) -> Section:
    protocol = results["protocol"]
    rows: list[tuple[str, Any]] = [
        ("score", protocol["metric"]),
        ("split", protocol["split"]),
        ("chosen", protocol["selection"]),
        ("scored", f"{protocol['n_patients']} patients, {protocol['n_units']} {results['run']['unit']}s"),
        ("shown", f"groups of at least {protocol['smallest_cell']} patients"),
        ("margin", f"{protocol['margin']:g}"),
    ]
    return Section("How it was measured", [Table([], rows)])
