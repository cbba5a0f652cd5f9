"""Try many mutations of each kind by hand: ``python -m tests.fuzz --cases 5000 [--kind pack]``."""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time
from functools import partial

from tests.fuzz.kinds import KINDS
from tests.fuzz.trial import Trial

MOST = 20  # failures of a kind that are shown
say = partial(print, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=5000, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--kind", choices=sorted(KINDS), action="append", help="only these")
    given = parser.parse_args()
    faulthandler.enable()
    failed = 0
    say(f"{'kind':<14}{'cases':>7}{'loaded':>8}{'refused':>9}{'failed':>8}{'slowest':>9}")
    for name in given.kind or KINDS:
        with Trial(name) as trial:
            counts = {"loaded": 0, "refused": 0, "failed": 0}
            slowest = 0.0
            for number in range(given.first, given.first + given.cases):
                begun = time.perf_counter()
                try:
                    counts[trial.case(number)] += 1
                except Exception as error:
                    counts["failed"] += 1
                    if counts["failed"] > MOST:
                        continue
                    say(f"  {name} {number}: {type(error).__name__}: {str(error)[:600]}")
                took = time.perf_counter() - begun
                if took > 1:
                    say(f"  {name} {number} took {took:.1f} seconds")
                slowest = max(slowest, took)
        failed += counts["failed"]
        numbers = "".join(f"{n:>{w}}" for n, w in zip(counts.values(), (8, 9, 8), strict=True))
        say(f"{name:<14}{given.cases:>7}{numbers}{slowest:>8.2f}s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
