"""Print a command's findings: tables and sentences for people, one JSON value for programs.

In: plain values. Out: text on stdout. Cells are shown as they are: what looks like markup in an
edit's text is not read as such.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDE = 24  # characters that a prompt gets, however narrow the terminal


def show(as_json: bool, values: Any, *parts: Table | str) -> None:
    """Print ``values`` as JSON, or the parts, tables and plain sentences, for people."""
    if as_json:
        sys.stdout.write(json.dumps(finite(values), indent=2, allow_nan=False) + "\n")
        return
    console = Console(file=sys.stdout, highlight=False)
    for part in parts:
        # soft: a terminal breaks long sentences itself, a pipe gets whole lines
        console.print(
            Text(part) if isinstance(part, str) else part, soft_wrap=isinstance(part, str)
        )


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table; columns whose name begins with ``>`` are set to the right, in one line."""
    found = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        show_header=any(columns),
    )
    for name in columns:
        right = name.startswith(">")
        found.add_column(
            Text(name.lstrip(">")),
            justify="right" if right else "left",
            no_wrap=right or name == "id",
            min_width=WIDE if name == "prompt" else None,
        )
    for row in rows:
        found.add_row(*(Text(number(cell)) for cell in row))
    return found


def number(value: object) -> str:
    """A cell's text: floats with four significant digits, None empty, yes and no for bool."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def probability(value: float | None) -> str:
    """A probability with three decimals; empty where it was not measured."""
    return "" if value is None else f"{value:.3f}"


def finite(values: Any) -> Any:
    """JSON values in which NaN and infinity, which JSON does not know, are null."""
    if isinstance(values, dict):
        return {str(name): finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def count(total: int, one: str, many: str = "") -> str:
    """``1 edit``, ``2 edits``."""
    return f"{total} {one if total == 1 else many or one + 's'}"


def watched() -> bool:
    """Whether someone watches stderr, so that progress bars make sense."""
    return sys.stderr.isatty()
