"""What hooks promise: the same bits where nothing changes, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CodeGenConfig

from alphaedit_peft import hooks
from alphaedit_peft.architecture import describe
from tests.test_architecture import VARIANTS, build


class Block(nn.Module):
    """Adds one to its input; puts out a tensor, or a tuple with an extra."""

    def __init__(self, in_tuple: bool) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.in_tuple = in_tuple
        self.runs = 0

    def forward(self, hidden_states, scale=1.0):
        self.runs += 1
        out = self.inner(hidden_states) + scale
        return (out, "extra") if self.in_tuple else out


class Stack(nn.Module):
    """Three blocks; the last call of the forward pass can be made to fail."""

    def __init__(self, in_tuple: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(in_tuple) for _ in range(3))
        self.fails = False

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        hidden = input_ids[..., None].float()  # (batch, tokens, 1)
        for block in self.blocks:
            out = block(hidden, scale=1.0)
            hidden = hooks.hidden_of(out)
        if self.fails:
            raise RuntimeError("the head is broken")
        return out


INPUTS = {"input_ids": torch.tensor([[1, 2], [3, 4]])}
BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]


@pytest.fixture(params=[False, True], ids=["tensor", "tuple"])
def stack(request) -> Stack:
    return Stack(request.param)


def hidden(output) -> list:
    return hooks.hidden_of(output)[..., 0].tolist()


def is_clean(model: nn.Module) -> bool:
    """No hook is registered and no forward replaced, anywhere."""
    return not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in model.modules()
    )


USES = {
    "watching_inputs": lambda m: hooks.watching_inputs(m, BLOCKS, lambda name, x: None),
    "watching_output": lambda m: hooks.watching_output(m, "blocks.1", lambda output: None),
    "changing_input": lambda m: hooks.changing_input(m, "blocks.1", lambda h: h + 10),
    "resuming_above": lambda m: hooks.resuming_above(
        m, BLOCKS[:2], torch.zeros(2, 2, 1), lambda: torch.zeros(2, 2, 1)
    ),
}


@pytest.mark.parametrize("use", USES)
def test_all_is_undone_after_the_block(use):
    model = Stack()
    before = hidden(model(**INPUTS))
    with USES[use](model):
        assert not is_clean(model)
        model(**INPUTS)
    assert is_clean(model)
    assert hidden(model(**INPUTS)) == before


@pytest.mark.parametrize("use", USES)
def test_all_is_undone_on_error(use):
    model = Stack()
    model.fails = True
    with pytest.raises(RuntimeError, match="head is broken"), USES[use](model):
        model(**INPUTS)
    assert is_clean(model)


def test_a_name_that_is_missing_leaves_nothing_behind():
    model = Stack()
    names = ["blocks.0", "blocks.7"]
    watching = hooks.watching_inputs(model, names, lambda name, x: None)
    with pytest.raises(AttributeError), watching:
        pass
    resuming = hooks.resuming_above(model, [*names, "blocks.2"], None, lambda: None)
    with pytest.raises(AttributeError), resuming:
        pass
    assert is_clean(model)


@pytest.mark.parametrize("capture", [hooks.run_until, hooks.capture_output])
def test_captures_are_undone_on_error(capture):
    model = Stack()
    model.fails = True
    model.extra = nn.Identity()  # never runs, so the pass goes on to its failing end
    with pytest.raises(RuntimeError, match="head is broken"):
        capture(model, INPUTS, "extra")
    assert is_clean(model)


def test_run_until_never_runs_later_blocks(stack):
    stack.fails = True
    hooks.run_until(stack, INPUTS, "blocks.1")
    assert [block.runs for block in stack.blocks] == [1, 1, 0]
    assert is_clean(stack)


def test_capture_output_is_in_the_blocks_own_form(stack):
    output = hooks.capture_output(stack, INPUTS, "blocks.0")
    assert isinstance(output, tuple) == stack.blocks[0].in_tuple
    assert hidden(output) == [[2, 3], [4, 5]]
    assert [block.runs for block in stack.blocks] == [1, 0, 0]
    assert is_clean(stack)


def test_capture_inputs_by_name(stack):
    names = ["blocks.0.inner", "blocks.1.inner"]
    found = hooks.capture_inputs(stack, INPUTS, names, "blocks.1")
    assert {name: hidden(value) for name, value in found.items()} == {
        "blocks.0.inner": [[1, 2], [3, 4]],
        "blocks.1.inner": [[2, 3], [4, 5]],
    }
    assert stack.blocks[2].runs == 0
    assert is_clean(stack)


def test_changing_input_is_what_the_module_sees(stack):
    with hooks.changing_input(stack, "blocks.2.inner", lambda h: h * 0):
        assert hidden(stack(**INPUTS)) == [[1, 1], [1, 1]]


def test_changing_input_changes_the_heads_logits():
    model = build("llama")
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        whole = model(**ids).logits
        with hooks.changing_input(model, "lm_head", lambda h: h[:, -1:]):
            last = model(**ids).logits
    assert last.shape == (1, 1, 320)
    assert torch.allclose(last, whole[:, -1:], atol=1e-5)


def test_resuming_passes_over_the_blocks(stack):
    output = hooks.capture_output(stack, INPUTS, "blocks.1")
    runs = [block.runs for block in stack.blocks]
    with hooks.resuming_above(stack, BLOCKS[:2], output, lambda: torch.zeros(2, 2, 1)):
        assert hidden(stack(**INPUTS)) == [[1, 1], [1, 1]]
    assert [block.runs for block in stack.blocks] == [runs[0], runs[1], runs[2] + 1]


def test_a_forward_set_on_the_block_itself_comes_back():
    model = Stack()
    own = model.blocks[0].forward
    model.blocks[0].forward = own  # as accelerate's device hooks do
    with hooks.resuming_above(model, BLOCKS[:1], None, lambda: torch.zeros(2, 2, 1)):
        assert vars(model.blocks[0])["forward"] is not own
    assert vars(model.blocks[0])["forward"] is own


def test_evaluating_puts_every_mode_back():
    model = Stack().train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    with hooks.evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(KeyError), hooks.evaluating(model):
        raise KeyError
    assert [module.training for module in model.modules()] == modes


def padded_inputs() -> dict[str, torch.Tensor]:
    """Rows of 9, 6 and 2 tokens, padded on the right; longer than the sliding windows of 4."""
    random = torch.Generator().manual_seed(0)
    mask = (torch.arange(9) < torch.tensor([[9], [6], [2]])).long()
    ids = torch.randint(2, 320, (3, 9), generator=random) * mask
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("above", [0, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_resuming_from_what_was_captured_gives_the_same_bits(name, above):
    model, inputs = build(name), padded_inputs()
    blocks = [describe(model).block_name(layer) for layer in range(above + 1)]
    with torch.no_grad():
        plain = model(**inputs, use_cache=False).logits
        output = hooks.capture_output(model, inputs, blocks[-1])
        state = hooks.hidden_of(output)
        with hooks.resuming_above(model, blocks, output, lambda: state):
            resumed = model(**inputs, use_cache=False).logits
    assert state.shape == (3, 9, 24 if name == "bloom" else 32)
    assert torch.equal(resumed, plain)
    assert is_clean(model)


@pytest.mark.parametrize("name", VARIANTS)
def test_keys_come_as_rows_of_tokens(name):
    model, inputs = build(name), padded_inputs()
    architecture = describe(model)
    rewrite = architecture.rewrite_name(1)
    keys = hooks.capture_inputs(model, inputs, [rewrite], architecture.block_name(1))[rewrite]
    first = {key: value[:1] for key, value in inputs.items()}
    alone = hooks.capture_inputs(model, first, [rewrite], architecture.block_name(1))[rewrite]
    assert keys.shape == (3, 9, 96)
    assert torch.allclose(keys[:1], alone, atol=1e-4)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_module_runs_at_some_tokens_only_and_gives_zeros_elsewhere(by_name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    given, where = torch.randn(2, 5, 4, requires_grad=True), [(0, 4), (1, 0), (1, 2)]
    whole = model(given)
    seen = []
    model[0].register_forward_pre_hook(lambda _m, args: seen.append(args))
    with hooks.running_at(model, "0", where):
        found = model[0](input=given) if by_name else model(given)
    if by_name:
        assert torch.equal(found, whole)
        return
    assert found.shape == whole.shape
    for row in range(2):
        for position in range(5):
            wanted = whole[row, position] if (row, position) in where else torch.zeros(3)
            assert torch.allclose(found[row, position], wanted, atol=1e-6)
    gradient = torch.autograd.grad(found.sum(), given)[0]
    assert sorted(map(tuple, gradient.abs().sum(-1).nonzero().tolist())) == where
    assert "forward" not in vars(model[0])


def test_other_arguments_of_each_token_are_gathered_too_and_flat_ones_run_whole():
    class Residual(nn.Module):
        def forward(self, hidden, residual, scale, *, more):
            return hidden * scale + residual + more, "said"

    model, where = nn.Sequential(Residual()), [(0, 1)]
    one = torch.arange(12.0).view(2, 3, 2)
    with hooks.running_at(model, "0", where):
        (found, said), flat = (
            model[0](one, one, 2.0, more=one),
            model[0](one[0], one[0], 2.0, more=one[0]),
        )
    assert said == "said"
    assert torch.equal(found[0, 1], 4 * one[0, 1])
    assert float(found.abs().sum()) == float(4 * one[0, 1].sum())
    assert torch.equal(flat[0], 4 * one[0])


def codegen():
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
    return AutoModelForCausalLM.from_config(CodeGenConfig(n_positions=64, n_ctx=64, **sizes)).eval()


@pytest.mark.parametrize("make", [lambda: build("gptj"), codegen], ids=["gptj", "codegen"])
def test_short_position_tables_change_no_logit_and_are_put_back(make):
    model, ids = make().double(), torch.arange(12).view(2, 6)
    tables = {k: v for k, v in model.named_buffers() if k.endswith("embed_positions")}
    expected = model(ids).logits
    with hooks.short_position_tables(model, 6):
        inside = dict(model.named_buffers())
        assert len(tables) == model.config.n_layer
        assert all(len(inside[k]) == 6 < len(tables[k]) for k in tables)
        assert torch.equal(model(ids).logits, expected)
    after = dict(model.named_buffers())
    assert all(after[k] is table for k, table in tables.items())


@pytest.mark.parametrize("name", ["gpt2", "gptj"])
def test_a_fused_gelu_gives_the_same_numbers_and_gradients_and_is_put_back(name):
    model, ids = build(name).double(), torch.arange(12).view(2, 6)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()

    def run():
        logits = model(inputs_embeds=embeddings).logits
        return logits, torch.autograd.grad(logits.logsumexp(-1).sum(), embeddings)[0]

    expected, runs = run(), []
    activations = [m for m in model.modules() if type(m).__name__ == "NewGELUActivation"]
    own = torch.nn.functional.gelu
    with hooks.fused_gelu(model):
        assert all(activation.forward.func is own for activation in activations)
        runs.append(run())
    assert activations
    assert not any("forward" in vars(activation) for activation in activations)
    for mine, theirs in zip(runs[0], expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-13)


def test_models_without_position_tables_stay_as_they_are():
    model = build("llama")
    before = dict(model.named_buffers())
    with hooks.short_position_tables(model, 1):
        assert all(before[k] is v for k, v in model.named_buffers())


def test_tables_that_a_longer_text_left_behind_do_not_stay():
    """Dynamic NTK keeps those of a text beyond its positions, for one as long as these."""
    model, long = build("llama/dynamic"), torch.arange(2, 202)[None]
    before = model(long[:, :128]).logits
    model(long)
    assert not torch.equal(model(long[:, :128]).logits, before)
    with hooks.evaluating(model):
        assert torch.equal(model(long[:, :128]).logits, before)
