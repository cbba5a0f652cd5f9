"""Ctrl-C and SIGTERM at the command line: what is finished is kept; one line; status 130 or 143.

In: signals. Out: in the commands a ``KeyboardInterrupt``, as Python makes it of Ctrl-C, so that
what keeps finished work does it for both; at the end the line and the exit status. The library has
no handlers.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
NOT_TAKEN = (signal.SIG_IGN, None)  # the parent wants it ignored; None: handled outside Python


class Stopped(KeyboardInterrupt):
    """One of the two signals, with its ``number``."""

    number = int(signal.SIGINT)


@contextmanager
def stoppable(*, for_good: bool = False) -> Iterator[None]:
    """Raise :class:`Stopped` on both signals within the block, and end in one line.

    With ``for_good`` they are ignored afterwards, while the process goes to its end.

    Raises:
        SystemExit: 128 and the signal's number, as shells have it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: h for n in SAID if (h := signal.getsignal(n)) not in NOT_TAKEN}
    for number in before:
        signal.signal(number, _stop)
    hook, sys.unraisablehook = sys.unraisablehook, _send_again
    try:
        yield
    except KeyboardInterrupt as stopped:
        _ignore(before)
        for_good = for_good or _stop in before.values()  # within another such block
        number = getattr(stopped, "number", signal.SIGINT)
        sys.stderr.write(f"alphaedit: {SAID[signal.Signals(number)]}\n")
        raise SystemExit(128 + number) from None
    finally:
        sys.unraisablehook = hook
        _ignore(before)
        for number, handler in () if for_good else before.items():
            signal.signal(number, handler)


def _ignore(numbers: Iterable[int]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def _stop(number: int, frame: object) -> None:
    if number == signal.SIGTERM:  # once is enough: what is finished is being saved
        signal.signal(number, signal.SIG_IGN)
    stopped = Stopped()
    stopped.number = number
    raise stopped


def _send_again(lost: Any) -> None:
    """Where a signal fell into what can raise nothing, such as ``__del__``, it comes anew."""
    if not issubclass(lost.exc_type, Stopped):
        sys.__unraisablehook__(lost)
        return
    signal.signal(lost.exc_value.number, _stop)
    threading.Timer(0.01, os.kill, [os.getpid(), lost.exc_value.number]).start()
