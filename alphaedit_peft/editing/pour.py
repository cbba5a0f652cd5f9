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
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaedit_peft import algebra
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.editing.bench import Bench
from alphaedit_peft.editing.objective import AlphaEdit, Objective
from alphaedit_peft.editing.prompts import EditRows

Factors = Mapping[int, LowRankDelta]
Write = Callable[[int, LowRankDelta], None]
GUARD_FACTOR, GUARD_STEPS = 2.0, 20


@dataclass(frozen=True)
class Poured:
    """Factors after a batch, and how far they reach.

    ``shares`` (layers, groups) of each layer's wanted residual reached; ``kept`` (layers, groups),
    |A|^2 / |K|^2, what projection leaves of each squared key length; ``total`` (groups,), the share
    of z - h that the hidden state moved in the end; ``guarded`` the layers whose ridge the norm
    guard raised.
    """

    factors: dict[int, LowRankDelta]
    shares: Tensor
    kept: Tensor
    total: Tensor
    guarded: tuple[int, ...] = ()


def pour(
    bench: Bench,
    objective: Objective,
    leaders: Sequence[EditRows],
    targets: Tensor,
    factors: Factors,
    protected: Sequence[bool],
    write: Write,
) -> Poured:
    """Write a batch of target values into the model.

    Args:
        bench: the model, which ``write`` changes.
        objective: the metric of the solve.
        leaders: for each group the edit whose prompts give its key.
        targets: z, (groups, d).
        factors: by layer, (n, d_in) and (d_out, n), in place before this batch.
        protected: (n,), whether each row in place shall keep its output.
        write: puts a layer's new factors into the model.

    Warns:
        UserWarning: the norm guard acted.
    """
    bare = [leader.rows[0] for leader in leaders]
    last = bench.layers[-1]
    start = bench.hidden(bare, last).to(targets)  # (groups, d)
    poured: dict[int, LowRankDelta] = {}
    shares, kept, guarded = [], [], []
    hidden = start
    for layer, part in zip(bench.layers, _parts(bench, objective, leaders), strict=True):
        residuals = (targets - hidden) * part
        keys = mean_keys(bench, leaders, layer)  # (groups, d_in)
        rows = objective.rows(layer, keys)
        poured[layer], reached, doubled = _extend(
            bench.config, objective, layer, rows, residuals, factors[layer], protected
        )
        if doubled:
            guarded.append(layer)
            _tell_of_guard(bench, layer, doubled)
        shares.append(algebra.residual_share(residuals, reached.to(residuals)))
        kept.append(rows.square().sum(1) / keys.square().sum(1))
        write(layer, poured[layer])
        hidden = bench.hidden(bare, last).to(targets)
    total = algebra.residual_share(targets - start, hidden - start)
    columns = [torch.stack([part.cpu() for part in parts]) for parts in (shares, kept)]
    return Poured(poured, columns[0], columns[1], total.cpu(), tuple(guarded))


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
        for position, layer in enumerate(bench.layers):
            rows = objective.rows(layer, mean_keys(bench, leaders, layer)).double()
            moved = space.moment_quadratic(layer, rows).diagonal()
            cost = moved / rows.square().sum(1).square().clamp_min(1e-300)
            weights[position] = 1 / max(float(cost.median()), 1e-300)
    return [weight / sum(weights[i:]) for i, weight in enumerate(weights)]


def mean_keys(bench: Bench, leaders: Sequence[EditRows], layer: int) -> Tensor:
    """Keys (groups, d_in): the bare prompt's and the mean over contexts', half each.

    The paper averages over contexts (Eq. 2 of MEMIT); its code averages over kinds of context
    first, and the bare prompt is a kind of its own. Without contexts it is the bare prompt's.
    """
    flat = [row for leader in leaders for row in leader.rows]
    keys = bench.keys(flat, layer).unflatten(0, (len(leaders), -1))  # (groups, contexts, d_in)
    bare, others = keys[:, 0], keys[:, 1:]
    return bare if others.shape[1] == 0 else (bare + others.mean(1)) / 2


def _extend(
    config: AlphaEditConfig,
    objective: Objective,
    layer: int,
    rows: Tensor,
    residuals: Tensor,
    before: LowRankDelta,
    protected: Sequence[bool],
) -> tuple[LowRankDelta, Tensor, int]:
    """One layer's solve: longer factors, the output (groups, d_out) of the keys, ridge doublings.

    Rows in place have ``prior_ridge`` times the new rows' ridge: the less it is, the better they
    keep their outputs, and at 0 the update is orthogonal to them. While the update is more than
    ``norm_guard`` times what orthogonal keys would need, every ridge grows: keys that are nearly
    alike would otherwise be told apart by enormous weights.
    """
    guard = config.norm_guard or float("inf")
    count, prior = len(rows), before.rank
    new = torch.arange(prior, prior + count, device=rows.device)
    together = torch.cat([before.A.to(rows), rows])  # (n + groups, d_in)
    gram = objective.gram(layer, together)
    ridge = objective.ridge(gram[prior:, prior:])
    ridges = torch.full((prior + count,), ridge, dtype=torch.float64, device=rows.device)
    if config.prior_ridge is not None:
        ridges[:prior] *= config.prior_ridge
    ridges[:prior][~torch.tensor(protected, dtype=torch.bool, device=rows.device)] = torch.inf
    residuals = residuals.to(rows.device)
    coefficients = algebra.solve(gram, residuals, ridges, new)
    doubled = 0
    while (
        doubled < GUARD_STEPS and algebra.amplification(gram, coefficients, residuals, new) > guard
    ):
        doubled += 1
        coefficients = algebra.solve(gram, residuals, ridges * GUARD_FACTOR**doubled, new)
    stored = objective.stored(layer, rows)
    return before.extended(stored, coefficients), gram[new] @ coefficients, doubled
