"""Tiny configurations through the real composition, and processes that die with SIGKILL at a chosen moment."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

from ddops.config.load import compose, validate, write_params
from ddops.config.stages import Config
from ddops.models.interface import Student, Teacher
from ddops.models.registry import build_student, build_teacher
from ddops.models.weights import STUDENT, TOKENIZER, TRANSFORMER, save_weights
from ddops.models.weights_dd2 import save_generator
from ddops.stages import paths
from ddops.trajectories.dataset import TrajectoryBatch
from ddops.trajectories.shards import MANIFEST
from ddops.workspace.files import TEMPLATE
from ddops.workspace.recipes import RECIPES

ROOT = Path(__file__).parents[2]
PARAMS = ROOT / "params"

SIZES = [
    *("teacher.model.depth=1", "teacher.model.width=32", "teacher.model.heads=2"),
    *("teacher.model.codebook_size=64", "teacher.model.code_dim=8"),
    *("sampling.guidance=1.5", "sampling.temperature=1.0", "dd1.start_positions=[0,2]"),
]
"""Pinned, so that tuning the presets changes no test."""
FAMILIES = {
    "llamagen": ["preset=digits", "ar_diffusion=digits", *SIZES, "teacher.model.ffn_hidden=48"],
    "var": ["preset=digits_var", *SIZES, "teacher.model.mlp_ratio=2.0"],
}

KILLED_AT_A_FILE = """
import os, pathlib, runpy, signal, sys
module, suffix, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
replace, seen = pathlib.Path.replace, []
def dying_replace(self, target):
    seen.extend([target] * str(target).endswith(suffix))
    if len(seen) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
pathlib.Path.replace = dying_replace
sys.argv = [module]
runpy.run_module(module, run_name="__main__")
"""


@cache
def tiny(family: str = "llamagen", *overrides: str) -> Config:
    """The digits preset of a family with a very small transformer."""
    return validate(compose(PARAMS, [*FAMILIES[family], *overrides]), family)


@cache
@torch.inference_mode(False)  # whoever asks first: others train it
def untrained(family: str = "llamagen") -> tuple[Teacher, Student]:
    """A teacher and its student with random weights so large that every one of them matters to the output."""
    torch.manual_seed(0)
    config = tiny(family).teacher.model
    teacher, student = build_teacher(config), build_student(config)
    for module in (teacher, student):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return teacher.eval().requires_grad_(False), student.eval().requires_grad_(False)


def write_tiny_params(directory: Path, *overrides: str) -> None:
    """A workspace's params.yaml of the tiny smoke preset."""
    directory.mkdir(parents=True, exist_ok=True)
    write_params(compose(PARAMS, ["preset=smoke", *SIZES, *overrides]), directory / "params.yaml")
    write_recipes(directory)


def write_recipes(directory: Path) -> None:
    """The workspace asks for what this ddops computes: without that no stage runs."""
    shutil.copy(TEMPLATE / RECIPES, directory)


def kill_stage_in(workspace: Path, stage: str, *, suffix: str, number: int, first: str = "") -> None:
    """Run a stage's command line and SIGKILL it as its n-th file of a suffix, already written, would take its place.

    ``first`` is code that runs before the stage.
    """
    command = [sys.executable, "-c", first + KILLED_AT_A_FILE, f"ddops.stages.{stage}", suffix, str(number)]
    # As many threads as this process has: rounding depends on it.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    # The command line notes its code; the function, which tests compare with, does not.
    shutil.rmtree(workspace / paths.CODE)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by its relative path."""
    files = (file for file in sorted(directory.rglob("*")) if file.is_file())
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


class RandomBatches:
    """What a data set of trajectories gives a training step: random labels, noise and ids."""

    def __init__(self, teacher: Teacher) -> None:
        self.length, self.codebook_VC = teacher.layout.length, teacher.codebook_VC

    def batch(self, indices_B: torch.Tensor, step: int) -> TrajectoryBatch:
        size = len(indices_B), self.length
        noise_BLC = torch.randn(*size, self.codebook_VC.shape[1])
        return TrajectoryBatch(torch.randint(10, size[:1]), noise_BLC, torch.randint(len(self.codebook_VC), size))


def write_weights(directory: Path) -> None:
    """A tokenizer, a teacher, a student and a DD2 generator with random weights, and an empty trajectory data set."""
    teacher, student = untrained("llamagen")
    config = tiny("llamagen").teacher.model
    for path in (paths.TOKENIZER, paths.DD1_STUDENT, paths.DD2_GENERATOR, paths.TRAJECTORIES / MANIFEST):
        (directory / path).parent.mkdir(parents=True)
    save_weights(directory / paths.TOKENIZER, teacher.tokenizer.state_dict(), config, TOKENIZER)
    save_weights(directory / paths.TRANSFORMER, teacher.transformer.state_dict(), config, TRANSFORMER)
    save_weights(directory / paths.DD1_STUDENT, student.state_dict(), config, STUDENT)
    half = {name: value / 2 for name, value in student.state_dict().items()}
    save_generator(directory / paths.DD2_GENERATOR, half, config, None)
    (directory / paths.TRAJECTORIES / MANIFEST).write_text("{}")


def stage_environment(**settings: str) -> dict[str, str]:
    """Of a stage in a process of its own, which no launcher has started."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        **settings,
    }
