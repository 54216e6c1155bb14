"""Pure functions of the step: learning rate, EMA decay, batch. A resumed run needs nothing but its step."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ddops.config.training import TrainingConfig
from ddops.sampling.noise import Stream, philox_words


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warm-up over ``warmup_steps``, then a cosine to ``final_learning_rate`` at ``steps``."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine


def ema_decay(config: TrainingConfig, step: int) -> float:
    """The configured decay, less at the start so that the initial weights are soon forgotten."""
    return min(config.ema_decay, (1 + step) / (10 + step))


def batch_indices(seed: int, step: int, batch_size: int, dataset_size: int) -> Tensor:
    """Which samples step ``step`` trains on, int64 of shape (batch_size,).

    Samples are consumed epoch after epoch, each a permutation of its own; a batch may span two epochs.
    """
    first = step * batch_size
    epochs = range(first // dataset_size, (first + batch_size - 1) // dataset_size + 1)
    order = np.concatenate([_permutation(seed, epoch, dataset_size) for epoch in epochs])
    offset = first - epochs.start * dataset_size
    return torch.from_numpy(order[offset : offset + batch_size])


_permutations: dict[tuple[int, int, int], np.ndarray[tuple[int], np.dtype[np.int64]]] = {}


def _permutation(seed: int, epoch: int, size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    key = (seed, epoch, size)
    if key not in _permutations:
        while len(_permutations) > 1:
            _permutations.pop(next(iter(_permutations)))
        words = philox_words(seed, Stream.SHUFFLE, np.array([epoch], dtype=np.int64), size)[0]
        _permutations[key] = np.argsort(words, kind="stable").astype(np.int64)
    return _permutations[key]
