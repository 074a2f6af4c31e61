"""A Hugging Face Hub in a thread: as much of its HTTP interface as huggingface_hub uses to push and load a model.

Repositories live in memory, files travel inside the commit ("regular" upload mode), and every request is written
down. ``python fake_hub.py`` serves one and prints its address.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_user"  # of the one account, "user"


@dataclass
class Repository:
    """Commits (files by path) by their hash, and where the branches stand."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {})

    def commit(self, branch: str, changes: dict[str, bytes]) -> str:
        files = {**self.commits.get(self.branches.get(branch, ""), {}), **changes}
        sha = hashlib.sha1(f"{len(self.commits)} {branch}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class FakeHub:
    """``with FakeHub() as hub``: ``hub.url`` is what HF_ENDPOINT wants."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.refuse: int | None = None  # answer everything with this status

    def __enter__(self) -> FakeHub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return repository.commits[repository.resolve(revision)]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, content: object = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.handle_request()

    def do_HEAD(self) -> None:
        self.handle_request()

    def do_POST(self) -> None:
        self.handle_request()

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.refuse:
            return self.answer(self.hub.refuse, {"error": "refused"})
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command == "POST":
            if not known:
                return self.answer(401, {"error": "Invalid username or password."})
            return self.write(path, body)
        self.read(path, known)

    # Reading

    def read(self, path: str, known: bool) -> None:
        if resolved := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo_id, revision, file = resolved.groups()
        elif listed := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:tree|revision)/([^/]+)(?:/(.+))?)?", path):
            repo_id, revision, file = listed[1], listed[2] or "main", listed[3]  # no folder is ever found
        else:
            return self.answer(404, {"error": f"the fake Hub has no {path}"})
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not known):
            # the Hub says 401, so that the names of private repositories do not leak
            return self.answer(401, {"error": "Invalid username or password."}, X_Error_Code="RepoNotFound")
        sha = repository.resolve(revision)
        if sha is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        files = repository.commits[sha]
        if file is not None:
            if file not in files:
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            etag = hashlib.sha1(files[file]).hexdigest()
            return self.answer(200, files[file], ETag=f'"{etag}"', X_Repo_Commit=sha)
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
        ]
        if "/tree/" in path:
            return self.answer(200, json.dumps(entries).encode())
        siblings = [{"rfilename": name} for name in files]
        self.answer(200, {"id": repo_id, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})

    # Writing

    def write(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            asked = json.loads(body)
            owner, name = asked["organization"] or "user", asked["name"]
            if owner != "user":
                return self.answer(403, {"error": f"You don't have the rights to create a model under {owner}"})
            repo_id = f"{owner}/{name}"
            status = 409 if repo_id in self.hub.repositories else 200
            self.hub.repositories.setdefault(repo_id, Repository(asked.get("visibility") == "private"))
            return self.answer(status, {"url": f"{self.hub.url}/{repo_id}"})
        if path == "/api/validate-yaml":
            card = json.loads(body)["content"]
            block = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
            if block is None or not isinstance(yaml.safe_load(block[1]), dict):
                return self.answer(400, {"errors": [{"message": "no metadata"}], "warnings": []})
            return self.answer(200, {"errors": [], "warnings": []})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path)
        if match is None:
            return self.answer(404, {"error": f"the fake Hub has no {path}"})
        repo_id, action, revision = match.groups()
        repository = self.hub.repositories.get(repo_id)
        if repository is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if action == "branch":
            if revision in repository.branches:
                return self.answer(409, {"error": "Reference already exists"})
            repository.branches[revision] = repository.branches["main"]
            return self.answer(200)
        if revision not in repository.branches:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if action == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            return self.answer(200, {"files": modes})
        lines = [json.loads(line) for line in body.splitlines()]
        changes = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        sha = repository.commit(revision, changes)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha})


if __name__ == "__main__":
    with FakeHub() as hub:
        print(hub.url, flush=True)
        input()
