"""What the evaluation compares: each row samples the protocol's labels in its own way, image by image from one seed.

A sample is a function of (row, seed, sample index); within the rounding of the arithmetic it does not depend on
its batch. The teacher's flow-map row and the student's rows start from the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ddops.config.models import SamplingConfig
from ddops.config.stages import DD1Config, FlowMapConfig
from ddops.evaluation.images import to_uint8
from ddops.models.interface import Student, Teacher
from ddops.sampling.few_step import sample_student
from ddops.sampling.noise import Stream, normals, uniforms
from ddops.sampling.teacher import categorical_picker, flow_picker, sample_marginals, sample_teacher

RECONSTRUCTION, TEACHER, TEACHER_FLOW = "reconstruction", "teacher", "teacher_flow"
ONESTEP_STAR, ONESTEP_CLASS = "onestep_star", "onestep_class"


def dd1_row(steps: int) -> str:
    """Name of the DD1 student's row with so many steps."""
    return f"dd1_{steps}step"


@dataclass(frozen=True)
class Protocol:
    """Which labels are asked for: those of the reference images, over and over, so in the data's proportions."""

    reference_labels_N: Tensor
    count: int
    batch_size: int

    @property
    def labels(self) -> Tensor:
        """Label of every sample, int64 (count,)."""
        return self.reference_labels_N[torch.arange(self.count) % len(self.reference_labels_N)]

    def batches(self, description: str) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Sample indices and their labels, batch by batch, with a progress bar."""
        with tqdm(total=self.count, desc=description, unit="image", leave=False, mininterval=1.0) as bar:
            for labels_B, first in zip(
                self.labels.split(self.batch_size), range(0, self.count, self.batch_size), strict=True
            ):
                yield np.arange(first, first + len(labels_B), dtype=np.int64), labels_B
                bar.update(len(labels_B))


def sample_noise(seed: int, indices_B: NDArray[np.int64], model: Teacher | Student, code_dim: int) -> Tensor:
    """The noise sequences (B, L, C) that the flow map and the students start from."""
    return normals(seed, Stream.SAMPLE_NOISE, indices_B, (model.layout.length, code_dim))


@torch.inference_mode()
def collect(protocol: Protocol, row: str, decode: Callable[[NDArray[np.int64], Tensor], Tensor]) -> Tensor:
    """uint8 images (count, I, H, W) of what ``decode`` makes of sample indices and labels, batch by batch."""
    batches = [to_uint8(decode(indices_B, labels_B)).cpu() for indices_B, labels_B in protocol.batches(row)]
    return torch.cat(batches)


def _decode_ids(teacher: Teacher, ids_BL: Tensor) -> Tensor:
    return teacher.decode(F.embedding(ids_BL, teacher.codebook_VC))


def reconstruct(teacher: Teacher, images_NIHW: Tensor, batch_size: int) -> Tensor:
    """The reference images through the tokenizer and back, uint8: the floor of every row."""
    with torch.inference_mode():
        batches = [_decode_ids(teacher, teacher.tokenizer.encode(batch)) for batch in images_NIHW.split(batch_size)]
        return to_uint8(torch.cat(batches))


def sample_teacher_row(teacher: Teacher, sampling: SamplingConfig, protocol: Protocol, seed: int) -> Tensor:
    """Row ``teacher``: ordinary autoregressive sampling, uint8 images (count, I, H, W)."""

    def decode(indices_B: NDArray[np.int64], labels_B: Tensor) -> Tensor:
        uniforms_BL = torch.from_numpy(uniforms(seed, Stream.CATEGORICAL, indices_B, teacher.layout.length))
        pick = categorical_picker(teacher.layout, uniforms_BL)
        return _decode_ids(teacher, sample_teacher(teacher, labels_B, sampling, pick))

    return collect(protocol, TEACHER, decode)


def sample_flow_row(
    teacher: Teacher, sampling: SamplingConfig, solver: FlowMapConfig, protocol: Protocol, seed: int
) -> Tensor:
    """Row ``teacher_flow``: the teacher through the flow map, what the trajectories are made of."""

    def decode(indices_B: NDArray[np.int64], labels_B: Tensor) -> Tensor:
        noise_BLC = sample_noise(seed, indices_B, teacher, teacher.codebook_VC.shape[1])
        pick = flow_picker(teacher.layout, teacher.codebook_VC, noise_BLC, solver)
        return _decode_ids(teacher, sample_teacher(teacher, labels_B, sampling, pick))

    return collect(protocol, TEACHER_FLOW, decode)


def sample_dd1(
    student: Student, teacher: Teacher, config: DD1Config, steps: int, protocol: Protocol, seed: int
) -> Tensor:
    """Row ``dd1_<steps>step``: the student from its first ``steps`` start positions."""
    codebook_VC = teacher.codebook_VC

    def decode(indices_B: NDArray[np.int64], labels_B: Tensor) -> Tensor:
        noise_BLC = sample_noise(seed, indices_B, student, codebook_VC.shape[1])
        starts = config.start_positions[:steps]
        return teacher.decode(sample_student(student, codebook_VC, noise_BLC, labels_B, starts, config.logit_prefix))

    return collect(protocol, dd1_row(steps), decode)


def sample_independent(teacher: Teacher, marginals_KLV: Tensor, protocol: Protocol, seed: int) -> Tensor:
    """Rows ``onestep_star`` and ``onestep_class``: every token independently from the marginals of its class."""

    def decode(indices_B: NDArray[np.int64], labels_B: Tensor) -> Tensor:
        uniforms_BL = torch.from_numpy(uniforms(seed, Stream.CATEGORICAL, indices_B, teacher.layout.length))
        return _decode_ids(teacher, sample_marginals(marginals_KLV, labels_B, uniforms_BL))

    return collect(protocol, "independent tokens", decode)
