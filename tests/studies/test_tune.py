"""Tuning: every combination once, the same for a seed, the model as before, reasons with noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from alphaedit_peft import get_alphaedit_model
from alphaedit_peft.architecture import default_rewrite_layers
from alphaedit_peft.evaluation import CaseScores, Scores
from alphaedit_peft.evaluation.summary import Estimate
from alphaedit_peft.studies.tune import (
    Grid,
    Setting,
    Tried,
    Tuning,
    layer_choices,
    preset_grid,
    tune,
)

GRID = Grid(((0, 1), (1,)), (1.0,), (0.05, 5.0), (0.02,))


@pytest.mark.slow
def test_it_is_reproducible_and_leaves_the_model_as_it_was(study):
    base, said = study.base, []
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    one = tune(base, study.suite, GRID, study.config, progress=said.append)
    assert len(one.tried) == len(said) == GRID.size == 4
    after = base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    again = tune(base, study.suite, GRID, study.config)
    assert again.to_json() == one.to_json()
    assert again.recommended.setting == one.recommended.setting


@pytest.mark.slow
def test_pouring_again_equals_editing_anew_with_that_setting(study):
    solution = tune(study.base, study.suite, GRID, study.config).tried[1]
    alone = Grid((solution.setting.rewrite_layers,), (1.0,), (solution.setting.ridge,), (0.02,))
    anew = tune(study.base, study.suite, alone, study.config).tried[0]
    assert anew.setting == solution.setting
    for name, value in anew.scores.metrics.items():
        assert value.value == pytest.approx(solution.scores[name], abs=1e-4)
    assert anew.drift.value == pytest.approx(solution.drift.value, rel=1e-2)


def test_without_its_statistics_nothing_is_tried(study):
    with pytest.raises(ValueError, match="null_space=None: settings are tried with it"):
        tune(replace(study.base, null_space=None), study.suite, GRID)
    memit = replace(study.config, objective="memit")
    with pytest.raises(ValueError, match="key_moments=None: settings are tried with it"):
        tune(replace(study.base, key_moments=None), study.suite, GRID, memit)


def test_of_memit_its_weight_is_tried_in_units_of_what_auto_decides(study):
    grid = replace(GRID, layers=((0, 1),), weights=(1.0, 4.0))
    config = replace(study.config, objective="memit", history=False)
    found = tune(study.base, study.suite, grid, config)
    assert len(found.tried) == grid.size_for("memit") == 2
    one, four = (tried.setting for tried in found.tried)
    assert set(one.solve) == {"moment_weight"}
    assert four.moment_weight == pytest.approx(4 * one.moment_weight, rel=0.05)
    made = replace(config, moment_weight=None)
    model = get_alphaedit_model(
        study.base.model, made, tokenizer=study.base.tokenizer, key_moments=study.base.key_moments
    )
    model.edit(study.suite.edits, batch_size=6, progress=False)
    assert model.alphaedit_config.moment_weight == one.moment_weight
    model.unload()
    assert set(four.changes()) == {"rewrite_layers", "clamp_factor", "moment_weight"}
    assert str(four) == f"layers 0,1, clamp 1, moment_weight {four.moment_weight:g}"


def test_every_objective_gets_as_many_tries_by_default():
    grid = Grid(((0,),))
    assert grid.size == grid.size_for("alphaedit") == grid.size_for("memit")


@pytest.mark.parametrize("name", ["layers", "clamps", "ridges", "thresholds", "weights"])
def test_an_empty_or_repeated_list_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name}=\(\)"):
        replace(GRID, **{name: ()})
    with pytest.raises(ValueError, match=f"{name}="):
        replace(GRID, **{name: getattr(GRID, name)[:1] * 2})


@pytest.mark.parametrize("blocks", [2, 6, 12, 32, 48])
def test_layers_to_try_hold_the_default_and_leave_a_block_above(blocks):
    choices = layer_choices(blocks)
    assert default_rewrite_layers(blocks) in choices
    assert len(set(choices)) == len(choices)
    assert all(0 <= layer <= blocks - 2 for choice in choices for layer in choice)
    assert preset_grid(choices).size == len(choices)


def tried(ridge: float, hits: list[float], drift: float | None, recall: bool = False) -> Tried:
    """Made-up scores: efficacy by case, everything else perfect."""
    tail = "_recall" if recall else ""
    names = [f"{name}{tail}" for name in ("efficacy", "generalization", "specificity")]
    cases = [
        CaseScores(str(i), str(i), dict(zip(names, (hit, 1.0, 1.0), strict=True)))
        for i, hit in enumerate(hits)
    ]
    spread = None if drift is None else Estimate(drift, drift, drift, 3)
    return Tried(Setting((0,), 1.0, ridge, 0.02), Scores({}, tuple(cases)), spread, len(hits))


def tuning(*found: Tried) -> Tuning:
    return Tuning(found, Scores({}, ()), len(found[0].scores.cases))


def test_the_highest_is_recommended_and_a_distance_beyond_noise_is_said():
    low, high = tried(0.1, [1.0, 0.0] * 10, 0.0), tried(0.2, [1.0] * 20, 0.5)
    found = tuning(low, high)
    assert found.recommended is high
    assert found.even == (high,)
    assert high.score.value == 1.0
    assert low.score.value == pytest.approx(3 / (1 / 0.5 + 1 + 1))
    assert "0.250 lower" in found.reason
    assert "beyond noise" in found.reason


def test_a_distance_within_noise_is_said_with_what_drifts_less():
    low, high = tried(0.1, [0.0] + [1.0] * 19, 0.1), tried(0.2, [1.0] * 20, 0.5)
    found = tuning(low, high)
    assert found.recommended is high
    assert found.even == (high, low)
    assert "1 of the 1 others are within noise" in found.reason
    assert "ridge 0.1, threshold 0.02 moves held-out texts least, 0.1 nats" in found.reason


def test_of_equal_ones_the_least_drift_is_recommended():
    more, less = tried(0.1, [1.0] * 5, 0.5), tried(0.2, [1.0] * 5, 0.1)
    assert tuning(more, less).recommended is less
    assert "of the equal ones" in tuning(more, less).reason
    assert tuning(tried(0.1, [1.0], None)).reason == "it is the only setting tried"


def test_recalls_stand_in_where_the_old_target_is_not_known():
    found = tried(0.1, [1.0, 0.0], None, recall=True)
    assert found.columns == ("efficacy_recall", "generalization_recall", "specificity_recall")
    assert found.score.value == pytest.approx(0.75)
