"""A server on this machine that speaks as much of the Hugging Face hub's protocol as its client asks for."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FIRST_COMMIT = "1" * 40
OTHER_COMMIT = "2" * 40


@dataclass
class Hub:
    """What is served, what goes wrong, and what was asked. ``files`` is keyed by ``owner/name/path``."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=lambda: {"main": FIRST_COMMIT})
    """Branch -> commit. Commits that a branch has had stay known."""
    stated: dict[str, bytes] = field(default_factory=dict)
    """Files whose size and hash the hub states wrongly: those of these bytes."""
    status: dict[str, list[int]] = field(default_factory=dict)
    """``HEAD`` or ``GET`` -> answers to give before the right one; the last is kept if it is a 4xx."""
    cut_after: list[int] = field(default_factory=list)
    """Bytes after which each of the next bodies breaks off."""
    instead: list[bytes] = field(default_factory=list)
    """Bodies that the next GETs get with a 200 instead of what they asked for, as of a login page."""
    size_unknown: bool = False
    """Bodies end when the connection does, and nothing says their size."""
    redirect: bool = False
    """Bodies lie under another path and host, as on the hub's own storage."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and Range of every request."""

    def count(self, method: str) -> int:
        return Counter(request[0] for request in self.requests)[method]

    def ranges(self) -> list[str]:
        return [asked for method, _, asked in self.requests if method == "GET" and asked]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.hub
        hub.requests.append((self.command, self.path, self.headers.get("Range")))
        if planned := hub.status.get(self.command):
            status = planned[0] if planned[0] < 500 and len(planned) == 1 else planned.pop(0)
            self._empty(status)
        elif self.path.startswith("/storage/"):
            self._body(self.path.removeprefix("/storage/"), None)
        else:
            self._resolve()

    def _resolve(self) -> None:
        """``/owner/name/resolve/revision/path``."""
        repo, _, rest = self.path.removeprefix("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        commit = self.hub.heads.get(revision, revision if revision in self._commits() else None)
        key = f"{repo}/{name}"
        if commit is None:
            self._empty(404, {"X-Error-Code": "RevisionNotFound"})
        elif key not in self.hub.files:
            self._empty(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        elif self.hub.redirect:
            storage = self.hub.url.replace("127.0.0.1", "localhost")
            self._empty(302, self._facts(key, commit) | {"Location": f"{storage}/storage/{key}"})
        else:
            self._body(key, commit)

    def _commits(self) -> set[str]:
        return {FIRST_COMMIT, *self.hub.heads.values()}

    def _facts(self, key: str, commit: str) -> dict[str, str]:
        content = self.hub.stated.get(key, self.hub.files[key])
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        size = {} if self.hub.size_unknown else {"X-Linked-Size": str(len(content))}
        return {"X-Repo-Commit": commit, "X-Linked-Etag": etag, "ETag": etag, **size}

    def _body(self, key: str, commit: str | None) -> None:
        content = self.hub.files[key]
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if self.command == "GET" and self.hub.instead:
            content, first, commit = self.hub.instead.pop(0), 0, None
        if first >= len(content):
            self._empty(416)
            return
        self.send_response(206 if first else 200)
        for name, value in (self._facts(key, commit) if commit else {}).items():
            self.send_header(name, value)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if self.hub.size_unknown:
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cut_after:
            self.wfile.write(content[first : first + self.hub.cut_after.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_WR)
            return
        self.wfile.write(content[first:])

    def _empty(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()


def serve() -> tuple[Hub, ThreadingHTTPServer]:
    """A running server; shut it down after use."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return hub, server
