"""A save is whole or not made: foreign files, full disks, links, leftovers of killed saves."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from alphaedit_peft import saving
from alphaedit_peft.pack import EditPack
from alphaedit_peft.saving import replace_folder


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    if request.param == "two renames":
        monkeypatch.setattr(saving, "_exchange", lambda one, other: False)
    return request.param


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
