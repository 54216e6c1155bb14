"""The flow ``retrain``: DVC's stages one after the other, each a Prefect task. Thin: see docs/PREFECT.md."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_client, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import Field

from ddops.config.load import ConfigError, group_files
from ddops.flows import artifacts, dvc, promotion, shards
from ddops.flows.dvc import Outcome, Result, Stage
from ddops.flows.environment import GPU_TAG
from ddops.flows.steps import RETRIES, as_state, delays, forward_to, may_pass
from ddops.flows.workspace import WorkspaceBusyError, compose_parameters, end_with_the_worker, locked, write_parameters

SERVER_PATIENCE = 480.0

Preset = Annotated[str, Field(json_schema_extra={"enum": sorted(group_files("params", "preset"))})]
Override = Annotated[str, Field(pattern=r"^(\+{0,2}[\w.]+=.*|~[\w.]+)$")]


@flow(name="retrain", description="`dvc repro` by stages: retrain, judge, refuse or export.", persist_result=False)
def retrain(
    preset: Preset = "digits",
    seed: Annotated[int, Field(ge=0)] | None = None,
    trajectories: Annotated[int, Field(ge=0)] | None = None,
    overrides: list[Override] | None = None,
    target: str | None = None,
    force: bool = False,
    remote: str | None = None,
    promote: Annotated[str, Field(min_length=1)] | None = None,
    production: str | None = None,
    wait_seconds: Annotated[float, Field(ge=0)] = 3600.0,
    retry_seconds: Annotated[float, Field(gt=0)] = 30.0,
) -> State[Any]:
    """Bring the workspace (the working directory) up to date with what the parameters ask for.

    Args:
        preset: a preset of ddops, or one of the workspace's own in params/preset.
        seed: of everything random; the preset's own if left out.
        trajectories: the size of the data set that the student learns from; the preset's own if left out.
        overrides: more settings as `section.key=value`, e.g. `dd1.training.steps=8000`.
        target: the last stage to run; all of them if left out.
        force: run stages even if they are up to date.
        remote: a DVC remote to fetch results from before, and to push them to after; none if left out.
        promote: why the model, if it passes, is to be the production model; if left out, production stays as it is.
        production: the Git revision whose metrics the table shows beside this run's; if left out, the figures with
            which the model in production was promoted, or while there is none what is committed (HEAD).
        wait_seconds: how long to wait for another run in the same workspace.
        retry_seconds: the first wait before trying again what may pass; then twice that, and so on.
    """
    workspace = Path.cwd()
    if os.environ.get("PREFECT__FLOW_RUN_ID"):
        end_with_the_worker()
    log = get_run_logger()
    try:
        if promote is not None and target is not None:
            raise ConfigError("promote needs every stage: leave out the target")
        values = compose_parameters(workspace, preset, seed, trajectories, overrides or [])
        plan = dvc.stages(workspace, target)
        with locked(workspace, f"run {flow_run.get_name()}", wait_seconds, log.info) as lock:
            write_parameters(workspace, values)
            return _run_all(plan, Job(workspace, lock, force, remote, promote, production, retry_seconds))
    except (ConfigError, dvc.DvcError) as error:
        return Failed(name="ParametersRefused", message=str(error))
    except WorkspaceBusyError as error:
        return Failed(name="WorkspaceBusy", message=str(error))


@dataclass(frozen=True)
class Job:
    """What every step of a run needs to know; see :func:`retrain`."""

    workspace: Path
    lock: int
    force: bool
    remote: str | None
    promote: str | None
    production: str | None
    retry_seconds: float

    @property
    def delays(self) -> list[float]:
        """Seconds to wait before each retry."""
        return delays(self.retry_seconds)


def _run_all(plan: list[Stage], job: Job) -> State[Any]:
    """Everything in order, up to the first that does not end well: its state is the run's."""
    log = get_run_logger()
    states: dict[str, State[Any]] = {}
    if (pulled := _transfer("pull", job)) is not None and not pulled.is_completed():
        return _like(pulled, "pull")
    for number, stage in enumerate(plan, 1):
        log.info("[%d/%d] %s", number, len(plan), stage.name)
        named = run_stage.with_options(
            name=stage.name,
            task_run_name=stage.name,
            tags=[GPU_TAG] if stage.device == "gpu" else [],
            retry_delay_seconds=job.delays,
        )
        if (mapped := _map_shards(stage, job)) is not None and not mapped.is_completed():
            return _like(mapped, stage.name)
        needed = [states[name] for name in stage.needs]
        state: State[Any] = named(stage, job, wait_for=needed, return_state=True)
        states[stage.name] = state
        publish = artifacts.AFTER_STAGE.get(stage.name)
        if publish is not None and (state.is_completed() or state.name == "Refused"):
            publish(job.workspace, job.production)
        if not state.is_completed():
            return _like(state, stage.name)
    if (promoted := _promote(job)) is not None and not promoted.is_completed():
        return _like(promoted, "promote")
    if (pushed := _transfer("push", job)) is not None and not pushed.is_completed():
        return _like(pushed, "push")
    ran = [name for name, state in states.items() if state.name != "Cached"]
    kept = len(states) - len(ran)
    said = f"{len(ran)} stages ran ({', '.join(ran) or 'none'}), {kept} were up to date"
    return Completed(message=f"{said}; {promoted.message}" if promoted is not None else said)


def _map_shards(stage: Stage, job: Job) -> State[Any] | None:
    """Where there is a Dask cluster, have it make the shards; the stage has then only to put its seal on them."""
    if stage.name != shards.STAGE or (cluster := shards.cluster_from_environment()) is None:
        return None
    if not job.force and dvc.is_up_to_date(stage, job.workspace):
        return None
    return shards.map_shards(cluster, job.workspace, job.delays)


def _promote(job: Job) -> State[Any] | None:
    if job.promote is None:
        return None
    named = promotion.promote.with_options(retry_delay_seconds=job.delays)
    state: State[Any] = named(job.promote, job.workspace, job.lock, return_state=True)
    return state


def _transfer(direction: str, job: Job) -> State[Any] | None:
    if job.remote is None:
        return None
    named = run_transfer.with_options(name=direction, task_run_name=direction, retry_delay_seconds=job.delays)
    state: State[Any] = named(direction, job, return_state=True)
    return state


def _like(state: State[Any], what: str) -> State[Any]:
    """The run's state after a task's that did not end well."""
    return State(type=state.type, name=state.name, message=f"{what}: {state.message}")


@task(retries=RETRIES, retry_condition_fn=may_pass, cache_policy=NO_CACHE, persist_result=False)
def run_stage(stage: Stage, job: Job) -> State[Any]:
    """One DVC stage."""
    log = get_run_logger()
    with artifacts.ProgressArtifact(stage.name) as progress:
        forward = forward_to(log, progress)
        result = dvc.reproduce(stage, job.workspace, forward, force=job.force, lock=job.lock)
    await_server()
    return as_state(result)


@task(retries=RETRIES, retry_condition_fn=may_pass, cache_policy=NO_CACHE, persist_result=False)
def run_transfer(direction: str, job: Job) -> State[Any]:
    """Fetch from the DVC remote what the workspace lacks of its results, or push there what it has."""
    arguments = {"pull": ["pull", "--allow-missing", "--run-cache"], "push": ["push", "--run-cache"]}[direction]
    log = get_run_logger()
    with artifacts.ProgressArtifact(direction) as progress:
        forward = forward_to(log, progress)
        result = dvc.run([*arguments, "--remote", str(job.remote)], job.workspace, forward, lock=job.lock)
    if result.outcome is Outcome.FAILED:
        # DVC does not say why in its exit code; a remote that is away is the likeliest.
        result = Result(Outcome.TRY_AGAIN, result.seconds, f"remote {job.remote}: {result.message}")
    await_server()
    return as_state(result)


def await_server() -> None:
    """Wait for the server to answer, so that what a stage did in hours is not lost to a server that is just restarting.

    Prefect tries again by itself only where a client has reached the server before, and it often makes a new client.
    """
    deadline = time.monotonic() + SERVER_PATIENCE
    with get_client(sync_client=True) as client:
        while client.api_healthcheck() is not None and time.monotonic() < deadline:
            time.sleep(1)
