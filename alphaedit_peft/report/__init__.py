"""Pages for people: one self-contained HTML file with tables and plots, and the page of a pack.

In: values. Out: HTML as text. ``html`` has the project's one template, ``svg`` the plots, as pure
functions without any library; ``pack`` puts a pack's page together from them. A page asks the
network for nothing, and every text in it is escaped.
"""

from alphaedit_peft.report.html import Markup, Section, facts, page, paragraph, source, table
from alphaedit_peft.report.pack import pack_page
from alphaedit_peft.report.svg import bar_chart, heat_map, line_chart, spectrum_chart

__all__ = [
    "Markup",
    "Section",
    "bar_chart",
    "facts",
    "heat_map",
    "line_chart",
    "pack_page",
    "page",
    "paragraph",
    "source",
    "spectrum_chart",
    "table",
]
