"""Figures of a pack's rows: they agree with what removal finds, and with dense algebra."""

import pytest
import torch

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.report import layer_sections
from alphaedit_peft.report.layer_sections import histogram, row_figures
from tests.pack.conftest import make_pack


def delta(rows):
    A = torch.tensor(rows, dtype=torch.float32)
    return LowRankDelta(A, torch.ones(2, len(A)))


def test_what_rows_have_in_common_is_what_their_removal_leaves_in_force():
    pack = make_pack(rows=5)
    for module, factors in pack.factors.items():
        found = row_figures(factors).in_common
        for record in pack.records:
            left = pack.without([record.edit.id], max_share=1.0)
            share = pack.removal_shares([record.edit.id])[record.edit.id][module]
            assert found[record.row] == pytest.approx(share, abs=1e-6)
            assert left.rank == 4


def test_rank_condition_and_cosines_are_those_of_the_gram_matrix():
    A = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    found = row_figures(LowRankDelta(A, torch.zeros(3, 6)))
    assert (found.rows, found.rank) == (6, 6)
    assert found.condition == pytest.approx(float(torch.linalg.cond(A.double() @ A.double().T)))
    cosines = torch.nn.functional.cosine_similarity(A[:, None], A[None], dim=2)
    assert torch.allclose(found.cosines.float(), cosines, atol=1e-5)


def test_equal_rows_are_dependent_and_entirely_in_common():
    found = row_figures(delta([[1, 0, 0], [2, 0, 0], [0, 1, 0]]))
    assert (found.rank, found.condition) == (2, float("inf"))
    assert found.in_common.tolist() == pytest.approx([1, 1, 0], abs=1e-5)
    assert found.closest(1) == [(pytest.approx(1.0), 0, 1)]


def test_a_row_of_zeros_has_nothing_in_common():
    found = row_figures(delta([[0, 0, 0], [0, 1, 0]]))
    assert (found.rank, found.condition) == (1, float("inf"))
    assert found.in_common.tolist() == [0, 0]
    assert found.cosines.tolist() == [[0, 0], [0, 1]]


def test_very_small_rows_are_independent_all_the_same():
    found = row_figures(delta([[1e-6, 0, 0], [0, 1, 0]]))
    assert found.rank == 2
    assert found.condition == pytest.approx(1e12, rel=1e-3)


def test_no_rows_and_one_row():
    for rows in (0, 1):
        found = row_figures(LowRankDelta(torch.ones(rows, 3), torch.ones(2, rows)))
        assert (found.rows, found.rank, found.condition) == (rows, rows, 1.0)
        assert found.closest(3) == []


def test_only_the_first_rows_of_a_huge_pack_are_looked_at(monkeypatch):
    monkeypatch.setattr(layer_sections, "MAX_ROWS", 2)
    assert row_figures(delta([[1, 0, 0], [0, 1, 0], [0, 0, 1]])).rows == 2


def test_a_histogram_counts_every_value():
    found = histogram(torch.tensor([-1.0, -0.05, 0.0, 0.05, 1.0]), -1, 1, 20)
    assert sum(count for _, count in found) == 5
    assert dict(found)["-0.1 to 0.0"] == 1
    assert dict(found)["0.0 to 0.1"] == 2
