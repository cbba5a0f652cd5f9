"""How far an edit moves the other tokens of its prompt, and the threshold where that is least.

In: a null space, keys of edits, keys of the tokens around them. Out: for a projected key a = k P,
alone, the update Delta = r a^T / |a|^2 moves its own output by r and that for another key o by
(o . a) / |a|^2 of r. A low threshold leaves a short and so the update large; a high one lets
through what all keys have in common. In between there is a least disturbance. Where it lies differs
between models by an order of magnitude in the threshold; all of it is exact with the eigenvectors
that are stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from alphaedit_peft import algebra
from alphaedit_peft.nullspace.space import NullSpace
from alphaedit_peft.nullspace.spectrum import LayerSpace

ENERGIES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
CLEARLY = 0.85  # a threshold is left for one that disturbs at most this much of what it does
KeysAround = Sequence[tuple[Tensor, Tensor]]
"""For each edit its key (d_in,), and the keys of other tokens of its prompt, (tokens, d_in)."""


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
    null_space: NullSpace, keys: Mapping[int, KeysAround]
) -> tuple[float, dict[float, float]]:
    """The energy threshold at which these edits move the other tokens of their prompts least.

    The null space's own is left only where another one is clearly better: the curve is flat at its
    bottom, and packs of one model can only be joined where they have one threshold.

    Args:
        null_space: at an energy threshold; only those within its reach are looked at.
        keys: by rewrite layer.

    Returns:
        The threshold, and for each of ``ENERGIES`` within reach the geometric mean over layers of
        the edits' median disturbance.

    Raises:
        ValueError: none of them is within reach.
    """
    reachable = [t for t in ENERGIES if all(_reaches(null_space.parts[n], t) for n in keys)]
    if not reachable:
        raise ValueError(
            f"none of the energy thresholds {ENERGIES} is within this null space's reach; set "
            "threshold, or make another one with KeyMoments.null_space"
        )
    logs = torch.zeros(len(reachable), dtype=torch.float64)
    for layer, around in keys.items():
        part = null_space.parts[layer]
        kept = [algebra.null_dimension(part.values, t, "energy") for t in reachable]
        medians = disturbance(part, around, kept).median(0).values
        logs += medians.clamp_min(torch.finfo(torch.float64).tiny).log() / len(keys)
    found = dict(zip(reachable, logs.exp().tolist(), strict=True))
    best, own = min(found, key=lambda t: found[t]), null_space.threshold
    return own if found[best] > CLEARLY * found.get(own, torch.inf) else best, found


def _reaches(part: LayerSpace, threshold: float) -> bool:
    kept = algebra.null_dimension(part.values, threshold, "energy")
    low, high = part.reach
    return kept > 0 and low <= kept <= high
