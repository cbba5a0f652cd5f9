"""``alphaedit show``: a record of a data set with all its prompts, and a model's answers to them.

In: a data set's file, a record's number; a model, and a pack on it. Out: tables or JSON, and one
HTML page. It does what ``alphaedit_peft.report.ask`` and ``record_page`` do.
"""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alphaedit_peft.cli import show
from alphaedit_peft.cli.evaluate import Target, TargetOption
from alphaedit_peft.cli.loading import finding, load_model
from alphaedit_peft.cli.options import (
    PAGES,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    PageOption,
    check_file,
)
from alphaedit_peft.cli.report import ModelOption, PackOption

if TYPE_CHECKING:
    from alphaedit_peft.evaluation import Case
    from alphaedit_peft.report import Answer, Prompt


class Layout(str, Enum):
    """Data sets whose records can be shown."""

    COUNTERFACT = "counterfact"
    ZSRE = "zsre"
    KNOWEDIT = "knowedit"
    OWN = "own"


def show_record(  # noqa: PLR0913
    layout: Annotated[Layout, typer.Argument(help="What the file holds.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Of records, JSON or JSON Lines.")],
    *,
    case: Annotated[
        int, typer.Option("--case", min=0, help="The record's case_id; without one, its place.")
    ] = 0,
    model: ModelOption = None,
    pack: PackOption = None,
    html: PageOption = None,
    target: TargetOption = Target.ANSWERS,
    text_tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Written after generation prompts.")
    ] = 24,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one record: the request, paraphrases, neighbours, and what a model says to them.

    `alphaedit show counterfact counterfact.json --case 12`

    `alphaedit show zsre zsre.json --case 3 --model MODEL --pack pack --html record.html`
    """
    if pack is not None and model is None:
        raise typer.BadParameter(f"--pack {pack} needs its model; give --model too")
    check_file("--html", html, PAGES)
    read = _read(layout, file, case, target)
    from alphaedit_peft.report import prompts_of, record_page

    prompts = prompts_of(read)
    before = after = None
    told = ""
    if model is not None:
        before, after, told = _answers(read, prompts, model, pack, text_tokens, dtype, device)
    name = f"{file.name}, record {case}"
    facts = {"record": name, "case": read.to_dict(), "answers": _facts(prompts, before, after)}
    parts: list[Any] = [name, _request(read), *_tables(prompts, before, after)]
    if told:
        parts.append(told)
    if html is not None:
        page = record_page(read, before, after, title=name, lead=told)
        html.write_text(page, encoding="utf-8")
        parts.append(f"Written to {html}; open it in a browser")
        facts["html"] = str(html)
    show.show(as_json, facts, *parts)


def _read(layout: Layout, file: Path, number: int, target: Target) -> Case:
    """One record as a case.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such record, or one that is not of the layout.
    """
    from alphaedit_peft.evaluation import DataError, read_cases
    from alphaedit_peft.evaluation.data.source import raw_records

    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file; give one of records, .json or .jsonl")
    name, records = raw_records(file)
    ids = [r.get("case_id") if isinstance(r, dict) else None for r in records]
    where = ids if any(value is not None for value in ids) else list(range(len(records)))
    if number not in where:
        known = sorted(value for value in where if isinstance(value, int))
        there = f"{len(known)} records, {known[0]} to {known[-1]}" if known else "no record"
        raise ValueError(f"--case {number} is not in {name}, which holds {there}")
    chosen = records[where.index(number)]
    try:
        return read_cases([chosen], layout.value, target=target.value)[0][0]
    except DataError as error:
        why = str(error).removeprefix("list, record 0, ")  # its place in the list of one
        raise ValueError(f"{name}, --case {number}: {why}") from error


def _answers(
    case: Case,
    prompts: tuple[Prompt, ...],
    model: str,
    pack: str | None,
    text_tokens: int,
    dtype: Dtype,
    device: str | None,
) -> tuple[tuple[Answer, ...], tuple[Answer, ...] | None, str]:
    """What the model says without and with the pack, and that in a sentence."""
    from alphaedit_peft import AlphaEditModel
    from alphaedit_peft.report import ask

    base, tokenizer = load_model(model, dtype, device)
    before = ask(base, tokenizer, prompts, text_tokens=text_tokens)
    if pack is None:
        return before, None, f"Answers are those of {model}, greedily."
    with finding(pack):
        edited: Any = AlphaEditModel.from_pretrained(base, pack)
    after = ask(edited, tokenizer, prompts, text_tokens=text_tokens)
    same = [
        e for e in edited.edits if (e.subject, e.prompt) == (case.edit.subject, case.edit.prompt)
    ]
    held = any(e.target_new.strip() == case.edit.target_new.strip() for e in same)
    if held:
        there = "which holds this edit"
    elif same:
        there = f"which teaches another target here, {same[-1].target_new.strip()!r}"
    else:
        there = "which does not hold this edit"
    count = show.count(len(edited.edits), "edit")
    return before, after, f"Before is {model}, after is with {pack} ({count}), {there}; greedily."


def _facts(
    prompts: tuple[Prompt, ...],
    before: tuple[Answer, ...] | None,
    after: tuple[Answer, ...] | None,
) -> list[dict[str, Any]]:
    """Prompts with the answers to each, as plain JSON values."""
    rows = []
    for i, prompt in enumerate(prompts):
        row: dict[str, Any] = asdict(prompt)
        row["before"] = None if before is None else asdict(before[i])
        row["after"] = None if after is None else asdict(after[i])
        rows.append(row)
    return rows


def _request(case: Case) -> str:
    """Subject and targets in a line."""
    edit = case.edit
    told = f"Subject: {edit.subject}; new target: {edit.target_new.strip()}"
    return told if edit.target_true is None else f"{told}; true target: {edit.target_true.strip()}"


def _tables(
    prompts: tuple[Prompt, ...],
    before: tuple[Answer, ...] | None,
    after: tuple[Answer, ...] | None,
) -> list[Any]:
    """A table a part of the record."""
    from alphaedit_peft.report import PARTS

    told = [(name, said) for name, said in (("before", before), ("after", after)) if said]
    tables = []
    for part, meaning in PARTS.items():
        where = [i for i, prompt in enumerate(prompts) if prompt.part == part]
        if not where:
            continue
        wanted = any(prompts[i].wanted is not None for i in where)
        columns = ["prompt", *(["should\nfollow"] if wanted else [])]
        for name, _ in told:
            columns += [name, *([">P"] if wanted else [])]
        rows = []
        for i in where:
            row: list[object] = [prompts[i].text, *([prompts[i].wanted] if wanted else [])]
            for _, said in told:
                row.append(" ".join(said[i].text.split()))
                row += [show.probability(said[i].wanted)] if wanted else []
            rows.append(row)
        tables.append(
            show.table(f"{part.replace('_', ' ').capitalize()}: {meaning}", columns, rows)
        )
    return tables
