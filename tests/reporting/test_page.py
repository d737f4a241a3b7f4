"""Pages: self-contained, escaped, and honest about what is undefined."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinical_nlp.config import RecipeConfig
from clinical_nlp.reporting.page import Figure, Notice, Points, Section, Table, Text, interval, p_text, page, run_report
from clinical_nlp.reporting.plots import interval_plot, line_plot, null_plot, number
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
    ):
        if plot:
            assert "nan" not in plot
            ElementTree.fromstring(plot)


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
