"""How far a model has moved on texts that have nothing to do with its edits.

In: a model (as a :class:`Reader`) and held-out texts; for the divergence, the model it came from.
Out: perplexity, and the mean KL divergence of its next-token distributions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn

from alphaedit_peft.evaluation import metrics
from alphaedit_peft.evaluation.summary import Estimate, bootstrap
from alphaedit_peft.log_probs import Reader, TextBatch

Without = Callable[[], AbstractContextManager[object]]


def text_perplexity(
    reader: Reader, texts: Sequence[str], *, level: float = 0.95, seed: int = 0
) -> Estimate:
    """exp( -(1/n) sum_t log P(x_t | x_<t) ) over the n tokens of all texts, each alone.

    The first token of a text is not foretold (with a tokenizer that puts BOS first, that is BOS).

    The interval is a bootstrap over texts.

    Raises:
        TypeError: one text instead of a list.
        ValueError: no text with two tokens or more.
    """
    sums = _Sums(texts)
    for batch in reader.text_batches(texts):
        log_probs = reader.log_probs(batch.inputs, batch.places)  # (places, vocab)
        index = torch.tensor(batch.following, device=log_probs.device)
        sums.add(batch.texts, log_probs.gather(1, index[:, None])[:, 0])
    return bootstrap(sums.rows(), lambda m: np.exp(-m[:, 0] / m[:, 1]), level=level, seed=seed)


def text_divergence(
    reader: Reader,
    before: nn.Module | Without,
    texts: Sequence[str],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Mean KL(before || now) of the next-token distributions over the texts' places, in nats.

    The mean is over all places, its interval a bootstrap over texts.

    Args:
        before: the model it came from, with the same tokenizer; or what switches the edits off, as
            PEFT's ``model.disable_adapter`` does, which needs no second model.

    Raises:
        TypeError: one text instead of a list.
        ValueError: no text with two tokens or more, or another vocabulary.
    """
    sums = _Sums(texts)
    for batch in reader.text_batches(texts):
        now = reader.log_probs(batch.inputs, batch.places)  # (places, vocab)
        then = _before(reader, before, batch).to(now.device)
        if then.shape != now.shape:
            raise ValueError(
                f"the models have {then.shape[1]} and {now.shape[1]} token ids; compare a model "
                "with the one it came from"
            )
        sums.add(batch.texts, metrics.divergence(then, now))
    return bootstrap(sums.rows(), lambda m: m[:, 0] / m[:, 1], level=level, seed=seed)


class _Sums:
    """Sums and counts by text, filled batch by batch."""

    def __init__(self, texts: Sequence[str]) -> None:
        if isinstance(texts, str):
            raise TypeError(f"texts={texts[:40]!r} is one text; pass a list of texts")
        self.sums = torch.zeros(len(texts), 2, dtype=torch.float64)

    def add(self, texts: Sequence[int], values: Tensor) -> None:
        """Add one value to the text of each."""
        column = values.cpu().double()
        rows = torch.stack([column, torch.ones_like(column)], 1)  # (places, 2)
        self.sums.index_add_(0, torch.tensor(texts), rows)

    def rows(self) -> list[list[float]]:
        """(sum, count) of each text that had a value."""
        return self.sums[self.sums[:, 1] > 0].tolist()


def _before(reader: Reader, before: nn.Module | Without, batch: TextBatch) -> Tensor:
    if isinstance(before, nn.Module):
        other = Reader(before, reader.tokenizer, reader.tokens_per_batch)
        inputs = {name: tensor.to(other.device) for name, tensor in batch.inputs.items()}
        return other.log_probs(inputs, batch.places)
    with before():
        return reader.log_probs(batch.inputs, batch.places)
