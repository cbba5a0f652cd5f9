"""How many directions count as null, and the threshold at which edits disturb least.

In: the eigenvalues of a key moment C0, ascending, a threshold and its mode. Out: the number k of
directions that P = Q Q^T keeps, and each layer's eigenvectors that this and nearby thresholds need.

The threshold ``auto`` chooses by the other tokens of the edits' prompts. For a projected key
a = k P, alone, the update Delta = r a^T / |a|^2 moves its own output by r and that for another key
o by (o . a) / |a|^2 of r. A low threshold leaves a short and so the update large; a high one lets
through what all keys have in common. Where the least disturbance lies differs between models by an
order of magnitude; all of it is exact with the eigenvectors that are stored.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from alphaedit_peft import algebra
from alphaedit_peft.nullspace.spectrum import PROJECTOR, LayerSpace, exact_spectrum
from alphaedit_peft.progress import counting
from alphaedit_peft.settings import THRESHOLD_MODES, require_one_of

REACH = 10.0  # the threshold can be moved by this factor, either way
ADVISED = 10  # tokens for each of d_in directions
LONG = 4096  # width from which on an eigen-decomposition takes so long that a bar is shown
ENERGIES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
CLEARLY = 0.85  # a threshold is left for one that disturbs at most this much of what it does
KeysAround = Sequence[tuple[Tensor, Tensor]]
"""For each edit its key (d_in,), and the keys of other tokens of its prompt, (tokens, d_in)."""


def null_dimension(values: Tensor, threshold: float, mode: str = "absolute") -> int:
    """How many of the smallest eigenvalues (ascending, (d_in,)) count as zero.

    Modes: ``absolute``: eigenvalue < threshold (the paper; its code uses 2e-2);
    ``relative``: eigenvalue < threshold * largest; ``energy``: the most directions whose sum stays
    <= threshold * total; ``rank``: all but the ``threshold`` largest.

    Raises:
        ValueError: an unknown mode, or a threshold outside its range.
    """
    require_in_range(threshold, mode, len(values))
    if mode == "absolute":
        return int((values < threshold).sum())
    if mode == "relative":
        return int((values < threshold * values[-1]).sum())
    if mode == "energy":
        cumulative = values.double().cumsum(0)
        return int((cumulative <= threshold * cumulative[-1]).sum())
    return len(values) - int(threshold)


def require_in_range(threshold: float, mode: str, width: int) -> None:
    """Refuse an unknown mode, or a threshold that none of this width can have."""
    require_one_of("threshold_mode", mode, THRESHOLD_MODES)
    top = _largest(mode, width)
    if not 0 <= threshold <= top:
        raise ValueError(f"threshold={threshold} is outside 0..{top} for mode {mode!r}")


def _largest(mode: str, width: int) -> float:
    """The largest threshold of a mode."""
    return {"absolute": float("inf"), "rank": float(width)}.get(mode, 1.0)


def null_basis(key_moment: Tensor, threshold: float, mode: str = "absolute") -> Tensor:
    """Orthonormal basis Q (d_in, k) of the directions that preserved keys do not use.

    P = Q Q^T is the paper's projector (section 3.2).
    """
    found = algebra.spectrum(key_moment)
    return found.vectors[:, : null_dimension(found.values, threshold, mode)]


def check_reach(part: LayerSpace, layer: int, threshold: float, mode: str) -> None:
    """Refuse a threshold that keeps nothing, is beyond the stored eigenvectors, or not P's own."""
    if part.projector_only and (threshold, mode) != PROJECTOR:
        raise ValueError(
            f"threshold={threshold} ({mode}) cannot be used: layer {layer} was read from a "
            f"projector, and its eigenvalues are not known; use {PROJECTOR[0]} "
            f"({PROJECTOR[1]}), which is the projector as it is, or leave the threshold unset"
        )
    kept = null_dimension(part.values, threshold, mode)
    low, high = part.reach
    if kept == 0:
        raise ValueError(
            f"threshold={threshold} ({mode}) keeps none of layer {layer}'s {len(part.values)} "
            f"directions (eigenvalues {float(part.values[0]):.3g} to "
            f"{float(part.values[-1]):.3g}), so no edit could be made; use a threshold that "
            "counts more of them as zero"
        )
    if not low <= kept <= high:
        raise ValueError(
            f"threshold={threshold} ({mode}) keeps {kept} directions of layer {layer}, but "
            f"this null space stores eigenvectors for {low} to {high}; make another one with "
            "KeyMoments.null_space"
        )


def decompose(
    moments: Mapping[int, Tensor],
    tokens: int,
    wanted: tuple[float, str, float],
    progress: bool = False,
) -> dict[int, LayerSpace]:
    """Every layer's part of a null space, from its moment C0 (d_in, d_in) over so many tokens.

    ``wanted`` is threshold, mode and reach; ``progress`` shows a bar where a layer takes seconds.
    """
    for layer, moment in moments.items():
        width = len(moment)
        if tokens < width:
            raise ValueError(
                f"{tokens} tokens are fewer than layer {layer}'s width {width}, so directions "
                f"would count as unused for want of data; collect at least {width - tokens} more, "
                f"better {ADVISED * width - tokens}"
            )
        if tokens < ADVISED * width:
            warnings.warn(
                f"{tokens} tokens are few for layer {layer}'s width {width}; ten for each "
                f"direction are advised, {ADVISED * width}",
                stacklevel=4,
            )
    long = any(len(moment) >= LONG for moment in moments.values())
    parts = {}
    with counting("eigenvectors", len(moments), "layer", shown=progress, bar=long) as bar:
        for layer in sorted(moments):
            parts[layer] = layer_space(moments[layer], *wanted)
            bar.update(1)
    return parts


def layer_space(moment: Tensor, threshold: float, mode: str, reach: float = REACH) -> LayerSpace:
    """Decompose C0 (d_in, d_in); keep what thresholds within ``reach`` times either way need."""
    if not 1 <= reach < float("inf"):
        raise ValueError(
            f"reach={reach} is no factor to move the threshold by; use 1 (not at all) or more"
        )
    found = exact_spectrum(moment)
    values = found.values.float().cpu()
    top = _largest(mode, len(values))
    reached = [
        null_dimension(values, min(t, top), mode)
        for t in (threshold / reach, threshold, threshold * reach)
    ]
    return LayerSpace.from_spectrum(found, min(reached), max(reached))


def disturbance(part: LayerSpace, keys: KeysAround, kept: Sequence[int]) -> Tensor:
    """Root mean square over tokens of (o . a) / |a|^2 for each edit, (n, len(kept)).

    Args:
        part: one layer of a null space.
        keys: of n edits, each with one other token or more.
        kept: numbers of directions within ``part.reach``, 1 or more.
    """
    width, stored = part.basis.shape
    columns = [k - (width - stored if part.complement else 1) for k in kept]
    found = []
    for key, others in keys:
        both = torch.cat([key[None], others])  # (1 + tokens, d_in)
        both = both.to(torch.promote_types(both.dtype, torch.float32))
        along = (both @ part.basis.to(both)).double()  # (1 + tokens, m)
        products = along * along[:1]
        if part.complement:  # what is not stored is the sum of all smaller directions
            whole = both.double() @ both[0].double()
            products = torch.cat([(whole - products.sum(1))[:, None], products], 1)
        sums = products.cumsum(1)[:, columns]  # (1 + tokens, len(kept)): |a|^2, then o . a
        size = sums[0].clamp_min(torch.finfo(torch.float64).tiny)
        found.append((sums[1:] / size).square().mean(0).sqrt())
    return torch.stack(found).cpu()


def least_disturbing(
    parts: Mapping[int, LayerSpace], own: float, keys: Mapping[int, KeysAround]
) -> tuple[float, dict[float, float]]:
    """The energy threshold at which these edits move the other tokens of their prompts least.

    A null space's ``own`` is left only where another one is clearly better: the curve is flat at
    its bottom, and packs of one model can only be joined where they have one threshold.

    Returns:
        The threshold, and for each of ``ENERGIES`` within reach of all ``parts`` the geometric mean
        over layers of the edits' median disturbance. None within reach is a ValueError.
    """
    reachable = [t for t in ENERGIES if all(_reaches(parts[n], t) for n in keys)]
    if not reachable:
        raise ValueError(
            f"none of the energy thresholds {ENERGIES} is within this null space's reach; set "
            "threshold, or make another one with KeyMoments.null_space"
        )
    logs = torch.zeros(len(reachable), dtype=torch.float64)
    for layer, around in keys.items():
        part = parts[layer]
        kept = [null_dimension(part.values, t, "energy") for t in reachable]
        medians = disturbance(part, around, kept).median(0).values
        logs += medians.clamp_min(torch.finfo(torch.float64).tiny).log() / len(keys)
    found = dict(zip(reachable, logs.exp().tolist(), strict=True))
    best = min(found, key=lambda t: found[t])
    return own if found[best] > CLEARLY * found.get(own, torch.inf) else best, found


def _reaches(part: LayerSpace, threshold: float) -> bool:
    kept = null_dimension(part.values, threshold, "energy")
    low, high = part.reach
    return kept > 0 and low <= kept <= high
