"""Sampling a DD1 student in one or a few steps (arXiv 2412.17153; released code).

A step fills in every level from its start position on, all at once; the next step keeps the levels before its own
start position and returns the others to *the same* noise. With a fixed noise and label the result is deterministic.

The number of steps and their starts are Python values and nothing branches on a tensor, so that a whole sampling run
can be exported as one graph. Shape suffixes: see :mod:`ddops.models.interface`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddops.models.interface import Student, StudentOutput
from ddops.models.layout import LevelLayout


def renoise(x_BLC: Tensor, noise_BLC: Tensor, start_B: Tensor, layout: LevelLayout) -> Tensor:
    """The first ``start`` levels of ``x_BLC``, the rest from ``noise_BLC``: (B, L, C)."""
    return torch.where(layout.given_mask(start_B)[..., None], x_BLC, noise_BLC)


def needs_logits(start: int, logit_prefix: int, layout: LevelLayout) -> slice:
    """The positions whose tokens come from the logits in a step from ``start``; empty where there are none."""
    given = layout.offsets[start]
    return slice(given, max(given, layout.offsets[logit_prefix]))


def final_sequence(
    x_BLC: Tensor, output: StudentOutput, codebook_VC: Tensor, start: int, logit_prefix: int, layout: LevelLayout
) -> Tensor:
    """The sequence (B, L, C) after a step from ``start``.

    Given positions keep their value from ``x_BLC``, whichever it was. Of the predicted ones, those in the first
    ``logit_prefix`` levels take the code of the largest logit (``output`` holds the logits of just these positions),
    later ones the regressed embedding.
    """
    coded = needs_logits(start, logit_prefix, layout)
    parts = [x_BLC[:, : coded.start], output.embeddings_BLC[:, coded.stop :]]
    if coded.start < coded.stop:
        parts.insert(1, F.embedding(output.logits_BLV.argmax(-1), codebook_VC))
    return torch.cat([part_BlC for part_BlC in parts if part_BlC.shape[1]], dim=1)


def sample_student(
    student: Student,
    codebook_VC: Tensor,
    noise_BLC: Tensor,
    labels_B: Tensor,
    start_positions: tuple[int, ...],
    logit_prefix: int,
) -> Tensor:
    """Embeddings (B, L, C) for the tokenizer's decoder, in one student pass for each start position.

    ``start_positions`` and ``logit_prefix`` count levels: VAR's scales, LlamaGen's tokens. Raises ValueError unless
    the start positions begin with 0, increase and stay below S, and ``logit_prefix`` is in 0..S.
    """
    _check_schedule(start_positions, logit_prefix, student.layout.num_levels)
    x_BLC = noise_BLC
    for start in start_positions:
        x_BLC = student_step(student, codebook_VC, x_BLC, noise_BLC, labels_B, start, logit_prefix)
    return x_BLC


def student_step(
    student: Student,
    codebook_VC: Tensor,
    x_BLC: Tensor,
    noise_BLC: Tensor,
    labels_B: Tensor,
    start: int,
    logit_prefix: int,
) -> Tensor:
    """One step: the sequence (B, L, C) whose first ``start`` levels are those of ``x_BLC``."""
    start_B = torch.full_like(labels_B, start)
    x_BLC = renoise(x_BLC, noise_BLC, start_B, student.layout)
    output = student(x_BLC, labels_B, start_B, needs_logits(start, logit_prefix, student.layout))
    return final_sequence(x_BLC, output, codebook_VC, start, logit_prefix, student.layout)


def _check_schedule(start_positions: tuple[int, ...], logit_prefix: int, num_levels: int) -> None:
    increasing = list(start_positions) == sorted(set(start_positions))
    if not start_positions or start_positions[0] != 0 or not increasing or start_positions[-1] >= num_levels:
        raise ValueError(f"start_positions must rise from 0 and stay below {num_levels} levels, got {start_positions}")
    if not 0 <= logit_prefix <= num_levels:
        raise ValueError(f"logit_prefix must be in 0..{num_levels}, got {logit_prefix}")
