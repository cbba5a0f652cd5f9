"""The algebra against the paper's formulas, written plainly in float64 with edits as columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alphaedit_peft import algebra
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.nullspace.threshold import null_basis, null_dimension

D_IN, D_OUT, NULL = 24, 10, 16
RIDGE = 0.3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(seed: int = 0, decay: float = 0.6) -> Tensor:
    """C0, (d_in, d_in), whose eigenvalues fall from 1 by ``decay``."""
    vectors = torch.linalg.qr(random(D_IN, D_IN, seed=seed)).Q
    return vectors @ (decay ** torch.arange(D_IN, dtype=torch.float64)).diag() @ vectors.T


def basis() -> Tensor:
    """Q, (d_in, NULL)."""
    return null_basis(moment(), D_IN - NULL, "rank")


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Keys (u, d_in) and residuals (u, d_out) of sequential batches."""
    return [(random(u, D_IN, seed=i), random(u, D_OUT, seed=100 + i)) for i, u in enumerate(sizes)]


def empty() -> LowRankDelta:
    return LowRankDelta(random(0, D_IN), random(D_OUT, 0))


def solve_layers(before: LowRankDelta, keys: Tensor, residuals: Tensor, Q: Tensor, ridge=RIDGE):
    """One batch the package's way."""
    rows = algebra.project(keys, Q)
    A = torch.cat([before.A, rows])
    new = torch.arange(before.rank, len(A))
    return before.extended(rows, algebra.solve(A @ A.T, residuals, ridge, new))


def paper(prior: Tensor, keys: Tensor, residuals: Tensor, P: Tensor, ridge: float = RIDGE):
    """Eq. 14: Delta = R K1^T P (Kp Kp^T P + K1 K1^T P + lambda I)^-1, (d_out, d_in)."""
    Kp, K1, R = prior.T, keys.T, residuals.T  # columns are edits
    identity = torch.eye(D_IN, dtype=torch.float64)
    return R @ K1.T @ P @ torch.linalg.inv(Kp @ Kp.T @ P + K1 @ K1.T @ P + ridge * identity)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-12) -> bool:
    return float((one - other).norm()) <= tolerance * float(other.norm())


@pytest.mark.parametrize("sizes", [(5, 3, 4, 2), (1,), (1, 1, 1, 1), (NULL + 9,), (9, 9, 9, 9)])
def test_sequential_batches_are_the_papers(sizes):
    Q = basis()
    delta, dense, prior = empty(), torch.zeros(D_OUT, D_IN, dtype=torch.float64), random(0, D_IN)
    for keys, residuals in batches(*sizes):
        delta = solve_layers(delta, keys, residuals, Q)
        dense = dense + paper(prior, keys, residuals, Q @ Q.T)
        prior = torch.cat([prior, keys])
        assert close(delta.dense(), dense)
    assert delta.rank == sum(sizes)


def test_float32_is_as_accurate_as_it_can_be():
    Q = basis()
    exact, rounded = empty(), empty().to(torch.float32)
    for keys, residuals in batches(5, 3, 4, 2):
        exact = solve_layers(exact, keys, residuals, Q)
        rounded = solve_layers(rounded, keys.float(), residuals.float(), Q.float())
    assert rounded.A.dtype == rounded.B.dtype == torch.float32
    assert close(rounded.dense().double(), exact.dense(), 1e-5)


@pytest.mark.parametrize("history", [True, False])
def test_memit_is_its_papers(history):
    """Delta = R K^T (w C0 + Kp Kp^T + K K^T)^-1; without history, Kp is left out."""
    C0, w = moment(decay=0.9), 7.0
    L = algebra.moment_factor(C0, w)
    delta, dense, prior = empty(), torch.zeros(D_OUT, D_IN, dtype=torch.float64), random(0, D_IN)
    for keys, residuals in batches(4, 3, 5):
        n = delta.rank
        rows = algebra.memit_rows(keys, L)
        half = torch.cat([delta.A, rows]) @ L
        ridges = torch.ones(n + len(keys), dtype=torch.float64)
        ridges[:n] = 1 if history else torch.inf
        new = torch.arange(n, n + len(keys))
        delta = delta.extended(rows, algebra.solve(half @ half.T, residuals, ridges, new))
        Kp, K, R = prior.T, keys.T, residuals.T
        protected = Kp @ Kp.T if history else 0
        dense = dense + R @ K.T @ torch.linalg.inv(w * C0 + protected + K @ K.T)
        prior = torch.cat([prior, keys])
        assert close(delta.dense(), dense)


def test_memit_rows_keep_their_dtype():
    L = algebra.moment_factor(moment(decay=0.9).float(), 7.0)
    rows = algebra.memit_rows(random(3, D_IN).float(), L)
    assert rows.dtype == torch.float32
    assert close(rows.double() @ (7 * moment(decay=0.9)), random(3, D_IN), 1e-5)


def test_a_moment_that_memit_cannot_invert():
    with pytest.raises(ValueError, match=r"key moment \(24, 24\) is not positive definite"):
        algebra.moment_factor(torch.zeros(D_IN, D_IN), 15_000)


def test_preserved_keys_keep_their_output():
    """P k0 = 0 for the keys the moment was made of, so Delta k0 = 0."""
    K0 = random(NULL // 2, D_IN, seed=7)
    Q = null_basis(K0.T @ K0 / len(K0), 1e-10)
    assert Q.shape[1] == D_IN - len(K0)
    assert float(algebra.project(K0, Q).norm()) < 1e-12 * float(K0.norm())
    delta = solve_layers(empty(), *batches(6)[0], Q)
    assert float(delta.apply(K0).norm()) < 1e-12 * float(delta.dense().norm() * K0.norm())


def test_the_projector_is_one():
    Q, keys = basis(), random(5, D_IN)
    once = algebra.project(keys, Q)
    assert close(Q.T @ Q, torch.eye(NULL, dtype=torch.float64))
    assert close(algebra.project(once, Q), once)
    assert close(once, keys @ (Q @ Q.T))


def test_both_forms_of_the_projector_agree():
    U = algebra.spectrum(moment()).vectors[:, NULL:]
    keys = random(5, D_IN)
    assert close(algebra.project(keys, U, complement=True), algebra.project(keys, basis()))


def test_rank_is_the_number_of_edits_and_next_to_no_ridge_reaches_all():
    keys, residuals = batches(6)[0]
    delta = solve_layers(empty(), keys, residuals, basis(), ridge=1e-9)
    assert delta.rank == 6
    assert torch.linalg.matrix_rank(delta.dense()) == 6
    assert close(delta.apply(keys), residuals, 1e-6)


@pytest.mark.parametrize("ridge", [1e-6, 1.0])
def test_a_repeated_key_gets_the_mean_of_its_residuals(ridge):
    """Two rows of one key act as one row with the mean residual and half the ridge."""
    key, R = random(1, D_IN), random(2, D_OUT, seed=1)
    twice = solve_layers(empty(), key.repeat(2, 1), R, basis(), ridge)
    once = solve_layers(empty(), key, R.mean(0, keepdim=True), basis(), ridge / 2)
    assert close(twice.dense(), once.dense(), 1e-8)


def test_a_repeated_key_without_ridge_is_singular_but_finite():
    key, R = random(1, D_IN), random(2, D_OUT, seed=1)
    delta = solve_layers(empty(), key.repeat(2, 1), R, basis(), ridge=0.0)
    assert close(delta.apply(key), R.mean(0, keepdim=True), 1e-9)


def test_more_edits_than_directions_without_ridge_is_least_squares():
    keys, R = batches(NULL + 9)[0]
    Q = basis()
    delta = solve_layers(empty(), keys, R, Q, ridge=0.0)
    fit = torch.linalg.lstsq(keys @ Q, R, driver="gelsd").solution  # (NULL, d_out)
    assert close(delta.dense(), (Q @ fit).T, 1e-8)


def test_a_key_of_zeros_is_finite():
    coefficients = algebra.solve(torch.zeros(2, 2), random(2, D_OUT), 0.0, torch.arange(2))
    assert torch.equal(coefficients, torch.zeros(2, D_OUT, dtype=torch.float64))


def test_an_infinite_ridge_takes_a_row_out():
    A, R = random(5, D_IN), random(2, D_OUT)
    ridges = torch.tensor([0.5, torch.inf, 0.5, 0.5, 0.5], dtype=torch.float64)
    found = algebra.solve(A @ A.T, R, ridges, torch.tensor([3, 4]))
    kept = [0, 2, 3, 4]
    alone = algebra.solve(A[kept] @ A[kept].T, R, 0.5, torch.tensor([2, 3]))
    assert close(found[kept], alone)
    assert torch.equal(found[1], torch.zeros(D_OUT, dtype=torch.float64))


def test_all_rows_out_gives_nothing():
    found = algebra.solve(torch.eye(2), random(2, D_OUT), float("inf"), torch.arange(2))
    assert torch.equal(found, torch.zeros(2, D_OUT, dtype=torch.float64))


def test_a_ridge_near_zero_protects_a_row():
    A, R = random(9, D_IN), random(3, D_OUT)
    ridges = torch.tensor([1e-9] * 6 + [0.5] * 3, dtype=torch.float64)
    update = LowRankDelta(A, algebra.solve(A @ A.T, R, ridges, torch.arange(6, 9)).T)
    moved = update.apply(A).norm(dim=1)
    assert (moved[:6] < 1e-6 * moved[6:].min()).all()


def test_new_rows_may_stand_anywhere():
    A, R, order = random(4, D_IN), random(2, D_OUT), torch.tensor([2, 3, 0, 1])
    last = algebra.solve(A @ A.T, R, RIDGE, torch.tensor([2, 3]))
    first = algebra.solve(A[order] @ A[order].T, R, RIDGE, torch.tensor([0, 1]))
    assert close(first, last[order])


@pytest.mark.parametrize("ridge", [-1.0, float("nan")])
def test_ridges_that_cannot_be(ridge):
    with pytest.raises(ValueError, match=f"ridge={ridge} must not be negative or NaN"):
        algebra.solve(torch.eye(2), random(2, D_OUT), ridge, torch.arange(2))


def test_values_that_are_not_finite():
    bad = torch.tensor([[1.0, torch.nan], [0.0, 1.0]])
    for gram, residuals in ((bad, torch.eye(2)), (torch.eye(2), bad * torch.inf)):
        with pytest.raises(ValueError, match="keys or residuals hold NaN or infinity"):
            algebra.solve(gram, residuals, 1.0, torch.arange(2))


def test_relative_ridge_is_a_share_of_the_mean_square():
    A = random(5, D_IN)
    expected = 0.1 * float(A.square().sum(1).mean())
    assert algebra.relative_ridge(A @ A.T, 0.1) == pytest.approx(expected)


def test_residual_share():
    wanted = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [0.0, 0.0]])
    achieved = torch.tensor([[1.0, 5.0], [0.0, 3.0], [-1.0, 1.0], [4.0, 4.0]])
    assert algebra.residual_share(wanted, achieved).tolist() == [0.5, 1.0, 0.0, 1.0]


VALUES = torch.tensor([0.0, 1e-3, 0.01, 0.02, 1.0, 9.0])  # total 10.031


@pytest.mark.parametrize(
    ("threshold", "mode", "expected"),
    [
        (0.02, "absolute", 3),  # strictly below
        (0.0, "absolute", 0),
        (100.0, "absolute", 6),
        (0.1, "relative", 4),
        (1.0, "relative", 5),
        (0.0, "energy", 1),
        (0.1, "energy", 4),
        (1.0, "energy", 6),
        (0, "rank", 6),
        (2, "rank", 4),
        (6, "rank", 0),
    ],
)
def test_thresholds(threshold, mode, expected):
    assert null_dimension(VALUES, threshold, mode) == expected


@given(
    values=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=20),
    fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    mode=st.sampled_from(["absolute", "relative", "energy"]),
)
def test_a_higher_threshold_never_keeps_less(values, fractions, mode):
    ascending = torch.tensor(sorted(values))
    low, high = (null_dimension(ascending, t, mode) for t in sorted(fractions))
    assert 0 <= low <= high <= len(values)


@pytest.mark.parametrize(
    ("threshold", "mode", "message"),
    [
        (0.1, "svd", "threshold_mode='svd' is unknown; use one of .'absolute'"),
        (-1, "absolute", "threshold=-1 is outside 0..inf for mode 'absolute'"),
        (1.5, "relative", "threshold=1.5 is outside 0..1.0 for mode 'relative'"),
        (1.5, "energy", "threshold=1.5 is outside 0..1.0 for mode 'energy'"),
        (7, "rank", "threshold=7 is outside 0..6.0 for mode 'rank'"),
        (float("nan"), "absolute", "threshold=nan is outside"),
    ],
)
def test_thresholds_that_cannot_be(threshold, mode, message):
    with pytest.raises(ValueError, match=message):
        null_dimension(VALUES, threshold, mode)


def test_spectrum_gives_the_moment_back_in_ascending_order():
    found = algebra.spectrum(moment())
    assert close(found.vectors @ found.values.diag() @ found.vectors.T, moment())
    assert torch.equal(found.values, found.values.sort().values)
    assert (found.values >= 0).all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 3), r"key moment \(2, 3\) is not square"),
        (torch.zeros(3), r"key moment \(3,\) is not square"),
        (torch.tensor([[torch.inf]]), "key moment holds NaN or infinity"),
    ],
)
def test_moments_that_cannot_be(bad, message):
    with pytest.raises(ValueError, match=message):
        algebra.spectrum(bad)


def test_a_delta_applies_as_its_dense_form_and_has_its_norm():
    delta = LowRankDelta(random(4, D_IN), random(D_OUT, 4))
    keys = random(3, D_IN, seed=2)
    assert close(delta.apply(keys), keys @ delta.dense().T)
    assert delta.norm() == pytest.approx(float(delta.dense().norm()), rel=1e-12)
    assert empty().norm() == 0.0


def test_first_takes_extended_back():
    delta = LowRankDelta(random(4, D_IN), random(D_OUT, 4))
    rows, coefficients = random(2, D_IN), random(6, D_OUT)
    longer = delta.extended(rows, coefficients)
    added = LowRankDelta(torch.cat([delta.A, rows]), coefficients.T)
    assert longer.rank == 6
    assert close(longer.dense(), delta.dense() + added.dense())
    same = delta.extended(rows, torch.zeros(6, D_OUT)).first(4)
    assert torch.equal(same.A, delta.A)
    assert torch.equal(same.B, delta.B)


def test_factors_keep_their_dtype_when_extended():
    delta = LowRankDelta(random(1, D_IN), random(D_OUT, 1)).to(torch.bfloat16)
    longer = delta.extended(random(2, D_IN), random(3, D_OUT))
    assert longer.A.dtype == longer.B.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("a", "b"), [((3, 4), (5, 2)), ((3,), (5, 3)), ((3, 4), (3, 5)), ((1, 3, 4), (5, 1))]
)
def test_factors_that_do_not_multiply(a, b):
    with pytest.raises(ValueError, match=rf"A \({', '.join(map(str, a))},?\) and B .*do not"):
        LowRankDelta(torch.zeros(a), torch.zeros(b))


def test_conv1d_takes_the_transpose_of_what_linear_takes():
    delta, keys = LowRankDelta(random(4, D_IN), random(D_OUT, 4)), random(3, D_IN, seed=3)
    linear, conv1d = nn.Linear(D_IN, D_OUT).double(), Conv1D(D_OUT, D_IN).double()
    for module, dense in ((linear, delta.dense()), (conv1d, delta.dense().T)):
        before = module(keys).detach()
        module.weight.data += dense
        assert close(module(keys).detach() - before, delta.apply(keys), 1e-10)
