"""`ddops run` with a Dask cluster: the shards as Prefect tasks on real worker processes, one of which is killed."""

import json
import os
import shutil
import signal
import subprocess
from contextlib import contextmanager, suppress

import psutil
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from ddops.flows import dvc, retrain, shards
from ddops.flows.retrain import Job
from ddops.stages import paths
from helpers.pipeline_world import PATIENCE, environment, run, stages_run
from helpers.prefect_world import World, alive, eventually
from helpers.tiny import contents

SMALL = ["trajectories.count=24", "trajectories.shard_size=8", "trajectories.batch_size=8"]


@pytest.fixture
def workspace(finished, tmp_path):
    """With a teacher, and a data set of other settings than those that are asked for."""
    return shutil.copytree(finished[0], tmp_path / "work", symlinks=True)


def making(flow):
    """(worker, maker) of a shard that is being made: the Dask worker, and the command it holds on a leash."""
    for process in psutil.Process(flow.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "--shards" in process.cmdline() and "leash.py" not in " ".join(process.cmdline()):
                leash = process.parent()
                return leash.parent(), process
    return None


@pytest.mark.rare
@pytest.mark.pipeline
@pytest.mark.xdist_group("pipeline")
def test_a_killed_worker_costs_nothing_and_the_bytes_are_those_of_one_process(workspace, tmp_path):
    env = {
        **environment(workspace),
        "DDOPS_DASK": "local",
        "DDOPS_WORKERS": "2",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(PATIENCE),
    }
    command = ["ddops", "run", "smoke", *SMALL, "--target", "trajectories"]
    with (tmp_path / "log").open("w") as log:
        flow = subprocess.Popen(command, cwd=workspace, env=env, stdout=log, stderr=log)
    try:
        found = eventually(lambda: making(flow) or flow.poll() is not None, "a shard on a worker", PATIENCE)
        assert flow.poll() is None, (tmp_path / "log").read_text()
        worker, maker = found
        worker.send_signal(signal.SIGKILL)
        eventually(lambda: not alive(maker.pid), "the end of what the worker was making", 30)
        code = flow.wait(PATIENCE)
    finally:
        flow.kill()
    said = (tmp_path / "log").read_text()
    assert code == 0, said
    assert "3 shards to make" in said
    assert all(f"shard-{number}" in said for number in range(3)), said
    assert "trajectories: 24 of 24 are there already" in said
    run(workspace, "ddops", "trajectories", "verify")
    run(workspace, "ddops", "trajectories", "generate", "--directory", "alone")
    assert contents(workspace / "alone") == contents(workspace / paths.TRAJECTORIES)
    assert stages_run(run(workspace, "dvc", "repro", "trajectories")) == []


def test_what_is_up_to_date_is_not_mapped(monkeypatch, tmp_path):
    monkeypatch.setenv(dvc.DASK, "local")
    monkeypatch.setattr(shards, "map_shards", lambda *arguments: "mapped")
    job = Job(tmp_path, lock=0, force=False, remote=None, promote=None, production=None, retry_seconds=1.0)
    stage = dvc.Stage(shards.STAGE, ())
    for done in (True, False):
        monkeypatch.setattr(dvc, "is_up_to_date", lambda *arguments, done=done: done)
        assert retrain._map_shards(stage, job) == (None if done else "mapped")


@contextmanager
def cluster_started_by_hand(workspace, tmp_path):
    """A scheduler and two workers, as docs/SCALING.md starts them on machines of their own; the scheduler's address."""
    path = os.pathsep.join([str(workspace), str(workspace / "src")])
    env = {**environment(workspace), "PYTHONPATH": path, "NO_PROXY": "127.0.0.1"}
    address = (tmp_path / "scheduler.json").absolute()
    nowhere = ["--dashboard-address", "127.0.0.1:0"]
    scheduler = ["dask", "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(address), *nowhere]
    worker = ["dask", "worker", "--scheduler-file", str(address), "--host", "127.0.0.1", "--nthreads", "1", *nowhere]
    with (tmp_path / "cluster").open("w") as log:
        started = [
            subprocess.Popen(command, cwd=workspace, env=env, stdout=log, stderr=log)
            for command in (scheduler, worker, worker)
        ]
    try:
        eventually(lambda: address.exists() and address.read_text().rstrip().endswith("}"), "the scheduler", PATIENCE)
        yield json.loads(address.read_text())["address"]
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(PATIENCE)


@pytest.mark.rare
@pytest.mark.pipeline
@pytest.mark.xdist_group("pipeline")
def test_a_cluster_at_an_address_makes_the_same_bytes(workspace, tmp_path):
    """With a Prefect server, which the flow alone is told of: the workers learn from it whom to report to."""
    world = World(tmp_path, workspace)
    env = {**environment(workspace), "PREFECT_API_URL": world.env["PREFECT_API_URL"]}
    command = ["ddops", "run", "smoke", *SMALL, "--target", "trajectories"]
    world.start_server()
    try:
        with cluster_started_by_hand(workspace, tmp_path) as address:
            env["DDOPS_DASK"] = address
            result = subprocess.run(command, cwd=workspace, env=env, capture_output=True, text=True, check=False)
    finally:
        world.kill_server()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 shards to make" in result.stdout + result.stderr
    assert (tmp_path / "cluster").read_text().count("Register worker") == 2
    run(workspace, "ddops", "trajectories", "verify")
    run(workspace, "ddops", "trajectories", "generate", "--directory", "alone")
    assert contents(workspace / "alone") == contents(workspace / paths.TRAJECTORIES)


def test_the_cluster_is_what_the_environment_says(monkeypatch):
    monkeypatch.delenv(dvc.DASK, raising=False)
    assert shards.cluster_from_environment() is None
    monkeypatch.setenv(dvc.DASK, "tcp://127.0.0.1:8786")
    with temporary_settings({PREFECT_API_URL: None}), pytest.raises(dvc.DvcError, match="set PREFECT_API_URL"):
        shards.task_runner("tcp://127.0.0.1:8786")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}):
        assert shards.task_runner(shards.cluster_from_environment()).address == "tcp://127.0.0.1:8786"
    assert dvc.DASK not in dvc.environment(), "the stage would start a cluster of its own"
    monkeypatch.setenv(shards.WORKERS, "3")
    assert shards.task_runner("local").cluster_kwargs["n_workers"] == 3
    monkeypatch.setenv(shards.WORKERS, "many")
    with pytest.raises(dvc.DvcError, match="DDOPS_WORKERS=many: expected a number of processes"):
        shards.task_runner("local")
