"""What a benchmark measures and what it found, as values: times, their floors, memory, ratios.

In: a :class:`Plan`, then measurements. Out: :class:`Findings`, which gives all of it as plain JSON
values. Times are in seconds, memory in bytes, operations count two for a multiply-add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Any, ClassVar

from alphaedit_peft.edits import Edit

OBJECTIVES = ("alphaedit", "memit")


@dataclass(frozen=True)
class Plan:
    """What is measured; a number below its least or an unknown objective is a ValueError."""

    edits: int = 100  # in a batch
    batches: int = 1  # one on top of the other
    repeats: int = 1  # of everything that is timed, in turn; medians are given
    objectives: tuple[str, ...] = OBJECTIVES
    plain_edits: int = 0  # how many of the first batch's to make the plain way
    floor: bool = True  # count operations, in an untimed run of the first batch
    inference: bool = False  # time forward passes with packs of growing rank

    def __post_init__(self) -> None:
        for name in ("edits", "batches", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        unknown = [name for name in self.objectives if name not in OBJECTIVES]
        if unknown or not self.objectives:
            raise ValueError(f"objectives={self.objectives} must be some of {OBJECTIVES}")
        if not 0 <= self.plain_edits <= self.edits:
            raise ValueError(
                f"plain_edits={self.plain_edits} is outside 0..{self.edits}, the edits of a batch"
            )

    @property
    def needed(self) -> int:
        """How many edits all batches take."""
        return self.edits * self.batches

    def take(self, edits: Sequence[Edit]) -> tuple[Edit, ...]:
        """The first edits, as many as all batches take; ValueError where there are fewer."""
        if len(edits) < self.needed:
            raise ValueError(
                f"{len(edits)} edits are too few for {self.batches} batches of {self.edits}; give "
                f"{self.needed}, or ask for fewer"
            )
        return tuple(edits[: self.needed])


class Figures:
    """A dataclass that is written as JSON with what is derived from it, ``DERIVED``."""

    DERIVED: ClassVar[tuple[str, ...]] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        return {name: _plain(getattr(self, name)) for name in (*names, *self.DERIVED)}


def _plain(value: Any) -> Any:
    if isinstance(value, Figures):
        return value.to_json()
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Batch(Figures):
    """One batch of edits, over all repeats; ``totals`` are the phases and what is between."""

    DERIVED = ("total",)

    edits: int  # asked for
    rows_before: int  # of ``lora_A``, in place when it began
    made: int  # edits that were written
    rows: int  # new ones; fewer than edits where some share a key
    steps: float  # loss evaluations of a target value, the mean over edits
    seconds: Mapping[str, float]  # by phase, medians
    totals: tuple[float, ...]  # wall seconds of the whole call, one for each repeat
    contexts: tuple[float, ...]  # seconds of sampling and tokenising contexts, likewise
    memory: int  # peak above what was there before, the largest of the repeats

    @property
    def total(self) -> float:
        """Median over repeats."""
        return median(self.totals)

    @property
    def bare(self) -> tuple[float, ...]:
        """Seconds without contexts, which only the first batch samples, one for each repeat."""
        return tuple(a - b for a, b in zip(self.totals, self.contexts, strict=True))


@dataclass(frozen=True)
class Floor(Figures):
    """The arithmetic of the first batch by phase: what was counted, the least time it can take."""

    DERIVED = ("total",)

    operations: Mapping[str, Mapping[str, int]]  # by dtype
    seconds: Mapping[str, float]  # at the matrix rates of that machine
    tokens: float  # passes of one token, padding too, through all blocks

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Session(Figures):
    """Batches one after another with one objective, and the floor of the first."""

    objective: str
    batches: tuple[Batch, ...]
    floor: Floor | None = None


@dataclass(frozen=True)
class PlainSession(Figures):
    """One batch the plain way, of some of the edits.

    ``scaled`` to a whole batch, targets and keys are in proportion to the edits; the systems of
    d_in equations and the writes are per layer, and stay as they were measured.
    """

    DERIVED = ("seconds", "scaled", "scaled_floor", "total")

    edits: int  # that were made
    of: int  # so many in a batch
    runs: tuple[Mapping[str, float], ...]  # seconds by phase, as measured, one for each repeat
    memory: int  # peak above what was there before
    floor: Floor | None = None  # of these edits

    @property
    def seconds(self) -> dict[str, float]:
        """By phase, medians over repeats."""
        return {name: median(run[name] for run in self.runs) for name in self.runs[0]}

    @property
    def scaled(self) -> dict[str, float]:
        """Seconds by phase for a whole batch."""
        return self._scaled(self.seconds)

    @property
    def scaled_floor(self) -> dict[str, float]:
        """The floor by phase for a whole batch; empty where nothing was counted."""
        return {} if self.floor is None else self._scaled(self.floor.seconds)

    @property
    def totals(self) -> tuple[float, ...]:
        """Seconds of a whole batch, one for each repeat."""
        return tuple(sum(self._scaled(run).values()) for run in self.runs)

    @property
    def total(self) -> float:
        """Median over repeats."""
        return median(self.totals)

    def _scaled(self, seconds: Mapping[str, float]) -> dict[str, float]:
        factor = self.of / self.edits
        return {k: v * (factor if k in ("targets", "keys") else 1) for k, v in seconds.items()}


@dataclass(frozen=True)
class Forward(Figures):
    """A forward pass of some tokens: which model, and milliseconds."""

    DERIVED = ("tokens_per_second",)

    model: str
    rank: int
    tokens: int
    milliseconds: float

    @property
    def tokens_per_second(self) -> float:
        """How many tokens go through in a second."""
        return 1000 * self.tokens / self.milliseconds


@dataclass(frozen=True)
class Findings(Figures):
    """Everything a benchmark found."""

    head: Mapping[str, Any]  # machine, model, settings, edits: all that the figures depend on
    rates: Mapping[str, float]  # of a matrix product, operations a second by dtype
    statistics: Mapping[str, float]  # seconds of making them, and of first use by an objective
    sessions: tuple[Session, ...]  # one for each objective
    plain: PlainSession | None = None  # the same edits the plain way
    inference: tuple[Forward, ...] = ()  # what unmerged and merged packs cost in use

    @property
    def batches(self) -> dict[str, tuple[Batch, ...]]:
        """By objective."""
        return {session.objective: session.batches for session in self.sessions}

    @property
    def alphaedit_to_memit(self) -> tuple[float, ...]:
        """Seconds of AlphaEdit's batches to MEMIT's, run by run; empty without one of them."""
        if not {*OBJECTIVES} <= {*self.batches}:
            return ()
        ours, theirs = (
            map(sum, zip(*(batch.totals for batch in self.batches[name]), strict=True))
            for name in OBJECTIVES
        )
        return tuple(a / b for a, b in zip(ours, theirs, strict=True))

    @property
    def plain_to_ours(self) -> tuple[float, ...]:
        """Seconds of a batch the plain way to those here, both without contexts, run by run."""
        ours = self.batches.get("alphaedit")
        if ours is None or self.plain is None:
            return ()
        return tuple(a / b for a, b in zip(self.plain.totals, ours[0].bare, strict=True))

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, with the ratios: their median, and all runs (programs come and go).

        None in place of a ratio where one of its two sides was not measured.
        """
        ratios = {name: getattr(self, name) for name in ("alphaedit_to_memit", "plain_to_ours")}
        return super().to_json() | {
            name: {"median": median(runs), "runs": list(runs)} if runs else None
            for name, runs in ratios.items()
        }
