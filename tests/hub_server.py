"""A small Hub on 127.0.0.1, for the real client: repositories, commits, large files, refs, rights.

In: HTTP requests as ``huggingface_hub`` sends them. Out: what the Hub answers, from memory.
``HubServer`` is the state and the threads; ``fail`` makes a request fail once, ``requests`` lists
what was asked. Each revision of a repository is a whole dict of files, so a commit is made or not.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import _http

LARGE = (".safetensors", ".bin", ".pt")


@dataclass(frozen=True)
class Blob:
    """A file's content; ``oid`` is git's SHA-1, or the content's SHA-256 for large files."""

    data: bytes
    large: bool

    @property
    def oid(self) -> str:
        if self.large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    def describe(self, path: str) -> dict:
        facts = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid}
        if self.large:
            facts["oid"] = hashlib.sha1(self.oid.encode()).hexdigest()
            facts["lfs"] = {"oid": self.oid, "size": len(self.data), "pointerSize": 134}
        return facts


Files = dict[str, Blob]


@dataclass
class Repo:
    """Branches, tags and pull requests point to commits; a commit is all its files."""

    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.refs["refs/heads/main"] = self.add({}, "initial commit")

    def add(self, files: Files, message: str, parent: str = "") -> str:
        state = [parent, message, len(self.commits), {p: b.oid for p, b in sorted(files.items())}]
        sha = hashlib.sha1(json.dumps(state).encode()).hexdigest()
        self.commits[sha], self.messages[sha] = dict(files), message
        return sha

    def full_ref(self, revision: str) -> str:
        return revision if revision.startswith("refs/") else f"refs/heads/{revision}"

    def resolve(self, revision: str) -> str | None:
        names = (self.full_ref(revision), f"refs/tags/{revision}")
        found = next((self.refs[name] for name in names if name in self.refs), None)
        return found or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {p: b.data for p, b in self.commits[self.resolve(revision) or ""].items()}


@dataclass
class Failure:
    """What to do, once, to the next request whose ``METHOD /path`` matches."""

    pattern: str
    status: int | None = None  # None: drop the connection
    after: bool = False  # drop it when the work is done, before the answer
    times: int = 1
    headers: dict = field(default_factory=dict)


class Refusal(Exception):
    """An answer other than success: status, error code, and message."""

    def __init__(self, status: int, code: str = "", message: str = "", **more: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.more = status, code, message, more


class HubServer:
    """The server; use it as a context manager. ``tokens`` maps a token to its user."""

    def __init__(self, tokens: dict[str, str]) -> None:
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.others: set[str] = set()  # "datasets/user/name", "spaces/user/name"
        self.large: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self.connections: set[socket.socket] = set()
        self.before_commit: Callable[[Repo], None] | None = None

    def __enter__(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        with self.lock:
            for connection in self.connections:  # those that clients keep open
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def fail(self, pattern: str, status: int | None = None, **options: object) -> None:
        self.failures.append(Failure(pattern, status, **options))  # type: ignore[arg-type]

    def put(self, name: str, folder: Path) -> Repo:
        """A repository with a folder's files, without asking."""
        paths = {path for path in folder.rglob("*") if path.is_file()}
        files = {
            path.relative_to(folder).as_posix(): Blob(path.read_bytes(), path.suffix in LARGE)
            for path in paths
        }
        self.large |= {blob.oid: blob.data for blob in files.values() if blob.large}
        repo = self.repos[name] = Repo(name)
        repo.refs["refs/heads/main"] = repo.add(files, "put")
        return repo

    def asked(self, pattern: str) -> list[str]:
        return [line for line in self.requests if re.search(pattern, line)]

    def failure(self, line: str) -> Failure | None:
        with self.lock:
            for failure in self.failures:
                if failure.times > 0 and re.search(failure.pattern, line):
                    failure.times -= 1
                    return failure
        return None


class _Handler(BaseHTTPRequestHandler):
    """One request; routes are methods named in ``_ROUTES``."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        with self.hub.lock:
            self.hub.connections.add(self.connection)

    def finish(self) -> None:
        super().finish()
        with self.hub.lock:
            self.hub.connections.discard(self.connection)

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _serve(self) -> None:
        line = f"{self.command} {self.path}"
        self.hub.requests.append(line)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        failure = self.hub.failure(line)
        if failure and not failure.after:
            status, headers = failure.status, failure.headers
            return self._drop() if status is None else self._refuse(Refusal(status), headers)
        try:
            with self.hub.lock:
                answer = self._answer()
        except Refusal as refusal:
            return self._refuse(refusal)
        if failure:
            return self._drop()
        return self._send(*answer)

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _refuse(self, refusal: Refusal, more: dict | None = None) -> None:
        headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message, **(more or {})}
        body = {"error": refusal.message or f"status {refusal.status}", **refusal.more}
        self._send(refusal.status, body, {k: v for k, v in headers.items() if v})

    def _send(self, status: int, body: object, headers: dict | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        self.send_response(status)
        for name, value in {**given, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # -- who asks, and what they may do

    @property
    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if token and token not in self.hub.tokens:
            raise Refusal(401, message="Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _repo(self, name: str, write: bool = False, content: bool = False) -> Repo:
        repo, user = self.hub.repos.get(name), self.user
        owner = name.partition("/")[0]
        if repo is None or (repo.private and user != owner):
            status = 401 if user is None else 404
            raise Refusal(status, "RepoNotFound", "Repository not found")
        if content and repo.gated and user != owner:
            raise Refusal(401 if user is None else 403, "GatedRepo", f"Access to {name} is gated")
        if write and user is None:
            raise Refusal(401, message="Invalid username or password.")
        if write and user != owner:
            raise Refusal(403, message="You do not have the rights to write here")
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        sha = repo.resolve(unquote(revision))
        if sha is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {unquote(revision)}")
        return sha

    def _json(self) -> dict:
        return json.loads(self.body or b"{}")

    # -- routes

    def _answer(self) -> tuple:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        for methods, pattern, name in _ROUTES:
            found = re.fullmatch(pattern, parts.path)
            if found and self.command in methods:
                return getattr(self, name)(**found.groupdict())
        raise Refusal(404, message=f"no route for {self.command} {self.path}")

    def whoami(self) -> tuple:
        if self.user is None:
            raise Refusal(401, message="Invalid username or password.")
        return 200, {"type": "user", "name": self.user, "auth": {"type": "access_token"}}

    def create(self) -> tuple:
        asked = self._json()
        if self.user is None:
            raise Refusal(401, message="Invalid username or password.")
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        if name.partition("/")[0] != self.user:
            raise Refusal(403, message="You don't have the rights to create a model here")
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            raise Refusal(409, message="You already created this model repo", url=url)
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.repos[name] = Repo(name, bool(private))
        return 200, {"url": url, "name": name}

    def validate(self) -> tuple:
        text = self._json()["content"]
        found = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        try:
            values = yaml.safe_load(found[1]) if found else {}
            wrong = [] if isinstance(values, dict) else ["no mapping"]
        except yaml.YAMLError as error:
            wrong = [str(error)]
        errors = [{"message": message} for message in wrong]
        return (400 if wrong else 200), {"errors": errors, "warnings": []}

    def info(self, name: str, rev: str = "main") -> tuple:
        repo = self._repo(name)
        sha = self._commit(repo, rev)
        files = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        facts = {"id": name, "modelId": name, "sha": sha, "siblings": files, "tags": []}
        return 200, {**facts, "private": repo.private, "gated": "manual" if repo.gated else False}

    def other(self, name: str) -> tuple:
        _ = self.user  # a token that nobody has is refused first, as everywhere
        if name not in self.hub.others:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        return 200, {"id": name.partition("/")[2], "sha": "0" * 40, "siblings": [], "tags": []}

    def tree(self, name: str, rev: str, folder: str | None = None) -> tuple:
        repo = self._repo(name, content=True)
        prefix = f"{unquote(folder)}/" if folder else ""
        files = repo.commits[self._commit(repo, rev)]
        deep = self.query.get("recursive", ["false"])[0].lower() == "true"
        wanted = {p: b for p, b in files.items() if p.startswith(prefix)}
        if prefix and not wanted:
            raise Refusal(404, "EntryNotFound", f"{prefix} does not exist")
        listed = [
            blob.describe(path)
            for path, blob in sorted(wanted.items())
            if deep or "/" not in path[len(prefix) :]
        ]
        folders = {p[len(prefix) :].split("/")[0] for p in wanted if "/" in p[len(prefix) :]}
        listed += [{"type": "directory", "path": prefix + f, "oid": "0" * 40} for f in folders]
        return 200, listed

    def paths_info(self, name: str, rev: str) -> tuple:
        repo = self._repo(name, content=True)
        files = repo.commits[self._commit(repo, rev)]
        form = "json" in (self.headers.get("Content-Type") or "")
        paths = self._json()["paths"] if form else parse_qs(self.body.decode()).get("paths", [])
        return 200, [files[path].describe(path) for path in paths if path in files]

    def list_refs(self, name: str) -> tuple:
        repo = self._repo(name)
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
        found: dict[str, list] = {"converts": []}
        for kind, start in kinds.items():
            found[kind] = [
                {"name": ref.removeprefix(start), "ref": ref, "targetCommit": sha}
                for ref, sha in repo.refs.items()
                if ref.startswith(start)
            ]
        return 200, found

    def branch(self, name: str, rev: str) -> tuple:
        repo = self._repo(name, write=True)
        ref = f"refs/heads/{unquote(rev)}"
        if ref in repo.refs:
            raise Refusal(409, message="Reference already exists")
        repo.refs[ref] = self._commit(repo, self._json().get("startingPoint") or "main")
        return 200, {}

    def tag(self, name: str, rev: str) -> tuple:
        repo = self._repo(name, write=True)
        ref = f"refs/tags/{self._json()['tag']}"
        if ref in repo.refs:
            raise Refusal(409, message="Tag reference exists already")
        repo.refs[ref] = self._commit(repo, rev)
        return 200, {}

    def preupload(self, name: str, rev: str) -> tuple:
        repo = self._repo(name, write="create_pr" not in self.query)
        there = repo.commits[self._commit(repo, rev)]
        return 200, {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": there[file["path"]].oid if file["path"] in there else None,
                }
                for file in self._json()["files"]
            ]
        }

    def lfs_batch(self, name: str) -> tuple:
        self._repo(name)
        objects = []
        for wanted in self._json()["objects"]:
            if wanted["oid"] not in self.hub.large:
                href = f"{self.hub.url}/lfs/{wanted['oid']}"
                actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
                wanted = {**wanted, "actions": actions}
            objects.append(wanted)
        return 200, {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid: str) -> tuple:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, message="content does not match its SHA-256")
        self.hub.large[oid] = self.body
        return 200, b"", {"ETag": f'"{oid}"'}

    def lfs_verify(self, oid: str) -> tuple:
        if len(self.hub.large.get(oid, b"")) != self._json()["size"]:
            raise Refusal(404, message="object is not there")
        return 200, {}

    def commit(self, name: str, rev: str) -> tuple:
        pull = "create_pr" in self.query
        repo = self._repo(name, write=not pull)
        if self.user is None:
            raise Refusal(401, message="Invalid username or password.")
        if self.hub.before_commit is not None:
            self.hub.before_commit(repo)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        base = self._commit(repo, rev)
        if header.get("parentCommit", base) != base:
            raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
        ref = repo.full_ref(unquote(rev))
        if not pull and ref not in repo.refs:
            raise Refusal(404, "RevisionNotFound", f"{unquote(rev)} is no branch")
        if pull:
            ref = f"refs/pr/{sum(name.startswith('refs/pr/') for name in repo.refs) + 1}"
        files = self._changed(dict(repo.commits[base]), lines)
        repo.refs[ref] = sha = repo.add(files, header["summary"], base)
        url = f"{self.hub.url}/{name}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}"}
        if pull:
            answer["pullRequestUrl"] = f"{url}/discussions/{ref.rpartition('/')[2]}"
        return 200, answer

    def _changed(self, files: Files, lines: list[dict]) -> Files:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise Refusal(400, message=f"{value['path']} was not uploaded")
                files[value["path"]] = Blob(self.hub.large[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        return files

    def resolve(self, name: str, rev: str, path: str) -> tuple:
        repo = self._repo(name, content=True)
        sha = self._commit(repo, rev)
        commit = {"X-Repo-Commit": sha}
        blob = repo.commits[sha].get(unquote(path))
        if blob is None:
            found = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return 404, b"Entry not found", {**found, **commit}
        if blob.large:
            where = f"{self.hub.url}/cdn/{blob.oid}?commit={sha}"
            linked = {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
            return 302, b"", {"Location": where, **linked, **commit}
        return self._part(blob.data, {"ETag": f'"{blob.oid}"', **commit})

    def cdn(self, oid: str) -> tuple:
        commits = [files for repo in self.hub.repos.values() for files in repo.commits.values()]
        blobs = (blob for files in commits for blob in files.values())
        blob = next((blob for blob in blobs if blob.large and blob.oid == oid), None)
        if blob is None:
            raise Refusal(404, "EntryNotFound", "no such object")
        commit = self.query["commit"][0]
        return self._part(blob.data, {"ETag": f'"{oid}"', "X-Repo-Commit": commit})

    def _part(self, data: bytes, headers: dict) -> tuple:
        headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return 200, data, headers
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        if first > last:
            return 416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"}
        part = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        return 206, data[first : last + 1], {**headers, **part}


_NAME, _REV = r"(?P<name>[^/]+/[^/]+)", r"(?P<rev>[^/]+)"
_ROUTES = (
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", rf"/api/models/{_NAME}", "info"),
    ("GET", r"/api/(?P<name>(datasets|spaces)/[^/]+/[^/]+)", "other"),
    ("HEAD", r"/(?P<name>datasets/[^/]+/[^/]+)/resolve/.+", "other"),
    ("GET", rf"/api/models/{_NAME}/revision/{_REV}", "info"),
    ("GET", rf"/api/models/{_NAME}/tree/{_REV}(/(?P<folder>.+))?", "tree"),
    ("POST", rf"/api/models/{_NAME}/paths-info/{_REV}", "paths_info"),
    ("GET", rf"/api/models/{_NAME}/refs", "list_refs"),
    ("POST", rf"/api/models/{_NAME}/branch/{_REV}", "branch"),
    ("POST", rf"/api/models/{_NAME}/tag/{_REV}", "tag"),
    ("POST", rf"/api/models/{_NAME}/preupload/{_REV}", "preupload"),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]+)", "lfs_upload"),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]+)/verify", "lfs_verify"),
    ("POST", rf"/api/models/{_NAME}/commit/{_REV}", "commit"),
    (("GET", "HEAD"), rf"/{_NAME}/resolve/{_REV}/(?P<path>.+)", "resolve"),
    (("GET", "HEAD"), r"/cdn/(?P<oid>[0-9a-f]+)", "cdn"),
)


@contextmanager
def client_of(hub: HubServer, home: Path, token: str | None = None) -> Iterator[pytest.MonkeyPatch]:
    """Have the Hub's client in this process, and in those it starts, talk to ``hub``.

    Its constants are read from the environment at import, so both are set, and put back after.
    """
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
            patch.delenv(name, raising=False)
        if token is not None:
            patch.setenv("HF_TOKEN", token)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(hf_api.api, "endpoint", hub.url)
        patch.setattr(_http, "time", impatient)  # waits between its retries
        _http.close_session()
        yield patch
        _http.close_session()
