"""Packs load where this package is not installed: PEFT, AutoPeft, transformers."""

from __future__ import annotations

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.edits import Edit
from alphaedit_peft.pack import EditPack, EditRecord, read_plain_lora
from tests.conftest import PEFT_ALONE

pytestmark = PEFT_ALONE
TOKENS = torch.arange(12).reshape(2, 6)
# family, (d_out, d_in), rewrite module, whether the weight is stored transposed
FAMILIES = {
    "gpt2": ((16, 64), "transformer.h.{}.mlp.c_proj", True),
    "llama": ((16, 40), "model.layers.{}.mlp.down_proj", False),
}


def base_model(family):
    torch.manual_seed(0)
    if family == "gpt2":
        config = GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=50, n_positions=16)
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=50,
    )
    return LlamaForCausalLM(config).eval()


def edit_pack(family, base, rows=3):
    (d_out, d_in), module, transposed = FAMILIES[family]
    random = torch.Generator().manual_seed(1)
    factors = {
        module.format(i): LowRankDelta(
            torch.randn(rows, d_in, generator=random), torch.randn(d_out, rows, generator=random)
        )
        for i in (0, 1)
    }
    return EditPack(
        factors=factors,
        config=AlphaEditConfig(rewrite_layers=[0, 1], base_model_name_or_path=str(base)),
        records=[EditRecord(Edit(f"S{i}", "{} is", "x"), i) for i in range(rows)],
        targets=torch.randn(rows, d_out, generator=random),
        fan_in_fan_out=transposed,
    )


@torch.no_grad()
def edited_logits(model, pack):
    for name, delta in pack.factors.items():
        weight = model.get_submodule(name).weight
        dense = delta.dense()
        weight += dense.T if pack.fan_in_fan_out else dense
    return model(TOKENS).logits


@torch.no_grad()
def logits(model):
    return model.eval()(TOKENS).logits


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def base(family, tmp_path):
    base_model(family).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_three_loaders_give_the_edited_model(family, base, tmp_path):
    pack = edit_pack(family, base)
    pack.save_pretrained(tmp_path / "pack")
    expected = edited_logits(AutoModelForCausalLM.from_pretrained(base), pack)
    original = logits(AutoModelForCausalLM.from_pretrained(base))
    assert (expected - original).abs().max() > 0.1

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "pack")
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "pack")
    native = AutoModelForCausalLM.from_pretrained(base)
    native.load_adapter(str(tmp_path / "pack"))
    for model in (plain, auto, native):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    with plain.disable_adapter():
        assert torch.equal(logits(plain), original)


def test_an_empty_pack_changes_nothing(family, base, tmp_path):
    edit_pack(family, base, rows=0).save_pretrained(tmp_path / "pack")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "pack")
    original = AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(logits(model), logits(original))


def test_peft_saves_the_same_adapter(family, base, tmp_path):
    edit_pack(family, base).save_pretrained(tmp_path / "pack")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "pack")
    model.save_pretrained(tmp_path / "again")
    ours, theirs = (
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("pack", "again")
    )
    assert set(theirs.pop("target_modules")) == set(ours.pop("target_modules"))
    assert ours == theirs
    once, twice = read_plain_lora(tmp_path / "pack"), read_plain_lora(tmp_path / "again")
    assert all(torch.equal(once[name].B, twice[name].B) for name in once)
    assert all(torch.equal(once[name].A, twice[name].A) for name in once)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_plain_lora_is_read_with_its_scaling(base, family, tmp_path, rslora):
    module = FAMILIES[family][1].rpartition(".")[2]
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=[module],
        use_rslora=rslora,
        init_lora_weights=False,
        fan_in_fan_out=family == "gpt2",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "plain")
    name = FAMILIES[family][1].format(1)
    delta = read_plain_lora(tmp_path / "plain")[name].dense()
    layer = model.get_base_model().get_submodule(name)
    wanted = layer.get_delta_weight("default")
    torch.testing.assert_close(delta, wanted.T if family == "gpt2" else wanted)
    with pytest.raises(FileNotFoundError, match=r"is no edit pack"):
        EditPack.from_pretrained(tmp_path / "plain")
