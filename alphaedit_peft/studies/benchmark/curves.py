"""How solve time and memory grow: over the edits made so far, over d_in, over a model's size.

In: a grid of sizes. Out: :class:`Growth`, points of three curves. Over edits and over d_in the
systems are made of random keys: n + u equations for n rows in place and u new edits, or d_in of
them the plain way, whatever n is. Over depth and width whole batches run on models with random
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.cholesky import KeptFactor
from alphaedit_peft.editing.solve_layers import Solved, solve_layer
from alphaedit_peft.editing.state import EditState
from alphaedit_peft.edits import Edit
from alphaedit_peft.nullspace import NullSpace
from alphaedit_peft.pack import EditRecord
from alphaedit_peft.settings import EditOptions
from alphaedit_peft.solve_metric import Projector
from alphaedit_peft.studies.base import Progress
from alphaedit_peft.studies.benchmark import subject
from alphaedit_peft.studies.benchmark.machine import PeakMemory, describe_machine, timed
from alphaedit_peft.studies.benchmark.measure import benchmark
from alphaedit_peft.studies.benchmark.plain import plain_update
from alphaedit_peft.studies.benchmark.timings import Plan

RIDGE = 10.0
VOCABULARY, STEPS, EDITS = 2048, 5, 8  # of the batches that whole models run
CONTEXTS, LENGTH = 5, 10  # as many as the paper's code samples, and as long
HEAD = 64  # width of an attention head


@dataclass(frozen=True)
class Grid:
    """The sizes of the curves."""

    edits: tuple[int, ...]  # rows in place, at a width of ``d_in``
    widths: tuple[int, ...]  # d_in, with ``rows`` rows in place
    d_in: int
    rows: int
    new: int  # edits that are solved
    d_out: int
    depths: tuple[int, ...]  # blocks of models of hidden size ``hidden[0]``
    hidden: tuple[int, ...]  # sizes of models of ``depths[0]`` blocks


SMALL = Grid((0, 100, 300, 1000), (512, 1024, 2048), 2048, 500, 100, 512, (4, 8), (64, 128))
FULL = Grid(
    (0, 100, 300, 1000, 2000, 5000, 10000),
    (1024, 2048, 4096, 6400, 8192, 14336),
    6400,
    2000,
    100,
    1600,
    (8, 16, 32, 48),
    (256, 512, 1024, 1600),
)


@dataclass(frozen=True)
class Point:
    """One measurement.

    ``method``: ``ours``, from what the last batch left; ``anew``, from the rows alone, as after a
    load; ``plain``, d_in x d_in; ``batch``, all of a batch on a model.
    """

    curve: str  # edits, widths, depths or hidden
    at: int  # the value along it
    method: str
    seconds: float  # of one rewrite layer's solve, or of the batch
    state: int  # bytes kept for the next batch, of one rewrite layer; 0 for batches
    memory: int  # peak above what was there before, bytes
    floor: float | None = None  # least seconds of its arithmetic, where operations were counted


@dataclass(frozen=True)
class Growth:
    """All points of a grid, and the machine they were measured on."""

    grid: Grid
    machine: dict[str, Any]
    points: tuple[Point, ...]

    def curve(self, name: str, method: str) -> list[Point]:
        """The points of one curve by one method, in order."""
        return [p for p in self.points if (p.curve, p.method) == (name, method)]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def growth(
    grid: Grid, device: torch.device | str = "cpu", progress: Progress = lambda text: None
) -> Growth:
    """Measure every point of a grid once, after a warm-up.

    The largest width takes a few times its square in float32, on ``device``, where systems are
    solved and models run; ``progress`` is called with a line now and then.
    """
    place = torch.device(device)
    list(_solves(replace(grid, d_in=64, new=8), "edits", 16, 64, place))  # warms up
    points: list[Point] = []
    for rows in grid.edits:
        progress(f"{rows} rows in place, d_in {grid.d_in}")
        points += _solves(grid, "edits", rows, grid.d_in, place)
    for width in grid.widths:
        progress(f"d_in {width}, {grid.rows} rows in place")
        points += _solves(grid, "widths", grid.rows, width, place)
    for depth in grid.depths:
        progress(f"a model of {depth} blocks")
        points.append(_batch("depths", depth, depth, grid.hidden[0], place))
    for hidden in grid.hidden:
        progress(f"a model of hidden size {hidden}")
        points.append(_batch("hidden", hidden, grid.depths[0], hidden, place))
    return Growth(grid, describe_machine(place), tuple(points))


def _solves(grid: Grid, curve: str, rows: int, width: int, device: torch.device) -> Iterator[Point]:
    """One layer's solve with ``rows`` rows in place, here and the plain way."""
    system = System.drawn(rows, grid.new, width, grid.d_out, device)
    at, factors = rows if curve == "edits" else width, system.state.factors[0]

    def point(method: str, state: int, work: Callable[[], object]) -> Point:
        with PeakMemory(device) as memory:
            seconds = timed(work, device)
        return Point(curve, at, method, seconds, state, memory.above)

    size = factors.A.nbytes + factors.B.nbytes
    yield point("anew", size, system.ours)
    kept = system.ours().kept
    halves = 2 * sum(part.nbytes for part in kept.grams[:-1])  # G and L of the rows in place
    yield point("ours", size + halves, lambda: system.ours(kept))
    projector, cache = system.dense()
    size = projector.nbytes + cache.nbytes
    yield point("plain", size, lambda: system.plain(projector, cache))


@dataclass(frozen=True, eq=False)
class System:
    """One layer's solve: rows in place, keys (u, d_in) and residuals (u, d_out) of a batch."""

    metric: Projector
    state: EditState
    keys: Tensor
    residuals: Tensor

    @classmethod
    def drawn(cls, rows: int, new: int, width: int, d_out: int, device: torch.device) -> System:
        """A system of random keys, with rows in place that were made in batches of ``new``."""
        random = torch.Generator(device).manual_seed(rows + width)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, device=device)

        half = subject.random_half(width, random)
        space = NullSpace({0: half}, width - width // 2, "rank", 2 * width)
        prior = space.project(0, draw(rows, width))
        delta = LowRankDelta(prior, torch.zeros(d_out, rows, device=device))
        records = tuple(
            EditRecord(Edit(f"s{row}", "{} is", "t"), row=row, batch=row // new, prefix=f"s{row}")
            for row in range(rows)
        )
        state = EditState({0: delta}, records, torch.zeros(rows, d_out, device=device))
        return cls(Projector(space, RIDGE, False), state, draw(new, width), draw(new, d_out))

    def ours(self, kept: KeptFactor | None = None) -> Solved:
        """Project and solve as an edit does, from what the batch before left or from the rows."""
        state = replace(self.state, kept={} if kept is None else {0: kept})
        rows, protected = self.metric.rows(0, self.keys), [True] * state.rank
        options = EditOptions(norm_guard=0.0)
        return solve_layer(options, self.metric, 0, rows, self.residuals, state, protected)

    def dense(self) -> tuple[Tensor, Tensor]:
        """P and the sum of k k^T over the keys in place, (d_in, d_in) each."""
        prior = self.state.factors[0].A
        identity = torch.eye(prior.shape[1], device=prior.device)
        return self.metric.null_space.project(0, identity), prior.T @ prior

    def plain(self, projector: Tensor, cache: Tensor) -> Tensor:
        """The update the plain way, (d_out, d_in)."""
        return plain_update(projector, cache, self.keys, self.residuals, RIDGE)


def _batch(curve: str, at: int, depth: int, hidden: int, device: torch.device) -> Point:
    """A small batch on a random GPT-2 of that depth and hidden size."""
    fields = {"n_layer": depth, "n_embd": hidden, "n_head": max(1, hidden // HEAD)}
    shape = subject.Shape("gpt2", {**fields, "vocab_size": VOCABULARY, **subject.ENDS})
    model = subject.random_model(subject.shape_config(shape), torch.float32, device)
    tokenizer = subject.stand_in_tokenizer(VOCABULARY)
    contexts = subject.random_texts(tokenizer, CONTEXTS * LENGTH, LENGTH)
    config = replace(subject.benchmark_config(steps=STEPS), contexts=contexts)
    small = subject.Subject(f"{depth} x {hidden}", model, tokenizer, config)
    edits, plan = subject.made_up_edits(tokenizer, EDITS), Plan(EDITS, objectives=("alphaedit",))
    found = benchmark(small, subject.random_statistics(small), edits, plan).sessions[0]
    batch, least = found.batches[0], found.floor.total if found.floor else None
    return Point(curve, at, "batch", batch.bare[0], 0, batch.memory, least)
