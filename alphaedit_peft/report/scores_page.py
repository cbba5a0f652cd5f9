"""The page of an evaluation: scores as bars and tables, over the edits, by age, and their origin.

In: :class:`~alphaedit_peft.report.findings.Finding` of one or more methods or models. Out: one
self-contained HTML page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alphaedit_peft.evaluation.metrics import Estimate
from alphaedit_peft.evaluation.scores import METRICS, PERCENT
from alphaedit_peft.report.charts import COLOURS, course_chart, interval_bars, with_half
from alphaedit_peft.report.findings import Finding
from alphaedit_peft.report.page import Markup, Section, page, paragraph, side_by_side, table

UNEDITED_COLOUR = COLOURS - 1  # the quiet one
LOWER_IS_BETTER = ("perplexity",)


def scores_page(
    findings: Sequence[Finding], *, more: Sequence[Section] = (), title: str = "Scores"
) -> str:
    """One HTML page of an evaluation; it needs no network and no other file.

    Args:
        findings: at least one, unless there is ``more``.
        more: sections to put before the origin of the numbers.
        title: plain text.

    Raises:
        ValueError: nothing to show.
    """
    if not findings:
        if not more:
            raise ValueError("findings=[] leave nothing to show; give at least one")
        return page(title, more)
    main = set(main_columns(findings))
    heads, rows = all_scores(findings)
    sections = [
        Section("Scores", _bars(findings, [m for m in METRICS if m in main])),
        *_over_edits(findings),
        *_by_age(findings),
        Section("All numbers", table([heads[0], *(f">{name}" for name in heads[1:])], rows)),
        *more,
        Section("What the numbers depend on", table(["", "value"], origins(findings))),
    ]
    return page(title, sections, intervals_in_words(findings))


def _bars(findings: Sequence[Finding], metrics: Iterable[str]) -> Markup:
    """A chart a metric, a bar a model."""
    charts = []
    for metric in dict.fromkeys([*metrics, *_beside(findings)]):
        bars = [
            (name, found[metric], UNEDITED_COLOUR)
            for name, found in unedited(findings)
            if metric in found
        ]
        bars += [(f.name, f.final[metric], 0) for f in findings if metric in f.final]
        percent = METRICS[metric] == PERCENT
        caption = metric.replace("_", " ") + (", %" if percent else "")
        note = " (lower is better)" if metric in LOWER_IS_BETTER else ""
        scale, digits = scale_of(metric)
        full = 1.0 if percent else None
        charts.append(interval_bars(caption + note, bars, scale=scale, digits=digits, full=full))
    return side_by_side(charts)


def _beside(findings: Sequence[Finding]) -> list[str]:
    """What is drawn beside the main columns; shares of tokens only where recall is not there."""
    measured = {metric for found in findings for metric in found.final}
    return [
        metric
        for metric in RECALL
        if metric in measured and metric.replace("_tokens", "_recall") not in measured - {metric}
    ]


def _over_edits(findings: Sequence[Finding]) -> list[Section]:
    """Curves of metrics over the edits made."""
    charts = []
    for metric in (*TABLE_1, *_beside(findings)):
        courses = {
            f.name: [(edits, e if edits else _exact(e.value)) for edits, e in f.course[metric]]
            for f in findings
            if f.course.get(metric)
        }
        if not courses:
            continue
        percent = METRICS[metric] == PERCENT
        scale, ends = (100, (0.0, 100.0)) if percent else (1, None)
        caption = metric.replace("_", " ") + (", %" if percent else "")
        charts.append(
            course_chart(caption, courses, x_label="edits made", scale=scale, y_range=ends)
        )
    if not charts:
        return []
    text = (
        "Each judgement asks about all edits made until then; the bands are the intervals. At 0 "
        "stands the unedited model on all cases, without its interval, which is over cases."
    )
    return [Section("Over the edits", Markup(side_by_side(charts) + paragraph(text)))]


def _by_age(findings: Sequence[Finding]) -> list[Section]:
    """How well each batch's edits hold at the end."""
    charts, rows = [], []
    metrics = dict.fromkeys(m for f in findings for m, v in f.by_batch.items() if len(v) > 1)
    for metric in metrics:
        lines = {
            f.name: [(i + 1, _exact(value)) for i, value in enumerate(f.by_batch[metric])]
            for f in findings
            if metric in f.by_batch
        }
        caption = metric.replace("_", " ") + ", %"
        charts.append(
            course_chart(
                caption, lines, x_label="batch, the oldest first", scale=100, y_range=(0.0, 100.0)
            )
        )
        for name, points in lines.items():
            first, last = points[0][1].value, points[-1][1].value
            rows.append((metric, name, f"{100 * first:.1f}", f"{100 * last:.1f}"))
    if not charts:
        return []
    listed = table(["metric", "method", ">oldest batch, %", ">latest batch, %"], rows)
    text = "Every edit judged after the last batch, by the batch that it was made in."
    return [Section("By age of the edits", Markup(side_by_side(charts) + listed + paragraph(text)))]


def _exact(value: float) -> Estimate:
    """A value that is drawn without an interval."""
    return Estimate(value, value, value, 0)


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
