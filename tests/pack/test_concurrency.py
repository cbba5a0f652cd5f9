"""Readers see one save, whole: beside writers, and after a writer was killed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from alphaedit_peft.pack import EditPack, PackError

KILLER = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from conftest import make_pack
from alphaedit_peft import saving
from alphaedit_peft.pack import EditPack

def save_and_kill(folder):
    packs[0].save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    for _ in range(10):
        child = os.fork()
        if child == 0:
            while True:
                for pack in packs:
                    pack.save_pretrained(folder)
        time.sleep(random.uniform(0.002, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert EditPack.from_pretrained(folder).digest() in known
    packs[0].save_pretrained(folder)
    assert EditPack.from_pretrained(folder).digest() == packs[0].digest()
    assert (folder / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in folder.parent.iterdir()) == ["pack"]

torch.set_num_threads(1)
random.seed(0)
packs = [make_pack(rows=3), make_pack(rows=40, seed=1, targets=None)]
known = {pack.digest() for pack in packs}
save_and_kill(Path(sys.argv[2]) / "exchange" / "pack")
saving._exchange = lambda one, other: False
save_and_kill(Path(sys.argv[2]) / "renames" / "pack")
print("whole")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_at_any_moment(tmp_path):
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", KILLER, here, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "whole\n", done.stderr


def test_a_reader_beside_a_writer_sees_one_save(new_pack, tmp_path):
    packs = [new_pack(rows=3), new_pack(rows=20, seed=1)]
    packs[0].save_pretrained(tmp_path / "pack")
    over = threading.Event()

    def write():
        while not over.is_set():
            for pack in packs:
                pack.save_pretrained(tmp_path / "pack")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {EditPack.from_pretrained(tmp_path / "pack").digest() for _ in range(30)}
    finally:
        over.set()
        writer.join()
    assert seen <= {pack.digest() for pack in packs}


def test_writers_beside_each_other_take_turns(new_pack, tmp_path):
    packs = [new_pack(rows=3), new_pack(rows=20, seed=1)]

    def write(pack):
        for _ in range(5):
            pack.save_pretrained(tmp_path / "pack")

    writers = [threading.Thread(target=write, args=(pack,)) for pack in packs]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert EditPack.from_pretrained(tmp_path / "pack").digest() in {p.digest() for p in packs}
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def test_a_folder_that_never_rests(saved, monkeypatch):
    stamps = iter(range(1000))
    monkeypatch.setattr("alphaedit_peft.saving._stamp", lambda folder: next(stamps))
    with pytest.raises(PackError, match=r"changed 20 times while it was read"):
        EditPack.from_pretrained(saved)
