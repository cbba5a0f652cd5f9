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
from alphaedit_peft.placement import held
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
        passes: rounds through all of these models in turn, after one that does not count; medians
            are given.
    """
    positions = getattr(subject.model.config, "max_position_embeddings", None) or tokens
    length = min(tokens, positions)
    row = torch.arange(length, device=subject.device)[None] % len(subject.weights)
    times: dict[tuple[str, int], list[float]] = {}
    for number in range(passes + 1):
        progress(f"forward passes, round {number} of {passes}")
        for name, seconds in _round(subject, row, ranks).items():
            times.setdefault(name, []).append(seconds)
    return tuple(
        Forward(name, rank, length, 1000 * median(found[1:]))
        for (name, rank), found in times.items()
    )


@torch.no_grad()
def _round(subject: Subject, row: Tensor, ranks: Sequence[int]) -> dict[tuple[str, int], float]:
    """Seconds of a pass by each model."""

    def seconds(model: nn.Module) -> float:
        with hooks.evaluating(model):
            return timed(lambda: model(input_ids=row, use_cache=False), row.device)

    found = {("base", 0): seconds(subject.model)}
    model = get_alphaedit_model(subject.model, subject.config, tokenizer=subject.tokenizer)
    try:
        for rank in ranks:
            _fill(model, rank)
            found["unmerged", rank] = seconds(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what rounding loses plays no part
            model.merge()
        found["merged", ranks[-1]] = seconds(model)
        model.unmerge()
    finally:
        model.unload()
    return found


def _fill(model: AlphaEditModel, rank: int) -> None:
    """Random factors of a rank, whose update is as large as the weight."""
    random = torch.Generator().manual_seed(rank)
    for layer in live.lora_layers(model).values():
        weight = held(layer.get_base_layer(), "weight")
        A = torch.randn(rank, layer.in_features, generator=random)
        B = torch.randn(layer.out_features, rank, generator=random)
        B *= float(weight.float().std()) / rank**0.5
        live.write_factors(layer, "default", LowRankDelta(A, B))
