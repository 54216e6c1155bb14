"""``ddops prefect``: a server, the pool, limits, automations and deployments, and a worker; Ctrl-C ends them all."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import FrameType

from ddops.flows.environment import settings
from ddops.flows.leash import Leash

START_SECONDS = 600.0


def main() -> None:
    """Start everything, say where it is, and wait until it ends."""
    parser = argparse.ArgumentParser(prog="ddops prefect", description=__doc__)
    parser.add_argument("--port", type=int, default=4200)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: for this machine only)")
    arguments = parser.parse_args()
    workspace = Path.cwd()
    url = f"http://{arguments.host}:{arguments.port}"
    env = {**os.environ, **settings(workspace), "PREFECT_API_URL": f"{url}/api"}
    home = Path(env["PREFECT_HOME"])
    # Leave through the `with` below, which ends server and worker. SIGINT too: started in the background of a script,
    # this process would not hear it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    serve = ["-m", "prefect", "server", "start", "--host", arguments.host, "--port", str(arguments.port)]
    with (
        suppress(KeyboardInterrupt),
        (home / "server.log").open("ab") as log,
        Leash([sys.executable, *serve], cwd=workspace, env=env, output=log) as server,
    ):
        _wait_for(f"{url}/api/health", server, log.name)
        subprocess.run([sys.executable, "-m", "ddops.flows.setup"], cwd=workspace, env=env, check=True)
        with Leash([sys.executable, "-m", "ddops.flows.worker"], cwd=workspace, env=env, output=None) as worker:
            print(f"\nPrefect: {url}\nserver's log: {log.name}\nCtrl-C ends server and worker\n", flush=True)
            while server.process.poll() is None and worker.process.poll() is None:
                time.sleep(0.5)
            ended = "worker" if server.process.poll() is None else "server"
            raise SystemExit(f"the {ended} ended by itself; what it said last is above, or in {log.name}")


def _leave(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _wait_for(url: str, server: Leash, log: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.3)
    raise SystemExit(f"the server did not answer at {url} within {START_SECONDS:g} s; see {log}")


if __name__ == "__main__":
    main()
