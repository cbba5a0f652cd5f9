"""Printing: cells as they are, numbers short, JSON that any program reads."""

import json
import logging
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alphaedit_peft import Edit, progress
from alphaedit_peft.cli import app, printing
from alphaedit_peft.cli.arguments import check_folder, parse_layers
from alphaedit_peft.pack import EditRecord
from alphaedit_peft.tables import cell
from tests.cli.conftest import write_lines
from tests.pack.conftest import make_pack

EDIT = {"subject": "Tōkyō", "prompt": "{} lies in", "target_new": "日本"}
CONSOLES = [  # whose encodings lack the characters above
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "cp1252"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


def test_cells_are_not_markup(capsys):
    printing.show(
        False, None, printing.table("[bold]t", ["prompt", ">n"], [("[red]x[/red] {}", 0.5)])
    )
    text = capsys.readouterr().out
    assert "[bold]t" in text
    assert "[red]x[/red] {}" in text


def test_a_table_too_wide_goes_on_below_with_its_first_column(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    columns = ["metric", *(f">a long name {i}" for i in range(8))]
    rows = [("efficacy", *(f"{i}{i}.0 ± 0.5" for i in range(8)))]
    found = printing.tables("Scores", columns, rows)
    printing.show(False, None, *found)
    text = capsys.readouterr().out
    assert len(found) == text.count("efficacy") == 2
    assert all(f"{i}{i}.0 ± 0.5" in text and f"a long name {i}" in text for i in range(8))
    assert text.count("Scores") == 1
    assert len(printing.tables("Scores", columns[:3], [rows[0][:3]])) == 1


def test_sentences_are_not_broken(capsys):
    printing.show(False, None, "word " * 60)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_json_has_no_nan(capsys):
    printing.show(True, {"a": float("nan"), 1: [float("inf"), (2.0, None)]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "1": [None, [2.0, None]]}


def printed(capsys, monkeypatch, table) -> str:
    """A table as a terminal of eighty columns shows it, nothing of it cut."""
    monkeypatch.setenv("COLUMNS", "80")
    printing.show(False, None, table)
    text = capsys.readouterr().out
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    return text


def test_eighty_columns_are_enough_for_the_report(capsys, monkeypatch):
    columns = ["prompt", "target", ">before", ">after", ">said", ">loss", ">steps", ">share"]
    row = ("The first language of Zoren was", "French", "0.000", "1.000", True, "0.050", 25, "1.00")
    text = printed(capsys, monkeypatch, printing.table("Edits", columns, [row]))
    assert "1.00" in text


def test_long_prompts_leave_room_for_every_other_column(capsys, monkeypatch):
    columns = ["prompt", "follow", "before", ">P", "after", ">P"]
    row = (
        "a word or two " * 5,
        "guitar",
        "instrument trumpet.",
        "0.1",
        "instrument trumpet.",
        "0.2",
    )
    text = printed(capsys, monkeypatch, printing.table("Neighbours " * 10, columns, [row]))
    assert "0.2" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (True, "yes"), (False, "no"), (0.000123456, "0.0001235"), (7, "7"), ("a", "a")],
)
def test_cells(value, text):
    assert cell(value) == text


def test_counts_and_probabilities():
    assert (printing.count(1, "edit"), printing.count(2, "edit")) == ("1 edit", "2 edits")
    assert (printing.probability(None), printing.probability(0.5)) == ("", "0.500")


@pytest.mark.parametrize(
    ("text", "layers"), [(None, None), ("4", [4]), ("4,5, 6", [4, 5, 6]), ("4-6,9", [4, 5, 6, 9])]
)
def test_layers(text, layers):
    assert parse_layers(text) == layers


def test_a_folder_below_a_file_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.touch()
    check_folder(tmp_path / "new" / "folder")
    with pytest.raises(FileExistsError, match=f"{file} is a file"):
        check_folder(Path(file) / "folder")


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A pack of one edit that no console of ``CONSOLES`` can show."""
    records = (EditRecord(Edit(**EDIT), 0, "own", 0, "x", 0.1, 0.9),)
    make_pack(1, records=records).save_pretrained(tmp_path / "pack")
    return tmp_path / "pack"


@pytest.mark.parametrize("charset", ["ascii", "cp1252", "latin-1"])
def test_characters_that_a_console_lacks_are_replaced(charset, foreign, tmp_path):
    cases = write_lines(tmp_path / "cases.jsonl", EDIT)
    console = CliRunner(charset=charset)
    for words in (["inspect", foreign], ["show", "own", cases, "--case", 0], ["--help"]):
        done = console.invoke(app, [str(word) for word in words])
        assert (done.exit_code, done.stderr) == (0, "")
        assert "T?ky?" in done.stdout or words == ["--help"]


def test_a_shell_without_a_language_sees_the_same(shell, foreign):
    done = shell("inspect", foreign, **CONSOLES[2])
    assert done.returncode == 0, done.stderr
    assert "T?ky?" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("console", CONSOLES)
def test_edits_are_made_and_shown_in_a_console_that_is_not_utf_8(shell, shown, tmp_path, console):
    edits, space = write_lines(tmp_path / "edits.jsonl", EDIT), shown[0] / "null_space"
    words = ["edit", "embedded", edits, "--null-space", space, "--steps", 2]
    done = shell(*words, "--out", tmp_path / "pack", **console)
    assert done.returncode == 0, done.stderr
    assert "T?ky?" in done.stdout
    assert "Traceback" not in done.stderr


def test_where_nobody_watches_lines_tell_how_far_a_command_is(
    run, shown, edits_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(progress, "EVERY", 1e-3)
    words = ["edit", "embedded", edits_file, "--null-space", shown[0] / "null_space", "--steps", 3]
    told = run(*words, "--out", tmp_path / "pack").stderr
    assert "alphaedit: edits: 0 of 2 edits, " in told
    assert "alphaedit: edits: 2 of 2 edits, " in told
    told = run("evaluate", "embedded", "--pack", tmp_path / "pack").stderr
    assert "alphaedit: judging: " in told
    told = run("merge", "embedded", tmp_path / "pack", "--out", tmp_path / "merged").stderr
    assert "alphaedit: merging: " in told
    assert logging.getLogger("alphaedit_peft").handlers == []
