"""The benchmark of full-size training, on models small enough for a test: it is to be right when a GPU is at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.here import run_script_here

STEPS = 3
SMALL = (
    *("teacher.model.depth=2", "teacher.model.width=64", "teacher.model.codebook_size=64"),
    *("teacher.model.patch_sizes=[1,2]", "teacher.model.image_size=32", "teacher.model.autoencoder.channels=32"),
    *("dd1.start_positions=[0,1]", "dd1.logit_prefix=1", "sampling.top_k=32", "trajectories.batch_size=4"),
    *("dd1.training.batch_size=2", "dd1.perceptual.batch_size=1", "ar_diffusion.training.batch_size=2"),
    *("dd2.training.batch_size=2", "dd2.guidance.batch_size=2", "ar_diffusion.head.width=32"),
)


@pytest.mark.slow
def test_every_phase_is_trained_timed_and_set_beside_the_plan(tmp_path: Path) -> None:
    output = tmp_path / "full_size.json"
    options = ["--output", str(output), "--work", str(tmp_path / "work"), "--steps", str(STEPS)]
    for action in ("one", "plan"):
        arguments = [action, *options, "--presets", "var_d16_dd2", "--overrides", *SMALL]
        ended = run_script_here("benchmarks/full_size.py", *arguments)
        assert ended.returncode == 0, ended.stderr
    row = json.loads(output.read_text())["var_d16_dd2"]
    assert row["trajectories"]["samples"] == 12
    phases = [row["distill_dd1"], row["distill_dd1_float32"], row["ar_diffusion"]]
    phases += [row["distill_dd2"][kind] for kind in ("alignment", "guidance", "generator")]
    assert [phase["steps"] for phase in phases] == [STEPS, STEPS, STEPS, STEPS, 3 * STEPS, STEPS]
    assert all(phase["finite"] and phase["seconds"]["median"] > 0 for phase in phases)
    for phase in ("trajectories", "distill_dd1", "distill_dd1_float32", "ar_diffusion", "distill_dd2"):
        assert row["plan"][phase]["tflop"] > 0
        assert row["plan"][phase]["predicted_over_measured_seconds"] > 0
    wide, half = (row["plan"][phase]["predicted_memory_gb"] for phase in ("distill_dd1_float32", "distill_dd1"))
    assert wide > half, "each is set beside the prediction for its own precision"
