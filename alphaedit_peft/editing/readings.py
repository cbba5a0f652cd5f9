"""Keys and hidden states of edits, read on the way up, so that no block runs twice for nothing.

In: a bench and tokenised edits. Out: :class:`Readings`: each edit's key at one rewrite layer, its
hidden state after the last one, and where its rows stand: the states in front of the layer's block.
Once the layer is written, ``onward`` runs only what the write can reach, from those states on: bare
prompts up to the last rewrite layer, prompts behind a context up to the next one's rewrite module.
Rows are cut after the subject, since keys are causal, and what several of them have behind contexts
in common runs once for all (see ``prefixes``). The states of all rows are kept, on the model's
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
from alphaedit_peft.editing.batching import Part, Parts, parts_of
from alphaedit_peft.editing.bench import Bench, tell_of_memory
from alphaedit_peft.editing.past import Past, aligned, cached, recording
from alphaedit_peft.editing.prompts import EditRows


@dataclass(frozen=True)
class Readings:
    """What edits' rows give at a rewrite layer, and where they can be run on from.

    Args:
        layer: the rewrite layer that ``keys`` are of; None above the last one.
        keys: (edits, d_in), float32 or better: the bare prompt's and the mean over contexts', half
            each. The paper averages over contexts (Eq. 2 of MEMIT); its code averages over kinds of
            context first, and the bare prompt is a kind of its own. Without contexts it is the bare
            prompt's.
        hidden: (edits, d), the bare prompt's hidden state after the last rewrite layer.
        parts: the batches of prompts and how far they have run.
    """

    layer: int | None
    keys: Tensor
    hidden: Tensor
    parts: Parts

    def chosen(self, edits: Sequence[int]) -> Readings:
        """The same of some of the edits, in the given order."""
        some = list(edits)
        return Readings(self.layer, self.keys[some], self.hidden[some], self.parts.chosen(some))

    def onward(self, bench: Bench) -> Readings:
        """What the edits give once ``layer`` is written: keys at the next one, and h.

        Above the last rewrite layer there is no next one: only h is read.
        """
        assert self.layer is not None, "above the last rewrite layer nothing is left to read"
        above = [layer for layer in bench.layers if layer > self.layer]
        return _read(bench, self.parts, above[0] if above else None)


def read(bench: Bench, edits: Sequence[EditRows]) -> Readings:
    """Keys at the first rewrite layer and hidden states after the last, from one pass.

    Args:
        bench: the model as it is.
        edits: one or more, with equally many rows each.
    """
    return _read(bench, parts_of(bench, edits), bench.layers[0])


def keys_by_layer(bench: Bench, edits: Sequence[EditRows]) -> dict[int, Tensor]:
    """Keys (edits, d_in) at every rewrite layer of the model as it is, from one pass."""
    parts, last = parts_of(bench, edits), bench.layers[-1]
    bare = _in_parts(parts.bare, partial(_run, bench, layers=bench.layers, last=last, whole=False))
    others = _run_behind(bench, parts, bench.layers, last)[1]
    return {layer: _mean_keys(layer, bare, others) for layer in bench.layers}


@dataclass(frozen=True)
class _Ran:
    """What a run of a part gave: by layer its keys (rows, d_in), and h (rows, d).

    ``part`` stands where the run can be gone on from; ``past`` is what it left in a cache.
    """

    part: Part
    keys: Mapping[int, Tensor]
    hidden: Tensor | None = None
    past: Past | None = None


def _read(bench: Bench, parts: Parts, layer: int | None) -> Readings:
    """Run the bare prompts to the last rewrite layer, the others to the module of ``layer``."""
    wanted = () if layer is None else (layer,)
    through = partial(_run, bench, layers=wanted, last=bench.layers[-1], whole=True)
    first = _in_parts(parts.bare, through)
    if layer is None:
        hidden = _hidden(first)
        return Readings(None, hidden.new_zeros(len(hidden), 0), hidden, Parts(()))
    shared, second = _run_behind(bench, parts, wanted, layer)
    stand = Parts(*(tuple(ran.part for ran in runs) for runs in (first, second, shared)))
    return Readings(layer, _mean_keys(layer, first, second), _hidden(first), stand)


def _run_behind(
    bench: Bench, parts: Parts, layers: Sequence[int], last: int
) -> tuple[list[_Ran], list[_Ran]]:
    """Run the shared prefixes and the prompts behind contexts to the module of ``last``."""
    run = partial(_run, bench, layers=layers, last=last, whole=False)
    shared = [run(part, keeping=True) for part in parts.shared]
    past = shared[0].past if shared else None
    return shared, _in_parts(parts.others, partial(run, past=past))


def _in_parts(parts: Sequence[Part], run: Callable[[Part], _Ran]) -> list[_Ran]:
    """Run every part, by halves where memory runs out."""
    found: list[_Ran] = []
    pending = list(parts)
    while pending:
        part = pending.pop(0)
        try:
            found.append(run(part))
            continue
        except torch.OutOfMemoryError:
            if len(part.rows) == 1:
                raise
        tell_of_memory(f"{len(part.rows)} prompts", len(part.rows) // 2, "tokens_per_batch")
        pending = [*part.halves(), *pending]
    return found


def _run(
    bench: Bench,
    part: Part,
    *,
    layers: Sequence[int],
    last: int,
    whole: bool,
    past: Past | None = None,
    keeping: bool = False,
) -> _Ran:
    """Run a part on, through block ``last`` if ``whole``, else up to its rewrite module.

    The keys of ``layers`` are taken on the way, and the states in front of the first of them.
    ``past`` is that of the shared prefixes; ``keeping`` leaves the part's own.
    """
    model, layout = bench.model, bench.architecture
    inputs, cache = recording(part.inputs) if keeping else (part.inputs, None)
    if past is not None and part.behind:
        inputs = past.chosen(part.behind).followed_by(model, part.inputs)
    names = {layout.rewrite_name(layer): layer for layer in layers}
    keys: dict[int, Tensor] = {}
    below: list[Any] = []
    top: list[Tensor] = []
    stop = layout.block_name(last) if whole else layout.rewrite_name(last)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if part.states is not None:
            here, passed = part.states, [layout.block_name(i) for i in range(part.block)]
            stack.enter_context(hooks.resuming_above(model, passed, part.form, lambda: here))

        def take_key(name: str, values: Tensor) -> None:
            keys[names[name]] = part.at_subject(values)

        def take_hidden(output: Any) -> None:
            top.append(part.at_subject(hooks.hidden_of(output)))

        stack.enter_context(hooks.watching_inputs(model, list(names), take_key))
        if layers and layers[0] > part.block:
            under = layout.block_name(layers[0] - 1)
            stack.enter_context(hooks.watching_output(model, under, below.append))
        if whole:
            stack.enter_context(hooks.watching_output(model, stop, take_hidden))
        hooks.run_until(model, inputs, stop, entering=not whole)
    if below:
        states, form = hooks.hidden_of(below[0]), hooks.form_of(below[0])
        part = replace(part, block=layers[0], states=states, form=form)
    left = None if cache is None else aligned(cached(cache), part.subjects + 1)
    return _Ran(part, keys, top[0] if top else None, left)


def _mean_keys(layer: int, bare: Sequence[_Ran], others: Sequence[_Ran]) -> Tensor:
    """(edits, d_in): see ``Readings.keys``."""
    alone = _table(layer, bare)[:, 0]
    return alone if not others else (alone + _table(layer, others).mean(1)) / 2


def _table(layer: int, runs: Sequence[_Ran]) -> Tensor:
    """Keys of all rows, (edits, rows of each, d_in)."""
    names = [name for ran in runs for name in ran.part.rows]
    keys = torch.cat([ran.keys[layer] for ran in runs])
    edits, each = (1 + max(name[k] for name in names) for k in (0, 1))
    order = sorted(range(len(names)), key=names.__getitem__)
    return keys[order].unflatten(0, (edits, each))


def _hidden(runs: Sequence[_Ran]) -> Tensor:
    """h of all edits, (edits, d)."""
    found: dict[int, Tensor] = {}
    for ran in runs:
        assert ran.hidden is not None, "bare prompts run through the last rewrite layer"
        found |= {edit: ran.hidden[k] for k, (edit, _) in enumerate(ran.part.rows)}
    return torch.stack([found[edit] for edit in range(len(found))])
