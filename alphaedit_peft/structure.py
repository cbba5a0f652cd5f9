"""Find the decoder blocks and rewrite modules of any causal language model, and prove them.

In: a model from transformers. Out: a :class:`Rewrite` a block: which module an edit rewrites, and
whether the block adds its output to the residual stream as it is. Nothing is guessed from names: a
forward pass over a few tokens tells what runs, and a random vector added to a module's output tells
where it goes. Blocks are the outermost ``ModuleList`` whose children put out hidden states. In a
block, candidates are the modules with a 2-D weight that put out d features; the rewrite module
(W_out in the paper's Eq. 1) is the candidate with the widest input that

1. writes: with the other candidates' outputs held, v added to its output at one position changes
   the block's output there and nowhere else (as it is: by exactly v; a norm or a factor behind it:
   by something else). That drops queries, keys and gates;
2. reads its own position alone: with the other writers' outputs held, its input does not change
   with the block's input at another position. That drops the output projections of attention and
   of state spaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alphaedit_peft import hooks
from alphaedit_peft.devices import has_no_weights, reads_ids_on
from alphaedit_peft.tokens import text_config

TOKENS = 7  # of the probe; the last but one is looked at
ALIKE = 1e-3  # of the vector added: the block puts it out as it is; bfloat16 rounds at 4e-3 a step
NOTHING = 1e-4  # of what was changed: no trace of it


@dataclass(frozen=True)
class Rewrite:
    """A block's rewrite module.

    ``module`` is its full name, ``adds`` whether the block's output is the residual stream plus the
    module's output as it is, ``conv1d`` whether its weight is stored (d_in, d_out).
    """

    module: str
    adds: bool
    conv1d: bool = False


@dataclass(frozen=True)
class Structure:
    """Names of all blocks in order, and what an edit can rewrite in each; None: nothing."""

    blocks: tuple[str, ...]
    rewrites: tuple[Rewrite | None, ...]


@torch.no_grad()
def find_structure(
    model: nn.Module, block_module: str | None = None, rewrite_module: str | None = None
) -> Structure:
    """Find a model's blocks and their rewrite modules by running it on a few tokens.

    Blocks made of the same modules of the same sizes are probed once. Of a model on torch's meta
    device only sizes are known: nothing is proved there.

    Args:
        block_module: a block's name with ``{}`` for its number, where another is meant.
        rewrite_module: likewise the rewrite module's, which is then only proved to write.

    Raises:
        ValueError: a model that does not run on token ids alone, whose output at a token depends on
            later ones, whose blocks cannot be told, or run more than once; names that it does not
            have, or a module that does not write.
    """
    if has_no_weights(model) and rewrite_module is None:
        return _by_sizes(model)
    named_stack = [] if block_module is None else [_stem(model, block_module)]
    with hooks.evaluating(model):
        calls = _calls_in(model, named_stack or _lists(model))
        stack = named_stack[0] if named_stack else _stack_of(model, calls)
        blocks = _children(model, stack)
        calls = {name: calls[name] for name in blocks if name in calls}
        if any(len(some) > 1 for some in calls.values()):
            raise ValueError(
                f"{type(model).__name__} runs its blocks {stack} more than once in a pass: one "
                "weight at several depths cannot be edited yet"
            )
        known: dict[Any, tuple[str, bool] | None] = {}
        rewrites: list[Rewrite | None] = []
        for number, name in enumerate(blocks):
            named = None if rewrite_module is None else _within(model, name, rewrite_module, number)
            part = None
            if name in calls:
                part = _proved(model, name, calls[name][0], named, known)
            rewrites.append(None if part is None else _rewrite(model, f"{name}.{part[0]}", part[1]))
    return Structure(tuple(blocks), tuple(rewrites))


def _by_sizes(model: nn.Module) -> Structure:
    """What a model without weights shows: in each block the widest matrix that puts out d."""
    config: Any = model.config
    features = text_config(config).hidden_size
    stack = max(_lists(model), key=lambda name: len(_children(model, name)), default=None)
    blocks = [] if stack is None else _children(model, stack)
    rewrites: list[Rewrite | None] = []
    for block in blocks:
        found = None
        for name, part in model.get_submodule(block).named_modules():
            if not _weight(part) or type(part) is nn.Embedding:
                continue
            rewrite = _rewrite(model, f"{block}.{name}", True)
            weight: Any = part.weight
            d_in, d_out = weight.shape if rewrite.conv1d else weight.shape[::-1]
            if d_out == features and (found is None or d_in >= found[0]):
                found = d_in, rewrite
        rewrites.append(None if found is None else found[1])
    return Structure(tuple(blocks), tuple(rewrites))


def _proved(
    model: nn.Module,
    name: str,
    call: _Call,
    named: str | None,
    known: dict[Any, tuple[str, bool] | None],
) -> tuple[str, bool] | None:
    """What ``_Block`` finds in a block, or found in one of its kind; ``known`` keeps it."""
    try:
        block = _Block(model.get_submodule(name), call)
        kind = block.kind()
        if kind not in known:
            known[kind] = block.rewrite() if named is None else block.proved(named)
        return known[kind]
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"block {name} of {type(model).__name__} does not run by itself as it ran in the model "
            f"({type(error).__name__}: {str(error)[:120]}), so it cannot be edited yet"
        ) from error


def _rewrite(model: nn.Module, name: str, adds: bool) -> Rewrite:
    module: Any = model.get_submodule(name)
    return Rewrite(name, adds, type(getattr(module, "base_layer", module)).__name__ == "Conv1D")


def _stem(model: nn.Module, block_module: str) -> str:
    """Name of the list of blocks in what the user calls a block."""
    _require_slot(block_module)
    stem = block_module.partition(".{}")[0]
    _module(model, stem)
    return stem


def _within(model: nn.Module, block: str, rewrite_module: str, number: int) -> str:
    """Name within a block of what the user calls the rewrite module."""
    _require_slot(rewrite_module)
    name = rewrite_module.replace("{}", str(number))
    _module(model, name)
    if not name.startswith(f"{block}."):
        raise ValueError(f"rewrite_module={rewrite_module!r} is not within the block {block!r}")
    return name.removeprefix(f"{block}.")


def _require_slot(name: str) -> None:
    if name.count("{}") != 1:
        raise ValueError(f"module name {name!r} needs one '{{}}' for the block's number")


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{type(model).__name__} has no module {name!r}; see model.named_modules() and set "
            "block_module and rewrite_module in the config"
        ) from None


@dataclass(frozen=True)
class _Call:
    """One call of a module: its arguments, and what it put out."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any


def _calls_in(model: nn.Module, stacks: Sequence[str]) -> dict[str, list[_Call]]:
    """By name, the calls of the children of modules in one pass over ``_probe_ids``.

    Whether a token's logits depend on those behind it is tried with a second one.

    Raises:
        ValueError: they do; the model does not run on ids alone, or its logits are not finite.
    """
    calls: dict[str, list[_Call]] = {}

    def see(name: str, args: Any, kwargs: Any, output: Any) -> None:
        calls.setdefault(name, []).append(_Call(_copied(args), _copied(kwargs), _copied(output)))

    ids = _probe_ids(model)
    children = [child for stack in stacks for child in _children(model, stack)]
    with hooks.watching_calls(model, children, see):
        first = _logits(model, ids)[0, 0]
    second = _logits(model, ids[:, [0, *range(TOKENS - 1, 0, -1)]])[0, 0]
    if not (first.isfinite().all() and second.isfinite().all()):
        weights = ((n, w) for n, w in model.named_parameters() if not w.is_meta)
        bad = next((n for n, w in weights if not w.isfinite().all()), None)
        why = "its dtype is too narrow; load it in float32 or bfloat16"
        raise ValueError(
            f"the logits of {type(model).__name__} are not finite: "
            f"{why if bad is None else f'{bad} holds NaN or infinity; load the model again'}"
        )
    rounding = 16 * torch.finfo(first.dtype).eps
    if not (first - second).norm() <= rounding * first.norm():
        raise ValueError(
            f"{type(model).__name__} reads what comes after a token too: it is an encoder; use a "
            "causal language model (is_decoder=True in its config, where it can be one)"
        )
    return calls


def _probe_ids(model: nn.Module) -> Tensor:
    """A row of distinct ids, (1, tokens), spread over the vocabulary."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(getattr(embedding, "weight", None), Tensor):
        raise ValueError(f"{type(model).__name__} has no token embedding; pass a causal LM")
    count = len(embedding.weight)
    ids = torch.arange(1, TOKENS + 1, device=reads_ids_on(model)) * max(count // (TOKENS + 1), 1)
    return (ids % count)[None]


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    try:
        return model(input_ids=ids, use_cache=False).logits  # (1, tokens, vocab)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not run on token ids alone: {type(error).__name__}: "
            f"{str(error)[:160]}; pass a causal language model"
        ) from error


def _lists(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]


def _children(model: nn.Module, name: str) -> list[str]:
    return [f"{name}.{child}" for child, _ in model.get_submodule(name).named_children()]


def _stack_of(model: nn.Module, calls: Mapping[str, Sequence[_Call]]) -> str:
    """Name of the outermost ModuleList whose children put out hidden states, the longest one."""
    found: dict[str, int] = {}
    for name in _lists(model):
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        ran = [calls[child] for child in _children(model, name) if child in calls]
        outputs = [hooks.hidden_of(call.output) for some in ran for call in some]
        states = [o for o in outputs if isinstance(o, Tensor) and o.is_floating_point()]
        shapes = {tuple(state.shape) for state in states}
        if len(shapes) == 1 and TOKENS in next(iter(shapes))[:-1]:
            found[name] = len(ran)
    most = [name for name in found if found[name] == max(found.values())]
    if len(most) != 1:
        what = f"several stacks of blocks, {most}" if most else "no stack of decoder blocks"
        raise ValueError(
            f"{type(model).__name__} has {what}; name its parts in the config: "
            "block_module='model.layers.{}', rewrite_module='model.layers.{}.mlp.down_proj'"
        )
    return most[0]


class _Block:
    """A block that can be run again as it was called, with outputs held or moved within."""

    def __init__(self, module: nn.Module, call: _Call) -> None:
        self.module, self.call = module, call
        if hasattr(call.output, "_make"):
            raise TypeError(f"it puts out a named tuple {type(call.output).__name__}")
        self.output = hooks.hidden_of(call.output)
        self.axis = [k for k, size in enumerate(self.output.shape[:-1]) if size == TOKENS][-1]
        self.candidates = self._candidates()

    def kind(self) -> Any:
        """What two blocks have in common of which one alone need be probed."""
        parts = [(name, type(part)) for name, part in self.module.named_modules()]
        sizes = [tuple(part.shape) for part in self.module.parameters()]
        return tuple(parts), tuple(sizes), tuple(self.candidates)

    def width(self, name: str) -> int:
        """Input features of a candidate."""
        return int(self.candidates[name].args[0].shape[-1])

    def proved(self, name: str) -> tuple[str, bool]:
        """A named module, and whether its output is added as it is.

        Raises:
            ValueError: what it puts out does not go into the block's output.
        """
        adds = self._writes(name) if name in self.candidates else None
        if adds is None:
            raise ValueError(
                f"{name!r} of {type(self.module).__name__} does not write into the block's output "
                "at its own position; name the MLP's last matrix"
            )
        return name, adds

    def rewrite(self) -> tuple[str, bool] | None:
        """The rewrite module's name within the block, and whether its output is added as it is."""
        writers = {name: self._writes(name) for name in self.candidates}
        held = {name: adds for name, adds in writers.items() if adds is not None}
        found = {name: held[name] for name in held if self._reads_its_own_position(name, held)}
        widest = max(map(self.width, found), default=0)
        last = [name for name in found if self.width(name) == widest][-1:]
        return (last[0], found[last[0]]) if last else None

    def _candidates(self) -> dict[str, _Call]:
        """By name within the block, modules with a 2-D weight that put out d features, as run."""
        features = self.output.shape[-1]
        names: list[str] = []
        seen: dict[str, list[_Call]] = {}
        for name, part in self.module.named_modules():
            if _weight(part) and not any(name.startswith(f"{outer}.") for outer in names):
                names.append(name)

        def see(name: str, args: Any, kwargs: Any, output: Any) -> None:
            by_token = isinstance(output, Tensor) and output.shape[-1] == features
            if args and by_token and _by_token(output).shape[-2:-1] == (TOKENS,):
                call = _Call(_copied(args), {}, output.clone())  # some blocks add to it in place
                seen.setdefault(name, []).append(call)

        self._run({}, watch=(names, see))
        return {name: calls[0] for name, calls in seen.items() if len(calls) == 1}

    def _run(
        self,
        changes: Mapping[str, Callable[[Tensor], Tensor]],
        *,
        moved: tuple[int, Tensor] | None = None,
        watch: tuple[Sequence[str], Callable[..., None]] | None = None,
    ) -> Tensor:
        """Run it with outputs changed; ``moved`` adds a vector to its input at a position."""
        args, kwargs = _copied(self.call.args), _copied(self.call.kwargs)
        if moved is not None:
            args, kwargs = self._moved(args, kwargs, *moved)
        with ExitStack() as stack:
            stack.enter_context(hooks.changing_outputs(self.module, changes))
            if watch is not None:
                stack.enter_context(hooks.watching_calls(self.module, *watch))
            return hooks.hidden_of(self.module(*args, **kwargs))

    def _held(self, names: Iterable[str], but: str) -> dict[str, Callable[[Tensor], Tensor]]:
        """Changes that give candidates the output they had, all but one."""

        def keep(name: str) -> Callable[[Tensor], Tensor]:
            return lambda _: self.candidates[name].output.clone()

        return {name: keep(name) for name in names if name != but}

    def _writes(self, name: str) -> bool | None:
        """Whether the block's output moves by what its output is moved by; None: not only there."""
        place, kept = TOKENS - 2, self.candidates[name].output
        before = _by_token(kept)[..., place, :].float()
        vector = _random_like(before)

        def move(output: Tensor) -> Tensor:
            moved = _by_token(output.clone())
            moved[..., place, :] += vector.to(moved)
            return moved.view_as(output)

        held = self._held(self.candidates, but=name)
        base = self._run(held).movedim(self.axis, 0).float()
        after = self._run({**held, name: move}).movedim(self.axis, 0).float()
        moved = after - base  # (tokens, ...)
        size = vector.norm()
        others = torch.cat([moved[:place], moved[place + 1 :]])
        if moved[place].norm() <= NOTHING * size or others.norm() > NOTHING * size:
            return None
        here = moved[place].reshape(-1, vector.shape[-1])
        error = (here - vector.reshape(-1, vector.shape[-1])).norm() if len(here) == 1 else size
        rounding = torch.finfo(self.output.dtype).eps * after[place].norm()
        return bool(error <= max(ALIKE * size, 2 * rounding))

    def _reads_its_own_position(self, name: str, writers: Iterable[str]) -> bool:
        """Whether its input follows the block's input at no other position, writers held."""
        held = self._held(writers, but=name)
        seen: list[Tensor] = []
        kept = _by_token(self.candidates[name].args[0]).float()
        for other in (TOKENS - 3, 1):
            vector = _random_like(self.output.movedim(self.axis, 0)[other].float())
            watch = [name], lambda _name, args, _kwargs, _output: seen.append(args[0])
            self._run(held, moved=(other, vector), watch=watch)
            change = (_by_token(seen.pop()).float() - kept)[..., TOKENS - 2, :]
            if change.norm() > NOTHING * kept[..., TOKENS - 2, :].norm():
                return False
        return True

    def _moved(self, args: Any, kwargs: Any, place: int, vector: Tensor) -> tuple[Any, Any]:
        """The block's arguments with its hidden states moved at a position."""

        def moves(value: Any) -> bool:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return floating and value.shape == self.output.shape

        places = [k for k, value in enumerate(args) if moves(value)]
        names = [name for name, value in kwargs.items() if moves(value)]
        hidden = args[places[0]] if places else kwargs[names[0]]
        hidden = hidden.clone()
        hidden.movedim(self.axis, 0)[place] += vector.to(hidden)
        if places:
            return (*args[: places[0]], hidden, *args[places[0] + 1 :]), kwargs
        return args, {**kwargs, names[0]: hidden}


def _weight(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix: a linear layer, packed or not, or a LoRA around."""
    weight = getattr(module, "weight", None)
    alone = not list(module.children()) or hasattr(module, "base_layer")
    packed = weight is None and isinstance(getattr(module, "in_features", None), int)
    return alone and (packed or (isinstance(weight, Tensor) and weight.ndim == 2))


def _by_token(values: Tensor) -> Tensor:
    """A view (..., tokens, features) of what may be (rows x tokens, features)."""
    if values.ndim == 2 and len(values) % TOKENS == 0:
        return values.view(-1, TOKENS, values.shape[-1])
    return values


def _random_like(values: Tensor) -> Tensor:
    """A vector of the same size and length, from a generator of its own."""
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    size = values.norm().clamp_min(1e-3 * values[..., 0].numel() ** 0.5)
    return noise.to(values.device) * (size / noise.norm())


def _copied(value: Any) -> Any:
    """A copy of arguments, so that a run does not write into what the next one is given."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(map(_copied, value))
    if type(value) is dict:
        return {name: _copied(entry) for name, entry in value.items()}
    return value
