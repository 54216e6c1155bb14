"""Reading trajectories for training."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddops.files import sha256_file
from ddops.sampling.noise import NOISE_VERSION
from ddops.trajectories.errors import DatasetError
from ddops.trajectories.generate import trajectory_noise
from ddops.trajectories.shards import MANIFEST, differences, read_manifest, read_shard

NOISE_CACHE_BYTES = 1 << 28
"""Noise is kept in memory when all of it fits into this; else it is computed batch by batch."""


class TrajectoryBatch(NamedTuple):
    labels_B: Tensor
    noise_BLC: Tensor
    ids_BL: Tensor

    def to(self, device: torch.device) -> TrajectoryBatch:
        """On another device; from pinned memory while the GPU computes what it was given before."""
        return TrajectoryBatch(*(part.to(device, non_blocking=True) for part in self))


class TrajectoryDataset:
    """All labels and token ids in memory; the noise is computed from (seed, index).

    Raises:
        DatasetError: no manifest, no trajectories, a shard that is missing or altered, or noise of another version.
    """

    def __init__(self, directory: Path, code_dim: int) -> None:
        manifest = read_manifest(directory)
        if not manifest["shards"]:
            raise DatasetError(f"{directory}: holds no trajectories; set trajectories.count and generate them")
        firsts = list(accumulate((shard["count"] for shard in manifest["shards"]), initial=0))
        if [*(shard["first"] for shard in manifest["shards"]), manifest["count"]] != firsts:
            raise DatasetError(f"{directory / MANIFEST}: damaged (its shards do not add up); generate it again")
        version = manifest["settings"]["noise_version"]
        if version != NOISE_VERSION:
            raise DatasetError(
                f"{directory}: made with noise {version}, this version computes {NOISE_VERSION}; generate it again"
            )
        labels, ids = [], []
        for shard in manifest["shards"]:
            path = directory / shard["name"]
            if not path.is_file() or sha256_file(path) != shard["sha256"]:
                raise DatasetError(f"{path}: missing or altered since the manifest was written; generate it again")
            read = read_shard(path)
            if different := differences(read.settings, manifest["settings"]):
                raise DatasetError(f"{path}: made with other settings than the manifest says: {different}")
            if (read.first, len(read.labels_N)) != (shard["first"], shard["count"]):
                raise DatasetError(f"{path}: does not hold the samples that the manifest says; generate it again")
            labels.append(read.labels_N)
            ids.append(read.ids_NL)
        self.seed: int = manifest["settings"]["seed"]
        self.labels_N = torch.from_numpy(np.concatenate(labels).astype(np.int64))
        self.ids_NL = torch.from_numpy(np.concatenate(ids).astype(np.int32))
        self._noise_shape = (self.ids_NL.shape[1], code_dim)
        self._noise_NLC = self._all_noise()

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def noise_in_memory(self) -> bool:
        """Whether a batch costs next to nothing."""
        return self._noise_NLC is not None

    def batch(self, indices_B: Tensor) -> TrajectoryBatch:
        """Labels (B,), noise (B, L, C) and token ids (B, L) of the given samples."""
        if self._noise_NLC is not None:
            noise_BLC = self._noise_NLC[indices_B]
        else:
            noise_BLC = trajectory_noise(self.seed, indices_B.numpy(), self._noise_shape)
        return TrajectoryBatch(self.labels_N[indices_B], noise_BLC, self.ids_NL[indices_B].long())

    def sequences(self, indices_B: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (B,) and token ids (B, L) alone: the noise, where it is computed, takes all of a batch's time."""
        return self.labels_N[indices_B], self.ids_NL[indices_B].long()

    def _all_noise(self) -> Tensor | None:
        if 4 * len(self) * self._noise_shape[0] * self._noise_shape[1] > NOISE_CACHE_BYTES:
            return None
        chunks = torch.arange(len(self)).split(4096)
        return torch.cat([trajectory_noise(self.seed, chunk.numpy(), self._noise_shape) for chunk in chunks])
