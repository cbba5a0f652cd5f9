"""The one template of all pages: a title, sections, tables that can be searched; no network.

In: texts and numbers, and :class:`Markup` for what is HTML already. Out: a whole page as text, or a
piece of one as :class:`Markup`. The page carries its style and its script, and a content policy
that lets no other script run and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from alphaedit_peft.tables import cell

STACKED = 4  # tables of more columns become one block a row on narrow screens
NOTHING = "\N{EN DASH}"


class Markup(str):
    """Text that is HTML already, and goes into a page as it is; any other text is escaped."""

    __slots__ = ()


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, which its contents list, and what stands below."""

    heading: str
    html: Markup


def page(title: str, sections: Sequence[Section], lead: object = "") -> str:
    """A whole page, light or dark as the reader's system is, with a list of its sections.

    Below the title stands ``lead``: what the page is, in a sentence or two.
    """
    script = _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    contents, body = [], []
    for i, section in enumerate(sections, start=1):
        slug = re.sub(r"[^a-z0-9]+", "-", section.heading.lower()).strip("-")
        anchor, heading = f"{i}-{slug}", escaped(section.heading)
        contents.append(f'<a href="#{anchor}">{heading}</a>')
        body.append(f'<section id="{anchor}">\n<h2>{heading}</h2>\n{section.html}\n</section>')
    return Template(_resource("page.html")).substitute(
        title=escaped(title),
        lead=escaped(lead),
        contents="\n".join(contents),
        sections="\n".join(body),
        style=_resource("page.css"),
        script=script,
        digest=digest,
    )


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, search: str | None = None
) -> Markup:
    """A table; columns whose name begins with ``>`` are set to the right.

    Args:
        columns: their names.
        rows: one cell a column: text, a number, None, or Markup.
        search: a label such as ``Find an edit``; gives a box that leaves the rows with all of its
            words, and lets a long table scroll. ``PAGE.html#search=word`` fills the box. Without
            scripts there is no box and every row is seen.
    """
    names = [escaped(name.lstrip(">")) for name in columns]
    kinds = [' class="number"' if name.startswith(">") else "" for name in columns]
    heads = zip(names, kinds, strict=True)
    head = "".join(f'<th scope="col"{kind}>{name}</th>' for name, kind in heads)
    body = (
        "".join(
            f'<td data-name="{name}"{kind}>{escaped(value)}</td>'
            for value, name, kind in zip(row, names, kinds, strict=True)
        )
        for row in rows
    )
    stacked = " stacked" if len(columns) > STACKED else ""
    shown = f'<table class="data{stacked}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
    shown += "\n".join(f"<tr>{cells}</tr>" for cells in body) + "\n</tbody>\n</table>"
    if search is None:
        return Markup(f'<div class="wide">{shown}</div>')
    return Markup(
        f'<div class="searched">\n<p class="search" hidden><label>{escaped(search)} '
        f'<input type="search" autocomplete="off" spellcheck="false"></label> '
        f'<output></output></p>\n<div class="wide long" tabindex="0">{shown}</div>\n</div>'
    )


def facts(pairs: Iterable[tuple[str, object]]) -> Markup:
    """Names and values, as a list."""
    rows = (f"<div><dt>{escaped(n)}</dt><dd>{escaped(v)}</dd></div>" for n, v in pairs)
    return Markup(f'<dl class="facts">{"".join(rows)}</dl>')


def paragraph(text: object) -> Markup:
    """A paragraph."""
    return Markup(f"<p>{escaped(text)}</p>")


def source(code: str) -> Markup:
    """Code, set as it is."""
    return Markup(f"<pre><code>{escaped(code)}</code></pre>")


def side_by_side(pieces: Iterable[Markup]) -> Markup:
    """Charts beside each other where there is room."""
    return Markup(f'<div class="charts">{"".join(pieces)}</div>')


def escaped(value: object) -> Markup:
    """What a page shows of a value: Markup as it is, anything else as text and never as HTML.

    Floats get four significant digits, None a dash; control characters and half surrogates, which
    no HTML file can hold, become the replacement character.
    """
    if isinstance(value, Markup):
        return value
    return Markup(html.escape("".join(map(_writable, cell(value, NOTHING)))))


def _writable(character: str) -> str:
    known = character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs")
    return character if known else "\ufffd"


def _resource(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
