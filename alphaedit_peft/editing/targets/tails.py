"""Rows from their subjects on: the tokens before are in a cache, in batches of like length.

In: token rows and the last rewrite layer L. Out: :class:`Tails`, a form of ``resume.Resumed``. What
never changes is run once (see ``before``). It and the tails are batched by length for themselves:
rows of one edit differ in what stands before the subject, and edits in what comes after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from alphaedit_peft import hooks
from alphaedit_peft.editing.bench import Bench, gathering_logits
from alphaedit_peft.editing.past import Past, take, unread
from alphaedit_peft.editing.targets.before import Pass, differing, passes_before
from alphaedit_peft.editing.targets.reduced import Reduced
from alphaedit_peft.editing.targets.resume import CacheDiffers, Row, log_softmax
from alphaedit_peft.tokens import by_length, padded


class Tails:
    """See :class:`alphaedit_peft.editing.targets.resume.Resumed`."""

    def __init__(self, bench: Bench, rows: Sequence[Row], reduced: Reduced) -> None:
        """Run what comes before the subjects once.

        Raises:
            CacheDiffers: a model that does not keep all keys and values for each of its blocks.
        """
        self.rows = rows
        passes = passes_before(bench, rows, reduced)
        lengths = [len(row.ids) - row.subject for row in rows]
        batched = by_length(lengths, bench.device, few=bench.few_passes)
        self._parts = [_Part(bench, rows, reduced, some, passes) for some in batched]
        self._places = {
            row: (part, slot) for part in self._parts for slot, row in enumerate(part.which)
        }
        places = [self._places[row] for row in range(len(rows))]
        self.hidden = torch.stack([part.states[slot, 0] for part, slot in places])  # (rows, d)

    def together(self, chosen: Sequence[int]) -> list[list[int]]:
        """See :class:`Resumed`."""
        wanted = set(chosen)
        found = [[row for row in part.which if row in wanted] for part in self._parts]
        return [some for some in found if some]

    def log_probs(self, chosen: Sequence[int], moved: Tensor) -> Tensor:
        """See :class:`Resumed`."""
        part, _ = self._places[chosen[0]]
        return part.log_probs([self._places[row][1] for row in chosen], moved)


class _Part:
    """Rows whose tails are of like length, padded to the longest on the right.

    ``which`` are the rows, in the order of the passes that they come from.
    """

    def __init__(
        self,
        bench: Bench,
        rows: Sequence[Row],
        reduced: Reduced,
        some: Sequence[int],
        passes: Sequence[Pass],
    ) -> None:
        wanted = set(some)
        self.which = [row for p in passes for row in p.slots if row in wanted]
        self.bench, self.reduced = bench, reduced
        self.rows = [rows[row] for row in self.which]
        tails = [row.ids[row.subject :] for row in self.rows]
        self.inputs = padded(tails, bench.device)
        self.lengths = torch.tensor([len(tail) for tail in tails])
        device = bench.device
        subjects = torch.tensor([row.subject for row in self.rows], device=device)
        steps = torch.arange(int(self.lengths.max()), device=device)
        positions = subjects[:, None] + steps  # (rows, tail)
        self.states = self._taken(passes, positions, lambda p: (hooks.hidden_of(p.output), 0))
        width = int(subjects.max())
        before = torch.arange(width, device=device) - width + subjects[:, None]
        passed = [unread(len(self.rows), width, device)] * (bench.layers[-1] + 1)
        pairs = [
            tuple(self._taken(passes, before, _side(block, side)) for side in (0, 1))
            for block in passes[0].pairs
        ]
        self.past = Past(subjects.cpu(), (*passed, *pairs))  # type: ignore[arg-type]
        self.form = hooks.form_of(passes[0].output)
        self.blocks = [bench.architecture.block_name(i) for i in range(bench.layers[-1] + 1)]
        self.expected: dict[int, Tensor] | None = self._expected()

    def _taken(
        self,
        passes: Sequence[Pass],
        positions: Tensor,
        of: Callable[[Pass], tuple[Tensor, int]],
    ) -> Tensor:
        """What the passes give at tokens (rows, k), along the last axis but one.

        ``of`` a pass are values by token, and the index at which its rows' prefixes end.
        """
        found, start = [], 0
        for p in passes:
            slots = [p.slots[row] for row in self.which if row in p.slots]
            if slots:
                values, end = of(p)
                some = positions[start : start + len(slots)] - p.starts[slots, None] + end
                found.append(take(values[slots], some))
                start += len(slots)
        return torch.cat(found)

    @torch.no_grad()
    def _expected(self) -> dict[int, Tensor]:
        """By slot, log-probabilities (vocab,) at the last read, from whole rows.

        Of the rows with the least and the most before the subject: where a cache does not
        continue, or its padding counts, it is so for them.
        """
        order = sorted(
            range(len(self.rows)), key=lambda i: (self.rows[i].subject, len(self.rows[i].ids))
        )
        tried = sorted({order[0], order[-1]})
        where = [(k, self.rows[slot].reads[-1]) for k, slot in enumerate(tried)]
        model, bench = self.bench.model, self.bench
        inputs = padded([self.rows[slot].ids for slot in tried], bench.device)
        with (
            self.reduced.running_above(self.blocks[-1]),
            gathering_logits(model, bench.head_name, where),
        ):
            found = log_softmax(model(**inputs, use_cache=False).logits[0])
        return dict(zip(tried, found, strict=True))

    def log_probs(self, chosen: Sequence[int], moved: Tensor) -> Tensor:
        """See :class:`alphaedit_peft.editing.targets.resume.Resumed`."""
        length = int(self.lengths[list(chosen)].max())
        rest = self.states[list(chosen), 1:length]
        hidden = torch.cat([moved.to(rest)[:, None], rest], dim=1)  # (chosen, tail, d)
        inputs = {name: value[list(chosen), :length] for name, value in self.inputs.items()}
        where = [
            (i, position - self.rows[slot].subject)
            for i, slot in enumerate(chosen)
            for position in self.rows[slot].reads
        ]
        model = self.bench.model
        with (
            nullcontext() if self.expected is None else differing(),
            self.reduced.running(hidden.device),
            hooks.resuming_above(model, self.blocks, self.form, lambda: hidden),
            self._last_mlp_at(where),
            gathering_logits(model, self.bench.head_name, where),
        ):
            logits = model(**self.past.chosen(chosen).followed_by(model, inputs)).logits[0]
        log_probs = log_softmax(logits)
        self._compare(log_probs)
        return log_probs

    def _last_mlp_at(self, where: Sequence[tuple[int, int]]) -> AbstractContextManager[None]:
        """Let the last block's MLP run only where the head reads; nothing else follows it.

        A rewrite module that the user names may be part of something that mixes tokens.
        """
        architecture, last = self.bench.architecture, self.bench.architecture.num_blocks - 1
        name = architecture.rewrite_name(last).rpartition(".")[0]
        if self.bench.config.rewrite_module is not None or name == architecture.block_name(last):
            return nullcontext()
        return hooks.running_at(self.bench.model, name, where)

    def _compare(self, log_probs: Tensor) -> None:
        """At the first call: whether the tails give the whole rows' own log-probabilities."""
        if self.expected is None:
            return
        last = torch.tensor([len(row.reads) for row in self.rows]).cumsum(0) - 1
        slots, values = list(self.expected), torch.stack(list(self.expected.values()))
        likely = values > -10  # far out in the tail rounding is large and plays no part
        found = log_probs.detach()[last[slots].to(log_probs.device)]
        error = (found - values)[likely].abs()
        half = self.states.dtype in (torch.bfloat16, torch.float16)
        bound = 0.5 if half or self.reduced.dtype is not None else 0.02
        self.expected = None
        if not bool((error < bound).all()):
            raise CacheDiffers


def _side(block: int, side: int) -> Callable[[Pass], tuple[Tensor, int]]:
    return lambda found: (found.pairs[block][side], found.width)
