"""What a call that edits works with: the runner with its metric, settled settings, its figures.

In: a model and the adapter that is edited. Out: a runner in evaluation mode and the metric, or a
sentence that says why nothing can be edited now; how full the adapter is afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from alphaedit_peft import hooks, parallel
from alphaedit_peft.devices import differentiable, held
from alphaedit_peft.editing.auto_settings import Decision, decisions, keys_around, movable
from alphaedit_peft.editing.capacity import Capacity, measure_capacity, prompt_drift
from alphaedit_peft.editing.contexts import sample_contexts
from alphaedit_peft.editing.edit_report import LayerReport, MomentProducts, layer_report
from alphaedit_peft.editing.keys import keys_by_layer
from alphaedit_peft.editing.prompts import EditRows
from alphaedit_peft.editing.runner import Phases, Runner
from alphaedit_peft.editing.state import protects
from alphaedit_peft.edits import Edit
from alphaedit_peft.log_probs import Reader
from alphaedit_peft.model.adapter import Adapter, EditedModel, Moved, require_editable
from alphaedit_peft.nullspace import NullSpace
from alphaedit_peft.nullspace.threshold import least_disturbing
from alphaedit_peft.settings import Settings
from alphaedit_peft.solve_metric import Metric, kind


@contextmanager
def running(
    model: EditedModel,
    adapter: Adapter,
    contexts: tuple[str, ...] | None = None,
    edits: Sequence[Edit] = (),
    *,
    anew: bool = False,
) -> Iterator[tuple[Runner, Metric]]:
    """What edits are made with, in evaluation mode.

    Contexts are the adapter's own, or those of a pack that it goes on top of; else ``contexts``, or
    sampled. ``edits`` are those to come: what the tokenizer cannot do for them is told before. With
    ``anew`` all rows are going to be made again, maybe by another null space.

    Raises:
        RuntimeError, ValueError: as ``require_editable`` and ``Renderer.edit_rows``; statistics
            that are missing or of another model, or another null space than the rows in place.
    """
    require_editable(model, adapter)
    base, config, resources = model.get_base_model(), model.alphaedit_config, model.resources
    tokenizer, phases = resources.find_tokenizer(base), Phases(base)
    runner = Runner(base, tokenizer, Settings.of(config), model.architecture, (), phases)
    for edit in edits:
        runner.renderer.edit_rows(edit, ())
    metric = resources.find_metric(config, model.base_fingerprint)
    if not anew:
        _require_same_null_space(model, adapter)
    with hooks.evaluating(base), differentiable(base):
        contexts = _contexts(model, adapter, contexts)
        if contexts is None:
            with model.disable_adapter(), phases.timed("contexts"):
                contexts = parallel.from_main(partial(sample_contexts, base, tokenizer, config))
        yield replace(runner, contexts=contexts), metric


@contextmanager
def settled(
    model: EditedModel,
    adapter: Adapter,
    runner: Runner,
    metric: Metric,
    edits: Sequence[EditRows],
) -> Iterator[tuple[Metric, tuple[Decision, ...]]]:
    """The metric with all settings decided, and what was decided now.

    Settings are decided at the model's first edits, for them; if none is made, or all are taken
    back, they are open again.
    """
    config, resources = model.alphaedit_config, model.resources
    empty = not any(other.journal.rank for other in model.edit_adapters.values())
    if not empty or not edits or config.preset != "auto":
        yield metric, ()
        return
    if model.moved is not None and resources.null_space is model.moved.now:
        _reopen(model, model.moved)
        metric = resources.find_metric(config, model.base_fingerprint)
    given = resources.null_space
    tried: dict[float, float] = {}
    decides = "threshold" in model.left_open and movable(given, config)
    with runner.phases.timed("keys"):
        around = keys_around(runner, edits) if decides else {}
    before = (config.threshold, config.threshold_mode)
    decided: dict[str, float] = {}
    try:
        with runner.phases.timed("keys"):
            taken = keys_by_layer(runner, edits)
            if given is not None and around:
                config.threshold, tried = least_disturbing(given.parts, given.threshold, around)
            if any(getattr(config, name) is None for name in metric.decides):
                found = metric.decide(taken[0])
                decided |= {n: x for n, x in found.items() if getattr(config, n) is None}
            for name, value in decided.items():
                setattr(config, name, value)
            metric = resources.find_metric(config, model.base_fingerprint)
            model.moved = Moved(given, before, resources.null_space, decided)
            now = replace(runner, settings=Settings.of(config))
            said = decisions(now, metric, taken, model.left_open, tried)
        yield metric, said
    finally:
        if not adapter.journal.rank:
            _reopen(model, Moved(given, before, resources.null_space, decided))


@torch.no_grad()
def capacity(model: EditedModel, adapter: Adapter, prompts: Sequence[str] = ()) -> Capacity:
    """How full an adapter is; see :meth:`AlphaEditModel.capacity`."""
    journal, factors = adapter.known_journal(), adapter.factors
    null_space, grams = _known_of_rows(model, adapter)
    mixed = adapter.compression is not None and adapter.compression.mixed  # no row is an edit's own
    found = measure_capacity(
        factors,
        [True] * journal.rank if mixed else protects(journal.standing, journal.rank),
        null_space=null_space,
        weight_norms={layer: weight_norm(adapter, layer) for layer in factors},
        grams=grams,
        bound=model.alphaedit_config.capacity_bound,
    )
    if not prompts:
        return found
    base, most = model.get_base_model(), model.alphaedit_config.tokens_per_batch
    reader = Reader(base, model.resources.find_tokenizer(base), most)
    return replace(found, drift=prompt_drift(reader, model.disable_adapter, prompts))


def layer_reports(
    model: EditedModel, adapter: Adapter, rank_before: int
) -> tuple[LayerReport, ...]:
    """Every rewrite layer after a call that began with ``rank_before`` rows."""
    null_space, grams = _known_of_rows(model, adapter)
    products: dict[int, MomentProducts] = {}
    reports = []
    for layer, delta in adapter.factors.items():
        space = None if null_space is None else null_space.parts[layer]
        if space is not None and delta.rank and not space.projector_only:
            kept = adapter.moment_products.get(layer)
            products[layer] = MomentProducts.of(space, delta.A, kept)
        new = max(0, delta.rank - rank_before)  # no batch, no parents' rows either
        norm = weight_norm(adapter, layer)
        reports.append(layer_report(layer, delta, new, norm, grams.get(layer), products.get(layer)))
    adapter.moment_products = products
    return tuple(reports)


def _reopen(model: EditedModel, moved: Moved) -> None:
    config, model.resources.null_space = model.alphaedit_config, moved.given
    config.threshold, config.threshold_mode = moved.threshold
    for name, value in moved.decided.items():
        if getattr(config, name) == value:
            setattr(config, name, None)


def _contexts(
    model: EditedModel, adapter: Adapter, given: tuple[str, ...] | None
) -> tuple[str, ...] | None:
    names = [name for name in model.active_adapters if name in model.edit_adapters]
    journals = [adapter.journal, *(model.edit_adapters[name].journal for name in names)]
    return next((j.contexts for j in journals if j.contexts is not None), given)


def _require_same_null_space(model: EditedModel, adapter: Adapter) -> None:
    given = model.resources.provenance()
    for name in {adapter.name, *model.active_adapters} & model.edit_adapters.keys():
        journal = model.edit_adapters[name].journal
        if journal.rank == 0 or journal.null_space is None or given is None:
            continue
        names = ("digest", *kind(model.alphaedit_config.objective).rows_depend_on)
        made = {key: (journal.null_space.get(key), given[key]) for key in names}
        other = {key: (old, new) for key, (old, new) in made.items() if old != new}
        if other:
            told = ", ".join(f"{key} {old}, not {new}" for key, (old, new) in other.items())
            first = "pass that null space" if "digest" in other else "set the first"
            raise ValueError(
                f"the edits of adapter {name!r} were made with {told}; rows of two projectors do "
                f"not go together: {first}, or make the edits anew"
            )


def _known_of_rows(
    model: EditedModel, adapter: Adapter
) -> tuple[NullSpace | None, dict[int, torch.Tensor]]:
    """The null space and A A^T by layer, where rows are projected keys: MEMIT's are not."""
    if not kind(model.alphaedit_config.objective).rows_are_keys:
        return None, {}
    return model.resources.null_space, adapter.grams()


def weight_norm(adapter: Adapter, layer: int) -> float | None:
    """|W| of a layer's base weight, Frobenius; None where it is quantised."""
    module = adapter.layers[layer]
    weight = module.original if module.merged else held(module.get_base_layer(), "weight")
    return float(weight.float().norm()) if weight.is_floating_point() else None
