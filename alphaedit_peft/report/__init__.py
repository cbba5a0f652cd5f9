"""Pages for people: one self-contained HTML file with tables and plots, of packs and evaluations.

In: values. Out: HTML as text. ``html`` has the project's one template, ``svg`` and ``charts`` the
plots, as pure functions without any library; ``pack`` puts a pack's page together from them,
``scores_page`` that of an evaluation, ``record_page`` that of a record, ``shift`` a picture of
hidden states. A page asks the network for nothing, and every text in it is escaped.
"""

from alphaedit_peft.report.charts import course_chart, interval_bars, scatter_chart
from alphaedit_peft.report.findings import Finding, read_findings
from alphaedit_peft.report.html import Markup, Section, facts, page, paragraph, source, table
from alphaedit_peft.report.pack import pack_page
from alphaedit_peft.report.record import PARTS, Answer, Prompt, ask, prompts_of
from alphaedit_peft.report.record_page import record_page
from alphaedit_peft.report.scores import (
    all_scores,
    intervals_in_words,
    scores_markdown,
    scores_table,
)
from alphaedit_peft.report.scores_page import scores_page
from alphaedit_peft.report.shift import Shift, last_states, pack_shift, shift_between, shift_section
from alphaedit_peft.report.svg import bar_chart, heat_map, line_chart, spectrum_chart

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
