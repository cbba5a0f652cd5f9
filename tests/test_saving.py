"""What is written is whole or not there, one process writes it at a time, and nothing is left."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaedit_peft import saving
from tests.conftest import FULL

if not hasattr(os, "fork"):
    pytest.skip("needs flock and fork", allow_module_level=True)


def fill(folder: Path) -> None:
    (folder / "small").write_bytes(b"new")
    (folder / "sub").mkdir()
    save_file({"x": torch.zeros(2 * FULL)}, folder / "sub" / "large.safetensors")


WRITES = {
    "file": lambda path: saving.replace_file(path, b"x" * 2 * FULL),
    "text": lambda path: saving.replace_file(path, "x" * 2 * FULL),
    "tensors": lambda path: saving.replace_file(
        path, lambda fresh: save_file({"x": torch.zeros(2 * FULL)}, fresh)
    ),
    "append": lambda path: saving.append(path, "x" * 2 * FULL),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_full_disk_leaves_the_old_file_and_is_said_with_its_name(tmp_path, full_disk, name):
    path = tmp_path / "page"
    path.write_text("old")
    with pytest.raises(OSError, match=r"saving .*page failed: .*File too large.*untouched; free"):
        WRITES[name](path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["page"]


def test_a_full_disk_leaves_no_half_of_a_new_folder(tmp_path, full_disk):
    with pytest.raises(OSError, match=r"saving .*model failed: .*File too large") as caught:
        saving.make_folder(tmp_path / "model", fill)
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_what_rust_says_without_a_number_of_its_own_is_a_full_disk_too(tmp_path):
    def tokenizer(folder):  # as the tokenizers library
        raise Exception("No space left on device (os error 28)")

    with pytest.raises(
        OSError, match=r"saving .*model failed: No space left .*untouched"
    ) as caught:
        saving.make_folder(tmp_path / "model", tokenizer)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(ValueError, match="no disk"):
        saving.make_folder(tmp_path / "model", lambda folder: int("no disk"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", denied)
    for write in (*WRITES.values(), lambda path: saving.make_folder(path, fill)):
        if write is not WRITES["append"]:
            with pytest.raises(PermissionError, match=r"saving .*there failed: Permission denied"):
                write(tmp_path / "there")
    with pytest.raises(PermissionError, match=r"saving .*there failed"), saving.alone("there"):
        pytest.fail("not alone")


def test_a_file_keeps_its_mode_and_links_lead_to_it(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "file").chmod(0o640)
    (tmp_path / "link").symlink_to("file")
    saving.replace_file(tmp_path / "link", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "link").is_symlink()
    saving.append(tmp_path / "link", " and more")
    assert (tmp_path / "file").read_text() == "new and more"


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    saving.replace_file(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    left = tmp_path / ".sums.saving-0123abcd"
    left.mkdir()
    (left / ".tmpXYZ").write_bytes(b"half")
    saving.replace_file(
        tmp_path / "sums", lambda path: save_file({"x": torch.ones(2)}, path, {"notes": "1"})
    )
    assert load_file(tmp_path / "sums")["x"].tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["sums"]


HOLDS = """
import sys, time
from alphaedit_peft import saving
from tests.conftest import FULL
with getattr(saving, sys.argv[1])(*sys.argv[2:]) as place:
    print(place, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holding():
    """Start a process that stays within a context of ``saving``; it is killed at the end."""
    started = []

    def hold(*words: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDS, *map(str, words)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        started[-1].first = started[-1].stdout.readline().strip()
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_the_second_process_is_told_of_the_first(tmp_path, holding):
    path = tmp_path / "sums"
    other = holding("alone", path)
    said = rf"sums is being written by process {other.pid} on .*; wait for its end, or name another"
    with pytest.raises(BlockingIOError, match=said), saving.alone(path):
        pytest.fail("not alone")
    with saving.alone(tmp_path / "others"):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".sums.lock"]
    with saving.alone(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        said = r"saving .*sums failed: No space left on device"
        with pytest.raises(OSError, match=said), saving.alone(tmp_path / "sums"):
            pytest.fail("no lock")
    assert list(tmp_path.iterdir()) == []


def test_alone_where_there_are_no_locks(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", none)
        with saving.alone(tmp_path / "a"), saving.alone(tmp_path / "a"):
            pass
    monkeypatch.setattr(saving, "fcntl", None)
    with saving.alone(tmp_path / "a"), saving.alone(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_name_went_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    real, calls = fcntl.flock, []

    def late(handle, how):
        real(handle, how)
        calls.append(how)
        if len(calls) == 1:  # its owner ends, and takes the name along
            (tmp_path / ".a.lock").unlink()

    monkeypatch.setattr(fcntl, "flock", late)
    with saving.alone(tmp_path / "a"):
        assert len(calls) == 2
        assert (tmp_path / ".a.lock").exists()


def test_temporary_folders_of_the_dead_are_swept_and_those_of_the_living_stay(
    tmp_path, holding, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    killed, living = holding("temporary_folder"), holding("temporary_folder")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    mine = tmp_path / f"{saving._TEMPORARY[1:]}mine"
    mine.mkdir()
    with saving.temporary_folder() as place:
        others = [Path(living.first).parent, mine]
        assert sorted(tmp_path.iterdir()) == sorted([place.parent, *others])
        saving.replace_file(place / "file", "x")
    assert sorted(tmp_path.iterdir()) == sorted(others)
    with pytest.raises(ConnectionError, match="its own words"), saving.temporary_folder():
        raise ConnectionError("its own words")
