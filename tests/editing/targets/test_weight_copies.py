"""Copies of the upper weights in a smaller dtype: used while they run, gone after, counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alphaedit_peft.editing.groups import Group
from alphaedit_peft.editing.memory import estimate
from alphaedit_peft.editing.targets import optimise_targets
from alphaedit_peft.editing.targets.autocast import Autocast
from tests.conftest import tiny_model
from tests.editing.test_batch import EDITS, runner_for, settings
from tests.editing.test_memory import OBJECTIVE, runner_and_edits

CPU = torch.device("cpu")


def runner_of(family: str, tokenizer, dtype: torch.dtype = torch.float32, **changes):
    changes = {"autocast": "bfloat16", **changes}
    return runner_for(tiny_model(family, dtype), tokenizer, settings(**changes))


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: weight.dtype for name, weight in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_only_products_above_the_last_rewrite_layer_are_copied(family, tokenizer):
    runner = runner_of(family, tokenizer)
    architecture, last = runner.architecture, runner.layers[-1]
    names = [architecture.block_name(i) for i in range(architecture.num_blocks)]
    with Autocast(runner).running(CPU):
        found = dtypes(runner.model)
    assert found[f"{names[last + 1]}.{_mlp(architecture, last + 1)}"] == torch.bfloat16
    assert found[f"{runner.head_name}.weight"] == torch.bfloat16
    for name, dtype in found.items():
        upper = any(name.startswith(f"{block}.") for block in names[last + 1 :])
        upper = upper or name.startswith(f"{runner.head_name}.")
        assert dtype == torch.float32 or (dtype == torch.bfloat16 and upper), name


def _mlp(architecture, layer: int) -> str:
    block = architecture.block_name(layer)
    return architecture.rewrite_name(layer).removeprefix(f"{block}.") + ".weight"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_models_own_weights_are_back_afterwards(family, fails, tokenizer):
    runner = runner_of(family, tokenizer)
    before = dict(runner.model.named_parameters(remove_duplicate=False))
    bits = {name: weight.detach().clone() for name, weight in before.items()}
    try:
        with Autocast(runner).running(CPU):
            assert torch.is_autocast_enabled("cpu")
            assert not fails, "stop"
    except AssertionError:
        assert fails
    after = dict(runner.model.named_parameters(remove_duplicate=False))
    assert not torch.is_autocast_enabled("cpu")
    assert list(after) == list(before)
    for name, weight in after.items():
        assert weight is before[name]
        assert torch.equal(weight, bits[name])


def test_a_tied_embedding_keeps_its_own_weight(tokenizer):
    runner = runner_of("gpt2", tokenizer)
    embedding = runner.model.get_input_embeddings()
    assert runner.model.get_output_embeddings().weight is embedding.weight
    with Autocast(runner).running(CPU):
        assert embedding.weight.dtype == torch.float32
        assert runner.model.get_output_embeddings().weight.dtype == torch.bfloat16


def test_nothing_is_copied_without_autocast_or_of_a_bfloat16_model(tokenizer):
    for runner in (
        runner_of("llama", tokenizer, autocast=None),
        runner_of("llama", tokenizer, torch.bfloat16),
    ):
        before = dtypes(runner.model)
        assert list(runner.upper_weights()) == []
        with Autocast(runner).running(CPU):
            assert dtypes(runner.model) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_of_another_dtype_than_float32_runs_in_its_own(family, dtype, tokenizer):
    found = []
    for autocast in (None, "bfloat16"):
        runner = runner_of(family, tokenizer, dtype, autocast=autocast, steps=2)
        assert Autocast(runner).dtype is None
        rows = [runner.renderer.edit_rows(edit, runner.contexts) for edit in EDITS]
        found.append(optimise_targets(runner, [Group((r,)) for r in rows]).values)
    assert torch.equal(*found)


def test_the_memory_formula_counts_the_copies(tokenizer):
    runner, edits = runner_and_edits(tokenizer)
    copying, _ = runner_and_edits(tokenizer, autocast="bfloat16")
    with Autocast(copying).running(CPU):
        copies = [weight for weight in copying.model.parameters() if weight.dtype == torch.bfloat16]
    taken = sum(weight.numel() * weight.element_size() for weight in copies)
    assert taken > 0
    plain = estimate(runner, OBJECTIVE, edits, 4, 4)
    assert estimate(copying, OBJECTIVE, edits, 4, 4).held == plain.held + taken


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, "bfloat16"), (torch.bfloat16, None), (torch.bfloat16, "bfloat16")],
)
def test_attention_is_in_float32_within_where_a_cpu_runs_in_bfloat16(dtype, autocast, tokenizer):
    runner = runner_of("llama", tokenizer, dtype, autocast=autocast)
    random = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 6, 8, generator=random).bfloat16()
    mask = torch.zeros(2, 1, 6, 6, dtype=torch.bfloat16)
    attention = torch.nn.functional.scaled_dot_product_attention
    with Autocast(runner).running(CPU):
        found = attention(query, key, value, attn_mask=mask, is_causal=False)
    wanted = attention(query.float(), key.float(), value.float(), attn_mask=mask.float())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted.bfloat16())


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_the_cache_goes_on_in_every_dtype(family, dtype, autocast, tokenizer, recwarn):
    runner = runner_of(family, tokenizer, dtype, autocast=autocast)
    groups = [Group((runner.renderer.edit_rows(edit, runner.contexts),)) for edit in EDITS]
    found = optimise_targets(runner, groups)
    assert not recwarn.list
    assert bool(((found.values - found.hidden).norm(dim=1) > 0).all())


def casts(*outputs) -> int:
    """How many casts are in the graph of some outputs."""
    seen, pending = set(), [output.grad_fn for output in outputs]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [below for below, _ in node.next_functions]
    return sum(type(node).__name__ == "ToCopyBackward0" for node in seen)


def test_layers_that_read_the_same_tensor_share_its_cast(tokenizer):
    runner = runner_of("llama", tokenizer)
    random = torch.Generator().manual_seed(0)
    given = torch.randn(5, 32, generator=random, requires_grad=True)
    hidden = given.sin()  # autocast itself keeps casts of leaves
    first, second = (torch.randn(16, 32, generator=random).bfloat16() for _ in range(2))
    linear = torch.nn.functional.linear

    def run(values):
        return linear(values, first), linear(values, second)

    with torch.autocast("cpu", torch.bfloat16):
        apart = run(hidden)
    with Autocast(runner).running(CPU):
        together, other = run(hidden), run(2 * hidden)
    assert casts(*apart) == 2
    assert casts(*together) == 1
    for mine, theirs in zip(together, apart, strict=True):
        assert torch.equal(mine, theirs)
    assert all(torch.equal(a, 2 * b) for a, b in zip(other, together, strict=True))
    gradients = [
        torch.autograd.grad(sum(o.sum() for o in some), given, retain_graph=True)[0]
        for some in (together, apart)
    ]
    assert torch.allclose(*gradients, rtol=1e-2, atol=1e-2)


def test_a_tensor_that_was_written_to_is_cast_anew(tokenizer):
    runner = runner_of("llama", tokenizer)
    weight, values = torch.eye(4).bfloat16(), torch.ones(2, 4)
    with Autocast(runner).running(CPU):
        before = torch.nn.functional.linear(values, weight)
        after = torch.nn.functional.linear(values.add_(1), weight)
    assert before.unique().tolist() == [1]
    assert after.unique().tolist() == [2]


def test_what_a_model_keeps_out_of_autocast_stays_in_its_dtype(tokenizer):
    runner = runner_of("llama", tokenizer)
    weight, values = torch.eye(4), torch.full((2, 4), 1 / 3)
    linear = torch.nn.functional.linear
    with Autocast(runner).running(CPU), torch.autocast("cpu", enabled=False):
        assert torch.equal(linear(values, weight), values)
    with Autocast(runner).running(CPU):
        assert linear(input=values, weight=weight).dtype == torch.bfloat16
        assert linear(values, weight).dtype == torch.bfloat16
