"""Plots as inline SVG: lines, bars, a heat map, a spectrum; pure functions, no library.

In: numbers and labels. Out: a ``<figure>`` as :class:`~alphaedit_peft.report.html.Markup`, whose
colours are classes that the page's style sets, light or dark. Values that are not finite are left
out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from alphaedit_peft.report.axis import Axis
from alphaedit_peft.report.frame import (
    BOTTOM,
    COLOURS,
    HEIGHT,
    LABEL,
    LEFT,
    RIGHT,
    ROW,
    TOP,
    WIDTH,
    figure,
    frame,
    legend,
)
from alphaedit_peft.report.html import Markup, escaped

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
        parts.append(_line(points, x_axis, y_axis, i))
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
        _line(points, x_axis, y_axis, 0),
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


def _line(points: Sequence[tuple[float, float]], x_axis: Axis, y_axis: Axis, i: int) -> str:
    places = [f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in points]
    if len(places) == 1:
        x, _, y = places[0].partition(",")
        return f'<circle class="fill-{i % COLOURS}" cx="{x}" cy="{y}" r="4"/>'
    return f'<polyline class="line stroke-{i % COLOURS}" points="{" ".join(places)}"/>'
