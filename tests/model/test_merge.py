"""Merging to the bit: what goes into the weights, and that nothing is left when it is taken out."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig

from alphaedit_peft import (
    AlphaEditConfig,
    NullSpace,
    embedded,
    get_alphaedit_model,
)
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.model import lora_layer
from tests.conftest import tiny_model
from tests.model.test_model import logits, same_bits, weights, wrap
from tests.shared import embedded_edits

FAMILIES = ("gpt2", "llama")  # Conv1D and Linear
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

every_family = pytest.mark.parametrize("family", FAMILIES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
one_or_two = pytest.mark.parametrize("count", [1, 2])


def random_model(family: str, dtype: torch.dtype, tokenizer, count: int = 1, size: float = 0.1):
    """A model with ``count`` active adapters of random factors in its rewrite layers."""
    model = wrap(tiny_model(family, dtype), tokenizer)
    random = torch.Generator().manual_seed(3)
    names = ["default", "second"][:count]
    if count == 2:
        targets = [n.removeprefix("base_model.model.") for n in lora_layer.lora_layers(model)]
        config = LoraConfig(r=2, target_modules=targets, fan_in_fan_out=family == "gpt2")
        model.add_adapter("second", config)
    for layer in lora_layer.lora_layers(model).values():
        for rank, name in enumerate(names, start=3):
            A = torch.randn(rank, layer.in_features, generator=random)
            B = torch.randn(layer.out_features, rank, generator=random) * size
            lora_layer.write_factors(layer, name, LowRankDelta(A, B))
    model.base_model.set_adapter(names, inference_mode=True)
    return model, names


def base_weights(model) -> dict[str, torch.Tensor]:
    layers = lora_layer.lora_layers(model).items()
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers}


def expected(model, names) -> dict[str, torch.Tensor]:
    """round(W + B_1 A_1 + B_2 A_2), computed in float32 from the factors."""
    found = {}
    for where, layer in lora_layer.lora_layers(model).items():
        weight = layer.get_base_layer().weight.detach()
        total = weight.float()
        for name in names:
            dense = layer.lora_B[name].weight @ layer.lora_A[name].weight  # (d_out, d_in)
            total = total + (dense.T if dense.shape != weight.shape else dense)
        found[where] = total.to(weight.dtype).detach()
    return found


@contextmanager
def by_our_names(model):
    model.merge()
    yield
    model.unmerge()


@contextmanager
def by_peft_names(model):
    model.merge_adapter()
    yield
    model.unmerge_adapter()


@contextmanager
def by_peft_itself(model):
    model.base_model.merge_adapter()
    yield
    model.base_model.unmerge_adapter()


@contextmanager
def one_after_another(model):
    names = model.active_adapters
    for name in names:
        model.merge_adapter([name])
    yield
    model.unmerge_adapter()


WAYS = (by_our_names, by_peft_names, by_peft_itself, one_after_another)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@one_or_two
@every_dtype
@every_family
def test_every_way_in_rounds_once_and_every_way_out_restores_the_bits(
    family, dtype, count, way, tokenizer
):
    model, names = random_model(family, dtype, tokenizer, count)
    before, wanted = weights(model), expected(model, names)
    unmerged = logits(model, tokenizer)
    for _ in range(3):
        with way(model):
            assert model.merged
            assert same_bits(base_weights(model), wanted)
        assert not model.merged
        assert same_bits(weights(model), before)
    assert torch.equal(logits(model, tokenizer), unmerged)


@every_dtype
@every_family
def test_a_merged_model_is_its_base_while_disabled(family, dtype, tokenizer):
    model, names = random_model(family, dtype, tokenizer, count=2)
    before, wanted = base_weights(model), expected(model, names)
    plain = logits(tiny_model(family, dtype), tokenizer)
    model.merge_adapter()
    for _ in range(3):
        with model.disable_adapter():
            assert same_bits(base_weights(model), before)
            assert torch.equal(logits(model, tokenizer), plain)
        assert same_bits(base_weights(model), wanted)
    model.unmerge_adapter()
    assert same_bits(base_weights(model), before)


@pytest.mark.parametrize("merged_first", [False, True])
@every_dtype
@every_family
def test_unload_gives_the_base_and_merge_and_unload_the_merged_bits(
    family, dtype, merged_first, tokenizer
):
    before = weights(tiny_model(family, dtype))
    for merges in (False, True):
        model, names = random_model(family, dtype, tokenizer, count=2)
        changed = expected(model, names) if merges else {}
        wanted = {f"{n.removeprefix('base_model.model.')}.weight": w for n, w in changed.items()}
        if merged_first:
            model.merge()
        plain = model.merge_and_unload() if merges else model.unload()
        assert same_bits(weights(plain), before | wanted)


@every_dtype
@every_family
def test_merge_errors_are_what_rounding_changes_of_the_update(family, dtype, tokenizer):
    model, names = random_model(family, dtype, tokenizer, count=2)
    errors = model.merge_errors()
    rounded = expected(model, names)
    for where, layer in lora_layer.lora_layers(model.get_base_model()).items():
        weight = layer.get_base_layer().weight.detach().double()
        update = sum(layer.get_delta_weight(name).double() for name in names)
        lost = rounded[f"base_model.model.{where}"].double() - weight - update
        assert errors[where] == pytest.approx(float(lost.norm() / update.norm()), rel=1e-3)
        if dtype in ROUNDOFF:
            bound = ROUNDOFF[dtype] * float((weight + update).norm() / update.norm())
            assert bound / 10 < errors[where] < bound
        else:
            assert 0 < errors[where] < 1e-6
    model.merge()
    assert model.merge_errors() == errors
    model.unmerge()
    assert model.merge_errors(["second"]) != errors


def test_an_adapter_that_is_not_loaded_is_not_merged(tokenizer):
    model, names = random_model("llama", torch.float32, tokenizer)
    for merge in (model.merge_adapter, model.merge_errors):
        with pytest.raises(ValueError, match=r"\['b'\] are not loaded.* has \['default'\]"):
            merge([*names, "b"])
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload(adapter_names=["b"])
    assert not model.merged


def test_a_model_without_edits_loses_nothing(tokenizer):
    model = wrap(tiny_model("llama", torch.bfloat16), tokenizer)
    assert set(model.merge_errors().values()) == {0.0}


def test_merging_warns_where_rounding_eats_the_update(tokenizer):
    said = r"into bfloat16 changes the update of \S+down_proj by \d+%.*base in float32"
    for merge in ("merge", "merge_and_unload"):
        model, _ = random_model("llama", torch.bfloat16, tokenizer, size=1e-3)
        assert max(model.merge_errors().values()) > 0.1
        with pytest.warns(UserWarning, match=said):
            getattr(model, merge)()
        model, _ = random_model("llama", torch.float32, tokenizer, size=1e-3)
        getattr(model, merge)()


@pytest.mark.slow
def test_the_embedded_models_edits_survive_rounding():
    edits = embedded_edits(28, 7)
    base, tokenizer = embedded.load()
    space = NullSpace.identity(dict.fromkeys([0, 1], base.config.intermediate_size))
    config = AlphaEditConfig(rewrite_layers=[0, 1], contexts=[])
    model = get_alphaedit_model(base, config, tokenizer=tokenizer, null_space=space)
    model.edit(edits, progress=False)
    pack = model.to_pack()
    for dtype, bound in ((torch.bfloat16, 5e-2), (torch.float16, 6e-3), (torch.float32, 1e-6)):
        rounded = type(model)(embedded.load(dtype)[0], pack.config)
        for layer, delta in model.factors.items():
            rounded.edit_adapters["default"].write(layer, delta)
        assert max(rounded.merge_errors().values()) < bound
        plain = rounded.merge_and_unload()
        for edit in edits:
            ids = tokenizer(edit.question, return_tensors="pt", return_token_type_ids=False)
            with torch.no_grad():
                said = int(plain(**ids).logits[0, -1].argmax())
            assert tokenizer.decode(said).strip() == edit.target_new
