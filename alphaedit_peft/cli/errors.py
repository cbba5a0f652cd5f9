"""What goes wrong in a command, as one line on stderr and an exit code.

In: exceptions and warnings from the library. Out: ``alphaedit: ...`` on stderr; exit code 1, or 130
after Ctrl-C. Errors that the library does not raise on purpose keep their traceback.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

EXPECTED = (ValueError, RuntimeError, OSError, ImportError)  # PackError is a ValueError
INTERRUPTED = 130
# bitsandbytes tells here, when it is imported, that an optional faster kernel is not installed;
# PEFT imports it wherever it is installed, also for bases that are not quantised
OPTIONAL_KERNEL = ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")


class CommandGroup(TyperGroup):
    """The group of commands, which turns what they raise into one line."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command by its first two words, such as ``nullspace import``, or by one."""
        both = " ".join(args[:2])
        if len(args) > 1 and both in self.commands:
            return both, self.commands[both], args[2:]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command asked for."""
        try:
            with warnings_in_one_line(), optional_kernel_unmentioned():
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except EXPECTED as error:
            if ctx.params.get("traceback"):
                raise
            say(one_line(error))
            raise typer.Exit(1) from error


def say(text: str) -> None:
    """Print a line on stderr under the program's name."""
    typer.echo(f"alphaedit: {text}", err=True)


def one_line(error: BaseException) -> str:
    """An error's message without line breaks or escapes for the terminal; else its type."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else f"{error.filename}: "
        text = f"{name}{error.strerror}"
    shown = "".join(c if c.isprintable() else " " for c in text)  # it may quote a stranger's pack
    return " ".join(shown.split()) or type(error).__name__


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
