"""What a user gets wrong: each mistake gets a sentence, and leaves the model as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from alphaedit_peft import (
    AlphaEditConfig,
    AlphaEditModel,
    KeyMoments,
    NullSpace,
    get_alphaedit_model,
)
from alphaedit_peft.fingerprint import fingerprint
from alphaedit_peft.structure import find_structure
from tests.conftest import CORPUS, tiny_config, tiny_model
from tests.model.test_model import EDITS, SETTINGS, logits, same_bits, weights, wrap


@pytest.fixture
def model(tokenizer):
    return wrap(tiny_model("llama"), tokenizer)


@pytest.fixture
def saved(model, tmp_path):
    model.edit(EDITS[:1], progress=False)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("edits", "error", "message"),
    [
        ([], ValueError, r"edits=\[\] is empty; give at least one edit"),
        (EDITS[0], TypeError, "a single Edit; pass a list"),
        (["Rome"], TypeError, "'Rome' is a str; an edit is an Edit or a dict"),
        ([{"subject": "France"}], ValueError, r"missing fields \['prompt', 'target_new'\]"),
        ([{"subject": " ", "prompt": "{} is", "target_new": "x"}], ValueError, "subject=' '"),
        ([{"subject": "a", "prompt": "{} {}", "target_new": "x"}], ValueError, "holds 2 times"),
        ([{"subject": "a", "prompt": "is", "target_new": "x"}], ValueError, "holds 0 times"),
    ],
)
def test_edits_that_are_none(model, edits, error, message):
    before = weights(model)
    with pytest.raises(error, match=message):
        model.edit(edits, progress=False)
    assert same_bits(weights(model), before)
    assert model.edits == []


def test_batch_size_below_one(model):
    with pytest.raises(ValueError, match="batch_size=0 must be a whole number, at least 1"):
        model.edit(EDITS, batch_size=0, progress=False)


def test_one_bad_edit_stops_the_call_before_anything_is_written(model, tokenizer):
    deaf = {"subject": "France", "prompt": "{} is", "target_new": "☃"}
    model.resources.tokenizer = _without_snowmen(tokenizer)
    before = weights(model)
    with pytest.raises(ValueError, match=r"target '☃' has no token"):
        model.edit([EDITS[0], deaf], batch_size=1, progress=False)
    assert same_bits(weights(model), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj", "model.layers.3.mlp.up_proj"])
def test_base_that_is_not_finite(tokenizer, name, value):
    base = tiny_model("llama")
    model = wrap(base, tokenizer)
    with torch.no_grad():
        part = base.get_submodule(name)
        getattr(part, "base_layer", part).weight[3, 3] = value
    with pytest.raises(ValueError, match=rf"not finite: {name}.*\.weight holds NaN or infinity"):
        find_structure(base)
    before, calls = model.factors, []
    try:
        report = model.edit(EDITS, progress=False)
        calls = [result.reason for result in report]
    except ValueError as error:
        calls = [str(error)]
    assert all("finite" in reason or "became" in reason for reason in calls)
    for layer, delta in before.items():
        assert torch.equal(delta.A, model.factors[layer].A)
    assert model.edits == []


def test_factors_that_are_not_finite_are_not_saved(model, tmp_path):
    model.edit(EDITS[:1], progress=False)
    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.down_proj.lora_B["default"].weight[0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        model.save_pretrained(tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_null_space_of_another_layer_set(tokenizer):
    config = AlphaEditConfig(**SETTINGS)
    space = NullSpace.identity({0: 96, 2: 96})
    model = get_alphaedit_model(tiny_model("llama"), config, tokenizer=tokenizer, null_space=space)
    with pytest.raises(ValueError, match=r"made for layers \[0, 2\], the config wants \[0, 1\]"):
        model.edit(EDITS, progress=False)


def test_null_space_of_another_model(tokenizer):
    other = tiny_model("llama", seed=5)
    _, architecture = AlphaEditConfig(**SETTINGS).resolve(other)
    space = NullSpace.identity({0: 96, 1: 96}, fingerprint(other, 1, architecture))
    model = get_alphaedit_model(
        tiny_model("llama"), AlphaEditConfig(**SETTINGS), tokenizer=tokenizer, null_space=space
    )
    with pytest.raises(ValueError, match="this null space"):
        model.edit(EDITS, progress=False)


def test_going_on_with_another_null_space(model, tokenizer, tmp_path):
    model.edit(EDITS[:1], progress=False)
    model.save_pretrained(tmp_path)
    loaded = AlphaEditModel.from_pretrained(
        tiny_model("llama"),
        tmp_path,
        tokenizer=tokenizer,
        null_space=_moments(0, 1).null_space(0.0, "rank"),
    )
    adapter = loaded.edit_adapters["default"]
    adapter.keep(replace(adapter.journal, null_space={**adapter.journal.null_space, "digest": "0"}))
    with pytest.raises(ValueError, match="rows of two projectors do not go together"):
        loaded.edit(EDITS[1:], progress=False)
    assert loaded.edits == EDITS[:1]


def test_missing_null_space_and_tokenizer(tokenizer):
    config = AlphaEditConfig(**SETTINGS)
    model = get_alphaedit_model(tiny_model("llama"), config, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="no null space was given"):
        model.edit(EDITS, progress=False)
    model = get_alphaedit_model(tiny_model("llama"), config)
    with pytest.raises(ValueError, match="no tokenizer was given"):
        model.edit(EDITS, progress=False)


def test_memit_without_moments_or_with_history_and_projection(tokenizer):
    memit = AlphaEditConfig(**SETTINGS, objective="memit")
    model = get_alphaedit_model(tiny_model("llama"), memit, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="objective='memit' needs key moments"):
        model.edit(EDITS, progress=False)
    both = AlphaEditConfig(**SETTINGS, objective="memit", projection=True)
    space, moments = NullSpace.identity({0: 96, 1: 96}), _moments(0, 1)
    model = get_alphaedit_model(
        tiny_model("llama"), both, tokenizer=tokenizer, null_space=space, key_moments=moments
    )
    with pytest.raises(ValueError, match="set history=False"):
        model.edit(EDITS, progress=False)
    alone = get_alphaedit_model(
        tiny_model("llama"), memit, tokenizer=tokenizer, key_moments=_moments(0)
    )
    with pytest.raises(ValueError, match=r"moments are of layers \[0\].*\[1\] are missing"):
        alone.edit(EDITS, progress=False)


def test_base_that_carries_adapters(tokenizer):
    base = tiny_model("llama")
    wrap(base, tokenizer)
    with pytest.raises(ValueError, match="LlamaForCausalLM carries PEFT adapters already"):
        wrap(base, tokenizer)


def test_two_active_adapters(model, tokenizer, tmp_path):
    model.edit(EDITS[:1], progress=False)
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), "second")
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(RuntimeError, match=r"adapters \['default', 'second'\] are active"):
        model.edit(EDITS[1:], progress=False)


def test_pack_without_targets_cannot_be_poured_again(model, tokenizer, tmp_path):
    model.edit(EDITS[:2], progress=False)
    replace(model.to_pack(), targets=None).save_pretrained(tmp_path)
    loaded = AlphaEditModel.from_pretrained(
        tiny_model("llama"),
        tmp_path,
        tokenizer=tokenizer,
        null_space=NullSpace.identity({0: 96, 1: 96}),
    )
    with pytest.raises(ValueError, match="saved without target values"):
        loaded.repour()
    loaded.edit(EDITS[2:], progress=False)
    assert len(loaded.edits) == len(EDITS)


def test_pack_of_other_shapes_even_where_mismatch_is_allowed(model, tmp_path):
    model.edit(EDITS[:1], progress=False)
    model.save_pretrained(tmp_path)
    wide = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            vocab_size=320,
        )
    )
    with pytest.raises(ValueError, match=r"of shape \(32, 96\), and this model's is \(32, 64\)"):
        AlphaEditModel.from_pretrained(wide, tmp_path, allow_base_mismatch=True)
    assert not any("lora_" in name for name, _ in wide.named_parameters())


def test_huge_hidden_state_is_set_aside_and_the_others_made(tokenizer):
    base = tiny_model("llama")
    with torch.no_grad():
        base.model.embed_tokens.weight[tokenizer("Anna")["input_ids"][-1]] *= 1e4
    model = wrap(base, tokenizer)
    report = model.edit([*EDITS[:3], {"subject": "Anna", "prompt": "{} is", "target_new": "x"}],
                        progress=False)  # fmt: skip
    assert [result.made for result in report] == [True, True, True, False]
    assert "over max_hidden_ratio=10 times the batch's median" in report.results[3].reason
    assert torch.isfinite(logits(model, tokenizer)).all()


def _moments(*layers: int) -> KeyMoments:
    names = {layer: f"model.layers.{layer}.mlp.down_proj" for layer in layers}
    return KeyMoments({layer: 2 * torch.eye(96) for layer in layers}, 10_000, names)


def _without_snowmen(tokenizer):
    """The fixture's tokenizer, deaf to snowmen."""
    from tokenizers import Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.normalizer = normalizers.Replace("☃", "")
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def test_a_base_without_weights_is_refused(tokenizer, saved):
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(tiny_config("llama"))
    said = 'LlamaForCausalLM has no weights: .* "meta".* from_pretrained'
    with pytest.raises(ValueError, match=said):
        get_alphaedit_model(base, AlphaEditConfig())
    with pytest.raises(ValueError, match=said):
        AlphaEditModel.from_pretrained(base, saved)
    with pytest.raises(ValueError, match=said):
        KeyMoments.collect(base, tokenizer, CORPUS, AlphaEditConfig())


def test_a_base_of_inference_mode_is_refused_and_adapters_of_it_are_made_outside(tokenizer, saved):
    with torch.inference_mode():
        base = AutoModelForCausalLM.from_config(tiny_config("llama"))
    for wrapped in (
        lambda base: wrap(base, tokenizer),
        lambda base: AlphaEditModel.from_pretrained(base, saved, tokenizer=tokenizer),
    ):
        with pytest.raises(ValueError, match=r"within torch\.inference_mode.*torch\.no_grad"):
            wrapped(base)
        usual = tiny_model("llama")
        with torch.inference_mode():
            model = wrapped(usual)
            model.add_adapter("b")
            model.load_adapter(saved, "c")
        model.resources.null_space = NullSpace.identity({0: 96, 1: 96})
        for name in ("default", "b", "c"):
            model.set_adapter(name)
            model.edit(EDITS[2:3], progress=False)


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "a\\b", None, 3])
def test_a_name_that_no_adapter_can_have(model, saved, name):
    before, base = weights(model), tiny_model("llama")
    for named in (
        lambda: get_alphaedit_model(base, AlphaEditConfig(**SETTINGS), adapter_name=name),
        lambda: AlphaEditModel.from_pretrained(base, saved, adapter_name=name),
        lambda: model.add_adapter(name),
        lambda: model.load_adapter(saved, name),
    ):
        with pytest.raises(ValueError, match=r"adapter_name=.* cannot name an adapter.*'people'"):
            named()
    assert same_bits(weights(model), before)
    assert list(model.peft_config) == ["default"]
    wrap(base, model.resources.tokenizer)  # nothing was left in it


def test_an_unloaded_model_takes_no_adapter(model, saved):
    base = model.unload()
    for take in (lambda: model.add_adapter("b"), lambda: model.load_adapter(saved, "b")):
        with pytest.raises(RuntimeError, match=r"was unloaded.*wrap its base again"):
            take()
    assert model.edits == []
    wrap(base, model.resources.tokenizer)
