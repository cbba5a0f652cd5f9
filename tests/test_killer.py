"""Commands killed at random moments leave what is whole, and the next run ends as any does."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.killer import killing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals"),
]


def test_commands_killed_at_random_moments(weights):
    with killing(seed=0) as (killer, found):
        for name, command in found.items():
            whole = killer.whole(command)
            before = Counter(killer.counts)
            while sum((killer.counts - before).values()) < 3:
                killer.kill(name, command, *whole)
