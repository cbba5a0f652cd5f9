"""Figures of the report: what is kept from call to call gives those of all rows at once."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.editing.edit_report import EditResult, MomentProducts, layer_report
from alphaedit_peft.edits import Edit
from alphaedit_peft.nullspace import KeyMoments, NullSpace
from alphaedit_peft.nullspace.spectrum import moment_quadratic

WIDTH, SIZES = 30, (4, 1, 6)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def space_of(removed: int) -> NullSpace:
    keys = random(200, WIDTH) * torch.linspace(0.01, 3, WIDTH)
    return KeyMoments({0: keys.T @ keys / 200}, 400, {0: "m"}).null_space(removed, "rank")


def forms(products: MomentProducts, B: Tensor) -> tuple[float, float]:
    """tr(B A C0 A^T B^T) by what is kept, and from all rows at once."""
    quadratic = moment_quadratic(products.space, products.rows.double())
    exact = B.double()
    return products.squared(B), float((exact.T @ exact * quadratic).sum())


@pytest.mark.parametrize("removed", [5, 25])
@pytest.mark.parametrize("projected", [True, False])
def test_products_kept_from_call_to_call_give_the_figures_of_all_rows_at_once(removed, projected):
    space, rows = space_of(removed), random(sum(SIZES), WIDTH, seed=1)
    rows = space.project(0, rows) if projected else rows
    kept, end = None, 0
    for size in SIZES:
        end += size
        kept = MomentProducts.of(space.parts[0], rows[:end], kept)
        found, wanted = forms(kept, random(7, end, seed=2))
        assert found == pytest.approx(wanted, rel=1e-9)
    assert [len(part) for part in kept.parts] == [*SIZES]


def test_what_is_kept_of_other_rows_or_another_null_space_is_not_used():
    space, rows = space_of(5), random(sum(SIZES), WIDTH, seed=1)
    first = MomentProducts.of(space.parts[0], rows[:4])
    kept = MomentProducts.of(space.parts[0], rows[:5], first)
    assert MomentProducts.of(space.parts[0], rows[:4], kept).parts == first.parts  # rolled back
    assert MomentProducts.of(space.with_threshold(6).parts[0], rows[:5], kept).parts == kept.parts
    changed = rows.clone()
    changed[4] += 1
    found = MomentProducts.of(space.parts[0], changed, kept)
    assert found.parts[0] is first.parts[0]
    assert [len(part) for part in found.parts] == [4, 7]
    for other in (MomentProducts.of(space_of(5).parts[0], rows[:5], kept), None):
        fresh = other or MomentProducts.of(space.parts[0], rows[1:5], kept)
        assert len(fresh.parts) == 1
        assert fresh.parts[0] is not first.parts[0]


def test_the_report_is_that_of_the_dense_update():
    space, rows = space_of(25), random(6, WIDTH, seed=1)
    delta = LowRankDelta(space.project(0, rows), random(9, 6, seed=2))
    dense, keys = delta.dense().double(), random(200, WIDTH) * torch.linspace(0.01, 3, WIDTH)
    found = layer_report(0, delta, 2, 1.0, moments=MomentProducts.of(space.parts[0], delta.A))
    moved = (keys.double() @ dense.T).square().sum(1).mean().sqrt()
    assert found.preserved_change == pytest.approx(float(moved), rel=1e-4)
    edited = (delta.A[4:].double() @ dense.T).square().sum(1).mean().sqrt()
    assert found.edited_change == pytest.approx(float(edited), rel=1e-4)
    without = layer_report(0, delta, 2, 1.0)
    assert without.preserved_change is without.edited_change is None


@pytest.mark.parametrize(
    ("why_not", "paraphrases", "beyond", "remark"),
    [
        ("", (True,), "", ""),
        ("", (True,), "?", "its key holds '\\?' too, one token with the subject's end"),
        ("", (False,), "?", r"it holds only as phrased.*; its key holds '\?' too"),
        ("raise steps", (False,), "", "^not the likeliest: raise steps$"),
    ],
)
def test_a_result_says_all_that_did_not_come_out_as_asked(why_not, paraphrases, beyond, remark):
    edit = Edit("Leedstown (APA-56)", "What is {}?", "a ship")
    result = EditResult(edit, why_not=why_not, paraphrases=paraphrases, beyond=beyond)
    assert re.search(remark, result.remark)
    assert bool(result.remark) == bool(remark)
