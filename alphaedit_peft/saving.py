"""Files and folders written at once or not at all: the one way in which everything is written.

In: a name, and bytes or what writes them. Out: the file or folder, on disk: readers see the old one
or the new one, never a mixture. Everything is written to a sibling folder and flushed; then the two
names are exchanged in one step (Linux ``renameat2``), or, where the system cannot, the old folder
is moved aside under a name that reading recognises. A process killed at any moment leaves the old
or the new one; the next save sweeps up the rest.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Found = TypeVar("Found")
Content = bytes | Callable[[Path], object]  # a file's bytes, or what writes it to a path
_SAVING, _REPLACED = "saving", "replaced"
_ATTEMPTS = 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


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
