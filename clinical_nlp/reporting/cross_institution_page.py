"""The page of the suite `cross_institution`, from its `results.json`: what holds first, then what that rests on."""

from __future__ import annotations

from typing import Any

from clinical_nlp.reporting.page import Figure, Notice, Points, Section, Table, Text, interval, p_text, page
from clinical_nlp.reporting.plots import heat_table, interval_plot, number

_NAN = float("nan")
_LABELS = {
    "erm": "erm (nothing asked)",
    "erm_reseeded": "control: erm, other seeds",
    "constant": "control: the same for every note",
    "erm_size_matched": "erm, as few patients as in-domain",
    "in_domain": "in-domain, as many patients",
    "style_masked": "ceiling: given sentences taken out",
    "lp_ft": "head first, then all (lp_ft)",
    "institution_token": "erm with an institution token",
    "self_training": "self-training",
    "tent": "erm, norm layers moved by the notes to be read",
}


def cross_institution_page(results: dict[str, Any], judging: Section) -> str:
    """Render the results of `eval.cross_institution`; they hold no note text, and neither does the page."""
    corpus, label = results["corpus"], results["label"]
    sections = [Section("Does it hold at the next institution?", [*_verdicts(results), _not_claimed(results)])]
    for table in results["targets"]:
        sections.append(_held_out(results, table, f"held_out.{table['target']}"))
        if tuned := table.get("fine_tuned"):
            sections.append(_held_out(results, {**table, **tuned}, f"fine_tuned.{table['target']}"))
    sections += [_matrix(results), _temporal(results), _flow(results), _method(results), judging]
    return page(
        "Across institutions",
        sections,
        subtitle=f"Corpus {corpus['name']} (institution: {corpus['institution_means'].rstrip('.')}); told of each "
        f"note: whether its encounter has {label['system']} code {label['code']}",
        footer=f"clinical-nlp evaluate cross_institution, protocol version {results['version']}",
    )


def _name(method: str) -> str:
    if method in _LABELS:
        return _LABELS[method]
    if method.startswith("few_labels_"):
        return f"{method.removeprefix('few_labels_')} target patients with labels"
    if method.endswith("_target"):
        return f"{method.removesuffix('_target')} with unlabelled target notes"
    return "what source patients chose" if method == "chosen" else method


def _entry(results: dict[str, Any], name: str) -> dict[str, Any]:
    empty = {"value": None, "low": None, "high": None, "n_patients": 0, "n_notes": 0, "note": "not measured"}
    found: dict[str, Any] = results["numbers"].get(name, empty)
    return found


def _short(entry: dict[str, Any]) -> str:
    """A cell: the value with its interval, without the reason where there is none."""
    known = entry["low"] is not None
    return f"{number(entry['value'])} ({interval(entry['low'], entry['high'])})" if known else number(entry["value"])


def _said(entry: dict[str, Any]) -> str:
    if entry["value"] is None:
        return entry["note"] or "undefined"
    known = entry["low"] is not None
    return f"{number(entry['value'])} ({interval(entry['low'], entry['high']) if known else entry['note']})"


def _verdicts(results: dict[str, Any]) -> list[Notice]:
    found = []
    tables = [(f"held_out.{table['target']}", table) for table in results["targets"]]
    tables += [
        (f"fine_tuned.{table['target']}", {**table, **table["fine_tuned"]})
        for table in results["targets"]
        if table.get("fine_tuned")
    ]
    for prefix, table in tables:
        target, tuned = table["target"], prefix.startswith("fine_tuned.")
        drop, source = _entry(results, f"{prefix}.target_drop"), _entry(results, f"{prefix}.source_drop")
        shown = drop["low"] is not None and drop["low"] > 0
        claims = [row for row in table["rows"] if row.get("verdict") in ("higher", "lower")]
        helped = [row["name"] for row in claims if row["verdict"] == "higher" and row["tier"] not in _ASIDE]
        harmed = [row["name"] for row in claims if row["verdict"] == "lower" and row["tier"] not in _ASIDE]
        made = f"{table['base_model']}, fine-tuned" if tuned else "A model trained"
        words = [
            f"{made} at {', '.join(table['sources'])} scores AUC {_said(_entry(results, f'{prefix}.erm'))} on "
            f"{table['n_patients']} patients ({table['n_notes']} notes) of {target}; its AUC at home minus that: "
            f"{_said(source)}. A model of as many of {target}'s own patients minus it: {_said(drop)}; "
            f"{'a drop is shown' if shown else 'no drop is shown'}.",
            f"Better than plain training (erm): {', '.join(map(_name, helped))}."
            if helped
            else "Nothing is shown to be better than plain training (erm).",
        ]
        if harmed:
            words.append(f"Worse: {', '.join(map(_name, harmed))}.")
        control: dict[str, Any] = next((row for row in table["rows"] if row["name"] == "erm_reseeded"), {})
        alarm = control.get("p_seeds") is not None and control["p_seeds"] <= results["protocol"]["level"]
        if alarm:
            words.append(
                "The control failed: erm with other seeds differs from erm, so a difference of that size means nothing."
            )
        tone = "caution" if alarm or (shown and helped) else "bad" if shown else "plain"
        state = (
            "the control failed" if alarm else "a model from elsewhere scores lower" if shown else "no drop is shown"
        )
        if helped and not alarm:
            state += "; some methods score higher"
        found.append(Notice(" ".join(words), tone, f"{target}{', fine-tuned' if tuned else ''}: {state}"))
    return found


_ASIDE = ("reference", "control")


def _not_claimed(results: dict[str, Any]) -> Points:
    count = len({entry["institution"] for entry in results["flow"]})
    points = [
        "Better and worse are said only where both the seeds (exact permutation, Holm) and the patients (interval) "
        "show it; a difference between two trained models alone (last column) says nothing of their methods.",
        "Intervals are of new patients and new seeds, with the training patients as they are; other training patients "
        "would move the scores further.",
        "A recovery is given only where a target drop is shown; a share of nothing has no meaning.",
    ]
    if count < 6:
        points.append(f"With {count} institutions nothing is said of institutions in general.")
    return Points(points)


def _held_out(results: dict[str, Any], table: dict[str, Any], prefix: str) -> Section:
    rows, points, undefined = [], [], []
    for row in table["rows"]:
        name = row["name"]
        score, contrast = _entry(results, f"{prefix}.{name}"), _entry(results, f"{prefix}.{name}.minus_erm")
        recovery = _entry(results, f"{prefix}.{name}.recovery")
        if name != "erm" and recovery["value"] is None and recovery["note"] not in undefined:
            undefined.append(recovery["note"])
        low, high = (_NAN if score[key] is None else score[key] for key in ("low", "high"))
        points.append((_name(name), _NAN if score["value"] is None else score["value"], low, high))
        rows.append(
            [
                row["tier"],
                _name(name),
                _short(score),
                "" if name == "erm" else _short(contrast),
                "" if name == "erm" else _short(recovery),
                _p(row, "p_seeds"),
                _p(row, "p_holm"),
                _p(row, "p_models"),
                row.get("verdict", ""),
            ]
        )
    erm = _entry(results, f"{prefix}.erm")["value"]
    plot = interval_plot(
        points, title=f"AUC at {table['target']}", x_label="AUC at the held-out institution", reference=erm
    )
    columns = [
        "sees of the target",
        "method",
        "AUC",
        "minus erm",
        "recovery",
        "p (seeds)",
        "Holm",
        "p (two models)",
        "",
    ]
    weights = ", ".join(f"{name} {weight:g}" for name, weight in table["weights"].items())
    missing = [
        f"{_name(name.removeprefix(prefix + '.'))}: {reason}"
        for name, reason in results["missing"].items()
        if name.startswith(prefix + ".")
    ]
    tuned = prefix.startswith("fine_tuned.")
    return Section(
        f"Held out: {table['target']}" + (f", fine-tuned ({table['strategy']})" if tuned else ""),
        [
            Figure(plot, "Mean over seeds, 95 % interval over patients and seeds. The line marks erm."),
            Table(
                columns,
                rows,
                f"{table['n_patients']} patients, {table['n_notes']} notes, the same in every row"
                + (f". No recovery: {'; '.join(undefined)}" if undefined else ""),
            ),
            Text(
                f"Trained on {table['n_training_patients']} patients of {', '.join(table['sources'])}; the tiers with "
                f"target data draw on {table['n_adaptation_patients']} other patients of {table['target']}. Chosen by "
                f"{results['protocol']['selection']} on source patients: {_name(table['chosen'])}"
                + (f"; weights, in multiples of the default: {weights}." if weights else ".")
            ),
            *([Points(missing)] if missing else []),
        ],
    )


def _p(row: dict[str, Any], key: str) -> str:
    return p_text(row[key]) if row.get(key) is not None else ""


def _matrix(results: dict[str, Any]) -> Section:
    names = sorted({entry["institution"] for entry in results["flow"]})
    rows = [[name, *(_said(_entry(results, f"matrix.{name}.{other}")) for other in names)] for name in names]
    drops = [
        [source, target, *(_said(_entry(results, f"{kind}_drop.{source}.{target}")) for kind in ("source", "target"))]
        for source in names
        for target in names
        if source != target
    ]
    drawn = {(one, two): _entry(results, f"matrix.{one}.{two}")["value"] for one in names for two in names}
    plot = heat_table(
        names,
        {pair: value for pair, value in drawn.items() if value is not None},
        title="AUC of each institution's model at each institution",
        x_label="scored on",
        y_label="trained on",
    )
    return Section(
        "Each institution on each other",
        [
            Figure(plot, "AUC of erm with as many patients each. The darker, the higher; the diagonal is at home."),
            Table(["trained on", *(f"scored on {name}" for name in names)], rows, "AUC of erm, sizes matched"),
            Table(
                ["trained on", "scored on", "source drop", "target drop"],
                drops,
                "Source drop: at home minus there; a hard institution has one too. Target drop: a model of the "
                "institution's own patients minus this one.",
            ),
        ],
    )


def _temporal(results: dict[str, Any]) -> Section:
    if reason := results["missing"].get("temporal"):
        return Section("Over time", [Text(f"Not measured: {reason}.")])
    entries = [(name, _entry(results, f"temporal.{name}")) for name in ("early", "recent", "drop")]
    words = {"early": "trained on early patients", "recent": "trained on as many late ones", "drop": "drop"}
    rows = [[words[name], _said(entry), entry["n_patients"], entry["n_notes"]] for name, entry in entries]
    split = entries[0][1].get("split", "")
    return Section("Over time", [Table(["erm", "AUC on late patients", "patients", "notes"], rows, split)])


def _flow(results: dict[str, Any]) -> Section:
    columns = ["institution", "patients that are", "patients", "notes", "notes with the code", "first", "last"]
    keys = ("institution", "part", "n_patients", "n_notes", "n_with_label", "first", "last")
    return Section(
        "Patients and notes", [Table(columns, [[row[key] or "–" for key in keys] for row in results["flow"]])]
    )


def _method(results: dict[str, Any]) -> Section:
    protocol = results["protocol"]
    reason = f" ({protocol['selection_reason']})" if protocol["selection_reason"] else ""
    return Section(
        "Protocol",
        [
            Points(
                [
                    f"Metric: {protocol['metric']}.",
                    f"Evaluation protocol: {protocol['evaluation']}.",
                    f"Selection criterion: {protocol['selection']}{reason}; weights and objective were fixed on "
                    "training patients of the other institutions.",
                    f"Features: {protocol['features']['encoder']}, frozen; {protocol['features']['steps']} steps of an "
                    f"adapter and a head on them; {protocol['seeds']} seeds of each method, no seed shared.",
                    *_fine_tuning(protocol.get("fine_tuning")),
                    f"Control: {protocol['control']}. Multiplicity: {protocol['multiplicity']}, at "
                    f"{protocol['level']:g}.",
                ]
            )
        ],
    )


def _fine_tuning(tuning: dict[str, Any] | None) -> list[str]:
    if tuning is None:
        return []
    steps = f"{tuning['epochs']:g} epochs" + (f", at most {tuning['max_steps']} steps" if tuning["max_steps"] else "")
    return [
        f"Fine-tuned: {tuning['base_model']}, {tuning['strategy']} (lp_ft: all weights), {steps}, {tuning['n_seeds']} "
        f"seeds of each method; the first {tuning['max_tokens']} tokens of a note are read (at most "
        f"{tuning['notes_cut']} notes of a training and its scoring are longer). Same patients and tests as above."
    ]
