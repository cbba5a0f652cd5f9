"""Several adapters in one model, adapters that are not packs, and arguments that do not fit."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from alphaedit_peft import AlphaEditConfig, AlphaEditModel, EditPack, NullSpace, get_alphaedit_model
from alphaedit_peft.pack import PackError
from tests.conftest import PEFT_ALONE, tiny_model
from tests.model.test_model import EDITS, logits, same_bits, weights, wrap

pytestmark = PEFT_ALONE
WEIGHTS = "adapter_model.safetensors"


def save_lora(folder: Path, **settings) -> Path:
    """A LoRA with random factors, as PEFT saves it."""
    options = {"r": 4, "target_modules": ["down_proj"], "init_lora_weights": False} | settings
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", **options))
    model.save_pretrained(folder)
    return folder


def edited(tokenizer, edits, **settings) -> AlphaEditModel:
    model = wrap(tiny_model("llama"), tokenizer, **settings)
    model.edit(edits, progress=False)
    return model


def load(base, folder, **options) -> AlphaEditModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*plain LoRA", UserWarning)
        return AlphaEditModel.from_pretrained(base, folder, **options)


@pytest.fixture
def plain(tmp_path) -> Path:
    return save_lora(tmp_path / "plain")


@pytest.fixture
def second(tokenizer, tmp_path) -> Path:
    edited(tokenizer, EDITS[2:]).save_pretrained(tmp_path / "second")
    return tmp_path / "second"


@pytest.mark.filterwarnings("ignore:.*lora_bias=True", "ignore:.*LoRA tensor.s. have invalid shape")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"use_dora": True}, "is a DoRA"), ({"lora_bias": True}, "has a LoRA bias")],
)
def test_more_than_plain_lora_is_used_but_not_merged(settings, reason, tokenizer, tmp_path):
    base = tiny_model("llama")
    before = weights(base)
    model = wrap(base, tokenizer)
    model.load_adapter(str(save_lora(tmp_path, **settings)), "style")
    model.set_adapter("style")
    used = logits(model, tokenizer)
    for merge in (model.merge, model.base_model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match=f"adapter 'style' {reason}.*PeftModel"):
            merge()
        assert not model.merged
    assert torch.equal(logits(model, tokenizer), used)
    model.set_adapter("default")
    model.merge()
    assert same_bits(weights(model.unload()), before)


@pytest.mark.parametrize("targets", [["down_proj"], ["q_proj"], r".*layers\.1\.mlp\.down_proj"])
@pytest.mark.parametrize("rslora", [False, True])
def test_plain_lora_computes_what_peft_computes(targets, rslora, tokenizer, tmp_path):
    folder = save_lora(tmp_path, target_modules=targets, use_rslora=rslora)
    wanted = logits(PeftModel.from_pretrained(tiny_model("llama"), folder), tokenizer)
    model = load(tiny_model("llama"), folder)
    assert torch.equal(logits(model, tokenizer), wanted)
    model.merge()
    assert torch.allclose(logits(model, tokenizer), wanted, atol=1e-4)


def to_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def to_nan(folder):
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, folder / WEIGHTS)


def to_shorter(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-50])


def to_ia3(folder):
    shutil.rmtree(folder)
    config = IA3Config(
        task_type="CAUSAL_LM", target_modules=["down_proj"], feedforward_modules=["down_proj"]
    )
    get_peft_model(tiny_model("llama"), config).save_pretrained(folder)


def to_dora(folder):
    save_lora(folder, use_dora=True)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (to_pickle, "adapter_model.safetensors: the file is missing"),
        (to_nan, "holds NaN or infinity"),
        (to_shorter, "not a safetensors file"),
        (to_ia3, "peft_type='IA3' is not 'LORA'"),
        (to_dora, "use_dora=True is more than plain LoRA"),
    ],
)
def test_bad_adapter_folder_is_refused_before_the_base_is_touched(spoil, reason, plain, tmp_path):
    whole = shutil.copytree(plain, tmp_path / "whole")
    spoil(plain)
    base = tiny_model("llama")
    before = weights(base)
    with pytest.raises(PackError, match=reason):
        AlphaEditModel.from_pretrained(base, plain)
    assert same_bits(weights(base), before)
    assert not hasattr(base, "peft_config")
    load(base, whole)


def test_plain_lora_of_another_base_is_refused(plain):
    base = tiny_model("gpt2")
    with pytest.raises(PackError, match=r"down_proj, which this GPT2LMHeadModel has not"):
        AlphaEditModel.from_pretrained(base, plain)
    assert not hasattr(base, "peft_config")


def test_failure_while_loading_leaves_a_bare_base(plain, monkeypatch):
    base = tiny_model("llama")
    before = weights(base)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AlphaEditModel, "load_adapter", interrupted)
        with pytest.raises(KeyboardInterrupt):
            AlphaEditModel.from_pretrained(base, plain)
    assert same_bits(weights(base), before)
    load(base, plain)


def test_folder_without_adapter_and_no_folder_are_not_found(tmp_path):
    for path in (tmp_path, tmp_path / "none", str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError):
            AlphaEditModel.from_pretrained(tiny_model("llama"), path)


@pytest.mark.parametrize("model_id", [None, 5])
def test_model_id_must_be_a_path(model_id, tokenizer):
    with pytest.raises(TypeError, match=f"model_id={model_id} is a .*pass the pack's folder"):
        AlphaEditModel.from_pretrained(tiny_model("llama"), model_id)
    with pytest.raises(TypeError, match=f"model_id={model_id} is a .*pass the pack's folder"):
        wrap(tiny_model("llama"), tokenizer).load_adapter(model_id, "second")


def test_loaded_pack_brings_its_edits_and_goes_on(tokenizer, second, tmp_path):
    model = edited(tokenizer, EDITS[:2])
    first = logits(model, tokenizer)
    model.load_adapter(str(second), "second")
    assert model.edits == EDITS[:2]
    assert torch.equal(logits(model, tokenizer), first)
    model.set_adapter("second")
    assert model.edits == EDITS[2:]
    alone = edited(tokenizer, EDITS[2:])
    assert torch.equal(logits(model, tokenizer), logits(alone, tokenizer))
    for each in (model, alone):
        each.edit(EDITS[:1], progress=False)
    assert torch.equal(logits(model, tokenizer), logits(alone, tokenizer))
    model.save_pretrained(tmp_path / "saved")
    assert EditPack.from_pretrained(tmp_path / "saved").digest() == alone.to_pack().digest()
    model.rollback()
    assert model.edits == EDITS[2:]
    model.set_adapter("default")
    assert model.edits == EDITS[:2]


def test_loading_over_an_adapter_replaces_its_edits(tokenizer, second):
    model = edited(tokenizer, EDITS[:2])
    model.load_adapter(second, "default")
    assert model.edits == EDITS[2:]
    assert model.edit_adapters["default"].snapshots == []
    assert torch.equal(
        logits(model, tokenizer), logits(load(tiny_model("llama"), second), tokenizer)
    )


def test_loading_over_an_adapter_that_fails_leaves_its_edits(tokenizer, second, monkeypatch):
    model = edited(tokenizer, EDITS[:2])
    before, adapter = weights(model), model.edit_adapters["default"]

    def fails(*args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("alphaedit_peft.model.load._hold_pack", fails)
        with pytest.raises(MemoryError):
            model.load_adapter(second, "default")
    assert same_bits(weights(model), before)
    assert model.edit_adapters["default"] is adapter
    assert model.edits == EDITS[:2]


def test_adapters_that_cannot_be_edited_have_no_edits(tokenizer, second, plain, tmp_path):
    edited(tokenizer, EDITS[:1], rewrite_layers=[0]).save_pretrained(tmp_path / "layer 0")
    model = edited(tokenizer, EDITS[:2])
    model.load_adapter(plain, "plain")
    model.load_adapter(tmp_path / "layer 0", "layer 0")
    model.load_adapter(second, "trained", is_trainable=True)
    for name in ("plain", "layer 0", "trained"):
        model.set_adapter(name)
        assert model.edits == []
        with pytest.raises(RuntimeError, match=f"adapter '{name}' is a plain LoRA"):
            model.edit(EDITS, progress=False)


def test_pack_of_another_base_is_not_loaded_beside(tokenizer, second):
    model = wrap(tiny_model("llama", seed=1), tokenizer)
    with pytest.raises(ValueError, match="this pack"):
        model.load_adapter(second, "second")
    assert list(model.peft_config) == ["default"]
    model.load_adapter(second, "second", allow_base_mismatch=True)
    model.set_adapter("second")
    assert model.edits == EDITS[2:]


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_merge_adds_the_active_adapter_to_what_is_merged(tokenizer, second):
    model = edited(tokenizer, EDITS[:2])
    base = model.get_base_model()
    before = weights(model)
    model.load_adapter(second, "second")
    model.base_model.merge_adapter(adapter_names=["second"])
    one = weights(base)
    with model.disable_adapter():
        assert all(torch.equal(value, weights(model)[key]) for key, value in before.items())
    assert same_bits(weights(base), one)
    model.merge()
    both = weights(base)
    assert not same_bits(both, one)
    model.merge()
    with model.disable_adapter():
        pass
    assert same_bits(weights(base), both)
    model.unmerge()
    assert all(torch.equal(value, weights(model)[key]) for key, value in before.items())


def test_loaded_model_is_in_evaluation_mode_and_wrapped_keeps_its_base_mode(
    tokenizer, second, plain
):
    for folder in (second, plain):
        assert not load(tiny_model("llama").train(), folder).training
    assert get_alphaedit_model(tiny_model("llama").train(), AlphaEditConfig()).training


def test_save_takes_pefts_arguments_where_they_fit(tokenizer, second, tmp_path):
    model = load(tiny_model("llama"), second)
    model.save_pretrained(tmp_path / "a", safe_serialization=True, selected_adapters=["default"])
    assert EditPack.from_pretrained(tmp_path / "a").edits == EDITS[2:]
    with pytest.raises(ValueError, match=r"safe_serialization=False .* safetensors only"):
        model.save_pretrained(tmp_path / "b", safe_serialization=False)
    with pytest.raises(ValueError, match=r"selected_adapters=\['other'\] .* \['default'\]; name"):
        model.save_pretrained(tmp_path / "b", selected_adapters=["other"])
    assert not (tmp_path / "b").exists()


def test_arguments_of_another_type_are_refused(second, tmp_path):
    with pytest.raises(TypeError, match="config is a dict, not an AlphaEditConfig"):
        get_alphaedit_model(tiny_model("llama"), {})
    with pytest.raises(TypeError, match="config is a LoraConfig, not an AlphaEditConfig"):
        get_alphaedit_model(tiny_model("llama"), LoraConfig())
    with pytest.raises(TypeError, match="base model is 'gpt2'; pass a loaded model"):
        get_alphaedit_model("gpt2", AlphaEditConfig())
    for space in ("space", tmp_path):
        with pytest.raises(
            TypeError, match=r"NullSpace.from_pretrained\(path\).*config.null_space"
        ):
            get_alphaedit_model(tiny_model("llama"), AlphaEditConfig(), null_space=space)
        with pytest.raises(
            TypeError, match=r"NullSpace.from_pretrained\(path\).*config.null_space"
        ):
            AlphaEditModel.from_pretrained(tiny_model("llama"), second, null_space=space)
    with pytest.raises(TypeError, match="key_moments"):
        get_alphaedit_model(
            tiny_model("llama"), AlphaEditConfig(), key_moments=NullSpace.identity({0: 96})
        )
