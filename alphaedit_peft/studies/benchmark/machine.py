"""The machine a figure was measured on: its matrix rate, and what work takes of time and memory.

In: a device, some work. Out: the machine as plain values, operations a second of a large matrix
product (which sets the floor under every time), wall seconds, the peak of memory above what was
there before, and the operations and tokens of the work.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from alphaedit_peft import hooks
from alphaedit_peft.architecture import Architecture
from alphaedit_peft.editing.runner import Phases
from alphaedit_peft.studies.base import dtype_name, versions

T = TypeVar("T")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads, GPU and versions, as plain JSON values."""
    found: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count()}
    found |= {"threads": torch.get_num_threads(), "device": str(device), "versions": versions()}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {"gpu": gpu.name, "gpu_bytes": gpu.total_memory, "cuda": torch.version.cuda}
    return found


def _processor() -> str:
    names = _lines("/proc/cpuinfo", "model name")
    return names[0] if names else platform.processor() or platform.machine()


def _lines(path: str, name: str) -> list[str]:
    """What a file of Linux has under a name (proc(5)); nothing on other systems."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = (line.partition(":") for line in lines)
    return [value.strip() for key, _, value in found if key.strip() == name]


SMALLEST, LARGEST = 512, 8192  # matrices that are multiplied to find the rate
ENOUGH = 0.02  # seconds of a product from which on its start plays no part
PRODUCTS = 8  # the best of so many counts


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating point operations a second of one large square product, the best of several.

    Two operations for each multiply-add, as everywhere here. The matrices grow until a product
    takes 20 ms, to 8,192 rows at most.
    """
    size = SMALLEST
    while True:
        left = torch.randn(size, size, device=device).to(dtype)
        work = partial(torch.matmul, left, left.T.contiguous())
        timed(work, device)  # libraries set themselves up
        if size >= LARGEST or timed(work, device) >= ENOUGH:
            return 2 * size**3 / min(timed(work, device) for _ in range(PRODUCTS))
        size *= 2


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of some work, waited for on a GPU."""
    return clocked(work, device)[1]


def clocked(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What some work gives, and its wall seconds, waited for on a GPU."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    found = work()
    wait()
    return found, time.perf_counter() - start


class PeakMemory:
    """How far memory rose ``above`` where it stood when the ``with`` block began.

    On a GPU: torch's own count of allocated bytes. Otherwise resident memory of the process, whose
    peak Linux lets a process set back; elsewhere it is the peak since the process began, so that
    only the largest block of a run shows (``exact`` is False).
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.exact, self.above, self._before = device, True, 0, 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if os.name == "posix" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
            trim(0)  # the C library gives freed memory back, so that it is not taken for in use
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self.exact = _reset_peak()
            self._before = _status("VmRSS") if self.exact else _peak()
        return self

    def __exit__(self, *_: object) -> None:
        gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if gpu else _peak()
        self.above = max(0, peak - self._before)


def _reset_peak() -> bool:
    """Set the peak of resident memory back to what it is (proc(5)); whether that could be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return _status("VmRSS") > 0 and _status("VmHWM") > 0


def _peak() -> int:
    """Largest resident memory so far, in bytes."""
    if peak := _status("VmHWM"):
        return peak
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    """A size in the process's status file, "1234 kB", in bytes; 0 without it."""
    sizes = _lines("/proc/self/status", name)
    return 1024 * int(sizes[0].split()[0]) if sizes else 0


class OperationCounter(TorchDispatchMode):
    """Counts operations while it is entered, by the phase that a stopwatch is in.

    ``by_phase``: phase, or ``other`` outside of all -> name of the dtype -> operations.
    """

    def __init__(self, phases: Phases | None = None) -> None:
        super().__init__()
        self.phases = phases or Phases()
        self.by_phase: dict[str, dict[str, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and count it where there is a formula."""
        kwargs = kwargs or {}
        formula = FORMULAS.get(func._overloadpacket)
        if formula is None:
            with self:  # an operator made of others is counted by these
                found = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if found is NotImplemented else found
        out = func(*args, **kwargs)
        if count := int(formula(*args, **kwargs, out_val=out)):
            dtype = next((a.dtype for a in args if isinstance(a, Tensor)), torch.float32)
            counts = self.by_phase.setdefault(self.phases.phase or "other", {})
            counts[dtype_name(dtype)] = counts.get(dtype_name(dtype), 0) + count
        return out


def _matrices(a: Tensor) -> int:
    """How many matrices (..., n, n) there are."""
    return a[..., 0, 0].numel()


def _general(a: Tensor, b: Tensor, **_: Any) -> int:
    n = a.shape[-1]
    return _matrices(a) * 2 * n**3 // 3 + 2 * n * b.numel()


# operator -> operations from its arguments and its output: Golub and Van Loan, Matrix Computations;
# eigenvalues and vectors roughly; the rest, and attention as on GPUs, as torch counts it
ATEN = torch.ops.aten
FLASH = ATEN._scaled_dot_product_flash_attention, ATEN._scaled_dot_product_flash_attention_backward
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    ATEN.linalg_cholesky_ex: lambda a, **_: _matrices(a) * a.shape[-1] ** 3 // 3,
    ATEN.cholesky_solve: lambda b, *_, **__: 2 * b.numel() * b.shape[-2],
    ATEN.linalg_solve_triangular: lambda a, *_, out_val, **__: out_val.numel() * a.shape[-1],
    ATEN._linalg_solve_ex: _general,
    ATEN._linalg_eigh: lambda a, *_, **__: _matrices(a) * 9 * a.shape[-1] ** 3,
    ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[FLASH[0]],
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[FLASH[1]],
}


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
