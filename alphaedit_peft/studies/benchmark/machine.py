"""The machine a figure was measured on: its name, its matrix rate, and how much memory work took.

In: a device and a dtype. Out: a description as plain values, operations a second of a large matrix
product (which sets the floor under every time), and the peak of memory above what was there before.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from alphaedit_peft.studies.base import LIBRARIES

SMALLEST, LARGEST = 512, 8192  # matrices that are multiplied to find the rate
ENOUGH = 0.02  # seconds of a product from which on its start plays no part
PRODUCTS = 8  # the best of so many counts
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): what to write into clear_refs


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads, GPU and versions, as plain JSON values."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "versions": {name: version(name) for name in LIBRARIES}
        | {"python": platform.python_version()},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_bytes"] = properties.total_memory
        found["cuda"] = torch.version.cuda
    return found


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating point operations a second of one large square product, the best of several.

    Two operations for each multiply-add, as everywhere here. The matrices grow until a product
    takes 20 ms, to 8,192 rows at most.

    Args:
        dtype: of the matrices.
        device: where they are multiplied.
    """
    size = SMALLEST
    while True:
        left = torch.randn(size, size, device=device).to(dtype)
        right = left.T.contiguous()
        work = partial(torch.matmul, left, right)
        timed(work, device)  # libraries set themselves up
        if size >= LARGEST or timed(work, device) >= ENOUGH:
            return 2 * size**3 / min(timed(work, device) for _ in range(PRODUCTS))
        size *= 2


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of some work, waited for on a GPU."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what was ordered; nothing to do elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """How far memory rose above where it stood when the ``with`` block began.

    On a GPU: torch's own count of allocated bytes. Otherwise resident memory of the process, whose
    peak Linux lets a process set back; elsewhere it is the peak since the process began, so that
    only the largest block of a run shows (``exact`` is False).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.exact = True
        self.above = 0
        self._before = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        _give_back()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self.exact = _reset_peak()
            self._before = _resident() if self.exact else _peak()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if gpu else _peak()
        self.above = max(0, peak - self._before)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _give_back() -> None:
    """Let the C library return freed memory to the system, so that it is not taken for in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _reset_peak() -> bool:
    """Set the peak of resident memory back to what it is; whether that could be done."""
    try:
        CLEAR.write_text(RESET_PEAK, encoding="ascii")
        return _status("VmHWM") > 0
    except (OSError, ValueError):
        return False


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    """Largest resident memory so far, in bytes."""
    try:
        return _status("VmHWM")
    except (OSError, ValueError):
        import resource  # not on every system

        unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    """A size in the process's status file, in bytes.

    Raises:
        OSError: no such file.
        ValueError: the name is not in it.
    """
    for line in STATUS.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return 1024 * int(value.split()[0])
    raise ValueError(f"{STATUS} has no {name}")
