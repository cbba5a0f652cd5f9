"""Metrics of freely generated texts: fluency, consistency, exact match.

In: texts. Out: numbers. Fluency and consistency are ROME's (arXiv 2202.05262, section 3.3), which
MEMIT and AlphaEdit report multiplied by 100.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from alphaedit_peft.evaluation.metrics import mean

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
