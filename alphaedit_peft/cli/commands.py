"""The commands: each parses, calls one function of the package, and prints.

They import torch and transformers only when they run, so that ``--help`` is quick.
"""

from __future__ import annotations

from typing import Annotated

import typer

from alphaedit_peft.cli import (
    benchmark_command,
    compare_command,
    demo_command,
    edit_command,
    evaluate_command,
    hub_commands,
    inspect_merge_commands,
    locate_command,
    nullspace_commands,
    pack_file_commands,
    report_commands,
    tune_command,
)
from alphaedit_peft.cli.printing import CommandGroup

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


app.command()(demo_command.demo)
app.command()(nullspace_commands.nullspace)
app.command("nullspace import")(nullspace_commands.import_statistics)
app.command()(edit_command.edit)
app.command("inspect")(inspect_merge_commands.inspect_pack)
app.command()(inspect_merge_commands.merge)
app.command()(inspect_merge_commands.rollback)
app.command()(pack_file_commands.remove)
app.command()(pack_file_commands.join)
app.command()(pack_file_commands.compress)
app.command()(pack_file_commands.export)
app.command()(evaluate_command.evaluate)
app.command()(compare_command.compare)
app.command()(locate_command.locate)
app.command()(tune_command.tune)
app.command()(benchmark_command.benchmark)
app.command()(report_commands.report)
app.command("show")(report_commands.show_record)
app.command()(hub_commands.push)
app.command()(hub_commands.pull)
app.command("nullspace push")(hub_commands.push_null_space)
app.command("nullspace pull")(hub_commands.pull_null_space)
