"""The search for z, the hidden state after the last rewrite layer that makes the model say it.

In: groups of edits that share a key. Out: z = h + delta for each group, (groups, d): Adam descends
the loss of ``loss``, with |delta| clamped to a multiple of |h|. All edits of a chunk go through the
model together, and only through what delta reaches (see ``continuation``); an edit that is done
leaves the batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from alphaedit_peft import hooks
from alphaedit_peft.editing.groups import Group
from alphaedit_peft.editing.memory import by_halves
from alphaedit_peft.editing.runner import Runner
from alphaedit_peft.editing.targets.autocast import Autocast
from alphaedit_peft.editing.targets.continuation import (
    CacheDiffers,
    FromSubject,
    Resumable,
    Row,
    WholeRows,
)
from alphaedit_peft.editing.targets.loss import Loss, chunked, rows_of
from alphaedit_peft.settings import Settings

BETAS = (0.9, 0.999)
EPSILON = 1e-8


@dataclass(frozen=True)
class Targets:
    """Optimised values and how they were reached, one entry for each group.

    ``values`` z and ``hidden`` h are (groups, d); ``losses``, ``steps`` and ``said``, the share of
    prompts whose target greedy decoding says at z, are (groups,).
    """

    values: Tensor
    hidden: Tensor
    losses: Tensor
    steps: Tensor
    said: Tensor

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """All fields in their order."""
        return self.values, self.hidden, self.losses, self.steps, self.said

    @property
    def clamped(self) -> Tensor:
        """|z - h| / |h|, (groups,): at the clamp factor where the bound stopped the search."""
        return (self.values - self.hidden).norm(dim=1) / self.hidden.norm(dim=1)


def optimise_targets(
    runner: Runner, groups: Sequence[Group], progress: Callable[[int], None] = lambda n: None
) -> Targets:
    """Optimise every group's z, in chunks of at most ``target_tokens`` tokens.

    The model's state decides h, so edits made earlier count. ``progress`` is called with the number
    of groups that were finished.

    Warns:
        UserWarning: memory ran out, so that smaller chunks are used from there on.
    """
    autocast, how = Autocast(runner), (runner.settings, runner.switches)

    def run(members: list[int]) -> dict[int, tuple[Tensor, ...]]:
        own = [rows_of(groups[g], slot, *how) for slot, g in enumerate(members)]
        found = optimise_chunk(runner, autocast, [row for rows in own for row in rows])
        progress(len(members))
        return dict(zip(members, zip(*found.columns, strict=True), strict=True))

    parts = by_halves(
        list(chunked(runner, groups)),
        run,
        size=len,
        split=lambda left, most: [c[i : i + most] for c in left for i in range(0, len(c), most)],
        what="target values",
        setting="target_tokens",
    )
    found = {g: columns for part in parts for g, columns in part.items()}
    columns = zip(*(found[g] for g in range(len(groups))), strict=True)
    return Targets(*(torch.stack(list(column)) for column in columns))


def optimise_chunk(runner: Runner, autocast: Autocast, rows: Sequence[Row]) -> Targets:
    """Run Adam on all groups of rows; each leaves when its loss is small or its steps are spent."""
    settings, model = runner.settings, runner.model
    longest = max(len(row.ids) for row in rows)
    with hooks.short_position_tables(model, longest), hooks.fused_gelu(model):
        loss = Loss(settings, rows, _continuation(runner, rows, autocast))
        adam, count = Adam(loss.hidden, settings), len(loss.hidden)
        losses = loss.hidden.new_full((count,), float("inf"))
        steps, said = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.float32)
        active = list(range(count))
        for step in range(settings.steps):
            last = step == settings.steps - 1
            evaluate = partial(loss.at, adam.delta[active], active, descending=not last)
            try:
                found = evaluate()
            except CacheDiffers:
                loss.go_on_with(_whole_rows(runner, rows, autocast))
                found = evaluate()
            losses[active], said[active], gradient = found
            steps[active] = step + 1
            going = [k for k, g in enumerate(active) if not _done(settings, losses[g], said[g])]
            active = [active[k] for k in going]
            if not active or last:
                break
            adam.update(active, gradient[going])
    return Targets(loss.hidden + adam.delta, loss.hidden, losses, steps, said)


def _done(settings: Settings, loss: Tensor, said: Tensor) -> bool:
    likeliest = settings.stop_when == "likeliest" and bool(said == 1)
    return likeliest or bool(loss < settings.stop_loss)


def _continuation(runner: Runner, rows: Sequence[Row], autocast: Autocast) -> Resumable:
    short = runner.all_short([len(row.ids) for row in rows])
    if not short or max(row.subject for row in rows) == 0:
        return WholeRows(runner, rows, autocast)
    try:
        return FromSubject(runner, rows, autocast)
    except CacheDiffers:
        return _whole_rows(runner, rows, autocast)


def _whole_rows(runner: Runner, rows: Sequence[Row], autocast: Autocast) -> Resumable:
    warnings.warn(
        f"{type(runner.model).__name__}: its cache does not continue to the same numbers; "
        "targets are optimised over whole rows, and contexts run anew for each edit, which "
        "takes several times as long",
        stacklevel=2,
    )
    return WholeRows(runner, rows, autocast)


class Adam:
    """The deltas and what Adam remembers of their gradients."""

    def __init__(self, hidden: Tensor, settings: Settings) -> None:
        self.delta = torch.zeros_like(hidden)  # (groups, d)
        self.mean, self.square = torch.zeros_like(hidden), torch.zeros_like(hidden)
        self.bound = settings.clamp_factor * hidden.norm(dim=1, keepdim=True)
        scale = hidden.norm(dim=1, keepdim=True) / hidden.shape[1] ** 0.5  # (groups, 1)
        relative = settings.learning_rate_mode == "relative"
        self.rate = settings.learning_rate * (scale if relative else torch.ones_like(scale))
        self.count = 0

    def update(self, active: Sequence[int], gradient: Tensor) -> None:
        """One step for the active groups; all of them have made equally many."""
        self.count += 1
        (b1, b2), which = BETAS, list(active)
        self.mean[which] = b1 * self.mean[which] + (1 - b1) * gradient
        self.square[which] = b2 * self.square[which] + (1 - b2) * gradient.square()
        mean = self.mean[which] / (1 - b1**self.count)
        root = (self.square[which] / (1 - b2**self.count)).sqrt()
        moved = self.delta[which] - self.rate[which] * mean / (root + EPSILON)
        norm = moved.norm(dim=1, keepdim=True)
        bound = self.bound[which]
        self.delta[which] = torch.where(norm > bound, moved * bound / norm, moved)
