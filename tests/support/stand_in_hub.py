"""A hub on loopback: as much of the Hugging Face hub's HTTP interface as fetching a model's files needs."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one model's files; `asked` are the paths of all requests, `fail` a status for every file."""

    def __init__(self, repository: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repository, self.folder = repository, folder
        self.asked: list[str] = []
        self.fail: int | None = None
        self.gated = False

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        repository = self.server.repository
        if self.server.gated and repository in path:
            self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}, body)
        elif path.startswith(f"/api/models/{repository}/revision/"):
            files = sorted(p.name for p in self.server.folder.iterdir())
            info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
        elif path.startswith(f"/api/models/{repository}/tree/"):
            tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40}
                    for p in sorted(self.server.folder.iterdir())]  # fmt: skip
            self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
        elif (
            path.startswith(f"/{repository}/resolve/") and (file := self.server.folder / path.split("/")[-1]).is_file()
        ):
            if self.server.fail:
                self._send(self.server.fail, b"", {}, body)
                return
            raw = file.read_bytes()
            etag = hashlib.sha256(raw).hexdigest()
            self._send(200, raw, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)

    def _send(self, status: int, raw: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if body:
            self.wfile.write(raw)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def stand_in_hub(repository: str, folder: Path) -> Iterator[Hub]:
    """Run a hub that has one model, `repository`, whose files are those of `folder`."""
    hub = Hub(repository, folder)
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
