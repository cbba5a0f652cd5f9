"""The metrics, as pure functions of log-probabilities; the formula stands at each.

In: :class:`Reading`, what a model said about one continuation of one prompt, or lists of them.
Out: numbers. Names are those of the papers (ROME, arXiv 2202.05262, section 3.3; MEMIT,
arXiv 2210.07229; AlphaEdit, arXiv 2410.02355, appendix B). A continuation o of m tokens is taken by
its mean log-probability, as the published evaluation code does:

    log p(o | x) = (1/m) sum_t log P(o_t | x, o_<t)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """What a model said about a continuation, token by token, with the true tokens before each.

    Attributes:
        target: the continuation's token ids, at least one.
        log_probs: log P of each, natural logarithm.
        top: the most probable id in the place of each.

    Raises:
        ValueError: fields of unequal length, or empty.
    """

    target: tuple[int, ...]
    log_probs: tuple[float, ...]
    top: tuple[int, ...]

    def __post_init__(self) -> None:
        lengths = (len(self.target), len(self.log_probs), len(self.top))
        if len(set(lengths)) != 1 or not lengths[0]:
            raise ValueError(
                f"target, log_probs and top have lengths {lengths}; give each token all"
            )

    @property
    def mean_log_prob(self) -> float:
        """(1/m) sum_t log P(o_t | x, o_<t)."""
        return sum(self.log_probs) / len(self.log_probs)

    @property
    def mean_probability(self) -> float:
        """Exp of the mean log-probability: the geometric mean over the tokens."""
        return math.exp(self.mean_log_prob)

    @property
    def recalled(self) -> bool:
        """Whether greedy decoding says the whole continuation: o_t = argmax for all t.

        If every argmax is right given the right tokens before it, greedy decoding goes that way.
        """
        return self.top == self.target

    @property
    def token_accuracy(self) -> float:
        """(1/m) sum_t [o_t = argmax], each given the right tokens before it (zsRE's accuracy)."""
        return agreement(self.top, self.target)


def agreement(ids: Sequence[int], others: Sequence[int]) -> float:
    """Share of places in which two equally long lists of ids agree.

    Raises:
        ValueError: unequal lengths, or none.
    """
    if len(ids) != len(others) or not ids:
        raise ValueError(
            f"{len(ids)} and {len(others)} ids cannot be compared; give as many of each"
        )
    return mean([float(a == b) for a, b in zip(ids, others, strict=True)])


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("values=[] have no mean; give at least one")
    return math.fsum(values) / len(values)


def preference(wanted: Sequence[Reading], other: Sequence[Reading]) -> float:
    """Share of prompts at which one continuation is more probable than the other; a tie is not.

    (1/n) sum_i [ log p(wanted_i | x_i) > log p(other_i | x_i) ]. With wanted the new and other
    the true target this is efficacy on the edit's prompt ("ES"), generalization on paraphrases
    ("PS"); with wanted the true and other the new target, specificity on neighbours ("NS").
    """
    pairs = zip(wanted, other, strict=True)
    return mean([float(a.mean_log_prob > b.mean_log_prob) for a, b in pairs])


def magnitude(wanted: Sequence[Reading], other: Sequence[Reading]) -> float:
    """Mean difference of the two probabilities, in -1..1 ("EM", "PM", "NM").

    (1/n) sum_i ( p(wanted_i | x_i) - p(other_i | x_i) ), p the exp of the mean log-probability.
    """
    pairs = zip(wanted, other, strict=True)
    return mean([a.mean_probability - b.mean_probability for a, b in pairs])


def recall(readings: Sequence[Reading]) -> float:
    """Share of prompts that greedy decoding continues by the whole answer ("accuracy")."""
    return mean([float(reading.recalled) for reading in readings])


def token_accuracy(readings: Sequence[Reading]) -> float:
    """Share of answer tokens that are the argmax, meaned by prompt, then over prompts."""
    return mean([reading.token_accuracy for reading in readings])


def unchanged(tops: Sequence[Sequence[int]], before: Sequence[Sequence[int]]) -> float:
    """Share of answer tokens whose argmax is the unedited model's, meaned by prompt, then over all.

    Args:
        tops: argmax ids at the answer's places, one list a prompt.
        before: those of the unedited model for the same prompts.
    """
    return mean([agreement(a, b) for a, b in zip(tops, before, strict=True)])


def score(efficacy: float, generalization: float, specificity: float) -> float:
    """Harmonic mean of the three, 0 where one is 0 (ROME's S)."""
    three = (efficacy, generalization, specificity)
    return 0.0 if min(three) <= 0 else len(three) / sum(1 / value for value in three)


def perplexity(log_probs: Sequence[float]) -> float:
    """exp( -(1/n) sum_t log P(x_t | x_<t) ), over all tokens of all texts."""
    return math.exp(-mean(log_probs))


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) = sum_v P_before(v) (log P_before(v) - log P_after(v)), in nats.

    Args:
        before: log-probabilities, (..., vocab).
        after: of the same shape.

    Returns:
        One value a distribution, (...).
    """
    difference = before - after
    # a token that is impossible before adds nothing, whatever it is after
    parts = torch.where(before.isneginf(), torch.zeros_like(before), before.exp() * difference)
    return parts.sum(-1)
