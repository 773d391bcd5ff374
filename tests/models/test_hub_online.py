"""Loading over the network from a small server that speaks the hub's protocol, in a process of its own: the hub's client
reads HF_ENDPOINT and HF_HOME when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tiny import tiny_model, tiny_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import sys, json
from elsteer.errors import ModelError
from elsteer.models import load, source_of
for name, revision in json.loads(sys.argv[1]):
    try:
        model, tokenizer = load(name, revision=revision, device="cpu")
        print(json.dumps({**source_of(model), "dtype": str(model.dtype), "template": bool(tokenizer.chat_template)}))
    except ModelError as error:
        print(json.dumps({"error": str(error)}))
"""


class Hub(BaseHTTPRequestHandler):
    """someone/tiny at one commit, branch main and tag v1; everything else is not there."""

    folder: Path
    down = False
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        if self.down:
            return self.reply(503, b"")
        if path == "/":
            return self.reply(200, b"")
        parts = path.strip("/").split("/")
        files = sorted(file.name for file in self.folder.iterdir())
        if parts[:4] == ["api", "models", "someone", "tiny"]:
            if parts[4:5] == ["tree"]:
                tree = [{"type": "file", "path": f, "size": (self.folder / f).stat().st_size, "oid": f} for f in files]
                return self.reply(200, json.dumps(tree).encode(), body=body)
            if parts[4:5] in ([], ["revision"]) and parts[-1] in ("tiny", "main", "v1", COMMIT):
                info = {"id": "someone/tiny", "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                return self.reply(200, json.dumps(info).encode(), body=body)
            return self.reply(404, b"", error="RevisionNotFound")
        if parts[:3] == ["someone", "tiny", "resolve"] and parts[3] in ("main", "v1", COMMIT):
            if (file := self.folder / parts[-1]).is_file() and len(parts) == 5:
                return self.reply(200, file.read_bytes(), body=body, etag=file.name)
            return self.reply(404, b"", error="EntryNotFound")
        return self.reply(404, b"", error="RevisionNotFound" if parts[:2] == ["someone", "tiny"] else "RepoNotFound")

    def reply(self, status: int, data: bytes, *, body: bool = True, etag: str = "", error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        if etag:
            self.send_header("ETag", f'"{etag}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[type[Hub], dict[str, str]]]:
    root = tmp_path_factory.mktemp("hub")
    tiny_model("qwen2").save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    handler = type("Tiny", (Hub,), {"folder": root / "model", "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))},
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(root / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "ELSTEER_CACHE": str(root / "cache"),
        }
        yield handler, environment
        server.shutdown()
        thread.join()


def run(environment: dict[str, str], *models: tuple[str, str | None]) -> list[dict[str, str]]:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(models)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_model_is_downloaded_and_then_found_in_the_cache(hub: tuple[type[Hub], dict[str, str]]) -> None:
    server, environment = hub
    want = {"name": "someone/tiny", "revision": COMMIT, "origin": "hub", "dtype": "torch.float32", "template": True}
    tag, default, nothing, branch = run(
        environment, ("someone/tiny", "v1"), ("someone/tiny", None), ("someone/nothing", None), ("someone/tiny", "none")
    )
    assert tag == default == want
    assert any("model.safetensors" in path for path in server.asked)
    for name, failed in (("someone/nothing", nothing), ("someone/tiny", branch)):
        for part in (name, environment["HF_ENDPOINT"], "no registry mirror"):
            assert part in failed["error"]
    server.asked.clear()
    server.down = True
    assert run(environment, ("someone/tiny", None)) == [want]
    assert server.asked == ["/"]
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    assert run(offline, ("someone/tiny", "v1")) == [want]
    assert server.asked == ["/"]
