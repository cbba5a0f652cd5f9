from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from alphaedit_peft.architecture import describe
from alphaedit_peft.fingerprint import BaseFingerprint, fingerprint, require_same_base
from tests.conftest import PEFT_ALONE


def gpt2(seed: int = 0, **sizes: int) -> GPT2LMHeadModel:
    shape = {"n_layer": 3, "n_embd": 8, "n_head": 2, "vocab_size": 20, "n_positions": 16} | sizes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(**shape))


def of(model: nn.Module, last_layer: int = 1) -> BaseFingerprint:
    return fingerprint(model, last_layer, describe(model))


def test_the_same_for_float32_and_bfloat16_loads(tmp_path):
    gpt2().save_pretrained(tmp_path)
    loads = [
        of(GPT2LMHeadModel.from_pretrained(tmp_path, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert loads[0] == loads[1]
    assert loads[0].verifiable


def test_the_same_for_sharded_loads(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert of(GPT2LMHeadModel.from_pretrained(tmp_path)) == of(model)


def test_float16_agrees_where_it_holds_the_bfloat16_values_exactly():
    model = gpt2().bfloat16()
    before = of(model)
    assert of(model.to(torch.float16)) == before


@PEFT_ALONE
@pytest.mark.parametrize("target", ["c_fc", "wte"])
def test_the_same_within_a_peft_wrapper(target):
    model = gpt2()
    before, architecture = of(model), describe(model)
    wrapped = get_peft_model(
        model, LoraConfig(target_modules=[target], fan_in_fan_out=target == "c_fc")
    )
    assert fingerprint(wrapped, 1, architecture) == before
    assert fingerprint(wrapped.get_base_model(), 1, architecture) == before


def test_other_weights_are_told_from_which_block_on():
    model = gpt2()
    before = of(model)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.mul_(1.1)
    assert before.matches(of(model)) is False
    assert before.describe_mismatch(of(model)) == "the weights differ from block 1 on"
    assert "from the embeddings on" in before.describe_mismatch(of(gpt2(seed=1)))


def test_blocks_above_the_last_layer_do_not_count():
    model = gpt2()
    before = of(model)
    with torch.no_grad():
        model.transformer.h[2].mlp.c_fc.weight.mul_(1.1)
    assert before.matches(of(model)) is True
    assert before.describe_mismatch(of(model)) == "no difference"


def test_other_last_layers_are_compared_over_the_blocks_that_both_cover():
    model = gpt2()
    assert of(model, 0).matches(of(model, 2)) is True
    assert of(gpt2(seed=1), 0).matches(of(model, 2)) is False


def test_other_shapes_are_named():
    assert of(gpt2()).matches(of(gpt2(n_embd=16))) is False
    text = of(gpt2()).describe_mismatch(of(gpt2(n_embd=16)))
    assert text == "hidden is 8 here, 16 there, intermediate is 32 here, 64 there"


def test_shape_of_a_llama():
    shape = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 20}
    found = of(LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **shape)))
    assert found.shape == {
        "model_type": "llama",
        "layers": 2,
        "hidden": 8,
        "intermediate": 12,
        "heads": 2,
        "vocab": 20,
    }


def offloaded(model: GPT2LMHeadModel) -> None:
    model.transformer.h[0].to("meta")


def quantised(model: GPT2LMHeadModel) -> None:
    weight = torch.zeros(4, dtype=torch.int8)
    model.transformer.h[0].mlp.c_fc.weight = nn.Parameter(weight, requires_grad=False)


def quantised_into_buffers(model: GPT2LMHeadModel) -> None:
    model.config.quantization_config = {"quant_method": "gptq"}


@pytest.mark.parametrize("change", [offloaded, quantised, quantised_into_buffers])
def test_unreadable_weights_make_it_unverifiable(change):
    model = gpt2()
    architecture = describe(model)
    change(model)
    found = fingerprint(model, 1, architecture)
    assert not found.verifiable
    assert found.matches(of(gpt2())) is None
    assert "quantised or offloaded" in found.describe_mismatch(of(gpt2()))
    assert found.matches(of(gpt2(n_embd=16))) is False
    with pytest.warns(UserWarning, match="cannot verify that this pack belongs to this model"):
        require_same_base(of(gpt2()), found, "this pack")


def test_requiring_the_same_base():
    require_same_base(of(gpt2()), of(gpt2()), "this pack")
    with pytest.raises(ValueError, match="this pack was made for another model: the weights"):
        require_same_base(of(gpt2(seed=1)), of(gpt2()), "this pack")


@pytest.mark.parametrize("digest", ["0" * 16, None])
def test_json_round_trip(digest):
    found = replace(of(gpt2(), 0), digest=digest)
    assert BaseFingerprint.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_damaged_json_is_refused():
    values = of(gpt2()).to_json()
    with pytest.raises(ValueError, match=r"fields of fingerprint \['last_layer'\] are missing"):
        BaseFingerprint.from_json({k: v for k, v in values.items() if k != "last_layer"})
    with pytest.raises(ValueError, match=r"'abc' does not cover .* 0\.\.1"):
        BaseFingerprint.from_json(values | {"digest": "abc"})


def test_last_layer_outside_the_model():
    with pytest.raises(ValueError, match=r"last_layer=3 is outside .* 3 blocks; use 0\.\.2"):
        of(gpt2(), 3)
