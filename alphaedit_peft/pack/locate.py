"""Find a pack's folder: on this disk, or on the Hub.

In: a path or a repository name. Out: a local folder, holding at least what the repository has of
the pack's files. A folder that a killed save left aside is found under its own name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from alphaedit_peft.pack.format import FILES, PackError
from alphaedit_peft.pack.save import left_aside

Found = TypeVar("Found")
_ATTEMPTS = 20


def locate(
    path_or_repo: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> Path:
    """The local folder of a pack; downloads only the pack's own files.

    Raises:
        FileNotFoundError: neither a folder here nor a repository name.
    """
    folder = Path(path_or_repo) / (subfolder or "")
    if folder.is_dir():
        return folder
    aside = left_aside(folder)
    if aside is not None:
        return aside
    missing = f"{folder} is no folder here, and no Hub repository name either; check the path"
    if isinstance(path_or_repo, Path) or Path(path_or_repo).exists():
        raise FileNotFoundError(missing)
    prefix = f"{subfolder}/" if subfolder else ""
    try:
        snapshot = snapshot_download(
            path_or_repo,
            revision=revision,
            token=token,
            allow_patterns=[prefix + name for name in FILES],
        )
    except HFValidationError as error:
        raise FileNotFoundError(missing) from error
    return Path(snapshot) / (subfolder or "")


def read_steadily(folder: Path, read: Callable[[Path], Found]) -> Found:
    """Read a folder's files so that all come from one save, even while another process saves.

    Raises:
        PackError: the folder is replaced faster than it can be read; otherwise what ``read`` says.
    """
    for _ in range(_ATTEMPTS):
        before = _stamp(folder)
        try:
            found = read(folder)
        except (OSError, PackError):
            if _stamp(folder) == before:
                raise
            continue
        if _stamp(folder) == before:
            return found
    raise PackError(f"{folder} changed {_ATTEMPTS} times while it was read; wait for its writer")


def _stamp(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_ino, status.st_mtime_ns
