"""The settings of Prefect that this project starts it with. What is set already, by you, stays."""

from __future__ import annotations

import os
from pathlib import Path

POOL = "ddops"
GPU_TAG = "gpu"
HEARTBEAT_SECONDS = 30
WORKSPACE = "DDOPS_WORKSPACE"
"""Where a worker's runs work; prefect.yaml names it."""


def settings(workspace: Path) -> dict[str, str]:
    """Environment variables for a server, a worker or a run of its own, each with its reason.

    Makes the directory that they keep things in: Prefect does not make its parents.
    """
    defaults = {
        # Its database, blocks and logs: with the workspace's other state, not in the home directory.
        "PREFECT_HOME": str(workspace / ".ddops" / "prefect"),
        WORKSPACE: str(workspace),
        # No telemetry, from the server or its clients.
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # A run that is silent for three of these is found crashed (ddops.flows.automations).
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        # In memory, the default, a restart of the server would leave slots taken by nobody.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        # SQLite has one writer at a time; the 10 s that are the default are too few when the machine is busy.
        "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
        # The first start makes the database: over a minute on a busy machine, where the default gives up after 20 s.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "600",
        # A proxy for the outside world is none for a server on this machine.
        "no_proxy": "127.0.0.1,localhost",
        # 2 + 4 + ... + 256 s: a run outlives eight minutes without its server.
        "PREFECT_CLIENT_MAX_RETRIES": "8",
    }
    chosen = {name: os.environ.get(name, value) for name, value in defaults.items()}
    Path(chosen["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    return chosen
