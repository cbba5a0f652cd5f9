"""``alphaedit evaluate``: judge a model, or a pack on it, over cases.

In: a model, cases from a file or the embedded world, a pack. Out: metrics as a table or JSON, and
a results file that a later call takes up. It does what ``alphaedit_peft.evaluation.evaluate`` does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import BadParameter, Option

from alphaedit_peft.cli import arguments, printing

if TYPE_CHECKING:
    from alphaedit_peft.evaluation import Scores, Suite


def evaluate(  # noqa: PLR0913
    model: arguments.ModelArgument,
    *,
    data: arguments.DataOption = None,
    pack: Annotated[
        str | None, Option(metavar="PACK", help="Edits to judge, before and after.")
    ] = None,
    limit: Annotated[int | None, Option(min=1, help="Judge so many cases at most.")] = None,
    split: arguments.SplitOption = None,
    target: arguments.TargetOption = "answers",
    snippets: arguments.SnippetsOption = None,
    texts: arguments.TextsOption = None,
    generate: arguments.GenerateOption = False,
    out: Annotated[
        Path | None,
        Option(metavar="FILE.jsonl", help="Keep judged cases here, and go on from there."),
    ] = None,
    dtype: arguments.DtypeOption = "auto",
    device: arguments.DeviceOption = None,
    as_json: arguments.JsonOption = False,
) -> None:
    """Judge a model, with or without a pack: efficacy, generalization, specificity and more.

    `alphaedit evaluate MODEL --data counterfact.json --limit 300`

    `alphaedit evaluate MODEL --pack pack --data cases.jsonl` (before and after)

    `alphaedit evaluate MODEL --pack pack` (the pack's own edits and their paraphrases)

    What the metrics mean: docs/evaluation.md.
    """
    arguments.check_file("--out", out)
    from alphaedit_peft import evaluation

    if data is None and pack is None:
        raise BadParameter("give --data FILE, or --pack PACK for a pack's own edits")
    if data is None:
        arguments.check_ways(data, split, target, snippets)
        suite = _suite_of_pack(str(pack), limit)
    else:
        suite = arguments.read_suite(data, limit, split=split, target=target, snippets=snippets)
    suite = replace(suite, texts=(*suite.texts, *arguments.read_lines(texts)))
    base, tokenizer = arguments.load_model(model, dtype, device)
    before, now = None, base if pack is None else arguments.load_pack(base, pack)
    how = evaluation.Judging() if pack is None else evaluation.Judging.of(now.alphaedit_config)
    ways: dict[str, Any] = {"generate": generate, "how": how}
    with printing.kept(out):
        if pack is not None:
            first = None if out is None else out.with_name(f"{out.stem}.before{out.suffix}")
            with now.disable_adapter():
                before = _judged(now, tokenizer, suite, results=first, **ways)
        scores = _judged(now, tokenizer, suite, baseline=before, results=out, **ways)
    found = scores.to_json()
    facts = {"cases": len(suite.cases), "metrics": found["metrics"], "settings": found["settings"]}
    if before is not None:
        facts["before"] = before.to_json()["metrics"]
    parts = [scores.table(before)]
    if pack is not None and suite.texts:
        reader = evaluation.Reader(now, tokenizer)
        drift = evaluation.text_divergence(reader, now.disable_adapter, suite.texts)
        facts["drift"] = drift.to_json()
        parts.append(
            f"Drift over {drift.n} texts: KL(before || after) {drift.value:.3g} nats a token "
            f"({drift.low:.3g} to {drift.high:.3g})"
        )
    if out is not None:
        facts["out"] = str(out)
        parts.append(f"Judged cases are in {out}")
    printing.show(as_json, facts, *parts)


def _judged(model: Any, tokenizer: Any, suite: Suite, **options: Any) -> Scores:
    """A model judged, and told how far that is; options as ``evaluation.evaluate``."""
    from alphaedit_peft.evaluation import evaluate
    from alphaedit_peft.progress import counting

    with counting("judging", len(suite.cases), "case") as bar:
        done = 0

        def tell(judged: int, _: int) -> None:
            nonlocal done
            bar.update(judged - done)
            done = judged

        return evaluate(model, tokenizer, suite, progress=tell, **options)


def _suite_of_pack(pack: str, limit: int | None) -> Suite:
    from alphaedit_peft.evaluation import Case, Suite

    edits = arguments.read_pack(pack).edits[:limit]
    if not edits:
        raise ValueError(f"{pack} holds no edit to judge; give --data FILE")
    return Suite([Case(edit, paraphrases=edit.paraphrases) for edit in edits])
