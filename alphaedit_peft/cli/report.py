"""``alphaedit report``: what evaluations found, as a table, a page, or Markdown.

In: files and folders of ``evaluate`` and ``compare``; a model, a pack and prompts for a picture of
what moved inside. Out: tables or JSON, one HTML page, a Markdown file. It does what
``alphaedit_peft.report.read_findings`` and ``scores_page`` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alphaedit_peft.cli import show
from alphaedit_peft.cli.evaluate import read_lines
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

if TYPE_CHECKING:
    from alphaedit_peft.report import Finding, Shift

TEXTS = (".md", ".markdown")
KEPT, EDITED = "prompts to be kept", "edited prompts"

ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="A model's folder or Hub id, or 'embedded'."),
]
PackOption = Annotated[
    str | None, typer.Option("--pack", metavar="PACK", help="An edit pack of that model.")
]


def report(  # noqa: PLR0913
    results: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RESULTS]...", help="Files or folders of evaluate and compare."),
    ] = None,
    *,
    html: PageOption = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE.md", help="Write the tables there.")
    ] = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Scores",
    model: ModelOption = None,
    pack: PackOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="Prompts that should stay, one a line."),
    ] = None,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what evaluations found: tables here, a page with plots, Markdown.

    `alphaedit report run --html scores.html` (the folder of `alphaedit compare`)

    `alphaedit report judged.jsonl other.jsonl --markdown scores.md` (of `evaluate --out`)

    `alphaedit report run --html scores.html --model MODEL --pack pack --prompts kept.txt` (also
    how far the pack moves hidden states)
    """
    given = (model, pack, prompts)
    if any(given) and not all(given):
        raise typer.BadParameter("--model, --pack and --prompts belong together; give all three")
    if not results and not model:
        raise typer.BadParameter("give results, or --model, --pack and --prompts")
    if markdown is not None and not results:
        raise typer.BadParameter("--markdown is for results; give some, or --html")
    check_file("--html", html, PAGES)
    check_file("--markdown", markdown, TEXTS)
    from alphaedit_peft.report import (
        read_findings,
        scores_markdown,
        scores_page,
        shift_section,
    )

    found = read_findings(results or [])
    moved = _shifts(str(model), str(pack), prompts, dtype, device) if prompts else ()
    facts: dict[str, Any] = {
        "findings": [_facts(one) for one in found],
        "moved": [_moves(one) for one in moved],
    }
    parts: list[Any] = [*_scores(found), *_moved(moved)]
    if html is not None:
        more = [shift_section(moved)] if moved else []
        html.write_text(scores_page(found, more=more, title=title), encoding="utf-8")
        parts.append(f"Written to {html}; open it in a browser")
        facts["html"] = str(html)
    if markdown is not None:
        markdown.write_text(scores_markdown(found, title), encoding="utf-8")
        parts.append(f"Written to {markdown}")
        facts["markdown"] = str(markdown)
    show.show(as_json, facts, *parts)


def _shifts(
    model: str, pack: str, prompts: Path, dtype: Dtype, device: str | None
) -> tuple[Shift, ...]:
    kept = read_lines(prompts)
    if not kept:
        raise ValueError(f"{prompts} holds no prompt; write one a line")
    from alphaedit_peft import AlphaEditModel
    from alphaedit_peft.report import pack_shift

    base, tokenizer = load_model(model, dtype, device)
    with finding(pack):
        edited = AlphaEditModel.from_pretrained(base, pack)
    groups = {KEPT: kept, EDITED: [edit.question for edit in edited.edits]}
    return pack_shift(edited, tokenizer, groups)


def _facts(found: Finding) -> dict[str, Any]:
    """A finding as plain JSON values."""
    return {
        "name": found.name,
        "source": found.source,
        "over": found.over,
        "before": {name: e.to_json() for name, e in found.before.items()},
        "final": {name: e.to_json() for name, e in found.final.items()},
        "by_batch": {name: list(means) for name, means in found.by_batch.items()},
        "seconds_an_edit": found.seconds,
    }


def _moves(moved: Shift) -> dict[str, Any]:
    relative = {name: found.tolist() for name, found in moved.relative.items()}
    return {"where": moved.where, "spread": moved.spread, "relative_move": relative}


def _scores(found: Sequence[Finding]) -> list[Any]:
    from alphaedit_peft.report import all_scores, intervals_in_words, scores_table

    if not found:
        return []
    heads, rows = scores_table(found)
    parts: list[Any] = show.tables("Scores", [heads[0], *(f">{n}" for n in heads[1:])], rows)
    rest_heads, every = all_scores(found)
    main = set(heads)
    rest = [row for row in every if row[0] not in main]
    if rest:  # turned round, so that many models do not make it too wide
        columns = [rest_heads[0], *(f">{name}" for name in rest_heads[1:])]
        parts += show.tables("Everything else", columns, rest)
    return [*parts, intervals_in_words(found)]


def _moved(shifts: Sequence[Shift]) -> list[Any]:
    from statistics import median

    rows = [
        (one.where, name, len(far), *(f"{100 * v:.2f} %" for v in (median(far), max(far))))
        for one in shifts
        for name, far in ((name, moves.tolist()) for name, moves in one.relative.items())
    ]
    columns = ["hidden states", "of", ">how many", ">median move", ">largest"]
    return [show.table("What moved inside", columns, rows)] if rows else []
