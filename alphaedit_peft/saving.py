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
import socket
import sys
import tempfile
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
_TEMPORARY = ".alphaedit_peft.temporary-"
_ATTEMPTS = 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def replace_file(path: str | Path, content: Content | str) -> None:
    """Make a file hold ``content``, which is text, bytes, or what writes it to a path.

    Its folder is made, links to it are followed, and what is no file, as a pipe, is written to.

    Raises:
        OSError: the disk is full, or a right is missing; what was there before is untouched.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    target = Path(path).resolve()
    with _told(path):
        if Path(path).exists() and not Path(path).is_file() and isinstance(data, bytes):
            Path(path).write_bytes(data)
            return
        with _beside(target) as fresh:
            _write(fresh / target.name, data)
            if target.exists():
                shutil.copymode(target, fresh / target.name)
            _flush(fresh / target.name)
            os.replace(fresh / target.name, target)


def append(path: str | Path, text: str) -> None:
    """Add text to a file, all of it or, with an OSError as that of ``replace_file``, none."""
    rest = memoryview(text.encode("utf-8"))
    with _told(path), open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(size)
            raise


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

    def fill(fresh: Path) -> None:
        for name, data in files.items():
            _write(fresh / name, data)

    _replace_folder(folder, fill, {*files, *owned})


def make_folder(folder: str | Path, fill: Callable[[Path], object]) -> None:
    """Make ``folder`` hold what ``fill`` writes into the folder it is given, and nothing else.

    Errors are those of ``replace_folder``.
    """
    _replace_folder(folder, fill, None)


def _replace_folder(
    folder: str | Path, fill: Callable[[Path], object], new: Collection[str] | None
) -> None:
    """As ``fill`` says, and what the old folder held under other names than ``new``; None: none."""
    check_folder(folder)
    target = Path(folder).resolve()
    with _told(folder), _beside(target) as fresh:
        fill(fresh)
        made = [fresh, *fresh.rglob("*")]
        if target.exists():
            shutil.copymode(target, fresh)
            if new is not None:
                _carry_over(target, fresh, new)
        for path in made:
            _flush(path)
        _swap(fresh, target)


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
def alone(target: str | Path) -> Iterator[None]:
    """Let no other process write a file or folder while the block runs.

    A name beside it, ``.NAME.lock``, is locked and goes at the end; a process that was killed holds
    no lock, and the next one takes over the name. Where the system has no locks nobody is kept off.

    Raises:
        BlockingIOError: another process is in such a block.
        OSError: nothing can be written there.
    """
    place = Path(target).resolve()
    name = place.with_name(f".{place.name}.lock")
    with _told(target):
        name.parent.mkdir(parents=True, exist_ok=True)
        handle = None if fcntl is None else _lock(name, target)
    try:
        yield
    finally:
        if handle is not None:
            name.unlink(missing_ok=True)  # first, so that nobody else's is unlinked
            os.close(handle)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder where the system has its temporary ones, gone at the end.

    The one around it is locked while the block runs: what processes left that were killed is known
    by that, and goes first.
    """
    root = Path(tempfile.gettempdir())
    for left in root.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError), _flocked(left, wait=False) as free:
            if free:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY) as place, _flocked(Path(place), wait=True):
        inner = Path(place) / "files"  # saving into it locks it for itself
        inner.mkdir()
        yield inner


def _lock(name: Path, target: str | Path) -> int:
    """The handle of a lock file that is now this process's."""
    while True:
        handle = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.read(handle, 200).decode("utf-8", "replace") or "another process"
            os.close(handle)
            raise BlockingIOError(
                errno.EAGAIN,
                f"{target} is being written by {other}; wait for its end, or name another",
            ) from None
        except OSError:  # a file system without locks
            return handle
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(name)):
                _sign(handle, name)
                return handle
        os.close(handle)  # its owner went and took the name along


def _sign(handle: int, name: Path) -> None:
    """Write into a lock file whose it is; where the disk is full, the name goes again."""
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError:
        name.unlink(missing_ok=True)
        os.close(handle)
        raise


@contextlib.contextmanager
def _told(target: str | Path) -> Iterator[None]:
    """Say in one sentence what could not be written, whatever library was to write it."""
    try:
        yield
    except Exception as error:
        rust = re.search(r"\(os error (\d+)\)", str(error))  # safetensors, tokenizers: no errno
        if isinstance(error, BlockingIOError) or not (rust or isinstance(error, OSError)):
            raise
        number = int(rust[1]) if rust else error.errno  # type: ignore[attr-defined]
        raise OSError(
            number,
            f"saving {target} failed: {getattr(error, 'strerror', None) or error}; what was there "
            "before is untouched; free space, check rights or choose another folder",
        ) from error


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A folder beside the target to write into; what killed saves of it left goes first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with _flocked(target.parent, wait=True) as locked:
        if locked:
            _sweep(target)
        fresh = _sibling(target, _SAVING)
        try:
            fresh.mkdir()
            yield fresh
        finally:
            shutil.rmtree(fresh, ignore_errors=True)  # after a swap, this name holds the old folder
        with contextlib.suppress(OSError):
            _flush(target.parent)


@contextlib.contextmanager
def _flocked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a folder's lock; False where it is held, or where the file system knows no locks."""
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            locked = True
        except OSError:
            locked = False
        yield locked
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


def _write(path: Path, data: Content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        path.touch()
        mode = path.stat().st_mode
        data(path)
        path.chmod(mode)  # some writers make private files


def _flush(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk, where the system can do that."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
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
