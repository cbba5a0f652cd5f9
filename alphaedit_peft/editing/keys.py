"""Keys and hidden states of edits, read on the way up, so that no block runs twice for nothing.

In: a runner and tokenised edits. Out: :class:`EditKeys`: each edit's key at one rewrite layer, its
hidden state after the last one, and where its rows stand: the states in front of the layer's block.
Once the layer is written, ``onward`` runs only what the write can reach, from those states on: bare
prompts up to the last rewrite layer, prompts behind a context up to the next one's rewrite module.
Rows are cut after the subject, since keys are causal (but for rows above a switch of the model's
position tables, which are run whole), and what several of them have behind contexts
in common runs once for all (``shared_prefixes``). The states of all rows are kept, on the model's
device and in its dtype: rows x tokens x d numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alphaedit_peft import hooks
from alphaedit_peft.devices import for_solving
from alphaedit_peft.editing.memory import by_halves
from alphaedit_peft.editing.prompts import EditRows, TokenRow
from alphaedit_peft.editing.runner import Runner, at_least_float32
from alphaedit_peft.editing.shared_prefixes import (
    Cut,
    PrefixCache,
    aligned,
    cached,
    cut_rows,
    recording,
)
from alphaedit_peft.tokens import padded


@dataclass(frozen=True)
class EditKeys:
    """What edits' rows give at a rewrite layer, and where they can be run on from.

    Args:
        layer: the rewrite layer that ``keys`` are of; None above the last one.
        keys: (edits, d_in), float32 or better: the bare prompt's and the mean over contexts', half
            each. The paper averages over contexts (Eq. 2 of MEMIT); its code averages over kinds of
            context first, and the bare prompt is a kind of its own. Without contexts it is the bare
            prompt's.
        hidden: (edits, d), the bare prompt's hidden state after the last rewrite layer.
        bare: batches of bare prompts, and how far they have run.
        others: of prompts behind contexts.
        shared: leading tokens that some of ``others`` go on from, at most one batch.
    """

    layer: int | None
    keys: Tensor
    hidden: Tensor
    bare: tuple[Part, ...] = ()
    others: tuple[Part, ...] = ()
    shared: tuple[Part, ...] = ()

    def chosen(self, edits: Sequence[int]) -> EditKeys:
        """The same of some of the edits, in the given order."""
        some, place = list(edits), {edit: k for k, edit in enumerate(edits)}
        bare, others = (
            tuple(part.renumbered(place) for part in parts if any(e in place for e, _ in part.rows))
            for parts in (self.bare, self.others)
        )
        given = self.keys[some], self.hidden[some]
        return EditKeys(self.layer, *given, bare, others, self.shared)

    def onward(self, runner: Runner) -> EditKeys:
        """What the edits give once ``layer`` is written: keys at the next one, if any, and h."""
        assert self.layer is not None, "above the last rewrite layer nothing is left to read"
        above = [layer for layer in runner.layers if layer > self.layer]
        return _run_on(runner, (self.bare, self.others, self.shared), above[:1])


def take_keys(runner: Runner, edits: Sequence[EditRows]) -> EditKeys:
    """Keys at the first rewrite layer and hidden states after the last, from one pass.

    All edits have equally many rows.
    """
    return _run_on(runner, _parts_of(runner, edits), runner.layers[:1])


def keys_by_layer(runner: Runner, edits: Sequence[EditRows]) -> tuple[dict[int, Tensor], Tensor]:
    """Of the model as it is, keys (edits, d_in) at every rewrite layer and h (edits, d)."""
    bare, others, _ = _run_all(runner, _parts_of(runner, edits), runner.layers)
    return {layer: _mean_keys(layer, bare, others) for layer in runner.layers}, _hidden(bare)


@dataclass(frozen=True)
class _Ran:
    """What a run of a part gave: by layer its keys (rows, d_in), and h (rows, d).

    ``part`` stands where the run can be gone on from; ``prefix_cache`` is what it left in a cache.
    """

    part: Part
    keys: Mapping[int, Tensor]
    hidden: Tensor | None
    prefix_cache: PrefixCache | None


def _run_on(runner: Runner, parts: Parts, layers: Sequence[int]) -> EditKeys:
    """Run the parts on to the one layer of ``layers``, or to the end where there is none."""
    runs = _run_all(runner, parts, layers)
    hidden = _hidden(runs[0])
    if not layers:
        return EditKeys(None, hidden.new_zeros(len(hidden), 0), hidden)
    stand = (tuple(ran.part for ran in some) for some in runs)
    return EditKeys(layers[0], _mean_keys(layers[0], *runs[:2]), hidden, *stand)


def _run_all(
    runner: Runner, parts: Parts, layers: Sequence[int]
) -> tuple[list[_Ran], list[_Ran], list[_Ran]]:
    """Runs of bare prompts through L, and of the others to the module of the last of ``layers``.

    Without ``layers`` only the bare ones run.
    """
    alone, behind, prefixes = parts
    bare = _in_parts(alone, partial(_run, runner, layers=layers, last=None))
    if not layers:
        return bare, [], []
    run = partial(_run, runner, layers=layers, last=layers[-1])
    shared = [run(part, keeping=True) for part in prefixes]
    prefix_cache = shared[0].prefix_cache if shared else None
    return bare, _in_parts(behind, partial(run, prefix_cache=prefix_cache)), shared


def _in_parts(parts: Sequence[Part], run: Callable[[Part], _Ran]) -> list[_Ran]:
    """Run every part, by halves where memory runs out."""
    return by_halves(
        parts,
        run,
        size=lambda part: len(part.rows),
        split=lambda left, most: [*left[0].cut_at(most), *left[1:]],
        what="prompts",
        setting="tokens_per_batch",
    )


def _run(
    runner: Runner,
    part: Part,
    *,
    layers: Sequence[int],
    last: int | None,
    prefix_cache: PrefixCache | None = None,
    keeping: bool = False,
) -> _Ran:
    """Run a part on up to the rewrite module of ``last``; None: through the last rewrite layer.

    The keys of ``layers`` are taken on the way, and the states in front of the first of them.
    ``prefix_cache`` is that of the shared prefixes; ``keeping`` leaves the part's own.
    """
    model, layout = runner.model, runner.architecture
    inputs, cache = recording(part.inputs) if keeping else (part.inputs, None)
    if prefix_cache is not None and part.behind:
        inputs = prefix_cache.chosen(part.behind).followed_by(model, part.inputs)
    names = {layout.rewrite_name(layer): layer for layer in layers}
    keys: dict[int, Tensor] = {}
    below: list[Any] = []
    top: list[Any] = []
    stop = runner.blocks_below[-1] if last is None else layout.rewrite_name(last)

    def take_key(name: str, values: Tensor) -> None:
        keys[names[name]] = part.at_subject(values)

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if part.states is not None:
            here, passed = part.states, runner.blocks[: part.block]
            stack.enter_context(hooks.resuming_above(model, passed, part.form, lambda: here))
        stack.enter_context(hooks.watching_inputs(model, list(names), take_key))
        if layers and layers[0] > part.block:
            under = layout.block_name(layers[0] - 1)
            stack.enter_context(hooks.watching_output(model, under, below.append))
        if last is None:
            stack.enter_context(hooks.watching_output(model, stop, top.append))
        hooks.run_until(model, inputs, stop, entering=last is not None)
    hidden = part.at_subject(hooks.hidden_of(top[0])) if top else None
    if below:
        states, form = hooks.hidden_of(below[0]), hooks.form_of(below[0])
        part = replace(part, block=layers[0], states=states, form=form)
    left = None if cache is None else aligned(cached(cache), part.subjects + 1)
    return _Ran(part, keys, hidden, left)


def _mean_keys(layer: int, bare: Sequence[_Ran], others: Sequence[_Ran]) -> Tensor:
    """(edits, d_in): see ``EditKeys.keys``."""
    alone = _table(bare, [ran.keys[layer] for ran in bare])[:, 0]
    if not others:
        return alone
    return (alone + _table(others, [ran.keys[layer] for ran in others]).mean(1)) / 2


def _hidden(bare: Sequence[_Ran]) -> Tensor:
    """h of all edits, (edits, d)."""
    return _table(bare, [ran.hidden for ran in bare if ran.hidden is not None])[:, 0]


def _table(runs: Sequence[_Ran], values: Sequence[Tensor]) -> Tensor:
    """What the runs gave for their rows, (edits, rows of each, k)."""
    names = [name for ran in runs for name in ran.part.rows]
    order = sorted(range(len(names)), key=names.__getitem__)
    return torch.cat(list(values))[order].unflatten(0, (len({edit for edit, _ in names}), -1))


@dataclass(frozen=True)
class Part:
    """A padded batch of rows and how far it has run: up to the front of ``block``.

    ``rows`` are pairs of an edit and which of its prompts it is, ``subjects`` (rows,) the positions
    that are read. ``behind`` says which shared prefix each row goes on from: of all rows or none.
    ``states`` (rows, tokens, d) is None in front of block 0; ``form`` is what the block below puts
    out, in its family's own form.
    """

    rows: tuple[tuple[int, int], ...]
    subjects: Tensor
    inputs: Mapping[str, Tensor]
    behind: tuple[int, ...] = ()
    block: int = 0
    states: Tensor | None = None
    form: Any = None

    def renumbered(self, place: Mapping[int, int]) -> Part:
        """The rows of some edits, under their new numbers."""
        part = self.chosen([k for k, (edit, _) in enumerate(self.rows) if edit in place])
        return replace(part, rows=tuple((place[edit], prompt) for edit, prompt in part.rows))

    def cut_at(self, row: int) -> tuple[Part, Part]:
        """The rows before one, and the others."""
        every = range(len(self.rows))
        return self.chosen(every[:row]), self.chosen(every[row:])

    def chosen(self, rows: Sequence[int]) -> Part:
        """Some of the rows, by their places."""
        some = list(rows)
        return replace(
            self,
            rows=tuple(self.rows[k] for k in some),
            subjects=self.subjects[some],
            inputs={name: value[some] for name, value in self.inputs.items()},
            behind=tuple(self.behind[k] for k in some if self.behind),
            states=None if self.states is None else self.states[some],
        )

    def at_subject(self, values: Tensor) -> Tensor:
        """Values (rows, tokens, k) or (rows x tokens, k) at each row's subject, (rows, k)."""
        if values.ndim == 2:  # OPT's blocks flatten batch and tokens before their MLP
            values = values.unflatten(0, self.inputs["input_ids"].shape)
        rows = torch.arange(len(self.rows), device=values.device)
        found = at_least_float32(values[rows, self.subjects.to(values.device)])
        return for_solving(found)


# bare prompts, those behind contexts, and prefixes that some of these share
Parts = tuple[tuple[Part, ...], tuple[Part, ...], tuple[Part, ...]]


def _parts_of(runner: Runner, edits: Sequence[EditRows]) -> Parts:
    """Batches of the prompts, in front of the first block."""
    named = [
        ((e, j), row.key_row if runner.all_short([len(row.ids)]) else row)
        for e, edit in enumerate(edits)
        for j, row in enumerate(edit.rows)
    ]
    bare = [(name, row) for name, row in named if name[1] == 0]
    others = [(name, row) for name, row in named if name[1] > 0]
    cut = cut_rows(runner, [row.ids for _, row in others], [row.subject_last for _, row in others])
    alone, behind = _batched(runner, bare, Cut.none(len(bare))), _batched(runner, others, cut)
    if not cut.prefixes:
        return alone, behind, ()
    last = torch.tensor([len(prefix) - 1 for prefix in cut.prefixes])
    names = tuple((number, 0) for number in range(len(cut.prefixes)))
    return alone, behind, (Part(names, last, padded(cut.prefixes, runner.device)),)


def _batched(
    runner: Runner, rows: Sequence[tuple[tuple[int, int], TokenRow]], cut: Cut
) -> tuple[Part, ...]:
    """Named rows in batches, of each what follows its shared prefix."""
    starts = cut.starts
    return tuple(
        Part(
            tuple(rows[i][0] for i in which),
            torch.tensor([rows[i][1].subject_last - starts[i] for i in which]),
            inputs,
            behind,
        )
        for which, inputs, behind in cut.batches(runner, [row.ids for _, row in rows])
    )
