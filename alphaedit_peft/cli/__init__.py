"""The command ``alphaedit``.

In: a command line. Out: tables, or JSON with ``--json``, on stdout; progress, warnings and errors
on stderr; exit code 0, 1 for what cannot be done, 2 for a wrong command line, 130 after Ctrl-C, 143
after SIGTERM. The commands are imported once either can be answered.
"""

from __future__ import annotations

import os
import sys

from alphaedit_peft.cli.stopping import stoppable


def main() -> None:
    """Run the command line of this process, to its exit."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, and a file would take its number
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    with stoppable(for_good=True):
        from alphaedit_peft.cli.commands import app

        app(prog_name="alphaedit")


def __getattr__(name: str) -> object:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from alphaedit_peft.cli.commands import app

    return app
