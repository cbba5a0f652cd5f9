"""The metrics of one case, from what the model said and wrote.

In: a case, the readings of its prompts, the texts the model wrote, and the same case's scores on
the unedited model. Out: :class:`CaseScores`. A metric whose prompts the case lacks is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alphaedit_peft.evaluation import metrics, text_metrics
from alphaedit_peft.evaluation.cases import Case, Question
from alphaedit_peft.evaluation.metrics import Reading
from alphaedit_peft.evaluation.scores import CaseScores

Pair = tuple[str, str]

# kinds of questions whose answers are looked at token by token, and compared with the base's
KINDS = ("neighborhood", "locality", "same_subject", "portability")
COMPARED = ("neighborhood", "locality", "same_subject")


@dataclass(frozen=True)
class Written:
    """What a model wrote for one case: after the edit's prompt and paraphrases, and texts."""

    answer: str
    paraphrases: tuple[str, ...]
    texts: tuple[str, ...]


def pairs_of(case: Case) -> list[Pair]:
    """Every (prompt, continuation) that the case's metrics need."""
    edit = case.edit
    targets = [edit.target_new] + ([edit.target_true] if edit.target_true else [])
    found = [(p, t) for p in (edit.question, *case.paraphrases) for t in targets]
    found += [(question.prompt, edit.target_new) for question in case.neighborhood]
    for kind in KINDS:
        found += [(q.prompt, answer) for q in getattr(case, kind) for answer in q.answers]
    return list(dict.fromkeys(found))


def judge(
    case: Case,
    readings: Mapping[Pair, Reading],
    written: Written | None = None,
    before: CaseScores | None = None,
    vectorizer: Any = None,
) -> CaseScores:
    """All metrics of a case.

    Args:
        case: what was asked.
        readings: by (prompt, continuation), at least those of ``pairs_of``.
        written: what the model wrote; None leaves out what is about free text.
        before: the case's scores on the unedited model; None leaves out ``..._unchanged``.
        vectorizer: from ``text_metrics.fit_tfidf``; None leaves out consistency.

    Raises:
        ValueError: ``before`` is of another case.
    """
    found: dict[str, float] = {}
    for name, prompts in (
        ("efficacy", (case.edit.question,)),
        ("generalization", case.paraphrases),
    ):
        found |= _told(name, prompts, case, readings)
    if case.neighborhood:
        true = [readings[q.prompt, q.answer] for q in case.neighborhood]
        new = [readings[q.prompt, case.edit.target_new] for q in case.neighborhood]
        found["specificity"] = metrics.preference(true, new)
        found["specificity_magnitude"] = metrics.magnitude(true, new)
        found["specificity_recall"] = metrics.recall(true)
    tops: dict[str, list[list[int]]] = {}
    for kind in KINDS:
        questions = getattr(case, kind)
        if not questions:
            continue
        tops[kind] = [list(readings[q.prompt, q.answer].top) for q in questions]
        if kind != "neighborhood":
            found |= _answered(kind, questions, readings)
        if before is not None and kind in COMPARED:
            found[f"{kind}_unchanged"] = metrics.unchanged(tops[kind], _tops(before, case, kind))
    if written is None:
        return CaseScores(case.id, case.digest, found, tops)
    found |= _of_texts(case, written, vectorizer)
    texts = {"answer": [written.answer], "paraphrases": list(written.paraphrases)}
    texts |= {"generation": list(written.texts)}
    return CaseScores(case.id, case.digest, found, tops, texts)


def _told(
    name: str, prompts: Sequence[str], case: Case, readings: Mapping[Pair, Reading]
) -> dict[str, float]:
    """Metrics of prompts that should show the new target."""
    if not prompts:
        return {}
    new = [readings[prompt, case.edit.target_new] for prompt in prompts]
    found = {
        f"{name}_recall": metrics.recall(new),
        f"{name}_tokens": metrics.token_accuracy(new),
        f"{name}_probability": metrics.mean([reading.mean_probability for reading in new]),
    }
    if case.edit.target_true:
        true = [readings[prompt, case.edit.target_true] for prompt in prompts]
        found[name] = metrics.preference(new, true)
        found[f"{name}_magnitude"] = metrics.magnitude(new, true)
    return found


def _answered(
    kind: str, questions: Sequence[Question], readings: Mapping[Pair, Reading]
) -> dict[str, float]:
    """How well questions are answered; of an answer's spellings the best one counts."""
    spelt = [[readings[q.prompt, answer] for answer in q.answers] for q in questions]
    hits = [float(any(reading.recalled for reading in ways)) for ways in spelt]
    best = [max(reading.token_accuracy for reading in ways) for ways in spelt]
    return {f"{kind}_recall": metrics.mean(hits), f"{kind}_tokens": metrics.mean(best)}


def _of_texts(case: Case, written: Written, vectorizer: Any) -> dict[str, float]:
    wanted = (case.edit.target_new,)
    found = {"exact_match": float(text_metrics.says(written.answer, wanted))}
    if written.paraphrases:
        said = [float(text_metrics.says(text, wanted)) for text in written.paraphrases]
        found["exact_match_paraphrases"] = metrics.mean(said)
    if written.texts:
        found["fluency"] = text_metrics.fluency(written.texts)
        if case.references and vectorizer is not None:
            found["consistency"] = text_metrics.consistency(
                written.texts, case.references, vectorizer
            )
    return found


def _tops(before: CaseScores, case: Case, kind: str) -> Sequence[Sequence[int]]:
    if before.digest != case.digest:
        raise ValueError(
            f"baseline of edit {before.id!r} was judged on another case than {case.digest}; judge "
            "the unedited model on the same cases"
        )
    return before.tops[kind]
