"""An axis of a plot: where values lie on it, and which round values are marked.

In: the range of the values, and of their places. Out: :class:`Axis`.
"""

from __future__ import annotations

import math


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
