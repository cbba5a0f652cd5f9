"""Key moments C0 = K0^T K0 / tokens (paper section 3.2): one pass of a corpus through a model.

In: a model, the names of its rewrite modules and token batches. Out: :class:`Sums`, the sum of
k k^T (d_in, d_in) for each module and how many tokens went in (``space.KeyMoments`` is what users
see of it). The model runs in its own dtype on its own devices and stops in front of the last
rewrite module; a pass that is interrupted can go on from a checkpoint file, and several processes
take the batches in turn: all end with the same sums.
"""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from alphaedit_peft import hooks, parallel, saving
from alphaedit_peft.devices import reads_ids_on
from alphaedit_peft.messages import sentence, shown
from alphaedit_peft.nullspace.corpus import TokenBatch
from alphaedit_peft.progress import Bar, span
from alphaedit_peft.safe_files import (
    MAX_TENSOR_BYTES,
    DamagedFileError,
    Field,
    check_fields,
    opened_tensors,
    parse_json,
    refusing,
    shown_name,
)

BATCHES_PER_CHECKPOINT = 200
LOGGER = logging.getLogger(__name__)
MEASURED = 4  # batches from which the time of a pass is told, the first of them left out
BLOCK, MAX_BLOCKS = 256, 8  # of a sum: smallest width, and most to a side


@dataclass
class Sums:
    """Running sums: module name -> sum of k k^T (d_in, d_in), and what went into them.

    float32 sums: over b batches rounding adds about 6e-8 sqrt(b) to an entry, which stays below
    the corpus's own sampling error, 1 / sqrt(tokens), and takes half the memory of float64.
    ``seen`` is a hash over all token ids, in order.
    """

    matrices: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    batches: int = 0
    texts: int = 0
    seen: str = ""

    def mean(self, name: str) -> Tensor:
        """C0 of a module, (d_in, d_in), on the CPU; a ValueError where no tokens went in."""
        if not self.tokens:
            raise ValueError("the corpus holds 0 tokens; give texts that are not blank")
        return (self.matrices[name] / self.tokens).cpu()


_COUNTS = {
    **{name: Field(int, 0, 2**62) for name in ("tokens", "batches", "texts")},
    "seen": Field(str, high=64),
}


def _unreadable(where: str | Path, wrong: str) -> DamagedFileError:
    return DamagedFileError(
        sentence(where, f"it is no readable checkpoint ({wrong})", "delete it or give another path")
    )


@dataclass(frozen=True)
class Checkpoint:
    """Where a pass keeps its sums, and what it must be about to be gone on with."""

    path: Path
    subject: Mapping[str, Any]

    def write(self, sums: Sums) -> None:
        """Replace the file in one step, so that a crash leaves the old one; in the main process."""
        if not parallel.is_main():
            return
        counts = {name: value for name, value in vars(sums).items() if name != "matrices"}
        notes = json.dumps({"subject": self.subject, "counts": counts}, sort_keys=True)
        kept = {name: matrix.contiguous() for name, matrix in sums.matrices.items()}
        saving.replace_file(self.path, lambda path: save_file(kept, path, {"notes": notes}))

    def read(self) -> Sums:
        """The sums so far; empty where there is no file yet, a ValueError where it is another's."""
        if not self.path.exists():
            return Sums()
        with opened_tensors(self.path, MAX_TENSOR_BYTES, _unreadable) as file:
            file.require((torch.float32,))
            with refusing(self.path, _unreadable):
                notes = parse_json(file.notes.get("notes", "").encode(), self.path, _unreadable)
                check_fields(notes, {"subject": Field(dict), "counts": Field(dict)})
                counts = check_fields(notes["counts"], _COUNTS, "counts")
                for name, stored in file.tensors.items():
                    if len(stored.shape) != 2 or stored.shape[0] != stored.shape[1]:
                        raise ValueError(f"{shown_name(name)} {stored.shape} is not square")
            wanted = json.loads(json.dumps(self.subject))
            other = [n for n in ("modules", *wanted) if notes["subject"].get(n) != wanted[n]]
            if other:
                was, now = (shown(of.get(other[0]), 120) for of in (notes["subject"], wanted))
                wrong = f"it was made for {other[0]} {was}, this pass is for {now}"
                raise ValueError(sentence(self.path, wrong, "delete it or give another path"))
            return Sums({name: file.read(name) for name in file.tensors}, **counts)

    def alone(self) -> AbstractContextManager[None]:
        """Keep other passes off the file, within the block."""
        return saving.alone(self.path) if parallel.is_main() else nullcontext()

    def begin(self) -> Sums:
        """What it holds: the counts in every process, the sums in the main one."""
        sums = self.read() if parallel.is_main() else Sums()
        counts = parallel.gathered({**vars(sums), "matrices": {}})[0]
        return Sums(**{**counts, "matrices": sums.matrices})


def collect_sums(
    model: Any,
    names: list[str],
    batches: Iterable[TokenBatch],
    *,
    checkpoint: Checkpoint | None = None,
    bar: Bar,
    tell: bool = False,
) -> Sums:
    """Sum k k^T over all tokens of all batches.

    Args:
        model: the bare base model.
        names: rewrite modules, the one that runs last at the end.
        batches: the same ones in the same order when going on from a checkpoint.
        checkpoint: where to keep the sums; written now and then, on Ctrl-C and at the end.

        bar: counts the tokens.
        tell: record the pace, once.

    Raises:
        ValueError: activations that are not finite, or a checkpoint of other texts.
        BlockingIOError: another process keeps its sums in the same checkpoint.
        OSError: the checkpoint cannot be written; the one before is untouched.
    """
    with parallel.in_step(), checkpoint.alone() if checkpoint else nullcontext():
        sums = Sums() if checkpoint is None else checkpoint.begin()
        bar.initial = sums.tokens
        bar.update(sums.tokens)
        pace = Pace(bar.total)
        try:
            for batch in _remaining(batches, sums):
                # a batch half summed cannot be saved, so a signal waits for its end
                with _signals_held() if checkpoint else nullcontext():
                    if sums.batches % parallel.count() == parallel.rank():
                        _add(model, names, batch, sums)
                    sums.seen = _chained(sums.seen, batch)
                    sums.tokens += batch.tokens
                    sums.batches += 1
                    sums.texts = batch.texts
                bar.update(batch.tokens)
                if tell:
                    pace.measure(sums.tokens)
                if checkpoint and sums.batches % BATCHES_PER_CHECKPOINT == 0:
                    checkpoint.write(_combined(sums, names))
        except KeyboardInterrupt:
            if checkpoint and parallel.count() == 1:  # several stop at different batches
                checkpoint.write(sums)
            raise
        whole = _combined(sums, names)
        if checkpoint:
            checkpoint.write(whole)
    return whole


class Pace:
    """Tells once, from the first few batches, how long a pass takes."""

    def __init__(self, total: int | None) -> None:
        self.total, self.batches = total, 0
        self.tokens, self.begun = 0, 0.0  # when the first batch was done

    def measure(self, tokens: int) -> None:
        """Take note of a batch that is done, with so many tokens by then."""
        self.batches += 1
        if self.batches == 1:
            self.tokens, self.begun = tokens, time.monotonic()
        elif self.batches == MEASURED:
            rate = (tokens - self.tokens) / max(1e-9, time.monotonic() - self.begun)
            told = f"{rate:,.0f} tokens a second"
            if self.total is not None:
                told += f", about {span((self.total - tokens) / rate)} left"
            LOGGER.info("key moments: %s", told)


def _combined(sums: Sums, names: list[str]) -> Sums:
    """The sums of all processes together; some may have had no batch."""
    if parallel.count() == 1:
        return sums
    shapes = parallel.gathered({name: matrix.shape for name, matrix in sums.matrices.items()})
    known = {name: shape for found in shapes for name, shape in found.items()}
    own = {
        name: sums.matrices.get(name, torch.zeros(known[name], dtype=torch.float32))
        for name in names
        if known
    }
    return replace(sums, matrices={name: parallel.summed(own[name]) for name in own})


def _remaining(batches: Iterable[TokenBatch], sums: Sums) -> Iterator[TokenBatch]:
    """The batches that are not in the sums yet, after a check that the others are."""
    remaining = iter(batches)
    seen = ""
    for batch in islice(remaining, sums.batches):
        seen = _chained(seen, batch)
    if seen != sums.seen:
        raise ValueError(
            f"the checkpoint holds {sums.tokens} tokens of other texts, or of these in other "
            "batches (tokens_per_batch, max_tokens); give the same ones or delete the file"
        )
    return remaining


def _add(model: Any, names: list[str], batch: TokenBatch, sums: Sums) -> None:
    padded = not bool(batch.mask.all())

    def see(name: str, inputs: Tensor) -> None:
        keys = inputs.reshape(-1, inputs.shape[-1])  # (rows * tokens, d_in)
        if padded:
            keys = keys[batch.mask.reshape(-1).to(keys.device)]  # (real tokens, d_in)
        if name not in sums.matrices:
            width = keys.shape[1]
            sums.matrices[name] = torch.zeros(width, width, dtype=torch.float32, device=keys.device)
        total = sums.matrices[name] = sums.matrices[name].to(keys.device)
        add_products(total, keys)
        if not torch.isfinite(total.diagonal()).all():  # squares show what is not finite
            raise ValueError(
                f"the keys of {name} hold NaN or infinity in {inputs.dtype}; load the model in "
                "bfloat16 or float32, or check its weights"
            )

    to = reads_ids_on(model)
    inputs = {"input_ids": batch.ids.to(to), "attention_mask": batch.mask.long().to(to)}
    with torch.no_grad(), hooks.watching_inputs(model, names, see):
        hooks.run_until(model, inputs, names[-1], entering=True)


def add_products(total: Tensor, keys: Tensor) -> None:
    """Add K^T K to a symmetric sum, in place, in float32.

    Only blocks on and above the diagonal are multiplied, and mirrored: with b blocks a side this
    is (b + 1) / 2b of the arithmetic. Products of bfloat16 and float16 keys are exact in float32;
    a GPU multiplies them as they are.

    Args:
        total: (d_in, d_in), float32, symmetric.
        keys: (tokens, d_in), any floating dtype, on the same device.
    """
    width = len(total)
    narrow = keys.dtype in (torch.bfloat16, torch.float16) and keys.is_cuda
    keys = keys if narrow else keys.float()
    step = max(BLOCK, -(-width // MAX_BLOCKS))
    for first in range(0, width, step):
        left = keys[:, first : first + step].T
        rows = slice(first, first + step)
        if narrow:
            total[rows, first:] += torch.mm(left, keys[:, first:], out_dtype=torch.float32)
        else:
            total[rows, first:].addmm_(left, keys[:, first:])
        total[first + step :, rows] = total[rows, first + step :].T


def _chained(seen: str, batch: TokenBatch) -> str:
    content = batch.ids.numpy().tobytes() + batch.mask.numpy().tobytes()
    return hashlib.sha256(seen.encode() + content).hexdigest()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Let Ctrl-C, and SIGTERM where it is handled, take effect only at the end of the block."""
    if threading.current_thread() is not threading.main_thread():  # other threads never see them
        yield
        return
    came: list[signal.Signals] = []
    before = {n: h for n in (signal.SIGINT, signal.SIGTERM) if callable(h := signal.getsignal(n))}
    for number in before:
        signal.signal(number, lambda number, _: came.append(signal.Signals(number)))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in came[:1]:
        before[number](number, None)
