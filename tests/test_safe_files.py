"""Saving an artefact replaces its two files together, or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from alphaedit_peft import safe_files, saving
from alphaedit_peft.nullspace import KeyMoments, NullSpace

KILLED_BETWEEN = """
import os, signal, sys
from pathlib import Path
from alphaedit_peft.saving import replace_folder

def killing(path):
    assert (path.parent / "a").exists()
    os.kill(os.getpid(), signal.SIGKILL)

replace_folder(sys.argv[1], {"a": b"new", "b": killing})
"""

KILLED_ANYWHERE = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from alphaedit_peft import saving
from alphaedit_peft.nullspace import KeyMoments, NullSpace

def made(width):
    keys = torch.randn(500, width, generator=torch.Generator().manual_seed(width))
    moments = KeyMoments({0: keys.T @ keys / 500}, 5000, {0: "mlp"})
    return moments, moments.null_space(0.5, "energy")

def save(pair, folder):
    for value in pair:
        value.save_pretrained(folder)

def save_and_kill(folder):
    save(pairs[0], folder)
    (folder / "notes.txt").write_text("mine")
    for _ in range(10):
        child = os.fork()
        if child == 0:
            while True:
                for pair in pairs:
                    save(pair, folder)
        time.sleep(random.uniform(0.002, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert KeyMoments.from_pretrained(folder).digest() in known
        assert NullSpace.from_pretrained(folder).digest() in known
    save(pairs[0], folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in folder.parent.iterdir()) == ["ns"]

torch.set_num_threads(1)
random.seed(0)
pairs = [made(30), made(60)]
known = {value.digest() for pair in pairs for value in pair}
save_and_kill(Path(sys.argv[1]) / "exchange" / "ns")
saving._exchange = lambda one, other: False
save_and_kill(Path(sys.argv[1]) / "renames" / "ns")
print("whole")
"""


def moments_of(width: int) -> KeyMoments:
    return KeyMoments({0: torch.eye(width)}, 1000, {0: "mlp"})


def run(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_between_two_files_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "ns"
    saving.replace_folder(folder, {"a": b"old", "b": b"old"})
    done = run(KILLED_BETWEEN, folder)
    assert done.returncode == -9, done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": b"old", "b": b"old"}
    assert len(list(tmp_path.iterdir())) == 2
    saving.replace_folder(folder, {"a": b"new", "b": b"new"})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": b"new", "b": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["ns"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_at_any_moment_leaves_whole_artefacts(tmp_path):
    done = run(KILLED_ANYWHERE, tmp_path)
    assert done.stdout == "whole\n", done.stderr


def test_a_failed_write_of_either_file_leaves_both_old_ones(tmp_path, monkeypatch):
    folder = tmp_path / "ns"
    moments_of(4).save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safe_files, "save_file", full)
        with pytest.raises(OSError, match=r"saving .*ns failed: I/O error: No space .*untouched"):
            moments_of(5).save_pretrained(folder)
    written = Path.write_bytes

    def no_json(path, data):
        if path.suffix == ".json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(path, data)

    monkeypatch.setattr(Path, "write_bytes", no_json)
    with pytest.raises(OSError, match=r"saving .*ns failed: No space .*untouched"):
        moments_of(5).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["ns"]


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    moments_of(4).save_pretrained(tmp_path / "ns")
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in (*(tmp_path / "ns").iterdir(), tmp_path / "plain")}
    assert len(modes) == 1


def test_two_artefacts_and_other_files_share_a_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    NullSpace.identity({0: 4}).save_pretrained(tmp_path)
    moments_of(4).save_pretrained(tmp_path)
    NullSpace.identity({0: 5}).save_pretrained(tmp_path)
    assert NullSpace.from_pretrained(tmp_path).width(0) == 5
    assert KeyMoments.from_pretrained(tmp_path).layers == (0,)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_left_aside_is_read(tmp_path):
    folder = tmp_path / "ns"
    moments_of(4).save_pretrained(folder)
    NullSpace.identity({0: 4}).save_pretrained(folder)
    folder.rename(tmp_path / ".ns.replaced-0123abcd")
    assert KeyMoments.from_pretrained(folder).layers == (0,)
    assert NullSpace.from_pretrained(folder).width(0) == 4


def test_a_file_and_the_working_directory_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match=r"file is a file; give the name of a folder"):
        moments_of(4).save_pretrained(tmp_path / "file")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"is or holds the working directory"):
        moments_of(4).save_pretrained(".")
    with pytest.raises(
        FileNotFoundError, match=r"nowhere does not exist; give the folder of a key"
    ):
        KeyMoments.from_pretrained("nowhere")


def test_a_reader_beside_a_writer_sees_one_save(tmp_path):
    both = [moments_of(4), moments_of(40)]
    both[0].save_pretrained(tmp_path / "ns")
    over = threading.Event()

    def write():
        while not over.is_set():
            for moments in both:
                moments.save_pretrained(tmp_path / "ns")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {KeyMoments.from_pretrained(tmp_path / "ns").digest() for _ in range(30)}
    finally:
        over.set()
        writer.join()
    assert seen <= {moments.digest() for moments in both}
