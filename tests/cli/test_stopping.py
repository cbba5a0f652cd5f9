"""Ctrl-C and SIGTERM end a command in one line; the handlers are the command line's alone."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from alphaedit_peft.cli import printing
from alphaedit_peft.cli.stopping import stoppable

BOTH = [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")]


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))
    time.sleep(0.01)  # Python's handler runs at the next instruction


@pytest.mark.parametrize(("name", "status", "word"), BOTH)
def test_a_signal_ends_the_block_and_the_handlers_come_back(capsys, name, status, word):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as ended, stoppable(), stoppable():
        send(name)
    assert ended.value.code == status
    assert capsys.readouterr().err == f"alphaedit: {word}\n"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_sigterm_does_not_break_what_the_first_has_saved(capsys):
    saved = []

    @stoppable()
    def command():
        try:
            send("SIGTERM")
        except KeyboardInterrupt:
            send("SIGTERM")
            saved.append("all")
            raise

    with pytest.raises(SystemExit, match="143"):
        command()
    assert saved == ["all"]


def test_a_signal_in_a_finalizer_is_not_lost(capsys):
    class Finalized:
        def __del__(self):
            send("SIGTERM")

    @stoppable()
    def command():
        Finalized()
        time.sleep(5)

    with pytest.raises(SystemExit, match="143"):
        command()
    assert capsys.readouterr().err == "alphaedit: terminated\n"


def test_what_the_parent_ignores_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stoppable():
            send("SIGTERM")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_a_thread_there_are_no_handlers():
    seen = []

    def work():
        with stoppable():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status", "word"), BOTH)
@pytest.mark.parametrize("module", ["alphaedit_peft.cli.commands", "alphaedit_peft.edits"])
def test_while_modules_are_imported(name, status, word, module):
    # the process sends itself the signal when the module is looked for
    code = f"""
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.{name})
sys.meta_path.insert(0, Finder())
sys.argv = ["alphaedit", "edit", "embedded", "edits.jsonl", "--out", "pack"]
from alphaedit_peft.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (status, f"alphaedit: {word}\n")


def test_a_full_disk_under_standard_output_is_named(monkeypatch):
    def full(text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.stdout, "write", full)
    with pytest.raises(OSError, match=r"standard output: No space left on device"):
        printing.show(True, {})
