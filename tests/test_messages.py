"""Values and sentences of errors: short, whatever was given."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaedit_peft.messages import LONGEST, PLACE, SHOWN, sentence, shown

DEEP: list = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "'a'"),
        ({"a": [1, None]}, "{'a': [1, None]}"),
        ("\ud800\x00\n", r"'\ud800\x00\n'"),
        (10**5000, "<a int too large to show>"),
        (DEEP, "<a list too large to show>"),
    ],
    ids=["text", "object", "no text", "digits", "deep"],
)
def test_a_value_is_shown(value, text):
    assert shown(value) == text


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, b"x" * 10**6, ["x" * 10**6], {"a": "b" * 500}],
    ids=["text", "bytes", "list", "object"],
)
def test_a_long_value_is_cut(value):
    assert len(shown(value)) == SHOWN
    assert shown(value).endswith("...")
    assert len(shown(value, 40)) == 40


def test_a_sentence_keeps_the_end_of_its_place_and_its_remedy():
    assert sentence("edits.jsonl, line 3", "x", "do y") == "edits.jsonl, line 3: x; do y"
    assert sentence("a", "b") == "a: b"
    told = sentence("/far" * 100 + "/edits.jsonl, line 3", "x" * 1000, "write it again")
    assert len(told) == LONGEST
    assert told.index("edits.jsonl, line 3: xxx") < PLACE
    assert told.endswith("xxx...; write it again")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(), st.text(max_size=600), st.text(max_size=150))
def test_no_sentence_is_longer(place, wrong, remedy):
    assert len(sentence(place, wrong, remedy)) <= LONGEST
