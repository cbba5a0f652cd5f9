"""Target values z: the hidden state after the last rewrite layer that makes the model say it.

In: groups of edits that share a key. Out: z = h + delta for each group, (groups, d). Equation
(MEMIT Eq. 16, AlphaEdit section 2.2): delta minimises, at the subject's last token,

    mean_j -log P(target | x_j + prompt) + kl KL(P || P_0)(subject) + decay |delta| / |h|^2

with |delta| clamped to a multiple of |h|. Anchors add ``anchor_factor`` times their mean
KL(P || P_0), at the end of the prompt: the paper's term is read at the subject and so cannot tell
what is asked about it. All edits of a chunk go through the model together, and only through what
delta reaches (see ``resume``); an edit that is done leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.editing.bench import Bench
from alphaedit_peft.editing.groups import Group
from alphaedit_peft.editing.resume import Row, resume

ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8


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
    bench: Bench, groups: Sequence[Group], progress: Callable[[int], None] = lambda n: None
) -> Targets:
    """Optimise every group's z, in chunks of at most ``config.target_tokens`` tokens.

    Args:
        bench: the model and its settings; its state decides h, so edits made earlier count.
        groups: edits that share a key, see ``group_by_key``.
        progress: called with the number of groups that were finished.
    """
    found: dict[int, tuple[Tensor, ...]] = {}
    for members in _chunks(bench, groups):
        rows = [
            row for slot, g in enumerate(members) for row in _rows(groups[g], slot, bench.config)
        ]
        part = _Chunk(bench, rows, len(members)).optimise()
        for slot, g in enumerate(members):
            found[g] = tuple(column[slot] for column in part.columns)
        progress(len(members))
    columns = zip(*(found[g] for g in range(len(groups))), strict=True)
    return Targets(*(torch.stack(list(column)) for column in columns))


class _Chunk:
    """One padded batch of rows and the state of its optimisation."""

    def __init__(self, bench: Bench, rows: list[Row], num_groups: int) -> None:
        self.bench, self.rows, self.num_groups = bench, rows, num_groups
        self.resumed = resume(bench, rows)
        dtype = torch.promote_types(self.resumed.hidden.dtype, torch.float32)
        self.subjects = self.resumed.hidden.to(dtype)  # (rows, d)
        first = [next(i for i, r in enumerate(rows) if r.group == g) for g in range(num_groups)]
        self.hidden = self.subjects[first]  # (groups, d): the bare leaders' h
        self.initial: dict[int, Tensor] = {}  # row -> log P_0 where it is read, (reads, vocab)

    def optimise(self) -> Targets:
        """Run Adam on all groups; each leaves when its loss is small or its steps are spent."""
        config = self.bench.config
        assert config.steps is not None, "resolve the config first"
        adam = _Adam(self.hidden, config)
        losses = self.hidden.new_full((self.num_groups,), float("inf"))
        steps = torch.zeros(self.num_groups, dtype=torch.long)
        said = torch.zeros(self.num_groups)
        active = list(range(self.num_groups))
        for step in range(config.steps):
            delta = adam.delta[active].requires_grad_()
            with torch.enable_grad():
                loss, said[active] = self._losses(delta, active)  # (active,)
                gradient = torch.autograd.grad(loss.sum(), delta)[0]
            losses[active], steps[active] = loss.detach(), step + 1
            going = [k for k, g in enumerate(active) if not self._done(losses[g], said[g])]
            active = [active[k] for k in going]
            if not active or step == config.steps - 1:
                break
            adam.update(active, gradient[going])
        return Targets(self.hidden + adam.delta, self.hidden, losses, steps, said)

    def _done(self, loss: Tensor, said: Tensor) -> bool:
        config = self.bench.config
        assert config.stop_loss is not None, "resolve the config first"
        likeliest = config.stop_when == "likeliest" and bool(said == 1)
        return likeliest or bool(loss < config.stop_loss)

    def _losses(self, delta: Tensor, active: Sequence[int]) -> tuple[Tensor, Tensor]:
        """For deltas (active, d): each group's loss, and the share of its prompts that say theirs.

        Both are (active,).
        """
        config = self.bench.config
        slot = {g: k for k, g in enumerate(active)}
        chosen = [i for i, row in enumerate(self.rows) if row.group in slot]
        where = torch.tensor([slot[self.rows[i].group] for i in chosen], device=delta.device)
        log_probs = self.resumed.log_probs(chosen, self.subjects[chosen] + delta[where])
        loss = config.weight_decay * delta.norm(dim=1) / self.hidden[list(active)].norm(dim=1) ** 2
        parts: list[Tensor] = []
        said: list[list[bool]] = [[] for _ in active]
        start = 0
        for i in chosen:
            row = self.rows[i]
            part = log_probs[start : start + len(row.reads)]
            start += len(row.reads)
            parts.append(row.weight * self._row_loss(i, part))
            if row.target:
                said[slot[row.group]].append(part.argmax(1).tolist() == list(row.target))
        shares = torch.tensor([sum(hits) / len(hits) for hits in said])
        return loss.index_add(0, where, torch.stack(parts).to(loss)), shares

    def _row_loss(self, index: int, log_probs: Tensor) -> Tensor:
        """A row's loss from its log-probabilities (reads, vocab): -log P(target), or the KL."""
        row = self.rows[index]
        if row.target:
            target = torch.tensor(row.target, device=log_probs.device)
            return -log_probs.gather(1, target[:, None]).mean()
        initial = self.initial.setdefault(index, log_probs.detach())
        return (log_probs.exp() * (log_probs - initial)).sum(1).mean()


class _Adam:
    """Adam on each group's delta, with the paper's bound on its norm."""

    def __init__(self, hidden: Tensor, config: AlphaEditConfig) -> None:
        assert config.learning_rate is not None, "resolve the config first"
        assert config.clamp_factor is not None, "resolve the config first"
        self.delta = torch.zeros_like(hidden)  # (groups, d)
        self.mean, self.square = torch.zeros_like(hidden), torch.zeros_like(hidden)
        self.bound = config.clamp_factor * hidden.norm(dim=1, keepdim=True)
        scale = hidden.norm(dim=1, keepdim=True) / hidden.shape[1] ** 0.5  # (groups, 1)
        relative = config.learning_rate_mode == "relative"
        self.rate = config.learning_rate * (scale if relative else torch.ones_like(scale))
        self.count = 0

    def update(self, active: Sequence[int], gradient: Tensor) -> None:
        """One step for the active groups; all of them have made equally many."""
        self.count += 1
        (b1, b2), which = ADAM_BETAS, list(active)
        self.mean[which] = b1 * self.mean[which] + (1 - b1) * gradient
        self.square[which] = b2 * self.square[which] + (1 - b2) * gradient.square()
        mean = self.mean[which] / (1 - b1**self.count)
        root = (self.square[which] / (1 - b2**self.count)).sqrt()
        moved = self.delta[which] - self.rate[which] * mean / (root + ADAM_EPSILON)
        norm = moved.norm(dim=1, keepdim=True)
        bound = self.bound[which]
        self.delta[which] = torch.where(norm > bound, moved * bound / norm, moved)


def _rows(group: Group, slot: int, config: AlphaEditConfig) -> list[Row]:
    """The rows of a group: prompts in every context, the leader's KL row, every anchor once."""
    rows = []
    for member in group.members:
        weight = 1 / (len(group.members) * len(member.rows))
        for row in member.rows:
            reads = tuple(row.target_positions)
            rows.append(Row(slot, row.scoring_ids, row.subject_last, reads, row.target, weight))
    kl = group.leader.kl_row
    rows.append(Row(slot, kl.ids, kl.subject_last, (kl.subject_last,), (), config.kl_factor))
    asked = {member.rows[0].ids for member in group.members}  # an edit's prompt is no anchor
    anchors = [a for member in group.members for a in member.anchors if a.ids not in asked]
    anchors = list(dict.fromkeys(anchors))
    for anchor in anchors:
        reads = tuple(anchor.target_positions) or (len(anchor.ids) - 1,)
        weight = config.anchor_factor / len(anchors)
        rows.append(Row(slot, anchor.scoring_ids, anchor.subject_last, reads, (), weight))
    return rows


def _chunks(bench: Bench, groups: Sequence[Group]) -> Iterator[list[int]]:
    """Groups with like tails together, at most ``target_tokens`` padded tail tokens a chunk."""
    tails = [
        [len(row.ids) - row.subject for row in _rows(group, 0, bench.config)] for group in groups
    ]
    order = sorted(range(len(groups)), key=lambda g: max(tails[g]))
    chunk: list[int] = []
    for g in order:
        count = sum(len(tails[i]) for i in [*chunk, g])
        if chunk and count * max(tails[g]) > bench.config.target_tokens:
            yield chunk
            chunk = []
        chunk.append(g)
    if chunk:
        yield chunk
