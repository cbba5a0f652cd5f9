"""What comes before the subjects, run once: no change at them can reach it.

In: token rows and the last rewrite layer L. Out: :class:`Pass`: block L's output and, above it, the
keys and values of the tokens before the subject. Leading tokens that rows share are run once for
all of them (see ``prefixes``), the others through block L, and above it only those before the
subject.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alphaedit_peft import hooks
from alphaedit_peft.editing.bench import Bench
from alphaedit_peft.editing.past import Pair, Past, aligned, cached, recording
from alphaedit_peft.editing.prefixes import cut_rows
from alphaedit_peft.editing.targets.reduced import Reduced
from alphaedit_peft.editing.targets.resume import CacheDiffers, Row
from alphaedit_peft.tokens import padded


@dataclass(frozen=True)
class Pass:
    """One pass over rows that are cut where a shared prefix ends.

    ``slots``: row -> its place in the batch; ``starts`` (batch,): its tokens in the prefix;
    ``output``: block L's, in its family's own form, of tokens from there on; ``pairs``: by block
    above L, keys and values (batch, heads, tokens, d_head) of tokens before the subject, those of
    the prefix in front, which end at index ``width``.
    """

    slots: dict[int, int]
    starts: Tensor
    output: Any
    pairs: dict[int, Pair]
    width: int


@torch.no_grad()
def passes_before(bench: Bench, rows: Sequence[Row], reduced: Reduced) -> list[Pass]:
    """Run everything that no change at the subjects can reach."""
    cut = cut_rows(bench, [row.ids for row in rows], [row.subject for row in rows])
    starts = cut.starts
    past = _shared_past(bench, reduced, cut.prefixes) if cut.prefixes else None
    found = []
    for side in cut.sides():
        rests = [rows[row].ids[starts[row] :] for row in side]
        for batch in bench.batches(rests, [starts[row] for row in side]):
            which = [side[k] for k in batch.indices]
            behind = [prefix for row in which if (prefix := cut.behind[row]) is not None]
            own = past.chosen(behind) if past is not None and behind else None
            found.append(_pass(bench, rows, reduced, which, batch.inputs, own))
    return found


def _shared_past(bench: Bench, reduced: Reduced, prefixes: Sequence[Sequence[int]]) -> Past:
    """Keys and values of the shared prefixes, at every block."""
    last = bench.architecture.num_blocks - 1
    inputs, cache = recording(padded(prefixes, bench.device))
    names = [bench.architecture.block_name(i) for i in (bench.layers[-1], last)]
    with differing(), reduced.running_above(names[0]):
        hooks.run_until(bench.model, inputs, names[1])
    lengths = torch.tensor([len(prefix) for prefix in prefixes])
    return aligned(_complete(bench, cached(cache), int(lengths.max()), 0), lengths)


def _pass(
    bench: Bench,
    rows: Sequence[Row],
    reduced: Reduced,
    which: Sequence[int],
    inputs: dict[str, Tensor],
    past: Past | None,
) -> Pass:
    """Run what follows the prefixes through block L, and what is before the subjects above it."""
    model, above = bench.model, bench.layers[-1] + 1
    blocks = [bench.architecture.block_name(i) for i in range(above)]
    starts = torch.zeros(len(which), dtype=torch.long) if past is None else past.lengths
    subjects = torch.tensor([rows[row].subject for row in which])
    lengths = (subjects - starts).clamp_min(1)  # a subject that nothing precedes runs for itself
    length, width = int(lengths.max()), 0 if past is None else past.width
    mask = torch.arange(length) < lengths[:, None]
    before = {"input_ids": inputs["input_ids"][:, :length]}
    before["attention_mask"] = mask.long().to(before["input_ids"].device)
    with differing():
        output = hooks.capture_output(
            model, inputs if past is None else past.followed_by(model, inputs), blocks[-1]
        )
        states = hooks.hidden_of(output)
        if past is None:
            further, cache = recording(before)
        else:
            further = past.followed_by(model, before)
            cache = further["past_key_values"]
        with (
            reduced.running(states.device),
            hooks.resuming_above(model, blocks, output, lambda: states[:, :length]),
        ):
            hooks.run_until(
                model, further, bench.architecture.block_name(bench.architecture.num_blocks - 1)
            )
    pairs = _complete(bench, cached(cache), width + length, above)
    slots = {row: slot for slot, row in enumerate(which)}
    return Pass(slots, starts.to(bench.device), output, pairs, width)


def _complete(bench: Bench, pairs: dict[int, Pair], tokens: int, first: int) -> dict[int, Pair]:
    """The pairs of all blocks from ``first`` on, each of so many tokens."""
    found = {block: pair for block, pair in pairs.items() if block >= first}
    whole = all(part.shape[-2] == tokens for pair in found.values() for part in pair)
    if not whole or len(found) != bench.architecture.num_blocks - first:
        raise CacheDiffers
    return found


@contextmanager
def differing() -> Iterator[None]:
    """Say that the cache differs where a model fails on it; its blocks may need another kind.

    What fails for another reason fails again with whole rows, and is told of then.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise CacheDiffers from error
