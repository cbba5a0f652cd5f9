"""The config: what it refuses, what ``resolve`` fills in, and its way to disk and back."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from alphaedit_peft import AlphaEditConfig
from alphaedit_peft.architecture import default_rewrite_layers
from alphaedit_peft.settings import EditOptions
from tests.conftest import PEFT_ALONE, tiny_model

PAPER_SHAPES = {
    "llama-3-8b": hf.LlamaConfig(
        num_hidden_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_key_value_heads=8,
        vocab_size=320,
    ),
    "gpt-j-6b": hf.GPTJConfig(vocab_size=320),
    "gpt2-xl": hf.GPT2Config(n_layer=48, n_embd=1600, n_head=25, vocab_size=320),
}
COMMON = {
    "clamp_factor": 0.75,
    "kl_factor": 0.0625,
    "weight_decay": 0.5,
    "ridge": 10.0,
    "ridge_mode": "absolute",
    "threshold": 2e-2,
    "threshold_mode": "absolute",
    "learning_rate_mode": "absolute",
}
PAPER = {
    "llama-3-8b": ([4, 5, 6, 7, 8], "model.layers.{}.mlp.down_proj", 25, 0.1, 15_000),
    "gpt-j-6b": ([3, 4, 5, 6, 7, 8], "transformer.h.{}.mlp.fc_out", 25, 0.5, 15_000),
    "gpt2-xl": ([13, 14, 15, 16, 17], "transformer.h.{}.mlp.c_proj", 20, 0.5, 20_000),
}


@pytest.fixture(scope="module", params=PAPER_SHAPES)
def paper_model(request):
    """A model of the paper's shape without memory, and its name."""
    with torch.device("meta"):
        return request.param, AutoModelForCausalLM.from_config(PAPER_SHAPES[request.param])


def values(config: AlphaEditConfig, names) -> dict:
    return {name: getattr(config, name) for name in names}


def test_paper_preset_holds_the_papers_numbers(paper_model):
    name, model = paper_model
    layers, module, steps, rate, weight = PAPER[name]
    full, architecture = AlphaEditConfig(preset="paper").resolve(model)
    assert full.rewrite_layers == layers
    assert architecture.rewrite_name(0) == module.replace("{}", "0")
    assert architecture.conv1d == (name == "gpt2-xl")
    assert (full.steps, full.learning_rate, full.moment_weight) == (steps, rate, weight)
    assert values(full, COMMON) == COMMON


def test_auto_preset_is_relative_and_keeps_the_papers_layers(paper_model):
    name, model = paper_model
    full, _ = AlphaEditConfig().resolve(model)
    assert full.rewrite_layers == PAPER[name][0]
    assert (full.ridge, full.ridge_mode) == (0.05, "relative")
    assert (full.threshold, full.threshold_mode) == (0.02, "energy")
    assert full.learning_rate_mode == "relative"
    assert full.moment_weight is None  # decided at the first edits, by their keys


@pytest.mark.parametrize("preset", ["auto", "paper"])
def test_other_models_get_layers_by_the_depth_rule(preset):
    full, architecture = AlphaEditConfig(preset=preset).resolve(tiny_model("llama"))
    assert full.rewrite_layers == list(default_rewrite_layers(architecture.num_blocks)) == [0, 1]
    assert None not in values(full, [*COMMON, "steps", "learning_rate"]).values()
    assert full.moment_weight == {"auto": None, "paper": 15_000}[preset]


def test_what_the_user_sets_wins(paper_model):
    set_here = {"rewrite_layers": [2, 0], "ridge": 3.0, "ridge_mode": "relative", "steps": 7}
    config = AlphaEditConfig(preset="paper", clamp_factor=2.5, **set_here)
    full, _ = config.resolve(paper_model[1])
    assert values(full, set_here) == set_here | {"rewrite_layers": [0, 2]}
    assert full.clamp_factor == 2.5
    assert config.rewrite_layers == [2, 0]  # resolve gives a new value
    assert config.learning_rate is None


def test_resolve_refuses_layers_outside():
    with pytest.raises(ValueError, match=r"rewrite_layers=\[40\] is outside this model's 4 blocks"):
        AlphaEditConfig(rewrite_layers=[40]).resolve(tiny_model("gpt2"))


def test_resolve_takes_the_bases_name():
    model = tiny_model("gpt2")
    assert AlphaEditConfig().resolve(model)[0].base_model_name_or_path is None
    model.config._name_or_path = "some/base"
    assert AlphaEditConfig().resolve(model)[0].base_model_name_or_path == "some/base"
    named = AlphaEditConfig(base_model_name_or_path="mine")
    assert named.resolve(model)[0].base_model_name_or_path == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "fast"}, r"preset='fast' is unknown; use one of \('auto', 'paper'\)"),
        ({"objective": "rome"}, r"objective='rome' is unknown; use one of \('alphaedit', 'memit'"),
        ({"on_conflict": None}, r"on_conflict=None is unknown"),
        ({"ridge": 1, "ridge_mode": "energy"}, r"ridge_mode='energy' is unknown"),
        ({"threshold": 1, "threshold_mode": "svd"}, r"threshold_mode='svd' is unknown"),
        ({"ridge_mode": "absolute"}, r"ridge_mode='absolute' says how to read ridge, which is not"),
        ({"threshold_mode": "rank"}, r"threshold_mode='rank' says how to read threshold"),
        ({"learning_rate_mode": "slow"}, r"learning_rate_mode='slow' is unknown"),
        ({"learning_rate_mode": "relative"}, r"says how to read learning_rate, which is not set"),
        ({"ridge": -1}, r"ridge=-1 is outside 0..inf"),
        ({"ridge": float("nan")}, r"ridge=nan is outside"),
        ({"threshold": -0.1}, r"threshold=-0.1 is outside 0..inf"),
        ({"moment_weight": 0}, r"moment_weight=0 is outside"),
        ({"tokens_per_batch": 0}, r"tokens_per_batch=0 is outside 1..inf"),
        ({"target_tokens": 1.5}, r"target_tokens=1.5 must be a whole number"),
        ({"steps": 0}, r"steps=0 is outside 1..100000"),
        ({"steps": 2.5}, r"steps=2.5 must be a whole number"),
        ({"rollback_depth": float("inf")}, r"rollback_depth=inf must be a whole number"),
        ({"num_contexts": True}, r"num_contexts=True must be a number"),
        ({"learning_rate": "0.1"}, r"learning_rate='0.1' must be a number"),
        ({"learning_rate": 0}, r"learning_rate=0 is outside"),
        ({"clamp_factor": 0}, r"clamp_factor=0 is outside"),
        ({"kl_factor": -1}, r"kl_factor=-1 is outside 0..inf"),
        ({"weight_decay": -1}, r"weight_decay=-1 is outside"),
        ({"stop_loss": -1}, r"stop_loss=-1 is outside"),
        ({"num_contexts": 1001}, r"num_contexts=1001 is outside 0..1000"),
        ({"context_length": 0}, r"context_length=0 is outside 1..1000"),
        ({"key_cosine": 1.1}, r"key_cosine=1.1 is outside 0.5..1.0"),
        ({"max_hidden_ratio": 0.5}, r"max_hidden_ratio=0.5 is outside 1..inf, or 0 for off"),
        ({"norm_guard": 0.5}, r"norm_guard=0.5 is outside 1..inf, or 0 for off"),
        ({"base_model_name_or_path": 7}, r"base_model_name_or_path=7 must be of type"),
        ({"revision": 7}, r"revision=7 must be of type"),
        *(
            ({name: float("inf")}, rf"{name}=inf is outside the finite numbers")
            for name in ("ridge", "norm_guard", "threshold", "moment_weight", "learning_rate")
        ),
        *(
            ({name: float("inf")}, rf"{name}=inf is outside the finite numbers")
            for name in ("clamp_factor", "kl_factor", "weight_decay", "stop_loss")
        ),
        ({"max_hidden_ratio": float("inf")}, r"max_hidden_ratio=inf is outside the finite"),
        ({"tokens_per_batch": float("inf")}, r"tokens_per_batch=inf must be a whole number"),
        ({"tokens_per_batch": 10**400}, r"is outside the finite numbers"),
        ({"ridge": -float("inf")}, r"ridge=-inf is outside"),
        ({"rewrite_layers": []}, r"rewrite_layers=\[\] must be a list of block numbers"),
        ({"rewrite_layers": 4}, r"rewrite_layers=4 must be a list of block numbers, such as"),
        ({"rewrite_layers": [4.0]}, r"rewrite_layers=\[4.0\] must be"),
        ({"rewrite_layers": [True]}, r"rewrite_layers=\[True\] must be"),
        ({"rewrite_layers": "456"}, r"rewrite_layers='456' must be"),
        ({"contexts": "The."}, r"contexts='The.' must be of type list"),
        ({"contexts": [1]}, r"contexts=\[1\] must be a list of texts"),
        ({"contexts": ["The. {}"]}, r"contexts=\['The. \{\}'\] hold '\{\}'.*leave the"),
        ({"kl_prompt": "it is a"}, r"kl_prompt='it is a' needs one '\{\}'"),
        ({"kl_prompt": "{} {}"}, r"kl_prompt='\{\} \{\}' needs one '\{\}'"),
        ({"history": "no"}, r"history='no' must be of type"),
        ({"separator": None}, r"separator=None must be of type"),
        ({"seed": 1.5}, r"seed=1.5 must be of type"),
    ],
    ids=str,
)
def test_values_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        AlphaEditConfig(**changes)


def test_projection_goes_with_the_objective_unless_set():
    assert AlphaEditConfig().projects
    assert not AlphaEditConfig(objective="memit").projects
    assert AlphaEditConfig(objective="memit", projection=True).projects


def test_it_is_a_peft_config():
    config = AlphaEditConfig()
    assert isinstance(config, PeftConfig)
    assert not isinstance(config, LoraConfig)
    assert config.task_type == "CAUSAL_LM"


def test_every_field_says_what_it_is():
    own = set(AlphaEditConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    assert all(AlphaEditConfig.__dataclass_fields__[name].metadata["help"] for name in own)


OTHER = {
    "preset": "paper",
    "rewrite_layers": [1, 2],
    "ridge": 0.25,
    "ridge_mode": "relative",
    "contexts": ["naïve\u2028", ""],
    "base_model_name_or_path": "some/base",
    "revision": "v1",
}


def test_json_and_back():
    config = AlphaEditConfig(**OTHER)
    stored = json.loads(json.dumps(config.to_json()))
    assert AlphaEditConfig.from_json(stored) == config
    assert "peft_type" not in stored


def test_json_of_a_later_version():
    with pytest.raises(ValueError, match=r"config fields \['speed'\] are unknown here; update"):
        AlphaEditConfig.from_json({"speed": 1})


def test_peft_s_own_fields_are_no_settings_for_any_reader():
    """A sidecar is read without PEFT by commands, and with it by ``EditPack``: one law for both."""
    for kind in (EditOptions, AlphaEditConfig):
        with pytest.raises(ValueError, match=r"fields \['task_type'\] are unknown here"):
            kind.from_json({"task_type": "CAUSAL_LM"})


def test_folder_and_back(tmp_path):
    full, _ = AlphaEditConfig(**OTHER).resolve(tiny_model("llama"))
    full.save_pretrained(tmp_path)
    assert AlphaEditConfig.from_pretrained(tmp_path) == full
    assert [path.name for path in tmp_path.iterdir()] == ["alphaedit"]  # LoRA's file is not ours


def test_a_folder_that_is_no_pack(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist; .* is no edit pack"):
        AlphaEditConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_its_lora_config_is_pure(family):
    model = tiny_model(family)
    full, architecture = AlphaEditConfig(rewrite_layers=[0, 2]).resolve(model)
    lora = full.lora_config(architecture, 5)
    plain = LoraConfig().to_dict()
    changed = {name for name, value in lora.to_dict().items() if value != plain[name]}
    assert changed <= {
        *("r", "lora_alpha", "target_modules", "fan_in_fan_out"),
        *("task_type", "inference_mode", "base_model_name_or_path"),
    }
    assert (lora.r, lora.lora_alpha) == (5, 5)
    assert lora.target_modules == {architecture.rewrite_name(layer) for layer in (0, 2)}
    assert lora.fan_in_fan_out == (family == "gpt2")


@PEFT_ALONE
@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_its_lora_config_hits_the_rewrite_modules_and_nothing_else(family):
    model = tiny_model(family)
    full, architecture = AlphaEditConfig(rewrite_layers=[0, 2]).resolve(model)
    peft_model = get_peft_model(model, full.lora_config(architecture, 1))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert set(layers) == {architecture.rewrite_name(layer) for layer in (0, 2)}
    assert all(layer.scaling == {"default": 1.0} for layer in layers.values())
    assert not any(p.requires_grad for p in peft_model.parameters())


@pytest.mark.parametrize("name", ["max_hidden_ratio", "norm_guard"])
def test_zero_switches_a_bound_off(name):
    assert getattr(AlphaEditConfig(**{name: 0}), name) == 0


def test_a_packs_settings_are_not_overwritten(tmp_path):
    path = tmp_path / "alphaedit" / "config.json"
    path.parent.mkdir()
    path.write_text('{"format_version": 1, "config": {}}')
    with pytest.raises(
        ValueError, match=r"is an edit pack, .* save the settings in another folder"
    ):
        AlphaEditConfig().save_pretrained(tmp_path)
    assert path.read_text() == '{"format_version": 1, "config": {}}'


def test_settings_can_be_saved_again(tmp_path):
    AlphaEditConfig(seed=1).save_pretrained(tmp_path)
    AlphaEditConfig(seed=2).save_pretrained(tmp_path)
    assert AlphaEditConfig.from_pretrained(tmp_path).seed == 2
