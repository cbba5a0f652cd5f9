"""How full a model is of edits: crowding, room, growth and drift, layer by layer.

In: factors in place (A (n, d_in), B (d_out, n)), which rows stand, and where they are at hand the
null space, the base weights' norms and how far kept prompts moved. Out: a :class:`Capacity`, a
value that says in words when there is no room for more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.devices import for_solving
from alphaedit_peft.editing.state import protects
from alphaedit_peft.pack.contents import PackContents

if TYPE_CHECKING:
    from alphaedit_peft.log_probs import Reader
    from alphaedit_peft.nullspace import NullSpace

ALIKE = 0.9  # cosine from which two rows pull on each other
MAX_ROWS = 2000  # all eigenvalues of more dependent rows take minutes
EXACT_ROWS = 500  # all eigenvalues of n x n up to here, the two ends by iteration beyond
ITERATIONS, SUBSPACE = 30, 8  # leave the ends within 2 % where the spectrum is dense there


@dataclass(frozen=True)
class LayerCapacity:
    """One rewrite layer.

    Args:
        layer: block number.
        rows: rows of A that protect an edit: neither superseded nor zero.
        rank: how many of them are independent.
        room: directions that the null space keeps; None where it is not known.
        condition: largest by smallest eigenvalue of A A^T with rows at length 1; inf where rows are
            dependent, 1 without rows.
        conflicts: pairs of rows whose cosine is at least ``ALIKE``.
        delta_norm: |Delta|, Frobenius.
        weight_norm: |W| of the base; None where it is not known.
    """

    layer: int
    rows: int
    rank: int
    room: int | None
    condition: float
    conflicts: int
    delta_norm: float
    weight_norm: float | None

    @property
    def used(self) -> float | None:
        """Share of the kept directions that the rows take, rank / room."""
        return None if not self.room else self.rank / self.room

    @property
    def growth(self) -> float | None:
        """|Delta| / |W|."""
        return None if not self.weight_norm else self.delta_norm / self.weight_norm

    def __str__(self) -> str:
        taken = "" if self.used is None else f"{self.used:.0%} of {self.room} directions taken, "
        size = f"{self.delta_norm:.3g}" if self.growth is None else f"{self.growth:.2f} of |W|"
        return (
            f"room in layer {self.layer}: {taken}{self.rank} of {self.rows} rows independent, "
            f"condition {self.condition:.2g}, {self.conflicts} pairs of rows alike, |Delta| {size}"
        )


@dataclass(frozen=True)
class Capacity:
    """How full a model is.

    Args:
        layers: one for each rewrite layer.
        drift: mean KL(unedited || edited) of the distributions of the token after each kept prompt,
            in nats; None where no prompts were given.
        bound: ``config.capacity_bound``, the share of the room from which ``warning`` speaks; 0:
            never.
    """

    layers: tuple[LayerCapacity, ...]
    drift: float | None = None
    bound: float = 0.0

    @property
    def warning(self) -> str:
        """Why to stop here; empty while there is room, or where the room is not known."""
        known = [(part.used, part) for part in self.layers if part.used is not None]
        used, worst = max(known, key=lambda pair: pair[0], default=(0.0, None))
        if worst is None or not self.bound or used < self.bound:
            return ""
        return (
            f"the edits take {worst.rank} of the {worst.room} directions ({used:.0%}) that the "
            f"null space keeps in layer {worst.layer}, capacity_bound={self.bound:g}: with many "
            "more, edits fade and other facts change; spread them over more rewrite_layers, or "
            "over packs that are not active together"
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; ``condition`` is None where it is infinite."""
        layers = [
            asdict(part)
            | {"condition": part.condition if isfinite(part.condition) else None}
            | {"used": part.used, "growth": part.growth}
            for part in self.layers
        ]
        return {"layers": layers, "drift": self.drift, "warning": self.warning}

    def __str__(self) -> str:
        lines = [str(part) for part in self.layers]
        if self.drift is not None:
            lines.append(f"drift on kept prompts: {self.drift:.4f} nats")
        return "\n".join(lines + [self.warning] * bool(self.warning))


def measure_capacity(
    factors: Mapping[int, LowRankDelta],
    standing: Sequence[bool],
    *,
    null_space: NullSpace | None = None,
    weight_norms: Mapping[int, float | None] | None = None,
    grams: Mapping[int, Tensor] | None = None,
    bound: float = 0.0,
) -> Capacity:
    """Figures of the factors in place; the first ``MAX_ROWS`` standing rows are looked at.

    Args:
        standing: (n,), for each row whether an edit stands in it.
        null_space: the one that the rows were projected with.
        weight_norms: by layer, |W| of the base.
        grams: by layer, A A^T (n, n) in float64 where it is at hand: it is most of the work.

    Raises:
        ValueError: ``standing`` is not as long as the factors.
    """
    layers = []
    for layer, delta in factors.items():
        if len(standing) != delta.rank:
            raise ValueError(
                f"standing has {len(standing)} entries for {delta.rank} rows of layer {layer}; "
                "give one for each row"
            )
        gram = (grams or {}).get(layer)
        gram = delta.gram() if gram is None else gram  # (n, n)
        stands = torch.tensor(standing, dtype=torch.bool, device=gram.device)
        count, rank, condition, conflicts = _crowding(gram[stands][:, stands])
        room = None if null_space is None else null_space.null_dimension(layer)
        norms = delta.norm(gram), (weight_norms or {}).get(layer)
        layers.append(LayerCapacity(layer, count, rank, room, condition, conflicts, *norms))
    return Capacity(tuple(layers), bound=bound)


def pack_capacity(pack: PackContents, null_space: NullSpace | None = None) -> Capacity | None:
    """What a pack alone tells, with its null space the room too.

    None where compression made its rows mixtures of keys.
    """
    if pack.mixed:
        return None
    standing = [record for record in pack.records if record.role != "superseded"]
    return measure_capacity(
        dict(zip(pack.layers, pack.factors.values(), strict=True)),
        protects(standing, pack.rank),
        null_space=null_space,
        bound=pack.config.capacity_bound,
    )


def prompt_drift(
    reader: Reader, without: Callable[[], AbstractContextManager[object]], prompts: Sequence[str]
) -> float:
    """Mean KL(unedited || edited) of the distributions of the token after each prompt, in nats.

    Args:
        without: switches the edits off, as PEFT's ``model.disable_adapter`` does.
        prompts: texts that should go on as before.

    Raises:
        TypeError: one text instead of a list.
        ValueError: no prompt, or one without a token.
    """
    from alphaedit_peft import tokens  # a pack's own figures do without
    from alphaedit_peft.evaluation import metrics

    if isinstance(prompts, str):
        raise TypeError(f"prompts={prompts[:40]!r} is one text; pass a list of texts")
    rows = [tokens.encode(reader.tokenizer, text)[0][: reader.positions] for text in prompts]
    if not rows or not all(rows):
        raise ValueError(f"prompts={[*prompts]!r:.80} lack a text; give one or more, none empty")
    total = 0.0
    for batch in reader.batches(rows):
        where = [(k, len(rows[i]) - 1) for k, i in enumerate(batch.indices)]
        now = reader.log_probs(batch.inputs, where)  # (prompts, vocab)
        with without():
            then = reader.log_probs(batch.inputs, where)
        total += float(for_solving(metrics.divergence(then, now)).double().sum())
    return total / len(rows)


def _crowding(gram: Tensor) -> tuple[int, int, float, int]:
    """Rows that are not zero, how many are independent, condition, pairs that are alike."""
    lengths = gram.diagonal().sqrt()
    some = (lengths > 0).nonzero()[:, 0]
    count, some = len(some), some[:MAX_ROWS]
    if not count:
        return 0, 0, 1.0, 0
    G = gram[some][:, some] / lengths[some] / lengths[some][:, None]  # (n, n), cosines
    alike = int((G.triu(1) >= ALIKE).sum())
    bound = len(G) * torch.finfo(torch.float32).eps  # what float32 rows can tell from 0
    if len(G) > EXACT_ROWS:
        shifted = G - bound * torch.eye(len(G)).to(G)  # has a factor if no eigenvalue is below
        if int(torch.linalg.cholesky_ex(shifted).info) == 0:
            return count, len(G), _condition(G), alike
    values = torch.linalg.eigvalsh(G)
    rank = int((values > bound).sum())
    condition = float(values[-1] / values[0]) if rank == len(G) else float("inf")
    return count, rank, condition, alike


def _condition(G: Tensor) -> float:
    """Largest by smallest eigenvalue of a positive definite G (n, n), by subspace iteration."""
    lower = torch.linalg.cholesky(G)
    seed = torch.Generator().manual_seed(0)
    start = torch.randn(len(G), SUBSPACE, generator=seed, dtype=torch.float64).to(G)
    high = low = start
    for _ in range(ITERATIONS):
        high = torch.linalg.qr(G @ high).Q
        low = torch.linalg.qr(torch.cholesky_solve(low, lower)).Q
    largest = torch.linalg.eigvalsh(high.T @ G @ high)[-1]
    smallest = torch.linalg.eigvalsh(low.T @ G @ low)[0]
    return float(largest / smallest)
