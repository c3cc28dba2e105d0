"""A Hub on 127.0.0.1 for tests: repositories in memory, regular and LFS uploads, faults on demand.

Only the calls that creating a repository, committing to it and downloading from it make. `huggingface_hub` reads
HF_ENDPOINT when it is imported, so code that goes through `from_pretrained` or `push_to_hub` runs in a subprocess with
`environment(hub)`; `HfApi(endpoint=hub.url)` works in the test's own process.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"


@dataclass
class Fault:
    """Answer the next `times` requests whose address holds `fragment` with `status`."""

    fragment: str
    status: int
    times: int
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Repository:
    """Files of every branch, and how many commits there were."""

    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    private: bool = False
    commits: list[str] = field(default_factory=list)

    def sha(self) -> str:
        """Name of the newest commit."""
        return hashlib.sha1(f"commit {len(self.commits)}".encode()).hexdigest()


class LoopbackHub:
    """Context manager: a server on a free port of 127.0.0.1.

    Attributes:
        repositories: `owner/name` to Repository.
        requests: method and path of every request, in order.
        lfs: whether files are uploaded the LFS way (needs HF_HUB_DISABLE_XET=1) instead of inside the commit.
    """

    def __init__(self, lfs: bool = False, token: str = TOKEN) -> None:
        self.lfs = lfs
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, fragment: str, status: int, times: int = 1, **headers: str) -> None:
        """Make the next `times` requests to an address that holds `fragment` fail with `status`."""
        self.faults.append(Fault(fragment, status, times, {k.replace("_", "-"): v for k, v in headers.items()}))

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """Path to content of everything in a repository's branch."""
        return self.repositories[repo].branches[branch]


def environment(hub: LoopbackHub, home: str, token: str | None = TOKEN) -> dict[str, str]:
    """Variables for a subprocess that takes `hub` for the Hub, with a fresh cache below `home`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "HUGGING"))}
    kept |= {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return kept | ({"HF_TOKEN": token} if token else {})


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def _answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
        headers = {"Content-Length": str(len(content)), "Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str, message: str, **headers: str) -> None:
        named = {"X-Error-Code": code, "X-Error-Message": message}
        self._answer(status, {"error": message}, named | {k.replace("_", "-"): v for k, v in headers.items()})

    def _route(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        self.body = self._read_chunks() if chunked else self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        for fault in self.hub.faults:
            if fault.times and fault.fragment in path:
                fault.times -= 1
                return self._answer(fault.status, {"error": "injected"}, fault.headers)
        for method, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return getattr(self, name)(**match.groupdict())
        return self._refuse(404, "NotFound", f"no route {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = _route

    def _read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        self._refuse(401, "Unauthorized", "Invalid username or password.")
        return False

    def _repository(self, repo: str) -> Repository | None:
        found = self.hub.repositories.get(repo)
        if found is None:
            self._refuse(404, "RepoNotFound", "Repository not found")
        return found

    def create(self) -> None:
        if not self._may_write():
            return None
        request = json.loads(self.body)
        name = f"{request['organization']}/{request['name']}" if request.get("organization") else request["name"]
        name = name if "/" in name else f"user/{name}"
        address = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            return self._answer(409, {"error": "You already created this model repo", **address})
        self.hub.repositories[name] = Repository(private=bool(request.get("private")))
        return self._answer(200, address)

    def branch(self, repo: str, branch: str) -> None:
        found = self._repository(repo)
        if found is None or not self._may_write():
            return None
        if branch in found.branches:
            return self._refuse(409, "Conflict", "Reference already exists")
        found.branches[branch] = dict(found.branches["main"])
        return self._answer(200)

    def info(self, repo: str, revision: str = "main") -> None:
        found = self._repository(repo)
        if found is None:
            return None
        files = self._revision(found, revision)
        if files is None:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        siblings = [{"rfilename": path} for path in sorted(files)]
        base = {"id": repo, "modelId": repo, "sha": found.sha(), "private": found.private, "tags": [], "downloads": 0}
        return self._answer(200, base | {"siblings": siblings, "likes": 0, "gated": False, "disabled": False})

    @staticmethod
    def _revision(found: Repository, revision: str) -> dict[str, bytes] | None:
        return found.branches["main"] if revision in ("main", found.sha()) else found.branches.get(revision)

    def tree(self, repo: str, revision: str) -> None:
        found = self._repository(repo)
        if found is None:
            return None
        files = self._revision(found, revision)
        if files is None:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        rows = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in sorted(files.items())
        ]
        return self._answer(200, rows)

    def preupload(self, repo: str, revision: str) -> None:
        if self._repository(repo) is None or not self._may_write():
            return None
        mode = "lfs" if self.hub.lfs else "regular"
        rows = [
            {
                "path": file["path"],
                "uploadMode": mode if file["size"] else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body)["files"]
        ]
        return self._answer(200, {"files": rows})

    def commit(self, repo: str, revision: str) -> None:
        found = self._repository(repo)
        if found is None or not self._may_write():
            return None
        files = found.branches[revision]
        for line in self.body.splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif row["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif row["key"] == "header":
                found.commits.append(value["summary"])
        url = f"{self.hub.url}/{repo}/commit/{found.sha()}"
        return self._answer(200, {"success": True, "commitUrl": url, "commitOid": found.sha(), "hookOutput": ""})

    def lfs_batch(self, repo: str) -> None:
        if not self._may_write():
            return None
        rows = []
        for item in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}
            verify = {"href": f"{self.hub.url}/lfs/verify", "header": {}}
            rows.append({**item, "actions": {"upload": upload, "verify": verify}})
        return self._answer(200, {"transfer": "basic", "objects": rows})

    def lfs_put(self, oid: str) -> None:
        self.hub.blobs[oid] = self.body
        return self._answer(200)

    def lfs_verify(self) -> None:
        return self._answer(200)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._repository(repo)
        if found is None:
            return None
        files = self._revision(found, revision)
        if files is None:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        if path not in files:
            return self._refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=found.sha())
        content = files[path]
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": found.sha(), "Content-Type": "application/octet-stream"}
        return self._answer(200, content, headers)

    def validate_yaml(self) -> None:
        return self._answer(200, {"errors": [], "warnings": []})

    def whoami(self) -> None:
        return self._answer(200, {"name": "user", "type": "user"}) if self._may_write() else None


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = (
    (("POST",), r"/api/repos/create", "create"),
    (("POST",), r"/api/validate-yaml", "validate_yaml"),
    (("GET",), r"/api/whoami-v2", "whoami"),
    (("POST",), rf"/api/models/{_REPO}/branch/(?P<branch>.+)", "branch"),
    (("POST",), rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", "preupload"),
    (("POST",), rf"/api/models/{_REPO}/commit/(?P<revision>.+)", "commit"),
    (("GET",), rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", "tree"),
    (("GET",), rf"/api/models/{_REPO}/revision/(?P<revision>[^/]+)", "info"),
    (("GET",), rf"/api/models/{_REPO}", "info"),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    (("POST",), r"/lfs/verify", "lfs_verify"),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]+)", "lfs_put"),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
)
