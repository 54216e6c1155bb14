"""The flow map eps -> code: solve dx/dt = v(x, t) over the codebook and read off the code it converges to.

The default solver adapts its steps to each token, see :mod:`ddops.flow.adaptive`. The others take the same steps for
every token, on a grid uniform in log-SNR, and serve as its measure: Euler, Heun, and a multistep method of second
order that predicts the data ("DPM-Solver++ (2M)", arXiv 2211.01095, with alpha = t and sigma = 1 - t). Tokens whose
code is not decided where the grid ends are followed to the limit by the adaptive solver, so that no answer is an
artefact of the grid's end.
All are written in ``z = x / (1 - t)`` and ``r = t / (1 - t)``, where the flow is ``dz/dr = m`` and r^2 is the SNR.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Final, Literal

import torch
from torch import Tensor

from ddops.flow.adaptive import Solution, solve_adaptive
from ddops.flow.codebook import posterior_mean

Solver = Literal["adaptive", "multistep", "heun", "euler"]
Solve = Callable[[Tensor, Tensor, Tensor], Solution]
Mean = Callable[[Tensor, float], Tensor]
"""The posterior mean (N, C) of given z (N, C) and r."""
Advance = Callable[[Mean, Tensor, list[float]], Tensor]
"""z (N, C) at the last of the given values of r, from z at r = 0."""

LOG_SNR_RANGE = (-2.0, 2.5)
"""First (after t = 0) and last point of the fixed grids: log of ``r * spread``, where ``spread`` is the codes'
root-mean-square distance from their mean. Before it the posterior is still the prior; after it few codes are left."""
TOLERANCE: Final = 3e-3
MOST_EVALUATIONS: Final = 100
CHUNK_ELEMENTS = {"cpu": 1 << 19}
"""Tokens are mapped in chunks of at most this many (token, code) pairs, which bounds the memory. On a CPU a chunk's
arrays of 2 MB stay in the second-level cache."""
OTHER_CHUNK_ELEMENTS = 1 << 26
"""On an accelerator: 256 MB an array, where launching a kernel costs what a million pairs do."""


def flow_map(
    noise_NC: Tensor,
    log_p_NV: Tensor,
    codebook_VC: Tensor,
    *,
    solver: Solver = "adaptive",
    evaluations: int = MOST_EVALUATIONS,
    tolerance: float = TOLERANCE,
    compiled: bool = False,
) -> Tensor:
    """Token ids (N,), int64: where the flow takes each ``noise``, given each token's log-probabilities.

    Over standard normal noise the ids are distributed as ``exp(log_p)``, up to the solver's error. A code of
    probability zero is never returned. Codes at the same place cannot be told apart by any flow: the likeliest of
    them, then the first, stands for all.

    Args:
        evaluations: for ``adaptive`` the most posterior means that a token may take. For the others those on the grid
            (a Heun step takes two); the test whether the code is decided, and the way on where it is not, come on top.
        tolerance: error of a step of ``adaptive``, and of the others' way beyond their grid.
        compiled: compile the posterior step of ``adaptive``.

    Raises:
        ValueError: fewer than two evaluations, or a token without a distribution (NaN, or no code at all).
    """
    return solve_flow(
        noise_NC,
        log_p_NV,
        codebook_VC,
        solver=solver,
        evaluations=evaluations,
        tolerance=tolerance,
        compiled=compiled,
    ).ids_N


def solve_flow(
    noise_NC: Tensor,
    log_p_NV: Tensor,
    codebook_VC: Tensor,
    *,
    solver: Solver = "adaptive",
    evaluations: int = MOST_EVALUATIONS,
    tolerance: float = TOLERANCE,
    compiled: bool = False,
) -> Solution:
    """:func:`flow_map` with the evaluations each token took. Computes in float32, or in float64 if given that."""
    if evaluations < 2:
        raise ValueError(f"the flow map needs at least 2 evaluations of the posterior mean, got {evaluations}")
    dtype = torch.promote_types(log_p_NV.dtype, torch.float32)
    noise_NC, log_p_NV, codebook_VC = noise_NC.to(dtype), log_p_NV.to(dtype), codebook_VC.to(dtype)
    if not log_p_NV.amax(-1).isfinite().all():
        raise ValueError("the flow map was given log-probabilities that are NaN, infinite or zero for every code")
    solve: Solve
    if solver == "adaptive":
        solve = partial(solve_adaptive, tolerance=tolerance, evaluations=evaluations, compiled=compiled)
    else:
        solve = partial(_solve_fixed, *_FIXED[solver], evaluations, tolerance)
    elements = CHUNK_ELEMENTS.get(noise_NC.device.type, OTHER_CHUNK_ELEMENTS)
    chunk = max(1, elements // len(codebook_VC))
    parts = [
        solve(noise, log_p, codebook_VC)
        for noise, log_p in zip(noise_NC.split(chunk), log_p_NV.split(chunk), strict=True)
    ]
    return Solution(torch.cat([part.ids_N for part in parts]), torch.cat([part.evaluations_N for part in parts]))


def grid_ratios(codebook_VC: Tensor, points: int) -> list[float]:
    """Values of r, uniform in the log-SNR of this codebook."""
    centred_VC = codebook_VC.double() - codebook_VC.double().mean(0)
    log_spread = 0.5 * math.log(float(centred_VC.square().sum(-1).mean()) or 1.0)
    start, end = (bound - log_spread for bound in LOG_SNR_RANGE)
    return torch.linspace(start, end, points, dtype=torch.float64).exp().tolist()


def _solve_fixed(
    advance: Advance,
    evaluations_a_step: int,
    evaluations: int,
    tolerance: float,
    noise_NC: Tensor,
    log_p_NV: Tensor,
    codebook_VC: Tensor,
) -> Solution:
    """Walk the grid, and beyond it where the code is still open."""
    ratios = grid_ratios(codebook_VC, max(1, (evaluations - 1) // evaluations_a_step))

    def mean(z_NC: Tensor, r: float) -> Tensor:
        return posterior_mean(z_NC / (1 + r), r / (1 + r), log_p_NV, codebook_VC)

    z_NC = advance(mean, noise_NC, ratios)
    end = solve_adaptive(
        z_NC, log_p_NV, codebook_VC, tolerance=tolerance, evaluations=MOST_EVALUATIONS, from_r=ratios[-1]
    )
    return Solution(end.ids_N, end.evaluations_N + len(ratios) * evaluations_a_step)


def _euler(mean: Mean, z_NC: Tensor, ratios: list[float]) -> Tensor:
    r = 0.0
    for r_next in ratios:
        z_NC, r = z_NC + (r_next - r) * mean(z_NC, r), r_next
    return z_NC


def _heun(mean: Mean, z_NC: Tensor, ratios: list[float]) -> Tensor:
    r = 0.0
    for r_next in ratios:
        mean_NC = mean(z_NC, r)
        end_NC = mean(z_NC + (r_next - r) * mean_NC, r_next)
        z_NC, r = z_NC + 0.5 * (r_next - r) * (mean_NC + end_NC), r_next
    return z_NC


def _multistep(mean: Mean, z_NC: Tensor, ratios: list[float]) -> Tensor:
    r, mean_NC = 0.0, mean(z_NC, 0.0)
    target_NC = mean_NC
    for step, r_next in enumerate(ratios):
        if step:
            previous_NC, mean_NC = mean_NC, mean(z_NC, r)
            # Extrapolate half a step ahead; the step from r = 0 was infinite in log-SNR and does not count.
            target_NC = mean_NC + 0.5 * (mean_NC - previous_NC) if step > 1 else mean_NC
        z_NC, r = z_NC + (r_next - r) * target_NC, r_next
    return z_NC


_FIXED: Final[dict[str, tuple[Advance, int]]] = {"euler": (_euler, 1), "heun": (_heun, 2), "multistep": (_multistep, 1)}
"""How each walks the grid, and the evaluations it takes a step."""
