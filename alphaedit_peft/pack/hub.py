"""Send a pack to the Hub: the folder that ``save_pretrained`` writes, as one commit.

In: a pack and a repository name. Out: the commit's address. The pack is written and checked in a
temporary folder first, so a repository never holds half of one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import HfApi

if TYPE_CHECKING:
    from alphaedit_peft.pack.pack import EditPack


def push_pack(
    pack: EditPack,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Create the repository where it is missing, and upload the pack.

    Args:
        pack: the pack.
        repo_id: ``user/name``.
        private: of a repository that is created; None: the account's default.
        token: of the Hub; None: the one that is logged in.
        revision: branch to commit to; it must exist.
        create_pr: open a pull request instead of committing.
        commit_message: of the commit.
        dtype: of the factors in the file.

    Returns:
        The address of the commit or pull request.

    Raises:
        HfHubHTTPError: the Hub refuses: no such right, no such branch.
    """
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "pack"
        pack.save_pretrained(folder, dtype=dtype)
        commit = api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or f"Edit pack with {len(pack.edits)} edits",
        )
    return commit.pr_url or commit.commit_url
