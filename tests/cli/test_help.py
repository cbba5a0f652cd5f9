"""Help, version and usage: quick, complete, and with the exit codes that shells expect."""

import subprocess
import sys

import pytest

import alphaedit_peft
from alphaedit_peft.cli import app

COMMANDS = tuple(command.name or command.callback.__name__ for command in app.registered_commands)


def test_the_commands_are_those_of_the_readers_guides():
    pairs = {f"nullspace {word}" for word in ("import", "push", "pull")}
    assert {
        *("demo", "nullspace", "edit", "inspect", "merge", "rollback"),
        *("remove", "join", "compress", "export", "push", "pull", "benchmark"),
    } | pairs <= set(COMMANDS)


def test_help_names_every_command_and_the_way_to_begin(run):
    text = run("--help").stdout
    assert all(command in text for command in COMMANDS)
    assert "alphaedit demo" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_with_an_example(run, command):
    text = run(*command.split(), "--help").stdout
    assert f"alphaedit {command}" in text.partition("Options")[0]
    assert "--json" in text


def test_help_loads_neither_torch_nor_transformers():
    check = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from alphaedit_peft.cli import app\n"
        "assert CliRunner().invoke(app, ['edit', '--help']).exit_code == 0\n"
        "assert not {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_version(shell):
    done = shell("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"alphaedit {alphaedit_peft.__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["edti"],
        ["edit"],
        ["edit", "embedded"],
        ["edit", "embedded", "e.jsonl", "--out", "p", "--batch-size", "0"],
        ["edit", "embedded", "e.jsonl", "--out", "p", "--layers", "two"],
        ["edit", "embedded", "e.jsonl", "--out", "p", "--layers", "5-3"],
        ["edit", "embedded", "e.jsonl", "--out", "p", "--set", "ridge"],
        ["nullspace", "some/model", "--out", "ns"],
        ["nullspace", "embedded", "--out", "ns", "--texts", "a", "--dataset", "b"],
        ["rollback", "embedded", "p", "--out", "q", "--batches", "0"],
        ["merge", "embedded", "p", "--out", "q", "--dtype", "int8"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_exits_with_two(run, words):
    result = run(*words, code=2)
    assert "Usage" in result.output
