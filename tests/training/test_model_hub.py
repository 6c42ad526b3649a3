"""A base model that comes from the hub: a stand-in server that counts what it is asked for, the real client."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

LIMIT_S = 100.0
MODEL = "nobody/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FETCH = (
    "from orchestrator.training import model_source\n"
    f"print(model_source.materialize(model_source.resolve({MODEL!r})))\n"
)


class Hub:
    """The part of the hub's HTTP interface that its client asks for one model (huggingface_hub 2.4)."""

    def __init__(self, folder: Path, visitors: int) -> None:
        self.files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        self.gets: Counter[str] = Counter()
        """How often the content of a file was sent."""
        self.requests = 0
        # None goes on to the weights before all are about to: they meet there for certain.
        self.all_came = threading.Barrier(visitors)
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        self.requests += 1
        path = request.path.partition("?")[0]
        if path.startswith(f"/api/models/{MODEL}/revision/"):
            self.all_came.wait(LIMIT_S)
            return self.send(request, json.dumps({"id": MODEL, "sha": COMMIT, "siblings": []}).encode(), with_body)
        if path.startswith(f"/api/models/{MODEL}/tree/"):
            tree = [
                {"type": "file", "oid": _oid(content), "size": len(content), "path": name}
                for name, content in self.files.items()
            ]
            return self.send(request, json.dumps(tree).encode(), with_body)
        content = self.files.get(path.rpartition("/")[2])
        if content is None:
            request.send_error(404)
            return None
        if with_body:
            self.gets[path.rpartition("/")[2]] += 1
        return self.send(request, content, with_body)

    def send(self, request: BaseHTTPRequestHandler, content: bytes, with_body: bool) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("ETag", f'"{_oid(content)}"')
        request.end_headers()
        if with_body:
            request.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[Hub]:
    made = Hub(tiny_model, visitors=3)
    yield made
    made.server.shutdown()


def fetching(cache: Path, hub: Hub, offline: bool = False) -> subprocess.Popen[str]:
    """A process of a node that comes for the model."""
    variables = {"HF_ENDPOINT": hub.address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": str(int(offline))}
    environment = {**os.environ, **variables}
    return subprocess.Popen([sys.executable, "-c", FETCH], env=environment, stdout=subprocess.PIPE, text=True)


def test_who_comes_first_fetches_the_model_for_the_whole_node_and_nobody_asks_for_it_again_offline(
    hub: Hub, tmp_path: Path
) -> None:
    node = [fetching(tmp_path, hub) for _ in range(3)]
    folders = {process.communicate(timeout=LIMIT_S)[0].strip() for process in node}
    assert [process.returncode for process in node] == [0, 0, 0]
    (folder,) = folders
    assert hub.gets == dict.fromkeys(hub.files, 1)
    assert {file.name: file.read_bytes() for file in Path(folder).iterdir()} == hub.files

    asked = hub.requests
    offline = fetching(tmp_path, hub, offline=True)
    assert offline.communicate(timeout=LIMIT_S)[0].strip() == folder
    assert hub.requests == asked
