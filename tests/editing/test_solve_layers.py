"""Why an edit did not take, how layers share a residual, and what the norm guard says."""

from __future__ import annotations

import pytest
import torch

from alphaedit_peft import Edit, NullSpace, get_alphaedit_model
from alphaedit_peft.editing.batch import score as score_of
from alphaedit_peft.editing.batch import score_after, why_not
from alphaedit_peft.editing.edit_report import EditReport, EditResult
from alphaedit_peft.editing.solve_layers import SolvedLayers, _parts
from alphaedit_peft.editing.targets import Targets
from alphaedit_peft.nullspace import KeyMoments
from alphaedit_peft.settings import PRESETS, Settings
from alphaedit_peft.solve_metric import Moment, Projector
from tests import oracle
from tests.conftest import tiny_model
from tests.editing.targets.test_search import easy_edits
from tests.editing.test_batch import EDITS, key_moment, runner_for, settings


def reason(clamped=0.3, said=1.0, total=1.0, kept=0.5, **changes) -> str:
    """The reason for a group with these figures, after another one with which all is well."""
    h = torch.eye(4)[:2]
    values = h + torch.stack([0.3 * h[0], clamped * h[1]])
    found = Targets(
        values, h, torch.tensor([0.1, 1.5]), torch.tensor([9, 25]), torch.tensor([1, said])
    )
    solution = SolvedLayers(
        {}, torch.ones(2, 2), torch.tensor([[0.5, 0.5], [0.5, kept]]), torch.tensor([1.0, total])
    )
    known = {
        "stop_loss": 0.05,
        "clamp_factor": 0.75,
        "ridge": 7.0,
        "ridge_mode": "absolute",
        "moment_weight": 100.0,
    }
    config = Settings(**(PRESETS["auto"] | {"rewrite_layers": [0]} | known | changes))
    space = NullSpace.identity({0: 96})
    metric = {"alphaedit": Projector(space, 7.0, False), "memit": Moment(moments(), 100.0)}
    return why_not(config, metric[config.objective], found, solution, 1)


def test_a_search_that_ran_into_the_clamp_names_the_clamp():
    wanted = "its target value stopped at the clamp with loss 1.50; raise clamp_factor (now 0.75)"
    assert reason(clamped=0.75, said=0.4) == wanted
    assert reason(clamped=0.75, said=0.4, total=0.1, kept=0.001) == wanted


def test_a_search_that_was_too_short_names_the_steps():
    wanted = "its target value still had loss 1.50 after 25 steps; raise steps or learning_rate"
    assert reason(clamped=0.5, said=0.4) == wanted
    assert reason(clamped=0.75, said=0.4, clamp_factor=1.0) == wanted


def test_a_search_that_stopped_too_early_names_the_loss_at_which_it_stops():
    wanted = "its target value was taken at loss 1.50, before it says the target; lower stop_loss"
    assert reason(clamped=0.75, said=0.4, stop_loss=2.0).startswith(wanted)
    assert "stop_loss" not in reason(said=0.4, stop_loss=1.5)


def test_keys_that_projection_leaves_little_of_name_the_threshold():
    found = reason(total=0.42, kept=0.013)
    assert found == (
        "the layers reached 42% of its residual, and projection leaves 1.3% of its squared key "
        "length; raise threshold, or lower ridge (now 7, absolute)"
    )
    assert "threshold" not in reason(total=0.42, kept=0.013, objective="memit")


def test_layers_that_fell_short_name_the_ridge():
    wanted = "the layers reached 42% of its residual; lower ridge (now 7, absolute)"
    assert reason(total=0.42) == wanted
    assert reason(total=0.42, clamped=0.75) == wanted  # its target value works, so the clamp may


def test_a_target_value_that_was_reached_names_the_other_tokens():
    found = reason(total=0.97)
    assert found.startswith("its target value was reached (97%), but the batch also moves")
    assert reason(total=0.97, kept=0.001) == found


@pytest.mark.parametrize(
    ("why_not", "paraphrases", "wanted"),
    [
        ("", (), ""),
        ("", (True, False), ""),
        ("", (True, False, False), "it holds only as phrased: more or longer contexts help"),
        ("the clamp", (False,), "not the likeliest: the clamp"),
    ],
)
def test_an_edit_that_holds_in_less_than_half_of_its_paraphrases_says_so(
    why_not, paraphrases, wanted
):
    said = not why_not
    figures = {"probability_before": 0.1, "probability_after": 0.9, "loss": 0.1, "steps": 3}
    values = {"likeliest": said, "paraphrases": paraphrases, "why_not": why_not, **figures}
    found = EditResult(EDITS[0], **values)
    assert found.remark == wanted
    line = str(EditReport((found,), ())).splitlines()[1]
    assert line.endswith(f"; {wanted}" if wanted else "steps" if not paraphrases else "paraphrases")


def test_paraphrases_are_scored_with_their_own_edit(tokenizer):
    model = tiny_model("gpt2")
    runner = runner_for(model, tokenizer, settings())
    asked = [("Rome is", "The river"), (), ("Anna works as a",)]
    edits = [
        Edit(e.subject, e.prompt, e.target_new, paraphrases=texts)
        for e, texts in zip(EDITS, asked, strict=False)
    ]
    rows = [runner.renderer.edit_rows(edit, ()) for edit in edits]
    before = score_of(runner, [r.rows[0] for r in rows])
    found = score_after(runner, rows, before)
    assert [found[edit.id][0] for edit in edits] == before
    for edit in edits:
        for text, score in zip(edit.paraphrases, found[edit.id][2:], strict=True):
            row = runner.renderer.target_row(text, edit.target_new)
            with torch.no_grad():
                logits = model(torch.tensor([row.scoring_ids])).logits[0]
            said = logits.log_softmax(-1)[list(row.target_positions)]
            expected = float(said.gather(1, torch.tensor(row.target)[:, None]).sum())
            assert score.log_prob == pytest.approx(expected, rel=1e-4)


def moments() -> KeyMoments:
    found = {layer: key_moment(layer) for layer in (0, 1)}
    return KeyMoments(found, 10_000, dict.fromkeys(found, "mlp"))


def parts_of(tokenizer, objective, layer_shares: str):
    runner = runner_for(tiny_model("gpt2"), tokenizer, settings(layer_shares=layer_shares))
    rows = [runner.renderer.edit_rows(edit, runner.contexts) for edit in EDITS]
    return runner, rows, _parts(runner, objective, rows)


def test_shares_by_disturbance_are_the_inverse_of_what_each_layer_disturbs(tokenizer):
    space = moments().null_space(0.5, "absolute")
    runner, rows, parts = parts_of(tokenizer, Projector(space, 0.1, True), "disturbance")
    weights = []
    for layer in (0, 1):
        module = runner.architecture.rewrite_name(layer)
        keys = torch.stack([oracle.mean_key(runner.model, module, edit) for edit in rows])
        A = keys.double() @ space.project(layer, torch.eye(96).double())
        cost = (A @ key_moment(layer) * A).sum(1) / A.square().sum(1) ** 2
        weights.append(1 / float(cost.median()))
    assert parts == pytest.approx([weights[0] / sum(weights), 1.0], rel=1e-3)
    assert parts[0] != pytest.approx(0.5, rel=1e-2)


@pytest.mark.parametrize("shares", ["equal", "disturbance"])
def test_parts_of_the_residual_sum_up_to_all_of_it(shares, tokenizer):
    objective = Projector(moments().null_space(0.5, "absolute"), 0.1, True)
    parts = parts_of(tokenizer, objective, shares)[2]
    left = 1.0
    for part in parts:
        assert 0 < part <= 1
        left -= left * part
    assert left == pytest.approx(0, abs=1e-12)


def test_shares_are_equal_where_c0_does_not_count(tokenizer):
    plain = Projector(moments().null_space(0.5, "absolute"), 0.1, True)
    assert parts_of(tokenizer, plain, "equal")[2] == [0.5, 1.0]
    assert parts_of(tokenizer, Moment(moments(), 2.0), "disturbance")[2] == [0.5, 1.0]


def edited(tokenizer, edits=EDITS, **changes):
    space = NullSpace.identity({0: 96, 1: 96})
    values = {"steps": 20, "clamp_factor": 50.0, "ridge": 1e-3, "contexts": []} | changes
    config = settings(**values)
    model = get_alphaedit_model(tiny_model("gpt2"), config, tokenizer=tokenizer, null_space=space)
    return model, model.edit(edits, progress=False)


def test_shares_by_disturbance_reach_the_target_value_too(tokenizer):
    report = edited(tokenizer, layer_shares="disturbance", ridge=1e-6)[1]
    assert all(result.total_share == pytest.approx(1, abs=0.02) for result in report)


def test_an_edit_under_a_tiny_clamp_is_reported_with_the_clamp(tokenizer):
    report = edited(tokenizer, clamp_factor=1e-3)[1]
    assert len(report.not_taken) == len(EDITS)
    for result in report:
        assert "stopped at the clamp" in result.why_not
        assert "raise clamp_factor (now 0.001)" in result.why_not
        assert f"; not the likeliest: {result.why_not}" in str(report)


def test_an_edit_under_a_huge_ridge_is_reported_with_the_ridge(tokenizer):
    edits = easy_edits(tiny_model("gpt2"), tokenizer)
    report = edited(tokenizer, edits, ridge=1e6, learning_rate=0.3)[1]
    assert len(report.not_taken) == len(edits)
    assert {result.why_not for result in report.not_taken} == {
        "the layers reached 0% of its residual; lower ridge (now 1e+06, absolute)"
    }


def test_an_edit_that_took_has_no_reason_why_not(tokenizer):
    easy = easy_edits(tiny_model("gpt2"), tokenizer)
    report = edited(tokenizer, [EDITS[0], *easy], learning_rate=0.3)[1]
    assert [result.likeliest for result in report] == [False, True, True]
    assert all((result.why_not == "") == result.likeliest for result in report)


def test_paraphrases_change_no_factor(tokenizer):
    asked = ("Rome, whose capital is", "The river of France is")
    more = [Edit(e.subject, e.prompt, e.target_new, paraphrases=asked) for e in EDITS]
    (plain, without), (model, report) = (edited(tokenizer, e, steps=5) for e in (EDITS, more))
    for layer, delta in plain.factors.items():
        assert torch.equal(delta.A, model.factors[layer].A)
        assert torch.equal(delta.B, model.factors[layer].B)
    assert all(len(result.paraphrases) == 2 for result in report)
    assert all(result.paraphrases == () for result in without)
    assert " of 2 paraphrases" in str(report)


def test_the_norm_guard_says_in_which_layer_it_acts(tokenizer):
    space = NullSpace.identity({0: 96, 1: 96})
    config = settings(steps=3, clamp_factor=50.0, ridge=1e-3, contexts=[])
    model = get_alphaedit_model(tiny_model("gpt2"), config, tokenizer=tokenizer, null_space=space)
    model.alphaedit_config.norm_guard = 0.3  # below what may be asked for: keys need not be alike
    with pytest.warns(UserWarning, match="norm_guard") as warned:
        report = model.edit(EDITS, progress=False)
    told = [str(warning.message) for warning in warned]
    for layer in (0, 1):
        assert any(f"norm_guard=0.3 raised the ridge of layer {layer} " in text for text in told)
    assert all(share < 0.9 for result in report for share in result.shares.values())
