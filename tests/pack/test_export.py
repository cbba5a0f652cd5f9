"""Exports are plain LoRA folders whose B A is the pack's, whatever the reader asks for."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.fingerprint import BaseFingerprint
from alphaedit_peft.pack import EditPack, read_plain_lora

PREFIX = "base_model.model.model.layers"


def deltas(folder, config=None):
    """B A by block, times alpha / r, from the two files as any reader would."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {key.rpartition(".lora_")[0] for key in tensors}
    scaling = config["lora_alpha"] / config["r"]
    found = {}
    for name in names:
        A, B = (tensors[f"{name}.lora_{side}.weight"].double() for side in "AB")
        assert A.shape[0] == B.shape[1] == config["r"]
        found[name.removeprefix("base_model.model.")] = scaling * B @ A
    assert set(found) == set(config["target_modules"])
    return found


def close(found, delta, atol=1e-5):
    torch.testing.assert_close(found, delta.dense().double(), rtol=0, atol=atol)


def test_it_is_a_plain_lora_without_sidecar(pack, tmp_path):
    done = pack.export(tmp_path / "out")
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    assert (done.rank, done.modules, done.dtype) == (3, pack.modules, torch.float32)
    assert set(done.rounding_errors.values()) == {0.0}
    for name, found in deltas(tmp_path / "out").items():
        close(found, pack.factors[name])
        assert torch.equal(read_plain_lora(tmp_path / "out")[name].A, pack.factors[name].A)
    with pytest.raises(FileNotFoundError, match=r"is no edit pack"):
        EditPack.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("rows", "asked", "rank"),
    [(3, "vllm", 8), (1, "vllm", 1), (9, "vllm", 16), (3, 64, 64), (3, 3, 3), (0, None, 1)],
)
def test_rows_of_zeros_reach_the_rank_asked_for(new_pack, tmp_path, rows, asked, rank):
    pack = new_pack(rows=rows)
    assert pack.export(tmp_path, max_rank=asked).rank == rank
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    for name, found in deltas(tmp_path).items():
        close(found, pack.factors[name])


def test_too_many_rows_are_refused(new_pack, tmp_path):
    narrow = {
        "model.layers.1.mlp.down_proj": LowRankDelta(torch.zeros(513, 2), torch.zeros(2, 513))
    }
    pack = new_pack(factors=narrow, records=(), targets=None)
    with pytest.raises(ValueError, match=r"rank 513 is over 512.*compress it to rank 512 first"):
        pack.export(tmp_path, max_rank="vllm")
    with pytest.raises(ValueError, match=r"rank 513 is over 100, .*max_rank=100.*to rank 100"):
        pack.export(tmp_path, max_rank=100)
    assert not list(tmp_path.iterdir())


def test_all_layers_get_zeros_where_nothing_was_edited(pack, new_pack, tmp_path):
    done = pack.export(tmp_path / "a", all_layers=True)
    assert done.modules == tuple(f"model.layers.{i}.mlp.down_proj" for i in range(12))
    for name, found in deltas(tmp_path / "a").items():
        if name in pack.factors:
            close(found, pack.factors[name])
        else:
            assert not found.any()
    unknown = new_pack(base=None)
    assert len(unknown.export(tmp_path / "b", all_layers=True, num_blocks=11).modules) == 11
    with pytest.raises(ValueError, match=r"how many blocks its base has; give num_blocks"):
        unknown.export(tmp_path / "c", all_layers=True)
    with pytest.raises(ValueError, match=r"num_blocks=10 does not fit .* blocks \(2, 10\)"):
        unknown.export(tmp_path / "c", all_layers=True, num_blocks=10)
    hostile = new_pack(base=BaseFingerprint({"layers": "many"}, None, 1))
    with pytest.raises(ValueError, match=r"how many blocks"):
        hostile.export(tmp_path / "c", all_layers=True)


def test_a_module_without_a_block_number_is_refused(new_pack, tmp_path):
    pack = new_pack(factors={"head": LowRankDelta(torch.zeros(3, 2), torch.zeros(6, 3))})
    with pytest.raises(ValueError, match=r"module 'head' names no block"):
        pack.export(tmp_path, all_layers=True)


def test_transposed_for_llama_cpp(new_pack, tmp_path):
    pack = new_pack(fan_in_fan_out=True)
    assert pack.export(tmp_path / "t", format="llama.cpp", max_rank=8).transposed
    for name, found in deltas(tmp_path / "t").items():
        close(found.T, pack.factors[name])
    assert not pack.export(tmp_path / "p").transposed
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    plain = new_pack()
    assert not plain.export(tmp_path / "l", format="llama.cpp").transposed
    for name, found in deltas(tmp_path / "l").items():
        close(found, plain.factors[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_measured(pack, tmp_path, dtype):
    done = pack.export(tmp_path, dtype=dtype)
    for name, found in deltas(tmp_path).items():
        exact = pack.factors[name].dense().double()
        error = float((found - exact).norm() / exact.norm())
        assert done.rounding_errors[name] == pytest.approx(error, rel=1e-3)
        assert error > 0


def test_compressed_packs_are_exported_in_their_dtype(new_pack, tmp_path):
    small = new_pack(rows=5).compress(rank=2, dtype=torch.bfloat16)
    done = small.export(tmp_path)
    assert (done.rank, done.dtype) == (2, torch.bfloat16)
    assert set(done.rounding_errors.values()) == {0.0}
    for name, found in deltas(tmp_path).items():
        close(found, small.factors[name])


def test_an_export_replaces_an_export_and_nothing_else(pack, saved, tmp_path):
    pack.export(tmp_path / "out", max_rank=8)
    pack.export(tmp_path / "out")
    assert read_plain_lora(tmp_path / "out")[pack.modules[0]].rank == 3
    with pytest.raises(FileExistsError, match=r"is an edit pack, which an export would replace"):
        pack.export(saved)
    assert EditPack.from_pretrained(saved).digest() == pack.digest()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds \['notes.txt'\]; give an empty folder"):
        pack.export(tmp_path / "out")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"format": "gguf"}, r"format='gguf' is unknown; use one of \('peft', 'llama.cpp'\)"),
        ({"dtype": torch.int8}, r"dtype=torch.int8 cannot be saved"),
        ({"max_rank": 0}, r"max_rank=0 must be a whole number"),
        ({"max_rank": "tgi"}, r"max_rank='tgi' must be"),
    ],
)
def test_unusable_wishes(pack, tmp_path, asked, message):
    with pytest.raises(ValueError, match=message):
        pack.export(tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()
