"""The metrics of a case, and their formulas as pure functions.

A new one is a name in ``METRICS``, a line of ``metrics_of`` and its formula. In: what a model said
about continuations (:class:`~alphaedit_peft.log_probs.Reading`), and wrote. Out: numbers. Names are
those of the papers (ROME, arXiv 2202.05262, section 3.3; MEMIT, arXiv 2210.07229; AlphaEdit, arXiv
2410.02355, appendix B). A continuation o of m tokens is taken by its mean log-probability, as the
published evaluation code does:

    log p(o | x) = (1/m) sum_t log P(o_t | x, o_<t)
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alphaedit_peft.evaluation.cases import Case

if TYPE_CHECKING:
    from alphaedit_peft.log_probs import Reading


PERCENT, NUMBER = "percent", "number"
# how each metric is shown, in the order of the table
METRICS = {
    name: shown
    for shown, names in (
        (PERCENT, "efficacy generalization specificity score"),
        (NUMBER, "efficacy_probability generalization_probability"),
        (NUMBER, "efficacy_magnitude generalization_magnitude specificity_magnitude"),
        (PERCENT, "efficacy_recall generalization_recall specificity_recall"),
        (PERCENT, "efficacy_tokens generalization_tokens"),
        (PERCENT, "locality_tokens locality_recall locality_unchanged neighborhood_unchanged"),
        (PERCENT, "same_subject_recall same_subject_tokens same_subject_unchanged"),
        (PERCENT, "portability_recall portability_tokens exact_match exact_match_paraphrases"),
        (NUMBER, "fluency consistency"),
        (PERCENT, "unedited_recall"),
        (NUMBER, "perplexity"),
    )
    for name in names.split()
}

# kinds of questions whose answers are looked at token by token, and compared with the base's
KINDS = ("neighborhood", "locality", "same_subject", "portability")
COMPARED = ("neighborhood", "locality", "same_subject")

Pair = tuple[str, str]
Tops = Mapping[str, Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Written:
    """What a model wrote for one case: after the edit's prompt and paraphrases, and texts."""

    answer: str
    paraphrases: tuple[str, ...]
    texts: tuple[str, ...]

    def by_kind(self) -> dict[str, list[str]]:
        """Kind of prompt -> what was written, as :class:`CaseScores` keeps it."""
        paraphrases, texts = list(self.paraphrases), list(self.texts)
        return {"answer": [self.answer], "paraphrases": paraphrases, "generation": texts}


def pairs_of(case: Case) -> list[Pair]:
    """Every (prompt, continuation) that the case's metrics need."""
    edit = case.edit
    targets = [target for target in (edit.target_new, edit.target_true) if target]
    found = [(p, t) for p in (edit.question, *case.paraphrases) for t in targets]
    found += [(question.prompt, edit.target_new) for question in case.neighborhood]
    for kind in KINDS:
        found += [(q.prompt, answer) for q in getattr(case, kind) for answer in q.answers]
    return list(dict.fromkeys(found))


def tops_of(case: Case, readings: Mapping[Pair, Reading]) -> dict[str, list[list[int]]]:
    """Kind of question -> the argmax ids at the places of each answer."""
    return {
        kind: [list(readings[q.prompt, q.answer].top) for q in getattr(case, kind)]
        for kind in KINDS
        if getattr(case, kind)
    }


def metrics_of(
    case: Case,
    readings: Mapping[Pair, Reading],
    written: Written | None = None,
    before: Tops | None = None,
    vectorizer: Any = None,
) -> dict[str, float]:
    """All metrics of a case, by their names in ``METRICS``; what it does not ask for is missing.

    Args:
        readings: by (prompt, continuation), at least those of ``pairs_of``.
        written: what the model wrote; None leaves out what is about free text.
        before: ``tops_of`` the unedited model; None leaves out ``..._unchanged``.
        vectorizer: from ``fit_tfidf``; None leaves out consistency.
    """
    found = _told("efficacy", (case.edit.question,), case, readings)
    found |= _told("generalization", case.paraphrases, case, readings)
    if case.neighborhood:
        true = [readings[q.prompt, q.answer] for q in case.neighborhood]
        new = [readings[q.prompt, case.edit.target_new] for q in case.neighborhood]
        found["specificity"] = preference(true, new)
        found["specificity_magnitude"] = magnitude(true, new)
        found["specificity_recall"] = recall(true)
    for kind, tops in tops_of(case, readings).items():
        if kind != "neighborhood":
            # of an answer's spellings the best one counts
            asked = getattr(case, kind)
            spelt = [[readings[q.prompt, answer] for answer in q.answers] for q in asked]
            hits = [float(any(reading.recalled for reading in ways)) for ways in spelt]
            best = [max(reading.token_accuracy for reading in ways) for ways in spelt]
            found |= {f"{kind}_recall": mean(hits), f"{kind}_tokens": mean(best)}
        if before is not None and kind in COMPARED:
            found[f"{kind}_unchanged"] = unchanged(tops, before[kind])
    if written is not None:
        wanted = (case.edit.target_new,)
        found["exact_match"] = float(says(written.answer, wanted))
        if written.paraphrases:
            said = [float(says(text, wanted)) for text in written.paraphrases]
            found["exact_match_paraphrases"] = mean(said)
        if written.texts:
            found["fluency"] = fluency(written.texts)
        if written.texts and case.references and vectorizer is not None:
            found["consistency"] = consistency(written.texts, case.references, vectorizer)
    return found


def _told(
    name: str, prompts: Sequence[str], case: Case, readings: Mapping[Pair, Reading]
) -> dict[str, float]:
    """Metrics of prompts that should show the new target."""
    if not prompts:
        return {}
    new = [readings[prompt, case.edit.target_new] for prompt in prompts]
    found = {
        f"{name}_recall": recall(new),
        f"{name}_tokens": token_accuracy(new),
        f"{name}_probability": mean([reading.mean_probability for reading in new]),
    }
    if case.edit.target_true:
        true = [readings[prompt, case.edit.target_true] for prompt in prompts]
        found[name] = preference(new, true)
        found[f"{name}_magnitude"] = magnitude(new, true)
    return found


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
    """The arithmetic mean; raises ValueError where there is no value."""
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

    Both hold the argmax ids at the answer's places, one list a prompt, for the same prompts.
    """
    return mean([agreement(a, b) for a, b in zip(tops, before, strict=True)])


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) = sum_v P_before(v) (log P_before(v) - log P_after(v)), in nats.

    Takes log-probabilities, (..., vocab) both, and gives one value a distribution, (...).
    """
    # a token that is impossible before adds nothing, whatever it is after
    parts = torch.where(before.isneginf(), 0.0, before.exp() * (before - after))
    return parts.sum(-1)


WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # n-gram length -> weight, as in ROME's code

_WORDS = re.compile(r"\w+|[^\w\s]")


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
    shares = ([w * entropy(text, n, words) for n, w in WEIGHTS.items()] for text in texts)
    return mean([mean(share) for share in shares])


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

    It is 0 where one side has no word that the vectorizer (from ``fit_tfidf``) knows. References
    are texts about things of which the new target is true.
    """
    rows = vectorizer.transform([" ".join(generated), " ".join(references)])  # (2, terms), norm 1
    return float((rows[0] @ rows[1].T).sum())


def says(text: str, answers: Iterable[str]) -> bool:
    """Whether a generated continuation begins with one of the answers, as whole words.

    Spaces at the border and letters' case do not matter; "Parisian" does not say "Paris".
    """
    start = text.strip().casefold()
    wanted = (re.escape(answer.strip().casefold()) for answer in answers)
    # after an answer that ends in a word, no letter may follow
    return any(re.match(rf"{w}(?!(?<=\w)\w)", start) for w in wanted if w)
