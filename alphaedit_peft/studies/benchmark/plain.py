"""AlphaEdit the plain way: one edit at a time, the whole model every step, d_in x d_in matrices.

In: a bare model, tokenised edits, dense projectors. Out: target values z and changed weights, with
the seconds of each part: what the editing path of this package is measured against. It does what
the public code does (paper Eq. 11-14, MEMIT Eq. 16), with two things left out that would only make
it slower: the head runs once a step there twice, and the keys for the cache are those of the solve,
collected a second time there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alphaedit_peft import hooks
from alphaedit_peft.architecture import Architecture
from alphaedit_peft.devices import computes_on, held, in_place
from alphaedit_peft.editing.prompts import EditRows, TokenRow
from alphaedit_peft.editing.runner import Phases
from alphaedit_peft.nullspace import NullSpace
from alphaedit_peft.settings import Settings
from alphaedit_peft.tokens import padded

ROWS_AT_ONCE = 512  # prompts in one forward for keys


@dataclass(frozen=True, eq=False)
class PlainModel:
    """A bare model to be edited the plain way; ``config`` is resolved.

    ``projectors`` are P and ``caches`` the sums of k k^T of earlier batches, both (d_in, d_in) by
    layer; ``edit_batch`` adds to the caches.
    """

    model: nn.Module
    config: Settings
    architecture: Architecture
    projectors: Mapping[int, Tensor]
    caches: Mapping[int, Tensor]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        config: Settings,
        architecture: Architecture,
        null_space: NullSpace,
    ) -> PlainModel:
        """Write a null space out as dense projectors, beside empty caches."""
        projectors = {}
        for layer in config.rewrite_layers or ():
            module = model.get_submodule(architecture.rewrite_name(layer))
            wide = torch.promote_types(held(module, "weight").dtype, torch.float32)
            identity = torch.eye(null_space.width(layer), dtype=wide, device=computes_on(module))
            projectors[layer] = null_space.project(layer, identity)
        caches = {layer: torch.zeros_like(P) for layer, P in projectors.items()}
        return cls(model, config, architecture, projectors, caches)

    @property
    def layers(self) -> tuple[int, ...]:
        """The rewrite layers, ascending."""
        return tuple(self.config.rewrite_layers or ())

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
        before = {layer: self.weight(layer).clone() for layer in self.layers}
        try:
            yield
        finally:
            for layer, weight in before.items():
                with torch.no_grad(), in_place(module := self.module(layer)):
                    module.weight.copy_(weight)  # type: ignore[operator]

    def edit_batch(self, edits: Sequence[EditRows], phases: Phases | None = None) -> Tensor:
        """Make a batch of edits, written into the weights.

        Args:
            edits: tokenised; each is optimised by itself, also where two share a key.
            phases: where the time of targets, keys, solves and writes goes.

        Returns:
            The target values z, (edits, d).
        """
        phases = phases or Phases.of(self.model)
        with phases.timed("targets"):
            targets = torch.stack([self.target_value(rows) for rows in edits])
        found: dict[int, Tensor] = {}
        for place, layer in enumerate(self.layers):
            with phases.timed("keys"):
                keys = found[layer] = self.mean_keys(edits, layer)  # (edits, d_in)
                hidden = self.hidden([rows.rows[0] for rows in edits])  # (edits, d)
            residuals = (targets - hidden.to(targets)) / (len(self.layers) - place)
            with phases.timed("solve"):
                update = self.update(layer, keys, residuals)
            module = self.module(layer)
            with phases.timed("write"), torch.no_grad(), in_place(module):
                weight: Tensor = module.weight  # type: ignore[assignment]
                weight.add_((update.T if self.architecture.conv1d else update).to(weight))
        for layer, keys in found.items():
            with phases.timed("solve"):
                self.caches[layer].add_(keys.T @ keys)
        return targets

    def update(self, layer: int, keys: Tensor, residuals: Tensor) -> Tensor:
        """Delta (d_out, d_in) for keys (n, d_in) and residuals (n, d_out): paper Eq. 14.

        Solves (P (Kp Kp^T + K K^T) + lambda I) X = P K R^T, with keys as columns; Delta = X^T.
        """
        P, ridge = self.projectors[layer], self.config.ridge
        K = keys.T.to(P)  # (d_in, n)
        left = P @ (K @ K.T + self.caches[layer])  # (d_in, d_in)
        left.diagonal().add_(ridge)
        return torch.linalg.solve(left, P @ K @ residuals.to(P)).T

    @torch.no_grad()
    def mean_keys(self, edits: Sequence[EditRows], layer: int) -> Tensor:
        """Half the bare prompt's key and half the mean over contexts, (edits, d_in)."""
        rows = [row for edit in edits for row in edit.rows]
        found = torch.cat(list(self._inputs(rows, self.architecture.rewrite_name(layer))))
        means = []
        for part in found.split([len(edit.rows) for edit in edits]):
            bare, others = part[0], part[1:]
            means.append((bare + others.mean(0)) / 2 if len(others) else bare)
        return torch.stack(means)

    @torch.no_grad()
    def hidden(self, rows: Sequence[TokenRow]) -> Tensor:
        """Hidden states at the subject after the last rewrite layer, (rows, d)."""
        seen: list[Tensor] = []
        block, parts = self.architecture.block_name(self.layers[-1]), []
        for part in _parts(rows):
            with hooks.watching_output(
                self.model, block, lambda o: seen.append(hooks.hidden_of(o))
            ):
                self.model(**padded([row.ids for row in part], self.device), use_cache=False)
            parts.append(_at_subjects(seen.pop(), part))
        return torch.cat(parts)

    def _inputs(self, rows: Sequence[TokenRow], module: str) -> Iterator[Tensor]:
        """Inputs of a module at the subjects of the rows, by a forward through the model."""
        seen: dict[str, Tensor] = {}
        for part in _parts(rows):
            with hooks.watching_inputs(self.model, [module], seen.__setitem__):
                self.model(**padded([row.ids for row in part], self.device), use_cache=False)
            values = seen[module]
            if values.ndim == 2:  # families whose blocks flatten it
                values = values.unflatten(0, (len(part), -1))
            yield _at_subjects(values, part)

    @torch.enable_grad()
    def target_value(self, rows: EditRows) -> Tensor:
        """z of one edit, (d,): Adam on a vector added at the subject (MEMIT Eq. 16)."""
        config = self.config
        search = _Search(self, rows)
        loss = search.loss()  # tells h, which the learning rate may depend on
        size = search.start.norm()
        relative = config.learning_rate_mode == "relative"
        scale = float(size) / len(search.start) ** 0.5 if relative else 1.0
        adam = torch.optim.Adam([search.delta], lr=config.learning_rate * scale)
        for _ in range(config.steps - 1):
            if config.stop_loss is not None and float(loss.detach()) < config.stop_loss:
                break
            search.delta.grad = torch.autograd.grad(loss, search.delta)[0]  # no weight's
            adam.step()
            with torch.no_grad():
                bound, norm = config.clamp_factor * size, search.delta.norm()
                if norm > bound:
                    search.delta.mul_(bound / norm)
            loss = search.loss()
        return (search.start + search.delta).detach()


class _Search:
    """The prompts of one edit as one batch, its vector, and where it stood at the first step."""

    def __init__(self, plain: PlainModel, rows: EditRows) -> None:
        self.plain, self.rows = plain, rows
        ids = [row.scoring_ids for row in rows.rows] + [rows.kl_row.ids]
        self.inputs = padded(ids, plain.device)
        places = [row.subject_last for row in rows.rows] + [rows.kl_row.subject_last]
        self.subjects = torch.tensor(places, device=plain.device)
        weight: Tensor = plain.model.get_input_embeddings().weight  # type: ignore[operator]
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.delta = torch.zeros(
            weight.shape[1], dtype=wide, device=plain.device, requires_grad=True
        )
        self.start = self.delta.detach()
        self.initial: Tensor | None = None  # log P_0 at the subject of the KL prompt
        self.begun = False

    def loss(self) -> Tensor:
        """-log P(target), the KL term and the decay, at the vector as it is."""
        config = self.plain.config
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
        decay = config.weight_decay * self.delta.norm() / self.start.norm() ** 2
        return torch.stack(losses).mean() + config.kl_factor * divergence + decay

    def _log_probs(self) -> Tensor:
        block = self.plain.architecture.block_name(self.plain.layers[-1])
        with hooks.changing_outputs(self.plain.model, {block: self._moved}), _autocast(self.plain):
            logits = self.plain.model(**self.inputs, use_cache=False).logits
        return logits.to(self.delta.dtype).log_softmax(-1)

    def _moved(self, hidden: Tensor) -> Tensor:
        if not self.begun:
            self.start = hidden[0, self.subjects[0]].detach().to(self.delta)
            self.begun = True
        rows = torch.arange(len(hidden), device=hidden.device)
        moved = hidden.clone()
        moved[rows, self.subjects] += self.delta.to(hidden)
        return moved


@contextmanager
def _autocast(plain: PlainModel) -> Iterator[None]:
    """The config's autocast, where it has one."""
    name = getattr(plain.config, "autocast", None)
    if name is None:
        yield
        return
    with torch.autocast(plain.device.type, dtype=getattr(torch, name)):
        yield


def _parts(rows: Sequence[TokenRow]) -> Iterator[Sequence[TokenRow]]:
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[start : start + ROWS_AT_ONCE]


def _at_subjects(values: Tensor, rows: Sequence[TokenRow]) -> Tensor:
    """What stands at each row's subject, (rows, d), float32 or better."""
    places = torch.tensor([row.subject_last for row in rows], device=values.device)
    found = values[torch.arange(len(rows), device=values.device), places]
    return found.to(torch.promote_types(found.dtype, torch.float32))
