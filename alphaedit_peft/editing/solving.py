"""One layer's share of a batch: keys and residuals in, longer factors out.

In: the layer's new rows and wanted residuals, what is in place. Out: :class:`Solved`. Equation:
Delta = R^T E (G + D)^-1 A, where every row has the ridge of its own batch in D; the factor of G + D
is kept from the batch before and extended (see ``factoring``). What is kept is used only as far as
its rows are those in place, so that after a rollback, a load or a repour the rest is made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from alphaedit_peft import algebra
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.editing.objective import Objective
from alphaedit_peft.editing.state import EditState
from alphaedit_peft.factoring import KeptFactor

GUARD_FACTOR, GUARD_STEPS = 2.0, 20


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
    config: AlphaEditConfig,
    objective: Objective,
    layer: int,
    rows: Tensor,
    residuals: Tensor,
    state: EditState,
    protected: Sequence[bool],
) -> Solved:
    """Extend a layer's factors by a batch.

    Rows in place have ``prior_ridge`` times the ridge of their own batch: the less it is, the
    better they keep their outputs, and at 0 the update is orthogonal to them. While the update is
    more than ``norm_guard`` times what orthogonal keys would need, every ridge grows: keys that are
    nearly alike would otherwise be told apart by enormous weights.

    Args:
        config: resolved.
        objective: the metric.
        layer: block number.
        rows: K M of the new groups, (groups, d_in).
        residuals: R, (groups, d_out).
        state: in place before this batch.
        protected: (n,), whether each row in place shall keep its output.

    Raises:
        ValueError: keys or residuals that are not finite.
    """
    before, count = state.factors[layer].to(rows.device), len(rows)
    residuals = residuals.to(rows.device).double()
    if not (rows.isfinite().all() and residuals.isfinite().all()):
        raise ValueError("keys or residuals hold NaN or infinity; check the base model's weights")
    A = torch.cat([before.A, objective.stored(layer, rows).to(before.A)])
    whole = _extended(objective, layer, before.A, rows.to(before.A), state, A)
    ridges = _ridges(config, objective, whole, protected)
    whole = whole.factored(ridges)
    columns = whole.columns(count)  # (n + groups, groups)
    guard, doubled = config.norm_guard or float("inf"), 0
    while doubled < GUARD_STEPS and _grows(whole, columns, residuals, guard):
        doubled += 1
        columns = whole.at_once(ridges * GUARD_FACTOR**doubled).columns(count)
    reached = (whole.grams[-1] @ columns) @ residuals  # (groups, d_out)
    B = torch.nn.functional.pad(before.B, (0, count))  # (d_out, n + groups)
    delta = LowRankDelta(A, B + (residuals.T @ columns.T).to(B))
    return Solved(delta, reached, doubled, whole)


def _extended(
    objective: Objective, layer: int, prior: Tensor, rows: Tensor, state: EditState, A: Tensor
) -> KeptFactor:
    """The factor kept of the rows in place, with the products of those that it lacks and of new.

    ``prior`` (n, d_in) are the rows in place, ``rows`` (u, d_in) the new ones and ``A``
    (n + u, d_in) both as they go into ``lora_A``.
    """
    blocks = [len(list(rows)) for _, rows in groupby(state.batches)]
    found = state.kept.get(layer, KeptFactor.empty(prior)).matching(prior, blocks)
    start, missing = len(found.ridges), blocks[len(found.blocks) :]
    batches = [*prior[start:].split(missing), rows] if missing else [rows]
    return found.extended(A, objective.grams(layer, prior[:start], batches))


def _ridges(
    config: AlphaEditConfig, objective: Objective, factor: KeptFactor, protected: Sequence[bool]
) -> Tensor:
    """D, (n + groups,): every row's own batch's ridge; infinite for rows no longer protected."""
    found: list[float] = []
    for squares in factor.squares.cpu().split(list(factor.blocks)):
        some = squares[squares > 0]  # rows of zeros are nobody's key
        found += [objective.ridge(some if len(some) else squares)] * len(squares)
    ridges = factor.ridges.new_tensor(found)
    prior = len(found) - factor.blocks[-1]
    if config.prior_ridge is not None:
        ridges[:prior] *= config.prior_ridge
    ridges[:prior][~torch.tensor(protected, dtype=torch.bool, device=ridges.device)] = torch.inf
    return ridges


def _grows(factor: KeptFactor, columns: Tensor, residuals: Tensor, guard: float) -> bool:
    if guard == float("inf"):
        return False
    squares = factor.squares[len(columns) - len(residuals) :]
    return algebra.amplification(factor.times(columns), squares, columns, residuals) > guard
