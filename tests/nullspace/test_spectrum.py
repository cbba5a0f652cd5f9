"""How many eigenvectors a layer stores for how far its threshold can be moved."""

from __future__ import annotations

import pytest
import torch

from alphaedit_peft import algebra
from alphaedit_peft.nullspace import KeyMoments
from alphaedit_peft.nullspace.threshold import null_dimension

WIDTH = 40


def moments() -> KeyMoments:
    """Eigenvalues 1 to 1e-4, ten a factor of ten, in a random basis."""
    U = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))[0]
    C0 = U * torch.logspace(0, -4, WIDTH) @ U.T
    return KeyMoments({0: (C0 + C0.T) / 2}, 10_000, {0: "mlp"})


def kept(threshold: float) -> int:
    values = algebra.spectrum(moments().moments[0].double()).values
    return null_dimension(values, threshold, "absolute")


@pytest.mark.parametrize("threshold", [3e-4, 1.1e-2, 0.3])
@pytest.mark.parametrize("reach", [1.0, 2.0, 10.0])
def test_it_stores_the_fewest_eigenvectors_that_reach(threshold, reach):
    space = moments().null_space(threshold, "absolute", reach=reach)
    low, high = kept(threshold / reach), kept(threshold * reach)
    assert space.parts[0].basis.shape[1] == min(high, WIDTH - low)
    for moved in (threshold / reach, threshold * reach):
        if kept(moved):
            assert space.with_threshold(moved).null_dimension(0) == kept(moved)


def test_reach_changes_the_size_but_not_the_projection():
    keys = torch.randn(5, WIDTH)
    thin, thick = (moments().null_space(1.1e-2, "absolute", reach=r) for r in (1.0, 10.0))
    assert thin.parts[0].basis.shape[1] < thick.parts[0].basis.shape[1]
    torch.testing.assert_close(thin.project(0, keys), thick.project(0, keys), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"this null space stores eigenvectors for"):
        thin.with_threshold(1.1e-3)


@pytest.mark.parametrize("reach", [0.5, float("inf"), float("nan"), -1.0])
def test_a_reach_that_is_no_factor_is_refused(reach):
    with pytest.raises(ValueError, match=rf"reach={reach} is no factor"):
        moments().null_space(1e-2, "absolute", reach=reach)
