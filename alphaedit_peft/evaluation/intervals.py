"""How sure a mean over cases is: bootstrap confidence intervals.

In: one number a case. Out: :class:`Estimate`. The percentile bootstrap (Efron 1979): draw as many
cases with replacement as there are, again and again, and take quantiles of what the statistic says
of each draw. Cases are the units, not prompts, since prompts of one case stand or fall together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
AT_ONCE = 4_000_000  # drawn indices held at a time

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A statistic over ``n`` cases, with the bounds of its confidence interval."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float]:
        """The four numbers under their names."""
        return asdict(self)


def bootstrap(
    values: Sequence[float] | Sequence[Sequence[float]],
    statistic: Callable[[Values], Values] | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """A statistic of the cases and its percentile interval; the same seed gives the same bounds.

    Args:
        values: (n,), one number a case, or (n, k), one row a case.
        statistic: takes means over the cases, (draws, k), to (draws,); the mean itself where not
            given.
        level: share of draws within the interval, in 0..1.
        resamples: how many draws.
        seed: of the draws.

    Raises:
        ValueError: no values, values that are not finite, or a level or number out of range.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.size == 0 or not np.isfinite(table).all():
        raise ValueError(f"{table.size} values, finite or not, give no interval; pass finite ones")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level={level}, resamples={resamples}: use 0 < level < 1, resamples >= 1")
    table = table.reshape(len(table), -1)  # (n, k)
    of_means = statistic or (lambda means: means[:, 0])
    n = len(table)
    random = np.random.default_rng(seed)
    draws, step = [], max(1, AT_ONCE // n)
    for start in range(0, resamples, step):
        drawn = random.integers(0, n, (min(step, resamples - start), n))
        draws.append(of_means(table[drawn].mean(1)))
    low, high = np.quantile(np.concatenate(draws), [(1 - level) / 2, (1 + level) / 2])
    value = of_means(table.mean(0, keepdims=True))[0]
    return Estimate(float(value), float(low), float(high), n)
