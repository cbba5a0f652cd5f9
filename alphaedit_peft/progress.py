"""How far long work is: a bar where someone watches, a line every half minute where nobody does.

In: what is done, of how many. Out: on a terminal and in a notebook tqdm's bar; elsewhere a record
of this module's logger every ``EVERY`` seconds with what is done, the rate and the time left. Such
records are not shown unless a program asks for them, as the command line does.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm.auto import tqdm

from alphaedit_peft import parallel

LOGGER = logging.getLogger(__name__)
EVERY = 30.0  # seconds
LONG = 90  # seconds, or minutes, from which on the next larger unit is told


class Bar(Protocol):
    """What is told of work done: ``initial`` steps were there before it began."""

    initial: int
    total: int | None

    def update(self, n: int) -> None:
        """Add so many steps."""


class Lines:
    """Steps counted, and how far they are in words."""

    def __init__(
        self, what: str, total: int | None, unit: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.what, self.total, self.unit, self.clock = what, total, unit, clock
        self.begun = clock()
        self.initial = self.done = 0

    def update(self, n: int) -> None:
        """Add so many steps."""
        self.done += n

    def __str__(self) -> str:
        seconds, fresh = self.clock() - self.begun, self.done - self.initial
        so_far, last = f"{span(seconds)} so far", self.done if self.total is None else self.total
        of = "" if self.total is None else f"{self.done:,} of "
        of += f"{last:,} {self.unit}{'' if last == 1 else 's'}"
        if fresh <= 0 or seconds <= 0:
            return f"{self.what}: {of}, {so_far}"
        rate = fresh / seconds
        pace = f"{1 / rate:.3g} s each"
        if rate >= 1:
            pace = f"{rate:,.{0 if rate >= 10 else 1}f} a second"
        left = f"about {span((last - self.done) / rate)} left"
        return f"{self.what}: {of}, {pace}, {so_far if self.total is None else left}"


def span(seconds: float) -> str:
    """A time in the unit that one would say it in."""
    if seconds < LONG:
        return f"{max(0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 60 * LONG else f"{seconds / 3600:.1f} h"


def watched() -> bool:
    """Whether someone looks at stderr while the program runs: a terminal, or a notebook."""
    return "ipykernel" in sys.modules or sys.stderr.isatty()


@contextmanager
def counting(
    what: str, total: int | None, unit: str, *, shown: bool = True, bar: bool = True
) -> Iterator[Bar]:
    """Count steps of work; of several processes the main one tells of them.

    Args:
        what: is done, in a word or two.
        total: steps; None where it is not known.
        unit: of a step, in the singular.
        shown: whether anything is told at all.
        bar: whether there is a bar where someone watches.
    """
    shown = shown and parallel.is_main()
    if shown and bar and watched():
        with tqdm(total=total, desc=what, unit=unit) as found:
            yield found
        return
    lines, over = Lines(what, total, unit), threading.Event()

    def tell() -> None:
        while not over.wait(EVERY):
            LOGGER.info("%s", lines)

    if not shown or watched() or not LOGGER.isEnabledFor(logging.INFO):
        yield lines
        return
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        over.set()
        thread.join()
