"""What surrounds every request: an id, a limit on its body, a line in the log, figures for Prometheus."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddops.serving.metrics import Metrics

log = logging.getLogger("ddops.serving.access")

REQUEST_ID: Final = "x-request-id"
_SAFE_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
BODY_TIMEOUT_S: Final = 10.0
KNOWN_PATHS: Final = frozenset({"/", "/v1/images", "/healthz", "/readyz", "/metrics", "/openapi.json", "/docs"})
"""Label values of the metrics. Anything else counts as one path, or a scanner could fill the memory."""


class _Refused(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class RequestContext:
    """ASGI middleware. A client's request id is kept where it is harmless, else one is made."""

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body_bytes: int) -> None:
        self._app, self._metrics, self._max_body_bytes = app, metrics, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(REQUEST_ID.encode(), b"").decode("latin-1")
        request_id = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.perf_counter(), 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (REQUEST_ID.encode(), request_id.encode())]
            await send(message)

        try:
            body = await self._read_body(headers, receive)
            await self._app(scope, _replay(body, receive), send_with_id)
        except _Refused as refused:
            await _answer(send_with_id, refused.status, {"error": str(refused), "request_id": request_id})
        finally:
            seconds = time.perf_counter() - started
            path = scope["path"] if scope["path"] in KNOWN_PATHS else "other"
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.latency.labels(path).observe(seconds)
            fields = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            log.info("request", extra=fields | {"ms": round(seconds * 1000, 1)})

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body: it is small, and a client that sends it drop by drop is not waited for."""
        stated = headers.get(b"content-length", b"0")
        if stated.isdigit() and int(stated[:20]) > self._max_body_bytes:
            raise _Refused(413, f"the body may have {self._max_body_bytes} bytes")
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > self._max_body_bytes:
                        raise _Refused(413, f"the body may have {self._max_body_bytes} bytes")
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise _Refused(408, f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """A body that was read already, then whatever comes after it."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


async def _answer(send: Send, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
