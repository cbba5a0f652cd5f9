"""FromSubject of rows against whole rows, family by family, and what happens where they differ."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, DynamicCache

from alphaedit_peft import tokens
from alphaedit_peft.editing.groups import Group
from alphaedit_peft.editing.targets import optimise_targets
from alphaedit_peft.editing.targets.autocast import Autocast
from alphaedit_peft.editing.targets.continuation import CacheDiffers, FromSubject, WholeRows
from alphaedit_peft.editing.targets.loss import rows_of
from tests import oracle
from tests.conftest import tiny_model
from tests.editing.test_batch import EDITS, settings
from tests.editing.test_batch import runner_for as runner_of
from tests.editing.test_keys import runner_for, tokenised
from tests.test_architecture import GATED, VARIANTS

LAYERS = [0, 1]


def all_rows(runner):
    """Those that may go on from a cache: with LongRoPE not the long ones."""
    groups = [Group((rows,)) for rows in tokenised(runner)]
    every = [
        row for slot, group in enumerate(groups) for row in rows_of(group, slot, runner.settings)
    ]
    return [row for row in every if runner.all_short([len(row.ids)])]


def everything(continuation, rows, moved):
    """Log-probabilities of all rows, in their order, and how many batches they took."""
    found = {}
    batches = continuation.together(range(len(rows)))
    for chosen in batches:
        values = continuation.log_probs(chosen, moved[chosen])
        parts = values.split([len(rows[i].reads) for i in chosen])
        found |= dict(zip(chosen, parts, strict=True))
    return torch.cat([found[i] for i in range(len(rows))]), len(batches)


@pytest.mark.parametrize("name", VARIANTS)
def test_tails_give_what_whole_rows_give_wherever_they_are_cut(name, tokenizer, monkeypatch):
    runner = runner_for(name, tokenizer, LAYERS, tokens_per_batch=60)
    rows, autocast = all_rows(runner), Autocast(runner)
    whole = WholeRows(runner, rows, autocast)
    random = torch.Generator().manual_seed(0)
    step = torch.randn(whole.hidden.shape, generator=random, dtype=whole.hidden.dtype)
    moved = whole.hidden + 0.3 * whole.hidden.norm(dim=1, keepdim=True) * step / len(step[0]) ** 0.5
    with torch.no_grad():
        expected, _ = everything(whole, rows, moved)
        some = min(3, len({len(row.ids) - row.subject for row in rows}))
        for cost, at_least in ((0, some), (10**6, 1)):
            monkeypatch.setitem(tokens.PASS_COST, "cpu", cost)
            suffixes = FromSubject(runner, rows, autocast)
            unmoved, batches = everything(suffixes, rows, suffixes.hidden)
            assert batches >= at_least
            found, _ = everything(suffixes, rows, moved)
            assert torch.allclose(suffixes.hidden, whole.hidden, atol=1e-5)
            assert (found - expected).abs().max() < 2e-4
            assert (unmoved - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", VARIANTS)
def test_every_familys_float32_targets_are_the_plain_oracles(name, tokenizer):
    adam = {"steps": 4, "learning_rate": 0.1, "learning_rate_mode": "absolute", "clamp_factor": 0.5}
    runner = runner_for(name, tokenizer, LAYERS, **adam)
    runner.model.float()
    rows = tokenised(runner)[1]
    found = optimise_targets(runner, [Group((rows,))])
    block = runner.architecture.block_name(LAYERS[-1])
    expected = oracle.target_value(runner.model, block, rows, runner.settings)
    assert found.values.dtype == torch.float32
    moved = (found.values - found.hidden).norm()
    assert moved > 0.01 * found.hidden.norm()
    assert (found.values[0] - expected).norm() <= 1e-3 * moved


def test_whole_rows_run_no_more_tokens_at_once_than_asked_for(tokenizer):
    runner = runner_for("llama", tokenizer, LAYERS, target_tokens=60)
    rows = all_rows(runner)
    found = WholeRows(runner, rows, Autocast(runner)).together(range(len(rows)))
    assert sorted(i for some in found for i in some) == list(range(len(rows)))
    padded = [len(some) * max(len(rows[i].ids) for i in some) for some in found]
    assert all(count <= 60 or len(some) == 1 for count, some in zip(padded, found, strict=True))
    assert len(found) > 1


def optimised(model, tokenizer, **changes):
    runner = runner_of(model, tokenizer, settings(**changes))
    return optimise_targets(runner, [Group((rows,)) for rows in tokenised(runner)])


def without_what_was_before(cache):
    """As a family that keeps its state elsewhere would leave it: nothing to go on from."""
    for layer in cache.layers:
        if layer.get_seq_length():
            layer.values = torch.zeros_like(layer.values)
    return cache


def test_a_cache_that_does_not_continue_is_found_out_and_whole_rows_run(tokenizer):
    expected = optimised(tiny_model("llama", torch.float64), tokenizer)
    model = tiny_model("llama", torch.float64)
    with_cache(model, without_what_was_before)
    with pytest.warns(UserWarning, match="its cache does not continue to the same numbers"):
        found = optimised(model, tokenizer)
    assert (found.values - expected.values).norm() <= 1e-4 * expected.values.norm()
    assert found.losses.tolist() == pytest.approx(expected.losses.tolist(), rel=1e-4)


def test_a_model_that_fills_no_cache_runs_whole_rows(tokenizer):
    expected = optimised(tiny_model("llama", torch.float64), tokenizer)
    model = tiny_model("llama", torch.float64)
    with_cache(model, lambda _cache: DynamicCache())
    with pytest.warns(UserWarning, match="its cache does not continue to the same numbers"):
        found = optimised(model, tokenizer)
    assert (found.values - expected.values).norm() <= 1e-4 * expected.values.norm()
    runner = runner_of(model, tokenizer, settings())
    with pytest.raises(CacheDiffers):
        FromSubject(runner, all_rows(runner), Autocast(runner))


def test_a_family_that_needs_another_kind_of_cache_runs_whole_rows(tokenizer):
    shape = {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}
    config = hf.Lfm2Config(**GATED, **shape, initializer_range=0.2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).double().eval()
    names = {"block_module": "model.layers.{}"}
    names["rewrite_module"] = "model.layers.{}.feed_forward.w2"
    runner = runner_of(model, tokenizer, settings(**names))
    edits = tokenised(runner)
    with pytest.warns(UserWarning, match="its cache does not continue to the same numbers"):
        found = optimise_targets(runner, [Group((rows,)) for rows in edits])
    for value, rows in zip(found.values, edits, strict=True):
        expected = oracle.target_value(model, "model.layers.1", rows, runner.settings)
        assert (value - expected).norm() <= 1e-4 * expected.norm()


def with_cache(model, change) -> None:
    """Let the model's forward make of its cache what ``change`` does."""
    own = model.forward

    def forward(self, *args, past_key_values=None, position_ids=None, **more):
        if past_key_values is not None:
            past_key_values = change(past_key_values)
        return own(*args, past_key_values=past_key_values, position_ids=position_ids, **more)

    model.forward = forward.__get__(model)


def test_no_gradient_is_taken_after_the_last_evaluation(tokenizer, monkeypatch):
    runs = []
    own = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: (runs.append(1), own(*a, **k))[1])
    monkeypatch.setitem(tokens.PASS_COST, "cpu", 10**6)  # all rows in one batch
    optimised(tiny_model("gpt2"), tokenizer, steps=1)
    assert not runs
    optimised(tiny_model("gpt2"), tokenizer, steps=3)
    assert len(runs) == 4  # of the decay and of the rows, at two of three evaluations


def test_base_weights_that_ask_for_gradients_get_none(tokenizer):
    model = tiny_model("llama").requires_grad_()
    assert optimised(model, tokenizer).steps.tolist() == [6] * len(EDITS)
    assert all(weight.grad is None for weight in model.parameters())
