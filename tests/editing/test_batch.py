"""Batches against the plain oracle: targets, keys and updates, family by family, in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from alphaedit_peft import AlphaEditConfig, Edit, KeyMoments, NullSpace, get_alphaedit_model
from alphaedit_peft.editing.groups import Group
from alphaedit_peft.editing.runner import Runner
from alphaedit_peft.editing.targets import optimise_targets
from alphaedit_peft.nullspace.threshold import layer_space
from alphaedit_peft.settings import Settings
from tests import oracle
from tests.conftest import tiny_model

EDITS = [
    Edit("France", "The capital of {} is", "Rome"),
    Edit("Marie Curie", "I think that {} was born in", "Paris and Rome"),
    Edit("Albert Einstein", "{} works as a", "river"),
    Edit("Anna", "the mother tongue of {}", "French"),
]
CONTEXTS = ("I think that you are right.", "Therefore the river.")
# GPT-J's attention and Llama's norm compute in float32 inside whatever the model's dtype
TOLERANCE = {"gpt2": 1e-9, "gptj": 1e-4, "llama": 1e-4}


def settings(**changes) -> AlphaEditConfig:
    values = {
        "rewrite_layers": [0, 1],
        "steps": 6,
        "learning_rate": 0.1,
        "learning_rate_mode": "absolute",
        "clamp_factor": 0.75,
        "ridge": 0.3,
        "ridge_mode": "absolute",
        "norm_guard": 0.0,
        "contexts": list(CONTEXTS),
    }
    return AlphaEditConfig(**(values | changes))


def runner_for(model, tokenizer, config) -> Runner:
    full, architecture = config.resolve(model)
    return Runner(model, tokenizer, Settings.of(full), architecture, tuple(full.contexts))


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
@pytest.mark.parametrize("target_tokens", [1, 10_000])
def test_targets_equal_the_oracle(family, target_tokens, tokenizer):
    model = tiny_model(family, torch.float64)
    runner = runner_for(model, tokenizer, settings(target_tokens=target_tokens))
    rows = [runner.renderer.edit_rows(edit, runner.contexts) for edit in EDITS]
    found = optimise_targets(runner, [Group((r,)) for r in rows])
    block = runner.architecture.block_name(1)
    for i, row in enumerate(rows):
        expected = oracle.target_value(model, block, row, runner.settings)
        assert (found.values[i] - expected).norm() <= TOLERANCE[family] * expected.norm()
    assert found.steps.tolist() == [6] * len(EDITS)


def test_an_edit_that_is_done_leaves_and_the_others_do_not_notice(tokenizer):
    model = tiny_model("gpt2", torch.float64)
    rows = None
    values = {}
    for stop in (0.0, 6.2):
        runner = runner_for(model, tokenizer, settings(stop_loss=stop, steps=8))
        rows = [runner.renderer.edit_rows(edit, runner.contexts) for edit in EDITS]
        values[stop] = optimise_targets(runner, [Group((r,)) for r in rows])
    left = values[6.2].steps < 8
    assert left.any()
    assert not left.all()
    stayed = ~left
    assert torch.allclose(values[6.2].values[stayed], values[0.0].values[stayed], rtol=1e-9)


def test_grouped_edits_share_one_loss(tokenizer):
    model = tiny_model("gpt2", torch.float64)
    runner = runner_for(model, tokenizer, settings(steps=1))
    pair = [Edit("Anna", "{} lives in", "Rome"), Edit("Anna", "{} works as a", "river")]
    rows = [runner.renderer.edit_rows(edit, runner.contexts) for edit in pair]
    alone = [float(optimise_targets(runner, [Group((r,))]).losses[0]) for r in rows]
    together = float(optimise_targets(runner, [Group(tuple(rows))]).losses[0])
    assert together == pytest.approx(sum(alone) / 2, rel=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_sequential_batches_equal_the_oracle(family, tokenizer):
    plain = tiny_model(family, torch.float64)
    edited = copy.deepcopy(plain)
    moments = {layer: key_moment(layer) for layer in (0, 1)}
    parts = {layer: layer_space(moment, 0.5, "absolute") for layer, moment in moments.items()}
    space = NullSpace(parts, 0.5, "absolute", 10_000)
    model = get_alphaedit_model(edited, settings(), tokenizer=tokenizer, null_space=space)
    model.alphaedit_config.key_cosine = 1.0
    runner = runner_for(plain, tokenizer, settings())
    projectors = {layer: space.project(layer, torch.eye(96).double()) for layer in (0, 1)}
    prior = {layer: torch.zeros(96, 0, dtype=torch.float64) for layer in (0, 1)}
    for batch in (EDITS[:2], EDITS[2:]):
        model.edit(batch, progress=False)
        rows = [runner.renderer.edit_rows(edit, runner.contexts) for edit in batch]
        block = runner.architecture.block_name(1)
        z = [oracle.target_value(plain, block, row, runner.settings) for row in rows]
        oracle.write_batch(plain, runner.architecture, [0, 1], rows, z, prior, projectors, 0.3)
    model.merge()
    for layer in (0, 1):
        name = runner.architecture.rewrite_name(layer)
        expected = plain.get_submodule(name).weight
        got = model.get_base_model().get_submodule(name).get_base_layer().weight
        assert (got - expected).norm() <= 10 * TOLERANCE[family] * expected.norm()


def key_moment(layer: int) -> torch.Tensor:
    """A moment of full rank with a third of its directions below 0.5, (96, 96)."""
    generator = torch.Generator().manual_seed(layer)
    q, _ = torch.linalg.qr(torch.randn(96, 96, generator=generator, dtype=torch.float64))
    return (q * torch.logspace(-2, 2, 96, dtype=torch.float64)) @ q.T


@pytest.mark.parametrize(("history", "projection"), [(True, None), (False, None), (False, True)])
def test_memit_equals_its_dense_formula(history, projection, tokenizer):
    plain = tiny_model("gpt2", torch.float64)
    config = settings(objective="memit", history=history, projection=projection, moment_weight=2.0)
    moments = KeyMoments(
        {layer: key_moment(layer) for layer in (0, 1)},
        10_000,
        {layer: f"transformer.h.{layer}.mlp.c_proj" for layer in (0, 1)},
    )
    space = moments.null_space(0.5, "absolute")
    model = get_alphaedit_model(
        copy.deepcopy(plain), config, tokenizer=tokenizer, null_space=space, key_moments=moments
    )
    runner = runner_for(plain, tokenizer, config)
    prior = {layer: torch.zeros(96, 0, dtype=torch.float64) for layer in (0, 1)}
    for batch in (EDITS[:2], EDITS[2:]):
        model.edit(batch, progress=False)
        rows = [runner.renderer.edit_rows(edit, runner.contexts) for edit in batch]
        block = runner.architecture.block_name(1)
        z = [oracle.target_value(plain, block, row, runner.settings) for row in rows]
        kept, within = (prior if history else None), (space if projection else None)
        oracle.write_memit(plain, runner.architecture, [0, 1], rows, z, kept, moments, within)
    model.merge()
    for layer in (0, 1):
        name = runner.architecture.rewrite_name(layer)
        got = model.get_base_model().get_submodule(name).get_base_layer().weight
        assert torch.allclose(got, plain.get_submodule(name).weight, rtol=1e-6, atol=1e-8)
