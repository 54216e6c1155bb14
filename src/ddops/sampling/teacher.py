"""Sampling a teacher level by level: the ordinary way, through the flow map, and the independent-marginals baseline.

How a token is picked from its distribution is a function ``(level, log_p_BlV) -> ids_Bl``; the loop is one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from ddops.config.models import SamplingConfig
from ddops.config.stages import FlowMapConfig
from ddops.flow.solvers import flow_map
from ddops.models.interface import Teacher
from ddops.models.layout import LevelLayout
from ddops.models.precision import full_precision
from ddops.models.sampling_filters import guided_log_probs

Picker = Callable[[int, Tensor], Tensor]


@torch.inference_mode()
def sample_teacher(teacher: Teacher, labels_B: Tensor, sampling: SamplingConfig, pick: Picker) -> Tensor:
    """Token ids (B, L), int64: every level drawn by ``pick`` given the levels before it."""
    session = teacher.open(labels_B, sampling)
    levels: list[Tensor] = []
    for level in range(teacher.layout.num_levels):
        ids_Bl = pick(level, session.next_log_probs())
        session.append(ids_Bl)
        levels.append(ids_Bl)
    return torch.cat(levels, dim=1)


@torch.no_grad()
def conditional_log_probs(teacher: Teacher, labels_B: Tensor, ids_BL: Tensor, sampling: SamplingConfig) -> Tensor:
    """Log-probabilities (B, L, V), as sampling applies them, of every token given the earlier levels of ``ids_BL``.

    What :meth:`TeacherSession.next_log_probs` gives level after level, in one pass.
    """
    layout = teacher.layout
    scales = [teacher.guidance_scale(sampling.guidance, level) for level in range(layout.num_levels)]
    cond_BLV, uncond_BLV = teacher.logits(labels_B, ids_BL), None
    if any(scale != 1 for scale in scales):
        uncond_BLV = teacher.logits(teacher.unconditional(labels_B), ids_BL)
    parts, offset = [], 0
    for scale, group in groupby(zip(scales, layout.sizes, strict=True), key=itemgetter(0)):
        here = slice(offset, offset := offset + sum(size for _, size in group))
        uncond_BlV = None if uncond_BLV is None else uncond_BLV[:, here]
        parts.append(guided_log_probs(cond_BLV[:, here], uncond_BlV, scale, sampling))
    return torch.cat(parts, dim=1)


def categorical_picker(layout: LevelLayout, uniforms_BL: Tensor) -> Picker:
    """Ordinary sampling: each token by inversion of its distribution function at its own number in (0, 1)."""

    def pick(level: int, log_p_BlV: Tensor) -> Tensor:
        return invert_cdf(log_p_BlV.exp(), uniforms_BL[:, layout.positions(level)])

    return pick


def flow_picker(layout: LevelLayout, codebook_VC: Tensor, noise_BLC: Tensor, config: FlowMapConfig) -> Picker:
    """DD1's deterministic map (section 3.2): each token is where the flow takes the noise at its position."""

    def pick(level: int, log_p_BlV: Tensor) -> Tensor:
        noise_BlC = noise_BLC[:, layout.positions(level)]
        ids_N = full_precision(flow_map)(
            noise_BlC.flatten(0, 1),
            log_p_BlV.flatten(0, 1),
            codebook_VC,
            solver=config.solver,
            evaluations=config.evaluations,
            tolerance=config.tolerance,
            compiled=config.compiled,
        )
        return ids_N.view(noise_BlC.shape[:2])

    return pick


def invert_cdf(p_BlV: Tensor, uniforms_Bl: Tensor) -> Tensor:
    """Categorical draws (B, l), int64, by inversion in float64. A code of probability zero is never drawn."""
    cdf_BlV = p_BlV.double().cumsum(-1)
    thresholds_Bl1 = uniforms_Bl.double()[..., None] * cdf_BlV[..., -1:]
    return torch.searchsorted(cdf_BlV, thresholds_Bl1, right=True)[..., 0].clamp_max(p_BlV.shape[-1] - 1)
