"""Batches a second of the reader beside the steps a second of a DD1 student, with noise that is computed, not kept.

    python benchmarks/reader.py --output benchmarks/results/reader.json

The student is the digits preset's, on its own shape (16 tokens of width 4), and the step is forward, backward and AdamW
on one thread; the published shape (680 tokens of width 32) is read without a student, which would take minutes a step.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ddops.config.load import compose, validate
from ddops.files import write_json
from ddops.models.registry import build_student
from ddops.training.schedule import batch_indices
from ddops.trajectories.dataset import TrajectoryBatch, TrajectoryDataset
from ddops.trajectories.generate import trajectory_noise
from ddops.trajectories.reader import ReadAhead

SIZE = 100_000


class Computed:
    """A data set of random labels and ids, whose noise is computed batch by batch."""

    def __init__(self, length: int, code_dim: int, codes: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels_N = torch.randint(classes, (SIZE,), generator=generator)
        self.ids_NL = torch.randint(codes, (SIZE, length), generator=generator, dtype=torch.int32)
        self._shape = length, code_dim

    def batch(self, indices_B: Tensor) -> TrajectoryBatch:
        """As the real one's without room for the noise."""
        noise_BLC = trajectory_noise(0, indices_B.numpy(), self._shape)
        return TrajectoryBatch(self.labels_N[indices_B], noise_BLC, self.ids_NL[indices_B].long())


def reading(dataset: Computed, batch: int, steps: int, workers: int) -> float:
    """Batches a second with nothing else to do."""

    def schedule(step: int) -> Tensor:
        return batch_indices(0, step, batch, SIZE)

    reader = ReadAhead(cast(TrajectoryDataset, dataset), schedule, workers=workers)
    reader.batch(schedule(0), 0)
    begun = time.perf_counter()
    for step in range(1, steps + 1):
        reader.batch(schedule(step), step)
    seconds = time.perf_counter() - begun
    reader.close()
    return steps / seconds


def student_steps(params: Path, batch: int, steps: int) -> float:
    """Steps a second of the digits student on one batch, over and over."""
    config = validate(compose(params, ["preset=digits"]), "digits")
    torch.manual_seed(0)
    student = build_student(config.teacher.model)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    model = config.teacher.model
    data = Computed(student.layout.length, model.code_dim, model.codebook_size, model.num_classes)
    labels_B, noise_BLC, ids_BL = data.batch(torch.arange(batch))
    begun = 0.0
    for step in range(steps + 2):
        if step == 2:
            begun = time.perf_counter()
        output = student(noise_BLC, labels_B, torch.zeros_like(labels_B))
        optimizer.zero_grad()
        F.cross_entropy(output.logits_BLV.flatten(0, 1), ids_BL.flatten()).backward()
        optimizer.step()
    return steps / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--params", type=Path, default=Path("params"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shapes = {
        "digits, batch 128": SimpleNamespace(data=Computed(16, 4, 64, 10), batch=128, steps=100),
        "VAR, batch 64": SimpleNamespace(data=Computed(680, 32, 4096, 1000), batch=64, steps=10),
    }
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}",
        "batches_per_second": {
            name: {f"{workers} workers": round(reading(shape.data, shape.batch, shape.steps, workers), 2)}
            for name, shape in shapes.items()
            for workers in (2,)
        },
        "student_steps_per_second": {"digits, batch 128": round(student_steps(arguments.params, 128, 20), 2)},
    }
    write_json(arguments.output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
