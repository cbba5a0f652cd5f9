from __future__ import annotations

import pytest
import torch

from alphaedit_peft import progress
from alphaedit_peft.nullspace import KeyMoments, threshold


@pytest.fixture
def two_layers() -> KeyMoments:
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 400, 12, generator=draw) * torch.logspace(0, -3, 12)
    found = {layer: K.T @ K / 400 for layer, K in enumerate(keys)}
    return KeyMoments(found, 400, {0: "h.0.mlp", 1: "h.1.mlp"})


def test_a_bar_counts_layers_where_they_take_long_and_it_is_wanted(two_layers, capfd, monkeypatch):
    two_layers.null_space(1e-3, "relative")
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(progress, "watched", lambda: True)
    monkeypatch.setattr(threshold, "LONG", 12)
    two_layers.null_space(1e-3, "relative", progress=False)
    assert capfd.readouterr().err == ""
    two_layers.null_space(1e-3, "relative")
    assert "eigenvectors: 100%" in capfd.readouterr().err


def test_layers_are_those_of_each_moment_alone(two_layers):
    found = threshold.decompose(two_layers.moments, 400, (1e-3, "relative", 10.0))
    for layer, moment in two_layers.moments.items():
        alone = threshold.layer_space(moment, 1e-3, "relative", 10.0)
        assert torch.equal(found[layer].basis, alone.basis)


def test_too_few_tokens_are_told_before_any_layer_is_decomposed(two_layers, monkeypatch):
    monkeypatch.setattr(threshold, "LayerSpace", None)
    with pytest.raises(ValueError, match=r"11 tokens are fewer than layer 0's width 12"):
        threshold.decompose(two_layers.moments, 11, (1e-3, "relative", 10.0))
