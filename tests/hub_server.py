"""A small server that speaks the Hugging Face Hub's HTTP API, for tests that push and load over HTTP.

The client, huggingface_hub, runs unmodified in a process of its own, with the variables of `HubServer.environment`.
As on the Hub, a new repository has one commit with a `.gitattributes`, a commit is one request that makes one new
revision or none, every revision stays readable by its id, and LFS objects are uploaded to and downloaded from another
host, of which no one sees an object before a commit names it. Reading needs no token, writing takes any. There are
models only, no pull requests, no Xet storage (see `environment`), no `.gitignore` rules and no metadata from cards.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote
from uuid import uuid4


LFS_SUFFIXES = "7z arrow bin ckpt gz h5 model msgpack npy npz onnx parquet pickle pkl pt pth safetensors tar zip"
LFS_RULE = "{} filter=lfs diff=lfs merge=lfs -text\n"
LFS_SIZE = 10 * 2**20  # from here on a file is an LFS object whatever its name


@dataclass(frozen=True)
class File:
    """A file of a revision: its id in git, its size and, where it is an LFS object, its SHA-256."""

    oid: str
    size: int
    sha256: str | None = None

    def lfs(self, key: str) -> dict:
        """What JSON answers say of an LFS object, with its SHA-256 under `key`."""
        return {"lfs": {key: self.sha256, "size": self.size, "pointerSize": len(pointer(self.sha256, self.size))}}


@dataclass(frozen=True)
class Commit:
    """A revision, with all of its files."""

    sha: str
    title: str
    message: str
    date: str
    files: dict[str, File]
    parent: "Commit | None"

    def tree(self, folder: str = "", recursive: bool = False) -> list[dict]:
        """The files and folders in a folder, as the Hub lists them."""
        entries, prefix = {}, f"{folder}/" if folder else ""
        for path, file in sorted(self.files.items()):
            parents = path.removeprefix(prefix).split("/")[:-1]
            if path.startswith(prefix):
                for depth in range(1, (len(parents) if recursive else min(len(parents), 1)) + 1):
                    parent = prefix + "/".join(parents[:depth])
                    under = [item for item in sorted(self.files.items()) if is_under(item[0], parent)]
                    oid = sha1(repr(under).encode())
                    entries[parent] = {"type": "directory", "path": parent, "oid": oid, "size": 0}
                if recursive or not parents:
                    lfs = file.lfs("oid") if file.sha256 else {}
                    entries[path] = {"type": "file", "path": path, "oid": file.oid, "size": file.size, **lfs}
        return list(entries.values())


@dataclass
class Repository:
    """A repository: its branches and tags, every commit by its id, and the LFS objects uploaded to it."""

    name: str
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: set[str] = field(default_factory=set)

    def advance(self, branch: str, files: dict[str, File], title: str, message: str) -> Commit:
        parent, date = self.branches.get(branch), datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        content = repr((parent and parent.sha, len(self.commits), sorted(files.items()), title, message, date))
        commit = Commit(sha1(content.encode()), title, message, date, files, parent)
        self.commits[commit.sha] = self.branches[branch] = commit
        return commit


class Refusal(Exception):
    """An answer with an error: its status, its text, and the code that the client makes an exception of."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict | None = None, **body):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message, "X-Error-Code": code, **(headers or {})}


class HubServer:
    """What the server holds, how tests look at it, and how they make it fail.

    Attributes:
        endpoint: the URL for HF_ENDPOINT.
        requests: "METHOD path status" of every request answered, with "broken off" for the status of others.
        fail_next_commit: answer the next commit with status 500, and leave the repository as it is.
        drop_uploads: how many of the coming uploads of LFS objects to break off in their middle. The client tries an
            upload six times, for 23 seconds in all: a number below 6 it survives.
        on_upload: called in the middle of every upload of an LFS object, for example to kill the client.
    """

    def __init__(self, folder: str | Path):
        self.objects = Path(folder) / "objects"
        self.objects.mkdir(parents=True)
        self.lock = threading.Lock()
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, tuple[Repository, str, int]] = {}
        self.published: set[str] = set()
        self.requests: list[str] = []
        self.fail_next_commit = False
        self.drop_uploads = 0
        self.on_upload: Callable[[], None] | None = None
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"
        self.storage = f"http://localhost:{self.http.server_port}"  # another host, to the client

    def environment(self, home: str | Path, token: str | None = "hf_token") -> dict[str, str]:
        """The environment of a client: this process's, less what is about another Hub.

        HF_HUB_DISABLE_XET is needed where hf_xet is installed: the client then asks no server whether it has Xet.
        """
        ours = {
            **{"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"},
            **{"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"},
            **({"HF_TOKEN": token} if token else {}),
        }
        names = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_CACHE_HOME")
        return {name: value for name, value in os.environ.items() if not name.startswith(names)} | ours

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision, from the disk of the server."""
        commit = self.revision(self.repository(repo_id), revision)
        return {path: self.path(file).read_bytes() for path, file in sorted(commit.files.items())}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits up to a revision, the newest first."""
        commits = [self.revision(self.repository(repo_id), revision)]
        while commits[-1].parent:
            commits.append(commits[-1].parent)
        return commits

    def repository(self, name: str) -> Repository:
        if repository := self.repositories.get(name):
            return repository
        raise Refusal(404, "Repository not found", "RepoNotFound")

    def revision(self, repository: Repository, name: str) -> Commit:
        for commits in (repository.branches, repository.tags, repository.commits):
            if commit := commits.get(name):
                return commit
        raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")

    def path(self, file: File) -> Path:
        return self.objects / (file.sha256 or file.oid)

    def store(self, content: bytes) -> File:
        file = File(git_id(content), len(content))
        if not self.path(file).exists():
            self.path(file).write_bytes(content)
        return file

    def has_lfs_rule(self, files: dict[str, File], path: str) -> bool:
        """Whether `.gitattributes` says that a path is for LFS objects."""
        lines = self.path(files[".gitattributes"]).read_text().splitlines() if ".gitattributes" in files else []
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
        return any(fnmatchcase(path if "/" in pattern else path.split("/")[-1], pattern) for pattern in patterns)

    def commit(self, repository: Repository, branch: str, operations: list[dict]) -> Commit:
        """One new revision from the operations of one request, or a refusal that leaves all as it was."""
        header = operations[0]["value"]
        if branch not in repository.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        if not repository.branches[branch].sha.startswith(header.get("parentCommit", "")):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.branches[branch].files)
        for kind, value in ((operation["key"], operation["value"]) for operation in operations[1:]):
            path = value["path"]
            if kind == "file":
                files[path] = self.store(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                if value["oid"] not in repository.objects:
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
                size = (self.objects / value["oid"]).stat().st_size
                files[path] = File(git_id(pointer(value["oid"], size)), size, value["oid"])
                if not self.has_lfs_rule(files, path):
                    rules = self.path(files[".gitattributes"]).read_bytes() if ".gitattributes" in files else b""
                    files[".gitattributes"] = self.store(rules + LFS_RULE.format(path).encode())
            else:
                gone = [name for name in files if name == path or (kind == "deletedFolder" and is_under(name, path))]
                if kind not in ("deletedFile", "deletedFolder") or not gone:
                    raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                files = {name: file for name, file in files.items() if name not in gone}
        self.published |= {file.sha256 for file in files.values() if file.sha256}
        return repository.advance(branch, files, header["summary"], header.get("description", ""))


def is_under(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def git_id(content: bytes) -> str:
    return sha1(b"blob %d\0" % len(content) + content)


def pointer(sha256: str, size: int) -> bytes:
    """What git keeps of an LFS object."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


ROUTES: list[tuple[str, re.Pattern, Callable]] = []
API = r"/api/models/([^/]+(?:/[^/]+)??)"


def route(method: str, pattern: str) -> Callable[[Callable], Callable]:
    """A method of the handler that answers requests; it gets the pattern's groups, unquoted."""
    return lambda answer: ROUTES.append((method, re.compile(pattern), answer)) or answer


class Handler(BaseHTTPRequestHandler):
    """The HTTP side."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, hub: HubServer, *args):
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *args) -> None:
        """Not on the terminal: see `HubServer.requests`."""

    def answer(self) -> None:
        path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for wanted, pattern, answer in ROUTES:
                if method == wanted and (match := pattern.fullmatch(path)):
                    if method != "PUT":  # an upload, which its own method reads piece by piece
                        self.body = b"".join(self.pieces())
                    if "/api/" in path and method == "POST" and "/paths-info/" not in path:
                        self.require_token()
                    return answer(self, *(group and unquote(group) for group in match.groups()))
            raise Refusal(404, f"Not on this Hub: {method} {path}")
        except Refusal as refusal:
            # Of an upload there may be an unread body. A client that is not told so would ask on the same connection.
            last = {"Connection": "close"} if method == "PUT" else {}
            self.reply(refusal.body, refusal.status, {**refusal.headers, **last})
        except ConnectionError:
            self.close_connection = True
            self.hub.requests.append(f"{self.command} {self.path} broken off")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def require_token(self) -> None:
        if not self.headers.get("Authorization", "").removeprefix("Bearer").strip():
            raise Refusal(401, "Invalid username or password.")

    def pieces(self) -> Iterator[bytes]:
        """The request's body; ConnectionError if the client goes away before its end."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline() or b"-1", 16):
                yield self.take(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            left = int(self.headers.get("Content-Length", 0))
            while left:
                yield self.take(min(left, 2**16))
                left -= min(left, 2**16)

    def take(self, size: int) -> bytes:
        content = self.rfile.read(size) if size > 0 else b""
        if len(content) != size:
            raise ConnectionAbortedError("The client went away.")
        return content

    def reply(self, content: dict | list | bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        is_json = not isinstance(content, bytes)
        content = json.dumps(content).encode() if is_json else content
        self.hub.requests.append(f"{self.command} {self.path} {status}")
        self.send_response(status)
        kind = "application/json" if is_json else "application/octet-stream"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reply_with_file(self, path: Path, headers: dict[str, str]) -> None:
        """A file, or the range of it that the request asks for."""
        size, headers = path.stat().st_size, {**headers, "Accept-Ranges": "bytes"}
        start, end, status = 0, size, 200
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = match.groups()
            start = int(first) if first else max(size - int(last or 0), 0)
            end, status = min(int(last) + 1, size) if first and last else size, 206
            if start >= end:
                raise Refusal(416, f"Not a range of {size} bytes")
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        with open(path, "rb") as file:
            file.seek(start)
            self.reply(file.read(end - start), status, headers)

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        self.require_token()
        self.reply({"type": "user", "id": "0", "name": "user", "fullname": "User", "orgs": []})

    @route("POST", "/api/validate-yaml")
    def validate_card(self) -> None:
        self.reply({"errors": [], "warnings": []})

    @route("POST", "/api/repos/create")
    def create_repository(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{name}"
        with self.hub.lock:
            if name in self.hub.repositories:
                raise Refusal(409, "You already created this model repo", url=url)
            repository = Repository(name, wanted.get("private") or wanted.get("visibility") == "private")
            rules = self.hub.store("".join(LFS_RULE.format(f"*.{suffix}") for suffix in LFS_SUFFIXES.split()).encode())
            repository.advance("main", {".gitattributes": rules}, "initial commit", "")
            self.hub.repositories[name] = repository
        self.reply({"url": url, "name": name})

    @route("GET", API + "(?:/revision/([^/]+))?")
    def information(self, name: str, revision: str | None) -> None:
        repository = self.hub.repository(name)
        commit, first = self.hub.revision(repository, revision or "main"), next(iter(repository.commits.values()))
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        for sibling in siblings if "blobs" in self.query else []:
            file = commit.files[sibling["rfilename"]]
            sibling |= {"size": file.size, "blobId": file.oid, **(file.lfs("sha256") if file.sha256 else {})}
        answer = {"id": name, "modelId": name, "author": name.split("/")[0], "sha": commit.sha, "siblings": siblings}
        answer |= {"private": repository.private, "gated": False, "disabled": False, "tags": [], "downloads": 0}
        self.reply({**answer, "likes": 0, "createdAt": first.date, "lastModified": commit.date})

    @route("GET", API + "/tree/([^/]+)(?:/(.+))?")
    def tree(self, name: str, revision: str, folder: str | None) -> None:
        commit = self.hub.revision(self.hub.repository(name), revision)
        entries = commit.tree(folder or "", self.query.get("recursive", [""])[0].lower() in ("1", "true"))
        if folder and not entries:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        self.reply(entries)

    @route("POST", API + "/paths-info/([^/]+)")
    def paths(self, name: str, revision: str) -> None:
        commit, wanted = self.hub.revision(self.hub.repository(name), revision), parse_qs(self.body.decode())
        self.reply([entry for entry in commit.tree(recursive=True) if entry["path"] in wanted.get("paths", [])])

    @route("GET", API + "/commits/([^/]+)")
    def commits(self, name: str, revision: str) -> None:
        answers = []
        for commit in self.hub.commits(name, revision):
            answers.append({"id": commit.sha, "title": commit.title, "message": commit.message, "date": commit.date})
            answers[-1]["authors"] = [{"user": "user"}]
        self.reply(answers)

    @route("POST", API + "/(branch|tag)/([^/]+)")
    def name_commit(self, name: str, what: str, argument: str) -> None:
        repository, wanted = self.hub.repository(name), json.loads(self.body or b"{}")
        new, start = (argument, wanted.get("startingPoint", "main")) if what == "branch" else (wanted["tag"], argument)
        commits = repository.branches if what == "branch" else repository.tags
        if new in commits:
            raise Refusal(409, f"Reference already exists: {new}")
        commits[new] = self.hub.revision(repository, start)
        self.reply({})

    @route("POST", API + "/preupload/([^/]+)")
    def preupload(self, name: str, revision: str) -> None:
        commit, answers = self.hub.revision(self.hub.repository(name), revision), []
        for file in json.loads(self.body)["files"]:
            is_large_or_binary = file["size"] >= LFS_SIZE or b"\0" in base64.b64decode(file["sample"])
            is_lfs = is_large_or_binary or self.hub.has_lfs_rule(commit.files, file["path"])
            answers.append({"path": file["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False})
            if there := commit.files.get(file["path"]):
                answers[-1]["oid"] = there.sha256 or there.oid
        self.reply({"files": answers})

    @route("POST", API + "/commit/([^/]+)")
    def commit(self, name: str, revision: str) -> None:
        repository = self.hub.repository(name)
        if self.query.get("create_pr"):
            raise Refusal(501, "No pull requests here")
        if self.hub.fail_next_commit:
            self.hub.fail_next_commit = False
            raise Refusal(500, "Internal Error - told to fail")
        with self.hub.lock:
            commit = self.hub.commit(repository, revision, [json.loads(line) for line in self.body.splitlines()])
        url = f"{self.hub.endpoint}/{name}/commit/{commit.sha}"
        self.reply({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    @route("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
    def offer_uploads(self, name: str) -> None:
        self.require_token()
        repository, answers = self.hub.repository(name), []
        for wanted in json.loads(self.body)["objects"]:
            answers.append({"oid": wanted["oid"], "size": wanted["size"]})
            if wanted["oid"] not in repository.objects:
                secret = uuid4().hex
                self.hub.uploads[secret] = repository, wanted["oid"], wanted["size"]
                answers[-1]["actions"] = {"upload": {"href": f"{self.hub.storage}/upload/{secret}"}}
        self.reply({"transfer": "basic", "objects": answers})

    @route("PUT", "/upload/([^/]+)")
    def upload(self, secret: str) -> None:
        if secret not in self.hub.uploads or "Authorization" in self.headers:
            raise Refusal(403, "This address is for uploads that the Hub offered, and takes no token")
        repository, oid, size = self.hub.uploads[secret]
        content, before = bytearray(), 0
        for piece in self.pieces():
            content += piece
            if before < size / 2 <= len(content):
                if self.hub.on_upload:
                    self.hub.on_upload()
                if self.hub.drop_uploads:
                    self.hub.drop_uploads -= 1
                    raise ConnectionAbortedError("Told to drop this upload.")
            before = len(content)
        if hashlib.sha256(content).hexdigest() != oid or len(content) != size:
            raise Refusal(400, "Not the content that was announced")
        (self.hub.objects / secret).write_bytes(content)
        (self.hub.objects / secret).replace(self.hub.objects / oid)
        repository.objects.add(oid)
        self.reply(b"")

    @route("GET", r"/([^/]+(?:/[^/]+)??)/resolve/([^/]+)/(.+)")
    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self.hub.revision(self.hub.repository(name), revision)
        headers = {"X-Repo-Commit": commit.sha}
        if not (file := commit.files.get(path)):
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        if file.sha256:
            headers |= {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.sha256}"', "ETag": f'"{file.oid}"'}
            return self.reply(b"", 302, {**headers, "Location": f"{self.hub.storage}/object/{file.sha256}"})
        self.reply_with_file(self.hub.path(file), {**headers, "ETag": f'"{file.oid}"'})

    @route("GET", "/object/([0-9a-f]{64})")
    def stored_object(self, sha256: str) -> None:
        if sha256 not in self.hub.published or "Authorization" in self.headers:
            raise Refusal(403, "This address is for objects that the Hub redirects to, and takes no token")
        self.reply_with_file(self.hub.objects / sha256, {"ETag": f'"{sha256}"'})


@contextmanager
def serve(folder: str | Path) -> Iterator[HubServer]:
    """A Hub on a free port of this machine that keeps its files in a folder, as long as the context lasts."""
    hub = HubServer(folder)
    thread = threading.Thread(target=hub.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.http.shutdown()
        hub.http.server_close()
        thread.join()
