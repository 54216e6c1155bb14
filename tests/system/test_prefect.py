"""The flow on a real Prefect server with a real worker, real processes, and what becomes of it when they are killed.

One server and one worker for the file, over a pipeline whose stages only pretend (helpers/tiny_pipeline.py). The
workspace is on a file system of its own, so that its disk can be filled.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import psutil
import pytest
import yaml

from ddops.flows.workspace import LOCK
from helpers import tiny_pipeline
from helpers.prefect_world import PATIENCE, Receiver, World, alive, eventually, free_port
from helpers.tiny_pipeline import behave, ran

pytestmark = [pytest.mark.prefect, pytest.mark.xdist_group("prefect")]

STAGE_GONE_SECONDS, CRASHED_SECONDS = 15, 30
SILENT_SECONDS = 150
"""What docs/PREFECT.md promises: after the worker is killed its stage is gone, and its run marked crashed; after the
last heartbeat of a machine that is gone, its run is marked crashed."""


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A small file system. Needs root, as CI has."""
    path = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", path], capture_output=True, check=False
    )
    yield path
    if mounted.returncode == 0:
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture(scope="module")
def receiver():
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory, disk, receiver):
    """Server, worker and deployments, started as ``make prefect`` starts them."""
    workspace = tiny_pipeline.make(disk / "work")
    world = World(tmp_path_factory.mktemp("world"), workspace, DDOPS_NOTIFY_URL=receiver.url)
    try:
        world.start_server()
        world.keep_empty_database()
        world.run("-m", "ddops.flows.setup")
        world.start_worker()
        yield world
    finally:
        world.close()


@pytest.fixture
def workspace(world):
    """The workspace, with well-behaved stages, of which none has run."""
    behave(world.workspace)
    (world.workspace / "dvc.lock").unlink(missing_ok=True)
    (world.workspace / ".ddops" / "ran").unlink(missing_ok=True)
    for directory in (".dvc/cache/runs", ".ddops/state", "production"):
        shutil.rmtree(world.workspace / directory, ignore_errors=True)
    return world.workspace


def use(workspace, names, **meta):
    """Have only these stages, so that a run is short."""
    (workspace / "dvc.yaml").write_text(yaml.safe_dump(tiny_pipeline.declared(names, **meta), sort_keys=False))


def started(world, stage):
    """The process id of a stage, once it runs."""

    def running():
        return next((pid for name, pid in ran(world.workspace) if name == stage and alive(pid)), None)

    return eventually(running, f"{stage} to run")


def process_of_run(world):
    """The process of the one run under way: the worker's child."""
    (child,) = psutil.Process(world.worker.pid).children()
    return child.pid


def steps_of(workspace, stage):
    path = workspace / ".ddops" / "state" / stage
    return int(path.read_text() or 0) if path.exists() else 0


def assert_clean(workspace, stage):
    """Nothing of a run that was stopped goes on, or is in the next one's way."""
    eventually(lambda: not alive(stage), "the end of the stage")
    strays = [path for path in (workspace / "artifacts").glob(".*") if path.name != ".gitignore"]
    assert not strays
    said = tiny_pipeline.python(
        workspace, "-c", f"import fcntl; fcntl.flock(open({str(LOCK)!r}), fcntl.LOCK_EX | fcntl.LOCK_NB); print('free')"
    )
    assert said == "free\n"


def assert_goes_on(world, workspace):
    """A new run of the same deployment starts from the checkpoint, ten steps before the end."""
    reached = steps_of(workspace, "teacher")
    assert reached > 3
    behave(workspace, teacher={"steps": reached + 10})
    again = world.ask_for_run(seed=1)
    assert world.ended(again)[0] == "COMPLETED"
    assert f"teacher: resuming at step {reached} of {reached + 10}" in world.logs(again)


# A whole run, and what it shows


def test_a_refused_model_ends_the_run_as_refused_and_the_next_run_does_only_the_rest(world, workspace, receiver):
    (workspace / "artifacts").mkdir(exist_ok=True)
    (workspace / "artifacts" / "onnx").write_text("production")
    use(workspace, ["teacher", "sample", "evaluate", "gate", "export_onnx", "report"])
    (workspace / "reports").mkdir(exist_ok=True)
    (workspace / "reports" / "metrics.json").write_text(json.dumps({"dd1_1step": {"fid": 6.5}}))
    tiny_pipeline.git(workspace, "add", "--all")
    tiny_pipeline.git(workspace, "commit", "--quiet", "--message", "figures of before")
    behave(workspace, gate={"refuse": True}, teacher={"steps": 10})
    run = world.ask_for_run(seed=1, promote="it was asked for")
    kind, name, message = world.ended(run)
    assert (kind, name) == ("FAILED", "Refused")
    assert message.startswith("gate: the model is refused\n")
    assert "FAILED near the teacher: exceeded by 5.5" in message
    tasks = world.tasks(run)
    assert {task: state["name"] for task, state in tasks.items()} == {
        **dict.fromkeys(["teacher", "sample", "evaluate"], "Completed"),
        "gate": "Refused",
    }
    assert (workspace / "artifacts" / "onnx").read_text() == "production"
    assert not (workspace / "production").exists()

    artifacts = world.artifacts(run)
    assert artifacts["gate"][0] == "markdown"
    assert "# Refused: nothing was exported" in artifacts["gate"][1]
    assert "| **failed** | near the teacher | dd1_1step.fid = 7.5 | at most 2 |" in artifacts["gate"][1]
    assert artifacts["progress-teacher"] == ("progress", 100)
    assert artifacts["grid-dd1-1step"][0] == "image"
    assert artifacts["grid-dd1-1step"][1].startswith("data:image/png;base64,")
    fid = {"metric": "metrics: dd1_1step.fid", "this run": "8.5"}
    assert artifacts["metrics"][0] == "table"
    assert {**fid, "production": "6.5", "change": "+2"} in yaml.safe_load(artifacts["metrics"][1])
    log = world.logs(run)
    assert "[1/6] teacher" in log
    assert "teacher at work" in log
    assert "teacher 100 %, 10/10" in log

    told = eventually(lambda: [note for note in receiver.received if "Refused" in note["subject"]], "the notification")
    assert "exceeded by 5.5" in told[0]["body"]
    assert "/runs/flow-run/" in told[0]["body"]

    # Once there is a model in production, it is its figures that count, whatever was committed since.
    (workspace / "production").mkdir()
    version = {"metrics": {"dd1_1step": {"fid": 10.0}}}
    registry = {"current": "v1.0.0", "versions": {"v1.0.0": version}, "history": []}
    (workspace / "production" / "registry.json").write_text(json.dumps(registry))
    behave(workspace)
    run = world.ask_for_run(seed=1)
    assert world.ended(run) == ("COMPLETED", "Completed", "3 stages ran (gate, export_onnx, report), 3 were up to date")
    assert {task: state["name"] for task, state in world.tasks(run).items()} == {
        **dict.fromkeys(["teacher", "sample", "evaluate"], "Cached"),
        **dict.fromkeys(["gate", "export_onnx", "report"], "Completed"),
    }
    artifacts = world.artifacts(run)
    assert artifacts["gate"][1].startswith("# Accepted")
    assert (workspace / "reports" / "index.html").as_uri() in artifacts["report"][1]
    assert {**fid, "production": "10", "change": "-1.5"} in yaml.safe_load(artifacts["metrics"][1])


# What is refused, tried again, timed out


@pytest.mark.parametrize(
    "wrong",
    [
        {"preset": "nonsense"},
        {"seed": -1},
        {"seed": "seven"},
        {"trajectories": 1.5},
        {"overrides": ["no equals sign"]},
        {"sead": 7},
        {"promote": ""},
    ],
)
def test_wrong_parameters_are_refused_by_the_server_before_there_is_a_run(world, wrong):
    path = f"/deployments/{world.deployment()['id']}/create_flow_run"
    answer = world.api.post(path, json={"parameters": {"preset": "smoke", **wrong}})
    assert answer.status_code in (409, 422), answer.text
    assert next(iter(wrong)) in answer.text or str(next(iter(wrong.values()))) in answer.text


def test_what_only_composing_finds_is_refused_before_anything_runs(world, workspace):
    before = (workspace / "params.yaml").read_bytes()
    misspelt = world.ask_for_run(overrides=["dd1.training.stepz=3"])
    half = world.ask_for_run("nightly", target="gate", promote="a model that is not exported")
    for run, said in ((misspelt, "did you mean 'steps'"), (half, "promote needs every stage")):
        kind, name, message = world.ended(run)
        assert (kind, name) == ("FAILED", "ParametersRefused")
        assert said in message
    assert ran(workspace) == []
    assert (workspace / "params.yaml").read_bytes() == before


def test_what_may_pass_is_tried_again_and_a_full_disk_is_not_and_with_room_it_goes_on(world, workspace):
    use(workspace, ["teacher", "distill_dd1"])
    # Mounting a small file system needs root; elsewhere the stage only says what a full disk has it say.
    small = os.statvfs(workspace).f_blocks * os.statvfs(workspace).f_frsize <= 1 << 25
    full = {"fill": True} if small else {"exit": 1, "say": ["OSError: [Errno 28] No space left on device"]}
    behave(workspace, teacher={"flaky": 2}, distill_dd1=full)
    run = world.ask_for_run(seed=1)
    kind, name, message = world.ended(run)
    assert (kind, name) == ("FAILED", "Failed")
    assert message.startswith("distill_dd1: exited with 1\n")
    assert "No space left on device" in message
    assert [stage for stage, _ in ran(workspace)] == ["teacher", "teacher", "teacher", "distill_dd1"]
    for task in world.post("/task_runs/filter", flow_runs={"id": {"any_": [run]}}):
        assert task["empirical_policy"]["retry_delay"] == pytest.approx([0.2, 0.4, 0.8]), "each wait twice the last"
    (workspace / ".ddops" / "state" / "huge").unlink(missing_ok=True)
    behave(workspace)
    run = world.ask_for_run(seed=1)
    assert world.ended(run) == ("COMPLETED", "Completed", "1 stages ran (distill_dd1), 1 were up to date")


def test_a_timeout_ends_the_stage_and_all_it_started(world, workspace):
    # Long enough for DVC to come to the stage, however busy the machine is.
    began = time.monotonic()
    tiny_pipeline.python(workspace, "-m", "dvc", "repro", "--dry", "teacher")
    patience = 2 + math.ceil(3 * (time.monotonic() - began))
    use(workspace, ["teacher"], teacher={"timeout": patience})
    behave(workspace, teacher={"steps": 6000, "stray": True})
    run = world.ask_for_run()
    stage = started(world, "teacher")
    kind, name, message = world.ended(run)
    assert (kind, name) == ("FAILED", "TimedOut")
    assert message.startswith(f"teacher: not done after {patience} s")
    assert not alive(int((workspace / ".ddops" / "stray").read_text()))
    assert_clean(workspace, stage)


# One at a time


def test_two_runs_take_turns_and_cancelling_one_ends_its_stage_and_lets_the_other_go_on(world, workspace):
    use(workspace, ["teacher"])
    behave(workspace, teacher={"steps": 6000, "stray": True})
    first = world.ask_for_run(seed=1)
    stage = started(world, "teacher")
    impatient = world.ask_for_run("nightly", seed=2, wait_seconds=0)
    kind, name, message = world.ended(impatient)
    assert (kind, name) == ("FAILED", "WorkspaceBusy")
    assert f"held by run {world.run_of(first)['name']}" in message
    patient = world.ask_for_run("nightly", seed=2)
    eventually(lambda: "waiting up to 3600 s" in world.logs(patient), "the second run to wait")
    reached = steps_of(workspace, "teacher")
    assert reached > 3
    behave(workspace, teacher={"steps": reached + 10})
    world.cancel(first)
    assert world.ended(first)[:2] == ("CANCELLED", "Cancelled")
    assert not alive(int((workspace / ".ddops" / "stray").read_text()))
    assert world.ended(patient)[0] == "COMPLETED"
    assert_clean(workspace, stage)
    (resumed,) = re.findall(rf"teacher: resuming at step (\d+) of {reached + 10}\n", world.logs(patient) + "\n")
    assert int(resumed) >= reached
    assert "seed: 2" in (workspace / "params.yaml").read_text()


def test_stages_of_two_workspaces_share_one_gpu(world, workspace, tmp_path):
    """The tag's limit holds across workspaces, where no lock does. The second has a pool and a worker of its own, which
    runs in the directory it was started in (docs/SCALING.md)."""
    use(workspace, ["teacher"])
    other = tiny_pipeline.make(tmp_path / "other", ["teacher"])
    behave(workspace, teacher={"until": ".ddops/go"})
    deployment = world.deployment()
    keep = ("flow_id", "entrypoint", "pull_steps", "parameter_openapi_schema")
    # Not by Prefect's command line: it has the server ask for a list of pool types elsewhere.
    world.post("/work_pools/", name="ddops-other", type="process")
    world.post("/deployments/", name="other", work_pool_name="ddops-other", **{key: deployment[key] for key in keep})
    worker = world.spawn("other", "-m", "ddops.flows.worker", "--pool", "ddops-other", workspace=other)
    try:
        runs = [world.ask_for_run(seed=7)]
        started(world, "teacher")
        runs.append(world.ask_for_run("other", seed=7))
        eventually(lambda: "[1/1] teacher" in world.logs(runs[1]), "the second run to come to its stage")
        time.sleep(2)
        assert ran(other) == []
        (workspace / ".ddops" / "go").touch()
        assert [world.ended(run)[0] for run in runs] == ["COMPLETED"] * 2
    finally:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    assert [name for name, _ in ran(workspace)] == [name for name, _ in ran(other)] == ["teacher"]
    spans = sorted(
        (task["start_time"], task["end_time"])
        for task in world.post("/task_runs/filter", flow_runs={"id": {"any_": runs}})
    )
    assert len(spans) == 2
    assert spans[0][1] <= spans[1][0]


# Cancelled, killed, cut off


def test_a_killed_worker_leaves_no_orphan_and_the_next_run_goes_on_from_the_checkpoint(world, workspace):
    use(workspace, ["teacher"])
    behave(workspace, teacher={"steps": 6000, "stray": True})
    run = world.ask_for_run(seed=1)
    stage = started(world, "teacher")
    eventually(lambda: steps_of(workspace, "teacher") > 3, "a checkpoint")
    world.kill_worker()
    killed = time.monotonic()
    # The order of the two waits: the stage ends first, within the leash's grace.
    eventually(lambda: not alive(stage), "the end of the stage", STAGE_GONE_SECONDS)
    assert world.ended(run, CRASHED_SECONDS)[:2] == ("CRASHED", "Crashed")
    assert time.monotonic() - killed < CRASHED_SECONDS
    assert_clean(workspace, stage)
    assert not alive(int((workspace / ".ddops" / "stray").read_text()))
    world.start_worker()
    assert_goes_on(world, workspace)


@pytest.mark.rare
def test_a_run_outlives_a_restart_of_the_server(world, workspace):
    use(workspace, ["teacher", "distill_dd1"])
    behave(workspace, teacher={"steps": 30})
    run = world.ask_for_run(seed=1)
    stage = started(world, "teacher")
    world.kill_server()
    reached = steps_of(workspace, "teacher")
    eventually(lambda: steps_of(workspace, "teacher") > reached + 5 or not alive(stage), "training without a server")
    world.start_server()
    assert world.ended(run) == ("COMPLETED", "Completed", "2 stages ran (teacher, distill_dd1), 0 were up to date")
    assert [name for name, _ in ran(workspace)] == ["teacher", "distill_dd1"]


def test_a_remote_that_is_away_fails_the_run_after_retries_and_nothing_is_lost(world, workspace, tmp_path):
    use(workspace, ["teacher"])
    remote = tmp_path / "remote"
    tiny_pipeline.python(workspace, "-m", "dvc", "remote", "add", "--force", "store", str(remote))
    remote.mkdir()
    behave(workspace, teacher={"steps": 30})
    run = world.ask_for_run(seed=1, remote="store")
    started(world, "teacher")
    remote.rmdir()
    remote.write_text("in the way")
    kind, name, message = world.ended(run)
    assert (kind, name) == ("FAILED", "TryAgain")
    assert message.startswith("push: remote store: ")
    assert {task: state["name"] for task, state in world.tasks(run).items()} == {
        "pull": "Completed",
        "teacher": "Completed",
        "push": "TryAgain",
    }
    assert world.logs(run).count("ERROR: ") >= 4, "the first try and three more"
    remote.unlink()
    remote.mkdir()
    run = world.ask_for_run(seed=1, remote="store")
    assert world.ended(run)[0] == "COMPLETED"
    assert world.tasks(run)["teacher"]["name"] == "Cached"
    assert list((remote / "files").rglob("*"))


# Schedules


def test_the_deployments_are_scheduled_and_a_schedule_fires(world, workspace):
    schedules = {name: world.deployment(name)["schedules"] for name in ("nightly", "weekly-evaluation", "on-demand")}
    assert [entry["schedule"]["cron"] for entry in schedules["nightly"]] == ["0 2 * * *"]
    assert [entry["schedule"]["cron"] for entry in schedules["weekly-evaluation"]] == ["0 6 * * 0"]
    assert schedules["on-demand"] == []
    use(workspace, ["teacher"])
    nightly = world.deployment("nightly")
    # Soon; and again, should the server be too slow to take that one up.
    schedule = {"interval": 60, "anchor_date": (datetime.now(UTC) + timedelta(seconds=6)).isoformat()}
    added = (
        world.api.post(
            f"/deployments/{nightly['id']}/schedules",
            json=[{"schedule": schedule, "active": True, "parameters": {"preset": "smoke"}}],
        )
        .raise_for_status()
        .json()
    )

    def fired():
        runs = world.post("/flow_runs/filter", deployments={"id": {"any_": [nightly["id"]]}})
        return [
            run["id"] for run in runs if run["auto_scheduled"] and run["state_type"] not in ("SCHEDULED", "PENDING")
        ]

    eventually(fired, "the scheduled run")
    world.api.delete(f"/deployments/{nightly['id']}/schedules/{added[0]['id']}").raise_for_status()
    runs = fired()
    assert [world.ended(run)[0] for run in runs] == ["COMPLETED"] * len(runs)
    assert [name for name, _ in ran(workspace)] == ["teacher"]


# Without a server, and with everything in one command


def test_ddops_run_needs_no_server_and_shows_progress_and_what_went_wrong(world, tmp_path):
    workspace = tiny_pipeline.make(tmp_path / "alone", ["teacher", "distill_dd1"])
    behave(workspace, teacher={"steps": 10}, distill_dd1={"exit": 1, "say": ["ValueError: no such class"]})
    world.give_empty_database(workspace / ".ddops" / "prefect")
    env = {name: value for name, value in world.env.items() if not name.startswith("PREFECT")}
    command = [sys.executable, "-m", "ddops.cli", "run", "smoke", "seed=5"]
    result = subprocess.run(
        command, cwd=workspace, env=env, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    output = result.stdout + result.stderr
    assert result.returncode == 1, output
    assert "[1/2] teacher" in output
    assert "teacher        teacher 100 %, 10/10" in output
    assert "Traceback" not in output
    assert "Failed: distill_dd1: exited with 1" in result.stderr
    assert "ValueError: no such class" in result.stderr


def test_one_command_starts_everything_and_ends_it(world, tmp_path):
    """What `make prefect` runs."""
    workspace = tiny_pipeline.make(tmp_path / "up", ["teacher"])
    port = free_port()
    env = {**world.env, "PREFECT_HOME": str(tmp_path / "home")}
    world.give_empty_database(tmp_path / "home")
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "ddops.flows.up", "--port", str(port)]
        process = subprocess.Popen(command, cwd=workspace, env=env, stdout=log, stderr=log)
    family = []
    try:
        eventually(
            lambda: f"Prefect: http://127.0.0.1:{port}" in (tmp_path / "log").read_text(), "everything", 2 * PATIENCE
        )
        family = psutil.Process(process.pid).children(recursive=True)
        names = " ".join(" ".join(child.cmdline()) for child in family)
        assert "server start" in names
        assert "worker start" in names or "ddops.flows.worker" in names
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)
        assert not [child for child in family if alive(child.pid)]
    finally:
        with suppress(ProcessLookupError):
            process.kill()


# Last, because it takes the server a while to see


@pytest.mark.rare
def test_a_run_that_falls_silent_is_found_crashed(world, workspace, receiver):
    """Its worker and its own process are killed at once, as when a machine loses its power."""
    behave(workspace, teacher={"steps": 6000})
    use(workspace, ["teacher"])
    run = world.ask_for_run(seed=90)
    stage = started(world, "teacher")
    flow = process_of_run(world)
    os.kill(world.worker.pid, signal.SIGSTOP)
    os.killpg(flow, signal.SIGKILL)
    world.kill_worker()
    eventually(lambda: not alive(stage), "the end of the stage")
    world.start_worker()
    kind, name, message = world.ended(run)
    assert (kind, name) == ("CRASHED", "Crashed")
    assert "No sign of life" in message
    assert world.seconds_of_silence(run) < SILENT_SECONDS
    eventually(
        lambda: [note for note in receiver.received if "No sign of life" in note["body"]], "the notification", 30
    )


def test_nothing_but_this_machine_was_called(world):
    """By any process of this file: server, worker, runs, stages. First, that the watch would have seen it."""
    code = "import socket; socket.getaddrinfo('telemetry.invalid', 443)"
    subprocess.run([sys.executable, "-c", code], env=world.env, check=False, capture_output=True)
    said = world.api.get("/admin/settings").raise_for_status().json()
    assert said["server"]["analytics_enabled"] is False
    calls = world.calls.read_text().splitlines()
    assert len([call for call in calls if call.endswith("socket.getaddrinfo telemetry.invalid")]) == 1
    assert [call for call in calls if "telemetry.invalid" not in call] == []
