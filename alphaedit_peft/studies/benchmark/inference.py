"""What a pack costs in use: forward passes of the base, with packs of growing rank, and merged.

In: a subject. Out: milliseconds of a forward pass of 256 tokens for each. An unmerged pack adds two
thin products a rewrite layer; merged, nothing is left of it. The packs' numbers are random, since
time does not depend on them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from alphaedit_peft import hooks
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.model import AlphaEditModel, get_alphaedit_model, live
from alphaedit_peft.studies.benchmark.findings import Forward
from alphaedit_peft.studies.benchmark.machine import timed
from alphaedit_peft.studies.benchmark.preparing import Subject

RANKS = (1, 100, 1000)
TOKENS, PASSES = 256, 9


def forward_times(
    subject: Subject,
    progress: Callable[[str], object] = lambda text: None,
    *,
    ranks: Sequence[int] = RANKS,
    tokens: int = TOKENS,
    passes: int = PASSES,
) -> tuple[Forward, ...]:
    """Time forward passes of one row of tokens.

    Args:
        subject: whose model is bare; it is left with the bits it had.
        progress: called with a line now and then.
        ranks: of the packs.
        tokens: in the row; fewer where the model has fewer positions.
        passes: the median of so many counts; those of all models in turn.
    """
    positions = getattr(subject.model.config, "max_position_embeddings", None) or tokens
    length = min(tokens, positions)
    row = torch.arange(length, device=subject.device)[None] % len(subject.weights)
    progress("forward passes of the base")
    times = {("base", 0): _forwards(subject.model, row, passes)}
    model = get_alphaedit_model(subject.model, subject.config, tokenizer=subject.tokenizer)
    try:
        for rank in ranks:
            progress(f"forward passes with a pack of rank {rank}")
            _fill(model, rank)
            times["unmerged", rank] = _forwards(model, row, passes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what rounding loses plays no part
            model.merge()
        times["merged", ranks[-1]] = _forwards(model, row, passes)
        model.unmerge()
    finally:
        model.unload()
    return tuple(Forward(name, rank, length, found) for (name, rank), found in times.items())


@torch.no_grad()
def _forwards(model: nn.Module, row: Tensor, passes: int) -> float:
    """Milliseconds of a pass, the median of some after one that does not count."""
    with hooks.evaluating(model):
        seconds = [
            timed(lambda: model(input_ids=row, use_cache=False), row.device)
            for _ in range(passes + 1)
        ]
    return 1000 * median(seconds[1:])


def _fill(model: AlphaEditModel, rank: int) -> None:
    """Random factors of a rank, whose update is as large as the weight."""
    random = torch.Generator().manual_seed(rank)
    for layer in live.lora_layers(model).values():
        weight = layer.get_base_layer().weight
        A = torch.randn(rank, layer.in_features, generator=random)
        B = torch.randn(layer.out_features, rank, generator=random)
        B *= float(weight.float().std()) / rank**0.5
        live.write_factors(layer, "default", LowRankDelta(A, B))
