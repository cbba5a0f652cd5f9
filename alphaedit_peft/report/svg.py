"""What every chart has: its size, colours, axes with grid and numbers, legend, and figure.

In: axes, names, drawn parts. Out: SVG, and the figure around it. ``svg`` and ``charts`` draw in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from alphaedit_peft.report.page import Markup, escaped

WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 38
COLOURS = 5  # classes stroke-0 ... of page.css
DASHES = ("", "6 3", "2 3", "8 3 2 3")  # lines beyond the colours are told apart by these
ROW, LABEL = 22, 130  # of a bar chart: height of a bar, width of its label


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
    middle = (LEFT + WIDTH - RIGHT) / 2
    if x_label:
        parts.append(
            f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escaped(x_label)}</text>'
        )
    if y_label:
        parts.append(f'<text x="{LEFT + 6}" y="{TOP + 12}">{escaped(y_label)}</text>')
    return parts


def legend(names: Sequence[str], wanted: bool | None = None) -> str:
    """Which line is whose; nothing where there is one line only."""
    if not (len(names) > 1 if wanted is None else wanted):
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
    """One axis: values to places, and where its ticks are.

    Args:
        low, high: smallest and largest value.
        start, end: their places.
        log: whether the scale is logarithmic; values are above zero then.
    """

    def __init__(self, low: float, high: float, start: float, end: float, log: bool) -> None:
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
