"""Floating point operations of a piece of work, by phase and dtype, and the tokens that went in.

In: work that runs within the counter. Out: operations as torch's own formulas count the operators
that ran (``torch.utils.flop_counter``), with the textbook counts of the factorisations that it
leaves out; two operations for each multiply-add. Counting slows work down, so nothing is timed
meanwhile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from alphaedit_peft import hooks
from alphaedit_peft.architecture import Architecture
from alphaedit_peft.editing.phases import Phases

OUTSIDE = "other"  # work in no phase
Formula = Callable[[Any, tuple[Any, ...]], int]


def _cholesky(out: Any, args: tuple[Any, ...]) -> int:
    return _batch(args[0]) * args[0].shape[-1] ** 3 // 3


def _triangular_twice(out: Any, args: tuple[Any, ...]) -> int:
    return 2 * args[0].numel() * args[0].shape[-2]


def _triangular(out: Any, args: tuple[Any, ...]) -> int:
    return out.numel() * args[0].shape[-1]


def _general(out: Any, args: tuple[Any, ...]) -> int:
    n = args[0].shape[-1]
    return _batch(args[0]) * 2 * n**3 // 3 + 2 * n * args[1].numel()


def _eigen(out: Any, args: tuple[Any, ...]) -> int:
    return _batch(args[0]) * 9 * args[0].shape[-1] ** 3  # values and vectors, roughly


def _attention(out: Any, args: tuple[Any, ...]) -> int:
    return sdpa_flop_count(*(value.shape for value in args[:3]))


def _attention_back(out: Any, args: tuple[Any, ...]) -> int:
    return sdpa_backward_flop_count(*(value.shape for value in args[:4]))


# Golub and Van Loan, Matrix Computations; attention as torch counts it on GPUs
FORMULAS: dict[str, Formula] = {
    "aten::linalg_cholesky_ex": _cholesky,
    "aten::cholesky_solve": _triangular_twice,
    "aten::linalg_solve_triangular": _triangular,
    "aten::_linalg_solve_ex": _general,
    "aten::_linalg_eigh": _eigen,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_back,
}


class OperationCounter(TorchDispatchMode):
    """Counts operations while it is entered: ``operations[phase, dtype]``."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = OUTSIDE
        self.operations: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and count it where there is a formula."""
        kwargs = kwargs or {}
        packet = func._overloadpacket
        own = FORMULAS.get(func._schema.name)
        if own is None and packet not in flop_registry:
            with self:  # an operator made of others is counted by these
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        out = func(*args, **kwargs)
        dtype = next((a.dtype for a in args if isinstance(a, Tensor)), torch.float32)
        if own is not None:
            self.operations[self.phase, dtype] += own(out, args)
        elif packet in flop_registry:
            self.operations[self.phase, dtype] += int(
                flop_registry[packet](*args, **kwargs, out_val=out)
            )
        return out

    @property
    def by_phase(self) -> dict[str, dict[str, int]]:
        """Phase -> name of the dtype -> operations."""
        found: dict[str, dict[str, int]] = {}
        for (phase, dtype), count in self.operations.items():
            if count:
                found.setdefault(phase, {})[str(dtype).removeprefix("torch.")] = count
        return found


class CountedPhases(Phases):
    """A stopwatch that tells a counter which phase it is in."""

    def __init__(self, counter: OperationCounter) -> None:
        super().__init__()
        self._counter = counter

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count what runs in this block for ``phase``; the innermost block counts."""
        around, self._counter.phase = self._counter.phase, phase
        try:
            with super().timed(phase):
                yield
        finally:
            self._counter.phase = around


@contextmanager
def counting_tokens(model: nn.Module, architecture: Architecture) -> Iterator[Counter[str]]:
    """Count the tokens, padding too, that each block's MLP reads, by the block's name.

    Blocks that a pass leaves out do not count.
    """
    blocks = range(architecture.num_blocks)
    names = {architecture.rewrite_name(n): architecture.block_name(n) for n in blocks}
    seen: Counter[str] = Counter()

    def see(name: str, inputs: Tensor) -> None:
        seen[names[name]] += inputs.numel() // inputs.shape[-1]

    with hooks.watching_inputs(model, list(names), see):
        yield seen


def floor_seconds(operations: Mapping[str, int], rates: Mapping[str, float]) -> float:
    """The least time that operations by dtype can take; dtypes without a rate at the highest."""
    highest = max(rates.values())
    return sum(count / rates.get(dtype, highest) for dtype, count in operations.items())


def _batch(matrices: Tensor) -> int:
    """How many matrices (..., n, n) there are."""
    return matrices[..., 0, 0].numel()
