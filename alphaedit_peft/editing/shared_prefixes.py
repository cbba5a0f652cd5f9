"""Leading tokens that several rows share, so that they are run once, and the cache they leave.

In: token rows, and how many of its tokens each may share at most. Out: :class:`Cut`, where each row
is cut and behind which shared prefix it goes on; :class:`PrefixCache`, what rows have behind them.
The prompts of all edits follow the same contexts, and prompts of one relation begin alike. Each row
is cut at most once.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from alphaedit_peft import hooks
from alphaedit_peft.editing.runner import Runner
from alphaedit_peft.tokens import padded, pass_cost

Ids = Sequence[int]


@dataclass(frozen=True)
class Cut:
    """Shared prefixes, and by row which of them it follows; None where it shares none."""

    prefixes: tuple[tuple[int, ...], ...]
    behind: tuple[int | None, ...]

    @classmethod
    def none(cls, rows: int) -> Cut:
        """Every row is left whole."""
        return cls((), (None,) * rows)

    @property
    def starts(self) -> list[int]:
        """By row, how many of its tokens are in its prefix."""
        return [0 if which is None else len(self.prefixes[which]) for which in self.behind]

    def batches(
        self, runner: Runner, rows: Sequence[Ids]
    ) -> Iterator[tuple[list[int], dict[str, Tensor], tuple[int, ...]]]:
        """Padded batches of what follows the prefixes, of rows that follow one and of the others.

        Returns:
            Of each batch which rows these are, the inputs, and by row its prefix; empty for none.
        """
        starts = self.starts
        for whole in (False, True):
            side = [row for row, which in enumerate(self.behind) if (which is None) is whole]
            rests = [rows[row][starts[row] :] for row in side]
            for batch in runner.batches(rests, [starts[row] for row in side]):
                which = [side[k] for k in batch.indices]
                prefixes = (self.behind[row] for row in which)
                yield which, batch.inputs, tuple(p for p in prefixes if p is not None)


def cut_rows(runner: Runner, rows: Sequence[Ids], most: Sequence[int]) -> Cut:
    """Cut rows where it saves more than the further pass costs, and the model goes on from a cache.

    Each may share its first ``most`` tokens; none of one that is above a switch of the model's
    position tables. The cut is tried on two rows first.
    """
    most = [n if runner.all_short([len(row)]) else 0 for n, row in zip(most, rows, strict=True)]
    cut = _within_a_pass(shared_prefixes(rows, most), rows, runner.settings.tokens_per_batch)
    saved = sum(cut.starts) - sum(map(len, cut.prefixes))
    worth_it = not runner.few_passes and saved > pass_cost(runner.device)
    return cut if worth_it and _continues(runner, rows, cut) else Cut.none(len(rows))


def shared_prefixes(rows: Sequence[Ids], most: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Lengths of prefixes and the rows that share them, two or more, each row once.

    Rows that begin alike are all cut there, or some of them further on, whichever saves more: a
    prefix saves length x (rows - 1).
    """
    order = sorted(range(len(rows)), key=lambda i: tuple(rows[i][: most[i]]))
    parts = [tuple(rows[i][: most[i]]) for i in order]
    found: list[tuple[int, list[int]]] = []
    open_: list[_Alike] = []  # each within the one before it, sharing more
    for end in range(1, len(parts) + 1):
        length = _common(parts[end - 1], parts[end]) if end < len(parts) else 0
        inner = _Alike(length, end - 1)
        while open_ and open_[-1].length > length:
            closed = open_.pop()
            together = closed.length, sorted(order[closed.start : end])
            apart = closed.cuts + inner.cuts
            better = _saved(together) >= sum(map(_saved, apart))
            inner = _Alike(length, closed.start, [together] if better else apart)
        if open_ and open_[-1].length == length:
            open_[-1].cuts += inner.cuts
        elif length:
            open_.append(inner)
        else:
            found += inner.cuts
    return found


@dataclass
class _Alike:
    """Rows from ``start`` on, in sorted order, that share ``length`` tokens.

    ``cuts`` are what would be cut further on.
    """

    length: int
    start: int
    cuts: list[tuple[int, list[int]]] = field(default_factory=list)


def _saved(shared: tuple[int, list[int]]) -> int:
    """Tokens that need not run where a prefix of some length runs once for some rows."""
    length, rows = shared
    return length * (len(rows) - 1)


def _common(left: Ids, right: Ids) -> int:
    """How many leading tokens two rows share."""
    pairs = zip(left, right, strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _within_a_pass(found: Sequence[tuple[int, list[int]]], rows: Sequence[Ids], most: int) -> Cut:
    """The prefixes that save most, as many as run in one padded pass of ``most`` tokens."""
    prefixes: list[tuple[int, ...]] = []
    behind: list[int | None] = [None] * len(rows)
    longest = 0
    for length, some in sorted(found, key=_saved, reverse=True):
        if (len(prefixes) + 1) * max(longest, length) > most:
            continue
        longest = max(longest, length)
        for row in some:
            behind[row] = len(prefixes)
        prefixes.append(tuple(rows[some[0]][:length]))
    return Cut(tuple(prefixes), tuple(behind))


@torch.no_grad()
def _continues(runner: Runner, rows: Sequence[Ids], cut: Cut) -> bool:
    """Whether rows in two parts give the last rewrite layer's output of the whole rows.

    Of the rows with the shortest and with the longest prefix, which are aligned at its end.
    """
    model, device, block = runner.model, runner.device, runner.blocks_below[-1]
    begin = cut.starts
    shared = [row for row, which in enumerate(cut.behind) if which is not None]
    shared.sort(key=lambda row: (begin[row], len(rows[row])))
    tried = sorted({shared[0], shared[-1]})
    starts, ends = [begin[i] for i in tried], [len(rows[i]) - 1 for i in tried]
    whole = hooks.capture_output(model, padded([rows[i] for i in tried], device), block)
    try:
        inputs, cache = recording(padded([rows[i][: begin[i]] for i in tried], device))
        hooks.run_until(model, inputs, block)
        prefix_cache = aligned(cached(cache), torch.tensor(starts))
        rests = padded([rows[i][begin[i] :] for i in tried], device)
        parts = hooks.capture_output(model, prefix_cache.followed_by(model, rests), block)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a family whose blocks need a cache of another kind
        return False
    expected = _at(whole, ends)
    found = _at(parts, [end - start for end, start in zip(ends, starts, strict=True)])
    bound = 0.1 if expected.dtype in (torch.bfloat16, torch.float16) else 0.01
    error = (found - expected).float().norm(dim=1)
    return bool((error <= bound * expected.float().norm(dim=1)).all())


def _at(output: Any, positions: Sequence[int]) -> Tensor:
    """Hidden states of a block's output, one position a row, (rows, d)."""
    hidden = hooks.hidden_of(output)
    return hidden[torch.arange(len(hidden)), torch.tensor(list(positions))]


Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PrefixCache:
    """What rows have behind them, by block.

    Args:
        lengths: (rows,), how many tokens each row has behind it; on the CPU.
        pairs: by block, keys and values (rows, heads, width, d_head), where width is the largest
            length; of blocks that are passed over only zeros, that count tokens.
    """

    lengths: Tensor
    pairs: tuple[Pair, ...]

    @classmethod
    def of(
        cls, lengths: Tensor, pairs: Mapping[int, Pair], blocks: int, device: torch.device
    ) -> PrefixCache:
        """The cache of a model's first blocks; those without a pair are passed over."""
        nothing = torch.zeros(len(lengths), 1, int(lengths.max()), 1, device=device)
        return cls(lengths, tuple(pairs.get(b, (nothing, nothing)) for b in range(blocks)))

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max())

    def chosen(self, rows: Sequence[int]) -> PrefixCache:
        """The same of some rows, in the given order, no wider than they need."""
        if list(rows) == list(range(len(self.lengths))):
            return self
        pick = torch.tensor(list(rows))
        lengths = self.lengths[pick]
        skip = self.width - int(lengths.max())
        pairs = []
        for keys, values in self.pairs:
            here = pick.to(keys.device)
            pairs.append((keys[here, :, skip:], values[here, :, skip:]))
        return PrefixCache(lengths, tuple(pairs))

    def followed_by(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """The model's inputs for tokens (rows, tokens) after these: their ids and mask.

        Models that do not take positions from the mask are given them. Padding behind a row has
        its last token's, which the model has room for.
        """
        ids, mask, cache = inputs["input_ids"], inputs["attention_mask"], DynamicCache()
        lengths = self.lengths[:, None].to(mask.device)
        for block, (keys, values) in enumerate(self.pairs):
            cache.update(keys, values, block)
        steps = torch.arange(self.width, device=mask.device) - self.width
        before = steps + lengths >= 0  # (rows, width)
        whole = torch.cat([before.to(mask), mask], dim=1)
        found = {"input_ids": ids, "attention_mask": whole, "past_key_values": cache}
        if "position_ids" in inspect.signature(model.forward).parameters:
            found["position_ids"] = lengths + mask.cumsum(1) - 1
        return {**found, "use_cache": True}


def recording(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Any], DynamicCache]:
    """Inputs that let a pass leave its keys and values in a cache, and the cache."""
    cache = DynamicCache()
    return {**inputs, "past_key_values": cache, "use_cache": True}, cache


def cached(cache: DynamicCache) -> dict[int, Pair]:
    """By block, the keys and values (rows, heads, tokens, d_head) that a cache was given."""
    layers: Sequence[Any] = cache.layers
    found = {block: (layer.keys, layer.values) for block, layer in enumerate(layers)}
    return {block: pair for block, pair in found.items() if all(p is not None for p in pair)}


def aligned(pairs: Mapping[int, Pair], lengths: Tensor) -> PrefixCache:
    """The cache of rows that a pass ran padded on the right; ``lengths`` (rows,) are on the CPU."""
    width = int(lengths.max())
    steps = torch.arange(width) - width + lengths[:, None]
    moved = {b: (take(keys, steps), take(values, steps)) for b, (keys, values) in pairs.items()}
    return PrefixCache.of(lengths, moved, max(pairs) + 1, lengths.device)


def take(values: Tensor, positions: Tensor) -> Tensor:
    """Pick positions (rows, k) along the last axis but one; what is outside gives any of it."""
    index = positions.to(values.device).clamp(0, values.shape[-2] - 1)
    index = index.view(len(index), *[1] * (values.ndim - 3), -1, 1)
    return values.gather(-2, index.expand(*values.shape[:-2], -1, values.shape[-1]))
