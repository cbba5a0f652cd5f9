"""Texts to token ids and padded batches, for whatever runs a model over prompts and continuations.

In: texts, a fast tokenizer. Out: ids cut at the border between a prompt and what follows it, and
padded batches of them. A prompt and its continuation are tokenised once, together; padding is made
here, on the right, whatever the tokenizer's own setting, which is never touched.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 80  # characters of a prompt in an error
# Padded tokens that take as long as one more pass of fewer: thin products and calls on a CPU, the
# launches of hundreds of kernels on a GPU.
PASS_COST = {"cpu": 32, "cuda": 512}

Offsets = list[tuple[int, int]]


def require_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a slow tokenizer: it does not say which characters its tokens stand for."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} gives no character offsets, which place the "
            "subject and the target; load a fast one (AutoTokenizer.from_pretrained(..., "
            "use_fast=True))"
        )


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True
) -> tuple[tuple[int, ...], Offsets]:
    """Ids and character offsets of a text; ``special`` adds BOS where the tokenizer does.

    A closing EOS is taken off, since a continuation is to follow.
    """
    # verbose=False: no advice about lengths, ``require_fit`` sees to them
    encoded = tokenizer(
        text, add_special_tokens=special, return_offsets_mapping=True, verbose=False
    )
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    while ids and offsets[-1][0] == offsets[-1][1] and ids[-1] in tokenizer.all_special_ids:
        ids.pop()
        offsets.pop()
    return tuple(ids), offsets


def joined(
    tokenizer: PreTrainedTokenizerBase, text: str, suffix: str, special: bool = True
) -> tuple[tuple[int, ...], Offsets, int]:
    """Ids and offsets of ``text + suffix``, and the index of the first token of the suffix.

    A token that runs over the border would belong to both: the two sides are then tokenised
    apart, as they meet in generation, and the offsets are of ``text`` alone.
    """
    ids, offsets = encode(tokenizer, text + suffix, special)
    border = next((i for i, (_, b) in enumerate(offsets) if b > len(text)), len(ids))
    if border < len(ids) and offsets[border][0] < len(text):
        ids, offsets = encode(tokenizer, text, special)
        border, ids = len(ids), ids + encode(tokenizer, suffix, special=False)[0]
    return ids, offsets, border


def last_token(offsets: Offsets, start: int, end: int) -> int | None:
    """Index of the last token that holds something of the characters ``start`` to ``end``.

    So the subject's last token is found, whose MLP input is an edit's key. None: there is none.
    """
    within = [i for i, (a, b) in enumerate(offsets) if a < end and b > max(start, a)]
    return within[-1] if within else None


def separator_between(text: str, target: str, separator: str) -> str:
    """What stands between a prompt and its continuation: nothing where either brings a space."""
    return "" if text[-1:].isspace() or target[:1].isspace() else separator


def require_fit(
    ids: Sequence[int], largest: int, text: str, limits: tuple[int | None, int], advice: str
) -> None:
    """Refuse a row ``ids`` that the model has no positions or no embeddings for.

    Args:
        ids: what the model is to read.
        largest: the largest token id in it and in what is to follow.
        text: the prompt, shown in the error.
        limits: how many positions the model has (None: any), and how many token ids it knows.
        advice: what to shorten.
    """
    positions, vocabulary = limits
    shown = text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
    if positions is not None and len(ids) > positions:
        raise ValueError(
            f"prompt {shown!r} and its target have {len(ids)} tokens, the model has {positions} "
            f"positions; {advice}"
        )
    if largest >= vocabulary:
        raise ValueError(
            f"prompt {shown!r} or its target has token id {largest}, the model has ids "
            f"0..{vocabulary - 1}; use the tokenizer that belongs to the model"
        )


@dataclass(frozen=True)
class PaddedBatch:
    """Rows padded on the right: ``inputs`` for the model, and which rows these are."""

    inputs: dict[str, Tensor]
    indices: list[int]


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Ids (batch, tokens) padded with 0 on the right, and their attention mask."""
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def batches(
    rows: Sequence[Sequence[int]],
    tokens_per_batch: int,
    device: torch.device,
    behind: Sequence[int] = (),
    *,
    few: bool = False,
    switches: Sequence[int] = (),
) -> Iterator[PaddedBatch]:
    """Padded batches of at most ``tokens_per_batch`` tokens, rows of like length together.

    A row longer than that makes a batch of its own. The other arguments: see ``by_length``.
    """
    lengths = [len(row) for row in rows]
    for batch in by_length(lengths, device, tokens_per_batch, behind, few=few, switches=switches):
        yield PaddedBatch(padded([rows[i] for i in batch], device), batch)


def pass_cost(device: torch.device) -> int:
    """Tokens that take as long as one more pass of fewer; see ``PASS_COST``."""
    return PASS_COST.get(device.type, PASS_COST["cuda"])


def by_length(
    lengths: Sequence[int],
    device: torch.device,
    most: float = float("inf"),
    behind: Sequence[int] = (),
    *,
    few: bool = False,
    switches: Sequence[int] = (),
) -> list[list[int]]:
    """Indices in batches to be padded to their longest, from the shortest up.

    The borders are those with the least work, where a further pass costs as much as some padding,
    ``PASS_COST`` tokens of it; then batches of more than ``most`` padded tokens are cut. Tokens
    that rows follow in a cache, ``behind`` each, count there too: they take room, if no time.
    ``few`` makes as few batches as it can: where each pass brings weights to a GPU, it costs more
    than any padding. Rows on either side of one of ``switches`` (``position_switches``), with what
    is behind them, never share a batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    sides: dict[int, list[int]] = {}
    for i in order:
        whole = lengths[i] + (behind[i] if behind else 0)
        sides.setdefault(bisect_left(switches, whole), []).append(i)
    cost, found = pass_cost(device), []
    cuts = ([side] if few else _least_padding(side, lengths, cost) for side in sides.values())
    for some in chain.from_iterable(cuts):
        batch: list[int] = []
        width = 0
        for index in some:
            before = behind[index] if behind else 0
            if batch and (len(batch) + 1) * (max(width, before) + lengths[index]) > most:
                found.append(batch)
                batch, width = [], 0
            batch.append(index)
            width = max(width, before)
        found.append(batch)
    return found


def _least_padding(order: Sequence[int], lengths: Sequence[int], cost: int) -> list[Sequence[int]]:
    """Cut a sorted order where padded tokens plus ``cost`` a batch are fewest."""
    ends = [k for k in range(1, len(order)) if lengths[order[k - 1]] < lengths[order[k]]]
    ends.append(len(order))
    best, cut = {0: 0}, {}  # the least work up to an end, and where its last batch starts
    for end in ends if order else []:
        longest = lengths[order[end - 1]]
        work = {start: least + cost + (end - start) * longest for start, least in best.items()}
        cut[end] = min(work, key=lambda start: work[start])
        best[end] = work[cut[end]]
    found: list[Sequence[int]] = []
    end = len(order)
    while end:
        found.insert(0, order[cut[end] : end])
        end = cut[end]
    return found
