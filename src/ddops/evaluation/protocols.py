"""The named protocols, as far as drawing goes: which labels are asked for, and what is done to an image.

How samples are judged is in :mod:`ddops.evaluation.ruler`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from ddops.captions.conditions import Conditions
from ddops.config.evaluation import (
    ADM50kEvaluateConfig,
    DD50kEvaluateConfig,
    DigitsEvaluateConfig,
    EvaluateConfig,
    T2IEvaluateConfig,
)
from ddops.data import digits
from ddops.data.digits import LabelledImages
from ddops.evaluation.errors import MetricError
from ddops.sampling.noise import Stream, integers


class Protocol(ABC):
    """Which samples a protocol wants."""

    @abstractmethod
    def labels(self, seed: int, conditions: Conditions) -> Tensor:
        """The condition of every sample of a row, int64 (N,)."""

    @property
    def image_size(self) -> int | None:
        """Side that larger images are brought down to before they are quantised; None to leave them as they are."""
        return None

    def real_images(self) -> LabelledImages | None:
        """The real images, where they are at hand: the grid beside the samples, and the tokenizer's reconstruction."""
        return None


class DigitsProtocol(Protocol):
    """``digits``: the labels of the embedded data set, over and over, so in the data's proportions."""

    def __init__(self, config: DigitsEvaluateConfig) -> None:
        self.config = config

    def labels(self, seed: int, conditions: Conditions) -> Tensor:
        return conditions.of_images(digits.load().labels_N).repeat(self.config.samples_per_image)

    def real_images(self) -> LabelledImages | None:
        return digits.load()


class ImageNetProtocol(Protocol):
    """``dd_50k``: labels at random, a function of the seed. ``adm_50k``: every class as often."""

    def __init__(self, config: DD50kEvaluateConfig | ADM50kEvaluateConfig) -> None:
        self.config = config

    def labels(self, seed: int, conditions: Conditions) -> Tensor:
        if isinstance(self.config, ADM50kEvaluateConfig):
            return torch.arange(conditions.count).repeat(self.config.samples_per_class)
        indices_N = np.arange(self.config.samples, dtype=np.int64)
        return torch.from_numpy(integers(seed, Stream.LABEL, indices_N, 1, conditions.count)[:, 0])

    @property
    def image_size(self) -> int | None:
        return self.config.image_size


class T2IProtocol(Protocol):
    """``t2i_30k``: the first prompts, an image each."""

    def __init__(self, config: T2IEvaluateConfig) -> None:
        self.config = config

    def labels(self, seed: int, conditions: Conditions) -> Tensor:
        if conditions.count < self.config.samples or conditions.captions is None or conditions.captions.classes:
            raise MetricError(
                f"t2i_30k asks for {self.config.samples} prompts without classes, captions.sets.evaluate holds "
                f"{conditions.count}: give it more, or lower evaluate.samples"
            )
        return torch.arange(self.config.samples)

    @property
    def image_size(self) -> int | None:
        return self.config.image_size


def open_protocol(config: EvaluateConfig) -> Protocol:
    """The protocol that a configuration names."""
    if isinstance(config, DigitsEvaluateConfig):
        return DigitsProtocol(config)
    return T2IProtocol(config) if isinstance(config, T2IEvaluateConfig) else ImageNetProtocol(config)
