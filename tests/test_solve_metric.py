"""Products of rows: made at once they have the bits of those made batch by batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alphaedit_peft import algebra
from alphaedit_peft.nullspace import KeyMoments, NullSpace
from alphaedit_peft.solve_metric import COLUMNS_AT_ONCE, Metric, Moment, Projector

SIZES = (3, 17, 1, 64, 2)


def rows_of(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(sum(SIZES), width, generator=torch.Generator().manual_seed(0)).to(dtype)


def objective_of(name: str, width: int) -> Metric:
    if name == "alphaedit":
        return Projector(NullSpace.identity({0: width}), 1.0, False)
    drawn = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(1))
    moments = KeyMoments({0: drawn.T @ drawn / len(drawn)}, len(drawn), {0: "m"})
    return Moment(moments, 7.0)


@pytest.mark.parametrize("width", [5, COLUMNS_AT_ONCE // 16, COLUMNS_AT_ONCE + 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["alphaedit", "memit"])
def test_products_at_once_have_the_bits_of_batch_by_batch(name, dtype, width):
    rows, objective = rows_of(width, dtype), objective_of(name, width)
    batches = rows.split(SIZES)
    together = objective.grams(0, rows[:0], batches)
    for number, batch in enumerate(batches):
        start = sum(SIZES[:number])
        alone = objective.grams(0, rows[:start], [batch])
        assert len(alone) == 1
        assert torch.equal(alone[0], together[number])
    later = objective.grams(0, rows[: sum(SIZES[:2])], batches[2:])
    assert all(map(torch.equal, later, together[2:]))


@pytest.mark.parametrize("name", ["alphaedit", "memit"])
def test_products_are_those_of_the_metric_in_float64(name):
    width = COLUMNS_AT_ONCE // 16
    rows, objective = rows_of(width), objective_of(name, width)
    metric = torch.eye(width, dtype=torch.float64)
    if isinstance(objective, Moment):
        factor = algebra.moment_factor(objective.moments.moments[0], objective.weight)
        metric = factor @ factor.T
    whole = rows.double() @ metric @ rows.double().T
    ends = torch.tensor(SIZES).cumsum(0).tolist()
    for found, size, end in zip(
        objective.grams(0, rows[:0], rows.split(SIZES)), SIZES, ends, strict=True
    ):
        wanted = whole[end - size : end, :end]
        assert found.dtype == torch.float64
        assert float((found - wanted).norm()) <= 1e-13 * float(wanted.norm())
