"""A record of a dataset: its request and all its prompts, a model's answers to them, its page.

In: a :class:`~alphaedit_peft.evaluation.Case`, a model without and with a pack. Out: answers, and
one self-contained HTML page in the manner of AlphaEdit's figures 12 and 13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from alphaedit_peft.evaluation import Case, Reader
from alphaedit_peft.evaluation.generate import greedy
from alphaedit_peft.report.charts import bar_chart, gauge
from alphaedit_peft.report.page import (
    Markup,
    Section,
    escaped,
    facts,
    page,
    paragraph,
    side_by_side,
    table,
)
from alphaedit_peft.tables import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REQUEST, PARAPHRASE, GENERATION = "request", "paraphrase", "generation"
# part of a record -> what its prompts are there for
PARTS = {
    REQUEST: "The sentence that is taught.",
    PARAPHRASE: "The same fact in other words: these should say the new target too.",
    "neighborhood": "The same relation of other subjects: these should stay as they were.",
    "same_subject": "Other facts of the subject: these should stay as they were.",
    "locality": "Questions about something else: these should stay as they were.",
    "portability": "What follows from the edit.",
    GENERATION: "Beginnings that the model goes on from freely.",
}


@dataclass(frozen=True)
class Prompt:
    """One prompt of a record."""

    part: str  # a key of PARTS
    text: str
    wanted: str | None = None  # what should follow it; None where anything may
    # the target it is compared with: the true one of what is taught, the new one where an answer
    # should stay
    rival: str | None = None


@dataclass(frozen=True)
class Answer:
    """A model's greedy continuation of a prompt, and what it holds of the prompt's two targets.

    Both are probabilities, the geometric mean over the target's tokens.
    """

    text: str
    wanted: float | None = None
    rival: float | None = None


Answers = Sequence[Answer]


def prompts_of(case: Case) -> tuple[Prompt, ...]:
    """Every prompt of a case, each once in its part, in the order of ``PARTS``."""
    edit = case.edit
    found = [Prompt(REQUEST, edit.question, edit.target_new, edit.target_true)]
    found += [Prompt(PARAPHRASE, t, edit.target_new, edit.target_true) for t in case.paraphrases]
    for part in ("neighborhood", "same_subject", "locality", "portability"):
        rival = edit.target_new if part == "neighborhood" else None
        found += [Prompt(part, q.prompt, q.answer, rival) for q in getattr(case, part)]
    found += [Prompt(GENERATION, text) for text in case.generation]
    return tuple(dict.fromkeys(found))


def ask(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    answer_tokens: int = 8,
    text_tokens: int = 24,
) -> tuple[Answer, ...]:
    """What a model says to each prompt, greedily, and how probable the two targets are.

    Args:
        model: a causal language model with ``generate``.
        answer_tokens: most tokens of an answer.
        text_tokens: most tokens after a beginning that is to be continued freely.

    Raises:
        ValueError: no tokens to write, or a prompt that the model cannot take.
    """
    for name, value in (("answer_tokens", answer_tokens), ("text_tokens", text_tokens)):
        if value < 1:
            raise ValueError(f"{name}={value} leaves nothing to write; use 1 or more")
    reader = Reader(model, tokenizer)
    said: dict[tuple[bool, str], str] = {}
    for free, length in ((True, text_tokens), (False, answer_tokens)):
        texts = [p.text for p in prompts if (p.part == GENERATION) == free]
        continuations = greedy(reader, texts, length)
        said |= {(free, t): c for t, c in zip(texts, continuations, strict=True)}
    pairs = [(p.text, t) for p in prompts for t in (p.wanted, p.rival) if t is not None]
    read = reader.read(pairs) if pairs else []
    found = {pair: one.mean_probability for pair, one in zip(pairs, read, strict=True)}
    return tuple(
        Answer(
            said[p.part == GENERATION, p.text],
            *(None if t is None else found[p.text, t] for t in (p.wanted, p.rival)),
        )
        for p in prompts
    )


def record_page(
    case: Case,
    before: Answers | None = None,
    after: Answers | None = None,
    *,
    title: str = "Record",
    lead: str = "",
) -> str:
    """One HTML page of a record.

    Args:
        before: what a model says to ``prompts_of(case)``, in that order.
        after: what it says with a pack; needs ``before``.
        lead: of what the answers are, below the title.

    Raises:
        ValueError: ``after`` without ``before``, or another number of answers than prompts.
    """
    prompts = prompts_of(case)
    if after is not None and before is None:
        raise ValueError("after=... needs before=...: answers of the model without the edit")
    for name, answers in (("before", before), ("after", after)):
        if answers is not None and len(answers) != len(prompts):
            raise ValueError(
                f"{name} holds {len(answers)} answers to {len(prompts)} prompts; ask them all"
            )
    edit, true = case.edit, case.edit.target_true
    request = [
        ("subject", edit.subject),
        ("prompt", edit.prompt),
        ("new target", edit.target_new.strip()),
        ("true target", true and true.strip()),
    ]
    told = [said for said in (before, after) if said is not None]
    heads = ("prompt", "should follow"), ("model before", "P before"), ("model after", "P after")
    sections = []
    for part, found in part_tables(
        prompts, told, heads, _marked, lambda said: (said.text.strip(), gauge(said.wanted))
    ):
        shown = paragraph(PARTS[part]) + table(*found)
        if part == REQUEST:
            shown = facts(request) + shown + _chart(prompts[0], told)
        sections.append(Section(heading(part), Markup(shown)))
    return page(title, sections, lead)


def part_tables(
    prompts: Sequence[Prompt],
    answers: Sequence[Answers],
    heads: Sequence[tuple[str, str]],
    asked: Callable[[Prompt], object],
    said: Callable[[Answer], tuple[object, object]],
) -> Iterator[tuple[str, Table]]:
    """Each part of a record that has prompts, with a table of them and what is said to them.

    Args:
        answers: before, and after, as far as they were asked for.
        heads: of prompts and what should follow, then of each answer and its probability; the
            second of each is left out where nothing should follow.
        asked: gives a prompt's cell; ``said`` an answer's two.
    """
    for part in PARTS:
        found = [row for row in zip(prompts, *answers, strict=True) if row[0].part == part]
        width = 2 if any(prompt.wanted is not None for prompt, *_ in found) else 1
        rows = [
            [v for pair in ((asked(p), p.wanted), *map(said, told)) for v in pair[:width]]
            for p, *told in found
        ]
        columns = [name for pair in heads[: len(answers) + 1] for name in pair[:width]]
        if rows:
            yield part, Table(columns, rows)


def heading(part: str) -> str:
    """A part's name as a heading."""
    return part.replace("_", " ").capitalize()


def _marked(prompt: Prompt) -> Markup:
    text = escaped(prompt.text)
    return Markup(f"<strong>{text}</strong>") if prompt.part == REQUEST else text


def _chart(request: Prompt, told: Sequence[Answers]) -> Markup:
    """Probabilities of the new and the true target after the request."""
    if not told:
        return Markup("")
    bars = []
    for name, (answer, *_) in zip(("before", "after"), told, strict=False):
        for target, value in ((request.wanted, answer.wanted), (request.rival, answer.rival)):
            if target is not None and value is not None:
                bars.append((f"{target.strip()}, {name}", round(100 * value, 1)))
    return side_by_side([bar_chart("Probability after the request, %", bars)])
