"""The bootstrap: known cases, seeds, coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from alphaedit_peft.evaluation.summary import bootstrap


def test_equal_values_leave_no_doubt():
    found = bootstrap([0.5] * 7)
    assert (found.value, found.low, found.high, found.n) == (0.5, 0.5, 0.5, 7)


def test_the_same_seed_gives_the_same_bounds_and_another_does_not():
    values = np.random.default_rng(0).normal(size=40).tolist()
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)


def test_bounds_of_a_share_are_those_of_the_binomial():
    found = bootstrap([1.0] * 50 + [0.0] * 50, resamples=4000)
    deviation = 1.96 * math.sqrt(0.25 / 100)
    assert found.value == 0.5
    assert found.low == pytest.approx(0.5 - deviation, abs=0.015)
    assert found.high == pytest.approx(0.5 + deviation, abs=0.015)


def test_a_statistic_is_taken_of_the_means():
    rows = [[1.0, 2.0], [3.0, 4.0]]
    found = bootstrap(rows, lambda m: m[:, 0] / m[:, 1])
    assert found.value == pytest.approx(2 / 3)
    assert found.low == pytest.approx(1 / 2)
    assert found.high == pytest.approx(3 / 4)


def test_a_wider_level_gives_a_wider_interval():
    values = list(range(30))
    wide, narrow = bootstrap(values, level=0.99), bootstrap(values, level=0.5)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, 1.0]])
def test_values_that_give_no_interval(values):
    with pytest.raises(ValueError, match=f"{len(values)} values"):
        bootstrap(values)


@pytest.mark.parametrize("ways", [{"level": 1.0}, {"level": 0.0}, {"resamples": 0}])
def test_levels_and_numbers_out_of_range(ways):
    name, value = next(iter(ways.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        bootstrap([1.0, 2.0], **ways)
