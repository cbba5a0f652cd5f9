"""What ``auto`` decides through a model: when, what a pack keeps of it, and pouring it anew."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from alphaedit_peft import (
    AlphaEditConfig,
    AlphaEditModel,
    Edit,
    EditPack,
    NullSpace,
    get_alphaedit_model,
)
from alphaedit_peft.editing.auto_settings import keys_around
from alphaedit_peft.nullspace import KeyMoments
from alphaedit_peft.nullspace.threshold import least_disturbing
from alphaedit_peft.solve_metric import SHARE
from tests import oracle
from tests.conftest import tiny_model
from tests.editing.test_auto_settings import projector, space
from tests.editing.test_batch import EDITS, key_moment, runner_for

AT = {"threshold": 0.02, "threshold_mode": "energy"}
SEARCH = ["clamp_factor", "learning_rate", "stop_loss"]


def moving(tokenizer) -> NullSpace:
    """At 0.02 it lets through what the keys have in common, at 0.01 and below it does not."""
    config = AlphaEditConfig(rewrite_layers=[0, 1], contexts=["I think."])
    runner = runner_for(tiny_model("gpt2"), tokenizer, config)
    rows = [runner.renderer.edit_rows(edit, runner.contexts) for edit in EDITS]
    values = torch.tensor([0.6] + 47 * [1e-3] + 48 * [1.0], dtype=torch.float64)
    moments = {}
    for layer, around in keys_around(runner, rows).items():
        common = torch.cat([torch.cat([key[None], others]) for key, others in around]).mean(0)
        noise = torch.randn(96, 95, generator=torch.Generator().manual_seed(layer))
        Q = torch.linalg.qr(torch.cat([common[:, None], noise], 1).double())[0]
        moments[layer] = (Q * values) @ Q.T
    return KeyMoments(moments, 10_000, dict.fromkeys(moments, "mlp")).null_space(0.02, "energy")


def wrap(tokenizer, null_space=None, key_moments=None, **changes) -> AlphaEditModel:
    values = {"rewrite_layers": [0, 1], "steps": 3, "contexts": ["I think."]} | changes
    return get_alphaedit_model(
        tiny_model("gpt2"),
        AlphaEditConfig(**values),
        tokenizer=tokenizer,
        null_space=null_space or moving(tokenizer),
        key_moments=key_moments,
    )


def names(report) -> list[str]:
    return [decision.name for decision in report.decisions]


def same_factors(one: AlphaEditModel, other: AlphaEditModel, **close) -> None:
    for layer, delta in one.factors.items():
        torch.testing.assert_close(delta.dense(), other.factors[layer].dense(), **close)


def test_the_threshold_becomes_the_least_disturbing_one(tokenizer):
    given = moving(tokenizer)
    model = wrap(tokenizer, given)
    runner = runner_for(tiny_model("gpt2"), tokenizer, model.alphaedit_config)
    rows = [runner.renderer.edit_rows(edit, runner.contexts) for edit in EDITS]
    wanted = least_disturbing(given.parts, given.threshold, keys_around(runner, rows))[0]
    assert wanted < given.threshold
    report = model.edit(EDITS, progress=False)
    state = (model.alphaedit_config.threshold, model.resources.null_space.threshold)
    assert state == (wanted, wanted)
    assert model.resources.provenance()["threshold"] == wanted
    assert names(report) == ["threshold", "ridge", *SEARCH]
    made = wrap(tokenizer, given, threshold=wanted, threshold_mode="energy")
    made.edit(EDITS, progress=False)
    same_factors(model, made, rtol=0, atol=0)


def test_settings_that_the_user_made_are_not_decided(tokenizer):
    model = wrap(tokenizer, ridge=0.1, ridge_mode="relative", clamp_factor=0.5, **AT)
    assert names(model.edit(EDITS, progress=False)) == ["learning_rate", "stop_loss"]
    assert model.alphaedit_config.threshold == 0.02
    model = wrap(tokenizer, rewrite_layers=None)
    assert names(model.edit(EDITS[:1], progress=False))[0] == "rewrite_layers"


def test_the_papers_numbers_leave_nothing_to_decide(tokenizer):
    report = wrap(tokenizer, preset="paper").edit(EDITS, progress=False)
    assert report.decisions == ()


@pytest.mark.parametrize("made", [lambda: space(0.05), projector])
def test_a_null_space_keeps_the_threshold_it_was_given(made, tokenizer):
    given = made()
    model = wrap(tokenizer, given)
    report = model.edit(EDITS, progress=False)
    assert names(report) == ["ridge", *SEARCH]
    assert model.resources.null_space is given
    assert model.alphaedit_config.threshold == given.threshold


def statistics() -> KeyMoments:
    moments = {layer: key_moment(layer) for layer in (0, 1)}
    return KeyMoments(moments, 10_000, {n: f"transformer.h.{n}.mlp.c_proj" for n in moments})


def memit(tokenizer, **changes) -> AlphaEditModel:
    return wrap(tokenizer, space(), statistics(), objective="memit", **changes)


@pytest.mark.parametrize("changes", [{}, {"projection": True, "history": False}])
def test_memits_threshold_and_ridge_are_not_decided(changes, tokenizer):
    model = memit(tokenizer, **changes)
    given = model.resources.null_space
    assert names(model.edit(EDITS, progress=False)) == ["moment_weight", *SEARCH]
    assert model.resources.null_space is given


def weight_by_hand(tokenizer) -> tuple[float, list[float]]:
    """w, and by layer the median of k C0^-1 k^T over the edits' keys k."""
    config = AlphaEditConfig(rewrite_layers=[0, 1], contexts=["I think."])
    runner = runner_for(tiny_model("gpt2"), tokenizer, config)
    rows = [runner.renderer.edit_rows(edit, runner.contexts) for edit in EDITS]
    sizes = []
    for layer in (0, 1):
        module = runner.architecture.rewrite_name(layer)
        keys = torch.stack([oracle.mean_key(runner.model, module, row) for row in rows]).double()
        inverse = torch.linalg.inv(key_moment(layer))
        sizes.append(float((keys @ inverse @ keys.T).diagonal().median()))
    return (1 - SHARE) / SHARE * sum(sizes) / 2, sizes


def test_memits_weight_is_by_the_edits_keys_and_told(tokenizer, tmp_path):
    model, (wanted, sizes) = memit(tokenizer), weight_by_hand(tokenizer)
    assert model.alphaedit_config.moment_weight is None
    decision = model.edit(EDITS, progress=False).decisions[0]
    weight = model.alphaedit_config.moment_weight
    assert weight == float(f"{wanted:.2g}")
    assert decision.value == f"{weight:g}"
    shares = [size / (size + weight) for size in sizes]
    said = f"reaches, of its residual, {shares[0]:.0%} in layer 0, {shares[1]:.0%} in layer 1"
    assert said in decision.reason
    model.save_pretrained(tmp_path)
    pack = EditPack.from_pretrained(tmp_path)
    assert pack.config.moment_weight == pack.null_space["moment_weight"] == weight
    assert pack.decisions[0] == decision.to_json()


def test_memits_weight_is_open_again_once_all_edits_are_taken_back(tokenizer):
    model = memit(tokenizer)
    model.edit(EDITS, progress=False)
    model.rollback()
    report = model.edit(EDITS[:1], progress=False)
    assert names(report)[0] == "moment_weight"
    model.rollback()
    model.alphaedit_config.moment_weight = 7.0
    model.edit(EDITS, progress=False)
    assert model.alphaedit_config.moment_weight == 7.0


def test_memit_goes_on_at_the_recorded_weight(tokenizer, tmp_path):
    whole = memit(tokenizer)
    whole.edit(EDITS[:2], progress=False)
    whole.save_pretrained(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    sidecar = tmp_path / "old" / "alphaedit" / "config.json"
    values = json.loads(sidecar.read_text())
    del values["null_space"]["moment_weight"]  # as earlier versions wrote it
    sidecar.write_text(json.dumps(values))
    whole.edit(EDITS[2:], progress=False)
    given = {"tokenizer": tokenizer, "key_moments": statistics()}
    for name in ("new", "old"):
        again = AlphaEditModel.from_pretrained(tiny_model("gpt2"), tmp_path / name, **given)
        assert again.edit(EDITS[2:], progress=False).decisions == ()
        same_factors(again, whole, rtol=0, atol=0)
        beside = memit(tokenizer)
        beside.load_adapter(tmp_path / name, "pack")
        assert beside.alphaedit_config.moment_weight == whole.alphaedit_config.moment_weight
        beside.set_adapter("pack")
        beside.edit(EDITS[2:], progress=False)
        same_factors(beside, whole, rtol=0, atol=0)
        joined = memit(tokenizer)
        joined.join([tmp_path / name])
        assert joined.alphaedit_config.moment_weight == whole.alphaedit_config.moment_weight
        other = memit(tokenizer, moment_weight=3.0)
        other.load_adapter(tmp_path / name, "pack")
        other.set_adapter("pack")
        with pytest.raises(ValueError, match=r"moment_weight 16\.0, not 3\.0; .* set the first"):
            other.edit(EDITS[2:], progress=False)


def test_rows_at_another_weight_are_made_anew_or_refused(tokenizer):
    model, made = memit(tokenizer), memit(tokenizer, moment_weight=3.0)
    model.edit(EDITS, progress=False)
    made.edit(EDITS, progress=False)
    model.alphaedit_config.moment_weight = None
    with pytest.raises(ValueError, match=r"moment_weight=None, and there are edits already"):
        model.repour()
    model.alphaedit_config.moment_weight = 3.0
    with pytest.raises(ValueError, match="rows of two projectors do not go together"):
        model.edit([Edit("Rome", "{} lies in", "Spain")], progress=False)
    model.repour()
    same_factors(model, made, rtol=1e-5, atol=1e-7)
    assert model.resources.provenance()["moment_weight"] == 3.0


def test_nothing_moves_after_an_adapters_first_edits(tokenizer):
    model = wrap(tokenizer)
    first = model.edit(EDITS[:2], batch_size=1, progress=False)
    threshold, used = model.alphaedit_config.threshold, model.resources.null_space
    later = model.edit(EDITS[2:], progress=False)
    assert first.decisions != ()
    assert threshold != 0.02
    assert later.decisions == ()
    assert model.alphaedit_config.threshold == threshold
    assert model.resources.null_space is used
    assert model.to_pack().decisions == tuple(d.to_json() for d in first.decisions)


def check_open_again(model: AlphaEditModel, given) -> None:
    assert model.resources.null_space is given
    assert model.alphaedit_config.threshold == given.threshold
    assert model.alphaedit_config.threshold_mode == given.threshold_mode
    assert model.edits == []
    assert model.to_pack().decisions == ()


def test_settings_are_open_again_where_every_edit_was_set_aside(tokenizer):
    given = moving(tokenizer)
    model = wrap(tokenizer, given, learning_rate=1e308, learning_rate_mode="absolute")
    report = model.edit(EDITS, progress=False)
    assert len(report.set_aside) == len(EDITS)
    assert all("lower learning_rate" in result.reason for result in report)
    check_open_again(model, given)
    model.alphaedit_config.learning_rate = 0.1
    model.edit(EDITS, progress=False)
    assert model.alphaedit_config.threshold != given.threshold


def test_settings_are_open_again_where_the_batch_failed(tokenizer, monkeypatch):
    given = moving(tokenizer)
    model = wrap(tokenizer, given)
    adapter, calls = model.edit_adapters["default"], []

    def fail_at_second_layer(layer, delta):
        calls.append(layer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        type(adapter).write(adapter, layer, delta)

    with monkeypatch.context() as patch:
        patch.setattr(adapter, "write", fail_at_second_layer)
        with pytest.raises(KeyboardInterrupt):
            model.edit(EDITS, progress=False)
    check_open_again(model, given)
    assert "threshold" in names(model.edit(EDITS, progress=False))


def test_a_report_prints_its_decisions_and_gives_them_as_json(tokenizer):
    report = wrap(tokenizer).edit(EDITS, progress=False)
    text = str(report)
    assert report.decisions
    for decision in report.decisions:
        assert f"  {decision.name} {decision.value}: {decision.reason}\n" in text
    assert report.to_json()["decisions"] == [
        {"name": d.name, "value": d.value, "reason": d.reason} for d in report.decisions
    ]


def test_a_pack_keeps_what_was_decided_and_goes_on_by_it(tokenizer, tmp_path):
    model = wrap(tokenizer)
    report = model.edit(EDITS[:2], progress=False)
    decided = tuple(decision.to_json() for decision in report.decisions)
    model.save_pretrained(tmp_path)
    assert EditPack.from_pretrained(tmp_path).decisions == decided
    loaded = AlphaEditModel.from_pretrained(
        tiny_model("gpt2"), tmp_path, tokenizer=tokenizer, null_space=moving(tokenizer)
    )
    assert loaded.edit(EDITS[2:], progress=False).decisions == ()
    model.edit(EDITS[2:], progress=False)
    same_factors(model, loaded)
    assert loaded.resources.null_space.threshold == model.alphaedit_config.threshold
    assert loaded.to_pack().decisions == decided


def other_space():
    moments = {layer: key_moment(layer + 7) for layer in (0, 1)}
    return KeyMoments(moments, 10_000, dict.fromkeys(moments, "mlp")).null_space(0.02, "energy")


@pytest.mark.parametrize(
    "changes",
    [{"ridge": 3.0}, {"threshold": 0.1}, {"null_space": other_space}, {"norm_guard": 0.0}],
)
def test_pouring_again_goes_by_the_settings_of_now(changes, tokenizer):
    values = {"ridge": 0.1, "ridge_mode": "relative", "norm_guard": 2.0, **AT}
    model = wrap(tokenizer, space(), **values)
    model.edit(EDITS, progress=False)
    before = model.factors
    given = {k: v() if callable(v) else v for k, v in changes.items()}
    wanted = wrap(tokenizer, **({"null_space": space()} | values | given))
    wanted.edit(EDITS, progress=False)
    for name, value in given.items():
        setattr(model.resources if name == "null_space" else model.alphaedit_config, name, value)
    model.repour()
    same_factors(model, wanted, rtol=1e-4, atol=1e-6)
    moved = [not torch.allclose(before[n].dense(), d.dense()) for n, d in model.factors.items()]
    assert all(moved) == ("norm_guard" not in changes)


def test_going_on_with_another_null_space_waits_for_pouring_again(tokenizer):
    model = wrap(tokenizer, **AT)
    model.edit(EDITS[:2], progress=False)
    model.resources.null_space = other_space()
    with pytest.raises(ValueError, match="rows of two projectors do not go together"):
        model.edit(EDITS[2:], progress=False)
    assert len(model.edits) == 2
    model.repour()
    model.edit(EDITS[2:], progress=False)
    assert len(model.edits) == len(EDITS)


def test_going_on_at_another_threshold_waits_for_pouring_again(tokenizer):
    model = wrap(tokenizer)
    model.edit(EDITS[:2], progress=False)
    model.alphaedit_config.threshold = 0.15
    with pytest.raises(ValueError, match="rows of two projectors do not go together"):
        model.edit(EDITS[2:], progress=False)
    model.repour()
    assert model.resources.provenance()["threshold"] == 0.15


def test_a_pack_that_is_loaded_and_saved_says_how_it_was_made(tokenizer, tmp_path):
    made = memit(tokenizer, moment_weight=3.0, separator="", steps=2)
    made.edit(EDITS[:2], progress=False)
    made.save_pretrained(tmp_path / "pack")
    model = memit(tokenizer, moment_weight=7.0)
    model.load_adapter(tmp_path / "pack", "b")
    model.set_adapter("b")
    model.save_pretrained(tmp_path / "again")
    again = EditPack.from_pretrained(tmp_path / "again" / "b")
    assert again.config.to_json() == made.to_pack().config.to_json()
    given = {"tokenizer": tokenizer, "key_moments": statistics()}
    on = AlphaEditModel.from_pretrained(tiny_model("gpt2"), tmp_path / "again" / "b", **given)
    on.edit(EDITS[2:], progress=False)
    model.repour()  # by the model's settings
    assert model.to_pack().config.moment_weight == 7.0
