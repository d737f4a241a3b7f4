"""The page of the suite `calibration`, from its `results.json`: whether the probabilities hold, then what shows it."""

from __future__ import annotations

from typing import Any

from clinical_nlp.reporting.page import Figure, Notice, Points, Section, Table, Text, interval, p_text, page
from clinical_nlp.reporting.plots import interval_plot, line_plot, number, point_plot
from clinical_nlp.runs import Estimate

_NAN = float("nan")
_EVERYWHERE = "all institutions"


def calibration_page(results: dict[str, Any], judging: Section) -> str:
    """Render the results of `eval.calibration`; they hold no note text, and neither does the page."""
    protocol, about = results["protocol"], results["about"]
    places = list(results["bins"])
    sections = [
        Section(
            "Do the probabilities hold?", [*(_verdict(results, place) for place in places), Points(_limits(results))]
        ),
        _reliability(results, places),
        _net_benefit(results, places),
        _sets(results, places),
        _abstention(results),
        _numbers(results, places),
        _method(results),
        judging,
    ]
    return page(
        "Can the probabilities be acted on?",
        sections,
        subtitle=f"{about['what']}; an item is {about['item']}",
        footer=f"clinical_nlp evaluate calibration, protocol version {results['version']}, seed {protocol['seed']}; "
        "every number is also in results.json. No note text is shown. Not for clinical decisions.",
    )


def _or_nan(value: float | None) -> float:
    return _NAN if value is None else value


def _estimate(entry: dict[str, Any]) -> Estimate:
    return Estimate(_or_nan(entry["value"]), _or_nan(entry["low"]), _or_nan(entry["high"]), entry["n_patients"],
                    entry["n_notes"], entry["part"], entry["note"])  # fmt: skip


def _with_interval(entry: dict[str, Any]) -> str:
    if entry["value"] is None:
        return f"not known ({entry['note']})"
    words = f"95 % interval {interval(entry['low'], entry['high'])}" if entry["low"] is not None else entry["note"]
    return f"{number(entry['value'])} ({words})"


def _verdict(results: dict[str, Any], place: str) -> Notice:
    numbers = results["numbers"]
    error, slope, level = (numbers[f"{place}.given.{name}"] for name in ("ece", "slope", "intercept"))
    covered = numbers[f"{place}.coverage"]
    found, tone = [], "plain"  # that nothing is shown is no proof
    if error["p_value"] is None:
        heading, tone = "too few patients to tell", "caution"
    elif error["p_value"] > 0.05:
        heading = "no miscalibration is shown"
    else:
        heading, tone = "the probabilities are off", "bad"
    if slope["high"] is not None and slope["high"] < 1:
        found.append(f"They are too extreme: slope {_with_interval(slope)}, where 1 is right.")
    elif slope["low"] is not None and slope["low"] > 1:
        found.append(f"They are too timid: slope {_with_interval(slope)}, where 1 is right.")
    if level["low"] is not None and level["low"] > 0:
        found.append(f"The outcome is commoner than they say: intercept {_with_interval(level)}, where 0 is right.")
    elif level["high"] is not None and level["high"] < 0:
        found.append(f"The outcome is rarer than they say: intercept {_with_interval(level)}, where 0 is right.")
    if error["p_value"] is not None:
        found.insert(
            0,
            f"They miss the frequencies by {number(100 * error['value'])} points on average; a calibrated model of so "
            f"many patients would show {number(100 * error['null_mean'])} (p = {p_text(error['p_value'])}, "
            f"{error['n_patients']} patients).",
        )
    else:
        found.insert(0, f"{error['n_patients']} patients: {error['note']}.")
    promised = 1 - results["protocol"]["miss"]
    if covered["high"] is not None and covered["high"] < promised:
        tone = "bad"
        found.append(
            f"Sets that promise to hold the right answer in {number(100 * promised)} % of items hold it in "
            f"{number(100 * covered['value'])} % ({interval(100 * covered['low'], 100 * covered['high'])})."
        )
    found.append(_worth(results, place))
    return Notice(" ".join(found), tone, f"{'All institutions' if place == _EVERYWHERE else place}: {heading}")


def _worth(results: dict[str, Any], place: str) -> str:
    better = [
        point["threshold"]
        for point in results["net_benefit"][place]
        if point["model"]["low"] is not None and point["model"]["low"] > 0 and (point["over_treat_all"]["low"] or 0) > 0
    ]
    if not better:
        return "At no decision threshold is acting on them shown to be better than acting on everybody and on nobody."
    listed = ", ".join(f"{t:g}" for t in better)
    return f"Acting on them is shown to be better than acting on everybody and on nobody at thresholds {listed}."


def _limits(results: dict[str, Any]) -> list[str]:
    points = [
        "“Off”: p at most 0.05 that patients of a calibrated model are so far off. “No miscalibration is shown” is no "
        "proof; see the intervals. Nothing is corrected for looking at several institutions.",
        "An institution whose patients did not calibrate has no promise: coverage there is what it happens to be.",
    ]
    if results["hidden"]:
        points.append(
            f"Not shown alone, fewer than {results['protocol']['smallest_cell']} patients: {len(results['hidden'])} "
            "institutions."
        )
    return points


def _reliability(results: dict[str, Any], places: list[str]) -> Section:
    blocks: list[Any] = []
    for place in places[:5]:
        points = [("", one["said"], one["seen"]) for one in results["bins"][place]]
        plot = point_plot(
            points, title=f"Reliability, {place}", x_label="probability said", y_label="frequency seen", diagonal=True
        )
        if plot:
            blocks.append(
                Figure(plot, f"{place}: one dot a bin of at least 11 patients; on the dashed line they agree.")
            )
    rows = [
        [place, one["said"], one["seen"], one["n_patients"], one["n_items"]]
        for place in places
        for one in results["bins"][place]
    ]
    columns = ["where", "said", "seen", "patients", "items"]
    protocol = results["protocol"]
    few = f"None of {protocol['n_bins']} bins has {protocol['smallest_cell']} patients; ask for fewer (n_bins)."
    blocks.append(Table(columns, rows, "No interval a bin; see slope and intercept.") if rows else Text(few))
    return Section("Said and seen", blocks)


def _net_benefit(results: dict[str, Any], places: list[str]) -> Section:
    blocks: list[Any] = []
    for place in places[:5]:
        found = results["net_benefit"][place]
        lines = {
            "acting on them": [(p["threshold"], _or_nan(p["model"]["value"])) for p in found],
            "on everybody": [(p["threshold"], max(-0.1, _or_nan(p["treat_all"]["value"]))) for p in found],
            "on nobody": [(p["threshold"], 0.0) for p in found],
        }
        plot = line_plot(
            lines, title=f"Net benefit, {place}", x_label="decision threshold", y_label="net benefit an item"
        )
        blocks.append(Figure(plot, f"{place}. Acting on everybody is cut off at −0.1."))
    rows = [
        [place, p["threshold"], _estimate(p["model"]), _estimate(p["treat_all"]), _estimate(p["over_treat_all"]),
         _estimate(p["avoided"]), p["model"]["n_patients"]]
        for place in places
        for p in results["net_benefit"][place]
    ]  # fmt: skip
    columns = ["where", "threshold", "acting on them", "on everybody", "difference", "spared of 100", "patients"]
    caption = (
        "Hits minus false alarms, weighed by the odds of the threshold, for each item; acting on nobody gives 0. "
        "“Spared of 100”: items on which one need not act, at equal benefit, compared with acting on everybody. Bands "
        "resample patients."
    )
    return Section("Is it worth acting on them?", [*blocks, Table(columns, rows, caption)])


def _sets(results: dict[str, Any], places: list[str]) -> Section:
    rows, drawn = [], []
    promised = 1 - results["protocol"]["miss"]
    for place in places:
        covered, size = (results["numbers"][f"{place}.{name}"] for name in ("coverage", "set_size"))
        more = results["coverage"][place]
        people = covered["n_patients"]
        rows.append([place, _estimate(covered), _estimate(size), more["empty"], more["undecided"], people])
        drawn.append((place, _or_nan(covered["value"]), _or_nan(covered["low"]), _or_nan(covered["high"])))
    label = "share of items whose set holds the right answer"
    plot = interval_plot(drawn, title="Coverage by institution", x_label=label, reference=promised)
    columns = [
        "where",
        "coverage",
        "outcomes a set",
        "share of empty sets",
        "share of undecided sets",
        "patients",
    ]
    caption = (
        f"Sets promise the right answer in {number(100 * promised)} % of the items of new patients like the "
        f"{results['sets']['n_patients']} that they were made on."
    )
    blocks: list[Any] = [Figure(plot, f"Dashed: {promised:g}, as promised.") if plot else Text("Nothing to draw.")]
    if results["sets"]["note"]:
        blocks.append(Notice(results["sets"]["note"], "caution"))
    blocks.append(Table(columns, rows, caption))
    return Section("Sets that cannot be ruled out", [*blocks, *_shifted_sets(results, places)])


def _shifted_sets(results: dict[str, Any], places: list[str]) -> list[Any]:
    """Sets for institutions where the outcome may be commoner or rarer, under the assumption that they stand on."""
    found = {place: results["shifted"][place] for place in places if place in results.get("shifted", {})}
    if not found:
        return []
    rows, absent = [], []
    for place, one in found.items():
        if one["reason"]:
            absent.append(f"{place}: {one['reason']}.")
            continue
        covered, size = (results["numbers"][f"{place}.{name}_shifted"] for name in ("coverage", "set_size"))
        fits = "" if one["contradicted_p"] is None else p_text(one["contradicted_p"])
        share = _estimate(one["prevalence"])
        rows.append([place, share, _estimate(covered), _estimate(size), one["undecided"], fits, covered["n_patients"]])
    columns = [
        "where",
        "how common, estimated without gold",
        "coverage",
        "outcomes a set",
        "share of undecided sets",
        "p that the assumption fits",
        "patients",
    ]
    assumption = next((one["assumption"] for one in found.values() if not one["reason"]), "")
    caption = (
        "Sets made for an institution's own prevalence, which is estimated from its notes without gold. They keep the "
        f"promise if {assumption}; a small p contradicts that, a large one says nothing."
    )
    return [*([Table(columns, rows, caption)] if rows else []), *([Points(absent)] if absent else [])]


def _abstention(results: dict[str, Any]) -> Section:
    found = results["abstention"]
    lines = {
        place: [(100 * p["share"], 100 * _or_nan(p["error"]["value"])) for p in reversed(points)]
        for place, points in list(found.items())[:4]
    }
    plot = line_plot(lines, title="Errors among what is answered", x_label="answered, % of items", y_label="wrong, %")
    rows = [
        [place, 100 * p["share"], _estimate(p["error"]), p["error"]["n_patients"], p["error"]["n_notes"]]
        for place, points in found.items()
        for p in points
    ]
    columns = ["where", "answered, %", "share that is wrong", "patients", "items"]
    return Section("Answering only what is sure", [Figure(plot) if plot else Text("No curve."), Table(columns, rows)])


def _numbers(results: dict[str, Any], places: list[str]) -> Section:
    rows, parts = [], []
    for key, entry in results["numbers"].items():
        for how, words in (("given", "as they are"), ("temperature", "temperature"), ("dropout", "dropout passes")):
            marker = f".{how}."
            if marker not in key:
                continue
            place, _, name = key.rpartition(marker)
            extra = ""
            if name == "ece":
                extra = f"excess {number(entry['excess'])}, p {p_text(entry['p_value'])}"
            rows.append([place, words, name, _estimate(entry), extra, entry["n_patients"], entry["n_notes"]])
            if name == "brier":
                parts.append([place, words, *(entry[part] for part in ("score", "reliability", "resolution",
                              "uncertainty", "within")), entry["n_patients"]])  # fmt: skip
    columns = ["where", "probabilities", "measure", "value (95 % interval)", "", "patients", "notes"]
    caption = (
        "ece: its excess over a calibrated model counts. slope: 1 is right. intercept: 0 is right. Patients weigh 1."
    )
    more = [
        "where",
        "probabilities",
        "Brier score",
        "reliability",
        "resolution",
        "uncertainty",
        "within bins",
        "patients",
    ]
    note = (
        "score = reliability − resolution + uncertainty + within bins; small reliability and large resolution are good."
    )
    return Section("All figures", [Table(columns, rows, caption), Table(more, parts, note)])


def _method(results: dict[str, Any]) -> Section:
    protocol, about, temperature = results["protocol"], results["about"], results["temperature"]
    rows: list[tuple[str, Any]] = [("split", protocol["split"]), ("chosen", protocol["selection"])]
    rows += [
        (f"{part} part", f"{protocol['n_patients'][part]} patients, {protocol['n_notes'][part]} notes or documents, "
         f"{protocol['n_items'][part]} items")
        for part in ("calibration", "test")
    ]  # fmt: skip
    places = len(protocol["calibration_institutions"])
    rows.append(("calibrated at", f"{places} institution{'s' if places > 1 else ''}"))
    if about["left_out"]:
        words = f"{about['left_out']} items of a probability below {protocol['at_least']:g}"
        rows.append(("left out", words))
    if about["model"]:
        rows.append(("probabilities", about["model"]))
    said = number(temperature["value"]) + (f"; {temperature['note']}" if temperature["note"] else "")
    rows.append(("temperature", f"{said}, fitted on {temperature['n_patients']} patients"))
    return Section("How it was measured", [Table([], rows)])
