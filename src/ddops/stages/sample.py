"""Stage ``sample``: draw every row's images once a seed of the protocol, and a grid a row to look at."""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors.numpy import save
from torch import Tensor

from ddops.config.models import SamplingConfig
from ddops.config.stages import DD1Config, DigitsEvaluateConfig, EvaluateConfig, TrajectoriesConfig
from ddops.data import digits
from ddops.evaluation import rows
from ddops.evaluation.images import grid, save_png, to_uint8
from ddops.files import atomic_path
from ddops.models.interface import Student, Teacher
from ddops.models.weights import load_student, load_teacher
from ddops.sampling.teacher import token_marginals
from ddops.stages import paths
from ddops.stages.common import inception_not_built, require, run_stage
from ddops.trajectories.dataset import TrajectoryDataset

GRID_SCALE = 6


def sample(
    sampling: SamplingConfig, trajectories: TrajectoriesConfig, dd1: DD1Config, evaluate: EvaluateConfig
) -> None:
    """Write ``data/samples/<row>.safetensors`` (uint8 images a seed) and ``reports/grids/<row>.png``.

    Raises:
        StageError: the protocol is not ``digits``.
    """
    if not isinstance(evaluate, DigitsEvaluateConfig):
        raise inception_not_built(f"evaluate.protocol {evaluate.protocol}")
    data = digits.load()
    model = load_teacher(require(paths.TOKENIZER, "teacher"), require(paths.TRANSFORMER, "teacher"))
    student = load_student(require(paths.DD1_STUDENT, "distill_dd1"))
    protocol = rows.Protocol(data.labels_N, evaluate.samples_per_image * len(data), evaluate.batch_size)
    samplers = _samplers(model, student, sampling, trajectories, dd1, protocol)

    _write_grid("data", to_uint8(data.images_NIHW), data.labels_N, evaluate)
    reconstruction = rows.reconstruct(model, data.images_NIHW, evaluate.batch_size)
    _write_row(rows.RECONSTRUCTION, {0: reconstruction})
    _write_grid(rows.RECONSTRUCTION, reconstruction, data.labels_N, evaluate)
    for row, sampler in samplers.items():
        images = {seed: sampler(seed) for seed in evaluate.seeds}
        _write_row(row, images)
        _write_grid(row, images[evaluate.seeds[0]], protocol.labels, evaluate)


def _samplers(
    model: Teacher,
    student: Student,
    sampling: SamplingConfig,
    trajectories: TrajectoriesConfig,
    dd1: DD1Config,
    protocol: rows.Protocol,
) -> dict[str, Callable[[int], Tensor]]:
    dataset = TrajectoryDataset(paths.TRAJECTORIES, model.codebook_VC.shape[1])
    ids_NL, codes = dataset.ids_NL.long(), len(model.codebook_VC)
    marginals_KLV = token_marginals(ids_NL, dataset.labels_N, model.num_classes, codes)
    pooled_KLV = token_marginals(ids_NL, torch.zeros_like(dataset.labels_N), 1, codes).expand_as(marginals_KLV)
    samplers: dict[str, Callable[[int], Tensor]] = {
        rows.TEACHER: lambda seed: rows.sample_teacher_row(model, sampling, protocol, seed),
        rows.TEACHER_FLOW: lambda seed: rows.sample_flow_row(model, sampling, trajectories, protocol, seed),
    }
    for steps in range(1, len(dd1.start_positions) + 1):
        samplers[rows.dd1_row(steps)] = lambda seed, steps=steps: rows.sample_dd1(  # type: ignore[misc]
            student, model, dd1, steps, protocol, seed
        )
    samplers[rows.ONESTEP_CLASS] = lambda seed: rows.sample_independent(model, marginals_KLV, protocol, seed)
    samplers[rows.ONESTEP_STAR] = lambda seed: rows.sample_independent(model, pooled_KLV, protocol, seed)
    return samplers


def _write_row(row: str, images: dict[int, Tensor]) -> None:
    with atomic_path(paths.SAMPLES / f"{row}.safetensors") as temporary:
        temporary.write_bytes(save({f"seed{seed}": values.numpy() for seed, values in images.items()}))


def _write_grid(row: str, images_NIHW: Tensor, labels_N: Tensor, evaluate: EvaluateConfig) -> None:
    """The first few images of every class, a column a class."""
    columns = [images_NIHW[labels_N == label][: evaluate.grid_per_class] for label in labels_N.unique().tolist()]
    picture = grid(torch.stack(columns, 1).flatten(0, 1), columns=len(columns), scale=GRID_SCALE)
    save_png(picture, paths.GRIDS / f"{row}.png")


if __name__ == "__main__":
    run_stage(sample)
