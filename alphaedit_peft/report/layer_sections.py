"""A pack's page, layer by layer: size of the update, room left, keys, spectrum of the null space.

In: a pack, and its null space where it is at hand. Out: :class:`RowFigures` of the rows of A at
each module, and sections of a page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.editing.capacity import ALIKE, pack_capacity
from alphaedit_peft.edits import Edit
from alphaedit_peft.pack.contents import PackContents
from alphaedit_peft.report.charts import bar_chart, heat_map, spectrum_chart
from alphaedit_peft.report.page import Markup, Section, facts, paragraph, side_by_side, table

if TYPE_CHECKING:
    from alphaedit_peft.nullspace import NullSpace

MAX_ROWS = 2000  # an eigendecomposition of n x n beyond it takes minutes
MAX_CELLS = 100  # rows of a heat map; more rows are counted by their cosines instead
MAX_CHARTS = 6  # layers whose keys are drawn
CLOSEST = 8


@dataclass(frozen=True, eq=False)
class RowFigures:
    """The rows of A at one module.

    Args:
        rows: how many were looked at.
        rank: how many of them are independent.
        condition: largest by smallest eigenvalue of A A^T; inf where rows are dependent, 1 without
            rows.
        cosines: (rows, rows), float64; 0 for a row of zeros.
        in_common: (rows,), the share of each row that the others span, |Pi a|^2 / |a|^2: what
            removing its edit from the pack alone leaves in force.
    """

    rows: int
    rank: int
    condition: float
    cosines: Tensor
    in_common: Tensor

    def closest(self, number: int) -> list[tuple[float, int, int]]:
        """The pairs of rows with the largest cosines: (cosine, row, row), the largest first."""
        i, j = torch.triu_indices(self.rows, self.rows, offset=1)
        values = self.cosines[i, j]
        found = values.topk(min(number, len(values)))
        pairs = zip(i[found.indices].tolist(), j[found.indices].tolist(), strict=True)
        return [(value, *pair) for value, pair in zip(found.values.tolist(), pairs, strict=True)]


def row_figures(delta: LowRankDelta) -> RowFigures:
    """Figures of the first ``MAX_ROWS`` rows of an update.

    The distance of row i from the others' span is 1 / (G^-1)_ii, so that it shares
    1 - 1 / (G_ii (G^-1)_ii) with them.
    """
    A = delta.A[:MAX_ROWS].double()
    G = A @ A.T  # (n, n)
    size = G.diagonal()
    cosines = _unit(G, size)
    values, vectors = torch.linalg.eigh(cosines)  # of the rows at length 1
    bound = len(A) * torch.finfo(torch.float32).eps  # what float32 rows can tell from 0
    rank = int((values > bound).sum())
    inverse = (vectors.square() / values.clamp_min(bound)).sum(1)
    alone = torch.where(size > 0, 1 / inverse.clamp_min(1.0), 1.0)
    full = torch.linalg.eigvalsh(G) if len(G) else G.new_ones(1)
    dependent = rank < len(A) or bool((size == 0).any())
    condition = float("inf") if dependent else float(full[-1] / full[0])
    return RowFigures(len(A), rank, condition, cosines, 1 - alone)


def _unit(G: Tensor, size: Tensor) -> Tensor:
    """Cosines from G = A A^T, with zeros for rows of zeros."""
    scale = torch.where(size > 0, size.clamp_min(torch.finfo(size.dtype).tiny).rsqrt(), 0.0)
    return G * scale[:, None] * scale[None, :]


def capacity_section(
    pack: PackContents, rows: Mapping[str, RowFigures], null_space: NullSpace | None
) -> Section:
    """Norms of the update, and how much of the room that the null space leaves is taken."""
    filled = pack_capacity(pack, null_space)
    alike = {part.layer: part.conflicts for part in filled.layers} if filled else {}
    bars, cells = [], []
    for layer, (module, delta) in zip(pack.layers, pack.factors.items(), strict=True):
        room = delta.A.shape[1] if null_space is None else null_space.null_dimension(layer)
        found, condition = rows.get(module), None
        rank = pack.rank if found is None or found.rows < pack.rank else found.rank
        if found is not None:
            dependent = found.condition == float("inf")
            condition = "rows are dependent" if dependent else f"{found.condition:,.4g}"
        size, taken = delta.norm(), f"{rank / room:.1%}"
        bars.append((f"layer {layer}", size))
        cells.append((layer, module, size, rank, room, taken, condition, alike.get(layer)))
    room_name = ">width" if null_space is None else ">kept directions"
    columns = [">layer", "module", ">|Delta|", ">independent rows", room_name, ">taken"]
    text = (
        "Delta is what the pack adds to a layer's weight. Each row takes one direction of those "
        "that the null space keeps. The condition of A Aᵀ says how crowded the rows are: where it "
        "is large, some edits are nearly alike, and the solve is touchy."
    )
    if null_space is None:
        text += " How many directions are kept is not known here, so rows are set against all."
    if pack.rank > MAX_ROWS:
        text += f" The condition is that of the first {MAX_ROWS:,} rows."
    chart = bar_chart("Size of the update, |Delta|", bars)
    listed = table([*columns, ">condition of A Aᵀ", f">pairs of cosine ≥ {ALIKE:g}"], cells)
    said = paragraph(f"Note: {filled.warning}.") if filled and filled.warning else ""
    content = Markup(side_by_side([chart]) + said + listed + paragraph(text))
    return Section("Layers and room", content)


def key_section(pack: PackContents, rows: Mapping[str, RowFigures]) -> Section:
    """How alike the edits' keys are: every cosine, or how many there are of each size."""
    heading = "How alike the keys are"
    first = next((found.rows for found in rows.values()), 0)
    if first < 2:
        mixed = "The pack was compressed to a lower rank, so its rows are mixtures of keys."
        none = mixed if pack.rank else "The pack holds no rows."
        return Section(heading, paragraph("There is one key only." if rows else none))
    edits = _edits_of_rows(pack)
    layers = dict(zip(pack.modules, pack.layers, strict=True))
    charts = []
    for module, found in [*rows.items()][:MAX_CHARTS]:
        title = f"Layer {layers[module]}"
        if first <= MAX_CELLS:
            labels = [edits[r].subject if r in edits else str(r) for r in range(first)]
            charts.append(heat_map(f"{title}: cosines of the rows", found.cosines.tolist(), labels))
        else:
            i, j = torch.triu_indices(first, first, offset=1)
            bars = histogram(found.cosines[i, j], -1.0, 1.0, 20)
            used = [k for k, (_, count) in enumerate(bars) if count]
            bars = bars[used[0] : used[-1] + 1]
            charts.append(bar_chart(f"{title}: pairs of rows, by cosine", bars))
    text = (
        "Edits whose keys are alike pull on each other. A cosine of 1 is one key, 0 is none in "
        "common."
    )
    if pack.rank > first:
        text += f" These are the first {first:,} rows of {pack.rank:,}."
    module, found = [*rows.items()][-1]
    closest = [
        (cosine, *(edits[row].question if row in edits else f"row {row}" for row in rows_of))
        for cosine, *rows_of in found.closest(CLOSEST)
    ]
    pairs = table([">cosine", "edit", "nearest to it"], closest)
    above = Markup(f"<h3>The nearest pairs, in layer {layers[module]}</h3>")
    return Section(heading, Markup(paragraph(text) + side_by_side(charts) + above + pairs))


def null_space_section(pack: PackContents, null_space: NullSpace | None) -> Section:
    """The spectrum with what is kept of it, or what the pack says of its null space."""
    made = pack.null_space or {}
    names = {"tokens": "Tokens", "threshold": "Threshold", "mode": "Threshold mode"}
    pairs = [(name, made.get(field)) for field, name in {**names, "digest": "Digest"}.items()]
    if null_space is None:
        text = (
            "What the edits must not disturb was measured beforehand over a corpus. The pack "
            "records this of it; its spectrum is drawn where the null space is given."
            if made
            else "The pack does not record a null space."
        )
        return Section("Null space", Markup(paragraph(text) + (facts(pairs) if made else "")))
    pairs.insert(0, ("Corpus", null_space.provenance.get("corpus", "unknown")))
    charts = [
        spectrum_chart(f"Layer {n}", null_space.spectra[n].tolist(), null_space.null_dimension(n))
        for n in pack.layers
    ]
    text = (
        "Eigenvalues of the moment of the keys over a corpus: large where other knowledge lives. "
        "Updates move only along the shaded directions, whose eigenvalues the threshold counts as "
        "zero."
    )
    return Section("Null space", Markup(paragraph(text) + facts(pairs) + side_by_side(charts)))


def _edits_of_rows(pack: PackContents) -> dict[int, Edit]:
    """Each row's first edit, one in force if there is one."""
    edits: dict[int, Edit] = {}
    for record in sorted(pack.records, key=lambda record: record.role == "superseded"):
        edits.setdefault(record.row, record.edit)
    return edits


def histogram(values: Tensor, low: float, high: float, bins: int) -> list[tuple[str, int]]:
    """How many values lie in each of equal parts of low..high, with the parts' names."""
    counts = torch.histc(values.double().clamp(low, high), bins, low, high)
    step = (high - low) / bins
    names = [f"{low + i * step:.1f} to {low + (i + 1) * step:.1f}" for i in range(bins)]
    return list(zip(names, map(int, counts.tolist()), strict=True))
