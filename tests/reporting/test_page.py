"""Pages: self-contained, escaped, and honest about what is undefined."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinical_nlp.config import RecipeConfig
from clinical_nlp.reporting.page import Figure, Notice, Points, Section, Table, Text, interval, p_text, page, run_report
from clinical_nlp.reporting.plots import heat_table, interval_plot, line_plot, null_plot, number, point_plot
from clinical_nlp.runs import Estimate, Run

ANY = st.floats(allow_nan=True, allow_infinity=False, width=32)


@given(st.text())
def test_whatever_is_given_is_escaped(text):
    marked = f"<script>{text}</script>"
    blocks = [Text(marked), Notice(marked, heading=marked), Points([marked]), Table([marked], [[marked]], marked)]
    html = page(marked, [Section(marked, blocks)], subtitle=marked, footer=marked)
    assert "<script" not in html


def test_a_page_loads_nothing():
    plot = line_plot({"loss": [(0, 1.0), (1, 0.5)]}, title="t", x_label="x", y_label="y")
    html = page("t", [Section("s", [Figure(plot)])])
    assert not re.search(r"""(src|href)\s*=|url\(|@import|<link|<script""", html)
    assert "default-src 'none'" in html


@given(st.lists(st.tuples(st.text("ab<&", max_size=5), ANY, ANY, ANY), max_size=5))
def test_plots_are_well_formed_for_any_numbers(rows):
    labelled = [(label, value, min(low, high), max(low, high)) for label, value, low, high in rows]
    for plot in (
        interval_plot(labelled, title="<t>", x_label="x", reference=0.5),
        null_plot([(label, value, "p") for label, value, *_ in rows], title="t", x_label="x"),
        line_plot({"a": [(float(i), row[1]) for i, row in enumerate(rows)]}, title="t", x_label="x", y_label="y"),
        line_plot(
            {f"{label}{i}": [(0.0, value), (1.0, low)] for i, (label, value, low, _) in enumerate(rows)},
            title="t", x_label="x", y_label="y", x_names=["2019", "2020"],
        ),
        heat_table(
            list(dict.fromkeys(label for label, *_ in rows)),
            {(label, label): value for label, value, *_ in rows}, title="t", x_label="x", y_label="y",
        ),
        point_plot([(label, value, low) for label, value, low, _ in rows], title="t", x_label="x", y_label="y"),
    ):  # fmt: skip
        if plot:
            assert "nan" not in plot
            ElementTree.fromstring(plot)


def texts(plot):
    """Every text of a plot: where it begins, and where it ends at a width no letter exceeds by much."""
    found = []
    for one in ElementTree.fromstring(plot).iter("{http://www.w3.org/2000/svg}text"):
        width, x = 6.5 * len(one.text), float(one.get("x"))
        left = x - {"start": 0, "middle": width / 2, "end": width}[one.get("text-anchor")]
        found.append((one.text, left, left + width, float(one.get("y"))))
    return found


def test_names_of_lines_cover_neither_each_other_nor_the_axis():
    names = ["sentences that begin in lower case", "notes without capitals", "lines with a bullet", "impression"]
    lines = {name: [(0.0, at), (1.0, 2.0 * at), (2.0, 1.0)] for at, name in enumerate(names)}
    years = ["2018", "2019", "2020"]
    label = "standard errors from the first window"
    plot = line_plot(lines, title="t", x_label="window", y_label=label, x_names=years)
    shown = texts(plot)
    assert {*names, *years, label} <= {text for text, *_ in shown}
    assert all(left > -1 and right < 721 for _, left, right, _ in shown)
    for text, left, right, y in shown:
        for other, begin, end, height in shown:
            assert text == other or abs(y - height) > 10 or right <= begin or end <= left, (text, other)


def test_labels_of_points_cover_no_other():
    points = [(f"inlp {at}", 0.8 + 0.004 * at, 0.7 + 0.002 * at) for at in range(6)] + [("raw", 1.0, 0.9)]
    shown = texts(point_plot(points, title="t", x_label="x", y_label="y"))
    labels = [one for one in shown if one[0] in {name for name, *_ in points}]
    assert len(labels) == 7
    for at, (_, left, right, y) in enumerate(labels):
        for _, begin, end, height in labels[at + 1 :]:
            assert abs(y - height) >= 11 or right <= begin or end <= left


def test_a_matrix_shows_every_number_where_it_belongs():
    names = ["north", "a hospital whose name is far too long for the room that there is beside a matrix"]
    values = {("north", "north"): 0.9, ("north", names[1]): 0.7, (names[1], names[1]): math.nan}
    plot = heat_table(names, values, title="t", x_label="scored on", y_label="trained on")
    shown = {text: (left, y) for text, left, _, y in texts(plot)}
    assert shown["0.900"][1] == shown["0.700"][1]
    assert shown["0.900"][0] < shown["0.700"][0]
    assert all(left > -1 and right < 721 for _, left, right, _ in texts(plot))
    shades = [float(one.get("fill-opacity")) for one in ElementTree.fromstring(plot).iter() if one.get("fill-opacity")]
    assert shades[0] > shades[1]
    assert len(shades) == 2
    assert heat_table(names, {}, title="t", x_label="x", y_label="y") == ""


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.81234, "0.812"), (1234567, "1\u202f234\u202f567"), (math.nan, "–"), (None, "–"), (-0.5, "−0.500"), (0.0, "0")],
)
def test_numbers(value, shown):
    assert number(value) == shown


def test_no_p_value_is_written_as_zero_and_no_missing_interval_as_a_number():
    assert p_text(0.0001) == "0.0001"
    assert p_text(0.001) == "0.001"
    assert interval(math.nan, math.nan) == interval(None, None) == "–"
    assert interval(0.99951, 0.99962) == "0.9995 to 0.9996"


def test_figures_and_intervals_stay_on_one_line_and_notices_list_points():
    cells = [interval(-0.5, 1.25), "1 to 3 patients", 3, None]
    notice = Notice("said", "bad", "heading", ["a <b> point", "another"])
    html = page("t", [Section("s", [notice, Table(["a", "b", "c", "d"], [cells])])])
    assert re.findall(r"<td( class=\"n\")?>", html) == [' class="n"', "", ' class="n"', ' class="n"']
    assert "<p>said</p><ul><li>a &lt;b&gt; point</li><li>another</li></ul></div>" in html


def test_the_report_of_a_run(tmp_path):
    with Run.open(tmp_path / "run", RecipeConfig(), recipe="some_recipe") as run:
        run.log(step=1, loss=2.0)
        run.log(step=2, loss=1.5)
        (run.path / "metrics.jsonl").open("a").write('{"step": 3, "lo')
        run.record(
            {
                "test.f1_strict": Estimate(0.8123, 0.78, 0.843, 120, 800),
                "test.f1_rare": Estimate(math.nan, math.nan, math.nan, 0, 0, "test", "undefined: nothing to count"),
            }
        )
        run.note(base_model={"name": "builtin:tiny"}, inputs={"corpus": "a | b"})
    run_report(run)
    html, card = (run.path / "report.html").read_text(), (run.path / "model_card.md").read_text()
    for shown in ("0.812", "0.780 to 0.843", "undefined: nothing to count", "polyline", "builtin:tiny", "120"):
        assert shown in html
    assert "| test.f1_rare | – | – | 0 | 0 | test | undefined: nothing to count |" in card
    assert card.startswith('---\nlibrary_name: clinical_nlp\nbase_model: "builtin:tiny"\n')
    run_report(Run.load(run.path))
    assert (run.path / "report.html").read_text() == html
