"""Small SVG plots for pages: no library, no script, colours from the page's own style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

_WIDTH = 720.0
_LABEL = 210.0
_RIGHT = _WIDTH - 12


def number(value: float | None, digits: int = 3) -> str:
    """Write a number for reading: `digits` significant ones, thousands with a thin space, a dash where undefined."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    places = max(0, digits - 1 - size)
    return f"{value:,.{places}f}".replace(",", "\u202f").replace("-", "−")


def _ticks(low: float, high: float, about: int = 5) -> list[tuple[float, str]]:
    """Round positions between two values, and how to write them: all with the same number of decimals."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= min((1, 2, 5, 10), key=lambda factor: abs((high - low) / (step * factor) - about))
    first = math.ceil(low / step - 1e-9)
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    positions = [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]
    return [(value, f"{value:,.{places}f}".replace(",", "\u202f").replace("-", "−")) for value in positions]


def _spread(values: Sequence[float], least: float) -> float:
    """How far values reach; at least so much that ticks between them can be told apart."""
    return max(max(values) - min(values), least, 1e-6 * max(map(abs, values)))


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">' + "".join(parts) + "</svg>"
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _room(labels: Iterable[str]) -> float:
    """Return the width that the longest label takes, within reason."""
    return min(0.45 * _WIDTH, max(_LABEL, 16 + 7.6 * max(map(len, labels), default=0)))


def null_plot(rows: Sequence[tuple[str, float, str]], *, title: str, x_label: str, reach: float = 10.0) -> str:
    """Show how far each measurement lies outside what chance gives.

    Parameters
    ----------
    rows : (label, distance from the mean of the null in its standard deviations, words at the right end); beyond
        `reach` an arrow head takes the place of the dot.
    title : read out in place of the picture.
    x_label : under the axis.
    reach : the most standard deviations that are drawn to scale.
    """
    # Beyond some standard deviations only "far outside" matters; an open scale would hide the band.
    clipped = [min(max(value, -reach), reach) for _, value, _ in rows if not math.isnan(value)]
    low, high = min([-3.0, *(value - 0.5 for value in clipped)]), max([4.0, *(value + 0.5 for value in clipped)])
    left, right, step, top = _room(label for label, *_ in rows), _WIDTH - 120, 34.0, 10.0
    bottom = top + step * len(rows)

    def at(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    parts = [
        f'<rect x="{at(-2):.1f}" y="{top:.1f}" width="{at(2) - at(-2):.1f}" height="{bottom - top:.1f}" class="band"/>',
        _line(at(0), top, at(0), bottom, "zero"),
    ]
    for tick, words in _ticks(low, high, 6):
        parts += [_line(at(tick), bottom, at(tick), bottom + 5, "axis")]
        parts += [_text(at(tick), bottom + 19, words, "tick", "middle")]
    parts += [
        _line(left, bottom, right, bottom, "axis"),
        _text((left + right) / 2, bottom + 38, x_label, "tick", "middle"),
    ]
    for index, (label, value, remark) in enumerate(rows):
        y = top + step * (index + 0.5)
        parts.append(_text(left - 12, y + 4, label, "", "end"))
        if not math.isnan(value):
            x = at(min(max(value, -reach), reach))
            tip = 7 if value > 0 else -7
            mark = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="dot"/>'
            if abs(value) > reach:
                mark = f'<path d="M{x:.1f} {y - 6:.1f} l{2 * tip} 6 l{-2 * tip} 6 z" class="dot"/>'
            parts += [_line(at(0), y, x, y, "stem"), mark]
        parts.append(_text(right + 12, y + 4, remark, "tick"))
    return _svg(_WIDTH, bottom + 46, title, parts)


def interval_plot(
    rows: Sequence[tuple[str, float, float, float]], *, title: str, x_label: str, reference: float | None = None
) -> str:
    """Show estimates with their intervals; an interval of NaN is left out and the point drawn hollow.

    Parameters
    ----------
    rows : (label, value, low, high).
    title : read out in place of the picture.
    x_label : under the axis.
    reference : a value to mark, such as chance.
    """
    shown = [x for _, *numbers in rows for x in numbers if math.isfinite(x)]
    shown += [] if reference is None else [reference]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    margin = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    low, high = low - margin, high + margin
    widest = max((len(number(value)) for _, value, *_ in rows), default=0)
    left, right, step, top = _room(label for label, *_ in rows), _WIDTH - 20 - 7.2 * max(6, widest), 30.0, 8.0
    bottom = top + step * len(rows)

    def at(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    parts = [] if reference is None else [_line(at(reference), top, at(reference), bottom, "zero")]
    for tick, words in _ticks(low, high, 6):
        parts += [_line(at(tick), bottom, at(tick), bottom + 5, "axis")]
        parts += [_text(at(tick), bottom + 19, words, "tick", "middle")]
    parts += [
        _line(left, bottom, right, bottom, "axis"),
        _text((left + right) / 2, bottom + 38, x_label, "tick", "middle"),
    ]
    for index, (label, value, below, above) in enumerate(rows):
        y = top + step * (index + 0.5)
        parts.append(_text(left - 12, y + 4, label, "", "end"))
        if not math.isfinite(value):
            parts.append(_text(at(low) + 6, y + 4, "undefined", "tick"))
            continue
        known = math.isfinite(below) and math.isfinite(above)
        if known:
            parts.append(_line(at(below), y, at(above), y, "whisker"))
        parts.append(f'<circle cx="{at(value):.1f}" cy="{y:.1f}" r="4.5" class="{"dot" if known else "hollow"}"/>')
        parts.append(_text(right + 12, y + 4, number(value), "tick"))
    return _svg(_WIDTH, bottom + 46, title, parts)


def heat_table(
    names: Sequence[str], values: Mapping[tuple[str, str], float], *, title: str, x_label: str, y_label: str
) -> str:
    """Draw a matrix of numbers, each cell shaded by its size; undefined ones are left white.

    Parameters
    ----------
    names : of rows and columns.
    values : (row, column) -> number.
    title : read out in place of the picture.
    x_label, y_label : above the columns, and of the rows.
    """
    known = [value for value in values.values() if math.isfinite(value)]
    if not known:
        return ""
    low, high = min(known), max(known)
    left, top, height = _room(names), 46.0, 36.0
    width = min(120.0, (_RIGHT - left) / len(names))
    room = max(3, int(width / 7.5))
    parts = [_text(left, 14, x_label, "tick"), _text(left - 12, top - 10, y_label, "tick", "end")]
    for column, name in enumerate(names):
        short = name if len(name) <= room else name[: room - 1] + "…"
        parts.append(_text(left + width * (column + 0.5), top - 10, short, "tick", "middle"))
    for row, name in enumerate(names):
        y = top + height * row
        fits = int((left - 16) / 7.2)
        shown = name if len(name) <= fits else name[: fits - 1] + "…"
        parts.append(_text(left - 12, y + height / 2 + 4, shown, "", "end"))
        for column, other in enumerate(names):
            x, value = left + width * column, values.get((name, other), math.nan)
            if math.isfinite(value):
                depth = 0.08 + 0.5 * ((value - low) / (high - low) if high > low else 0.0)
                parts.append(
                    f'<rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{width - 2:.1f}" height="{height - 2:.1f}" '
                    f'class="dot" fill-opacity="{depth:.2f}"/>'
                )
            parts.append(_text(x + width / 2, y + height / 2 + 4, number(value), "", "middle"))
    return _svg(_WIDTH, top + height * len(names) + 8, title, parts)


def _axes(
    xs: tuple[float, float],
    ys: tuple[float, float],
    bottom: float,
    x_label: str,
    y_label: str,
    named: Sequence[tuple[float, str]] = (),
    top: float = 30.0,
) -> tuple[Callable[[float, float], tuple[float, float]], list[str]]:
    """Return where a point of a plane from (low, high) to (low, high) is drawn, and the plane's axes and grid."""
    left = 64.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (_RIGHT - left) * (x - xs[0]) / (xs[1] - xs[0]),
            bottom - (bottom - top) * (y - ys[0]) / (ys[1] - ys[0]),
        )

    parts = []
    for tick, words in _ticks(*ys):
        y = place(xs[0], tick)[1]
        parts += [_line(left, y, _RIGHT, y, "grid"), _text(left - 8, y + 4, words, "tick", "end")]
    for tick, words in named or _ticks(*xs, 7):
        x = min(place(tick, ys[0])[0], _WIDTH - 3.8 * len(words))
        parts.append(_text(x, bottom + 18, words, "tick", "middle"))
    parts += [
        _line(left, bottom, _RIGHT, bottom, "axis"),
        _text((left + _RIGHT) / 2, bottom + 38, x_label, "tick", "middle"),
        _text(4, top - 14, y_label, "tick"),
    ]
    return place, parts


def line_plot(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_names: Sequence[str] = (),
) -> str:
    """Draw one line a series; values that are not finite are left out.

    Parameters
    ----------
    series : name -> (x, y) points in order of x; at most four are told apart by colour.
    title : read out in place of the picture.
    x_label, y_label : of the axes.
    x_names : what stands at x = 0, 1, 2, ..., where these are no numbers; as many are written as there is room for.
    """
    lines = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    spread = _spread(ys, 1e-3 * max(map(abs, ys))) or 1.0
    y_low, y_high = min(ys) - 0.05 * spread, max(ys) + 0.05 * spread
    bottom = 262.0
    every = max(1, math.ceil(len(x_names) * 9 * max(map(len, x_names), default=0) / (_RIGHT - 64)))
    named = [(float(at), name) for at, name in enumerate(x_names) if at % every == 0 and x_low <= at <= x_high]
    widths = [7.2 * len(name) + 34 for name in lines] if len(lines) > 1 else []
    beside = 7.2 * len(y_label) + 16 + sum(widths) <= _RIGHT
    rows, x = [0] * len(widths), 4.0
    if not beside:  # the names stand in rows of their own, above the axis
        for index, width in enumerate(widths):
            if index and x + width > _RIGHT:
                rows[index:], x = [rows[index] + 1] * (len(rows) - index), 4.0
            x += width
        bottom += 20.0 * (rows[-1] + 1)
    top = 30.0 if beside else 30.0 + 20.0 * (rows[-1] + 1)
    place, parts = _axes((x_low, x_high), (y_low, y_high), bottom, x_label, y_label, named, top)
    x = _RIGHT - sum(widths) if beside else 4.0
    for index, (name, points) in enumerate(lines.items()):
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(*point) for point in points))
        if len(points) == 1:
            px, py = place(*points[0])
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" class="dot"/>')
        parts.append(f'<polyline points="{path}" class="line s{index % 4}"/>')
        if widths:
            x = 4.0 if not beside and index and rows[index] > rows[index - 1] else x
            y = 12.0 + 20.0 * rows[index]
            parts += [_line(x, y, x + 20, y, f"line s{index % 4}"), _text(x + 26, y + 4, name, "tick")]
            x += widths[index]
    return _svg(_WIDTH, bottom + 46, title, parts)


_Box = tuple[float, float, float, float]


def _free_place(at: tuple[float, float], width: float, taken: Sequence[_Box]) -> tuple[tuple[float, float], _Box]:
    """Return where a label beside a point covers no other label or point, as far as there is such a place."""
    best: tuple[float, tuple[float, float], _Box] | None = None
    for down in (-6.0, 16.0, 4.0, -20.0, 30.0, -34.0, 44.0):
        for right in (8.0, -8.0 - width):
            x, y = at[0] + right, at[1] + down
            box = (x, y - 11.0, x + width, y + 3.0)
            covered = sum(
                max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
                * max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
                for other in taken
            )
            covered += 100.0 * (max(0.0, 64.0 - box[0]) + max(0.0, box[2] - _WIDTH))
            if best is None or covered < best[0] - 1e-9:
                best = (covered, (x, y), box)
    assert best is not None
    return best[1], best[2]


def point_plot(
    points: Sequence[tuple[str, float, float]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    joined: Sequence[str] = (),
    diagonal: bool = False,
) -> str:
    """Place named points; those in `joined` are linked in the order of x. Points that are not finite are left out.

    Parameters
    ----------
    points : (label, x, y).
    title : read out in place of the picture.
    x_label, y_label : of the axes.
    joined : labels of the points to link, such as a Pareto front.
    diagonal : draw x = y.
    """
    shown = [(label, x, y) for label, x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not shown:
        return ""
    xs, ys = [x for _, x, _ in shown], [y for _, _, y in shown]
    wide, high = _spread(xs, 0.02), _spread(ys, 0.02)
    x_low, x_high = min(xs) - 0.06 * wide, max(xs) + 0.18 * wide
    y_low, y_high = min(ys) - 0.1 * high, max(ys) + 0.1 * high
    if diagonal:
        x_low = y_low = min(x_low, y_low)
        x_high = y_high = max(x_high, y_high)
        if all(0 <= value <= 1 for value in (*xs, *ys)):
            x_low = y_low = max(0.0, x_low)
            x_high = y_high = min(1.0, x_high)
    bottom = 302.0
    place, parts = _axes((x_low, x_high), (y_low, y_high), bottom, x_label, y_label)
    if diagonal:
        parts.append(_line(*place(x_low, x_low), *place(x_high, x_high), "zero"))
    front = sorted((x, y) for label, x, y in shown if label in joined)
    if len(front) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in front))
        parts.append(f'<polyline points="{path}" class="line s2"/>')
    taken = [(px - 5, py - 5, px + 5, py + 5) for px, py in (place(x, y) for _, x, y in shown)]
    for label, x, y in shown:
        at = place(x, y)
        kind = "dot" if not joined or label in joined else "hollow"
        parts.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="4.5" class="{kind}"/>')
        if label:
            where, box = _free_place(at, 6.8 * len(label), taken)
            taken.append(box)
            parts.append(_text(*where, label, "tick"))
    return _svg(_WIDTH, bottom + 46, title, parts)
