"""Damaged and hostile pack folders give PackError, and nothing else."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaedit_peft.pack import EditPack, PackError, read_plain_lora
from alphaedit_peft.pack.format import FILES

ADAPTER, MODEL = "adapter_config.json", "adapter_model.safetensors"
SIDECAR, EDITS, TARGETS = (
    f"alphaedit/{name}" for name in ("config.json", "edits.jsonl", "targets.safetensors")
)
KEY_A = "base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"
KEY_B = KEY_A.replace("lora_A", "lora_B")


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(path, **changes):
    tensors = load_file(path) | {k.replace("/", "."): v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


def refused(folder, message):
    with pytest.raises(PackError, match=message):
        EditPack.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type='IA3' is not 'LORA'.*PeftModel"),
        ({"peft_type": None}, r"peft_type=None"),
        ({"r": 2, "lora_alpha": 2}, r"has rank 3, adapter_config.json says r=2"),
        ({"r": 0}, r"r=0 is outside 1.."),
        ({"r": True}, r"r=True"),
        ({"r": 10**300}, r"r=1000"),
        ({"lora_alpha": 6}, r"lora_alpha / r is 2.0, not 1"),
        ({"lora_alpha": "3"}, r"lora_alpha='3' is not a number"),
        ({"use_rslora": True}, r"lora_alpha / r is 1.73"),
        ({"use_rslora": 1}, r"use_rslora=1 is not true or false"),
        ({"fan_in_fan_out": True}, r"fan_in_fan_out=True differs"),
        ({"fan_in_fan_out": "no"}, r"fan_in_fan_out='no' is not true"),
        ({"target_modules": ["model.layers.2.mlp.down_proj"]}, r"target_modules are not"),
        ({"target_modules": "all-linear"}, r"target_modules are not"),
        ({"target_modules": [1]}, r"target_modules\[0\]=1 is not text"),
        ({"rank_pattern": {"x": 1}}, r"rank_pattern=\{'x': 1\} is more than plain LoRA"),
        ({"alpha_pattern": {"x": 1}}, r"alpha_pattern="),
        ({"bias": "all"}, r"bias='all'"),
        ({"use_dora": True}, r"use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa'"),
        ({"some_future_method": {"a": 1}}, r"some_future_method="),
    ],
)
def test_adapter_config(saved, changes, message):
    change_json(saved / ADAPTER, **changes)
    refused(saved, message)


def test_a_lora_that_is_not_plain_is_not_read(saved):
    change_json(saved / ADAPTER, use_dora=True)
    with pytest.raises(PackError, match=r"use_dora=True is more than plain LoRA"):
        read_plain_lora(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, r"format_version=2 is not 1, .*; update alphaedit_peft"),
        ({"rows": 2}, r"r=3 differs from rows=2"),
        ({"rows": 0}, r"holds 3 rows, alphaedit/config.json says rows=0"),
        ({"rows": -3}, r"r=3 differs from rows=-3"),
        ({"rows": True}, r"rows=True is not a whole number"),
        ({"contexts": "x"}, r"contexts='x' is not a list"),
        ({"contexts": [1]}, r"contexts\[0\]=1 is not text"),
        ({"parents": [1]}, r"parents\[0\]=1 is not an object"),
        ({"config": {"colour": 1}}, r"config fields \['colour'\] are unknown"),
        ({"config": {"steps": 0}}, r"steps=0 is outside"),
        ({"config": {"kl_prompt": 5}}, r"config.json: "),
        ({"base": {}}, r"fields of fingerprint \['digest', .* are missing"),
        ({"base": {"shape": 5, "digest": None, "last_layer": 1}}, r"config.json: "),
        ({"base": {"shape": {}, "digest": "00", "last_layer": 1}}, r"digest '00'"),
        ({"colour": 1}, r"fields \['colour'\] are unknown"),
    ],
)
def test_sidecar_config(saved, changes, message):
    change_json(saved / SIDECAR, **changes)
    refused(saved, message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", r"edits.jsonl, line 4: record has missing fields"),
        ("[]", r"line 4: holds a JSON list, not an object"),
        ("{", r"line 4: not valid JSON"),
        ("[" * 100_000, r"line 4: not valid JSON"),
        ('{"a": NaN}', r"NaN is no finite number"),
        ('{"a": 1e999}', r"1e999 is no finite number"),
        ('{"a": "' + "x" * 2**20 + '"}', r"line 4: its bytes are more than the limit"),
    ],
)
def test_edits(saved, line, message):
    with (saved / EDITS).open("a") as file:
        file.write(line + "\n")
    refused(saved, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row": 3}, r"rows \[3\] of the records are outside the factors' 3 rows"),
        ({"row": -1}, r"line 4: row=-1"),
        ({"batch": None}, r"line 4: batch=None"),
        ({"role": "x"}, r"line 4: role='x'"),
        ({"probability_after": 2}, r"line 4: probability_after=2"),
        ({"edit": {"subject": "a", "prompt": "b", "target_new": "c"}}, r"line 4: prompt='b'"),
        ({"edit": []}, r"line 4: edit=\[\] must be a JSON object"),
        ({}, r"edit ids \['.*'\] occur twice"),
    ],
)
def test_records(saved, changes, message):
    lines = (saved / EDITS).read_bytes().split(b"\n")
    record = json.dumps(json.loads(lines[0]) | changes)
    (saved / EDITS).write_bytes(b"\n".join([*lines[:3], record.encode(), b""]))
    refused(saved, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({KEY_A: torch.full((3, 12), torch.nan)}, r"lora_A.weight holds NaN or infinity"),
        ({KEY_B: torch.full((6, 3), torch.inf)}, r"lora_B.weight holds NaN or infinity"),
        ({KEY_A: torch.zeros(2, 12)}, r"A \(2, 12\) and B \(6, 3\) do not multiply"),
        ({KEY_A: torch.zeros(2, 12), KEY_B: torch.zeros(6, 2)}, r"rank 2, .* says r=3"),
        ({KEY_B: torch.zeros(7, 3)}, r"targets \(3, 6\) do not fit .*: \(3, 7\) needed"),
        ({KEY_A: torch.zeros(36)}, r"lora_A.weight \(36,\) is not a matrix"),
        ({KEY_A: torch.zeros(3, 12).double()}, r"is torch.float64, not one of"),
        ({KEY_A: torch.zeros(3, 12).long()}, r"is torch.int64, not one of"),
        ({KEY_A: None}, r"down_proj has lora_B only"),
        ({"x": torch.zeros(1, 1)}, r"key 'x' is not 'base_model.model.<module>"),
        ({KEY_A + ".x": torch.zeros(1, 1)}, r"weight.x' is not"),
    ],
)
def test_factors(saved, changes, message):
    change_tensors(saved / MODEL, **changes)
    refused(saved, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z": torch.zeros(2, 6)}, r"targets \(2, 6\) do not fit"),
        ({"z": torch.full((3, 6), torch.inf)}, r"z holds NaN or infinity"),
        ({"y": torch.zeros(3, 6)}, r"holds \['y', 'z'\], not 'z' alone"),
    ],
)
def test_targets(saved, changes, message):
    change_tensors(saved / TARGETS, **changes)
    refused(saved, message)


@pytest.mark.parametrize("name", [MODEL, TARGETS])
def test_not_safetensors(saved, name):
    whole = (saved / name).read_bytes()
    for content in (
        b"",
        whole[:-1],
        whole[:20],
        whole + b"x",
        b"\xff" * 64,
        pickle.dumps({"a": 1}),
    ):
        (saved / name).write_bytes(content)
        refused(saved, rf"{name}: not a safetensors file")


def test_no_tensor_at_all(saved):
    save_file({}, saved / MODEL)
    refused(saved, r"there is no tensor in it")


@pytest.mark.parametrize("name", [ADAPTER, MODEL, EDITS])
def test_a_missing_file(saved, name):
    (saved / name).unlink()
    refused(saved, rf"{name}: the file is missing")
    (saved / name).mkdir()
    refused(saved, rf"{name}: the file is missing")


@pytest.mark.parametrize("name", [ADAPTER, SIDECAR, EDITS])
def test_large_json(saved, name, monkeypatch):
    limit = "MAX_EDITS_BYTES" if name == EDITS else "MAX_JSON_BYTES"
    monkeypatch.setattr(f"alphaedit_peft.pack.format.{limit}", 2000)
    (saved / name).write_bytes(b" " * 2001)
    refused(saved, rf"{name}: the file is larger than the limit of 2000 bytes")


@pytest.mark.parametrize("name", [name for name in FILES if name != "README.md"])
def test_links_out_of_the_folder(saved, name):
    outside = saved.parent / "outside"
    (saved / name).rename(outside)
    (saved / name).symlink_to(outside)
    refused(saved, rf"{name}: a link leads out of the folder, to .*outside")


def test_links_within_the_folder(saved, pack):
    (saved / EDITS).rename(saved / "elsewhere")
    (saved / EDITS).symlink_to(saved / "elsewhere")
    assert EditPack.from_pretrained(saved).digest() == pack.digest()


def test_text_that_is_no_text(saved):
    (saved / EDITS).write_bytes(b"\xff\xfe")
    refused(saved, r"edits.jsonl, line 1: not valid JSON")
