"""Printing: cells as they are, numbers short, JSON that any program reads."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from alphaedit_peft.cli import show
from alphaedit_peft.cli.options import check_folder, parse_layers


def test_cells_are_not_markup(capsys):
    show.show(False, None, show.table("[bold]t", ["prompt", ">n"], [("[red]x[/red] {}", 0.5)]))
    text = capsys.readouterr().out
    assert "[bold]t" in text
    assert "[red]x[/red] {}" in text


def test_sentences_are_not_broken(capsys):
    show.show(False, None, "word " * 60)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_json_has_no_nan(capsys):
    show.show(True, {"a": float("nan"), 1: [float("inf"), (2.0, None)]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "1": [None, [2.0, None]]}


def test_eighty_columns_are_enough_for_the_report():
    columns = ["prompt", "target", ">before", ">after", ">said", ">loss", ">steps", ">share"]
    row = ("The first language of Zoren was", "French", "0.000", "1.000", True, "0.050", 25, "1.00")
    console = Console(width=80)
    with console.capture() as captured:
        console.print(show.table("Edits", columns, [row]))
    assert "1.00" in captured.get()
    assert "…" not in captured.get()


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (True, "yes"), (False, "no"), (0.000123456, "0.0001235"), (7, "7"), ("a", "a")],
)
def test_cells(value, text):
    assert show.number(value) == text


def test_counts_and_probabilities():
    assert (show.count(1, "edit"), show.count(2, "edit")) == ("1 edit", "2 edits")
    assert (show.probability(None), show.probability(0.5)) == ("", "0.500")


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
