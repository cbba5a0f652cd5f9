"""A save is seen whole or not at all: foreign files, full disks, kills, readers beside writers."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from alphaedit_peft.pack import EditPack, PackError
from alphaedit_peft.pack import save as saving
from alphaedit_peft.pack.save import replace_folder

KILLER = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from conftest import make_pack
from alphaedit_peft.pack import EditPack, save

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
save._exchange = lambda one, other: False
save_and_kill(Path(sys.argv[2]) / "renames" / "pack")
print("whole")
"""


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    if request.param == "two renames":
        monkeypatch.setattr(saving, "_exchange", lambda one, other: False)
    return request.param


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
    monkeypatch.setattr("alphaedit_peft.pack.locate._stamp", lambda folder: next(stamps))
    with pytest.raises(PackError, match=r"changed 20 times while it was read"):
        EditPack.from_pretrained(saved)


def test_foreign_files_stay(saved, new_pack, way):
    (saved / "notes").mkdir()
    (saved / "notes" / "a.txt").write_text("a")
    (saved / "empty").mkdir()
    (saved / "alphaedit" / "mine.json").write_text("{}")
    (saved / "link").symlink_to("notes/a.txt")
    (saved / "README.md").write_text("old card")
    new_pack(targets=None).save_pretrained(saved)
    assert (saved / "link").is_symlink()
    assert (saved / "link").read_text() == "a"
    assert (saved / "empty").is_dir()
    assert (saved / "alphaedit" / "mine.json").exists()
    assert "old card" not in (saved / "README.md").read_text()
    assert not (saved / "alphaedit" / "targets.safetensors").exists()
    assert EditPack.from_pretrained(saved).targets is None
    assert [path.name for path in saved.parent.iterdir()] == ["pack"]


def test_foreign_files_are_copied_where_links_are_refused(saved, pack, monkeypatch):
    (saved / "notes.txt").write_text("mine")
    monkeypatch.setattr(os, "link", _fails_at(0, os.link))
    pack.save_pretrained(saved)
    assert (saved / "notes.txt").read_text() == "mine"


def test_saves_into_new_and_empty_folders_and_over_a_plain_adapter(pack, tmp_path, way):
    (tmp_path / "empty").mkdir(mode=0o750)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    for name in ("empty", "plain", "new/and/deep"):
        pack.save_pretrained(tmp_path / name)
        assert EditPack.from_pretrained(tmp_path / name).digest() == pack.digest()
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o750


def test_follows_a_link_to_the_folder(saved, new_pack, way):
    (saved.parent / "latest").symlink_to("pack")
    other = new_pack(seed=5)
    other.save_pretrained(saved.parent / "latest")
    assert (saved.parent / "latest").is_symlink()
    assert EditPack.from_pretrained(saved).digest() == other.digest()


def test_refuses_a_file(pack, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match=r"file is a file; give the name of a folder"):
        pack.save_pretrained(tmp_path / "file")
    with pytest.raises(OSError, match=r"saving .*file/pack failed"):
        pack.save_pretrained(tmp_path / "file" / "pack")


@pytest.mark.parametrize("name", [".", ".."])
def test_refuses_the_working_directory(pack, saved, monkeypatch, name):
    monkeypatch.chdir(saved)
    with pytest.raises(ValueError, match=r"is or holds the working directory"):
        pack.save_pretrained(name)


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize(("holder", "call"), [(os, "fsync"), (Path, "open"), (Path, "mkdir")])
def test_a_full_disk_leaves_the_old_pack(saved, new_pack, files_of, holder, call, after):
    before, other = files_of(saved), new_pack(seed=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holder, call, _fails_at(after, getattr(holder, call)))
        with pytest.raises(OSError, match=r"saving .*pack failed: No space .* untouched") as caught:
            other.save_pretrained(saved)
    assert caught.value.errno == errno.ENOSPC
    assert files_of(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["pack"]


@pytest.mark.parametrize("after", [0, 1])
def test_a_failed_rename_leaves_the_old_pack(saved, new_pack, files_of, monkeypatch, after):
    monkeypatch.setattr(saving, "_exchange", lambda one, other: False)
    before, other = files_of(saved), new_pack(seed=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", _fails_at(after, os.rename))
        with pytest.raises(OSError, match=r"No space"):
            other.save_pretrained(saved)
    assert files_of(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["pack"]


def test_a_rename_that_fails_after_the_swap_is_swept_later(saved, new_pack, monkeypatch):
    monkeypatch.setattr(saving, "_exchange", lambda one, other: False)
    other = new_pack(seed=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", _fails_at(2, os.rename))
        other.save_pretrained(saved)
    assert EditPack.from_pretrained(saved).digest() == other.digest()
    assert len(list(saved.parent.iterdir())) == 2
    other.save_pretrained(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["pack"]


def test_an_interrupted_save_leaves_nothing(saved, pack, files_of, monkeypatch):
    before = files_of(saved)

    def interrupt(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack.save_pretrained(saved)
    assert files_of(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == ["pack"]


def test_a_folder_left_aside_is_read_and_put_back(saved, pack, new_pack):
    aside = saved.with_name(".pack.replaced-0123abcd")
    saved.rename(aside)
    (saved.with_name(".pack.saving-0123abcd")).mkdir()
    assert EditPack.from_pretrained(saved).digest() == pack.digest()
    assert EditPack.from_pretrained(str(saved)).digest() == pack.digest()
    (aside / "notes.txt").write_text("mine")
    other = new_pack(seed=3)
    other.save_pretrained(saved)
    assert EditPack.from_pretrained(saved).digest() == other.digest()
    assert (saved / "notes.txt").exists()
    assert [path.name for path in saved.parent.iterdir()] == ["pack"]


def test_sweeps_its_own_leftovers_only(saved, pack):
    for name in (".pack.saving-0123abcd", ".pack.replaced-0123abcd"):
        (saved.parent / name).mkdir()
    others = [".pack2.saving-0123abcd", ".pack.saving-1.saving-0123abcd", ".pack.saving-x", "mine"]
    for name in others:
        (saved.parent / name).mkdir()
    pack.save_pretrained(saved)
    assert sorted(path.name for path in saved.parent.iterdir()) == sorted([*others, "pack"])


def test_without_locks_nothing_is_swept(tmp_path, monkeypatch):
    left = tmp_path / ".pack.saving-0123abcd"
    left.mkdir()
    monkeypatch.setattr(saving, "fcntl", None)
    replace_folder(tmp_path / "pack", {"a": b"1"})
    assert left.exists()
    assert (tmp_path / "pack" / "a").read_bytes() == b"1"


def test_file_systems_that_cannot_flush_a_folder(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    replace_folder(tmp_path / "pack", {"a": b"1"})
    assert (tmp_path / "pack" / "a").read_bytes() == b"1"


def _fails_at(after, real):
    """A call that works ``after`` times, then finds the disk full once, then works again."""
    calls = iter(range(1000))

    def call(*arguments, **options):
        if next(calls) == after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    return call
