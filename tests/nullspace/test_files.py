from __future__ import annotations

import json

import pytest
import torch

from alphaedit_peft import safe_files
from alphaedit_peft.nullspace import NullSpace
from alphaedit_peft.safe_files import Field, read_artefact, write_artefact

FIELDS = {"size": Field(int)}


@pytest.fixture
def saved(tmp_path):
    write_artefact(tmp_path, "thing", {"a": torch.ones(2)}, {"size": 2})
    return tmp_path


def test_round_trip(saved):
    tensors, values = read_artefact(saved, "thing", FIELDS)
    assert torch.equal(tensors["a"], torch.ones(2))
    assert values == {"size": 2}


@pytest.mark.parametrize("end", [".json", ".safetensors"])
def test_a_missing_or_damaged_file(saved, end):
    path = saved / f"thing{end}"
    path.write_bytes(b"{not")
    with pytest.raises(ValueError, match=rf"thing{end}: not .*; make or download it again"):
        read_artefact(saved, "thing", FIELDS)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"thing{end} does not exist"):
        read_artefact(saved, "thing", FIELDS)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("MAX_TENSOR_BYTES", r"thing\.safetensors: the file is larger than the limit of 7 bytes"),
        ("MAX_NAMES_BYTES", r"\(a list of tensors of \d+ bytes, more than 7\)"),
    ],
)
def test_a_file_over_its_limit_is_refused(saved, monkeypatch, limit, message):
    monkeypatch.setattr(safe_files, limit, 7)
    with pytest.raises(ValueError, match=message):
        read_artefact(saved, "thing", FIELDS)


def test_a_list_of_tensors_that_claims_to_be_huge_is_not_parsed(saved):
    path = saved / "thing.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(
        ValueError,
        match=rf"thing.safetensors: not a safetensors file \(a list of tensors of {2**40} bytes",
    ):
        read_artefact(saved, "thing", FIELDS)


def test_json_nested_too_deep_is_damaged(saved):
    (saved / "thing.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"thing.json: not valid JSON"):
        read_artefact(saved, "thing", FIELDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "format 'thing' version 9; .* reads 'thing' version 1"),
        ({"format": "other"}, "format 'other' version 1"),
        ({"size": "2"}, "size='2' is not a whole number"),
        ({"more": 1}, r"fields \['more'\] are unknown"),
    ],
)
def test_another_format_version_or_field(saved, change, message):
    path = saved / "thing.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        read_artefact(saved, "thing", FIELDS)


def test_json_that_is_no_object(saved):
    (saved / "thing.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a JSON list, not an object"):
        read_artefact(saved, "thing", FIELDS)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_no_folder_and_no_repo(name):
    with pytest.raises(FileNotFoundError, match="is no folder here, and no Hub repository name"):
        NullSpace.from_pretrained(name)
