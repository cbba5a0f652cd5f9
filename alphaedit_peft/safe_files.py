"""Folders written at once or not at all, and strangers' files read safely.

In: a folder's name and its files' bytes, or what writes them. Out: the folder, on disk: readers see
the old one or the new one, never a mixture. Everything is written to a sibling folder and flushed;
then the two names are exchanged in one step (Linux ``renameat2``), or, where the system cannot, the
old folder is moved aside under a name that reading recognises. A process killed at any moment
leaves the old or the new folder; the next save sweeps up the rest. The other way, bytes, JSON or
tensors: nothing is unpickled, no link out of the folder is followed, no file is read past its
limit, and no NaN or infinity gets through where numbers are used.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from alphaedit_peft import parallel

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Found = TypeVar("Found")
Content = bytes | Callable[[Path], object]  # a file's bytes, or what writes it to a path
Damaged = Callable[[str | Path, str], Exception]  # the error for a file: where, what is wrong
_SAVING, _REPLACED = "saving", "replaced"
_ATTEMPTS = 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
FORMAT_VERSION = 1
MAX_JSON_BYTES = 64 * 2**20
MAX_NAMES_BYTES = 2**20  # of the list of tensors; a few hundred bytes for each layer
MAX_TENSOR_BYTES = 64 * 2**30  # moments of 19 layers of d_in 28,672, as in 70B models
Types = type | tuple[type, ...]
ORIGIN: dict[str, Types] = {"tokens": int, "fingerprint": (dict, type(None)), "provenance": dict}


def replace_folder(
    folder: str | Path, files: Mapping[str, Content], owned: Collection[str] = ()
) -> None:
    """Make ``folder`` hold ``files``, and whatever else it held that is not in ``owned``.

    Args:
        folder: the folder; made where it does not exist, links to it are followed.
        files: content by name relative to the folder, with ``/``: bytes, or a function that
            writes the file to the path it is given, for what is too large to hold twice.
        owned: names that do not survive from the old folder unless they are in ``files``.

    Raises:
        FileExistsError: ``folder`` is a file.
        ValueError: ``folder`` is, or holds, the working directory, which cannot be exchanged.
        OSError: the disk is full, or a right is missing; what was there before is untouched.
    """
    check_folder(folder)
    target = Path(folder).resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent) as alone:
            if alone:
                _sweep(target)
            _write_and_swap(target, files, owned)
    except OSError as error:
        raise OSError(
            error.errno,
            f"saving {folder} failed: {error.strerror or error}; what was there before is "
            "untouched; free space, check rights or choose another folder",
        ) from error


def check_folder(folder: str | Path) -> None:
    """Refuse what ``replace_folder`` cannot replace; to call before hours of work, too."""
    target = Path(folder).resolve()
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{folder} is a file; give the name of a folder")
    if Path.cwd().is_relative_to(target):
        raise ValueError(
            f"{folder} is or holds the working directory, which a save would pull away from under "
            "its programs; give a folder of its own"
        )


def left_aside(folder: str | Path) -> Path | None:
    """Where the old folder lies if a save was killed between its two renames, else None."""
    target = Path(folder).resolve()
    if target.exists():
        return None
    return next(iter(_leftovers(target, _REPLACED)), None)


def read_steadily(
    folder: Path, read: Callable[[Path], Found], error: type[ValueError] = ValueError
) -> Found:
    """Read a folder's files so that all come from one save, even while another process saves.

    An ``error`` is raised where the folder is replaced faster than it can be read.
    """
    for _ in range(_ATTEMPTS):
        before = _stamp(folder)
        try:
            found = read(folder)
        except (OSError, ValueError):
            if _stamp(folder) == before:
                raise
            continue
        if _stamp(folder) == before:
            return found
    raise error(f"{folder} changed {_ATTEMPTS} times while it was read; wait for its writer")


def read_bytes(folder: Path, name: str, limit: int, damaged: Damaged) -> bytes:
    """Read a regular file of at most ``limit`` bytes that lies within the folder."""
    path = folder / name
    if not path.is_file():
        raise damaged(path, "the file is missing")
    if not any(path.resolve().is_relative_to(root) for root in _allowed_roots(folder)):
        raise damaged(path, f"a link leads out of the folder, to {path.resolve()}")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > limit else file.read(size + 1)
    if max(size, len(data)) > limit:
        raise damaged(path, f"the file is larger than the limit of {limit} bytes")
    return data


def parse_json(data: bytes, where: str | Path, damaged: Damaged) -> dict[str, Any]:
    """Parse a JSON object with finite numbers."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_finite, parse_float=_finite)
        if b"\\ud" in data.lower():  # half a surrogate pair is no text: it could not be saved again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise damaged(where, f"not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise damaged(where, f"holds a JSON {type(value).__name__}, not an object")
    return value


def parse_tensors(
    data: bytes, where: str | Path, dtypes: Collection[torch.dtype], damaged: Damaged
) -> dict[str, Tensor]:
    """Parse a safetensors file of finite numbers, on the CPU."""
    try:
        tensors = load(data)
    except Exception as error:  # what the parser raises on hostile bytes is not documented
        raise damaged(where, f"not a safetensors file ({error})") from error
    for key, tensor in tensors.items():
        if tensor.dtype not in dtypes:
            raise damaged(where, f"{key} is {tensor.dtype}, not one of {dtypes}")
        if not bool(torch.isfinite(tensor).all()):
            raise damaged(where, f"{key} holds NaN or infinity")
    return tensors


def write_artefact(
    folder: str | Path, stem: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Write tensors and values, with the format's name and version, into a folder, in one step.

    Of several processes the main one does. The folder's other files stay. A process killed at any
    moment leaves the old two files or the new ones. Errors are those of ``replace_folder``.
    """
    if not parallel.is_main():
        return
    kept = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format": stem, "version": FORMAT_VERSION, **values}, indent=2)
    files: dict[str, Content] = {
        f"{stem}.safetensors": partial(_save_tensors, kept),
        f"{stem}.json": (text + "\n").encode(),
    }
    replace_folder(folder, files)


def read_artefact(
    folder: str | Path, stem: str, fields: Mapping[str, Types]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``write_artefact`` wrote, both files of one save.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file that is damaged, over its limit, of another format or version, or with
            other fields or types of them, or tensors that are not finite float32.
    """
    place = left_aside(folder) or Path(folder)
    if not place.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; give the folder of a {stem} artefact")
    return read_steadily(place, lambda found: _read(found, stem, fields))


def versions(*more: str) -> dict[str, str]:
    """Versions of what makes the numbers, as far as it is installed, for provenance."""
    found = {}
    for name in sorted(("alphaedit_peft", "torch", "transformers", *more)):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@contextlib.contextmanager
def _locked(parent: Path) -> Iterator[bool]:
    """Hold off other saves beside this one; False where the file system knows no locks."""
    if fcntl is None:
        yield False
        return
    handle = os.open(parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(handle)


def _sweep(target: Path) -> None:
    """Undo what killed saves left: put an old folder back if it is the only one, else delete."""
    aside = left_aside(target)
    if aside is not None:
        os.rename(aside, target)
    for left in _leftovers(target, f"{_SAVING}|{_REPLACED}"):
        shutil.rmtree(left, ignore_errors=True)


def _leftovers(target: Path, kinds: str) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.({kinds})-[0-9a-f]{{8}}")
    if not target.parent.is_dir():
        return []
    return sorted(path for path in target.parent.iterdir() if pattern.fullmatch(path.name))


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(4)}")


def _write_and_swap(target: Path, files: Mapping[str, Content], owned: Collection[str]) -> None:
    fresh = _sibling(target, _SAVING)
    try:
        fresh.mkdir()
        for name, data in files.items():
            _write(fresh / name, data)
        if target.exists():
            shutil.copymode(target, fresh)
            _carry_over(target, fresh, {*files, *owned})
        for folder in {fresh, *(fresh / name for name in files)}:
            _flush(folder if folder.is_dir() else folder.parent)
        _swap(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # after the swap, this name holds the old folder
    with contextlib.suppress(OSError):
        _flush(target.parent)


def _write(path: Path, data: Content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        path.touch()
        mode = path.stat().st_mode
        data(path)
        path.chmod(mode)  # some writers make private files
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Have the folder's list of names on the disk, where the system can do that."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _carry_over(old: Path, new: Path, without: Collection[str]) -> None:
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old).as_posix()
        if name in without:
            continue
        if path.is_dir() and not path.is_symlink():
            (new / name).mkdir(exist_ok=True)
            continue
        try:  # a second name for the file, where system and file system can
            os.link(path, new / name, follow_symlinks=False)
        except (OSError, NotImplementedError):
            shutil.copy2(path, new / name, follow_symlinks=False)


def _swap(fresh: Path, target: Path) -> None:
    """Give the fresh folder the target's name, and the old one, if any, the name of ``fresh``."""
    if not target.exists():
        os.rename(fresh, target)
    elif not _exchange(fresh, target):
        aside = _sibling(target, _REPLACED)
        os.rename(target, aside)
        try:
            os.rename(fresh, target)
        except BaseException:
            os.rename(aside, target)
            raise
        with contextlib.suppress(OSError):  # it is done; the next save sweeps this up
            os.rename(aside, fresh)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    old, new = os.fsencode(one), os.fsencode(other)
    exchange = ctypes.c_uint(_RENAME_EXCHANGE)
    return bool(renameat2(_AT_FDCWD, old, _AT_FDCWD, new, exchange) == 0)


def _stamp(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_ino, status.st_mtime_ns


def _allowed_roots(folder: Path) -> list[Path]:
    """The folder itself and, inside the Hub's cache, the blobs that its snapshots link to.

    The cache keeps a repository in models--OWNER--NAME, with snapshots/COMMIT and blobs.
    """
    here = folder.resolve()
    repositories = [
        parent.parent
        for parent in here.parents
        if parent.name == "snapshots" and parent.parent.name.startswith("models--")
    ]
    return [here, *(repository / "blobs" for repository in repositories)]


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # it has no errno; a full disk is one
        raise OSError(str(error)) from error


def _read(
    folder: Path, stem: str, fields: Mapping[str, Types]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    json_path, tensor_path = (folder / f"{stem}{end}" for end in (".json", ".safetensors"))
    for path in (json_path, tensor_path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; {folder} holds no {stem} artefact")
    try:
        _check_sizes(json_path, tensor_path)
        values = json.loads(json_path.read_text(encoding="utf-8"))
        tensors = load_file(tensor_path)
    except (ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{folder} holds a damaged {stem} artefact: {error}") from error
    _check_header(json_path, stem, values, fields)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
            raise ValueError(
                f"{tensor_path}: {name} ({tensor.dtype}) is not finite float32; the file is damaged"
            )
    return tensors, {name: values[name] for name in fields}


def _check_sizes(json_path: Path, tensor_path: Path) -> None:
    """Refuse files over their limits, before anything of them is parsed."""
    with tensor_path.open("rb") as file:
        names = int.from_bytes(file.read(8), "little")  # how safetensors begins
    found = (
        (json_path, "the file", json_path.stat().st_size, MAX_JSON_BYTES),
        (tensor_path, "the file", tensor_path.stat().st_size, MAX_TENSOR_BYTES),
        (tensor_path, "its list of tensors", names, MAX_NAMES_BYTES),
    )
    for path, what, size, limit in found:
        if size > limit:
            raise ValueError(
                f"{path.name}: {what} takes {size} bytes, over the limit of {limit}; make or "
                "download it again"
            )


def _check_header(path: Path, stem: str, values: Any, fields: Mapping[str, Types]) -> None:
    header = values if isinstance(values, dict) else {}
    if header.get("format") != stem or header.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} is format {header.get('format')!r} version {header.get('version')!r}; this "
            f"version of alphaedit_peft reads {stem!r} version {FORMAT_VERSION}"
        )
    if wrong := sorted(set(header) ^ {"format", "version", *fields}):
        raise ValueError(f"{path}: fields {wrong} are missing or unknown; the file is damaged")
    for name, types in fields.items():
        if not isinstance(header[name], types):
            raise ValueError(f"{path}: {name}={header[name]!r} is of a wrong type; damaged file")
