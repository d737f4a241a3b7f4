"""One self-contained HTML page: sections of text, tables, notices and plots. Opens offline, needs no script."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from clinical_nlp.reporting.plots import interval_plot, line_plot, number
from clinical_nlp.runs import Estimate, Run, write_atomic

_INTERVAL = re.compile(r"[−∞\d.\u202fe]+ to [−∞\d.\u202fe]+")
_WITH_INTERVAL = re.compile(r"([−∞\d.\u202fe]+) (\([−∞\d.\u202fe]+ to [−∞\d.\u202fe]+\))")


@dataclass(frozen=True)
class Text:
    """One paragraph."""

    text: str
    kind = "text"


@dataclass(frozen=True)
class Notice:
    """A boxed statement, with what it lists as `points`; `tone` is plain, good, caution or bad."""

    text: str
    tone: str = "plain"
    heading: str = ""
    points: Sequence[str] = ()
    kind = "notice"


@dataclass(frozen=True)
class Points:
    """A list of statements."""

    points: Sequence[str]
    kind = "points"


@dataclass(frozen=True)
class Table:
    """Rows of cells (text, numbers or `Estimate`); without columns, rows of name and fact."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    kind = "table"

    @property
    def legend(self) -> str:
        """The caption, and why estimates among the cells have no interval."""
        cells = [cell for row in self.rows for cell in row if isinstance(cell, Estimate)]
        notes = (cell.note for cell in cells if cell.note and math.isnan(cell.low))
        reasons = dict.fromkeys(note.removeprefix("test: ").removeprefix("no interval: ") for note in notes)
        if not reasons:
            return self.caption
        caption = f"{self.caption.rstrip('.')}. " if self.caption else ""
        return f"{caption}A dash for an interval: {'; '.join(reasons)}."


@dataclass(frozen=True)
class Figure:
    """An SVG from `reporting.plots`."""

    svg: str
    caption: str = ""
    kind = "figure"


@dataclass(frozen=True)
class Marked:
    """Text with marked passages, as (start, end, tone, why); tones are those of `Notice`. Overlaps show once."""

    text: str
    marks: Sequence[tuple[int, int, str, str]] = ()

    @property
    def pieces(self) -> list[tuple[str, str, str]]:
        """Return the text in pieces of (text, tone, why); tone and why are empty where nothing is marked."""
        pieces, position = [], 0
        for start, end, tone, why in sorted(self.marks):
            if start < position:
                continue
            pieces += [(self.text[position:start], "", ""), (self.text[start:end], tone, why)]
            position = end
        return [piece for piece in [*pieces, (self.text[position:], "", "")] if piece[0]]


@dataclass(frozen=True)
class SideBySide:
    """Texts in columns, each with its heading."""

    columns: Sequence[tuple[str, Marked]]
    caption: str = ""
    kind = "side_by_side"


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    heading: str
    blocks: Sequence[Text | Notice | Points | Table | Figure | SideBySide]


def page(title: str, sections: Sequence[Section], *, subtitle: str = "", footer: str = "") -> str:
    """Render a page.

    Everything given is escaped but the SVG of figures. The page loads nothing: no script, font, style or image.

    Parameters
    ----------
    title : of the page.
    sections : in order.
    subtitle : one line below the title.
    footer : one line at the end, such as the command and versions.
    """
    return template("page.html").render(title=title, sections=list(sections), subtitle=subtitle, footer=footer)


def interval(low: float | None, high: float | None) -> str:
    """Write an interval, or a dash where there is none."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return "–"
    digits = 3
    while digits < 6 and number(low, digits) == number(high, digits) and low != high:
        digits += 1
    return f"{number(low, digits)} to {number(high, digits)}"


def p_text(p_value: float | None) -> str:
    """Write a p-value with two digits, never as zero."""
    if p_value is None or math.isnan(p_value):
        return "–"
    return f"{p_value:.2f}" if p_value >= 0.095 else f"{p_value:.2g}"


def _pieces(value: Any) -> list[str]:
    """Return a cell in pieces that stay on one line each: a figure and its interval, or all of it."""
    found = _WITH_INTERVAL.fullmatch(_cell(value))
    return list(found.groups()) if found else [_cell(value)]


def _cell(value: Any) -> str:
    if isinstance(value, Estimate):
        return f"{number(value.value)} ({interval(value.low, value.high)})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")
    return number(value) if isinstance(value, float) or value is None else str(value)


def _is_figure(value: Any) -> bool:
    """Whether a cell is a number or an interval, which stays on one line."""
    return value is None or isinstance(value, (int, float)) or bool(_INTERVAL.fullmatch(str(value)))


@functools.cache
def template(name: str) -> Any:
    """Return a Jinja2 template of this room; HTML is escaped, and a missing value is an error."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def read(wanted: str) -> str:
        return (resources.files("clinical_nlp.reporting") / wanted).read_text("utf-8")

    environment = Environment(
        loader=FunctionLoader(read),
        autoescape=name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["pieces"] = _pieces
    environment.tests["numeric"] = _is_figure
    return environment.get_template(name)


def run_report(run: Run) -> None:
    """Write `report.html`, and `model_card.md` if the run holds a model, from what the run recorded.

    A recipe or suite that has its own page (a function `report(run) -> str`) is asked for it. Call it when the run's
    block has ended, so that duration and hardware are known; `clinical-nlp report DIR` calls it again later.
    """
    from clinical_nlp.reporting.model_card import model_card

    names = [f"clinical_nlp.{shelf}.{run.manifest.get('recipe')}" for shelf in ("recipes", "eval")]
    found = [importlib.import_module(name) for name in names if importlib.util.find_spec(name)]
    own = next((module.report for module in found if hasattr(module, "report")), None)
    write_atomic(run.path / "report.html", own(run) if own else training_page(run))
    if own is None or (run.path / "task.json").is_file():
        write_atomic(run.path / "model_card.md", model_card(run))


def training_page(run: Run, *, first: Section | None = None, last: Section | None = None) -> str:
    """Render the general page of a run: what was measured, how training went, what it was made from.

    `first` is a section of the recipe's own, above the others, and `last` one below them.
    """
    from clinical_nlp.reporting.model_card import making, metric_rows, origin, phi_text

    manifest = run.manifest
    rows = metric_rows(run)
    measured: list[Any] = [Notice("The run recorded no metric.", tone="caution")]
    if rows:
        columns = ["metric", "value", "95 % interval", "patients", "notes", "part", "remark"]
        note = "Intervals resample patients, not notes; they say nothing about other institutions."
        measured = [Table(columns, rows, note)]
        shares = [
            (key, entry["value"], _nan(entry["low"]), _nan(entry["high"]))
            for key, entry in run.metrics.items()
            if entry["value"] is not None and 0 <= entry["value"] <= 1
        ]
        if shares:
            plot = interval_plot(shares, title="Metrics with their intervals", x_label="value, 95 % interval")
            measured.insert(0, Figure(plot, "Hollow: no valid interval."))
    sections = [*([] if first is None else [first]), Section("What was measured", measured)]
    if drawn := curves(run):
        sections.append(Section("How training went", drawn))
    sections.append(Section("What it was made from", [Table([], origin(run))]))
    sections.append(Section("How it was made", [Table([], making(run)), Text(phi_text(run))]))
    if last is not None:
        sections.append(last)
    return page(
        f"{manifest.get('recipe', 'run')}: {run.path.name}",
        sections,
        subtitle=f"Base model {manifest['base_model']}" if isinstance(manifest.get("base_model"), str) else "",
        footer="Rendered from metrics.json, metrics.jsonl and manifest.json of the run. Not for clinical decisions.",
    )


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def curves(run: Run) -> list[Figure]:
    """Plot how the losses of a training went; nothing where none was logged."""
    file = run.path / "metrics.jsonl"
    if not file.is_file():
        return []
    series: dict[str, list[tuple[float, float]]] = {}
    for line in file.read_text("utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the line that a crash cut off
            continue
        step = entry.get("step")
        for key, value in entry.items():
            if "loss" in key and isinstance(value, (int, float)) and isinstance(step, (int, float)):
                series.setdefault(key, []).append((float(step), float(value)))
    plot = line_plot(dict(sorted(series.items())[:4]), title="Loss over steps", x_label="step", y_label="loss")
    return [Figure(plot)] if plot else []
