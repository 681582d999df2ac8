"""
A server on this machine that speaks as much of the Hugging Face Hub's HTTP API as pushing and loading models takes.

The client, huggingface_hub, runs unmodified in a process of its own, with the variables of `HubServer.environment`. As
on the Hub, a commit is one request that makes a new revision or changes nothing, every revision stays readable by its
id, and large files and weights are LFS objects, which are uploaded before the commit and downloaded from another host.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote


LFS_SIZE = 10 * 2**20  # larger files are LFS objects, whatever their name
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet")


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@dataclass(frozen=True)
class File:
    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """What git calls the file, or the pointer that stands for an LFS object."""
        stored = self.content
        if self.is_lfs:
            stored = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(stored)}\n".encode()
            )
        return sha1(b"blob %d\0" % len(stored) + stored)

    def entry(self, path: str) -> dict:
        """As the Hub lists it."""
        lfs = {"oid": self.sha256, "sha256": self.sha256, "size": len(self.content), "pointerSize": 130}
        entry = {"type": "file", "path": path, "rfilename": path, "oid": self.oid, "blobId": self.oid}
        return {**entry, "size": len(self.content), **({"lfs": lfs} if self.is_lfs else {})}


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    files: dict[str, File]
    parent: "Commit | None"


class Refusal(Exception):
    """An error as answer: a status, and the code that the client makes an exception of."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message, "X-Error-Code": code}


class HubServer:
    """
    What the server holds.

    Attributes:
        branches: of each repository, the newest commit by the branch's name.
        requests: "METHOD path status" of every request answered.
        fail_next_commit: answer the next commit with status 500, and change nothing.
        on_upload: called in the middle of every upload of an LFS object, for example to kill the client.
    """

    def __init__(self):
        self.branches: dict[str, dict[str, Commit]] = {}
        self.objects: dict[tuple[str, str], bytes] = {}  # by repository and SHA-256
        self.requests: list[str] = []
        self.fail_next_commit = False
        self.on_upload: Callable[[], None] | None = None
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"
        self.storage = f"http://localhost:{self.http.server_port}"  # to the client, another host

    def environment(self, home: Path) -> dict[str, str]:
        """The variables of a client with an empty cache, in place of those about another Hub."""
        ours = {
            **{"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": "hf_token"},
            **{"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            **{"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1"},
        }
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_CACHE_HOME")
        return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | ours

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The contents of all files of a revision."""
        return {path: file.content for path, file in self.commit(repo_id, revision).files.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits up to a revision, the newest first."""
        commits = [self.commit(repo_id, revision)]
        while commits[-1].parent:
            commits.append(commits[-1].parent)
        return commits

    def titles(self, repo_id: str) -> list[str]:
        """What was pushed, the first first."""
        return [commit.title for commit in self.commits(repo_id)][::-1][1:]

    def add(self, repo_id: str, folder: Path) -> None:
        """A repository with the files of a folder, without a push."""
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        self.branches[repo_id] = {}
        self.advance(repo_id, "main", {name: File(path.read_bytes(), False) for name, path in files.items()}, "all")

    def commit(self, repo_id: str, revision: str) -> Commit:
        if repo_id not in self.branches:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        branches = self.branches[repo_id]
        if revision in branches:
            return branches[revision]
        for commit in branches.values():
            while commit:
                if commit.sha == revision:
                    return commit
                commit = commit.parent
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def advance(self, repo_id: str, branch: str, files: dict[str, File], title: str) -> Commit:
        parent = self.branches[repo_id].get(branch)
        state = repr((parent and parent.sha, title, [(path, file.oid) for path, file in sorted(files.items())]))
        commit = self.branches[repo_id][branch] = Commit(sha1(state.encode()), title, files, parent)
        return commit

    def apply(self, repo_id: str, branch: str, operations: list[dict]) -> Commit:
        """A new revision by the operations of one request."""
        files = dict(self.commit(repo_id, branch).files)
        for kind, value in ((operation["key"], operation["value"]) for operation in operations[1:]):
            path = value["path"]
            if kind == "file":
                files[path] = File(base64.b64decode(value["content"]), False)
            elif kind == "lfsFile":
                if (repo_id, value["oid"]) not in self.objects:
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
                files[path] = File(self.objects[repo_id, value["oid"]], True)
            elif kind == "deletedFile" and path in files:
                del files[path]
            else:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        return self.advance(repo_id, branch, files, operations[0]["value"]["summary"])


ROUTES: list[tuple[str, re.Pattern, Callable]] = []
API = "/api/(?:models|datasets)/([^/]+/[^/]+)"


def route(method: str, pattern: str) -> Callable[[Callable], Callable]:
    """A method of the handler that answers requests; it gets the pattern's groups, unquoted."""
    return lambda answer: ROUTES.append((method, re.compile(pattern), answer)) or answer


class Handler(BaseHTTPRequestHandler):
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
            self.body = self.read_body(is_upload=method == "PUT")
            if method == "POST" and "/paths-info/" not in path and "Authorization" not in self.headers:
                raise Refusal(401, "Invalid username or password.")
            for wanted, pattern, answer in ROUTES:
                if method == wanted and (match := pattern.fullmatch(path)):
                    return answer(self, *(group and unquote(group) for group in match.groups()))
            raise Refusal(404, f"Not on this Hub: {method} {path}", "EntryNotFound")
        except Refusal as refusal:
            self.reply({"error": str(refusal)}, refusal.status, refusal.headers)
        except ConnectionError:  # the client was killed
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_body(self, is_upload: bool) -> bytes:
        length = int(self.headers.get("Content-Length", 0))
        content = self.rfile.read(length // 2)
        if is_upload and self.hub.on_upload:
            self.hub.on_upload()
        content += self.rfile.read(length - length // 2)
        if len(content) < length:
            raise ConnectionAbortedError
        return content

    def reply(self, content: dict | list | bytes = b"", status: int = 200, headers: dict | None = None) -> None:
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}
        self.hub.requests.append(f"{self.command} {self.path} {status}")
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reply_with_file(self, content: bytes, headers: dict[str, str]) -> None:
        """A file, or the range of it that the request asks for."""
        status, size = 200, len(content)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or size - 1), size - 1)
            content, status = content[start : end + 1], 206
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        self.reply(content, status, {**headers, "Accept-Ranges": "bytes"})

    @route("POST", "/api/repos/create")
    def create_repository(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        answer = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.branches:
            return self.reply({**answer, "error": "You already created this model repo"}, 409)
        self.hub.branches[name] = {}
        rules = File("".join(f"*{suffix} filter=lfs\n" for suffix in LFS_SUFFIXES).encode(), False)
        self.hub.advance(name, "main", {".gitattributes": rules}, "initial commit")
        self.reply(answer)

    @route("POST", "/api/validate-yaml")
    def validate_card(self) -> None:
        self.reply({"errors": [], "warnings": []})

    @route("GET", f"{API}(?:/revision/([^/]+))?")
    def information(self, name: str, revision: str | None) -> None:
        commit = self.hub.commit(name, revision or "main")
        siblings = [file.entry(path) for path, file in sorted(commit.files.items())]
        self.reply(
            {"id": name, "modelId": name, "sha": commit.sha, "siblings": siblings, "private": False, "tags": []}
        )

    @route("GET", f"{API}/tree/([^/]+)(?:/(.+))?")
    def tree(self, name: str, revision: str, folder: str | None) -> None:
        files = self.hub.commit(name, revision).files
        start = f"{folder}/" if folder else ""
        entries = {path: file.entry(path) for path, file in sorted(files.items()) if path.startswith(start)}
        if not entries:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        if self.query.get("recursive", ["false"])[0].lower() == "false":
            for path in list(entries):
                if "/" in (rest := path.removeprefix(start)):
                    parent = start + rest.partition("/")[0]
                    del entries[path]
                    entries[parent] = {"type": "directory", "path": parent, "oid": sha1(parent.encode()), "size": 0}
        self.reply(list(entries.values()))

    @route("POST", f"{API}/paths-info/([^/]+)")
    def paths(self, name: str, revision: str) -> None:
        files, wanted = self.hub.commit(name, revision).files, parse_qs(self.body.decode())["paths"]
        self.reply([files[path].entry(path) for path in wanted if path in files])

    @route("POST", f"{API}/branch/([^/]+)")
    def create_branch(self, name: str, branch: str) -> None:
        if branch in self.hub.branches[name]:
            raise Refusal(409, f"Reference already exists: {branch}")
        self.hub.branches[name][branch] = self.hub.commit(name, "main")
        self.reply({})

    @route("POST", f"{API}/preupload/([^/]+)")
    def preupload(self, name: str, revision: str) -> None:
        commit, answers = self.hub.commit(name, revision), []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            is_lfs = file["size"] >= LFS_SIZE or path.endswith(LFS_SUFFIXES)
            answers.append({"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False})
            if present := commit.files.get(path):
                answers[-1]["oid"] = present.sha256 if present.is_lfs else present.oid
        self.reply({"files": answers})

    @route("POST", f"{API}/commit/([^/]+)")
    def create_commit(self, name: str, branch: str) -> None:
        if self.hub.fail_next_commit:
            self.hub.fail_next_commit = False
            raise Refusal(500, "Told to fail.")
        with self.hub.lock:
            commit = self.hub.apply(name, branch, [json.loads(line) for line in self.body.splitlines()])
        url = f"{self.hub.endpoint}/{name}/commit/{commit.sha}"
        self.reply({"success": True, "commitOid": commit.sha, "commitUrl": url})

    @route("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
    def offer_uploads(self, name: str) -> None:
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            answers.append({"oid": wanted["oid"], "size": wanted["size"]})
            if (name, wanted["oid"]) not in self.hub.objects:
                answers[-1]["actions"] = {"upload": {"href": f"{self.hub.storage}/object/{name}/{wanted['oid']}"}}
        self.reply({"transfer": "basic", "objects": answers})

    @route("PUT", "/object/([^/]+/[^/]+)/([0-9a-f]{64})")
    def upload(self, name: str, sha256: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise Refusal(400, "Not the content that was announced")
        self.hub.objects[name, sha256] = self.body
        self.reply()

    @route("GET", r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self.hub.commit(name, revision)
        if not (file := commit.files.get(path)):
            raise Refusal(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.oid}"'}
        if not file.is_lfs:
            return self.reply_with_file(file.content, headers)
        headers |= {"X-Linked-Size": str(len(file.content)), "X-Linked-ETag": f'"{file.sha256}"'}
        self.reply(b"", 302, {**headers, "Location": f"{self.hub.storage}/object/{name}/{file.sha256}"})

    @route("GET", "/object/([^/]+/[^/]+)/([0-9a-f]{64})")
    def download(self, name: str, sha256: str) -> None:
        self.reply_with_file(self.hub.objects[name, sha256], {"ETag": f'"{sha256}"'})


@contextmanager
def serve() -> Iterator[HubServer]:
    """A Hub on a free port of this machine, as long as the context lasts."""
    hub = HubServer()
    thread = threading.Thread(target=hub.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.http.shutdown()
        hub.http.server_close()
        thread.join()
