"""The closed form of the flow over a codebook (METHOD: "The flow over a codebook"; DD1, section 3.2).

Path ``x_t = (1 - t) eps + t q`` from noise (t = 0) to data (t = 1), with ``q`` one of V codes of probability p.
Everything below is exact. ``N`` counts independent tokens; memory is O(N V), never O(N V C).
"""

from __future__ import annotations

import torch
from torch import Tensor


def posterior_logits(x_NC: Tensor, t: float | Tensor, log_p_NV: Tensor, codebook_VC: Tensor) -> Tensor:
    """Unnormalised log of ``w_j ~ p_j exp(-|x - t c_j|^2 / (2 (1 - t)^2))``, shape (N, V).

    ``t`` is a number or a tensor (N,) in [0, 1). The term in ``|x|^2`` is the same for every code and left out,
    so one matrix product does the work. A code with ``log_p = -inf`` stays at ``-inf``.
    """
    t_N1 = _column(t, x_NC)
    half_norms_V = 0.5 * codebook_VC.square().sum(-1)
    snr_N1 = t_N1 / (1 - t_N1)
    inner_NV = (x_NC * (snr_N1 / (1 - t_N1))) @ codebook_VC.T
    return log_p_NV + inner_NV - snr_N1.square() * half_norms_V


def posterior_mean(x_NC: Tensor, t: float | Tensor, log_p_NV: Tensor, codebook_VC: Tensor) -> Tensor:
    """``m(x, t) = sum_j w_j c_j = E[q | x_t = x]``, shape (N, C)."""
    return posterior_logits(x_NC, t, log_p_NV, codebook_VC).softmax(-1) @ codebook_VC


def velocity(x_NC: Tensor, t: float | Tensor, log_p_NV: Tensor, codebook_VC: Tensor) -> Tensor:
    """``v(x, t) = (m(x, t) - x) / (1 - t)``, shape (N, C): the drift of the probability-flow ODE."""
    return (posterior_mean(x_NC, t, log_p_NV, codebook_VC) - x_NC) / (1 - _column(t, x_NC))


def score(x_NC: Tensor, t: float | Tensor, log_p_NV: Tensor, codebook_VC: Tensor) -> Tensor:
    """``s(x, t) = grad_x log p_t(x) = (t m(x, t) - x) / (1 - t)^2``, shape (N, C)."""
    t_N1 = _column(t, x_NC)
    return (t_N1 * posterior_mean(x_NC, t, log_p_NV, codebook_VC) - x_NC) / (1 - t_N1).square()


def _column(t: float | Tensor, x_NC: Tensor) -> Tensor:
    t = torch.as_tensor(t, dtype=x_NC.dtype, device=x_NC.device)
    return t.expand(len(x_NC))[:, None] if t.ndim == 0 else t[:, None]
