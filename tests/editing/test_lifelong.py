"""Lifelong editing: a ridge of their own for the rows in place, down to none at all."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from alphaedit_peft import AlphaEditConfig, Edit, NullSpace, algebra, get_alphaedit_model
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.nullspace.threshold import layer_space
from tests.conftest import tiny_model
from tests.editing.test_batch import CONTEXTS, key_moment, settings

D_IN, D_OUT = 24, 7
BATCHES = (
    [Edit("France", "The capital of {} is", "Rome"), Edit("Anna", "the tongue of {}", "French")],
    [Edit("Albert Einstein", "{} works as a", "river"), Edit("Italy", "{} lies in", "Paris")],
    [Edit("Marie Curie", "I think that {} was born in", "Ulm")],
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def projector(keep: int = 16) -> torch.Tensor:
    q, _ = torch.linalg.qr(random(D_IN, D_IN, seed=9))
    return q[:, :keep] @ q[:, :keep].T


def poured(prior: torch.Tensor, keys: torch.Tensor, residuals: torch.Tensor, ridge: float):
    """The update of a batch on top of prior rows that have no ridge, as a matrix."""
    A = torch.cat([prior, keys]) @ projector()
    ridges = torch.full((len(A),), ridge, dtype=torch.float64)
    ridges[: len(prior)] = 0
    new = torch.arange(len(prior), len(A))
    X = algebra.solve(A @ A.T, residuals, ridges, new)
    return LowRankDelta(A, X.T).dense()


def papers(P: torch.Tensor, keys: torch.Tensor, residuals: torch.Tensor, ridge: float):
    """Equation 14 without prior keys, d_in x d_in, for any projector P."""
    inner = keys.T @ keys @ P + ridge * torch.eye(D_IN, dtype=P.dtype)
    return residuals.T @ keys @ P @ torch.linalg.inv(inner)


def test_without_prior_ridge_the_projector_also_removes_the_prior_keys():
    prior, keys, residuals = random(6, D_IN), random(4, D_IN, seed=1), random(4, D_OUT, seed=2)
    P = projector()
    q, _ = torch.linalg.qr((prior @ P).T)
    expected = papers(P - q @ q.T, keys, residuals, 0.3)
    got = poured(prior, keys, residuals, 0.3)
    assert (got - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("twist", [0.0, 1e-9, 1e-5])
def test_prior_keys_that_are_nearly_equal_are_held_all_the_same(twist):
    prior = random(3, D_IN)
    prior = torch.cat([prior, prior + twist * random(3, D_IN, seed=3)])
    got = poured(prior, random(4, D_IN, seed=1), random(4, D_OUT, seed=2), 0.3)
    moved = (prior @ projector() @ got.T).norm()
    assert moved <= 1e-9 * got.norm() * prior.norm()


def test_where_prior_keys_take_all_directions_nothing_moves():
    got = poured(random(20, D_IN), random(2, D_IN, seed=1), random(2, D_OUT, seed=2), 0.3)
    assert got.norm() < 1e-9


def wrapped(tokenizer, keep: float = 0.5, **changes):
    parts = {i: layer_space(key_moment(i), keep, "absolute") for i in (0, 1)}
    space = NullSpace(parts, keep, "absolute", 10_000)
    config = settings(contexts=list(CONTEXTS), key_cosine=1.0, **changes)
    model = copy.deepcopy(tiny_model("gpt2", torch.float64))
    return get_alphaedit_model(model, config, tokenizer=tokenizer, null_space=space)


def test_at_zero_the_stored_keys_of_earlier_edits_keep_their_outputs(tokenizer):
    model = wrapped(tokenizer, prior_ridge=0)
    model.edit(BATCHES[0], progress=False)
    for batch in BATCHES[1:]:
        before = model.factors
        model.edit(batch, progress=False)
        for layer, delta in model.factors.items():
            rows = before[layer].A
            then, now = before[layer].apply(rows), delta.apply(rows)
            assert delta.rank > before[layer].rank
            assert (now - then).abs().max() <= 1e-9 * then.abs().max()


def test_the_less_the_prior_ridge_the_less_earlier_outputs_move(tokenizer):
    moved = []
    for ridge in (10.0, 1.0, 0.1, 0.01, 0.0):
        model = wrapped(tokenizer, prior_ridge=ridge)
        model.edit(BATCHES[0], progress=False)
        before = model.factors[0]
        model.edit(BATCHES[1], progress=False)
        moved.append(float((model.factors[0].apply(before.A) - before.apply(before.A)).norm()))
    assert moved == sorted(moved, reverse=True)
    assert moved[1] > 1e-3


def test_a_prior_ridge_of_one_gives_the_papers_bits(tokenizer):
    one, papers_own = (wrapped(tokenizer, prior_ridge=value) for value in (1.0, None))
    for batch in BATCHES:
        one.edit(batch, progress=False)
        papers_own.edit(batch, progress=False)
    for layer, delta in papers_own.factors.items():
        assert torch.equal(one.factors[layer].A, delta.A)
        assert torch.equal(one.factors[layer].B, delta.B)


def test_a_first_batch_does_not_depend_on_it(tokenizer):
    held, free = (wrapped(tokenizer, prior_ridge=value) for value in (0.0, None))
    for model in (held, free):
        model.edit(BATCHES[0], progress=False)
    assert torch.equal(held.factors[0].B, free.factors[0].B)


def test_pouring_again_obeys_it(tokenizer):
    model = wrapped(tokenizer, prior_ridge=0.0)
    for batch in BATCHES:
        model.edit(batch, progress=False)
    before = model.factors
    model.repour()
    for layer, delta in model.factors.items():
        dense = before[layer].dense()
        assert (delta.dense() - dense).norm() <= 1e-5 * dense.norm()  # z is kept in float32


def test_a_replaced_edit_is_not_held(tokenizer):
    model = wrapped(tokenizer, prior_ridge=0.0, on_conflict="replace")
    model.edit(BATCHES[0], progress=False)
    before = model.factors[0]
    other = Edit("France", "The capital of {} is", "Ulm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.edit([other], progress=False)
    moved = (model.factors[0].apply(before.A) - before.apply(before.A)).norm(dim=1)
    assert moved[0] > 1e-3
    assert moved[1] < 1e-9


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan"), "0", True])
def test_prior_ridges_that_cannot_be(value):
    with pytest.raises(ValueError, match=f"prior_ridge={value!r}"):
        AlphaEditConfig(prior_ridge=value)


def relative_model(tokenizer, **changes):
    values = {"ridge": 0.3, "ridge_mode": "relative"} | changes
    return wrapped(tokenizer, **values)


def test_every_row_keeps_the_ridge_of_its_own_batch(tokenizer):
    """The last batch's columns of B are (G + D)^-1 E^T R with each batch's mean |P k|^2 in D."""
    model = relative_model(tokenizer)
    for batch in BATCHES[:-1]:
        model.edit(batch, progress=False)
    before = model.factors
    report = model.edit(BATCHES[-1], progress=False)
    for layer, delta in model.factors.items():
        G = delta.A.double() @ delta.A.double().T
        parts = [G.diagonal()[rows].mean() for rows in (slice(0, 2), slice(2, 4), slice(4, 5))]
        assert max(parts) > 1.05 * min(parts)
        ridges = 0.3 * torch.stack(parts)[torch.tensor([0, 0, 1, 1, 2])]
        added = delta.B.clone()  # (d_out, n)
        added[:, :4] -= before[layer].B
        S = torch.linalg.inv(G + ridges.diag())[:, 4:]
        R = added[:, 4:] / S[4:]  # one new row: its column is R^T times the last entry of S
        assert (added - R @ S.T).norm() <= 1e-9 * added.norm()
        share = float(G[4] @ S)
        assert report.results[0].shares[layer] == pytest.approx(share, rel=1e-9)


@pytest.mark.parametrize("prior_ridge", [None, 0.1, 0.0])
def test_what_is_kept_of_the_solve_changes_no_bit(prior_ridge, tokenizer):
    kept, anew = (relative_model(tokenizer, prior_ridge=prior_ridge) for _ in range(2))
    for batch in BATCHES:
        kept.edit(batch, progress=False)
        anew.edit(batch, progress=False)
        anew.edit_adapters["default"].kept.clear()
    assert kept.edit_adapters["default"].kept
    for layer, delta in kept.factors.items():
        assert torch.equal(delta.A, anew.factors[layer].A)
        assert torch.equal(delta.B, anew.factors[layer].B)


def test_after_a_rollback_the_solve_goes_on_from_what_is_left(tokenizer):
    there, back = (relative_model(tokenizer) for _ in range(2))
    there.edit(BATCHES[0], progress=False)
    back.edit(BATCHES[0], progress=False)
    back.edit(BATCHES[1], progress=False)
    back.rollback()
    for model in (there, back):
        model.edit(BATCHES[2], progress=False)
    for layer, delta in there.factors.items():
        assert torch.equal(delta.B, back.factors[layer].B)
