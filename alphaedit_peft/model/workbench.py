"""What a call that edits works with: the runner, the packs it goes on top of, figures by layer.

In: an adapter, and those active beside it. Out: a runner in evaluation mode with the objective, the
other active packs as parents, or a sentence that says why nothing can be edited now. ``editable``
does the editing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from alphaedit_peft import devices, hooks, parallel
from alphaedit_peft.devices import held
from alphaedit_peft.editing.capacity import Capacity, measure_capacity, prompt_drift
from alphaedit_peft.editing.contexts import sample_contexts
from alphaedit_peft.editing.decide import Decision, decisions, keys_around, movable
from alphaedit_peft.editing.prompts import EditRows
from alphaedit_peft.editing.report import LayerReport, MomentProducts, layer_report
from alphaedit_peft.editing.runner import Phases, Runner
from alphaedit_peft.editing.state import protects
from alphaedit_peft.metric import Metric, kind
from alphaedit_peft.model.saving import SavingModel
from alphaedit_peft.model.stack import Parent, needed
from alphaedit_peft.nullspace import NullSpace
from alphaedit_peft.nullspace.threshold import least_disturbing
from alphaedit_peft.pack.compress import require_rows
from alphaedit_peft.scoring import Reader
from alphaedit_peft.settings import Settings


@dataclass(frozen=True)
class Moved:
    """A threshold that was decided: the null space and setting before, and the null space since."""

    given: NullSpace | None
    threshold: tuple[float | None, str | None]
    now: NullSpace | None


class WorkbenchModel(SavingModel):
    """The preparing part of :class:`~alphaedit_peft.model.AlphaEditModel`."""

    _moved: Moved | None = None

    @contextmanager
    def _runner(
        self, contexts: tuple[str, ...] | None = None, *, anew: bool = False
    ) -> Iterator[tuple[Runner, Metric]]:
        """What the river works with, in evaluation mode.

        Contexts are the adapter's, those of a pack that it goes on top of, or those given; where
        there are none they are sampled. ``anew``: all rows are going to be made again.
        """
        self._require_editable()
        base, config = self.get_base_model(), self.alphaedit_config
        tokenizer = self.resources.find_tokenizer(base)
        objective = self.resources.find_metric(config, self.base_fingerprint)
        if not anew:
            self._require_same_null_space()
        phases = Phases.of(base)
        with hooks.evaluating(base), devices.differentiable(base):
            contexts = self._contexts(contexts)
            if contexts is None:
                with self.disable_adapter(), phases.timed("contexts"):
                    sample = partial(sample_contexts, base, tokenizer, config)
                    contexts = parallel.from_main(sample)
            settings = Settings.of(config)
            yield Runner(base, tokenizer, settings, self.architecture, contexts, phases), objective

    @contextmanager
    def _settled(
        self, runner: Runner, objective: Metric, edits: Sequence[EditRows]
    ) -> Iterator[tuple[Metric, tuple[Decision, ...]]]:
        """The objective with all settings decided, and what was decided now.

        Settings are decided at the model's first edits, for them; if none is made, or all are taken
        back, they are open again.
        """
        config, resources = self.alphaedit_config, self.resources
        empty = not any(journal.rank for journal in self._journals.values())
        if not empty or not edits or config.preset != "auto":
            yield objective, ()
            return
        if self._moved is not None and resources.null_space is self._moved.now:
            self._reopen(self._moved)
            objective = resources.find_metric(config, self.base_fingerprint)
        given = resources.null_space
        tried: dict[float, float] = {}
        decides = "threshold" in self._undecided and movable(given, config)
        with runner.phases.timed("keys"):
            around = keys_around(runner, edits) if decides else {}
        before = (config.threshold, config.threshold_mode)
        try:
            if given is not None and around:
                with runner.phases.timed("keys"):
                    config.threshold, tried = least_disturbing(given.parts, given.threshold, around)
                objective = resources.find_metric(config, self.base_fingerprint)
                self._moved = Moved(given, before, resources.null_space)
            with runner.phases.timed("keys"):
                now = replace(runner, settings=Settings.of(config))
                found = decisions(now, objective, edits, self._undecided, tried)
            yield objective, found
        finally:
            if not self._journal().rank:
                self._reopen(Moved(given, before, resources.null_space))

    def _reopen(self, moved: Moved) -> None:
        config, self.resources.null_space = self.alphaedit_config, moved.given
        config.threshold, config.threshold_mode = moved.threshold

    def _contexts(self, given: tuple[str, ...] | None) -> tuple[str, ...] | None:
        names = [self._active, *self.active_adapters]
        journals = [self._journals[name] for name in names if name in self._journals]
        return next((j.contexts for j in journals if j.contexts is not None), given)

    def _require_same_null_space(self) -> None:
        given = self.resources.provenance()
        for name in {self._active, *self.active_adapters} & self._journals.keys():
            journal = self._journals[name]
            if journal.rank == 0 or journal.null_space is None or given is None:
                continue
            if journal.null_space["digest"] != given["digest"]:
                raise ValueError(
                    f"the edits of adapter {name!r} were made with null space "
                    f"{journal.null_space}, and {given} was given; rows of two projectors do not "
                    "go together: pass the first, or make the edits anew"
                )

    def _others(self) -> tuple[Parent, ...]:
        """The packs that are active beside the one that is edited, as its parents.

        Raises:
            ValueError: that one is not active, or one of the others stands on it.
            RuntimeError: a plain LoRA is active, whose keys are not known.
        """
        target, active = self._active, self.active_adapters
        if target not in active:
            raise ValueError(
                f"adapter {target!r} is not active, and edits go into the model as it computes; "
                f"call set_adapter({target!r}), or with a list the packs it stands on and it"
            )
        if len(active) == 1:
            return ()
        self._require_top(target)
        found = (self._as_parent(name) for name in active if name != target)
        return tuple(parent for parent in found if parent.own)

    def _require_top(self, target: str) -> None:
        """Refuse to change an adapter that an active one stands on."""
        on_packs = {
            name: needed(self._journals[name].parents)
            for name in self.active_adapters
            if name != target and name in self._journals
        }
        if target not in self._journals or not any(on_packs.values()):
            return
        own = self.to_pack(target).digest()
        for name, parents in on_packs.items():
            if any(parent.get("digest") == own for parent in parents):
                raise ValueError(
                    f"adapter {name!r} was made on top of {target!r}, which would change under it; "
                    f"edit into {name!r}, or first make {target!r} active alone"
                )

    def _as_parent(self, adapter_name: str) -> Parent:
        if adapter_name not in self._journals:
            raise RuntimeError(
                f"adapter {adapter_name!r} is active and no pack of edits in this model's rewrite "
                "layers, so what it does for its keys cannot be protected; leave it out of "
                "set_adapter, or merge it into the base before wrapping that for edits"
            )
        with self._on(adapter_name):
            require_rows(self._compressions.get(adapter_name), "edit on top of it")
            source = self._sources.get(adapter_name, adapter_name)
            return Parent(adapter_name, source, self.to_pack().digest(), self._state())

    @torch.no_grad()
    def capacity(self, prompts: Sequence[str] = (), *, adapter_name: str | None = None) -> Capacity:
        """How full an adapter is: rows against the room, their crowding, growth, drift.

        Args:
            prompts: texts that should go on as before; how far the next token's distribution has
                moved from the bare base's, with all active adapters, is measured on them.
            adapter_name: which adapter; needed where there are several.

        Raises:
            RuntimeError: a plain LoRA, or factors that something else has changed.
            ValueError: an empty prompt, or an adapter that is not loaded.
        """
        with self._on(adapter_name):
            journal, factors = self._journal(), self.factors
            self._known_journal(self._active)
            standing = [record for record in journal.records if record.role != "superseded"]
            compression = self._compressions.get(self._active)
            mixed = compression is not None and compression.mixed  # no row is an edit's own
            found = measure_capacity(
                factors,
                [True] * journal.rank if mixed else protects(standing, journal.rank),
                null_space=self._null_space_of_rows(),
                weight_norms={layer: self._weight_norm(layer) for layer in factors},
                grams=self._grams(factors),
            )
            found = replace(found, bound=self.alphaedit_config.capacity_bound)
            if not prompts:
                return found
            base, most = self.get_base_model(), self.alphaedit_config.tokens_per_batch
            reader = Reader(base, self.resources.find_tokenizer(base), most)
            return replace(found, drift=prompt_drift(reader, self.disable_adapter, prompts))

    def _layer_reports(self, rank_before: int) -> tuple[LayerReport, ...]:
        null_space = self._null_space_of_rows()
        reports = []
        factors = self.factors
        grams = self._grams(factors)
        kept = self._moments.get(self._active, {})
        found: dict[int, MomentProducts] = {}
        for layer, delta in factors.items():
            norm = self._weight_norm(layer)
            new = max(0, delta.rank - rank_before)  # no batch, no parents' rows either
            space = None if null_space is None else null_space.parts[layer]
            if space is not None and delta.rank and not space.projector_only:
                found[layer] = MomentProducts.of(space, delta.A, kept.get(layer))
            reports.append(
                layer_report(layer, delta, new, norm, grams.get(layer), found.get(layer))
            )
        self._moments[self._active] = found
        return tuple(reports)

    def _null_space_of_rows(self) -> NullSpace | None:
        """The null space, where the rows are keys projected by it: MEMIT's are not."""
        known = kind(self.alphaedit_config.objective).rows_are_keys
        return self.resources.null_space if known else None

    def _weight_norm(self, layer: int) -> float | None:
        """|W| of a layer's base weight, Frobenius; None where it is quantised."""
        module = self._lora_layer(layer)
        weight = module.original if module.merged else held(module.get_base_layer(), "weight")
        return float(weight.float().norm()) if weight.is_floating_point() else None
