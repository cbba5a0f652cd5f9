"""Several processes that do the same work, each a share of it; with one process, nothing.

In: the processes of ``accelerate launch`` or ``torchrun``, which all make the same calls in order,
each with the whole model. Out: items and sums shared between them, so that all end with the same
numbers. Where one of them fails, the others stop in the next call with an
:class:`OtherProcessError` that says which one, and how, instead of waiting for it: whatever is
shared begins with an exchange that carries failures, and all that shares is done :func:`in_step`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from alphaedit_peft.messages import SHOWN, cut

T = TypeVar("T")
_TOLD = "_alphaedit_told_others"  # set on an error that the others have heard of
LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK")  # what launchers put into the environment


class OtherProcessError(RuntimeError):
    """Another process failed, so that this one cannot go on."""


def count() -> int:
    """How many processes there are; those that a launcher started are joined at the first call."""
    if not dist.is_available():
        return 1
    if not dist.is_initialized():
        if not all(name in os.environ for name in LAUNCHED) or os.environ["WORLD_SIZE"] == "1":
            return 1
        from accelerate import PartialState

        PartialState()  # chooses the backend and this process's device
    return dist.get_world_size()


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def gathered(value: T) -> list[T]:
    """Every process's value, in the order of ranks; they go through pickle, tensors on the CPU."""
    return [value] if count() == 1 else _exchanged(None, value)


def from_main(make: Callable[[], T]) -> T:
    """What the main process makes, in all of them; the others make nothing."""
    if count() == 1:
        return make()
    with in_step():
        made = make() if is_main() else None
    found: Any = gathered(made)[0]
    return found


def summed(matrix: Tensor) -> Tensor:
    """The sum of every process's matrix, of one shape and dtype: the same bits in all."""
    if count() == 1:
        return matrix
    gathered(None)  # another may have failed
    between_gpus = dist.get_backend() == "nccl"
    total = matrix.to(torch.cuda.current_device() if between_gpus else "cpu", copy=True)
    dist.all_reduce(total)
    return total.to(matrix.device)


def share(
    items: Sequence[Any], work: Callable[[Sequence[Any]], Sequence[Tensor]]
) -> tuple[Tensor, ...]:
    """Do some work on a share of the items in each process, and give all of it to all.

    Args:
        items: the same ones in all processes. Where there are fewer than processes, each does all.
        work: takes items and gives tensors with one entry for each along the first axis, which
            are returned for all items, in their order.
    """
    n = count()
    if n == 1 or len(items) < n:
        return tuple(work(items))
    with in_step():
        own = tuple(work(items[rank() :: n]))
    parts = gathered([column.detach().cpu() for column in own])
    whole = tuple(column.new_empty(len(items), *column.shape[1:]) for column in own)
    for r, part in enumerate(parts):
        for column, found in zip(whole, part, strict=True):
            column[r::n] = found.to(column)
    return whole


@contextmanager
def in_step() -> Iterator[None]:
    """Go on after the block, or the function so decorated, only if it ended well in all processes.

    Wherever a process fails, the others hear of it once, in the exchange that they come to next.
    """
    try:
        yield
    except OtherProcessError:
        raise
    except BaseException as error:
        if count() > 1 and not getattr(error, _TOLD, False):
            setattr(error, _TOLD, True)
            _exchanged(f"{type(error).__name__}: {cut(str(error), SHOWN)}", None, quiet=True)
        raise
    gathered(None)


def require_same(value: Any, what: str) -> None:
    """Refuse values, named by ``what``, that processes differ in, as they can on unlike devices."""
    found = gathered(value)
    other = next((r for r, one in enumerate(found) if one != found[0]), None)
    if other is not None:
        raise RuntimeError(
            f"{what} differs between process 0 and process {other}, so their packs would; run them "
            "on devices of one kind, with the same versions and the same inputs"
        )


def _exchanged(failure: str | None, value: T, *, quiet: bool = False) -> list[T]:
    """Every process's value, unless one of them brings a failure."""
    slots: list[Any] = [None] * count()
    try:
        dist.all_gather_object(slots, (failure, value))
    except RuntimeError as error:  # of the connection
        why = cut(str(error), SHOWN)
        raise OtherProcessError(
            f"process {rank()} of {len(slots)} lost the others ({why}), so it stopped; one of them "
            "was ended from outside, or could not say why it failed; see its own output"
        ) from error
    failed = next((r for r, (reason, _) in enumerate(slots) if reason is not None), None)
    if failed is not None and not quiet:
        raise OtherProcessError(
            f"process {failed} of {len(slots)} failed ({slots[failed][0]}), so this one stopped "
            "too; see that process's own error"
        )
    return [found for _, found in slots]
