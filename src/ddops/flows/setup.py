"""Tell a server what it needs to know: ``python -m ddops.flows.setup`` in a workspace, with PREFECT_API_URL set.

Pool, limit and automations, and the deployments of prefect.yaml. Again is fine: it replaces what was there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ddops.flows.environment import GPU_TAG, POOL, WORKSPACE, settings

DEPLOYMENTS = "prefect.yaml"
FLOW = "retrain"
GPUS = "DDOPS_GPUS"
"""How many stages tagged "gpu" may run at once, over all workspaces of this server; default 1."""


def main() -> None:
    """Do it."""
    os.environ |= settings(Path.cwd())
    # After the environment: Prefect reads it when it is imported.
    from prefect import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    from ddops.flows import automations

    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"), overwrite=True)
        client.upsert_global_concurrency_limit_by_name(f"tag:{GPU_TAG}", int(os.environ.get(GPUS, "1")))
    automations.install()
    deploy = ["-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", DEPLOYMENTS]
    # Left to be filled in by the worker that takes a run: its workspace is where it was started, not here.
    env = {name: value for name, value in os.environ.items() if name != WORKSPACE}
    deployed = subprocess.run([sys.executable, *deploy], env=env, capture_output=True, text=True, check=False)
    if deployed.returncode:
        raise SystemExit(f"{DEPLOYMENTS}: not deployed\n{deployed.stdout}{deployed.stderr}")
    print(f"deployments: {', '.join(refuse_unknown_parameters())}", flush=True)


def refuse_unknown_parameters() -> list[str]:
    """Close the schema of the flow's deployments, and give their names: Prefect leaves it open, and drops a misspelt
    parameter without a word."""
    from prefect import get_client
    from prefect.client.schemas.actions import DeploymentUpdate
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    with get_client(sync_client=True) as client:
        ours = client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW])))
        for deployment in ours:
            schema = {**(deployment.parameter_openapi_schema or {}), "additionalProperties": False}
            client.update_deployment(deployment.id, DeploymentUpdate(parameter_openapi_schema=schema))
        return sorted(deployment.name for deployment in ours)


if __name__ == "__main__":
    main()
