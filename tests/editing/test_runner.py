"""Where the time goes: phases add up, none is counted twice, and the report says them."""

from __future__ import annotations

import time

import pytest

from alphaedit_peft import NullSpace, get_alphaedit_model
from alphaedit_peft.editing.edit_report import in_words
from alphaedit_peft.editing.runner import PHASES, Phases
from tests.conftest import tiny_model
from tests.editing.test_batch import EDITS, settings

PAUSE = 0.03


def test_a_phase_within_another_is_not_counted_twice():
    phases = Phases()
    began = time.perf_counter()
    with phases.timed("keys"):
        time.sleep(PAUSE)
        with phases.timed("solve"):
            time.sleep(2 * PAUSE)
        time.sleep(PAUSE)
    took = time.perf_counter() - began
    assert phases.seconds["keys"] >= 2 * PAUSE
    assert phases.seconds["solve"] >= 2 * PAUSE
    assert sum(phases.seconds.values()) <= took


def test_the_time_of_a_block_that_fails_counts():
    phases = Phases()
    with pytest.raises(ValueError, match="sleep length"), phases.timed("write"):
        time.sleep(PAUSE) or time.sleep(-1)
    assert phases.seconds["write"] >= PAUSE
    time.sleep(PAUSE)
    with phases.timed("score"):
        pass
    assert phases.seconds["score"] < PAUSE


def test_an_unknown_phase():
    with (
        pytest.raises(ValueError, match="phase 'lunch' is unknown; use one of"),
        Phases().timed("lunch"),
    ):
        pass


def test_the_longest_phase_comes_first():
    assert in_words({"keys": 1.04, "targets": 9.1, "write": 0.0}) == (
        "10.1 s: targets 9.1, keys 1.0, write 0.0"
    )


def test_a_report_has_the_time_of_the_whole_call(tokenizer):
    space = NullSpace.identity({0: 96, 1: 96})
    model = get_alphaedit_model(
        tiny_model("gpt2"), settings(), tokenizer=tokenizer, null_space=space
    )
    began = time.perf_counter()
    report = model.edit(EDITS, batch_size=2, progress=False)
    took = time.perf_counter() - began
    assert tuple(report.seconds) == PHASES
    assert 0.5 * took < sum(report.seconds.values()) <= took
    assert all(report.seconds[name] > 0 for name in PHASES)
    assert report.to_json()["seconds"] == report.seconds
    assert in_words(report.seconds) in str(report)
