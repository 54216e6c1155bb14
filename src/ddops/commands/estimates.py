"""Sizes of a preset's models, counted on torch's meta device, and of what its stages leave on the disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from ddops.config.captions import EncodedCaptionsConfig
from ddops.config.stages import Config
from ddops.costs.stages import samples
from ddops.models.registry import build_student, build_teacher

FLOAT: Final = 4
"""Bytes of a float32, which weights are stored in."""


@dataclass(frozen=True)
class ModelSize:
    """What a model holds."""

    parameters: int
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Measured:
    """The models of a preset, counted."""

    transformer: ModelSize
    tokenizer: ModelSize
    student: ModelSize
    length: int


def measure(config: Config) -> Measured:
    """Build the models without allocating them, and count."""
    with torch.device("meta"):
        teacher, student = build_teacher(config.teacher.model), build_student(config.teacher.model)
    return Measured(
        transformer=_size(teacher.get_submodule("transformer")),
        tokenizer=_size(teacher.tokenizer),
        student=_size(student),
        length=teacher.layout.length,
    )


def caption_bytes(config: EncodedCaptionsConfig, width: int, prompts: int) -> int:
    """Stored bytes of captions that fill their tokens: the most that they take."""
    return prompts * config.length * width * (FLOAT if config.dtype == "float32" else 2)


def trajectory_bytes(measured: Measured) -> int:
    """Stored bytes a trajectory: the class and the token ids, two each. The noise is computed, not stored."""
    return 2 * (measured.length + 1)


def noise_bytes(config: Config, measured: Measured) -> int:
    """What storing the noise would add."""
    return FLOAT * measured.length * config.teacher.model.code_dim


def image_bytes(config: Config) -> int:
    """Bytes of all rows' images."""
    model = config.teacher.model
    image = model.image_channels * model.image_size**2
    return image * samples(config) * len(config.evaluate.seeds) * len(config.evaluate.rows)


def checkpoint_bytes(measured: Measured, *, dd2: bool) -> int:
    """The largest checkpoint of a training: weights, EMA and two moments; DD2's holds its guidance network too."""
    return 4 * measured.student.bytes + (3 * measured.transformer.bytes if dd2 else 0)


def _size(module: nn.Module) -> ModelSize:
    state = module.state_dict()
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        tensors=len(state),
        bytes=sum(tensor.nbytes for tensor in state.values()),
    )
