"""Bases of 8 and 4 bits: edited and used unmerged, saved and loaded, and never merged into."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from alphaedit_peft import (
    AlphaEditConfig,
    AlphaEditModel,
    Edit,
    EditPack,
    NullSpace,
    embedded,
    get_alphaedit_model,
)
from alphaedit_peft.devices import SWITCH, differentiable
from alphaedit_peft.model import lora_layer
from tests.conftest import PEFT_ALONE, tiny_model
from tests.model.test_model import same_bits
from tests.shared import embedded_edits

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not here"
)
UNVERIFIED = "ignore:cannot verify that this"
QUANTISED = {
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "4bit, scales of 8": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
}


def edits(count: int, start: int = 0) -> list[Edit]:
    return embedded_edits(70, 7)[start : start + count]


def quantised(bits: str):
    if not (embedded.folder() / "model.safetensors").is_file():
        pytest.skip("the embedded model's weights are not here")
    return AutoModelForCausalLM.from_pretrained(
        embedded.folder(),
        quantization_config=BitsAndBytesConfig(**QUANTISED[bits]),
        device_map="cpu",
        dtype=torch.bfloat16,
    ).eval()


def setting() -> dict:
    """What editing needs besides the base."""
    space = NullSpace.identity(dict.fromkeys([0, 1], 1024))
    return {"tokenizer": embedded.load()[1], "null_space": space}


@torch.no_grad()
def logits(model, tokenizer) -> torch.Tensor:
    ids = tokenizer(edits(1)[0].question, return_tensors="pt", return_token_type_ids=False)
    return model(**ids).logits


def says(model, tokenizer, edit: Edit) -> str:
    ids = tokenizer(edit.question, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        return tokenizer.decode(int(model(**ids).logits[0, -1].argmax())).strip()


@pytest.fixture(scope="module", params=QUANTISED)
def edited(request, tmp_path_factory):
    """(bits, model with two edits, its tokenizer, its pack, logits of the base before)."""
    base, needed = quantised(request.param), setting()
    before = logits(base, needed["tokenizer"])  # a first use, after which 4-bit weights are packed
    config = AlphaEditConfig(rewrite_layers=[0, 1], contexts=[])
    model = get_alphaedit_model(base, config, **needed)
    model.edit(edits(2), progress=False)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model, needed["tokenizer"], folder, before


@pytest.mark.slow
@needs_bitsandbytes
def test_edits_take_and_the_base_is_left_alone(edited):
    bits, model, tokenizer, _, before = edited
    kind = "Linear8bitLt" if bits == "8bit" else "Linear4bit"
    for layer in lora_layer.lora_layers(model).values():
        assert type(layer.get_base_layer()).__name__ == kind
        assert layer.lora_A["default"].weight.dtype == torch.float32
    assert [says(model, tokenizer, edit) for edit in edits(2)] == [e.target_new for e in edits(2)]
    with model.disable_adapter():
        assert torch.equal(logits(model, tokenizer), before)


@PEFT_ALONE
@pytest.mark.slow
@needs_bitsandbytes
def test_a_pack_comes_back_with_a_warning_that_its_base_cannot_be_verified(edited):
    bits, model, tokenizer, folder, _ = edited
    assert EditPack.from_pretrained(folder).base.digest is None
    with pytest.warns(UserWarning, match=r"cannot verify that this pack.* quantised or offloaded"):
        loaded = AlphaEditModel.from_pretrained(quantised(bits), folder, **setting())
    assert torch.equal(logits(loaded, tokenizer), logits(model, tokenizer))
    plain = PeftModel.from_pretrained(quantised(bits), folder)
    assert torch.equal(logits(plain, tokenizer), logits(model, tokenizer))
    loaded.edit(edits(1, start=2), progress=False)
    assert [says(loaded, tokenizer, edit) for edit in edits(3)] == [e.target_new for e in edits(3)]


@pytest.mark.slow
@needs_bitsandbytes
def test_merging_into_few_bits_is_refused_and_changes_nothing(edited):
    _, model, tokenizer, _, _ = edited
    before = {name: value.clone() for name, value in model.named_parameters()}
    used = logits(model, tokenizer)
    reason = r"quantised weight would round the edits.* load the base in bfloat16 and merge there"
    ways = (model.merge, model.merge_adapter, model.merge_and_unload, model.merge_errors)
    for merge in (*ways, model.base_model.merge_adapter, model.base_model.merge_and_unload):
        with pytest.raises(RuntimeError, match=reason):
            merge()
        assert not model.merged
    assert torch.equal(logits(model, tokenizer), used)
    assert same_bits(before, dict(model.named_parameters()))


@pytest.mark.slow
@needs_bitsandbytes
@pytest.mark.filterwarnings(UNVERIFIED)
def test_the_way_out_holds_edits_made_on_few_bits_merge_into_the_full_base(edited):
    _, _, tokenizer, folder, _ = edited
    full = AlphaEditModel.from_pretrained(embedded.load(torch.bfloat16)[0], folder)
    merged = full.merge_and_unload()
    assert [says(merged, tokenizer, edit) for edit in edits(2)] == [e.target_new for e in edits(2)]


@pytest.mark.slow
@needs_bitsandbytes
@pytest.mark.filterwarnings(UNVERIFIED)
@pytest.mark.parametrize("bits", QUANTISED)
def test_edits_made_on_the_full_base_hold_on_few_bits(bits, tmp_path):
    needed = setting()
    config = AlphaEditConfig(rewrite_layers=[0, 1], contexts=[])
    full = get_alphaedit_model(embedded.load(torch.bfloat16)[0], config, **needed)
    full.edit(edits(2), progress=False)
    full.save_pretrained(tmp_path)
    small = AlphaEditModel.from_pretrained(quantised(bits), tmp_path)
    tokenizer = needed["tokenizer"]
    assert [says(small, tokenizer, edit) for edit in edits(2)] == [e.target_new for e in edits(2)]


@needs_bitsandbytes
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("scales_of_8", [False, True])
def test_a_4bit_layer_gives_its_gradient_on_any_processor(used, scales_of_8):
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    how = {"compute_dtype": torch.bfloat16, "compress_statistics": scales_of_8}
    layer = Linear4bit(128, 64, bias=False, quant_type="nf4", **how)
    weight = layer.weight.detach().clone()
    layer = layer.to("cpu").eval()
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    if used:  # where the processor has the packed kernel, the weight is packed from here on
        with torch.no_grad():
            wanted = layer(x)
    before, x = layer.weight.data.clone(), x.requires_grad_()
    switch = getattr(layer, SWITCH)
    with differentiable(layer):
        found = layer(x)
        found.sum().backward()
    assert torch.equal(layer.weight.data, before)
    assert getattr(layer, SWITCH) == switch
    exact = weight.sum(0).expand(3, -1)
    assert (x.grad - exact).norm() < 0.15 * exact.norm()  # four bits, but its gradient
    if used:
        assert (found - wanted).norm() < 0.02 * wanted.norm()
        with torch.no_grad():
            assert torch.equal(layer(x), wanted)


def test_a_full_precision_model_is_left_as_it_is():
    model = tiny_model("llama")
    before = {name: vars(module).copy() for name, module in model.named_modules()}
    with differentiable(model):
        assert {name: vars(module) for name, module in model.named_modules()} == before
