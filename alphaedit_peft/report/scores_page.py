"""Scores of an evaluation: a page with bars and curves, tables, Markdown, and their origin.

In: :class:`~alphaedit_peft.report.findings.Finding` of one or more methods or models. Out: one
self-contained HTML page; tables as in AlphaEdit's Table 1; Markdown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alphaedit_peft.evaluation.metrics import METRICS, PERCENT
from alphaedit_peft.evaluation.summary import Estimate, estimates_to_json
from alphaedit_peft.report.charts import COLOURS, course_chart, interval_bars, with_half
from alphaedit_peft.report.page import Markup, Section, page, paragraph, side_by_side, table
from alphaedit_peft.tables import Table, plain

if TYPE_CHECKING:
    from alphaedit_peft.report.findings import Finding

TABLE_1 = ("efficacy", "generalization", "specificity", "fluency", "consistency")
RECALL = (
    *("efficacy_recall", "generalization_recall", "specificity_recall", "same_subject_recall"),
    *("efficacy_tokens", "generalization_tokens", "locality_tokens"),
    *("unedited_recall", "perplexity"),
)
LOWER_IS_BETTER = ("perplexity",)
DIGITS = {"perplexity": 3}  # of metrics that are no shares; 2 of the others
UNEDITED = "unedited"
UNEDITED_COLOUR = COLOURS - 1  # the quiet one
NESTED = 3  # entries of a list that are shown in the table of origins


def scores_page(
    findings: Sequence[Finding], *, more: Sequence[Section] = (), title: str = "Scores"
) -> str:
    """One HTML page of an evaluation; it needs no network and no other file.

    Args:
        findings: at least one, unless there is ``more``.
        more: sections to put before the origin of the numbers.

    Raises:
        ValueError: nothing to show.
    """
    if not findings:
        if not more:
            raise ValueError("findings=[] leave nothing to show; give at least one")
        return page(title, more)
    sections = [
        Section("Scores", _bars(findings)),
        *_over_edits(findings),
        *_by_age(findings),
        Section("All numbers", table(*all_scores(findings).numbers())),
        *more,
        Section("What the numbers depend on", table(["", "value"], _origins(findings))),
    ]
    return page(title, sections, intervals_in_words(findings))


def scores_markdown(findings: Sequence[Finding], title: str = "Scores") -> str:
    """Both tables and what intervals are over, as Markdown; any text in cells stays text."""
    origins = Table(["what the numbers depend on", "value"], _origins(findings))
    tables = [scores_table(findings).numbers(), all_scores(findings).numbers(), origins]
    above = [f"# {plain(title)}\n", f"{intervals_in_words(findings)}\n"]
    return "\n".join([*above, *(part.markdown() for part in tables)])


def scores_table(findings: Sequence[Finding]) -> Table:
    """A row a model as in AlphaEdit's Table 1, the unedited ones before the others.

    Where nothing compares new and true targets, as in zsRE, the columns are recall and token
    accuracy instead. Shares in percent, with half the width of the interval.
    """
    metrics = _main_columns(findings)
    rows = [[name, *(_shown(m, of.get(m)) for m in metrics)] for name, of in _models(findings)]
    return Table(["", *metrics], rows)


def all_scores(findings: Sequence[Finding]) -> Table:
    """A row for every metric that was measured, a column a model."""
    columns = _models(findings)
    measured = [m for m in METRICS if any(m in of for _, of in columns)]
    rows = [[m, *(_shown(m, of.get(m)) for _, of in columns)] for m in measured]
    if any(f.seconds is not None for f in findings):
        blank = [""] * (len(columns) - len(findings))
        costs = ["" if f.seconds is None else f"{f.seconds:.2f}" for f in findings]
        rows.append(["processor seconds an edit", *blank, *costs])
    return Table(["metric", *(name for name, _ in columns)], rows)


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


def _level(found: Finding) -> float:
    judging = found.origin.get("judging", {})
    level = judging.get("level", 0.95) if isinstance(judging, Mapping) else 0.95
    return level if isinstance(level, float) and math.isfinite(level) else 0.95


def _main_columns(findings: Sequence[Finding]) -> list[str]:
    """Of the paper's Table 1; where fewer than two of these were measured, recall and tokens."""
    measured = {metric for found in findings for metric in found.final}
    columns = [metric for metric in TABLE_1 if metric in measured]
    if len(columns) < 2:
        columns += [metric for metric in RECALL if metric in measured]
    return columns or sorted(measured)[: len(TABLE_1)]


def _models(findings: Sequence[Finding]) -> list[tuple[str, Mapping[str, Estimate]]]:
    """The unedited models, then the others, each with its metrics."""
    return [*_unedited(findings), *((f.name, f.final) for f in findings)]


def _unedited(findings: Sequence[Finding]) -> list[tuple[str, Mapping[str, Estimate]]]:
    """The unedited models, each once; with the source's name where they differ."""
    distinct: dict[str, tuple[str, Mapping[str, Estimate]]] = {}
    for found in findings:
        if found.before:
            key = json.dumps(estimates_to_json(found.before), sort_keys=True)
            distinct.setdefault(key, (f"{UNEDITED}, {found.name}", found.before))
    models = list(distinct.values())
    return [(UNEDITED, models[0][1])] if len(models) == 1 else models


def _shown(metric: str, estimate: Estimate | None) -> str:
    """A metric with half the width of its interval, in percent where it is a share."""
    return "" if estimate is None else with_half(estimate, *_scale_of(metric))


def _scale_of(metric: str) -> tuple[float, int]:
    """What a metric is multiplied with to be shown, and its digits after the point."""
    return (100, 1) if METRICS.get(metric) == PERCENT else (1, DIGITS.get(metric, 2))


def _bars(findings: Sequence[Finding]) -> Markup:
    """A chart a metric, a bar a model."""
    charts = []
    main = _main_columns(findings)
    for metric in dict.fromkeys([*(m for m in METRICS if m in main), *_beside(findings)]):
        models = [(*model, UNEDITED_COLOUR) for model in _unedited(findings)]
        models += [(f.name, f.final, 0) for f in findings]
        bars = [(name, of[metric], colour) for name, of, colour in models if metric in of]
        note = " (lower is better)" if metric in LOWER_IS_BETTER else ""
        scale, digits = _scale_of(metric)
        full = 1.0 if METRICS[metric] == PERCENT else None
        title = _caption(metric) + note
        charts.append(interval_bars(title, bars, scale=scale, digits=digits, full=full))
    return side_by_side(charts)


def _beside(findings: Sequence[Finding]) -> list[str]:
    """What is drawn beside the main columns; shares of tokens only where recall is not there."""
    measured = {metric for found in findings for metric in found.final}
    doubled = {m for m in measured if m.replace("_tokens", "_recall") in measured - {m}}
    return [metric for metric in RECALL if metric in measured - doubled]


def _caption(metric: str) -> str:
    return metric.replace("_", " ") + (", %" if METRICS.get(metric) == PERCENT else "")


def _over_edits(findings: Sequence[Finding]) -> list[Section]:
    """Curves of metrics over the edits made."""
    charts = []
    for metric in (*TABLE_1, *_beside(findings)):
        courses = {
            f.name: [(edits, e if edits else _exact(e.value)) for edits, e in f.course[metric]]
            for f in findings
            if f.course.get(metric)
        }
        if courses:
            title, x_label = _caption(metric), "edits made"
            scale, ends = (100, (0.0, 100.0)) if METRICS[metric] == PERCENT else (1, None)
            charts.append(course_chart(title, courses, x_label=x_label, scale=scale, y_range=ends))
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
    for metric in dict.fromkeys(m for f in findings for m, v in f.by_batch.items() if len(v) > 1):
        lines = {
            f.name: [(i, _exact(value)) for i, value in enumerate(f.by_batch[metric], start=1)]
            for f in findings
            if metric in f.by_batch
        }
        title, x_label = metric.replace("_", " ") + ", %", "batch, the oldest first"
        charts.append(course_chart(title, lines, x_label=x_label, scale=100, y_range=(0.0, 100.0)))
        rows += [
            (metric, name, *(f"{100 * points[i][1].value:.1f}" for i in (0, -1)))
            for name, points in lines.items()
        ]
    if not charts:
        return []
    listed = table(["metric", "method", ">oldest batch, %", ">latest batch, %"], rows)
    text = "Every edit judged after the last batch, by the batch that it was made in."
    return [Section("By age of the edits", Markup(side_by_side(charts) + listed + paragraph(text)))]


def _exact(value: float) -> Estimate:
    """A value that is drawn without an interval."""
    return Estimate(value, value, value, 0)


def _origins(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    """What the numbers depend on: what all share once, the rest with the finding's name."""
    flat = {found.name: dict(_flat(found.origin)) for found in findings}
    rows = []
    for name in dict.fromkeys(name for values in flat.values() for name in values):
        values = {values.get(name) for values in flat.values()}
        if len(values) == 1:
            rows.append((name, str(next(iter(values)))))
        else:
            rows += [(f"{f}: {name}", own[name]) for f, own in flat.items() if name in own]
    sources = ", ".join(dict.fromkeys(found.source for found in findings))
    return [("read from", sources), *rows]


def _flat(values: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{name}.")
        elif isinstance(value, list) and value:
            rest = f" and {len(value) - NESTED} more" if len(value) > 2 * NESTED else ""
            yield f"{path}{name}", ", ".join(map(str, value[:NESTED] if rest else value)) + rest
        elif value not in (None, {}, []):
            yield f"{path}{name}", str(value)
