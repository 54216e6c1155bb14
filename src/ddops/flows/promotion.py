"""A run's last step, where it was asked for: the model that passed becomes the production model (`ddops promote`)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from ddops.flows import artifacts, dvc
from ddops.flows.dvc import Outcome
from ddops.flows.steps import RETRIES, as_state, forward_to, may_pass

TIMEOUT = 7200.0
COMMAND = [sys.executable, "-m", "ddops.cli", "promote", "--commit", "--if-new"]


@task(
    task_run_name="promote", retries=RETRIES, retry_condition_fn=may_pass, cache_policy=NO_CACHE, persist_result=False
)
def promote(reason: str, workspace: Path, lock: int) -> State[Any]:
    """Commit what the run made, and promote it with the reason, in the run's name; cached if production has it."""
    before = artifacts.read_registry(workspace)["current"]
    command = [*COMMAND, "--by", f"run {flow_run.get_name()}", "--reason", reason]
    forward = forward_to(get_run_logger(), None)
    result = dvc.run_command(command, workspace, dvc.environment(), forward, timeout=TIMEOUT, lock=lock)
    if result.outcome is not Outcome.RAN:
        return as_state(result)
    artifacts.in_production(workspace)
    current = artifacts.read_registry(workspace)["current"]
    return Completed(name="Cached" if current == before else None, message=f"{current} is in production")
