"""The plain way that edits are measured against: the same numbers, by another road."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from alphaedit_peft import Edit, get_alphaedit_model
from alphaedit_peft.editing.runner import Runner
from alphaedit_peft.settings import Settings
from alphaedit_peft.studies.benchmark import Subject, benchmark_config, collect_statistics
from alphaedit_peft.studies.benchmark.plain import PlainModel
from tests.conftest import tiny_model
from tests.studies.conftest import FACTS

CONTEXTS = ["I think.", "The river is fine."]
LAYERS = [0, 1]


def make_subject(family: str, tokenizer, dtype: torch.dtype, **settings) -> Subject:
    config = replace(
        benchmark_config(LAYERS, steps=4), contexts=CONTEXTS, ridge=0.1, key_cosine=1.0, **settings
    )
    return Subject(family, tiny_model(family, dtype), tokenizer, config)


def edited_both_ways(subject: Subject):
    """Plain z, our z, plain changes of weights, ours, our steps: two batches of three facts."""
    edits = [Edit(s, prompt, new) for s, prompt, new, _ in FACTS]
    space = collect_statistics(subject, 400).null_space
    config = replace(subject.config, threshold=space.threshold, threshold_mode=space.threshold_mode)
    model = get_alphaedit_model(
        subject.model, config, tokenizer=subject.tokenizer, null_space=space
    )
    reports = [model.edit(edits[start : start + 3], progress=False) for start in (0, 3)]
    steps = {result.steps for report in reports for result in report}
    ours = {layer: delta.dense() for layer, delta in model.factors.items()}
    targets, full = model.to_pack().targets, model.alphaedit_config
    base, architecture = model.unload(), model.architecture
    runner = Runner(base, subject.tokenizer, Settings.of(full), architecture, tuple(CONTEXTS))
    rows = [runner.renderer.edit_rows(edit, CONTEXTS) for edit in edits]
    plain = PlainModel.of(base, full, architecture, space)
    before = {layer: plain.weight(layer).detach().clone() for layer in LAYERS}
    with plain.weights_kept():
        found = torch.cat([plain.edit_batch(rows[:3]), plain.edit_batch(rows[3:])])
        moved = {layer: plain.weight(layer).detach() - before[layer] for layer in LAYERS}
    assert all(torch.equal(plain.weight(layer), before[layer]) for layer in LAYERS)
    plain_moved = {n: m.T if architecture.conv1d else m for n, m in moved.items()}
    return found, targets, plain_moved, ours, steps


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other.to(one)).norm() / one.norm())


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_in_float64_it_gives_our_targets_and_our_weights(family, tokenizer):
    plain_z, z, plain_moved, moved, _ = edited_both_ways(
        make_subject(family, tokenizer, torch.float64)
    )
    assert off(plain_z, z) < 1e-5
    for layer in LAYERS:
        assert off(plain_moved[layer], moved[layer]) < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_in_float32_it_gives_them_to_a_hundredth(family, tokenizer):
    plain_z, z, plain_moved, moved, _ = edited_both_ways(
        make_subject(family, tokenizer, torch.float32)
    )
    assert off(plain_z, z) < 1e-2
    for layer in LAYERS:
        assert off(plain_moved[layer], moved[layer]) < 1e-2


def test_a_relative_rate_and_an_early_end_are_the_same_too(tokenizer):
    relative = {"learning_rate": 0.3, "learning_rate_mode": "relative", "stop_loss": 6.0}
    subject = make_subject("llama", tokenizer, torch.float64, **relative)
    plain_z, z, _, _, steps = edited_both_ways(subject)
    assert min(steps) < max(steps) == 4  # some end early, not all
    assert off(plain_z, z) < 1e-5
