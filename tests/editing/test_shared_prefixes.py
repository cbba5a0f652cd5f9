"""Shared prefixes: the best cuts, where they are made, and that nothing in them runs twice."""

from __future__ import annotations

import pytest
import torch

from alphaedit_peft import hooks, tokens
from alphaedit_peft.editing.groups import Group
from alphaedit_peft.editing.keys import take_keys
from alphaedit_peft.editing.shared_prefixes import cut_rows, shared_prefixes
from alphaedit_peft.editing.targets import optimise_targets
from alphaedit_peft.editing.targets.autocast import Autocast
from alphaedit_peft.editing.targets.continuation import FromSubject
from tests.conftest import tiny_model
from tests.editing.targets.test_continuation import all_rows, with_cache, without_what_was_before
from tests.editing.test_keys import agree, plain, runner_for, tokenised
from tests.test_architecture import VARIANTS


def saved(found) -> int:
    return sum(length * (len(rows) - 1) for length, rows in found)


def common(rows, most, some) -> int:
    length = min(most[i] for i in some)
    while any(rows[i][:length] != rows[some[0]][:length] for i in some):
        length -= 1
    return length


@pytest.mark.parametrize("seed", range(6))
def test_cuts_are_sound_and_save_no_less_than_cutting_all_rows_at_any_length(seed):
    random = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=random))

    rows = [tuple(number(0, 2) for _ in range(number(2, 7))) for _ in range(6)]
    most = [number(0, len(row)) for row in rows]
    found = shared_prefixes(rows, most)
    assert all(len(some) > 1 and 0 < length <= common(rows, most, some) for length, some in found)
    members = [row for _, some in found for row in some]
    assert len(members) == len(set(members))
    for length in range(1, 7):
        alike = {row[:length] for row, limit in zip(rows, most, strict=True) if limit >= length}
        groups = [
            [i for i, row in enumerate(rows) if most[i] >= length and row[:length] == prefix]
            for prefix in alike
        ]
        assert saved(found) >= sum(length * (len(some) - 1) for some in groups)


def test_prompts_of_a_relation_behind_a_context_are_cut_deeper_where_that_saves_more():
    context, relation = (9, 9), (7, 7, 7, 7, 7, 7)
    rows = [(*context, *relation, i) for i in range(3)] + [(*context, 8, 0), (*context, 6, 0)]
    assert shared_prefixes(rows, [8] * 5) == [(8, [0, 1, 2])]
    assert shared_prefixes(rows, [4] * 5) == [(2, [0, 1, 2, 3, 4])]


def test_rows_without_anything_in_common_are_not_cut():
    assert shared_prefixes([(1, 2), (2, 2)], [2, 2]) == []
    assert shared_prefixes([(1, 2)], [2]) == []
    assert shared_prefixes([], []) == []


def test_a_thousand_shared_tokens_are_no_trouble():
    rows = [(*range(5000), i) for i in range(3)]
    assert shared_prefixes(rows, [5000] * 3) == [(5000, [0, 1, 2])]


def test_rows_that_each_go_one_token_further_are_no_trouble():
    rows = [(*(1,) * i, 2, 3) for i in range(1, 1500)]
    found = shared_prefixes(rows, [len(row) for row in rows])
    assert saved(found) == max(i * (1500 - i - 1) for i in range(1, 1500))


def rows_for(runner):
    return [(row.ids, row.subject_last) for edit in tokenised(runner) for row in edit.rows]


def test_rows_are_cut_where_it_saves_more_than_a_pass_costs(tokenizer, monkeypatch):
    runner = runner_for("llama", tokenizer, [1, 2])
    ids, most = zip(*rows_for(runner), strict=True)
    monkeypatch.setitem(tokens.PASS_COST, "cpu", 0)
    cut = cut_rows(runner, ids, most)
    spared = sum(cut.starts) - sum(map(len, cut.prefixes))
    assert spared > 0
    for row, which in enumerate(cut.behind):
        if which is not None:
            assert ids[row][: cut.starts[row]] == cut.prefixes[which]
            assert cut.starts[row] <= most[row]
    batched = [i for which, _, _ in cut.batches(runner, ids) for i in which]
    assert sorted(batched) == list(range(len(ids)))
    monkeypatch.setitem(tokens.PASS_COST, "cpu", spared)
    assert cut_rows(runner, ids, most).prefixes == ()
    monkeypatch.setitem(tokens.PASS_COST, "cpu", spared - 1)
    assert cut_rows(runner, ids, most) == cut


def test_no_more_prefixes_than_fit_in_a_pass(tokenizer, monkeypatch):
    monkeypatch.setitem(tokens.PASS_COST, "cpu", 0)
    runner = runner_for("llama", tokenizer, [1, 2])
    ids, most = zip(*rows_for(runner), strict=True)
    every = cut_rows(runner, ids, most)
    room = max(map(len, every.prefixes))
    some = cut_rows(runner_for("llama", tokenizer, [1, 2], tokens_per_batch=room), ids, most)
    assert len(some.prefixes) == 1 < len(every.prefixes)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_goes_on_from_shared_prefixes_to_the_plain_paths_keys(
    name, tokenizer, monkeypatch
):
    monkeypatch.setitem(tokens.PASS_COST, "cpu", 0)
    runner = runner_for(name, tokenizer, [0, 2], tokens_per_batch=60)
    edits = tokenised(runner)
    taken = take_keys(runner, edits)
    assert taken.shared or name.endswith("longrope")  # whose long rows are read whole
    for layer in (0, 2):
        assert agree(taken.keys, plain(runner, edits, layer)[0], 1e-6)
        with torch.no_grad():
            runner.model.get_submodule(runner.architecture.rewrite_name(layer)).weight.mul_(1.5)
        taken = taken.onward(runner)


def test_what_rows_follow_in_a_cache_counts_for_the_size_of_a_pass(tokenizer, monkeypatch):
    monkeypatch.setitem(tokens.PASS_COST, "cpu", 32)
    runner = runner_for(
        "gpt2", tokenizer, [1, 2], contexts=["The river " * 7], tokens_per_batch=300
    )
    parts = take_keys(runner, tokenised(runner) * 20)
    (prefix,) = parts.shared
    width = prefix.inputs["input_ids"].shape[1]
    assert width > 40
    sizes = [part.inputs["input_ids"].shape for part in parts.others if part.behind]
    assert len(sizes) > 1
    assert all(rows == 1 or rows * (width + length) <= 300 for rows, length in sizes)


def test_readings_hold_the_states_of_their_rows_once(tokenizer):
    runner = runner_for("llama", tokenizer, [1, 2])
    for part in take_keys(runner, tokenised(runner)).bare:
        assert hooks.hidden_of(part.form).untyped_storage().nbytes() == 0
        assert part.states.numel() > 0


def test_a_shared_prefix_runs_once_for_all_rows(tokenizer, monkeypatch):
    monkeypatch.setitem(tokens.PASS_COST, "cpu", 0)
    runner = runner_for("gpt2", tokenizer, [1, 2], tokens_per_batch=4096)
    block = runner.model.get_submodule("transformer.h.0")
    seen = []
    hook = block.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[:2]))
    ids, most = zip(
        *((r.key_row.ids, r.subject_last) for e in tokenised(runner) for r in e.rows[1:]),
        strict=True,
    )
    cut = cut_rows(runner, ids, most)
    tried, seen[:] = len(seen), []
    take_keys(runner, tokenised(runner))
    hook.remove()
    bare = sum(len(edit.rows[0].key_row.ids) for edit in tokenised(runner))
    shared = len(cut.prefixes) * max(map(len, cut.prefixes))
    rests = sum(map(len, ids)) - sum(cut.starts)
    assert sum(rows * length for rows, length in seen[tried:]) == bare + shared + rests
    assert rests + shared < 0.7 * sum(map(len, ids))


def test_where_a_cache_does_not_continue_nothing_is_cut(tokenizer, monkeypatch):
    monkeypatch.setitem(tokens.PASS_COST, "cpu", 0)
    runner = runner_for("llama", tokenizer, [1, 2])
    edits = tokenised(runner)
    expected = take_keys(runner, edits)
    assert expected.shared
    for broken in (without_what_was_before, lambda cache: cache.refuse_to_be_read):
        model = tiny_model("llama", torch.float64)
        model.load_state_dict(runner.model.state_dict())
        with_cache(model, broken)
        other = runner_for("llama", tokenizer, [1, 2])
        object.__setattr__(other, "model", model)
        found = take_keys(other, edits)
        assert not found.shared
        assert agree(found.keys, expected.keys, 1e-9)


def test_tails_behind_shared_prefixes_keep_what_is_before_each_row(tokenizer, monkeypatch):
    runner = runner_for("llama", tokenizer, [0, 1])
    rows = all_rows(runner)
    found = []
    for cost in (0, 10**6):
        monkeypatch.setitem(tokens.PASS_COST, "cpu", cost)
        parts = FromSubject(runner, rows, Autocast(runner))._parts
        found.append(
            {
                row: part.prefix_cache.chosen([i])
                for part in parts
                for i, row in enumerate(part.which)
            }
        )
    for row, prefix_cache in found[0].items():
        other = found[1][row]
        assert prefix_cache.lengths.tolist() == other.lengths.tolist() == [rows[row].subject]
        for mine, theirs in zip(prefix_cache.pairs, other.pairs, strict=True):
            assert torch.allclose(mine[0], theirs[0], atol=1e-12)
            assert torch.allclose(mine[1], theirs[1], atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_rows_as_long_as_the_models_positions_need_no_more(family, tokenizer, monkeypatch, recwarn):
    monkeypatch.setitem(tokens.PASS_COST, "cpu", 10**6)
    room = tiny_model(family).config.max_position_embeddings
    runner = runner_for(family, tokenizer, [0, 1], contexts=["The z"])
    left = room - max(len(row.ids) for row in all_rows(runner))
    runner = runner_for(family, tokenizer, [0, 1], contexts=["The z" + "z" * left])
    rows = all_rows(runner)
    assert max(len(row.ids) for row in rows) == room
    FromSubject(runner, rows, Autocast(runner))
    found = optimise_targets(runner, [Group((rows,)) for rows in tokenised(runner)])
    assert bool((found.losses < 100).all())
    assert not recwarn.list
