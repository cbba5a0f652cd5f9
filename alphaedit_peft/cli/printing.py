"""Print a command's findings: tables and sentences for people, one JSON value for programs.

In: plain values. Out: text on stdout. Cells are shown as they are: what looks like markup in an
edit's text is not read as such.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from alphaedit_peft import messages
from alphaedit_peft.cli.stopping import stoppable
from alphaedit_peft.tables import cell
from alphaedit_peft.tables import count as count

WIDE = 24  # characters that a prompt gets, however narrow the terminal
DECIDED = "Settings that auto decided", ("setting", "value", "reason")


def show(as_json: bool, values: Any, *parts: Table | str) -> None:
    """Print ``values`` as JSON, or the parts, tables and plain sentences, for people.

    Of several processes (``accelerate launch``) the main one prints.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        _show(as_json, values, parts)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"standard output: {error.strerror}") from error


def _show(as_json: bool, values: Any, parts: Sequence[Table | str]) -> None:
    if as_json:
        sys.stdout.write(json_text(values, 2))
        return
    console = Console(file=sys.stdout, highlight=False)
    for part in parts:
        if isinstance(part, Table):
            _fit(part, console)
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
        )
    for row in rows:
        found.add_row(*(Text(cell(value)) for value in row))
    return found


def filled(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]
) -> list[Table | str]:
    """A table, or nothing where it has no rows."""
    return [table(title, columns, rows)] if rows else []


def _fit(found: Table, console: Console) -> None:
    """Narrow the prompts of a table that is too wide, down to ``WIDE``, before other columns."""
    endless = console.options.update(width=10**6)
    excess = Measurement.get(console, endless, found).maximum - console.width
    for column in found.columns:
        if excess > 0 and str(column.header) == "prompt":
            longest = max(
                (cell.cell_len for cell in column.cells if isinstance(cell, Text)), default=0
            )
            column.width = max(min(WIDE, longest), longest - excess)


def tables(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[Table]:
    """One table, or several below each other where the terminal is too narrow for one.

    The first column stands in each of them; the title only in the first.
    """
    texts = [columns, *([cell(value) for value in row] for row in rows)]
    first, *widths = (
        max(len(text.lstrip(">")) for text in column) + 2 for column in zip(*texts, strict=True)
    )
    parts: list[list[int]] = [[]]
    left = room = Console(file=sys.stdout).width - first
    for i, width in enumerate(widths, start=1):
        if width > left and parts[-1]:
            parts.append([])
            left = room
        parts[-1].append(i)
        left -= width
    return [
        table(
            title if not n else "",
            [columns[i] for i in (0, *part)],
            [[row[i] for i in (0, *part)] for row in rows],
        )
        for n, part in enumerate(parts)
    ]


def probability(value: float | None) -> str:
    """A probability with three decimals; empty where it was not measured."""
    return "" if value is None else f"{value:.3f}"


def json_text(values: Any, indent: int = 1) -> str:
    """Values as JSON, with a line break at the end."""
    return json.dumps(finite(values), indent=indent, allow_nan=False) + "\n"


def finite(values: Any) -> Any:
    """JSON values in which NaN and infinity, which JSON does not know, are null."""
    if isinstance(values, dict):
        return {str(name): finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


@contextmanager
def kept(path: Path | None) -> Iterator[None]:
    """Where a signal ends the block, say that the command can go on from the file or folder."""
    try:
        yield
    except KeyboardInterrupt:
        if path is not None and path.exists():
            say(f"stopped; what is finished is in {path}, and the same command goes on from there")
        raise


def progress(text: str) -> None:
    """Print a line on stderr where someone watches it; elsewhere lines come now and then."""
    from alphaedit_peft.progress import watched  # which imports torch

    if watched():
        say(text)


class Told(logging.Handler):
    """Prints what the package records of its progress: a line on stderr, above a bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stderr):
            say(one_line(record.getMessage()))


@contextmanager
def records_told() -> Iterator[None]:
    """Show what the package records while a command runs."""
    logger, told = logging.getLogger("alphaedit_peft"), Told()
    before = logger.level
    logger.addHandler(told)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(told)
        logger.setLevel(before)


EXPECTED = (ValueError, RuntimeError, OSError, ImportError)  # PackError is a ValueError
# bitsandbytes tells here, when it is imported, that an optional faster kernel is not installed;
# PEFT imports it wherever it is installed, also for bases that are not quantised
OPTIONAL_KERNEL = ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")


# left when the command at work ends
AT_WORK: ContextVar[ExitStack] = ContextVar("at_work")


def until_the_end(manager: AbstractContextManager[Any]) -> None:
    """Enter a context that is left when the command at work ends; nothing where there is none."""
    if (stack := AT_WORK.get(None)) is not None:
        stack.enter_context(manager)


class CommandGroup(TyperGroup):
    """The group of commands, which turns what they raise into one line."""

    def make_context(self, *words: Any, **options: Any) -> Any:
        """Read the command line, which a signal ends as it does the command itself."""
        with stoppable(), errors_in_one_line():
            return super().make_context(*words, **options)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line; from here on stdout takes any text, that of ``--help`` too."""
        if isinstance(sys.stdout, io.TextIOWrapper):  # a console's encoding may lack characters
            sys.stdout.reconfigure(errors="replace")
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command by its first two words, such as ``nullspace import``, or by one."""
        both = " ".join(args[:2])
        if len(args) > 1 and both in self.commands:
            return both, self.commands[both], args[2:]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command asked for."""
        told = nullcontext() if ctx.params.get("traceback") else errors_in_one_line()
        with told, ExitStack() as at_work, stoppable(), warnings_in_one_line():
            at_work.callback(AT_WORK.reset, AT_WORK.set(at_work))
            at_work.enter_context(optional_kernel_unmentioned())
            at_work.enter_context(records_told())
            return super().invoke(ctx)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Say what is ``EXPECTED`` in one line, and end with status 1."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except EXPECTED as error:
        say(one_line(error))
        raise typer.Exit(1) from error


def say(text: str) -> None:
    """Print a line on stderr under the program's name."""
    sys.stderr.write(f"alphaedit: {text}\n")  # which escapes what its encoding lacks


def one_line(error: object) -> str:
    """An error's message without line breaks or escapes for the terminal; else its type."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else f"{error.filename}: "
        text = f"{name}{error.strerror}"
    text = text.encode(errors="backslashreplace").decode()  # a file's name may be no UTF-8
    return messages.one_line(text) or type(error).__name__


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Show warnings meant for users as one line; leave out what libraries tell developers."""
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", kind)
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: say(
            f"warning: {one_line(_error(message))}"
        )
        yield


@contextmanager
def optional_kernel_unmentioned() -> Iterator[None]:
    """Drop the one line about a kernel that is optional; all else that is logged is shown."""
    name, begins = OPTIONAL_KERNEL
    logger = logging.getLogger(name)

    def other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(begins)

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _error(message: Warning | str) -> Warning:
    return message if isinstance(message, Warning) else UserWarning(message)
