"""A server that speaks just enough of the hub's protocol for `huggingface_hub` to make, fill and download a repository."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["FakeHub", "fake_hub"]

WRITER = "hf_writer"  # the one token that may write


class FakeHub:
    """What is on the hub. commits: by repository, each commit's files, oldest first."""

    def __init__(self) -> None:
        self.address = ""
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.broken: int | None = None  # answer every request about a repository with this error

    def sha(self, repo: str, number: int = -1) -> str:
        files = self.commits[repo][number]
        return hashlib.sha1(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        if revision == "main":
            return self.commits[repo][-1]
        return next((f for i, f in enumerate(self.commits[repo]) if self.sha(repo, i) == revision), None)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """The hub on a free port of this machine."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self._parts()
        if parts == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
            return
        if self.hub.broken:
            self._error(self.hub.broken, "broken")
            return
        if self.headers.get("Authorization") != f"Bearer {WRITER}":
            self._error(401, "Invalid credentials")
            return
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            existed = repo in self.hub.commits
            self.hub.commits.setdefault(repo, [{}])
            if not existed:
                self.hub.private[repo] = bool(asked.get("private")) or asked.get("visibility") == "private"
            self._json({"url": f"{self.hub.address}/{repo}"}, 409 if existed else 200)
            return
        repo, action = "/".join(parts[2:4]), parts[4]
        if action == "preupload":
            files = json.loads(body)["files"]
            self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif action == "commit":
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            files = dict(self.hub.commits[repo][-1])
            for line in lines:
                if line["key"] == "header":
                    self.hub.messages.append(line["value"]["summary"])
                elif line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.hub.commits[repo].append(files)
            sha = self.hub.sha(repo)
            self._json({"success": True, "commitUrl": f"{self.hub.address}/{repo}/commit/{sha}", "commitOid": sha})
        else:
            self._error(404, f"no such action: {action}")

    def _get(self) -> None:
        parts = self._parts()
        if not parts:
            self._answer(b"hub", "text/plain")
            return
        api = parts[0] == "api"
        repo = "/".join(parts[2:4] if api else parts[:2])
        rest = parts[4:] if api else parts[2:]
        if self.hub.broken:
            self._error(self.hub.broken, "broken")
        elif repo not in self.hub.commits:
            self._error(404, "Repository not found", "RepoNotFound")
        elif not rest:
            self._json({"id": repo, "sha": self.hub.sha(repo)})
        elif (files := self.hub.files(repo, rest[1])) is None:
            self._error(404, "Invalid rev id", "RevisionNotFound")
        elif rest[0] == "revision":
            sha = self.hub.sha(repo, self.hub.commits[repo].index(files))
            self._json({"id": repo, "sha": sha, "siblings": [{"rfilename": name} for name in files]})
        elif rest[0] == "tree":
            listed = [{"type": "file", "path": n, "size": len(d), "oid": _oid(d)} for n, d in files.items()]
            self._json(listed)
        elif rest[0] == "resolve" and "/".join(rest[2:]) in files:
            data = files["/".join(rest[2:])]
            sha = self.hub.sha(repo, self.hub.commits[repo].index(files))
            self._answer(data, "application/octet-stream", {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": sha})
        else:
            self._error(404, "Entry not found", "EntryNotFound")

    def _parts(self) -> list[str]:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        return [part for part in path.split("/") if part]

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(json.dumps(value).encode(), "application/json", status=status)

    def _error(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message}
        self._answer(json.dumps({"error": message}).encode(), "application/json", headers, status)

    def _answer(self, data: bytes, kind: str, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Type": kind, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
