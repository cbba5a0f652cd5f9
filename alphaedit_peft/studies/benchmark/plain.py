"""AlphaEdit the plain way: one edit at a time, the whole model every step, d_in x d_in matrices.

In: a bare model, tokenised edits, dense projectors. Out: target values z and changed weights, with
the seconds of each part: what the editing path of this package is measured against. It does what
the public code does (paper Eq. 11-14, MEMIT Eq. 16) but two things that would only make it slower:
there the head runs twice a step, and keys for the cache are collected a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alphaedit_peft import hooks
from alphaedit_peft.architecture import Architecture
from alphaedit_peft.devices import computes_on, held, in_place
from alphaedit_peft.editing.prompts import EditRows, TokenRow
from alphaedit_peft.editing.runner import Phases, at_least_float32
from alphaedit_peft.nullspace import NullSpace
from alphaedit_peft.settings import Settings
from alphaedit_peft.tokens import padded

ROWS_AT_ONCE = 512  # prompts in one forward for keys


@dataclass(frozen=True, eq=False)
class PlainModel:
    """A bare model to be edited the plain way.

    ``projectors`` are P and ``caches`` the sums of k k^T of earlier batches, both (d_in, d_in) by
    layer; ``edit_batch`` adds to the caches.
    """

    model: nn.Module
    settings: Settings
    architecture: Architecture
    projectors: Mapping[int, Tensor]
    caches: Mapping[int, Tensor]

    @classmethod
    def of(
        cls, model: nn.Module, settings: Settings, architecture: Architecture, space: NullSpace
    ) -> PlainModel:
        """Write a null space out as dense projectors, beside empty caches."""
        projectors = {}
        for layer in settings.rewrite_layers:
            module = model.get_submodule(architecture.rewrite_name(layer))
            wide = torch.promote_types(held(module, "weight").dtype, torch.float32)
            identity = torch.eye(space.width(layer), dtype=wide, device=computes_on(module))
            projectors[layer] = space.project(layer, identity)
        caches = {layer: torch.zeros_like(P) for layer, P in projectors.items()}
        return cls(model, settings, architecture, projectors, caches)

    @property
    def block(self) -> str:
        """The last rewrite layer's block, after which z is optimised."""
        return self.architecture.block_name(self.settings.rewrite_layers[-1])

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return computes_on(self.model.get_input_embeddings())  # type: ignore[operator]

    def module(self, layer: int) -> nn.Module:
        """A rewrite module, whose weight may be kept elsewhere."""
        return self.model.get_submodule(self.architecture.rewrite_name(layer))

    def weight(self, layer: int) -> Tensor:
        """The weight of a rewrite module, a copy where it is kept elsewhere."""
        return held(self.module(layer), "weight")

    @contextmanager
    def weights_kept(self) -> Iterator[None]:
        """Put the weights of the rewrite modules back when the block ends."""
        before = {layer: self.weight(layer).clone() for layer in self.projectors}
        try:
            yield
        finally:
            for layer, weight in before.items():
                with torch.no_grad(), in_place(module := self.module(layer)):
                    module.weight.copy_(weight)  # type: ignore[operator]

    def edit_batch(self, edits: Sequence[EditRows], phases: Phases | None = None) -> Tensor:
        """Write a batch of edits into the weights, each optimised by itself; returns z, (edits, d).

        ``phases`` takes the time of targets, keys, solves and writes.
        """
        phases = phases or Phases(self.model)
        with phases.timed("targets"):
            targets = torch.stack([self.target_value(rows) for rows in edits])
        for place, layer in enumerate(self.projectors):
            with phases.timed("keys"):
                keys = self.mean_keys(edits, layer)  # (edits, d_in)
                hidden = self.hidden([rows.rows[0] for rows in edits])  # (edits, d)
            residuals = (targets - hidden.to(targets)) / (len(self.projectors) - place)
            with phases.timed("solve"):
                P, cache = self.projectors[layer], self.caches[layer]
                update = plain_update(P, cache, keys, residuals, self.settings.ridge)
                cache.add_(keys.T @ keys)
            module = self.module(layer)
            with phases.timed("write"), torch.no_grad(), in_place(module):
                weight: Tensor = module.weight  # type: ignore[assignment]
                weight.add_((update.T if self.architecture.conv1d else update).to(weight))
        return targets

    @torch.enable_grad()
    def target_value(self, rows: EditRows) -> Tensor:
        """z of one edit, (d,): Adam on a vector added at the subject (MEMIT Eq. 16)."""
        settings, search = self.settings, _Search(self, rows)
        loss = search.loss()  # tells h, which the learning rate may depend on
        size = search.start.norm()
        relative = settings.learning_rate_mode == "relative"
        scale = float(size) / len(search.start) ** 0.5 if relative else 1.0
        adam = torch.optim.Adam([search.delta], lr=settings.learning_rate * scale)
        for _ in range(settings.steps - 1):
            if settings.stop_loss is not None and float(loss.detach()) < settings.stop_loss:
                break
            search.delta.grad = torch.autograd.grad(loss, search.delta)[0]  # no weight's
            adam.step()
            with torch.no_grad():
                bound, norm = settings.clamp_factor * size, search.delta.norm()
                if norm > bound:
                    search.delta.mul_(bound / norm)
            loss = search.loss()
        return (search.start + search.delta).detach()

    def mean_keys(self, edits: Sequence[EditRows], layer: int) -> Tensor:
        """Half the bare prompt's key and half the mean over contexts, (edits, d_in)."""
        rows = [row for edit in edits for row in edit.rows]
        name = self.architecture.rewrite_name(layer)
        found = self._at_subjects(rows, partial(hooks.watching_inputs, self.model, [name]))
        means = []
        for part in found.split([len(edit.rows) for edit in edits]):
            bare, others = part[0], part[1:]
            means.append((bare + others.mean(0)) / 2 if len(others) else bare)
        return torch.stack(means)

    def hidden(self, rows: Sequence[TokenRow]) -> Tensor:
        """Hidden states at the subject after the last rewrite layer, (rows, d)."""
        return self._at_subjects(rows, partial(hooks.watching_output, self.model, self.block))

    @torch.no_grad()
    def _at_subjects(
        self,
        rows: Sequence[TokenRow],
        watching: Callable[[Callable[..., None]], AbstractContextManager[None]],
    ) -> Tensor:
        """What a hook sees at each row's subject in a forward, (rows, d), float32 or better."""
        found: list[Tensor] = []
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part, seen = rows[start : start + ROWS_AT_ONCE], list[Any]()
            with watching(lambda *given, seen=seen: seen.append(given[-1])):
                self.model(**padded([row.ids for row in part], self.device), use_cache=False)
            values = hooks.hidden_of(seen[-1])
            if values.ndim == 2:  # families whose blocks flatten it
                values = values.unflatten(0, (len(part), -1))
            found += (values[i, row.subject_last] for i, row in enumerate(part))
        return at_least_float32(torch.stack(found))


def plain_update(P: Tensor, cache: Tensor, keys: Tensor, residuals: Tensor, ridge: float) -> Tensor:
    """Delta (d_out, d_in) for keys (n, d_in) and residuals (n, d_out): paper Eq. 14.

    Solves (P (Kp Kp^T + K K^T) + lambda I) X = P K R^T, with keys as columns; Delta = X^T. P and
    ``cache``, which is Kp Kp^T, are (d_in, d_in).
    """
    K = keys.T.to(P)  # (d_in, n)
    left = P @ (K @ K.T + cache)  # (d_in, d_in)
    left.diagonal().add_(ridge)
    return torch.linalg.solve(left, P @ K @ residuals.to(P)).T


class _Search:
    """The prompts of one edit as one batch, its vector, and where it stood at the first step."""

    def __init__(self, plain: PlainModel, rows: EditRows) -> None:
        self.plain, self.rows = plain, rows
        device, model = plain.device, plain.model
        self.inputs = padded([*(r.scoring_ids for r in rows.rows), rows.kl_row.ids], device)
        subjects = [row.subject_last for row in (*rows.rows, rows.kl_row)]
        self.subjects = torch.tensor(subjects, device=device)
        weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.delta = torch.zeros(weight.shape[1], dtype=wide, device=device, requires_grad=True)
        self.start = self.delta.detach()  # h at the bare prompt's subject
        self.initial: Tensor | None = None  # log P_0 at the subject of the KL prompt

    def loss(self) -> Tensor:
        """-log P(target), the KL term and the decay, at the vector as it is."""
        settings = self.plain.settings
        log_probs = self._log_probs()  # (rows, tokens, vocab)
        losses = []
        for i, row in enumerate(self.rows.rows):
            target = torch.tensor(row.target, device=log_probs.device)
            part = log_probs[i, list(row.target_positions)]
            losses.append(-part.gather(1, target[:, None]).mean())
        now = log_probs[-1, self.rows.kl_row.subject_last]
        if self.initial is None:
            self.initial = now.detach()
        divergence = (now.exp() * (now - self.initial)).sum()
        decay = settings.weight_decay * self.delta.norm() / self.start.norm() ** 2
        return torch.stack(losses).mean() + settings.kl_factor * divergence + decay

    def _log_probs(self) -> Tensor:
        model, name = self.plain.model, self.plain.settings.autocast
        kind = self.delta.device.type
        narrow = torch.autocast(kind, getattr(torch, name)) if name else nullcontext()
        with hooks.changing_outputs(model, {self.plain.block: self._moved}), narrow:
            logits = model(**self.inputs, use_cache=False).logits
        return logits.to(self.delta.dtype).log_softmax(-1)

    def _moved(self, hidden: Tensor) -> Tensor:
        if self.initial is None:  # the first step
            self.start = hidden[0, self.subjects[0]].detach().to(self.delta)
        rows = torch.arange(len(hidden), device=hidden.device)
        moved = hidden.clone()
        moved[rows, self.subjects] += self.delta.to(hidden)
        return moved
