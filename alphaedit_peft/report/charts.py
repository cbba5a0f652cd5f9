"""Plots of evaluations as inline SVG: bars and lines with their intervals, and points that moved.

In: estimates, or pairs of points. Out: a ``<figure>`` as
:class:`~alphaedit_peft.report.html.Markup`, in the manner of ``svg``: colours are classes of the
page's style, and values that are not finite are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from alphaedit_peft.evaluation.intervals import Estimate
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
    dash,
    figure,
    frame,
    legend,
)
from alphaedit_peft.report.html import Markup, escaped

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
        parts.append(_line(points, x_axis, y_axis, i))
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


def _line(
    points: Sequence[tuple[float, float, float, float]], x_axis: Axis, y_axis: Axis, i: int
) -> str:
    places = [(x_axis.place(x), y_axis.place(value)) for x, value, _, _ in points]
    dots = "".join(
        f'<circle class="fill-{i % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places
    )
    through = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline class="line stroke-{i % COLOURS}"{dash(i)} points="{through}"/>{dots}'
