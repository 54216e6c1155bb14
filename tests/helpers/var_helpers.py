"""The tiny VAR configuration of the golden files, and how to read them (prefixes: in., out., sd.)."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from ddops.config.models import AutoencoderConfig, VARConfig
from ddops.models.checkpoints_var import var_student_state
from ddops.models.interface import Student
from ddops.models.var_student import VARStudent

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}

TINY = VARConfig(
    family="var",
    num_classes=10,
    image_size=64,
    image_channels=3,
    codebook_size=64,
    code_dim=8,
    patch_sizes=(1, 2, 3, 4),
    shared_phi=4,
    autoencoder=AutoencoderConfig(channels=32, channel_multipliers=(1, 1, 2, 2, 4), res_blocks=2),
    depth=2,
    width=64,
    heads=4,
    mlp_ratio=4.0,
    attention_l2_norm=True,
    shared_ada_ln=False,
    norm_eps=1e-6,
)
NUM_LEVELS = len(TINY.patch_sizes)

PUBLISHED = replace(
    TINY,
    num_classes=1000,
    image_size=256,
    codebook_size=4096,
    code_dim=32,
    patch_sizes=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    autoencoder=replace(TINY.autoencoder, channels=160),
)
PUBLISHED_512 = replace(PUBLISHED, image_size=512, patch_sizes=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32), shared_ada_ln=True)


class Sample(Protocol):
    """The lean way to sample, or the plain one."""

    def __call__(
        self, student: Student, codes: Tensor, noise: Tensor, labels: Tensor, starts: tuple[int, ...], prefix: int, /
    ) -> Tensor: ...


def of_depth(config: VARConfig, depth: int) -> VARConfig:
    """The published scaling rule: width 64 and one head a layer."""
    return replace(config, depth=depth, width=64 * depth, heads=depth)


def golden(name: str) -> dict[str, Tensor]:
    """A golden file; float8 values, used for size alone, as float32."""
    tensors = load_file(Path(__file__).parents[1] / "golden" / f"{name}.safetensors")
    return {key: t.float() if t.dtype == torch.float8_e4m3fn else t for key, t in tensors.items()}


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def levels(tensors: dict[str, Tensor], prefix: str) -> list[Tensor]:
    """The values of ``prefix0``, ``prefix1``, ..., one a level."""
    return [tensors[f"{prefix}{level}"] for level in range(NUM_LEVELS)]


def codebook(tensors: dict[str, Tensor]) -> Tensor:
    return tensors["sd_vae.quantize.embedding.weight"]


SMALL = replace(TINY, width=32, depth=2, heads=2, patch_sizes=(1, 2, 4))


@cache
def golden_student() -> VARStudent:
    student = VARStudent(TINY)
    student.load_state_dict(var_student_state(with_prefix(golden("dd1_var"), "sd."), TINY))
    return student.eval()
