"""The hub of hub_server.py, with as much of its upload protocol as its client speaks: repository, preupload, LFS batch,
commit; and the listing that a download of a whole repository begins with."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any

from helpers.hub_server import Hub, _Handler

TOKEN = "hf_of_these_tests"
LARGE = (".onnx", ".data", ".safetensors", ".engine")
"""What goes through LFS; all else travels within the commit."""


@dataclass
class UploadHub(Hub):
    """A hub that takes what it is sent by whoever has the token."""

    repos: dict[str, str | None] = field(default_factory=dict)
    """Visibility, by ``owner/name``."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """What LFS holds, by sha256."""
    messages: list[str] = field(default_factory=list)
    """Of the commits."""


class _UploadHandler(_Handler):
    hub: UploadHub

    def do_GET(self) -> None:
        path = self.path.removeprefix("/api/models/")
        if path == self.path:
            return super().do_GET()
        repo = "/".join(path.split("/")[:2])
        held = {key.removeprefix(f"{repo}/"): key for key in self.hub.files if key.startswith(f"{repo}/")}
        if "/tree/" in path:
            return self._json([self._entry(name, self.hub.files[key]) for name, key in held.items()])
        siblings = [{"rfilename": name} for name in held]
        return self._json({"id": repo, "sha": self.hub.heads["main"], "siblings": siblings})

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        oid = hashlib.sha256(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}

    def do_PUT(self) -> None:
        oid, content = self.path.rpartition("/")[2], self._content()
        if hashlib.sha256(content).hexdigest() != oid:
            return self._json({"error": "another content"}, 400)
        self.hub.objects[oid] = content
        return self._json({})

    def do_POST(self) -> None:
        self.hub.requests.append(("POST", self.path, None))
        content = self._content()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json({"error": "who are you?"}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(content)
            self.hub.repos[f"{asked['organization']}/{asked['name']}"] = asked.get("visibility")
            self._json({"url": f"{self.hub.url}/{asked['organization']}/{asked['name']}"})
        elif self.path == "/api/validate-yaml":
            self._json({"warnings": [], "errors": []})
        elif self.path.endswith("/preupload/main"):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(content)["files"]
            ]
            self._json({"files": files})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}}
                for entry in json.loads(content)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif self.path.endswith("/commit/main"):
            self._commit([json.loads(line) for line in content.splitlines()])
        else:
            self._json({"error": self.path}, 404)

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        repo = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                self.hub.files[f"{repo}/{value['path']}"] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[f"{repo}/{value['path']}"] = self.hub.objects[value["oid"]]
        oid = hashlib.sha1(repr(sorted(self.hub.files)).encode()).hexdigest()
        self.hub.heads["main"] = oid
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def _content(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, answer: Any, status: int = 200) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def serve_uploads() -> tuple[UploadHub, ThreadingHTTPServer]:
    """A running server; shut it down after use."""
    hub = UploadHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_UploadHandler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return hub, server
