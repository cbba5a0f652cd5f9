"""The tokens before: their keys and values, for rows that go on from them.

In: what a forward pass left in its cache. Out: :class:`Past`, and a model's inputs for tokens that
follow it. Rows of different lengths are aligned at their end, so that what follows begins at the
same index in all of them; the mask hides the padding in front.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Past:
    """What rows have behind them, by block.

    Args:
        lengths: (rows,), how many tokens each row has behind it; on the CPU.
        pairs: by block, keys and values (rows, heads, width, d_head), where width is the largest
            length; of blocks that are passed over only ``unread`` ones, that count tokens.
    """

    lengths: Tensor
    pairs: tuple[Pair, ...]

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max())

    def chosen(self, rows: Sequence[int]) -> Past:
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
        return Past(lengths, tuple(pairs))

    def followed_by(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """The model's inputs for tokens (rows, tokens) after these: their ids and mask."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        steps = torch.arange(self.width, device=mask.device) - self.width
        before = steps + self.lengths[:, None].to(mask.device) >= 0  # (rows, width)
        return {
            "input_ids": ids,
            "attention_mask": torch.cat([before.to(mask), mask], dim=1),
            "past_key_values": self._cache(),
            "use_cache": True,
            **self._positions(model, mask),
        }

    def _positions(self, model: nn.Module, mask: Tensor) -> dict[str, Tensor]:
        """Positions (rows, tokens), for models that do not take them from the mask.

        Padding behind a row has its last token's, which the model has room for.
        """
        if "position_ids" not in inspect.signature(model.forward).parameters:
            return {}
        return {"position_ids": self.lengths[:, None].to(mask.device) + mask.cumsum(1) - 1}

    def _cache(self) -> DynamicCache:
        cache = DynamicCache()
        for block, (keys, values) in enumerate(self.pairs):
            cache.update(keys, values, block)
        return cache


def unread(rows: int, width: int, device: torch.device) -> Pair:
    """Keys and values of a block that is passed over: they count its tokens."""
    nothing = torch.zeros(rows, 1, width, 1, device=device)
    return nothing, nothing


def recording(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Any], DynamicCache]:
    """Inputs that let a pass leave its keys and values in a cache, and the cache."""
    cache = DynamicCache()
    return {**inputs, "past_key_values": cache, "use_cache": True}, cache


def cached(cache: DynamicCache) -> dict[int, Pair]:
    """By block, the keys and values (rows, heads, tokens, d_head) that a cache was given."""
    layers: Sequence[Any] = cache.layers
    found = {block: (layer.keys, layer.values) for block, layer in enumerate(layers)}
    return {block: pair for block, pair in found.items() if all(p is not None for p in pair)}


def aligned(pairs: Mapping[int, Pair], lengths: Tensor) -> Past:
    """The past of rows that a pass ran padded on the right; blocks without a pair are unread.

    ``lengths`` (rows,) are on the CPU.
    """
    width = int(lengths.max())
    steps = torch.arange(width) - width + lengths[:, None]
    moved = {b: (take(keys, steps), take(values, steps)) for b, (keys, values) in pairs.items()}
    nothing = unread(len(lengths), width, lengths.device)
    return Past(lengths, tuple(moved.get(b, nothing) for b in range(max(pairs) + 1)))


def take(values: Tensor, positions: Tensor) -> Tensor:
    """Pick positions (rows, k) along the last axis but one; what is outside gives any of it."""
    index = positions.to(values.device).clamp(0, values.shape[-2] - 1)
    index = index.view(len(index), *[1] * (values.ndim - 3), -1, 1)
    return values.gather(-2, index.expand(*values.shape[:-2], -1, values.shape[-1]))
