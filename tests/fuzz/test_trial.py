"""Mutated artefacts load as something sane, or are refused in a sentence that names the file."""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.nullspace import KeyMoments, NullSpace, read_projector, read_second_moments
from alphaedit_peft.pack import EditPack, PackError
from tests.fuzz.kinds import KINDS
from tests.fuzz.trial import SEEDS, Trial
from tests.pack.conftest import MODULES, make_pack

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
MIB = 2**20
CASES, SLOW_CASES = 20, 300  # of each kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_valid_one_loads(kind):
    with Trial(kind) as trial:
        assert trial.outcome() == "loaded"


@pytest.mark.parametrize("kind", KINDS)
def test_some_mutations(kind):
    with Trial(kind) as trial:
        assert {trial.case(number) for number in range(CASES)} <= {"loaded", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutations(kind):
    with Trial(kind) as trial:
        found = [trial.case(number) for number in range(CASES, SLOW_CASES)]
    assert set(found) == {"loaded", "refused"}


SEED_FILES = sorted(path for path in SEEDS.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", SEED_FILES, ids=lambda path: path.relative_to(SEEDS).as_posix())
def test_what_once_went_wrong_is_refused(path):
    kind, _, *inside = path.relative_to(SEEDS).parts
    with Trial(kind) as trial:
        assert trial.with_file("/".join(inside), path.read_bytes()) == "refused"


@pytest.fixture
def peak():
    """Tells how many bytes more a call took at its height than before it."""

    def measured(call):
        trim(0)  # memory that was freed counts as the process's own until then
        CLEAR.write_text("5")  # forget the height so far; proc(5)
        before = height()
        call()
        return height() - before

    def height():
        return int(re.findall(r"VmHWM:\s+(\d+) kB", STATUS.read_text())[0]) * 1024

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or not os.access(CLEAR, os.W_OK):
        pytest.skip("needs glibc, and Linux's /proc/self/clear_refs")
    return measured


def big_pack(folder, dtype):
    factors = {
        name: LowRankDelta(torch.ones(16, 2**18), torch.ones(6, 16)) for name in MODULES
    }  # 32 MiB in float32
    make_pack(16, factors=factors).save_pretrained(folder, dtype=dtype)
    return lambda: EditPack.from_pretrained(folder)


def big_moments(folder):
    KeyMoments({0: torch.eye(2048)}, 9000, {0: "a"}).save_pretrained(folder)
    return lambda: KeyMoments.from_pretrained(folder)


def big_npz(folder):
    noise = torch.randn(2048, 2048)
    total = (noise @ noise.T).numpy()
    np.savez(folder / "x.npz", **{"mom2.mom2": total, "mom2.count": 9000})
    return lambda: read_second_moments({0: folder / "x.npz"})


@pytest.mark.parametrize(
    ("make", "valid"),
    [
        (lambda folder: big_pack(folder, torch.float32), 32 * MIB),
        (lambda folder: big_pack(folder, torch.bfloat16), 32 * MIB),
        (big_moments, 16 * MIB),
        (big_npz, 16 * MIB),
    ],
    ids=["pack", "bfloat16", "moments", "npz"],
)
def test_reading_takes_at_most_twice_what_is_read(tmp_path, peak, make, valid):
    read = make(tmp_path)
    read()  # what is imported or cached once does not count
    assert peak(read) < 2 * valid + 4 * MIB
    assert peak(read) > valid / 2  # it was measured


def mostly_a_hole(path, **shapes):
    """A safetensors file of zeros that take no place on the disk."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


LORA = f"base_model.model.{MODULES[0]}.lora_"


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("adapter_model.safetensors", {f"{LORA}A.weight": [5 * 10**8]}),
        (
            "adapter_model.safetensors",
            {f"{LORA}A.weight": [500, 10**6], f"{LORA}B.weight": [6, 500]},
        ),
        ("alphaedit/targets.safetensors", {"z": [5 * 10**8]}),
        ("alphaedit/targets.safetensors", {"z": [3, 6], "y": [5 * 10**8]}),
    ],
)
def test_a_pack_that_is_mostly_a_hole_takes_no_memory(tmp_path, peak, name, shapes):
    make_pack().save_pretrained(tmp_path)
    mostly_a_hole(tmp_path / name, **shapes)

    def refused():
        with pytest.raises(PackError, match=f"{name}: "):
            EditPack.from_pretrained(tmp_path)

    assert peak(refused) < 8 * MIB


@pytest.mark.parametrize(
    "shapes",
    [
        {"layers.0.basis": [5 * 10**8, 1], "layers.0.values": [0]},
        {"layers.0.basis": [4, 0], "layers.0.values": [5 * 10**8]},
        {"layers.0.basis": [4, 0], "layers.0.values": [4], "layers.1.values": [5 * 10**8]},
    ],
)
def test_a_null_space_that_is_mostly_a_hole_takes_no_memory(tmp_path, peak, shapes):
    NullSpace.identity({0: 4}).save_pretrained(tmp_path)
    mostly_a_hole(tmp_path / "null_space.safetensors", **shapes)

    def refused():
        with pytest.raises(ValueError, match=r"null_space\.safetensors: "):
            NullSpace.from_pretrained(tmp_path)

    assert peak(refused) < 8 * MIB


def test_projectors_stay_on_the_disk_until_they_are_used(tmp_path, peak):
    torch.save(torch.eye(64).repeat(2000, 1, 1), tmp_path / "x.pt")  # 31 MiB

    def refused():
        with pytest.raises(ValueError, match="must be 2000 distinct blocks"):
            read_projector(tmp_path / "x.pt", [0])

    assert peak(refused) < 80 * MIB
