"""The judge: runs any causal language model over cases and scores it.

In: a model (edited by this package, by another, or not at all), its tokenizer, a suite of cases.
Out: :class:`Scores`. Cases go through in groups by their place in the suite, since the batches they
share decide the last bits of their scores; finished ones can be written to a file, from which a run
that was stopped goes on to the scores of one that was not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from alphaedit_peft.evaluation.cases import Case, Suite
from alphaedit_peft.evaluation.drift import text_perplexity
from alphaedit_peft.evaluation.generate import Sampling, greedy, sampled
from alphaedit_peft.evaluation.metrics import Written, fit_tfidf, metrics_of, pairs_of, tops_of
from alphaedit_peft.evaluation.results import JsonLines
from alphaedit_peft.evaluation.summary import CaseScores, Estimate, Scores, bootstrap, gather
from alphaedit_peft.log_probs import Reader
from alphaedit_peft.messages import shown
from alphaedit_peft.safe_files import refusing
from alphaedit_peft.saving import alone
from alphaedit_peft.settings import EditOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]

SAME = 0.02  # largest difference of a probability between two runs of one model


@dataclass(frozen=True)
class Judging:
    """How to judge.

    Prompts are to be read as the edits were made: ``Judging.of`` takes that from their settings.

    Attributes:
        tokens_per_batch: most tokens in a batch, padding included.
        cases_at_once: cases whose prompts are sorted into batches together, and then written.
        separator: between a prompt and its continuation.
        chat_template: put prompts through the tokenizer's chat template.
        answer_tokens: how far the model may write after a prompt, for exact match.
        text_tokens: length of the texts for fluency, prompt included.
        top_k: among how many tokens these texts are sampled.
        seed: of the samples and of the intervals.
        level: of the confidence intervals.

    Raises:
        ValueError: a number out of range.
    """

    tokens_per_batch: int = 4096
    cases_at_once: int = 64
    separator: str = " "
    chat_template: bool = False
    answer_tokens: int = 16
    text_tokens: int = 100
    top_k: int = 5
    seed: int = 0
    level: float = 0.95

    def __post_init__(self) -> None:
        for name in ("tokens_per_batch", "cases_at_once", "answer_tokens", "text_tokens", "top_k"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value} is too small; use 1 or more")
        if not 0 < self.level < 1:
            raise ValueError(f"level={self.level} is no share of draws; use 0 < level < 1")

    @classmethod
    def of(cls, settings: EditOptions) -> Judging:
        """Prompts as ``settings`` (a config's or a pack's) say, all else by default."""
        return cls(separator=settings.separator, chat_template=settings.chat_template)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; without a chat template those of before there was a choice."""
        return {k: v for k, v in asdict(self).items() if k != "chat_template" or v}


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    cases: Suite | Sequence[Case],
    *,
    baseline: Scores | Iterable[CaseScores] | None = None,
    generate: bool = False,
    results: str | Path | None = None,
    progress: Progress | None = None,
    how: Judging | None = None,
) -> Scores:
    """Judge a causal language model.

    Args:
        model: from transformers, from PEFT, or any module that gives ``logits``; it is judged in
            evaluation mode and put back into the mode it was in.
        cases: what to ask (``read_cases``); in a :class:`Suite`, with facts and texts around them.
        baseline: what this function gave for the unedited model on the same cases; adds how many
            answers are unchanged.
        generate: also let the model write: exact match, and fluency and consistency where a case
            has generation prompts and references. Much slower.
        results: a JSON Lines file: cases in it keep their scores, those judged now are added.
            It belongs to one model, which is checked on one case, and to one way of judging.
        progress: called with the number of cases done and of all, after each group.

    Raises:
        ValueError: no case, two equal ones, a baseline that lacks a case, a results file of
            another run or model, or a prompt the model cannot take.
        TypeError: something else than a model, cases or a baseline.
        BlockingIOError: another process writes the results file.
        OSError: it cannot be written; finished lines stay.
        ImportError: references, but no scikit-learn for consistency.
    """
    how = how or Judging()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={shown(model)} is a {type(model).__name__}; load it first")
    suite = cases if isinstance(cases, Suite) else Suite(cases)
    told = dict.fromkeys(text for case in suite.cases for text in case.references)
    references = list(told) if generate else []  # the documents of TF-IDF
    group = _Group(
        Reader(model, tokenizer, how.tokens_per_batch, how.separator, how.chat_template),
        how,
        generate,
        _baseline(baseline, suite.cases),
        fit_tfidf(references) if references else None,
    )
    way = _way(how, generate, baseline is not None, references)
    file = JsonLines(Path(results), "judging", way) if results else None
    with alone(file.path) if file else nullcontext():
        done = _judged(group, suite, file, progress)
    judged = [done[case.digest] for case in suite.cases]
    scores = gather(judged, how.level, how.seed, {**how.to_json(), "generate": generate})
    return replace(scores, metrics={**scores.metrics, **_around(group.reader, suite, how)})


def _judged(
    group: _Group, suite: Suite, file: JsonLines | None, progress: Progress | None
) -> dict[str, CaseScores]:
    """Scores of all cases by digest: those in the file, and the others, which are added to it."""
    done = _finished(file) if file else {}
    asked = [p for case in suite.cases if case.digest not in done for p in pairs_of(case)]
    for pair in dict.fromkeys([*asked, *((q.prompt, q.answer) for q in suite.unedited)]):
        group.reader.encode(*pair)  # what cannot be read is told before anything is run
    there = [case for case in suite.cases if case.digest in done]
    if file and there:
        _require_same_model(group, there[0], done[there[0].digest], file.path)
    count = len(there)
    for found in group.missing(suite.cases, done):
        done |= {case.digest: case for case in found}
        count += len(found)
        if file:
            file.add(case.to_json() for case in found)
        if progress:
            progress(count, len(suite.cases))
    return done


@dataclass(frozen=True)
class _Group:
    """Judges some cases at once."""

    reader: Reader
    how: Judging
    generate: bool
    earlier: dict[str, CaseScores]
    vectorizer: Any

    def missing(
        self, cases: Sequence[Case], done: Mapping[str, CaseScores]
    ) -> Iterator[list[CaseScores]]:
        """Scores of the cases that are not done, by groups of all cases in their order.

        A group is judged whole, for the batches of a run that was not stopped in it.
        """
        for start in range(0, len(cases), self.how.cases_at_once):
            some = cases[start : start + self.how.cases_at_once]
            wanted = {case.digest for case in some if case.digest not in done}
            if wanted:
                yield [scores for scores in self.judge(some) if scores.digest in wanted]

    def judge(self, cases: Sequence[Case]) -> list[CaseScores]:
        pairs = list(dict.fromkeys(pair for case in cases for pair in pairs_of(case)))
        readings = dict(zip(pairs, self.reader.read(pairs), strict=True))
        wrote = self._write(cases) if self.generate else [None] * len(cases)
        scores = []
        for case, written in zip(cases, wrote, strict=True):
            before = self.earlier.get(case.digest)
            unedited = before.tops if before else None
            found = metrics_of(case, readings, written, unedited, self.vectorizer)
            tops = tops_of(case, readings)
            texts = written.by_kind() if written else {}
            scores.append(CaseScores(case.id, case.digest, found, tops, texts))
        return scores

    def _write(self, cases: Sequence[Case]) -> list[Written]:
        """What the model writes for each case: greedy after its prompts, sampled texts."""
        prompts = [p for case in cases for p in (case.edit.question, *case.paraphrases)]
        said = greedy(self.reader, prompts, self.how.answer_tokens)
        answers = dict(zip(prompts, said, strict=True))
        named = [(f"{c.digest} {i}", p) for c in cases for i, p in enumerate(c.generation)]
        sampling = Sampling(self.how.top_k, self.how.seed)
        texts = iter(sampled(self.reader, named, self.how.text_tokens, sampling))
        return [
            Written(
                answers[case.edit.question],
                tuple(answers[prompt] for prompt in case.paraphrases),
                tuple(next(texts) for _ in case.generation),
            )
            for case in cases
        ]


def _around(reader: Reader, suite: Suite, how: Judging) -> dict[str, Estimate]:
    """What is measured beside the cases."""
    found = {}
    if suite.unedited:
        readings = reader.read([(question.prompt, question.answer) for question in suite.unedited])
        hits = [float(reading.recalled) for reading in readings]
        found["unedited_recall"] = bootstrap(hits, level=how.level, seed=how.seed)
    if suite.texts:
        found["perplexity"] = text_perplexity(reader, suite.texts, level=how.level, seed=how.seed)
    return found


def _baseline(
    baseline: Scores | Iterable[CaseScores] | None, asked: Sequence[Case]
) -> dict[str, CaseScores]:
    if baseline is None:
        return {}
    entries = list(baseline.cases if isinstance(baseline, Scores) else baseline)
    wrong = [entry for entry in entries if not isinstance(entry, CaseScores)]
    if wrong:
        raise TypeError(f"baseline holds {shown(wrong[0])}; pass what evaluate gave")
    found = {entry.digest: entry for entry in entries}
    missing = [case.id for case in asked if case.digest not in found]
    if missing:
        raise ValueError(
            f"the baseline lacks {len(missing)} of {len(asked)} cases, edit "
            f"{shown(missing[0], 80)} first; judge the unedited model on the same cases"
        )
    return found


def _way(how: Judging, generate: bool, baseline: bool, references: list[str]) -> dict[str, Any]:
    """What a case's scores depend on, beside the case and the model."""
    way = {k: v for k, v in how.to_json().items() if k not in ("level", "cases_at_once")}
    way |= {"generate": generate, "baseline": baseline}
    if generate:
        way["references"] = hashlib.sha256("\n".join(references).encode()).hexdigest()[:16]
    return way


def _finished(file: JsonLines) -> dict[str, CaseScores]:
    """Scores in a results file, by case digest."""
    entries = file.read()
    with refusing(file.path):
        cases = [CaseScores.from_json(entry) for entry in entries]
    return {case.digest: case for case in cases}


def _require_same_model(group: _Group, case: Case, before: CaseScores, file: Path) -> None:
    """Judge one finished case again, without free text, and compare."""
    again = replace(group, generate=False).judge([case])[0].metrics
    for name in (name for name in again if name.endswith("_probability")):
        there = before.metrics.get(name)
        if there is None or not math.isclose(again[name], there, abs_tol=SAME):
            raise ValueError(
                f"{file} was judged on another model: {name} of edit {shown(case.id, 80)} is "
                f"{again[name]:.3f} now and {there} there; name another file"
            )
