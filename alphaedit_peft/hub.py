"""The Hugging Face Hub: a folder up as one commit, some of a repository's files down.

In: a folder and a :class:`Destination`, or a repository's name. Out: the address of a commit, or a
local folder whose files are all of one commit. What goes wrong is said in one sentence, as an
``OSError`` of Python's own, whatever the Hub's client raised.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from alphaedit_peft.messages import one_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

LOGIN = "log in with 'hf auth login' or pass token="
_MAIN = "main"
# as huggingface_hub's validate_repo_id, which takes longer to import than a pack to read
_NAME = re.compile(r"(\b[\w.-]{1,96}\b/)?\b[\w.-]{1,96}\b", re.ASCII)
_CONFLICTS = (409, 412)  # another push at the same time; the parent commit is no longer the last
_UNKNOWN, _FORBIDDEN, _MISSING, _TOO_MANY, _FAILS = 401, 403, 404, 429, 500  # and above
_SHOWN = 160  # characters of an answer that is quoted
_NETWORK = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}


@dataclass(frozen=True)
class Destination:
    """Where on the Hub a push goes.

    Args:
        repo_id: ``user/name``; made where it does not exist.
        private: of a repository that is made; None: the account's default. An existing public one
            is refused where True was asked for.
        token: of the Hub; None: the one that is logged in.
        revision: branch to commit to, made from ``main`` where it does not exist; None: ``main``.
        create_pr: open a pull request instead of committing.
        subfolder: folder within the repository; None: its root.

    Raises:
        ValueError: a revision that is a commit, or a subfolder that leads out of the repository.
    """

    repo_id: str
    private: bool | None = None
    token: str | bool | None = None
    revision: str | None = None
    create_pr: bool = False
    subfolder: str | None = None

    def __post_init__(self) -> None:
        if self.revision is not None and re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(
                f"revision={self.revision!r} is a commit, which cannot change; give a branch"
            )
        check_subfolder(self.subfolder)


def push_folder(folder: Path, to: Destination, owned: Collection[str], message: str) -> str:
    """Make a place on the Hub hold a folder's files, in one commit; returns its address.

    The Hub takes the commit as a whole or not at all, so a push that breaks off leaves the old
    revision. Files that are there stay, but for names in ``owned`` (relative to the destination)
    that the folder does not have. An unchanged push makes no commit.

    Raises:
        PermissionError: the token is not valid, or may not write there.
        FileNotFoundError: no such pull request, or no such branch for ``create_pr``.
        ValueError: a tag as revision, a public repository where a private one was asked for, or
            what is no repository's name.
        RuntimeError: someone else's push came in between.
        ConnectionError: the Hub cannot be reached, or fails.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=to.token)
    prefix = f"{to.subfolder.strip('/')}/" if to.subfolder else ""
    local = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: prefix + path.relative_to(folder).as_posix() for path in local}
    with _pushing(to):
        repo_id = api.create_repo(to.repo_id, private=to.private, exist_ok=True).repo_id
        if to.private and api.model_info(repo_id).private is False:
            raise ValueError(
                f"private=True, but {repo_id} exists and is public; push to another repository, or "
                "make that one private on the Hub"
            )
        _ensure_branch(api, repo_id, to)
        there = api.model_info(repo_id, revision=to.revision)
        stale = {prefix + name for name in owned} & {f.rfilename for f in there.siblings or []}
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(name) for name in sorted(stale - set(names.values()))),
                *(CommitOperationAdd(name, path) for path, name in names.items()),
            ],
            commit_message=message,
            revision=to.revision,
            create_pr=to.create_pr,
            parent_commit=there.sha,
        )
    return commit.pr_url or commit.commit_url


def fetch_folder(
    repo_id: str,
    names: Iterable[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> Path:
    """Some files of a repository, all of one commit, in the Hub's cache.

    Args:
        names: relative to ``subfolder``; ``*`` stands for one folder's name. Those that the
            repository does not have are left out.
        revision: branch, tag, commit or ``refs/pr/N``; None: ``main``.
        subfolder: of the files within the repository.

    Returns:
        The local folder that stands for ``subfolder``; the root's is named by its commit.

    Raises:
        FileNotFoundError: no such repository for this token, revision, or folder; nothing in the
            cache while offline; or what is no repository's name.
        PermissionError: a gated repository, or a token that is not valid or lacks the right.
        ConnectionError: the Hub fails, or was asked too often.
    """
    from huggingface_hub import snapshot_download

    check_subfolder(subfolder)
    inside = subfolder.strip("/") if subfolder else ""
    start = glob.escape(f"{inside}/") if inside else ""
    wanted = list(names)
    with _in_plain_words(repo_id, revision, token):
        patterns = [start + name for name in wanted]
        place = snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns)
    folder = Path(place) / inside
    if not folder.is_dir():
        missing = f"no folder {subfolder!r}" if subfolder else f"none of {', '.join(wanted[:3])}"
        raise FileNotFoundError(
            f"{repo_id} on the Hub has {missing} at revision {revision or _MAIN!r}; look at its "
            "files there"
        )
    return folder


def check_subfolder(subfolder: str | None) -> None:
    """Refuse a subfolder out of its repository: an absolute path, or with ``..`` or backslashes."""
    parts = PurePosixPath(subfolder or "").parts
    if subfolder is not None and (
        not parts or subfolder.startswith("/") or ".." in parts or "\\" in subfolder
    ):
        raise ValueError(
            f"subfolder={subfolder!r} is no folder within a repository; give a name such as "
            "'packs/first', or None for the root"
        )


def repository_name(name: object) -> str | None:
    """What can be a repository's name, as it is; None for anything else, such as a folder here."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.endswith(".git"):
        return None
    return None if "--" in name or ".." in name or Path(name).is_dir() else name


def _ensure_branch(api: HfApi, repo_id: str, to: Destination) -> None:
    if to.revision in (None, _MAIN) or to.create_pr or str(to.revision).startswith("refs/"):
        return
    refs = api.list_repo_refs(repo_id)
    if to.revision in {tag.name for tag in refs.tags}:
        raise ValueError(f"revision={to.revision!r} is a tag of {repo_id}; give a branch")
    if to.revision not in {branch.name for branch in refs.branches}:
        api.create_branch(repo_id, branch=str(to.revision), exist_ok=True)


@contextmanager
def _pushing(to: Destination) -> Iterator[None]:
    """What goes wrong in a push, in plain words."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise ValueError(f"repo_id={to.repo_id!r} is no repository's name: {error}") from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{to.repo_id} has no revision {to.revision!r}") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in _CONFLICTS:
            raise RuntimeError(
                f"{to.repo_id} changed while this was pushed, and was left as it is then; look at "
                "what is there, and push again"
            ) from error
        told = refusal(f"{to.repo_id} was not pushed", error)
        if told is None or status == _FORBIDDEN:
            raise PermissionError(
                f"{to.repo_id}: the Hub lets this token not write there (status {status}); {LOGIN} "
                "of someone who may, or propose the change with create_pr=True"
            ) from error
        raise told from error
    except Exception as error:
        if isinstance(error, UnicodeEncodeError):
            told = refusal(f"{to.repo_id} was not pushed", error)
            raise told or error from error
        broken = _broken(error)
        if isinstance(error, ValueError) or broken is None:
            raise
        raise ConnectionError(
            f"the connection to the Hub broke while {to.repo_id} was pushed ({broken}): it holds "
            "its old revision or the new one, whole; push again"
        ) from error


@contextmanager
def _in_plain_words(repo_id: str, revision: str | None, token: str | bool | None) -> Iterator[None]:
    """What goes wrong in a download, in plain words."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise FileNotFoundError(
            f"{repo_id} is no folder here, and no Hub repository name either; check the path"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id} on the Hub has no revision {revision!r}; give one of its branches, tags "
            "or commits"
        ) from error
    except Exception as error:
        if (told := refusal(f"{repo_id} was not downloaded", error)) is not None:
            raise told from error
        if isinstance(error, errors.RepositoryNotFoundError):
            raise FileNotFoundError(_missing(repo_id, token)) from error
        if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
            raise FileNotFoundError(
                f"{repo_id}: no such folder here, nothing of it in the Hub's cache, and no Hub "
                "repository that could be asked for; check the path or the connection"
            ) from error
        broken = _broken(error)
        if broken is None:
            raise
        raise ConnectionError(
            f"the connection to the Hub broke while {repo_id} was read ({broken}); try again"
        ) from error


@contextmanager
def answers_told(what: str) -> Iterator[None]:
    """Raise the ``refusal`` instead of what another library makes of the Hub's answer."""
    try:
        yield
    except Exception as error:
        answer = _answer(error)
        missing = answer is not None and answer.response.status_code == _MISSING
        told = None if missing else refusal(what, error)  # what is missing, the library knows best
        if told is None:
            raise
        raise told from error


def refusal(what: str, error: BaseException) -> OSError | None:
    """What the Hub's answer among an error's causes means, and what to do.

    None where it answered nothing, or that there is no such repository. ``what`` says what was not
    done, such as ``me/pack was not pushed``.
    """
    from huggingface_hub import errors

    header = next((e for e in _causes(error) if isinstance(e, UnicodeEncodeError)), None)
    if header is not None and str(header.object).startswith("Bearer "):
        wrong = header.object[header.start : header.end]
        return PermissionError(
            f"{what}: the token holds {wrong!r}, as none does; log in anew with 'hf auth login', "
            "or pass another token="
        )
    answer = _answer(error)
    if answer is None:
        return None
    status = answer.response.status_code
    if status == _UNKNOWN and "authorization" in answer.response.request.headers:
        return PermissionError(
            f"{what}: the Hub does not know this token (status {status}), which is mistyped, "
            "expired or withdrawn; log in anew with 'hf auth login', or pass another token="
        )
    if isinstance(answer, errors.GatedRepoError):
        return PermissionError(f"{what}: it is gated; ask for access on its page, then {LOGIN}")
    if isinstance(answer, errors.RepositoryNotFoundError):
        return None
    if status == _UNKNOWN:
        return PermissionError(f"{what}: nobody is logged in (status {status}); {LOGIN}")
    if status == _FORBIDDEN and not isinstance(answer, errors.DisabledRepoError):
        return PermissionError(
            f"{what}: this token has no right to it (status {status}); give it the right in the "
            f"Hub's settings, or {LOGIN} of someone who has it"
        )
    if status == _TOO_MANY:
        wait = answer.response.headers.get("Retry-After", "")
        when = f"in {wait} seconds" if wait.isdecimal() else "in some minutes"
        return ConnectionError(
            f"{what}: the Hub was asked too often from here (status {status}); try again {when}, "
            "or log in, which allows more"
        )
    if status >= _FAILS:
        return ConnectionError(f"{what}: the Hub itself fails (status {status}); try again later")
    said = one_line(answer)[:_SHOWN]
    return ConnectionError(
        f"{what}: the Hub refuses it with status {status} ({said}); look at the repository's page "
        "there"
    )


def _missing(repo_id: str, token: str | bool | None) -> str:
    """That there is no such repository of a model; that there is a dataset or space, if so."""
    from huggingface_hub import HfApi

    for kind in ("dataset", "space"):
        with suppress(Exception):
            if HfApi(token=token).repo_exists(repo_id, repo_type=kind):
                return (
                    f"{repo_id} on the Hub is a {kind}, and packs and null spaces are read from "
                    "repositories of models; give the name of one"
                )
    return (
        f"{repo_id}: no such folder here, and no Hub repository of that name that may be read; "
        f"check the name, or {LOGIN} if it is private"
    )


def _broken(error: BaseException) -> str | None:
    """The words of an error's root, where the network is among its causes; else None."""
    chain = _causes(error)
    network = any(
        isinstance(cause, (ConnectionError, TimeoutError))
        or type(cause).__module__.partition(".")[0] in _NETWORK
        for cause in chain
    )
    return (str(chain[-1]) or type(chain[-1]).__name__) if network else None


def _answer(error: BaseException) -> HfHubHTTPError | None:
    """What the Hub answered, among an error's causes."""
    from huggingface_hub import errors

    return next((e for e in _causes(error) if isinstance(e, errors.HfHubHTTPError)), None)


def _causes(error: BaseException) -> list[BaseException]:
    """An error and what it came from, its root last."""
    chain = [error]
    while len(chain) < 20 and (cause := chain[-1].__cause__ or chain[-1].__context__):
        chain.append(cause)  # not for ever: chains may be circular
    return chain
