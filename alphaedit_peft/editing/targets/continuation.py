"""Rows run again from block L with other hidden states at the subject, as often as z moves.

In: token rows and the last rewrite layer L. Out: a :class:`Resumable`, log-probabilities where the
rows read. :class:`FromSubject` runs once what z cannot reach (``_passes_before``) and keeps it
in a cache: then only each row's suffix runs, from its subject on. Both are batched by length for
themselves, since rows of one edit differ in what stands before the subject, and edits in what comes
after it. :class:`WholeRows` runs all tokens, where a model does not go on from a cache to the same
numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from alphaedit_peft import hooks
from alphaedit_peft.editing.runner import Runner, at_least_float32
from alphaedit_peft.editing.shared_prefixes import (
    Pair,
    PrefixCache,
    aligned,
    cached,
    cut_rows,
    recording,
    take,
)
from alphaedit_peft.editing.targets.autocast import Autocast
from alphaedit_peft.tokens import by_length, padded


@dataclass(frozen=True)
class Row:
    """A token row of a group: what it reads and scores, and its weight in the group's loss."""

    group: int
    ids: tuple[int, ...]
    subject: int
    reads: tuple[int, ...]  # positions whose logits the loss reads
    target: tuple[int, ...]  # empty for the KL row
    weight: float


class CacheDiffers(Exception):
    """Going on from a cache gives other numbers than the model's own forward."""


class Resumable(Protocol):
    """Rows that can be run again from block L with other hidden states at the subject."""

    hidden: Tensor
    """Hidden states at the subjects, (rows, d), in the model's dtype."""

    def together(self, chosen: Sequence[int]) -> list[list[int]]:
        """The chosen rows in batches, each for one call of ``log_probs``."""

    def log_probs(self, chosen: Sequence[int], moved: Tensor) -> Tensor:
        """Log-probabilities at all reads of the chosen rows in turn, (reads, vocab).

        Args:
            chosen: indices of rows that run together.
            moved: their hidden states at the subject, (len(chosen), d).

        Raises:
            CacheDiffers: at the first call for these rows, which is to move none.
        """


class WholeRows:
    """All tokens of each row, above block L, at most ``target_tokens`` of them at once."""

    def __init__(self, runner: Runner, rows: Sequence[Row], autocast: Autocast) -> None:
        self.runner, self.rows, self.autocast = runner, rows, autocast
        self.blocks = runner.blocks_below
        self.inputs = padded([row.ids for row in rows], runner.device)
        found: dict[int, Tensor] = {}
        for some in self.together(range(len(rows))):
            output = hooks.capture_output(runner.model, self._inputs(some), self.blocks[-1])
            found |= dict(zip(some, hooks.hidden_of(output), strict=True))
        self.form = hooks.form_of(output)
        self.states = pad_sequence([found[i] for i in range(len(rows))], True)  # (rows, tokens, d)
        subjects = torch.tensor([row.subject for row in rows], device=self.states.device)
        self.hidden = self.states[torch.arange(len(rows), device=self.states.device), subjects]

    def together(self, chosen: Sequence[int]) -> list[list[int]]:
        """See :class:`Resumable`."""
        runner, lengths = self.runner, [len(self.rows[i].ids) for i in chosen]
        most, few, switches = runner.settings.target_tokens, runner.few_passes, runner.switches
        batched = by_length(lengths, runner.device, most, few=few, switches=switches)
        return [[chosen[k] for k in batch] for batch in batched]

    def _inputs(self, some: Sequence[int]) -> dict[str, Tensor]:
        """The model's for some of the rows, as wide as the longest."""
        length = max(len(self.rows[i].ids) for i in some)
        return {name: value[list(some), :length] for name, value in self.inputs.items()}

    def log_probs(self, chosen: Sequence[int], moved: Tensor) -> Tensor:
        """See :class:`Resumable`."""
        inputs, rows = self._inputs(chosen), [self.rows[i] for i in chosen]
        states = self.states[list(chosen), : inputs["input_ids"].shape[1]]
        which = torch.arange(len(rows), device=states.device)
        subjects = torch.tensor([row.subject for row in rows], device=states.device)
        hidden = states.index_put((which, subjects), moved.to(states))
        where = [(i, position) for i, row in enumerate(rows) for position in row.reads]
        with (
            self.autocast.running(hidden.device),
            hooks.resuming_above(self.runner.model, self.blocks, self.form, lambda: hidden),
        ):
            return _log_probs(self.runner, inputs, where)


class FromSubject:
    """Each row from its subject on, behind a cache of what comes before."""

    def __init__(self, runner: Runner, rows: Sequence[Row], autocast: Autocast) -> None:
        """Run what comes before the subjects once.

        Raises:
            CacheDiffers: a model that does not keep all keys and values for each of its blocks.
        """
        passes = _passes_before(runner, rows, autocast)
        lengths = [len(row.ids) - row.subject for row in rows]
        batched = by_length(lengths, runner.device, few=runner.few_passes)
        parts = [{row: rows[row] for row in some} for some in batched]
        self._parts = [_Suffixes(runner, autocast, part, passes) for part in parts]
        self._places = {
            row: (part, slot) for part in self._parts for slot, row in enumerate(part.which)
        }
        places = [self._places[row] for row in range(len(rows))]
        self.hidden = torch.stack([part.states[slot, 0] for part, slot in places])  # (rows, d)

    def together(self, chosen: Sequence[int]) -> list[list[int]]:
        """See :class:`Resumable`."""
        wanted = set(chosen)
        found = [[row for row in part.which if row in wanted] for part in self._parts]
        return [some for some in found if some]

    def log_probs(self, chosen: Sequence[int], moved: Tensor) -> Tensor:
        """See :class:`Resumable`."""
        part, _ = self._places[chosen[0]]
        return part.log_probs([self._places[row][1] for row in chosen], moved)


class _Suffixes:
    """Rows whose suffixes are of like length, padded to the longest on the right.

    ``which`` are the rows, in the order of the passes that they come from.
    """

    def __init__(
        self, runner: Runner, autocast: Autocast, rows: Mapping[int, Row], passes: Sequence[_Pass]
    ) -> None:
        device = runner.device
        self.which = [row for p in passes for row in p.slots if row in rows]
        self.runner, self.autocast, self.blocks = runner, autocast, runner.blocks_below
        self.rows = [rows[row] for row in self.which]
        suffixes = [row.ids[row.subject :] for row in self.rows]
        self.inputs = padded(suffixes, device)
        self.lengths = torch.tensor([len(suffix) for suffix in suffixes])
        subjects = torch.tensor([row.subject for row in self.rows], device=device)
        positions = subjects[:, None] + torch.arange(int(self.lengths.max()), device=device)
        self.states = self._taken(positions, [(p, hooks.hidden_of(p.output), 0) for p in passes])
        self.form = hooks.form_of(passes[0].output)
        width = int(subjects.max())
        before = torch.arange(width, device=device) - width + subjects[:, None]
        pairs: dict[int, Pair] = {}
        for block in passes[0].pairs:
            sides = ([(p, p.pairs[block][side], p.width) for p in passes] for side in (0, 1))
            keys, values = (self._taken(before, side) for side in sides)
            pairs[block] = keys, values
        self.prefix_cache = PrefixCache.of(subjects.cpu(), pairs, len(runner.blocks), device)
        self.expected: dict[int, Tensor] | None = self._expected()

    def _taken(self, positions: Tensor, given: Sequence[tuple[_Pass, Tensor, int]]) -> Tensor:
        """Values at (rows, k) positions of tokens, along the last axis but one.

        ``given`` are passes with values by token, and where in them the rows' prefixes end.
        """
        found, start = [], 0
        for p, values, end in given:
            slots = [p.slots[row] for row in self.which if row in p.slots]
            if slots:
                some = positions[start : start + len(slots)] - p.starts[slots, None] + end
                found.append(take(values[slots], some))
                start += len(slots)
        return torch.cat(found)

    @torch.no_grad()
    def _expected(self) -> dict[int, Tensor]:
        """By slot, log-probabilities (vocab,) at the last read, from whole rows.

        Of the rows with the least and the most before the subject: where a cache does not
        continue, or its padding counts, it is so for them.
        """
        sizes = [(row.subject, len(row.ids)) for row in self.rows]
        order = sorted(range(len(sizes)), key=sizes.__getitem__)
        tried = sorted({order[0], order[-1]})
        where = [(k, self.rows[slot].reads[-1]) for k, slot in enumerate(tried)]
        inputs = padded([self.rows[slot].ids for slot in tried], self.runner.device)
        with self.autocast.running_above(self.blocks[-1]):
            return dict(zip(tried, _log_probs(self.runner, inputs, where), strict=True))

    def log_probs(self, chosen: Sequence[int], moved: Tensor) -> Tensor:
        """See :class:`Resumable`; ``chosen`` are slots."""
        some, model = list(chosen), self.runner.model
        length = int(self.lengths[some].max())
        rest = self.states[some, 1:length]
        hidden = torch.cat([moved.to(rest)[:, None], rest], dim=1)  # (chosen, suffix, d)
        inputs = {name: value[some, :length] for name, value in self.inputs.items()}
        rows = [self.rows[slot] for slot in some]
        where = [(i, read - row.subject) for i, row in enumerate(rows) for read in row.reads]
        with (
            nullcontext() if self.expected is None else _differing(),
            self.autocast.running(hidden.device),
            hooks.resuming_above(model, self.blocks, self.form, lambda: hidden),
            self._last_mlp_at(where),
        ):
            behind = self.prefix_cache.chosen(some).followed_by(model, inputs)
            log_probs = _log_probs(self.runner, behind, where)
        self._compare(log_probs)
        return log_probs

    def _last_mlp_at(self, where: Sequence[tuple[int, int]]) -> AbstractContextManager[None]:
        """Let the last block's MLP run only where the head reads; nothing else follows it.

        A rewrite module that the user names may be part of something that mixes tokens.
        """
        architecture, last = self.runner.architecture, self.runner.blocks[-1]
        found = architecture.rewrites[-1]
        name = last if found is None else found.module.rpartition(".")[0]
        if self.runner.settings.rewrite_module is not None or name == last:
            return nullcontext()
        return hooks.running_at(self.runner.model, name, where)

    def _compare(self, log_probs: Tensor) -> None:
        """At the first call: whether the suffixes give the whole rows' own log-probabilities."""
        if self.expected is None:
            return
        last = torch.tensor([len(row.reads) for row in self.rows]).cumsum(0) - 1
        slots, values = list(self.expected), torch.stack(list(self.expected.values()))
        likely = values > -10  # far out in the suffix rounding is large and plays no part
        found = log_probs.detach()[last[slots].to(log_probs.device)]
        error = (found - values)[likely].abs()
        half = self.states.dtype in (torch.bfloat16, torch.float16)
        bound = 0.5 if half or self.autocast.dtype is not None else 0.02
        self.expected = None
        if not bool((error < bound).all()):
            raise CacheDiffers


def _log_probs(runner: Runner, inputs: dict[str, Any], where: Sequence[tuple[int, int]]) -> Tensor:
    """Log-probabilities at (row, position) pairs, (pairs, vocab), float32 or better."""
    with hooks.gathering_logits(runner.model, runner.head_name, where):
        logits = runner.model(**{"use_cache": False, **inputs}).logits[0]
    return at_least_float32(logits).log_softmax(-1)


@dataclass(frozen=True)
class _Pass:
    """One pass over rows that are cut where a shared prefix ends.

    ``slots``: row -> its place in the batch; ``starts`` (batch,): its tokens in the prefix;
    ``output``: block L's, in its family's own form, of tokens from there on; ``pairs``: by block
    above L, keys and values (batch, heads, tokens, d_head) of tokens before the subject, those of
    the prefix in front, which end at index ``width``.
    """

    slots: dict[int, int]
    starts: Tensor
    output: Any
    pairs: dict[int, Pair]
    width: int


@torch.no_grad()
def _passes_before(runner: Runner, rows: Sequence[Row], autocast: Autocast) -> list[_Pass]:
    """Run everything that no change at the subjects can reach."""
    cut = cut_rows(runner, [row.ids for row in rows], [row.subject for row in rows])
    prefix_cache, found = None, []
    if cut.prefixes:
        inputs, cache = recording(padded(cut.prefixes, runner.device))
        with _differing(), autocast.running_above(runner.blocks_below[-1]):
            hooks.run_until(runner.model, inputs, runner.blocks[-1])
        lengths = torch.tensor([len(prefix) for prefix in cut.prefixes])
        prefix_cache = aligned(_complete(runner, cached(cache), int(lengths.max()), 0), lengths)
    for which, inputs, behind in cut.batches(runner, [row.ids for row in rows]):
        own = prefix_cache.chosen(behind) if prefix_cache is not None and behind else None
        found.append(_pass(runner, rows, autocast, which, inputs, own))
    return found


def _pass(
    runner: Runner,
    rows: Sequence[Row],
    autocast: Autocast,
    which: Sequence[int],
    inputs: dict[str, Tensor],
    prefix_cache: PrefixCache | None,
) -> _Pass:
    """Run what follows the prefixes through block L, and what is before the subjects above it."""
    model, blocks = runner.model, runner.blocks_below
    starts, width = torch.zeros(len(which), dtype=torch.long), 0
    if prefix_cache is not None:
        starts, width = prefix_cache.lengths, prefix_cache.width
    subjects = torch.tensor([rows[row].subject for row in which])
    lengths = (subjects - starts).clamp_min(1)  # a subject that nothing precedes runs for itself
    length = int(lengths.max())
    mask = torch.arange(length) < lengths[:, None]
    before = {"input_ids": inputs["input_ids"][:, :length]}
    before["attention_mask"] = mask.long().to(before["input_ids"].device)
    with _differing():
        if prefix_cache is None:
            further, cache = recording(before)
        else:
            inputs = prefix_cache.followed_by(model, inputs)
            further = prefix_cache.followed_by(model, before)
            cache = further["past_key_values"]
        output = hooks.capture_output(model, inputs, blocks[-1])
        states = hooks.hidden_of(output)
        with (
            autocast.running(states.device),
            hooks.resuming_above(model, blocks, output, lambda: states[:, :length]),
        ):
            hooks.run_until(model, further, runner.blocks[-1])
    pairs = _complete(runner, cached(cache), width + length, len(blocks))
    slots = {row: slot for slot, row in enumerate(which)}
    return _Pass(slots, starts.to(runner.device), output, pairs, width)


def _complete(runner: Runner, pairs: dict[int, Pair], tokens: int, first: int) -> dict[int, Pair]:
    """The pairs of all blocks from ``first`` on, each of so many tokens."""
    found = {block: pair for block, pair in pairs.items() if block >= first}
    whole = all(part.shape[-2] == tokens for pair in found.values() for part in pair)
    if not whole or len(found) != runner.architecture.num_blocks - first:
        raise CacheDiffers
    return found


@contextmanager
def _differing() -> Iterator[None]:
    """Say that the cache differs where a model fails on it; its blocks may need another kind.

    What fails for another reason fails again with whole rows, and is told of then.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise CacheDiffers from error
