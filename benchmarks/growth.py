"""How cost and disk grow: trajectories and a student's training on the digits' shapes, measured over sizes of both.

    python benchmarks/growth.py --output benchmarks/results/growth_digits.json

Seconds are of the processor, one thread: other work on the machine adds little to them. Weights are random, which the
cost of the teacher and of a training step does not see; the flow map's steps do (flat distributions take more of them).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ddops.config.load import compose, validate
from ddops.config.stages import Config
from ddops.distill.dd1 import dd1_objective
from ddops.files import write_json
from ddops.models.interface import Teacher
from ddops.models.registry import build_student, build_teacher
from ddops.training.checkpoint import CheckpointFile
from ddops.training.loop import seeded, train
from ddops.trajectories.dataset import TrajectoryDataset
from ddops.trajectories.generate import Job, generate
from ddops.trajectories.reader import Direct


def configured(params: Path, width: int) -> Config:
    """The preset digits with a transformer of another width; heads of 16, as there."""
    sizes = {"width": width, "heads": width // 16, "ffn_hidden": width * 11 // 4}
    overrides = [f"teacher.model.{name}={value}" for name, value in sizes.items()]
    return validate(compose(params, ["preset=digits", *overrides]), f"width {width}")


def trajectories(teacher: Teacher, config: Config, count: int, directory: Path) -> dict[str, float]:
    """Processor seconds and bytes of a data set."""
    settings = replace(config.trajectories, count=count, shard_size=500, batch_size=500)
    started = time.process_time()
    generate(Job(lambda precision: teacher, "untrained", settings, config.sampling, config.seed, directory))
    seconds = time.process_time() - started
    return {"seconds": seconds, "bytes": sum(file.stat().st_size for file in directory.iterdir())}


def training(teacher: Teacher, config: Config, steps: int, data: Path, directory: Path) -> dict[str, float]:
    """Processor seconds a step of DD1 without its perceptual term, and the bytes of a checkpoint and of the weights."""
    assert config.dd1.source == "train"
    student = seeded(config.seed, lambda: build_student(config.teacher.model))
    student.init_from_teacher(teacher)
    optimisation = replace(config.dd1.training, steps=steps, warmup_steps=1, processes=1, checkpoint_every=steps)
    dd1 = replace(config.dd1, perceptual=replace(config.dd1.perceptual, batch_size=1))
    dataset = TrajectoryDataset(data, teacher.codebook_VC.shape[1])
    checkpoint = CheckpointFile(directory / "state.pt", "growth")
    started = time.process_time()
    weights = train(
        student,
        dd1_objective(teacher, Direct(dataset), dd1, lambda a_BIHW, b_BIHW: (a_BIHW - b_BIHW).square().mean((1, 2, 3))),
        config=optimisation,
        seed=config.seed,
        dataset_size=len(dataset),
        checkpoint=checkpoint,
        curves_dir=directory / "curves",
        description="growth",
    )
    seconds = (time.process_time() - started) / steps
    parameters = sum(value.numel() for value in student.parameters())
    return {
        "seconds_a_step": seconds,
        "parameters": parameters,
        "weights_bytes": sum(value.nbytes for value in weights.values()),
        "checkpoint_bytes": checkpoint.path.stat().st_size,
    }


def measure(arguments: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """A row a width."""
    rows = []
    for width in arguments.widths:
        config = configured(arguments.params, width)
        teacher = seeded(config.seed, lambda config=config: build_teacher(config.teacher.model))
        teacher = teacher.eval().requires_grad_(False)
        place = directory / str(width)
        trajectories(teacher, config, 500, place / "warm")
        made = {count: trajectories(teacher, config, count, place / str(count)) for count in arguments.counts}
        data = place / str(max(arguments.counts))
        training(teacher, config, 1, data, place / "warm-training")
        rows.append(
            {
                "width": width,
                "teacher_parameters": sum(p.numel() for p in teacher.get_submodule("transformer").parameters()),
                "trajectories": {str(count): figures for count, figures in made.items()},
                "training": training(teacher, config, arguments.steps, data, place),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--counts", type=int, nargs="+", default=[500, 1000, 2000])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--params", type=Path, default=Path("params"))
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        rows = measure(arguments, Path(directory))
    facts = {"command": " ".join(sys.argv), "date": datetime.now(UTC).date().isoformat(), "cpus": os.cpu_count()}
    write_json(arguments.output, {**facts, "machine": f"{platform.system()} {platform.machine()}", "rows": rows})
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
