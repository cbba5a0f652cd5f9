"""Families of decoders, taken through an edit; what is refused, and how it is said.

The law: with P = I and next to no ridge, the hidden state at the subject's last token after the
last rewrite layer reaches the target value z. It fails where a wrong module is rewritten, where a
block does more to its MLP's output than add it, or where resuming above a block is unfaithful.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from alphaedit_peft import (
    AlphaEditConfig,
    Edit,
    NullSpace,
    architecture,
    get_alphaedit_model,
    structure,
)
from alphaedit_peft.architecture import (
    PAPER_PRESETS,
    default_rewrite_layers,
    describe,
    paper_preset,
    position_switches,
)
from alphaedit_peft.hooks import hidden_of
from tests.conftest import PEFT_ALONE

IDS = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
WIDTH = 96
COMMON = IDS | {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GATED = COMMON | {"intermediate_size": WIDTH, "num_key_value_heads": 2}
GPT = IDS | {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "n_inner": WIDTH}
NEOX = COMMON | {"intermediate_size": WIDTH}
FALCON = COMMON | {"ffn_hidden_size": WIDTH}
OPT = COMMON | {"ffn_dim": WIDTH, "word_embed_proj_dim": 32}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
NEO = IDS | {
    "hidden_size": 32,
    "intermediate_size": WIDTH,
    "num_layers": 4,
    "num_heads": 4,
    "max_position_embeddings": 128,
    "window_size": 4,
    "attention_types": [[["global", "local"], 2]],
}
ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 3, 9, 27]}
LONG = {"original_max_position_embeddings": 16, "rope_parameters": ROPE | LONGROPE}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}

# model type, and what is special -> config class and its arguments
VARIANTS = {
    "gpt2": (hf.GPT2Config, GPT),
    "gptj": (hf.GPTJConfig, GPT | {"rotary_dim": 8}),
    "llama": (hf.LlamaConfig, GATED),
    "llama/tied": (hf.LlamaConfig, GATED | {"tie_word_embeddings": True}),
    "llama/longrope": (hf.LlamaConfig, GATED | {"rope_parameters": ROPE | LONGROPE}),
    "llama/dynamic": (hf.LlamaConfig, GATED | DYNAMIC),
    "mistral/sliding": (hf.MistralConfig, GATED | {"sliding_window": 4, "head_dim": 8}),
    "qwen2/some-sliding": (hf.Qwen2Config, GATED | SLIDING),
    "qwen3": (hf.Qwen3Config, GATED | {"head_dim": 8}),
    "phi": (hf.PhiConfig, COMMON | {"intermediate_size": WIDTH}),
    "phi3": (hf.Phi3Config, GATED),
    "phi3/longrope": (hf.Phi3Config, GATED | LONG),
    "gpt_neox/parallel": (hf.GPTNeoXConfig, NEOX | {"use_parallel_residual": True}),
    "gpt_neox/sequential": (hf.GPTNeoXConfig, NEOX | {"use_parallel_residual": False}),
    "opt": (hf.OPTConfig, OPT),
    "stablelm": (hf.StableLmConfig, GATED),
    "stablelm/parallel": (hf.StableLmConfig, GATED | {"use_parallel_residual": True}),
    "falcon/parallel": (hf.FalconConfig, FALCON | {"parallel_attn": True}),
    "falcon/sequential": (hf.FalconConfig, FALCON | {"parallel_attn": False}),
    "falcon/new": (
        hf.FalconConfig,
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon/alibi": (hf.FalconConfig, FALCON | {"alibi": True}),
    "bloom": (hf.BloomConfig, IDS | {"hidden_size": 24, "n_layer": 4, "n_head": 4}),
    "gpt_neo": (hf.GPTNeoConfig, NEO),
    "gemma": (hf.GemmaConfig, GATED | {"head_dim": 8}),
    "cohere": (hf.CohereConfig, GATED),
}

EDITS = [
    Edit("Marie Curie", "{} was born in", "Rome"),
    Edit("France", "The capital of {} is", "Ulm"),
]


def build(name: str) -> nn.Module:
    """A random model of a variant, whose activations are of order one."""
    kind, arguments = {**VARIANTS, "olmo2": (hf.Olmo2Config, GATED)}[name]
    config = kind(**arguments)
    config.initializer_range = 0.2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).float().eval()


def wrapped(name: str, layers: list[int], tokenizer):
    """A fresh base, and the same wrapped with P = I and next to no ridge."""
    base = build(name)
    config = AlphaEditConfig(
        rewrite_layers=layers,
        ridge=1e-9,
        ridge_mode="absolute",
        steps=5,
        learning_rate=0.3,
        learning_rate_mode="relative",
        stop_loss=0.05,
        contexts=[],
    )
    space = NullSpace.identity(dict.fromkeys(layers, WIDTH))
    return get_alphaedit_model(base, config, tokenizer=tokenizer, null_space=space)


def subject_hidden(base: nn.Module, block: str, edit: Edit, tokenizer) -> torch.Tensor:
    """The hidden state after a block, at the token that ends the subject, (d,)."""
    text = edit.question[: edit.subject_span[1]]
    seen = []
    hook = base.get_submodule(block).register_forward_hook(
        lambda _module, _args, output: seen.append(hidden_of(output))
    )
    with torch.no_grad():
        base(input_ids=torch.tensor([tokenizer(text)["input_ids"]]), use_cache=False)
    hook.remove()
    return seen[0][0, -1]


def all_hidden(model, layer: int, tokenizer) -> torch.Tensor:
    base, block = model.get_base_model(), model.architecture.block_name(layer)
    return torch.stack([subject_hidden(base, block, edit, tokenizer) for edit in EDITS])


def logits(model: nn.Module, tokenizer) -> torch.Tensor:
    ids = torch.tensor([tokenizer("The capital of France is Paris, and")["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("layers", [[1], [0, 2]], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_hidden_state_reaches_the_target_value(name, layers, tokenizer):
    model = wrapped(name, layers, tokenizer)
    before = all_hidden(model, layers[-1], tokenizer)
    report = model.edit(EDITS, progress=False)
    targets = model.to_pack().targets
    distance = (all_hidden(model, layers[-1], tokenizer) - targets).norm(dim=1)
    wanted = (targets - before).norm(dim=1)
    assert (wanted > 0.1 * before.norm(dim=1)).all()
    assert (distance <= 0.05 * wanted).all(), (distance, wanted)
    assert all(result.made and result.total_share > 0.99 for result in report)


@pytest.mark.parametrize("name", VARIANTS)
def test_without_edits_it_is_its_base_bit_for_bit(name, tokenizer):
    expected = logits(build(name), tokenizer)
    assert torch.equal(logits(wrapped(name, [1], tokenizer), tokenizer), expected)


@PEFT_ALONE
@pytest.mark.parametrize("name", VARIANTS)
def test_plain_lora_computes_what_the_merged_model_does(name, tokenizer, tmp_path):
    model = wrapped(name, [1, 2], tokenizer)
    unedited = logits(model, tokenizer)
    model.edit(EDITS, progress=False)
    model.save_pretrained(tmp_path / "pack")
    plain = PeftModel.from_pretrained(build(name), str(tmp_path / "pack"))
    merged = logits(model.merge_and_unload(), tokenizer)
    assert torch.allclose(logits(plain, tokenizer), merged, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(merged, unedited, atol=1e-2)


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_lie_as_they_are_found(name):
    model = build(name)
    found = describe(model)
    module = model.get_submodule(found.rewrite_name(3))
    d_out = model.get_input_embeddings().weight.shape[1]
    d_in = 4 * d_out if name == "bloom" else WIDTH
    expected = (d_in, d_out) if found.conv1d else (d_out, d_in)
    assert module.weight.shape == expected
    assert found.conv1d == (type(module).__name__ == "Conv1D")
    assert found.num_blocks == 4
    assert found.model_type == name.partition("/")[0]


MOE = GATED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (hf.MixtralConfig(**GATED), "no block has a matrix that writes.*routed experts"),
        (hf.Qwen3MoeConfig(**MOE), "no block has a matrix that writes.*routed experts"),
        (hf.BertConfig(**GATED), "BertLMHeadModel reads what comes after a token too"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_refused(config, message):
    with pytest.raises(ValueError, match=message):
        describe(AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize(
    "config",
    [
        hf.Gemma2Config(**GATED, head_dim=8),
        hf.Olmo2Config(**GATED),
        hf.GraniteConfig(**GATED, residual_multiplier=0.22),
        hf.OPTConfig(**OPT, do_layer_norm_before=False),
    ],
    ids=lambda config: config.model_type,
)
def test_what_stands_behind_the_rewrite_module_is_told(config):
    message = r"its blocks do not add what model\..*layers\.0\..* puts out as it is \(a norm or a"
    with pytest.raises(ValueError, match=message):
        describe(AutoModelForCausalLM.from_config(config).eval())


def test_an_encoder_decoder_is_refused():
    config = hf.T5Config(vocab_size=320, d_model=32, d_kv=8, d_ff=WIDTH, num_layers=2, num_heads=4)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        describe(hf.T5ForConditionalGeneration(config))


def test_a_refused_family_would_break_the_law(monkeypatch, tokenizer):
    found = structure.find_structure(build("olmo2"))
    plain = [None if part is None else replace(part, adds=True) for part in found.rewrites]
    monkeypatch.setattr(
        architecture, "find_structure", lambda *_: replace(found, rewrites=tuple(plain))
    )
    report = wrapped("olmo2", [1], tokenizer).edit(EDITS, progress=False)
    assert all(abs(result.total_share - 1) > 0.05 for result in report)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"block_module": "model.layer.{}"}, "LlamaForCausalLM has no module 'model.layer'"),
        ({"block_module": "model.layers"}, "'model.layers' needs one '{}'"),
        ({"block_module": "model.layers.{}.{}"}, "'model.layers.{}.{}' needs one '{}'"),
        ({"rewrite_module": "model.layers.3.mlp.down_proj"}, "'model.layers.3.* needs one '{}'"),
        ({"rewrite_module": "model.layers.{}.mlp.fc2"}, "has no module 'model.layers.0.mlp.fc2'"),
        ({"rewrite_module": "model.layers.{}.{x}"}, "has no module 'model.layers.0.{x}'"),
    ],
    ids=str,
)
def test_wrong_module_names(names, message):
    with pytest.raises(ValueError, match=message):
        describe(build("llama"), **names)


def test_a_rewrite_module_can_be_named_within_a_known_family():
    module = "model.layers.{}.self_attn.o_proj"
    assert describe(build("llama"), rewrite_module=module).rewrite_name(2) == module.format(2)
    assert describe(build("gpt2"), rewrite_module="transformer.h.{}.attn.c_proj").conv1d


def test_a_named_module_must_write():
    with pytest.raises(ValueError, match=r"'mlp\.c_fc' of GPT2Block does not write into the block"):
        describe(build("gpt2"), rewrite_module="transformer.h.{}.mlp.c_fc")


def test_a_model_without_config_is_refused():
    with pytest.raises(ValueError, match="Linear has no transformers config"):
        describe(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], r"rewrite_layers=\[\] must be a list of distinct blocks"),
        ([1, 1], r"rewrite_layers=\[1, 1\] must be a list of distinct blocks"),
        ([4], r"rewrite_layers=\[4\] is outside this model's 4 blocks; use 0..3"),
        ([-1, 2], r"rewrite_layers=\[-1, 2\] is outside this model's 4 blocks"),
    ],
)
def test_layers_outside(layers, message):
    with pytest.raises(ValueError, match=message):
        describe(build("llama")).check_layers(layers)


def test_layers_come_in_ascending_order():
    assert describe(build("llama")).check_layers([3, 0, 1]) == (0, 1, 3)


@pytest.mark.parametrize("num_blocks", [2, 3, 4, 6, 12, 15, 16, 17, 24, 28, 32, 48, 80, 126])
def test_default_layers_are_consecutive_and_leave_a_block_above(num_blocks):
    layers = default_rewrite_layers(num_blocks)
    assert layers == tuple(range(layers[0], layers[-1] + 1))
    assert 0 <= layers[0] <= layers[-1] <= num_blocks - 2
    assert len(layers) <= (5 if num_blocks >= 16 else 3)
    if num_blocks >= 16:
        assert len(layers) == 5
        assert abs(layers[-1] - 0.3 * num_blocks) < 1  # 30 % of the depth


SCALED = {"rope_type": "longrope", "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, ()),
        ({"rope_parameters": None}, ()),
        ({"rope_parameters": {"rope_type": "yarn"} | ROPE}, ()),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ()),
        ({"rope_parameters": SCALED}, (16,)),
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 64}, (64,)),
        (
            {
                "rope_parameters": {
                    "full_attention": SCALED,
                    "sliding_attention": SCALED | {"original_max_position_embeddings": 8},
                    "other": {"rope_type": "default"},
                }
            },
            (8, 16),
        ),
        ({"rope_scaling": {"type": "longrope"}}, ()),
    ],
    ids=str,
)
def test_lengths_above_which_other_tables_are_used_are_read_from_the_config(stated, expected):
    assert position_switches(SimpleNamespace(**stated)) == expected


@pytest.mark.parametrize("name", ["phi3/longrope", "llama/longrope"])
def test_that_length_is_where_what_follows_changes_a_token(name):
    model = build(name).double()
    ids = torch.randint(2, 320, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seconds = [model(ids[:, :n]).logits[0, 1] for n in range(2, 21)]
    changed = [
        n for n in range(2, 20) if not torch.allclose(seconds[n - 1], seconds[n - 2], atol=1e-9)
    ]
    assert tuple(changed) == position_switches(model.config) == (16,)


def test_a_single_block_is_its_own_default():
    assert default_rewrite_layers(1) == (0,)


@pytest.mark.parametrize(
    ("config", "layers", "steps", "rate"),
    [
        (
            hf.LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=14336),
            range(4, 9),
            25,
            0.1,
        ),
        (hf.GPTJConfig(), range(3, 9), 25, 0.5),
        (hf.GPT2Config(n_layer=48, n_embd=1600, n_head=25), range(13, 18), 20, 0.5),
    ],
    ids=["llama", "gptj", "gpt2"],
)
def test_paper_presets_are_found_by_shape(config, layers, steps, rate):
    preset = paper_preset(config)
    assert preset is not None
    assert preset.rewrite_layers == tuple(layers)
    assert (preset.steps, preset.learning_rate) == (steps, rate)
    assert preset in PAPER_PRESETS.values()


def test_another_shape_has_no_paper_preset():
    assert paper_preset(hf.LlamaConfig(num_hidden_layers=32, intermediate_size=11008)) is None
    assert paper_preset(hf.GPT2Config()) is None
