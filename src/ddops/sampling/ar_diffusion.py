"""Sampling the AR-diffusion model of DD2, and refining a sequence with it (arXiv 2510.21003).

The solver is the multistep one of the flow map (:mod:`ddops.flow.solvers`): it predicts the data, on a grid uniform in
log-SNR, and is written in ``z = x / (1 - t)`` and ``r = t / (1 - t)``, where the flow is ``dz/dr = E[q | x_t]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from ddops.config.models import SamplingConfig
from ddops.flow.solvers import grid_ratios
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
            grid_ratios(model.codebook_VC, evaluations - 1),
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
    first = start / (1 - start)
    ratios = [r for r in grid_ratios(model.codebook_VC, evaluations - 1) if r > first]
    q_BLC = solve(lambda x_BLC, t_BL: model.mean(x_BLC, t_BL, hidden_BLD), x_BLC, ratios, first)
    return torch.nn.functional.embedding(nearest_code(q_BLC, model.codebook_VC), model.codebook_VC)


def solve(mean: Denoiser, x_BlC: Tensor, ratios: list[float], r: float = 0.0) -> Tensor:
    """The last posterior mean on the way from ``x_BlC`` at ``r`` through ``ratios``, which are all larger.

    Second order; one evaluation a ratio, and one at the start.
    """

    def at(z_BlC: Tensor, r: float) -> Tensor:
        return mean(z_BlC / (1 + r), torch.full_like(z_BlC[..., 0], r / (1 + r)))

    extrapolates_from = 1 if r > 0 else 2
    z_BlC = x_BlC * (1 + r)
    mean_BlC = at(z_BlC, r)
    change_BlC = torch.zeros_like(mean_BlC)
    for step, r_next in enumerate(ratios, start=1):
        # Half a step ahead by the last change; the step from r = 0 is infinite in log-SNR and does not count.
        z_BlC = z_BlC + (r_next - r) * (mean_BlC + 0.5 * change_BlC)
        r, previous_BlC, mean_BlC = r_next, mean_BlC, at(z_BlC, r_next)
        if step >= extrapolates_from:
            change_BlC = mean_BlC - previous_BlC
    return mean_BlC
