"""Results files: finished lines are never written again, and one process at a time adds some."""

from __future__ import annotations

import pytest

from alphaedit_peft import Edit, saving
from alphaedit_peft.evaluation import Case, evaluate
from alphaedit_peft.evaluation.results import JsonLines
from tests.evaluation.models import Uniform

CASE = Case(Edit("Rome", "The capital of {} is", "Oslo", target_true="Pisa"))


@pytest.fixture
def file(tmp_path):
    made = JsonLines(tmp_path / "results.jsonl", "judging", {"way": 1})
    assert made.read() == []
    made.add([{"case": 1}])
    return made


def test_a_cut_line_goes_and_the_lines_before_it_are_not_written_again(file, full_disk):
    before = file.path.stat().st_ino
    with file.path.open("a") as end:
        end.write('{"case": 2')
    assert file.read() == [{"case": 1}]
    assert file.path.read_text() == '{"judging": {"way": 1}}\n{"case": 1}\n'
    assert file.path.stat().st_ino == before


def test_lines_that_do_not_fit_on_the_disk_leave_no_half_and_are_said(file, full_disk):
    with pytest.raises(OSError, match=r"saving .*results\.jsonl failed: File too large"):
        file.add([{"case": 2}, {"case": "x" * 5000}])
    assert file.read() == [{"case": 1}]


def test_another_process_at_the_same_file_is_refused(tokenizer, tmp_path):
    path = tmp_path / "results.jsonl"
    with (
        saving.alone(path),
        pytest.raises(BlockingIOError, match=r"results\.jsonl is being written by process \d+ on"),
    ):
        evaluate(Uniform(), tokenizer, [CASE], results=path)
    evaluate(Uniform(), tokenizer, [CASE], results=path)
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]
