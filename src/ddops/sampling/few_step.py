"""Sampling a DD1 student in one or a few steps (arXiv 2412.17153; released code).

A step fills in every level from its start position on, all at once; the next step keeps the levels before its own
start position and returns the others to *the same* noise. With a fixed noise and label the result is deterministic.

What a later step returns to noise need not be predicted, and what is given need not be predicted again: each position
is predicted once, and a step runs over the positions up to the next step's start (docs/FAST_PATH.md).
:mod:`ddops.sampling.plain` says the same the short way.

The number of steps and their starts are Python values and nothing branches on a tensor, so that a whole sampling run
can be exported as one graph. Shape suffixes: see :mod:`ddops.models.interface`; n positions whose token an argmax
decided.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddops.models.conditions import Condition
from ddops.models.interface import Student, StudentSession
from ddops.models.layout import LevelLayout


class Prefix(NamedTuple):
    """The leading l positions of a sequence, up to the end of a level."""

    q_BlC: Tensor
    ids_Bn: Tensor
    """The tokens among them that an argmax decided, in order."""


def renoise(x_BLC: Tensor, noise_BLC: Tensor, start_B: Tensor, layout: LevelLayout) -> Tensor:
    """The first ``start`` levels of ``x_BLC``, the rest from ``noise_BLC``: (B, L, C)."""
    return torch.where(layout.given_mask(start_B)[..., None], x_BLC, noise_BLC)


def sample_student(
    student: Student,
    codebook_VC: Tensor,
    noise_BLC: Tensor,
    labels_B: Condition,
    start_positions: tuple[int, ...],
    logit_prefix: int,
) -> Tensor:
    """Embeddings (B, L, C) for the tokenizer's decoder, in one student pass for each start position.

    ``start_positions`` and ``logit_prefix`` count levels: VAR's scales, LlamaGen's tokens. Raises ValueError unless
    the start positions begin with 0, increase and stay below S, and ``logit_prefix`` is in 0..S.
    """
    return sample_sequence(student, codebook_VC, noise_BLC, labels_B, start_positions, logit_prefix).q_BlC


def sample_sequence(
    student: Student,
    codebook_VC: Tensor,
    noise_BLC: Tensor,
    labels_B: Condition,
    start_positions: tuple[int, ...],
    logit_prefix: int,
) -> Prefix:
    """As :func:`sample_student`, with the tokens that were decided on the way."""
    check_schedule(start_positions, logit_prefix, student.layout.num_levels)
    session, offsets = student.open(labels_B), student.layout.offsets
    sequence = Prefix(noise_BLC[:, :0], noise_BLC[:, :0, 0].long())
    for start in (*start_positions[1:], student.layout.num_levels):
        sequence = extend(session, codebook_VC, sequence, noise_BLC[:, : offsets[start]], offsets[logit_prefix])
    return sequence


def extend(session: StudentSession, codebook_VC: Tensor, given: Prefix, noise_BlC: Tensor, coded: int) -> Prefix:
    """One step: ``given`` and the rest of the l positions of ``noise_BlC``, predicted from their noise.

    Of the predicted positions, those before ``coded`` take the code of the largest logit, later ones the regressed
    embedding. Given ones keep their value, whichever it was.
    """
    known, length = given.q_BlC.shape[1], noise_BlC.shape[1]
    coded = min(max(coded, known), length)
    output = session.predict(torch.cat([given.q_BlC, noise_BlC[:, known:]], dim=1), known, coded)
    parts, ids_Bn = [given.q_BlC], given.ids_Bn
    if known < coded:
        ids_Bl = output.logits_BLV.argmax(-1)
        ids_Bn = torch.cat([ids_Bn, ids_Bl], dim=1)
        parts.append(F.embedding(ids_Bl, codebook_VC))
    if coded < length:
        parts.append(output.embeddings_BLC)
    return Prefix(torch.cat(parts, dim=1), ids_Bn)


def check_schedule(start_positions: tuple[int, ...], logit_prefix: int, num_levels: int) -> None:
    """Raises ValueError: see :func:`sample_student`."""
    increasing = list(start_positions) == sorted(set(start_positions))
    if not start_positions or start_positions[0] != 0 or not increasing or start_positions[-1] >= num_levels:
        raise ValueError(f"start_positions must rise from 0 and stay below {num_levels} levels, got {start_positions}")
    if not 0 <= logit_prefix <= num_levels:
        raise ValueError(f"logit_prefix must be in 0..{num_levels}, got {logit_prefix}")
