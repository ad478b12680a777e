"""A small hub on loopback that serves folders as huggingface_hub asks for them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40
_MODEL = re.compile(r"/api/models/(\w+/[\w.-]+?)(?:/revision/([^?]+)|/tree/([^?]+))?(?:\?.*)?")
_FILE = re.compile(r"/(\w+/[\w.-]+)/resolve/([^/]+)/([^?]+)(?:\?.*)?")


class Hub:
    """`files`: repository -> name -> file. `downloads` are the files that were sent. `damaged`:
    file -> what is sent in place of its content, and "" -> of a listing."""

    def __init__(self, files: Mapping[str, Mapping[str, Path]], gated: tuple[str, ...]) -> None:
        self.files, self.gated = dict(files), gated
        self.downloads: list[str] = []
        self.damaged: dict[str, Callable[[bytes], bytes]] = {}
        self.requests = 0
        self.endpoint = ""


@contextmanager
def serve(files: Mapping[str, Mapping[str, Path]], gated: tuple[str, ...] = ()) -> Iterator[Hub]:
    hub = Hub(files, gated)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None: ...

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.requests += 1
            if match := _FILE.fullmatch(self.path):
                self.file(*match.groups())
            elif match := _MODEL.fullmatch(self.path):
                self.listing(*match.groups())
            else:
                self.refuse(404, "EntryNotFound")

        def listing(self, repo: str, revision: str | None, tree: str | None) -> None:
            if repo not in hub.files:
                return self.refuse(401, "RepoNotFound")
            if (revision or tree or "main") not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            files = hub.files[repo]
            sizes = {name: path.stat().st_size for name, path in files.items()}
            if tree:
                answer: object = [
                    {"type": "file", "path": name, "size": size, "oid": digest(files[name])}
                    for name, size in sizes.items()
                ]
            else:
                siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
                answer = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}
            content = json.dumps(answer).encode()
            self.send(hub.damaged.get("", bytes)(content), "application/json")

        def file(self, repo: str, revision: str, name: str) -> None:
            if repo not in hub.files:
                return self.refuse(401, "RepoNotFound")
            if name not in hub.files[repo]:
                return self.refuse(404, "EntryNotFound")
            if repo in hub.gated and "Bearer good" not in self.headers.get("Authorization", ""):
                return self.refuse(401, "GatedRepo")
            path = hub.files[repo][name]
            if self.command == "GET":
                hub.downloads.append(name)
            etag = {"ETag": f'"{digest(path)}"', "X-Repo-Commit": COMMIT}
            content = path.read_bytes()
            if self.command == "GET" and name in hub.damaged:
                content = hub.damaged[name](content)
            self.send(content, "application/octet-stream", etag)

        def send(self, body: bytes, kind: str, headers: Mapping[str, str] = {}) -> None:
            self.send_response(200)
            for key, value in {"Content-Type": kind, **headers}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def digest(path: Path) -> str:
    """As the real one: SHA-256 of large files."""
    kind = hashlib.sha256 if path.suffix == ".safetensors" else hashlib.sha1
    return kind(path.read_bytes()).hexdigest()


def run_python(hub: Hub, folder: Path, *arguments: str, **changes: str) -> tuple[int, str, str]:
    """Run Python in `folder` with this hub and a cache there: (exit code, stdout, stderr)."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        **changes,
    }
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        if name not in changes:
            environment.pop(name, None)
    hub.downloads.clear()
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return ended.returncode, ended.stdout.strip(), ended.stderr
