"""Plots as inline SVG, without any library: lines, bars, intervals, moves, matrices, spectra.

In: points, estimates or values. Out: a ``<figure>`` as :class:`~alphaedit_peft.report.page.Markup`.
Colours are classes of the page's style, so that a chart follows its theme; values that are not
finite are left out, and nothing that is left gives a figure that says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from alphaedit_peft.evaluation.summary import Estimate
from alphaedit_peft.report.page import Markup, escaped

WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 38
COLOURS = 5  # classes stroke-0 ... of page.css
DASHES = ("", "6 3", "2 3", "8 3 2 3")  # lines beyond the colours are told apart by these
ROW, LABEL = 22, 130  # of a bar chart: height of a bar, width of its label
POINTS = 400  # of a spectrum's line; more than a screen shows
LEVELS = 10  # shades of a heat map
NAMED = 12  # a heat map of more rows has no labels
NUMBERS = 104  # of bars with intervals: width of the numbers

Points = Sequence[tuple[float, float]]
Course = Sequence[tuple[float, Estimate]]
Moved = Sequence[Sequence[Sequence[float]]]  # ((x, y) before, (x, y) after)


def line_chart(
    title: str,
    series: Mapping[str, Points],
    *,
    x_label: str = "",
    y_label: str = "",
    y_range: tuple[float, float] | None = None,
    log_y: bool = False,
) -> Markup:
    """Lines, each through its points (x, y); one of a single point is a dot.

    Args:
        series: name -> points, in the order of x.
        y_range: lowest and highest y; None: those of the points.
        log_y: a logarithmic y axis; points at zero and below are left out.
    """
    lines = {
        name: [(x, y) for x, y in points if _finite(x, y) and (y > 0 or not log_y)]
        for name, points in series.items()
    }
    every = [point for points in lines.values() for point in points]
    if not every:
        return figure(title, [])
    axes = _axes(every, y_range, log_y)
    parts = frame(*axes, x_label, y_label)
    parts += [_line(_places(points, *axes), i) for i, points in enumerate(lines.values())]
    return figure(title, parts, WIDTH, HEIGHT, legend(list(lines)))


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
        courses: name -> (x, estimate), in the order of x.
        scale: shown is ``scale`` times each value.
        y_range: lowest and highest y shown, of scaled values; None: those of the intervals.
    """
    lines = [
        [
            (x, scale * e.value, scale * e.low, scale * e.high)
            for x, e in found
            if _finite(x, e.value, e.low, e.high)
        ]
        for found in courses.values()
    ]
    ends = [(x, end) for points in lines for x, _, *bounds in points for end in bounds]
    if not ends:
        return figure(title, [])
    axes = _axes(ends, y_range)
    parts = frame(*axes, x_label)
    for i, points in enumerate(lines):
        above, below = ([(point[0], point[k]) for point in points] for k in (3, 2))
        if above != below:
            around = " ".join([*_places(above, *axes), *reversed(_places(below, *axes))])
            parts.append(f'<polygon class="fill-{i % COLOURS}" opacity="0.15" points="{around}"/>')
    for i, points in enumerate(lines):
        places = _places([(x, value) for x, value, _, _ in points], *axes)
        parts.append(_line(places, i, dash(i)) + "".join(_dot(place, i, 2.5) for place in places))
    return figure(title, parts, WIDTH, HEIGHT, legend(list(courses)))


def scatter_chart(
    title: str, groups: Mapping[str, Moved], *, x_label: str = "", y_label: str = ""
) -> Markup:
    """Points that moved: a ring where each was, a dot where it is, a line between them.

    Each group, name -> ((x, y) before, (x, y) after), has a colour of its own.
    """
    drawn = {
        name: [pair for pair in pairs if all(_finite(*point) for point in pair)]
        for name, pairs in groups.items()
    }
    every = [point for pairs in drawn.values() for pair in pairs for point in pair]
    if not every:
        return figure(title, [])
    xs, ys = zip(*every, strict=True)
    axes = (
        Axis(min(xs), max(xs), LEFT + 6, WIDTH - RIGHT - 6),
        Axis(min(ys), max(ys), HEIGHT - BOTTOM - 6, TOP + 16),
    )
    parts = frame(*axes, x_label, y_label)
    for i, pairs in enumerate(drawn.values()):
        for pair in pairs:
            ring, dot = _places(pair, *axes)
            (x1, y1), (x2, y2) = ring.split(","), dot.split(",")
            stroke = f'class="stroke-{i % COLOURS}"'
            parts.append(
                f'<line {stroke} opacity="0.6" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'
                f'<circle {stroke} fill="none" cx="{x1}" cy="{y1}" r="3.5"/>{_dot(dot, i, 2)}'
            )
    return figure(title, parts, WIDTH, HEIGHT, legend(list(drawn), 1))


def bar_chart(title: str, bars: Sequence[tuple[str, float]], *, unit: str = "") -> Markup:
    """Bars to the right from zero for each (label, value from 0 on), with ``unit`` after each."""
    known = [(name, value) for name, value in bars if math.isfinite(value)]
    longest = max((value for _, value in known), default=0.0)
    parts = []
    for i, (name, value) in enumerate(known):
        length = (WIDTH - LABEL - 80) * max(value, 0.0) / longest if longest > 0 else 0.0
        shown = (f"{value:,}" if isinstance(value, int) else f"{value:.4g}") + unit
        parts.append(_bar(i, name, shown, length, f"{LABEL + length + 6:.1f}"))
    return figure(title, parts, WIDTH, len(known) * ROW + 4)


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
        bars: (label, estimate, number of its colour), estimates from 0 on.
        scale: shown is ``scale`` times the value; 100 for shares in percent.
        digits: after the point.
        full: the value at the right end; None: the largest upper bound.
    """
    known = [bar for bar in bars if math.isfinite(bar[1].value)]
    ends = [found.high if math.isfinite(found.high) else found.value for _, found, _ in known]
    axis = Axis(0.0, full or max(ends, default=0.0) or 1.0, LABEL, WIDTH - NUMBERS)
    parts = []
    for i, (name, found, colour) in enumerate(known):
        length = axis.place(found.value) - LABEL
        whisker = ""
        if _finite(found.low, found.high) and found.low != found.high:
            low, high, middle = axis.place(found.low), axis.place(found.high), i * ROW + ROW / 2
            whisker = (
                f'<path stroke="currentColor" fill="none" d="M{low:.1f} {middle - 3}v6'
                f'M{low:.1f} {middle}H{high:.1f}M{high:.1f} {middle - 3}v6"/>'
            )
        shown = with_half(found, scale, digits)
        parts.append(_bar(i, name, shown, length, f"{WIDTH - NUMBERS + 8}", colour, whisker))
    return figure(title, parts, WIDTH, len(known) * ROW + 4)


def with_half(found: Estimate, scale: float, digits: int) -> str:
    """``98.9 ± 1.2``: a value and half the width of its interval; no width where it has none."""
    half = scale * (found.high - found.low) / 2
    tail = f" ± {half:.{digits}f}" if math.isfinite(half) else ""
    return f"{scale * found.value:.{digits}f}{tail}"


def heat_map(title: str, values: Sequence[Sequence[float]], labels: Sequence[str] = ()) -> Markup:
    """A grid of cells: darker is nearer to 1, in another colour nearer to -1; 0 is empty.

    Args:
        values: rows of numbers in -1..1, equally long; a square, or wider or narrower than high.
        labels: of the rows (and of a square's columns), shown where they are at most ``NAMED``.
    """
    n = len(values)
    if not n:
        return figure(title, [])
    named = labels if n <= NAMED else ()
    left, wide = 120 if named else 4, len(values[0])
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
    edge = f'x="{left}" y="0.5" width="{wide * cell:.2f}" height="{n * cell:.2f}"'
    parts.append(f'<rect class="grid" fill="none" {edge}/>')
    for i, label in enumerate(named):
        parts.append(
            f'<text x="{left - 6}" y="{(i + 0.5) * cell + 4:.1f}" text-anchor="end">'
            f"<title>{escaped(label)}</title>{_cut(label, 16)}</text>"
        )
    return figure(title, parts, WIDTH, n * cell + 2)


def spectrum_chart(title: str, values: Sequence[float], kept: int) -> Markup:
    """Eigenvalues from the largest down, on a logarithmic axis, and which of them count as zero.

    Those at zero in ``values``, (d_in,), ascending, are drawn at the smallest positive one; the
    ``kept`` smallest, which the null space keeps, are shaded.
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
    axes = _axes(points, log_y=True)
    edge = axes[0].place(len(falling) - kept + 0.5)
    width = axes[0].end - edge
    x, side = ((edge + axes[0].end) / 2, "middle") if width > 150 else (edge - 6, "end")
    parts = [
        f'<rect class="area" x="{edge:.1f}" y="{TOP}" width="{max(width, 0):.1f}" '
        f'height="{HEIGHT - TOP - BOTTOM}"/>',
        *frame(*axes, "direction, largest eigenvalue first"),
        f'<line class="mark" x1="{edge:.1f}" x2="{edge:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>',
        _line(_places(points, *axes), 0),
        f'<text class="strong" x="{x:.1f}" y="{TOP + 16}" text-anchor="{side}">'
        f"{kept:,} of {len(falling):,} kept</text>",
    ]
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


def _finite(*values: float) -> bool:
    return all(map(math.isfinite, values))


def _axes(
    points: Points, y_range: tuple[float, float] | None = None, log_y: bool = False
) -> tuple[Axis, Axis]:
    xs, ys = zip(*points, strict=True)
    low, high = y_range or (min(ys), max(ys))
    across = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    return across, Axis(low, high, HEIGHT - BOTTOM, TOP, log_y)


def _places(points: Sequence[Sequence[float]], x_axis: Axis, y_axis: Axis) -> list[str]:
    return [f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in points]


def _line(places: Sequence[str], i: int, pattern: str | None = None) -> str:
    """A line in the colour of the i-th; without a pattern, one of a single place is a dot."""
    if pattern is None and len(places) == 1:
        return _dot(places[0], i, 4)
    line = f'<polyline class="line stroke-{i % COLOURS}"{pattern or ""}'
    return f'{line} points="{" ".join(places)}"/>'


def _dot(place: str, i: int, radius: float) -> str:
    x, y = place.split(",")
    return f'<circle class="fill-{i % COLOURS}" cx="{x}" cy="{y}" r="{radius}"/>'


def _bar(
    i: int, name: str, shown: str, length: float, x: str, colour: int = 0, whisker: str = ""
) -> str:
    """The i-th bar from above, its label to the left, and at ``x`` what is shown of its value."""
    y = i * ROW
    return (
        f"<g><title>{escaped(f'{name}: {shown}')}</title>"
        f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{_cut(name, 20)}</text>'
        f'<rect class="fill-{colour % COLOURS}" x="{LABEL}" y="{y + 4}" width="{length:.1f}" '
        f'height="{ROW - 8}" rx="2"/>{whisker}'
        f'<text class="strong" x="{x}" y="{y + 15}">{escaped(shown)}</text></g>'
    )


def _cut(label: str, most: int) -> Markup:
    return escaped(label if len(label) <= most else label[: most - 1] + "…")


def frame(x_axis: Axis, y_axis: Axis, x_label: str = "", y_label: str = "") -> list[str]:
    """Grid lines and the axes' numbers and names."""
    parts = []
    for value in y_axis.ticks():
        y = y_axis.place(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(value)}</text>'
        )
    below = HEIGHT - BOTTOM + 16
    for value in x_axis.ticks():
        x = x_axis.place(value)
        parts.append(f'<text x="{x:.1f}" y="{below}" text-anchor="middle">{_tick(value)}</text>')
    if x_label:
        place = f'x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle"'
        parts.append(f"<text {place}>{escaped(x_label)}</text>")
    if y_label:
        parts.append(f'<text x="{LEFT + 6}" y="{TOP + 12}">{escaped(y_label)}</text>')
    return parts


def legend(names: Sequence[str], least: int = 2) -> str:
    """Which line is whose; nothing where there are fewer than ``least``."""
    if len(names) < least:
        return ""
    keys = (
        f'<span class="key"><svg width="26" height="10" aria-hidden="true">'
        f'<line class="line stroke-{i % COLOURS}" stroke-width="2" x1="1" x2="25" y1="5" y2="5"'
        f"{dash(i)}/></svg> {escaped(name)}</span>"
        for i, name in enumerate(names)
    )
    return f'<p class="legend">{" ".join(keys)}</p>'


def dash(i: int) -> str:
    """The attribute that tells line ``i`` from one of the same colour."""
    pattern = DASHES[i // COLOURS % len(DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def figure(
    title: str, parts: Sequence[str], width: float = 0, height: float = 0, keys: str = ""
) -> Markup:
    """A chart with its title and legend; without parts it says that there is nothing to draw."""
    drawn = (
        f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escaped(title)}">{"".join(parts)}</svg>'
        if parts
        else '<p class="quiet">Nothing to draw.</p>'
    )
    return Markup(f"<figure><figcaption>{escaped(title)}</figcaption>{keys}{drawn}</figure>")


def _tick(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.6g}"


class Axis:
    """One axis, from ``low`` at ``start`` to ``high`` at ``end``; if ``log``, of values above 0."""

    def __init__(
        self, low: float, high: float, start: float, end: float, log: bool = False
    ) -> None:
        self.log, self.start, self.end = log, start, end
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self.low, self.high = low, high

    def place(self, value: float) -> float:
        """Where a value is drawn; values beyond the ends are drawn at the ends."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        share = (self._scaled(value) - low) / (high - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """At most seven round values within the axis."""
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            each = max(1, math.ceil((last - first) / 5))
            found = [10.0**power for power in range(first, last + 1, each)]
            return found if len(found) > 1 else [self.low, self.high]
        rough = (self.high - self.low) / 5
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, self.low)) if self.log else value
