"""Runs of one prompt with a corrupted subject and states put back, many at once.

In: a model, a tokenised fact, noise, which states to restore in which run. Out: P(target) of each
run. All runs of a fact have the same length, so they fill batches without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from alphaedit_peft import hooks, tokens
from alphaedit_peft.architecture import Architecture
from alphaedit_peft.devices import computes_on
from alphaedit_peft.log_probs import Continuation, log_probs_at, score

HIDDEN, MLP = "hidden", "mlp"
STATES = (HIDDEN, MLP)


@dataclass(frozen=True)
class Row(Continuation):
    """A fact as ids: the prompt, the target that should follow, the subject's positions."""

    subject: range


@dataclass(frozen=True)
class Run:
    """One forward pass: which draw of the noise (None: no noise), and what is put back.

    Every one of ``modules`` gets its clean output back at every one of ``places``.
    """

    sample: int | None
    modules: tuple[str, ...] = ()
    places: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tracer:
    """A model, and how to run it."""

    model: nn.Module
    architecture: Architecture
    tokens_per_batch: int = 8192

    @property
    def embeddings(self) -> nn.Module:
        """The module that turns ids into vectors."""
        return self.model.get_input_embeddings()  # type: ignore[operator]

    @property
    def width(self) -> int:
        """d of the embeddings."""
        return int(self.embeddings.weight.shape[1])  # type: ignore[index]

    @property
    def device(self) -> torch.device:
        """Where ids go."""
        return computes_on(self.embeddings)

    def names(self, state: str, block: int, width: int = 1) -> tuple[str, ...]:
        """Modules whose output is a state: of one block, or of ``width`` blocks around it."""
        name = {HIDDEN: self.architecture.block_name, MLP: self.architecture.rewrite_name}[state]
        first = max(0, block - width // 2)
        end = min(self.architecture.num_blocks, block + (width + 1) // 2)
        return tuple(name(number) for number in range(first, end))

    def require_fit(self, ids: Sequence[int], text: str) -> None:
        """Refuse a prompt that the model has no positions or ids for; ValueError says which."""
        positions = tokens.positions_of(self.model)
        limits = (positions, len(self.embeddings.weight))  # type: ignore[arg-type]
        tokens.require_fit(ids, max(ids), text, limits, "leave the fact out")

    def deviation(self, rows: Sequence[Row]) -> float:
        """Standard deviation of all entries of the subjects' embeddings, as in ROME's code."""
        ids = [row.ids[place] for row in rows for place in row.subject]
        found = self.embeddings(torch.tensor([ids], device=self.device))  # (1, tokens, d)
        return float(found.double().std())

    def next_token(self, row: Row) -> int:
        """The id that greedy decoding puts after the prompt."""
        return int(self._log_probs([row.ids], [len(row.ids) - 1])[0, 0].argmax())

    def says(self, row: Row) -> bool:
        """Whether greedy decoding gives the target after the prompt."""
        batches = partial(tokens.batches, tokens_per_batch=len(row.scoring_ids), device=self.device)
        return score(self.model, [row], batches)[0].greedy

    def clean(self, row: Row) -> tuple[float, dict[str, Tensor]]:
        """P(target) untouched, and every state by its module's name, (tokens, d)."""
        seen: dict[str, Tensor] = {}
        blocks = range(self.architecture.num_blocks)
        names = [name for state in STATES for block in blocks for name in self.names(state, block)]

        def keep(output: object, name: str) -> None:
            hidden = hooks.hidden_of(output)
            seen[name] = hidden if hidden.ndim == 2 else hidden[0]  # OPT's MLPs see no batch

        with ExitStack() as stack:
            for name in names:
                see = partial(keep, name=name)
                stack.enter_context(hooks.watching_output(self.model, name, see))
            found = self._target_probs(row, 1)
        return float(found[0]), seen

    def probabilities(
        self, row: Row, states: dict[str, Tensor], noise: Tensor, runs: Sequence[Run]
    ) -> Tensor:
        """P(target) of each run, (runs,), float64 on the CPU.

        ``states`` are the clean outputs by module, from ``clean``; ``noise`` (samples, subject's
        tokens, d) is added to the subject's embeddings.
        """
        size = max(1, self.tokens_per_batch // len(row.scoring_ids))
        parts = [runs[start : start + size] for start in range(0, len(runs), size)]
        return torch.cat([self._together(row, states, noise, part) for part in parts])

    def _together(
        self, row: Row, states: dict[str, Tensor], noise: Tensor, runs: Sequence[Run]
    ) -> Tensor:
        """One batch of runs."""
        silent = torch.zeros_like(noise[0])
        added = torch.stack([silent if r.sample is None else noise[r.sample] for r in runs])

        def corrupt(vectors: Tensor) -> Tensor:
            vectors = vectors.clone()  # (runs, tokens, d)
            vectors[:, row.subject[0] : row.subject[-1] + 1] += added.to(vectors)
            return vectors

        modules = self.model.named_modules()
        first = next(name for name, found in modules if found is self.embeddings)
        changes: dict[str, Callable[[Tensor], Tensor]] = {first: corrupt}
        places: dict[str, list[tuple[int, int]]] = {}
        for i, run in enumerate(runs):
            for name in run.modules:
                places.setdefault(name, []).extend((i, place) for place in run.places)
        for name, pairs in places.items():
            changes[name] = _restoring(states[name], pairs, len(runs))
        with hooks.changing_outputs(self.model, changes):
            return self._target_probs(row, len(runs))

    def _target_probs(self, row: Row, copies: int) -> Tensor:
        """P(target) in each of several equal rows, the product over its tokens, (copies,)."""
        log_probs = self._log_probs([row.scoring_ids] * copies, row.target_positions)
        target = torch.tensor(row.target, device=log_probs.device)
        chosen = log_probs.gather(2, target.expand(copies, -1)[..., None])  # (copies, target, 1)
        if chosen.isnan().any():
            raise ValueError(
                "the model's logits are not finite; its weights hold NaN or infinity, its dtype is "
                "too narrow, or the noise is too large"
            )
        return chosen.double().sum((1, 2)).exp().cpu()

    def _log_probs(self, rows: Sequence[Sequence[int]], places: Sequence[int]) -> Tensor:
        """Log-probabilities at some places of equally long rows, (rows, places, vocab)."""
        if hooks.head_name(self.model) is None:
            raise ValueError(f"{type(self.model).__name__} has no output head; pass a causal LM")
        where = [(i, place) for i in range(len(rows)) for place in places]
        found = log_probs_at(self.model, tokens.padded(rows, self.device), where)
        return found.unflatten(0, (len(rows), len(places)))


def _restoring(
    clean: Tensor, pairs: Sequence[tuple[int, int]], rows: int
) -> Callable[[Tensor], Tensor]:
    """A change that puts clean states (tokens, d) back at (row, position) pairs."""
    at = torch.tensor(pairs, device=clean.device)  # (pairs, 2)

    def restore(hidden: Tensor) -> Tensor:
        apart = hidden if hidden.ndim == 3 else hidden.unflatten(0, (rows, -1))
        apart = apart.clone()  # (rows, tokens, d)
        apart[at[:, 0], at[:, 1]] = clean[at[:, 1]].to(apart)
        return apart.view_as(hidden)

    return restore
