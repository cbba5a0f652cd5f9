"""How far work is: in words from counts and times, as lines now and then, and as a bar."""

from __future__ import annotations

import logging
import sys
import threading

import pytest

from alphaedit_peft import parallel, progress
from alphaedit_peft.progress import Lines, counting, span


def lines(*, total: int | None, seconds: float, **counts: int) -> str:
    """What is told after some seconds."""
    clock = iter([100.0, 100.0 + seconds]).__next__
    found = Lines("key moments", total, "token", clock)
    found.initial = counts.get("initial", 0)
    found.update(found.initial)
    found.update(counts.get("fresh", 0))
    return str(found)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("0 of 2,000 tokens, 30 s so far", {"total": 2000, "seconds": 30}),
        ("600 of 2,000 tokens, 20 a second, about 70 s left", {"total": 2000, "fresh": 600}),
        ("15 of 20 tokens, 2 s each, about 10 s left", {"total": 20, "fresh": 15}),
        ("1 of 1 token, 30 s each, about 0 s left", {"total": 1, "fresh": 1}),
        ("90 tokens, 3.0 a second, 30 s so far", {"total": None, "fresh": 90}),
        ("700 of 900 tokens, 20 a second, about 10 s left", {"total": 900, "fresh": 600}),
    ],
)
def test_done_total_rate_and_time_left(words, options):
    initial = 100 if words.startswith("700") else 0
    assert lines(initial=initial, **{"seconds": 30, **options}) == f"key moments: {words}"


def test_a_time_is_said_in_its_unit():
    assert [span(n) for n in (-1, 3.4, 89, 90, 5000, 9000)] == (
        ["0 s", "3 s", "89 s", "2 min", "83 min", "2.5 h"]
    )


class Heard(logging.Handler):
    """Keeps records; ``event`` is set by the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.texts, self.event = [], threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
        if len(self.texts) > 1:
            self.event.set()


@pytest.fixture
def heard(monkeypatch):
    """What is recorded where nobody watches and half a minute is a moment."""
    found = Heard()
    monkeypatch.setattr(progress, "EVERY", 1e-3)
    monkeypatch.setattr(progress, "watched", lambda: False)
    progress.LOGGER.addHandler(found)
    yield found
    progress.LOGGER.removeHandler(found)
    progress.LOGGER.setLevel(logging.NOTSET)


def test_lines_come_now_and_then_where_they_are_asked_for(heard):
    before = threading.active_count()
    progress.LOGGER.setLevel(logging.INFO)
    with counting("edits", 3, "edit") as bar:
        bar.update(2)
        assert heard.event.wait(60)
    assert threading.active_count() == before
    assert heard.texts[-1].startswith("edits: 2 of 3 edits, ")
    with counting("edits", 3, "edit", shown=False):
        assert threading.active_count() == before


def test_the_library_tells_nothing_by_itself(heard, capsys):
    before = threading.active_count()
    with counting("edits", 3, "edit") as bar:
        bar.update(1)
        assert threading.active_count() == before
    assert heard.texts == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("main", [True, False])
def test_a_bar_where_someone_watches_the_main_process(main, monkeypatch, capsys):
    monkeypatch.setattr(progress, "watched", lambda: True)
    monkeypatch.setattr(parallel, "is_main", lambda: main)
    with counting("edits", 3, "edit") as bar:
        bar.update(3)
    with counting("settings", 3, "setting", bar=False) as bar:
        bar.update(1)
    text = capsys.readouterr().err
    assert ("edits: 100%" in text) == main
    assert "settings" not in text


def test_a_terminal_and_a_notebook_are_watched(monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        assert progress.watched() is terminal
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert progress.watched()
