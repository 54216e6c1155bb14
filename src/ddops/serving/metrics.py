"""What Prometheus is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from ddops.export.manifest import Manifest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """One set a server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("ddops_requests", "Answered requests", ["path", "status"], registry=own)
        self.latency = Histogram("ddops_request_seconds", "Time to answer", ["path"], buckets=SECONDS, registry=own)
        self.images = Counter("ddops_images", "Images drawn", registry=own)
        self.batches = Histogram("ddops_batch_size", "Images a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=own)
        self.batch_seconds = Histogram("ddops_batch_seconds", "Time to draw a batch", buckets=SECONDS, registry=own)
        self.queue = Gauge("ddops_queue_images", "Images waiting", registry=own)
        self.reload_failures = Counter("ddops_reload_failures", "Bundles that could not be served", registry=own)
        self.model = Info("ddops_model", "The model that is served", registry=own)

    def watch_queue(self, waiting: Callable[[], int]) -> None:
        """Ask ``waiting`` for the queue's length at each scrape."""
        self.queue.set_function(waiting)

    def set_model(self, manifest: Manifest) -> None:
        """Name the model."""
        self.model.info({"id": manifest.identity, "preset": manifest.facts.get("ddops.preset", "")})

    @contextmanager
    def batch(self, size: int) -> Iterator[None]:
        """Around the drawing of a batch."""
        started = time.perf_counter()
        yield
        self.batch_seconds.observe(time.perf_counter() - started)
        self.batches.observe(size)
        self.images.inc(size)
