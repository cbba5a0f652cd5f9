"""``alphaedit report``: what evaluations found, as a table, a page, or Markdown.

In: files and folders of ``evaluate`` and ``compare``; a model, a pack and prompts for a picture of
what moved inside. Out: tables or JSON, one HTML page, a Markdown file. It does what
``alphaedit_peft.report.read_findings`` and ``scores_page`` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, BadParameter, Option

from alphaedit_peft.cli import arguments, printing
from alphaedit_peft.saving import replace_file

if TYPE_CHECKING:
    from alphaedit_peft.evaluation import Case
    from alphaedit_peft.report import Answer, Finding, Prompt, Shift


TEXTS = (".md", ".markdown")
KEPT, EDITED = "prompts to be kept", "edited prompts"

Layout = Literal["counterfact", "zsre", "knowedit", "own"]

ModelOption = Annotated[
    str | None, Option(metavar="MODEL", help="A model's folder or Hub id, or 'embedded'.")
]
PackOption = Annotated[str | None, Option(metavar="PACK", help="An edit pack of that model.")]


def report(  # noqa: PLR0913
    results: Annotated[
        list[str] | None,
        Argument(metavar="[RESULTS]...", help="Files or folders of evaluate and compare."),
    ] = None,
    *,
    html: arguments.PageOption = None,
    markdown: Annotated[
        Path | None, Option(metavar="FILE.md", help="Write the tables there.")
    ] = None,
    title: Annotated[str, Option(help="Of the page.")] = "Scores",
    model: ModelOption = None,
    pack: PackOption = None,
    prompts: Annotated[
        Path | None, Option(metavar="FILE", help="Prompts that should stay, one a line.")
    ] = None,
    dtype: arguments.DtypeOption = "auto",
    device: arguments.DeviceOption = None,
    as_json: arguments.JsonOption = False,
) -> None:
    """Show what evaluations found: tables here, a page with plots, Markdown.

    `alphaedit report run --html scores.html` (the folder of `alphaedit compare`)

    `alphaedit report judged.jsonl other.jsonl --markdown scores.md` (of `evaluate --out`)

    `alphaedit report run --html scores.html --model MODEL --pack pack --prompts kept.txt` (also
    how far the pack moves hidden states)
    """
    given = (model, pack, prompts)
    if any(given) and not all(given):
        raise BadParameter("--model, --pack and --prompts belong together; give all three")
    if not results and not model:
        raise BadParameter("give results, or --model, --pack and --prompts")
    if markdown is not None and not results:
        raise BadParameter("--markdown is for results; give some, or --html")
    arguments.check_file("--html", html, arguments.PAGES)
    arguments.check_file("--markdown", markdown, TEXTS)
    from alphaedit_peft.report import read_findings, scores_markdown, scores_page, shift_section

    found = read_findings(results or [])
    moved = _shifts(str(model), str(pack), prompts, dtype, device) if prompts else ()
    facts: dict[str, Any] = {
        "findings": [_facts(one) for one in found],
        "moved": [_moves(one) for one in moved],
    }
    parts: list[Any] = [*_scores(found), *_moved(moved)]
    if html is not None:
        more = [shift_section(moved)] if moved else []
        replace_file(html, scores_page(found, more=more, title=title))
        parts.append(f"Written to {html}; open it in a browser")
        facts["html"] = str(html)
    if markdown is not None:
        replace_file(markdown, scores_markdown(found, title))
        parts.append(f"Written to {markdown}")
        facts["markdown"] = str(markdown)
    printing.show(as_json, facts, *parts)


def _shifts(
    model: str, pack: str, prompts: Path, dtype: arguments.Dtype, device: str | None
) -> tuple[Shift, ...]:
    kept = arguments.read_lines(prompts)
    if not kept:
        raise ValueError(f"{prompts} holds no prompt; write one a line")
    from alphaedit_peft.report import pack_shift

    base, tokenizer = arguments.load_model(model, dtype, device)
    edited = arguments.load_pack(base, pack)
    groups = {KEPT: kept, EDITED: [edit.question for edit in edited.edits]}
    return pack_shift(edited, tokenizer, groups)


def _facts(found: Finding) -> dict[str, Any]:
    """A finding as plain JSON values."""
    from alphaedit_peft.evaluation.summary import estimates_to_json

    return {
        "name": found.name,
        "source": found.source,
        "over": found.over,
        "before": estimates_to_json(found.before),
        "final": estimates_to_json(found.final),
        "by_batch": {name: list(means) for name, means in found.by_batch.items()},
        "seconds_an_edit": found.seconds,
    }


def _moves(moved: Shift) -> dict[str, Any]:
    relative = {name: found.tolist() for name, found in moved.relative.items()}
    return {"where": moved.where, "spread": moved.spread, "relative_move": relative}


def _scores(found: Sequence[Finding]) -> list[Any]:
    from alphaedit_peft.report import all_scores, intervals_in_words, scores_table
    from alphaedit_peft.tables import Table

    if not found:
        return []
    main, every = scores_table(found), all_scores(found)
    parts: list[Any] = printing.tables("Scores", *main.numbers())
    rest = [row for row in every.rows if row[0] not in main.columns]
    if rest:  # turned round, so that many models do not make it too wide
        parts += printing.tables("Everything else", *Table(every.columns, rest).numbers())
    return [*parts, intervals_in_words(found)]


def _moved(shifts: Sequence[Shift]) -> list[Any]:
    from alphaedit_peft.report.shift import moves

    columns = ["hidden states", "of", ">how many", ">median move", ">largest"]
    rows = [row[: len(columns)] for row in moves(shifts).rows]
    return printing.filled("What moved inside", columns, rows)


def show_record(  # noqa: PLR0913
    layout: Annotated[Layout, Argument(help="What the file holds.")],
    file: Annotated[Path, Argument(metavar="FILE", help="Of records, as for evaluate --data.")],
    *,
    case: Annotated[int, Option(min=0, help="The record's case_id; without one, its place.")] = 0,
    model: ModelOption = None,
    pack: PackOption = None,
    html: arguments.PageOption = None,
    target: arguments.TargetOption = "answers",
    text_tokens: Annotated[
        int, Option("--tokens", min=1, help="Written after generation prompts.")
    ] = 24,
    dtype: arguments.DtypeOption = "auto",
    device: arguments.DeviceOption = None,
    as_json: arguments.JsonOption = False,
) -> None:
    """Show one record: the request, paraphrases, neighbours, and what a model says to them.

    `alphaedit show counterfact counterfact.json --case 12`

    `alphaedit show zsre zsre.json --case 3 --model MODEL --pack pack --html record.html`
    """
    if pack is not None and model is None:
        raise BadParameter(f"--pack {pack} needs its model; give --model too")
    arguments.check_file("--html", html, arguments.PAGES)
    read = _read(layout, file, case, target)
    from alphaedit_peft.report import prompts_of, record_page

    prompts = prompts_of(read)
    answers: list[tuple[Answer, ...]] = []  # before, and after with a pack
    told = ""
    if model is not None:
        answers, told = _answers(read, prompts, model, pack, text_tokens, dtype, device)
    name = f"{file.name}, record {case}"
    facts = {"record": name, "case": read.to_dict(), "answers": _record_facts(prompts, answers)}
    parts: list[Any] = [name, _request(read), *_tables(prompts, answers)]
    if told:
        parts.append(told)
    if html is not None:
        replace_file(html, record_page(read, *answers, title=name, lead=told))
        parts.append(f"Written to {html}; open it in a browser")
        facts["html"] = str(html)
    printing.show(as_json, facts, *parts)


def _read(layout: Layout, file: Path, number: int, target: arguments.Target) -> Case:
    """One record as a case.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such record, or one that is not of the layout.
    """
    from alphaedit_peft.evaluation import read_cases
    from alphaedit_peft.records import read_records

    records = read_records(file)
    where: list[Any] = [record.values.get("case_id") for record in records]
    if all(value is None for value in where):
        where = list(range(len(records)))
    if number not in where:
        known = sorted(value for value in where if isinstance(value, int))
        there = f"{len(known)} records, {known[0]} to {known[-1]}" if known else "no record"
        raise ValueError(f"--case {number} is not in {file.name}, which holds {there}")
    return read_cases([records[where.index(number)]], layout, target=target)[0][0]


def _answers(
    case: Case,
    prompts: tuple[Prompt, ...],
    model: str,
    pack: str | None,
    text_tokens: int,
    dtype: arguments.Dtype,
    device: str | None,
) -> tuple[list[tuple[Answer, ...]], str]:
    """What the model says without and with the pack, and that in a sentence."""
    from alphaedit_peft.report import ask

    base, tokenizer = arguments.load_model(model, dtype, device)
    before = ask(base, tokenizer, prompts, text_tokens=text_tokens)
    if pack is None:
        return [before], f"Answers are those of {model}, greedily."
    edited = arguments.load_pack(base, pack)
    after = ask(edited, tokenizer, prompts, text_tokens=text_tokens)
    asked = case.edit
    same = [e for e in edited.edits if (e.subject, e.prompt) == (asked.subject, asked.prompt)]
    if any(e.target_new.strip() == asked.target_new.strip() for e in same):
        there = "which holds this edit"
    elif same:
        there = f"which teaches another target here, {same[-1].target_new.strip()!r}"
    else:
        there = "which does not hold this edit"
    count = printing.count(len(edited.edits), "edit")
    told = f"Before is {model}, after is with {pack} ({count}), {there}; greedily."
    return [before, after], told


def _record_facts(
    prompts: tuple[Prompt, ...], answers: Sequence[tuple[Answer, ...]]
) -> list[dict[str, Any]]:
    """Prompts with the answers to each, as plain JSON values."""
    rows = []
    for i, prompt in enumerate(prompts):
        said = [asdict(found[i]) for found in answers]
        before, after = [*said, None, None][:2]
        rows.append({**asdict(prompt), "before": before, "after": after})
    return rows


def _request(case: Case) -> str:
    """Subject and targets in a line."""
    edit = case.edit
    told = f"Subject: {edit.subject}; new target: {edit.target_new.strip()}"
    return told if edit.target_true is None else f"{told}; true target: {edit.target_true.strip()}"


def _tables(prompts: tuple[Prompt, ...], answers: Sequence[tuple[Answer, ...]]) -> list[Any]:
    """A table a part of the record."""
    from alphaedit_peft.report.record_page import PARTS, heading, part_tables

    def said(answer: Answer) -> tuple[str, str]:
        return " ".join(answer.text.split()), printing.probability(answer.wanted)

    heads = ("prompt", "should\nfollow"), ("before", ">P"), ("after", ">P")
    return [
        printing.table(f"{heading(part)}: {PARTS[part]}", *found)
        for part, found in part_tables(prompts, answers, heads, lambda prompt: prompt.text, said)
    ]
