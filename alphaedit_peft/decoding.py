"""Text written token by token from a model's logits, whatever its ``generation_config`` holds.

In: a causal language model, equally long rows of ids, a choice among logits. Out: the rows and what
follows. Each token is what the choice makes of the logits that one pass over the whole row gives. A
cache saves running the row again, where the model keeps one that gives the same numbers.
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


class Decoder:
    """A model that writes on, behind a cache once that is seen to be true."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._switches = position_switches(getattr(model, "config", None))
        self._caching, self._compared = True, 0
        self._cache: Any = None

    @torch.no_grad()
    def write(
        self, ids: Tensor, new: int, choose: Choose, ends: Collection[int] = ()
    ) -> list[list[int]]:
        """Rows with up to ``new`` tokens more, each to the first of ``ends`` that it comes to.

        Args:
            ids: (rows, tokens), without padding, where the model reads ids.
            choose: from ids (rows, tokens) and logits (rows, vocab) to the next ids (rows,).
        """
        start, self._cache = ids.shape[1], None
        ended = torch.zeros(len(ids), dtype=torch.bool)
        with hooks.evaluating(self._model):
            for _ in range(new):
                chosen = choose(ids, self._logits(ids)).to(ids.device)  # (rows,)
                ids = torch.cat([ids, chosen[:, None]], dim=1)
                ended |= torch.tensor([token in ends for token in chosen.tolist()])
                if ended.all():
                    break
        self._cache = None
        return [_until(row, start, ends) for row in ids.tolist()]

    def _logits(self, ids: Tensor) -> Tensor:
        """Logits (rows, vocab) of the token behind ids (rows, tokens), one more at each call."""
        if self._cache is None or ids.shape[1] - 1 in self._switches:  # kept under other tables
            return self._run(ids)
        if self._compared < COMPARED:
            self._compared += 1
            return self._held_against_whole(ids)
        return self._run(ids, self._cache)

    def _held_against_whole(self, ids: Tensor) -> Tensor:
        """As ``_logits``, and whether the cache gives them is looked at for two of the rows."""
        some, cache = sorted({0, len(ids) - 1}), self._cache
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
        self._caching = False
        return self._run(ids)

    def _run(self, ids: Tensor, cache: Any = None) -> Tensor:
        """One pass over the rows, or over their last tokens behind a cache."""
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if cache is not None:
            inputs |= {"input_ids": ids[:, -1:], "past_key_values": cache}
        inputs["use_cache"] = self._caching
        where = [(row, -1) for row in range(len(ids))]
        logits, output = hooks.logits_at(self._model, inputs, where)
        self._cache = getattr(output, "past_key_values", None) if self._caching else None
        if self._caching and self._cache is None:  # a state of its own; RWKV's mixes the rows
            self._caching = False
            return self._run(ids)
        return logits


def _until(row: list[int], start: int, ends: Collection[int]) -> list[int]:
    stop = next((k for k in range(start, len(row)) if row[k] in ends), len(row))
    return row[: stop + 1]
