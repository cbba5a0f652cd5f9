"""Run only what a change at the subject can reach: the blocks above, the tokens from there on.

In: token rows and the last rewrite layer L. Out: log-probabilities where the rows are read, for any
hidden state put at the subject's last token after block L. What lies before never changes, so it
is computed once: block L's output, and the keys and values of the tokens before the subject. The
model's own forward runs the rest, with its masks, positions and head, under ``config.autocast``
where it is set; h and what is cached are always the model's own. A family whose cache cannot
be continued this way is found out by a comparison at the start, and runs whole rows instead.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from alphaedit_peft import hooks
from alphaedit_peft.editing.bench import Bench, gathering_logits
from alphaedit_peft.tokens import padded


@dataclass(frozen=True)
class Row:
    """A token row of a group: what it reads and scores, and its weight in the group's loss."""

    group: int
    ids: tuple[int, ...]
    subject: int
    reads: tuple[int, ...]  # positions whose logits the loss reads
    target: tuple[int, ...]  # empty for the KL row
    weight: float


class Resumed(Protocol):
    """Rows that can be run again from block L with other hidden states at the subject."""

    hidden: Tensor
    """Hidden states at the subjects, (rows, d), in the model's dtype."""

    def log_probs(self, chosen: Sequence[int], moved: Tensor) -> Tensor:
        """Log-probabilities at all reads of the chosen rows in turn, (reads, vocab).

        Args:
            chosen: indices of rows.
            moved: their hidden states at the subject, (len(chosen), d).
        """


def resume(bench: Bench, rows: Sequence[Row]) -> Resumed:
    """The fastest form of :class:`Resumed` that gives the model's own numbers.

    Warns:
        UserWarning: whole rows have to run, because the cache cannot be continued.
    """
    if max(row.subject for row in rows) == 0:
        return WholeRows(bench, rows)
    tails = Tails(bench, rows)
    if tails.agrees():
        return tails
    warnings.warn(
        f"{type(bench.model).__name__}: its cache does not continue to the same numbers; targets "
        "are optimised over whole rows, which takes several times as long",
        stacklevel=2,
    )
    return WholeRows(bench, rows)


class WholeRows:
    """All tokens of each row, above block L."""

    def __init__(self, bench: Bench, rows: Sequence[Row]) -> None:
        self.bench, self.rows = bench, rows
        self.blocks = [bench.architecture.block_name(i) for i in range(bench.layers[-1] + 1)]
        self.inputs = padded([row.ids for row in rows], bench.device)
        self.output = hooks.capture_output(bench.model, self.inputs, self.blocks[-1])
        self.states = hooks.hidden_of(self.output)  # (rows, tokens, d)
        subjects = torch.tensor([row.subject for row in rows], device=self.states.device)
        self.hidden = self.states[torch.arange(len(rows), device=self.states.device), subjects]

    def log_probs(self, chosen: Sequence[int], moved: Tensor) -> Tensor:
        """See :class:`Resumed`."""
        rows = [self.rows[i] for i in chosen]
        length = max(len(row.ids) for row in rows)
        states = self.states[list(chosen), :length]
        which = torch.arange(len(rows), device=states.device)
        subjects = torch.tensor([row.subject for row in rows], device=states.device)
        hidden = states.index_put((which, subjects), moved.to(states))
        inputs = {name: value[list(chosen), :length] for name, value in self.inputs.items()}
        where = [(i, position) for i, row in enumerate(rows) for position in row.reads]
        with (
            _reduced(self.bench, hidden),
            hooks.resuming_above(self.bench.model, self.blocks, self.output, lambda: hidden),
            gathering_logits(self.bench.model, self.bench.head_name, where),
        ):
            return _log_softmax(self.bench.model(**inputs, use_cache=False).logits[0])


class Tails:
    """The tokens from each row's subject on, above block L; those before are in a cache.

    Prefixes are aligned at their end, so a row's subject is always at index ``width``.
    """

    def __init__(self, bench: Bench, rows: Sequence[Row]) -> None:
        self.bench, self.rows = bench, rows
        self.blocks = [bench.architecture.block_name(i) for i in range(bench.layers[-1] + 1)]
        inputs = padded([row.ids for row in rows], bench.device)
        self._run_whole(inputs)
        subjects = torch.tensor([row.subject for row in rows], device=bench.device)
        self.subjects, self.width = subjects, int(subjects.max())
        self.lengths = torch.tensor([len(row.ids) for row in rows], device=bench.device) - subjects
        steps = torch.arange(int(self.lengths.max()), device=bench.device)
        self.positions = subjects[:, None] + steps  # (rows, tail)
        inside = self.positions.clamp_max(inputs["input_ids"].shape[1] - 1)
        self.ids = inputs["input_ids"].gather(1, inside)
        self.states = _take(hooks.hidden_of(self.output), inside)  # (rows, tail, d)
        self.hidden = self.states[:, 0]
        before = torch.arange(self.width, device=bench.device) - self.width + subjects[:, None]
        self.prefix = [
            (_take(keys, before.clamp_min(0)), _take(values, before.clamp_min(0)))
            for keys, values in self.cached
        ]  # per block (rows, heads, width, d_head)
        del self.cached
        self.mask = torch.cat([before >= 0, steps < self.lengths[:, None]], dim=1).long()

    @torch.no_grad()
    def _run_whole(self, inputs: dict[str, Tensor]) -> None:
        """One forward over whole rows: block L's output, every block's cache, one read a row."""
        model = self.bench.model
        seen: list[Any] = []
        cache = DynamicCache()
        where = [(i, row.reads[-1]) for i, row in enumerate(self.rows)]
        with (
            hooks.watching_output(model, self.blocks[-1], seen.append),
            gathering_logits(model, self.bench.head_name, where),
        ):
            logits = model(**inputs, past_key_values=cache, use_cache=True).logits[0]
        self.output: Any = seen[0]
        self.expected = _log_softmax(logits)  # (rows, vocab)
        layers: Sequence[Any] = cache.layers
        self.cached = [(layer.keys, layer.values) for layer in layers]

    @torch.no_grad()
    def agrees(self) -> bool:
        """Whether the tails give the whole rows' log-probabilities with nothing moved."""
        if len(self.prefix) != self.bench.architecture.num_blocks:
            return False
        found = self.log_probs(range(len(self.rows)), self.hidden)
        last = torch.tensor([len(row.reads) for row in self.rows]).cumsum(0) - 1
        likely = self.expected > -10  # far out in the tail rounding is large and plays no part
        error = (found[last.to(found.device)] - self.expected)[likely].abs()
        half = self.states.dtype in (torch.bfloat16, torch.float16)
        bound = 0.5 if half or self.bench.config.autocast else 0.02
        del self.expected
        return bool((error < bound).all())

    def log_probs(self, chosen: Sequence[int], moved: Tensor) -> Tensor:
        """See :class:`Resumed`."""
        pick = torch.tensor(list(chosen), device=self.ids.device)
        width = int(self.subjects[pick].max())
        length = int(self.lengths[pick].max())
        skip = self.width - width
        rest = self.states[pick.to(self.states.device), 1:length]
        hidden = torch.cat([moved.to(rest)[:, None], rest], dim=1)  # (chosen, tail, d)
        where = [
            (i, position - self.rows[k].subject)
            for i, k in enumerate(chosen)
            for position in self.rows[k].reads
        ]
        with (
            _reduced(self.bench, hidden),
            hooks.resuming_above(self.bench.model, self.blocks, self.output, lambda: hidden),
            gathering_logits(self.bench.model, self.bench.head_name, where),
        ):
            logits = self.bench.model(
                input_ids=self.ids[pick, :length],
                attention_mask=self.mask[pick, skip : self.width + length],
                past_key_values=self._cache(pick, skip),
                use_cache=True,
                **self._positions(pick, length),
            ).logits[0]
        return _log_softmax(logits)

    def _positions(self, pick: Tensor, length: int) -> dict[str, Tensor]:
        """Positions (chosen, tail), for models that do not take them from the mask."""
        if "position_ids" not in inspect.signature(self.bench.model.forward).parameters:
            return {}
        return {"position_ids": self.positions[pick, :length]}

    def _cache(self, pick: Tensor, skip: int) -> DynamicCache:
        cache = DynamicCache()
        for block, (keys, values) in enumerate(self.prefix):
            here = pick.to(keys.device)
            cache.update(keys[here, :, skip:], values[here, :, skip:], block)
        return cache


@contextmanager
def _reduced(bench: Bench, hidden: Tensor) -> Iterator[None]:
    """Matrix products in the dtype of ``config.autocast``; what goes in and out stays as it is."""
    dtype, device = bench.config.autocast, hidden.device.type
    with ExitStack() as stack:
        if dtype is not None:
            stack.enter_context(torch.autocast(device, getattr(torch, dtype)))
        if dtype is not None and device == "cpu":
            # the gradient of the CPU's fused attention takes far longer in bfloat16
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def _take(values: Tensor, positions: Tensor) -> Tensor:
    """Pick positions (rows, k) along the token axis, the last but one."""
    index = positions.to(values.device)
    index = index.view(len(index), *[1] * (values.ndim - 3), -1, 1)
    return values.gather(-2, index.expand(*values.shape[:-2], -1, values.shape[-1]))


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
