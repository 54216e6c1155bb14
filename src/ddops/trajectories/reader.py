"""Reading ahead of training: the next batches are put together by threads while a step is computed.

What takes time is the noise, computed from (seed, index) where it does not all fit into memory; NumPy computes it
outside Python's lock. Which samples a step sees is a function of the step, so a training that is resumed in the middle
of an epoch reads what it would have read.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Protocol

import torch
from torch import Tensor

from ddops.trajectories.dataset import TrajectoryBatch, TrajectoryDataset

THREADS: Final = min(8, max(2, os.cpu_count() or 1))
"""That read ahead in each training process: two feed a step of many seconds, a GPU's steps want more."""


class BatchSource(Protocol):
    """Where an objective's batches come from."""

    def batch(self, indices_B: Tensor, step: int) -> TrajectoryBatch:
        """The samples ``indices_B``, which are those of ``step``."""


class Direct:
    """Each batch when it is asked for."""

    def __init__(self, dataset: TrajectoryDataset) -> None:
        self._dataset = dataset

    def batch(self, indices_B: Tensor, step: int) -> TrajectoryBatch:
        """See :class:`BatchSource`."""
        return self._dataset.batch(indices_B)


def batch_source(dataset: TrajectoryDataset, indices_of: Callable[[int], Tensor], device: torch.device) -> BatchSource:
    """Reads ahead where a batch's noise has to be computed; ``indices_of`` gives a step's samples in this process."""
    if dataset.noise_in_memory:
        return Direct(dataset)
    return ReadAhead(dataset, indices_of, pinned=device.type == "cuda")


class ReadAhead:
    """The batches of the next ``ahead`` steps are under way in ``workers`` threads; where they are ``pinned``, a GPU
    reads them from memory by itself.

    Threads start with the first batch, so a process may still be forked before that; and ``indices_of`` is asked from
    then on, so it may depend on which of the forked processes this is.
    """

    def __init__(
        self,
        dataset: TrajectoryDataset,
        indices_of: Callable[[int], Tensor],
        *,
        pinned: bool = False,
        workers: int = THREADS,
        ahead: int = max(4, THREADS),
    ) -> None:
        self._dataset, self._indices_of, self._ahead = dataset, indices_of, ahead
        self._workers, self._pinned = workers, pinned
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future[TrajectoryBatch]] = {}

    def batch(self, indices_B: Tensor, step: int) -> TrajectoryBatch:
        """See :class:`BatchSource`.

        Raises:
            ValueError: ``indices_B`` are not what ``step`` was announced to read.
        """
        if not torch.equal(indices_B, self._indices_of(step)):
            raise ValueError(f"step {step} reads other samples than those announced for it")
        self._pool = self._pool or ThreadPoolExecutor(self._workers, thread_name_prefix="read-ahead")
        self._coming = {number: future for number, future in self._coming.items() if number >= step}
        for number in range(step, step + self._ahead + 1):
            if number not in self._coming:
                self._coming[number] = self._pool.submit(self._read, self._indices_of(number))
        return self._coming.pop(step).result()

    def close(self) -> None:
        """End the threads; what they were reading is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool, self._coming = None, {}

    def _read(self, indices_B: Tensor) -> TrajectoryBatch:
        batch = self._dataset.batch(indices_B)
        return TrajectoryBatch(*(part.pin_memory() for part in batch)) if self._pinned else batch
