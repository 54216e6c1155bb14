"""Trainings compute where they should: every step on the model's device, and each process on a device of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddops.models.layout import LevelLayout
from ddops.training.device import training_device


@pytest.mark.slow
def test_every_step_of_every_training_runs_on_a_device_that_only_pretends():
    """In a process of its own: autograd must meet such a device before any other, and a process never loses it."""
    steps = Path(__file__).parents[1] / "helpers" / "on_a_pretended_gpu.py"
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", str(steps)]
    done = subprocess.run(command, cwd=steps.parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("sizes", [(1,) * 16, (1, 4, 9, 16), (1, 1, 4, 4, 1)])
def test_levels_are_the_same_wherever_they_are_made(sizes, monkeypatch):
    """The GPU's way of making them, computed on the CPU."""
    layout = LevelLayout(sizes)
    expected_L = layout.level_of_position()
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *bounds, device: arange(*bounds))
    assert torch.equal(layout.level_of_position("cuda"), expected_L)


def machine(monkeypatch, gpus):
    """A machine with so many GPUs; which one was made the current one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
    return chosen


@pytest.mark.parametrize(
    ("gpus", "processes", "device"),
    [(0, 1, "cpu"), (1, 1, "cuda:0"), (8, 1, "cuda:0"), (0, 2, "cpu"), (8, 2, "cpu")],
)
def test_one_process_has_the_first_gpu_and_forked_ones_have_none(monkeypatch, gpus, processes, device):
    chosen = machine(monkeypatch, gpus)
    assert training_device(processes) == torch.device(device)
    assert chosen == ([] if device == "cpu" else [0])


@pytest.mark.parametrize(("gpus", "device"), [(4, "cuda:3"), (8, "cuda:3"), (3, "cpu"), (0, "cpu")])
def test_each_of_torchruns_processes_has_a_gpu_of_its_own_or_all_have_none(monkeypatch, gpus, device):
    chosen = machine(monkeypatch, gpus)
    for name, value in {"TORCHELASTIC_RUN_ID": "run", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert training_device(8) == torch.device(device)
    assert chosen == ([] if device == "cpu" else [3])
