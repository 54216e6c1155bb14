"""Generating trajectories: (class, noise, token ids) with the ids from the flow map under the teacher (DD1, 3.2)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ddops.config.models import SamplingConfig
from ddops.config.stages import TrajectoriesConfig
from ddops.files import sha256_json
from ddops.models.interface import Teacher
from ddops.sampling.noise import NOISE_VERSION, Stream, integers, normals
from ddops.sampling.teacher import flow_picker, sample_teacher
from ddops.trajectories.shards import MANIFEST, ShardPlan, is_complete, plan_shards, write_manifest, write_shard

log = logging.getLogger(__name__)


def trajectory_settings(
    config: TrajectoriesConfig, sampling: SamplingConfig, seed: int, teacher_sha256: str
) -> dict[str, Any]:
    """Everything that a trajectory's bytes depend on besides its index (and the platform's arithmetic)."""
    return {
        "teacher_sha256": teacher_sha256,
        "sampling": {
            "guidance": sampling.guidance,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "temperature": sampling.temperature,
        },
        "solver": config.solver,
        "evaluations": config.evaluations,
        "tolerance": config.tolerance,
        "shard_size": config.shard_size,
        # Rounding in a matrix product may depend on its size, and a rounding error can move a token.
        "batch_size": config.batch_size,
        "seed": seed,
        "noise_version": NOISE_VERSION,
    }


def trajectory_labels(seed: int, indices_N: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """Class labels (N,), uniform over the classes, a function of (seed, index)."""
    return integers(seed, Stream.LABEL, indices_N, 1, num_classes)[:, 0]


def trajectory_noise(seed: int, indices_N: NDArray[np.int64], shape: tuple[int, int]) -> Tensor:
    """Noise sequences (N, L, C), a function of (seed, index); ``shape`` is (L, C)."""
    return normals(seed, Stream.TRAJECTORY_NOISE, indices_N, shape)


def generate(
    teacher: Teacher,
    config: TrajectoriesConfig,
    sampling: SamplingConfig,
    *,
    seed: int,
    teacher_sha256: str,
    directory: Path,
) -> None:
    """Fill ``directory`` with the data set. Shards already there with these settings are kept; others are replaced."""
    settings = trajectory_settings(config, sampling, seed, teacher_sha256)
    fingerprint = sha256_json(settings)
    plans = plan_shards(config.count, config.shard_size)
    directory.mkdir(parents=True, exist_ok=True)
    # While shards change there must be no manifest that vouches for the old ones.
    (directory / MANIFEST).unlink(missing_ok=True)
    _remove_foreign_files(directory, plans)
    missing = [plan for plan in plans if not is_complete(directory / plan.name, plan, fingerprint)]
    done = config.count - sum(plan.count for plan in missing)
    if done:
        log.info("trajectories: %d of %d are there already", done, config.count)
    with tqdm(total=config.count, initial=done, desc="trajectories", unit="sample", mininterval=1.0) as bar:
        for plan in missing:
            labels_N, ids_NL = _make_shard(teacher, config, sampling, seed, plan, bar)
            write_shard(directory / plan.name, labels_N, ids_NL, fingerprint)
    write_manifest(directory, settings, plans)


def write_empty(directory: Path, reason: str) -> None:
    """A data set of no trajectories, whose manifest says why."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    _remove_foreign_files(directory, [])
    log.info("trajectories: none (%s)", reason)
    write_manifest(directory, {"empty": reason}, [])


def _make_shard(
    teacher: Teacher, config: TrajectoriesConfig, sampling: SamplingConfig, seed: int, plan: ShardPlan, bar: Any
) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    codebook_VC = teacher.codebook_VC
    labels, ids = [], []
    for first in range(plan.first, plan.first + plan.count, config.batch_size):
        indices_B = np.arange(first, min(first + config.batch_size, plan.first + plan.count), dtype=np.int64)
        labels_B = trajectory_labels(seed, indices_B, teacher.num_classes)
        noise_BLC = trajectory_noise(seed, indices_B, (teacher.layout.length, codebook_VC.shape[1]))
        device = codebook_VC.device
        pick = flow_picker(teacher.layout, codebook_VC, noise_BLC.to(device), config)
        ids_BL = sample_teacher(teacher, torch.from_numpy(labels_B).to(device), sampling, pick)
        labels.append(labels_B.astype(np.uint16))
        ids.append(ids_BL.cpu().numpy().astype(np.uint16))
        bar.update(len(indices_B))
    return np.concatenate(labels), np.concatenate(ids)


def _remove_foreign_files(directory: Path, plans: list[ShardPlan]) -> None:
    wanted = {plan.name for plan in plans}
    for path in directory.iterdir():
        if path.is_file() and path.name not in wanted:
            log.info("trajectories: removing %s, which is not part of this data set", path)
            path.unlink()
