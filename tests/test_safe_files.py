"""Saving an artefact replaces its two files together, or not at all; files are read strictly."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from alphaedit_peft import safe_files, saving
from alphaedit_peft.messages import LONGEST
from alphaedit_peft.nullspace import KeyMoments, NullSpace
from alphaedit_peft.safe_files import DamagedFileError, Field, check_fields, refusing

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


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("field", "value", "wrong"),
    [
        (Field(int), True, "=True is not a whole number"),
        (Field((int, float)), "1", "='1' is not a number"),
        (Field((dict, type(None))), [], r"=\[\] is not an object or null"),
        (Field(int, 0, 9), 10**400, r"=10{50,}.* is outside 0\.\.9"),
        (Field(float, 0, 1), float("nan"), r"=nan is outside 0\.\.1"),
        (Field(str, 1, 3), "", r"='' is shorter or longer than 1\.\.3"),
        (
            Field(list, each=Field(list, each=Field(int))),
            [[1], [2, None]],
            r"\[1\]\[1\]=None is not",
        ),
        (Field(dict, each=Field(str)), {"a": 1}, r"\['a'\]=1 is not text"),
        (Field(dict, key=r"\d+"), {"a": 1}, " holds 'a', which is no name there"),
    ],
)
def test_a_field_says_what_is_wrong_and_where(field, value, wrong):
    with pytest.raises(ValueError, match=f"^thing.x{wrong}"):
        check_fields({"x": value}, {"x": field}, "thing")


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ([], r"^it=\[\] is not an object"),
        ({}, r"^fields \['a'\] are missing; it has a, b$"),
        ({"a": 1, "c": 2}, r"^fields \['c'\] are unknown; it has a, b$"),
        ({"c": 2}, r"^fields \['a'\] are missing and \['c'\] are unknown; it has"),
    ],
)
def test_fields_that_are_missing_or_unknown(values, wrong):
    wanted = {"a": Field(int), "b": Field(int, optional=True)}
    with pytest.raises(ValueError, match=wrong):
        check_fields(values, wanted)
    assert check_fields({"a": 1, "z": 2}, wanted, others=True) == {"a": 1, "z": 2}


def test_what_checks_raise_is_said_of_the_file():
    for raised, told in (
        (ValueError("x" * 999), r"^f\.json: xxx.*xxx\.\.\.; make or download it again$"),
        (KeyError("a"), "f.json: no field 'a'"),
        (RecursionError(), "f.json: RecursionError"),
        (OverflowError("too large"), "f.json: too large"),
    ):
        with pytest.raises(DamagedFileError, match=told) as caught, refusing("f.json"):
            raise raised
        assert len(str(caught.value)) <= LONGEST


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (b"{", r"f\.json: not valid JSON \(Expecting"),
        (b"\xff", r"not valid JSON \('utf-8' codec"),
        (DEEP.encode(), "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": 1e999}', "1e999 is no finite number"),
        (b'{"a": NaN}', "NaN is no finite number"),
        (rb'{"a": "\ud800"}', "surrogates not allowed"),
        (b"[1]", "holds a JSON list, not an object"),
        (b'{"a": "' + b"x" * 200 + b'"}', "the file is larger than the limit of 200 bytes"),
    ],
    ids=["cut", "bytes", "deep", "digits", "overflow", "nan", "surrogate", "list", "long"],
)
def test_json_that_is_refused(tmp_path, text, wrong):
    limit = 200 if b"xxx" in text else 2**20
    (tmp_path / "f.json").write_bytes(text)
    with pytest.raises(DamagedFileError, match=wrong) as caught:
        safe_files.read_json(tmp_path / "f.json", limit=limit)
    assert len(str(caught.value)) <= LONGEST


def test_lines_are_read_one_by_one_and_named(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}\n{"a"')
    found = list(safe_files.json_lines(path, cut=True))
    assert [value for _, value in found] == [{"a": 1}, {"a": 2}]
    assert found[1][0] == f"{path}, line 3"
    with pytest.raises(DamagedFileError, match="line 4: not valid JSON"):
        list(safe_files.json_lines(path))
    with pytest.raises(DamagedFileError, match=r"line 1: its bytes are more than the limit of 7"):
        list(safe_files.json_lines(path, limits=(99, 7)))
    with pytest.raises(DamagedFileError, match=r"f.jsonl: the file is larger than the limit of 9"):
        list(safe_files.json_lines(path, limits=(9, 9)))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_pipes_devices_and_links_out_of_the_folder_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "out").symlink_to(Path(__file__))
    for name, wrong in (
        ("pipe", r"pipe: the file is missing \(what is there is no regular file\)"),
        ("zeros", "no regular file"),
        ("nothing", "nothing: the file is missing;"),
        ("out", r"a link leads out of the folder, to .*test_safe_files\.py"),
    ):
        with pytest.raises(DamagedFileError, match=wrong):
            safe_files.read_bytes(tmp_path / name, 99, within=tmp_path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "wrong"),
    [
        ([], "its list of tensors is no JSON object"),
        ({"a": 1}, "a=1 is not an object"),
        ({"a": {**ENTRY, "dtype": "X9"}}, "a is of dtype 'X9'"),
        ({"a": {**ENTRY, "shape": [-2]}}, r"a\.shape\[0\]=-2 is outside 0\.\."),
        ({"a": {**ENTRY, "shape": [2**40, 2**40]}}, r"a \(.*\) does not fill bytes 0\.\.8"),
        ({"a": {**ENTRY, "shape": [1], "data_offsets": [4, 8]}}, "nothing, or two tensors, are at"),
        ({"a": ENTRY, "b": ENTRY}, "nothing, or two tensors, are at byte"),
        ({"a": {**ENTRY, "shape": [1], "data_offsets": [0, 4]}}, r"it has \d+ bytes, and its ten"),
        ({"a": ENTRY, "__metadata__": {"a": 1}}, r"__metadata__\['a'\]=1 is not text"),
        ('{"a": 1, "a": 2}', "the field 'a' is there twice"),
        (DEEP, "not a safetensors file"),
    ],
)
def test_a_list_of_tensors_that_cannot_be(tmp_path, header, wrong):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with (
        pytest.raises(DamagedFileError, match=rf"f: not a safetensors file.*{wrong}|^.*f: {wrong}"),
        safe_files.opened_tensors(tmp_path / "f", 2**20),
    ):
        pass


def test_tensors_are_read_as_they_were_saved(tmp_path):
    kept = {
        "a": torch.randn(3, 40_000),
        "b": torch.arange(5, dtype=torch.bfloat16),
        "c": torch.zeros(0, 7, dtype=torch.float16),
        "d": torch.tensor(True),
        "e": torch.tensor([2**62]),
    }
    save_file(kept, tmp_path / "f", {"note": "x"})
    with safe_files.opened_tensors(tmp_path / "f", 2**20) as file:
        assert file.notes == {"note": "x"}
        assert all(torch.equal(file.read(name), tensor) for name, tensor in kept.items())
        assert {name: stored.dtype for name, stored in file.tensors.items()} == {
            name: tensor.dtype for name, tensor in kept.items()
        }
        with pytest.raises(DamagedFileError, match=r"e is torch\.int64, not one of"):
            file.require([torch.float32])
        os.truncate(tmp_path / "f", file.tensors["a"].end - 1)
        with pytest.raises(DamagedFileError, match="a is cut off"):
            file.read("a")
    save_file({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "f")
    with (
        safe_files.opened_tensors(tmp_path / "f", 2**20) as file,
        pytest.raises(DamagedFileError, match="a holds NaN or infinity"),
    ):
        file.read("a")
    with (
        pytest.raises(DamagedFileError, match="larger than the limit of 9 bytes"),
        safe_files.opened_tensors(tmp_path / "f", 9),
    ):
        pass


def test_an_archive_that_unpacks_to_too_much_or_asks_for_too_much_at_once(tmp_path, monkeypatch):
    path = tmp_path / "f.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(10**6))
    with pytest.raises(ValueError, match=r"it unpacks to 1000000 bytes, over 16 times its size"):
        safe_files.opened_archive(path, 16).__enter__()
    with pytest.raises(ValueError, match="it is packed or encrypted in a way that no such file"):
        safe_files.opened_archive(path, 2000, [zipfile.ZIP_STORED]).__enter__()
    monkeypatch.setattr(safe_files, "MAX_NAMES_BYTES", 40)
    with pytest.raises(zipfile.BadZipFile, match="its directory takes more than 40 bytes"):
        safe_files.opened_archive(path, 2000).__enter__()
