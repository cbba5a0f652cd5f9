"""Rows from their subjects on: the tokens before are in a cache, in batches of like length.

In: token rows and the last rewrite layer L. Out: :class:`Tails`, a form of ``resume.Resumed``. One
pass over the whole rows gives block L's output and every block's keys and values of the tokens
before the subject. Both passes, whole rows and tails, are batched by length for themselves: rows of
one edit differ in what stands before the subject, and edits in what comes after it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from alphaedit_peft import hooks
from alphaedit_peft.editing.bench import Bench, gathering_logits
from alphaedit_peft.editing.reduced import Reduced
from alphaedit_peft.editing.resume import CacheDiffers, Row, log_softmax
from alphaedit_peft.tokens import by_length


class Tails:
    """See :class:`alphaedit_peft.editing.resume.Resumed`."""

    def __init__(self, bench: Bench, rows: Sequence[Row], reduced: Reduced) -> None:
        """Run the whole rows once.

        Raises:
            CacheDiffers: a model that does not keep all keys and values for each of its blocks.
        """
        self.rows = rows
        passes = [
            _pass(bench, rows, reduced, batch.indices, batch.inputs)
            for batch in bench.batches([row.ids for row in rows])
        ]
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


@dataclass(frozen=True)
class _Pass:
    """One pass over whole rows.

    ``slots``: row -> its place in the batch; ``output``: block L's, in its family's own form;
    ``cached``: by block, keys and values (batch, heads, tokens, d_head), of one number up to L;
    ``expected`` (batch, vocab): log-probabilities at each row's last read.
    """

    slots: dict[int, int]
    output: Any
    cached: list[tuple[Tensor, Tensor]]
    expected: Tensor


@torch.no_grad()
def _pass(
    bench: Bench,
    rows: Sequence[Row],
    reduced: Reduced,
    which: Sequence[int],
    inputs: dict[str, Tensor],
) -> _Pass:
    model, last = bench.model, bench.architecture.block_name(bench.layers[-1])
    cache, seen = DynamicCache(), []
    with ExitStack() as above:

        def go_on(output: Any) -> None:
            seen.append(output)
            above.enter_context(reduced.running(hooks.hidden_of(output).device))

        where = [(slot, rows[row].reads[-1]) for slot, row in enumerate(which)]
        above.enter_context(hooks.watching_output(model, last, go_on))
        above.enter_context(gathering_logits(model, bench.head_name, where))
        above.enter_context(_differing())
        logits = model(**inputs, past_key_values=cache, use_cache=True).logits[0]
    layers: Sequence[Any] = cache.layers
    cached = [(layer.keys, layer.values) for layer in layers]
    length = inputs["input_ids"].shape[1]
    whole = all(part is not None and part.shape[-2] == length for pair in cached for part in pair)
    if len(cached) != bench.architecture.num_blocks or not whole:
        raise CacheDiffers
    for block in range(bench.layers[-1] + 1):  # never run again: only their length counts
        keys, values = cached[block]
        cached[block] = keys[..., :1].clone(), values[..., :1].clone()
    slots = {row: slot for slot, row in enumerate(which)}
    return _Pass(slots, seen[0], cached, log_softmax(logits))


@contextmanager
def _differing() -> Iterator[None]:
    """Say that the cache differs where a model fails on it; its blocks may need another kind.

    What fails for another reason fails again with whole rows, and is told of then.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise CacheDiffers from error


class _Part:
    """Rows whose tails are of like length, padded to the longest on the right.

    Prefixes are aligned at their end, so a row's subject is always at index ``width``. ``which``
    are the rows, in the order of the passes that they come from.
    """

    def __init__(
        self,
        bench: Bench,
        rows: Sequence[Row],
        reduced: Reduced,
        some: Sequence[int],
        passes: Sequence[_Pass],
    ) -> None:
        wanted = set(some)
        self.which = [row for p in passes for row in p.slots if row in wanted]
        self.bench, self.reduced = bench, reduced
        self.rows = [rows[row] for row in self.which]
        device = bench.device
        self.subjects = torch.tensor([row.subject for row in self.rows], device=device)
        self.width = int(self.subjects.max())
        lengths = torch.tensor([len(row.ids) for row in self.rows], device=device)
        self.lengths = lengths - self.subjects
        steps = torch.arange(int(self.lengths.max()), device=device)
        self.positions = self.subjects[:, None] + steps  # (rows, tail)
        padded = torch.zeros(len(lengths), int(lengths.max()) + len(steps), dtype=torch.long)
        for slot, row in enumerate(self.rows):
            padded[slot, : len(row.ids)] = torch.tensor(row.ids)
        self.ids = padded.to(device).gather(1, self.positions)
        self.states = self._taken(passes, lambda p: hooks.hidden_of(p.output), self.positions)
        before = torch.arange(self.width, device=device) - self.width + self.subjects[:, None]
        self.prefix = [
            tuple(self._taken(passes, _cached(block, side), before) for side in (0, 1))
            for block in range(len(passes[0].cached))
        ]  # by block, keys and values (rows, heads, width, d_head)
        self.mask = torch.cat([before >= 0, steps < self.lengths[:, None]], dim=1).long()
        self.output = passes[0].output
        self.blocks = [bench.architecture.block_name(i) for i in range(bench.layers[-1] + 1)]
        found = [p.expected[[p.slots[row] for row in self.which if row in p.slots]] for p in passes]
        self.expected: Tensor | None = torch.cat(found)  # (rows, vocab)

    def _taken(
        self, passes: Sequence[_Pass], of: Callable[[_Pass], Tensor], positions: Tensor
    ) -> Tensor:
        """What the passes give at positions (rows, k) along the last axis but one."""
        found, start = [], 0
        for p in passes:
            slots = [p.slots[row] for row in self.which if row in p.slots]
            if slots:
                some = positions[start : start + len(slots)]
                found.append(_take(of(p)[slots], some))
                start += len(slots)
        return torch.cat(found)

    def log_probs(self, chosen: Sequence[int], moved: Tensor) -> Tensor:
        """See :class:`alphaedit_peft.editing.resume.Resumed`."""
        pick = torch.tensor(list(chosen), device=self.ids.device)
        width = int(self.subjects[pick].max())
        length = int(self.lengths[pick].max())
        skip = self.width - width
        rest = self.states[pick.to(self.states.device), 1:length]
        hidden = torch.cat([moved.to(rest)[:, None], rest], dim=1)  # (chosen, tail, d)
        where = [
            (i, position - self.rows[slot].subject)
            for i, slot in enumerate(chosen)
            for position in self.rows[slot].reads
        ]
        with (
            nullcontext() if self.expected is None else _differing(),
            self.reduced.running(hidden.device),
            hooks.resuming_above(self.bench.model, self.blocks, self.output, lambda: hidden),
            self._last_mlp_at(where),
            gathering_logits(self.bench.model, self.bench.head_name, where),
        ):
            logits = self.bench.model(
                input_ids=self.ids[pick, :length],
                attention_mask=self.mask[pick, skip : self.width + length],
                past_key_values=self._cache(pick, skip),
                use_cache=True,
                **self._positions(pick, length),
            ).logits[0]
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
        likely = self.expected > -10  # far out in the tail rounding is large and plays no part
        found = log_probs.detach()[last.to(log_probs.device)]
        error = (found - self.expected)[likely].abs()
        half = self.states.dtype in (torch.bfloat16, torch.float16)
        bound = 0.5 if half or self.reduced.dtype is not None else 0.02
        self.expected = None
        if not bool((error < bound).all()):
            raise CacheDiffers

    def _positions(self, pick: Tensor, length: int) -> dict[str, Tensor]:
        """Positions (chosen, tail), for models that do not take them from the mask."""
        if "position_ids" not in inspect.signature(self.bench.model.forward).parameters:
            return {}
        return {"position_ids": self.positions[pick, :length]}

    def _cache(self, pick: Tensor, skip: int) -> DynamicCache:
        cache = DynamicCache()
        for block, (keys, values) in enumerate(self.prefix):
            here = pick.to(keys.device)
            cache.update(keys[here, :, skip:], values[here, :, skip:], block)
        return cache


def _cached(block: int, side: int) -> Callable[[_Pass], Tensor]:
    return lambda found: found.cached[block][side]


def _take(values: Tensor, positions: Tensor) -> Tensor:
    """Pick positions (rows, k) along the last axis but one; what is outside gives any of it."""
    index = positions.to(values.device).clamp(0, values.shape[-2] - 1)
    index = index.view(len(index), *[1] * (values.ndim - 3), -1, 1)
    return values.gather(-2, index.expand(*values.shape[:-2], -1, values.shape[-1]))
