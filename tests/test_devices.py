"""Bases whose weights accelerate keeps elsewhere: the same packs, bit for bit, as in one place."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import attach_align_device_hook
from torch import nn
from transformers import AutoModelForCausalLM

from alphaedit_peft import AlphaEditConfig, AlphaEditModel, Edit, KeyMoments, get_alphaedit_model
from alphaedit_peft.architecture import describe
from alphaedit_peft.devices import (
    brings_to_gpu,
    computes_on,
    for_solving,
    held,
    in_place,
    keeps_elsewhere,
    require_whole,
    solving_on,
    supports_float64,
)
from alphaedit_peft.editing.runner import Runner
from alphaedit_peft.fingerprint import fingerprint
from alphaedit_peft.log_probs import Reader
from alphaedit_peft.model import lora_layer
from alphaedit_peft.model.prepare import weight_norm
from alphaedit_peft.settings import Settings
from tests.conftest import CORPUS, tiny_model

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8]])
EDITS = [
    Edit(subject="Anna Smith", prompt="The mother tongue of {} is", target_new="French"),
    Edit(subject="Albert Einstein", prompt="{} was born in", target_new="Rome"),
]
CONFIG = {
    **{"rewrite_layers": [1, 2], "steps": 4, "num_contexts": 2, "context_length": 4},
    **{"threshold": 0.02, "threshold_mode": "energy"},
}
FAMILIES = {"gpt2": ("transformer", "h"), "llama": ("model", "layers")}


def device_map(model: nn.Module, family: str, disk: tuple[int, ...] = (1, 3)) -> dict[str, str]:
    """Blocks in CPU memory and on disk by turns."""
    stem, blocks = FAMILIES[family]
    whole = {f"{stem}.{name}" for name, _ in getattr(model, stem).named_children()}
    found = dict.fromkeys({"lm_head", *whole} - {f"{stem}.{blocks}"}, "cpu")
    return found | {f"{stem}.{blocks}.{i}": "disk" if i in disk else "cpu" for i in range(4)}


def placed(family: str, how: str, folder) -> nn.Module:
    model = tiny_model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "cpu":
            return cpu_offload(model, CPU)
        if how == "disk":
            return disk_offload(model, str(folder), CPU)
        if how == "loaded":
            model.save_pretrained(folder / "base")
            where = {"device_map": device_map(model, family), "offload_folder": folder / "off"}
            return AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto", **where)
        where = {"main_device": "cpu", "offload_dir": str(folder), "force_hooks": True}
        return dispatch_model(model, device_map(model, family), **where)


def edited(base: nn.Module, tokenizer) -> AlphaEditModel:
    config = AlphaEditConfig(**CONFIG)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tokens are few")
        moments = KeyMoments.collect(base, tokenizer, CORPUS * 2, config, progress=False)
        null_space = moments.null_space(0.02, "energy")
    model = get_alphaedit_model(base, config, tokenizer=tokenizer, null_space=null_space)
    model.edit(EDITS, progress=False)
    return model


@pytest.fixture(scope="module")
def plain(tokenizer):
    """Of each family the edited model whose base is in one place."""
    return {family: edited(tiny_model(family), tokenizer) for family in FAMILIES}


@pytest.fixture(params=[(f, how) for f in FAMILIES for how in ("cpu", "disk", "split", "loaded")])
def pair(request, plain, tokenizer, tmp_path):
    """An edited model of a base that is kept elsewhere, and the plain one."""
    family, how = request.param
    base = placed(family, how, tmp_path)
    assert keeps_elsewhere(base)
    return edited(base, tokenizer), plain[family]


def test_a_pack_made_on_an_offloaded_base_is_the_plain_bases_bit_for_bit(pair):
    found, wanted = (model.to_pack() for model in pair)
    assert found.digest() == wanted.digest()
    assert (found.base, found.null_space) == (wanted.base, wanted.null_space)
    assert [r.probability_after for r in found.records] == [
        r.probability_after for r in wanted.records
    ]


def test_an_offloaded_base_is_merged_unmerged_and_unloaded_exactly(pair):
    model, wanted = pair
    before = model(IDS).logits
    assert torch.equal(before, wanted(IDS).logits)
    with model.disable_adapter(), wanted.disable_adapter():
        bare = model(IDS).logits
        assert torch.equal(bare, wanted(IDS).logits)
    model.merge()
    wanted.merge()
    try:
        assert torch.equal(model(IDS).logits, wanted(IDS).logits)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, bare)
        assert torch.equal(model(IDS).logits, wanted(IDS).logits)
        norms = [weight_norm(m.edit_adapters["default"], 1) for m in (model, wanted)]
        assert norms[0] == norms[1]
    finally:
        wanted.unmerge()
    model.unmerge()
    assert torch.equal(model(IDS).logits, before)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_packs_are_loaded_gone_on_from_and_saved_on_an_offloaded_base(
    family, plain, tokenizer, tmp_path
):
    wanted = plain[family]
    wanted.save_pretrained(tmp_path / "pack")
    with_space = {"tokenizer": tokenizer, "null_space": wanted.resources.null_space}
    base = placed(family, "split", tmp_path / "off")
    model = AlphaEditModel.from_pretrained(base, tmp_path / "pack", **with_space)
    model.rollback()
    model.edit(EDITS, progress=False)
    assert model.to_pack().digest() == wanted.to_pack().digest()
    model.save_pretrained(tmp_path / "again")
    model.load_adapter(tmp_path / "again", "second")
    model.set_adapter("second")
    assert torch.equal(model(IDS).logits, wanted(IDS).logits)
    rows = Reader(model, tokenizer, 512)
    assert rows.device == CPU


@pytest.mark.parametrize("how", ["cpu", "split"])
def test_a_plain_lora_is_loaded_onto_an_offloaded_base(how, plain, tmp_path):
    wanted = plain["llama"]
    wanted.save_pretrained(tmp_path / "lora")
    shutil.rmtree(tmp_path / "lora" / "alphaedit")
    with pytest.warns(UserWarning, match="loaded as a plain LoRA"):
        model = AlphaEditModel.from_pretrained(
            placed("llama", how, tmp_path / "off"), tmp_path / "lora"
        )
    assert torch.equal(model(IDS).logits, wanted(IDS).logits)


@pytest.mark.parametrize(("where", "dear"), [("cpu", False), ("cuda:0", True)])
def test_few_passes_are_made_where_each_brings_weights_to_a_gpu(where, dear, tokenizer):
    model = tiny_model("llama")
    full, architecture = AlphaEditConfig(**CONFIG).resolve(model)
    runner, reader = (
        Runner(model, tokenizer, Settings.of(full), architecture, ()),
        Reader(model, tokenizer),
    )
    rows = [[5]] * 90 + [[5] * 40]
    assert [len(list(owner.batches(rows))) for owner in (runner, reader)] == [2, 2]
    for block in model.model.layers:
        attach_align_device_hook(block, where, offload=True)
    assert runner.few_passes is brings_to_gpu(model) is dear
    assert [len(list(owner.batches(rows))) for owner in (runner, reader)] == [2 - dear] * 2


def test_an_adapter_that_peft_left_without_numbers_is_refused(plain, tmp_path):
    model = get_alphaedit_model(placed("llama", "cpu", tmp_path), AlphaEditConfig(**CONFIG))
    layer = model.edit_adapters["default"].layers[1]
    layer.lora_A["default"] = nn.Linear(96, 1, bias=False, device="meta")
    with pytest.raises(ValueError, match=r"adapter 'default' changes .*layers\.1\.mlp\.down_proj"):
        lora_layer.require_factors(model, "default")


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_merged_weights_saved_from_an_offloaded_base_load_again(plain, tmp_path):
    wanted = plain["gpt2"]
    wanted.save_pretrained(tmp_path / "pack")
    model = AlphaEditModel.from_pretrained(
        placed("gpt2", "split", tmp_path / "off"), tmp_path / "pack"
    )
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    torch.testing.assert_close(again(IDS).logits, wanted(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["cpu", "disk", "split"])
def test_the_fingerprint_reads_weights_wherever_they_are(how, tmp_path):
    plain, other = tiny_model("llama"), placed("llama", how, tmp_path)
    assert fingerprint(other, 2, describe(other)) == fingerprint(plain, 2, describe(plain))


def test_weights_that_nothing_knows_leave_the_fingerprint_open():
    model = tiny_model("llama").to("meta")
    assert not fingerprint(model, 2, describe(model)).verifiable


def test_a_weight_changed_in_place_stays_changed_and_the_disk_stays_as_it_was(tmp_path):
    model = placed("llama", "disk", tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    module = model.get_submodule("model.layers.1.mlp.down_proj")
    before = held(module, "weight").clone()
    assert module.weight.is_meta
    assert computes_on(module) == CPU
    with in_place(module):
        module.weight.data.add_(1)
    assert module.weight.is_meta
    assert torch.equal(held(module, "weight"), before + 1)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    meet = f"file://{tmp_path / 'meet'}"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_base_split_by_fsdp_is_refused(group):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    sharded = fully_shard(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"split among processes by FSDP.*device_map=\"auto\""):
        get_alphaedit_model(sharded, AlphaEditConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on a group of one
        wrapped = FullyShardedDataParallel(tiny_model("llama"), device_id=CPU)
    with pytest.raises(ValueError, match="split among processes by FSDP"):
        KeyMoments.collect(wrapped, None, CORPUS, AlphaEditConfig())


def test_a_tensor_parallel_base_is_refused(group):
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    model = tiny_model("llama")
    mesh = init_device_mesh("cpu", (1,))
    head = model.lm_head
    head.weight = nn.Parameter(distribute_tensor(head.weight.data, mesh, [Replicate()]))
    with pytest.raises(ValueError, match=r"tensor parallelism \(lm_head\.weight is a DTensor\)"):
        get_alphaedit_model(model, AlphaEditConfig())


def test_a_base_that_transformers_split_is_refused():
    model = tiny_model("llama")
    model._tp_size = 2
    with pytest.raises(ValueError, match="split among processes by tensor parallelism"):
        require_whole(model)


def test_a_data_parallel_wrapper_is_refused():
    with pytest.raises(ValueError, match=r"wrapped in DataParallel.*pass model\.module"):
        get_alphaedit_model(nn.DataParallel(tiny_model("llama")), AlphaEditConfig())


def test_where_a_device_lacks_float64_solves_are_on_the_cpu():
    assert [supports_float64(torch.device(d)) for d in ("cpu", "cuda", "mps")] == [1, 1, 0]
    assert solving_on(torch.device("mps")) == CPU
    assert solving_on(torch.device("cuda", 1)) == torch.device("cuda", 1)
    values = torch.zeros(2)
    assert for_solving(values) is values
