"""Drawing samples: each is a function of (row, seed, sample index) and, up to rounding, not of its batch.

The teacher's flow-map row and the students' rows start from the same noise, so their images can be compared one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ddops.config.stages import DD1Config
from ddops.evaluation.images import to_uint8
from ddops.models.interface import Student, Teacher
from ddops.sampling.few_step import sample_student
from ddops.sampling.noise import Stream, normals

Indices = NDArray[np.int64]
DECODED_AT_ONCE: Final = {"cpu": 128}
"""Images, by device; elsewhere a whole batch. Of so many digits a decoder's map is 1 MB, which a processor's cache
holds; of larger images it holds not one."""
Draw = Callable[[int, Indices, Tensor], Tensor]
"""(seed, sample indices (B,), labels (B,)) -> images (B, I, H, W), nominally in [-1, 1]."""
Generator = Callable[[Tensor, Tensor], Tensor]
"""(noise (B, L, C), labels (B,)) -> images (B, I, H, W): a draw that is a function of the noise alone."""


@dataclass(frozen=True)
class Request:
    """The labels that images are asked for, and how many are drawn at a time."""

    labels_N: Tensor
    batch_size: int
    shown: bool = True
    """Whether a bar shows the progress; where nothing else hides it."""
    first: int = 0
    """Index of the first sample."""

    def batches(self, description: str) -> Iterator[tuple[Indices, Tensor]]:
        """Sample indices and their labels, batch by batch, with a progress bar."""
        progress = partial(tqdm, total=len(self.labels_N), desc=description, unit="image", leave=False, mininterval=1.0)
        # Asked for nothing, tqdm does as the environment says (TQDM_DISABLE).
        with progress() if self.shown else progress(disable=True) as bar:
            first = self.first
            for labels_B in self.labels_N.split(self.batch_size):
                yield np.arange(first, first + len(labels_B), dtype=np.int64), labels_B
                first += len(labels_B)
                bar.update(len(labels_B))


def draw_batches(
    draw: Draw, request: Request, seed: int, description: str, image_size: int | None = None
) -> Iterator[Tensor]:
    """uint8 images (B, I, H, W) on the CPU, batch by batch; larger ones are first brought down to ``image_size``."""
    for indices_B, labels_B in request.batches(description):
        with torch.inference_mode():
            images_BIHW = draw(seed, indices_B, labels_B)
            if image_size is not None and images_BIHW.shape[-1] > image_size:
                images_BIHW = F.interpolate(images_BIHW, size=(image_size, image_size), mode="bicubic")
            quantised_BIHW = to_uint8(images_BIHW).cpu()
        yield quantised_BIHW


def draw_all(draw: Draw, request: Request, seed: int, description: str) -> Tensor:
    """uint8 images (N, I, H, W): for sets that fit into memory."""
    return torch.cat(list(draw_batches(draw, request, seed, description)))


def decode(teacher: Teacher, q_BLC: Tensor) -> Tensor:
    """Images (B, I, H, W) of token embeddings."""
    parts = q_BLC.split(DECODED_AT_ONCE.get(q_BLC.device.type, len(q_BLC)))
    return torch.cat([teacher.decode(part_BLC) for part_BLC in parts])


def dd1_row(steps: int) -> str:
    """Name of the DD1 student's row with so many steps."""
    return f"dd1_{steps}step"


def sample_noise(seed: int, indices_B: Indices, model: Teacher | Student, code_dim: int) -> Tensor:
    """The noise sequences (B, L, C) that the flow map and the students start from."""
    return normals(seed, Stream.SAMPLE_NOISE, indices_B, (model.layout.length, code_dim))


def dd1_generator(student: Student, teacher: Teacher, config: DD1Config, steps: int) -> Generator:
    """The student from its first ``steps`` start positions."""
    starts = config.start_positions[:steps]

    def generate(noise_BLC: Tensor, labels_B: Tensor) -> Tensor:
        codebook_VC = teacher.codebook_VC
        noise_BLC, labels_B = noise_BLC.to(codebook_VC.device), labels_B.to(codebook_VC.device)
        q_BLC = sample_student(student, codebook_VC, noise_BLC, labels_B, starts, config.logit_prefix)
        return decode(teacher, q_BLC)

    return generate


def from_noise(generator: Generator, model: Teacher | Student, code_dim: int) -> Draw:
    """A generator's samples of the shared noise."""
    return lambda seed, indices_B, labels_B: generator(sample_noise(seed, indices_B, model, code_dim), labels_B)


def dd1_draw(student: Student, teacher: Teacher, config: DD1Config, steps: int) -> Draw:
    """The student's samples of the shared noise."""
    return from_noise(dd1_generator(student, teacher, config, steps), student, teacher.codebook_VC.shape[1])
