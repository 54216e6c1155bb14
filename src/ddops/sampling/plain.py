"""Few-step sampling as the paper states it (arXiv 2412.17153): every step predicts everything. The oracle of
:mod:`ddops.sampling.few_step`, which leaves out what is not used; for tests and benchmarks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddops.models.conditions import Condition
from ddops.models.interface import Student, StudentOutput
from ddops.models.layout import LevelLayout
from ddops.sampling.few_step import renoise


def plain_sample(
    student: Student,
    codebook_VC: Tensor,
    noise_BLC: Tensor,
    labels_B: Condition,
    start_positions: tuple[int, ...],
    logit_prefix: int,
) -> Tensor:
    """See :func:`ddops.sampling.few_step.sample_student`."""
    x_BLC = noise_BLC
    for start in start_positions:
        x_BLC = plain_step(student, codebook_VC, x_BLC, noise_BLC, labels_B, start, logit_prefix)
    return x_BLC


def plain_step(
    student: Student,
    codebook_VC: Tensor,
    x_BLC: Tensor,
    noise_BLC: Tensor,
    labels_B: Condition,
    start: int,
    logit_prefix: int,
) -> Tensor:
    """One step: the sequence (B, L, C) whose first ``start`` levels are those of ``x_BLC``."""
    start_B = torch.full_like(noise_BLC[:, 0, 0], start, dtype=torch.int64)
    x_BLC = renoise(x_BLC, noise_BLC, start_B, student.layout)
    output = student(x_BLC, labels_B, start_B)
    return final_sequence(x_BLC, output, codebook_VC, start_B, logit_prefix, student.layout)


def final_sequence(
    x_BLC: Tensor, output: StudentOutput, codebook_VC: Tensor, start_B: Tensor, logit_prefix: int, layout: LevelLayout
) -> Tensor:
    """The sequence (B, L, C) after a step: given positions as they were, the predicted ones of the first
    ``logit_prefix`` levels as the code of the largest logit, later ones as the regressed embedding."""
    coded_L = layout.level_of_position(x_BLC.device) < logit_prefix
    codes_BLC = F.embedding(output.logits_BLV.argmax(-1), codebook_VC)
    predicted_BLC = torch.where(coded_L[:, None], codes_BLC, output.embeddings_BLC)
    return renoise(x_BLC, predicted_BLC, start_B, layout)
