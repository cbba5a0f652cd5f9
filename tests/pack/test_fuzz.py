"""Hostile changes to a pack's folder: it is read as a valid pack or refused, never anything else.

Bytes are flipped in test_pack_fuzz; here the changes are well-formed: JSON values, tensors, headers
and links that mean something else.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import struct
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from alphaedit_peft.pack import EditPack, PackError, read_plain_lora
from alphaedit_peft.pack.format import FILES, MAX_JSON_BYTES

ADAPTER, MODEL, CARD, SIDECAR, EDITS, TARGETS = FILES
QUICK = 5.0  # seconds
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 2**31, 2**63, 10**400, 1e308, -0.0, 0.5])
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=8)
    | st.sampled_from(["../../etc/passwd", "/etc/passwd", "float32", "own", "{}", "\ud800", "\0"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
TENSORS = st.tuples(
    st.lists(st.sampled_from([0, 1, 2, 3, 6, 12, 60]), max_size=3),
    st.sampled_from(
        [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]
    ),
    st.sampled_from([0.0, 1.0, 1e38, float("nan"), float("inf")]),
)
often = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def check(folder):
    """A pack that saves itself and comes back equal, or PackError; within seconds."""
    begun = time.perf_counter()
    try:
        pack = EditPack.from_pretrained(folder)
    except (PackError, FileNotFoundError):
        return
    finally:
        assert time.perf_counter() - begun < QUICK
    pack.summary()
    with tempfile.TemporaryDirectory() as place:
        pack.save_pretrained(Path(place) / "again")
        again = EditPack.from_pretrained(Path(place) / "again")
    assert again.digest() == pack.digest()
    assert again.provenance == pack.provenance
    assert again.compression == pack.compression


@pytest.fixture(params=["plain", "compressed"])
def folder(request, new_pack, tmp_path):
    """A saved pack of five rows, and one compressed to two."""
    pack = new_pack(rows=5)
    pack = pack if request.param == "plain" else pack.compress(rank=2)
    pack.save_pretrained(tmp_path / "pack")
    return tmp_path / "pack"


def changed(folder, place):
    return Path(shutil.copytree(folder, Path(place) / "pack"))


def paths_of(value, at=()):
    """Every place in a JSON value, as a tuple of keys."""
    yield at
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield from paths_of(inner, (*at, key))


def put(value, path, new):
    """A JSON value with one place changed."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(value[path[0]], path[1:], new)
    return copy


@given(st.data())
@often
def test_changed_json_values(folder, data):
    name = data.draw(st.sampled_from([ADAPTER, SIDECAR, EDITS]))
    lines = (folder / name).read_text().split("\n") if name == EDITS else None
    text = lines[0] if lines else (folder / name).read_text()
    value = json.loads(text)
    path = data.draw(st.sampled_from(sorted(paths_of(value), key=str)))
    new = json.dumps(put(value, path, data.draw(VALUES)))
    with tempfile.TemporaryDirectory() as place:
        copy = changed(folder, place)
        whole = "\n".join([new, *lines[1:]]) if lines else new
        (copy / name).write_bytes(whole.encode("utf-8", "surrogatepass"))
        check(copy)


@given(st.sampled_from([MODEL, TARGETS]), st.text(max_size=20), TENSORS, st.booleans())
@often
def test_changed_tensors(folder, name, key, tensor, replace):
    shape, dtype, value = tensor
    with tempfile.TemporaryDirectory() as place:
        copy = changed(folder, place)
        tensors = load_file(copy / name) if (copy / name).exists() else {}
        key = min(tensors) if replace and tensors else key.encode("utf-8", "replace").decode()
        tensors[key] = torch.full(shape, value, dtype=torch.float64).to(dtype)
        save_file(tensors, copy / name)
        check(copy)


@given(
    st.dictionaries(st.text(max_size=8), VALUES, max_size=2),
    st.sampled_from([0, 8, 2**20, 2**40, 2**63, 2**64 - 1]),
    st.binary(max_size=32),
)
@often
def test_headers_of_tensors(saved, header, length, data):
    text = json.dumps(header).encode("utf-8", "replace")
    start = struct.pack("<Q", len(text) if length == 0 else length)
    with tempfile.TemporaryDirectory() as place:
        copy = changed(saved, place)
        (copy / MODEL).write_bytes(start + text + data)
        check(copy)


@pytest.mark.parametrize("shape", [[2**40, 2**40], [2**62, 2], [-1, 12], [3.5, 12], [3, 12, 1]])
def test_absurd_shapes_in_a_header(saved, shape):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}
    text = json.dumps({"base_model.model.x.lora_A.weight": entry}).encode()
    (saved / MODEL).write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 16)
    with pytest.raises(PackError, match=r"safetensors"):
        EditPack.from_pretrained(saved)


@given(
    st.sampled_from(FILES),
    st.sampled_from(["/etc/passwd", "..", ".", "../../outside", "loop", "/dev/zero", "alphaedit"]),
)
@often
def test_files_that_are_links(saved, name, target):
    with tempfile.TemporaryDirectory() as place:
        copy = changed(saved, place)
        (Path(place) / "outside").write_bytes((copy / name).read_bytes())
        (copy / name).unlink()
        (copy / name).symlink_to((copy / name).name if target == "loop" else target)
        check(copy)


@given(st.lists(st.sampled_from(FILES), min_size=1, unique=True), st.booleans())
@often
def test_files_that_are_missing_or_folders(saved, names, folders):
    with tempfile.TemporaryDirectory() as place:
        copy = changed(saved, place)
        for name in names:
            (copy / name).unlink()
            if folders:
                (copy / name).mkdir()
        check(copy)


@pytest.mark.parametrize("name", [MODEL, TARGETS, SIDECAR, EDITS])
def test_nothing_is_unpickled(saved, tmp_path, name):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "opened",)

    (saved / name).write_bytes(pickle.dumps(Trap()))
    torch.save({"x": torch.zeros(2)}, saved / "adapter_model.bin")
    with pytest.raises(PackError):
        EditPack.from_pretrained(saved)
    assert not (tmp_path / "opened").exists()


def test_json_over_its_limit_is_not_read_to_its_end(saved):
    with (saved / SIDECAR).open("r+b") as file:
        file.truncate(100 * MAX_JSON_BYTES)  # sparse, 6 GB
    begun = time.perf_counter()
    with pytest.raises(PackError, match=r"larger than the limit"):
        EditPack.from_pretrained(saved)
    assert time.perf_counter() - begun < QUICK


@pytest.mark.parametrize(
    "text", ["9" * 10**6, "[" * 10**5 + "]" * 10**5, '{"a":' * 10**5 + "1" + "}" * 10**5]
)
def test_json_that_is_hard_to_parse(saved, text):
    values = json.loads((saved / SIDECAR).read_text())
    line = json.dumps(values | {"rows": "HERE"}).replace('"HERE"', text)
    (saved / SIDECAR).write_text(line)
    with pytest.raises(PackError):
        EditPack.from_pretrained(saved)


def test_many_records_are_read_quickly(new_pack, tmp_path):
    pack = new_pack(rows=1)
    record = pack.records[0]
    many = [
        dataclasses.replace(record, edit=dataclasses.replace(record.edit, id=str(i)))
        for i in range(4_000)
    ]
    dataclasses.replace(pack, records=many).save_pretrained(tmp_path / "pack")
    begun = time.perf_counter()
    pack = EditPack.from_pretrained(tmp_path / "pack")
    assert time.perf_counter() - begun < QUICK
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=r"share a row"):
        pack.without(["7"])
    assert time.perf_counter() - begun < QUICK


def test_a_sidecar_on_another_adapters_factors(saved, new_pack, tmp_path):
    new_pack(rows=4).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / MODEL, saved / MODEL)
    with pytest.raises(PackError, match=r"has rank 4, adapter_config.json says r=3"):
        EditPack.from_pretrained(saved)
    with pytest.raises(PackError):
        read_plain_lora(saved)


def test_half_a_surrogate_pair_is_no_text(saved):
    text = (saved / EDITS).read_text().replace("Subject 0", r"\ud800")
    (saved / EDITS).write_text(text)
    with pytest.raises(PackError, match=r"line 1: not valid JSON .*surrogates"):
        EditPack.from_pretrained(saved)
