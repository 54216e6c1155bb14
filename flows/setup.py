"""Tell a server what it needs to know: ``python -m flows.setup`` in a workspace, with PREFECT_API_URL set.

Pool, limit and automations, and the deployments of deploy/prefect.yaml. Again is fine: it replaces what was there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from flows.environment import GPU_TAG, POOL, WORKSPACE, settings

DEPLOYMENTS = "deploy/prefect.yaml"
GPUS = "DDOPS_GPUS"
"""How many stages tagged "gpu" may run at once, over all workspaces of this server; default 1."""


def main() -> None:
    """Do it."""
    os.environ |= settings(Path.cwd())
    # After the environment: Prefect reads it when it is imported.
    from prefect import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    from flows import automations

    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"), overwrite=True)
        client.upsert_global_concurrency_limit_by_name(f"tag:{GPU_TAG}", int(os.environ.get(GPUS, "1")))
    automations.install()
    deploy = ["-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", DEPLOYMENTS]
    # Left to be filled in by the worker that takes a run: its workspace is where it was started, not here.
    env = {name: value for name, value in os.environ.items() if name != WORKSPACE}
    subprocess.run([sys.executable, *deploy], env=env, check=True)
    refuse_unknown_parameters()


def refuse_unknown_parameters() -> None:
    """Close every deployment's schema: Prefect leaves it open, and drops a misspelt parameter without a word."""
    from prefect import get_client
    from prefect.client.schemas.actions import DeploymentUpdate

    with get_client(sync_client=True) as client:
        for deployment in client.read_deployments():
            schema = {**(deployment.parameter_openapi_schema or {}), "additionalProperties": False}
            client.update_deployment(deployment.id, DeploymentUpdate(parameter_openapi_schema=schema))


if __name__ == "__main__":
    main()
