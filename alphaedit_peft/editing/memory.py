"""What happens when memory runs out, and how much a batch of edits takes, so that it does not.

``by_halves`` runs parts, and smaller ones from where memory runs out. ``within_budget`` sets a
runner's chunk sizes from ``settings.memory_budget``, by the formula below, which counts above the
base's weights. With n rows after the batch, u edits of c rows each for keys, rows of up to p tokens
before the subject and q from it on (q' in the edit that has fewest), t tokens of a target, r of the
row with most of its tokens read, b rewrite layers, N blocks, N' of them above the last rewrite
layer, width d, MLP f, keys and values k, vocabulary V, e bytes a number of the model, s of the
metric's workspace, and w weights above the last rewrite layer, the head's among them, where
``autocast`` copies them (else 0):

    held   = statistics + b (8 n (f + d) + 12 n^2) + e u c (p + 1) d + 24 u d + 2 w
    solve  = 24 n f + 24 n^2 + s
    token  = e (6 d + 3 f + 6 k (L + 1)) + (e + 8) V t / r    of a forward pass, the last block L
    before = 2 e k (N (2 p + q) + N' p) + e (p + q) (7 d + 3 f)     of a row, ``passes_before``
    after  = 2 e k N' (3 p + q) + 2 e (p + q) d + (2 e + 16) V t    of a row, ``FromSubject``
    back   = e N' (10 d + 4 f)                                      of a token's backward pass
    suffix = max(before / q', after / q' + back)                    a padded token
    peak   = held + max(solve, token x tokens_per_batch, suffix x target_tokens)

A chunk's padded tokens are at least q' a row, since it is padded to its longest suffix. An edit by
itself may be larger than a chunk is to be; it takes max(before, after + q back) for each row.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from alphaedit_peft.editing.prompts import EditRows
from alphaedit_peft.editing.runner import Runner
from alphaedit_peft.settings import byte_count, bytes_in_words
from alphaedit_peft.solve_metric import Metric
from alphaedit_peft.tokens import text_config

Part = TypeVar("Part")
Found = TypeVar("Found")


def by_halves(
    parts: Sequence[Part],
    run: Callable[[Part], Found],
    *,
    size: Callable[[Part], int],
    split: Callable[[Sequence[Part], int], Sequence[Part]],
    what: str,
    setting: str,
    least: int = 1,
) -> list[Found]:
    """Run parts in turn, smaller ones from where memory runs out.

    Args:
        size: how many of ``what`` a part holds, at least ``least``.
        split: what to run instead of all that is left, the first of which was too large, and how
            many it may hold: half as many.
        setting: which one bounds the parts.

    Raises:
        torch.OutOfMemoryError: there is no room for the smallest part.

    Warns:
        UserWarning: memory ran out, so that smaller parts are used.
    """
    found, left = [], list(parts)
    while left:
        count = size(left[0])
        try:
            found.append(run(left[0]))
        except torch.OutOfMemoryError:
            if count // 2 < least:
                raise
        else:
            del left[0]
            continue
        left = list(split(left, count // 2))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what torch keeps of a GPU's memory is given back
        warnings.warn(
            f"{count} {what} do not fit in memory at once; going on with {count // 2}. Set "
            f"memory_budget or a lower {setting} to begin with less",
            stacklevel=3,
        )
    return found


@dataclass(frozen=True)
class Need:
    """Bytes that a batch of edits takes above the base's weights; see the module's formula.

    ``held`` always, ``solve`` for a layer's solve and figures, ``token`` for each of a forward
    pass, ``suffix`` for each padded token that is optimised, ``largest`` for the largest edit that
    is optimised by itself. ``longest`` is the longest row.
    """

    held: int
    solve: int
    token: int
    suffix: int
    longest: int
    largest: int

    def peak(self, tokens_per_batch: int, target_tokens: int) -> int:
        """What the batch takes with these chunk sizes; with none, one edit at a time."""
        passes = self.token * max(tokens_per_batch, self.longest)
        return self.held + max(self.solve, passes, self.largest, self.suffix * target_tokens)


def within_budget(
    runner: Runner, metric: Metric, edits: Sequence[EditRows], batch_size: int, rank: int
) -> Runner:
    """The runner with chunk sizes from ``settings.memory_budget``; as it is where there is none.

    All ``edits`` are to be made, at most ``batch_size`` at once, over ``rank`` rows in place.

    Raises:
        ValueError: a budget that is too small for one edit; says how much it takes.
    """
    budget = byte_count("memory_budget", runner.settings.memory_budget)
    if budget is None or not edits:
        return runner
    need = estimate(runner, metric, edits, min(batch_size, len(edits)), rank + len(edits))
    if budget < (least := need.peak(0, 0)):
        raise ValueError(
            f"memory_budget={bytes_in_words(budget)} is too small for one edit of this batch, "
            f"which takes {bytes_in_words(least)}; raise it, or lower batch_size, "
            "num_contexts or context_length"
        )
    left = budget - need.held
    return runner.within(left // need.token, left // need.suffix)


def estimate(
    runner: Runner, metric: Metric, edits: Sequence[EditRows], together: int, rank: int
) -> Need:
    """What edits take by the formula above: ``together`` in a batch, ``rank`` rows in the end."""
    embedding: Any = runner.model.get_input_embeddings()  # type: ignore[operator]
    vocabulary, e = len(embedding.weight), embedding.weight.element_size()
    d, f, pair = _widths(runner)
    pair *= 2 * e
    blocks = runner.architecture.num_blocks
    above = blocks - runner.layers[-1] - 1
    rows = [(*edit.rows, edit.kl_row, *edit.anchors) for edit in edits]
    every = [row for some in rows for row in some]
    p = max(row.subject_last for row in every)
    suffixes = [max(len(row.scoring_ids) - row.subject_last for row in some) for some in rows]
    q, shortest = max(suffixes), min(suffixes)
    t = max(max(1, len(row.target)) for row in every)
    reads = max(-(-max(1, len(row.target)) * vocabulary // len(row.scoring_ids)) for row in every)
    held = metric.held_bytes + len(runner.layers) * (8 * rank * (f + d) + 12 * rank**2)
    copies = sum(2 * weight.numel() for _, _, weight in runner.upper_weights())
    held += together * (e * len(edits[0].rows) * (p + 1) * d + 24 * d) + copies
    before = pair * (blocks * (2 * p + q) + above * p) + e * (p + q) * (7 * d + 3 * f)
    after = pair * above * (3 * p + q) + 2 * e * (p + q) * d + (2 * e + 16) * vocabulary * t
    back = e * above * (10 * d + 4 * f)
    return Need(
        held=held,
        solve=24 * rank * f + 24 * rank**2 + metric.workspace(f),
        token=e * (6 * d + 3 * f) + 3 * pair * (runner.layers[-1] + 1) + (e + 8) * reads,
        suffix=max(-(-before // shortest), -(-after // shortest) + back),
        longest=p + q,
        largest=max(map(len, rows)) * max(before, after + q * back),
    )


def _widths(runner: Runner) -> tuple[int, int, int]:
    """Of hidden states, of the MLP, and of keys (and of values) in a cache."""
    model: Any = runner.model
    config = text_config(model.config)
    module: Any = runner.model.get_submodule(runner.architecture.rewrite_name(runner.layers[0]))
    weight = getattr(module, "base_layer", module).weight
    hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", None) or 1
    pairs = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or hidden // heads
    width = weight.numel() // hidden if weight.is_floating_point() else module.in_features
    return hidden, width, pairs * head
