"""The page of a drift analysis, from its `results.json`: the answer first, then what it rests on."""

from __future__ import annotations

from typing import Any

from clinical_nlp.reporting.page import Figure, Notice, Points, Section, Table, Text, interval, p_text, page
from clinical_nlp.reporting.plots import line_plot, null_plot, number

_NAN = float("nan")
_NAMES = {
    "domain_classifier": "Telling notes apart",
    "mmd": "Text as a whole",
    "length": "Length of notes",
    "vocabulary": "Words used",
    "vocabulary_kl": "Words used (directed)",
    "units": "Clinical units",
    "utilisation": "Notes a patient",
    "mlp_classifier": "Telling notes apart, by a small neural network",
    "coral": "Covariance of the text (CORAL)",
    "frechet": "Mean and covariance of the text (Fréchet)",
    "length_psi": "Population stability of words a note",
}
_UNITS = {
    "domain_classifier": "AUC, 0.5 is chance",
    "mmd": "null s.d. beyond shuffled patients",
    "length": "times as many words a note",
    "vocabulary": "bits a token beyond shuffled patients",
    "vocabulary_kl": "bits a token beyond shuffled patients",
    "units": "largest |t| of all units",
    "utilisation": "times as many notes a patient",
    "mlp_classifier": "AUC, 0.5 is chance",
    "coral": "null s.d. beyond shuffled patients",
    "frechet": "null s.d. beyond shuffled patients",
    "length_psi": "index beyond shuffled patients",
}
_SHOWN_INSTITUTIONS = 25
_SHOWN_UNITS = 12
_SHOWN_PLACES = 4
_QUESTIONS = {
    "style": "Is it written differently?",
    "prevalence": "Is the label more or less common?",
    "association": "Does style go with the label in another way?",
    "annotation": "Do annotators follow another convention?",
    "outputs": "Does the model say other things?",
    "loss": "Is the model differently often wrong?",
}
_ANSWERS = {"changed": "yes", "changed_if": "yes, if", "not_found": "not found", "cannot_tell": "cannot tell"}


def drift_page(results: dict[str, Any], judging: Section) -> str:
    """Render the results of `recipes.drift`; they hold no note text, and neither does the page."""
    comparisons = results["comparisons"]
    answers: list[Any] = [_answer(item) for item in comparisons]
    advised: dict[tuple[str, ...], list[str]] = {}
    for item in comparisons:
        advised.setdefault(tuple(item["advice"]), []).append(item["other"])
    for advice, others in advised.items():
        if advice:
            answers += [Text(f"What to do about {', '.join(others)}:"), Points(advice)]
    sections = [Section("The answer", answers)]
    sections.append(Section("What may be claimed, and what not", [Points(_claims(results))]))
    sections.append(_over_time(results))
    for item in comparisons:
        sections.append(_units(item, results["protocol"]))
        sections.append(_questions(item))
        sections.append(_details(item, results["protocol"]))
    sections = [section for section in sections if section.blocks]
    sections += [_compared(results), _method(results), judging]
    names = f"{results['reference']} against " + ", ".join(item["other"] for item in comparisons)
    protocol = results["protocol"]
    return page(
        f"Do the notes differ {'over time' if protocol['window'] != 'none' else 'between institutions'}?",
        sections,
        subtitle=names if len(names) < 200 else f"{results['reference']} against {len(comparisons)} others",
        footer=f"clinical_nlp drift; seed {protocol['seed']}; every number is also in results.json. No note text is "
        f"shown, and nothing that fewer than {protocol['smallest_cell']} patients share.",
    )


def _tests(item: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {test["name"]: test for test in item[item["basis"]]}


def _answer(item: dict[str, Any]) -> Notice:
    pair, tests = f"{item['other']} and {item['reference']}", _tests(item)
    if item["verdict"] == "too_few":
        if item["note"]:
            said = f"No test can be made: {item['note']}."
            return Notice(said, "caution", f"{pair}: nothing to compare within")
        smallest = item["smallest_p"]
        attainable = (
            f"With these patients no p-value can fall below {p_text(smallest)}. "
            if smallest and tests
            else "No test can be made with fewer than two patients on a side. "
        )
        return Notice(
            f"At least 12 patients are needed in each institution, and {item['n_patients_together']} are there in all. "
            f"{attainable}{_power(item)}The measurements below describe these patients; they say neither that the "
            "institutions differ nor that they are alike.",
            "caution",
            f"{pair}: too few patients to tell",
        )
    pairs = _pairs_told(item, tests.get("domain_classifier"))
    if item["verdict"] == "not_distinguished":
        n_tests = {2: "two", 4: "four", 5: "five"}.get(len(item["adjusted_p"]), str(len(item["adjusted_p"])))
        return Notice(
            f"{pairs} None of the {n_tests} tests finds a difference beyond chance. That is not proof that they are "
            f"alike: a difference too small for this number of patients would look the same. {_power(item)}".strip(),
            "plain",
            f"{pair}: no difference found",
        )
    named = [unit for unit in item["units"] if unit["adjusted_p"] <= 0.05]
    changed = [_change(unit) for unit in named[:5]]
    if len(named) > 5:
        changed.append(f"and {len(named) - 5} more")
    said = f"{pairs} {' '.join(_differences(item, tests, bool(named)))}".strip()
    return Notice(said, "bad", f"{pair}: the notes differ", changed)


def _power(item: dict[str, Any]) -> str:
    """What so many patients can show, and how many would do."""
    power = item["power"]
    if power is None or power["found_now"] is None:
        return ""
    difference = f"a difference of AUC {number(power['effect'])}"
    found = f"With these patients {difference} would be found with a chance of {100 * power['found_now']:.0f} %"
    if power["found_now"] >= power["power"]:
        return f"{found}. "
    enough = f"{power['patients_needed']:,.0f}".replace(",", "\u202f")
    return f"{found}; about {enough} in each institution would find it with {100 * power['power']:.0f} %. "


def _pairs_told(item: dict[str, Any], auc: dict[str, Any] | None) -> str:
    if auc is None:
        return ""
    share = 100 * auc["effect"]
    right = "more than 99" if share > 99 else f"{share:.0f}"
    return (
        f"Given one note each of a patient of {item['other']} and of a patient of {item['reference']} that it has not "
        f"seen before, a simple classifier tells which is which in {right} of 100 pairs (50 would be "
        f"guessing; AUC {number(auc['effect'])}, "
        + (auc["note"] if auc["low"] is None else f"95 % interval {interval(auc['low'], auc['high'])}")
        + ")."
    )


def _differences(item: dict[str, Any], tests: dict[str, dict[str, Any]], units_follow: bool) -> list[str]:
    adjusted = item["adjusted_p"]
    said = []
    if not units_follow and (adjusted.get("length") or 1) <= 0.05:
        length = tests["length"]
        said.append(
            f"Notes of {item['other']} have {number(length['effect'])} times as many words "
            f"({interval(length['low'], length['high'])})."
        )
    if (adjusted.get("vocabulary") or 1) <= 0.05:
        words = tests["vocabulary"]
        said.append(
            f"Their words diverge by {number(words['effect'])} bits a token beyond what shuffling patients gives."
        )
    found = [_NAMES[name].lower() for name, p in adjusted.items() if p is not None and p <= 0.05]
    said.append(f"Beyond chance: {', '.join(found)}.")
    if units_follow:
        said.append(f"What changed most from {item['reference']} to {item['other']}:")
    return said


def _change(unit: dict[str, Any]) -> str:
    """One unit as a phrase: what it is, from how much to how much."""
    before, after = _side(unit, "reference"), _side(unit, "other")
    return f"{unit['name'][0].lower()}{unit['name'][1:]} from {before} to {after} {unit['unit']}"


def _side(unit: dict[str, Any], side: str) -> str:
    return f"about {number(unit['usual'])}" if unit[side] is None else number(unit[side])


def _claims(results: dict[str, Any]) -> list[str]:
    verdicts = {item["verdict"] for item in results["comparisons"]}
    points = []
    if "differ" in verdicts:
        points.append(
            "May be claimed: the notes of these patients differ between the two institutions by more than shuffling "
            "whole patients explains, by the amounts measured below."
        )
        points.append(
            "Not shown: that a model does worse there. Text that differs a lot can be harmless and a small shift can "
            "hurt; score the model on labelled notes of both institutions before relying on it."
        )
        points.append(
            "Not shown: why. Style, templates, note types, patients, period and how the export was made all move the "
            "text. What the evidence says about causes stands below as answers to questions; without labelled notes of "
            "both institutions most of them cannot be answered."
        )
        points += _mixes(results)
    if "not_distinguished" in verdicts:
        points.append(
            "May be claimed where no difference was found: these tests, with this many patients, did not tell the "
            "notes apart. Not shown: that the institutions are alike."
        )
    if "too_few" in verdicts:
        points.append(
            "Nothing may be claimed where there are too few patients. Add patients, or compare at a coarser level "
            "(another --institution-from)."
        )
    points.append(_further(results))
    points.append(f"“Institution” here means: {results['account']['institution_means'].rstrip('.')}.")
    return points


def _further(results: dict[str, Any]) -> str:
    """What this says about institutions that were not compared."""
    coming = results.get("new_institution")
    if coming is None:
        return "The statement is about these institutions; nothing here is about hospitals that were not compared."
    return (
        f"For one more institution, the AUC against {results['reference']} would lie between {number(coming['low'])} "
        f"and {number(coming['high'])} (95 % prediction interval from {coming['n']} institutions, taken as a sample of "
        f"those that could come). No p-value over institutions is given; that needs {coming['needed']}."
    )


def _mixes(results: dict[str, Any]) -> list[str]:
    """Where the mix of note types explains a difference as well as style does, say so."""
    if results["protocol"]["strata"] != "none":
        return []
    shares = {row["name"]: row.get("note_types") or {} for row in results["institutions"]}
    ours, points = shares.get(results["reference"], {}), []
    for item in results["comparisons"]:
        theirs = shares.get(item["other"], {})
        gaps = {kind: abs(ours[kind] - theirs[kind]) for kind in ours if kind in theirs}
        widest = max(gaps, key=lambda kind: (gaps[kind], kind), default=None)
        if item["verdict"] == "differ" and widest is not None and gaps[widest] > 0.1:
            points.append(
                f"{item['other']} and {results['reference']} mix note types differently ({widest}: "
                f"{100 * theirs[widest]:.0f} % and {100 * ours[widest]:.0f} % of a patient's notes). To see what is "
                "left beyond that, run again with --strata profile."
            )
    return points


def _over_time(results: dict[str, Any]) -> Section:
    """Windows of time as looks, and the units that moved most over them."""
    looks = results.get("looks") or []
    found = {item["other"]: item for item in results["comparisons"]}
    rows = [
        [
            look["other"],
            found[look["other"]]["n_patients"][1],
            p_text(look["p_value"]),
            p_text(look["adjusted_p"]),
            "alarm" if look["alarm"] else look["note"] or "no alarm",
        ]
        for look in looks
    ]
    if not rows:
        return Section("Over time", [])
    places = list(dict.fromkeys(look["other"].rpartition(" ")[0] for look in looks))
    figures: list[Any] = []
    for place in places[:_SHOWN_PLACES]:
        windows = [look["other"] for look in looks if look["other"].rpartition(" ")[0] == place]
        plot = _units_over_windows(results["reference"], windows, found)
        caption = "The clinical units that moved most. Beyond 2 or so is more than chance for one unit."
        if plot:
            figures.append(Figure(plot, f"{place}: {caption}" if len(places) > 1 else caption))
    share = looks[0]["spends"]
    caption = (
        f"Every look may spend {100 * share:.2g} of the 5 % that a year has, so that a year without drift has at most "
        f"0.05 false alarms on average. All are compared with {results['reference']}."
    )
    columns = ["window", "patients", "p of the look", "p, counted per year", ""]
    return Section("Over time", [*figures, Table(columns, rows, caption)])


def _units_over_windows(reference: str, windows: list[str], found: dict[str, dict[str, Any]]) -> str:
    moved: dict[str, dict[int, float]] = {}
    for at, window in enumerate(windows, 1):
        for unit in found[window]["units"] if found[window]["verdict"] != "too_few" else ():
            if unit["t"] is not None:
                moved.setdefault(unit["name"], {})[at] = unit["t"]
    size = {name: max(map(abs, values.values())) for name, values in moved.items()}
    lines = {
        _short(name): [(0.0, 0.0), *((float(at), t) for at, t in moved[name].items())]
        for name in sorted(size, key=lambda name: (-size[name], name))[:4]
    }
    return line_plot(
        lines,
        title="Clinical units over time",
        x_label="window",
        y_label=f"standard errors from {reference}" if len(reference) < 40 else "standard errors from the reference",
        x_names=[window.rpartition(" ")[2] for window in (reference, *windows)],
    )


def _units(item: dict[str, Any], protocol: dict[str, Any]) -> Section:
    """What changed, in units that a reader knows, ranked."""
    heading = f"{item['other']} against {item['reference']}: what changed, in clinical units"
    units = item["units"]
    if not units or item["verdict"] == "too_few":
        return Section(heading, [])
    first = units[:_SHOWN_UNITS]
    rows = [(_short(unit["name"]), _bounded(unit["t"]), f"p {p_text(unit['adjusted_p'])}") for unit in first]
    blocks: list[Any] = [
        Figure(
            null_plot(
                rows,
                title="Clinical units, ranked",
                x_label="difference in standard errors; right: more of it",
                reach=max(10.0, min(60.0, max(abs(t) for _, t, _ in rows))),
            ),
            "The units that differ most. Shaded: two standard errors. p-values are adjusted for all units together.",
        )
    ]
    named = [unit for unit in units if unit["adjusted_p"] <= 0.05]
    shown = named if len(named) > _SHOWN_UNITS else first
    table = []
    for unit in shown:
        times = unit["scale"] == "ratio" and unit["difference"] is not None
        table.append(
            [
                unit["name"],
                unit["unit"],
                _side(unit, "reference"),
                _side(unit, "other"),
                (f"× {number(unit['difference'])}" if times else number(unit["difference"])),
                interval(unit["low"], unit["high"]),
                p_text(unit["adjusted_p"]),
            ]
        )
    smallest = protocol["smallest_cell"]
    blocks.append(
        Table(
            ["", "unit", item["reference"], item["other"], "difference", "95 % interval", "p (adjusted)"],
            table,
            f"{len(named)} of {len(units)} units differ beyond chance. Averages over "
            f"{item['n_patients_together']} patients. "
            f"“About”: fewer than {smallest} patients depart from that value, and nothing more is shown. "
            "Units measured on too few patients are left out; all others are in results.json.",
        )
    )
    return Section(heading, blocks)


def _short(name: str) -> str:
    """A name as far as there is room beside a plot."""
    name = name.removeprefix("Section: ").removeprefix("Short form: ")
    name = name[0].upper() + name[1:]
    return name if len(name) <= 27 else name[:25].rstrip() + "…"


def _bounded(t: float | None) -> float:
    return 99.0 if t is None else t


def _questions(item: dict[str, Any]) -> Section:
    """What changed behind the text, as far as the evidence carries."""
    heading = f"{item['other']} against {item['reference']}: what may have changed"
    if not item["claims"]:
        return Section(heading, [])
    rows = []
    for claim in item["claims"]:
        condition = f" {claim['condition']}" if claim["answer"] == "changed_if" else ""
        reason = claim["reason"][0].upper() + claim["reason"][1:] + "."
        if claim["condition"] and claim["answer"] != "changed_if":
            reason += f" The assumption would be: {claim['condition']}."
        for name, found in claim["estimates"].items():
            side = item[name] if name in ("reference", "other") else name
            reason += f" {side}: {number(found['value'])} ({interval(found['low'], found['high'])}; {found['part']})."
        n = f"{claim['n_patients']} patients, {claim['n_notes']} notes"
        rows.append(
            [_QUESTIONS[claim["question"]], _ANSWERS[claim["answer"]] + condition, reason, p_text(claim["p_value"]), n]
        )
    caption = (
        "“Cannot tell” is an answer: text alone does not show how annotators mark, nor what style goes with. Each "
        "question has the 5 % level for itself."
    )
    return Section(heading, [Table(["question", "answer", "why", "p", "from"], rows, caption)])


def _details(item: dict[str, Any], protocol: dict[str, Any]) -> Section:
    heading = f"{item['other']} against {item['reference']}: what was measured"
    tests = _tests(item)
    if not tests:
        why = item["note"] or "fewer than two patients stand on one side"
        return Section(heading, [Text(f"No test was made: {why}.")])
    utilisation = item["utilisation"]
    blocks: list[Any] = []
    if item["basis"] == "one_note":
        blocks.append(
            Notice(
                f"Patients of {item['other']} have {number(utilisation['effect'])} times as many notes "
                f"({interval(utilisation['low'], utilisation['high'])}; p {p_text(utilisation['p_value'])}). That is a "
                "difference in care, documentation or export, not in text. The verdict therefore rests on one random "
                "note of each patient, where it plays no part.",
                "caution",
                "How many notes patients have differs",
            )
        )
    shown = [name for name in ("domain_classifier", "mmd", "length", "vocabulary", "units") if name in tests]
    rows = []
    for name in shown:
        test = tests[name]
        sd = test["null_sd"]
        distance = (test["statistic"] - test["null_mean"]) / sd if sd and test["statistic"] is not None else _NAN
        far = f"{number(distance, 2)} s.d., " if abs(distance) > 10 else ""
        rows.append((_NAMES[name], distance, f"{far}p {p_text(test['p_value'])}"))
    axis = "distance from shuffled patients, in standard deviations of the shuffles"
    blocks.append(
        Figure(
            null_plot(rows, title="Each test against its null", x_label=axis),
            "Shaded: what shuffling patients between the institutions gives most of the time. A dot far to the right "
            "is a difference that shuffling does not produce; an arrow head: further than the axis.",
        )
    )
    together = f"{item['n_patients_together']} patients"
    if item["n_patients"][0] is not None:
        together = f"{item['n_patients'][1]} and {item['n_patients'][0]} patients"
    columns = ["", "measured", "unit", "95 % interval", "p", "p (Holm)", "patients", "notes"]
    judged = item["verdict"] != "too_few"
    bases = [("all_notes", "all sampled notes"), ("one_note", "one random note of each patient")]
    if item["all_notes"] and item["all_notes"][0]["n_notes"] == item["all_notes"][0]["n_units"]:
        bases = bases[:1]  # every patient has one note: the repeat is the same
    for basis, words in bases:
        if not item[basis]:
            continue  # one note a patient may leave no cell with patients of both sides
        table = [_row(test, item["adjusted_p"] if basis == item["basis"] else {}) for test in item[basis]]
        if basis == "all_notes":
            table.append(_row(utilisation, {}))
        role = "the verdict rests on these" if basis == item["basis"] else "repeat, for comparison"
        if item["verdict"] == "too_few":
            role = "a description, without a verdict"
        if not judged:
            table = [row[:5] + row[6:] for row in table]
        shown_columns = columns if judged else columns[:5] + columns[6:]
        blocks.append(
            Table(shown_columns, table, f"On {words} ({together}): {role}. A dash: no valid interval exists.")
        )
    if item["verdict"] == "too_few":
        return Section(heading, blocks)
    if item["further"]:
        further = [_row(test, {}) for test in item["further"]]
        blocks.append(
            Table(
                [*columns[:5], *columns[6:]],
                [row[:5] + row[6:] for row in further],
                "Second opinions: no verdict rests on them, and their p-values are not adjusted. The network was "
                "trained on the other half of the patients.",
            )
        )
    if item["tokens"]:
        small = f"< {protocol['smallest_cell']} patients"
        blocks.append(
            Table(
                ["token", f"per 1,000 in {item['reference']}", f"per 1,000 in {item['other']}", "bits added"],
                [
                    [
                        token["token"],
                        *(
                            number(rate) if count is not None else small
                            for rate, count in zip(token["per_thousand"], token["n_patients"], strict=True)
                        ),
                        number(token["excess_bits"], 2),
                    ]
                    for token in item["tokens"]
                ],
                "The tokens that add most to the divergence of words; each is in the notes of at least "
                f"{protocol['smallest_cell']} patients of one institution. An exploration, without p-values.",
            )
        )
    else:
        blocks.append(Text("No token of enough patients adds to the divergence of words."))
    return Section(heading, blocks)


def _row(test: dict[str, Any], adjusted: dict[str, float]) -> list[Any]:
    holm = adjusted.get(test["name"])
    effect = test["effect"]
    if test["name"] in ("coral", "frechet"):  # a bare distance between vectors tells nobody anything
        effect = (test["statistic"] - test["null_mean"]) / test["null_sd"] if test["null_sd"] else None
    return [
        _NAMES[test["name"]],
        effect,
        _UNITS[test["name"]],
        interval(test["low"], test["high"]),
        p_text(test["p_value"]),
        "" if holm is None else p_text(holm),
        test["n_units"],
        test["n_notes"],
    ]


def _compared(results: dict[str, Any]) -> Section:
    account, smallest = results["account"], results["protocol"]["smallest_cell"]
    large = [row for row in results["institutions"] if row["n_patients"] is not None]
    rows = []
    for row in large[:_SHOWN_INSTITUTIONS]:
        kinds = sorted(row["note_types"].items(), key=lambda pair: (-pair[1], pair[0]))[:4]
        types = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in kinds)
        rows.append([row["name"], row["n_patients"], row["n_notes"], row["words_a_note"], types])
    blocks: list[Any] = []
    if rows:
        blocks.append(
            Table(
                ["institution", "patients", "notes", "words a note", "commonest note types"],
                rows,
                "Words: geometric mean, every patient weighing the same. Note types as shares of a patient's notes.",
            )
        )
    points = []
    if len(large) > _SHOWN_INSTITUTIONS:
        points.append(f"{len(large) - _SHOWN_INSTITUTIONS} more institutions are in results.json.")
    if few := len(results["institutions"]) - len(large):
        points.append(f"{few} of {len(results['institutions'])} institutions have fewer than {smallest} patients each.")
    if gone := account["n_institutions_named"] - account["n_institutions"]:
        points.append(f"{gone} institutions are left without patients once each patient stands in one only.")
    if results["protocol"]["from_profiles"]:
        points.append(
            f"{account['n_patients']} patients with {account['n_notes']} notes; {account['n_profiles']} of "
            f"{len(large)} institutions came as a profile, without their notes. The files say what they hold."
        )
        return Section("What was compared", [*blocks, Points(points)])
    skipped = sum(account["skipped"].values())
    rules = "; ".join(f"{rule} {count}" for rule, count in account["skipped"].items())
    points += [
        f"{account['n_records']} records: {account['n_notes']} notes, {skipped} skipped"
        + (f" ({rules})" if rules else "")
        + f", {account['n_rejected']} rejected.",
        f"{account['n_patients']} patients; {account['n_notes_sampled']} of their notes were sampled (at most "
        f"{results['protocol']['max_notes_per_patient']} a patient, {results['protocol']['max_patients']} patients an "
        "institution).",
    ]
    several = account["n_patients_in_several_institutions"]
    if several:
        how = {
            "majority": "stand where most of their notes are; their notes elsewhere were left out",
            "drop": "were left out with all their notes",
        }[results["protocol"]["patient_in_two"]]
        points.append(
            f"{several} patients have notes in several institutions. They {how} "
            f"({account['n_notes_left_out_elsewhere']} notes)."
        )
    if account["n_ids_in_several_sources"] and not account["ids_joined"]:
        points.append(
            f"{account['n_ids_in_several_sources']} patient ids occur in more than one source and were taken for "
            "different people, as ids of different systems are. If they are the same people this result is wrong: "
            "run it again with --shared-patients."
        )
    return Section("What was compared", [*blocks, Points(points)])


def _method(results: dict[str, Any]) -> Section:
    protocol = results["protocol"]
    if protocol["from_profiles"]:
        points = [
            "Unit: the patient; every patient weighs the same in a profile.",
            f"Representation: {protocol['representation']}.",
            "Text as a whole: unbiased squared distance of the mean random features. Clinical units: the largest |t|.",
            f"p-values: {protocol['p_values']}. A difference is claimed at 0.05 after Holm.",
            "From profiles no classifier, no vocabulary and no strata: who gives the exports gets these too.",
        ]
        return Section("How", [Points(points)])
    strata = []
    if protocol["strata"] != "none":
        cell = "type" if protocol["strata"] == "profile" else "type and year"
        strata = [
            f"Strata: notes are compared with notes of the same {cell} only, and patients are shuffled only among "
            "patients with a like number and mix of notes. This answers whether notes differ beyond their mix. It is "
            "approximate and gives no intervals: in simulation, each test called identical hospitals with different "
            "mixes different in 5 to 6 % of cases instead of 5 %."
        ]
    return Section(
        "How",
        [
            Points(
                [
                    *strata,
                    "Unit: the patient. Notes of one patient resemble each other, so every patient weighs the same and "
                    "is shuffled with all of their notes; shuffling notes would find a difference between identical "
                    "hospitals.",
                    f"Representation: {protocol['representation']}.",
                    "Telling notes apart: a ridge discriminant fitted on four fifths of the patients scores the rest; "
                    "area under the ROC curve over pairs of patients.",
                    "Text as a whole: unbiased squared maximum mean discrepancy, three Gaussian kernels around the "
                    "pooled median distance, pairs of one patient left out.",
                    "Length: ratio of geometric means of words a note; Welch's t, permuted.",
                    "Clinical units: a fixed list of measures of every note, averaged within patients; Welch's t of "
                    "each, the largest permuted, p-values of all adjusted together (step-down).",
                    "Words used: Jensen-Shannon divergence of the average note's tokens; directed: Kullback-Leibler of "
                    "the other institution from the reference. Both as excess over shuffled patients.",
                    f"p-values: {protocol['p_values']}. A difference is claimed at 0.05 after Holm.",
                    "Chance of finding a difference: normal form from the spread over shuffled patients, at 0.05 "
                    "divided by the number of tests; a classifier trained on more patients would need fewer.",
                    "If the number of notes a patient differs (p at most 0.05), the verdict rests on one random note a "
                    "patient, where the tests are exact.",
                ]
            )
        ],
    )
