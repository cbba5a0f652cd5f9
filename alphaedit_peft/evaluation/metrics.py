"""The metrics, as pure functions; the formula stands at each.

In: what a model said about a continuation of a prompt (:class:`~alphaedit_peft.scoring.Reading`),
generated texts, values by case. Out: numbers, and their confidence intervals by the bootstrap over
cases (Efron 1979). Names are those of the papers (ROME, arXiv 2202.05262, section 3.3; MEMIT, arXiv
2210.07229; AlphaEdit, arXiv 2410.02355, appendix B). A continuation o of m tokens is taken by its
mean log-probability, as the published evaluation code does:

    log p(o | x) = (1/m) sum_t log P(o_t | x, o_<t)
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from alphaedit_peft.scoring import Reading


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


WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # n-gram length -> weight, as in ROME's code

_WORDS = re.compile(r"\w+|[^\w\s]")
_WORD = re.compile(r"\w")


def split_words(text: str) -> list[str]:
    """Words and single punctuation marks; ROME splits by NLTK, which cuts English contractions."""
    return _WORDS.findall(text)


def entropy(text: str, n: int, words: Callable[[str], list[str]] = split_words) -> float:
    """Entropy of a text's n-grams in bits: -sum_g f(g) log2 f(g), f their relative frequencies.

    A text of fewer than n words has none, and its entropy is 0.
    """
    tokens = words(text)
    counts = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) if counts else 0.0


def fluency(texts: Sequence[str], words: Callable[[str], list[str]] = split_words) -> float:
    """Weighted mean of bigram and trigram entropy, in bits, meaned over texts ("GE").

    (1/2) (2/3 H_2 + 4/3 H_3) = 1/3 H_2 + 2/3 H_3. Low where a model repeats itself; higher for
    longer texts, so compare texts of equal length.

    Args:
        texts: prompt and continuation each, as ROME has it.
        words: splits a text; ``nltk.word_tokenize`` gives ROME's numbers.

    Raises:
        ValueError: no text.
    """
    shares = [
        mean([weight * entropy(text, n, words) for n, weight in WEIGHTS.items()]) for text in texts
    ]
    return mean(shares)


def fit_tfidf(texts: Iterable[str]) -> Any:
    """A TF-IDF vectorizer whose document frequencies are those of the texts.

    ROME's was fitted on Wikipedia snippets; its numbers need its ``idf.npy`` and vocabulary.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: no text, or none with a word in it.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ImportError(
            "consistency needs scikit-learn: `pip install alphaedit_peft[evaluation]`, or judge "
            "cases without references"
        ) from error
    return TfidfVectorizer().fit(list(texts))


def consistency(generated: Sequence[str], references: Sequence[str], vectorizer: Any) -> float:
    """Cosine of the TF-IDF vectors of all generated and of all reference texts ("RS"), in 0..1.

    Args:
        generated: texts that begin with a prompt about the subject.
        references: texts about things of which the new target is true.
        vectorizer: from ``fit_tfidf``.

    Returns:
        The cosine; 0 where one side has no word that the vectorizer knows.
    """
    rows = vectorizer.transform([" ".join(generated), " ".join(references)])  # (2, terms), norm 1
    return float((rows[0] @ rows[1].T).sum())


def says(text: str, answers: Iterable[str]) -> bool:
    """Whether a generated continuation begins with one of the answers, as whole words.

    Spaces at the border and letters' case do not matter; "Parisian" does not say "Paris".
    """
    start = text.strip().casefold()
    wanted = (answer.strip().casefold() for answer in answers)
    return any(start.startswith(w) and not _goes_on(w, start[len(w) :]) for w in wanted if w)


def _goes_on(answer: str, rest: str) -> bool:
    return bool(_WORD.match(answer[-1]) and _WORD.match(rest))


RESAMPLES = 1000
AT_ONCE = 4_000_000  # drawn indices held at a time

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A statistic over ``n`` cases, with the bounds of its confidence interval."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float]:
        """The four numbers under their names."""
        return asdict(self)


def bootstrap(
    values: Sequence[float] | Sequence[Sequence[float]],
    statistic: Callable[[Values], Values] | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """A statistic of the cases and its percentile interval; the same seed gives the same bounds.

    Args:
        values: (n,), one number a case, or (n, k), one row a case.
        statistic: takes means over the cases, (draws, k), to (draws,); the mean itself where not
            given.
        level: share of draws within the interval, in 0..1.
        resamples: how many draws.
        seed: of the draws.

    Raises:
        ValueError: no values, values that are not finite, or a level or number out of range.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.size == 0 or not np.isfinite(table).all():
        raise ValueError(f"{table.size} values, finite or not, give no interval; pass finite ones")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level={level}, resamples={resamples}: use 0 < level < 1, resamples >= 1")
    table = table.reshape(len(table), -1)  # (n, k)
    of_means = statistic or (lambda means: means[:, 0])
    n = len(table)
    random = np.random.default_rng(seed)
    draws, step = [], max(1, AT_ONCE // n)
    for start in range(0, resamples, step):
        drawn = random.integers(0, n, (min(step, resamples - start), n))
        draws.append(of_means(table[drawn].mean(1)))
    low, high = np.quantile(np.concatenate(draws), [(1 - level) / 2, (1 + level) / 2])
    value = of_means(table.mean(0, keepdims=True))[0]
    return Estimate(float(value), float(low), float(high), n)
