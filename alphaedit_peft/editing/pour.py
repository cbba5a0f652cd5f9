"""Pour target values into the rewrite layers: keys, residuals, solve, write, layer by layer.

In: groups with their target values z, the factors in place. Out: longer factors, one row a group.
Equation (MEMIT Algorithm 1, AlphaEdit Eq. 11): at layer l of the L rewrite layers still to go, the
wanted residual is R = (z - h) / L with h taken from the model as edited so far (or a part by how
little the layer disturbs, see ``layer_shares``); the layer gets
Delta = R^T E (G + D)^-1 A. There is no optimisation here, so stored targets pour again at the cost
of forward passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alphaedit_peft import algebra
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.editing.bench import Bench
from alphaedit_peft.editing.objective import AlphaEdit, Objective
from alphaedit_peft.editing.prompts import EditRows
from alphaedit_peft.editing.readings import Readings, keys_by_layer, read
from alphaedit_peft.editing.solving import GUARD_FACTOR, Solved, solve_layer
from alphaedit_peft.editing.state import EditState
from alphaedit_peft.factoring import KeptFactor

Write = Callable[[int, LowRankDelta], None]


@dataclass(frozen=True)
class Poured:
    """Factors after a batch, and how far they reach.

    ``shares`` (layers, groups) of each layer's wanted residual reached; ``kept`` (layers, groups),
    |A|^2 / |K|^2, what projection leaves of each squared key length; ``total`` (groups,), the share
    of z - h that the hidden state moved in the end; ``guarded`` the layers whose ridge the norm
    guard raised; ``solvers`` by layer what the next batch's solve can begin with.
    """

    factors: dict[int, LowRankDelta]
    shares: Tensor
    kept: Tensor
    total: Tensor
    guarded: tuple[int, ...] = ()
    solvers: Mapping[int, KeptFactor] = field(default_factory=dict)


def pour(
    bench: Bench,
    objective: Objective,
    leaders: Sequence[EditRows],
    targets: Tensor,
    state: EditState,
    protected: Sequence[bool],
    write: Write,
    readings: Readings | None = None,
) -> Poured:
    """Write a batch of target values into the model.

    Args:
        bench: the model, which ``write`` changes.
        objective: the metric of the solve.
        leaders: for each group the edit whose prompts give its key.
        targets: z, (groups, d).
        state: what is in place before this batch.
        protected: (n,), whether each row in place shall keep its output.
        write: puts a layer's new factors into the model.
        readings: of the leaders in the model as it is, where they have been taken already.

    Warns:
        UserWarning: the norm guard acted.
    """
    timed = bench.phases.timed
    with timed("keys"):
        now = read(bench, leaders) if readings is None else readings
        parts = _parts(bench, objective, leaders)
    start = now.hidden.to(targets)  # (groups, d)
    solved: dict[int, Solved] = {}
    shares, kept = [], []
    for layer, part in zip(bench.layers, parts, strict=True):
        residuals = (targets - now.hidden.to(targets)) * part
        with timed("solve"):
            rows = objective.rows(layer, now.keys)  # (groups, d_in)
            solved[layer] = solve_layer(
                bench.config, objective, layer, rows, residuals, state, protected
            )
        if solved[layer].doubled:
            _tell_of_guard(bench, layer, solved[layer].doubled)
        shares.append(algebra.residual_share(residuals, solved[layer].reached.to(residuals)))
        kept.append(rows.square().sum(1) / now.keys.square().sum(1))
        with timed("write"):
            write(layer, solved[layer].delta)
        with timed("keys"):
            now = now.onward(bench)
    total = algebra.residual_share(targets - start, now.hidden.to(targets) - start)
    columns = [torch.stack([part.cpu() for part in found]) for found in (shares, kept)]
    return Poured(
        {layer: found.delta for layer, found in solved.items()},
        columns[0],
        columns[1],
        total.cpu(),
        tuple(layer for layer, found in solved.items() if found.doubled),
        {layer: found.kept for layer, found in solved.items()},
    )


def _tell_of_guard(bench: Bench, layer: int, doubled: int) -> None:
    warnings.warn(
        f"norm_guard={bench.config.norm_guard:g} raised the ridge of layer {layer} "
        f"{GUARD_FACTOR**doubled:g}-fold, since edits in this batch have nearly the same key; they "
        "reach less of their residuals: leave some of them out, or lower key_cosine, from which on "
        "edits share a row",
        stacklevel=2,
    )


def _parts(bench: Bench, objective: Objective, leaders: Sequence[EditRows]) -> list[float]:
    """For each layer, its part of what is left of z - h: equal ones are 1/L, ..., 1/2, 1.

    By disturbance, each layer's share of z - h is as 1 / (a C0 a^T / |a|^4): if residuals r_l add
    up to z - h, this makes the sum of |r_l|^2 a C0 a^T / |a|^4 least. Only AlphaEdit knows C0.
    """
    weights = [1.0] * len(bench.layers)
    if bench.config.layer_shares == "disturbance" and isinstance(objective, AlphaEdit):
        space = objective.null_space
        for position, (layer, keys) in enumerate(keys_by_layer(bench, leaders).items()):
            rows = objective.rows(layer, keys).double()
            moved = space.moment_quadratic(layer, rows).diagonal()
            cost = moved / rows.square().sum(1).square().clamp_min(1e-300)
            weights[position] = 1 / max(float(cost.median()), 1e-300)
    return [weight / sum(weights[i:]) for i, weight in enumerate(weights)]
