"""The flow map eps -> code: solve dx/dt = v(x, t) over the codebook and read off the code it converges to.

The default solver predicts the data (the posterior mean), is of second order and multistep, on a grid
uniform in log-SNR: one evaluation of the posterior mean a step ("DPM-Solver++ (2M)", arXiv 2211.01095, with
alpha = t and sigma = 1 - t). Heun's method is there as an independent oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ddops.flow.codebook import posterior_logits, posterior_mean, velocity

Solver = Literal["multistep", "heun"]

LOG_SNR_RANGE = (-2.0, 2.5)
"""First (after t = 0) and last point of the grid: log of ``t * spread / (1 - t)``, where ``spread`` is the codes'
root-mean-square distance from their mean. Before it the posterior is still the prior, after it one code is left."""
CHUNK_ELEMENTS = 1 << 22
"""Tokens are mapped in chunks of at most this many (token, code) pairs, which bounds the memory."""


def flow_map(
    noise_NC: Tensor, log_p_NV: Tensor, codebook_VC: Tensor, *, evaluations: int = 32, solver: Solver = "multistep"
) -> Tensor:
    """Token ids (N,), int64: where the flow takes each ``noise``, given each token's log-probabilities.

    ``evaluations`` counts the posterior means computed a token. Over standard normal noise the ids are distributed
    as ``exp(log_p)``, up to the solver's error. A code of probability zero is never returned.
    """
    if evaluations < 2:
        raise ValueError(f"the flow map needs at least 2 evaluations of the posterior mean, got {evaluations}")
    solve = {"multistep": _solve_multistep, "heun": _solve_heun}[solver]
    chunk = max(1, CHUNK_ELEMENTS // len(codebook_VC))
    ids = [
        _endpoint(solve, noise, log_p, codebook_VC, evaluations)
        for noise, log_p in zip(noise_NC.split(chunk), log_p_NV.split(chunk), strict=True)
    ]
    return torch.cat(ids)


def _endpoint(
    solve: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, float]],
    noise_NC: Tensor,
    log_p_NV: Tensor,
    codebook_VC: Tensor,
    evaluations: int,
) -> Tensor:
    x_NC, t = solve(noise_NC, log_p_NV, codebook_VC, evaluations)
    return posterior_logits(x_NC, t, log_p_NV, codebook_VC).argmax(-1)


def grid_times(codebook_VC: Tensor, points: int) -> list[float]:
    """Times in (0, 1), uniform in the log-SNR of this codebook."""
    centred_VC = codebook_VC.double() - codebook_VC.double().mean(0)
    log_spread = 0.5 * math.log(float(centred_VC.square().sum(-1).mean()) or 1.0)
    start, end = (bound - log_spread for bound in LOG_SNR_RANGE)
    return torch.linspace(start, end, points, dtype=torch.float64).sigmoid().tolist()


def _solve_multistep(noise_NC: Tensor, log_p_NV: Tensor, codebook_VC: Tensor, evaluations: int) -> tuple[Tensor, float]:
    """x and t at the end of the grid. One evaluation is left to the caller, who reads the code off."""
    # At t = 0 the posterior is p itself, whatever x is.
    mean_NC = log_p_NV.exp() @ codebook_VC
    x_NC, t, target_NC = noise_NC, 0.0, mean_NC
    for step, t_next in enumerate(grid_times(codebook_VC, evaluations - 1)):
        if step:
            previous_NC, mean_NC = mean_NC, posterior_mean(x_NC, t, log_p_NV, codebook_VC)
            # Extrapolate half a step ahead; the step from t = 0 was infinite in log-SNR and does not count.
            target_NC = mean_NC + 0.5 * (mean_NC - previous_NC) if step > 1 else mean_NC
        shrink = (1 - t_next) / (1 - t)
        x_NC, t = shrink * x_NC + (t_next - shrink * t) * target_NC, t_next
    return x_NC, t


def _solve_heun(noise_NC: Tensor, log_p_NV: Tensor, codebook_VC: Tensor, evaluations: int) -> tuple[Tensor, float]:
    """Heun's method on a uniform grid in t that ends where the log-SNR grid does; two evaluations a step."""
    t_end = grid_times(codebook_VC, 2)[-1]
    steps = max(1, (evaluations - 1) // 2)
    x_NC, h = noise_NC, t_end / steps
    for k in range(steps):
        v_NC = velocity(x_NC, k * h, log_p_NV, codebook_VC)
        w_NC = velocity(x_NC + h * v_NC, (k + 1) * h, log_p_NV, codebook_VC)
        x_NC = x_NC + 0.5 * h * (v_NC + w_NC)
    return x_NC, t_end
