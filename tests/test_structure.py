"""Blocks and rewrite modules are found in any make of model; what cannot be edited is told."""

from __future__ import annotations

import json
import runpy
import warnings
from types import SimpleNamespace

import accelerate
import pytest
import torch
import transformers
from torch import nn

from alphaedit_peft.structure import find_structure
from tests.conftest import ROOT, tiny_model

ZOO = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "figures" / "model_zoo.py")))

# model type -> by block the rewrite module within it, and whether its output is added as it is
FOUND = {
    "bloom": [("mlp.dense_4h_to_h", True)] * 5,
    "ctrl": [("ffn.2", True)] * 5,
    "gemma2": [("mlp.down_proj", False)] * 5,
    "olmo_hybrid": [("mlp.down_proj", k != 3) for k in range(5)],
    "deepseek_v3": [("mlp.down_proj", True)] + [("mlp.shared_experts.down_proj", True)] * 4,
    "llama4_text": [("feed_forward.shared_expert.down_proj", True)] * 5,
    "qwen2_moe": [("mlp.shared_expert.down_proj", False)] * 5,  # gated by token
    "jamba": [("feed_forward.down_proj", True), None] * 2 + [("feed_forward.down_proj", True)],
    "mimo_v2_flash": [("mlp.down_proj", True)] + [None] * 4,
    "recurrent_gemma": [("mlp_block.down_proj", True)] * 5,
    "mixtral": [None] * 5,
    "mamba": [None] * 5,
}


@pytest.mark.parametrize("kind", FOUND)
def test_rewrite_modules_are_found_block_by_block(kind):
    found = find_structure(ZOO.build(kind))
    assert len(found.blocks) == 5
    seen = [
        None if part is None else (part.module.removeprefix(f"{block}."), part.adds)
        for block, part in zip(found.blocks, found.rewrites, strict=True)
    ]
    assert seen == FOUND[kind]


def test_it_is_the_same_in_every_dtype_and_leaves_the_model_as_it_was():
    expected = find_structure(tiny_model("llama"))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = tiny_model("llama").to(dtype).train()
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        assert find_structure(model) == expected
        assert model.training
        assert not any(part._forward_hooks for part in model.modules())
        assert all(torch.equal(before[n], weight) for n, weight in model.state_dict().items())


def test_a_lora_around_the_module_is_seen_through():
    from peft import LoraConfig, get_peft_model

    model = tiny_model("gpt2")
    expected = find_structure(model)
    config = LoraConfig(r=2, target_modules=["c_proj", "c_attn"], fan_in_fan_out=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        get_peft_model(model, config)
    assert find_structure(model) == expected


@pytest.mark.parametrize("kind", ["gemma2", "llama"])
def test_offloaded_weights_are_proved_too(kind, tmp_path):
    model = ZOO.build(kind)
    expected = find_structure(model)
    accelerate.disk_offload(model, tmp_path)
    assert all(weight.is_meta for weight in model.model.layers.parameters())
    assert find_structure(model) == expected
    assert expected.rewrites[0].adds == (kind == "llama")


class Packed(nn.Module):
    """A linear layer whose weight has another name, as some quantised ones have."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed_weight", linear.weight.detach().clone())

    def forward(self, x):
        return nn.functional.linear(x, self.packed_weight)


def test_layers_with_packed_weights_are_seen():
    model = tiny_model("llama")
    expected = find_structure(model)
    for layer in model.model.layers:
        layer.mlp.down_proj = Packed(layer.mlp.down_proj)
    assert find_structure(model) == expected


def test_a_block_that_does_not_run_by_itself_is_refused():
    model = tiny_model("llama")
    ran, own = [], model.model.layers[0].forward

    def once(*args, **kwargs):
        ran.append(1)
        if len(ran) > 2:  # the two passes of the model
            raise RuntimeError("no state left")
        return own(*args, **kwargs)

    model.model.layers[0].forward = once
    message = r"block model\.layers\.0 of Llama.* does not run by itself .*no state left.*cannot be"
    with pytest.raises(ValueError, match=message):
        find_structure(model)


def test_memory_that_runs_out_is_told_as_such():
    model = tiny_model("llama")

    def full(**_):
        raise torch.OutOfMemoryError("no room")

    model.forward = full
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        find_structure(model)


def test_what_does_not_run_on_token_ids_is_refused():
    model = tiny_model("llama")
    model.forward = lambda pixel_values: None
    with pytest.raises(ValueError, match="LlamaForCausalLM does not run on token ids alone: TypeE"):
        find_structure(model)


def test_blocks_that_run_twice_are_refused():
    model = tiny_model("llama")
    layers = model.model.layers
    own = layers[3].forward
    layers[3].forward = lambda hidden, **more: own(layers[2](hidden, **more), **more)
    with pytest.raises(ValueError, match=r"runs its blocks model\.layers more than once in a pass"):
        find_structure(model)


def test_a_model_without_a_stack_is_refused():
    model = tiny_model("llama")
    kept = list(model.model.layers)
    model.model.layers = nn.Sequential(*kept)
    with pytest.raises(ValueError, match="has no stack of decoder blocks; name its parts"):
        find_structure(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ZOO.ENTRIES)
def test_the_zoo_is_as_the_page_says(kind):
    stored = json.loads((ROOT / "docs" / "data" / "model_zoo.json").read_text(encoding="utf-8"))
    if stored["transformers"] != transformers.__version__:
        pytest.skip(f"the page is of transformers {stored['transformers']}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ZOO.judge(kind) == stored["models"][kind]


def test_the_page_is_made_from_its_data():
    stored = json.loads((ROOT / "docs" / "data" / "model_zoo.json").read_text(encoding="utf-8"))
    written = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert written == ZOO.page(stored["models"], stored["transformers"])
    assert set(stored["models"]) == set(ZOO.ENTRIES) or stored["transformers"] != (
        transformers.__version__
    )
