"""Write target values into the rewrite layers: keys, residuals, solve, write, layer by layer.

In: groups with their target values z, the factors in place. Out: longer factors, one row a group.
Equation (MEMIT Algorithm 1, AlphaEdit Eq. 11): at layer l of the L rewrite layers still to go, the
wanted residual is R = (z - h) / L with h taken from the model as edited so far (or a part by how
little the layer disturbs, see ``layer_shares``); the layer gets
Delta = R^T E (G + D)^-1 A. There is no optimisation here, so stored targets are written again at
the cost of forward passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from alphaedit_peft import algebra
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.cholesky import KeptFactor
from alphaedit_peft.editing.keys import EditKeys, keys_by_layer, take_keys
from alphaedit_peft.editing.prompts import EditRows
from alphaedit_peft.editing.runner import Runner
from alphaedit_peft.editing.state import EditState
from alphaedit_peft.settings import EditOptions
from alphaedit_peft.solve_metric import Metric

GUARD_FACTOR, GUARD_STEPS = 2.0, 20

Write = Callable[[int, LowRankDelta], None]


@dataclass(frozen=True)
class SolvedLayers:
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


def solve_layers(
    runner: Runner,
    metric: Metric,
    leaders: Sequence[EditRows],
    targets: Tensor,
    state: EditState,
    protected: Sequence[bool],
    write: Write,
    taken: EditKeys | None = None,
) -> SolvedLayers:
    """Write a batch of target values into the model, beside what ``state`` has in place.

    Args:
        leaders: for each group the edit whose prompts give its key.
        targets: z, (groups, d).
        protected: (n,), whether each row in place shall keep its output.
        write: puts a layer's new factors into the runner's model.
        taken: of the leaders in the model as it is, where they have been taken already.

    Warns:
        UserWarning: the norm guard acted.
    """
    timed = runner.phases.timed
    with timed("keys"):
        now = take_keys(runner, leaders) if taken is None else taken
        parts = _parts(runner, metric, leaders)
    start = now.hidden.to(targets)  # (groups, d)
    solved: dict[int, Solved] = {}
    shares, kept = [], []
    for layer, part in zip(runner.layers, parts, strict=True):
        residuals = (targets - now.hidden.to(targets)) * part
        with timed("solve"):
            rows = metric.rows(layer, now.keys)  # (groups, d_in)
            solved[layer] = solve_layer(
                runner.settings, metric, layer, rows, residuals, state, protected
            )
        if solved[layer].doubled:
            warnings.warn(
                f"norm_guard={runner.settings.norm_guard:g} raised the ridge of layer {layer} "
                f"{GUARD_FACTOR ** solved[layer].doubled:g}-fold, since edits in this batch have "
                "nearly the same key; they reach less of their residuals: leave some of them out, "
                "or lower key_cosine, from which on edits share a row",
                stacklevel=2,
            )
        shares.append(algebra.residual_share(residuals, solved[layer].reached.to(residuals)))
        kept.append(rows.square().sum(1) / now.keys.square().sum(1))
        with timed("write"):
            write(layer, solved[layer].delta)
        with timed("keys"):
            now = now.onward(runner)
    total = algebra.residual_share(targets - start, now.hidden.to(targets) - start)
    return SolvedLayers(
        {layer: found.delta for layer, found in solved.items()},
        torch.stack([part.cpu() for part in shares]),
        torch.stack([part.cpu() for part in kept]),
        total.cpu(),
        tuple(layer for layer, found in solved.items() if found.doubled),
        {layer: found.kept for layer, found in solved.items()},
    )


def _parts(runner: Runner, metric: Metric, leaders: Sequence[EditRows]) -> list[float]:
    """For each layer, its part of what is left of z - h: equal ones are 1/L, ..., 1/2, 1.

    By disturbance, each layer's share of z - h is as 1 / (a C0 a^T / |a|^4): if residuals r_l add
    up to z - h, this makes the sum of |r_l|^2 a C0 a^T / |a|^4 least. C0 is known where rows are
    keys.
    """
    weights = [1.0] * len(runner.layers)
    if runner.settings.layer_shares == "disturbance" and metric.rows_are_keys:
        for position, (layer, keys) in enumerate(keys_by_layer(runner, leaders)[0].items()):
            weights[position] = 1 / metric.disturbance(layer, keys)
    return [weight / sum(weights[i:]) for i, weight in enumerate(weights)]


@dataclass(frozen=True)
class Solved:
    """A layer after its solve.

    ``delta``: the factors; ``reached`` (groups, d_out): what the update puts out for the new keys;
    ``doubled``: how often the norm guard doubled the ridge; ``kept``: for the next batch.
    """

    delta: LowRankDelta
    reached: Tensor
    doubled: int
    kept: KeptFactor


def solve_layer(
    settings: EditOptions,
    metric: Metric,
    layer: int,
    rows: Tensor,
    residuals: Tensor,
    state: EditState,
    protected: Sequence[bool],
) -> Solved:
    """Extend a layer's factors, as ``state`` has them in place, by a batch.

    Rows in place have ``prior_ridge`` times the ridge of their own batch: the less it is, the
    better they keep their outputs, and at 0 the update is orthogonal to them. While the update is
    more than ``norm_guard`` times what orthogonal keys would need, every ridge grows: keys that are
    nearly alike would otherwise be told apart by enormous weights.

    Args:
        rows: K M of the new groups, (groups, d_in).
        residuals: R, (groups, d_out).
        protected: (n,), whether each row in place shall keep its output.

    Raises:
        ValueError: keys or residuals that are not finite.
    """
    before, count = state.factors[layer].to(rows.device), len(rows)
    prior = before.A  # (n, d_in)
    residuals = residuals.to(rows.device).double()
    if not (rows.isfinite().all() and residuals.isfinite().all()):
        raise ValueError("keys or residuals hold NaN or infinity; check the base model's weights")
    A = torch.cat([prior, metric.stored(layer, rows).to(prior)])  # (n + groups, d_in)
    blocks = [len(list(some)) for _, some in groupby(state.batches)]
    known = state.kept.get(layer, KeptFactor.empty(prior)).matching(prior, blocks)
    start, missing = len(known.ridges), blocks[len(known.blocks) :]
    lacking = [*prior[start:].split(missing)] if missing else []
    whole = known.extended(A, metric.grams(layer, prior[:start], [*lacking, rows.to(prior)]))
    ridges = _ridges(settings, metric, whole, protected)
    whole = whole.factored(ridges)
    columns = whole.columns(count)  # (n + groups, groups)
    squares, doubled, guard = whole.squares[len(prior) :], 0, settings.norm_guard
    while guard and doubled < GUARD_STEPS:
        growth = algebra.amplification(whole.times(columns), squares, columns, residuals)
        if not growth > guard:
            break
        doubled += 1
        columns = whole.at_once(ridges * GUARD_FACTOR**doubled).columns(count)
    reached = (whole.grams[-1] @ columns) @ residuals  # (groups, d_out)
    B = torch.nn.functional.pad(before.B, (0, count))  # (d_out, n + groups)
    delta = LowRankDelta(A, B + (residuals.T @ columns.T).to(B))
    return Solved(delta, reached, doubled, whole)


def _ridges(
    settings: EditOptions, metric: Metric, factor: KeptFactor, protected: Sequence[bool]
) -> Tensor:
    """D, (n + groups,): every row's own batch's ridge; infinite for rows no longer protected."""
    found: list[float] = []
    for squares in factor.squares.cpu().split(list(factor.blocks)):
        some = squares[squares > 0]  # rows of zeros are nobody's key
        found += [metric.ridge(some if len(some) else squares)] * len(squares)
    ridges = factor.ridges.new_tensor(found)
    prior = len(found) - factor.blocks[-1]
    if settings.prior_ridge is not None:
        ridges[:prior] *= settings.prior_ridge
    ridges[:prior][~torch.tensor(protected, dtype=torch.bool, device=ridges.device)] = torch.inf
    return ridges
