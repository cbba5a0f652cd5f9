"""A table as a value, which every face shows: plain text, Markdown, rich and HTML.

In: names of columns and rows of cells. Out: text. ``cli.printing`` and ``report.page`` set the same
value in rich and in HTML.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """Names of columns, of which those that begin with ``>`` are set to the right, and rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    def numbers(self) -> Table:
        """The same table, all columns but the first set to the right."""
        first, *others = self.columns
        return Table([first, *(f">{name}" for name in others)], self.rows)

    def text(self, left: int = 1) -> str:
        """Lines of equally wide columns: the first ``left`` set to the left, others right."""
        lines = [[cell(value) for value in row] for row in (self.columns, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        set_by = [str.ljust] * left + [str.rjust] * (len(widths) - left)
        padded = (
            [put(text, n) for put, text, n in zip(set_by, row, widths, strict=True)]
            for row in lines
        )
        return "\n".join("  ".join(row).rstrip() for row in padded)

    def markdown(self) -> str:
        """A table of Markdown, in which any text stays text, with a line break at its end."""
        rules = ("---:" if name.startswith(">") else "---" for name in self.columns)
        lines = [
            _row(name.removeprefix(">") for name in self.columns),
            f"|{'|'.join(rules)}|",
            *map(_row, self.rows),
        ]
        return "".join(f"{line}\n" for line in lines)


def count(total: int, one: str, many: str = "") -> str:
    """``1 edit``, ``2 edits``."""
    return f"{total} {one if total == 1 else many or one + 's'}"


def cell(value: object, nothing: str = "") -> str:
    """A cell's text: floats with four significant digits, yes and no for bool."""
    if value is None:
        return nothing
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(plain, cells))} |"


def plain(value: object) -> str:
    """Text that Markdown shows as it is, in one line."""
    text = " ".join(str(value).split())
    return "".join("\\" + c if c in "\\|`*_[]<>#&" else c for c in text)
