"""``python -m ddops.flows.worker``, with PREFECT_API_URL set: a Prefect worker whose runs end when it does."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ddops.flows.environment import POOL, settings
from ddops.flows.workspace import WORKER_PID


def main() -> None:
    """Become the worker: this process goes on as it, so its runs know which parent to look for."""
    parser = argparse.ArgumentParser(prog="python -m ddops.flows.worker", description="More arguments are Prefect's.")
    parser.add_argument("--pool", default=POOL, help=f"default: {POOL}")
    known, more = parser.parse_known_args()
    os.environ |= {**settings(Path.cwd()), WORKER_PID: str(os.getpid())}
    arguments = ["-m", "prefect", "worker", "start", "--pool", known.pool, *more]
    os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    main()
