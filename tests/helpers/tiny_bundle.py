"""A bundle of a tiny untrained student, made once a test run, and `ddops serve` as a process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch

from ddops.export.bundle import Sources, write_bundle
from ddops.inference import OneStepPipeline
from ddops.models.weights import STUDENT, TOKENIZER, save_weights
from helpers.tiny import tiny, untrained

FACTS = {"ddops.preset": "tiny", "ddops.protocol": "digits", "ddops.fid": "12.3456", "ddops.license": "MIT"}
PATIENCE = 240
"""Seconds for a process to get ready on a machine that is busy with other things."""


def save_sources(directory: Path, scale: float = 1.0) -> Sources:
    """The weights of a tiny student and tokenizer as files; ``scale`` other than 1 makes it another model."""
    teacher, student = untrained("llamagen")
    model = tiny("llamagen").teacher.model
    directory.mkdir(parents=True, exist_ok=True)
    weights = {key: value * scale for key, value in student.state_dict().items()}
    save_weights(directory / "student.safetensors", weights, model, STUDENT)
    save_weights(directory / "tokenizer.safetensors", teacher.tokenizer.state_dict(), model, TOKENIZER)
    return Sources(directory / "student.safetensors", directory / "tokenizer.safetensors", (0, 2), 8)


def make_bundle(directory: Path, scale: float = 1.0, **changes: Any) -> Path:
    """A bundle; ``changes`` are to the export's configuration."""
    with torch.random.fork_rng():
        sources = save_sources(directory.parent / f"{directory.name}-weights", scale)
        export = replace(tiny("llamagen").export, parity_count=8, **changes)
        write_bundle(directory, sources, export, FACTS)
    return directory


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, **options)

    def records(self) -> list[dict[str, Any]]:
        """What it logged: every line is JSON."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def wait_until(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"waited in vain for {what}\n{self.log.read_text()}"
            time.sleep(0.05)

    def ready(self) -> bool:
        try:
            with self.client() as client:
                return client.get("/readyz").status_code == 200
        except httpx2.TransportError:
            return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(
    place: Path, log: Path, *arguments: str, wait: bool = True, python: str = sys.executable, **environment: str
) -> Iterator[Server]:
    """`ddops serve` on a free port; killed at the end where the test has not ended it."""
    port = free_port()
    command = [python, "-m", "ddops.cli", "serve", str(place), "--port", str(port), *arguments]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        if wait:
            server.wait_until(server.ready, "readiness")
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


def pixels(pipe: OneStepPipeline, labels: Any, **options: Any) -> np.ndarray:
    """The images as integers (N, H, W) or (N, H, W, channels)."""
    return np.stack([np.asarray(image) for image in pipe(labels, **options).images]).astype(int)
