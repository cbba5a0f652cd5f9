"""The kept factor: extended equals made anew, also where rows are replaced and ridges change."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from alphaedit_peft import algebra
from alphaedit_peft.cholesky import PART, KeptFactor

D_IN, D_OUT = 40, 7
SIZES = (4, 3, 5, 2, 6)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rows_of(sizes=SIZES) -> list[Tensor]:
    return [random(size, D_IN, seed=i) for i, size in enumerate(sizes)]


def grown(factor: KeptFactor, rows: Tensor) -> KeptFactor:
    together = torch.cat([factor.rows, rows])
    return factor.extended(together, [rows @ together.T])


def fresh(rows: list[Tensor], ridges: Tensor) -> KeptFactor:
    factor = KeptFactor.empty(rows[0])
    for part in rows:
        factor = grown(factor, part)
    return factor.factored(ridges)


def plain(rows: list[Tensor], ridges: Tensor) -> Tensor:
    """(G + D)^-1 E^T for the last batch, rows of infinite ridge left out."""
    A, u = torch.cat(rows), len(rows[-1])
    identity = torch.eye(u, dtype=torch.float64)
    return algebra.solve(A @ A.T, identity, ridges, torch.arange(len(A) - u, len(A)))


def same_bits(one: KeptFactor, other: KeptFactor) -> bool:
    pairs = [(one.ridges, other.ridges)]
    pairs += zip(one.grams, other.grams, strict=True)
    pairs += zip(one.lowers, other.lowers, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def agree(one: Tensor, other: Tensor, tolerance: float = 1e-12) -> bool:
    return float((one - other).norm()) <= tolerance * float(other.norm())


def ridges_for(batch: int, replaced=(), prior: float = 1.0, guard: float = 1.0) -> Tensor:
    """Each batch's own ridge; those in place times ``prior``; some rows replaced."""
    values = [0.1 * (i + 1) * (1.0 if i == batch else prior) for i in range(batch + 1)]
    ridges = torch.cat([torch.full((SIZES[i],), v) for i, v in enumerate(values)]).double()
    ridges[list(replaced)] = torch.inf
    return ridges * guard


REPLACED = {0: (), 1: (), 2: (1,), 3: (1, 8), 4: (1, 8, 9)}  # by batch


@pytest.mark.parametrize("prior", [1.0, 0.01, 0.0])
@pytest.mark.parametrize("replaces", [False, True])
def test_extended_over_five_batches_it_is_what_is_made_anew(replaces, prior):
    rows, kept = rows_of(), KeptFactor.empty(random(0, D_IN))
    for batch in range(len(rows)):
        ridges = ridges_for(batch, REPLACED[batch] if replaces else (), prior)
        kept = grown(kept, rows[batch]).factored(ridges)
        assert same_bits(kept, fresh(rows[: batch + 1], ridges))
        assert agree(kept.columns(SIZES[batch]), plain(rows[: batch + 1], ridges))


def test_under_a_guard_it_is_what_is_made_anew_and_what_is_kept_stays():
    rows, kept = rows_of(), KeptFactor.empty(random(0, D_IN))
    for batch in range(len(rows)):
        ridges = ridges_for(batch)
        kept = grown(kept, rows[batch]).factored(ridges)
        for guard in (2.0, 1024.0):
            found = kept.at_once(guard * ridges).columns(SIZES[batch])
            assert agree(found, plain(rows[: batch + 1], guard * ridges))
    assert same_bits(kept, fresh(rows, ridges_for(4)))


def test_small_batches_are_factored_together_and_made_anew_have_the_same_bits():
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 40, (16,), generator=generator).tolist()
    sizes[7:9] = [PART, 2 * PART]
    n = sum(sizes)
    rows = [random(size, n, seed=i) for i, size in enumerate(sizes)]
    ridges = torch.full((n,), 0.1, dtype=torch.float64)
    kept = KeptFactor.empty(rows[0])
    for batch, part in enumerate(rows):
        end = sum(sizes[: batch + 1])
        kept = grown(kept, part).factored(ridges[:end])
        assert same_bits(kept, fresh(rows[: batch + 1], ridges[:end]))
        shortened = kept.matching(kept.rows[: end - sizes[batch]], sizes[:batch])
        again = grown(shortened, part).factored(ridges[:end])
        assert same_bits(again, kept)
    assert len(kept.lowers) < len(sizes)
    assert agree(kept.columns(sizes[-1]), plain(rows, ridges), 1e-10)
    other = ridges.clone()
    other[n // 2] = torch.inf
    assert same_bits(kept.factored(other), fresh(rows, other))


def test_blocks_before_the_first_change_are_not_made_again():
    rows = rows_of()
    kept = fresh(rows, ridges_for(4))
    spoilt = replace(kept, lowers=tuple(part + 1 for part in kept.lowers))
    other = kept.ridges.clone()
    other[12] = torch.inf  # the first row of batch 3
    found = spoilt.factored(other)
    assert torch.equal(found.lower[:12, :12], spoilt.lower[:12, :12])
    assert not torch.equal(found.lower[12:, 12:], spoilt.lower[12:, 12:])


def test_rows_that_are_not_those_in_place_are_forgotten():
    rows = rows_of()
    kept, A = fresh(rows, ridges_for(4)), torch.cat(rows)
    assert same_bits(kept.matching(A, SIZES), kept)
    assert kept.matching(A[:12], SIZES[:3]).blocks == SIZES[:3]  # rolled back
    assert kept.matching(A, (4, 3, 5, 1, 7)).blocks == SIZES[:3]
    assert kept.matching(A.float(), SIZES).blocks == ()
    for row, left in ((0, ()), (11, SIZES[:2]), (12, SIZES[:3]), (19, SIZES[:4])):
        other = A.clone()
        other[row, -1] += 1e-12
        assert kept.matching(other, SIZES).blocks == left
    shortened = kept.matching(A[:12], SIZES[:3])
    assert same_bits(shortened.factored(ridges_for(2)), fresh(rows[:3], ridges_for(2)))


def test_rows_that_repeat_without_a_ridge_are_solved_as_by_least_norm():
    rows = rows_of()
    rows[3] = torch.stack([rows[0][0], torch.zeros(D_IN, dtype=torch.float64)])
    ridges = ridges_for(4, prior=0.0)
    kept = fresh(rows, ridges)
    assert len(kept.lower) < len(ridges)
    assert agree(kept.columns(SIZES[4]), plain(rows, ridges), 1e-9)
    good = fresh(rows, ridges_for(4))
    assert same_bits(kept.factored(ridges_for(4)), good)


def test_all_rows_in_place_can_be_out():
    rows = rows_of()
    ridges = ridges_for(4, range(14))
    found = fresh(rows, ridges).columns(6)
    assert not found[:14].any()
    alone = rows[4] @ rows[4].T + 0.5 * torch.eye(6, dtype=torch.float64)
    assert agree(found[14:], torch.linalg.inv(alone))


def test_keys_of_zeros_give_zeros():
    rows = [torch.zeros(2, D_IN, dtype=torch.float64)]
    found = fresh(rows, torch.zeros(2, dtype=torch.float64)).columns(2)
    assert torch.equal(found, torch.zeros(2, 2, dtype=torch.float64))


def test_what_is_held_by_batches_is_written_out():
    rows, ridges = rows_of(), ridges_for(4)
    factor, A, S = fresh(rows, ridges), torch.cat(rows_of()), random(20, 3, seed=8)
    G = A @ A.T
    assert agree(factor.gram, G)
    assert agree(factor.gram, factor.gram.T)  # a batch's products with itself are not mirrored,
    for end, u in zip(accumulate(factor.blocks), factor.blocks, strict=True):  # all others are
        above = factor.gram[: end - u, end - u : end]
        assert torch.equal(above, factor.gram[end - u : end, : end - u].T)
    assert torch.equal(factor.squares, factor.gram.diagonal())
    assert agree(factor.times(S), G @ S)
    assert agree(factor.lower, torch.linalg.cholesky(G + ridges.diag()))
    assert torch.equal(factor.gram_of(A), factor.gram)
    assert factor.gram_of(A[:-1]) is None


def test_amplification_is_the_size_of_the_update_to_that_on_orthogonal_keys():
    rows, ridges = rows_of(), ridges_for(4)
    factor, R = fresh(rows, ridges), random(6, D_OUT, seed=9)
    columns = factor.columns(6)
    delta = R.T @ columns.T @ factor.rows
    orthogonal = (R.square().sum(1) / rows[4].square().sum(1)).sum().sqrt()
    squares = factor.squares[14:]
    found = algebra.amplification(factor.times(columns), squares, columns, R)
    assert found == pytest.approx(float(delta.norm() / orthogonal))
