"""A pack to the Hub, as one commit, and from the Hub into a folder, with the same bytes.

In: a pack and a :class:`~alphaedit_peft.hub.Destination`, or a repository's name and a folder. Out:
the commit's address, or the folder. A pack that goes up is written and checked in a temporary
folder first, and its card names the repository.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load

from alphaedit_peft.artefact import replace_folder
from alphaedit_peft.hub import Destination, push_folder
from alphaedit_peft.pack.card import card
from alphaedit_peft.pack.files import locate, read_steadily
from alphaedit_peft.pack.format import ADAPTER_MODEL, CARD, FILES, read_bytes

if TYPE_CHECKING:
    from alphaedit_peft.pack.pack import EditPack


def push_pack(
    pack: EditPack,
    to: Destination,
    *,
    texts: bool = True,
    commit_message: str | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Create the repository and branch where they are missing, and upload the pack.

    Args:
        pack: the pack.
        to: where to.
        texts: whether the card shows the edits' texts; ``alphaedit/edits.jsonl`` has them always.
        commit_message: of the commit; None: how many edits there are.
        dtype: of the factors in the file; None: float32, or what the pack was compressed to.

    Returns:
        The address of the commit or pull request.

    Raises:
        PackError: a value that the dtype or JSON cannot hold.
        OSError, ValueError, RuntimeError: as :func:`alphaedit_peft.hub.push_folder`.
    """
    count = len(pack.edits)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "pack"
        pack.save_pretrained(folder, dtype=dtype)
        text = card(pack, to.repo_id, to.subfolder, texts=texts)
        (folder / CARD).write_text(text, encoding="utf-8")
        message = commit_message or f"Edit pack with {count} edit{'' if count == 1 else 's'}"
        return push_folder(folder, to, FILES, message)


def copy_pack(
    path_or_repo: str | Path,
    folder: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> EditPack:
    """Write a pack's files into a folder as they are, once they have been read and checked.

    Args:
        path_or_repo: a Hub repository, or a folder.
        folder: where to; replaced in one step, files that are not a pack's stay.
        revision: branch, tag, commit or ``refs/pr/N``.
        token: for private repositories.
        subfolder: of the pack in the repository.

    Raises:
        PackError: a damaged pack.
        OSError: as :func:`alphaedit_peft.hub.fetch_folder`, or ``folder`` cannot be written.
    """
    from alphaedit_peft.pack.pack import EditPack

    found = locate(path_or_repo, revision, token, subfolder)

    def read(place: Path) -> tuple[EditPack, dict[str, bytes]]:
        names = [name for name in FILES if (place / name).is_file()]
        return EditPack.from_pretrained(place), {name: read_bytes(place, name) for name in names}

    pack, files = read_steadily(found, read)
    replace_folder(folder, files, owned=FILES)
    return pack


def stored_dtype(folder: Path) -> torch.dtype:
    """dtype of the factors in a pack's folder."""
    tensors = load(read_bytes(folder, ADAPTER_MODEL))
    return next(iter(tensors.values())).dtype
