"""What causal tracing found: effects by token and block, by fact and over facts.

In: indirect effects. Out: :class:`FactTrace`, one fact, and :class:`Located`, averages by class of
token with their intervals, the peak, and the rewrite layers that it suggests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from alphaedit_peft.evaluation.intervals import Estimate, bootstrap
from alphaedit_peft.studies.tracing import MLP, STATES

CLASSES = ("first subject", "middle subject", "last subject", "first after", "further", "last")
LAST_SUBJECT = CLASSES[2]
DEEP, MANY, FEW = 16, 5, 3  # how many layers are rewritten, as in ``default_rewrite_layers``


@dataclass(frozen=True)
class FactTrace:
    """One fact, traced.

    Attributes:
        id: of the edit that names the fact.
        question: the prompt.
        target: the continuation whose probability is traced.
        clean: P(target) untouched.
        corrupted: P(target) with a corrupted subject, a mean over the samples.
        tokens: the prompt's tokens from the subject on; what stands before it cannot matter.
        classes: one of ``CLASSES`` for each token.
        effects: state -> (tokens, blocks), the indirect effects.
    """

    id: str
    question: str
    target: str
    clean: float
    corrupted: float
    tokens: tuple[str, ...]
    classes: tuple[str, ...]
    effects: Mapping[str, tuple[tuple[float, ...], ...]]

    def of_class(self, state: str, name: str) -> tuple[float, ...] | None:
        """Effects by block, (blocks,), a mean over a class's tokens; None where there are none."""
        rows = [row for row, c in zip(self.effects[state], self.classes, strict=True) if c == name]
        return tuple(mean(column) for column in zip(*rows, strict=True)) if rows else None


@dataclass(frozen=True)
class Located:
    """Traces of several facts, and how they were made.

    Attributes:
        traces: one a fact that the model knows.
        set_aside: how many facts it does not know.
        deviation: standard deviation of the embeddings of the facts' subjects, over all entries.
        noise: standard deviation of the noise, in units of ``deviation``.
        samples: draws of the noise.
        window: how many neighbouring blocks' MLP outputs are restored together.
        blocks: of the model.
    """

    traces: tuple[FactTrace, ...]
    set_aside: int
    deviation: float
    noise: float
    samples: int
    window: int
    blocks: int

    @property
    def clean(self) -> Estimate:
        """P(target) untouched, over the facts."""
        return bootstrap([trace.clean for trace in self.traces])

    @property
    def corrupted(self) -> Estimate:
        """P(target) with corrupted subjects, over the facts."""
        return bootstrap([trace.corrupted for trace in self.traces])

    def effect(self, state: str, name: str) -> tuple[Estimate, ...]:
        """Average indirect effect of a class by block, with intervals over facts; or nothing."""
        found = [trace.of_class(state, name) for trace in self.traces]
        rows = [row for row in found if row is not None]
        return tuple(bootstrap(column) for column in zip(*rows, strict=True))

    def effects(self, state: str) -> dict[str, tuple[Estimate, ...]]:
        """``effect`` of every class that occurs."""
        found = {name: self.effect(state, name) for name in CLASSES}
        return {name: values for name, values in found.items() if values}

    @property
    def peak(self) -> int:
        """The block whose MLP restores most at the subject's last token."""
        values = [estimate.value for estimate in self.effect(MLP, LAST_SUBJECT)]
        return values.index(max(values))

    @property
    def near_peak(self) -> tuple[int, ...]:
        """Blocks whose effect does not differ from the peak's: the interval of the difference,
        fact by fact, holds 0. The peak is one of them.
        """
        rows = [trace.of_class(MLP, LAST_SUBJECT) or () for trace in self.traces]
        gaps = [
            bootstrap([row[self.peak] - row[block] for row in rows]) for block in range(self.blocks)
        ]
        return tuple(block for block, gap in enumerate(gaps) if gap.low <= 0 <= gap.high)

    @property
    def suggested_layers(self) -> tuple[int, ...]:
        """Consecutive blocks up to the peak, five in deep models, three in others (MEMIT, 4.3).

        One block stays above the last of them, since an edit must have something to act through.
        """
        last = max(0, min(self.peak, self.blocks - 2))
        count = MANY if self.blocks >= DEEP else FEW
        return tuple(range(max(0, last - count + 1), last + 1))

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        own = ("set_aside", "deviation", "noise", "samples", "window", "blocks")
        return {
            **{name: getattr(self, name) for name in own},
            "clean": self.clean.to_json(),
            "corrupted": self.corrupted.to_json(),
            "effects": {
                state: {
                    name: [estimate.to_json() for estimate in values]
                    for name, values in self.effects(state).items()
                }
                for state in STATES
            },
            "peak": self.peak,
            "near_peak": list(self.near_peak),
            "suggested_layers": list(self.suggested_layers),
            "facts": [asdict(trace) for trace in self.traces],
        }
