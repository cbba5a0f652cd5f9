"""``alphaedit push`` and ``pull``, and the same for null spaces: to the Hub and from it.

In: a folder and a repository's name. Out: the commit's address, or a folder. They do what
``EditPack.push_to_hub``, ``NullSpace.push_to_hub`` and ``from_pretrained`` do. The token is the one
of ``hf auth login``, or the environment's ``HF_TOKEN``.
"""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from alphaedit_peft.cli import arguments, nullspace_commands, printing

RepoArgument = Annotated[str, Argument(metavar="REPO", help="On the Hub: user/name.")]
PrivateOption = Annotated[
    bool, Option("--private", help="Make the repository private where it is made.")
]
BranchOption = Annotated[str | None, Option(help="Branch; made where it does not exist.")]
PullRequestOption = Annotated[
    bool, Option("--create-pr", help="Open a pull request instead of committing.")
]
MessageOption = Annotated[str | None, Option(help="Of the commit.")]
SubfolderOption = Annotated[str | None, Option(metavar="NAME", help="Within the repository.")]
RevisionOption = Annotated[str | None, Option(help="Branch, tag, commit or refs/pr/N.")]


def push(  # noqa: PLR0913
    pack: arguments.PackArgument,
    repo: RepoArgument,
    *,
    private: PrivateOption = False,
    revision: BranchOption = None,
    create_pr: PullRequestOption = False,
    subfolder: SubfolderOption = None,
    no_texts: Annotated[
        bool, Option("--no-texts", help="Leave the edits' texts out of the model card.")
    ] = False,
    message: MessageOption = None,
    as_json: arguments.JsonOption = False,
) -> None:
    """Upload a pack to the Hub, in one commit, with a model card.

    The factors keep the precision they have in the folder. `edits.jsonl` holds the edits' texts,
    also with `--no-texts`; push to a private repository what others must not read.

    `alphaedit push pack user/name --private`
    """
    from alphaedit_peft.hub import Destination
    from alphaedit_peft.pack.files import StoredPack, locate, push_pack, read_pack, stored_dtype

    _hush()
    folder = locate(pack)
    read = read_pack(folder, StoredPack)
    to = Destination(repo, private or None, None, revision, create_pr, subfolder)
    url = push_pack(read, to, not no_texts, message, stored_dtype(folder))
    facts = {"repo": repo, "url": url, "edits": len(read.edits), "texts_in_card": not no_texts}
    printing.show(as_json, facts, f"Pushed {printing.count(len(read.edits), 'edit')}: {url}")


def pull(
    repo: RepoArgument,
    *,
    out: arguments.OutOption,
    revision: RevisionOption = None,
    subfolder: SubfolderOption = None,
    as_json: arguments.JsonOption = False,
) -> None:
    """Download a pack from the Hub into a folder, after checking it.

    `alphaedit pull user/name --out pack`
    """
    from alphaedit_peft.pack.files import copy_pack, locate

    _hush()
    arguments.check_folder(out)
    pack = copy_pack(locate(repo, revision, subfolder=subfolder), out)
    facts = {"out": str(out), "edits": len(pack.edits), "rank": pack.rank}
    shown = f"Written to {out}: {printing.count(len(pack.edits), 'edit')}, rank {pack.rank}"
    printing.show(as_json, facts, shown)


def push_null_space(  # noqa: PLR0913
    folder: Annotated[str, Argument(metavar="FOLDER", help="A NullSpace folder.")],
    repo: RepoArgument,
    *,
    by_fingerprint: Annotated[
        bool,
        Option("--by-fingerprint", help="Into the folder named by its base, beside other bases'."),
    ] = False,
    private: PrivateOption = False,
    revision: BranchOption = None,
    create_pr: PullRequestOption = False,
    subfolder: SubfolderOption = None,
    message: MessageOption = None,
    as_json: arguments.JsonOption = False,
) -> None:
    """Upload a null space to the Hub, in one commit, with a README.

    `alphaedit nullspace push ns user/null-spaces --by-fingerprint`
    """
    from alphaedit_peft import NullSpace

    _hush()
    space = NullSpace.from_pretrained(folder)
    url = space.push_to_hub(
        repo,
        by_fingerprint=by_fingerprint,
        private=private or None,
        revision=revision,
        create_pr=create_pr,
        subfolder=subfolder,
        commit_message=message,
    )
    printing.show(
        as_json, {"repo": repo, "url": url, "layers": list(space.layers)}, f"Pushed: {url}"
    )


def pull_null_space(
    repo: RepoArgument,
    *,
    out: arguments.OutOption,
    model: Annotated[
        str | None,
        Option(metavar="MODEL", help="Take the one made for this model, by fingerprint."),
    ] = None,
    revision: RevisionOption = None,
    subfolder: SubfolderOption = None,
    dtype: arguments.DtypeOption = "auto",
    device: arguments.DeviceOption = None,
    as_json: arguments.JsonOption = False,
) -> None:
    """Download a null space from the Hub into a folder, after checking it.

    `alphaedit nullspace pull user/null-spaces --model MODEL --out ns`
    """
    from alphaedit_peft import NullSpace

    _hush()
    arguments.check_folder(out)
    wanted = None
    if model is not None:
        wanted = arguments.fingerprint_of(arguments.load_model(model, dtype, device)[0])
    found = NullSpace.from_pretrained(
        repo, revision=revision, subfolder=subfolder, fingerprint=wanted
    )
    if wanted is not None:
        found.check_base(wanted, [])
    nullspace_commands.write(found, out, as_json)


def _hush() -> None:
    """Keep the Hub's progress bars off a stderr that nobody watches, and its advice off any."""
    from huggingface_hub.utils import disable_progress_bars, logging

    from alphaedit_peft.progress import watched

    logging.set_verbosity_error()
    if not watched():
        disable_progress_bars()
