"""DD2's losses (arXiv 2510.21003): pure functions, one value a sample.

Everything is said with posterior means ``m(x, t) = E[q | x_t = x]``, which stay bounded for every t. With them
``score = (t m - x) / (1 - t)^2`` and ``velocity = (m - x) / (1 - t)``, so that differences of two scores or two
velocities at the same point are differences of two means times a number: ``t / (1 - t)^2`` or ``1 / (1 - t)``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ddops.models.precision import full_precision

Weighting = Literal["mean", "velocity", "score"]
"""What a difference of posterior means is turned into: nothing, that of the velocities, or that of the scores."""
Normalization = Literal["distance", "direction", "none"]
Divergence = Literal["reverse", "jensen_shannon", "forward"]
"""Which divergence of the generated conditionals q from the teacher's p descends: ``reverse``, KL(q || p), is the
paper's; ``forward`` is KL(p || q)."""

SMALLEST: float = 1e-6
LARGEST_WEIGHT: float = 5.0
"""Of a token in the forward divergence: where p_t / q_t is larger the guidance network knows it badly."""


def diffuse(q_BLC: Tensor, noise_BLC: Tensor, t_BL: Tensor) -> Tensor:
    """``x_t = (1 - t) eps + t q``, each token at its own time."""
    return torch.lerp(noise_BLC, q_BLC, t_BL[..., None])


def difference_factor(t_BL: Tensor, weighting: Weighting) -> Tensor:
    """What a difference of posterior means is multiplied by; finite for t < 1."""
    if weighting == "mean":
        return torch.ones_like(t_BL)
    return 1 / (1 - t_BL) if weighting == "velocity" else t_BL / (1 - t_BL).square()


def denoising_error(mean_BLC: Tensor, target_BLC: Tensor, t_BL: Tensor, weighting: Weighting) -> Tensor:
    """Mean over positions of the squared distance of a predicted posterior mean to its target; shape (B,).

    With the closed-form mean as the target and weighting ``velocity`` this is the ground-truth-score loss; with
    the clean token itself it is the single-sample flow-matching loss, whose expectation has the same gradient.
    """
    factor_BL = difference_factor(t_BL, weighting).square()
    return (factor_BL * (mean_BLC - target_BLC).square().sum(-1)).mean(1)


def csd_direction(teacher_mean_BLC: Tensor, guidance_mean_BLC: Tensor, t_BL: Tensor, weighting: Weighting) -> Tensor:
    """Where conditional score distillation moves each token of the generator's output, (B, L, C).

    With weighting ``score`` it is ``s_teacher(x_t | q_<i, y) - s_psi(x_t | q_<i, y)`` itself; the others leave out
    what grows without bound as t approaches the data. It vanishes where the two conditionals agree.
    """
    return difference_factor(t_BL, weighting)[..., None] * (teacher_mean_BLC - guidance_mean_BLC)


def divergence_weight(log_ratio_BL: Tensor, divergence: Divergence) -> Tensor:
    """What a token's direction is multiplied by, (B, L), given ``log p_t(x_t) / q_t(x_t)``; one where the two agree.

    The gradient of an f-divergence is that of the reverse one with each noisy token weighted by ``f''(r) r^2``, r the
    ratio of the densities (Xu et al., arXiv 2502.15681): ``r`` for the forward divergence, which so listens most where
    the teacher would rather be than the generator is, ``2 r / (1 + r)`` for (four times) Jensen and Shannon's.
    """
    if divergence == "reverse":
        return torch.ones_like(log_ratio_BL)
    if divergence == "forward":
        return log_ratio_BL.exp().clamp_max(LARGEST_WEIGHT)
    return 2 * log_ratio_BL.sigmoid()


def csd_loss(q_BLC: Tensor, direction_BLC: Tensor, scale_B: Tensor) -> Tensor:
    """The surrogate ``0.5 |q - sg(q + scale direction)|^2``, mean over positions; shape (B,).

    Its gradient in ``q`` is ``-scale direction`` (over L): a descent step moves every token along the direction.
    """
    target_BLC = (q_BLC + scale_B[:, None, None] * direction_BLC).detach()
    return 0.5 * (q_BLC - target_BLC).square().sum(-1).mean(1)


def gradient_scale(
    direction_BLC: Tensor, q_BLC: Tensor, teacher_mean_BLC: Tensor, normalization: Normalization
) -> Tensor:
    """A number a sample, (B,), that the direction is multiplied by.

    ``distance`` divides by how far the teacher would still move the sample (DMD, arXiv 2311.18828, eq. 8),
    ``direction`` by the mean absolute direction, so that every sample weighs the same; ``none`` is one.
    """
    if normalization == "none":
        return torch.ones_like(q_BLC[:, 0, 0])
    magnitude_BLC = q_BLC - teacher_mean_BLC if normalization == "distance" else direction_BLC
    return 1 / magnitude_BLC.detach().abs().mean((1, 2)).clamp_min(SMALLEST)


@full_precision
def straight_through_codes(logits_BLV: Tensor, ids_BL: Tensor, codebook_VC: Tensor) -> Tensor:
    """Embeddings of the codes ``ids_BL`` with the gradient of the expected embedding, (B, L, C).

    Given the likeliest codes the output stays on the codebook, so teacher and guidance network condition on what was
    generated *(ours)*. Where no gradient is asked for, no expectation is computed.
    """
    q_BLC = F.embedding(ids_BL, codebook_VC)
    if not torch.is_grad_enabled():
        return q_BLC
    expected_BLC = logits_BLV.softmax(-1) @ codebook_VC
    return expected_BLC + (q_BLC - expected_BLC).detach()
