"""Scores as rows and as Markdown: AlphaEdit's Table 1 first, then every metric, and their origin.

In: :class:`~alphaedit_peft.report.findings.Finding` of one or more methods or models. Out: headings
and rows of text, and a Markdown file of them. The columns of Table 1 are efficacy, generalization,
specificity, fluency and consistency.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alphaedit_peft.evaluation.intervals import Estimate
from alphaedit_peft.evaluation.scores import METRICS, PERCENT
from alphaedit_peft.report.charts import with_half
from alphaedit_peft.report.findings import Finding

TABLE_1 = ("efficacy", "generalization", "specificity", "fluency", "consistency")
RECALL = (
    *("efficacy_recall", "generalization_recall", "specificity_recall", "same_subject_recall"),
    *("efficacy_tokens", "generalization_tokens", "locality_tokens"),
    *("unedited_recall", "perplexity"),
)
UNEDITED = "unedited"
DIGITS = {"perplexity": 3}  # of metrics that are no shares; 2 of the others
NESTED = 3  # entries of a list that are shown in the table of origins


def scores_table(findings: Sequence[Finding]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row a model as in AlphaEdit's Table 1, the unedited ones before the others.

    Where nothing compares new and true targets, as in zsRE, the columns are recall and token
    accuracy instead. Shares in percent, with half the width of the interval.
    """
    metrics = main_columns(findings)
    rows = [
        [name, *(shown(metric, found.get(metric)) for metric in metrics)]
        for name, found in [*unedited(findings), *((f.name, f.final) for f in findings)]
    ]
    return ["", *metrics], rows


def all_scores(findings: Sequence[Finding]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for every metric that was measured, a column a model."""
    columns = [*unedited(findings), *((f.name, f.final) for f in findings)]
    rows = [
        [metric, *(shown(metric, found.get(metric)) for _, found in columns)]
        for metric in METRICS
        if any(metric in found for _, found in columns)
    ]
    if any(f.seconds is not None for f in findings):
        blank = [""] * (len(columns) - len(findings))
        costs = ["" if f.seconds is None else f"{f.seconds:.2f}" for f in findings]
        rows.append(["processor seconds an edit", *blank, *costs])
    return ["metric", *(name for name, _ in columns)], rows


def scores_markdown(findings: Sequence[Finding], title: str = "Scores") -> str:
    """Both tables and what intervals are over, as Markdown; any text in cells stays text."""
    lines = [f"# {_plain(title)}", "", intervals_in_words(findings), ""]
    for heads, rows in (scores_table(findings), all_scores(findings)):
        lines.append(_row(heads))
        lines.append("|---" + "|---:" * (len(heads) - 1) + "|")
        lines += [*map(_row, rows), ""]
    lines.append(_row(["what the numbers depend on", "value"]))
    lines.append("|---|---|")
    lines += [_row([name, value]) for name, value in origins(findings)]
    return "\n".join(lines) + "\n"


def intervals_in_words(findings: Sequence[Finding]) -> str:
    """What was judged, and what intervals are over."""
    over = " and ".join(dict.fromkeys(f.over for f in findings))
    levels = {_level(f) for f in findings if f.over == "cases"} or {0.95}
    level = " and ".join(f"{100 * level:g} %" for level in sorted(levels))
    counts = {found.final[m].n for found in findings for m in found.final if found.over == "cases"}
    apart = "" if over == "cases" else " (of the unedited model, over cases or texts)"
    size = f", at most {max(counts):,}" if counts else ""
    return (
        "Shares in percent; ± is half the width of the "
        f"{level} interval over {over}{size}{apart}. Efficacy, generalization and specificity "
        "compare new and true targets; _recall says whether the answer is said greedily, _tokens "
        "which share of its tokens is."
    )


def main_columns(findings: Sequence[Finding]) -> list[str]:
    """Of the paper's Table 1; where fewer than two of these were measured, recall and tokens."""
    measured = {metric for found in findings for metric in found.final}
    columns = [metric for metric in TABLE_1 if metric in measured]
    if len(columns) < 2:
        columns += [metric for metric in RECALL if metric in measured]
    return columns or sorted(measured)[: len(TABLE_1)]


def unedited(findings: Sequence[Finding]) -> list[tuple[str, Mapping[str, Estimate]]]:
    """The unedited models, each once; with the source's name where they differ."""
    distinct: dict[str, tuple[str, Mapping[str, Estimate]]] = {}
    for found in findings:
        if found.before:
            key = json.dumps({m: e.to_json() for m, e in found.before.items()}, sort_keys=True)
            distinct.setdefault(key, (found.name, found.before))
    if len(distinct) == 1:
        return [(UNEDITED, before) for _, before in distinct.values()]
    return [(f"{UNEDITED}, {name}", before) for name, before in distinct.values()]


def origins(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    """What the numbers depend on: what all share once, the rest with the finding's name."""
    flat = {found.name: dict(_flat(found.origin)) for found in findings}
    names = dict.fromkeys(name for values in flat.values() for name in values)
    rows = []
    for name in names:
        values = {values.get(name) for values in flat.values()}
        if len(values) == 1:
            rows.append((name, str(next(iter(values)))))
        else:
            rows += [(f"{f}: {name}", own[name]) for f, own in flat.items() if name in own]
    sources = ", ".join(dict.fromkeys(found.source for found in findings))
    return [("read from", sources), *rows]


def shown(metric: str, estimate: Estimate | None) -> str:
    """A metric with half the width of its interval, in percent where it is a share."""
    if estimate is None:
        return ""
    return with_half(estimate, *scale_of(metric))


def scale_of(metric: str) -> tuple[float, int]:
    """What a metric is multiplied with to be shown, and its digits after the point."""
    if METRICS.get(metric) == PERCENT:
        return 100, 1
    return 1, DIGITS.get(metric, 2)


def _level(found: Finding) -> float:
    judging = found.origin.get("judging", {})
    level = judging.get("level", 0.95) if isinstance(judging, Mapping) else 0.95
    return level if isinstance(level, float) and math.isfinite(level) else 0.95


def _flat(values: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{name}.")
        elif value not in (None, {}, []):
            yield f"{path}{name}", _words(value)


def _words(value: object) -> str:
    if isinstance(value, list):
        rest = f" and {len(value) - NESTED} more" if len(value) > 2 * NESTED else ""
        kept = value if not rest else value[:NESTED]
        return ", ".join(map(str, kept)) + rest
    return str(value)


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _plain(cell: object) -> str:
    """Text that Markdown shows as it is, in one line."""
    text = " ".join(str(cell).split())
    return "".join("\\" + c if c in "\\|`*_[]<>#&" else c for c in text)
