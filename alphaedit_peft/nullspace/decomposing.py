"""Key moments to the layers of a null space, one after the other.

In: C0 (d_in, d_in) for each layer, the tokens behind them, a threshold. Out: a
:class:`~alphaedit_peft.nullspace.layer.LayerSpace` for each, or a sentence on too few tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor
from tqdm import tqdm

from alphaedit_peft import parallel
from alphaedit_peft.nullspace.layer import LayerSpace

LONG = 4096  # width from which on an eigen-decomposition takes so long that a bar is shown


def decompose(
    moments: Mapping[int, Tensor],
    tokens: int,
    wanted: tuple[float, str, float],
    progress: bool = False,
) -> dict[int, LayerSpace]:
    """Every layer's part of a null space, from its moment C0 (d_in, d_in).

    Args:
        moments: by layer.
        tokens: that they were collected over.
        wanted: threshold, mode and reach.
        progress: whether to show a bar on stderr where a layer takes seconds or more.

    Raises:
        ValueError: as ``check_tokens`` and ``LayerSpace.from_moment``.
    """
    for layer, moment in moments.items():
        check_tokens(tokens, layer, len(moment))
    long = any(len(moment) >= LONG for moment in moments.values())
    shown = long and progress and parallel.is_main()
    layers = tqdm(sorted(moments), desc="eigenvectors", unit="layer", disable=not shown)
    return {layer: LayerSpace.from_moment(moments[layer], *wanted) for layer in layers}


def check_tokens(tokens: int, layer: int, width: int) -> None:
    """Refuse a moment over fewer tokens than it is wide; warn below ten tokens a direction.

    Raises:
        ValueError: fewer tokens than ``width``.
    """
    if tokens < width:
        raise ValueError(
            f"{tokens} tokens are fewer than layer {layer}'s width {width}, so directions would "
            f"count as unused for want of data; collect at least {width - tokens} more, better "
            f"{10 * width - tokens}"
        )
    if tokens < 10 * width:
        warnings.warn(
            f"{tokens} tokens are few for layer {layer}'s width {width}; ten for each direction "
            f"are advised, {10 * width}",
            stacklevel=5,
        )
