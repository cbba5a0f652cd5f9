"""Target values z: the hidden state after the last rewrite layer that makes the model say it.

In: groups of edits that share a key. Out: z = h + delta for each group, (groups, d). Equation
(MEMIT Eq. 16, AlphaEdit section 2.2): delta minimises, at the subject's last token,

    mean_j -log P(target | x_j + prompt) + kl KL(P || P_0)(subject) + decay |delta| / |h|^2

with |delta| clamped to a multiple of |h|. Anchors add ``anchor_factor`` times their mean
KL(P || P_0), at the end of the prompt: the paper's term is read at the subject and so cannot tell
what is asked about it. All edits of a chunk go through the model together, and only through what
delta reaches (see ``suffixes``); an edit that is done leaves the batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaedit_peft import hooks
from alphaedit_peft.editing.groups import Group
from alphaedit_peft.editing.runner import Runner, tell_of_memory
from alphaedit_peft.editing.targets.autocast import Autocast
from alphaedit_peft.editing.targets.continuation import (
    CacheDiffers,
    Continuation,
    FromSubject,
    Row,
    WholeRows,
)
from alphaedit_peft.editing.targets.loss import Reads, chunked, rows_of
from alphaedit_peft.settings import Settings


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

    Args:
        runner: the model and its settings; its state decides h, so edits made earlier count.
        groups: edits that share a key, see ``group_by_key``.
        progress: called with the number of groups that were finished.

    Warns:
        UserWarning: memory ran out, so that smaller chunks are used from there on.
    """
    autocast = Autocast(runner)
    found: dict[int, tuple[Tensor, ...]] = {}
    pending = list(chunked(runner, groups))
    while pending:
        members = pending.pop(0)
        part = _optimised(runner, autocast, [groups[g] for g in members])
        if part is None:
            pending = _smaller([members, *pending], len(members) // 2)
            continue
        for slot, g in enumerate(members):
            found[g] = tuple(column[slot] for column in part.columns)
        progress(len(members))
    columns = zip(*(found[g] for g in range(len(groups))), strict=True)
    return Targets(*(torch.stack(list(column)) for column in columns))


def _optimised(runner: Runner, autocast: Autocast, groups: Sequence[Group]) -> Targets | None:
    """A chunk's target values; None where it does not fit in memory and could be made smaller."""
    rows = [
        row for slot, group in enumerate(groups) for row in rows_of(group, slot, runner.settings)
    ]
    longest = max(len(row.ids) for row in rows)
    try:
        with hooks.short_position_tables(runner.model, longest), hooks.fused_gelu(runner.model):
            return _Chunk(runner, autocast, rows, len(groups)).optimise()
    except torch.OutOfMemoryError:
        if len(groups) == 1:
            raise
    return None


def _smaller(chunks: Sequence[list[int]], most: int) -> list[list[int]]:
    """Chunks of at most ``most`` groups each, after memory ran out."""
    tell_of_memory(f"{len(chunks[0])} target values", most, "target_tokens")
    return [chunk[i : i + most] for chunk in chunks for i in range(0, len(chunk), most)]


class _Chunk:
    """Rows that are optimised together, and the state of their optimisation."""

    def __init__(
        self, runner: Runner, autocast: Autocast, rows: list[Row], num_groups: int
    ) -> None:
        self.runner, self.autocast, self.rows, self.num_groups = runner, autocast, rows, num_groups
        self.continuation = self._continuation()
        dtype = torch.promote_types(self.continuation.hidden.dtype, torch.float32)
        self.subjects = self.continuation.hidden.to(dtype)  # (rows, d)
        first = [next(i for i, r in enumerate(rows) if r.group == g) for g in range(num_groups)]
        self.hidden = self.subjects[first]  # (groups, d): the bare leaders' h
        self.initial: dict[int, Tensor] = {}  # row -> log P_0 where it is read, (reads, vocab)

    def optimise(self) -> Targets:
        """Run Adam on all groups; each leaves when its loss is small or its steps are spent."""
        settings = self.runner.settings
        adam = Adam(self.hidden, settings)
        losses = self.hidden.new_full((self.num_groups,), float("inf"))
        steps = torch.zeros(self.num_groups, dtype=torch.long)
        said = torch.zeros(self.num_groups)
        active = list(range(self.num_groups))
        for step in range(settings.steps):
            last = step == settings.steps - 1
            losses[active], said[active], gradient = self._loss(adam.delta[active], active, last)
            steps[active] = step + 1
            going = [k for k, g in enumerate(active) if not self._done(losses[g], said[g])]
            active = [active[k] for k in going]
            if not active or last:
                break
            adam.update(active, gradient[going])
        return Targets(self.hidden + adam.delta, self.hidden, losses, steps, said)

    def _done(self, loss: Tensor, said: Tensor) -> bool:
        settings = self.runner.settings
        likeliest = settings.stop_when == "likeliest" and bool(said == 1)
        return likeliest or bool(loss < settings.stop_loss)

    def _continuation(self) -> Continuation:
        if max(row.subject for row in self.rows) == 0:
            return WholeRows(self.runner, self.rows, self.autocast)
        try:
            return FromSubject(self.runner, self.rows, self.autocast)
        except CacheDiffers:
            return self._whole_rows()

    def _whole_rows(self) -> Continuation:
        warnings.warn(
            f"{type(self.runner.model).__name__}: its cache does not continue to the same numbers; "
            "targets are optimised over whole rows, and contexts run anew for each edit, which "
            "takes several times as long",
            stacklevel=2,
        )
        return WholeRows(self.runner, self.rows, self.autocast)

    def _loss(
        self, delta: Tensor, active: Sequence[int], last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For deltas (active, d): losses, shares of prompts that say theirs, and the gradient.

        The first two are (active,), the gradient is (active, d), and zero where ``last``.
        """
        try:
            return self._summed(delta, active, last)
        except CacheDiffers:
            self.continuation = self._whole_rows()
            self.initial.clear()
            return self._summed(delta, active, last)

    def _summed(
        self, delta: Tensor, active: Sequence[int], last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``_loss``. Rows that run together are done with before the next ones begin."""
        settings = self.runner.settings
        slot = {g: k for k, g in enumerate(active)}
        moved = delta.detach().requires_grad_(not last)
        said: list[list[bool]] = [[] for _ in active]
        lengths = self.hidden[list(active)].norm(dim=1)
        with torch.set_grad_enabled(not last):
            loss = settings.weight_decay * moved.norm(dim=1) / lengths**2
            if not last:
                loss.sum().backward(inputs=[moved])
            for rows in self.continuation.together(
                [i for i, r in enumerate(self.rows) if r.group in slot]
            ):
                part = self._part_loss(moved, rows, slot, said)
                if not last:
                    part.sum().backward(inputs=[moved])
                loss = loss.detach() + part.detach()
        gradient = torch.zeros_like(moved) if moved.grad is None else moved.grad
        return loss, torch.tensor([sum(found) / len(found) for found in said]), gradient

    def _part_loss(
        self, delta: Tensor, chosen: Sequence[int], slot: dict[int, int], said: list[list[bool]]
    ) -> Tensor:
        """What rows that run together add to each group's loss, (active,).

        ``said`` gains for each row with a target whether it is likeliest at every read.
        """
        rows = [self.rows[i] for i in chosen]
        where = torch.tensor([slot[row.group] for row in rows], device=delta.device)
        log_probs = self.continuation.log_probs(chosen, self.subjects[list(chosen)] + delta[where])
        reads = Reads.of(rows, log_probs.device)
        each = -log_probs.gather(1, reads.targets[:, None])[:, 0]  # (reads,): -log P(target)
        if len(reads.free):
            each = each.index_copy(0, reads.free, self._divergence(chosen, log_probs[reads.free]))
        hits = iter((log_probs.detach().argmax(1) == reads.targets).tolist())
        for row in rows:
            here = [next(hits) for _ in row.reads]
            if row.target:
                said[slot[row.group]].append(all(here))
        owners = where[reads.rows.to(where.device)]
        weighted = (reads.weights.to(each) * each).to(delta)
        return delta.new_zeros(len(slot)).index_add(0, owners, weighted)

    def _divergence(self, chosen: Sequence[int], log_probs: Tensor) -> Tensor:
        """KL(P || P_0) at the reads without a target of the chosen rows, (reads,).

        P_0 is what the first evaluation gives, where nothing has moved yet.
        """
        free = [i for i in chosen if not self.rows[i].target]
        found = log_probs.detach().split([len(self.rows[i].reads) for i in free])
        for i, values in zip(free, found, strict=True):
            self.initial.setdefault(i, values)
        initial = torch.cat([self.initial[i] for i in free])
        return (log_probs.exp() * (log_probs - initial)).sum(1)


BETAS = (0.9, 0.999)
EPSILON = 1e-8


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
