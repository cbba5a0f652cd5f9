"""EditKeys against the plain path, family by family: one whole forward for every row and layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alphaedit_peft import AlphaEditConfig, hooks, tokens
from alphaedit_peft.editing.keys import keys_by_layer, take_keys
from alphaedit_peft.editing.runner import Runner
from alphaedit_peft.settings import Settings
from tests import oracle
from tests.editing.test_batch import CONTEXTS, EDITS
from tests.test_architecture import VARIANTS, build

# in a float64 model, Bloom's position biases and the attention scores of GPT-J and GPT-Neo are
# float32, and a matrix product's last bits depend on its shape
TOLERANCE = dict.fromkeys(("bloom", "gptj", "gpt_neo"), 8 * torch.finfo(torch.float32).eps)
LAYERS = ([1, 2], [0, 2])


def runner_for(name: str, tokenizer, layers, contexts=CONTEXTS, **changes) -> Runner:
    model = build(name).double()
    config = AlphaEditConfig(rewrite_layers=list(layers), **changes)
    full, architecture = config.resolve(model)
    return Runner(model, tokenizer, Settings.of(full), architecture, tuple(contexts))


def tokenised(runner: Runner):
    return [runner.renderer.edit_rows(edit, runner.contexts) for edit in EDITS]


def plain(runner: Runner, edits, layer: int | None):
    """Keys and hidden states as the oracle reads them, a forward for each."""
    module = runner.architecture.rewrite_name(runner.layers[-1] if layer is None else layer)
    block = runner.architecture.block_name(runner.layers[-1])
    keys = [mean_key(runner.model, module, rows) for rows in edits]
    hidden = [
        oracle.block_output(runner.model, block, rows.rows[0].ids)[rows.rows[0].subject_last]
        for rows in edits
    ]
    return torch.stack(keys), torch.stack(hidden)


def mean_key(model, module: str, rows) -> torch.Tensor:
    """Half the bare prompt's key and half the mean of the others', (d_in,)."""
    keys = []
    for row in rows.rows:
        values = []
        hook = model.get_submodule(module).register_forward_pre_hook(
            lambda _m, args, values=values: values.append(args[0])
        )
        with torch.no_grad():
            model(torch.tensor([row.ids]))
        hook.remove()
        keys.append(values[0].reshape(len(row.ids), -1)[row.subject_last])
    return keys[0] if len(keys) == 1 else (keys[0] + torch.stack(keys[1:]).mean(0)) / 2


def change(runner: Runner, layer: int) -> None:
    """Write something into a rewrite module."""
    weight = runner.model.get_submodule(runner.architecture.rewrite_name(layer)).weight
    with torch.no_grad():
        weight.add_(0.1 * torch.randn_like(weight, generator=None))


def agree(found, expected, tolerance: float = 1e-12) -> bool:
    return float((found - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_familys_readings_are_the_plain_paths(name, layers, tokenizer):
    runner = runner_for(name, tokenizer, layers, tokens_per_batch=40)
    edits, tolerance = tokenised(runner), TOLERANCE.get(name, 1e-12)
    taken = take_keys(runner, edits)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in [*layers, None]:
            assert taken.layer == layer
            keys, hidden = plain(runner, edits, layer)
            assert layer is None or agree(taken.keys, keys, tolerance)
            assert agree(taken.hidden, hidden, tolerance)
            if layer is not None:
                change(runner, layer)
                taken = taken.onward(runner)


@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_in_pure_float64_they_agree_to_rounding(layers, tokenizer):
    runner = runner_for("gpt2", tokenizer, layers)
    edits = tokenised(runner)
    taken = take_keys(runner, edits)
    for layer in layers:
        keys, hidden = plain(runner, edits, layer)
        assert agree(taken.keys, keys)
        assert agree(taken.hidden, hidden)
        change(runner, layer)
        taken = taken.onward(runner)


def test_some_edits_go_on_without_the_others(tokenizer):
    runner = runner_for("llama", tokenizer, [1, 2])
    edits = tokenised(runner)
    some = take_keys(runner, edits).chosen([3, 0])
    change(runner, 1)
    keys, hidden = plain(runner, [edits[3], edits[0]], 2)
    onward = some.onward(runner)
    assert agree(onward.keys, keys)
    assert agree(onward.hidden, hidden)


@pytest.fixture
def large_passes(monkeypatch):
    """Rows of any length run together."""
    monkeypatch.setitem(tokens.PASS_COST, "cpu", 10**6)


@pytest.mark.usefixtures("large_passes")
def test_keys_of_all_layers_come_from_one_pass(tokenizer):
    runner = runner_for("gpt2", tokenizer, [0, 1, 2])
    edits = tokenised(runner)
    runs = Counting(runner.model.get_submodule("transformer.h.0"))
    found, _ = keys_by_layer(runner, edits)
    assert runs.count == 2  # bare prompts, and those behind contexts
    for layer, keys in found.items():
        assert agree(keys, plain(runner, edits, layer)[0])


def test_without_contexts_a_key_is_the_bare_prompts(tokenizer):
    runner = runner_for("gpt2", tokenizer, [1], contexts=())
    edits = tokenised(runner)
    assert agree(take_keys(runner, edits).keys, plain(runner, edits, 1)[0])


class Counting:
    """How often a module runs."""

    def __init__(self, module: nn.Module) -> None:
        self.count = 0
        module.register_forward_hook(self.add)

    def add(self, *_) -> None:
        self.count += 1


@pytest.mark.usefixtures("large_passes")
def test_no_block_below_the_write_runs_again(tokenizer):
    runner = runner_for("gpt2", tokenizer, [1, 2])
    counts = [Counting(runner.model.get_submodule(f"transformer.h.{i}.attn")) for i in range(4)]
    taken = take_keys(runner, tokenised(runner))
    assert [c.count for c in counts] == [2, 2, 1, 0]  # contexts stop within block 1
    taken = taken.onward(runner)
    assert [c.count for c in counts] == [2, 4, 3, 0]
    taken.onward(runner)
    assert [c.count for c in counts] == [2, 4, 4, 0]  # bare prompts alone


def test_entering_stops_before_the_module_runs(tokenizer):
    runner = runner_for("gpt2", tokenizer, [1])
    count = Counting(runner.model.get_submodule("transformer.h.1.mlp.c_proj"))
    inputs = {"input_ids": torch.tensor([[1, 2]])}
    hooks.run_until(runner.model, inputs, "transformer.h.1.mlp.c_proj", entering=True)
    assert count.count == 0
    hooks.run_until(runner.model, inputs, "transformer.h.1.mlp.c_proj")
    assert count.count == 1
