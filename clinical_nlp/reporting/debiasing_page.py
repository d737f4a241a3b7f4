"""The page of the suite `debiasing`, from its `results.json`: what can be read first, then what that rests on."""

from __future__ import annotations

from typing import Any

from clinical_nlp.reporting.page import Figure, Notice, Points, Section, Table, Text, interval, p_text, page
from clinical_nlp.reporting.plots import interval_plot, line_plot, number, point_plot
from clinical_nlp.runs import Estimate

_NAN = float("nan")
_PROBES = {
    "linear": "a linear probe",
    "quadratic": "a quadratic probe",
    "mlp": "a small neural network",
    "neighbours": "nearest neighbours",
    "words": "TF-IDF of the text",
}
_SHORT = {"linear": "linear", "quadratic": "quadratic", "mlp": "network", "neighbours": "neighbours", "words": "TF-IDF"}
_STATES = {
    "readable": ("bad", "the institution can be read"),
    "not shown": ("caution", "not shown either way"),
    "not readable": ("good", "no probe reads the institution beyond the margin"),
}
_SHAPES = {"plateau": "plateau", "rising": "still rises", "not shown": "plateau not shown"}


def debiasing_page(results: dict[str, Any], judging: Section) -> str:
    """Render the results of `eval.debiasing`; they hold no note text, and neither does the page."""
    protocol, corpus = results["protocol"], results["corpus"]
    sections = [
        Section("What can be read", [*_verdicts(results), Points(_limits(results))]),
        *_utility(results),
        *(_curves(results, name) for name in ("raw", *results["erasers"])),
        _table(results),
        _other_views(results),
        _method(results),
        judging,
    ]
    places = ", ".join(protocol["institutions"])
    return page(
        "What of the institution is left in the vectors?",
        sections,
        subtitle=f"Corpus {corpus['name']}: {places if len(places) < 160 else str(len(protocol['institutions']))}; "
        f"{protocol['representation']}",
        footer=f"clinical_nlp evaluate debiasing, protocol version {results['version']}, seed {protocol['seed']}; "
        "every number is also in results.json. No note text is shown. Not for clinical decisions.",
    )


def _name(name: str) -> str:
    return {"raw": "Raw vectors", "text": "The text itself"}.get(name, f"After {name}")


def _value(entry: dict[str, Any]) -> str:
    low, high = entry["low"], entry["high"]
    interval_words = f"95 % interval {interval(low, high)}" if low is not None else f"no interval: {entry['note']}"
    return f"AUC {number(_or_nan(entry['value']))} ({interval_words})"


def _or_nan(value: float | None) -> float:
    return _NAN if value is None else value


def _verdicts(results: dict[str, Any]) -> list[Any]:
    notices: list[Any] = []
    for name, verdict in results["verdicts"].items():
        tone, words = _STATES[verdict["state"]]
        found = {
            kind: results["numbers"][f"leakage.{name}.{kind}"]
            for kind in _PROBES
            if f"leakage.{name}.{kind}" in results["numbers"]
        }
        if verdict["strongest"] is None:
            text = next(iter(found.values()))["note"].capitalize() + ": nothing can be told from them."
        else:
            best = verdict["strongest"]
            text = (
                f"Of two patients whom it has not seen, one of each place, {_PROBES[best]} tells which is which with "
                f"{_value(found[best])}; 0.5 is guessing."
            )
            if name != "raw" and best != "linear" and "linear" in found:
                text += f" A linear probe: {_value(found['linear'])}."
            if any(results["curves"][f"leakage.{name}.{kind}"]["shape"] != "plateau" for kind in found):
                text += " Some curves are not shown to have ended; more patients might read more."
        if name == "leace" and results["floor"]:
            floor = results["floor"]
            text += (
                f" With {floor['n_patients']} patients to fit it in {floor['dimensions']} dimensions, LEACE cannot be "
                f"expected below {number(floor['auc'])} for a linear probe with unlimited patients."
            )
        notices.append(Notice(text, tone, f"{_name(name)}: {words}"))
    return notices


def _limits(results: dict[str, Any]) -> list[str]:
    limit = number(0.5 + results["protocol"]["margin"])
    points = [
        f"“Can be read”: the whole 95 % interval of some probe lies above {limit}. “No probe reads it”: those of all "
        "probes lie at or below it and every curve has reached its plateau. A probe that finds nothing does not show "
        "that there is nothing; another one might.",
        "Intervals are for these trained probes and other patients of these institutions. They say nothing about "
        "another institution, and nothing is corrected for looking at several figures.",
    ]
    if results["erasers"]:
        names = ", ".join(results["erasers"])
        points.append(f"{names}: ways of taking the institution out of the vectors, fitted on other patients.")
    if len(results["protocol"]["institutions"]) > 2:
        points.append("With more than two institutions, the AUC is the mean over institutions of one against the rest.")
    return points


def _utility(results: dict[str, Any]) -> list[Section]:
    label = results["protocol"]["label"]
    if label is None:
        text = "No task label was given or found, so what erasing costs was not measured; set the config key label."
        return [Section("What it costs", [Notice(text, "caution")])]
    points = results["path"]
    front = [point["name"] for point in points if point["on_front"]]
    plot = point_plot(
        [(point["name"], point["leakage"], point["utility"]) for point in points],
        title="Leakage of the institution against usefulness for the task",
        x_label="leakage: AUC of the strongest probe for the institution",
        y_label=f"usefulness: AUC for {label}",
        joined=front,
    )
    rows = []
    for point in points:
        useful = results["numbers"][f"utility.{point['name']}"]
        within = results["numbers"].get(f"utility_within.{point['name']}")
        rows.append(
            [
                point["name"],
                point["leakage"],
                _SHORT[point["probe"]],
                _estimate(useful),
                _estimate(within) if within else "–",
                useful["n_patients"],
                "yes" if point["on_front"] else "",
            ]
        )
    columns = [
        "vectors",
        "leakage",
        "strongest probe",
        "AUC for the task",
        "within institutions",
        "patients",
        "on the front",
    ]
    caption = (
        "Solid: on the front, where nothing leaks less without being less useful; hollow: beaten. “inlp 4” takes four "
        "directions away. Leakage is the largest of several probes and has no interval of its own; those of each probe "
        "stand below. “Within institutions” compares patients of one institution, so that prevalence does not help."
    )
    return [
        Section(
            "What it costs", [Figure(plot, caption), Table(columns, rows, f"Task: {label}, a label of the patient.")]
        )
    ]


def _estimate(entry: dict[str, Any]) -> Estimate:
    return Estimate(_or_nan(entry["value"]), _or_nan(entry["low"]), _or_nan(entry["high"]), entry["n_patients"],
                    entry["n_notes"], entry["part"], entry["note"])  # fmt: skip


def _curves(results: dict[str, Any], name: str) -> Section:
    found = {
        _SHORT[kind]: results["curves"][f"leakage.{name}.{kind}"]
        for kind in _PROBES
        if f"leakage.{name}.{kind}" in results["curves"]
    }
    plot = line_plot(
        {
            kind: [(p["n_train_patients"], _or_nan(p["auc"]["value"])) for p in curve["points"]]
            for kind, curve in found.items()
        },
        title=f"AUC over probe patients, {_name(name).lower()}",
        x_label="patients that the probe was trained on",
        y_label="AUC for the institution, 0.5 is chance",
    )
    rows = []
    for kind, curve in found.items():
        for point in curve["points"]:
            auc, last = _estimate(point["auc"]), point is curve["points"][-1]
            rows.append([kind, point["n_train_patients"], auc, auc.n_patients, auc.n_notes, p_text(point["p_value"]),
                         _SHAPES[curve["shape"]] if last else ""])  # fmt: skip
    columns = ["probe", "patients trained on", "AUC (95 % interval)", "patients scored", "notes", "p", "curve"]
    return Section(f"{_name(name)}: curves", [Figure(plot) if plot else Text("No curve."), Table(columns, rows)])


def _table(results: dict[str, Any]) -> Section:
    rows, drawn = [], []
    for key, entry in results["numbers"].items():
        kind, _, rest = key.partition(".")
        if kind not in ("leakage", "given_label"):
            continue
        name, _, probe = rest.rpartition(".")
        what = f"{_name(name)}, {_SHORT[probe]}"
        rows.append([what, "given the label" if kind == "given_label" else "", _estimate(entry),
                     entry["n_patients"], entry["n_notes"], p_text(entry["p_value"])])  # fmt: skip
        if kind == "leakage":
            drawn.append((what, _or_nan(entry["value"]), _or_nan(entry["low"]), _or_nan(entry["high"])))
    plot = interval_plot(
        drawn, title="AUC of each probe", x_label="AUC for the institution, 95 % interval", reference=0.5
    )
    columns = ["vectors and probe", "", "AUC (95 % interval)", "patients", "notes", "p"]
    caption = (
        "“Given the label” compares patients alike in the task label only: where prevalence differs, the label itself "
        "tells the institution, and that is no style. p: patients relabelled, the probe as it was trained."
    )
    return Section(
        "Every probe beside the others", [Figure(plot, "Hollow: no valid interval."), Table(columns, rows, caption)]
    )


def _other_views(results: dict[str, Any]) -> Section:
    blocks: list[Any] = []
    if results["compression"]:
        rows = [
            [
                _name(name),
                one["bits"],
                one["uniform_bits"],
                one["compression"],
                interval(one["low"], one["high"]),
                one["n_patients"],
            ]
            for name, one in results["compression"].items()
        ]
        columns = ["vectors", "bits a patient", "without vectors", "compression", "range over orders", "patients"]
        caption = (
            "Online code length: how many bits tell someone who has the vectors where each patient is from. "
            "Compression 1: the vectors say nothing. The range is over orders of the patients, no confidence interval."
        )
        blocks.append(Table(columns, rows, caption))
    control = []
    for key, entry in results["numbers"].items():
        if key.startswith("control."):
            real, probe = results["numbers"][key.replace("control.", "leakage.")], key.rpartition(".")[2]
            difference = _or_nan(real["value"]) - _or_nan(entry["value"])
            control.append([_SHORT[probe], _estimate(real), _estimate(entry), difference, entry["n_patients"]])
    if control:
        columns = ["probe", "institution", "control", "difference", "patients"]
        caption = (
            "Control: a meaningless label, a random function of template lines that recur among the patients trained "
            "on and scored. A probe that reads it well reads templates; what it reads beyond that is the difference."
        )
        blocks.append(Table(columns, control, caption))
    pairs = [
        [_name(key.split(".", 2)[1]), key.split(".", 2)[2].replace("|", " and "), _estimate(entry), entry["n_patients"]]
        for key, entry in results["numbers"].items()
        if key.startswith("pair.")
    ]
    if pairs:
        blocks.append(Table(["vectors", "institutions", "AUC, linear", "patients"], pairs, "Fresh two-way probes."))
    missing = [f"{key}: {reason}." for key, reason in results["missing"].items()]
    if missing:
        blocks += [Text("Not measured:"), Points(missing)]
    return Section("Other views", blocks or [Text("Nothing further was measured.")])


def _method(results: dict[str, Any]) -> Section:
    protocol, corpus = results["protocol"], results["corpus"]
    rows: list[tuple[str, Any]] = [
        ("vectors", protocol["representation"]),
        ("institution", corpus["institution_means"]),
        ("patients", ", ".join(f"{name} {count}" for name, count in corpus["n_patients"].items())),
        ("split", protocol["split"]),
        *(
            (f"patients, {name}", f"{count} ({protocol['n_notes'][name]} notes)")
            for name, count in protocol["n_patients"].items()
        ),
        ("chosen", protocol["selection"]),
        ("null", f"{protocol['n_permutations']} relabellings of the scored patients"),
    ]
    for name, one in results["erasers"].items():
        said = [f"{one['n_directions']} directions taken away"]
        said += [f"shrinkage {number(one['shrinkage'])}"] if one["shrinkage"] else []
        rows.append((name, "; ".join([*said, *([one["note"]] if one["note"] else [])])))
    if floor := results["floor"]:
        rows.append(
            ("floor of LEACE", f"Φ(√(2 d deff / n)) = {number(floor['auc'])}; d = {floor['dimensions']}, "
             f"n = {floor['n_notes']} notes, deff = {number(floor['design_effect'])}, intra-patient correlation "
             f"{number(floor['icc'])}")
        )  # fmt: skip
    return Section("How it was measured", [Table([], rows)])
