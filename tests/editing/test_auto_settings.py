"""What ``auto`` measures to decide, against plain passes through the model."""

from __future__ import annotations

import pytest
import torch

from alphaedit_peft import AlphaEditConfig, Edit, NullSpace
from alphaedit_peft.editing.auto_settings import PROBED, decisions, keys_around, movable
from alphaedit_peft.editing.keys import keys_by_layer
from alphaedit_peft.nullspace import KeyMoments
from alphaedit_peft.nullspace.spectrum import LayerSpace
from alphaedit_peft.solve_metric import make_metric
from tests import oracle
from tests.conftest import tiny_model
from tests.editing.test_batch import CONTEXTS, EDITS, key_moment, runner_for

OPEN = AlphaEditConfig().open_settings


def space(threshold: float = 0.02, mode: str = "energy") -> NullSpace:
    moments = {layer: key_moment(layer) for layer in (0, 1)}
    return KeyMoments(moments, 10_000, dict.fromkeys(moments, "mlp")).null_space(threshold, mode)


def projector() -> NullSpace:
    part = LayerSpace.from_projector(torch.diag(torch.arange(96) < 30).double())
    return NullSpace({0: part, 1: part}, 0.5, "absolute", 0)


def runner(tokenizer, **changes):
    config = AlphaEditConfig(rewrite_layers=[0, 1], contexts=list(CONTEXTS), **changes)
    return runner_for(tiny_model("gpt2"), tokenizer, config)


def metric_of(runner, null_space: NullSpace | None):
    moments = KeyMoments({layer: key_moment(layer) for layer in (0, 1)}, 10_000, {0: "", 1: ""})
    return make_metric(runner.settings, null_space, moments)


def rows_of(runner, edits):
    return [runner.renderer.edit_rows(edit, runner.contexts) for edit in edits]


@pytest.mark.parametrize(
    ("made", "changes", "wanted"),
    [
        (space, {}, True),
        (lambda: None, {}, False),
        (space, {"preset": "paper"}, False),
        (space, {"objective": "memit"}, False),
        (lambda: space(0.05), {}, False),
        (lambda: space(40, "rank"), {}, False),
        (projector, {}, False),
        (lambda: NullSpace.identity({0: 96, 1: 96}), {}, False),
    ],
)
def test_a_threshold_moves_only_where_nobody_chose_one(made, changes, wanted):
    assert movable(made(), AlphaEditConfig(**changes)) is wanted


def test_keys_around_are_the_prompts_without_its_first_token_and_the_subject(tokenizer):
    found = runner(tokenizer)
    rows = rows_of(found, EDITS)
    around = keys_around(found, rows)
    assert list(around) == [0, 1]
    for layer in around:
        module = found.architecture.rewrite_name(layer)
        for (key, others), edit in zip(around[layer], rows, strict=True):
            row = edit.rows[-1]
            keys = oracle.module_input(found.model, module, row.ids)
            rest = [i for i in range(1, len(row.ids)) if i != row.subject_last]
            torch.testing.assert_close(key, keys[row.subject_last], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(others, keys[rest], rtol=1e-4, atol=1e-5)


def test_edits_without_any_other_token_are_passed_over(tokenizer):
    bare = runner_for(tiny_model("gpt2"), tokenizer, AlphaEditConfig(contexts=[]))
    short, usual = Edit("a", "{}", "Rome"), EDITS[0]
    assert keys_around(bare, rows_of(bare, [short])) == {}
    assert all(len(keys) == 1 for keys in keys_around(bare, rows_of(bare, [short, usual])).values())


def test_no_more_than_some_edits_of_a_batch_are_looked_at(tokenizer):
    bare = runner_for(tiny_model("gpt2"), tokenizer, AlphaEditConfig(contexts=[]))
    rows = rows_of(bare, [Edit(f"a{n}", "{} is", "Rome") for n in range(PROBED + 1)])
    assert 0 < len(keys_around(bare, rows)[0]) <= PROBED


@pytest.mark.parametrize("names", [frozenset(), {"ridge"}, {"clamp_factor", "threshold"}, OPEN])
def test_only_settings_left_open_are_named(names, tokenizer):
    found = runner(tokenizer, threshold=0.02, threshold_mode="energy")
    named = [
        d.name
        for d in decisions(
            found, metric_of(found, space()), keys_by_layer(found, rows_of(found, EDITS)), names, {}
        )
    ]
    every = ["rewrite_layers", "threshold", "ridge", "clamp_factor", "learning_rate", "stop_loss"]
    assert named == [name for name in every if name in names]


@pytest.mark.parametrize(
    ("made", "changes"),
    [
        (lambda: space(0.05), {}),
        (projector, {}),
        (space, {"objective": "memit", "moment_weight": 1.0}),
        (space, {"objective": "memit", "moment_weight": 1.0, "projection": True, "history": False}),
    ],
)
def test_a_threshold_that_was_not_chosen_here_is_no_decision(made, changes, tokenizer):
    found = runner(tokenizer, **changes)
    names = {
        d.name
        for d in decisions(
            found, metric_of(found, made()), keys_by_layer(found, rows_of(found, EDITS)), OPEN, {}
        )
    }
    assert "threshold" not in names
    assert ("ridge" in names) == ("objective" not in changes)
    assert {"clamp_factor", "learning_rate", "stop_loss"} <= names


def test_plain_memit_decides_neither_threshold_nor_ridge(tokenizer):
    found = runner(tokenizer, objective="memit", moment_weight=1.0)
    names = [
        d.name
        for d in decisions(
            found, metric_of(found, None), keys_by_layer(found, rows_of(found, EDITS)), OPEN, {}
        )
    ]
    assert names == [
        "rewrite_layers",
        "moment_weight",
        "clamp_factor",
        "learning_rate",
        "stop_loss",
    ]


def test_reasons_state_what_the_model_measures(tokenizer):
    found, made = runner(tokenizer), space()
    rows = rows_of(found, EDITS)
    said = {
        d.name: d
        for d in decisions(
            found,
            metric_of(found, made),
            keys_by_layer(found, rows),
            OPEN,
            {0.02: 1.2345, 0.1: 0.5},
        )
    }
    block = found.architecture.block_name(1)
    bare = [edit.rows[0] for edit in rows]
    states = [oracle.block_output(found.model, block, r.ids)[r.subject_last] for r in bare]
    norm = float(torch.stack(states).norm(dim=1).median())
    assert f"up to {norm:.3g}; the edits' median |h| after block 1 is {norm:.3g}" in str(
        said["clamp_factor"]
    )
    assert f"steps of {0.15 * norm / 32**0.5:.3g} a coordinate" in said["learning_rate"].reason
    module = found.architecture.rewrite_name(0)
    keys = torch.stack([oracle.mean_key(found.model, module, edit) for edit in rows])
    size = float(made.project(0, keys).square().sum(1).mean())
    assert said["ridge"].value == "0.05 (relative)"
    assert f"{0.05 * size:.3g} in layer 0" in said["ridge"].reason
    kept = made.null_dimension(0)
    assert f"keeps {kept} of 96 directions of layer 0 with " in said["threshold"].reason
    assert "1.234 at 0.02, 0.500 at 0.1" in said["threshold"].reason


def test_a_ridge_without_scale_is_told_beside_what_it_adds_to(tokenizer):
    found, made = runner(tokenizer, ridge=10.0, ridge_mode="absolute"), space()
    said = decisions(
        found, metric_of(found, made), keys_by_layer(found, rows_of(found, EDITS)), {"ridge"}, {}
    )
    assert said[0].value == "10 (absolute)"
    assert said[0].reason.startswith("|P k|^2 is ")
    assert set(said[0].to_json()) == {"name", "value", "reason"}
