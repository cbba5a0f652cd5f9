"""Find a pack's folder: on this disk, or on the Hub.

In: a path or a repository name. Out: a local folder, holding at least what the repository has of
the pack's files. A folder that a killed save left aside is found under its own name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from alphaedit_peft import storing
from alphaedit_peft.hub import fetch_folder
from alphaedit_peft.pack.format import FILES, PackError

Found = TypeVar("Found")


def locate(
    path_or_repo: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> Path:
    """The local folder of a pack; downloads only the pack's own files.

    Raises:
        FileNotFoundError: neither a folder here nor a repository that this token may read, or no
            such revision or subfolder in it.
        PermissionError: a gated repository.
        ConnectionError: the Hub fails.
    """
    folder = Path(path_or_repo) / (subfolder or "")
    if folder.is_dir():
        return folder
    aside = storing.left_aside(folder)
    if aside is not None:
        return aside
    if isinstance(path_or_repo, Path) or Path(path_or_repo).exists():
        raise FileNotFoundError(
            f"{folder} is no folder here, and no Hub repository name either; check the path"
        )
    return fetch_folder(path_or_repo, FILES, revision=revision, token=token, subfolder=subfolder)


def read_steadily(folder: Path, read: Callable[[Path], Found]) -> Found:
    """Read a folder's files so that all come from one save, even while another process saves.

    Raises:
        PackError: the folder is replaced faster than it can be read; otherwise what ``read`` says.
    """
    return storing.read_steadily(folder, read, PackError)
