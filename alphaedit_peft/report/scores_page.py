"""The page of an evaluation: scores as bars and tables, over the edits, by age, and their origin.

In: :class:`~alphaedit_peft.report.findings.Finding` of one or more methods or models. Out: one
self-contained HTML page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from alphaedit_peft.evaluation.intervals import Estimate
from alphaedit_peft.evaluation.scores import METRICS, PERCENT
from alphaedit_peft.report.charts import course_chart, interval_bars
from alphaedit_peft.report.findings import Finding
from alphaedit_peft.report.html import Markup, Section, page, paragraph, side_by_side, table
from alphaedit_peft.report.scores import (
    RECALL,
    TABLE_1,
    all_scores,
    intervals_in_words,
    main_columns,
    origins,
    scale_of,
    unedited,
)
from alphaedit_peft.report.svg import COLOURS

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
