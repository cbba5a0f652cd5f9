"""Look into a running model and change what flows through it; the only place that hooks.

In: a model and module names. Out: captured activations, replaced activations, runs that stop
early or resume above a block. Every change is undone when its ``with`` block ends, also on error.
Blocks may return a tensor or a tuple whose first entry is the hidden state; both are handled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class _Stop(Exception):
    """Raised by a hook to end a forward pass whose rest is not needed."""


def hidden_of(output: Any) -> Tensor:
    """The hidden state (batch, tokens, d) in a block's output."""
    return output[0] if isinstance(output, (tuple, list)) else output


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """A block's output with its hidden state exchanged."""
    return type(output)([hidden, *output[1:]]) if isinstance(output, (tuple, list)) else hidden


def form_of(output: Any) -> Any:
    """A block's output without its hidden state's numbers: the form to hand others on in."""
    hidden = hidden_of(output)
    return with_hidden(output, hidden.new_empty(0, *hidden.shape[1:]))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run with dropout off and put every module's mode back afterwards.

    Dynamic NTK's tables go back to a short text's: they keep those of the longest since the last.
    """
    modes = [(module, module.training) for module in model.modules() if module.training]
    model.eval()
    for module in model.modules():
        table: Any = getattr(module, "inv_freq", None)
        if getattr(module, "rope_type", None) == "dynamic" and not table.is_meta:
            module(table, torch.zeros(1, 1, device=table.device))
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def watching_inputs(
    model: nn.Module, names: Sequence[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``see(name, input)`` whenever one of the modules runs.

    Its input is (batch, tokens, d), or (batch * tokens, d) in families whose blocks flatten it.
    """
    with ExitStack() as stack:
        for name in names:
            register = model.get_submodule(name).register_forward_pre_hook
            stack.enter_context(register(lambda _module, args, name=name: see(name, args[0])))
        yield


@contextmanager
def watching_output(model: nn.Module, name: str, see: Callable[[Any], object]) -> Iterator[None]:
    """Call ``see(output)`` whenever the module runs, with what it puts out in its own form."""

    def watch(_module: nn.Module, _args: Any, output: Any) -> None:
        see(output)

    with model.get_submodule(name).register_forward_hook(watch):
        yield


@contextmanager
def watching_calls(
    model: nn.Module, names: Sequence[str], see: Callable[[str, Any, Any, Any], None]
) -> Iterator[None]:
    """Call ``see(name, args, kwargs, output)`` whenever one of the modules has run."""

    def watch(name: str, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        see(name, args, kwargs, output)

    with ExitStack() as stack:
        for name in names:
            register = model.get_submodule(name).register_forward_hook
            stack.enter_context(register(partial(watch, name), with_kwargs=True))
        yield


@contextmanager
def changing_input(
    model: nn.Module, name: str, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Pass the first argument of a module through ``change`` before it runs."""
    register = model.get_submodule(name).register_forward_pre_hook
    with register(lambda _module, args: (change(args[0]), *args[1:])):
        yield


@contextmanager
def changing_outputs(
    model: nn.Module, changes: Mapping[str, Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Pass the hidden state that each named module puts out through its own change."""
    with ExitStack() as stack:
        for name, change in changes.items():
            register = model.get_submodule(name).register_forward_hook
            stack.enter_context(
                register(lambda _m, _a, out, to=change: with_hidden(out, to(hidden_of(out))))
            )
        yield


@contextmanager
def short_position_tables(model: nn.Module, length: int) -> Iterator[None]:
    """Leave GPT-J's and CodeGen's blocks the first ``length`` positions of their tables.

    They copy the whole table, thousands of positions, for each row of a batch.
    """
    with ExitStack() as stack:
        for module in model.modules():
            table = module._buffers.get("embed_positions")
            if table is not None and table.device.type != "meta":
                stack.callback(module._buffers.__setitem__, "embed_positions", table)
                module._buffers["embed_positions"] = table[:length]
        yield


def fused_gelu(model: nn.Module) -> AbstractContextManager[None]:
    """Run GPT-2's and GPT-J's activation as one operator of torch instead of eight.

    It is 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) in both, to rounding.
    """
    from transformers.activations import NewGELUActivation

    fused = partial(functional.gelu, approximate="tanh")
    return _running({m: fused for m in model.modules() if type(m) is NewGELUActivation})


def head_name(model: nn.Module) -> str | None:
    """Name of the module that turns hidden states into logits, None where the model has none."""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    return next((name for name, module in model.named_modules() if module is head), None)


def gathering_logits(
    model: nn.Module, head: str, where: Sequence[tuple[int, int]]
) -> AbstractContextManager[None]:
    """Let the model's own head see only (row, position) pairs; logits come as (1, pairs, vocab)."""
    pairs = torch.tensor(where).T  # (2, pairs)
    return changing_input(model, head, lambda hidden: hidden[tuple(pairs.to(hidden.device))][None])


def logits_at(
    model: nn.Module, inputs: Mapping[str, Any], where: Sequence[tuple[int, int]]
) -> tuple[Tensor, Any]:
    """Logits at (row, position) pairs of one pass, (pairs, vocab), and all that the model puts out.

    The head runs on these pairs alone, where the model says which module it is.
    """
    head = head_name(model)
    with nullcontext() if head is None else gathering_logits(model, head, where):
        output = model(**inputs)
    rows, places = zip(*where, strict=True)
    return output.logits[list(rows), list(places)] if head is None else output.logits[0], output


@contextmanager
def running_at(model: nn.Module, name: str, where: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Let a module that treats each token by itself run for some (row, position) pairs only.

    It puts out zeros for all others. Tensors (batch, tokens, ...) among its arguments are gathered;
    a module that is not called with one runs as it is.
    """
    pairs = torch.tensor(where).T  # (2, pairs)
    module = model.get_submodule(name)
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not args or args[0].ndim != 3:
            return own(*args, **kwargs)
        shape = args[0].shape[:2]
        at = tuple(pairs.to(args[0].device))

        def gathered(value: Any) -> Any:
            per_token = isinstance(value, Tensor) and value.shape[:2] == shape
            return value[at][None] if per_token else value

        found = own(*map(gathered, args), **{k: gathered(v) for k, v in kwargs.items()})
        some = hidden_of(found)[0]  # (pairs, d)
        return with_hidden(found, some.new_zeros(*shape, some.shape[-1]).index_put(at, some))

    with _running({module: forward}):
        yield


def run_until(
    model: nn.Module, inputs: Mapping[str, Any], last: str, *, entering: bool = False
) -> None:
    """Run a forward pass and stop it right after the module named ``last``, or ``entering`` it.

    ``inputs`` are the model's, a cache among them where one is to be read or filled.
    """

    def stop(*_: Any) -> None:
        raise _Stop

    module = model.get_submodule(last)
    register = module.register_forward_pre_hook if entering else module.register_forward_hook
    with register(stop), suppress(_Stop):
        model(**{"use_cache": False, **inputs})


def capture_inputs(
    model: nn.Module, inputs: Mapping[str, Tensor], names: Sequence[str], last: str
) -> dict[str, Tensor]:
    """Inputs of the named modules, (batch, tokens, d_in) each, in one pass that stops at ``last``.

    ``last`` must run no earlier than the named modules; pass the block that holds the last one.
    OPT's blocks flatten batch and tokens before their MLP; those inputs are unflattened here.
    """
    seen: dict[str, Tensor] = {}
    with torch.no_grad(), watching_inputs(model, names, seen.__setitem__):
        run_until(model, inputs, last)
    shape = inputs["input_ids"].shape  # (batch, tokens)
    return {name: x.unflatten(0, shape) if x.ndim == 2 else x for name, x in seen.items()}


def capture_output(model: nn.Module, inputs: Mapping[str, Any], block: str) -> Any:
    """What a block puts out, in its family's own form, from one pass that stops there.

    ``hidden_of`` takes the hidden state (batch, tokens, d) from it.
    """
    seen: list[Any] = []
    with torch.no_grad(), watching_output(model, block, seen.append):
        run_until(model, inputs, block)
    return seen[0]


@contextmanager
def resuming_above(
    model: nn.Module, blocks: Sequence[str], output: Any, hidden: Callable[[], Tensor]
) -> Iterator[None]:
    """Make forward passes begin above the last of ``blocks``, from the state ``hidden()``.

    The model's own forward still runs, so its masks, positions and head stay its own; only these
    blocks are passed over.

    Args:
        blocks: names of the model's first blocks, in order and without a gap.
        output: what ``capture_output`` gave for the last of them; tells the form to hand on.
        hidden: gives the hidden state (batch, tokens, d) to go on from, at each forward pass.
    """

    def passed_over(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return with_hidden(output, hidden_states)

    *below, last = map(model.get_submodule, blocks)
    begun = {last: lambda *_, **__: with_hidden(output, hidden())}
    with _running({**dict.fromkeys(below, passed_over), **begun}):
        yield


@contextmanager
def _running(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Have modules run these in place of their own forwards."""
    with ExitStack() as stack:
        for module, forward in forwards.items():
            own = vars(module).get("forward")  # accelerate's device hooks set one on the instance
            module.forward = forward
            if own is None:
                stack.callback(delattr, module, "forward")
            else:
                stack.callback(setattr, module, "forward", own)
        yield
