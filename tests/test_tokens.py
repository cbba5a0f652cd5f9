"""Borders between prompts and what follows, limits, batches."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from alphaedit_peft import tokens


@pytest.mark.parametrize("suffix", [" Paris", " is", ".", "\n東京"])
def test_both_sides_of_the_border_join_to_the_whole(tokenizer, suffix):
    text = "The capital of France"
    ids, _, border = tokens.joined(tokenizer, text, suffix)
    assert tokenizer.decode(ids[:border]) == text
    assert tokenizer.decode(ids[border:]) == suffix


def test_a_token_over_the_border_is_split_as_generation_would(tokenizer):
    ids, _, border = tokens.joined(tokenizer, "The cap", "ital of")
    assert ids[:border] == tokens.encode(tokenizer, "The cap")[0]
    assert ids[border:] == tokens.encode(tokenizer, "ital of", special=False)[0]


@pytest.mark.parametrize(
    ("text", "target", "expected"), [("is", "a", "-"), ("is ", "a", ""), ("is", " a", "")]
)
def test_a_separator_stands_where_neither_side_brings_a_space(text, target, expected):
    assert tokens.separator_between(text, target, "-") == expected


def test_rows_the_model_cannot_take_are_refused():
    tokens.require_fit([1, 2, 3], 3, "text", (3, 4), "cut it")
    tokens.require_fit([1] * 99, 3, "text", (None, 4), "cut it")
    with pytest.raises(ValueError, match=r"'text' and its target have 4 tokens.* 3 positions; cut"):
        tokens.require_fit([1, 2, 3, 3], 3, "text", (3, 4), "cut it")
    with pytest.raises(ValueError, match=r"token id 4, the model has ids 0\.\.3"):
        tokens.require_fit([1], 4, "text", (3, 4), "cut it")


def test_every_row_is_in_one_batch_and_batches_stay_small():
    rows = [[1] * n for n in (5, 1, 9, 2, 3, 3)]
    found = list(tokens.batches(rows, 8, torch.device("cpu")))
    assert sorted(i for batch in found for i in batch.indices) == list(range(6))
    for batch in found:
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        assert ids.numel() <= 8 or len(ids) == 1
        assert mask.sum(1).tolist() == [len(rows[i]) for i in batch.indices]
        assert torch.equal(ids, mask)  # padded with 0


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="tokenizer object gives no character offsets"):
        tokens.require_offsets(object())


CPU = torch.device("cpu")


def work(lengths: list[int], found: list[list[int]]) -> int:
    cost = tokens.PASS_COST["cpu"]
    return sum(cost + len(some) * max(lengths[i] for i in some) for some in found)


def test_rows_of_like_length_run_together_and_others_apart():
    lengths = [10] * 9 + [30] * 9 + [31]
    found = tokens.by_length(lengths, CPU)
    assert found == [list(range(9)), list(range(9, 19))]
    assert tokens.by_length([], CPU) == []
    assert tokens.by_length([4, 9], CPU) == [[0, 1]]  # padding five is cheaper than another pass


@pytest.mark.parametrize("seed", range(20))
def test_no_other_borders_cost_less(seed):
    make = random.Random(seed)
    lengths = [make.choice([1, 2, 5, 8, 20, 40]) for _ in range(make.randint(1, 9))]
    found = tokens.by_length(lengths, CPU)
    assert sorted(i for some in found for i in some) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    everyway = [
        [order[a:b] for a, b in itertools.pairwise([0, *cut, len(order)])]
        for k in range(len(order))
        for cut in itertools.combinations(range(1, len(order)), k)
    ]
    assert work(lengths, found) == min(work(lengths, way) for way in everyway)


def test_few_batches_are_made_where_a_pass_is_dearer_than_any_padding():
    lengths = [1] * 90 + [200] * 9
    assert tokens.by_length(lengths, CPU, few=True) == [list(range(99))]
    assert tokens.by_length([], CPU, few=True) == []
    rows = [[1] * n for n in lengths]
    assert len(list(tokens.batches(rows, 10**6, CPU, few=True))) == 1
    assert len(list(tokens.batches(rows, 10**6, CPU))) == 2


def test_no_batch_has_more_than_the_most():
    lengths = [7] * 10 + [8] * 10
    found = tokens.by_length(lengths, CPU, 30)
    assert all(len(some) * max(lengths[i] for i in some) <= 30 for some in found)
    assert sorted(i for some in found for i in some) == list(range(20))


@pytest.mark.parametrize("few", [True, False])
def test_rows_on_either_side_of_a_switch_share_no_batch(few):
    lengths, behind, switches = [3, 9, 4, 5, 8, 2], [0, 0, 5, 3, 0, 7], (8, 9)
    found = tokens.by_length(
        lengths, torch.device("cpu"), behind=behind, few=few, switches=switches
    )
    # whole: 3, 9, 9, 8, 8, 9
    assert sorted(map(sorted, found)) == [[0, 3, 4], [1, 2, 5]]
