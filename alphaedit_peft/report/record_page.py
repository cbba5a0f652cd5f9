"""The page of a record: its request and all its prompts, with a model's answers before and after.

In: a :class:`~alphaedit_peft.evaluation.Case`, and answers from ``record.ask``. Out: one
self-contained HTML page in the manner of AlphaEdit's figures 12 and 13.
"""

from __future__ import annotations

from collections.abc import Sequence

from alphaedit_peft.evaluation import Case
from alphaedit_peft.report.html import (
    Markup,
    Section,
    escaped,
    facts,
    page,
    paragraph,
    side_by_side,
    table,
)
from alphaedit_peft.report.record import PARTS, REQUEST, Answer, Prompt, prompts_of
from alphaedit_peft.report.svg import bar_chart, gauge

Answers = Sequence[Answer]


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
        case: the record.
        before: what a model says to ``prompts_of(case)``, in that order.
        after: what it says with a pack; needs ``before``.
        title: plain text.
        lead: of what the answers are, below the title.

    Raises:
        ValueError: ``after`` without ``before``, or another number of answers than prompts.
    """
    prompts = prompts_of(case)
    require_answers(prompts, before, after)
    sections = []
    for part, meaning in PARTS.items():
        where = [i for i, prompt in enumerate(prompts) if prompt.part == part]
        if where:
            shown = paragraph(meaning) + _table(prompts, where, before, after)
            if part == REQUEST:
                shown = _request(case) + shown + _chart(prompts, before, after)
            sections.append(Section(heading(part), Markup(shown)))
    return page(title, sections, lead)


def heading(part: str) -> str:
    """A part's name as a heading."""
    return part.replace("_", " ").capitalize()


def require_answers(
    prompts: Sequence[Prompt], before: Answers | None, after: Answers | None
) -> None:
    """Refuse answers that do not belong to the prompts.

    Raises:
        ValueError: ``after`` without ``before``, or another number of answers than prompts.
    """
    if after is not None and before is None:
        raise ValueError("after=... needs before=...: answers of the model without the edit")
    for name, answers in (("before", before), ("after", after)):
        if answers is not None and len(answers) != len(prompts):
            raise ValueError(
                f"{name} holds {len(answers)} answers to {len(prompts)} prompts; ask them all"
            )


def _request(case: Case) -> Markup:
    edit = case.edit
    pairs = [
        ("subject", edit.subject),
        ("prompt", edit.prompt),
        ("new target", edit.target_new.strip()),
        ("true target", None if edit.target_true is None else edit.target_true.strip()),
    ]
    return facts(pairs)


def _table(
    prompts: Sequence[Prompt], where: Sequence[int], before: Answers | None, after: Answers | None
) -> Markup:
    told = [(name, answers) for name, answers in (("before", before), ("after", after)) if answers]
    wanted = any(prompts[i].wanted is not None for i in where)
    columns = ["prompt", *(["should follow"] if wanted else [])]
    for name, _ in told:
        columns += [f"model {name}", *([f"P {name}"] if wanted else [])]
    rows: list[list[object]] = []
    for i in where:
        row: list[object] = [_marked(prompts[i]), *([prompts[i].wanted] if wanted else [])]
        for _, answers in told:
            row += [answers[i].text.strip(), *([gauge(answers[i].wanted)] if wanted else [])]
        rows.append(row)
    return table(columns, rows)


def _marked(prompt: Prompt) -> Markup:
    text = escaped(prompt.text)
    return Markup(f"<strong>{text}</strong>") if prompt.part == REQUEST else text


def _chart(prompts: Sequence[Prompt], before: Answers | None, after: Answers | None) -> Markup:
    """Probabilities of the new and the true target after the request."""
    if before is None:
        return Markup("")
    bars = []
    for name, answers in (("before", before), ("after", after)):
        if answers is None:
            continue
        for target, value in (
            (prompts[0].wanted, answers[0].wanted),
            (prompts[0].rival, answers[0].rival),
        ):
            if target is not None and value is not None:
                bars.append((f"{target.strip()}, {name}", round(100 * value, 1)))
    return side_by_side([bar_chart("Probability after the request, %", bars)])
