"""Sampling the AR-diffusion model of DD2, and refining a sequence with it (arXiv 2510.21003).

The solver is that of the flow map (:mod:`ddops.flow.solvers`): it predicts the data, on a grid uniform in log-SNR.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from ddops.config.models import SamplingConfig
from ddops.flow.solvers import grid_times
from ddops.models.ar_diffusion import ARDiffusion
from ddops.models.quantization import nearest_code

UNGUIDED: Final = SamplingConfig(guidance=0.0, top_k=0, top_p=1.0, temperature=1.0)
"""Guidance, top-k and top-p are in the AR-diffusion model's weights: it was trained on the teacher's guided scores."""

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``(x_BlC, t_Bl) -> E[q | x_t]``, (B, l, C)."""


@torch.inference_mode()
def sample_ar_diffusion(model: ARDiffusion, labels_B: Tensor, noise_BLC: Tensor, evaluations: int) -> Tensor:
    """Token ids (B, L), int64: level after level, the head's flow from each token's noise to its code."""
    session = model.backbone.open(labels_B, UNGUIDED)
    layout, levels = model.backbone.layout, []
    for level in range(layout.num_levels):
        hidden_BlD = session.next_hidden()
        q_BlC = solve(
            lambda x_BlC, t_Bl, hidden_BlD=hidden_BlD: model.mean(x_BlC, t_Bl, hidden_BlD),  # type: ignore[misc]
            noise_BLC[:, layout.positions(level)],
            _times(model, evaluations),
        )
        ids_Bl = nearest_code(q_BlC, model.codebook_VC)
        session.append(ids_Bl)
        levels.append(ids_Bl)
    return torch.cat(levels, dim=1)


@torch.inference_mode()
def refine(
    model: ARDiffusion, q_BLC: Tensor, noise_BLC: Tensor, labels_B: Tensor, *, start: float, evaluations: int
) -> Tensor:
    """One step of few-step sampling: every token of ``q_BLC`` is returned to noise as far as ``start`` (1 is clean,
    0 all noise) and denoised again, given the others as they were. One pass of the backbone for all levels.

    Returns embeddings (B, L, C) on the codebook.
    """
    hidden_BLD = model.hidden(labels_B, nearest_code(q_BLC, model.codebook_VC))
    x_BLC = torch.lerp(noise_BLC, q_BLC, start)
    times = [t for t in _times(model, evaluations) if t > start]
    q_BLC = solve(lambda x_BLC, t_BL: model.mean(x_BLC, t_BL, hidden_BLD), x_BLC, times, start=start)
    return torch.nn.functional.embedding(nearest_code(q_BLC, model.codebook_VC), model.codebook_VC)


def solve(mean: Denoiser, x_BlC: Tensor, times: list[float], start: float = 0.0) -> Tensor:
    """Follow ``dx/dt = (mean - x) / (1 - t)`` from ``start`` through ``times`` and return the last mean.

    Second order and multistep; one evaluation a time, and one at ``start``.
    """
    t, change_BlC = start, torch.zeros_like(x_BlC)
    previous_BlC = mean(x_BlC, torch.full_like(x_BlC[..., 0], t))
    for step, t_next in enumerate(times):
        mean_BlC = mean(x_BlC, torch.full_like(x_BlC[..., 0], t)) if step else previous_BlC
        # The step from t = 0 is infinite in log-SNR: no extrapolation over it.
        change_BlC = mean_BlC - previous_BlC if step > 1 or start > 0 else change_BlC
        shrink = (1 - t_next) / (1 - t)
        x_BlC = shrink * x_BlC + (t_next - shrink * t) * (mean_BlC + 0.5 * change_BlC)
        t, previous_BlC = t_next, mean_BlC
    return mean(x_BlC, torch.full_like(x_BlC[..., 0], t))


def _times(model: ARDiffusion, evaluations: int) -> list[float]:
    return grid_times(model.codebook_VC, evaluations - 1)
