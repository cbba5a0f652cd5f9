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

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.editing.adam import Adam
from alphaedit_peft.editing.bench import Bench
from alphaedit_peft.editing.groups import Group
from alphaedit_peft.editing.resume import Row, resume


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
    """Optimise every group's z, in chunks of at most ``target_tokens`` tokens.

    Args:
        bench: the model and its settings; its state decides h, so edits made earlier count.
        groups: edits that share a key, see ``group_by_key``.
        progress: called with the number of groups that were finished.

    Warns:
        UserWarning: memory ran out, so that smaller chunks are used from there on.
    """
    found: dict[int, tuple[Tensor, ...]] = {}
    pending = list(_chunks(bench, groups))
    while pending:
        members = pending.pop(0)
        part = _optimised(bench, [groups[g] for g in members])
        if part is None:
            pending = _smaller([members, *pending], len(members) // 2)
            continue
        for slot, g in enumerate(members):
            found[g] = tuple(column[slot] for column in part.columns)
        progress(len(members))
    columns = zip(*(found[g] for g in range(len(groups))), strict=True)
    return Targets(*(torch.stack(list(column)) for column in columns))


def _optimised(bench: Bench, groups: Sequence[Group]) -> Targets | None:
    """A chunk's target values; None where it does not fit in memory and could be made smaller."""
    rows = [row for slot, group in enumerate(groups) for row in _rows(group, slot, bench.config)]
    try:
        return _Chunk(bench, rows, len(groups)).optimise()
    except torch.OutOfMemoryError:
        if len(groups) == 1:
            raise
    return None


def _smaller(chunks: Sequence[list[int]], most: int) -> list[list[int]]:
    """Chunks of at most ``most`` groups each, after memory ran out."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    warnings.warn(
        f"{len(chunks[0])} target values do not fit in memory at once; going on with {most}. Set "
        "memory_budget or a lower target_tokens to begin with less",
        stacklevel=3,
    )
    return [chunk[i : i + most] for chunk in chunks for i in range(0, len(chunk), most)]


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
        adam = Adam(self.hidden, config)
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
        reads = _Reads.of([self.rows[i] for i in chosen], log_probs.device)
        each = -log_probs.gather(1, reads.targets[:, None])[:, 0]  # (reads,): -log P(target)
        if len(reads.free):
            each = each.index_copy(0, reads.free, self._divergence(chosen, log_probs[reads.free]))
        loss = config.weight_decay * delta.norm(dim=1) / self.hidden[list(active)].norm(dim=1) ** 2
        owners = where[reads.rows.to(where.device)]
        loss = loss.index_add(0, owners, (reads.weights.to(each) * each).to(loss))
        hits = (log_probs.detach().argmax(1) == reads.targets).tolist()
        return loss, self._said(chosen, slot, hits)

    def _divergence(self, chosen: Sequence[int], log_probs: Tensor) -> Tensor:
        """KL(P || P_0) at the reads without a target of the chosen rows, (reads,).

        P_0 is what the first evaluation gives, where nothing has moved yet.
        """
        free = [i for i in chosen if not self.rows[i].target]
        if not self.initial:
            found = log_probs.detach().split([len(self.rows[i].reads) for i in free])
            self.initial = dict(zip(free, found, strict=True))
        initial = torch.cat([self.initial[i] for i in free])
        return (log_probs.exp() * (log_probs - initial)).sum(1)

    def _said(self, chosen: Sequence[int], slot: dict[int, int], hits: list[bool]) -> Tensor:
        """The share of each group's prompts whose target is likeliest at every read, (active,)."""
        said: list[list[bool]] = [[] for _ in slot]
        start = 0
        for row in (self.rows[i] for i in chosen):
            if row.target:
                said[slot[row.group]].append(all(hits[start : start + len(row.reads)]))
            start += len(row.reads)
        return torch.tensor([sum(found) / len(found) for found in said])


@dataclass(frozen=True)
class _Reads:
    """Everything that is read of some rows, in turn; all (reads,) but ``free``.

    ``rows``: whose read it is, as an index; ``targets``: the token to follow, 0 where none is;
    ``weights``: in the loss; ``free``: which reads have no target.
    """

    rows: Tensor
    targets: Tensor
    weights: Tensor
    free: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> _Reads:
        """Lay the rows' reads one behind the other."""
        owners: list[int] = []
        targets: list[int] = []
        weights: list[float] = []
        free: list[int] = []
        for i, row in enumerate(rows):
            for k in range(len(row.reads)):
                if not row.target:
                    free.append(len(owners))
                owners.append(i)
                targets.append(row.target[k] if row.target else 0)
                weights.append(row.weight / len(row.reads))
        numbers = (owners, targets, free)
        which, wanted, without = (torch.tensor(n, device=device).long() for n in numbers)
        return cls(
            which, wanted, torch.tensor(weights, device=device, dtype=torch.float64), without
        )


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
        if chunk and count * max(tails[g]) > bench.target_tokens:
            yield chunk
            chunk = []
        chunk.append(g)
    if chunk:
        yield chunk
