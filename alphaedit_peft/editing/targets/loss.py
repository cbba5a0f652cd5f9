"""The loss of z, and the token rows that it is read from.

In: groups of edits that share a key. Out: their rows, chunks of groups, and :class:`Loss`, which
``search`` descends (MEMIT Eq. 16, AlphaEdit section 2.2): with z = h + delta at the subject's last
token,

    mean_j -log P(target | x_j + prompt) + kl KL(P || P_0)(subject) + decay |delta| / |h|^2

Anchors add ``anchor_factor`` times their mean KL(P || P_0), at the end of the prompt: the paper's
term is read at the subject and so cannot tell what is asked about it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from alphaedit_peft.editing.groups import Group
from alphaedit_peft.editing.runner import Runner
from alphaedit_peft.editing.targets.continuation import Resumable, Row
from alphaedit_peft.settings import Settings


class Loss:
    """The loss of a chunk's groups as a function of their deltas.

    ``hidden`` (groups, d) are the bare leaders' h.
    """

    def __init__(self, settings: Settings, rows: Sequence[Row], continuation: Resumable) -> None:
        """Rows are sorted by group, the bare leader's first."""
        self.settings, self.rows, self.continuation = settings, rows, continuation
        hidden = continuation.hidden
        self._subjects = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # (rows, d)
        groups = [row.group for row in rows]
        self.hidden = self._subjects[[groups.index(g) for g in sorted(set(groups))]]
        self._initial: dict[int, Tensor] = {}  # row -> log P_0 where it is read, (reads, vocab)

    def go_on_with(self, continuation: Resumable) -> None:
        """Run the rows in another way from now on, P_0 anew."""
        self.continuation = continuation
        self._initial.clear()

    def at(
        self, delta: Tensor, active: Sequence[int], *, descending: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, shares of prompts whose target is likeliest, and the gradient.

        Rows that run together are done with before the next ones begin.

        Args:
            delta: (active, d); zero at the first call, which sets P_0.
            descending: whether the gradient is wanted; else it is zero.

        Returns:
            (active,), (active,) and (active, d).

        Raises:
            CacheDiffers: at the first call, where the rows are to be run in another way.
        """
        slot = {g: k for k, g in enumerate(active)}
        moved = delta.detach().requires_grad_(descending)
        said: list[list[bool]] = [[] for _ in active]
        lengths = self.hidden[list(active)].norm(dim=1)
        with torch.set_grad_enabled(descending):
            loss = self.settings.weight_decay * moved.norm(dim=1) / lengths**2
            if descending:
                loss.sum().backward(inputs=[moved])
            for chosen in self.continuation.together(
                [i for i, row in enumerate(self.rows) if row.group in slot]
            ):
                part = self._part(moved, chosen, slot, said)
                if descending:
                    part.sum().backward(inputs=[moved])
                loss = loss.detach() + part.detach()
        gradient = torch.zeros_like(moved) if moved.grad is None else moved.grad
        means = [sum(found) / len(found) for found in said]
        return loss, torch.tensor(means, dtype=torch.float32), gradient

    def _part(
        self,
        delta: Tensor,
        chosen: Sequence[int],
        slot: Mapping[int, int],
        said: Sequence[list[bool]],
    ) -> Tensor:
        """What rows that run together add to each group's loss, (active,).

        ``said`` gains for each row with a target whether it is likeliest at every read.
        """
        rows = [self.rows[i] for i in chosen]
        where = torch.tensor([slot[row.group] for row in rows], device=delta.device)
        log_probs = self.continuation.log_probs(chosen, self._subjects[list(chosen)] + delta[where])
        device = log_probs.device
        reads = [row for row in rows for _ in row.reads]
        wanted = [t for row in rows for t in row.target or [0] * len(row.reads)]
        targets = torch.tensor(wanted, device=device)  # (reads,)
        each = -log_probs.gather(1, targets[:, None])[:, 0]  # (reads,): -log P(target)
        free = [k for k, row in enumerate(reads) if not row.target]
        if free:
            at = torch.tensor(free, device=device)
            each = each.index_copy(0, at, self._divergence(chosen, log_probs[at]))
        hits = iter((log_probs.detach().argmax(1) == targets).tolist())
        for row in rows:
            here = [next(hits) for _ in row.reads]
            if row.target:
                said[slot[row.group]].append(all(here))
        weights = [row.weight / len(row.reads) for row in reads]
        weighted = torch.tensor(weights, dtype=torch.float64).to(each) * each
        owners = torch.tensor([slot[row.group] for row in reads], device=delta.device)
        return delta.new_zeros(len(slot)).index_add(0, owners, weighted.to(delta))

    def _divergence(self, chosen: Sequence[int], log_probs: Tensor) -> Tensor:
        """KL(P || P_0) at the reads without a target of the chosen rows, (reads,).

        P_0 is what the first evaluation gives, where nothing has moved yet.
        """
        free = [i for i in chosen if not self.rows[i].target]
        found = log_probs.detach().split([len(self.rows[i].reads) for i in free])
        for i, values in zip(free, found, strict=True):
            self._initial.setdefault(i, values)
        initial = torch.cat([self._initial[i] for i in free])
        return (log_probs.exp() * (log_probs - initial)).sum(1)


def rows_of(group: Group, slot: int, settings: Settings, switches: Sequence[int] = ()) -> list[Row]:
    """The rows of a group: prompts in every context, the leader's KL row, every anchor once.

    One whose target goes over one of ``switches`` (``position_switches``) is a row on either side.
    """
    rows = []
    for member in group.members:
        for row in member.rows:
            weight = 1 / (len(group.members) * len(member.rows))
            for places in row.places(switches):
                ids, target = row.scoring_ids[: places.stop], row.foretold_at(places)
                share = weight * (len(target) / len(row.target))
                rows.append(Row(slot, ids, row.subject_last, tuple(places), target, share))
    kl = group.leader.kl_row
    rows.append(Row(slot, kl.ids, kl.subject_last, (kl.subject_last,), (), settings.kl_factor))
    asked = {member.rows[0].ids for member in group.members}  # an edit's prompt is no anchor
    every = dict.fromkeys(anchor for member in group.members for anchor in member.anchors)
    anchors = [anchor for anchor in every if anchor.ids not in asked]
    for anchor in anchors:
        reads = tuple(anchor.target_positions) or (len(anchor.ids) - 1,)
        weight = settings.anchor_factor / len(anchors)
        rows.append(Row(slot, anchor.scoring_ids, anchor.subject_last, reads, (), weight))
    return rows


def chunked(runner: Runner, groups: Sequence[Group]) -> Iterator[list[int]]:
    """Groups with like suffixes together, at most ``target_tokens`` suffix tokens a chunk.

    They are counted as if all rows were padded to the longest, which running them in batches of
    like length keeps below.
    """
    rows = [rows_of(group, 0, runner.settings, runner.switches) for group in groups]
    suffixes = [[len(row.ids) - row.subject for row in own] for own in rows]
    chunk: list[int] = []
    for g in sorted(range(len(groups)), key=lambda g: max(suffixes[g])):
        count = sum(len(suffixes[i]) for i in [*chunk, g])
        if chunk and count * max(suffixes[g]) > runner.settings.target_tokens:
            yield chunk
            chunk = []
        chunk.append(g)
    if chunk:
        yield chunk
