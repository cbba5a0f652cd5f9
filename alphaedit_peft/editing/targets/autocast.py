"""The search for z in a smaller dtype: what runs above the last rewrite layer, under autocast.

In: a runner whose settings may name a dtype (``Runner.autocast``). Out: :class:`Autocast`. torch's
autocast casts a weight that needs no gradient at every product anew, so ``Runner.upper_weights``
are copied once, and the copies stand in for them while the upper blocks run. The model's own
weights are never written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from alphaedit_peft import hooks
from alphaedit_peft.editing.runner import Runner


class Autocast:
    """Runs the upper blocks in the runner's ``autocast``; as they are where it is None.

    ``dtype`` is what they run in, None where that is the model's own.
    """

    def __init__(self, runner: Runner) -> None:
        """Copy the float32 weights of the products above L."""
        self._model, self.dtype = runner.model, runner.autocast
        self._bfloat16 = torch.bfloat16 in (self.dtype, runner.dtype)
        self._copies = [
            (module, name, nn.Parameter(weight.detach().to(self.dtype), requires_grad=False))
            for module, name, weight in runner.upper_weights()
        ]

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Products within the block are in the dtype; what goes in and out stays as it is."""
        with ExitStack() as stack:
            for module, name, copy in self._copies:
                stack.callback(module._parameters.__setitem__, name, module._parameters[name])
                module._parameters[name] = copy
            kinds = {device.type, *(copy.device.type for _, _, copy in self._copies)}
            for kind in sorted(kinds):  # a model may go on from the CPU to a GPU
                if self.dtype is not None:
                    stack.enter_context(torch.autocast(kind, self.dtype))
            if self._bfloat16:
                stack.enter_context(_FewerCasts(self.dtype))
            yield

    @contextmanager
    def running_above(self, block: str) -> Iterator[None]:
        """As ``running``, from where the block of that name has put out its hidden state."""
        with ExitStack() as above:

            def go_on(output: Any) -> None:
                above.enter_context(self.running(hooks.hidden_of(output).device))

            above.enter_context(hooks.watching_output(self._model, block, go_on))
            yield


class _FewerCasts(TorchFunctionMode):
    """Leaves out casts that cost more than they save.

    Attention on a CPU is in float32 within, as the gradient of torch's fused one takes far longer
    in bfloat16. Under autocast, linear layers that read the same tensor one after the other, as
    those of queries, keys and values do, read the same copy of it.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        """``dtype`` is autocast's, None where that is off."""
        super().__init__()
        self.dtype = dtype
        self._read: tuple[Tensor, int, Tensor] | None = None  # what, its version, its copy

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function of torch with fewer casts, where there is something to leave out."""
        kwargs = kwargs or {}
        kind = args[0].device.type if args and isinstance(args[0], Tensor) else None
        if func is functional.scaled_dot_product_attention and kind == "cpu":
            with torch.autocast("cpu", enabled=False):
                exact = {name: _in_float32(value) for name, value in kwargs.items()}
                found = func(*map(_in_float32, args), **exact)
                return found.to(self.dtype or args[0].dtype)
        casting = self.dtype is not None and kind and torch.is_autocast_enabled(kind)
        if func is functional.linear and casting:
            args = (self._cast_of(args[0]), *args[1:])
        return func(*args, **kwargs)

    def _cast_of(self, values: Tensor) -> Tensor:
        if values.dtype != torch.float32:
            return values
        read = self._read
        if read is None or read[0] is not values or read[1] != values._version:
            self._read = read = values, values._version, values.to(self.dtype)
        return read[2]


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
