"""Every metric against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from alphaedit_peft.evaluation import metrics
from alphaedit_peft.evaluation.summary import harmonic
from alphaedit_peft.log_probs import Reading


def reading(*probabilities: float, top: tuple[int, ...] | None = None) -> Reading:
    target = tuple(range(len(probabilities)))
    return Reading(target, tuple(map(math.log, probabilities)), top or target)


def test_a_continuation_is_taken_by_its_mean_log_probability():
    found = reading(0.5, 0.125)
    assert found.mean_log_prob == pytest.approx((math.log(0.5) + math.log(0.125)) / 2)
    assert found.mean_probability == pytest.approx(0.25)  # geometric mean


def test_length_does_not_decide_between_continuations():
    long, short = reading(0.6, 0.6, 0.6), reading(0.5)  # joint probabilities 0.216 and 0.5
    assert metrics.preference([long], [short]) == 1


def test_preference_counts_prompts_and_a_tie_counts_for_nobody():
    a, b = reading(0.75), reading(0.25)
    assert metrics.preference([a, b, a, a], [b, a, b, a]) == 0.5
    assert metrics.preference([a], [a]) == 0


def test_magnitude_is_the_mean_difference_of_probabilities():
    found = metrics.magnitude([reading(0.9), reading(0.25, 0.25)], [reading(0.1), reading(0.75)])
    assert found == pytest.approx(((0.9 - 0.1) + (0.25 - 0.75)) / 2)


def test_one_wrong_argmax_spoils_recall_but_not_token_accuracy():
    whole, half = reading(0.9, 0.9), reading(0.9, 0.1, top=(0, 7))
    assert metrics.recall([whole, half]) == 0.5
    assert metrics.token_accuracy([whole, half]) == 0.75


def test_unchanged_compares_argmax_ids_by_prompt():
    assert metrics.unchanged([[1, 2], [3]], [[1, 9], [3]]) == 0.75


def test_score_is_the_harmonic_mean_and_one_zero_ruins_it():
    found = harmonic(np.array([[1.0, 0.5, 0.25], [1.0, 1.0, 0.0]]))
    assert found.tolist() == [pytest.approx(3 / (1 + 2 + 4)), 0]


def test_divergence_of_two_coins():
    before, after = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()
    by_hand = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert metrics.divergence(before, after).item() == pytest.approx(by_hand, abs=1e-6)
    assert metrics.divergence(before, before) == 0


def test_divergence_passes_over_what_was_impossible_before():
    before, after = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5]).log()
    assert metrics.divergence(before, after).item() == pytest.approx(math.log(2))
    assert metrics.divergence(after, before).isinf()


@pytest.mark.parametrize("lengths", [(1, 2, 1), (0, 0, 0)])
def test_a_reading_needs_one_value_a_token(lengths):
    t, p, g = lengths
    with pytest.raises(ValueError, match=r"lengths \(\d, \d, \d\)"):
        Reading((0,) * t, (0.0,) * p, (0,) * g)


def test_nothing_has_no_mean():
    with pytest.raises(ValueError, match="no mean"):
        metrics.recall([])


def test_ids_of_unequal_length_are_not_compared():
    with pytest.raises(ValueError, match="2 and 1 ids"):
        metrics.agreement([1, 2], [1])
