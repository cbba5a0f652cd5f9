"""The table of methods: ROME against its own equation, fine-tuning within its bound."""

from __future__ import annotations

import pytest
import torch

from alphaedit_peft import AlphaEditConfig, Edit
from alphaedit_peft.editing.batch import score
from alphaedit_peft.editing.keys import take_keys
from alphaedit_peft.editing.runner import Runner
from alphaedit_peft.settings import Settings
from alphaedit_peft.studies import METHODS, FineTuned, FineTuning, Method, find_methods, fine_tune
from alphaedit_peft.studies.methods import opened
from tests import oracle
from tests.studies.conftest import CONFIG, FACTS

EDITS = [Edit(subject, prompt, new) for subject, prompt, new, _ in FACTS]


def test_rome_is_its_rank_one_constraint(study):
    """Delta = (v - W k) (C^-1 k)^T / (k^T C^-1 k): ROME Eq. 2."""
    base, edit = study.base, EDITS[1]
    with opened(base, METHODS["rome"], study.config) as editor:
        settings = Settings.of(editor.model.alphaedit_config)
        (layer,) = settings.rewrite_layers
        runner = Runner(
            base.model, base.tokenizer, settings, editor.model.architecture, tuple(CONFIG.contexts)
        )
        rows = runner.renderer.edit_rows(edit, runner.contexts)
        k = oracle.mean_key(base.model, f"model.layers.{layer}.mlp.down_proj", rows).double()
        h = take_keys(runner, [rows]).hidden[0].double()
        editor.edit([edit])
        z = editor.model.to_pack().targets[0].double()
        found = editor.model.factors[layer].dense().double()
    inverse = torch.linalg.solve(base.key_moments.moments[layer].double(), k)
    wanted = torch.outer(z - h, inverse) / (k @ inverse)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    assert layer == study.config.rewrite_layers[-1]


def test_rome_makes_one_edit_at_a_time(study):
    with opened(study.base, METHODS["rome"], study.config) as editor:
        assert editor.edit(EDITS[:3]) == 3
        assert [record.batch for record in editor.model.records] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "objective", "history", "projects"),
    [
        ("alphaedit", "alphaedit", True, True),
        ("memit", "memit", False, False),
        ("memit-history", "memit", True, False),
        ("memit-projection", "memit", False, True),
        ("rome", "memit", False, False),
    ],
)
def test_methods_are_settings_of_one_solver(study, name, objective, history, projects):
    config = METHODS[name].config(study.base.model, CONFIG)
    assert (config.objective, config.history, config.projects) == (objective, history, projects)
    assert config.steps == CONFIG.steps


def test_fine_tuning_stays_within_its_bound_and_leaves_the_model_as_it_is(study):
    model = study.base.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = FineTuning(learning_rate=1e-2, bound=3e-3, steps=10)
    found = fine_tune(model, study.base.tokenizer, EDITS, CONFIG, settings)
    ((name, weight),) = found.items()
    assert name == "model.layers.0.mlp.down_proj.weight"
    change = (weight - before[name]).abs().max()
    assert change == pytest.approx(3e-3, rel=1e-3)
    assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fine_tuning_does_not_depend_on_its_batches(study):
    one, many = (
        fine_tune(
            study.base.model,
            study.base.tokenizer,
            EDITS,
            AlphaEditConfig(rewrite_layers=[1], tokens_per_batch=tokens),
            FineTuning(steps=4),
        )["model.layers.1.mlp.down_proj.weight"]
        for tokens in (10_000, 30)
    )
    assert torch.allclose(one, many, atol=1e-5)


def test_fine_tuning_makes_the_targets_likelier(study):
    method = METHODS["finetuning"].with_settings(learning_rate=1e-2, bound=1.0, layer=2)
    config = method.config(study.base.model, study.config)
    with opened(study.base, method, study.config) as editor:
        runner = Runner(study.base.model, study.base.tokenizer, Settings.of(config), None, ())
        rows = [runner.renderer.edit_rows(edit, ()).rows[0] for edit in EDITS]
        before = [said.log_prob for said in score(runner, rows)]
        editor.edit(EDITS)
        after = [said.log_prob for said in score(runner, rows)]
    assert all(new > old for new, old in zip(after, before, strict=True))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 0}, "steps=0"),
        ({"layer": -1}, "layer=-1"),
        ({"bound": 0.0}, "bound=0.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
    ],
)
def test_fine_tuning_refuses_settings_out_of_range(changes, named):
    with pytest.raises(ValueError, match=named):
        FineTuning(**changes)


def test_fine_tuning_refuses_a_layer_outside_the_model_and_no_edits(study):
    model, tokenizer = study.base.model, study.base.tokenizer
    with pytest.raises(ValueError, match=r"\[9\] is outside"):
        fine_tune(model, tokenizer, EDITS, CONFIG, FineTuning(layer=9))
    with pytest.raises(ValueError, match=r"edits=\[\]"):
        fine_tune(model, tokenizer, [], CONFIG, FineTuning())


def test_settings_go_to_whom_they_belong():
    memit = METHODS["memit"].with_settings(moment_weight=30.0)
    assert memit.settings == {"objective": "memit", "history": False, "moment_weight": 30.0}
    tuned = METHODS["finetuning"].with_settings(bound=0.5)
    assert tuned.writer == FineTuned(FineTuning(bound=0.5))
    assert tuned.to_json()["writer"]["bound"] == 0.5


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("memit", {"bound": 1.0}, r"memit has no settings \['bound'\]"),
        ("finetuning", {"ridge": 1.0}, r"finetuning has no settings \['ridge'\]"),
        ("memit", {"moment_weight": -1.0}, "moment_weight=-1.0"),
    ],
)
def test_settings_that_a_method_does_not_have_are_refused(name, changes, named):
    with pytest.raises(ValueError, match=named):
        METHODS[name].with_settings(**changes)


@pytest.mark.parametrize("names", [["alphaedit", "rom"], [], ["memit", "memit"]])
def test_names_that_are_no_methods_are_refused(names):
    with pytest.raises(ValueError, match="methods"):
        find_methods(names)


@pytest.mark.parametrize("name", ["", "a/b", "..", "A b"])
def test_a_method_needs_a_name_that_a_folder_can_have(name):
    with pytest.raises(ValueError, match="name="):
        Method(name, "something")
