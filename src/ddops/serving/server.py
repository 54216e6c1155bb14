"""The process: sockets, signals, and the order of going down."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
from pathlib import Path
from types import FrameType

import uvicorn

from ddops.export.errors import BundleError
from ddops.serving.app import Service, create_app
from ddops.serving.logs import configure_logging
from ddops.serving.models import find_bundle
from ddops.serving.settings import ServeSettings

log = logging.getLogger("ddops.serving")


class DrainingServer(uvicorn.Server):
    """On SIGTERM /readyz says no at once; after ``drain_delay_s`` no connection is accepted any more, and what was
    accepted is finished. A second signal ends it without waiting."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining or sig == signal.SIGINT:
            self.force_exit |= self._service.draining  # uvicorn itself goes by a second SIGINT alone
            super().handle_exit(sig, frame)
            return
        self._service.draining = True
        log.info("draining", extra={"delay_s": self._service.settings.drain_delay_s})
        loop = asyncio.get_event_loop()
        loop.call_soon_threadsafe(
            lambda: loop.call_later(
                self._service.settings.drain_delay_s, super(DrainingServer, self).handle_exit, sig, frame
            )
        )

    async def on_tick(self, counter: int) -> bool:
        if self._service.failure is not None:
            return True
        return await super().on_tick(counter)


def serve(place: Path, settings: ServeSettings, *, host: str, port: int, token: str | None) -> None:
    """Serve until told to stop.

    Raises:
        BundleError: there is no bundle, or it cannot be served here.
    """
    find_bundle(place)  # before a socket is opened
    app = create_app(place, settings, token)
    service: Service = app.state.service
    configure_logging()
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.drain_timeout_s),
        h11_max_incomplete_event_size=32_768,
    )
    DrainingServer(config, service).run()
    if service.failure is not None:
        raise BundleError(str(service.failure)) from service.failure
