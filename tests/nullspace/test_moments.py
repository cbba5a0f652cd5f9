from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from alphaedit_peft import progress
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.nullspace import KeyMoments
from alphaedit_peft.nullspace.corpus import expected_tokens
from tests.conftest import PEFT_ALONE
from tests.nullspace.test_collecting import is_probe


def naive_moment(model: nn.Module, tokenizer, texts, module: str) -> Tensor:
    """The mean of k k^T in float64: one text at a time, the whole model, a plain hook."""
    keys: list[Tensor] = []
    hook = model.get_submodule(module).register_forward_hook(
        lambda _module, args, _output: keys.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([tokenizer(text)["input_ids"]]))
    hook.remove()
    K = torch.cat(keys).double()
    return K.T @ K / len(K)


def llama(**changes) -> nn.Module:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape, **heads, **changes))


def longrope() -> nn.Module:
    """Of other tables above 16 tokens."""
    factors = {"short_factor": [1.0, 1.0], "long_factor": [5.0, 50.0]}
    own = {"rope_theta": 1e4, "original_max_position_embeddings": 16, "rope_type": "longrope"}
    return llama(initializer_range=0.4, rope_parameters=own | factors)


def opt() -> nn.Module:
    shape = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 4, "word_embed_proj_dim": 16}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 32}
    return OPTForCausalLM(OPTConfig(vocab_size=64, **shape, **heads))


def same(one: KeyMoments, two: KeyMoments) -> bool:
    return all(torch.equal(one.moments[layer], two.moments[layer]) for layer in one.layers)


def test_equal_to_one_text_at_a_time(model, tokenizer, texts, moments):
    assert moments.layers == (0, 2)
    assert moments.tokens == sum(len(text.split()) + 1 for text in texts)
    for layer, module in moments.modules.items():
        wanted = naive_moment(model.eval(), tokenizer, texts, module)
        torch.testing.assert_close(moments.moments[layer].double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", [llama, opt, longrope])
def test_other_families(build, tokenizer, texts, config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
    found = KeyMoments.collect(model, tokenizer, texts[:40], config, progress=False)
    wanted = naive_moment(model.eval(), tokenizer, texts[:40], found.modules[2])
    torch.testing.assert_close(found.moments[2].double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [32, 1000])
def test_padding_and_batch_size_change_nothing(size, model, tokenizer, texts, config, moments):
    other = replace(config, tokens_per_batch=size)
    found = KeyMoments.collect(model, tokenizer, texts, other, progress=False)
    assert found.tokens == moments.tokens
    for layer in moments.layers:
        torch.testing.assert_close(
            found.moments[layer], moments.moments[layer], rtol=1e-5, atol=1e-5
        )


def test_blocks_above_the_last_rewrite_layer_never_run(model, tokenizer, texts, config):
    def never(_module, args):
        if not is_probe(args):
            raise AssertionError("ran")

    model.transformer.h[3].register_forward_pre_hook(never)
    model.lm_head.register_forward_pre_hook(never)
    assert KeyMoments.collect(model, tokenizer, texts, config, progress=False).tokens


def test_the_model_is_left_as_it_was(model, tokenizer, texts, config):
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    KeyMoments.collect(model, tokenizer, texts, config, progress=False)
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases(dtype, model, tokenizer, texts, config, moments):
    found = KeyMoments.collect(model.to(dtype), tokenizer, texts, config, progress=False)
    assert found.moments[2].dtype == torch.float32
    torch.testing.assert_close(found.moments[2], moments.moments[2], rtol=0.1, atol=0.1)


@PEFT_ALONE
def test_of_a_peft_model_the_base_counts(model, tokenizer, texts, config, moments):
    names = ["c_fc", "mlp.c_proj"]
    lora = LoraConfig(target_modules=names, fan_in_fan_out=True, init_lora_weights=False)
    wrapped = get_peft_model(model, lora)
    found = KeyMoments.collect(wrapped, tokenizer, texts, config, progress=False)
    assert same(found, moments)
    assert found.fingerprint == moments.fingerprint


def test_dataset_objects_and_provenance(model, tokenizer, texts, config, moments):
    data = Dataset.from_dict({"body": texts})
    found = KeyMoments.collect(
        model, tokenizer, data, config, text_column="body", progress=False, max_tokens=500
    )
    assert found.tokens == 500
    assert 0 < found.provenance["texts"] < len(texts)
    assert moments.provenance["corpus"] == "list"
    assert set(moments.provenance["versions"]) == {"alphaedit_peft", "torch", "transformers"}


def test_progress_goes_to_stderr_or_nowhere(model, tokenizer, texts, config, capfd, monkeypatch):
    KeyMoments.collect(model, tokenizer, texts[:5], config, progress=False)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(progress, "watched", lambda: True)
    KeyMoments.collect(model, tokenizer, texts[:5], config)
    out, err = capfd.readouterr()
    assert out == ""
    assert "key moments" in err


@pytest.mark.parametrize(
    ("count", "most", "words"),
    [
        (90, None, "better 240; these texts hold about {}"),
        (90, 300, "better 240; these texts hold about {}, of which 300 are taken (max_tokens)"),
        (90, 100, "of which 100 are taken (max_tokens): enough, but few"),
        (2, None, "these texts hold about 5: too few"),
        (None, 300, "how many these texts hold is not known, of which 300 are taken"),
    ],
)
def test_what_a_pass_takes_is_recorded_before_it_starts(
    model, tokenizer, texts, config, caplog, count, most, words
):
    caplog.set_level("INFO", "alphaedit_peft")
    given = iter(texts) if count is None else texts[:count]
    KeyMoments.collect(model, tokenizer, given, config, max_tokens=most)
    held = expected_tokens(texts[:count], tokenizer)
    first = caplog.messages[0]
    assert first.startswith("key moments: 2 layers of d_in 24 need 24 tokens at least, ")
    assert words.format(f"{held:,}") in first
    paces = [text for text in caplog.messages[1:] if " tokens a second" in text]
    assert len(paces) == (count != 2 and most != 100)  # which is a batch or two
    assert all(text.endswith(" left") for text in paces)
    caplog.clear()
    KeyMoments.collect(model, tokenizer, texts, config, progress=False)
    assert caplog.messages == []


def test_saved_then_loaded_has_the_same_bits(tmp_path, moments):
    moments.save_pretrained(tmp_path)
    found = KeyMoments.from_pretrained(tmp_path)
    assert same(found, moments)
    assert found.layers == moments.layers
    assert (found.tokens, found.modules) == (moments.tokens, moments.modules)
    assert (found.fingerprint, found.provenance) == (moments.fingerprint, moments.provenance)


def test_no_tokens(model, tokenizer, config):
    with pytest.raises(ValueError, match="holds 0 tokens"):
        KeyMoments.collect(model, tokenizer, [" "], config, progress=False)


def test_keys_that_are_not_finite_are_named(model, tokenizer, texts, config):
    model.transformer.h[2].mlp.c_fc.register_forward_hook(
        lambda _module, args, output: output if is_probe(args) else output * float("nan")
    )
    with pytest.raises(ValueError, match=r"transformer\.h\.2\.mlp\.c_proj hold NaN .*float32"):
        KeyMoments.collect(model, tokenizer, texts, config, progress=False)


def test_null_space_needs_a_threshold(model, moments, config):
    with pytest.raises(ValueError, match=r"threshold=0\.1 and mode=None leave one open"):
        moments.null_space(0.1)
    full, _ = config.resolve(model)
    found = moments.null_space(config=full)
    assert (found.threshold, found.threshold_mode) == (full.threshold, full.threshold_mode)
    assert moments.null_space(0.1, config=full).threshold == 0.1


def test_files_that_do_not_belong_together(tmp_path, moments):
    moments.save_pretrained(tmp_path)
    path = tmp_path / "key_moments.json"
    path.write_text(path.read_text().replace('"2":', '"3":'))
    with pytest.raises(ValueError, match=r"layers\.2\.moment.*layers\.3\.moment.*not in both"):
        KeyMoments.from_pretrained(tmp_path)


def test_a_moment_that_is_not_square(tmp_path, moments):
    moments.save_pretrained(tmp_path)
    path = tmp_path / "key_moments.safetensors"
    tensors = load_file(path)
    tensors["layers.2.moment"] = tensors["layers.2.moment"][:-1].contiguous()
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"layer 2: moment \(23, 24\) do not fit"):
        KeyMoments.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "key_moments.json").read_text())["format"] == "key_moments"


def test_layers_outside_the_model(model, tokenizer, texts):
    with pytest.raises(ValueError, match=r"rewrite_layers=\[9\]"):
        KeyMoments.collect(model, tokenizer, texts, AlphaEditConfig(rewrite_layers=[9]))


@pytest.mark.parametrize("most", [0, -1])
def test_a_limit_without_tokens(model, tokenizer, texts, config, most):
    with pytest.raises(ValueError, match=rf"max_tokens={most} leaves no token"):
        KeyMoments.collect(model, tokenizer, texts, config, max_tokens=most, progress=False)


def test_digest_names_the_numbers(tmp_path, moments):
    moments.save_pretrained(tmp_path)
    assert KeyMoments.from_pretrained(tmp_path).digest() == moments.digest()
    others = {layer: 2 * moment for layer, moment in moments.moments.items()}
    assert replace(moments, moments=others).digest() != moments.digest()
