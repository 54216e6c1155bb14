"""Trainings whose processes torchrun starts: the same bytes as forked ones, kills included, and clear refusals."""

import os
import re
import signal
import subprocess
import sys

import psutil
import pytest
import torch

from ddops.config.training import TrainingConfig
from ddops.stages import launch
from ddops.stages.common import EXIT_TRY_AGAIN
from ddops.training.errors import LaunchError
from helpers.here import run_stage_here
from helpers.house import STAGES, run_stage_call
from helpers.prefect_world import eventually
from helpers.tiny import ROOT, contents, stage_environment, tiny, write_tiny_params

pytestmark = pytest.mark.xdist_group("launch")  # which shares the forked training

STEPS = [
    f"teacher.{part}.{setting}"
    for part, steps in (("tokenizer_training", 12), ("training", 400))
    for setting in (f"steps={steps}", "warmup_steps=2", "processes=2", "checkpoint_every=40", "log_every=40")
]
"""So many of the second that there is time to kill it."""


def start(workspace, **settings):
    """The stage `teacher`, which trains twice, in a workspace of its own."""
    write_tiny_params(workspace, *STEPS)
    command = [sys.executable, "-m", "ddops.stages.teacher"]
    return subprocess.Popen(
        command,
        cwd=workspace,
        env=stage_environment(**settings),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(process):
    _, said = process.communicate(timeout=300)
    return process.returncode, said


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    workspace = tmp_path_factory.mktemp("launch") / "forked"
    write_tiny_params(workspace, *STEPS)
    ended = run_stage_here(workspace, "teacher")
    assert ended.returncode == 0, ended.stderr
    return contents(workspace)


@pytest.mark.slow
def test_torchrun_makes_the_bytes_that_forking_makes(forked, tmp_path):
    """Of both trainings' results and of the curves: weights, and what only the first process may write."""
    code, said = finished(start(tmp_path, DDOPS_LAUNCHER="torchrun"))
    assert code == 0, said
    assert contents(tmp_path) == forked
    assert any(name.endswith(".tsv") for name in forked)


@pytest.mark.slow
def test_a_killed_process_of_torchruns_ends_them_all_and_the_same_command_goes_on(forked, tmp_path):
    checkpoint = tmp_path / ".ddops" / "state" / "transformer.pt"
    process = start(tmp_path, DDOPS_LAUNCHER="torchrun")
    eventually(lambda: checkpoint.exists() or process.poll() is not None, "a checkpoint", 200)
    family = psutil.Process(process.pid).children(recursive=True)
    (second,) = [child for child in family if child.environ().get("RANK") == "1"]
    second.send_signal(signal.SIGKILL)
    code, said = finished(process)
    assert code == EXIT_TRY_AGAIN, said
    assert re.search("process 1 of 2 .* signal 9; .* same command", said)
    assert not psutil.wait_procs(family, timeout=10)[1]
    code, said = finished(start(tmp_path, DDOPS_LAUNCHER="torchrun"))
    assert code == 0, said
    assert said.count("teacher: resuming at step") == 1, "said by the first process alone"
    assert contents(tmp_path) == forked


@pytest.mark.slow
def test_the_exit_code_is_that_of_the_process_that_failed(tmp_path):
    (tmp_path / "failing.py").write_text("import os; raise SystemExit(3 if os.environ['RANK'] == '1' else 0)")
    code = "from ddops.stages.launch import torchrun; raise SystemExit(torchrun('failing', 2))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=stage_environment(PYTHONPATH=f"{ROOT / 'src'}{os.pathsep}{tmp_path}"),
        check=False,
    )
    assert result.returncode == 3


@pytest.mark.slow
def test_another_number_of_processes_than_the_training_wants_is_refused(tmp_path):
    write_tiny_params(tmp_path, *STEPS)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "ddops.stages.teacher"]
    result = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=stage_environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert re.search("torchrun started 1 .*`processes` is 2", result.stderr)


def section(**processes):
    return tiny("llamagen", *(f"teacher.{name}.processes={count}" for name, count in processes.items())).teacher


@pytest.mark.parametrize(
    ("launcher", "processes", "wanted"),
    [
        (None, {"tokenizer_training": 2, "training": 2}, 0),
        ("fork", {"tokenizer_training": 2, "training": 2}, 0),
        ("torchrun", {"tokenizer_training": 2, "training": 2}, 2),
        ("torchrun", {"tokenizer_training": 1, "training": 1}, 0),
    ],
)
def test_torchrun_is_asked_for_what_the_trainings_ask_for(monkeypatch, launcher, processes, wanted):
    monkeypatch.delenv(launch.LAUNCHER, raising=False)
    if launcher:
        monkeypatch.setenv(launch.LAUNCHER, launcher)
    assert launch.processes_wanted(section(**processes)) == wanted
    assert launch.processes_wanted(None) == 0


@pytest.mark.parametrize(("gpus", "wanted"), [(0, 0), (1, 0), (2, 2), (8, 2)])
def test_torchrun_is_asked_for_where_each_process_has_a_gpu(monkeypatch, gpus, wanted):
    monkeypatch.delenv(launch.LAUNCHER, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert launch.processes_wanted(section(tokenizer_training=2, training=2)) == wanted
    assert launch.processes_wanted(section(tokenizer_training=1, training=1)) == 0
    monkeypatch.setenv(launch.LAUNCHER, "fork")
    assert launch.processes_wanted(section(tokenizer_training=2, training=2)) == 0


def test_what_torchrun_cannot_do_is_refused_by_name(monkeypatch):
    monkeypatch.setenv(launch.LAUNCHER, "mpirun")
    with pytest.raises(LaunchError, match="DDOPS_LAUNCHER=mpirun: valid: auto, fork, torchrun"):
        launch.processes_wanted(section())
    monkeypatch.setenv(launch.LAUNCHER, "torchrun")
    with pytest.raises(LaunchError, match=r"tokenizer_training\.processes 1, training\.processes 2"):
        launch.processes_wanted(section(tokenizer_training=1, training=2))
    monkeypatch.setenv(launch.TORCHRUN_ID, "by hand")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="trains nothing"):
        launch.processes_wanted(None)


def test_a_stage_that_trains_says_whose_processes_torchrun_starts():
    """Its own section, and only where that has trainings: else torchrun would start none, or the wrong number."""
    for name in STAGES:
        own = name.removeprefix("distill_")
        settings = getattr(tiny(), own, None)
        trains = settings is not None and any(isinstance(value, TrainingConfig) for value in vars(settings).values())
        assert run_stage_call(name)[1] == (own if trains else None), name
