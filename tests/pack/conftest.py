"""Small packs, and a check that two folders hold the same files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.edits import Edit
from alphaedit_peft.fingerprint import BaseFingerprint
from alphaedit_peft.pack import EditPack, EditRecord

D_IN, D_OUT = 12, 6
MODULES = tuple(f"model.layers.{i}.mlp.down_proj" for i in (10, 2))
SHAPE = {"model_type": "llama", "layers": 12, "hidden": D_OUT, "intermediate": D_IN, "vocab": 99}


def edit(number: int) -> Edit:
    return Edit(f"Subject {number}", "{} lives | in", f" tärget\u2028 {number}")


def make_pack(rows: int = 3, seed: int = 0, **changes: object) -> EditPack:
    random = torch.Generator().manual_seed(seed)
    factors = {
        name: LowRankDelta(
            torch.randn(rows, D_IN, generator=random), torch.randn(D_OUT, rows, generator=random)
        )
        for name in MODULES
    }
    fields: dict = {
        "factors": factors,
        "config": AlphaEditConfig(rewrite_layers=[2, 10], base_model_name_or_path="a/base"),
        "records": tuple(EditRecord(edit(i), i, "own", i % 2, "x", 0.1, 0.9) for i in range(rows)),
        "targets": torch.randn(rows, D_OUT, generator=random),
        "contexts": ("", "The"),
        "base": BaseFingerprint(SHAPE, "0" * 96, 10),
        "null_space": {"digest": "ab", "tokens": 1000, "threshold": 0.02, "mode": "energy"},
        "parents": ({"digest": "cd"},),
    }
    return EditPack(**(fields | changes))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def pack() -> EditPack:
    return make_pack()


@pytest.fixture
def saved(tmp_path: Path, pack: EditPack) -> Path:
    pack.save_pretrained(tmp_path / "pack")
    return tmp_path / "pack"


@pytest.fixture
def new_pack() -> Callable[..., EditPack]:
    return make_pack


@pytest.fixture
def files_of() -> Callable[[Path], dict[str, bytes]]:
    return folder_bytes
