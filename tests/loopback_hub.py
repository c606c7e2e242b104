"""A small Hugging Face Hub on the loopback, for tests: what huggingface_hub's client asks for models, and no more.

Kept in memory. Repositories have branches of commits; large files go through the LFS protocol, checked by their sha256.
A repository is written by whoever has its owner's token, and read by anybody, or with `private` by its owner.

```python
with LoopbackHub(tokens={"hf_test": "me"}) as hub:
    subprocess.run(command, env=hub.environment(home, HF_TOKEN="hf_test"))
```
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".onnx")


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @cached_property
    def oid(self) -> str:
        """The sha256 of a large file, of others git's name of the blob."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files, by sha256

    def commit(self, branch: str, files: dict[str, File], summary: str) -> str:
        parent = self.branches.get(branch)
        names = sorted((path, file.oid) for path, file in files.items())
        sha = hashlib.sha1(json.dumps([parent, summary, len(self.commits), names]).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> tuple[str, dict[str, File]]:
        """A branch's or commit's sha and files."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, self.commits[sha]


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class LoopbackHub:
    """The server; a context manager.

    Args:
        tokens: token -> name of the user whose it is.
    """

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.cut_uploads_after: int | None = None  # bytes of a large file, after which the connection is closed
        self.requests: list[tuple[str, str]] = []  # method and path
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.stop()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Variables of a process whose client uses this server, and keeps its cache in `home`."""
        ours = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        other = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return {**other, **ours, **more}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, format: str, *args: Any):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self):
        address = urlsplit(self.path)
        path, self.query = unquote(address.path), parse_qs(address.query)
        self.hub.requests.append((self.command, path))
        self.body_read = False
        try:
            for method, pattern, function in _ROUTES:
                if self.command in method and (found := re.fullmatch(pattern, path)):
                    result = function(self, **found.groupdict())
                    break
            else:
                raise Refusal(404, "NotFound", f"no {self.command} {path} here")
        except Refusal as refusal:
            self._read_body()
            self._send(refusal.status, {"error": str(refusal)}, {"X-Error-Code": refusal.code})
        except ConnectionAbortedError:
            self.close_connection = True
        else:
            if result is not None:
                self._read_body()
                self._send(200, result)

    def _send(self, status: int, data: Any, headers: dict[str, str] | None = None):
        content = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        if headers and "X-Error-Code" in headers:
            self.send_header("X-Error-Message", json.loads(content)["error"])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _parts(self) -> Iterator[bytes]:
        """The request's body, as it comes."""
        if self.body_read:
            return
        self.body_read = True
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            part = self.rfile.read(min(left, 1 << 14))
            left -= len(part)
            yield part

    def _read_body(self) -> bytes:
        return b"".join(self._parts())

    def _json(self) -> dict[str, Any]:
        return json.loads(self._read_body())

    def _user(self) -> str | None:
        """Whose token the client sent."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _repository(self, repo: str, write: bool = False) -> Repository:
        user, owner = self._user(), repo.partition("/")[0]
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and user != owner):
            # As the Hub has it: a stranger does not learn whether a private repository is there.
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user != owner:
            raise Refusal(403 if user else 401, "", f"{user or 'without a token you'} may not write to {repo}")
        return repository

    # What the client asks.

    def who_am_i(self):
        user = self._user()
        if user is None:
            raise Refusal(401, "", "Invalid username or password.")
        return {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}}

    def create_repository(self):
        wanted, user = self._json(), self._user()
        if user is None:
            raise Refusal(401, "", "Invalid username or password.")
        owner = wanted.get("organization") or user
        if owner != user:
            raise Refusal(403, "", f"You don't have the rights to create a model under the namespace {owner!r}")
        repo = f"{owner}/{wanted['name']}"
        address = {"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": repo}
        if repo in self.hub.repositories:
            self._send(409, {"error": "You already created this model repo", **address})
            return None
        private = wanted.get("private") or wanted.get("visibility") == "private"
        repository = self.hub.repositories[repo] = Repository(bool(private))
        repository.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        return address

    def create_branch(self, repo: str, branch: str):
        repository = self._repository(repo, write=True)
        if branch in repository.branches:
            raise Refusal(409, "", "Reference already exists")
        start, _ = repository.find(self._json().get("startingPoint") or "main")
        repository.branches[branch] = start
        return {}

    def validate_yaml(self):
        return {"errors": [], "warnings": []}

    def preupload(self, repo: str, revision: str):
        _, present = self._repository(repo, write=True).find(revision)
        answers = []
        for file in self._json()["files"]:
            path = file["path"]
            answer = {"path": path, "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular"}
            oid = {"oid": present[path].oid} if path in present else {}
            answers.append({**answer, **oid, "shouldIgnore": False})
        return {"files": answers}

    def lfs_batch(self, repo: str):
        objects = self._repository(repo, write=True).objects
        answers = []
        for wanted in self._json()["objects"]:
            if wanted["oid"] not in objects:
                place = f"{self.hub.endpoint}/lfs/{repo}/{wanted['oid']}"
                wanted["actions"] = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
            answers.append(wanted)
        return {"transfer": "basic", "objects": answers}

    def lfs_upload(self, repo: str, oid: str):
        content = b""
        for part in self._parts():
            content += part
            if self.hub.cut_uploads_after is not None and len(content) > self.hub.cut_uploads_after:
                raise ConnectionAbortedError
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "", f"what came is not {oid}")
        self.hub.repositories[repo].objects[oid] = content
        return {}

    def lfs_verify(self, repo: str, oid: str):
        stored = self._repository(repo, write=True).objects.get(oid)
        if stored is None or len(stored) != self._json()["size"]:
            raise Refusal(404, "", f"{oid} is not here in full")
        return {}

    def commit(self, repo: str, revision: str):
        repository = self._repository(repo, write=True)
        _, files = repository.find(revision)
        files, summary = dict(files), ""
        for line in self._read_body().splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                summary = value["summary"]
            elif kind == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif kind == "lfsFile":
                if value["oid"] not in repository.objects:
                    raise Refusal(400, "", f"{value['path']}: its content was not uploaded")
                files[value["path"]] = File(repository.objects[value["oid"]], True)
            elif kind == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, "", f"no {kind} here")
        sha = repository.commit(revision, files, summary)
        return {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None}

    def info(self, repo: str, revision: str = "main"):
        repository = self._repository(repo)
        sha, files = repository.find(revision)
        siblings = []
        for path, file in files.items():
            sizes = {"size": len(file.content), "blobId": file.oid} if "blobs" in self.query else {}
            siblings.append({"rfilename": path, **sizes})
        return {
            "id": repo,
            "modelId": repo,
            "sha": sha,
            "private": repository.private,
            "siblings": siblings,
            "tags": [],
        }

    def tree(self, repo: str, revision: str, folder: str | None = None):
        _, files = self._repository(repo).find(revision)
        inside = f"{folder.strip('/')}/" if folder else ""
        found = {path: file for path, file in files.items() if path.startswith(inside)}
        if folder and not found:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        return [
            {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
            | ({"lfs": {"oid": file.oid, "size": len(file.content), "pointerSize": 130}} if file.lfs else {})
            for path, file in found.items()
        ]

    def resolve(self, repo: str, revision: str, path: str):
        sha, files = self._repository(repo).find(revision)
        if path not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        file = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"'}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        self._send(200, file.content, headers)


_REPO, _REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
_ROUTES = [
    (("GET",), "/api/whoami-v2", _Handler.who_am_i),
    (("POST",), "/api/repos/create", _Handler.create_repository),
    (("POST",), "/api/validate-yaml", _Handler.validate_yaml),
    (("POST",), rf"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", _Handler.create_branch),
    (("POST",), rf"/api/models/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    (("POST",), rf"/api/models/{_REPO}/commit/{_REVISION}", _Handler.commit),
    (("GET",), rf"/api/models/{_REPO}", _Handler.info),
    (("GET",), rf"/api/models/{_REPO}/revision/{_REVISION}", _Handler.info),
    (("GET",), rf"/api/models/{_REPO}/tree/{_REVISION}(?P<folder>/.*)?", _Handler.tree),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), rf"/lfs/{_REPO}/(?P<oid>[0-9a-f]{{64}})", _Handler.lfs_upload),
    (("POST",), rf"/lfs/{_REPO}/(?P<oid>[0-9a-f]{{64}})/verify", _Handler.lfs_verify),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]
