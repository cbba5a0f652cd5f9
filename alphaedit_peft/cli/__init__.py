"""The command ``alphaedit``: each command parses, calls one function of the package, and prints.

In: a command line. Out: tables, or JSON with ``--json``, on stdout; progress, warnings and errors
on stderr; exit code 0, 1 for what cannot be done, 2 for a wrong command line, 130 after Ctrl-C.
Commands import torch and transformers only when they run, so that ``--help`` is quick.
"""

from __future__ import annotations

from typing import Annotated

import typer

from alphaedit_peft.cli import (
    benchmark,
    compare,
    demo,
    edit,
    evaluate,
    foreign,
    hub,
    locate,
    nullspace,
    operations,
    packs,
    records,
    report,
    tune,
)
from alphaedit_peft.cli.errors import CommandGroup

app = typer.Typer(
    name="alphaedit",
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _version(wanted: bool) -> None:
    if wanted:
        from alphaedit_peft import __version__

        typer.echo(f"alphaedit {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
    traceback: Annotated[
        bool,
        typer.Option(
            "--traceback", envvar="ALPHAEDIT_TRACEBACK", help="Show where an error came from."
        ),
    ] = False,
) -> None:
    """Edit what a language model knows, and keep the edits as a LoRA pack.

    First time here: `alphaedit demo`. On your own model, in two steps:

    `alphaedit nullspace MODEL --texts corpus.txt --out ns`

    `alphaedit edit MODEL edits.jsonl --null-space ns --out pack`

    The pack is a standard LoRA adapter: PEFT loads it without this program. MODEL is a folder, a
    Hub id, or the word `embedded` for the small model that comes with the package.
    """


app.command()(demo.demo)
app.command()(nullspace.nullspace)
app.command("nullspace import")(foreign.import_statistics)
app.command()(edit.edit)
app.command("inspect")(packs.inspect_pack)
app.command()(packs.merge)
app.command()(packs.rollback)
app.command()(operations.remove)
app.command()(operations.join)
app.command()(operations.compress)
app.command()(operations.export)
app.command()(evaluate.evaluate)
app.command()(compare.compare)
app.command()(locate.locate)
app.command()(tune.tune)
app.command()(benchmark.benchmark)
app.command()(report.report)
app.command("show")(records.show_record)
app.command()(hub.push)
app.command()(hub.pull)
app.command("nullspace push")(hub.push_null_space)
app.command("nullspace pull")(hub.pull_null_space)
