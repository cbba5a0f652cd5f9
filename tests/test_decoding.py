"""Text written token by token: the law is the argmax (or the draw) of a whole pass at each step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from alphaedit_peft.decoding import Decoder, likeliest
from tests.conftest import PEFT_ALONE, tiny_model
from tests.test_architecture import GATED, IDS, VARIANTS, build

MAMBA = IDS | {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}
CONV = {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}
SCAN = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
# beyond the table: hybrids, states in place of caches, mixtures of experts
OTHERS = {
    "lfm2": (hf.Lfm2Config, GATED | CONV),
    "falcon_h1": (hf.FalconH1Config, GATED | SCAN | {"mamba_n_groups": 1, "head_dim": 8}),
    "mamba": (hf.MambaConfig, MAMBA),
    "rwkv": (hf.RwkvConfig, IDS | {"hidden_size": 32, "num_hidden_layers": 2}),
    "mixtral": (hf.MixtralConfig, GATED | {"num_local_experts": 4}),
    "gemma2": (hf.Gemma2Config, GATED | {"head_dim": 8}),
}

# contents of a model's generation_config, each of which changes what ``generate`` writes or fails
OWN = [
    {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
    {"suppress_tokens": list(range(0, 320, 2)), "begin_suppress_tokens": [3]},
    {"sequence_bias": [[[300], 50.0]], "bad_words_ids": [[301]]},
    {"guidance_scale": 2.0},
    {"max_time": 1e-9},
    {"stop_strings": ["a"]},
    {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
    {"do_sample": True, "temperature": 0.0, "top_p": 0.1, "top_k": 1},
    {"do_sample": True, "temperature": 3.0, "min_p": 0.1, "typical_p": 0.9, "top_h": 0.5},
    {"repetition_penalty": 5.0, "encoder_repetition_penalty": 3.0, "no_repeat_ngram_size": 1},
    {"forced_bos_token_id": 4, "forced_eos_token_id": 5, "max_length": 3, "max_new_tokens": 1},
    {"min_length": 40, "min_new_tokens": 40, "exponential_decay_length_penalty": [1, 3.0]},
    {"watermarking_config": {"greenlist_ratio": 0.5, "bias": 9.0}},
    {"prompt_lookup_num_tokens": 2, "num_assistant_tokens": 3, "assistant_early_exit": 1},
    {"cache_implementation": "static", "use_cache": False, "cache_config": {"a": 1}},
    {"epsilon_cutoff": 0.05, "eta_cutoff": 0.1, "penalty_alpha": 0.6, "dola_layers": "low"},
    {"custom_generate": "nobody/nothing", "unheard_of": "words"},
    {"renormalize_logits": True, "remove_invalid_values": True, "pad_token_id": 7},
]


def built(name: str):
    if name not in OTHERS:
        return build(name)
    kind, arguments = OTHERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(kind(**arguments, initializer_range=0.2)).eval()


def set_all(generation_config, own) -> None:
    """As a file or a user may: without the checks of ``update``."""
    for name, value in own.items():
        setattr(generation_config, name, value)


def argmax_loop(model, ids, new: int, ends=()) -> list[int]:
    """The oracle: a whole pass of one row for each token."""
    ids = list(ids)
    for _ in range(new):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] in ends:
            break
    return ids


def rows(count: int, length: int) -> torch.Tensor:
    return torch.randint(2, 320, (count, length), generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("name", [*VARIANTS, *OTHERS])
def test_every_family_writes_its_argmax(name):
    """Also over the length (16) above which LongRoPE's tables are others."""
    model, ids = built(name), rows(3, 13)
    model = model if name == "mixtral" else model.double()  # whose products torch has not
    assert Decoder(model).write(ids, 7, likeliest) == [
        argmax_loop(model, row, 7) for row in ids.tolist()
    ]


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.lists(st.sampled_from(OWN), unique_by=id), st.integers(1, 4), st.integers(1, 20))
def test_whatever_the_generation_config_holds_it_is_the_argmax(owns, count, length):
    model, ids = tiny_model("gpt2"), rows(count, length)
    for own in owns:
        set_all(model.generation_config, own)
    found = Decoder(model).write(ids, 6, likeliest, ends=[5])
    assert found == [argmax_loop(model, row, 6, {5}) for row in ids.tolist()]


def test_each_row_ends_for_itself():
    model, ids = tiny_model("llama"), rows(4, 6)
    whole = Decoder(model).write(ids, 8, likeliest)
    ends = [whole[0][7], whole[1][9]]
    assert Decoder(model).write(ids, 8, likeliest, ends) == [
        argmax_loop(model, row, 8, ends) for row in ids.tolist()
    ]


class Forgets(nn.Module):
    """Says it has a cache; behind it, from some step on, it knows only the last token."""

    def __init__(self, inner: nn.Module, steps: int, error: Exception | None = None) -> None:
        super().__init__()
        self.inner, self.steps, self.error, self.passes = inner, steps, error, []

    def forward(self, input_ids, attention_mask, use_cache, past_key_values=None):
        self.passes.append((*input_ids.shape, use_cache))
        ids = input_ids
        if past_key_values is not None:
            before, left = past_key_values
            if not left and self.error:
                raise self.error
            ids = torch.cat([before, ids], 1) if left else ids
            kept = ids, left - 1
        else:
            kept = ids, self.steps
        logits = self.inner(input_ids=ids, use_cache=False).logits
        return SimpleNamespace(logits=logits, past_key_values=kept if use_cache else None)


@pytest.mark.parametrize("error", [None, TypeError("no such cache")])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_cache_that_gives_other_numbers_is_not_used(steps, error):
    inner, ids = tiny_model("llama"), rows(3, 6)
    model = Forgets(inner, steps, error)
    assert Decoder(model).write(ids, 5, likeliest) == [
        argmax_loop(inner, row, 5) for row in ids.tolist()
    ]
    assert [use for *_, use in model.passes[-2:]] == [False, False]


def test_memory_that_runs_out_behind_a_cache_is_said():
    model = Forgets(tiny_model("llama"), 0, torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        Decoder(model).write(rows(1, 4), 3, likeliest)


def test_behind_a_cache_only_the_last_tokens_run_and_the_head_sees_no_others():
    model, widths, seen = tiny_model("llama"), [], []
    model.register_forward_pre_hook(
        lambda _m, _a, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    model.lm_head.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[1]))
    Decoder(model).write(rows(3, 6), 5, likeliest)
    assert widths == [6, 7, 1, 8, 1, 1, 1]  # 7 and 8: the cache is held against whole rows
    assert seen == [3, 2, 3, 2, 3, 3, 3]


@PEFT_ALONE
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_an_adapter_that_puts_tokens_in_front_is_written_with(kind):
    model = tiny_model("gpt2").double()
    how = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = get_peft_model(model, kind(**how)).double().eval()
    ids = rows(3, 6)
    expected = [argmax_loop(wrapped, row, 5) for row in ids.tolist()]
    assert Decoder(wrapped).write(ids, 5, likeliest) == expected
