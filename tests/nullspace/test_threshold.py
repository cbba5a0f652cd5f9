"""How far an edit moves other tokens, against the dense projector and on moments made for it."""

from __future__ import annotations

import pytest
import torch

from alphaedit_peft.nullspace import NullSpace
from alphaedit_peft.nullspace.spectrum import LayerSpace
from alphaedit_peft.nullspace.threshold import ENERGIES, KeysAround, disturbance, least_disturbing

WIDTH, STORED = 40, 24
# cumulative 0.0015, 0.004, 0.009, 0.018, 0.045, 0.09, 0.19, 1: ENERGIES keep 1, 2, ..., 7 of them
STAIRS = torch.tensor([0.0015, 0.0025, 0.005, 0.009, 0.027, 0.045, 0.1, 0.81])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def stairs(own: float = 0.02, layers: int = 1) -> NullSpace:
    part = LayerSpace(torch.eye(8), STAIRS, False)
    return NullSpace(dict.fromkeys(range(layers), part), own, "energy", 1000)


def chosen(space: NullSpace, keys: dict[int, KeysAround]) -> tuple[float, dict[float, float]]:
    return least_disturbing(space.parts, space.threshold, keys)


def around(*others: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One edit whose key is all ones, and one other token, padded with ones."""
    other = torch.ones(8)
    other[: len(others)] = torch.tensor(others)
    return [(torch.ones(8), other[None])]


@pytest.mark.parametrize(
    ("complement", "kept"),
    [(False, [1, 5, 16, STORED]), (True, [WIDTH - STORED, WIDTH - 5, WIDTH - 1, WIDTH])],
)
def test_it_is_what_the_dense_projector_gives(complement, kept):
    U, values = torch.linalg.qr(draw(WIDTH, WIDTH))[0], torch.linspace(0.1, 2, WIDTH)
    basis = U[:, WIDTH - STORED :] if complement else U[:, :STORED]
    keys = [(draw(WIDTH, seed=n), draw(n, WIDTH, seed=n + 9)) for n in (1, 2, 5)]
    found = disturbance(LayerSpace(basis, values, complement), keys, kept)
    assert found.shape == (3, len(kept))
    for i, (key, others) in enumerate(keys):
        for j, count in enumerate(kept):
            a = U[:, :count] @ (U[:, :count].T @ key)
            expected = ((others @ a) / (a @ a)).square().mean().sqrt()
            torch.testing.assert_close(found[i, j], expected, rtol=1e-9, atol=0)


def test_a_token_with_the_edits_own_key_is_moved_as_far_as_it():
    key = draw(8).float()
    part = stairs().parts[0]
    found = disturbance(part, [(key, key[None])], [1, 4, 8])
    torch.testing.assert_close(found, torch.ones(1, 3, dtype=torch.float64))


def test_a_key_that_projection_leaves_nothing_of_gives_a_finite_answer():
    key = torch.zeros(8)
    key[7] = 1
    found = disturbance(stairs().parts[0], [(key, torch.ones(2, 8))], [1, 4])
    assert found.isfinite().all()


def test_a_threshold_is_left_for_one_that_disturbs_clearly_less():
    best, found = chosen(stairs(), {0: around(1, 1, 1, 1, -1, 0)})
    wanted = [1, 1, 1, 1, 3 / 5, 3 / 6, 4 / 7]
    assert found == pytest.approx(dict(zip(ENERGIES, wanted, strict=True)))
    assert best == 0.1


@pytest.mark.parametrize("own", [0.002, 0.02, 0.2])
def test_its_own_threshold_is_kept_where_no_other_is_clearly_better(own):
    best, found = chosen(stairs(own), {0: around(1, 1, 1, 1, 0.5)})
    assert min(found, key=lambda t: found[t]) == 0.05
    assert best == own


def test_layers_count_by_their_geometric_mean_and_edits_by_their_median():
    calm, wild = around(1, 1, 1, 1, -1, 0), around(1, 9, 9, 9, 9, 9, 9)
    keys = {0: calm, 1: [*calm, *wild, *calm]}
    best, found = chosen(stairs(layers=2), keys)
    assert (best, found) == (0.1, pytest.approx(chosen(stairs(), {0: calm})[1]))
    found = chosen(stairs(layers=2), {0: calm, 1: wild})[1]
    assert found[0.05] == pytest.approx((3 / 5 * 37 / 5) ** 0.5)


def test_only_thresholds_within_reach_are_looked_at():
    part = LayerSpace(torch.eye(8)[:, :5], STAIRS, False)  # keeps 5 directions at most
    space = NullSpace({0: part}, 0.02, "energy", 1000)
    best, found = chosen(space, {0: around(1, 1, 1, 1, -1, 0)})
    assert (best, list(found)) == (0.05, list(ENERGIES[:5]))


def test_a_null_space_that_reaches_none_of_them_is_refused():
    part = LayerSpace(torch.eye(8)[:, 7:], torch.full((8,), 2.0), True)  # keeps 7 or all 8
    space = NullSpace({0: part}, 0.9, "energy", 1000)
    with pytest.raises(
        ValueError, match=r"none of the energy thresholds \(0.002, .* set threshold"
    ):
        chosen(space, {0: around()})
