"""``alphaedit evaluate``: judge a model, or a pack on it, over cases.

In: a model, cases from a file or the embedded world, a pack. Out: metrics as a table or JSON, and
a results file that a later call takes up. It does what ``alphaedit_peft.evaluation.evaluate`` does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alphaedit_peft.cli import printing
from alphaedit_peft.cli.arguments import (
    DataOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    GenerateOption,
    JsonOption,
    ModelArgument,
    SnippetsOption,
    SplitOption,
    Target,
    TargetOption,
    TextsOption,
    check_ways,
    finding,
    load_model,
    load_pack,
    read_lines,
    read_suite,
)

if TYPE_CHECKING:
    from alphaedit_peft.evaluation import Suite
    from alphaedit_peft.evaluation.scores import Estimate


def evaluate(  # noqa: PLR0913
    model: ModelArgument,
    *,
    data: DataOption = None,
    pack: Annotated[
        str | None,
        typer.Option("--pack", metavar="PACK", help="Edits to judge, before and after."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Judge so many cases at most.")] = None,
    split: SplitOption = None,
    target: TargetOption = Target.ANSWERS,
    snippets: SnippetsOption = None,
    texts: TextsOption = None,
    generate: GenerateOption = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE.jsonl", help="Keep judged cases here, and go on from there."
        ),
    ] = None,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge a model, with or without a pack: efficacy, generalization, specificity and more.

    `alphaedit evaluate MODEL --data counterfact.json --limit 300`

    `alphaedit evaluate MODEL --pack pack --data cases.jsonl` (before and after)

    `alphaedit evaluate MODEL --pack pack` (the pack's own edits and their paraphrases)

    What the metrics mean: docs/evaluation.md.
    """
    from alphaedit_peft import evaluation

    if data is None and pack is None:
        raise typer.BadParameter("give --data FILE, or --pack PACK for a pack's own edits")
    if data is None:
        check_ways(data, split, target, snippets)
        suite = _suite_of_pack(str(pack), limit)
    else:
        suite = read_suite(data, limit, split=split, target=target, snippets=snippets)
    suite = replace(suite, texts=(*suite.texts, *read_lines(texts)))
    base, tokenizer = load_model(model, dtype, device)
    before, now = None, base
    if pack is not None:
        first = None if out is None else out.with_name(f"{out.stem}.before{out.suffix}")
        before = evaluation.evaluate(base, tokenizer, suite, generate=generate, results=first)
        now = load_pack(base, pack)
    scores = evaluation.evaluate(
        now, tokenizer, suite, baseline=before, generate=generate, results=out
    )
    found = scores.to_json()
    facts = {"cases": len(suite.cases), "metrics": found["metrics"], "settings": found["settings"]}
    if before is not None:
        facts["before"] = before.to_json()["metrics"]
    parts = [scores.table(before)]
    if pack is not None and suite.texts:
        reader = evaluation.Reader(now, tokenizer)
        drift = evaluation.text_divergence(reader, now.disable_adapter, suite.texts)
        facts["drift"] = drift.to_json()
        parts.append(_drift(drift))
    if out is not None:
        facts["out"] = str(out)
        parts.append(f"Judged cases are in {out}")
    printing.show(as_json, facts, *parts)


def _drift(found: Estimate) -> str:
    return (
        f"Drift over {found.n} texts: KL(before || after) {found.value:.3g} nats a token "
        f"({found.low:.3g} to {found.high:.3g})"
    )


def _suite_of_pack(pack: str, limit: int | None) -> Suite:
    from alphaedit_peft import EditPack
    from alphaedit_peft.evaluation import Case, Suite

    with finding(pack):
        edits = EditPack.from_pretrained(pack).edits[:limit]
    if not edits:
        raise ValueError(f"{pack} holds no edit to judge; give --data FILE")
    return Suite([Case(edit, paraphrases=edit.paraphrases) for edit in edits])
