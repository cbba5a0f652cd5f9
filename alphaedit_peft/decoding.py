"""Text written token by token, from the model's logits alone and its own settings of ``generate``.

In: a causal language model, equally long rows of ids, a choice among logits. Out: the rows and what
follows. Nothing of ``model.generation_config`` is read: each token is what ``choose`` makes of the
logits after the tokens before it, as one pass over the whole row gives them. A cache saves running
these again where the model keeps one that gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from alphaedit_peft import hooks
from alphaedit_peft.architecture import position_switches

Choose = Callable[[Tensor, Tensor], Tensor]

COMPARED = 2  # steps behind a cache: a state that is not carried on shows in the second
SAME = {torch.float16: 0.5, torch.bfloat16: 0.5}  # log-probabilities differ less; others by 0.02


def likeliest(_: Tensor, logits: Tensor) -> Tensor:
    """The greedy choice, (rows,)."""
    return logits.argmax(-1)


@torch.no_grad()
def decode(
    model: nn.Module, ids: Tensor, new: int, choose: Choose, ends: Collection[int] = ()
) -> list[list[int]]:
    """Rows with up to ``new`` tokens more, each to the first of ``ends`` that it comes to.

    Args:
        ids: (rows, tokens), without padding, where the model reads ids.
        choose: from ids (rows, tokens) and logits (rows, vocab) to the next ids (rows,).
    """
    start, steps = ids.shape[1], _Steps(model)
    ended = torch.zeros(len(ids), dtype=torch.bool)
    with hooks.evaluating(model):
        for _ in range(new):
            chosen = choose(ids, steps.logits(ids)).to(ids.device)  # (rows,)
            ids = torch.cat([ids, chosen[:, None]], dim=1)
            ended |= torch.tensor([token in ends for token in chosen.tolist()])
            if ended.all():
                break
    return [_until(row, start, ends) for row in ids.tolist()]


def _until(row: list[int], start: int, ends: Collection[int]) -> list[int]:
    stop = next((k for k in range(start, len(row)) if row[k] in ends), len(row))
    return row[: stop + 1]


class _Steps:
    """The logits behind rows that grow by a token at each call."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.switches = position_switches(getattr(model, "config", None))
        self.caching, self.compared = True, 0
        self.cache: Any = None

    def logits(self, ids: Tensor) -> Tensor:
        """Logits (rows, vocab) of the token behind ids (rows, tokens)."""
        if self.cache is None or ids.shape[1] - 1 in self.switches:  # kept under other tables
            return self._run(ids)
        if self.compared < COMPARED:
            self.compared += 1
            return self._compared(ids)
        return self._run(ids, self.cache)

    def _compared(self, ids: Tensor) -> Tensor:
        """As ``logits``, and whether the cache gives them is looked at for two of the rows."""
        some, cache = sorted({0, len(ids) - 1}), self.cache
        whole = self._run(ids[some]).log_softmax(-1)
        try:
            found = self._run(ids, cache)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a family whose blocks need a cache of another kind
            found = None
        if found is not None:
            error = (found[some].log_softmax(-1) - whole).abs()
            if bool((error < SAME.get(whole.dtype, 0.02))[whole > -10].all()):
                return found
        self.caching = False
        return self._run(ids)

    def _run(self, ids: Tensor, cache: Any = None) -> Tensor:
        """One pass over the rows, or over their last tokens behind a cache."""
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if cache is not None:
            inputs |= {"input_ids": ids[:, -1:], "past_key_values": cache}
        inputs["use_cache"] = self.caching
        where = [(row, -1) for row in range(len(ids))]
        logits, output = hooks.logits_at(self.model, inputs, where)
        self.cache = getattr(output, "past_key_values", None) if self.caching else None
        if self.caching and self.cache is None:  # a state of its own; RWKV's mixes the rows
            self.caching = False
            return self._run(ids)
        return logits
