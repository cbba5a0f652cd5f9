"""Pages for people: one self-contained HTML file with tables and plots, of packs and evaluations.

In: values. Out: HTML as text. ``page`` has the project's one template, ``charts`` the plots;
``pack_page`` puts a pack's page together, ``scores_page`` that of an evaluation, ``record_page``
that of a record, ``shift`` a picture of hidden states. A page asks the network for nothing, and
every text in it is escaped.
"""

from typing import TYPE_CHECKING

from alphaedit_peft.report.charts import (
    bar_chart,
    course_chart,
    heat_map,
    interval_bars,
    line_chart,
    scatter_chart,
    spectrum_chart,
)
from alphaedit_peft.report.pack_page import pack_page
from alphaedit_peft.report.page import Markup, Section, facts, page, paragraph, source, table
from alphaedit_peft.report.record_page import PARTS, Answer, Prompt, ask, prompts_of, record_page
from alphaedit_peft.report.scores_page import (
    all_scores,
    intervals_in_words,
    scores_markdown,
    scores_page,
    scores_table,
)
from alphaedit_peft.report.shift import Shift, last_states, pack_shift, shift_between, shift_section

if TYPE_CHECKING:
    from alphaedit_peft.report.findings import Finding, read_findings

__all__ = [
    "PARTS",
    "Answer",
    "Finding",
    "Markup",
    "Prompt",
    "Section",
    "Shift",
    "all_scores",
    "ask",
    "bar_chart",
    "course_chart",
    "facts",
    "heat_map",
    "interval_bars",
    "intervals_in_words",
    "last_states",
    "line_chart",
    "pack_page",
    "pack_shift",
    "page",
    "paragraph",
    "prompts_of",
    "read_findings",
    "record_page",
    "scatter_chart",
    "scores_markdown",
    "scores_page",
    "scores_table",
    "shift_between",
    "shift_section",
    "source",
    "spectrum_chart",
    "table",
]


def __getattr__(name: str) -> object:
    if name not in ("Finding", "read_findings"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from alphaedit_peft.report import findings  # with all that compares methods, so only when used

    return getattr(findings, name)
