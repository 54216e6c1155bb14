"""How the trajectories' cost and disk grow with their number and the teacher's size, for docs/SCALING.md.

For each size, a teacher with random weights (the work is that of a trained one), and the stage itself in a workspace
of its own, for two numbers of trajectories: the difference is free of what the process needs to start. CPU seconds,
not wall time, since the machine may be shared.

    python benchmarks/scaling.py --output benchmarks/results/scaling.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ddops.config.load import compose, validate, write_params
from ddops.models.registry import build_teacher, build_tokenizer
from ddops.models.weights import TOKENIZER, TRANSFORMER, save_weights
from ddops.stages import paths

ROOT = Path(__file__).parents[1]
SIZES = ((2, 32, 2, 88), (6, 64, 4, 176), (6, 128, 8, 344))
"""depth, width, heads, hidden width of preset digits' transformer; the second is the preset's own."""
COUNTS = (500, 1500)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    for depth, width, heads, hidden in SIZES:
        model = f"depth={depth} width={width} heads={heads} ffn_hidden={hidden}".split()
        runs = [measure([f"teacher.model.{setting}" for setting in model], count) for count in COUNTS]
        (less, more), counted = runs, COUNTS[1] - COUNTS[0]
        row = {
            "depth": depth,
            "width": width,
            "parameters": less["parameters"],
            "cpu_seconds_per_1000": (more["cpu_seconds"] - less["cpu_seconds"]) / counted * 1000,
            "bytes_per_trajectory": (more["bytes"] - less["bytes"]) / counted,
        }
        print(row, flush=True)
        rows.append(row)
    result = {"preset": "digits", "seed": 0, "counts": COUNTS, "threads": 1, "torch": torch.__version__, "rows": rows}
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def measure(settings: list[str], count: int) -> dict[str, Any]:
    """CPU seconds of the stage, and the bytes it wrote."""
    overrides = ["preset=digits", *settings, f"trajectories.count={count}", "trajectories.shard_size=500"]
    values = compose(ROOT / "params", overrides)
    config = validate(values, "scaling").teacher.model  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as directory:
        workspace = Path(directory)
        write_params(values, workspace / paths.PARAMS)
        torch.manual_seed(0)
        teacher, tokenizer = build_teacher(config), build_tokenizer(config)
        save_weights(workspace / paths.TOKENIZER, tokenizer.state_dict(), config, TOKENIZER)
        save_weights(workspace / paths.TRANSFORMER, teacher.transformer.state_dict(), config, TRANSFORMER)  # type: ignore[attr-defined]
        before = sum(os.times()[2:4])
        subprocess.run(
            [sys.executable, "-m", "ddops.stages.trajectories"],
            cwd=workspace,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
        )
        return {
            "cpu_seconds": sum(os.times()[2:4]) - before,
            "bytes": sum(file.stat().st_size for file in (workspace / paths.TRAJECTORIES).iterdir()),
            "parameters": sum(parameter.numel() for parameter in teacher.parameters()),
        }


if __name__ == "__main__":
    main()
