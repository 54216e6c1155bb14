"""Throughput and latency of `ddops serve`, and a load test that compares every image with the one of its seed.

    python benchmarks/serving.py artifacts/bundle --output benchmarks/results/serving.json
    python benchmarks/serving.py artifacts/bundle --soak-seconds 600 --output benchmarks/results/serving_soak.json

Server and clients share the machine. Batching on and off are measured in turns, so that a busy moment meets both.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import math
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image

from ddops import OneStepPipeline
from ddops.files import write_json

SETTINGS = {
    "batched": ["--set", "max_batch=32", "--set", "max_delay_ms=2"],
    "single": ["--set", "max_batch=1", "--set", "max_delay_ms=0"],
}
SEEDS = 256
CLASSES = 10
PARTS = 10
"""Of a load test; memory is read after each."""

Check = Callable[[int, int, bytes], None]
"""Takes seed, class and the picture."""


class Server:
    """`ddops serve` as a process."""

    def __init__(self, bundle: Path, settings: list[str], log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [
            sys.executable,
            "-m",
            "ddops.cli",
            "serve",
            str(bundle),
            "--port",
            str(port),
            "--set",
            "queue_limit=4096",
        ]
        with log.open("wb") as stream:
            self.process = subprocess.Popen([*command, *settings], stdout=stream, stderr=stream)
        while True:
            try:
                if httpx2.get(f"{self.url}/readyz").status_code == 200:
                    return
            except httpx2.TransportError:
                if self.process.poll() is not None:
                    raise SystemExit(log.read_text()) from None
            time.sleep(0.1)

    def resident_bytes(self) -> int:
        """Memory of the process."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> None:
        """SIGTERM, and the end."""
        self.process.terminate()
        self.process.wait(60)


async def load(url: str, clients: int, seconds: float, check: Check | None = None) -> tuple[list[float], list[str]]:
    """Latencies of all answered requests of ``clients`` concurrent clients, and what became of those that were lost.

    Each image goes through ``check``."""
    until = time.perf_counter() + seconds
    latencies: list[float] = []
    lost: list[str] = []
    limits = httpx2.Limits(max_connections=clients)
    async with httpx2.AsyncClient(base_url=url, timeout=120, limits=limits) as http:

        async def client(number: int) -> None:
            seed = number
            while time.perf_counter() < until:
                started = time.perf_counter()
                try:
                    answer = await http.post("/v1/images", json={"class": seed % CLASSES, "seed": seed % SEEDS})
                    answer.raise_for_status()
                except httpx2.HTTPError as error:
                    lost.append(repr(error))
                    continue
                latencies.append(time.perf_counter() - started)
                if check is not None:
                    check(seed % SEEDS, seed % CLASSES, answer.content)
                seed += clients

        await asyncio.gather(*(client(number) for number in range(clients)))
    return latencies, lost


def summary(latencies: list[float], seconds: float) -> dict[str, float]:
    """Requests a second, and percentiles in milliseconds."""
    cuts = statistics.quantiles(latencies, n=100)
    return {
        "requests": len(latencies),
        "per_second": round(len(latencies) / seconds, 1),
        "p50_ms": round(cuts[49] * 1000, 2),
        "p99_ms": round(cuts[98] * 1000, 2),
    }


def measure(bundle: Path, arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Every number of clients with each setting, in turns."""
    servers = {name: Server(bundle, settings, directory / name) for name, settings in SETTINGS.items()}
    runs: dict[str, dict[str, list[Any]]] = {name: {} for name in SETTINGS}
    try:
        for name, server in servers.items():
            asyncio.run(load(server.url, 4, 1.0))  # warm
            runs[name] = {str(clients): [] for clients in arguments.clients}
        for _ in range(arguments.rounds):
            for clients in arguments.clients:
                for name, server in servers.items():
                    latencies, lost = asyncio.run(load(server.url, clients, arguments.seconds))
                    if lost:
                        raise SystemExit(f"{len(lost)} requests were lost: {lost[0]}")
                    runs[name][str(clients)].append(summary(latencies, arguments.seconds))
    finally:
        for server in servers.values():
            server.stop()
    return {
        name: {
            clients: {key: statistics.median(run[key] for run in rounds) for key in rounds[0]}
            for clients, rounds in by_clients.items()
        }
        for name, by_clients in runs.items()
    }


def soak(bundle: Path, arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """64 clients; every image is compared with the reference of its seed, drawn in this process beforehand."""
    pipe = OneStepPipeline(bundle)
    wanted = {
        (seed, label): np.asarray(pipe([label], seed=seed).images[0]).astype(int)
        for seed in range(SEEDS)
        for label in range(CLASSES)
        if (seed - label) % math.gcd(SEEDS, CLASSES) == 0  # the pairs that one running number leads to
    }
    differences: list[int] = []

    def check(seed: int, label: int, content: bytes) -> None:
        drawn = np.asarray(Image.open(io.BytesIO(content))).astype(int)
        differences.append(int(np.abs(drawn - wanted[seed, label]).max()))

    server = Server(bundle, SETTINGS["batched"], directory / "soak")
    memory, latencies, lost = [server.resident_bytes()], [], []
    try:
        for part in range(PARTS):
            answered, failed = asyncio.run(load(server.url, 64, arguments.soak_seconds / PARTS, check))
            latencies += answered
            lost += failed
            memory.append(server.resident_bytes())
            print(f"{part + 1}/{PARTS}: {len(latencies)} answered, {len(lost)} lost", file=sys.stderr, flush=True)
    finally:
        server.stop()
    return {
        **summary(latencies, arguments.soak_seconds),
        "lost": len(lost),
        "first_lost": lost[:3],
        "wrong": sum(difference > 1 for difference in differences),
        "compared": len(differences),
        "largest_level_difference": max(differences),
        "memory_bytes": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--soak-seconds", type=float, default=0.0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run = soak if arguments.soak_seconds else measure
        result = run(arguments.bundle, arguments, Path(directory))
    facts = {
        "command": " ".join(sys.argv).replace(str(arguments.bundle), "BUNDLE"),
        "date": datetime.now(UTC).date().isoformat(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
    }
    write_json(arguments.output, {**facts, "machine": f"{platform.system()} {platform.machine()}", "result": result})
    print(json.dumps(result, indent=2))
    if result.get("lost") or result.get("wrong"):
        raise SystemExit("requests were lost or images were wrong")


if __name__ == "__main__":
    main()
