"""What the wrapper promises, end to end, on tiny models of the paper's families."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from alphaedit_peft import (
    AlphaEditConfig,
    AlphaEditModel,
    Edit,
    EditPack,
    KeyMoments,
    NullSpace,
    get_alphaedit_model,
)
from tests.conftest import CORPUS, PEFT_ALONE, tiny_model

FAMILIES = ("gpt2", "gptj", "llama")
EDITS = [
    Edit("France", "The capital of {} is", "Rome", id="france"),
    Edit("Marie Curie", "{} was born in", "Paris", id="curie"),
    Edit("Albert Einstein", "{} works as a", "river", id="einstein"),
    Edit("Anna Smith", "the mother tongue of {} is", "French", id="smith"),
]
SETTINGS = {
    "rewrite_layers": [0, 1],
    "steps": 8,
    "ridge": 1e-3,
    "contexts": ["I think.", "The river is fine."],
    "stop_loss": 0.0,
}


@pytest.fixture(scope="module", params=FAMILIES)
def base(request):
    return tiny_model(request.param)


def wrap(base, tokenizer, width: int = 96, **changes):
    config = AlphaEditConfig(**(SETTINGS | changes))
    layers = config.rewrite_layers or [0, 1]
    space = NullSpace.identity(dict.fromkeys(layers, width))
    return get_alphaedit_model(base, config, tokenizer=tokenizer, null_space=space)


def test_a_model_is_wrapped_and_loaded_without_a_warning(tokenizer, tmp_path):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        wrap(tiny_model("llama"), tokenizer).save_pretrained(tmp_path)
        AlphaEditModel.from_pretrained(tiny_model("llama"), tmp_path)
        assert warnings.filters == before
    assert [str(warning.message) for warning in told] == []


def probe(tokenizer) -> dict[str, torch.Tensor]:
    return tokenizer([CORPUS[0]], return_tensors="pt", return_token_type_ids=False)


def logits(model, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model(**probe(tokenizer)).logits


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture
def model(base, tokenizer):
    wrapped = wrap(base, tokenizer)
    yield wrapped
    wrapped.unload()


def test_fresh_model_is_its_base(base, tokenizer):
    before = logits(base, tokenizer)
    model = wrap(base, tokenizer)
    assert torch.equal(logits(model, tokenizer), before)
    assert model.edits == []
    assert not model.merged
    assert model.unload() is base


def test_edit_reaches_the_residuals_and_counts_rank(model, tokenizer):
    report = model.edit(EDITS, progress=False)
    assert [r.edit for r in report] == EDITS
    assert {layer.rank for layer in report.layers} == {len(EDITS)}
    assert model.edits == EDITS
    assert all(abs(share - 1) < 0.05 for r in report for share in r.shares.values())


def test_base_weights_are_never_touched_and_disable_gives_base(base, tokenizer):
    before, plain = weights(base), logits(base, tokenizer)
    model = wrap(base, tokenizer)
    model.edit(EDITS, progress=False)
    edited = logits(model, tokenizer)
    assert not torch.allclose(edited, plain)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokenizer), plain)
    assert torch.equal(logits(model, tokenizer), edited)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    assert same_bits(weights(model.unload()), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_merge_and_unmerge_restore_the_bits(family, dtype, tokenizer):
    base = tiny_model(family, dtype)
    before = weights(base)
    model = wrap(base, tokenizer)
    model.edit(EDITS[:2], progress=False)
    unmerged = logits(model, tokenizer)
    for _ in range(3):
        model.merge()
        assert model.merged
        assert not same_bits(weights(model.get_base_model()), before)
        model.unmerge()
    model.base_model.merge_adapter()
    model.base_model.unmerge_adapter()
    assert torch.equal(logits(model, tokenizer), unmerged)
    assert same_bits(weights(model.unload()), before)


def test_merge_then_disable_then_unmerge_stays_exact(base, tokenizer):
    before, plain = weights(base), logits(base, tokenizer)
    model = wrap(base, tokenizer)
    model.edit(EDITS, progress=False)
    model.merge()
    merged = logits(model, tokenizer)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokenizer), plain)
    assert model.merged
    assert torch.equal(logits(model, tokenizer), merged)
    model.base_model.disable_adapter_layers()  # PEFT then unmerges within forward
    assert torch.equal(logits(model, tokenizer), plain)
    model.base_model.enable_adapter_layers()
    model.unmerge()
    assert same_bits(weights(model.unload()), before)


def test_merge_and_unload_is_the_edited_model(base, tokenizer):
    before = weights(base)
    model = wrap(base, tokenizer)
    model.edit(EDITS, progress=False)
    edited = logits(model, tokenizer)
    plain = model.merge_and_unload()
    assert type(plain) is type(base)
    assert torch.allclose(logits(plain, tokenizer), edited, atol=1e-4)
    plain.load_state_dict(before)


def test_edit_while_merged_is_refused(model):
    model.merge()
    with pytest.raises(RuntimeError, match=r"merged into the base weights; call unmerge"):
        model.edit(EDITS, progress=False)
    model.unmerge()
    with model.disable_adapter(), pytest.raises(RuntimeError, match="adapter is disabled"):
        model.edit(EDITS, progress=False)


@PEFT_ALONE
def test_pack_loads_everywhere_with_the_same_logits(base, tokenizer, tmp_path):
    base.save_pretrained(tmp_path / "base")
    fresh = lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base")  # noqa: E731
    model = wrap(fresh(), tokenizer)
    model.edit(EDITS, progress=False)
    model.save_pretrained(tmp_path / "pack")
    edited = logits(model, tokenizer)
    ours = AlphaEditModel.from_pretrained(fresh(), tmp_path / "pack")
    assert torch.equal(logits(ours, tokenizer), edited)
    assert ours.edits == EDITS
    peft = PeftModel.from_pretrained(fresh(), tmp_path / "pack")
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "pack")
    transformers = fresh()
    transformers.load_adapter(str(tmp_path / "pack"))
    for other in (peft, auto, transformers):
        assert torch.allclose(logits(other, tokenizer), edited, atol=1e-5)


def test_saved_and_continued_equals_uninterrupted(tokenizer, tmp_path):
    whole = wrap(tiny_model("llama"), tokenizer)
    whole.edit(EDITS, batch_size=1, progress=False)
    first = wrap(tiny_model("llama"), tokenizer)
    first.edit(EDITS[:3], batch_size=1, progress=False)
    first.save_pretrained(tmp_path)
    space = NullSpace.identity({0: 96, 1: 96})
    second = AlphaEditModel.from_pretrained(
        tiny_model("llama"), tmp_path, tokenizer=tokenizer, null_space=space
    )
    second.edit(EDITS[3:], progress=False)
    for layer, delta in whole.factors.items():
        assert torch.equal(delta.A, second.factors[layer].A)
        assert torch.equal(delta.B, second.factors[layer].B)
    assert second.records == whole.records


def test_another_base_is_refused(base, tokenizer, tmp_path):
    model = wrap(base, tokenizer)
    model.edit(EDITS[:1], progress=False)
    model.save_pretrained(tmp_path)
    model.unload()
    other = tiny_model(base.config.model_type, seed=1)
    with pytest.raises(ValueError, match="this pack"):
        AlphaEditModel.from_pretrained(other, tmp_path)
    loaded = AlphaEditModel.from_pretrained(other, tmp_path, allow_base_mismatch=True)
    assert loaded.edits == EDITS[:1]


def test_plain_lora_loads_but_cannot_be_edited(base, tokenizer, tmp_path):
    model = wrap(base, tokenizer)
    model.edit(EDITS[:1], progress=False)
    edited = logits(model, tokenizer)
    PeftModel.save_pretrained(model, tmp_path)
    model.unload()
    with pytest.warns(UserWarning, match="plain LoRA"):
        plain = AlphaEditModel.from_pretrained(base, tmp_path, tokenizer=tokenizer)
    assert torch.allclose(logits(plain, tokenizer), edited, atol=1e-5)
    assert plain.edits == []
    with pytest.raises(RuntimeError, match=r"adapter 'default' is a plain LoRA"):
        plain.edit(EDITS, progress=False)
    plain.merge()
    plain.unload()


def test_rollback_restores_bits_and_after_a_load_repours(tokenizer, tmp_path):
    model = wrap(tiny_model("gpt2"), tokenizer)
    model.edit(EDITS[:2], progress=False)
    before, records = model.factors, model.records
    model.edit(EDITS[2:], batch_size=1, progress=False)
    model.save_pretrained(tmp_path)
    model.rollback(batches=2)
    assert model.records == records
    for layer, delta in before.items():
        assert torch.equal(delta.A, model.factors[layer].A)
        assert torch.equal(delta.B, model.factors[layer].B)
    space = NullSpace.identity({0: 96, 1: 96})
    loaded = AlphaEditModel.from_pretrained(
        tiny_model("gpt2"), tmp_path, tokenizer=tokenizer, null_space=space
    )
    loaded.rollback(batches=2)
    assert loaded.records == records
    for layer, delta in before.items():
        assert torch.allclose(delta.dense(), loaded.factors[layer].dense(), atol=1e-5)
    with pytest.raises(ValueError, match=r"batches=2 cannot be taken back; the model has 1"):
        loaded.rollback(batches=2)


def test_repour_gives_the_same_model_and_removes(model, tokenizer):
    model.edit(EDITS, batch_size=2, progress=False)
    before = model.factors
    model.repour()
    for layer, delta in before.items():
        assert torch.allclose(delta.dense(), model.factors[layer].dense(), atol=1e-4)
    model.remove_edits(["curie", "smith"])
    assert [edit.id for edit in model.edits] == ["france", "einstein"]
    assert {delta.rank for delta in model.factors.values()} == {2}
    with pytest.raises(ValueError, match=r"\['curie'\] are not in this model"):
        model.remove_edits(["curie"])
    model.remove_edits(["france", "einstein"])
    assert model.edits == []
    emptied = logits(model, tokenizer)
    assert torch.equal(emptied, logits(model.unload(), tokenizer))


def test_after_each_batch_the_pack_can_be_saved(model):
    seen = []

    def after_batch():
        seen.append(model.to_pack().digest())
        if len(model.edits) == 2:
            raise RuntimeError("the second batch is never made")

    with pytest.raises(RuntimeError, match="never made"):
        model.edit(EDITS, batch_size=2, progress=False, after_batch=after_batch)
    assert seen == [model.to_pack().digest()]
    model.edit(EDITS[2:], progress=False, after_batch=after_batch)
    assert len(seen) == 2
    assert seen[1] == model.to_pack().digest() != seen[0]


def test_failed_batch_leaves_no_trace(model, tokenizer, monkeypatch):
    model.edit(EDITS[:1], progress=False)
    before, records, plain = weights(model), model.records, logits(model, tokenizer)
    adapter, calls = model.edit_adapters["default"], []

    def fail_at_second_layer(layer, delta):
        calls.append(layer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        type(adapter).write(adapter, layer, delta)

    monkeypatch.setattr(adapter, "write", fail_at_second_layer)
    with pytest.raises(KeyboardInterrupt):
        model.edit(EDITS[1:], progress=False)
    assert same_bits(weights(model), before)
    assert model.records == records
    assert torch.equal(logits(model, tokenizer), plain)


def test_same_subject_shares_a_row_within_and_across_batches(model):
    one = Edit("Marie Curie", "{} was born in", "Paris", id="one")
    two = Edit("Marie Curie", "{} works as a", "river", id="two")
    three = Edit("Marie Curie", "{} lives in", "Rome", id="three")
    model.edit([one, two], progress=False)
    assert {delta.rank for delta in model.factors.values()} == {1}
    report = model.edit([three], progress=False)
    assert report.results[0].made
    assert {delta.rank for delta in model.factors.values()} == {2}
    assert {r.row for r in model.records if r.role == "own"} == {1}
    assert {r.row for r in model.records if r.role == "superseded"} == {0}
    assert sorted(edit.id for edit in model.edits) == ["one", "three", "two"]
    model.rollback()
    assert {r.role for r in model.records} == {"own"}


@pytest.mark.parametrize("rule", ["error", "replace", "keep"])
def test_conflict_rules_across_batches(base, tokenizer, rule):
    model = wrap(base, tokenizer, on_conflict=rule)
    model.edit([EDITS[0]], progress=False)
    other = Edit("France", "The capital of {} is", "London", id="other")
    if rule == "error":
        with pytest.raises(ValueError, match="edits france and other contradict"):
            model.edit([other], progress=False)
        assert [e.id for e in model.edits] == ["france"]
    else:
        report = model.edit([other], progress=False)
        assert [e.id for e in model.edits] == [{"replace": "other", "keep": "france"}[rule]]
        assert report.results[0].made == (rule == "replace")
    again = model.edit([model.edits[0]], progress=False)
    assert "already says so" in again.results[0].reason
    model.unload()


def test_pack_stands_without_a_model(model, tmp_path):
    model.edit(EDITS, progress=False)
    model.save_pretrained(tmp_path)
    pack = EditPack.from_pretrained(tmp_path)
    assert pack.edits == EDITS
    assert pack.rank == len(EDITS)
    assert "4 own" in pack.summary()
    assert pack.targets.shape == (4, 32)


def test_base_and_config_are_enough_where_both_can_be_found(tokenizer, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    NullSpace.identity({0: 96, 1: 96}).save_pretrained(tmp_path / "space")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = AlphaEditConfig(**SETTINGS, null_space=str(tmp_path / "space"))
    model = get_alphaedit_model(base, config)
    model.edit(EDITS[:1], progress=False)
    assert model.edits == EDITS[:1]


def test_dicts_are_edits_too(model):
    report = model.edit([edit.to_dict() for edit in EDITS], batch_size=3, progress=False)
    assert model.edits == EDITS
    assert {record.batch for record in model.records} == {0, 1}
    assert len(report) == len(EDITS)


def test_two_models_do_not_know_of_each_other(tokenizer):
    one, other = wrap(tiny_model("llama"), tokenizer), wrap(tiny_model("gpt2"), tokenizer)
    one.edit(EDITS[:2], progress=False)
    alone = one.factors
    other.edit(EDITS[2:], progress=False)
    again = wrap(tiny_model("llama"), tokenizer)
    again.edit(EDITS[:2], progress=False)
    for layer, delta in alone.items():
        assert torch.equal(delta.A, again.factors[layer].A)
        assert torch.equal(delta.B, again.factors[layer].B)


@pytest.mark.parametrize("leave", ["unload", "merge_and_unload"])
def test_an_unloaded_model_cannot_be_edited_or_merged(model, leave):
    model.edit(EDITS[:1], progress=False)
    getattr(model, leave)()
    for act in (lambda: model.edit(EDITS[1:], progress=False), model.rollback, model.merge):
        with pytest.raises(RuntimeError, match=r"this model was unloaded.*get_alphaedit_model"):
            act()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_torchs_default_dtype_changes_nothing(dtype, tokenizer):
    def made(base) -> list[str]:
        config = AlphaEditConfig(**SETTINGS | {"contexts": None})
        moments = KeyMoments.collect(base, tokenizer, CORPUS * 9, config, progress=False)
        space = moments.null_space(0.1, "energy")
        model = get_alphaedit_model(base, config, tokenizer=tokenizer, null_space=space)
        found = [moments.digest(), space.digest()]
        for change in (
            lambda: model.edit(EDITS[:3], 2, progress=False),
            lambda: model.edit(EDITS[3:], progress=False),
            lambda: model.remove_edits([EDITS[0].id]),
        ):
            change()
            found.append(model.to_pack().digest())
        pack = model.to_pack()
        smaller = pack.without([EDITS[1].id], max_share=1.0)
        found += [smaller.digest(), pack.compress(rank=2).digest()]
        return [*found, str(model.capacity(CORPUS[:1]))]

    bases = [tiny_model("llama") for _ in range(2)]
    wanted = made(bases[0])
    torch.set_default_dtype(dtype)
    try:
        assert made(bases[1]) == wanted
    finally:
        torch.set_default_dtype(torch.float32)
