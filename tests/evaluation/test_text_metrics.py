"""Fluency, consistency and exact match against values computed by hand."""

from __future__ import annotations

import math

import pytest

from alphaedit_peft.evaluation import metrics
from alphaedit_peft.evaluation.metrics import says


def test_entropy_of_distinct_bigrams_is_the_log_of_their_number():
    assert metrics.entropy("a b c d e", 2) == pytest.approx(math.log2(4))
    assert metrics.entropy("a b c d e", 3) == pytest.approx(math.log2(3))


def test_entropy_of_repeated_bigrams_by_hand():
    # ab ba ab ba ab: 3/5 and 2/5
    by_hand = -(3 / 5 * math.log2(3 / 5) + 2 / 5 * math.log2(2 / 5))
    assert metrics.entropy("a b a b a b", 2) == pytest.approx(by_hand)


def test_fluency_weights_bigrams_by_two_thirds_and_trigrams_by_four_thirds():
    by_hand = (2 / 3 * math.log2(4) + 4 / 3 * math.log2(3)) / 2
    assert metrics.fluency(["a b c d e"]) == pytest.approx(by_hand)


def test_a_model_that_repeats_itself_has_no_fluency():
    assert metrics.fluency(["no " * 50]) == 0
    assert metrics.fluency(["one"]) == 0


def test_fluency_is_meaned_over_texts_and_takes_another_splitter():
    both = metrics.fluency(["a b c d e", "a a a"])
    assert both == pytest.approx(metrics.fluency(["a b c d e"]) / 2)
    assert metrics.fluency(["abcde"], words=list) == metrics.fluency(["a b c d e"])


def test_words_and_punctuation_are_split():
    assert metrics.split_words("He's in Rome, now.") == [
        *("He", "'", "s", "in", "Rome", ",", "now", ".")
    ]


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        (" Paris.", ["Paris"], True),
        ("paris", [" Paris"], True),
        ("Parisian cafes", ["Paris"], False),
        ("the city of Paris", ["Paris"], False),
        ("New York City", ["New York"], True),
        ("U.S. soil", ["U.S."], True),
        ("NYC", ["New York", "NYC"], True),
        ("", ["Paris"], False),
        ("anything", [" "], False),
    ],
)
def test_a_text_says_an_answer_that_it_begins_with(text, answers, expected):
    assert says(text, answers) is expected


class TestConsistency:
    @pytest.fixture(autouse=True)
    def _needs_scikit_learn(self):
        pytest.importorskip("sklearn")

    def test_equal_texts_have_cosine_one_and_foreign_texts_zero(self):
        vectorizer = metrics.fit_tfidf(["red house", "blue sea", "green hill"])
        assert metrics.consistency(["red house"], ["house red"], vectorizer) == pytest.approx(1)
        assert metrics.consistency(["red house"], ["blue sea"], vectorizer) == 0
        assert metrics.consistency(["zzz"], ["blue sea"], vectorizer) == 0

    def test_cosine_by_hand(self):
        # every word in one of two documents: equal weights, so the plain cosine of counts
        vectorizer = metrics.fit_tfidf(["aa bb", "cc dd"])
        found = metrics.consistency(["aa", "cc"], ["aa bb"], vectorizer)
        assert found == pytest.approx(1 / 2)
