"""Run only what a change at the subject can reach: the blocks above, the tokens from there on.

In: token rows and the last rewrite layer L. Out: log-probabilities where the rows are read, for any
hidden state put at the subject's last token after block L. What lies before never changes, so it
is computed once (see ``tails``), and the model's own forward runs the rest, with its masks,
positions and head, in a smaller dtype where ``config.autocast`` names one (see ``reduced``); h is
always the model's own. A family whose cache cannot be continued this way is found out by a
comparison at the first step, and runs whole rows instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from alphaedit_peft import hooks
from alphaedit_peft.editing.bench import Bench, gathering_logits
from alphaedit_peft.editing.targets.reduced import Reduced
from alphaedit_peft.tokens import by_length, padded


@dataclass(frozen=True)
class Row:
    """A token row of a group: what it reads and scores, and its weight in the group's loss."""

    group: int
    ids: tuple[int, ...]
    subject: int
    reads: tuple[int, ...]  # positions whose logits the loss reads
    target: tuple[int, ...]  # empty for the KL row
    weight: float


class CacheDiffers(Exception):
    """Going on from a cache gives other numbers than the model's own forward."""


class Resumed(Protocol):
    """Rows that can be run again from block L with other hidden states at the subject."""

    hidden: Tensor
    """Hidden states at the subjects, (rows, d), in the model's dtype."""

    def together(self, chosen: Sequence[int]) -> list[list[int]]:
        """The chosen rows in batches, each for one call of ``log_probs``."""

    def log_probs(self, chosen: Sequence[int], moved: Tensor) -> Tensor:
        """Log-probabilities at all reads of the chosen rows in turn, (reads, vocab).

        Args:
            chosen: indices of rows that run together.
            moved: their hidden states at the subject, (len(chosen), d).

        Raises:
            CacheDiffers: at the first call for these rows, which is to move none.
        """


class WholeRows:
    """All tokens of each row, above block L, at most ``target_tokens`` of them at once."""

    def __init__(self, bench: Bench, rows: Sequence[Row], reduced: Reduced) -> None:
        self.bench, self.rows, self.reduced = bench, rows, reduced
        self.blocks = [bench.architecture.block_name(i) for i in range(bench.layers[-1] + 1)]
        self.inputs = padded([row.ids for row in rows], bench.device)
        self.output = hooks.capture_output(bench.model, self.inputs, self.blocks[-1])
        self.states = hooks.hidden_of(self.output)  # (rows, tokens, d)
        subjects = torch.tensor([row.subject for row in rows], device=self.states.device)
        self.hidden = self.states[torch.arange(len(rows), device=self.states.device), subjects]

    def together(self, chosen: Sequence[int]) -> list[list[int]]:
        """See :class:`Resumed`."""
        lengths = [len(self.rows[i].ids) for i in chosen]
        batched = by_length(
            lengths, self.bench.device, self.bench.target_tokens, few=self.bench.few_passes
        )
        return [[chosen[k] for k in batch] for batch in batched]

    def log_probs(self, chosen: Sequence[int], moved: Tensor) -> Tensor:
        """See :class:`Resumed`."""
        rows = [self.rows[i] for i in chosen]
        length = max(len(row.ids) for row in rows)
        states = self.states[list(chosen), :length]
        which = torch.arange(len(rows), device=states.device)
        subjects = torch.tensor([row.subject for row in rows], device=states.device)
        hidden = states.index_put((which, subjects), moved.to(states))
        inputs = {name: value[list(chosen), :length] for name, value in self.inputs.items()}
        where = [(i, position) for i, row in enumerate(rows) for position in row.reads]
        with (
            self.reduced.running(hidden.device),
            hooks.resuming_above(self.bench.model, self.blocks, self.output, lambda: hidden),
            gathering_logits(self.bench.model, self.bench.head_name, where),
        ):
            return log_softmax(self.bench.model(**inputs, use_cache=False).logits[0])


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
