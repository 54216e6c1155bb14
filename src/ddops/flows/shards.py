"""The trajectory shards as Prefect tasks on a Dask cluster, before the stage ``trajectories`` runs.

A shard is a pure function of the settings and its number, so it does not matter which machine makes it. Each task is a
`ddops trajectories generate --shards N` on a leash, so a worker that dies takes it along, and Dask gives the shard to
another. The stage then finds every shard in its place, checks them all, and writes the manifest.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import as_completed
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed, Failed
from prefect.task_runners import TaskRunner

from ddops.flows import artifacts, dvc
from ddops.flows.progress import Progress
from ddops.flows.steps import RETRIES, as_state, forward_to, may_pass

STAGE = "trajectories"
LOCAL = "local"
WORKERS = "DDOPS_WORKERS"
COMMAND = [sys.executable, "-m", "ddops.cli", "trajectories"]


def cluster_from_environment() -> str | None:
    """``DDOPS_DASK``: a scheduler's address, or ``local``; None where there is no cluster."""
    return os.environ.get(dvc.DASK) or None


def map_shards(cluster: str, workspace: Path, delays: list[float]) -> State[Any]:
    """Have the cluster make what is missing of the workspace's data set."""
    # What it says of its workers' coming and going is not for a run's log.
    logging.getLogger("distributed").setLevel(logging.WARNING)
    numbers = missing(workspace)
    if not numbers:
        return Completed(message="no shard is missing")
    mapped = make_shards.with_options(task_runner=task_runner(cluster))
    state: State[Any] = mapped(numbers, workspace, delays, return_state=True)
    return state


def missing(workspace: Path) -> list[int]:
    """Numbers of the shards that are to be made.

    Raises:
        DvcError: ddops cannot tell; in its own words.
    """
    command = [*COMMAND, "missing", "--replace"]
    result = subprocess.run(command, cwd=workspace, env=dvc.environment(), capture_output=True, text=True, check=False)
    if result.returncode:
        raise dvc.DvcError(result.stderr.strip())
    return [int(line) for line in result.stdout.split()]


def task_runner(cluster: str) -> TaskRunner[Any]:
    """Prefect's, on the cluster at an address, or on one of this machine's processes.

    Raises:
        DvcError: prefect-dask is not installed; DDOPS_WORKERS is no number; or there is no Prefect server, which the
            workers of a cluster at an address report to.
    """
    try:
        from prefect_dask.task_runners import DaskTaskRunner
    except ImportError:
        raise dvc.DvcError(f"{dvc.DASK}={cluster} needs prefect-dask: pip install 'ddops[prefect]'") from None
    if cluster != LOCAL:
        if not PREFECT_API_URL.value():
            raise dvc.DvcError(
                f"{dvc.DASK}={cluster}: its workers report to a Prefect server: set PREFECT_API_URL to one that they "
                f"reach (make prefect), or run dvc repro, which maps the shards without Prefect"
            )
        return DaskTaskRunner(address=cluster)
    workers = os.environ.get(WORKERS, "2")
    if not workers.isdecimal() or int(workers) < 1:
        raise dvc.DvcError(f"{WORKERS}={workers}: expected a number of processes, 1 or more")
    local = {"n_workers": int(workers), "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
    return DaskTaskRunner(cluster_kwargs=local)


@flow(name="shards", description="Trajectory shards on a Dask cluster.", persist_result=False)
def make_shards(numbers: list[int], workspace: Path, delays: list[float]) -> State[Any]:
    """Make these shards; the state is that of the first that did not end well."""
    log = get_run_logger()
    log.info("%d shards to make", len(numbers))
    mapped = make_shard.with_options(retry_delay_seconds=delays)
    futures = mapped.map(numbers, unmapped(workspace), unmapped(os.environ.get("OMP_NUM_THREADS")))
    bad: list[State[Any]] = []
    with artifacts.ProgressArtifact("shards") as progress:
        for done, future in enumerate(as_completed(list(futures)), 1):
            future.wait()
            if not future.state.is_completed():
                bad.append(future.state)
            progress.show(Progress("shards", 100 * done // len(numbers), f"{done}/{len(numbers)}"))
    if bad:
        first = bad[0]
        # A worker that cannot report to Prefect's server leaves its task as it found it.
        what = first.message if first.is_final() else "their worker did not report to Prefect: see the cluster's log"
        return Failed(
            name=first.name if first.is_final() else None, message=f"{len(bad)} of {len(numbers)} shards: {what}"
        )
    return Completed(message=f"{len(numbers)} shards made")


@task(
    name="shard",
    task_run_name="shard-{number}",
    retries=RETRIES,
    retry_condition_fn=may_pass,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def make_shard(number: int, workspace: Path, threads: str | None) -> State[Any]:
    """One shard, on a Dask worker that sees the workspace. ``threads`` is the flow's OMP_NUM_THREADS: Dask sets its own
    for its workers, and rounding may depend on the number."""
    env = {name: value for name, value in dvc.environment().items() if name != "OMP_NUM_THREADS"}
    if threads is not None:
        env["OMP_NUM_THREADS"] = threads
    command = [*COMMAND, "generate", "--replace", "--shards", str(number)]
    return as_state(dvc.run_command(command, workspace, env, forward_to(get_run_logger(), None)))
