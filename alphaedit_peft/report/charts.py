"""Plots of evaluations as inline SVG: bars and lines with their intervals, and points that moved.

In: estimates, or pairs of points. Out: a ``<figure>`` as
:class:`~alphaedit_peft.report.page.Markup`, in the manner of ``svg``: colours are classes of the
page's style, and values that are not finite are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from alphaedit_peft.evaluation.metrics import Estimate
from alphaedit_peft.report.page import Markup, escaped
from alphaedit_peft.report.svg import (
    BOTTOM,
    COLOURS,
    HEIGHT,
    LABEL,
    LEFT,
    RIGHT,
    ROW,
    TOP,
    WIDTH,
    Axis,
    dash,
    figure,
    frame,
    legend,
)

NUMBERS = 104  # of bars: width of the numbers
NAME = 20  # characters of a bar's label

Course = Sequence[tuple[float, Estimate]]
Moved = Sequence[tuple[tuple[float, float], tuple[float, float]]]


def interval_bars(
    title: str,
    bars: Sequence[tuple[str, Estimate, int]],
    *,
    scale: float = 1.0,
    digits: int = 2,
    full: float | None = None,
) -> Markup:
    """Bars to the right from zero, each with its interval as a line over its end.

    Args:
        title: above the chart.
        bars: (label, estimate, number of its colour), estimates from 0 on.
        scale: shown is ``scale`` times the value; 100 for shares in percent.
        digits: after the point.
        full: the value at the right end; None: the largest upper bound.
    """
    known = [bar for bar in bars if math.isfinite(bar[1].value)]
    if not known:
        return figure(title, [])
    ends = [found.high if math.isfinite(found.high) else found.value for _, found, _ in known]
    axis = Axis(0.0, full or max(ends) or 1.0, LABEL, WIDTH - NUMBERS, False)
    parts = []
    for i, (name, found, colour) in enumerate(known):
        y = i * ROW
        shown = with_half(found, scale, digits)
        label = name if len(name) <= NAME else name[: NAME - 1] + "…"
        length = axis.place(found.value) - LABEL
        parts.append(
            f"<g><title>{escaped(f'{name}: {shown}')}</title>"
            f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{escaped(label)}</text>'
            f'<rect class="fill-{colour % COLOURS}" x="{LABEL}" y="{y + 4}" '
            f'width="{length:.1f}" height="{ROW - 8}" rx="2"/>{_whisker(found, axis, y)}'
            f'<text class="strong" x="{WIDTH - NUMBERS + 8}" y="{y + 15}">{escaped(shown)}</text>'
            "</g>"
        )
    return figure(title, parts, WIDTH, len(known) * ROW + 4)


def course_chart(
    title: str,
    courses: Mapping[str, Course],
    *,
    x_label: str = "",
    scale: float = 1.0,
    y_range: tuple[float, float] | None = None,
) -> Markup:
    """Lines through estimates, with their intervals as a band.

    Args:
        title: above the chart.
        courses: name -> (x, estimate), in the order of x.
        x_label: below.
        scale: shown is ``scale`` times each value.
        y_range: lowest and highest y shown, of scaled values; None: those of the intervals.
    """
    lines = {
        name: [
            (x, scale * e.value, scale * e.low, scale * e.high)
            for x, e in found
            if all(map(math.isfinite, (x, e.value, e.low, e.high)))
        ]
        for name, found in courses.items()
    }
    every = [point for points in lines.values() for point in points]
    if not every:
        return figure(title, [])
    low, high = y_range or (min(p[2] for p in every), max(p[3] for p in every))
    x_axis = Axis(min(p[0] for p in every), max(p[0] for p in every), LEFT, WIDTH - RIGHT, False)
    y_axis = Axis(low, high, HEIGHT - BOTTOM, TOP, False)
    parts = frame(x_axis, y_axis, x_label)
    for i, points in enumerate(lines.values()):
        parts.append(_band(points, x_axis, y_axis, i))
    for i, points in enumerate(lines.values()):
        parts.append(_line_with_band(points, x_axis, y_axis, i))
    return figure(title, parts, WIDTH, HEIGHT, legend(list(lines)))


def scatter_chart(
    title: str, groups: Mapping[str, Moved], *, x_label: str = "", y_label: str = ""
) -> Markup:
    """Points that moved: a ring where each was, a dot where it is, a line between them.

    Args:
        title: above the chart.
        groups: name -> ((x, y) before, (x, y) after), each in a colour of its own.
        x_label: below.
        y_label: above the vertical axis.
    """
    drawn = {
        name: [pair for pair in pairs if all(math.isfinite(v) for point in pair for v in point)]
        for name, pairs in groups.items()
    }
    every = [point for pairs in drawn.values() for pair in pairs for point in pair]
    if not every:
        return figure(title, [])
    xs, ys = zip(*every, strict=True)
    x_axis = Axis(min(xs), max(xs), LEFT + 6, WIDTH - RIGHT - 6, False)
    y_axis = Axis(min(ys), max(ys), HEIGHT - BOTTOM - 6, TOP + 16, False)
    parts = frame(x_axis, y_axis, x_label, y_label)
    for i, pairs in enumerate(drawn.values()):
        colour = i % COLOURS
        for (x, y), (then_x, then_y) in pairs:
            before = f"{x_axis.place(x):.1f}", f"{y_axis.place(y):.1f}"
            after = f"{x_axis.place(then_x):.1f}", f"{y_axis.place(then_y):.1f}"
            parts.append(
                f'<line class="stroke-{colour}" opacity="0.6" x1="{before[0]}" y1="{before[1]}" '
                f'x2="{after[0]}" y2="{after[1]}"/>'
                f'<circle class="stroke-{colour}" fill="none" cx="{before[0]}" cy="{before[1]}" '
                f'r="3.5"/><circle class="fill-{colour}" cx="{after[0]}" cy="{after[1]}" r="2"/>'
            )
    return figure(title, parts, WIDTH, HEIGHT, legend(list(drawn), len(drawn) > 0))


def with_half(found: Estimate, scale: float, digits: int) -> str:
    """``98.9 ± 1.2``: a value and half the width of its interval; no width where it has none."""
    half = scale * (found.high - found.low) / 2
    tail = f" ± {half:.{digits}f}" if math.isfinite(half) else ""
    return f"{scale * found.value:.{digits}f}{tail}"


def _whisker(found: Estimate, axis: Axis, y: float) -> str:
    if not (math.isfinite(found.low) and math.isfinite(found.high)) or found.low == found.high:
        return ""
    low, high, middle = axis.place(found.low), axis.place(found.high), y + ROW / 2
    return (
        f'<path stroke="currentColor" fill="none" d="M{low:.1f} {middle - 3}v6'
        f'M{low:.1f} {middle}H{high:.1f}M{high:.1f} {middle - 3}v6"/>'
    )


def _band(
    points: Sequence[tuple[float, float, float, float]], x_axis: Axis, y_axis: Axis, i: int
) -> str:
    if all(low == high for _, _, low, high in points):
        return ""
    above = [f"{x_axis.place(x):.1f},{y_axis.place(high):.1f}" for x, _, _, high in points]
    below = [f"{x_axis.place(x):.1f},{y_axis.place(low):.1f}" for x, _, low, _ in points]
    places = " ".join([*above, *reversed(below)])
    return f'<polygon class="fill-{i % COLOURS}" opacity="0.15" points="{places}"/>'


def _line_with_band(
    points: Sequence[tuple[float, float, float, float]], x_axis: Axis, y_axis: Axis, i: int
) -> str:
    places = [(x_axis.place(x), y_axis.place(value)) for x, value, _, _ in points]
    dots = "".join(
        f'<circle class="fill-{i % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places
    )
    through = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline class="line stroke-{i % COLOURS}"{dash(i)} points="{through}"/>{dots}'


POINTS = 400  # of a spectrum's line; more than a screen shows
LEVELS = 10  # shades of a heat map
NAMED = 12  # a heat map of more rows has no labels

Series = Mapping[str, Sequence[tuple[float, float]]]


def line_chart(
    title: str,
    series: Series,
    *,
    x_label: str = "",
    y_label: str = "",
    y_range: tuple[float, float] | None = None,
    log_y: bool = False,
) -> Markup:
    """Lines, each through its points (x, y); one of a single point is a dot.

    Args:
        title: above the chart.
        series: name -> points, in the order of x.
        x_label: below.
        y_label: above the vertical axis.
        y_range: lowest and highest y; None: those of the points.
        log_y: a logarithmic y axis; points at zero and below are left out.
    """
    lines = {name: _drawable(points, log_y) for name, points in series.items()}
    every = [point for points in lines.values() for point in points]
    if not every:
        return figure(title, [])
    x_axis, y_axis = _axes(every, y_range, log_y)
    parts = frame(x_axis, y_axis, x_label, y_label)
    for i, points in enumerate(lines.values()):
        parts.append(_polyline(points, x_axis, y_axis, i))
    return figure(title, parts, WIDTH, HEIGHT, legend(list(lines)))


def bar_chart(title: str, bars: Sequence[tuple[str, float]], *, unit: str = "") -> Markup:
    """Bars to the right from zero, each with its label and value.

    Args:
        title: above the chart.
        bars: (label, value from 0 on).
        unit: after each value.
    """
    known = [(name, value) for name, value in bars if math.isfinite(value)]
    if not known:
        return figure(title, [])
    longest = max(value for _, value in known)
    room = WIDTH - LABEL - 80
    parts = []
    for i, (name, value) in enumerate(known):
        length = room * max(value, 0.0) / longest if longest > 0 else 0.0
        y = i * ROW
        shown = escaped(f"{value:,}" if isinstance(value, int) else f"{value:.4g}") + escaped(unit)
        label = name if len(name) <= 20 else name[:19] + "…"
        parts.append(
            f"<g><title>{escaped(name)}: {shown}</title>"
            f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{escaped(label)}</text>'
            f'<rect class="fill-0" x="{LABEL}" y="{y + 4}" width="{length:.1f}" height="{ROW - 8}"'
            f' rx="2"/><text class="strong" x="{LABEL + length + 6:.1f}" y="{y + 15}">'
            f"{shown}</text></g>"
        )
    return figure(title, parts, WIDTH, len(known) * ROW + 4)


def heat_map(title: str, values: Sequence[Sequence[float]], labels: Sequence[str] = ()) -> Markup:
    """A grid of cells: darker is nearer to 1, in another colour nearer to -1; 0 is empty.

    Args:
        title: above the chart.
        values: rows of numbers in -1..1, equally long; a square, or wider or narrower than high.
        labels: of the rows (and of a square's columns), shown where they are at most ``NAMED``.
    """
    n = len(values)
    if not n:
        return figure(title, [])
    left = 120 if labels and n <= NAMED else 4
    wide = len(values[0])
    cell = min(28.0, (WIDTH - left - 4) / max(n, wide))
    shades: dict[int, list[str]] = {}
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            level = round(value * LEVELS) if math.isfinite(value) else 0
            if level:
                place = f"M{left + j * cell:.2f} {i * cell:.2f}h{cell:.2f}v{cell:.2f}h-{cell:.2f}z"
                shades.setdefault(level, []).append(place)
    parts = [
        f'<path class="{"cells" if level > 0 else "below"}" d="{"".join(places)}" '
        f'opacity="{min(abs(level) / LEVELS, 1):.1f}"/>'
        for level, places in sorted(shades.items())
    ]
    size = n * cell
    edge = f'x="{left}" y="0.5" width="{wide * cell:.2f}" height="{size:.2f}"'
    parts.append(f'<rect class="grid" fill="none" {edge}/>')
    if labels and n <= NAMED:
        for i, label in enumerate(labels):
            shown = label if len(label) <= 16 else label[:15] + "…"
            y = (i + 0.5) * cell + 4
            parts.append(f'<text x="{left - 6}" y="{y:.1f}" text-anchor="end">')
            parts.append(f"<title>{escaped(label)}</title>{escaped(shown)}</text>")
    return figure(title, parts, WIDTH, size + 2)


def spectrum_chart(title: str, values: Sequence[float], kept: int) -> Markup:
    """Eigenvalues from the largest down, on a logarithmic axis, and which of them count as zero.

    Args:
        title: above the chart.
        values: (d_in,), ascending; those at zero are drawn at the smallest positive one.
        kept: how many of the smallest the null space keeps; they are shaded.
    """
    falling = [float(value) for value in reversed(values)]
    positive = [value for value in falling if 0 < value < math.inf]
    if not positive:
        return figure(title, [])
    floor = max(min(positive), max(positive) * 1e-14)
    step = max(1, len(falling) // POINTS)
    points = [(i + 1.0, max(falling[i], floor)) for i in range(0, len(falling), step)]
    if points[-1][0] != len(falling):
        points.append((float(len(falling)), max(falling[-1], floor)))
    x_axis, y_axis = _axes(points, None, True)
    removed = len(falling) - kept
    edge = x_axis.place(removed + 0.5)
    parts = [
        f'<rect class="area" x="{edge:.1f}" y="{TOP}" width="{max(x_axis.end - edge, 0):.1f}" '
        f'height="{HEIGHT - TOP - BOTTOM}"/>',
        *frame(x_axis, y_axis, "direction, largest eigenvalue first"),
        f'<line class="mark" x1="{edge:.1f}" x2="{edge:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>',
        _polyline(points, x_axis, y_axis, 0),
    ]
    within = x_axis.end - edge > 150
    x, side = ((edge + x_axis.end) / 2, "middle") if within else (edge - 6, "end")
    parts.append(
        f'<text class="strong" x="{x:.1f}" y="{TOP + 16}" text-anchor="{side}">'
        f"{kept:,} of {len(falling):,} kept</text>"
    )
    return figure(title, parts, WIDTH, HEIGHT)


def gauge(value: float | None) -> Markup:
    """A small bar for a share in 0..1, with the number after it; a dash for None."""
    if value is None:
        return escaped(None)
    width = 100 * min(max(value, 0.0), 1.0)
    return Markup(
        '<span class="share">'
        '<svg class="gauge" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="10" rx="2"/>'
        f'<rect class="fill-0" width="{width:.1f}" height="10" rx="2"/></svg>{value:.3f}</span>'
    )


def _drawable(points: Sequence[tuple[float, float]], log_y: bool) -> list[tuple[float, float]]:
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    return [(x, y) for x, y in finite if y > 0] if log_y else finite


def _axes(
    points: Sequence[tuple[float, float]], y_range: tuple[float, float] | None, log_y: bool
) -> tuple[Axis, Axis]:
    xs, ys = zip(*points, strict=True)
    low, high = y_range or (min(ys), max(ys))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    return Axis(min(xs), max(xs), LEFT, right, False), Axis(low, high, bottom, TOP, log_y)


def _polyline(points: Sequence[tuple[float, float]], x_axis: Axis, y_axis: Axis, i: int) -> str:
    places = [f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in points]
    if len(places) == 1:
        x, _, y = places[0].partition(",")
        return f'<circle class="fill-{i % COLOURS}" cx="{x}" cy="{y}" r="4"/>'
    return f'<polyline class="line stroke-{i % COLOURS}" points="{" ".join(places)}"/>'
