"""A table as plain text and as Markdown."""

from __future__ import annotations

from alphaedit_peft.tables import Table, cell

FOUND = Table(["metric", "P"], [["recall", 0.123456], ["a|b", None], ["said", True]])


def test_text_sets_the_first_column_to_the_left_and_the_others_to_the_right():
    assert FOUND.text().splitlines() == [
        "metric       P",
        "recall  0.1235",
        "a|b",
        "said       yes",
    ]


def test_markdown_marks_columns_to_the_right_and_keeps_text_text():
    lines = Table(["x", ">y"], [["a|*b*", "1\n2"]]).markdown().splitlines()
    assert lines == ["| x | y |", "|---|---:|", "| a\\|\\*b\\* | 1 2 |"]


def test_numbers_stand_to_the_right_of_what_they_are_of():
    assert FOUND.numbers() == (["metric", ">P"], FOUND.rows)


def test_nothing_is_shown_as_one_says():
    assert (cell(None), cell(None, "-"), cell(False), cell(7)) == ("", "-", "no", "7")
