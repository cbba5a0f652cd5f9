"""What an edit run did, edit by edit and layer by layer: :class:`EditReport`.

In: what a batch measured, and the factors. Out: values to read, print or store; an edit that was
set aside or that did not take says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.cholesky import equal_rows
from alphaedit_peft.editing.auto_settings import Decision
from alphaedit_peft.editing.capacity import Capacity
from alphaedit_peft.edits import Edit
from alphaedit_peft.nullspace.spectrum import LayerSpace, moment_quadratic, moment_times
from alphaedit_peft.solve_metric import products_with


@dataclass(frozen=True)
class EditResult:
    """One edit: made or set aside, and the figures that say how well it took.

    Args:
        edit: what was asked for.
        reason: why it was set aside; empty where it was made.
        row: its row of ``lora_A``.
        probability_before: P(target | bare prompt) before its batch.
        probability_after: the same after its batch.
        likeliest: whether greedy decoding says the whole target after the batch.
        loss: the last loss of its target value.
        steps: how many times that loss was evaluated.
        clamped: |z - h| / |h|; at ``clamp_factor`` the bound stopped the search.
        shares: by rewrite layer, the share of the wanted residual that the layer's solve reached.
        total_share: the share of z - h that the hidden state moved in the end.
        paraphrases: for each of the edit's, whether greedy decoding says the whole target.
        why_not: where it does not say it after the prompt: the reason that the figures point to.
        beyond: what the tokenizer merges into the subject's last token, such as the "?" of ")?".
    """

    edit: Edit
    reason: str = ""
    row: int | None = None
    probability_before: float | None = None
    probability_after: float | None = None
    likeliest: bool | None = None
    loss: float | None = None
    steps: int | None = None
    clamped: float | None = None
    shares: dict[int, float] = field(default_factory=dict)
    total_share: float | None = None
    paraphrases: tuple[bool, ...] = ()
    why_not: str = ""
    beyond: str = ""

    @property
    def made(self) -> bool:
        """Whether the edit was written into the model."""
        return not self.reason

    @property
    def remark(self) -> str:
        """What did not come out as asked, with what to turn; empty where nothing is known of it."""
        said = []
        if self.why_not:
            said.append(f"not the likeliest: {self.why_not}")
        elif 2 * sum(self.paraphrases) < len(self.paraphrases):
            said.append("it holds only as phrased: more or longer contexts help")
        if self.beyond:
            said.append(f"its key holds {self.beyond!r} too, one token with the subject's end")
        return "; ".join(said)


@dataclass(frozen=True)
class LayerReport:
    """One rewrite layer after the run.

    Args:
        layer: block number.
        rank: rows of ``lora_A``.
        delta_norm: Frobenius norm of the whole update.
        weight_norm: of the base weight; None where it is quantised.
        preserved_change: expected root mean square of the output change on preserved keys,
            sqrt(tr(Delta C0 Delta^T)); where only a part of C0 is known, an upper bound.
        edited_change: root mean square of the output change on this run's keys, for comparison.
    """

    layer: int
    rank: int
    delta_norm: float
    weight_norm: float | None
    preserved_change: float | None
    edited_change: float | None


@dataclass(frozen=True)
class EditReport:
    """Everything a call of ``edit`` did. Iterating gives the :class:`EditResult` of each edit.

    ``decisions`` are the settings that ``auto`` decided, at an adapter's first edits; ``capacity``
    is how full the adapter is afterwards; ``seconds`` the time of the call by phase (``Phases``).
    """

    results: tuple[EditResult, ...]
    layers: tuple[LayerReport, ...]
    decisions: tuple[Decision, ...] = ()
    capacity: Capacity | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __iter__(self) -> Iterator[EditResult]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    @property
    def made(self) -> tuple[EditResult, ...]:
        """Edits written into the model."""
        return tuple(r for r in self.results if r.made)

    @property
    def set_aside(self) -> tuple[EditResult, ...]:
        """Edits not written, each with its reason."""
        return tuple(r for r in self.results if not r.made)

    @property
    def not_taken(self) -> tuple[EditResult, ...]:
        """Edits written, whose target is still not what greedy decoding says."""
        return tuple(r for r in self.made if not r.likeliest)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "results": [
                asdict(r) | {"edit": r.edit.to_dict(), "made": r.made} for r in self.results
            ],
            "layers": [asdict(layer) for layer in self.layers],
            "decisions": [decision.to_json() for decision in self.decisions],
            "capacity": None if self.capacity is None else self.capacity.to_json(),
            "seconds": dict(self.seconds),
        }

    def __str__(self) -> str:
        lines = [
            f"{len(self.made)} edits made, {len(self.set_aside)} set aside, "
            f"{len(self.made) - len(self.not_taken)} say their target greedily"
        ]
        lines += [f"  {decision}" for decision in self.decisions]
        lines += [_result_line(r) for r in self.results]
        lines += [_layer_line(layer) for layer in self.layers]
        if self.capacity is not None:
            lines += [f"  {line}" for line in str(self.capacity).splitlines()]
        lines += [f"  {in_words(self.seconds)}"] if self.seconds else []
        return "\n".join(lines)


def in_words(seconds: Mapping[str, float]) -> str:
    """The sum, and the phases from the longest down: "12.3 s: targets 9.1, keys 3.2"."""
    longest = sorted(seconds.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{name} {value:.1f}" for name, value in longest)
    return f"{sum(seconds.values()):.1f} s: {parts}"


def _result_line(result: EditResult) -> str:
    head = f"  {result.edit.question} -> {result.edit.target_new.strip()}"
    if not result.made:
        return f"{head}: set aside, {result.reason}"
    share = "" if result.total_share is None else f", share {result.total_share:.2f}"
    told, asked = sum(result.paraphrases), len(result.paraphrases)
    remark = result.remark
    return (
        f"{head}: P {result.probability_before:.3g} -> {result.probability_after:.3g}"
        f", loss {result.loss:.3f} after {result.steps} steps{share}"
        f"{f', {told} of {asked} paraphrases' if asked else ''}"
        f"{f'; {remark}' if remark else ''}"
    )


def _layer_line(layer: LayerReport) -> str:
    of = "" if layer.weight_norm is None else f" of |W| {layer.weight_norm:.2f}"
    line = f"  layer {layer.layer}: rank {layer.rank}, |Delta| {layer.delta_norm:.3f}{of}"
    if layer.preserved_change is None or layer.edited_change is None:
        return line
    return (
        f"{line}; output moves by {layer.edited_change:.3f} on edited keys, "
        f"{layer.preserved_change:.3f} on preserved ones"
    )


@dataclass(frozen=True, eq=False)
class MomentProducts:
    """A C0 A^T of one layer, kept from call to call: each makes those of its own rows alone.

    Args:
        space: whose C0 it is.
        rows: A, (n, d_in).
        parts: of the u rows that each call added, (u, end), up to their own last column.
    """

    space: LayerSpace
    rows: Tensor
    parts: tuple[Tensor, ...]

    @classmethod
    def of(
        cls, space: LayerSpace, rows: Tensor, kept: MomentProducts | None = None
    ) -> MomentProducts:
        """Those of rows (n, d_in); what is kept is used as far as it is of these rows and C0."""
        parts: tuple[Tensor, ...] = ()
        if kept is not None and kept.space is space:
            same = equal_rows(kept.rows, rows)
            parts = tuple(part for part in kept.parts if part.shape[1] <= same)
        start = parts[-1].shape[1] if parts else 0
        if not start:
            return cls(space, rows, (moment_quadratic(space, rows.double()),))
        if start < len(rows):
            times = moment_times(space, rows[start:].double())  # (u, d_in)
            parts = (*parts, products_with(times, [rows]))
        return cls(space, rows, parts)

    def squared(self, B: Tensor) -> float:
        """tr(B A C0 A^T B^T) for B (d_out, n)."""
        B, total = B.double(), 0.0
        for part in self.parts:
            end, start = part.shape[1], part.shape[1] - len(part)
            own = B[:, start:end]
            total += 2 * float((own.T @ B[:, :start] * part[:, :start].to(B)).sum())
            total += float((own.T @ own * part[:, start:].to(B)).sum())
        return max(0.0, total)


def layer_report(
    layer: int,
    delta: LowRankDelta,
    new_rows: int,
    weight_norm: float | None,
    gram: Tensor | None = None,
    moments: MomentProducts | None = None,
) -> LayerReport:
    """One layer's whole update: its norm, and how far it moves preserved and edited keys.

    ``new_rows`` of its last rows are of this run. ``gram`` is A A^T, (n, n), where it is at hand;
    without ``moments``, A C0 A^T, the two changes stay unknown.
    """
    preserved = edited = None
    if moments is not None and delta.rank:
        preserved = moments.squared(delta.B) ** 0.5
        moved = delta.apply(delta.A[delta.rank - new_rows :])  # (new, d_out): A P = A
        edited = float(moved.square().sum(1).mean().sqrt()) if new_rows else None
    return LayerReport(layer, delta.rank, delta.norm(gram), weight_norm, preserved, edited)
